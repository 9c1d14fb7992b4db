//! The inbox in MongoDB: a replica set, or a sharded cluster ranged on the user.
//!
//! One document per message, `_id: {u, n}`, and the head record of each user at n = 0. Every writer
//! computes the same next number, so the unique `_id` orders the writers; no clock decides. Every
//! read that decides something goes to the primary with read concern majority, whatever the URI
//! says. The rules of appending are in `append`, those of removal in `janitor`. They belong
//! together, and `model` explores them.
//!
//! The logs of topics stand in a collection of their own, of the same form and by the same rules
//! ([`MongoInbox::logs`]), with an append lock of their own: an inbox never waits for a log.
//!
//! A head record's `head` rises only when everything up to it has expired for good, and it is
//! raised before anything is removed. A document at or below it counts nowhere.

mod append;
mod cursors;
mod identity;
mod indexes;
mod janitor;
#[cfg(test)]
mod lives_model;
mod log_positions;
mod members;
#[cfg(test)]
mod model;
mod open;
mod positions;
mod primary;
mod stored;
mod topics;
#[cfg(test)]
mod topics_model;
mod watch;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use futures_util::TryStreamExt;
use futures_util::future::{BoxFuture, FutureExt};
use mongodb::bson::{Document, doc};
use mongodb::error::{Error, ErrorKind, WriteFailure};
use mongodb::{Collection, Database};
use parking_lot::Mutex;

pub use open::OpenError;

use tokio::task::JoinSet;

use super::{
    Append, Appended, Appender, CURSOR_LIFE_MS, Change, Device, GroupCommit, Inbox, InboxError, InboxPage,
    Janitor, PASSED_OVER, PageLimit, PositionQuery, Positions, Profile, Sought, UserPosition, WriteObserver,
};
use crate::clock::Clock;
use crate::message::{DeviceId, Message, Seq, UserId};

use open::{index_fault, words};
use stored::{HeadRecord, StoredMessage, id, ids_above, place_of};

/// Deadline of one command. A failed primary is replaced in about ten seconds; a command that hangs
/// on the old one must not wait for that.
const COMMAND_DEADLINE: Duration = Duration::from_secs(4);
/// The error text for a command that exceeded [`COMMAND_DEADLINE`].
const TIMED_OUT: &str = "timed out: no answer within 4 s";
/// Documents fetched at once while a page is read.
const PAGE_FETCH: u32 = 64;

/// A command costs MongoDB as much as some twenty documents in it.
const GATHERING: GroupCommit = GroupCommit { every: Duration::from_millis(8), enough: 100 };

/// The times of the rules (docs/design.md, section 5).
#[derive(Debug, Clone, Copy)]
pub struct MongoTimes {
    /// How long a head in memory is trusted after its read, or its acknowledged insert, was sent.
    pub head_trust: Duration,
}

impl Default for MongoTimes {
    fn default() -> Self {
        Self { head_trust: Duration::from_secs(600) }
    }
}

impl MongoTimes {
    /// An append that is answered later than this after its head was read is verified before it is
    /// acknowledged.
    #[must_use]
    pub fn verify_after(&self) -> Duration {
        self.head_trust * 3
    }

    /// How long the janitor waits after it first saw a run expired: twice [`Self::verify_after`],
    /// so that no writer trusts an older head.
    #[must_use]
    pub fn removal_delay(&self) -> Duration {
        self.head_trust * 6
    }
}

/// The inbox on MongoDB. Cloned, it is the same inbox.
#[derive(Clone)]
pub struct MongoInbox {
    inner: Arc<Inner>,
    /// The store of the logs; `None` in that store itself.
    logs: Option<Arc<Inner>>,
}

struct Inner {
    /// This is the store of the logs: what belongs to users is in the other one.
    is_of_logs: bool,
    database: Database,
    messages: Collection<StoredMessage>,
    documents: Collection<Document>,
    cursors: Collection<Document>,
    topics: Collection<Document>,
    members: Collection<Document>,
    /// Which primary answers, and since when.
    primary: Arc<primary::Primary>,
    clock: Clock,
    times: MongoTimes,
    appends: tokio::sync::Mutex<append::Heads>,
    marker: Mutex<watch::Marker>,
    /// The store was restored or dropped: heads in memory are outdated.
    restored: AtomicBool,
    /// Why publishes with an id are refused for now.
    ids_refused: Mutex<Option<String>>,
    removals: tokio::sync::Mutex<janitor::Seen>,
    /// The identity of the store, once it was read.
    identity: std::sync::OnceLock<String>,
}

