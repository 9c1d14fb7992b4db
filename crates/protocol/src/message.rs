//! The nouns: user, device, node, message id, position, time, and the message itself.
//!
//! Names are checked where they enter ([`UserId::parse`] and its siblings), so a value of one of
//! these types is always valid. Names of up to 23 bytes (nearly all) are stored inline, so
//! comparing them follows no pointer. Cloning a longer one only bumps a reference count.

use std::fmt;
use std::sync::Arc;

use crate::trace::TraceParent;
use bytes::{Bytes, BytesMut};
use jiff::fmt::temporal::DateTimePrinter;
use smol_str::SmolStr;

/// Longest user id and message id, in bytes (docs/protocol.md, Collect HTTP).
pub const NAME_MAX_BYTES: usize = 128;
/// Longest device name, in bytes (docs/protocol.md, Client WebSocket).
pub const DEVICE_MAX_BYTES: usize = 64;
/// Longest name of an event, in bytes (docs/protocol.md, Collect HTTP).
pub const EVENT_MAX_BYTES: usize = 64;
/// Longest name of a topic, in bytes (docs/protocol.md, Topics).
pub const TOPIC_MAX_BYTES: usize = 64;
/// Longest name of a client, in bytes (docs/protocol.md, Client WebSocket).
pub const CLIENT_MAX_BYTES: usize = 64;
/// Longest node name, in bytes: one DNS label.
pub const NODE_MAX_BYTES: usize = 63;

/// A name that breaks its rule; the text says what is allowed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct NameError(&'static str);

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident, $check:expr, $rule:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(SmolStr);

        impl $name {
            /// Checks `text` and copies it.
            ///
            /// # Errors
            ///
            /// [`NameError`] with the rule that `text` breaks.
            pub fn parse(text: &str) -> Result<Self, NameError> {
                let check: fn(&str) -> bool = $check;
                if check(text) { Ok(Self(SmolStr::new(text))) } else { Err(NameError($rule)) }
            }

            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", &*self.0)
            }
        }
    };
}

name_type!(
    /// A recipient, as the business system names it: 1 to 128 bytes of UTF-8 without control
    /// characters.
    UserId,
    |text| (1..=NAME_MAX_BYTES).contains(&text.len()) && !text.chars().any(char::is_control),
    "a user id is 1 to 128 bytes of UTF-8 without control characters"
);
name_type!(
    /// One of a user's devices, each with a cursor of its own.
    DeviceId,
    |text| {
        (1..=DEVICE_MAX_BYTES).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
    },
    "a device is 1 to 64 characters of A-Z, a-z, 0-9, '.', '_' and '-'"
);
name_type!(
    /// The stable name of a node, such as `push-7`: one DNS label, so that it can stand in a URL
    /// and in a host name.
    NodeId,
    |text| {
        (1..=NODE_MAX_BYTES).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    },
    "a node name is 1 to 63 characters of a-z, 0-9 and '-'"
);
name_type!(
    /// The id of a message: the sender's own, or a ULID made by collect.
    MessageId,
    |text| (1..=NAME_MAX_BYTES).contains(&text.len()) && text.bytes().all(|b| (0x20..=0x7e).contains(&b)),
    "an id is 1 to 128 printable ASCII characters"
);

name_type!(
    /// The name of what a message tells, such as `order.paid`: a client routes by it without
    /// opening the payload.
    EventName,
    |text| {
        (1..=EVENT_MAX_BYTES).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._:-".contains(&b))
    },
    "an event is 1 to 64 characters of A-Z, a-z, 0-9, '.', '_', ':' and '-'"
);

name_type!(
    /// The name of a topic, such as `news` or `match-7`. `everyone` is the built-in topic of all
    /// users and no name.
    TopicName,
    |text| {
        (1..=TOPIC_MAX_BYTES).contains(&text.len())
            && text.as_bytes()[0].is_ascii_alphanumeric()
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._:-".contains(&b))
            && text != EVERYONE
    },
    "a topic is 1 to 64 characters of A-Z, a-z, 0-9, '.', '_', ':' and '-', begins with a letter or a digit, and is not \"everyone\""
);

/// The built-in topic of all users.
pub const EVERYONE: &str = "everyone";

/// A log that many read: that of a topic, or that of all users. An inbox is named by its
/// [`UserId`].
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LogId {
    /// The log of a topic.
    Topic(TopicName),
    /// The log of all users.
    Everyone,
}

