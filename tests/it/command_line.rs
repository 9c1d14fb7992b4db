//! The commands as a newcomer types them.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

use ringpush_testing::{Options, Server, Socket, clean, eventually, program};

fn ringpush(server: Option<&Server>, arguments: &[&str]) -> Command {
    let mut command = Command::new(program());
    clean(&mut command);
    if let Some(server) = server {
        command.env("RINGPUSH_DATA", server.directory.path());
    }
    command.args(arguments);
    command
}

fn output(command: &mut Command) -> (i32, String, String) {
    let Output { status, stdout, stderr } = command.stdin(Stdio::null()).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (status.code().unwrap(), text(stdout), text(stderr))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_is_printed_alone_and_opens_a_socket() {
    let server = Server::start().await;
    let (code, token, said) = output(&mut ringpush(Some(&server), &["token", "alice", "--ttl", "15m"]));
    assert_eq!((code, said.as_str()), (0, ""));
    assert_eq!(token.lines().count(), 1);
    let mut socket = Socket::open(&format!("ws://{}/v1/ws", server.at("push")), Some(token.trim())).await;
    assert_eq!(socket.expect("welcome").await["user"], "alice");
    for ttl in ["", "1", "0s", "91d", "1x", "-1h", "h"] {
        let (code, _, said) =
            output(&mut ringpush(Some(&server), &["token", "alice", &format!("--ttl={ttl}")]));
        assert_eq!(code, 64, "{ttl}: {said}");
        assert!(said.contains("--ttl"), "{said}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn published_lines_come_out_of_listen_in_order() {
    let server = Server::with(Options::nodes(3)).await;
    let mut listening = ringpush(Some(&server), &["listen", "alice"]);
    let mut listening = listening.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut out = BufReader::new(listening.stdout.take().unwrap());
    let mut said = BufReader::new(listening.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("caught up") {
        line.clear();
        assert!(said.read_line(&mut line).unwrap() > 0, "listen ended");
    }
    let (code, answer, _) =
        output(&mut ringpush(Some(&server), &["publish", "alice", r#"{"text":"hello"}"#]));
    assert_eq!(code, 0);
    // Options may stand anywhere, and a payload may be a negative number.
    let target = format!("http://{}", server.at("collect"));
    for words in
        [["publish", "carol", "-1", "--target", &target], ["publish", "carol", "--target", &target, "-1"]]
    {
        let (code, answer, said) = output(&mut ringpush(Some(&server), &words));
        assert_eq!(code, 0, "{words:?}: {said}");
        assert!(answer.contains("carol"), "{answer}");
    }
    let first = serde_json::from_str::<Value>(&answer).unwrap()["accepted"][0]["seq"].as_u64().unwrap();
    let mut many = ringpush(Some(&server), &["publish", "alice", "-"]);
    let mut many = many.stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut input = many.stdin.take().unwrap();
    for n in 0..2500 {
        writeln!(input, "{n}").unwrap();
    }
    writeln!(input, "not json\n").unwrap();
    drop(input);
    let mut told = String::new();
    many.stderr.take().unwrap().read_to_string(&mut told).unwrap();
    assert_eq!(many.wait().unwrap().code(), Some(1), "one line was no JSON");
    assert!(told.contains("line 2501 is not JSON") && told.contains("2500 published"), "{told}");
    let mut next = || {
        let mut line = String::new();
        out.read_line(&mut line).unwrap();
        serde_json::from_str::<Value>(&line).unwrap()
    };
    let message = next();
    assert_eq!((&message["seq"], &message["payload"]["text"]), (&json!(first), &json!("hello")));
    for n in 0..2500u64 {
        let message = next();
        assert_eq!((&message["seq"], &message["payload"]), (&json!(first + 1 + n), &json!(n)));
    }
    listening.kill().unwrap();
    listening.wait().unwrap();
    let since = (first + 2498).to_string();
    let mut rest = ringpush(Some(&server), &["listen", "alice", "--since", &since]);
    let mut rest = rest.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(rest.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(serde_json::from_str::<Value>(&line).unwrap()["payload"], 2498);
    rest.kill().unwrap();
    rest.wait().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_is_watched_on_the_command_line() {
    let server = Server::start().await;
    for args in [&["topic", "create", "match-7", "--delivery", "log"][..], &["topic", "create", "other"]] {
        assert_eq!(output(&mut ringpush(Some(&server), args)).0, 0);
    }
    let mut listening =
        ringpush(Some(&server), &["listen", "alice", "--watch", "match-7", "--watch", "other"]);
    let mut listening = listening.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    eventually("it is watched", async || server.get("/v1/topics/match-7").await.json()["online"] == json!(1))
        .await;
    output(&mut ringpush(Some(&server), &["publish", "--topic", "match-7", r#""goal""#]));
    let mut line = String::new();
    BufReader::new(listening.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let message: Value = serde_json::from_str(&line).unwrap();
    assert_eq!((&message["topic"], &message["payload"]), (&json!("match-7"), &json!("goal")));
    let mut said = BufReader::new(listening.stderr.take().unwrap()).lines();
    let refused = said.find(|line| line.as_ref().is_ok_and(|line| line.contains("unknown_topic")));
    assert!(refused.unwrap().unwrap().contains("other"));
    listening.kill().unwrap();
    listening.wait().unwrap();
    let (code, _, said) = output(&mut ringpush(Some(&server), &["listen", "alice", "--watch", "a b"]));
    assert_eq!(code, 64, "{said}");
    assert!(said.contains("--watch"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_ring_is_shown_with_a_users_owner() {
    let server = Server::with(Options::nodes(3)).await;
    let (code, shown, _) = output(&mut ringpush(Some(&server), &["ring"]));
    assert_eq!(code, 0);
    for word in ["epoch", "push-0", "push-1", "push-2", "active"] {
        assert!(shown.contains(word), "{shown}");
    }
    let (_, owner, _) = output(&mut ringpush(Some(&server), &["ring", "alice"]));
    let ring = ringpush::ring::Ring::build(["push-0", "push-1", "push-2"].map(|name| (name, 1.0)));
    assert_eq!(owner.trim(), ring.owner_of("alice").unwrap());
}

#[test]
fn wrong_usage_is_64_with_every_fault() {
    for arguments in [
        &["serv"][..],
        &["serve", "--push-nodes", "0"],
        &["serve", "--log", "xml"],
        &["token"],
        &["token", "a\u{7}"],
        &["listen", "alice", "--since", "soon"],
        &["listen", "alice", "--device", "no spaces", "--target", "http://127.0.0.1:1"],
        &["publish", "alice", "not json", "--target", "http://127.0.0.1:1"],
        &["publish", "alice", "1", "--target", "127.0.0.1:1"],
        &["serve", "--roles", "push"],
        &["serve", "--roles", "pusher"],
        &["serve", "--config", "/nowhere.toml"],
    ] {
        let place = tempfile::tempdir().unwrap();
        let (code, _, said) = output(ringpush(None, arguments).env("RINGPUSH_DATA", place.path()));
        assert_eq!(code, 64, "{arguments:?}: {said}");
        assert!(!said.contains("unexpected value"), "{arguments:?}: {said}");
        assert!(!said.is_empty());
    }
    let place = tempfile::tempdir().unwrap();
    let (code, _, said) = output(
        ringpush(None, &["serve"])
            .env("RINGPUSH_DATA", place.path())
            .env("RINGPUSH_PUSH__LISTN", "x")
            .env("RINGPUSH_PUSH__WEIGHT", "heavy")
            .env("RINGPUSH_PORT", "tcp://10.0.0.1:80"),
    );
    assert_eq!(code, 64);
    assert!(said.contains("push.listn") && said.contains("did you mean push.listen?"), "{said}");
    assert!(said.contains("push.weight"), "{said}");
    let (code, _, said) = output(ringpush(None, &["listen", "alice"]).env("RINGPUSH_DATA", place.path()));
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("no server runs on") && said.contains("--target"), "{said}");
    let mut incomplete = ringpush(None, &["serve"]);
    incomplete.env("RINGPUSH_DATA", place.path()).env("RINGPUSH_AUTH__MODE", "remote");
    let (code, _, said) = output(&mut incomplete);
    assert_eq!(code, 64, "{said}");
    assert!(said.contains("auth.url"), "{said}");
    let (code, shown, _) = output(&mut ringpush(None, &["--help"]));
    assert_eq!(code, 0);
    assert!(shown.contains("Examples:"), "{shown}");
}

#[test]
fn a_configuration_is_checked_and_shown_without_secrets() {
    let root = env!("CARGO_MANIFEST_DIR");
    let file = format!("{root}/config/cluster.toml");
    let (code, _, said) = output(&mut ringpush(None, &["config", "check", &file]));
    assert_eq!(code, 64);
    for key in ["auth.token_key", "auth.admin_key", "collect.api_keys", "peer.secret"] {
        assert!(said.contains(key), "{said}");
    }
    let mut complete = ringpush(None, &["config", "check", &file]);
    for (name, value) in [
        ("RINGPUSH_AUTH__TOKEN_KEY", "a-secret-of-more-than-32-bytes-in-length"),
        ("RINGPUSH_AUTH__ADMIN_KEY", "admin-secret-0123456789abcdef0123456789"),
        ("RINGPUSH_COLLECT__API_KEYS", "api-secret-0123456789abcdef0123456789"),
        ("RINGPUSH_PEER__SECRET", "peer-secret-0123456789abcdef0123456789"),
    ] {
        complete.env(name, value);
    }
    let (code, shown, said) = output(&mut complete);
    assert_eq!(code, 0, "{said}");
    assert!(
        shown.contains("[push]") && !shown.contains("secret-of") && !shown.contains("-secret-0"),
        "{shown}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_three_lines_that_are_printed_work_as_printed() {
    let data = tempfile::tempdir().unwrap();
    let mut serving = ringpush(None, &["serve", "--data", data.path().to_str().unwrap()]);
    for role in ["PUSH", "COLLECT", "AUTH", "DISPATCH", "OPS"] {
        serving.env(format!("RINGPUSH_{role}__LISTEN"), "127.0.0.1:0");
    }
    let mut serving = serving.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut out = BufReader::new(serving.stdout.take().unwrap()).lines();
    let mut line = |name: &str| loop {
        let line = out.next().expect("the greeting has it").unwrap();
        if let Some(rest) = line.trim().strip_prefix(name) {
            break rest.trim().to_owned();
        }
    };
    let sh = |line: &str| {
        let output = Command::new("sh").arg("-c").arg(line).output().unwrap();
        assert!(output.status.success(), "{line}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let page = line("page");
    assert!(sh(&format!("curl -sS {page}")).contains("<title>ringpush</title>"));
    let token = sh(&line("token"));
    let published = sh(&line("curl"));
    assert!(published.contains("\"accepted\""), "{published}");
    let (page, code) = page.split_once("?code=").expect("the page's code");
    assert!(code.len() > 20, "{code}");
    let url = format!("{}v1/ws", page.replace("http", "ws"));
    let mut socket = Socket::open(&url, Some(token.trim())).await;
    assert_eq!(socket.caught_up().await, [json!({"text": "hello"})]);
    serving.kill().unwrap();
    serving.wait().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn logs_are_json_where_asked_for_and_hold_no_token_and_no_payload() {
    let directory = std::sync::Arc::new(tempfile::tempdir().unwrap());
    let mut options = Options::default();
    options.environment.push(("RUST_LOG".to_owned(), "trace".to_owned()));
    let mut server = Server::on(directory, options).await;
    let token = server.token("alice").await;
    let mut socket = server.connect("alice", "").await;
    socket.caught_up().await;
    server.publish("alice", json!("a-payload-that-nobody-should-read")).await;
    socket.messages(1).await;
    assert_eq!(server.terminate().await, 0);
    let log = server.log();
    let key = server.key("api_key");
    for secret in [token.as_str(), "a-payload-that-nobody-should-read", &key] {
        let leak = log.lines().find(|line| line.contains(secret));
        assert_eq!(leak, None, "a secret is in the log");
    }
    let data = tempfile::tempdir().unwrap();
    let mut command = ringpush(None, &["serve", "--log", "json", "--data", data.path().to_str().unwrap()]);
    let mut child =
        command.env("RINGPUSH_PUSH__LISTEN", "127.0.0.1:0").env("RINGPUSH_OPS__LISTEN", "127.0.0.1:0");
    for role in ["COLLECT", "AUTH", "DISPATCH"] {
        child = child.env(format!("RINGPUSH_{role}__LISTEN"), "127.0.0.1:0");
    }
    let mut child = child.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stderr.take().unwrap()).read_line(&mut line).unwrap();
    assert!(serde_json::from_str::<Value>(&line).unwrap()["level"].is_string(), "{line}");
    child.kill().unwrap();
    child.wait().unwrap();
}

/// All the open files that the system grants, though the shell says fewer, and room for them in the
/// kernel's table at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_takes_all_the_files_that_it_is_granted() {
    let server = Server::start().await;
    let of = |file: &str, name: &str| {
        let text = std::fs::read_to_string(format!("/proc/{}/{file}", server.pid())).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    let limits = of("limits", "Max open files");
    assert_eq!(limits[0], limits[1], "soft and hard");
    let granted = limits[1].parse().unwrap_or(u64::MAX).min(65_536);
    let room: u64 = of("status", "FDSize:")[0].parse().unwrap();
    assert!(room >= granted, "{room} of {granted}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn topics_are_made_and_published_to() {
    let server = Server::start().await;
    let run = |words: &[&str]| output(&mut ringpush(Some(&server), words));
    let made = run(&["topic", "create", "news", "--ttl", "1h"]);
    assert!(made.0 == 0 && made.1.contains(r#""ttl_s":3600"#), "{made:?}");
    assert_eq!(run(&["topic", "add", "news", "alice", "bob"]).0, 0);
    assert_eq!(run(&["topic", "members", "news"]).1, "alice\nbob\n");
    assert_eq!(run(&["topic", "remove", "news", "bob"]).0, 0);
    assert_eq!(run(&["topic", "create", "team"]).0, 0);
    assert_eq!(run(&["topic", "list"]).1, "news\nteam\n");
    assert!(run(&["topic", "show", "news"]).1.contains(r#""members":1"#));
    let sent = run(&["publish", "--topic", "news", "1"]);
    assert!(sent.0 == 0 && sent.1.contains(r#""stored":1"#), "{sent:?}");
    let both = run(&["publish", "--topic", "news", "--topic", "team", "-7"]);
    assert!(both.0 == 0 && both.1.contains(r#""topic":"team","members":0"#), "{both:?}");
    let history = server.get("/v1/users/alice/messages").await.json();
    assert_eq!(
        (&history["messages"][0]["via"], &history["messages"][1]["payload"]),
        (&json!("news"), &json!(-7))
    );
    for (words, code, hint) in [
        (vec!["publish", "--topic", "new", "1"], 1, "did you mean news"),
        (vec!["publish", "--topic", "a b", "1"], 64, "--topic"),
        (vec!["publish", "--topic", "news", "alice", "1"], 64, "USER"),
        (vec!["publish", "1"], 64, "PAYLOAD"),
        (vec!["topic", "add", "news"], 64, "USERS"),
        (vec!["topic", "create", "news", "--ttl", "soon"], 64, "--ttl"),
        (vec!["topic", "members", "new"], 1, "did you mean news"),
    ] {
        let refused = run(&words);
        assert!(refused.0 == code && refused.2.contains(hint), "{words:?}: {refused:?}");
    }
    assert_eq!(run(&["topic", "delete", "news"]).0, 0);
    assert_eq!(run(&["topic", "list"]).1, "team\n");
}

/// The blocks of the README that post, run as they are printed, but for the port.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_readme_posts_reaches_a_user_and_a_group() {
    let server = Server::start().await;
    let readme = std::fs::read_to_string(ringpush_testing::root().join("README.md")).unwrap();
    let blocks = readme.split("```sh\n").skip(1).filter_map(|rest| rest.split("```").next());
    let script: String = blocks.filter(|block| block.contains("curl")).collect();
    assert!(script.contains("/v1/topics/news/members"), "{script}");
    assert!(script.contains("/v1/topics/city/members") && script.contains(r#""everyone":true"#), "{script}");
    let script = script
        .replace("127.0.0.1:8081", &server.at("collect"))
        .replace("data/dev-keys.toml", &server.directory.path().join("dev-keys.toml").display().to_string())
        .replace("curl ", "curl --silent --show-error --fail-with-body ");
    let mut bob = server.connect("bob", "").await;
    bob.caught_up().await;
    // A member of the topic, and somebody who is none; another member comes afterwards.
    let mut alice_reads = reads_logs(&server, "alice").await;
    let mut carol_reads = reads_logs(&server, "carol").await;
    let (code, said, wrong) = output(Command::new("bash").args(["-ec", &script]));
    assert_eq!(code, 0, "{said}\n{wrong}");
    assert!(said.contains(r#""topic":"news","members":2,"stored":2,"failed":[]"#), "{said}");
    assert_eq!(bob.until("message").await.1["payload"], json!({"text": "hello, all"}));
    let mut bob_reads = reads_logs(&server, "bob").await;
    for reads in [&mut alice_reads, &mut bob_reads] {
        assert_eq!(of_logs(reads).await, ["hello, city", "hello, world"]);
    }
    assert_eq!(carol_reads.until("message").await.1["everyone"], true);
    let alice = server.get("/v1/users/alice/messages").await.json();
    let texts: Vec<&Value> =
        alice["messages"].as_array().unwrap().iter().map(|message| &message["payload"]["text"]).collect();
    assert_eq!(texts, [&json!("hello"), &json!("hello, all")]);
}

/// A socket of a device that reads logs.
async fn reads_logs(server: &Server, user: &str) -> Socket {
    let mut socket = server.connect(user, "?device=reads&topics=auth").await;
    socket.say(&json!({"type": "auth", "topics": true})).await;
    socket.expect("welcome").await;
    socket
}

/// The texts of the next message of a topic's log and of the next one to everyone, in whichever
/// order they come.
async fn of_logs(socket: &mut Socket) -> [Value; 2] {
    let mut found = [Value::Null, Value::Null];
    while found.contains(&Value::Null) {
        let message = socket.until("message").await.1;
        for (kind, found) in ["topic", "everyone"].iter().zip(&mut found) {
            if message.get(kind).is_some() {
                *found = message["payload"]["text"].clone();
            }
        }
    }
    found
}