impl MongoInbox {
    /// The store of the logs of topics, for [`Logs`](crate::inbox::Logs).
    #[must_use]
    pub fn logs(&self) -> Self {
        Self { inner: Arc::clone(self.logs.as_ref().unwrap_or(&self.inner)), logs: None }
    }

    /// Checks that the store responds, by a majority read of one document.
    ///
    /// # Errors
    ///
    /// [`InboxError::Unavailable`] with the reason.
    pub async fn alive(&self) -> Result<(), InboxError> {
        watch::read(&self.inner).await.map(drop)
    }
}

/// MongoDB's code for a duplicate key.
const DUPLICATE_KEY: i32 = 11_000;

/// Whether a write failed only because what it would have made is there.
fn is_taken(error: &Error) -> bool {
    match &*error.kind {
        ErrorKind::Command(command) => command.code == DUPLICATE_KEY,
        ErrorKind::Write(WriteFailure::WriteError(one)) => one.code == DUPLICATE_KEY,
        ErrorKind::InsertMany(many) => {
            many.write_concern_error.is_none()
                && many.write_errors.iter().flatten().all(|one| one.code == DUPLICATE_KEY)
        }
        _ => false,
    }
}

fn unavailable(error: Error) -> InboxError {
    InboxError::Unavailable(format!("MongoDB (mongo.uri): {}", words(&error)))
}

impl Inner {
    /// Runs one command with [`COMMAND_DEADLINE`].
    async fn in_time<T>(
        &self,
        command: impl Future<Output = mongodb::error::Result<T>>,
    ) -> mongodb::error::Result<T> {
        match tokio::time::timeout(COMMAND_DEADLINE, command).await {
            Ok(answer) => answer,
            Err(_) => Err(Error::custom(TIMED_OUT)),
        }
    }

    /// Documents by `_id`, with these fields, as a majority has them.
    async fn by_ids(&self, ids: Vec<Document>, fields: Document) -> Result<Vec<Document>, InboxError> {
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        self.find(doc! { "_id": { "$in": ids } }, fields).await
    }

    /// Documents by a filter, with these fields, as a majority has them.
    async fn find(&self, filter: Document, fields: Document) -> Result<Vec<Document>, InboxError> {
        let found = async {
            let cursor = self.documents.find(filter).projection(fields).batch_size(10_000).await?;
            cursor.try_collect().await
        };
        self.in_time(found).await.map_err(unavailable)
    }

    async fn page(&self, user: UserId, after: Seq, limit: PageLimit) -> Result<InboxPage, InboxError> {
        let record = self.by_ids(vec![id(&user, 0)], doc! {}).await?;
        let record = record.first().map(HeadRecord::read).unwrap_or_default();
        let head = record.head.max(record.gone);
        let from = head.max(after.get());
        let now = self.clock.now();
        let mut page = InboxPage {
            messages: Vec::new(),
            unreadable: Vec::new(),
            upto: after.max(Seq::at(head)),
            more: false,
        };
        let reading = async {
            let mut found = self
                .documents
                .find(doc! { "_id": ids_above(&user, from) })
                .sort(doc! { "_id": 1 })
                .batch_size(PAGE_FETCH)
                .await?;
            let (mut bytes, mut looked_at) = (0, 0);
            while found.advance().await? {
                if looked_at == limit.messages + PASSED_OVER {
                    page.more = true;
                    break;
                }
                looked_at += 1;
                let raw = found.current();
                let message = mongodb::bson::deserialize_from_slice::<StoredMessage>(raw.as_bytes());
                let expired = message.as_ref().is_ok_and(|message| message.is_expired(now));
                let message = message.ok().and_then(|message| message.into_message().ok());
                let Some(message) = message else {
                    // Another program wrote it, or it is damaged. Without a number it belongs to
                    // nobody.
                    if let Some((_, n)) = Document::try_from(raw).ok().as_ref().and_then(place_of) {
                        page.unreadable.push(Seq::at(n));
                        page.upto = Seq::at(n);
                    }
                    continue;
                };
                let size = message.payload.len();
                let full = page.messages.len() >= limit.messages || bytes + size > limit.bytes;
                if full && !page.messages.is_empty() {
                    page.more = true;
                    break;
                }
                page.upto = message.seq;
                if !expired {
                    bytes += size;
                    page.messages.push(message);
                }
            }
            Ok(())
        };
        self.in_time(reading).await.map_err(unavailable)?;
        Ok(page)
    }

