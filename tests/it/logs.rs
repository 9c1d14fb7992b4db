//! Topics with a log, and everyone: one append, and every socket of every member reads it.

use serde_json::{Value, json};

use ringpush_testing::{Options, Server, Socket, eventually, http};

async fn with(topics: &[(&str, &[&str])]) -> Server {
    let server = Server::start().await;
    for (topic, members) in topics {
        let made = server.put(&format!("/v1/topics/{topic}"), &json!({"delivery": "log"})).await;
        assert_eq!(made.status, 201, "{made:?}");
        if !members.is_empty() {
            change(&server, topic, members, &[]).await;
        }
    }
    server
}

async fn change(server: &Server, topic: &str, add: &[&str], remove: &[&str]) -> Value {
    let path = format!("/v1/topics/{topic}/members");
    let changed = server.send("POST", &path, &json!({"add": add, "remove": remove})).await;
    assert_eq!(changed.status, 202, "{changed:?}");
    changed.json()
}

async fn publish(server: &Server, to: Value, payload: Value) -> http::Answer {
    server.try_publish(&json!({"to": to, "payload": payload})).await
}

/// Publishes to a topic, and returns the position in its log.
async fn to_topic(server: &Server, topic: &str, payload: Value) -> u64 {
    let sent = publish(server, json!({"topic": topic}), payload).await;
    assert_eq!(sent.status, 202, "{sent:?}");
    let accepted = &sent.json()["accepted"][0];
    assert_eq!((&accepted["topic"], &accepted["duplicate"]), (&json!(topic), &json!(false)));
    accepted["seq"].as_u64().unwrap()
}

/// A socket that understands logs, with these fields in its `auth` frame.
async fn open(server: &Server, user: &str, device: &str, more: Value) -> (Socket, Value) {
    let url = format!("ws://{}/v1/ws", server.at("push"));
    let mut socket = Socket::open(&url, None).await;
    let mut auth =
        json!({"type": "auth", "token": server.token(user).await, "device": device, "topics": true});
    auth.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    socket.say(&auth).await;
    let welcome = socket.expect("welcome").await;
    (socket, welcome)
}

async fn level(socket: &mut Socket) -> Vec<Value> {
    let mut before = Vec::new();
    loop {
        let (others, frame) = socket.until("caught_up").await;
        before.extend(others);
        if frame["all"] == true {
            return before;
        }
        before.push(frame);
    }
}

/// Nothing comes but that the inbox is level, and then all.
async fn only_level(socket: &mut Socket) {
    let before = level(socket).await;
    assert!(matches!(&before[..], [inbox] if *inbox == json!({"type": "caught_up", "seq": 0})), "{before:?}");
}

/// The next messages, of whichever logs.
async fn messages(socket: &mut Socket, count: usize) -> Vec<Value> {
    let mut all = Vec::with_capacity(count);
    while all.len() < count {
        all.push(socket.until("message").await.1);
    }
    all
}

fn payloads(frames: &[Value]) -> Vec<Value> {
    let messages = frames.iter().filter(|frame| frame["type"] == "message");
    messages.map(|frame| frame["payload"].clone()).collect()
}

/// A device that is new to everyone's log begins at most so many messages before its end, and not
/// where nothing has ever been: else it would be told of a gap when it comes back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_device_begins_with_the_last_messages_to_everyone_and_is_told_of_no_gap() {
    let server = Server::start().await;
    let (mut first, welcome) = open(&server, "alice", "first", json!({})).await;
    let at = welcome["everyone"].clone();
    assert_eq!(at["after"], at["head"], "{welcome}");
    only_level(&mut first).await;
    let (mut first, _) = open(&server, "alice", "first", json!({"everyone": at["after"]})).await;
    only_level(&mut first).await;
    // By its stored position.
    let (mut first, _) = open(&server, "alice", "first", json!({})).await;
    only_level(&mut first).await;
    for n in 0..3 {
        assert_eq!(publish(&server, json!({"everyone": true}), json!(n)).await.status, 202);
    }
    // The node has heard of them, which may be a moment after their sender was answered.
    assert_eq!(payloads(&messages(&mut first, 3).await), [0, 1, 2]);
    let (mut second, _) = open(&server, "alice", "second", json!({})).await;
    assert_eq!(payloads(&level(&mut second).await), [0, 1, 2]);
}

