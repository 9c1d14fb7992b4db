//! Processes that share a registry and should not, or not yet: another secret, an address that
//! leads elsewhere, another store; and what any program may have written there.

use std::time::Duration;

use serde_json::{Value, json};

use ringpush_testing::foreign::{Foreign, ReplicaSet, free_port, redis, redis_cli};
use ringpush_testing::{DEADLINE, Options, Server, clean, eventually, http, program};

fn url(redis: &Foreign) -> String {
    format!("redis://127.0.0.1:{}", redis.port)
}

/// A process that is not expected to become ready; killed when it is dropped.
struct Waiting {
    directory: tempfile::TempDir,
    child: std::process::Child,
    ops: String,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- the other said:\n{}", self.log());
        }
    }
}

impl Waiting {
    /// With these settings over those of a registered server, and without its own store.
    fn start(redis: &Foreign, settings: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let ops = format!("127.0.0.1:{}", free_port());
        let mut options = Options::registered_in(&url(redis)).with("ops.listen", &ops);
        for (key, value) in settings {
            options = options.with(key, value);
        }
        let child = ringpush_testing::command(directory.path(), &options).spawn().unwrap();
        Self { directory, child, ops }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    async fn readiness(&self) -> (u16, Value) {
        // It listens there before anything else.
        let up = async || tokio::net::TcpStream::connect(&self.ops).await.is_ok();
        eventually("its ops port", up).await;
        let answer = http::get(&self.ops, "/readyz", None).await;
        (answer.status, answer.json())
    }
}

async fn nodes_of(server: &Server) -> Vec<String> {
    let view = http::get(&server.at("ops"), "/cluster", None).await.json();
    let nodes = view["nodes"].as_array().unwrap();
    nodes.iter().map(|node| node["node"].as_str().unwrap().to_owned()).collect()
}

fn warns(log: &str, words: &[&str]) -> bool {
    log.lines().any(|line| line.contains("WARN") && words.iter().all(|word| line.contains(word)))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_with_another_secret_takes_no_users_and_both_sides_say_so() {
    let (redis, set) = (redis(&[]).await, ReplicaSet::start(1).await);
    let server = Server::with(Options::registered_in(&url(&redis)).with("mongo.uri", &set.uri())).await;
    let other = Waiting::start(
        &redis,
        &[
            ("node.name", "push-1"),
            ("mongo.uri", &set.uri()),
            ("peer.secret", "another-secret-of-the-tests-0123456789abcdef"),
        ],
    );
    eventually("the odd one says so", async || warns(&other.log(), &["peer.secret"])).await;
    eventually("the others say so", async || warns(&server.log(), &["push-1", "peer.secret"])).await;
    let (status, shown) = other.readiness().await;
    assert_eq!(status, 503, "{shown}");
    let detail = shown["conditions"]["peers"]["detail"].as_str().unwrap();
    assert!(detail.contains("peer.secret"), "{shown}");
    assert_eq!(nodes_of(&server).await, ["push-0"]);
    assert_eq!(server.metric("ringpush_peers_unreached").await, 1.0);
    assert_eq!(http::get(&server.at("ops"), "/readyz", None).await.status, 200);
    server.publish_as("alice", ringpush_testing::API_KEY).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_whose_address_leads_elsewhere_takes_no_users_and_both_sides_say_so() {
    let (redis, set) = (redis(&[]).await, ReplicaSet::start(1).await);
    let mongo = set.uri();
    let server = Server::with(Options::registered_in(&url(&redis)).with("mongo.uri", &mongo)).await;
    let peer = server.at("peer");
    // Takes connections, and never says a word.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent = silent.local_addr().unwrap();
    let closed = format!("127.0.0.1:{}", free_port());
    for (kind, advertised) in [
        ("nobody listens", closed),
        ("nobody answers", silent.to_string()),
        ("another node", peer),
        ("no peer port", server.at("ops")),
        ("no such host", "nobody.invalid:7070".to_owned()),
    ] {
        for roles in ["push,collect,dispatch,auth", "dispatch"] {
            let settings = [
                ("node.name", "push-1"),
                ("node.roles", roles),
                ("mongo.uri", mongo.as_str()),
                ("peer.advertise", advertised.as_str()),
            ];
            let other = Waiting::start(&redis, &settings);
            eventually(kind, async || warns(&other.log(), &["peer.advertise"])).await;
            let told = async || warns(&server.log(), &["push-1", &advertised, "peer.advertise"]);
            eventually(kind, told).await;
            let (status, shown) = other.readiness().await;
            assert_eq!(status, 503, "{kind}, {roles}: {shown}");
            assert_eq!(shown["conditions"]["peers"]["ok"], false, "{kind}, {roles}: {shown}");
            assert_eq!(nodes_of(&server).await, ["push-0"], "{kind}, {roles}");
            drop(other);
            redis_cli(redis.port, &["zrem", "{ringpush}:nodes", "push-1"]);
        }
    }
    // One whose address is right comes in.
    let settings = [("node.name", "push-1"), ("mongo.uri", mongo.as_str())];
    let good = Waiting::start(&redis, &settings);
    eventually("two nodes", async || nodes_of(&server).await == ["push-0", "push-1"]).await;
    eventually("the second is ready", async || good.readiness().await.0 == 200).await;
}

/// Passes on what comes to a port of its own, until it is dropped.
struct Passage {
    address: String,
    task: tokio::task::JoinHandle<()>,
}

impl Passage {
    async fn to(address: String) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let own = listener.local_addr().unwrap().to_string();
        let task = tokio::spawn(async move {
            let mut links = tokio::task::JoinSet::new();
            while let Ok((mut from, _)) = listener.accept().await {
                let Ok(mut to) = tokio::net::TcpStream::connect(&address).await else { continue };
                links.spawn(async move { tokio::io::copy_bidirectional(&mut from, &mut to).await });
            }
        });
        Self { address: own, task }
    }
}

impl Drop for Passage {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Alone it proves its address to itself. Whether others understand that address shows when there
/// are some.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_node_proved_alone_counts_until_there_is_another() {
    let (redis, set) = (redis(&[]).await, ReplicaSet::start(1).await);
    let mongo = set.uri();
    for leads in [true, false] {
        let port = format!("127.0.0.1:{}", free_port());
        let passage = Passage::to(port.clone()).await;
        let options = Options::registered_in(&url(&redis))
            .with("mongo.uri", &mongo)
            .with("peer.listen", &port)
            .with("peer.advertise", &passage.address);
        let server = Server::with(options).await;
        assert_eq!(nodes_of(&server).await, ["push-0"]);
        let passage = leads.then_some(passage);
        let settings = [("node.name", "push-1"), ("mongo.uri", mongo.as_str())];
        let other = Waiting::start(&redis, &settings);
        let shown = async || http::get(&other.ops, "/cluster", None).await.json().to_string();
        eventually("the second is ready", async || other.readiness().await.0 == 200).await;
        if leads {
            eventually("two nodes", async || nodes_of(&server).await == ["push-0", "push-1"]).await;
            eventually("it is reached anew", async || !shown().await.contains("candidate")).await;
            assert_eq!(http::get(&server.at("ops"), "/readyz", None).await.status, 200);
            assert!(!warns(&server.log(), &["peer.advertise"]), "{}", server.log());
        } else {
            eventually("the first says so", async || warns(&server.log(), &["peer.advertise"])).await;
            let told = async || warns(&other.log(), &["push-0", "peer.advertise"]);
            eventually("the second says so", told).await;
            let odd = async || http::get(&server.at("ops"), "/readyz", None).await.status == 503;
            eventually("the first is not ready", odd).await;
            let out = async || nodes_of(&server).await == ["push-1"];
            eventually("the first is in nobody's ring", out).await;
        }
        drop((server, other, passage));
        redis_cli(redis.port, &["flushall"]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_clusters_under_one_prefix_do_not_mix() {
    let redis = redis(&[]).await;
    // Each has an embedded store of its own.
    let server = Server::with(Options::registered_in(&url(&redis))).await;
    let (code, said) =
        crate::cluster::started(&[("REDIS__URL", &url(&redis)), ("NODE__NAME", "push-1")]).await;
    assert_eq!(code, Some(64), "{said}");
    for word in ["redis.prefix", "mongo.uri", "mongo.database", "push-0"] {
        assert!(said.contains(word), "{word}: {said}");
    }
    // Nor does one that has the same name: it would close the other's sessions.
    let mut alice = server.connect("alice", "").await;
    alice.caught_up().await;
    let (code, said) =
        crate::cluster::started(&[("REDIS__URL", &url(&redis)), ("NODE__NAME", "push-0")]).await;
    assert!(code == Some(64) && said.contains("redis.prefix"), "{code:?} {said}");
    server.publish("alice", json!(1)).await;
    alice.messages(1).await;
    let other = Server::with(
        Options::registered_in(&url(&redis)).with("redis.prefix", "other").with("node.name", "push-1"),
    )
    .await;
    assert_eq!(
        (nodes_of(&server).await, nodes_of(&other).await),
        (vec!["push-0".into()], vec!["push-1".into()])
    );
    // The identity is kept in the store: the same one comes back as itself.
    let server = server.kill_and_restart().await;
    assert_eq!(nodes_of(&server).await, ["push-0"]);
}

/// A process dies with its cluster, and one of another name comes while the lease of the dead one
/// runs: it is alone, though it has seen another, and takes users.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_comes_after_all_others_have_died_takes_users() {
    let redis = redis(&[]).await;
    let mut server = Server::with(Options::registered_in(&url(&redis))).await;
    server.kill();
    let directory = std::sync::Arc::clone(&server.directory);
    let options = Options::registered_in(&url(&redis)).with("node.name", "push-1");
    let server = Server::on(directory, options).await;
    let ready = async || http::get(&server.at("ops"), "/readyz", None).await.status == 200;
    let began = std::time::Instant::now();
    // A lease, and what a view is held for.
    while !ready().await {
        assert!(began.elapsed() < Duration::from_secs(60), "it never became ready");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    eventually("it is in the view", async || nodes_of(&server).await == ["push-1"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rubbish_in_redis_ends_nobody() {
    let redis = redis(&[]).await;
    let server = Server::with(Options::registered_in(&url(&redis))).await;
    let cli = |words: &[&str]| redis_cli(redis.port, words);
    let long = "x".repeat(100_000);
    let infos = [
        r#"{"weight":1e308,"accept_per_s":1,"peer":"127.0.0.1:1","push":true,"dispatch":true,"draining":false,"reached":true}"#,
        r#"{"weight":100000}"#,
        "{",
        "\u{ff}",
        &long,
        "[[[[[[",
        "null",
    ];
    for (n, info) in infos.iter().enumerate() {
        for name in [format!("push-{}", n + 1), format!("Bad Name {n}"), String::new()] {
            cli(&["zadd", "{ringpush}:nodes", "99999999999999", &name]);
            cli(&["hset", "{ringpush}:info", &name, info]);
            cli(&["hset", "{ringpush}:incarnations", &name, "1e300"]);
            cli(&["hset", "{ringpush}:counts", &name, "-1 9e99 x"]);
        }
    }
    for n in 0..3_000 {
        cli(&["zadd", "{ringpush}:nodes", "99999999999999", &format!("many-{n}")]);
        if n % 500 == 0 {
            assert_eq!(nodes_of(&server).await, ["push-0"]);
        }
    }
    cli(&["hset", "{ringpush}:meta", "epoch", "1e300"]);
    eventually("it is told", async || warns(&server.log(), &["push-1", "peer.secret"])).await;
    server.publish_as("alice", ringpush_testing::API_KEY).await;
    let text = http::get(&server.at("ops"), "/cluster", None).await;
    assert_eq!(text.status, 200);
    assert_eq!(nodes_of(&server).await, ["push-0"]);
    for (key, kind) in [("nodes", "string"), ("info", "list"), ("meta", "string")] {
        let key = format!("{{ringpush}}:{key}");
        cli(&["del", &key]);
        cli(&if kind == "list" { ["lpush", &key, "x"] } else { ["set", &key, "x"] });
    }
    eventually("Redis' own words", async || warns(&server.log(), &["WRONGTYPE", "redis.url"])).await;
    assert_eq!(nodes_of(&server).await, ["push-0"], "the view is held");
    server.publish_as("alice", ringpush_testing::API_KEY).await;
    cli(&["flushall"]);
    eventually("all is as before", async || {
        let view = http::get(&server.at("ops"), "/cluster", None).await.json();
        view["held"] == false && nodes_of(&server).await == ["push-0"]
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_redis_moves_nobody_and_is_told_in_its_own_words() {
    let redis = redis(&[]).await;
    let server = Server::with(Options::registered_in(&url(&redis))).await;
    let used: u64 = redis_cli(redis.port, &["info", "memory"])
        .lines()
        .find_map(|line| line.strip_prefix("used_memory:"))
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    redis_cli(redis.port, &["config", "set", "maxmemory-policy", "noeviction"]);
    redis_cli(redis.port, &["config", "set", "maxmemory", &(used / 2).to_string()]);
    eventually("Redis' own words", async || warns(&server.log(), &["OOM", "redis.url"])).await;
    // Longer than a lease: had anybody looked, it would be gone.
    let ends = std::time::Instant::now() + std::time::Duration::from_secs(13);
    while std::time::Instant::now() < ends {
        assert_eq!(nodes_of(&server).await, ["push-0"]);
        assert_eq!(redis_cli(redis.port, &["zrange", "{ringpush}:nodes", "0", "-1"]), "push-0");
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
    let held = async || http::get(&server.at("ops"), "/cluster", None).await.json()["held"] == true;
    eventually("the view is held", held).await;
    redis_cli(redis.port, &["config", "set", "maxmemory", "0"]);
    eventually("renewed", async || !held().await).await;
    assert_eq!(nodes_of(&server).await, ["push-0"]);
}

/// A command that is no server takes nothing of a registry.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_commands_need_no_place_in_the_registry() {
    let redis = redis(&[]).await;
    let server = Server::with(Options::registered_in(&url(&redis))).await;
    let mut ring = tokio::process::Command::new(program());
    clean(ring.as_std_mut());
    ring.args(["ring", "--data"]).arg(server.directory.path());
    ring.env("RINGPUSH_COLLECT__API_KEYS", ringpush_testing::API_KEY);
    let output = tokio::time::timeout(DEADLINE, ring.output()).await.unwrap().unwrap();
    assert!(String::from_utf8_lossy(&output.stdout).contains("push-0"), "{output:?}");
}
