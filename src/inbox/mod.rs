//! The inbox: the truth about every user's messages. Everything else in ringpush is a hint.
//!
//! # The contract
//!
//! Each user has an append-only log of messages numbered by `seq`, and a *head record*. The head
//! record is kept for ever and is written before the user's first message, with the time in ms as
//! its number. The next number is the highest ever assigned plus one. So numbers are dense for the
//! whole life of a user, also after everything has expired, and a store that was wiped starts above
//! the old numbers.
//!
//! - [`Inbox::append`] returns only when the messages are on stable storage. No reader sees them
//!   before.
//! - A repeated idempotency key whose message has not expired is a duplicate, or a conflict if the
//!   payload differs.
//! - A reader never sees a number without all unexpired numbers below it.
//! - Expiry is applied when reading. Messages are removed as an unbroken run from the head record
//!   upwards, and the head record is raised over it in the same step.
//! - [`Inbox::positions`] is exact: it says that there is more if and only if a number above the
//!   position was assigned.
//! - A message that cannot be read is reported by its number and blocks nothing.
//! - Cursors only rise. Losing one costs repeats, never a message.
//!
//! Every adapter passes the suite in `conformance` (feature `test-support`).

#[cfg(any(test, feature = "test-support"))]
pub mod conformance;
pub mod embedded;
pub mod group_commit;
pub mod history;
pub mod logs;
mod lookup;
#[cfg(any(test, feature = "test-support"))]
pub mod memory;
pub mod mongo;
pub mod topics;

use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use tokio::task::JoinSet;

pub use group_commit::{Appender, GroupCommit, Receipt, WriteObserver};
pub use logs::Logs;
pub use lookup::{Lookup, Lookups};
pub use topics::Topics;

use crate::message::{DeviceId, EventName, LogId, Message, MessageId, Millis, Seq, TopicName, UserId, Via};
use crate::trace::TraceParent;

/// Cursors kept per user. The longest unused one is dropped (docs/design.md, section 11).
pub const DEVICES_PER_USER: usize = 64;
/// A cursor that was not moved for this long is dropped: 90 days, in ms.
pub const CURSOR_LIFE_MS: u64 = 90 * 24 * 3600 * 1000;

/// How far in the future a disconnect may lie, in seconds. One further away was made by a wrong
/// clock. It counts from when it is first seen, because new tokens would be refused until then.
pub const REVOCATION_AHEAD_MAX_S: u64 = 60;

/// The port of the inbox. Its contract is in the module's documentation.
pub trait Inbox: Send + Sync + 'static {
    /// Appends each item to its user's inbox, in this order. Returns one outcome per item.
    fn append(&self, batch: Vec<Append>) -> BoxFuture<'_, Vec<Result<Appended, InboxError>>>;

    /// Looks up positions. A position that a client knows and this store does not is made durable
    /// first, with a head record for its user.
    fn positions(&self, batch: Vec<PositionQuery>) -> BoxFuture<'_, Result<Vec<UserPosition>, InboxError>>;

    /// Reads the unexpired messages after a position.
    fn page(
        &self,
        user: UserId,
        after: Seq,
        limit: PageLimit,
    ) -> BoxFuture<'_, Result<InboxPage, InboxError>>;

    /// Reads what is stored about a user. An unknown user has an empty profile.
    fn profile(&self, user: UserId) -> BoxFuture<'_, Result<Profile, InboxError>>;

    /// A message that is stored, also one that has expired and was not removed yet.
    fn stored(&self, user: UserId, which: Sought) -> BoxFuture<'_, Result<Option<Message>, InboxError>>;

    /// Raises cursors and times; it never lowers them. A `NotBefore` or `Begin` is on stable
    /// storage when this returns.
    fn update(&self, changes: Vec<Change>) -> BoxFuture<'_, Result<(), InboxError>>;

    /// Forgets a user's messages and cursors: no message that is stored now is shown any more, and
    /// upkeep removes them. Numbers go on, and revocations stay. Idempotent; where it fails, a
    /// repeat goes on.
    fn forget(&self, user: UserId) -> BoxFuture<'_, Result<(), InboxError>>;

    /// The positions of devices in logs of topics, in the same order.
    fn log_positions(&self, devices: Vec<Device>) -> BoxFuture<'_, Result<Vec<Positions>, InboxError>>;

    /// Starts the writer of this store, which gathers appends into writes ([`group_commit`]). One
    /// process starts it once. It ends with `tasks`.
    fn appender(self: Arc<Self>, observer: Arc<dyn WriteObserver>, tasks: &mut JoinSet<()>) -> Appender;

    /// Whether questions of single sessions are gathered into batches, because a batch costs this
    /// store little more than one of them ([`Lookups`]).
    fn gathers_lookups(&self) -> bool;
}

