//! What a client may ask of its session, and what it is told: heartbeats, windows, beginnings,
//! reasons, tickets in frames, events, its own history, and places for its sockets.

use std::time::Duration;

use serde_json::{Value, json};

use ringpush_testing::{Options, Server, Socket, eventually, http};

fn url(server: &Server) -> String {
    format!("ws://{}/v1/ws", server.at("push"))
}

/// Opens a socket whose `auth` frame has these fields beside the token.
async fn authenticated(server: &Server, user: &str, more: Value) -> Socket {
    let mut socket = Socket::open(&url(server), None).await;
    let mut auth = json!({"type": "auth", "token": server.token(user).await});
    auth.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    socket.say(&auth).await;
    socket
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn welcome_says_what_a_client_must_know() {
    let server = Server::start().await;
    let mut socket = server.connect("alice", "").await;
    let welcome = socket.expect("welcome").await;
    for feature in ["heartbeat", "window", "begin"] {
        assert!(welcome["features"].as_array().unwrap().contains(&json!(feature)), "{welcome}");
    }
    for moment in ["token_expires_at", "server_time"] {
        assert!(welcome[moment].as_str().unwrap().ends_with('Z'), "{welcome}");
    }
    assert!(welcome["token_expires_at"].as_str() > welcome["server_time"].as_str());
    assert!(
        welcome.get("heartbeat_ms").is_none() && welcome.get("began").is_none(),
        "not asked for: {welcome}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_heartbeat_comes_to_whoever_asks_for_it_and_to_nobody_else() {
    let server = Server::with(Options::default().with("limits.ping_ms", "1000")).await;
    let mut plain = server.connect("alice", "").await;
    let mut asked = [
        server.connect("alice", "?heartbeat=1").await,
        authenticated(&server, "alice", json!({"heartbeat": true})).await,
    ];
    for socket in &mut asked {
        assert_eq!(socket.expect("welcome").await["heartbeat_ms"], 1_000);
        socket.expect("caught_up").await;
        socket.expect("heartbeat").await;
        socket.expect("heartbeat").await;
    }
    plain.caught_up().await;
    plain.is_quiet(Duration::from_millis(100)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_window_holds_back_pages_and_live_messages_until_they_are_acked() {
    let server = Server::start().await;
    let seqs = server.publish_all("alice", (0..25).map(|n| json!(n))).await;
    let mut socket = server.connect("alice", "?window=10").await;
    socket.expect("welcome").await;
    assert_eq!(socket.messages(10).await, (0..10).map(|n| json!(n)).collect::<Vec<_>>());
    socket.is_quiet(Duration::from_millis(100)).await;
    socket.ack(seqs[3]).await;
    socket.is_quiet(Duration::from_millis(100)).await;
    socket.ack(seqs[9]).await;
    assert_eq!(socket.messages(10).await.len(), 10);
    socket.ack(seqs[19]).await;
    assert_eq!(socket.messages(5).await.len(), 5);
    socket.expect("caught_up").await;
    let live = server.publish_all("alice", (25..45).map(|n| json!(n))).await;
    let came = socket.messages(5).await;
    assert_eq!(came[4], json!(29), "five of ten were free");
    socket.is_quiet(Duration::from_millis(100)).await;
    socket.ack(live[4]).await;
    assert_eq!(socket.messages(10).await[9], json!(39));
    socket.ack(live[14]).await;
    assert_eq!(socket.messages(5).await[4], json!(44));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_device_may_begin_with_what_comes_and_that_is_kept_for_it() {
    let server = Server::start().await;
    let seqs = server.publish_all("alice", (0..3).map(|n| json!(n))).await;
    let mut new = server.connect("alice", "?device=new&begin=latest").await;
    let welcome = new.expect("welcome").await;
    assert_eq!((&welcome["began"], &welcome["since"]), (&json!(seqs[2]), &json!(seqs[2])));
    new.expect("caught_up").await;
    drop(new);
    // What comes while it is away, before it acked anything, is not skipped.
    let next = server.publish("alice", json!(3)).await;
    let server = server.kill_and_restart().await;
    let mut back = server.connect("alice", "?device=new&begin=latest").await;
    let welcome = back.expect("welcome").await;
    assert!(welcome.get("began").is_none(), "it has a cursor: {welcome}");
    assert_eq!(back.messages(1).await, [json!(3)]);
    back.ack(next).await;
    // `since` goes before it, and so does a cursor.
    let mut since = server.connect("alice", &format!("?device=other&begin=latest&since={}", seqs[1])).await;
    assert_eq!(since.expect("welcome").await["since"], seqs[1]);
    let mut oldest = server.connect("alice", "?device=third&begin=oldest").await;
    oldest.expect("welcome").await;
    assert_eq!(oldest.messages(4).await.len(), 4);
    // Also where there never was a message.
    let mut first = server.connect("bob", "?device=new&begin=latest").await;
    assert_eq!(first.expect("welcome").await["began"], 0);
    drop(first);
    server.publish("bob", json!("first")).await;
    let mut back = server.connect("bob", "?device=new&begin=latest").await;
    back.expect("welcome").await;
    assert_eq!(back.messages(1).await, [json!("first")]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_value_is_named_before_the_upgrade_or_closes_with_4500() {
    let server = Server::start().await;
    let token = server.token("alice").await;
    for (field, value) in [
        ("window", json!(0)),
        ("window", json!(-1)),
        ("window", json!(10_001)),
        ("window", json!("many")),
        ("begin", json!("newest")),
        ("heartbeat", json!("yes")),
        ("client", json!("x".repeat(65))),
    ] {
        let mut socket = authenticated(&server, "alice", json!({field: value})).await;
        let closed = socket.closed().await;
        assert_eq!((closed.code, closed.reason.as_str()), (4500, "bad_frame"), "{field} {value}");
        assert!(closed.message.unwrap().contains(field), "{field} {value}");
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let (status, body) = Socket::refusal(&format!("{}?{field}={text}", url(&server)), Some(&token)).await;
        assert_eq!((status, &body["errors"][0]["pointer"]), (422, &json!(format!("?{field}"))));
    }
    let long = json!({"window": 0, "padding": "x".repeat(5_000)});
    assert_eq!(authenticated(&server, "alice", long).await.closed().await.code, 4500, "also in a long frame");
    let both = authenticated(&server, "alice", json!({"ticket": "as well"})).await.closed().await;
    assert_eq!(both.code, 4500);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn why_a_token_is_refused_is_told_for_programs() {
    let server = Server::start().await;
    let good = server.token("alice").await;
    let (head, _) = good.rsplit_once('.').unwrap();
    let expired = server.token_for("alice", 1).await;
    eventually("the token has expired", async || {
        let body = json!({"token": expired});
        http::post(&server.at("auth"), "/v1/verify", None, &body).await.status == 401
    })
    .await;
    let cases = [
        ("rubbish".to_owned(), "token_malformed"),
        (format!("{head}.{}", "A".repeat(43)), "token_invalid"),
        (expired, "token_expired"),
    ];
    for (token, reason) in &cases {
        let mut socket = Socket::open(&url(&server), None).await;
        socket.say(&json!({"type": "auth", "token": token})).await;
        let closed = socket.closed().await;
        assert_eq!((closed.code, closed.reason.as_str()), (4501, *reason), "{token}");
        let (status, body) = Socket::refusal(&url(&server), Some(token)).await;
        assert_eq!((status, &body["reason"]), (401, &json!(reason)));
        let body = json!({"device": "web"});
        let answer = http::post(&server.at("push"), "/v1/connect", Some(token), &body).await;
        assert_eq!((answer.status, &answer.json()["reason"]), (401, &json!(reason)));
        let answer = http::post(&server.at("auth"), "/v1/verify", None, &json!({"token": token})).await;
        assert_eq!((answer.status, &answer.json()["reason"]), (401, &json!(reason)));
    }
    let answer = http::post(&server.at("push"), "/v1/connect", None, &json!({})).await;
    assert_eq!((answer.status, &answer.json()["reason"]), (401, &json!("token_missing")));
    let mut nothing = Socket::open(&url(&server), None).await;
    nothing.say(&json!({"type": "ping"})).await;
    assert_eq!(nothing.closed().await.reason, "token_missing");
    let (status, body) = Socket::refusal(&format!("{}?ticket=forged", url(&server)), None).await;
    assert_eq!((status, &body["reason"]), (401, &json!("ticket_invalid")));
    let mut open = server.connect("alice", "").await;
    open.caught_up().await;
    let key = server.key("api_key");
    http::request(&server.at("collect"), "DELETE", "/v1/users/alice/sessions", Some(&key), &[], b"").await;
    let closed = open.closed().await;
    assert_eq!((closed.code, closed.reason.as_str()), (4501, "token_revoked"));
    let mut again = Socket::open(&url(&server), Some(&good)).await;
    assert_eq!(again.closed().await.reason, "token_revoked");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ticket_may_come_in_the_first_frame_and_is_good_once() {
    let server = Server::start().await;
    let token = server.token("alice").await;
    let body = json!({"device": "web-1"});
    let place = http::post(&server.at("push"), "/v1/connect", Some(&token), &body).await.json();
    let (socket, ticket) = (place["socket"].as_str().unwrap(), place["ticket"].as_str().unwrap());
    assert_eq!(place["url"], format!("{socket}?ticket={ticket}"));
    let mut first = Socket::open(socket, None).await;
    first.say(&json!({"type": "auth", "ticket": ticket, "window": 7})).await;
    let welcome = first.expect("welcome").await;
    assert_eq!((&welcome["user"], &welcome["device"]), (&json!("alice"), &json!("web-1")));
    let mut second = Socket::open(socket, None).await;
    second.say(&json!({"type": "auth", "ticket": ticket})).await;
    let closed = second.closed().await;
    assert_eq!((closed.code, closed.reason.as_str()), (4501, "ticket_invalid"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_comes_with_its_message_and_another_one_under_the_same_id_is_a_conflict() {
    let server = Server::start().await;
    let mut socket = server.connect("alice", "").await;
    socket.caught_up().await;
    let publish =
        |event: Value| json!({"to": {"user": "alice"}, "payload": 1, "id": "order-1", "event": event});
    assert_eq!(server.try_publish(&publish(json!("order.paid"))).await.status, 202);
    assert_eq!(socket.expect("message").await["event"], "order.paid");
    assert_eq!(server.try_publish(&publish(json!("order.paid"))).await.status, 202);
    assert_eq!(server.try_publish(&publish(json!("order.shipped"))).await.status, 409);
    for bad in [json!("with space"), json!("x".repeat(65)), json!(""), json!(7)] {
        let answer = server.try_publish(&publish(bad)).await;
        assert_eq!((answer.status, answer.pointers()), (422, vec!["/event".to_owned()]));
    }
    let server = server.kill_and_restart().await;
    let history = server.get("/v1/users/alice/messages").await.json();
    assert_eq!(history["messages"][0]["event"], "order.paid");
    let seq = server.publish("alice", json!(2)).await;
    let after = server.get(&format!("/v1/users/alice/messages?after={}", seq - 1)).await.json();
    assert!(after["messages"][0].get("event").is_none(), "{after}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn users_read_their_own_history_forwards_and_backwards() {
    let server = Server::start().await;
    let seqs = server.publish_all("alice", (0..25).map(|n| json!(n))).await;
    server.publish("bob", json!("not for alice")).await;
    let token = server.token("alice").await;
    let (push, path) = (server.at("push"), "/v1/inbox/messages");
    let read = async |query: &str| http::get(&push, &format!("{path}{query}"), Some(&token)).await;
    let payloads = |page: &Value| -> Vec<Value> {
        page["messages"].as_array().unwrap().iter().map(|message| message["payload"].clone()).collect()
    };
    let all = read("").await.json();
    assert_eq!((payloads(&all), &all["next"]), ((0..25).map(|n| json!(n)).collect(), &Value::Null));
    let first = read(&format!("?after={}&limit=10", seqs[4])).await.json();
    assert_eq!(payloads(&first), (5..15).map(|n| json!(n)).collect::<Vec<_>>());
    assert_eq!(first["next"], seqs[14]);
    let newest = read(&format!("?before={}&limit=10", u64::MAX >> 11)).await.json();
    assert_eq!(payloads(&newest), (15..25).rev().map(|n| json!(n)).collect::<Vec<_>>());
    let older = read(&format!("?before={}&limit=100", newest["next"])).await.json();
    assert_eq!((payloads(&older), &older["next"]), ((0..15).rev().map(|n| json!(n)).collect(), &Value::Null));
    for bad in ["?after=1&before=2", "?after=-1", "?before=x", "?limit=0"] {
        assert_eq!(read(bad).await.status, 422, "{bad}");
    }
    assert_eq!(http::get(&push, path, None).await.status, 401);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_own_device_yields_first_and_a_user_without_place_is_refused_with_patience() {
    let limits =
        Options::default().with("limits.sessions_per_user", "3").with("limits.sessions_per_device", "2");
    // A first ping, at a random time, would make its session yield first.
    let server = Server::with(limits.with("limits.ping_ms", "3600000")).await;
    let open = async |device: &str| server.connect("alice", &format!("?device={device}")).await;
    let (mut phone, mut first, mut second) = (open("phone").await, open("web").await, open("web").await);
    for socket in [&mut phone, &mut first, &mut second] {
        socket.caught_up().await;
    }
    let mut third = open("web").await;
    third.caught_up().await;
    assert_eq!(first.closed().await.code, 4509, "the oldest of the same device");
    let refused = open("tablet").await.closed().await;
    assert_eq!((refused.code, refused.reason.as_str()), (4429, "rate_limited"));
    assert!(refused.hint["min_ms"].as_u64().unwrap() >= 60_000);
    server.publish("alice", json!(1)).await;
    for socket in [&mut phone, &mut second, &mut third] {
        assert_eq!(socket.messages(1).await, [json!(1)]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_client_says_that_it_is_is_shown() {
    let server = Server::start().await;
    let mut socket =
        authenticated(&server, "alice", json!({"client": "ringpush-js/1.0", "device": "web"})).await;
    socket.caught_up().await;
    let report = server.get("/v1/users/alice").await.json();
    assert_eq!(report["devices"][0]["client"], "ringpush-js/1.0", "{report}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_tokens_pass_and_only_where_tokens_are_due() {
    let server = Server::start().await;
    // A token of this key with a claim that makes it 8 KiB.
    let claims = json!({"sub": "alice", "exp": 4_102_444_800_u64, "padding": "x".repeat(5_900)});
    let key = jsonwebtoken::EncodingKey::from_secret(server.key("token_key").as_bytes());
    let long = jsonwebtoken::encode(&jsonwebtoken::Header::default(), &claims, &key).unwrap();
    assert!((7_500..8_192).contains(&long.len()), "{}", long.len());
    let mut socket = Socket::open(&url(&server), None).await;
    socket.say(&json!({"type": "auth", "token": long, "padding": "x".repeat(10_000)})).await;
    socket.caught_up().await;
    socket.say(&json!({"type": "refresh", "token": long})).await;
    socket.expect("refreshed").await;
    for (frame, code) in [
        (json!({"type": "ping", "padding": "x".repeat(4_097)}), 4513),
        (json!({"type": "refresh", "token": long, "padding": "x".repeat(5_000)}), 4513),
        (json!({"type": "ack", "seq": 1, "padding": "x".repeat(24 * 1024)}), 4513),
    ] {
        let mut socket = Socket::open(&url(&server), Some(&server.token("alice").await)).await;
        socket.caught_up().await;
        socket.say(&frame).await;
        assert_eq!(socket.closed().await.code, code, "{}", &frame.to_string()[..40]);
    }
    let mut huge = Socket::open(&url(&server), None).await;
    huge.say(&json!({"type": "auth", "token": "x".repeat(25 * 1024)})).await;
    assert_eq!(huge.closed().await.code, 4513);
}
