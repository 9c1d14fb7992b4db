//! Redis in its forms: a cluster, behind a Sentinel, over TLS.

use std::sync::Arc;

use ringpush::clock::Clock;
use ringpush::fallback::conformance as fallback_contract;
use ringpush::fallback::redis::RedisFallback;
use ringpush::membership::keeper::Times;
use ringpush::membership::redis::RedisMembership;
use ringpush::membership::{Membership, conformance};

use crate::registry::{entries, info, join, link, times, until};
use ringpush_testing::foreign::{Foreign, redis, redis_cli};
use ringpush_testing::{Options, Server, eventually, http};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_contracts_hold_in_a_redis_cluster_with_a_password() {
    let redis = redis(&["--cluster-enabled", "yes", "--requirepass", "secret"]).await;
    let cli =
        |words: &[&str]| redis_cli(redis.port, &[&["--no-auth-warning", "-a", "secret"], words].concat());
    cli(&["cluster", "addslotsrange", "0", "16383"]);
    eventually("the cluster", async || cli(&["cluster", "info"]).contains("cluster_state:ok")).await;
    let url = format!("redis+cluster://:secret@127.0.0.1:{}", redis.port);
    let membership =
        || Arc::new(RedisMembership::start(link(&url), "test", times(), Clock::system(), entries()));
    conformance::suite(&conformance::Bench { own: membership(), others: membership() }).await;
    let fallback = || Arc::new(RedisFallback::start(link(&url), "test", times().lease, times().poll));
    fallback_contract::suite(&fallback_contract::Bench { own: fallback(), others: fallback() }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_master_is_found_through_a_sentinel() {
    let redis = redis(&[]).await;
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("sentinel.conf");
    std::fs::write(&config, format!("sentinel monitor main 127.0.0.1 {} 1\n", redis.port)).unwrap();
    let port = "{port}";
    let sentinel =
        Foreign::start(&["redis-server", config.to_str().unwrap(), "--sentinel", "--port", port]).await;
    let url = format!("redis+sentinel://127.0.0.1:{}/main", sentinel.port);
    let membership =
        || Arc::new(RedisMembership::start(link(&url), "test", times(), Clock::system(), entries()));
    conformance::suite(&conformance::Bench { own: membership(), others: membership() }).await;
}

/// A certificate authority and a server's certificate for 127.0.0.1, as `ca.pem`, `cert.pem` and
/// `key.pem`.
fn certificates(directory: &std::path::Path) {
    let make = |words: &str| {
        let output = std::process::Command::new("openssl")
            .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"])
            .args(["-days", "2"])
            .args(words.split(' '))
            .current_dir(directory)
            .output()
            .expect("openssl is there: run scripts/test, which installs it");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    make("-keyout ca.key -out ca.pem -subj /CN=authority");
    make(
        "-CA ca.pem -CAkey ca.key -keyout key.pem -out cert.pem -subj /CN=redis \
         -addext subjectAltName=IP:127.0.0.1 -addext basicConstraints=critical,CA:FALSE",
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_is_spoken_to_over_tls_and_only_if_its_certificate_is_trusted() {
    let directory = tempfile::tempdir().unwrap();
    certificates(directory.path());
    let file = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let redis = Foreign::start(&[
        "redis-server",
        "--port",
        "0",
        "--tls-port",
        "{port}",
        "--bind",
        "127.0.0.1",
        "--dir",
        "{dir}",
        "--save",
        "",
        "--requirepass",
        "secret",
        "--tls-auth-clients",
        "no",
        "--tls-cert-file",
        &file("cert.pem"),
        "--tls-key-file",
        &file("key.pem"),
        "--tls-ca-cert-file",
        &file("ca.pem"),
    ])
    .await;
    let url = format!("rediss://:secret@127.0.0.1:{}", redis.port);
    let mut options = Options::registered_in(&url);
    options.environment.push(("SSL_CERT_FILE".to_owned(), file("ca.pem")));
    let server = Server::with(options).await;
    let view = http::get(&server.at("ops"), "/cluster", None).await.json();
    assert_eq!((view["nodes"][0]["node"].as_str(), view["held"].as_bool()), (Some("push-0"), Some(false)));
    assert!(!view["generation"].as_str().unwrap().is_empty());
    // No certificate authority that the machine trusts has signed this one.
    let (code, said) = crate::cluster::started(&[("REDIS__URL", &url)]).await;
    assert!(code.is_none() && said.contains("redis.url") && said.contains("certificate"), "{code:?} {said}");
    assert!(!said.contains("secret"), "a password is told: {said}");
}

/// Three masters with a replica each, in a Redis Cluster that elects another after two seconds.
async fn redis_cluster() -> Vec<Foreign> {
    let mut nodes = Vec::new();
    for _ in 0..6 {
        nodes.push(redis(&["--cluster-enabled", "yes", "--cluster-node-timeout", "2000"]).await);
    }
    let hosts: Vec<String> = nodes.iter().map(|node| format!("127.0.0.1:{}", node.port)).collect();
    let mut words = vec!["--cluster", "create"];
    words.extend(hosts.iter().map(String::as_str));
    words.extend(["--cluster-replicas", "1", "--cluster-yes"]);
    redis_cli(nodes[0].port, &words);
    for node in &nodes {
        let ok = async || redis_cli(node.port, &["cluster", "info"]).contains("cluster_state:ok");
        eventually("the cluster", ok).await;
    }
    let replicated = async || {
        nodes.iter().all(|node| {
            let about = redis_cli(node.port, &["info", "replication"]);
            about.contains("role:master") || about.contains("master_link_status:up")
        })
    };
    eventually("its replicas", replicated).await;
    nodes
}

/// The place of the node that has the slot of these keys, as another one sees it.
fn owner(nodes: &[Foreign], asked: usize) -> Option<usize> {
    let slot: u32 = redis_cli(nodes[asked].port, &["cluster", "keyslot", "{test}:nodes"]).parse().ok()?;
    let all = redis_cli(nodes[asked].port, &["cluster", "nodes"]);
    let owns = |line: &&str| {
        line.contains("master")
            && !line.contains("fail")
            && line.split(' ').skip(8).any(|range| {
                let (from, to) = range.split_once('-').unwrap_or((range, range));
                from.parse().is_ok_and(|from: u32| from <= slot) && to.parse().is_ok_and(|to: u32| slot <= to)
            })
    };
    let line = all.lines().find(owns)?;
    let port = line.split([':', '@']).nth(1)?.parse::<u16>().ok()?;
    nodes.iter().position(|node| node.port == port)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_a_redis_cluster_the_new_owner_of_a_frozen_ones_slot_is_followed() {
    let nodes = redis_cluster().await;
    let hosts: Vec<String> = nodes.iter().map(|node| format!("127.0.0.1:{}", node.port)).collect();
    let url = format!("redis+cluster://{}", hosts.join(","));
    let start = || RedisMembership::start(link(&url), "test", Times::default(), Clock::system(), entries());
    let (node, looker) = (start(), start());
    let joined = join(&node, info("push-0")).await;
    until(&looker, "one node", |view| view.members.len() == 1).await;
    let frozen = owner(&nodes, 0).expect("somebody owns the slot");
    let asked = (frozen + 1) % nodes.len();
    nodes[frozen].signal("STOP");
    let elected = async || owner(&nodes, asked).is_some_and(|owner| owner != frozen);
    eventually("another is elected", elected).await;
    let began = std::time::Instant::now();
    let epoch = looker.views().borrow().epoch;
    // What is new is seen: both write and read at the new owner.
    let second = async {
        let registered = join(&node, info("push-1")).await;
        until(&looker, "two nodes", |view| view.members.len() == 2 && view.epoch > epoch && !view.held).await;
        registered
    };
    let second = tokio::time::timeout(std::time::Duration::from_secs(10), second).await;
    assert!(second.is_ok(), "the new owner is not followed within 10 s");
    eprintln!("followed after {:?}", began.elapsed());
    nodes[frozen].signal("CONT");
    drop(joined);
}
