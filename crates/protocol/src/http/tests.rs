//! Bodies as senders write them, well and badly.

use super::*;
use crate::message::{LogId, Seq, TopicName, UserId};
use bytes::BytesMut;
use proptest::prelude::*;

const LIMITS: PublishLimits = PublishLimits { message_bytes: 64 * 1024, recipients: 1000, batch: 1000 };

fn publish(body: &str) -> Result<Publish, Problem> {
    parse_publish(&Bytes::copy_from_slice(body.as_bytes()), &LIMITS)
}

fn pointers(body: &str) -> (u16, Vec<String>) {
    let problem = publish(body).unwrap_err();
    (problem.status, problem.errors.into_iter().map(|e| e.pointer).collect())
}

#[test]
fn a_publish_keeps_its_payload_byte_for_byte() {
    let read = publish(r#" {"to":{"user":"alice"}, "payload": { "b" : 1.50 , "a":"\u00e9" } , "id":"x" } "#)
        .unwrap();
    assert_eq!(read.payload, r#"{ "b" : 1.50 , "a":"\u00e9" }"#);
    assert_eq!(read.ttl_s, None);
    assert_eq!(read.id.unwrap().as_str(), "x");
    assert_eq!(publish(r#"{"to":{"user":"a"},"payload":null}"#).unwrap().payload, "null");
    let escaped = publish(r#"{"to":{"user":"a\u00e9"},"payload":1,"more":"fields"}"#).unwrap();
    assert_eq!(escaped.to.users()[0].as_str(), "aé");
}

#[test]
fn only_a_large_payload_keeps_its_body_alive() {
    for (bytes, shared) in [(120, false), (SHARED_PAYLOAD - 3, false), (SHARED_PAYLOAD, true)] {
        let text = format!("\"{}\"", "x".repeat(bytes));
        let body = Bytes::from(format!(r#"{{"to":{{"user":"alice"}},"payload":{text}}}"#));
        let payload = parse_publish(&body, &LIMITS).unwrap().payload;
        assert_eq!(payload, text);
        assert_eq!(body.as_ptr_range().contains(&payload.as_ptr()), shared, "{bytes} bytes");
    }
}

#[test]
fn what_is_wrong_is_named_field_by_field() {
    for (body, expected) in [
        (r#"{}"#, (422, vec!["/to", "/payload"])),
        (r#"[]"#, (422, vec![""])),
        (r#"7"#, (422, vec![""])),
        (r#"{"to":{"user":"a"}}"#, (422, vec!["/payload"])),
        (r#"{"to":null,"payload":1}"#, (422, vec!["/to"])),
        (r#"{"to":"alice","payload":1}"#, (422, vec!["/to"])),
        (r#"{"to":["alice"],"payload":1}"#, (422, vec!["/to"])),
        (r#"{"to":{},"payload":1}"#, (422, vec!["/to"])),
        (r#"{"to":{"topic":"t","user":"a"},"payload":1}"#, (422, vec!["/to"])),
        (r#"{"to":{"topic":"t","topics":["t"]},"payload":1}"#, (422, vec!["/to"])),
        (r#"{"to":{"user":"t","except":["a"]},"payload":1}"#, (422, vec!["/to"])),
        (r#"{"to":{"everyone":1},"payload":1}"#, (422, vec!["/to/everyone"])),
        (r#"{"to":{"topic":"everyone"},"payload":1}"#, (422, vec!["/to/topic"])),
        (r#"{"to":{"topic":7},"payload":1}"#, (422, vec!["/to/topic"])),
        (r#"{"to":{"topics":[]},"payload":1}"#, (422, vec!["/to/topics"])),
        (r#"{"to":{"topics":["a","a b",7]},"payload":1}"#, (422, vec!["/to/topics/1", "/to/topics/2"])),
        (r#"{"to":{"topic":"t","except":["a",""]},"payload":1}"#, (422, vec!["/to/except/1"])),
        (r#"{"to":{"user":"a","users":["b"]},"payload":1}"#, (422, vec!["/to"])),
        (r#"{"to":{"user":7},"payload":1}"#, (422, vec!["/to/user"])),
        (r#"{"to":{"user":""},"payload":1}"#, (422, vec!["/to/user"])),
        (r#"{"to":{"user":"a\u0007"},"payload":1}"#, (422, vec!["/to/user"])),
        (r#"{"to":{"users":[]},"payload":1}"#, (422, vec!["/to/users"])),
        (r#"{"to":{"users":"a"},"payload":1}"#, (422, vec!["/to/users"])),
        (r#"{"to":{"users":["a","",7]},"payload":1}"#, (422, vec!["/to/users/1", "/to/users/2"])),
        (r#"{"to":{"user":"a"},"payload":1,"ttl_s":0}"#, (422, vec!["/ttl_s"])),
        (r#"{"to":{"user":"a"},"payload":1,"ttl_s":2592001}"#, (422, vec!["/ttl_s"])),
        (r#"{"to":{"user":"a"},"payload":1,"ttl_s":1.5}"#, (422, vec!["/ttl_s"])),
        (r#"{"to":{"user":"a"},"payload":1,"ttl_s":"60"}"#, (422, vec!["/ttl_s"])),
        (r#"{"to":{"user":"a"},"payload":1,"id":""}"#, (422, vec!["/id"])),
        (r#"{"to":{"user":"a"},"payload":1,"id":"é"}"#, (422, vec!["/id"])),
        (r#"{"to":{"user":"a"},"payload":1,"id":17}"#, (422, vec!["/id"])),
    ] {
        let (status, got) = pointers(body);
        assert_eq!((status, got.iter().map(String::as_str).collect::<Vec<_>>()), expected, "{body}");
    }
    for body in ["", "{", "not json", r#"{"to":{"user":"a"},"payload":nope}"#, "{} {}"] {
        assert_eq!(publish(body).unwrap_err().status, 400, "{body}");
    }
}

#[test]
fn limits_are_inclusive() {
    let payload = |bytes: usize| format!(r#"{{"to":{{"user":"a"}},"payload":"{}"}}"#, "x".repeat(bytes - 2));
    assert!(publish(&payload(65_536)).is_ok());
    assert_eq!(pointers(&payload(65_537)), (413, vec!["/payload".to_owned()]));
    let users = |count: usize| {
        let list: Vec<String> = (0..count).map(|n| format!("\"u{n}\"")).collect();
        format!(r#"{{"to":{{"users":[{}]}},"payload":1}}"#, list.join(","))
    };
    assert!(publish(&users(1000)).is_ok());
    assert_eq!(pointers(&users(1001)), (422, vec!["/to/users".to_owned()]));
}

#[test]
fn each_item_of_a_batch_stands_alone() {
    let body = Bytes::from_static(
        br#"{"messages":[{"to":{"user":"a"},"payload":1},{"to":{},"payload":1},7,{"to":{"user":"b"},"payload":[2]}]}"#,
    );
    let items = parse_batch(&body, &LIMITS).unwrap();
    assert_eq!(items.iter().map(Result::is_ok).collect::<Vec<_>>(), [true, false, false, true]);
    assert_eq!(items[3].as_ref().unwrap().payload, "[2]");
    for bad in [r#"{"messages":[]}"#, r#"{"messages":7}"#, "{}"] {
        assert_eq!(parse_batch(&Bytes::from_static(bad.as_bytes()), &LIMITS).unwrap_err().status, 422);
    }
}

#[test]
fn a_publish_that_was_not_stored_for_all_says_for_whom() {
    let user = |name: &str| UserId::parse(name).unwrap();
    let stored = Ok(Stored { seq: Seq::at(43), duplicate: false });
    let conflict = Err(PublishError::new(409, "another payload"));
    let busy = Err(PublishError::new(503, "later"));
    let id = MessageId::parse("m-1").unwrap();
    let all = Published {
        id: id.clone(),
        repeatable: true,
        accepted: vec![(user("a"), stored.clone())],
        topics: Vec::new(),
    };
    assert_eq!(all.problem(), None);
    let mut body = BytesMut::new();
    all.put(&mut body);
    assert_eq!(body, r#"{"id":"m-1","accepted":[{"user":"a","seq":43,"duplicate":false}]}"#);
    let mixed = |rest: Vec<_>| {
        Published { id: id.clone(), repeatable: true, accepted: rest, topics: Vec::new() }.problem().unwrap()
    };
    assert_eq!(mixed(vec![(user("a"), stored.clone()), (user("b"), conflict.clone())]).status, 409);
    let worst = mixed(vec![(user("a"), conflict), (user("b"), busy), (user("c"), stored)]);
    assert_eq!((worst.status, worst.retry_after_s), (503, Some(1)));
    let json: serde_json::Value = serde_json::from_slice(&worst.to_json()).unwrap();
    assert_eq!(json["accepted"][1]["error"]["status"], 503);
    assert_eq!(json["accepted"][2]["seq"], 43);
}

#[test]
fn a_publish_to_topics_says_for_each_how_many_have_it() {
    let topic = |name: &str| LogId::Topic(TopicName::parse(name).unwrap());
    let user = |name: &str| UserId::parse(name).unwrap();
    let busy = PublishError::new(503, "later");
    let of = |topics| Published {
        id: MessageId::parse("m").unwrap(),
        repeatable: true,
        accepted: Vec::new(),
        topics,
    };
    let whole = of(vec![(topic("news"), Ok(TopicOutcome::Members { members: 2, failed: Vec::new() }))]);
    assert_eq!(whole.problem(), None);
    let mut body = BytesMut::new();
    whole.put(&mut body);
    assert_eq!(body, r#"{"id":"m","accepted":[{"topic":"news","members":2,"stored":2,"failed":[]}]}"#);
    let log = of(vec![
        (topic("news"), Ok(TopicOutcome::Log(Stored { seq: Seq::at(9), duplicate: false }))),
        (LogId::Everyone, Ok(TopicOutcome::Log(Stored { seq: Seq::at(7), duplicate: true }))),
    ]);
    assert_eq!(log.problem(), None);
    let mut body = BytesMut::new();
    log.put(&mut body);
    let expected = r#"{"id":"m","accepted":[{"topic":"news","seq":9,"duplicate":false},{"everyone":true,"seq":7,"duplicate":true}]}"#;
    assert_eq!(body, expected);
    let part = of(vec![
        (topic("news"), Ok(TopicOutcome::Members { members: 2, failed: vec![(user("b"), busy.clone())] })),
        (topic("new"), Err(PublishError::new(404, "no such topic"))),
    ]);
    let problem = part.problem().unwrap();
    assert_eq!((problem.status, problem.detail.starts_with("2 of 3 ")), (503, true), "{problem:?}");
    let json: serde_json::Value = serde_json::from_slice(&problem.to_json()).unwrap();
    assert_eq!(json["accepted"][0]["stored"], 1);
    assert_eq!(json["accepted"][0]["failed"][0]["user"], "b");
    assert_eq!(json["accepted"][1]["error"]["status"], 404);
    let read: Problem = serde_json::from_value(json).unwrap();
    assert_eq!(read.accepted, problem.accepted);
}

#[test]
fn topics_are_read_with_those_who_are_left_out() {
    let to = |text: &str| publish(&format!(r#"{{"to":{text},"payload":1}}"#)).unwrap().to;
    let topic = |name: &str| LogId::Topic(TopicName::parse(name).unwrap());
    let bob = UserId::parse("bob").unwrap();
    assert_eq!(to(r#"{"topic":"news"}"#), Recipients::Topics { topics: vec![topic("news")], except: vec![] });
    assert_eq!(
        to(r#"{"topics":["b","a"],"except":["bob"]}"#),
        Recipients::Topics { topics: vec![topic("b"), topic("a")], except: vec![bob] }
    );
    let everyone = Recipients::Topics { topics: vec![LogId::Everyone], except: vec![] };
    assert_eq!(to(r#"{"everyone":true}"#), everyone);
    let many = |count: usize| vec!["\"t\""; count].join(",");
    let topics = |count: usize| publish(&format!(r#"{{"to":{{"topics":[{}]}},"payload":1}}"#, many(count)));
    assert!(topics(TOPICS_PER_PUBLISH).is_ok() && topics(TOPICS_PER_PUBLISH + 1).is_err());
}

proptest! {
    #[test]
    fn no_body_makes_it_panic(body in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = parse_publish(&Bytes::from(body.clone()), &LIMITS);
        let _ = parse_batch(&Bytes::from(body), &LIMITS);
    }

    #[test]
    fn nothing_but_json_makes_it_panic(text in r#"[{}\[\]":,a-z0-9\\ ]{0,80}"#) {
        let _ = publish(&text);
        let _ = publish(&format!(r#"{{"to":{text},"payload":{text}}}"#));
    }
}

#[test]
fn a_batch_reaches_ten_thousand_recipients_and_refuses_the_item_beyond_and_those_after_it() {
    let item = |count: usize| {
        let users: Vec<String> = (0..count).map(|n| format!("\"u{n}\"")).collect();
        format!(r#"{{"to":{{"users":[{}]}},"payload":1}}"#, users.join(","))
    };
    let batch = |items: &[String]| Bytes::from(format!(r#"{{"messages":[{}]}}"#, items.join(",")));
    let ten = vec![item(1_000); 10];
    let parsed = parse_batch(&batch(&ten), &LIMITS).unwrap();
    assert!(parsed.len() == 10 && parsed.iter().all(Result::is_ok));
    let eleven = [ten, vec![item(1), item(1)]].concat();
    let parsed = parse_batch(&batch(&eleven), &LIMITS).unwrap();
    assert!(parsed[..10].iter().all(Result::is_ok));
    let beyond = |parsed: &[Result<Publish, Problem>]| {
        parsed.iter().all(|one| {
            one.as_ref()
                .is_err_and(|problem| problem.status == 422 && problem.detail.contains("10000 recipients"))
        })
    };
    assert!(parsed.len() == 12 && beyond(&parsed[10..]), "also the one that would fit");
    // What is wrong anyway reaches nobody.
    let wrong = [vec![item(1_001); 20], vec![item(1_000); 10]].concat();
    assert!(parse_batch(&batch(&wrong), &LIMITS).is_ok());
    // But each of its faults is told, and that has its price too.
    let nobody = format!(r#"{{"to":{{"users":[{}]}},"payload":1}}"#, vec!["\"\""; 1_000].join(","));
    let parsed = parse_batch(&batch(&vec![nobody; 1_000]), &LIMITS).unwrap();
    assert!(parsed.len() == 1_000 && beyond(&parsed[11..]));
}

#[test]
fn a_list_that_is_far_too_long_is_counted_and_not_kept() {
    let users = vec!["\"u\""; 200_000].join(",");
    let body = Bytes::from(format!(r#"{{"to":{{"users":[{users}]}},"payload":1}}"#));
    let problem = parse_publish(&body, &LIMITS).unwrap_err();
    assert!(problem.errors[0].detail.contains("200000"), "{problem:?}");
    let list = format!("[{users}]");
    let UpTo { items, count } = serde_json::from_str::<UpTo<'_>>(&list).unwrap();
    assert_eq!((items.len(), count), (LIST_ITEMS, 200_000));
    for no_list in ["{}", "7", "null", "[1,"] {
        assert!(serde_json::from_str::<UpTo<'_>>(no_list).is_err(), "{no_list}");
    }
}

#[test]
fn a_payload_is_nested_128_levels_deep_at_the_most() {
    let parse = |payload: &str| {
        let body = Bytes::from(format!(r#"{{"to":{{"user":"a"}},"payload":{payload}}}"#));
        parse_publish(&body, &LIMITS).map(drop).map_err(|problem| problem.status)
    };
    let lists = |n: usize| "[".repeat(n) + &"]".repeat(n);
    let objects = |n: usize| r#"{"a":"#.repeat(n) + "1" + &"}".repeat(n);
    for deep in [lists, objects] {
        assert_eq!(parse(&deep(128)), Ok(()));
        assert_eq!(parse(&deep(129)), Err(422));
        assert_eq!(parse(&deep(5_000)), Err(422));
    }
    // Brackets in strings, and beside one another, are not levels.
    assert_eq!(parse(&format!(r#""{}\"{}""#, "[".repeat(1_000), "{".repeat(1_000))), Ok(()));
    assert_eq!(parse(&format!("[{}]", vec!["[]"; 1_000].join(","))), Ok(()));
}
