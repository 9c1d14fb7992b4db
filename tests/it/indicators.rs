//! What `/metrics` says of how well the service works: its names are a contract.

use serde_json::json;

use ringpush_testing::{Options, Server, Socket, eventually, http};

async fn metrics(server: &Server) -> String {
    String::from_utf8(http::get(&server.at("ops"), "/metrics", None).await.body).unwrap()
}

async fn count(server: &Server, series: &str) -> f64 {
    let text = metrics(server).await;
    let line = text.lines().find_map(|line| line.strip_prefix(&format!("{series} ")));
    line.unwrap_or_else(|| panic!("{series} is not among the metrics:\n{text}")).parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_indicator_is_measured_where_it_happens() {
    let server = Server::start().await;
    // What waits for its user is no delay of the service.
    server.publish("alice", json!(0)).await;
    let mut alice = server.connect("alice", "").await;
    let first = alice.until("message").await.1;
    alice.until("caught_up").await;
    assert_eq!(count(&server, r#"ringpush_delivery_seconds_count{path="live"}"#).await, 0.0);
    alice.ack(first["seq"].as_u64().unwrap()).await;
    let seq = server.publish("alice", json!(1)).await;
    alice.until("message").await;
    alice.ack(seq).await;
    eventually("the ack is measured", async || count(&server, "ringpush_ack_seconds_count").await == 1.0)
        .await;
    for (series, times) in [
        (r#"ringpush_delivery_seconds_count{path="live"}"#, 1.0),
        (r#"ringpush_delivery_seconds_count{path="displaced"}"#, 0.0),
        (r#"ringpush_delivery_seconds_count{path="behind"}"#, 0.0),
        (r#"ringpush_delivery_seconds_count{path="swept"}"#, 0.0),
        (r#"ringpush_publish_seconds_count{outcome="accepted"}"#, 2.0),
        (r#"ringpush_publish_seconds_count{outcome="refused"}"#, 0.0),
        (r#"ringpush_publish_seconds_count{outcome="unavailable"}"#, 0.0),
        ("ringpush_store_seconds_count", 2.0),
        ("ringpush_attach_seconds_count", 1.0),
        ("ringpush_move_seconds_count", 0.0),
        (r#"ringpush_auth_seconds_count{outcome="accepted"}"#, 1.0),
        (r#"ringpush_publishes_total{key="key-1",outcome="accepted"}"#, 2.0),
        ("ringpush_view_held", 0.0),
        (r#"ringpush_view_members{state="active"}"#, 1.0),
        (r#"ringpush_ready{condition="inbox"}"#, 1.0),
    ] {
        assert_eq!(count(&server, series).await, times, "{series}");
    }
    for (accept, kind) in
        [("*/*", "text/plain"), ("application/openmetrics-text;q=0.9,*/*", "application/openmetrics-text")]
    {
        let answer =
            http::request(&server.at("ops"), "GET", "/metrics", None, &[("accept", accept)], b"").await;
        assert!(answer.headers["content-type"].starts_with(kind), "{accept}: {:?}", answer.headers);
    }
    let text = metrics(&server).await;
    assert!(text.contains("ringpush_build_info{version=\"0."), "{text}");
    assert!(text.contains(r#"ringpush_delivery_seconds_bucket{le="0.0005",path="live"}"#), "{text}");
    assert!(text.contains(r#"le="60.0""#), "{text}");
    assert!(count(&server, "ringpush_process_resident_bytes").await > 1_000_000.0);
    assert!(count(&server, "ringpush_open_files").await > 5.0);
    // A socket without a good token.
    let url = format!("ws://{}/v1/ws", server.at("push"));
    assert_eq!(Socket::refusal(&url, Some("rubbish")).await.0, 401);
    assert_eq!(count(&server, r#"ringpush_sockets_refused_total{reason="unauthorized"}"#).await, 1.0);
    assert_eq!(count(&server, r#"ringpush_auth_seconds_count{outcome="refused"}"#).await, 1.0);
    // The same in the first frame.
    let mut late = Socket::open(&url, None).await;
    late.say(&json!({"type": "auth", "token": "rubbish"})).await;
    assert_eq!(late.closed().await.code, 4501);
    assert_eq!(count(&server, r#"ringpush_sockets_refused_total{reason="unauthorized"}"#).await, 2.0);
}

/// A client without credit: what it is sent later is `behind`, which is no fault of the service.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_for_credit_is_behind() {
    let server = Server::start().await;
    let mut alice = server.connect("alice", "?window=2").await;
    alice.until("caught_up").await;
    let mut last = 0;
    for n in 0..4 {
        last = server.publish("alice", json!(n)).await;
    }
    alice.messages(2).await;
    alice.ack(last - 2).await;
    alice.messages(2).await;
    assert_eq!(count(&server, r#"ringpush_delivery_seconds_count{path="live"}"#).await, 2.0);
    assert_eq!(count(&server, r#"ringpush_delivery_seconds_count{path="behind"}"#).await, 2.0);
}

/// One of three nodes owns the user; the others send the client there. What comes meanwhile by one
/// of them is `displaced`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_is_measured_until_the_session_is_gone() {
    let server = Server::with(Options::nodes(3)).await;
    let token = server.token("alice").await;
    for node in 0..3 {
        let mut socket = Socket::open(&format!("ws://{}/v1/ws", server.push(node)), Some(&token)).await;
        let welcome = socket.expect("welcome").await;
        let owner = server.get("/v1/users/alice").await.json()["owner"].clone();
        if welcome["node"] != owner {
            socket.until("move").await;
        }
        let seq = server.publish("alice", json!(node)).await;
        while socket.until("message").await.1["seq"] != seq {}
        socket.close().await;
    }
    eventually("both moves are over", async || count(&server, "ringpush_move_seconds_count").await == 2.0)
        .await;
    for (path, times) in [("live", 1.0), ("displaced", 2.0)] {
        let series = format!(r#"ringpush_delivery_seconds_count{{path="{path}"}}"#);
        assert_eq!(count(&server, &series).await, times, "{path}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_cluster_tells_how_long_deliveries_took_in_the_last_minute() {
    let server = Server::start().await;
    let node = async || server.get("/v1/cluster").await.json()["nodes"][0].clone();
    assert!(node().await["delivery_p50_ms"].is_null());
    let mut alice = server.connect("alice", "").await;
    alice.caught_up().await;
    for n in 0..20 {
        server.publish("alice", json!(n)).await;
        alice.until("message").await;
    }
    eventually("the next heartbeat tells it", async || {
        let node = node().await;
        let (p50, p99) = (node["delivery_p50_ms"].as_u64(), node["delivery_p99_ms"].as_u64());
        p50.zip(p99).is_some_and(|(p50, p99)| p50 <= p99 && p99 < 20_000)
    })
    .await;
}
