//! The frames of the client WebSocket, subprotocol `ringpush.v1.json`.
//!
//! The server reads [`ClientFrame`] and writes [`ServerFrame`]; the client library does the
//! reverse. `message` and its history form are written by hand, because the payload passes through
//! byte for byte.

mod client;

pub use client::{
    AUTH_MAX_BYTES, AuthCredential, AuthFrame, Begin, ClientFrame, LogAcks, LogOptions, OTHER_MAX_BYTES,
    REFRESH_MAX_BYTES, SessionOptions, Since, TOPICS_IN_AUTH, WINDOW_MAX, WatchSince, parse_window,
};

use std::collections::BTreeMap;
use std::fmt::Write;

use bytes::{BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::message::{LogId, Message, TopicName};

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
    /// The user joined the topic after they were published.
    Joined,
    /// The sender of the message left the user out.
    Excepted,
}

/// Which log a frame is about: that of a topic, that of everyone, or neither, which is the inbox.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfLog {
    /// The topic.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub topic: Option<String>,
    /// The log of all users.
    #[serde(default, skip_serializing_if = "is_false")]
    pub everyone: bool,
}

#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_false(flag: &bool) -> bool {
    !flag
}

impl From<&LogId> for OfLog {
    fn from(log: &LogId) -> Self {
        let topic = log.topic().map(|name| name.as_str().to_owned());
        Self { everyone: topic.is_none(), topic }
    }
}

impl OfLog {
    /// The log, unless the frame is about the inbox, or the name is none.
    #[must_use]
    pub fn log(&self) -> Option<LogId> {
        match &self.topic {
            Some(name) => TopicName::parse(name).ok().map(LogId::Topic),
            None => self.everyone.then_some(LogId::Everyone),
        }
    }

    /// Whether the frame is about the inbox.
    #[must_use]
    pub const fn is_inbox(&self) -> bool {
        self.topic.is_none() && !self.everyone
    }
}

/// Where a session stands in a log, in `welcome`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogPosition {
    /// The position after which the session begins.
    pub after: u64,
    /// The highest number of the log.
    pub head: u64,
}

/// What has become of a topic for a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TopicState {
    /// The user has joined it.
    Joined,
    /// The user has left it, it was removed, or it is watched no more.
    Left,
    /// It is watched.
    Watching,
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
// `welcome` is large, and comes once on each socket.
#[allow(clippy::large_enum_variant)]
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
        /// The logs of topics that this session reads, if the client understands them.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        topics: Option<BTreeMap<String, LogPosition>>,
        /// The log of all users, if the client understands logs.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        everyone: Option<LogPosition>,
        /// What this client would get if it understood it.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        missing: Vec<String>,
    },
    /// Comes beside each ping, for clients that see no pings.
    Heartbeat,
    /// The backlog is delivered; live messages follow.
    CaughtUp {
        /// The last position that was sent; `None` with `all`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        seq: Option<u64>,
        /// Which log.
        #[serde(flatten)]
        of: OfLog,
        /// Each log of `welcome` has been level once, the inbox too, or is left.
        #[serde(default, skip_serializing_if = "is_false")]
        all: bool,
    },
    /// What has become of a topic for this socket.
    Topic {
        /// The topic.
        topic: String,
        /// What has become of it.
        state: TopicState,
        /// The position after which its messages come.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        after: Option<u64>,
    },
    /// Numbers that will never come.
    Gap {
        /// Which log.
        #[serde(flatten)]
        of: OfLog,
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
        /// The topic that it is about, if it is about one: the socket stays open then.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        topic: Option<String>,
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
    #[serde(skip_serializing_if = "Option::is_none")]
    pub topics: Option<BTreeMap<&'a str, LogPosition>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub everyone: Option<LogPosition>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    pub missing: &'a [&'a str],
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

/// Encodes a `message` frame of a log. It is built once and shared by all sessions that get it.
#[must_use]
pub fn log_message_frame(log: &LogId, message: &Message) -> Bytes {
    let mut out = BytesMut::with_capacity(message.payload.len() + message.id.as_str().len() + 240);
    out.put_slice(br#"{"type":"message","#);
    put_log(&mut out, log);
    put_message_fields(&mut out, message);
    out.freeze()
}

fn put_log(out: &mut BytesMut, log: &LogId) {
    match log {
        // Its characters need no escaping.
        LogId::Topic(topic) => {
            out.put_slice(br#""topic":""#);
            out.put_slice(topic.as_str().as_bytes());
            out.put_slice(br#"","#);
        }
        LogId::Everyone => out.put_slice(br#""everyone":true,"#),
    }
}

/// Appends a message of an inbox, or of this log, in the form of a history response: a `message`
/// frame without `type`.
pub fn put_history_item(out: &mut BytesMut, log: Option<&LogId>, message: &Message) {
    out.put_u8(b'{');
    if let Some(log) = log {
        put_log(out, log);
    }
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
    if let Some(topic) = message.topic() {
        // Its characters need no escaping either.
        out.put_slice(br#","via":""#);
        out.put_slice(topic.as_str().as_bytes());
        out.put_u8(b'"');
    }
    if let Some(trace) = &message.trace {
        // Memory takes every text.
        let _ = write!(out, r#","traceparent":"{trace}""#);
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
    /// The topic by which it came to the inbox; `None` if it was sent to the user.
    #[serde(default)]
    pub via: Option<String>,
    /// The log in which it stands.
    #[serde(flatten)]
    pub of: OfLog,
    /// The trace that it belongs to, if its sender named one.
    #[serde(default)]
    pub traceparent: Option<String>,
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
            "welcome" | "caught_up" | "gap" | "move" | "refreshed" | "error" | "pong" | "heartbeat"
            | "topic" => serde_json::from_slice(text).map(Self::Other),
            _ => Ok(Self::Unknown),
        }
    }
}

#[cfg(test)]
mod tests;
