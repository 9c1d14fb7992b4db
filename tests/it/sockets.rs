//! One node and its sockets: resume, cursors, acks, devices, and frames that are none.

use std::time::Duration;

use serde_json::json;

use ringpush_testing::socket::Raw;
use ringpush_testing::{Options, Server, Socket, eventually};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_is_there_a_moment_later() {
    let server = Server::start().await;
    let mut socket = server.connect("alice", "?device=web-1").await;
    let welcome = socket.expect("welcome").await;
    assert_eq!(
        (&welcome["user"], &welcome["device"], &welcome["since"]),
        (&json!("alice"), &json!("web-1"), &json!(0))
    );
    assert_eq!(welcome["ping_every_ms"], 25_000);
    assert!(welcome["reconnect"]["max_ms"].as_u64().unwrap() >= 5_000 && welcome["epoch"].is_u64());
    assert_eq!(socket.expect("caught_up").await["seq"], 0, "there is nothing");
    let seq = server.publish("alice", json!({"text": "hello"})).await;
    let message = socket.expect("message").await;
    assert_eq!((&message["seq"], &message["payload"]["text"]), (&json!(seq), &json!("hello")));
    for field in ["id", "accepted_at", "expires_at"] {
        assert!(message[field].is_string(), "{message}");
    }
    server.publish("bob", json!("not for alice")).await;
    socket.is_quiet(Duration::from_millis(100)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_token_may_come_in_the_first_frame() {
    let server = Server::start().await;
    let url = format!("ws://{}/v1/ws", server.at("push"));
    let first = server.publish("alice", json!(1)).await;
    server.publish("alice", json!(2)).await;
    let mut socket = Socket::open(&url, None).await;
    let token = server.token("alice").await;
    socket.say(&json!({"type": "auth", "token": token, "device": "web-1", "since": first})).await;
    assert_eq!(socket.expect("welcome").await["device"], "web-1");
    assert_eq!(socket.expect("message").await["payload"], 2);
    socket.expect("caught_up").await;
    socket.say(&json!({"type": "ping"})).await;
    socket.expect("pong").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_device_resumes_from_its_own_cursor() {
    let server = Server::start().await;
    let (mut web, mut app) =
        (server.connect("alice", "?device=web").await, server.connect("alice", "?device=app").await);
    web.caught_up().await;
    app.caught_up().await;
    let seqs = server.publish_all("alice", (0..10).map(|n| json!(n))).await;
    assert_eq!(web.messages(10).await.len(), 10);
    assert_eq!(app.messages(10).await.len(), 10);
    web.ack(seqs[9]).await;
    app.ack(seqs[3]).await;
    app.ack(seqs[1]).await; // Going back is ignored.
    eventually("both cursors", async || {
        let devices = server.get("/v1/users/alice").await.json()["devices"].clone();
        devices[0]["acked"] == seqs[3] && devices[1]["acked"] == seqs[9]
    })
    .await;
    let report = server.get("/v1/users/alice").await.json();
    assert_eq!(report["online"], true);
    assert!(report["devices"][0]["connected_at"].is_string() && report["devices"][0]["node"].is_string());
    web.close().await;
    app.close().await;
    server.nobody_is_left().await;
    let later = server.publish_all("alice", (10..500).map(|n| json!(n))).await;
    // An hour of messages, in order; then caught up; then live.
    let mut app = server.connect("alice", "?device=app").await;
    assert_eq!(app.expect("welcome").await["since"], seqs[3]);
    let (frames, caught_up) = app.until("caught_up").await;
    let payloads: Vec<u64> = frames.iter().map(|f| f["payload"].as_u64().unwrap()).collect();
    assert_eq!(payloads, (4..500).collect::<Vec<_>>());
    assert_eq!(caught_up["seq"], *later.last().unwrap());
    server.publish("alice", json!("live")).await;
    assert_eq!(app.expect("message").await["payload"], "live");
    let mut web = server.connect("alice", "?device=web").await;
    assert_eq!(web.caught_up().await.len(), 491);
    let mut third = server.connect("alice", "?device=new").await;
    assert_eq!(third.caught_up().await.len(), 501, "a device that has never acked starts at the beginning");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_tabs_of_one_user_both_receive() {
    let server = Server::start().await;
    let (mut one, mut two) = (server.connect("alice", "").await, server.connect("alice", "").await);
    one.caught_up().await;
    two.caught_up().await;
    server.publish("alice", json!(1)).await;
    assert_eq!(one.messages(1).await, two.messages(1).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn since_says_where_to_start() {
    let server = Server::start().await;
    let seqs = server.publish_all("alice", (0..5).map(|n| json!(n))).await;
    let mut after = server.connect("alice", &format!("?since={}", seqs[2])).await;
    assert_eq!(after.caught_up().await, [json!(3), json!(4)]);
    let mut latest = server.connect("alice", "?since=latest").await;
    assert_eq!(latest.expect("welcome").await["since"], seqs[4]);
    assert_eq!(latest.expect("caught_up").await["seq"], seqs[4]);
    let mut beyond = server.connect("alice", &format!("?since={}", seqs[4] + 900)).await;
    beyond.expect("welcome").await;
    let gap = beyond.expect("gap").await;
    assert_eq!(gap, json!({"type": "gap", "after": seqs[4] + 900, "before": seqs[4] + 1, "reason": "reset"}));
    beyond.expect("caught_up").await;
    let mut long_ago = server.connect("alice", "?since=7").await;
    long_ago.expect("welcome").await;
    let gap = long_ago.expect("gap").await;
    assert_eq!(gap, json!({"type": "gap", "after": 7, "before": seqs[0], "reason": "expired"}));
    for socket in [&mut after, &mut latest, &mut beyond] {
        assert!(socket.last == 0 || socket.last == seqs[4]);
    }
    server.publish("alice", json!("next")).await;
    for socket in [&mut latest, &mut beyond] {
        assert_eq!(socket.expect("message").await["seq"], seqs[4] + 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_has_expired_is_told_as_a_gap_and_numbers_go_on() {
    let server = Server::with(Options::default().with("limits.janitor_ms", "100")).await;
    let first = server.publish("alice", json!("stays")).await;
    for n in 0..3 {
        let body = json!({"to": {"user": "alice"}, "payload": n, "ttl_s": 1});
        assert_eq!(server.try_publish(&body).await.status, 202);
    }
    eventually("their end", async || {
        server.get("/v1/users/alice/messages").await.json()["messages"].as_array().unwrap().len() == 1
    })
    .await;
    let mut socket = server.connect("alice", "").await;
    socket.expect("welcome").await;
    assert_eq!(socket.expect("message").await["payload"], "stays");
    let gap = socket.expect("gap").await;
    assert_eq!(gap, json!({"type": "gap", "after": first, "before": first + 4, "reason": "expired"}));
    socket.expect("caught_up").await;
    assert_eq!(server.publish("alice", json!("next")).await, first + 4);
    assert_eq!(socket.expect("message").await["seq"], first + 4);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_ack_above_what_was_sent_counts_as_the_last_one() {
    let server = Server::start().await;
    let mut socket = server.connect("alice", "?device=d").await;
    socket.caught_up().await;
    socket.ack(1 << 50).await; // Nothing was sent yet.
    let seq = server.publish("alice", json!(1)).await;
    socket.messages(1).await;
    socket.ack(seq + 1_000).await;
    eventually("the cursor", async || {
        server.get("/v1/users/alice").await.json()["devices"][0]["acked"] == seq
    })
    .await;
    let next = server.publish("alice", json!(2)).await;
    socket.close().await;
    let mut again = server.connect("alice", "?device=d").await;
    assert_eq!(again.caught_up().await, [json!(2)], "{next} was never acked");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_oldest_session_goes_when_a_device_has_too_many() {
    // A session with an unanswered ping yields first, and the first ping comes at a random time.
    let server = Server::with(Options::default().with("limits.ping_ms", "3600000")).await;
    let mut sockets = Vec::new();
    for _ in 0..17 {
        let mut socket = server.connect("alice", "").await;
        socket.caught_up().await;
        sockets.push(socket);
    }
    let closed = sockets[0].closed().await;
    assert_eq!((closed.code, closed.reason.as_str()), (4509, "replaced"));
    server.publish("alice", json!(1)).await;
    for socket in &mut sockets[1..] {
        assert_eq!(socket.messages(1).await, [json!(1)]);
    }
    drop(sockets);
    server.nobody_is_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frames_that_are_none_are_closed_by_their_code() {
    let server = Server::start().await;
    for text in
        ["not json", "[]", "{}", r#"{"type":"shout"}"#, r#"{"type":"ack","seq":"1"}"#, r#"{"type":"ack"}"#]
    {
        let mut socket = server.connect("alice", "").await;
        socket.caught_up().await;
        socket.say_text(text).await;
        let closed = socket.closed().await;
        assert_eq!((closed.code, closed.error.as_deref()), (4500, Some("bad_frame")), "{text}");
        assert!(!closed.reconnect, "it would only do it again");
    }
    let mut binary = server.connect("alice", "").await;
    binary.say_binary(b"{}").await;
    assert_eq!(binary.closed().await.code, 4500);
    let mut large = server.connect("alice", "").await;
    large.say_text(&format!(r#"{{"type":"ping","x":"{}"}}"#, "x".repeat(5_000))).await;
    assert_eq!(large.closed().await.code, 4513);
    server.nobody_is_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn faults_of_the_protocol_itself_have_codes_of_their_own() {
    let server = Server::start().await;
    let (at, token) = (server.at("push"), server.token("alice").await);
    let unmasked = [0x81, 2, b'{', b'}'].to_vec();
    let reserved = Raw::frame(0xf1, b"{}");
    let invalid = Raw::frame(0x81, &[0xff, 0xfe]);
    let mut fragments = Raw::frame(0x01, &[b' '; 13_000]);
    fragments.extend(Raw::frame(0x00, &[b' '; 13_000]));
    for (name, bytes, code) in [
        ("unmasked", unmasked, 1002),
        ("reserved bits", reserved, 1002),
        ("invalid UTF-8", invalid, 1007),
        ("too large in pieces", fragments, 4513),
    ] {
        let mut raw = Raw::open(&at, &token).await;
        raw.write(&bytes).await;
        assert_eq!(raw.close_code().await, code, "{name}");
    }
    server.nobody_is_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_socket_must_show_who_it_is_in_time() {
    let server = Server::with(Options::default().with("limits.auth_deadline_ms", "300")).await;
    let url = format!("ws://{}/v1/ws", server.at("push"));
    let mut silent = Socket::open(&url, None).await;
    let closed = silent.closed().await;
    assert_eq!((closed.code, closed.reconnect), (4408, true));
    let mut bad = Socket::open(&url, None).await;
    bad.say(&json!({"type": "auth", "token": "nonsense"})).await;
    assert_eq!(bad.closed().await.code, 4501);
    let mut late = Socket::open(&url, None).await;
    late.say(&json!({"type": "ack", "seq": 1})).await;
    assert_eq!(late.closed().await.code, 4501);
    assert_eq!(Socket::try_open(&url, Some("nonsense"), &[]).await.err(), Some(401));
    let in_url = format!("{url}?access_token={}", server.token("alice").await);
    let mut unread = Socket::open(&in_url, None).await;
    assert_eq!(
        unread.closed().await.code,
        4408,
        "a token in the URL is not looked at unless that is allowed"
    );
    server.nobody_is_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_gives_no_sign_of_life_is_let_go() {
    let server = Server::with(Options::default().with("limits.ping_ms", "150")).await;
    let (at, token) = (server.at("push"), server.token("alice").await);
    // Raw: it reads, and answers no ping.
    let mut silent = Raw::open(&at, &token).await;
    let mut answering = server.connect("alice", "").await;
    answering.caught_up().await;
    let pinging = tokio::spawn(async move {
        let closed = tokio::time::timeout(Duration::from_secs(2), answering.closed()).await;
        assert!(closed.is_err(), "a client that answers is kept: {closed:?}");
    });
    assert_eq!(silent.close_code().await, 4451);
    pinging.await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_reader_is_neither_dropped_nor_buffered_and_gets_all_of_it() {
    let server = Server::start().await;
    let mut slow = server.connect("alice", "").await;
    let mut quick = server.connect("alice", "?device=quick").await;
    slow.caught_up().await;
    quick.caught_up().await;
    let payload = "x".repeat(20_000);
    let before = resident_kib(server.pid());
    for n in 0..60 {
        let seqs = server.publish_all("alice", (0..25).map(|m| json!([n, m, payload]))).await;
        assert_eq!(seqs.len(), 25);
        quick.messages(25).await;
    }
    assert!(
        server.metric("ringpush_demoted_total").await >= 1.0,
        "30 MB do not fit into a socket that nobody reads"
    );
    let grown = resident_kib(server.pid()).saturating_sub(before);
    let messages = slow.messages(1500).await;
    assert_eq!(messages[1499][0], 59);
    assert_eq!(messages[1499][1], 24);
    // The store keeps 30 MB of messages in memory until they are flushed; a copy for the slow one
    // would come on top.
    assert!(grown < 120_000, "{grown} KiB more");
}

fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").trim().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_asks_and_never_reads_cannot_make_the_server_queue_without_end() {
    let server = Server::start().await;
    let mut raw = Raw::open(&server.at("push"), &server.token("alice").await).await;
    let pings = Raw::frame(0x81, br#"{"type":"ping"}"#).repeat(1_000);
    let before = resident_kib(server.pid());
    for _ in 0..300 {
        raw.write(&pings).await;
        tokio::time::sleep(Duration::from_millis(60)).await;
        if server.metric("ringpush_demoted_total").await > 0.0 {
            break;
        }
    }
    assert!(server.metric("ringpush_demoted_total").await > 0.0, "its socket is full");
    for _ in 0..20 {
        raw.write(&pings).await;
        tokio::time::sleep(Duration::from_millis(60)).await;
    }
    let grown = resident_kib(server.pid()).saturating_sub(before);
    assert!(grown < 20_000, "{grown} KiB more");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_answers_to_pings_that_nobody_reads_are_not_kept_without_end() {
    let server = Server::with(Options::default().with("limits.client_frames_per_s", "1000000")).await;
    let mut raw = Raw::open(&server.at("push"), &server.token("alice").await).await;
    assert_eq!(raw.text().await["type"], "welcome");
    assert_eq!(raw.text().await["type"], "caught_up");
    let pings = Raw::frame(0x89, &[b'x'; 125]).repeat(1_000);
    let before = resident_kib(server.pid());
    for _ in 0..300 {
        raw.write(&pings).await;
    }
    // 37 MB of answers, of which the kernel takes some.
    let grown = resident_kib(server.pid()).saturating_sub(before);
    assert!(grown < 20_000, "{grown} KiB more");
    server.publish("alice", json!(1)).await;
    assert_eq!(raw.text_after_pongs().await["payload"], 1, "the client reads again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_is_still_writing_hears_why_it_was_closed() {
    let server = Server::start().await;
    let mut socket = server.connect("alice", "").await;
    socket.caught_up().await;
    socket.say_text(&format!(r#"{{"type":"ping","x":"{}"}}"#, "x".repeat(1_000_000))).await;
    assert_eq!(socket.closed().await.code, 4513);
    server.nobody_is_left().await;
}
