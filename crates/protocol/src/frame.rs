//! The frames of the client WebSocket, subprotocol `ringpush.v1.json`.
//!
//! The server reads [`ClientFrame`] and writes [`ServerFrame`]; the client library does the
//! reverse. `message` and its history form are written by hand, because the payload passes through
//! byte for byte.

use bytes::{BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::message::{DeviceId, Message, Seq};

/// The subprotocol that the server selects if the client offers any.
pub const SUBPROTOCOL: &str = "ringpush.v1.json";

/// A frame from a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClientFrame {
    /// The first frame, if no token came with the request.
    Auth {
        /// The token, unverified.
        token: String,
        /// The device, if the client names one.
        device: Option<DeviceId>,
        /// Where to start, if the client says so.
        since: Option<Since>,
    },
    /// The client has handled everything up to this number, on this device.
    Ack(u64),
    /// A new token for the same user.
    Refresh(String),
    /// A ping of a client that cannot send WebSocket pings.
    Ping,
}

/// Where a session starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Since {
    /// After this position.
    After(Seq),
    /// Only what comes from now on.
    Latest,
}

impl Since {
    /// Parses `latest` or a number.
    ///
    /// # Errors
    ///
    /// The rule that `text` breaks.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        if text == "latest" {
            return Ok(Self::Latest);
        }
        text.parse().ok().and_then(Seq::new).map(Self::After).ok_or(SINCE_RULE)
    }
}

const SINCE_RULE: &str = "since is a seq (an integer from 0 to 2^53 - 1) or \"latest\"";

#[derive(Deserialize)]
struct Tagged<'a> {
    #[serde(rename = "type", borrow)]
    kind: std::borrow::Cow<'a, str>,
    token: Option<String>,
    device: Option<String>,
    #[serde(borrow)]
    since: Option<&'a RawValue>,
    #[serde(borrow)]
    seq: Option<&'a RawValue>,
}

impl ClientFrame {
    /// Parses one text message of a client.
    ///
    /// # Errors
    ///
    /// What is wrong, for the `error` frame. It never contains a part of a token.
    pub fn parse(text: &[u8]) -> Result<Self, String> {
        // serde would accept an array for a struct.
        if text.trim_ascii_start().first() != Some(&b'{') {
            return Err("a frame is one JSON object".to_owned());
        }
        let frame: Tagged<'_> = serde_json::from_slice(text).map_err(|fault| describe(&fault))?;
        match &*frame.kind {
            "ack" => Ok(Self::Ack(
                frame
                    .seq
                    .and_then(|raw| raw.get().parse().ok())
                    .filter(|n| *n <= Seq::MAX.get())
                    .ok_or("ack needs \"seq\", an integer from 0 to 2^53 - 1")?,
            )),
            "ping" => Ok(Self::Ping),
            "refresh" => Ok(Self::Refresh(frame.token.ok_or("refresh needs \"token\", a string")?)),
            "auth" => Ok(Self::Auth {
                token: frame.token.ok_or("auth needs \"token\", a string")?,
                device: frame.device.map(|d| DeviceId::parse(&d)).transpose().map_err(|f| f.to_string())?,
                since: frame.since.map(|raw| Since::parse(raw.get().trim_matches('"'))).transpose()?,
            }),
            _ => Err("unknown type: a client sends auth, ack, refresh or ping".to_owned()),
        }
    }

    /// Encodes the frame as a client sends it.
    #[must_use]
    pub fn encode(&self) -> String {
        match self {
            Self::Ack(seq) => format!(r#"{{"type":"ack","seq":{seq}}}"#),
            Self::Ping => r#"{"type":"ping"}"#.to_owned(),
            Self::Refresh(token) => serde_json::json!({"type": "refresh", "token": token}).to_string(),
            Self::Auth { token, device, since } => {
                let mut frame = serde_json::json!({"type": "auth", "token": token});
                if let Some(device) = device {
                    frame["device"] = device.as_str().into();
                }
                match since {
                    Some(Since::After(seq)) => frame["since"] = seq.get().into(),
                    Some(Since::Latest) => frame["since"] = "latest".into(),
                    None => {}
                }
                frame.to_string()
            }
        }
    }
}

fn describe(fault: &serde_json::Error) -> String {
    match fault.classify() {
        serde_json::error::Category::Data => {
            "a frame is a JSON object with \"type\" and fields of the right type".to_owned()
        }
        _ => "a frame is one JSON object".to_owned(),
    }
}

/// How long to wait before a reconnect: a delay drawn uniformly between the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReconnectHint {
    /// Shortest delay, in ms.
    pub min_ms: u64,
    /// Longest delay, in ms.
    pub max_ms: u64,
}

/// Why numbers are missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GapReason {
    /// The messages have expired.
    Expired,
    /// The client's position is above everything in the inbox: it knew another inbox.
    Reset,
    /// The messages are stored in a form that cannot be read.
    Unreadable,
}

/// Why a client is told to move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MoveReason {
    /// Another node owns the user.
    Owner,
    /// This node is leaving.
    Drain,
}

