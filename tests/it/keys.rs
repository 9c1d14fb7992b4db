//! Keys of senders: names, scopes, limits.

use serde_json::{Value, json};

use ringpush_testing::{Options, Server, eventually, http};

const SHOP: &str = "the-shop-publishes-with-this-key-0";
const NEWS: &str = "the-news-desk-publishes-with-this1";
const LOOKS: &str = "the-support-desk-looks-with-this-1";
const SLOW: &str = "the-slow-one-publishes-with-this-1";

async fn server() -> Server {
    let keys = json!([
        {"name": "shop", "secret": SHOP, "scopes": ["publish", "topics"]},
        {"name": "news", "secret": NEWS, "scopes": ["publish:topic/news-*"]},
        // printf %s the-support-desk-looks-with-this-1 | sha256sum
        {"name": "support", "secret_sha256": sha256(LOOKS), "scopes": ["read", "users", "cluster"]},
        {"name": "slow", "secret": SLOW, "scopes": ["publish"], "rate_per_s": 1, "burst": 3},
    ]);
    Server::with(Options::default().with("collect.keys", &keys.to_string())).await
}

fn sha256(text: &str) -> String {
    use std::io::Write;
    let mut child = std::process::Command::new("sha256sum")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let said = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
    said.split_whitespace().next().unwrap().to_owned()
}

async fn call(server: &Server, method: &str, path: &str, key: &str, body: &Value) -> http::Answer {
    let at = server.at("collect");
    let body = if body.is_null() { Vec::new() } else { body.to_string().into_bytes() };
    let headers: &[_] = if body.is_empty() { &[] } else { &[("content-type", "application/json")] };
    http::request(&at, method, path, Some(key), headers, &body).await
}