impl LogId {
    /// The name of the topic; `None` for everyone.
    #[must_use]
    pub const fn topic(&self) -> Option<&TopicName> {
        match self {
            Self::Topic(name) => Some(name),
            Self::Everyone => None,
        }
    }
}

impl fmt::Display for LogId {
    /// The name of the topic, or `everyone`, which is the name of none.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.topic().map_or(EVERYONE, TopicName::as_str))
    }
}

name_type!(
    /// Name and version of a client's library or program, such as `ringpush-js/1.0`, as it says
    /// itself.
    ClientName,
    |text| (1..=CLIENT_MAX_BYTES).contains(&text.len()) && text.bytes().all(|b| (0x20..=0x7e).contains(&b)),
    "client is 1 to 64 printable ASCII characters"
);

impl Default for DeviceId {
    /// The device name of a client that gives none.
    fn default() -> Self {
        Self(SmolStr::new_static("default"))
    }
}

/// A position in one user's inbox. It rises by one with each accepted message, for ever. Zero is
/// the beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Seq(u64);

impl Seq {
    /// The position before every message.
    pub const BEGINNING: Self = Self(0);
    /// The largest number that a JavaScript client can represent exactly, 2^53 - 1.
    pub const MAX: Self = Self((1 << 53) - 1);

    /// The position `n`, or `None` if it is above [`Seq::MAX`].
    #[must_use]
    pub const fn new(n: u64) -> Option<Self> {
        if n <= Self::MAX.0 { Some(Self(n)) } else { None }
    }

    /// The position `n`, capped at [`Seq::MAX`]: for numbers from our own stores.
    #[must_use]
    pub const fn at(n: u64) -> Self {
        if n <= Self::MAX.0 { Self(n) } else { Self::MAX }
    }

    /// The position as a number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The next position.
    #[must_use]
    pub const fn next(self) -> Self {
        Self::at(self.0 + 1)
    }

    /// Whether this is the beginning.
    #[must_use]
    pub const fn is_beginning(self) -> bool {
        self.0 == 0
    }
}

impl fmt::Display for Seq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A time in milliseconds since the Unix epoch, UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Millis(pub u64);

/// The printer behind [`Millis::rfc3339`].
const RFC3339: DateTimePrinter = DateTimePrinter::new().precision(Some(3));
/// Length of what [`RFC3339`] prints, in bytes.
const RFC3339_BYTES: usize = "2026-11-22T20:49:26.123Z".len();

/// Lets the printer write into a byte buffer.
struct Text<'a>(&'a mut BytesMut);

impl jiff::fmt::Write for Text<'_> {
    fn write_str(&mut self, text: &str) -> Result<(), jiff::Error> {
        self.0.extend_from_slice(text.as_bytes());
        Ok(())
    }
}

impl Millis {
    /// This time plus `seconds`.
    #[must_use]
    pub const fn plus_seconds(self, seconds: u64) -> Self {
        Self(self.0.saturating_add(seconds.saturating_mul(1000)))
    }

    /// Whole seconds since the epoch, the unit of times in tokens.
    #[must_use]
    pub const fn seconds(self) -> u64 {
        self.0 / 1000
    }

    /// RFC 3339 in UTC with milliseconds, such as `2026-11-22T20:49:26.123Z`.
    #[must_use]
    pub fn rfc3339(self) -> String {
        let mut out = BytesMut::with_capacity(RFC3339_BYTES);
        self.put_rfc3339(&mut out);
        String::from_utf8_lossy(&out).into_owned()
    }

    /// Appends [`Millis::rfc3339`] to `out` without an allocation: each message frame has two
    /// times.
    pub fn put_rfc3339(self, out: &mut BytesMut) {
        let moment = i64::try_from(self.0).ok().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
        let printed = RFC3339.print_timestamp(&moment.unwrap_or(jiff::Timestamp::MAX), Text(out));
        debug_assert!(printed.is_ok(), "memory takes every text");
    }

    /// Parses RFC 3339 of any offset and precision. Returns `None` for other text and for times
    /// before the epoch.
    #[must_use]
    pub fn parse_rfc3339(text: &str) -> Option<Self> {
        let moment: jiff::Timestamp = text.parse().ok()?;
        u64::try_from(moment.as_millisecond()).ok().map(Self)
    }
}

