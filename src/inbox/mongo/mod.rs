//! The inbox in MongoDB: a replica set, or a sharded cluster ranged on the user.
//!
//! One document per message, `_id: {u, n}`, and the head record of each user at n = 0. Every writer
//! computes the same next number, so the unique `_id` orders the writers; no clock decides. Every
//! read that decides something goes to the primary with read concern majority, whatever the URI
//! says. The rules of appending are in [`append`], those of removal in [`janitor`]. They belong
//! together, and `model` explores them.
//!
//! A head record's `head` rises only when everything up to it has expired for good, and it is
//! raised before anything is removed. A document at or below it counts nowhere.

mod append;
mod janitor;
#[cfg(test)]
mod model;
mod stored;
mod watch;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::future::{BoxFuture, FutureExt};
use futures_util::{StreamExt, TryStreamExt};
use mongodb::bson::{Bson, Document, doc};
use mongodb::error::{Error, ErrorKind};
use mongodb::options::{
    Acknowledgment, ClientOptions, ReadConcern, ReadPreference, ReturnDocument, SelectionCriteria,
    WriteConcern,
};
use mongodb::{Client, Collection, Database};
use parking_lot::Mutex;

use super::{
    Append, Appended, CURSOR_LIFE_MS, Change, DEVICES_PER_USER, GroupCommit, Inbox, InboxError, InboxPage,
    Janitor, PASSED_OVER, PageLimit, PositionQuery, Profile, REVOCATION_AHEAD_MAX_S, StartAt, UserPosition,
};
use crate::clock::Clock;
use crate::message::{DeviceId, Seq, UserId};
use stored::{ABOUT, CURSORS, HeadRecord, INBOX, StoredMessage, id, ids_above, int, integer, place_of};

/// Deadline of one command. A failed primary is replaced in about ten seconds; a command that hangs
/// on the old one must not wait for that.
const COMMAND_DEADLINE: Duration = Duration::from_secs(4);
/// The error text for a command that exceeded [`COMMAND_DEADLINE`].
const TIMED_OUT: &str = "timed out: no answer within 4 s";
/// How long the driver looks for a primary.
const SELECTION_TIMEOUT: Duration = Duration::from_secs(3);
/// A majority that takes longer counts as no response.
const MAJORITY_TIMEOUT: Duration = Duration::from_secs(3);
/// Documents fetched at once while a page is read.
const PAGE_FETCH: u32 = 64;
/// Positions above the head that are confirmed at the same time. Each takes two linearizable reads,
/// some 200 ms.
const CONFIRMATIONS: usize = 16;

/// Two indexes contain when a cursor was last used, to the minute, so that nearly no ack changes
/// them. The exact time stands beside it, without an index.
const MINUTE_MS: u64 = 60_000;

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
}