    async fn stored(&self, user: UserId, which: Sought) -> Result<Option<Message>, InboxError> {
        let record = self.by_ids(vec![id(&user, 0)], doc! {}).await?;
        let head = record.first().map(HeadRecord::read).unwrap_or_default().head;
        let filter = match &which {
            Sought::At(seq) if seq.is_beginning() => return Ok(None),
            Sought::At(seq) => doc! { "_id": id(&user, seq.get()) },
            which => doc! { "_id.u": user.as_str(), "f": { "$in": which.fences() } },
        };
        let newest = self.messages.find_one(filter).sort(doc! { "_id.n": -1 });
        let found = self.in_time(newest.into_future()).await.map_err(unavailable)?;
        // Numbers up to the head were given up; a bridge is no message.
        let found = found.filter(|message| message.n() > head && message.x != 0);
        found.map(StoredMessage::into_message).transpose()
    }

    async fn profile(&self, user: UserId) -> Result<Profile, InboxError> {
        let tops = self.tops(&[&user]).await?;
        let (record, top) = tops.get(&user).copied().unwrap_or_default();
        let filter = doc! { "_id.u": user.as_str() };
        let mut cursors: Vec<(DeviceId, Seq)> = self
            .read_cursors(filter)
            .await?
            .into_iter()
            .map(|((_, device), acked)| (device, acked))
            .collect();
        cursors.sort();
        let head = record.head.max(top);
        Ok(Profile {
            head: (head > record.first).then(|| Seq::at(head)),
            first: Seq::at(record.first),
            not_before_s: record.not_before_s,
            cursors,
        })
    }
}

fn distinct(mut users: Vec<&UserId>) -> Vec<&UserId> {
    users.sort_unstable();
    users.dedup();
    users
}

impl Inbox for MongoInbox {
    fn append(&self, batch: Vec<Append>) -> BoxFuture<'_, Vec<Result<Appended, InboxError>>> {
        append::append(&self.inner, batch).boxed()
    }

    fn positions(&self, batch: Vec<PositionQuery>) -> BoxFuture<'_, Result<Vec<UserPosition>, InboxError>> {
        self.inner.positions(batch).boxed()
    }

    fn page(
        &self,
        user: UserId,
        after: Seq,
        limit: PageLimit,
    ) -> BoxFuture<'_, Result<InboxPage, InboxError>> {
        self.inner.page(user, after, limit).boxed()
    }

    fn profile(&self, user: UserId) -> BoxFuture<'_, Result<Profile, InboxError>> {
        self.inner.profile(user).boxed()
    }

    fn stored(&self, user: UserId, which: Sought) -> BoxFuture<'_, Result<Option<Message>, InboxError>> {
        self.inner.stored(user, which).boxed()
    }

    fn update(&self, changes: Vec<Change>) -> BoxFuture<'_, Result<(), InboxError>> {
        self.inner.update(changes).boxed()
    }

    fn forget(&self, user: UserId) -> BoxFuture<'_, Result<(), InboxError>> {
        async move { self.inner.forget(&user).await }.boxed()
    }

    fn log_positions(&self, devices: Vec<Device>) -> BoxFuture<'_, Result<Vec<Positions>, InboxError>> {
        async move { self.inner.log_positions(&devices).await }.boxed()
    }

    fn appender(self: Arc<Self>, observer: Arc<dyn WriteObserver>, tasks: &mut JoinSet<()>) -> Appender {
        Appender::on_runtime(self, GATHERING, observer, tasks)
    }

    fn gathers_lookups(&self) -> bool {
        true
    }
}

/// The store is looked at this many times per [`MongoTimes::head_trust`]: every 2 s.
const LOOKS_PER_TRUST: u32 = 300;

impl Janitor for MongoInbox {
    fn watch(&self) -> BoxFuture<'_, ()> {
        watch::watch(&self.inner, self.inner.times.head_trust / LOOKS_PER_TRUST).boxed()
    }

    fn run_once(&self) -> BoxFuture<'_, Result<u64, InboxError>> {
        janitor::run_once(&self.inner).boxed()
    }
}
