//! The nouns: who a message is for, where it stands in an inbox, and the message itself.
//!
//! Every name is checked where it enters ([`UserId::parse`] and its siblings), so a value of one of these types is
//! always valid. One of up to 23 bytes, as nearly all are, lies where the value lies: to compare it is no look elsewhere in memory. Cloning
//! a longer one is a reference count, never a copy of the text.

use std::fmt;

use bytes::{Bytes, BytesMut};
use jiff::fmt::temporal::DateTimePrinter;
use smol_str::SmolStr;

/// Longest user id and message id, in bytes (docs/protocol.md, Collect HTTP).
pub const NAME_MAX_BYTES: usize = 128;
/// Longest device name, in bytes (docs/protocol.md, Client WebSocket).
pub const DEVICE_MAX_BYTES: usize = 64;
/// Longest node name, in bytes: one DNS label.
pub const NODE_MAX_BYTES: usize = 63;

/// Why a name was refused; the text says what is allowed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct NameError(&'static str);

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident, $check:expr, $rule:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(SmolStr);

        impl $name {
            /// Checks `text` and takes it over.
            ///
            /// # Errors
            /// [`NameError`] with the rule, if the text breaks it.
            pub fn parse(text: &str) -> Result<Self, NameError> {
                let check: fn(&str) -> bool = $check;
                if check(text) { Ok(Self(SmolStr::new(text))) } else { Err(NameError($rule)) }
            }

            /// The text as it was given.
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
    /// A recipient as the business system names it: 1-128 bytes of UTF-8 without control characters.
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
    /// The stable name of a node, such as `push-7`; one DNS label, so it can stand in a URL and a host name.
    NodeId,
    |text| {
        (1..=NODE_MAX_BYTES).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    },
    "a node name is 1 to 63 characters of a-z, 0-9 and '-'"
);
name_type!(
    /// A message's id: the sender's own, or a ULID made at the door.
    MessageId,
    |text| (1..=NAME_MAX_BYTES).contains(&text.len()) && text.bytes().all(|b| (0x20..=0x7e).contains(&b)),
    "an id is 1 to 128 printable ASCII characters"
);

impl Default for DeviceId {
    /// The device of a client that names none.
    fn default() -> Self {
        Self(SmolStr::new_static("default"))
    }
}

/// A place in one user's inbox. Rises by one per accepted message, for ever; zero is "from the beginning".
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Seq(u64);

impl Seq {
    /// Before every message there ever was.
    pub const BEGINNING: Self = Self(0);
    /// The largest number that a JavaScript client can count with, 2^53 - 1.
    pub const MAX: Self = Self((1 << 53) - 1);

    /// The position `n`, if it is one that JSON clients can hold.
    #[must_use]
    pub const fn new(n: u64) -> Option<Self> {
        if n <= Self::MAX.0 { Some(Self(n)) } else { None }
    }

    /// The position `n`, or [`Seq::MAX`] where that is less: for numbers from our own stores.
    #[must_use]
    pub const fn at(n: u64) -> Self {
        if n <= Self::MAX.0 { Self(n) } else { Self::MAX }
    }

    /// The number itself.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The number that follows.
    #[must_use]
    pub const fn next(self) -> Self {
        Self::at(self.0 + 1)
    }

    /// Whether this is the place before every message.
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

/// A moment, in milliseconds since the Unix epoch, UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Millis(pub u64);

/// As [`Millis::rfc3339`] says it.
const RFC3339: DateTimePrinter = DateTimePrinter::new().precision(Some(3));
/// And its length.
const RFC3339_BYTES: usize = "2026-11-22T20:49:26.123Z".len();

/// Bytes that text is written into.
struct Text<'a>(&'a mut BytesMut);

impl jiff::fmt::Write for Text<'_> {
    fn write_str(&mut self, text: &str) -> Result<(), jiff::Error> {
        self.0.extend_from_slice(text.as_bytes());
        Ok(())
    }
}

impl Millis {
    /// This moment and `seconds` more.
    #[must_use]
    pub const fn plus_seconds(self, seconds: u64) -> Self {
        Self(self.0.saturating_add(seconds.saturating_mul(1000)))
    }

    /// Whole seconds since the epoch, as tokens count them.
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

    /// The same, written where every message's frame needs it twice.
    pub fn put_rfc3339(self, out: &mut BytesMut) {
        let moment = i64::try_from(self.0).ok().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
        let printed = RFC3339.print_timestamp(&moment.unwrap_or(jiff::Timestamp::MAX), Text(out));
        debug_assert!(printed.is_ok(), "memory takes every text");
    }

    /// The reverse, of any offset and precision; None where it is no such text, or before the epoch.
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
    /// When collect took it.
    pub accepted_at: Millis,
    /// From then on nobody is shown it any more.
    pub expires_at: Millis,
    /// Valid JSON text.
    pub payload: Bytes,
}

impl Message {
    /// Whether its life is over at `now`.
    #[must_use]
    pub fn is_expired(&self, now: Millis) -> bool {
        self.expires_at <= now
    }
}

/// Whom a publish is for. Typed, so that topics can join later without a change of every signature.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Recipients {
    /// One user: the answer is that user's alone.
    User(UserId),
    /// Several users, each with an outcome of their own, in this order.
    Users(Vec<UserId>),
}

impl Recipients {
    /// The users in the order given.
    #[must_use]
    pub fn users(&self) -> &[UserId] {
        match self {
            Self::User(user) => std::slice::from_ref(user),
            Self::Users(users) => users,
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
