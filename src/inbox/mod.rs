//! The inbox: the truth about every user's messages. Everything else in ringpush is a hint.
//!
//! # The contract
//!
//! Each user has an append-only log of messages numbered by `seq`, and a *head record*, kept for ever and written
//! before the user's first message with the moment in ms as its number. The next number is the highest ever given plus
//! one, so numbers are dense for the whole life of a user, also after everything expired, and a wiped store starts
//! above the old numbers.
//!
//! - [`Inbox::append`] answers only when the messages are on stable storage, and they are visible to no reader before.
//!   A fenced id that stands there unexpired is answered as a duplicate, or as a conflict if the payload differs.
//! - A reader never sees a number without all unexpired numbers below it.
//! - Expiry is applied when reading. What is removed is removed as an unbroken run from the head record upwards, and
//!   the head record is raised over it in the same step.
//! - [`Inbox::standing`] is exact: it says that there is more if and only if a number above the position was given.
//! - What cannot be read is told apart by its number, and stands in nobody's way.
//! - Cursors only rise. Losing one costs repeats, never a message.
//!
//! Every adapter passes [`conformance::suite`].

pub mod conformance;
pub mod embedded;
pub mod memory;
pub mod mongo;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;

use crate::message::{DeviceId, Message, MessageId, Millis, Seq, UserId};

/// Cursors kept per user; the longest unused goes (docs/design.md, section 11).
pub const DEVICES_PER_USER: usize = 64;
/// A cursor that was not moved for this long goes too: 90 days, in ms.
pub const CURSOR_LIFE_MS: u64 = 90 * 24 * 3600 * 1000;

/// How far ahead a disconnect may lie, in seconds. One from further ahead was made by a clock that was wrong: it counts from when it is seen
/// first, or new tokens would be refused until then.
pub const REVOCATION_AHEAD_MAX_S: u64 = 60;

/// The port. Five methods; see the room's contract.
pub trait Inbox: Send + Sync + 'static {
    /// Appends each item to its user's inbox, in this order; one outcome per item.
    fn append(&self, batch: Vec<Append>) -> BoxFuture<'_, Vec<Result<Appended, InboxError>>>;

    /// For each question, where that position stands. A user without a head record gets one.
    fn positions(&self, batch: Vec<PositionQuery>) -> BoxFuture<'_, Result<Vec<UserPosition>, InboxError>>;

    /// The unexpired messages after a position.
    fn page(
        &self,
        user: UserId,
        after: Seq,
        limit: PageLimit,
    ) -> BoxFuture<'_, Result<InboxPage, InboxError>>;

    /// What is known of a user; an unknown one has nothing.
    fn profile(&self, user: UserId) -> BoxFuture<'_, Result<Profile, InboxError>>;

    /// Moves cursors and moments up, never down. A `NotBefore` is on stable storage when this answers.
    fn update(&self, changes: Vec<Change>) -> BoxFuture<'_, Result<(), InboxError>>;

    /// Whether questions should be asked one by one, at once: where one costs no more than its share of a lot.
    fn answers_alone(&self) -> bool {
        false
    }

    /// Whether [`Inbox::append`] blocks the thread that polls it, which should then be one of the caller's own.
    fn blocks(&self) -> bool {
        false
    }

    /// How appends should be gathered; not at all, where one write costs no more than its share of a large one.
    fn gathering(&self) -> GroupCommit {
        GroupCommit { every: Duration::ZERO, enough: 1 }
    }
}

/// How appends are gathered into writes. The first after a rest never waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupCommit {
    /// Between the beginnings of two writes, at the least.
    pub every: Duration,
    /// So many do not wait for it.
    pub enough: usize,
}

/// The other port: removal of what nobody can read any more. Idempotent; run by collect.
pub trait Janitor: Send + Sync + 'static {
    /// Looks after the store itself for as long as it is polled: that it is the one that it was, and whole.
    fn watch(&self) -> BoxFuture<'_, ()> {
        Box::pin(std::future::pending())
    }

    /// One pass over all users; answers how many messages it removed.
    fn run_once(&self) -> BoxFuture<'_, Result<u64, InboxError>>;
}

