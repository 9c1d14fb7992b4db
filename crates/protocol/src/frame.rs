//! The frames of the client WebSocket, subprotocol `ringpush.v1.json`.
//!
//! The server reads [`ClientFrame`] and writes [`ServerFrame`]; the client library does the
//! reverse. `message` and its history form are written by hand, because the payload passes through
//! byte for byte.

mod client;

pub use client::{
    AUTH_MAX_BYTES, AuthCredential, AuthFrame, Begin, ClientFrame, OTHER_MAX_BYTES, REFRESH_MAX_BYTES,
    SessionOptions, Since, WINDOW_MAX, parse_window,
};

use bytes::{BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::message::Message;

/// The subprotocol that the server selects if the client offers any.
pub const SUBPROTOCOL: &str = "ringpush.v1.json";

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
        /// When the token ends, and with it the session, RFC 3339. Empty from an earlier version.
        #[serde(default)]
        token_expires_at: String,
        /// The server's time, RFC 3339. Empty from an earlier version.
        #[serde(default)]
        server_time: String,
        /// What this server understands beyond the first version of the protocol.
        #[serde(default)]
        features: Vec<String>,
        /// Time between two `heartbeat` frames, in ms, if the client asked for them.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        heartbeat_ms: Option<u64>,
        /// Where a device without a cursor was made to begin, with `begin: "latest"`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        began: Option<u64>,
    },
    /// Comes beside each ping, for clients that see no pings.
    Heartbeat,
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
        /// Why: with `unauthorized` the name of a
        /// [`RefusalReason`](crate::refusal::RefusalReason), otherwise that of the close code.
        /// Empty from an earlier version.
        #[serde(default)]
        reason: String,
        /// An explanation for people.
        message: String,
        /// When to reconnect, if that makes sense.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reconnect: Option<ReconnectHint>,
    },
    /// The response to `ping`.
    Pong,
}

/// A `welcome` frame as the server writes it, from what it has at hand: one is written for each new
/// socket. [`ServerFrame::Welcome`] is the same frame as it is read, and says what the fields mean.
#[derive(Debug, Serialize)]
#[serde(tag = "type", rename = "welcome")]
#[allow(missing_docs)]
pub struct WelcomeFrame<'a> {
    pub user: &'a str,
    pub device: &'a str,
    pub node: &'a str,
    pub session: &'a str,
    pub generation: &'a str,
    pub epoch: u64,
    pub since: u64,
    pub ping_every_ms: u64,
    pub reconnect: ReconnectHint,
    pub token_expires_at: &'a str,
    pub server_time: &'a str,
    pub features: &'a [&'a str],
    #[serde(skip_serializing_if = "Option::is_none")]
    pub heartbeat_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub began: Option<u64>,
}

/// Room for a usual `welcome`, in bytes.
const WELCOME_ROOM: usize = 512;

impl WelcomeFrame<'_> {
    /// Encodes the frame as text.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut text = Vec::with_capacity(WELCOME_ROOM);
        // Only strings and numbers: serialisation cannot fail.
        let _ = serde_json::to_writer(&mut text, self);
        Bytes::from(text)
    }
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
    if let Some(event) = &message.event {
        // Its characters need no escaping.
        out.put_slice(br#","event":""#);
        out.put_slice(event.as_str().as_bytes());
        out.put_u8(b'"');
    }
    if let Some(topic) = &message.via {
        // Its characters need no escaping either.
        out.put_slice(br#","via":""#);
        out.put_slice(topic.as_str().as_bytes());
        out.put_u8(b'"');
    }
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
    /// What it tells, if its sender named that.
    #[serde(default)]
    pub event: Option<String>,
    /// The topic by which it came; `None` if it was sent to the user.
    #[serde(default)]
    pub via: Option<String>,
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
            "welcome" | "caught_up" | "gap" | "move" | "refreshed" | "error" | "pong" | "heartbeat" => {
                serde_json::from_slice(text).map(Self::Other)
            }
            _ => Ok(Self::Unknown),
        }
    }
}

#[cfg(test)]
mod tests;