/// A device of a user.
pub type Device = (UserId, DeviceId);

/// The positions of a device in logs of topics, as far as they are stored; in no order.
pub type Positions = Vec<(LogId, Seq)>;

/// The ports of the store that roles use.
#[derive(Clone)]
pub struct Stores {
    /// The inboxes.
    pub inbox: Arc<dyn Inbox>,
    /// Topics and their members.
    pub topics: Arc<dyn Topics>,
    /// The logs of topics.
    pub logs: Logs,
}

/// The second port: upkeep of the store, run by collect. Idempotent.
pub trait Janitor: Send + Sync + 'static {
    /// Watches the store for as long as it is polled: whether it was restored or dropped, and
    /// whether its indexes exist.
    fn watch(&self) -> BoxFuture<'_, ()> {
        Box::pin(std::future::pending())
    }

    /// Removes expired messages and unused cursors of all users. Returns the number of removed
    /// messages.
    fn run_once(&self) -> BoxFuture<'_, Result<u64, InboxError>>;
}

/// One message to append.
#[derive(Debug, Clone)]
pub struct Append {
    /// The recipient.
    pub user: UserId,
    /// The id of the message: the sender's idempotency key, or one made by collect.
    pub id: MessageId,
    /// Whether the sender may repeat the id: it is looked up, and remembered.
    pub deduplicated: bool,
    /// When collect accepted the message.
    pub accepted_at: Millis,
    /// When the message expires.
    pub expires_at: Millis,
    /// What the message tells, if its sender named that.
    pub event: Option<EventName>,
    /// What a topic has to do with it, if one has.
    pub via: Option<Arc<Via>>,
    /// The trace that the message belongs to, if its sender named one.
    pub trace: Option<Arc<TraceParent>>,
    /// Tells this append from another one under the same id, where two processes may try it;
    /// `None`: the adapter makes one if it needs one.
    pub append_id: Option<Arc<str>>,
    /// Valid JSON text.
    pub payload: Bytes,
}

/// The outcome of an append.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Appended {
    /// The message was stored.
    Stored(Arc<Message>),
    /// A message with this id and payload was stored before, at this position.
    Duplicate(Seq),
    /// A message with this id and another payload was stored before.
    Conflict,
}

/// A question about a position of a user's inbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PositionQuery {
    /// The user.
    pub user: UserId,
    /// The position.
    pub from: StartAt,
}

/// Which message of a user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sought {
    /// The one at this position.
    At(Seq),
    /// The one that was sent to the user under this id of its sender, as long as that is
    /// remembered.
    Under(MessageId),
    /// The same, sent by way of one of these topics; the newest, if several of them have used it.
    Through(Vec<TopicName>, MessageId),
}

impl Sought {
    /// The idempotency keys under which it may stand; none for one that is sought by its position.
    pub(crate) fn fences(&self) -> Vec<String> {
        match self {
            Self::At(_) => Vec::new(),
            Self::Under(id) => vec![fence_of(None, id)],
            Self::Through(topics, id) => {
                topics.iter().map(|topic| fence_of(Some(&Via::Inbox(topic.clone())), id)).collect()
            }
        }
    }
}

/// Where a session starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StartAt {
    /// After this position.
    After(Seq),
    /// After the cursor of this device; at the beginning if the device has none.
    Cursor(DeviceId),
    /// After the last message; at the beginning if there never was one.
    Latest,
}

/// What an inbox says about a position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UserPosition {
    /// The position after which to start.
    pub start: Seq,
    /// The highest number assigned so far if there is nothing after `start`; otherwise some
    /// assigned number above `start`.
    pub head: Seq,
    /// Whether there is something after `start`: then a page must be read.
    pub more: bool,
    /// Tokens issued before this time are refused; whole seconds.
    pub not_before_s: u64,
    /// How often the user's memberships in topics with a log have changed; 0: there never was one.
    pub memberships: u64,
}

/// Expired or unreadable messages that one page may pass over, so that reading a page is bounded.
const PASSED_OVER: usize = 10_000;

/// Size limits of a page.
#[derive(Debug, Clone, Copy)]
pub struct PageLimit {
    /// Most messages.
    pub messages: usize,
    /// Most bytes of payload. One message always fits.
    pub bytes: usize,
}

