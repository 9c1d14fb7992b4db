//! Topics with a log that a client reads without being a member, because its token says so.

use serde_json::{Value, json};

use ringpush_testing::{Server, Socket, http};

async fn token(server: &Server, user: &str, watch: Value) -> String {
    let body = json!({"user": user, "watch": watch});
    let key = server.key("admin_key");
    let answer = http::post(&server.at("auth"), "/v1/tokens", Some(&key), &body).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()["token"].as_str().unwrap().to_owned()
}

async fn make(server: &Server, topic: &str, delivery: &str) {
    let made = server.put(&format!("/v1/topics/{topic}"), &json!({"delivery": delivery})).await;
    assert_eq!(made.status, 201, "{made:?}");
}

/// Publishes, and returns the position in the log.
async fn publish(server: &Server, topic: &str, payload: Value) -> u64 {
    let sent = server.try_publish(&json!({"to": {"topic": topic}, "payload": payload})).await;
    assert_eq!(sent.status, 202, "{sent:?}");
    sent.json()["accepted"][0]["seq"].as_u64().unwrap()
}

async fn join(server: &Server, topic: &str, add: &[&str], remove: &[&str]) {
    let path = format!("/v1/topics/{topic}/members");
    let changed = server.send("POST", &path, &json!({"add": add, "remove": remove})).await;
    assert_eq!(changed.status, 202, "{changed:?}");
}

async fn open_by(server: &Server, credential: Value) -> Socket {
    let mut socket = Socket::open(&format!("ws://{}/v1/ws", server.at("push")), None).await;
    let mut auth = json!({"type": "auth", "topics": true});
    auth.as_object_mut().unwrap().extend(credential.as_object().unwrap().clone());
    socket.say(&auth).await;
    socket.until("welcome").await;
    socket
}

async fn open(server: &Server, token: &str) -> Socket {
    open_by(server, json!({"token": token, "device": "web"})).await
}

async fn watch(socket: &mut Socket, topic: &str, since: Value) -> Value {
    let mut frame = json!({"type": "watch", "topic": topic});
    if !since.is_null() {
        frame["since"] = since;
    }
    socket.say(&frame).await;
    socket.until("topic").await.1
}

async fn refused(socket: &mut Socket, topic: &str) -> (Value, Value) {
    socket.say(&json!({"type": "watch", "topic": topic})).await;
    let (_, error) = socket.until("error").await;
    assert_eq!(error["topic"], json!(topic), "{error}");
    (error["code"].clone(), error["message"].clone())
}

