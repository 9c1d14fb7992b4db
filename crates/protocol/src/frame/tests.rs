use std::sync::Arc;

use super::*;
use crate::message::{ClientName, DeviceId, Seq};
use crate::message::{LogEntry, MessageId, Millis, TopicName, Via};

fn auth(credential: AuthCredential, options: SessionOptions) -> ClientFrame {
    ClientFrame::Auth(Box::new(AuthFrame { credential: Some(credential), options }))
}

#[test]
fn a_bad_value_in_auth_is_named() {
    for (field, bad) in [
        ("window", "0"),
        ("window", "-1"),
        ("window", "10001"),
        ("window", "1.5"),
        ("window", "\"256\""),
        ("begin", "\"newest\""),
        ("begin", "7"),
        ("heartbeat", "1"),
        ("since", "-1"),
        ("device", "\"a b\""),
        ("device", "5"),
        ("client", "[]"),
        ("client", "\"\""),
        ("ticket", "\"as well\""),
        ("topics", "7"),
        ("topics", r#"{"news":-1}"#),
        ("topics", r#"{"news":9007199254740992}"#),
        ("everyone", "7"),
    ] {
        let text = format!(r#"{{"type":"auth","token":"t","{field}":{bad}}}"#);
        let fault = ClientFrame::parse(text.as_bytes()).unwrap_err();
        assert!(fault.contains(field), "{text}: {fault}");
    }
}

fn message(payload: &str) -> Message {
    Message {
        trace: None,
        event: None,
        via: None,
        seq: Seq::new(43).unwrap(),
        id: MessageId::parse(r#"order "17"\paid"#).unwrap(),
        accepted_at: Millis(1_795_380_566_120),
        expires_at: Millis(1_795_380_567_120),
        payload: Bytes::copy_from_slice(payload.as_bytes()),
    }
}

#[test]
fn a_message_passes_its_payload_through_byte_for_byte() {
    let text = message_frame(&message(r#"{ "b":1,  "a":[1.0e5,"\u00e9"] }"#));
    assert_eq!(
        std::str::from_utf8(&text).unwrap(),
        "{\"type\":\"message\",\"seq\":43,\"id\":\"order \\\"17\\\"\\\\paid\",\
         \"accepted_at\":\"2026-11-22T20:49:26.120Z\",\"expires_at\":\"2026-11-22T20:49:27.120Z\",\
         \"payload\":{ \"b\":1,  \"a\":[1.0e5,\"\\u00e9\"] }}"
    );
    let ReceivedFrame::Message(read) = ReceivedFrame::parse(&text).unwrap() else { panic!("not a message") };
    assert_eq!((read.seq, read.id.as_str()), (43, r#"order "17"\paid"#));
    assert_eq!(read.payload.get(), r#"{ "b":1,  "a":[1.0e5,"\u00e9"] }"#);
}

#[test]
fn a_message_that_came_by_a_topic_names_it() {
    let by_topic =
        Message { via: Some(Arc::new(Via::Inbox(TopicName::parse("match-7").unwrap()))), ..message("1") };
    let text = message_frame(&by_topic);
    assert!(std::str::from_utf8(&text).unwrap().contains(r#","via":"match-7","accepted_at""#));
    let ReceivedFrame::Message(read) = ReceivedFrame::parse(&text).unwrap() else { panic!("not a message") };
    assert_eq!((read.via.as_deref(), read.of.is_inbox()), (Some("match-7"), true));
}

#[test]
fn a_message_of_a_log_names_the_log() {
    let in_log = Message { via: Some(Arc::new(Via::Log(LogEntry::default()))), ..message("1") };
    for (log, field) in [
        (LogId::Topic(TopicName::parse("match-7").unwrap()), r#""topic":"match-7","#),
        (LogId::Everyone, r#""everyone":true,"#),
    ] {
        let text = log_message_frame(&log, &in_log);
        let start = format!(r#"{{"type":"message",{field}"seq":43,"id""#);
        assert!(std::str::from_utf8(&text).unwrap().starts_with(&start));
        let ReceivedFrame::Message(read) = ReceivedFrame::parse(&text).unwrap() else { panic!() };
        assert_eq!((read.of.log(), read.via), (Some(log), None));
    }
}

#[test]
fn the_frames_of_logs_are_what_the_protocol_says() {
    let of = |log: &LogId| OfLog::from(log);
    let news = LogId::Topic(TopicName::parse("news").unwrap());
    for (frame, text) in [
        (
            ServerFrame::CaughtUp { seq: Some(43), of: OfLog::default(), all: false },
            r#"{"type":"caught_up","seq":43}"#,
        ),
        (
            ServerFrame::CaughtUp { seq: Some(9), of: of(&news), all: false },
            r#"{"type":"caught_up","seq":9,"topic":"news"}"#,
        ),
        (
            ServerFrame::CaughtUp { seq: None, of: OfLog::default(), all: true },
            r#"{"type":"caught_up","all":true}"#,
        ),
        (
            ServerFrame::Gap { of: of(&LogId::Everyone), after: 1, before: 3, reason: GapReason::Joined },
            r#"{"type":"gap","everyone":true,"after":1,"before":3,"reason":"joined"}"#,
        ),
        (
            ServerFrame::Topic { topic: "news".into(), state: TopicState::Joined, after: Some(9) },
            r#"{"type":"topic","topic":"news","state":"joined","after":9}"#,
        ),
        (
            ServerFrame::Topic { topic: "news".into(), state: TopicState::Left, after: None },
            r#"{"type":"topic","topic":"news","state":"left"}"#,
        ),
    ] {
        assert_eq!(std::str::from_utf8(&frame.encode()).unwrap(), text);
        let ReceivedFrame::Other(read) = ReceivedFrame::parse(text.as_bytes()).unwrap() else { panic!() };
        assert_eq!(read, frame);
    }
}

#[test]
fn an_ack_names_the_inbox_or_logs_or_both() {
    let acks = |text: &str| ClientFrame::parse(text.as_bytes());
    let news = TopicName::parse("news").unwrap();
    let both = LogAcks { seq: Some(3), topics: vec![(news, 901)], everyone: Some(7) };
    assert_eq!(
        acks(r#"{"type":"ack","seq":3,"topics":{"news":901},"everyone":7}"#),
        Ok(ClientFrame::AckLogs(Box::new(both)))
    );
    let alone = LogAcks { everyone: Some(7), ..LogAcks::default() };
    assert_eq!(acks(r#"{"type":"ack","everyone":7}"#), Ok(ClientFrame::AckLogs(Box::new(alone))));
    for bad in [r#""topics":{"news":-1}"#, r#""topics":{".":1}"#, r#""topics":[]"#, r#""everyone":true"#] {
        assert!(acks(&format!(r#"{{"type":"ack",{bad}}}"#)).is_err(), "{bad}");
    }
    let many: Vec<String> = (0..=TOPICS_IN_AUTH).map(|n| format!(r#""t{n}":1"#)).collect();
    let many = format!(r#"{{"type":"auth","token":"t","topics":{{{}}}}}"#, many.join(","));
    assert!(acks(&many).unwrap_err().contains("at most 128"));
}

#[test]
fn client_frames_read_back_as_written() {
    for frame in [
        ClientFrame::Ack(43),
        ClientFrame::Ping,
        ClientFrame::Refresh("t".into()),
        auth(AuthCredential::Token("t".into()), SessionOptions::default()),
        auth(
            AuthCredential::Ticket("t".into()),
            SessionOptions {
                device: Some(DeviceId::parse("web-1").unwrap()),
                since: Some(Since::After(Seq::new(41).unwrap())),
                begin: Some(Begin::Oldest),
                heartbeat: Some(false),
                window: Some(WINDOW_MAX),
                client: Some(ClientName::parse("ringpush-js/1.0").unwrap()),
                logs: Some(Box::default()),
            },
        ),
        ClientFrame::AckLogs(Box::new(LogAcks {
            seq: Some(1),
            topics: vec![(TopicName::parse("news").unwrap(), 9)],
            everyone: Some(0),
        })),
        ClientFrame::Watch(TopicName::parse("news").unwrap(), WatchSince::Last),
        ClientFrame::Watch(TopicName::parse("news").unwrap(), WatchSince::Latest),
        ClientFrame::Watch(TopicName::parse("news").unwrap(), WatchSince::After(Seq::at(7))),
        ClientFrame::Unwatch(TopicName::parse("news").unwrap()),
        auth(
            AuthCredential::Token("t".into()),
            SessionOptions {
                logs: Some(Box::new(LogOptions {
                    topics: vec![(TopicName::parse("news").unwrap(), Seq::at(900))],
                    everyone: Some(Seq::at(7)),
                })),
                ..SessionOptions::default()
            },
        ),
        auth(
            AuthCredential::Token("t".into()),
            SessionOptions {
                since: Some(Since::Latest),
                begin: Some(Begin::Latest),
                ..SessionOptions::default()
            },
        ),
    ] {
        assert_eq!(ClientFrame::parse(frame.encode().as_bytes()), Ok(frame));
    }
}

#[test]
fn what_is_not_a_frame_is_said_to_be_so() {
    for text in [
        "",
        "null",
        "[]",
        r#"["ping",null,null,null,null]"#,
        "{",
        "{}",
        r#"{"type":"shout"}"#,
        r#"{"type":7}"#,
        r#"{"type":"ack"}"#,
        r#"{"type":"ack","seq":"43"}"#,
        r#"{"type":"ack","seq":-1}"#,
        r#"{"type":"ack","seq":1.5}"#,
        r#"{"type":"ack","seq":9007199254740992}"#,
        r#"{"type":"auth","token":"t","topics":{"a b":1}}"#,
        r#"{"type":"auth","token":"t","device":"no spaces"}"#,
        r#"{"type":"auth","token":"t","since":"soon"}"#,
        r#"{"type":"refresh","token":5}"#,
    ] {
        assert!(ClientFrame::parse(text.as_bytes()).is_err(), "{text}");
    }
}

#[test]
fn unknown_fields_and_unknown_types_are_ignored_by_the_side_that_must() {
    assert_eq!(ClientFrame::parse(br#"{"type":"ack","seq":4,"extra":[1]}"#), Ok(ClientFrame::Ack(4)));
    assert!(matches!(ReceivedFrame::parse(br#"{"type":"confetti"}"#), Ok(ReceivedFrame::Unknown)));
}

#[test]
fn server_frames_carry_the_agreed_names() {
    let of = OfLog::default();
    let gap = ServerFrame::Gap { of: of.clone(), after: 41, before: 50, reason: GapReason::Expired };
    assert_eq!(gap.encode(), r#"{"type":"gap","after":41,"before":50,"reason":"expired"}"#);
    assert_eq!(ServerFrame::Pong.encode(), r#"{"type":"pong"}"#);
    let caught = ServerFrame::CaughtUp { seq: Some(43), of, all: false };
    assert_eq!(caught.encode(), r#"{"type":"caught_up","seq":43}"#);
}

#[test]
fn the_welcome_that_is_written_is_the_one_that_is_read() {
    let reconnect = ReconnectHint { min_ms: 0, max_ms: 5_000 };
    let written = WelcomeFrame {
        user: "a\"用户",
        device: "web-1",
        node: "push-1",
        session: "s",
        generation: "g",
        epoch: 7,
        since: 41,
        ping_every_ms: 25_000,
        reconnect,
        token_expires_at: "2026-11-28T00:00:00.000Z",
        server_time: "2026-11-27T00:00:00.000Z",
        features: &["heartbeat"],
        heartbeat_ms: None,
        began: Some(41),
        topics: Some(BTreeMap::from([("news", LogPosition { after: 900, head: 950 })])),
        everyone: None,
        missing: &[],
    };
    let ReceivedFrame::Other(ServerFrame::Welcome {
        user,
        since,
        features,
        heartbeat_ms,
        began,
        topics,
        everyone,
        missing,
        ..
    }) = ReceivedFrame::parse(&written.encode()).unwrap()
    else {
        panic!("another frame")
    };
    assert_eq!(topics.unwrap()["news"], LogPosition { after: 900, head: 950 });
    assert_eq!((everyone, missing), (None, Vec::new()));
    assert_eq!((user.as_str(), since, heartbeat_ms, began), ("a\"用户", 41, None, Some(41)));
    assert_eq!(features, ["heartbeat"]);
}
