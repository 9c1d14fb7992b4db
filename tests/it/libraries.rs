//! The client libraries: the transcripts, their packages, and what their README promises against
//! the real server.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::json;

use ringpush_testing::examples::{Language, Program, built};
use ringpush_testing::{Options, Server, eventually, http, root, tool};

fn node() -> Command {
    let mut command = Command::new("node");
    command.current_dir(root()).env("RINGPUSH_WS", tool("node_modules").parent().unwrap());
    command
}

fn python() -> PathBuf {
    tool("venv/bin/python")
}

/// Runs a command to its end, which must be a success; returns what it printed.
fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{command:?}\n{said}{}", String::from_utf8_lossy(&output.stderr));
    said
}

fn transcripts(testee: &[&std::ffi::OsStr]) {
    let said = run(node()
        .args(["clients/conformance/run.mjs", "--ws"])
        .arg(tool("node_modules").parent().unwrap())
        .arg("--")
        .args(testee));
    let passed = said.lines().filter(|line| line.starts_with("ok ")).count();
    assert!(passed >= 25, "at least 25 transcripts: {said}");
}

#[test]
fn the_javascript_library_passes_every_transcript() {
    transcripts(&["node".as_ref(), "clients/javascript/testee.mjs".as_ref()]);
}

#[test]
fn the_python_library_passes_every_transcript() {
    transcripts(&[python().as_os_str(), "clients/python/testee.py".as_ref()]);
}

#[test]
fn the_rust_library_passes_every_transcript() {
    transcripts(&[built("testee").as_os_str()]);
}

/// Rules of the library's queue that no transcript can see.
#[test]
fn the_javascript_library_passes_its_own_tests() {
    let said = run(node().args(["--test", "clients/javascript/test/pump.test.mjs"]));
    assert!(said.contains("# fail 0") && !said.contains("# pass 0"), "{said}");
}

/// `esbuild --bundle --minify | gzip -9`: at most 10.5 KiB, with everything. It was 9 KiB before
/// the logs of topics and watching, which are 1.3 KiB.
#[test]
fn the_javascript_library_stays_small() {
    let directory = tempfile::tempdir().unwrap();
    let bundled = directory.path().join("bundled.js");
    let mut bundle = Command::new(tool("node_modules/.bin/esbuild"));
    bundle.args(["src/index.js", "--bundle", "--minify", "--format=esm"]);
    bundle.arg(format!("--outfile={}", bundled.display()));
    run(bundle.current_dir(root().join("clients/javascript")));
    let zipped = Command::new("gzip").arg("-9c").arg(&bundled).output().unwrap();
    let size = zipped.stdout.len();
    assert!((1_000..=10_752).contains(&size), "{size} bytes");
}

#[test]
fn the_types_and_the_packages_are_clean() {
    for package in ["clients/javascript", "clients/server-javascript"] {
        let package = root().join(package);
        let mut types = Command::new(tool("node_modules/.bin/tsc"));
        run(types.args(["-p", "test/tsconfig.json"]).current_dir(&package));
        let mut lint = Command::new(tool("node_modules/.bin/publint"));
        run(lint.args(["--strict", "."]).current_dir(&package));
        let packed = tempfile::tempdir().unwrap();
        let mut pack = Command::new("npm");
        pack.args(["pack", "--silent", "--pack-destination"]).arg(packed.path()).current_dir(&package);
        let tarball = packed.path().join(run(&mut pack).trim());
        let mut check = Command::new(tool("node_modules/.bin/attw"));
        let said = run(check.args(["--profile", "esm-only", "--format", "ascii"]).arg(tarball));
        assert!(said.contains("(ESM)"), "{said}");
    }
    run(Command::new(python()).args(["-m", "mypy", "--strict", "clients/python/src"]).current_dir(root()));
}

