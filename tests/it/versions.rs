//! Mixed versions: clients and peers of earlier versions against the server of today, and the other
//! way round, by what they really said (tests/recorded).

use prost::Message as _;
use ringpush::wire::frame::ReceivedFrame;
use ringpush::wire::proto::peer;
use ringpush_testing::{Server, Socket, http, root};
use serde_json::{Value, json};

/// Fields that must be as recorded; of the others their types.
const SAME: [&str; 9] =
    ["type", "user", "device", "payload", "id", "code", "duplicate", "ping_every_ms", "reconnect"];

fn recorded(name: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(root().join("tests/recorded/first").join(name)).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Whether a client that knows `then` finds in `now` all that it knows.
fn has_all_of(then: &Value, now: &Value, at: &str) {
    match (then, now) {
        (Value::Object(then), Value::Object(now)) => {
            for (name, value) in then {
                let path = format!("{at}/{name}");
                let new = now.get(name).unwrap_or_else(|| panic!("{path} is gone"));
                if SAME.contains(&name.as_str()) {
                    assert_eq!(value, new, "{path}");
                } else {
                    has_all_of(value, new, &path);
                }
            }
        }
        (Value::Array(then), Value::Array(now)) => {
            assert_eq!(then.len(), now.len(), "{at}");
            then.iter().zip(now).for_each(|(then, now)| has_all_of(then, now, at));
        }
        _ => {
            let same = std::mem::discriminant(then) == std::mem::discriminant(now);
            assert!(same, "{at} was {then}, and is {now}");
        }
    }
}

/// Opens a socket as the client of a recording did.
async fn open(server: &Server, name: &str, token: &str) -> Socket {
    let at = format!("ws://{}/v1/ws", server.at("push"));
    match name {
        "bearer.jsonl" => Socket::open(&format!("{at}?device=web-1&since=0"), Some(token)).await,
        "auth-frame.jsonl" => Socket::open(&at, None).await,
        _ => {
            let body = br#"{"device":"web-3"}"#;
            let answer =
                http::request(&server.at("push"), "POST", "/v1/connect", Some(token), &[], body).await;
            has_all_of(&recorded_connect(), &answer.json(), "connect");
            Socket::open(answer.json()["url"].as_str().unwrap(), None).await
        }
    }
}

fn recorded_connect() -> Value {
    let text = std::fs::read_to_string(root().join("tests/recorded/first/connect.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_of_the_first_version_are_served_as_they_were() {
    for name in ["bearer.jsonl", "auth-frame.jsonl", "ticket.jsonl"] {
        let server = Server::start().await;
        let token = server.token("alice").await;
        let rows = recorded(name);
        let publish = async |body: Value| {
            let body = json!({"to": {"user": "alice"}, "payload": body["payload"], "id": body["id"]});
            let key = server.key("api_key");
            let (at, bytes) = (server.at("collect"), body.to_string());
            http::request(&at, "POST", "/v1/messages", Some(&key), &[], bytes.as_bytes()).await.json()
        };
        // What was stored before the client came.
        let caught_up = rows.iter().position(|row| row["server"]["type"] == "caught_up").unwrap();
        for row in rows[..caught_up].iter().filter(|row| row["server"]["type"] == "message") {
            publish(row["server"].clone()).await;
        }
        let mut socket = open(&server, name, &token).await;
        for row in rows {
            if let Some(says) = row.get("client") {
                socket.say_text(&says.to_string().replace("TOKEN", &token)).await;
            } else if let Some(heard) = row.get("server") {
                let mut heard = heard.clone();
                if heard["type"] == "welcome" {
                    heard["node"] = Value::from("its name");
                }
                has_all_of(&heard, &socket.frame().await, name);
            } else if let Some(body) = row.get("publish") {
                has_all_of(&row["answer"], &publish(body.clone()).await, name);
            } else {
                assert_eq!(row["closed"], socket.closed().await.code, "{name}");
            }
        }
    }
}

#[test]
fn what_a_server_of_the_first_version_says_is_read_by_the_client_of_today() {
    let mut read = 0;
    for name in ["bearer.jsonl", "auth-frame.jsonl", "ticket.jsonl"] {
        for row in recorded(name) {
            let Some(frame) = row.get("server") else { continue };
            let parsed = ReceivedFrame::parse(frame.to_string().as_bytes());
            assert!(!matches!(parsed, Err(_) | Ok(ReceivedFrame::Unknown)), "{name}: {frame}");
            read += 1;
        }
    }
    assert!(read > 15, "{read} frames");
}

/// Messages between roles as the first version had them (proto/peer.proto of then).
mod first {
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Live {
        #[prost(string, tag = "1")]
        pub user: String,
        #[prost(uint64, tag = "2")]
        pub seq: u64,
        #[prost(string, tag = "3")]
        pub id: String,
        #[prost(uint64, tag = "4")]
        pub accepted_at_ms: u64,
        #[prost(uint64, tag = "5")]
        pub expires_at_ms: u64,
        #[prost(bytes = "vec", tag = "6")]
        pub payload: Vec<u8>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Session {
        #[prost(string, tag = "1")]
        pub device: String,
        #[prost(string, tag = "2")]
        pub node: String,
        #[prost(uint64, tag = "3")]
        pub connected_at_ms: u64,
        #[prost(uint64, tag = "4")]
        pub acked: u64,
    }
}

#[test]
fn peers_of_the_first_version_and_of_today_understand_one_another() {
    let then = first::Live {
        user: "alice".into(),
        seq: 43,
        id: "m-43".into(),
        accepted_at_ms: 1_795_897_007_803,
        expires_at_ms: 1_796_501_807_803,
        payload: b"{\"n\":1}".to_vec(),
    };
    let mut now = peer::Live::decode(then.encode_to_vec().as_slice()).unwrap();
    assert_eq!((now.user.as_str(), now.seq, now.id.as_str()), ("alice", 43, "m-43"));
    assert_eq!((now.accepted_at_ms, now.expires_at_ms), (then.accepted_at_ms, then.expires_at_ms));
    assert_eq!((now.payload.as_ref(), now.event.as_deref()), (then.payload.as_slice(), None));
    now.event = Some("order.paid".into());
    assert_eq!(first::Live::decode(now.encode_to_vec().as_slice()).unwrap(), then);

    let then = first::Session {
        device: "web-1".into(),
        node: "push-0".into(),
        connected_at_ms: 1_795_897_007_803,
        acked: 42,
    };
    let mut now = peer::Session::decode(then.encode_to_vec().as_slice()).unwrap();
    assert_eq!((now.device.as_str(), now.node.as_str(), now.acked), ("web-1", "push-0", 42));
    now.client = Some("ringpush-js/1.0".into());
    assert_eq!(first::Session::decode(now.encode_to_vec().as_slice()).unwrap(), then);
}