/// One stored message. The payload is the sender's JSON, byte for byte.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Its number in the recipient's inbox.
    pub seq: Seq,
    /// The sender's id, or the one made for it.
    pub id: MessageId,
    /// When collect accepted it.
    pub accepted_at: Millis,
    /// From this time on it is not shown to anybody.
    pub expires_at: Millis,
    /// What it tells, if its sender named that.
    pub event: Option<EventName>,
    /// What a topic has to do with it; `None` if the message was sent to the user. Shared, because
    /// nearly all messages have none: it takes 8 bytes.
    pub via: Option<Arc<Via>>,
    /// The trace that it belongs to, if its sender named one.
    pub trace: Option<Arc<TraceParent>>,
    /// Valid JSON text.
    pub payload: Bytes,
}

/// What a topic has to do with a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Via {
    /// It stands in the inbox of a user who was reached by this topic.
    Inbox(TopicName),
    /// It stands in the log of a topic, or of everyone.
    Log(LogEntry),
}

impl Via {
    /// The topic by which the user was reached in whose inbox the message stands.
    #[must_use]
    pub const fn inbox(&self) -> Option<&TopicName> {
        match self {
            Self::Inbox(topic) => Some(topic),
            Self::Log(_) => None,
        }
    }
}

/// What a message in a log has besides.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogEntry {
    /// The life of the topic's name in which it was published; 0 for everyone. It is for the
    /// members of that life alone.
    pub life: u64,
    /// Users who do not get it.
    pub except: Vec<UserId>,
}

impl Message {
    /// The topic by which the recipient was reached, if the message stands in an inbox.
    #[must_use]
    pub fn topic(&self) -> Option<&TopicName> {
        self.via.as_deref().and_then(Via::inbox)
    }

    /// What it has besides, if it stands in a log.
    #[must_use]
    pub fn log_entry(&self) -> Option<&LogEntry> {
        match self.via.as_deref() {
            Some(Via::Log(entry)) => Some(entry),
            _ => None,
        }
    }

    /// Whether the message has expired at `now`.
    #[must_use]
    pub fn is_expired(&self, now: Millis) -> bool {
        self.expires_at <= now
    }
}

/// The recipients of a publish.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Recipients {
    /// One user; the answer to the publish describes this user alone.
    User(UserId),
    /// Several users, in the order given; each has an outcome of its own.
    Users(Vec<UserId>),
    /// The members of topics, each topic with an outcome of its own.
    Topics {
        /// The topics in the order given, or everyone.
        topics: Vec<LogId>,
        /// Users who do not get the message, although they are members.
        except: Vec<UserId>,
    },
}

impl Recipients {
    /// The users in the order given; none for topics, whose members only the store knows.
    #[must_use]
    pub fn users(&self) -> &[UserId] {
        match self {
            Self::User(user) => std::slice::from_ref(user),
            Self::Users(users) => users,
            Self::Topics { .. } => &[],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_keep_their_rules() {
        assert!(UserId::parse("用户42").is_ok());
        assert!(UserId::parse("").is_err());
        assert!(UserId::parse("a\u{7}b").is_err());
        assert!(UserId::parse(&"x".repeat(129)).is_err());
        assert!(DeviceId::parse("web-1.a_B").is_ok());
        assert!(DeviceId::parse("web 1").is_err());
        assert!(NodeId::parse("push-7").is_ok());
        assert!(NodeId::parse("Push").is_err());
        assert!(NodeId::parse("a/../b").is_err());
        assert!(MessageId::parse("order \"17\"").is_ok());
        assert!(MessageId::parse("é").is_err());
        for good in ["n", "7", "match-7", "a.b_c:D-9", &"x".repeat(64), "Everyone"] {
            assert!(TopicName::parse(good).is_ok(), "{good}");
        }
        for bad in ["", "-a", ".a", "a b", "a/b", "é", "everyone", &"x".repeat(65), "a\n"] {
            assert!(TopicName::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn moments_print_in_utc_with_milliseconds() {
        assert_eq!(Millis(0).rfc3339(), "1970-01-01T00:00:00.000Z");
        assert_eq!(Millis(1_795_380_566_120).rfc3339(), "2026-11-22T20:49:26.120Z");
        assert!(Millis(u64::MAX).rfc3339().starts_with("9999-12-30"));
    }

    #[test]
    fn seq_stays_within_what_json_clients_can_count() {
        assert_eq!(Seq::new(1 << 53), None);
        assert_eq!(Seq::new((1 << 53) - 1), Some(Seq::MAX));
    }
}