/// Built, and installed into an empty project, each does what its README says.
#[test]
fn the_packages_install_into_empty_projects() {
    let empty = tempfile::tempdir().unwrap();
    let packed = run(Command::new("npm")
        .args(["pack", "--silent", "--pack-destination"])
        .arg(empty.path())
        .current_dir(root().join("clients/javascript")));
    let package = empty.path().join(packed.trim());
    std::fs::write(empty.path().join("package.json"), r#"{"type":"module"}"#).unwrap();
    let mut install = Command::new("npm");
    install.args(["install", "--silent", "--offline", "--no-audit", "--no-fund"]).arg(&package);
    run(install.current_dir(empty.path()));
    let script =
        "import { connect, Refused } from '@ringpush/client'; console.log(typeof connect, typeof Refused)";
    let mut import = Command::new("node");
    import.args(["--input-type=module", "-e", script]).current_dir(empty.path());
    assert_eq!(run(&mut import).trim(), "function function");

    let build = ["-m", "build", "--no-isolation", "--outdir"];
    run(Command::new(python()).args(build).arg(empty.path()).arg("clients/python").current_dir(root()));
    let wheel = empty.path().join("ringpush-0.1.0-py3-none-any.whl");
    let site = empty.path().join("site");
    let pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target"];
    run(Command::new(python()).args(pip).arg(&site).arg(&wheel));
    let import = "import ringpush; print(ringpush.__version__)";
    let mut command = Command::new(python());
    assert_eq!(run(command.args(["-c", import]).env("PYTHONPATH", &site)).trim(), "0.1.0");
}

/// The example of the package that publishes, as printed; then a refusal, and a publish while the
/// server is away.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_publishing_package_stores_once_through_a_restart() {
    const BEGIN: &str = "import { Ringpush, PublishError } from '@ringpush/server';\n\
         const ringpush = new Ringpush({ url: process.env.RINGPUSH_COLLECT, key: process.env.RINGPUSH_KEY });\n";
    let server = Server::start().await;
    let mut server = server.kill_and_restart().await;
    let directory = tempfile::tempdir().unwrap();
    let scope = directory.path().join("node_modules/@ringpush");
    std::fs::create_dir_all(&scope).unwrap();
    let package = root().join("clients/server-javascript").canonicalize().unwrap();
    std::os::unix::fs::symlink(&package, scope.join("server")).unwrap();
    let text = std::fs::read_to_string(package.join("README.md")).unwrap();
    let (_, rest) = text.split_once("```js\n").unwrap();
    let (example, _) = rest.split_once("```").unwrap();
    let (collect, key) = (format!("http://{}", server.at("collect")), server.key("api_key"));
    let node = |script: &str| {
        let path = directory.path().join("script.mjs");
        std::fs::write(&path, script).unwrap();
        let mut command = Command::new("node");
        command.arg(path).env("RINGPUSH_COLLECT", &collect).env("RINGPUSH_KEY", &key);
        command
    };
    assert_eq!(run(&mut node(example)).trim(), "alice false");
    let refused = "const many = await ringpush.publishMany([{ to: 'bob', payload: 1 }, { to: '', payload: 2 }]);\n\
         try { await ringpush.publish('bob', 1, { event: 'with space' }); }\n\
         catch (error) { console.log(error instanceof PublishError, error.status, error.problem.errors[0].pointer, \
         many[0].accepted[0].user, many[1].error.status); }";
    assert_eq!(run(&mut node(&format!("{BEGIN}{refused}"))).trim(), "true 422 /event bob 422");
    let topics = "const { created_at } = await ringpush.createTopic('news', { ttl_s: 60 });\n\
         const { added } = await ringpush.changeMembers('news', { add: ['dave', 'erin'] });\n\
         const { accepted: [one] } = await ringpush.publish({ topic: 'news', except: ['erin'] }, 3);\n\
         const { members } = await ringpush.members('news', { limit: 1 });\n\
         await ringpush.deleteTopic('news');\n\
         const gone = await ringpush.topic('news').catch((error) => error.status);\n\
         console.log(created_at.length, added, one.stored, members[0], gone);";
    assert_eq!(run(&mut node(&format!("{BEGIN}{topics}"))).trim(), "24 2 1 dave 404");
    let logs = "const { delivery } = await ringpush.createTopic('feed', { delivery: 'log' });\n\
         await ringpush.changeMembers('feed', { add: ['dave'] });\n\
         const { accepted: [one] } = await ringpush.publish({ topic: 'feed' }, 'log', { id: 'f-1' });\n\
         const { accepted: [again] } = await ringpush.publish({ topic: 'feed' }, 'log', { id: 'f-1' });\n\
         const { accepted: [all] } = await ringpush.publish({ everyone: true }, 'all');\n\
         const { messages: [stored] } = await ringpush.topicHistory('feed', { after: one.seq - 1 });\n\
         const { messages: [newest] } = await ringpush.everyoneHistory({ before: all.seq + 1, limit: 1 });\n\
         const names = async (page) => (await page).topics.map(({ topic }) => topic).join();\n\
         console.log(delivery, again.seq === one.seq, again.duplicate, stored.topic, stored.payload, newest.everyone, newest.payload);\n\
         console.log(await names(ringpush.topics({ limit: 5 })), await names(ringpush.topicsOf('dave')));\n\
         const { accepted: [own] } = await ringpush.publish('dave', 1, { id: 'd-1' });\n\
         console.log((await ringpush.status('dave', 'd-1')).state, (await ringpush.status('dave', own.seq)).id);\n\
         await ringpush.endMessage('feed', one.seq);\n\
         await ringpush.leaveTopics('dave');\n\
         await ringpush.forget('dave');\n\
         console.log((await ringpush.topicHistory('feed')).messages.length, (await ringpush.topic('feed')).members);";
    assert_eq!(
        run(&mut node(&format!("{BEGIN}{logs}"))).trim(),
        "log true true feed log true all\nfeed feed\nwaiting d-1\n0 0"
    );
    let later = "const { accepted } = await ringpush.publish('carol', 'through');\n\
         console.log(accepted[0].user, accepted[0].duplicate);";
    server.kill();
    let publishing = node(&format!("{BEGIN}{later}")).stdout(Stdio::piped()).spawn().unwrap();
    let server = server.kill_and_restart().await;
    let output = tokio::task::spawn_blocking(move || publishing.wait_with_output()).await.unwrap().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "carol false");
    let stored = server.get("/v1/users/carol/messages").await.json();
    assert_eq!(stored["messages"].as_array().map(Vec::len), Some(1));
}