struct Inner {
    database: Database,
    messages: Collection<StoredMessage>,
    documents: Collection<Document>,
    cursors: Collection<Document>,
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

/// Why the inbox cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// The store does not respond; waiting may help.
    #[error("MongoDB cannot be reached: {0}")]
    Unreachable(String),
    /// A configuration key, and what is wrong with its value. Waiting does not help.
    #[error("{0}: {1}")]
    Refused(&'static str, String),
}

impl MongoInbox {
    /// Parses the URI. Nothing is connected yet.
    ///
    /// # Errors
    ///
    /// [`OpenError::Refused`].
    pub async fn new(uri: &str, database: &str, times: MongoTimes, clock: Clock) -> Result<Self, OpenError> {
        let refused = |error: Error| OpenError::Refused("mongo.uri", words(&error));
        let names_compressors = uri.split(['?', '&']).skip(1).any(|option| {
            option.split('=').next().is_some_and(|name| name.eq_ignore_ascii_case("compressors"))
        });
        if names_compressors {
            let why = "compressors= is not built in: leave it out".to_owned();
            return Err(OpenError::Refused("mongo.uri", why));
        }
        let mut options = ClientOptions::parse(uri).await.map_err(refused)?;
        options.app_name.get_or_insert_with(|| "ringpush".to_owned());
        options.retry_writes = Some(true);
        options.server_selection_timeout = Some(SELECTION_TIMEOUT);
        options.connect_timeout = Some(SELECTION_TIMEOUT);
        options.read_concern = Some(ReadConcern::majority());
        options.selection_criteria = Some(SelectionCriteria::ReadPreference(ReadPreference::Primary));
        options.write_concern = Some(majority());
        let client = Client::with_options(options).map_err(refused)?;
        let database = client.database(database);
        let inner = Inner {
            messages: database.collection(INBOX),
            documents: database.collection(INBOX),
            cursors: database.collection(CURSORS),
            database,
            clock,
            times,
            appends: tokio::sync::Mutex::default(),
            marker: Mutex::default(),
            restored: AtomicBool::new(false),
            ids_refused: Mutex::default(),
            removals: tokio::sync::Mutex::default(),
            identity: std::sync::OnceLock::new(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Connects and checks or creates what must exist: a replica set, the indexes, and the store's
    /// identity, which is returned.
    ///
    /// # Errors
    ///
    /// [`OpenError`].
    pub async fn prepare(&self) -> Result<String, OpenError> {
        let inner = &self.inner;
        let admin = inner.database.client().database("admin");
        let hello = inner.in_time(admin.run_command(doc! { "hello": 1 }).into_future()).await;
        let hello = hello.map_err(|error| open_fault(&error))?;
        if !hello.contains_key("setName") && !hello.get_str("msg").is_ok_and(|kind| kind == "isdbgrid") {
            return Err(OpenError::Refused(
                "mongo.uri",
                "this is a standalone MongoDB, which cannot keep what it acknowledged: start it with --replSet and run \
                 rs.initiate(), or name a replica set"
                    .to_owned(),
            ));
        }
        inner.check_indexes().await?;
        inner.make_indexes().await?;
        watch::look(inner).await.map_err(|error| OpenError::Unreachable(error.to_string()))?;
        let made = ulid::Ulid::generate().to_string();
        let identity = inner.identity(&made).await.map_err(|error| open_fault(&error))?;
        Ok(inner.identity.get_or_init(|| identity).clone())
    }
}

impl MongoInbox {
    /// Checks that the store responds, by a majority read of one document.
    ///
    /// # Errors
    ///
    /// [`InboxError::Unavailable`] with the reason.
    pub async fn alive(&self) -> Result<(), InboxError> {
        watch::read(&self.inner).await.map(drop)
    }
}

fn majority() -> WriteConcern {
    WriteConcern::builder().w(Acknowledgment::Majority).journal(true).w_timeout(MAJORITY_TIMEOUT).build()
}

/// The driver's error text without the URI, or ours where the driver has none.
fn words(error: &Error) -> String {
    match &*error.kind {
        ErrorKind::Custom(own) => {
            own.downcast_ref::<&str>().copied().unwrap_or("an error of its own").to_owned()
        }
        kind => kind.to_string(),
    }
}

fn open_fault(error: &Error) -> OpenError {
    match &*error.kind {
        ErrorKind::Authentication { .. } => {
            OpenError::Refused("mongo.uri", format!("the user or password is refused: {}", words(error)))
        }
        // 13 Unauthorized, 18 AuthenticationFailed.
        ErrorKind::Command(command) if [13, 18].contains(&command.code) => {
            OpenError::Refused("mongo.uri", format!("the user may not do this: {}", words(error)))
        }
        // 73 InvalidNamespace, 13297 DatabaseDifferCase.
        ErrorKind::Command(command) if [73, 13_297].contains(&command.code) => {
            OpenError::Refused("mongo.database", command.message.clone())
        }
        // A wrong password shows as a failed server selection.
        ErrorKind::ServerSelection { message, .. } if message.contains("uthentication") => {
            OpenError::Refused("mongo.uri", format!("the user or password is refused: {message}"))
        }
        _ => OpenError::Unreachable(words(error)),
    }
}

fn index_fault(collection: &str, error: &Error) -> OpenError {
    match &*error.kind {
        // 85 IndexOptionsConflict, 86 IndexKeySpecsConflict, 11000 DuplicateKey.
        ErrorKind::Command(command) if [85, 86, 11000].contains(&command.code) => OpenError::Refused(
            "mongo.database",
            format!(
                "an index of {collection} is not what it must be; drop it and start again: {}",
                command.message
            ),
        ),
        _ => open_fault(error),
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

    /// The identity of the store. `made` is stored and returned if there is none yet (majority).
    async fn identity(&self, made: &str) -> mongodb::error::Result<String> {
        let about = self.database.collection::<Document>(ABOUT);
        let update = doc! { "$setOnInsert": { "id": made } };
        let finding = about
            .find_one_and_update(doc! { "_id": "store" }, update)
            .upsert(true)
            .return_document(ReturnDocument::After);
        let found = self.in_time(finding.into_future()).await?.unwrap_or_default();
        found
            .get_str("id")
            .map(str::to_owned)
            .map_err(|_| Error::custom("the identity of the store is no text"))
    }

    /// An index that removes documents by itself would break the order of writers.
    async fn check_indexes(&self) -> Result<(), OpenError> {
        for collection in [&self.documents, &self.cursors] {
            let Ok(mut indexes) = collection.list_indexes().await else { continue };
            while let Some(Ok(index)) = indexes.next().await {
                if index.options.as_ref().is_some_and(|options| options.expire_after.is_some()) {
                    return Err(OpenError::Refused(
                        "mongo.database",
                        format!(
                            "the collection {} has a TTL index, {}, which removes what only ringpush may remove: drop it",
                            collection.name(),
                            index.keys
                        ),
                    ));
                }
            }
        }
        Ok(())
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

    /// The head record and the highest number of each of these users that has a head record, at one
    /// snapshot.
    async fn tops(&self, users: &[&UserId]) -> Result<HashMap<UserId, (HeadRecord, u64)>, InboxError> {
        let records: Vec<Document> = users.iter().map(|user| id(user, 0)).collect();
        let above = doc! { "$gt": ["$_id", { "u": "$$u", "n": 0i64 }] };
        let below = doc! { "$lt": ["$_id", { "u": "$$u", "n": Bson::MaxKey }] };
        let top = vec![
            doc! { "$match": { "$expr": { "$and": [above, below] } } },
            doc! { "$sort": { "_id": -1 } },
            doc! { "$limit": 1 },
            doc! { "$project": { "_id": 1 } },
        ];
        let look_up = doc! { "from": INBOX, "let": { "u": "$_id.u" }, "pipeline": top, "as": "top" };
        let command = doc! {
            "aggregate": INBOX,
            "pipeline": [{ "$match": { "_id": { "$in": records } } }, { "$lookup": look_up }],
            "cursor": { "batchSize": 10_000 },
            "readConcern": { "level": "snapshot" },
        };
        let answered = async {
            let cursor = self.database.run_cursor_command(command).await?;
            cursor.try_collect::<Vec<Document>>().await
        };
        let rows = self.in_time(answered).await.map_err(unavailable)?;
        let read = |row: &Document| {
            let user = place_of(row).and_then(|(user, _)| UserId::parse(user).ok());
            let user = user.ok_or_else(|| InboxError::Corrupt("a look-up of heads".to_owned()))?;
            let top = row.get_array("top").ok().and_then(|found| place_of(found.first()?.as_document()?));
            Ok((user, (HeadRecord::read(row), top.map_or(0, |(_, n)| n))))
        };
        rows.iter().map(read).collect()
    }

    /// Like [`Self::tops`]; users without a head record get one first.
    async fn tops_made(&self, users: &[&UserId]) -> Result<HashMap<UserId, (HeadRecord, u64)>, InboxError> {
        let mut tops = self.tops(users).await?;
        let without: Vec<&UserId> = users.iter().filter(|user| !tops.contains_key(**user)).copied().collect();
        if !without.is_empty() {
            self.make_heads(&without).await?;
            tops.extend(self.tops(&without).await?);
        }
        Ok(tops)
    }

    /// Inserts head records (majority). Existing ones stay as they are.
    async fn make_heads(&self, users: &[&UserId]) -> Result<(), InboxError> {
        let now = int(self.clock.now().0);
        let record = |user: &&UserId| doc! { "_id": id(user, 0), "head": now, "first": now, "nb": 0i64 };
        let records: Vec<Document> = users.iter().map(record).collect();
        match self.in_time(self.documents.insert_many(records).ordered(false).into_future()).await {
            Ok(_) => Ok(()),
            Err(error) => match &*error.kind {
                ErrorKind::InsertMany(many)
                    if many.write_concern_error.is_none()
                        && many
                            .write_errors
                            .iter()
                            .flatten()
                            .all(|one| one.code == append::DUPLICATE_KEY) =>
                {
                    Ok(())
                }
                _ => Err(unavailable(error)),
            },
        }
    }

    /// The cursors of the queries that ask for one. A cursor that does not exist counts as the
    /// beginning. A majority is not waited for, because losing a cursor costs only repeats.
    async fn cursors_of(
        &self,
        batch: &[PositionQuery],
    ) -> Result<HashMap<(UserId, DeviceId), Seq>, InboxError> {
        let wanted: Vec<Document> = batch
            .iter()
            .filter_map(|ask| match &ask.from {
                StartAt::Cursor(device) => Some(doc! { "u": ask.user.as_str(), "d": device.as_str() }),
                _ => None,
            })
            .collect();
        if wanted.is_empty() {
            return Ok(HashMap::new());
        }
        self.read_cursors(doc! { "_id": { "$in": wanted } }).await
    }

    async fn read_cursors(&self, filter: Document) -> Result<HashMap<(UserId, DeviceId), Seq>, InboxError> {
        let found = async {
            let cursor =
                self.cursors.find(filter).read_concern(ReadConcern::local()).batch_size(10_000).await?;
            cursor.try_collect::<Vec<Document>>().await
        };
        let found = self.in_time(found).await.map_err(unavailable)?;
        let read = |document: &Document| {
            let id = document.get_document("_id").ok()?;
            let user = UserId::parse(id.get_str("u").ok()?).ok()?;
            let device = DeviceId::parse(id.get_str("d").ok()?).ok()?;
            Some(((user, device), Seq::at(u64::try_from(integer(document, "acked")?).ok()?)))
        };
        Ok(found.iter().filter_map(read).collect())
    }

    async fn positions(&self, batch: Vec<PositionQuery>) -> Result<Vec<UserPosition>, InboxError> {
        let cursors = self.cursors_of(&batch).await?;
        let starts: Vec<Option<Seq>> = batch
            .iter()
            .map(|ask| match &ask.from {
                StartAt::After(seq) => Some(*seq),
                StartAt::Cursor(device) => {
                    let key = (ask.user.clone(), device.clone());
                    Some(cursors.get(&key).copied().unwrap_or(Seq::BEGINNING))
                }
                StartAt::Latest => None,
            })
            .collect();
        let near = self.near(&batch, &starts).await?;
        // Queries from the beginning, from the end, and those whose position was not found need the
        // head.
        let far: Vec<&UserId> = batch
            .iter()
            .zip(&starts)
            .zip(&near)
            .filter(|((_, start), near)| {
                start.is_none_or(Seq::is_beginning) || near.as_ref().is_none_or(|near| !near.is_settled)
            })
            .map(|((ask, _), _)| &ask.user)
            .collect();
        let tops = if far.is_empty() { HashMap::new() } else { self.tops_made(&distinct(far)).await? };
        let mut answers = Vec::with_capacity(batch.len());
        for ((ask, start), near) in batch.iter().zip(starts).zip(near) {
            answers.push(self.answer(ask, start, near, tops.get(&ask.user).copied()));
        }
        // Nearly all are ready; those that must be confirmed overlap.
        let mut answers: Vec<UserPosition> =
            futures_util::stream::iter(answers).buffered(CONFIRMATIONS).try_collect().await?;
        self.correct(&batch, &mut answers).await?;
        Ok(answers)
    }

    /// Makes disconnects that are too far in the future, made by a wrong clock, count from now.
    async fn correct(&self, batch: &[PositionQuery], answers: &mut [UserPosition]) -> Result<(), InboxError> {
        let now = self.clock.now().seconds();
        for (ask, answer) in batch.iter().zip(answers) {
            if answer.not_before_s > now + REVOCATION_AHEAD_MAX_S {
                let filter = doc! { "_id": id(&ask.user, 0), "nb": int(answer.not_before_s) };
                let update = doc! { "$set": { "nb": int(now) } };
                let updated = self.documents.update_one(filter, update).into_future();
                self.in_time(updated).await.map_err(unavailable)?;
                answer.not_before_s = now;
            }
        }
        Ok(())
    }

    async fn answer(
        &self,
        ask: &PositionQuery,
        start: Option<Seq>,
        near: Option<Near>,
        top: Option<(HeadRecord, u64)>,
    ) -> Result<UserPosition, InboxError> {
        match (top, near) {
            (Some((record, top)), _) => self.by_top(ask, start, record, top).await,
            (None, Some(near)) => Ok(near.answer),
            (None, None) => Err(InboxError::Corrupt(format!("no head record of {}", ask.user))),
        }
    }

    /// Whether there is more after p, for all queries at once: (u, p+1) exists, or the head record
    /// is above p.
    async fn near(
        &self,
        batch: &[PositionQuery],
        starts: &[Option<Seq>],
    ) -> Result<Vec<Option<Near>>, InboxError> {
        let mut ids = Vec::with_capacity(batch.len() * 3);
        for (ask, start) in batch.iter().zip(starts) {
            if let Some(start) = start.filter(|start| !start.is_beginning()) {
                ids.extend([id(&ask.user, 0), id(&ask.user, start.get()), id(&ask.user, start.get() + 1)]);
            }
        }
        let fields = doc! { "_id": 1, "head": 1, "first": 1, "nb": 1 };
        let found = self.by_ids(ids, fields).await?;
        let found: HashMap<(&str, u64), &Document> =
            found.iter().filter_map(|document| Some((place_of(document)?, document))).collect();
        let near = |(ask, start): (&PositionQuery, &Option<Seq>)| {
            let start = start.filter(|start| !start.is_beginning())?;
            let (user, p) = (ask.user.as_str(), start.get());
            let record = HeadRecord::read(found.get(&(user, 0))?);
            let next = found.contains_key(&(user, p + 1)) && p + 1 > record.head;
            let more = next || record.head > p;
            let is_there = record.head >= p || found.contains_key(&(user, p));
            let head = if record.head > p { record.head } else { p + u64::from(next) };
            let answer = UserPosition { start, head: Seq::at(head), more, not_before_s: record.not_before_s };
            Some(Near { answer, is_settled: more || is_there })
        };
        Ok(batch.iter().zip(starts).map(near).collect())
    }

    async fn by_top(
        &self,
        ask: &PositionQuery,
        start: Option<Seq>,
        record: HeadRecord,
        top: u64,
    ) -> Result<UserPosition, InboxError> {
        let head = record.head.max(top);
        let never = head == record.first;
        let start = match start {
            Some(start) => start,
            None if never => Seq::BEGINNING,
            None => Seq::at(head),
        };
        let mut answer = UserPosition {
            start,
            head: Seq::at(head),
            more: head > start.get() && !(never && start.is_beginning()),
            not_before_s: record.not_before_s,
        };
        if start.get() > head && self.is_there_after_all(&ask.user, start).await? {
            answer.head = start;
        }
        Ok(answer)
    }

    /// A position above the head is confirmed by linearizable reads, because a primary that was
    /// just elected may not know yet what an earlier one acknowledged. The message is read before
    /// the head record, because the janitor raises the head record before it removes the message.
    async fn is_there_after_all(&self, user: &UserId, position: Seq) -> Result<bool, InboxError> {
        if self.linearizable(user, position.get()).await?.is_some() {
            return Ok(true);
        }
        let record = self.linearizable(user, 0).await?;
        Ok(record.is_some_and(|record| HeadRecord::read(&record).head >= position.get()))
    }

    async fn linearizable(&self, user: &UserId, n: u64) -> Result<Option<Document>, InboxError> {
        let find = self
            .documents
            .find_one(doc! { "_id": id(user, n) })
            .read_concern(ReadConcern::linearizable())
            .max_time(MAJORITY_TIMEOUT);
        self.in_time(find.into_future()).await.map_err(unavailable)
    }

    async fn page(&self, user: UserId, after: Seq, limit: PageLimit) -> Result<InboxPage, InboxError> {
        let record = self.by_ids(vec![id(&user, 0)], doc! {}).await?;
        let head = record.first().map(HeadRecord::read).unwrap_or_default().head;
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

    async fn profile(&self, user: UserId) -> Result<Profile, InboxError> {
        let tops = self.tops(&[&user]).await?;
        let Some((record, top)) = tops.get(&user) else { return Ok(Profile::default()) };
        let filter = doc! { "_id.u": user.as_str() };
        let mut cursors: Vec<(DeviceId, Seq)> = self
            .read_cursors(filter)
            .await?
            .into_iter()
            .map(|((_, device), acked)| (device, acked))
            .collect();
        cursors.sort();
        let head = record.head.max(*top);
        Ok(Profile {
            head: (head > record.first).then(|| Seq::at(head)),
            not_before_s: record.not_before_s,
            cursors,
        })
    }

    async fn update(&self, changes: Vec<Change>) -> Result<(), InboxError> {
        let now = self.clock.now().0;
        let minute = now - now % MINUTE_MS;
        let mut updates = Vec::new();
        let mut users = Vec::new();
        for change in changes {
            match change {
                Change::Cursor { user, device, acked } => {
                    updates.push(doc! {
                        "q": { "_id": { "u": user.as_str(), "d": device.as_str() } },
                        "u": { "$max": { "acked": int(acked.get()) }, "$set": { "at": int(minute), "t": int(now) } },
                        "upsert": true,
                    });
                    users.push(user);
                }
                Change::NotBefore { user, seconds } => self.revoke(&user, seconds).await?,
                Change::Shown { user, upto } => self.shown(&user, upto).await?,
            }
        }
        if updates.is_empty() {
            return Ok(());
        }
        let command = doc! {
            "update": CURSORS, "updates": updates, "ordered": false, "writeConcern": { "w": 1 },
        };
        let answer = self.in_time(self.database.run_command(command).into_future()).await;
        let answer = answer.map_err(unavailable)?;
        let upserted = answer.get_array("upserted").into_iter().flatten();
        let new_here: Vec<&UserId> = upserted
            .filter_map(|made| made.as_document()?.get_i32("index").ok())
            .filter_map(|index| users.get(usize::try_from(index).ok()?))
            .collect();
        if !new_here.is_empty()
            && let Err(error) = self.trim_devices(&distinct(new_here)).await
        {
            tracing::debug!(%error, "a user has a device too many for now");
        }
        if let Ok(errors) = answer.get_array("writeErrors") {
            return Err(InboxError::Unavailable(format!("{} cursors were not written", errors.len())));
        }
        Ok(())
    }

    async fn revoke(&self, user: &UserId, seconds: u64) -> Result<(), InboxError> {
        self.tops_made(&[user]).await?;
        let update = doc! { "$max": { "nb": int(seconds) } };
        let updated = self.documents.update_one(doc! { "_id": id(user, 0) }, update).into_future();
        self.in_time(updated).await.map(drop).map_err(unavailable)
    }

    async fn shown(&self, user: &UserId, upto: Seq) -> Result<(), InboxError> {
        let tops = self.tops_made(&[user]).await?;
        let update = doc! { "$max": { "shown": int(upto.get()) } };
        let updated = self.documents.update_one(doc! { "_id": id(user, 0) }, update).into_future();
        self.in_time(updated).await.map_err(unavailable)?;
        let last = tops.get(user).map_or(0, |(record, top)| record.head.max(*top));
        if last < upto.get() {
            watch::bridge(self, &[(user, last)]).await?;
        }
        // Writers must read heads again, and with them what was shown.
        self.restored.store(true, Ordering::Release);
        Ok(())
    }

    /// Users with more devices than [`DEVICES_PER_USER`] lose the longest unused cursors. One query
    /// for all: nearly no user has so many.
    async fn trim_devices(&self, users: &[&UserId]) -> Result<(), InboxError> {
        let names: Vec<&str> = users.iter().map(|user| user.as_str()).collect();
        let trimming = async {
            let found = self
                .cursors
                .find(doc! { "_id.u": { "$in": names } })
                .projection(doc! { "at": 1, "t": 1 })
                .read_concern(ReadConcern::local())
                .batch_size(10_000)
                .await?;
            let excess = longest_unused(found.try_collect().await?);
            if !excess.is_empty() {
                self.cursors.delete_many(doc! { "_id": { "$in": excess } }).await?;
            }
            Ok(())
        };
        self.in_time(trimming).await.map_err(unavailable)
    }
}

/// The `_id`s of the cursors beyond those that each user keeps.
fn longest_unused(mut cursors: Vec<Document>) -> Vec<Document> {
    // The later of the two: an earlier version knows only the first.
    let used =
        |cursor: &Document| ["at", "t"].map(|name| integer(cursor, name).unwrap_or(0)).into_iter().max();
    cursors.sort_by_key(|cursor| std::cmp::Reverse(used(cursor)));
    let mut kept: HashMap<String, usize> = HashMap::new();
    let mut excess = Vec::new();
    for id in cursors.iter().filter_map(|cursor| cursor.get_document("_id").ok()) {
        let count = kept.entry(id.get_str("u").unwrap_or_default().to_owned()).or_default();
        *count += 1;
        if *count > DEVICES_PER_USER {
            excess.push(id.clone());
        }
    }
    excess
}

/// What the documents around a position say about it.
struct Near {
    answer: UserPosition,
    /// The position is not above the head.
    is_settled: bool,
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

    fn update(&self, changes: Vec<Change>) -> BoxFuture<'_, Result<(), InboxError>> {
        self.inner.update(changes).boxed()
    }

    fn gathering(&self) -> GroupCommit {
        GATHERING
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
