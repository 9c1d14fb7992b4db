//! The trace that a sender names: it goes the whole way of the message.

use serde_json::{Value, json};

use ringpush_testing::foreign::{ReplicaSet, redis};
use ringpush_testing::{ADMIN_KEY, API_KEY, Options, Server, Socket, eventually, http};

const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

async fn post(at: &str, key: &str, path: &str, trace: &[&str], body: &Value) -> http::Answer {
    let mut headers = vec![("content-type", "application/json")];
    headers.extend(trace.iter().map(|trace| ("traceparent", *trace)));
    let answer = http::request(at, "POST", path, Some(key), &headers, body.to_string().as_bytes()).await;
    assert_eq!(answer.status, 202, "{answer:?}");
    answer
}

async fn messages(socket: &mut Socket, count: usize) -> Vec<Value> {
    let mut frames = Vec::new();
    while frames.len() < count {
        frames.push(socket.until("message").await.1);
    }
    frames
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trace_is_kept_with_the_message_and_a_bad_one_is_counted() {
    let server = Server::start().await;
    let (at, key) = (server.at("collect"), server.key("api_key"));
    let mut live = server.connect("alice", "?device=live").await;
    live.caught_up().await;
    assert_eq!(server.put("/v1/topics/news", &json!({"delivery": "log"})).await.status, 201);
    for to in [json!({"user": "alice"}), json!({"topic": "news"}), json!({"everyone": true})] {
        post(&at, &key, "/v1/messages", &[TRACE], &json!({"to": to, "payload": 1, "id": "one"})).await;
    }
    let batch = json!({"messages": [{"to": {"user": "alice"}, "payload": 2}]});
    post(&at, &key, "/v1/messages/batch", &[TRACE], &batch).await;
    // Each of these breaks a rule of the standard; the message counts, the trace does not.
    let upper = TRACE.to_uppercase();
    for bad in [&["rubbish"][..], &[&upper], &[TRACE, TRACE], &[""]] {
        post(&at, &key, "/v1/messages", bad, &json!({"to": {"user": "alice"}, "payload": "bad"})).await;
    }
    post(&at, &key, "/v1/messages", &[], &json!({"to": {"user": "alice"}, "payload": "none"})).await;
    assert_eq!(server.metric("ringpush_traceparents_ignored_total").await, 4.0);
    let traces = |frames: &[Value]| -> Vec<Value> {
        frames.iter().map(|frame| frame.get("traceparent").cloned().unwrap_or_default()).collect()
    };
    let expected: Vec<Value> = (0..7).map(|n| if n < 2 { json!(TRACE) } else { Value::Null }).collect();
    assert_eq!(traces(&messages(&mut live, 7).await), expected, "live");
    let history = server.get("/v1/users/alice/messages").await.json();
    assert_eq!(traces(history["messages"].as_array().unwrap()), expected, "history");
    let status = server.get("/v1/users/alice/messages/one/status").await.json();
    assert_eq!(status["traceparent"], TRACE);
    let log = server.get("/v1/topics/news/messages").await.json();
    assert_eq!(log["messages"][0]["traceparent"], TRACE);
    // From the disk.
    let server = server.kill_and_restart().await;
    let mut later = server.connect("alice", "?device=later").await;
    assert_eq!(traces(&messages(&mut later, 7).await), expected, "the backlog");
}

/// Four processes, one for each role: the trace leads to the message's lines in each log on its
/// way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_lines_of_one_message_are_found_in_the_logs_of_all_processes() {
    let (redis, set) = (redis(&[]).await, ReplicaSet::start(1).await);
    let url = format!("redis://127.0.0.1:{}", redis.port);
    let role = async |role: &str, more: &[(&str, &str)]| {
        let options = Options::registered_in(&url)
            .with("mongo.uri", &set.uri())
            .with("node.roles", role)
            .with("node.name", &format!("{role}-0"));
        Server::with(more.iter().fold(options, |options, (key, value)| options.with(key, value))).await
    };
    let auth = role("auth", &[]).await;
    let remote = [("auth.mode", "remote"), ("auth.url", &*format!("http://{}", auth.at("auth")))];
    let push = role("push", &remote).await;
    let dispatch = role("dispatch", &remote).await;
    let collect = role("collect", &[]).await;
    for server in [&push, &dispatch, &collect] {
        eventually("all have found one another", async || {
            let log = server.log();
            log.contains("members=1 routers=1") || log.contains("members=1 routers=2")
        })
        .await;
    }
    let body = json!({"user": "alice", "ttl_s": 3600});
    let token = http::post(&auth.at("auth"), "/v1/tokens", Some(ADMIN_KEY), &body).await.json();
    let socket_url = format!("ws://{}/v1/ws?topics=auth", push.at("push"));
    let mut alice = Socket::open(&socket_url, token["token"].as_str()).await;
    alice.say(&json!({"type": "auth", "topics": true})).await;
    alice.caught_up().await;
    let body = json!({"to": {"user": "alice"}, "payload": "traced"});
    post(&collect.at("collect"), API_KEY, "/v1/messages", &[TRACE], &body).await;
    assert_eq!(alice.until("message").await.1["traceparent"], TRACE);
    // The same of a message in a log, under a trace of its own.
    let other = TRACE.replace("4bf9", "5bf9");
    let body = json!({"to": {"everyone": true}, "payload": "traced"});
    post(&collect.at("collect"), API_KEY, "/v1/messages", &[&other], &body).await;
    assert_eq!(alice.until("message").await.1["traceparent"], other);
    // And of one that waits for its user.
    let away = TRACE.replace("4bf9", "6bf9");
    let body = json!({"to": {"user": "bob"}, "payload": "traced"});
    post(&collect.at("collect"), API_KEY, "/v1/messages", &[&away], &body).await;
    let body = json!({"user": "bob", "ttl_s": 3600});
    let token = http::post(&auth.at("auth"), "/v1/tokens", Some(ADMIN_KEY), &body).await.json();
    let mut bob = Socket::open(&format!("ws://{}/v1/ws", push.at("push")), token["token"].as_str()).await;
    assert_eq!(bob.until("message").await.1["traceparent"], away);
    for (server, step) in [(&collect, 5), (&dispatch, 6), (&push, 7)] {
        for trace in [TRACE, &other, &away] {
            eventually("the line is there", async || {
                let log = server.log();
                let mut lines = log.lines().filter(|line| line.contains(trace));
                lines.any(|line| line.contains(&format!("step={step}")))
            })
            .await;
        }
    }
}