/// A page of an inbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InboxPage {
    /// Unexpired messages in rising order.
    pub messages: Vec<Message>,
    /// Positions, in rising order, of messages that cannot be read.
    pub unreadable: Vec<Seq>,
    /// Every number after the requested position and up to this one is in `messages` or will never
    /// be shown.
    pub upto: Seq,
    /// The page was cut at `upto`; there is more above.
    pub more: bool,
}

/// What is stored about a user.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Profile {
    /// The highest position of a message; `None` if there never was one.
    pub head: Option<Seq>,
    /// No message ever had a number up to this one.
    pub first: Seq,
    /// Tokens issued before this time are refused; whole seconds.
    pub not_before_s: u64,
    /// The cursors by device, in the order of the names.
    pub cursors: Vec<(DeviceId, Seq)>,
}

/// A value to raise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// A device has acked everything up to a position.
    Cursor {
        /// The user.
        user: UserId,
        /// The device.
        device: DeviceId,
        /// The acked position.
        acked: Seq,
    },
    /// A device that has no cursor begins after a position. Its cursor is on stable storage when
    /// this returns; a cursor that it has meanwhile is only raised.
    Begin {
        /// The user.
        user: UserId,
        /// The device.
        device: DeviceId,
        /// The position; zero in an inbox that never had a message.
        at: Seq,
    },
    /// A device has handled everything up to these positions of logs, or begins there. They are on
    /// stable storage when this returns.
    Positions {
        /// The user.
        user: UserId,
        /// The device.
        device: DeviceId,
        /// The positions by log.
        logs: Vec<(LogId, Seq)>,
    },
    /// A client was sent numbers up to here that are gone, because the store was restored to an
    /// earlier state. None of them is assigned again.
    Shown {
        /// The user.
        user: UserId,
        /// The highest such number.
        upto: Seq,
    },
    /// A message ends at a time, unless it ends earlier. It is on stable storage when this returns.
    End {
        /// The user.
        user: UserId,
        /// The position of the message; nothing changes if there is none.
        seq: Seq,
        /// The time.
        at: Millis,
    },
    /// Tokens issued before a time are refused from now on.
    NotBefore {
        /// The user.
        user: UserId,
        /// The time, in whole seconds.
        seconds: u64,
    },
}

/// Why the inbox could not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InboxError {
    /// A write failed and what is on disk is unknown: the process must end.
    #[error("the store failed and takes no more writes: {0}")]
    Poisoned(String),
    /// The store does not respond now; it may later.
    #[error("the store cannot answer now: {0}")]
    Unavailable(String),
    /// A stored record cannot be read.
    #[error("the store holds something unreadable: {0}")]
    Corrupt(String),
}

/// Whether a stored payload is JSON text, as it was when it was accepted. Anything else would end
/// every connection that it is sent on, for ever.
pub(crate) fn is_json(payload: &[u8]) -> bool {
    let text = std::str::from_utf8(payload).ok();
    text.is_some_and(|text| serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok())
}

/// Stands between a topic or a life and an id in an idempotency key. None contains it.
const OF_TOPIC: char = '\n';

/// The idempotency key of an id, among those of one user or log. The same id by another topic, in
/// another life of a topic, or sent to the user, is another message.
pub(crate) fn fence_of(via: Option<&Via>, id: &MessageId) -> String {
    match via {
        None => id.as_str().to_owned(),
        Some(Via::Inbox(topic)) => format!("{topic}{OF_TOPIC}{id}"),
        Some(Via::Log(entry)) => format!("{}{OF_TOPIC}{id}", entry.life),
    }
}

impl Append {
    /// The message as it is stored at a position.
    pub(crate) fn stored_at(&self, seq: Seq) -> Message {
        Message {
            seq,
            id: self.id.clone(),
            accepted_at: self.accepted_at,
            expires_at: self.expires_at,
            event: self.event.clone(),
            via: self.via.clone(),
            trace: self.trace.clone(),
            payload: self.payload.clone(),
        }
    }

    /// The idempotency key.
    pub(crate) fn fence(&self) -> String {
        fence_of(self.via.as_deref(), &self.id)
    }

    /// The first half of the SHA-256 of the payload, and of the event if there is one. It tells a
    /// repeat from a conflict without keeping the payload twice. JSON text contains no zero byte,
    /// so the two cannot be mistaken for one another.
    pub(crate) fn digest(&self) -> [u8; 16] {
        use sha2::{Digest, Sha256};
        let mut hash = Sha256::new_with_prefix(&self.payload);
        if let Some(event) = &self.event {
            hash.update([0]);
            hash.update(event.as_str());
        }
        let mut half = [0u8; 16];
        half.copy_from_slice(&hash.finalize()[..16]);
        half
    }
}
