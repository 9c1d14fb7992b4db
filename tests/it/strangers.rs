//! Limits by address on clients that have not shown who they are, and the audit log.

use serde_json::{Value, json};

use ringpush_testing::{Options, Server, Socket, eventually, http};

const ELSEWHERE: &str = "203.0.113.9";

async fn upgrade(server: &Server, token: Option<&str>, forwarded: &str) -> Result<Socket, u16> {
    let url = format!("ws://{}/v1/ws", server.at("push"));
    Socket::try_open(&url, token, &[("x-forwarded-for", forwarded)]).await
}

async fn connect(server: &Server, token: &str, forwarded: &str) -> http::Answer {
    let headers = [("content-type", "application/json"), ("x-forwarded-for", forwarded)];
    http::request(&server.at("push"), "POST", "/v1/connect", Some(token), &headers, b"{}").await
}

fn limited(proxies: &str) -> Options {
    Options::default()
        .with("push.trusted_proxies", proxies)
        .with("limits.auth_failures_per_min", "3")
        .with("limits.handshakes_per_address", "2")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_may_show_some_bad_tokens_and_good_ones_always_pass() {
    let server = Server::with(limited("[]")).await;
    let token = server.token("alice").await;
    // What a client says of its address does not count where clients come directly.
    for n in 0..3 {
        assert_eq!(upgrade(&server, Some("bad"), &format!("203.0.113.{n}")).await.err(), Some(401));
    }
    assert_eq!(upgrade(&server, Some("bad"), ELSEWHERE).await.err(), Some(429));
    let refused = connect(&server, "bad", ELSEWHERE).await;
    assert_eq!(refused.status, 429);
    assert!((1..=60).contains(&refused.header("retry-after").parse::<u64>().unwrap()), "{refused:?}");
    let history = http::get(&server.at("push"), "/v1/inbox/messages", Some("bad")).await;
    assert_eq!(history.status, 429);
    // A token in the first frame: told with the same code that a client is told that is too fast.
    let mut late = upgrade(&server, None, ELSEWHERE).await.unwrap();
    late.say(&json!({"type": "auth", "token": "bad"})).await;
    assert_eq!(late.closed().await.code, 4429);
    // A token that was good once is told what is wrong with it, whatever else came from there.
    let ended = server.token_for("alice", 1).await;
    eventually("the token has ended", async || upgrade(&server, Some(&ended), ELSEWHERE).await.is_err())
        .await;
    assert_eq!(upgrade(&server, Some(&ended), ELSEWHERE).await.err(), Some(401));
    // Whoever is known comes in: by token, by ticket, by the first frame.
    upgrade(&server, Some(&token), ELSEWHERE).await.unwrap().caught_up().await;
    let place = connect(&server, &token, ELSEWHERE).await.json();
    Socket::open(place["url"].as_str().unwrap(), None).await.caught_up().await;
    let mut first_frame = upgrade(&server, None, ELSEWHERE).await.unwrap();
    first_frame.say(&json!({"type": "auth", "token": token})).await;
    first_frame.caught_up().await;
    assert!(server.metric("ringpush_strangers_refused_total{reason=\"bad_tokens\"}").await >= 4.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn behind_a_known_proxy_each_client_has_its_own_limit() {
    let server = Server::with(limited("127.0.0.0/8, ::1")).await;
    for address in ["203.0.113.1", "203.0.113.2", "192.0.2.1, 203.0.113.3", "2001:db8::1"] {
        for _ in 0..3 {
            assert_eq!(upgrade(&server, Some("bad"), address).await.err(), Some(401), "{address}");
        }
        assert_eq!(upgrade(&server, Some("bad"), address).await.err(), Some(429), "{address}");
    }
    // A client that puts another address before its own stays the same client.
    assert_eq!(upgrade(&server, Some("bad"), "198.51.100.7, 203.0.113.3").await.err(), Some(429));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn few_sockets_of_one_address_wait_for_a_token() {
    let server = Server::with(limited("[]").with("limits.auth_deadline_ms", "60000")).await;
    let token = server.token("alice").await;
    let mut first = upgrade(&server, None, ELSEWHERE).await.unwrap();
    let second = upgrade(&server, None, ELSEWHERE).await.unwrap();
    assert_eq!(upgrade(&server, None, ELSEWHERE).await.err(), Some(429));
    let known = upgrade(&server, Some(&token), ELSEWHERE).await.unwrap();
    // One that has shown its token waits no more; one that has gone neither.
    first.say(&json!({"type": "auth", "token": token})).await;
    first.caught_up().await;
    drop(second);
    let mut waiting = Vec::new();
    eventually("there is room for two again", async || {
        waiting.extend(upgrade(&server, None, ELSEWHERE).await.ok());
        waiting.len() == 2
    })
    .await;
    assert_eq!(upgrade(&server, None, ELSEWHERE).await.err(), Some(429));
    drop((first, known, waiting));
    server.nobody_is_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_word_about_proxies_nobody_is_limited_by_address() {
    let server = Server::with(
        Options::default()
            .with("limits.auth_failures_per_min", "1")
            .with("limits.handshakes_per_address", "1"),
    )
    .await;
    let mut waiting = Vec::new();
    for _ in 0..5 {
        assert_eq!(upgrade(&server, Some("bad"), ELSEWHERE).await.err(), Some(401));
        waiting.push(upgrade(&server, None, ELSEWHERE).await.unwrap());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_act_has_one_line_with_its_key_and_address() {
    let keys = json!([{"name": "support", "secret": "the-support-desk-looks-with-this-1", "scopes": ["read", "users", "topics", "publish"]}]);
    let options =
        Options::default().with("collect.keys", &keys.to_string()).with("push.trusted_proxies", "127.0.0.1");
    let server = Server::with(options).await;
    let call = async |method: &str, path: &str, body: &Value| {
        let body = if body.is_null() { Vec::new() } else { body.to_string().into_bytes() };
        let headers = [("content-type", "application/json"), ("x-forwarded-for", ELSEWHERE)];
        let key = Some("the-support-desk-looks-with-this-1");
        http::request(&server.at("collect"), method, path, key, &headers, &body).await.status
    };
    let secret = "what nobody may read in a log";
    server.token("alice").await;
    let body = json!({"to": {"user": "alice"}, "payload": secret});
    assert_eq!(call("POST", "/v1/messages", &body).await, 202);
    assert_eq!(call("PUT", "/v1/topics/news", &json!({"delivery": "log"})).await, 201);
    assert_eq!(call("POST", "/v1/topics/news/members", &json!({"add": ["alice"]})).await, 202);
    assert_eq!(call("GET", "/v1/users/alice/messages", &Value::Null).await, 200);
    assert_eq!(call("DELETE", "/v1/users/alice/sessions", &Value::Null).await, 202);
    assert_eq!(call("DELETE", "/v1/topics/news", &Value::Null).await, 202);
    assert_eq!(call("DELETE", "/v1/topics/news", &Value::Null).await, 404);
    assert_eq!(call("GET", "/v1/users/alice", &Value::Null).await, 200);
    let lines = || -> Vec<Value> {
        let log = server.log();
        let all = log.lines().filter(|line| line.contains("ringpush::audit"));
        all.map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    eventually("all lines are written", async || lines().len() == 6).await;
    let support = |act: &str, kind: &str, name: &str| json!({"act": act, "key": "support", "address": ELSEWHERE, kind: name});
    let expected = [
        json!({"act": "issue_token", "key": "admin", "address": "127.0.0.1", "user": "alice"}),
        support("make_topic", "topic", "news"),
        support("change_members", "topic", "news"),
        support("read_messages", "user", "alice"),
        support("disconnect_user", "user", "alice"),
        support("remove_topic", "topic", "news"),
    ];
    for (line, expected) in lines().iter().zip(expected) {
        assert!(line["timestamp"].is_string() && line["target"] == "ringpush::audit", "{line}");
        for (name, value) in expected.as_object().unwrap() {
            assert_eq!(&line[name], value, "{line}");
        }
    }
    assert!(!server.log().contains(secret));
}
