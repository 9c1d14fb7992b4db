use super::*;
use crate::message::{ClientName, DeviceId, Seq};
use crate::message::{MessageId, Millis, TopicName};

fn auth(credential: AuthCredential, options: SessionOptions) -> ClientFrame {
    ClientFrame::Auth(Box::new(AuthFrame { credential, options }))
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
    ] {
        let text = format!(r#"{{"type":"auth","token":"t","{field}":{bad}}}"#);
        let fault = ClientFrame::parse(text.as_bytes()).unwrap_err();
        assert!(fault.contains(field), "{text}: {fault}");
    }
}

fn message(payload: &str) -> Message {
    Message {
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
        Message { via: Some(std::sync::Arc::new(TopicName::parse("match-7").unwrap())), ..message("1") };
    let text = message_frame(&by_topic);
    assert!(std::str::from_utf8(&text).unwrap().contains(r#","via":"match-7","accepted_at""#));
    let ReceivedFrame::Message(read) = ReceivedFrame::parse(&text).unwrap() else { panic!("not a message") };
    assert_eq!(read.via.as_deref(), Some("match-7"));
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
        r#"{"type":"auth"}"#,
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
    let gap = ServerFrame::Gap { after: 41, before: 50, reason: GapReason::Expired };
    assert_eq!(gap.encode(), r#"{"type":"gap","after":41,"before":50,"reason":"expired"}"#);
    assert_eq!(ServerFrame::Pong.encode(), r#"{"type":"pong"}"#);
    let caught = ServerFrame::CaughtUp { seq: 43 };
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
    };
    let ReceivedFrame::Other(ServerFrame::Welcome { user, since, features, heartbeat_ms, began, .. }) =
        ReceivedFrame::parse(&written.encode()).unwrap()
    else {
        panic!("another frame")
    };
    assert_eq!((user.as_str(), since, heartbeat_ms, began), ("a\"用户", 41, None, Some(41)));
    assert_eq!(features, ["heartbeat"]);
}