/// Both publishers of the Python library: an outcome for each recipient, a refusal with its
/// problem, and a publish while the server is away.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_python_publishers_store_once_through_a_restart() {
    const SCRIPT: &str = r#"
import asyncio, os, ringpush

url, key = os.environ["RINGPUSH_COLLECT"], os.environ["RINGPUSH_KEY"]
if os.environ["RINGPUSH_STEP"] == "ways":
    with ringpush.SyncPublisher(url, key) as publisher:
        outcomes = publisher.publish(["alice", "bob"], {"n": 1}, event="order.paid", id="order-1")
        print([(one.user, one.duplicate, one.error) for one in outcomes])
        print(publisher.publish("alice", {"n": 1}, event="order.paid", id="order-1")[0].duplicate)
        [topic] = publisher.publish_topic("news", 1, exclude=["bob"])
        print(topic.topic, topic.members, topic.stored, topic.failed, topic.error)
        for _ in range(2):
            [log] = publisher.publish_topic("feed", 1, id="f-1")
            print(log.topic, log.seq > 0, log.duplicate, log.members, log.failed, log.error)
        everyone = publisher.publish_everyone(1, exclude=["bob"])
        print(everyone.topic, everyone.seq > 0, everyone.duplicate)
        try:
            publisher.publish("alice", {"n": 2}, event="with space")
        except ringpush.PublishFailed as failed:
            print(failed.status, failed.problem["errors"][0]["pointer"])
else:
    async def main():
        async with ringpush.Publisher(url, key) as publisher:
            print((await publisher.publish("carol", "through"))[0].duplicate, (await publisher.publish_everyone(2)).seq > 0)
    asyncio.run(main())
"#;
    let server = Server::start().await;
    let mut server = server.kill_and_restart().await;
    let (collect, key) = (format!("http://{}", server.at("collect")), server.key("api_key"));
    let script = |step: &str| {
        let mut command = Command::new(python());
        command.args(["-c", SCRIPT]).env("PYTHONPATH", root().join("clients/python/src"));
        command.env("RINGPUSH_COLLECT", &collect).env("RINGPUSH_KEY", &key).env("RINGPUSH_STEP", step);
        command
    };
    server.put("/v1/topics/news", &serde_json::json!({})).await;
    let members = serde_json::json!({"add": ["alice", "bob"]});
    server.send("POST", "/v1/topics/news/members", &members).await;
    server.put("/v1/topics/feed", &serde_json::json!({"delivery": "log"})).await;
    let said = run(&mut script("ways"));
    let expected = "[('alice', False, None), ('bob', False, None)]\nTrue\nnews 1 1 [] None\n\
        feed True False 0 [] None\nfeed True True 0 [] None\neveryone True False\n422 /event";
    assert_eq!(said.trim(), expected);
    server.kill();
    let publishing = script("away").stdout(Stdio::piped()).spawn().unwrap();
    let server = server.kill_and_restart().await;
    let output = tokio::task::spawn_blocking(move || publishing.wait_with_output()).await.unwrap().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "False True");
    let stored = server.get("/v1/users/carol/messages").await.json();
    assert_eq!(stored["messages"].as_array().map(Vec::len), Some(1));
}