/// A frame from the server. `message` is missing here: [`message_frame`] writes it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ServerFrame {
    /// The first frame of every session.
    Welcome {
        /// The user of this socket.
        user: String,
        /// The device whose cursor acks move.
        device: String,
        /// The node that holds the socket.
        node: String,
        /// The name of this session in logs.
        session: String,
        /// Generation of the node's view.
        generation: String,
        /// Epoch of the node's view.
        epoch: u64,
        /// The position at which this session starts; 0 is the beginning.
        since: u64,
        /// Time between two pings of the server, in ms.
        ping_every_ms: u64,
        /// The hint for the next reconnect.
        reconnect: ReconnectHint,
    },
    /// The backlog is delivered; live messages follow.
    CaughtUp {
        /// The last position that was sent.
        seq: u64,
    },
    /// Numbers that will never come.
    Gap {
        /// The last number before the gap.
        after: u64,
        /// The next number that can come.
        before: u64,
        /// Why the numbers are missing.
        reason: GapReason,
    },
    /// The client must open another socket and then close this one.
    Move {
        /// The URL to open.
        url: String,
        /// The node at that URL.
        node: String,
        /// Epoch of the view that names that node.
        epoch: u64,
        /// How long to wait first, in ms.
        after_ms: u64,
        /// Why the client must move.
        reason: MoveReason,
    },
    /// The new token was accepted.
    Refreshed {
        /// When the new token expires, RFC 3339.
        expires_at: String,
    },
    /// Precedes a close that is caused by a fault.
    Error {
        /// The name of the close code.
        code: String,
        /// An explanation for people.
        message: String,
        /// When to reconnect, if that makes sense.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reconnect: Option<ReconnectHint>,
    },
    /// The response to `ping`.
    Pong,
}

impl ServerFrame {
    /// Encodes the frame as text.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        // Only strings and numbers: serialisation cannot fail.
        Bytes::from(serde_json::to_vec(self).unwrap_or_default())
    }
}

/// Encodes a `message` frame. It is built once and shared by all sessions that get it.
#[must_use]
pub fn message_frame(message: &Message) -> Bytes {
    let mut out = BytesMut::with_capacity(message.payload.len() + message.id.as_str().len() + 160);
    out.put_slice(br#"{"type":"message","#);
    put_message_fields(&mut out, message);
    out.freeze()
}

/// Appends a message in the form of a history response: a `message` frame without `type`.
pub fn put_history_item(out: &mut BytesMut, message: &Message) {
    out.put_u8(b'{');
    put_message_fields(out, message);
}

fn put_message_fields(out: &mut BytesMut, message: &Message) {
    out.put_slice(br#""seq":"#);
    put_number(out, message.seq.get());
    out.put_slice(br#","id":"#);
    put_id(out, message.id.as_str());
    out.put_slice(br#","accepted_at":""#);
    message.accepted_at.put_rfc3339(out);
    out.put_slice(br#"","expires_at":""#);
    message.expires_at.put_rfc3339(out);
    out.put_slice(br#"","payload":"#);
    out.put_slice(&message.payload);
    out.put_u8(b'}');
}

/// Appends a decimal number.
pub fn put_number(out: &mut BytesMut, n: u64) {
    out.put_slice(itoa::Buffer::new().format(n).as_bytes());
}

/// Appends a message id as a JSON string. It is printable ASCII, so only two characters need
/// escaping.
pub fn put_id(out: &mut BytesMut, id: &str) {
    out.put_u8(b'"');
    for byte in id.bytes() {
        if byte == b'"' || byte == b'\\' {
            out.put_u8(b'\\');
        }
        out.put_u8(byte);
    }
    out.put_u8(b'"');
}

/// A `message` frame as a client reads it.
#[derive(Debug, Clone, Deserialize)]
pub struct MessageFrame {
    /// Position in the inbox.
    pub seq: u64,
    /// Id of the message.
    pub id: String,
    /// When it was accepted, RFC 3339.
    pub accepted_at: String,
    /// When it expires, RFC 3339.
    pub expires_at: String,
    /// The payload as the sender wrote it.
    pub payload: Box<RawValue>,
}

/// A frame of the server, as a client reads it.
#[derive(Debug)]
pub enum ReceivedFrame {
    /// A `message` frame.
    Message(MessageFrame),
    /// Any other frame that this version knows.
    Other(ServerFrame),
    /// A frame of an unknown, newer type; to be ignored.
    Unknown,
}

impl ReceivedFrame {
    /// Parses one text message of a server.
    ///
    /// # Errors
    ///
    /// The error of the JSON parser.
    pub fn parse(text: &[u8]) -> Result<Self, serde_json::Error> {
        #[derive(Deserialize)]
        struct Kind {
            #[serde(rename = "type")]
            kind: String,
        }
        let kind: Kind = serde_json::from_slice(text)?;
        match kind.kind.as_str() {
            "message" => serde_json::from_slice(text).map(Self::Message),
            "welcome" | "caught_up" | "gap" | "move" | "refreshed" | "error" | "pong" => {
                serde_json::from_slice(text).map(Self::Other)
            }
            _ => Ok(Self::Unknown),
        }
    }
}

#[cfg(test)]
mod tests;
