//! What the application is handed and told: messages, gaps, states.

use std::time::Duration;

use ringpush_protocol::frame::{GapReason, MessageFrame, MoveReason, OfLog};
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

/// A message.
#[derive(Debug, Clone)]
pub struct Message {
    /// Its number in the user's inbox, or in the log of its topic.
    pub seq: u64,
    /// Its id.
    pub id: String,
    /// What it tells, if its sender named that.
    pub event: Option<String>,
    /// The topic by which it came, `everyone` if it was sent to all users; `None` if it was sent to
    /// the user.
    pub topic: Option<String>,
    /// Whether it stands in the log of that topic. Otherwise it stands in the user's inbox.
    pub in_log: bool,
    /// The payload as the sender wrote it: JSON.
    pub payload: Box<RawValue>,
    /// When it was accepted, RFC 3339.
    pub accepted_at: String,
    /// When it expires, RFC 3339.
    pub expires_at: String,
    /// Whether it was sent as it came, and not from the backlog.
    pub live: bool,
    /// The trace that it belongs to, if its sender named one (W3C Trace Context).
    pub traceparent: Option<String>,
}

impl Message {
    /// The payload as a value of the application's own type.
    ///
    /// # Errors
    ///
    /// The error of the JSON parser.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, serde_json::Error> {
        serde_json::from_str(self.payload.get())
    }

    pub(crate) fn new(frame: MessageFrame, live: bool) -> Self {
        let MessageFrame { seq, id, event, via, accepted_at, expires_at, payload, of, traceparent } = frame;
        let in_log = !of.is_inbox();
        let topic = via.or(name_of(&of));
        Self { seq, id, event, topic, in_log, payload, accepted_at, expires_at, live, traceparent }
    }
}

/// The name of the log that a frame is about, as applications know it.
pub(crate) fn name_of(of: &OfLog) -> Option<String> {
    of.log().map(|log| log.to_string())
}

/// Numbers that will never come. Reload the state that the messages would have changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gap {
    /// The topic in whose log they are missing, `everyone` for that of all users; `None`: in the
    /// inbox.
    pub topic: Option<String>,
    /// The last number before the gap.
    pub after: u64,
    /// The next number that can come.
    pub before: u64,
    /// Why they are missing.
    pub reason: GapReason,
}

/// An item of the stream.
#[derive(Debug, Clone)]
pub enum Item {
    /// A message.
    Message(Message),
    /// Numbers that will never come.
    Gap(Gap),
}

/// The state of the connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// A line is being opened.
    Connecting,
    /// The backlog is on its way.
    CatchingUp {
        /// The node that holds the line.
        node: String,
        /// The number after which this line started.
        since: u64,
    },
    /// What comes now is sent as it comes.
    Live {
        /// The node that holds the line.
        node: String,
    },
    /// Another line is being opened, on the node that the server named.
    Moving {
        /// That node.
        node: String,
        /// Why the client must move.
        reason: MoveReason,
    },
    /// The next try comes after `rest`.
    Waiting {
        /// What happened.
        cause: String,
        /// The time until then. `None`: only [`InboxHandle::wake`](crate::InboxHandle::wake) ends
        /// it.
        rest: Option<Duration>,
    },
    /// The client has ended.
    Stopped(Stopped),
}

impl State {
    /// The state as the other client libraries name it.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::CatchingUp { .. } => "catching-up",
            Self::Live { .. } => "live",
            Self::Moving { .. } => "moving",
            Self::Waiting { .. } => "waiting",
            Self::Stopped(_) => "stopped",
        }
    }

    /// Why the client waits or has stopped; `None` in the other states.
    #[must_use]
    pub fn cause(&self) -> Option<&str> {
        match self {
            Self::Waiting { cause, .. } | Self::Stopped(Stopped { cause, .. }) => Some(cause),
            _ => None,
        }
    }
}

/// Why the client has ended for good.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("stopped: {cause}{}", self.described())]
pub struct Stopped {
    /// `closed` by the application; `refused` by the token source; `unauthorized` after two fresh
    /// tokens were refused; `wrong_user`; otherwise the reason that the server gave.
    pub cause: String,
    /// The close code or HTTP status of the server, if it was the server.
    pub code: Option<u16>,
    /// More words.
    pub detail: String,
}

impl Stopped {
    pub(crate) fn new(cause: &str, code: Option<u16>, detail: impl Into<String>) -> Self {
        Self { cause: cause.to_owned(), code, detail: detail.into() }
    }

    fn described(&self) -> String {
        let code = self.code.map_or_else(String::new, |code| format!(" ({code})"));
        if self.detail.is_empty() { code } else { format!("{code}: {}", self.detail) }
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.cause == "closed"
    }
}

/// What happens beside the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// The state changed.
    State(State),
    /// Something went wrong that the client lives with.
    Fault {
        /// A name, such as `token_failed` or `device_not_kept`.
        code: &'static str,
        /// What happened.
        detail: String,
    },
}