/// A `Retry-After` of a hostile or broken server is bounded.
#[test]
fn the_python_library_believes_no_retry_after_without_end() {
    let check = "from ringpush._errors import retry_after_s as seconds\n\
         assert [seconds(text) for text in (None, '', '7', '9' * 400, 'tomorrow')] == [0, 0, 7, 86400, 0]";
    let mut command = Command::new(python());
    run(command.args(["-c", check]).env("PYTHONPATH", root().join("clients/python/src")));
}

/// The example of the README, as it stands there: it receives, and survives a restart of the
/// server.
async fn the_example_works(language: Language) {
    let server = Server::with(Options::default().with("limits.reconnect_jitter_ms", "100")).await;
    let mut server = server.kill_and_restart().await;
    server.publish("alice", json!("before")).await;
    let url = format!("http://{}", server.at("push"));
    let mut program = Program::example(language, &url, &server.token("alice").await, "alice");
    assert_eq!(program.line(), "before");
    server.publish_all("alice", (0..50).map(|n| json!(n))).await;
    for n in 0..50 {
        assert_eq!(program.line(), n.to_string());
    }
    server = server.kill_and_restart().await;
    let seqs = server.publish_all("alice", (50..100).map(|n| json!(n))).await;
    for n in 50..100 {
        assert_eq!(program.line(), n.to_string(), "it went on where it was");
    }
    // The last message is handled when the loop asks for the next one.
    eventually("its acks", async || {
        server.get("/v1/users/alice").await.json()["devices"][0]["acked"] == seqs[49]
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_python_example_works_as_printed() {
    the_example_works(Language::Python).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_javascript_example_works_as_printed() {
    the_example_works(Language::JavaScript).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_rust_example_works_as_printed() {
    let shown = |readme: &str| {
        let text = std::fs::read_to_string(root().join(readme)).unwrap();
        let (_, rest) = text.split_once("```rust").expect("an example");
        let (_, example) = rest.split_once('\n').unwrap();
        example.split_once("```").unwrap().0.to_owned()
    };
    let example = std::fs::read_to_string(root().join("crates/client/examples/readme.rs")).unwrap();
    for readme in ["README.md", "crates/client/README.md"] {
        assert!(example.ends_with(&shown(readme)), "{readme} shows another program than examples/readme.rs");
    }
    the_example_works(Language::Rust).await;
}

/// The Python library reads the inbox, a topic's log and what goes to everyone, each by its own
/// numbers, and goes on in each where it was.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_python_library_reads_logs_and_goes_on_where_it_was() {
    const READER: &str = r#"
import asyncio, json, os, sys, ringpush
async def main(count):
    async with ringpush.connect(os.environ["RINGPUSH_URL"], token=os.environ["RINGPUSH_TOKEN"], device="py") as inbox:
        async for message in inbox:
            print(json.dumps([message.topic, message.in_log, message.seq, message.payload]), flush=True)
            count -= 1
            if count == 0:
                break
asyncio.run(main(int(sys.argv[1])))
"#;
    let server = Server::start().await;
    assert_eq!(server.put("/v1/topics/news", &json!({"delivery": "log"})).await.status, 201);
    let added = server.send("POST", "/v1/topics/news/members", &json!({"add": ["alice"]})).await;
    assert_eq!(added.status, 202, "{added:?}");
    let (url, token) = (format!("http://{}", server.at("push")), server.token("alice").await);
    let reads = |count: usize| {
        let mut command = Command::new(python());
        command.args(["-c", READER, &count.to_string()]);
        command.env("PYTHONPATH", root().join("clients/python/src"));
        command.env("RINGPUSH_URL", &url).env("RINGPUSH_TOKEN", &token);
        let said = run(&mut command);
        let mut lines: Vec<serde_json::Value> =
            said.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        lines.sort_by_key(|line| line[0].to_string());
        lines
    };
    let publish = async |to: serde_json::Value, payload: &str| {
        let sent = server.try_publish(&json!({"to": to, "payload": payload})).await;
        assert_eq!(sent.status, 202, "{sent:?}");
        sent.json()["accepted"][0]["seq"].clone()
    };
    let news = publish(json!({"topic": "news"}), "of the topic").await;
    let own = publish(json!({"user": "alice"}), "of the inbox").await;
    let all = publish(json!({"everyone": true}), "of all").await;
    let expected = [
        json!(["everyone", true, all, "of all"]),
        json!(["news", true, news, "of the topic"]),
        json!([null, false, own, "of the inbox"]),
    ];
    assert_eq!(reads(3), expected);
    let later = [publish(json!({"topic": "news"}), "1").await, publish(json!({"topic": "news"}), "2").await];
    assert_eq!(reads(2), [json!(["news", true, later[0], "1"]), json!(["news", true, later[1], "2"])]);
    let all = publish(json!({"everyone": true}), "3").await;
    assert_eq!(reads(1), [json!(["everyone", true, all, "3"])]);
}

/// The example of a worker, killed in the middle of its work three times: each order is shipped
/// once, and what is no order is passed over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_example_of_a_worker_handles_each_message_once_through_kills() {
    let server = Server::start().await;
    let directory = tempfile::tempdir().unwrap();
    let database = directory.path().join("orders.db");
    let token = server.token("warehouse").await;
    let url = format!("http://{}", server.at("push"));
    let start = || {
        let mut command = Command::new(python());
        command.arg(root().join("examples/worker/worker.py")).arg(&database);
        command.env("PYTHONPATH", root().join("clients/python/src"));
        command.env("RINGPUSH_URL", &url).env("RINGPUSH_TOKEN", &token);
        Program::start(command.stderr(Stdio::null()))
    };
    let orders = (1..=200).map(|n| json!({"order": n, "items": 2}));
    let payloads = std::iter::once(json!("no order")).chain(orders).collect::<Vec<_>>();
    server.publish_all("warehouse", payloads.into_iter()).await;
    for until in [40, 80, 120] {
        let mut worker = start();
        while !worker.line().contains(&format!("order {until}:")) {}
    }
    let mut worker = start();
    while !worker.line().contains("order 200:") {}
    drop(worker);
    let count = "import sqlite3, sys; \
         print(sqlite3.connect(sys.argv[1]).execute('SELECT count(*), count(DISTINCT customer_order) FROM shipment').fetchone())";
    assert_eq!(run(Command::new(python()).args(["-c", count]).arg(&database)).trim(), "(200, 200)");
}

/// The example of a service that publishes: an order that is sent twice is told once, and a bad one
/// is refused.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_example_of_a_publisher_tells_each_order_once() {
    let server = Server::start().await;
    let directory = tempfile::tempdir().unwrap();
    let scope = directory.path().join("node_modules/@ringpush");
    std::fs::create_dir_all(&scope).unwrap();
    let package = root().join("clients/server-javascript").canonicalize().unwrap();
    std::os::unix::fs::symlink(package, scope.join("server")).unwrap();
    let script = directory.path().join("service.mjs");
    std::fs::copy(root().join("examples/publisher/service.mjs"), &script).unwrap();
    let mut command = Command::new("node");
    command.arg(&script).env("PORT", "0").env("RINGPUSH_API_KEY", server.key("api_key"));
    command.env("RINGPUSH_COLLECT", format!("http://{}", server.at("collect")));
    let mut service = Program::start(&mut command);
    let at = service.line().trim_start_matches("http://").to_owned();
    let order = async |body: &str| http::request(&at, "POST", "/orders", None, &[], body.as_bytes()).await;
    for _ in 0..2 {
        let answer = order(r#"{"order":17,"customer":"alice","items":3}"#).await;
        assert_eq!((answer.status, answer.json()), (202, json!({"order": 17})));
    }
    assert_eq!(order(r#"{"order":17,"customer":"alice","items":4}"#).await.status, 409);
    for bad in ["{", r#"{"order":"x"}"#, r#"{"order":18,"customer":"","items":3}"#] {
        assert_eq!(order(bad).await.status, 400, "{bad}");
    }
    for user in ["alice", "warehouse"] {
        let stored = server.get(&format!("/v1/users/{user}/messages")).await.json();
        assert_eq!(stored["messages"].as_array().map(Vec::len), Some(1), "{user}: {stored}");
    }
}
