//! Topics: who is a member, and who has what was published to it.

use serde_json::{Value, json};

use ringpush_testing::{Server, http};

/// A server with these topics and their members.
async fn with(topics: &[(&str, &[&str])]) -> Server {
    let server = Server::start().await;
    for (topic, members) in topics {
        let made = server.put(&format!("/v1/topics/{topic}"), &json!({})).await;
        assert_eq!(made.status, 201, "{made:?}");
        if !members.is_empty() {
            assert_eq!(members_of(&server, topic, members, &[]).await["added"], members.len());
        }
    }
    server
}

async fn members_of(server: &Server, topic: &str, add: &[&str], remove: &[&str]) -> Value {
    let path = format!("/v1/topics/{topic}/members");
    let changed = server.send("POST", &path, &json!({"add": add, "remove": remove})).await;
    assert_eq!(changed.status, 202, "{changed:?}");
    changed.json()
}

async fn publish(server: &Server, to: Value, payload: Value) -> http::Answer {
    server.try_publish(&json!({"to": to, "payload": payload})).await
}

/// Payload and topic of each message of a user.
async fn inbox(server: &Server, user: &str) -> Vec<(Value, Value)> {
    let history = server.get(&format!("/v1/users/{user}/messages")).await.json();
    let messages = history["messages"].as_array().unwrap().iter();
    messages.map(|message| (message["payload"].clone(), message["via"].clone())).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_member_has_it_also_one_that_was_away() {
    let server = with(&[("news", &["alice", "bob"])]).await;
    let mut alice = server.connect("alice", "").await;
    alice.caught_up().await;
    let sent = publish(&server, json!({"topic": "news"}), json!("hello")).await;
    assert_eq!(sent.status, 202, "{sent:?}");
    let expected = json!([{"topic": "news", "members": 2, "stored": 2, "failed": []}]);
    assert_eq!(sent.json()["accepted"], expected);
    let (_, shown) = alice.until("message").await;
    assert_eq!((&shown["payload"], &shown["via"]), (&json!("hello"), &json!("news")));
    let direct = server.publish("bob", json!("for you")).await;
    let mut bob = server.connect("bob", "").await;
    let (_, first) = bob.until("message").await;
    assert_eq!((&first["payload"], &first["via"]), (&json!("hello"), &json!("news")));
    let (_, second) = bob.until("message").await;
    assert_eq!((&second["seq"], &second["via"]), (&json!(direct), &Value::Null));
    assert_eq!(first["seq"], direct - 1, "one order with everything else");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_publishes_after_a_change_reaches_the_members_of_then() {
    let server = with(&[("team", &["alice"])]).await;
    let to = || json!({"topic": "team"});
    publish(&server, to(), json!(1)).await;
    assert_eq!(members_of(&server, "team", &["bob"], &["alice"]).await["removed"], 1);
    publish(&server, to(), json!(2)).await;
    members_of(&server, "team", &["alice"], &[]).await;
    publish(&server, to(), json!(3)).await;
    let payloads = |messages: Vec<(Value, Value)>| messages.into_iter().map(|one| one.0).collect::<Vec<_>>();
    assert_eq!(payloads(inbox(&server, "alice").await), [1, 3]);
    assert_eq!(payloads(inbox(&server, "bob").await), [2, 3]);
    let nobody = members_of(&server, "team", &[], &["alice", "bob"]).await;
    assert_eq!(nobody["removed"], 2);
    let sent = publish(&server, to(), json!(4)).await;
    assert_eq!((sent.status, &sent.json()["accepted"][0]["members"]), (202, &json!(0)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repeat_reaches_those_who_have_joined_and_nobody_twice() {
    let server = with(&[("news", &["alice"]), ("other", &["alice"])]).await;
    let repeat = |to: Value| json!({"to": to, "payload": 1, "id": "once"});
    server.try_publish(&repeat(json!({"topic": "news"}))).await;
    members_of(&server, "news", &["bob"], &[]).await;
    let again = server.try_publish(&repeat(json!({"topic": "news"}))).await.json();
    assert_eq!(again["accepted"][0], json!({"topic": "news", "members": 2, "stored": 2, "failed": []}));
    assert_eq!((inbox(&server, "alice").await.len(), inbox(&server, "bob").await.len()), (1, 1));
    // The same id by another topic, and to the user, is another message.
    server.try_publish(&repeat(json!({"topic": "other"}))).await;
    let direct = server.try_publish(&repeat(json!({"user": "alice"}))).await.json();
    assert_eq!(direct["accepted"][0]["duplicate"], false);
    let via: Vec<Value> = inbox(&server, "alice").await.into_iter().map(|one| one.1).collect();
    assert_eq!(via, [json!("news"), json!("other"), Value::Null]);
    let conflict = json!({"to": {"topic": "news"}, "payload": 2, "id": "once"});
    let refused = server.try_publish(&conflict).await;
    assert_eq!(refused.status, 409);
    let accepted = refused.json()["accepted"][0].clone();
    assert_eq!((&accepted["stored"], &accepted["failed"][0]["error"]["status"]), (&json!(0), &json!(409)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_topics_stand_alone_and_some_users_are_left_out() {
    let server = with(&[("a", &["alice", "bob"]), ("b", &["bob"])]).await;
    let sent = publish(&server, json!({"topics": ["b", "a"], "except": ["alice"]}), json!(1)).await;
    assert_eq!(sent.status, 202, "{sent:?}");
    let accepted = sent.json()["accepted"].clone();
    assert_eq!((&accepted[0]["topic"], &accepted[0]["members"]), (&json!("b"), &json!(1)));
    assert_eq!((&accepted[1]["topic"], &accepted[1]["members"]), (&json!("a"), &json!(1)));
    assert!(inbox(&server, "alice").await.is_empty());
    assert_eq!(inbox(&server, "bob").await, [(json!(1), json!("b")), (json!(1), json!("a"))]);
    let sent = publish(&server, json!({"topics": ["a", "c"]}), json!(2)).await;
    assert_eq!((sent.status, sent.pointers().len()), (404, 0));
    let accepted = sent.json()["accepted"].clone();
    assert_eq!((&accepted[0]["stored"], &accepted[1]["error"]["status"]), (&json!(2), &json!(404)));
    assert_eq!(inbox(&server, "alice").await.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_that_is_not_there_is_told_with_a_near_name() {
    let server = with(&[("match-7", &[]), ("market", &[])]).await;
    let unknown = publish(&server, json!({"topic": "match7"}), json!(1)).await;
    assert_eq!(unknown.status, 404);
    let detail = unknown.json()["detail"].as_str().unwrap().to_owned();
    assert!(detail.contains("did you mean match-7") && !detail.contains("market"), "{detail}");
    for (method, path) in
        [("GET", "/v1/topics/match7"), ("DELETE", "/v1/topics/match7"), ("GET", "/v1/topics/match7/members")]
    {
        let answer = server.send(method, path, &Value::Null).await;
        assert_eq!(answer.status, 404, "{method} {path}: {answer:?}");
    }
    let joined = server.send("POST", "/v1/topics/match7/members", &json!({"add": ["a"]})).await;
    assert_eq!(joined.status, 404);
    let nothing_near = publish(&server, json!({"topic": "xyz"}), json!(1)).await.json();
    assert!(!nothing_near["detail"].as_str().unwrap().contains("did you mean"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn topics_are_made_shown_listed_and_removed() {
    let server = with(&[("b.c", &["alice"]), ("a", &["alice", "bob"]), ("b", &[])]).await;
    let again = server.put("/v1/topics/a", &json!({"delivery": "inbox", "ttl_s": 60})).await;
    assert_eq!((again.status, &again.json()["ttl_s"]), (200, &json!(60)));
    let shown = server.get("/v1/topics/a").await.json();
    assert_eq!(
        (&shown["delivery"], &shown["members"], &shown["ttl_s"]),
        (&json!("inbox"), &json!(2), &json!(60))
    );
    let names = |page: &Value| -> Vec<String> {
        let topics = page["topics"].as_array().unwrap();
        topics.iter().map(|topic| topic["topic"].as_str().unwrap().to_owned()).collect()
    };
    let first = server.get("/v1/topics?limit=2").await.json();
    assert_eq!((names(&first), &first["next"]), (vec!["a".into(), "b".into()], &json!("b")));
    let whole = server.get("/v1/topics?after=&limit=").await.json();
    assert_eq!(server.get("/v1/topics?limit=1001").await.json(), whole, "more than 1000 counts as 1000");
    let rest = server.get("/v1/topics?limit=2&after=b").await.json();
    assert_eq!((names(&rest), &rest["next"]), (vec!["b.c".into()], &Value::Null));
    assert_eq!(names(&server.get("/v1/users/alice/topics").await.json()), ["a", "b.c"]);
    let page = server.get("/v1/topics/a/members?limit=1").await.json();
    assert_eq!((&page["members"], &page["next"]), (&json!(["alice"]), &json!("alice")));
    let page = server.get("/v1/topics/a/members?after=alice").await.json();
    assert_eq!((&page["members"], &page["next"]), (&json!(["bob"]), &Value::Null));
    // The topic's life of a message holds where the sender names none.
    publish(&server, json!({"topic": "a"}), json!(1)).await;
    let message = server.get("/v1/users/bob/messages").await.json()["messages"][0].clone();
    let times = ["accepted_at", "expires_at"].map(|name| message[name].as_str().unwrap().to_owned());
    let seconds = times.map(|time| ringpush::message::Millis::parse_rfc3339(&time).unwrap().0 / 1000);
    assert_eq!(seconds[1] - seconds[0], 60);
    // Made anew, it has no members.
    assert_eq!(server.send("DELETE", "/v1/topics/a", &Value::Null).await.status, 202);
    assert_eq!(publish(&server, json!({"topic": "a"}), json!(2)).await.status, 404);
    assert_eq!(server.put("/v1/topics/a", &json!({})).await.status, 201);
    assert_eq!(server.get("/v1/topics/a").await.json()["members"], 0);
    assert_eq!(publish(&server, json!({"topic": "a"}), json!(3)).await.json()["accepted"][0]["members"], 0);
    let left = server.send("DELETE", "/v1/users/alice/topics", &Value::Null).await;
    assert_eq!((left.status, &left.json()["removed"]), (202, &json!(1)));
    assert!(names(&server.get("/v1/users/alice/topics").await.json()).is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_takes_a_thousand_members_and_a_request_ten_thousand_recipients() {
    let names: Vec<String> = (0..1_001).map(|n| format!("u{n:04}")).collect();
    let all: Vec<&str> = names.iter().map(String::as_str).collect();
    let server = with(&[("big", &[])]).await;
    let changed = members_of(&server, "big", &all, &[]).await;
    assert_eq!(changed["added"], 1_000);
    assert_eq!(changed["refused"][0]["user"], "u1000");
    assert!(changed["refused"][0]["detail"].as_str().unwrap().contains("1000"), "{changed}");
    let sent = publish(&server, json!({"topic": "big"}), json!(1)).await.json();
    assert_eq!(sent["accepted"][0]["stored"], 1_000);
    assert_eq!(inbox(&server, "u0999").await, [(json!(1), json!("big"))]);
    let ten = vec!["big"; 10];
    assert_eq!(publish(&server, json!({"topics": ten}), json!(2)).await.status, 202);
    let eleven = publish(&server, json!({"topics": vec!["big"; 11]}), json!(3)).await;
    assert_eq!((eleven.status, eleven.pointers()), (422, vec!["/to".to_owned()]));
    assert_eq!(
        inbox(&server, "u0000").await.len(),
        2,
        "one publish is one message, however often a topic is named"
    );
    let item = |to: Value| json!({"to": to, "payload": 4});
    let messages: Vec<Value> = std::iter::repeat_n(item(json!({"topic": "big"})), 11)
        .chain([item(json!({"user": "last"}))])
        .collect();
    let batch = server.send("POST", "/v1/messages/batch", &json!({"messages": messages})).await;
    let results = batch.json()["results"].clone();
    assert_eq!(results[9]["accepted"][0]["stored"], 1_000);
    assert_eq!(
        (&results[10]["error"]["status"], &results[11]["error"]["status"]),
        (&json!(422), &json!(422))
    );
    assert!(inbox(&server, "last").await.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_requests_about_topics_are_refused_by_name() {
    let server = with(&[("news", &[])]).await;
    for name in ["everyone", "-a", "a%20b", "a%2Fb", &"x".repeat(65), "%FF"] {
        let answer = server.put(&format!("/v1/topics/{name}"), &json!({})).await;
        assert_eq!(answer.status, 422, "{name}: {answer:?}");
    }
    for (body, pointer) in [
        (json!({"delivery": "mail"}), "/delivery"),
        (json!({"delivery": ["log"]}), "/delivery"),
        (json!({"ttl_s": 0}), "/ttl_s"),
        (json!([]), ""),
    ] {
        let answer = server.put("/v1/topics/news", &body).await;
        assert_eq!((answer.status, answer.pointers()), (422, vec![pointer.to_owned()]), "{body}");
    }
    let many: Vec<String> = (0..10_001).map(|n| format!("u{n}")).collect();
    for (body, pointer) in [
        (json!({}), ""),
        (json!({"add": ["a", ""]}), "/add/1"),
        (json!({"add": ["a"], "remove": ["a"]}), "/add/0"),
        (json!({"remove": "a"}), "/remove"),
        (json!({"add": many}), "/add"),
    ] {
        let answer = server.send("POST", "/v1/topics/news/members", &body).await;
        assert_eq!((answer.status, answer.pointers()), (422, vec![pointer.to_owned()]), "{pointer}");
    }
    for (to, pointer) in [
        (json!({"topic": "news", "user": "a"}), "/to"),
        (json!({"topic": "a b"}), "/to/topic"),
        (json!({"topics": []}), "/to/topics"),
        (json!({"topics": vec!["news"; 101]}), "/to/topics"),
        (json!({"topic": "news", "except": vec!["a"; 101]}), "/to/except"),
        (json!({"user": "a", "except": ["b"]}), "/to"),
        (json!({"everyone": false}), "/to/everyone"),
        (json!({"everyone": true, "topic": "news"}), "/to"),
    ] {
        let answer = publish(&server, to.clone(), json!(1)).await;
        assert_eq!((answer.status, answer.pointers()), (422, vec![pointer.to_owned()]), "{to}");
    }
    for path in [
        "/v1/topics?limit=0",
        "/v1/topics?limit=+3",
        "/v1/topics?after=a%20b",
        "/v1/topics/news/members?limit=x",
    ] {
        assert_eq!(server.get(path).await.status, 422, "{path}");
    }
    let at = server.at("collect");
    for (method, path) in [
        ("GET", "/v1/topics"),
        ("PUT", "/v1/topics/news"),
        ("DELETE", "/v1/topics/news"),
        ("POST", "/v1/topics/news/members"),
        ("GET", "/v1/users/a/topics"),
        ("DELETE", "/v1/users/a/topics"),
    ] {
        let stranger = http::request(&at, method, path, None, &[], b"").await;
        assert_eq!(stranger.status, 401, "{method} {path}");
        let stranger = http::request(&at, "PATCH", path, None, &[], b"").await;
        assert_eq!(stranger.status, 405, "{path}");
    }
    assert_eq!(server.get("/v1/topics/news").await.json()["members"], 0, "nothing was changed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_and_what_they_were_sent_survive_a_kill() {
    let server = with(&[("news", &["alice"])]).await;
    publish(&server, json!({"topic": "news"}), json!(1)).await;
    members_of(&server, "news", &["bob"], &[]).await;
    let server = server.kill_and_restart().await;
    let sent = publish(&server, json!({"topic": "news"}), json!(2)).await.json();
    assert_eq!(sent["accepted"][0]["stored"], 2);
    let via = || json!("news");
    assert_eq!(inbox(&server, "alice").await, [(json!(1), via()), (json!(2), via())]);
    assert_eq!(inbox(&server, "bob").await, [(json!(2), via())]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_who_is_forgotten_is_a_new_one() {
    let server = with(&[("news", &["alice", "bob"])]).await;
    publish(&server, json!({"topic": "news"}), json!(1)).await;
    let mut alice = server.connect("alice", "?device=web").await;
    let before = alice.until("message").await.1["seq"].as_u64().unwrap();
    alice.say(&json!({"type": "ack", "seq": before})).await;
    let old = server.token("alice").await;
    let gone = server.send("DELETE", "/v1/users/alice", &Value::Null).await;
    assert_eq!(gone.status, 202, "{gone:?}");
    assert_eq!(alice.closed().await.code, 4501);
    let url = format!("ws://{}/v1/ws", server.at("push"));
    assert_eq!(ringpush_testing::Socket::open(&url, Some(&old)).await.closed().await.code, 4501);
    let user = server.get("/v1/users/alice").await.json();
    assert_eq!((&user["devices"], &user["online"]), (&json!([]), &json!(false)));
    assert!(inbox(&server, "alice").await.is_empty());
    assert!(server.get("/v1/users/alice/topics").await.json()["topics"].as_array().unwrap().is_empty());
    assert_eq!(server.get("/v1/topics/news").await.json()["members"], 1);
    let mut anew = server.connect("alice", "?device=web").await;
    anew.caught_up().await;
    let next = server.publish("alice", json!(2)).await;
    assert_eq!(next, before + 1, "numbers go on");
    assert_eq!(anew.until("message").await.1["seq"], next);
    assert_eq!(inbox(&server, "bob").await.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_takes_a_thousand_topics_and_rows_of_ended_ones_do_not_count() {
    let server = Server::start().await;
    let make = async |n: usize| {
        let path = format!("/v1/topics/t{n:04}");
        assert_eq!(server.put(&path, &json!({})).await.status, 201);
        let path = format!("{path}/members");
        server.send("POST", &path, &json!({"add": ["alice"]})).await.json()
    };
    for n in 0..1_000 {
        assert_eq!(make(n).await["added"], 1, "{n}");
    }
    let refused = make(1_000).await;
    assert_eq!((&refused["added"], &refused["refused"][0]["user"]), (&json!(0), &json!("alice")));
    assert!(refused["refused"][0]["detail"].as_str().unwrap().contains("1000"), "{refused}");
    server.send("DELETE", "/v1/topics/t0500", &Value::Null).await;
    assert_eq!(make(1_001).await["added"], 1, "the row of the one that has ended does not count");
    let topics = server.get("/v1/users/alice/topics").await.json();
    assert_eq!(topics["topics"].as_array().unwrap().len(), 1_000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_repeat_mends_goes_before_what_it_does_not() {
    let server = with(&[("a", &["alice"])]).await;
    // The names are near one another, and are looked for once in a request.
    let sent = publish(&server, json!({"topics": ["aa", "ab", "a"], "except": []}), json!(1)).await;
    assert_eq!(sent.status, 404);
    let accepted = sent.json()["accepted"].clone();
    let detail = |n: usize| accepted[n]["error"]["detail"].as_str().unwrap().to_owned();
    assert!(detail(0).contains("did you mean a?") && !detail(1).contains("did you mean"), "{accepted}");
    assert_eq!(accepted[2]["stored"], 1);
}