/// One message to append.
#[derive(Debug, Clone)]
pub struct Append {
    /// Whose inbox.
    pub user: UserId,
    /// The id it will carry.
    pub id: MessageId,
    /// The id may be repeated by its sender: look for it, and remember it.
    pub deduplicated: bool,
    /// When collect took it.
    pub accepted_at: Millis,
    /// When its life ends.
    pub expires_at: Millis,
    /// Valid JSON text.
    pub payload: Bytes,
}

/// What became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Appended {
    /// It stands there now.
    Stored(Arc<Message>),
    /// It stood there before, with this number.
    Duplicate(Seq),
    /// Another payload stands there under this id.
    Conflict,
}

/// A question about a position.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PositionQuery {
    /// Whose inbox.
    pub user: UserId,
    /// Which position.
    pub from: StartAt,
}

/// A position to start after.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StartAt {
    /// This one.
    After(Seq),
    /// The device's cursor, or the beginning where it has none.
    Cursor(DeviceId),
    /// The head; the beginning where there never was a message.
    Latest,
}

/// Where a position stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UserPosition {
    /// The position itself.
    pub start: Seq,
    /// The highest number given so far, where there is nothing after `start`; else some number above `start` that was.
    pub head: Seq,
    /// There is something after `start`: read a page.
    pub more: bool,
    /// Tokens issued before this are refused, in whole seconds.
    pub not_before_s: u64,
}

/// Messages that a page may pass over besides those that it shows, expired or damaged ones: reading a page is bounded.
const PASSED_OVER: usize = 10_000;

/// How large a page may be.
#[derive(Debug, Clone, Copy)]
pub struct PageLimit {
    /// Most messages in it.
    pub messages: usize,
    /// Most bytes of payload; one message always fits.
    pub bytes: usize,
}

/// A page of an inbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InboxPage {
    /// Unexpired messages, rising.
    pub messages: Vec<Message>,
    /// Numbers, rising, of messages that stand there in a form that cannot be read.
    pub unreadable: Vec<Seq>,
    /// Every number after the position and up to here is in `messages` or will never be shown.
    pub upto: Seq,
    /// The page was cut at `upto`.
    pub more: bool,
}

/// What is known of a user.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Profile {
    /// The highest number given to a message; None if there never was one.
    pub head: Option<Seq>,
    /// Tokens issued before this are refused, in whole seconds.
    pub not_before_s: u64,
    /// The devices that have a cursor, in the order of their names.
    pub cursors: Vec<(DeviceId, Seq)>,
}

/// Something to raise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// A device has taken everything up to here.
    Cursor {
        /// Whose.
        user: UserId,
        /// Which.
        device: DeviceId,
        /// Up to where.
        acked: Seq,
    },
    /// A client was shown numbers up to here that stand there no more, for the store was restored to an earlier state: none of them is
    /// given again.
    Shown {
        /// Whose inbox.
        user: UserId,
        /// Up to where.
        upto: Seq,
    },
    /// Tokens issued before this are refused from now on.
    NotBefore {
        /// Whose.
        user: UserId,
        /// In whole seconds.
        seconds: u64,
    },
}

/// Why the inbox did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InboxError {
    /// A write failed and what is on disk is no longer known: this process must end.
    #[error("the store failed and takes no more writes: {0}")]
    Poisoned(String),
    /// It cannot answer now; later it may.
    #[error("the store cannot answer now: {0}")]
    Unavailable(String),
    /// What is stored cannot be read.
    #[error("the store holds something unreadable: {0}")]
    Corrupt(String),
}

/// Whether a stored payload is what was taken: JSON text. Anything else would end each connection that it is sent on, for ever.
pub(crate) fn is_json(payload: &[u8]) -> bool {
    let text = std::str::from_utf8(payload).ok();
    text.is_some_and(|text| serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok())
}

/// Tells a repeat from a conflict without keeping the payload twice: the first half of its SHA-256.
pub(crate) fn payload_digest(payload: &[u8]) -> [u8; 16] {
    use sha2::{Digest, Sha256};
    let mut half = [0u8; 16];
    half.copy_from_slice(&Sha256::digest(payload)[..16]);
    half
}