async fn publish(server: &Server, key: &str, to: Value) -> http::Answer {
    call(server, "POST", "/v1/messages", key, &json!({"to": to, "payload": 1})).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_key_does_what_its_scopes_say_and_nothing_else() {
    let server = server().await;
    for topic in ["news-1", "alerts"] {
        let log = json!({"delivery": "log"});
        assert_eq!(call(&server, "PUT", &format!("/v1/topics/{topic}"), SHOP, &log).await.status, 201);
    }
    assert_eq!(publish(&server, SHOP, json!({"user": "alice"})).await.status, 202);
    assert_eq!(publish(&server, NEWS, json!({"topic": "news-1"})).await.status, 202);
    for (key, to, named) in [
        (NEWS, json!({"topic": "alerts"}), "alerts"),
        (NEWS, json!({"topics": ["news-1", "alerts"]}), "alerts"),
        (NEWS, json!({"user": "alice"}), "users"),
        (NEWS, json!({"everyone": true}), "everyone"),
        (LOOKS, json!({"user": "alice"}), "publish"),
    ] {
        let refused = publish(&server, key, to.clone()).await;
        let detail = refused.json()["detail"].as_str().unwrap().to_owned();
        assert_eq!(refused.status, 403, "{to}: {detail}");
        assert!(detail.contains(named) && detail.contains("scope"), "{to}: {detail}");
    }
    // In a batch each item stands alone.
    let items = json!({"messages": [
        {"to": {"topic": "news-1"}, "payload": 1}, {"to": {"topic": "alerts"}, "payload": 1},
    ]});
    let batch = call(&server, "POST", "/v1/messages/batch", NEWS, &items).await.json();
    assert_eq!(batch["results"][1]["error"]["status"], json!(403), "{batch}");
    assert!(batch["results"][0]["error"].is_null(), "{batch}");
    for (method, path, good, bad) in [
        ("GET", "/v1/users/alice", LOOKS, SHOP),
        ("GET", "/v1/users/alice/messages", LOOKS, SHOP),
        ("GET", "/v1/topics/news-1/messages", LOOKS, SHOP),
        ("GET", "/v1/cluster", LOOKS, SHOP),
        ("GET", "/v1/topics", SHOP, LOOKS),
        ("DELETE", "/v1/users/alice/sessions", LOOKS, SHOP),
        ("DELETE", "/v1/topics/alerts", SHOP, NEWS),
    ] {
        let refused = call(&server, method, path, bad, &Value::Null).await;
        assert_eq!(refused.status, 403, "{method} {path}: {refused:?}");
        let allowed = call(&server, method, path, good, &Value::Null).await;
        assert!(matches!(allowed.status, 200 | 202), "{method} {path}: {allowed:?}");
    }
    assert_eq!(publish(&server, "nobody-has-this-key-nobody-has-it", json!({"user": "a"})).await.status, 401);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_burst_over_the_rate_is_told_when_to_come_again_and_each_key_is_counted() {
    let server = server().await;
    assert_eq!(publish(&server, SLOW, json!({"users": ["a", "b", "c"]})).await.status, 202);
    let refused = publish(&server, SLOW, json!({"users": ["a", "b"]})).await;
    assert_eq!(refused.status, 429, "{refused:?}");
    assert!((1..=3).contains(&refused.header("retry-after").parse::<u32>().unwrap()), "{refused:?}");
    assert_eq!(publish(&server, SHOP, json!({"user": "a"})).await.status, 202, "others go on");
    publish(&server, NEWS, json!({"user": "a"})).await;
    let shown = http::get(&server.at("ops"), "/metrics", None).await;
    let shown = String::from_utf8(shown.body).unwrap();
    for line in [
        r#"ringpush_publishes_total{key="slow",outcome="accepted"} 1"#,
        r#"ringpush_publishes_total{key="slow",outcome="refused"} 1"#,
        r#"ringpush_publishes_total{key="shop",outcome="accepted"} 1"#,
        r#"ringpush_publishes_total{key="news",outcome="refused"} 1"#,
    ] {
        assert!(shown.contains(line), "{line}: {shown}");
    }
}

/// A rotation: the new key beside the old one, and then without it. Nothing is restarted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_are_turned_while_the_server_runs_and_a_bad_file_changes_nothing() {
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("ringpush.toml");
    let write = |keys: &[(&str, &str)], more: &str| {
        let entry = |(name, secret): &(&str, &str)| {
            format!("[[collect.keys]]\nname = \"{name}\"\nsecret = \"{secret}\"\nscopes = [\"publish\"]\n")
        };
        let text: String = keys.iter().map(entry).collect();
        std::fs::write(&file, format!("{more}\n{text}")).unwrap();
    };
    write(&[("old", SHOP)], "");
    let server = Server::with(Options { config: Some(file.clone()), ..Options::default() }).await;
    let reload = || ringpush_testing::signal(server.pid(), "HUP");
    let status = async |key| publish(&server, key, json!({"user": "alice"})).await.status;
    assert_eq!((status(SHOP).await, status(NEWS).await), (202, 401));
    write(&[("old", SHOP), ("new", NEWS)], "");
    reload();
    eventually("the new key is taken", async || status(NEWS).await == 202).await;
    assert_eq!(status(SHOP).await, 202);
    // A fault: the keys in use stay.
    write(&[("new", "short")], "");
    reload();
    eventually("the fault is told", async || server.log().contains("collect.keys[0].secret")).await;
    assert_eq!((status(SHOP).await, status(NEWS).await), (202, 202));
    // What cannot change is told.
    let changed = "[push]\ndrain_window_s = 7\n[peer]\nsecret = \"another-secret-of-at-least-32-bytes-12\"";
    write(&[("new", NEWS)], changed);
    reload();
    eventually("the old key is gone", async || status(SHOP).await == 401).await;
    assert_eq!(status(NEWS).await, 202);
    eventually("what needs a restart is told", async || {
        let log = server.log();
        ["push.drain_window_s", "peer.secret", "by a restart"].iter().all(|text| log.contains(text))
    })
    .await;
    assert!(!server.log().contains(NEWS), "no secret is logged");
}