/// Where a device began is kept from its first socket on: it has all that came since, however much.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_never_acked_is_not_taken_for_a_new_one() {
    let server = Server::with(Options::default().with("limits.everyone_backlog", "2")).await;
    let (mut known, _) = open(&server, "alice", "known", json!({})).await;
    only_level(&mut known).await;
    drop(known);
    for n in 0..5 {
        assert_eq!(publish(&server, json!({"everyone": true}), json!(n)).await.status, 202);
    }
    let (mut known, _) = open(&server, "alice", "known", json!({})).await;
    // The last may come after it is level: the node hears of it after its sender was answered.
    assert_eq!(payloads(&messages(&mut known, 5).await), [0, 1, 2, 3, 4]);
    let (mut new, _) = open(&server, "alice", "new", json!({})).await;
    assert_eq!(payloads(&level(&mut new).await), [3, 4]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_has_it_at_once_or_when_it_comes_and_everyone_reaches_all() {
    let server = with(&[("news", &["alice", "bob"])]).await;
    let (mut alice, welcome) = open(&server, "alice", "web", json!({})).await;
    assert!(welcome["features"].as_array().unwrap().contains(&json!("topics")));
    let at = welcome["topics"]["news"].clone();
    assert_eq!(at["after"], at["head"], "{welcome}");
    level(&mut alice).await;
    let first = to_topic(&server, "news", json!("hello")).await;
    assert_eq!(at["head"], first - 1);
    let message = alice.expect("message").await;
    assert_eq!(
        (&message["topic"], &message["seq"], &message["payload"]),
        (&json!("news"), &json!(first), &json!("hello"))
    );
    assert_eq!(message.get("via"), None);
    let sent = publish(&server, json!({"everyone": true}), json!("all")).await;
    let everyone = sent.json()["accepted"][0].clone();
    assert_eq!(
        (sent.status, &everyone["everyone"], &everyone["duplicate"]),
        (202, &json!(true), &json!(false))
    );
    let message = alice.expect("message").await;
    assert_eq!((&message["everyone"], &message["seq"]), (&json!(true), &everyone["seq"]));
    // Bob was away, and carol is no member.
    let (mut bob, _) = open(&server, "bob", "web", json!({})).await;
    let mut had = payloads(&level(&mut bob).await);
    had.sort_by_key(Value::to_string);
    assert_eq!(had, ["all", "hello"]);
    let (mut carol, welcome) = open(&server, "carol", "web", json!({})).await;
    assert_eq!(welcome["topics"], json!({}));
    assert_eq!(payloads(&level(&mut carol).await), ["all"]);
    // One who does not know of logs is told so.
    let mut old = server.connect("bob", "?device=old").await;
    let (_, caught_up) = old.until("caught_up").await;
    assert_eq!(caught_up["all"], Value::Null);
    old.is_quiet(std::time::Duration::from_millis(200)).await;
    assert!(server.metric("ringpush_topic_unaware_total").await >= 1.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_goes_on_where_it_acked_and_a_client_where_it_says() {
    let server = with(&[("news", &["alice"])]).await;
    let (mut alice, _) = open(&server, "alice", "web", json!({})).await;
    level(&mut alice).await;
    let mut all = Vec::new();
    for n in 0..5 {
        all.push(to_topic(&server, "news", json!(n)).await);
    }
    assert_eq!(payloads(&messages(&mut alice, 5).await), [0, 1, 2, 3, 4]);
    alice.say(&json!({"type": "ack", "topics": {"news": all[2]}})).await;
    // An ack of something that is not read crosses with a leave.
    alice.say(&json!({"type": "ack", "topics": {"other": 7}, "everyone": 0})).await;
    alice.close().await;
    server.nobody_is_left().await;
    let (mut again, welcome) = open(&server, "alice", "web", json!({})).await;
    assert_eq!(welcome["topics"]["news"], json!({"after": all[2], "head": all[4]}));
    let frames = level(&mut again).await;
    assert_eq!(payloads(&frames), [3, 4]);
    let caught_up = frames.iter().find(|frame| frame["type"] == "caught_up" && frame["topic"] == "news");
    assert_eq!(caught_up.unwrap()["seq"], all[4]);
    let (mut told, _) = open(&server, "alice", "web", json!({"topics": {"news": all[0]}})).await;
    assert_eq!(payloads(&level(&mut told).await), [1, 2, 3, 4]);
    // Also after a restart, if it was written in time.
    again.say(&json!({"type": "ack", "topics": {"news": all[3]}})).await;
    again.close().await;
    told.close().await;
    server.nobody_is_left().await;
    tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    let server = server.kill_and_restart().await;
    let (mut last, welcome) = open(&server, "alice", "web", json!({})).await;
    assert_eq!(welcome["topics"]["news"]["after"], all[3]);
    assert_eq!(payloads(&level(&mut last).await), [4]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_joins_or_leaves_while_it_is_connected_is_told() {
    let server = with(&[("news", &[]), ("team", &["alice"])]).await;
    let (mut alice, _) = open(&server, "alice", "web", json!({})).await;
    level(&mut alice).await;
    let before = to_topic(&server, "news", json!("before")).await;
    change(&server, "news", &["alice"], &[]).await;
    let joined = alice.expect("topic").await;
    assert_eq!(joined, json!({"type": "topic", "topic": "news", "state": "joined", "after": before}));
    to_topic(&server, "news", json!("after")).await;
    assert_eq!(alice.expect("message").await["payload"], "after");
    change(&server, "team", &[], &["alice"]).await;
    assert_eq!(alice.expect("topic").await, json!({"type": "topic", "topic": "team", "state": "left"}));
    to_topic(&server, "team", json!("not for her")).await;
    // Removed and made anew: whoever was a member is none.
    let gone = server.send("DELETE", "/v1/topics/news", &json!({})).await;
    assert_eq!(gone.status, 202);
    assert_eq!(alice.expect("topic").await["state"], "left");
    server.put("/v1/topics/news", &json!({"delivery": "log"})).await;
    let after = to_topic(&server, "news", json!("of the second life")).await;
    change(&server, "news", &["alice"], &[]).await;
    assert_eq!(alice.expect("topic").await["after"], after);
    to_topic(&server, "news", json!("for her")).await;
    assert_eq!(alice.expect("message").await["payload"], "for her");
    // A client's own position from before it joined is a gap.
    let (mut old, _) = open(&server, "alice", "old", json!({"topics": {"news": before}})).await;
    let frames = level(&mut old).await;
    let gap = frames.iter().find(|frame| frame["type"] == "gap").unwrap();
    assert_eq!(
        *gap,
        json!({"type": "gap", "topic": "news", "after": before, "before": after + 1, "reason": "joined"})
    );
    assert_eq!(payloads(&frames), ["for her"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_limits_of_logs_are_told_and_left_out_users_get_a_gap() {
    let server = with(&[("news", &["alice", "bob"])]).await;
    let text = |bytes: usize| json!("x".repeat(bytes - 2));
    let news = || json!({"topic": "news"});
    assert_eq!(publish(&server, news(), text(16 * 1024)).await.status, 202);
    let large = publish(&server, news(), text(16 * 1024 + 1)).await;
    assert_eq!(large.status, 413, "{large:?}");
    let everyone = || json!({"everyone": true});
    assert_eq!(publish(&server, everyone(), text(4 * 1024)).await.status, 202);
    assert_eq!(publish(&server, everyone(), text(4 * 1024 + 1)).await.status, 413);
    let (mut alice, _) = open(&server, "alice", "web", json!({})).await;
    level(&mut alice).await;
    let sent = publish(&server, json!({"topic": "news", "except": ["alice"]}), json!("surprise")).await;
    let seq = sent.json()["accepted"][0]["seq"].as_u64().unwrap();
    let gap = alice.expect("gap").await;
    let expected =
        json!({"type": "gap", "topic": "news", "after": seq - 1, "before": seq + 1, "reason": "excepted"});
    assert_eq!(gap, expected);
    let (mut bob, _) = open(&server, "bob", "web", json!({})).await;
    assert!(payloads(&level(&mut bob).await).contains(&json!("surprise")));
    // A message under an id of its own is stored once.
    let repeat = json!({"to": {"topic": "news"}, "payload": 1, "id": "once"});
    let first = server.try_publish(&repeat).await.json()["accepted"][0].clone();
    let again = server.try_publish(&repeat).await.json()["accepted"][0].clone();
    assert_eq!((&again["seq"], &again["duplicate"]), (&first["seq"], &json!(true)));
    let conflict = json!({"to": {"topic": "news"}, "payload": 2, "id": "once"});
    assert_eq!(server.try_publish(&conflict).await.status, 409);
    // The eleventh to everyone in one second, of which two have been.
    let many = (0..20).map(|n| publish(&server, json!({"everyone": true}), json!(n)));
    let refused: Vec<http::Answer> = futures_util::future::join_all(many)
        .await
        .into_iter()
        .filter(|answer| answer.status == 429)
        .collect();
    assert!(!refused.is_empty() && refused.len() < 20, "{}", refused.len());
    assert_eq!(refused[0].header("retry-after"), "1");
    let other = server.put("/v1/topics/news", &json!({"delivery": "inbox"})).await;
    assert_eq!(other.status, 409, "{other:?}");
    let shown = server.get("/v1/topics/news").await.json();
    assert_eq!(
        (&shown["delivery"], &shown["members"], &shown["online"]),
        (&json!("log"), &json!(2), &json!(2))
    );
    assert_eq!(shown["head"], first["seq"]);
    let history = server.get("/v1/topics/news/messages").await.json();
    assert_eq!(history["messages"].as_array().unwrap().len(), 3);
    assert_eq!(history["messages"][0]["topic"], "news");
    let all = server.get("/v1/everyone/messages?limit=2").await.json();
    assert_eq!(all["messages"].as_array().unwrap().len(), 2);
    assert_eq!(all["messages"][0]["everyone"], true);
    assert_eq!(server.get("/v1/topics/mews/messages").await.status, 404);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_window_counts_all_logs_of_a_socket_together() {
    let server = with(&[("a", &["alice"]), ("b", &["alice"])]).await;
    let (mut alice, _) = open(&server, "alice", "web", json!({"window": 4})).await;
    level(&mut alice).await;
    for n in 0..6 {
        to_topic(&server, "a", json!(n)).await;
        to_topic(&server, "b", json!(n)).await;
        server.publish("alice", json!(n)).await;
    }
    let mut unacked = messages(&mut alice, 4).await;
    alice.is_quiet(std::time::Duration::from_millis(300)).await;
    let mut got = Vec::new();
    while got.len() < 18 {
        // The log with most of them: the inbox is read once half of the window is free.
        let count = |of: &Value| unacked.iter().filter(|message| message["topic"] == *of).count();
        let last = unacked.iter().max_by_key(|message| (count(&message["topic"]), message["seq"].as_u64()));
        let last = last.unwrap();
        let ack = match last["topic"].as_str() {
            Some(topic) => json!({"type": "ack", "topics": {topic: last["seq"]}}),
            None => json!({"type": "ack", "seq": last["seq"]}),
        };
        let of = last["topic"].clone();
        let freed = unacked.iter().filter(|message| message["topic"] == of).count();
        got.extend(unacked.iter().filter(|message| message["topic"] == of).cloned());
        unacked.retain(|message| message["topic"] != of);
        alice.say(&ack).await;
        let left = 18 - got.len() - unacked.len();
        unacked.extend(messages(&mut alice, freed.min(left)).await);
    }
    for of in [json!("a"), json!("b"), Value::Null] {
        let part: Vec<Value> = got.iter().filter(|message| message["topic"] == of).cloned().collect();
        assert_eq!(payloads(&part), [0, 1, 2, 3, 4, 5], "{of}");
    }
}

/// A client with a window that is slower than a topic: the inbox comes first, when the client comes
/// and while the topic goes on, and is never left behind for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_inbox_comes_before_topics_and_does_not_starve_behind_them() {
    let server = with(&[("busy", &["alice"])]).await;
    let away = |n: u64| json!(format!("away {n}"));
    for n in 0..40 {
        server.publish("alice", away(n)).await;
        to_topic(&server, "busy", json!(n)).await;
    }
    let (mut alice, _) = open(&server, "alice", "web", json!({"window": 10})).await;
    // Acks each message as soon as it has it. Returns those of the inbox and those of the topic.
    let ack = async |alice: &mut Socket| {
        let message = alice.until("message").await.1;
        let of_topic = message["topic"] == "busy";
        let ack = match of_topic {
            true => json!({"type": "ack", "topics": {"busy": message["seq"]}}),
            false => json!({"type": "ack", "seq": message["seq"]}),
        };
        alice.say(&ack).await;
        (of_topic, message["payload"].clone())
    };
    for n in 0..40 {
        assert_eq!(ack(&mut alice).await, (false, away(n)));
    }
    // The topic has a backlog now, and more of it comes than is taken.
    let mut of_topic = Vec::new();
    for n in 40..60 {
        server.publish("alice", away(n)).await;
        to_topic(&server, "busy", json!(n)).await;
        let mut before = 0;
        loop {
            let (is_of_topic, payload) = ack(&mut alice).await;
            if !is_of_topic {
                assert_eq!(payload, away(n));
                break;
            }
            of_topic.push(payload);
            before += 1;
            assert!(before <= 20, "an inbox waits for the messages that were sent before, and no longer");
        }
    }
    while of_topic.len() < 60 {
        let (is_of_topic, payload) = ack(&mut alice).await;
        assert!(is_of_topic, "{payload}");
        of_topic.push(payload);
    }
    assert_eq!(of_topic, (0..60).map(|n| json!(n)).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_that_is_left_gives_its_credit_back() {
    let server = with(&[("a", &["alice"])]).await;
    let (mut alice, _) = open(&server, "alice", "web", json!({"window": 2})).await;
    level(&mut alice).await;
    for n in 0..3 {
        to_topic(&server, "a", json!(n)).await;
    }
    assert_eq!(payloads(&messages(&mut alice, 2).await), [0, 1]);
    change(&server, "a", &[], &["alice"]).await;
    alice.expect("topic").await;
    server.publish("alice", json!("free again")).await;
    assert_eq!(alice.expect("message").await["payload"], "free again");
}

/// Frames above a tail are read in blocks, also where a block has more bytes than are read at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_backlog_of_large_messages_comes_whole_and_in_order() {
    let options = Options::default()
        .with("limits.topic_message_bytes", "65536")
        .with("limits.topic_per_s", "100000")
        .with("limits.tail_mib", "1");
    let server = Server::with(options).await;
    server.put("/v1/topics/big", &json!({"delivery": "log"})).await;
    change(&server, "big", &["alice"], &[]).await;
    // Somebody reads it, so that there is a tail; it keeps half a MiB.
    change(&server, "big", &["bob"], &[]).await;
    let (mut bob, _) = open(&server, "bob", "web", json!({})).await;
    level(&mut bob).await;
    let filler = "x".repeat(60_000);
    for n in 0..150 {
        to_topic(&server, "big", json!([n, filler])).await;
    }
    let all = messages(&mut bob, 150).await;
    let (mut alice, _) = open(&server, "alice", "web", json!({})).await;
    for expected in all {
        let message = alice.until("message").await.1;
        assert_eq!((&message["seq"], &message["payload"][0]), (&expected["seq"], &expected["payload"][0]));
    }
}

/// A message that was ended is held by the node, in a tail and in a block.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_was_ended_is_sent_to_nobody_any_more() {
    let server = with(&[("news", &["alice", "bob", "carol"]), ("other", &[])]).await;
    let first = to_topic(&server, "news", json!("first")).await;
    let (mut alice, _) = open(&server, "alice", "web", json!({})).await;
    let (mut bob, _) = open(&server, "bob", "web", json!({})).await;
    assert_eq!(payloads(&messages(&mut alice, 1).await), ["first"]);
    assert_eq!(payloads(&messages(&mut bob, 1).await), ["first"]);
    let second = to_topic(&server, "news", json!("second")).await;
    let third = to_topic(&server, "news", json!("third")).await;
    assert_eq!(payloads(&messages(&mut alice, 2).await), ["second", "third"]);
    for seq in [first, second] {
        let path = format!("/v1/topics/news/messages/{seq}");
        assert_eq!(server.send("DELETE", &path, &Value::Null).await.status, 202);
        assert_eq!(server.send("DELETE", &path, &Value::Null).await.status, 404, "it is over");
    }
    // A message behind it on the same way: the nodes know of the end by then.
    let fourth = to_topic(&server, "news", json!("fourth")).await;
    assert_eq!(payloads(&messages(&mut alice, 1).await), ["fourth"]);
    let (mut carol, _) = open(&server, "carol", "web", json!({})).await;
    assert_eq!(payloads(&level(&mut carol).await), ["third", "fourth"]);
    let history = server.get("/v1/topics/news/messages").await.json();
    let seqs: Vec<&Value> = history["messages"].as_array().unwrap().iter().map(|one| &one["seq"]).collect();
    assert_eq!(seqs, [&json!(third), &json!(fourth)]);
    for (path, status) in [
        ("news/messages/0", 404),
        ("news/messages/x", 422),
        ("nwes/messages/1", 404),
        ("other/messages/1", 404),
    ] {
        let answer = server.send("DELETE", &format!("/v1/topics/{path}"), &Value::Null).await;
        assert_eq!(answer.status, status, "{path}: {answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn open_topics_are_made_by_their_first_publish_or_join() {
    let server = Server::with(Options::default().with("topics.open", "match-*,score")).await;
    assert_eq!(server.send("GET", "/v1/topics/match-1", &Value::Null).await.status, 404);
    let nobody = server.send("POST", "/v1/topics/match-1/members", &json!({"remove": ["alice"]})).await;
    assert_eq!(nobody.status, 404, "whoever leaves makes nothing");
    change(&server, "match-1", &["alice"], &[]).await;
    to_topic(&server, "score", json!(1)).await;
    for name in ["match-1", "score"] {
        let topic = server.get(&format!("/v1/topics/{name}")).await;
        assert_eq!((topic.status, &topic.json()["delivery"]), (200, &json!("log")), "{topic:?}");
    }
    let (mut alice, _) = open(&server, "alice", "web", json!({})).await;
    to_topic(&server, "match-1", json!("goal")).await;
    assert_eq!(payloads(&messages(&mut alice, 1).await), ["goal"]);
    let other = publish(&server, json!({"topic": "matches"}), json!(1)).await;
    assert_eq!(other.status, 404, "{other:?}");
}

/// Sockets that read nothing fill what a node may hold: logs wait for room, inboxes do not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_for_slow_sockets_holds_logs_back_and_no_inbox() {
    let server = Server::with(Options::default().with("limits.outbound_mib", "1")).await;
    server.put("/v1/topics/news", &json!({"delivery": "log"})).await;
    change(&server, "news", &["alice"], &[]).await;
    let (mut alice, _) = open(&server, "alice", "web", json!({})).await;
    level(&mut alice).await;
    // Read here, and known to be.
    to_topic(&server, "news", json!("read")).await;
    assert_eq!(alice.until("message").await.1["payload"], "read");
    let mut slow = Vec::new();
    for n in 0..12 {
        slow.push(open(&server, &format!("slow-{n}"), "web", json!({})).await);
    }
    let names: Vec<String> = (0..12).map(|n| format!("slow-{n}")).collect();
    let large = "x".repeat(60_000);
    let waits = async || server.metric("ringpush_outbound_bytes").await;
    // The kernel takes the first ones, as many as it likes.
    eventually("more waits than may", async || {
        assert_eq!(publish(&server, json!({"users": names}), json!(large)).await.status, 202);
        waits().await > 1024.0 * 1024.0
    })
    .await;
    to_topic(&server, "news", json!("held back")).await;
    for n in 0..5 {
        server.publish("alice", json!(n)).await;
        // In her inbox nothing waits; of the log nothing comes before.
        assert_eq!(alice.until("message").await.1["payload"], n);
    }
    drop(slow);
    let message = alice.until("message").await.1;
    assert_eq!((&message["topic"], &message["payload"]), (&json!("news"), &json!("held back")));
    eventually("nothing waits any more", async || waits().await == 0.0).await;
}