async fn next(socket: &mut Socket) -> (Value, Value) {
    let (_, frame) = socket.until("message").await;
    (frame["topic"].clone(), frame["payload"].clone())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_is_watched_from_now_on_from_the_last_or_from_a_number() {
    let server = Server::start().await;
    make(&server, "match-7", "log").await;
    let first = publish(&server, "match-7", json!(1)).await;
    for n in 2..=3 {
        assert_eq!(publish(&server, "match-7", json!(n)).await, first + n - 1);
    }
    let token = token(&server, "alice", json!(["match-*"])).await;
    let answer =
        |n: u64| json!({"type": "topic", "topic": "match-7", "state": "watching", "after": first + n - 1});
    let mut latest = open(&server, &token).await;
    assert_eq!(watch(&mut latest, "match-7", Value::Null).await, answer(3));
    let mut last = open(&server, &token).await;
    assert_eq!(watch(&mut last, "match-7", json!("last")).await, answer(2));
    assert_eq!(next(&mut last).await, (json!("match-7"), json!(3)));
    let mut since = open(&server, &token).await;
    assert_eq!(watch(&mut since, "match-7", json!(first)).await, answer(1));
    for n in 2..=3 {
        assert_eq!(next(&mut since).await, (json!("match-7"), json!(n)));
    }
    publish(&server, "match-7", json!(4)).await;
    for socket in [&mut latest, &mut last, &mut since] {
        assert_eq!(next(socket).await, (json!("match-7"), json!(4)));
    }
    // Asked again, it answers where it is, and nothing comes twice.
    assert_eq!(watch(&mut since, "match-7", json!(0)).await, answer(4));
    since.say(&json!({"type": "unwatch", "topic": "match-7"})).await;
    assert_eq!(since.until("topic").await.1["state"], "left");
    publish(&server, "match-7", json!(5)).await;
    assert_eq!(next(&mut latest).await.1, json!(5));
    assert_eq!(watch(&mut since, "match-7", json!("latest")).await, answer(5));
}

/// Nothing of it is stored: an ack of a watched topic makes no position.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watched_topic_becomes_a_membership_where_it_is() {
    let server = Server::start().await;
    make(&server, "match-7", "log").await;
    let first = publish(&server, "match-7", json!(1)).await;
    let token = token(&server, "alice", json!(["match-7"])).await;
    let mut socket = open(&server, &token).await;
    watch(&mut socket, "match-7", json!(0)).await;
    assert_eq!(next(&mut socket).await.1, json!(1));
    socket.say(&json!({"type": "ack", "topics": {"match-7": first}})).await;
    join(&server, "match-7", &["alice"], &[]).await;
    let (_, joined) = socket.until("topic").await;
    assert_eq!((&joined["state"], &joined["after"]), (&json!("joined"), &json!(first)), "{joined}");
    // A membership is not ended by `unwatch`.
    socket.say(&json!({"type": "unwatch", "topic": "match-7"})).await;
    publish(&server, "match-7", json!(2)).await;
    assert_eq!(next(&mut socket).await.1, json!(2));
    assert_eq!(watch(&mut socket, "match-7", Value::Null).await["after"], first + 1);
    join(&server, "match-7", &[], &["alice"]).await;
    assert_eq!(socket.until("topic").await.1["state"], "left");
    assert_eq!(watch(&mut socket, "match-7", Value::Null).await["after"], first + 1);
    let gone = server.send("DELETE", "/v1/topics/match-7", &Value::Null).await;
    assert_eq!(gone.status, 202);
    assert_eq!(socket.until("topic").await.1["state"], "left");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_token_does_not_allow_is_refused_and_the_socket_stays() {
    let server = Server::start().await;
    make(&server, "match-7", "log").await;
    make(&server, "match-inbox", "inbox").await;
    make(&server, "news", "log").await;
    let without = server.token("alice").await;
    let mut socket = open(&server, &without).await;
    for topic in ["match-7", "nothing"] {
        let (code, why) = refused(&mut socket, topic).await;
        assert_eq!(code, "forbidden_topic", "the same whether there is one");
        assert!(why.as_str().unwrap().contains("claim watch"), "{why}");
    }
    let mut socket = open(&server, &token(&server, "alice", json!(["match-*"])).await).await;
    assert_eq!(refused(&mut socket, "news").await.0, "forbidden_topic");
    assert_eq!(refused(&mut socket, "match-8").await.0, "unknown_topic");
    assert_eq!(refused(&mut socket, "match-inbox").await.0, "unknown_topic");
    watch(&mut socket, "match-7", Value::Null).await;
    // A new token with fewer rights ends it.
    socket.say(&json!({"type": "refresh", "token": without})).await;
    let (before, refreshed) = socket.until("refreshed").await;
    assert!(!refreshed.is_null());
    let left = json!({"type": "topic", "topic": "match-7", "state": "left"});
    assert!(before.contains(&left) || socket.until("topic").await.1 == left, "{before:?}");
    assert_eq!(refused(&mut socket, "match-7").await.0, "forbidden_topic");
    // A socket that does not know of logs.
    let url = format!("ws://{}/v1/ws", server.at("push"));
    let mut old = Socket::open(&url, Some(&without)).await;
    old.until("welcome").await;
    assert_eq!(refused(&mut old, "match-7").await.0, "forbidden_topic");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tickets_carry_the_right_and_the_history_follows_it() {
    let server = Server::start().await;
    make(&server, "match-7", "log").await;
    let old = publish(&server, "match-7", json!("old")).await;
    let token = token(&server, "alice", json!(["match-*"])).await;
    let push = server.at("push");
    let place = http::post(&push, "/v1/connect", Some(&token), &json!({"device": "web"})).await.json();
    let mut socket = open_by(&server, json!({"ticket": place["ticket"]})).await;
    assert_eq!(watch(&mut socket, "match-7", json!("last")).await["after"], old - 1);
    assert_eq!(next(&mut socket).await.1, json!("old"));
    let page = http::get(&push, "/v1/topics/match-7/messages", Some(&token)).await;
    assert_eq!((page.status, &page.json()["messages"][0]["payload"]), (200, &json!("old")), "{page:?}");
    let other = server.token("bob").await;
    assert_eq!(http::get(&push, "/v1/topics/match-7/messages", Some(&other)).await.status, 403);
    let unknown = http::get(&push, "/v1/topics/match-8/messages", Some(&token)).await;
    assert_eq!(unknown.status, 403, "{unknown:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_that_is_no_list_allows_nothing_and_too_many_requests_end_the_socket() {
    let server = Server::start().await;
    let body = json!({"user": "alice", "watch": ["a*b"]});
    let key = server.key("admin_key");
    let answer = http::post(&server.at("auth"), "/v1/tokens", Some(&key), &body).await;
    assert_eq!(
        (answer.status, &answer.json()["errors"][0]["pointer"]),
        (422, &json!("/watch")),
        "{answer:?}"
    );
    let mut socket = open(&server, &token(&server, "alice", json!(["*"])).await).await;
    for n in 0..11 {
        socket.say(&json!({"type": "watch", "topic": format!("t{n}")})).await;
    }
    assert_eq!(socket.closed().await.code, 4429);
}
