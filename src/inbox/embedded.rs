//! The inbox on the embedded store `fjall`, for one process alone.
//!
//! Four keyspaces hold messages, and one describes the store itself. A key begins with four bytes
//! of the user's hash, the user id and a zero byte. No user id contains a zero byte, so users never
//! mix:
//!
//! | keyspace | key | value |
//! | --- | --- | --- |
//! | messages | hash user 0 seq | accepted, expires, deduplicated, id, payload |
//! | heads | hash user | head, first, not before |
//! | fences | hash user 0 idempotency key | seq, expires, payload digest |
//! | cursors | hash user 0 device | acked, moved at |
//!
//! The hash is only for speed. fjall keeps the first four bytes of a key beside its pointer, and
//! names of users begin alike; without the hash every comparison in the memtable went to memory
//! (docs/benchmarks/log.md).
//!
//! # Locks
//!
//! `writer` is held through the whole of a commit, including its sync, by appends, updates and the
//! janitor; it owns the heads in memory. Reads take no lock: each works on a snapshot, and a commit
//! becomes visible only after its sync. The writer's lock and fjall's lock on the directory are all
//! that numbers need for their order.
//!
//! # New users
//!
//! A user without a head record starts numbering at the time at which this process opened the
//! store. `positions` can therefore answer for such a user without a write: the record that is
//! created with the first message will hold the same number. A crash in between is harmless,
//! because a client of an empty inbox is only ever told 0.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes};
use fjall::{
    AbstractTree, Database, Keyspace, KeyspaceCreateOptions, OwnedWriteBatch, PersistMode, Readable, Snapshot,
};
use futures_util::future::{BoxFuture, FutureExt};
use parking_lot::Mutex;
use tokio::sync::watch;

use super::{
    Append, Appended, CURSOR_LIFE_MS, Change, DEVICES_PER_USER, GroupCommit, Inbox, InboxError, InboxPage,
    Janitor, PASSED_OVER, PageLimit, PositionQuery, Profile, REVOCATION_AHEAD_MAX_S, StartAt, UserPosition,
    is_json, payload_digest,
};
use crate::clock::Clock;
use crate::message::{DeviceId, Message, MessageId, Millis, Seq, UserId};

/// Heads kept in memory, at most twice this number: 2 x 100,000 x about 100 bytes = 20 MB.
const HEADS_IN_MEMORY: usize = 100_000;
/// The keyspace with the identity of the store.
const ABOUT: &str = "about.1";
const IDENTITY: &[u8] = b"identity";
/// The layout of the keys is part of the keyspaces' names: a store of another layout is refused,
/// not misread.
const KEYSPACES: [&str; 4] = ["messages.2", "heads.2", "fences.2", "cursors.2"];
/// A keyspace of the first layout.
const EARLIER: &str = "messages";
/// A sync takes a fifth of a millisecond and ten wake-ups, for one message as for many
/// (docs/decisions/004-group-commit.md).
const GATHERING: GroupCommit = GroupCommit { every: Duration::from_millis(1), enough: 24 };
/// Up to this many positions are looked up on the caller's thread: each is a look into memory, or
/// into a block of a file that the kernel has cached. Handing them to another thread would cost
/// several times as much.
const ASKED_AT_ONCE: usize = 1;
/// Positions that are looked up (about 0.1 ms) before the thread yields. A sweep asks for a
/// thousand, and live messages wait behind it.
const ASKED_IN_A_ROW: usize = 32;
/// How often memory that the store no longer needs is freed. At the fastest the store fills 64 MiB
/// in two seconds.
const FREE_EVERY: Duration = Duration::from_millis(500);
/// Users that the janitor visits, and messages that it removes, in one commit: some milliseconds of
/// the writer's lock.
const JANITOR_BATCH: usize = 1_000;

/// The inbox on fjall. Cloned, it is the same store.
#[derive(Clone)]
pub struct EmbeddedInbox {
    store: Arc<Store>,
}

struct Store {
    db: Database,
    messages: Keyspace,
    heads: Keyspace,
    fences: Keyspace,
    cursors: Keyspace,
    clock: Clock,
    /// Made once and kept in the store: tells this store from every other.
    identity: String,
    /// The head record of users that are new to this process.
    newborn: Head,
    writer: Mutex<Writer>,
    poisoned: watch::Sender<bool>,
}

/// State that belongs to the holder of the writer's lock.
#[derive(Default)]
struct Writer {
    heads: Heads,
}

/// The heads of recently written users, in two generations: when the young generation is full it
/// becomes the old one, and the old one is dropped. A head that is in neither is read from the
/// store.
#[derive(Default)]
struct Heads {
    young: HashMap<UserId, u64>,
    old: HashMap<UserId, u64>,
}

impl Heads {
    /// Raises the head of `user` by one and returns it; `None` if the head is not in memory.
    fn next(&mut self, user: &UserId) -> Option<u64> {
        if let Some(head) = self.young.get_mut(user) {
            *head += 1;
            return Some(*head);
        }
        let next = self.old.get(user)? + 1;
        self.put(user.clone(), next);
        Some(next)
    }

    fn put(&mut self, user: UserId, head: u64) {
        if self.young.len() >= HEADS_IN_MEMORY {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(user, head);
    }
}

/// A head record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Head {
    /// Everything up to this number is gone for good.
    head: u64,
    /// The value of `head` when the record was made.
    first: u64,
    not_before_s: u64,
}

/// Why the store could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process has opened it.
    #[error("another process uses this data directory; stop it, or choose another with --data DIR")]
    Locked,
    /// It was written by a version with another layout.
    #[error(
        "this data directory was written by an earlier version, whose layout this one cannot read; move it away"
    )]
    Earlier,
    /// Any other error, in the words of fjall.
    #[error("{0}")]
    Failed(String),
}

impl EmbeddedInbox {
    /// Opens the store under `directory`, and creates it if it does not exist.
    ///
    /// # Errors
    ///
    /// [`OpenError`], with the remedy if there is one.
    pub fn open(directory: &Path, clock: Clock) -> Result<Self, OpenError> {
        let open = || -> fjall::Result<Option<Store>> {
            let db = Database::builder(directory).open()?;
            if db.keyspace_exists(EARLIER) {
                return Ok(None);
            }
            let keyspace = |name: &str| db.keyspace(name, KeyspaceCreateOptions::default);
            let [messages, heads, fences, cursors] = KEYSPACES;
            let about = keyspace(ABOUT)?;
            let identity = match about.get(IDENTITY)? {
                Some(known) => String::from_utf8_lossy(&known).into_owned(),
                None => {
                    let made = ulid::Ulid::generate().to_string();
                    let mut pending = db.batch().durability(Some(PersistMode::SyncData));
                    pending.insert(&about, IDENTITY, made.as_bytes());
                    pending.commit()?;
                    made
                }
            };
            Ok(Some(Store {
                identity,
                messages: keyspace(messages)?,
                heads: keyspace(heads)?,
                fences: keyspace(fences)?,
                cursors: keyspace(cursors)?,
                db: db.clone(),
                newborn: Head::beginning_at(clock.now()),
                clock,
                writer: Mutex::default(),
                poisoned: watch::Sender::new(false),
            }))
        };
        match open() {
            Ok(Some(store)) => Ok(Self { store: Arc::new(store) }),
            Ok(None) => Err(OpenError::Earlier),
            Err(fjall::Error::Locked) => Err(OpenError::Locked),
            Err(error) => Err(OpenError::Failed(error.to_string())),
        }
    }

    /// The identity of this store. A copy of the store has the same.
    #[must_use]
    pub fn identity(&self) -> &str {
        &self.store.identity
    }

    /// Becomes true when a write has failed: what is on disk is unknown, and the process must end.
    #[must_use]
    pub fn poisoned(&self) -> watch::Receiver<bool> {
        self.store.poisoned.subscribe()
    }

    /// Frees the memory of what the store has written out, again and again. fjall would do it under
    /// the lock that every writer needs, for 90 to 160 ms per 64 MiB (docs/benchmarks/log.md). So
    /// this task keeps the memory alive until fjall has dropped it, and frees it outside that lock.
    pub async fn free_memory(self) {
        let mut held = Vec::new();
        loop {
            tokio::time::sleep(FREE_EVERY).await;
            let Store { messages, heads, fences, cursors, .. } = &*self.store;
            for keyspace in [messages, heads, fences, cursors] {
                let active = keyspace.tree.active_memtable();
                if !held.iter().any(|one| Arc::ptr_eq(one, &active)) {
                    held.push(active);
                }
            }
            let (in_use, over): (Vec<_>, Vec<_>) =
                held.into_iter().partition(|one| Arc::strong_count(one) > 1);
            held = in_use;
            if !over.is_empty() {
                let _ = tokio::task::spawn_blocking(move || drop(over)).await;
            }
        }
    }

    fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Store) -> Result<T, InboxError> + Send + 'static,
    ) -> BoxFuture<'static, Result<T, InboxError>> {
        let store = Arc::clone(&self.store);
        tokio::task::spawn_blocking(move || work(&store))
            .map(|joined| joined.unwrap_or_else(|fault| Err(InboxError::Unavailable(fault.to_string()))))
            .boxed()
    }
}

impl Inbox for EmbeddedInbox {
    fn append(&self, batch: Vec<Append>) -> BoxFuture<'_, Vec<Result<Appended, InboxError>>> {
        let count = batch.len();
        let append = || tokio::task::block_in_place(|| self.store.append(batch));
        async move {
            match append() {
                Ok(outcomes) => outcomes,
                Err(error) => vec![Err(error); count],
            }
        }
        .boxed()
    }

    fn positions(&self, batch: Vec<PositionQuery>) -> BoxFuture<'_, Result<Vec<UserPosition>, InboxError>> {
        if batch.len() > ASKED_AT_ONCE {
            return self.run(move |store| {
                let (mut answers, strangers) = store.positions(&batch)?;
                store.make_heads(&strangers)?;
                if store.is_ahead(&answers) {
                    store.correct(&batch, &mut answers)?;
                }
                Ok(answers)
            });
        }
        async move {
            let (mut answers, strangers) = self.store.positions(&batch)?;
            if !strangers.is_empty() {
                self.run(move |store| store.make_heads(&strangers)).await?;
            }
            if self.store.is_ahead(&answers) {
                let correct = move |store: &Store| store.correct(&batch, &mut answers).map(|()| answers);
                return self.run(correct).await;
            }
            Ok(answers)
        }
        .boxed()
    }

    fn answers_alone(&self) -> bool {
        true
    }

    fn page(
        &self,
        user: UserId,
        after: Seq,
        limit: PageLimit,
    ) -> BoxFuture<'_, Result<InboxPage, InboxError>> {
        self.run(move |store| store.page(&user, after, limit))
    }

    fn profile(&self, user: UserId) -> BoxFuture<'_, Result<Profile, InboxError>> {
        self.run(move |store| store.profile(&user))
    }

    fn update(&self, changes: Vec<Change>) -> BoxFuture<'_, Result<(), InboxError>> {
        self.run(move |store| store.update(&changes))
    }

    fn blocks(&self) -> bool {
        true
    }

    fn gathering(&self) -> GroupCommit {
        GATHERING
    }
}

impl Janitor for EmbeddedInbox {
    fn run_once(&self) -> BoxFuture<'_, Result<u64, InboxError>> {
        self.run(Store::run_once)
    }
}

/// The outcome of each item of a batch.
type Outcomes = Vec<Result<Appended, InboxError>>;

impl Store {
    fn append(&self, batch: Vec<Append>) -> Result<Outcomes, InboxError> {
        let mut writer = self.writer.lock();
        let outcomes = self.append_as(&mut writer, batch);
        if outcomes.is_err() {
            // The heads in memory count messages that were not stored.
            writer.heads = Heads::default();
        }
        outcomes
    }

    fn append_as(&self, writer: &mut Writer, batch: Vec<Append>) -> Result<Outcomes, InboxError> {
        let now = self.clock.now();
        let snapshot = self.db.snapshot();
        let mut pending = self.db.batch().durability(Some(PersistMode::SyncData));
        let mut fences: HashMap<Vec<u8>, Fence> = HashMap::new();
        let mut outcomes = Vec::with_capacity(batch.len());
        // fjall copies what it is given, so the buffers are reused.
        let (mut key, mut value) = (Vec::new(), Vec::new());
        for item in batch {
            let fence =
                item.deduplicated.then(|| (fence_key(&item.user, &item.id), payload_digest(&item.payload)));
            if let Some((key, digest)) = &fence {
                let known = match fences.get(key) {
                    Some(fence) => Some(*fence),
                    None => self.fence(&snapshot, key).unwrap_or_else(|error| {
                        tracing::warn!(%error, user = %item.user, "what a repeat would be known by; the message is stored");
                        None
                    }),
                };
                if let Some(fence) = known.filter(|fence| fence.expires_at > now) {
                    outcomes.push(Ok(fence.outcome(*digest)));
                    continue;
                }
            }
            let seq = match self.next_number(writer, &snapshot, &item.user, &mut pending) {
                Ok(seq) => seq,
                // A damaged record of one user must not fail the others.
                Err(error @ InboxError::Corrupt(_)) => {
                    outcomes.push(Err(error));
                    continue;
                }
                Err(error) => return Err(error),
            };
            put_message_key(&mut key, &item.user, seq);
            let message = item.numbered(seq);
            put_message(&mut value, &message, fence.is_some());
            pending.insert(&self.messages, &*key, &*value);
            if let Some((key, digest)) = fence {
                let fence = Fence { seq: message.seq, expires_at: message.expires_at, digest };
                pending.insert(&self.fences, &*key, fence.encode());
                fences.insert(key, fence);
            }
            outcomes.push(Ok(Appended::Stored(Arc::new(message))));
        }
        self.commit(pending)?;
        Ok(outcomes)
    }

    /// The number of a user's next message, from memory or from the store. The head record of a new
    /// user joins the batch.
    fn next_number(
        &self,
        writer: &mut Writer,
        snapshot: &Snapshot,
        user: &UserId,
        pending: &mut OwnedWriteBatch,
    ) -> Result<u64, InboxError> {
        if let Some(number) = writer.heads.next(user) {
            return Ok(number);
        }
        let last = match self.head(snapshot, user)? {
            Some(head) => self.highest(snapshot, user, head)?,
            None => {
                pending.insert(&self.heads, head_key(user), self.newborn.encode());
                self.newborn.head
            }
        };
        writer.heads.put(user.clone(), last + 1);
        Ok(last + 1)
    }

    fn commit(&self, pending: OwnedWriteBatch) -> Result<(), InboxError> {
        pending.commit().map_err(|error| {
            self.poisoned.send_replace(true);
            InboxError::Poisoned(error.to_string())
        })
    }

    fn head(&self, snapshot: &Snapshot, user: &UserId) -> Result<Option<Head>, InboxError> {
        snapshot
            .get(&self.heads, head_key(user))
            .map_err(unreadable)?
            .map(|raw| Head::decode(&raw))
            .transpose()
    }

    fn highest(&self, snapshot: &Snapshot, user: &UserId, head: Head) -> Result<u64, InboxError> {
        match snapshot.prefix(&self.messages, prefix(user)).next_back() {
            Some(last) => Ok(head.head.max(seq_of(&last.key().map_err(unreadable)?)?)),
            None => Ok(head.head),
        }
    }

    fn fence(&self, snapshot: &Snapshot, key: &[u8]) -> Result<Option<Fence>, InboxError> {
        snapshot.get(&self.fences, key).map_err(unreadable)?.map(|raw| Fence::decode(&raw)).transpose()
    }

    /// Looks up each position. Also returns the users that need a head record before the result may
    /// be told.
    fn positions(&self, batch: &[PositionQuery]) -> Result<(Vec<UserPosition>, Vec<UserId>), InboxError> {
        let snapshot = self.db.snapshot();
        let (mut answers, mut strangers) = (Vec::with_capacity(batch.len()), Vec::new());
        for (n, ask) in batch.iter().enumerate() {
            if n % ASKED_IN_A_ROW == ASKED_IN_A_ROW - 1 {
                std::thread::yield_now();
            }
            let head = match self.head(&snapshot, &ask.user) {
                // One damaged record must not fail a whole batch.
                Err(error @ InboxError::Corrupt(_)) if batch.len() > 1 => {
                    tracing::warn!(%error, user = %ask.user, "a head record");
                    answers.push(Self::unknown(ask));
                    continue;
                }
                head => head?,
            };
            answers.push(match head {
                Some(record) => self.answer(&snapshot, ask, record)?,
                None => {
                    // A position that this store never assigned: the client will be told a number,
                    // which must then be durable.
                    if let StartAt::After(position) = &ask.from
                        && ![Seq::BEGINNING, Seq::at(self.newborn.head)].contains(position)
                    {
                        strangers.push(ask.user.clone());
                    }
                    Self::answer_at(ask, self.newborn, self.newborn.head, None)
                }
            });
        }
        Ok((answers, strangers))
    }

    fn answer(
        &self,
        snapshot: &Snapshot,
        ask: &PositionQuery,
        record: Head,
    ) -> Result<UserPosition, InboxError> {
        let highest = self.highest(snapshot, &ask.user, record)?;
        let cursor = match &ask.from {
            StartAt::Cursor(device) => self.cursor(snapshot, &ask.user, device)?,
            _ => None,
        };
        Ok(Self::answer_at(ask, record, highest, cursor))
    }

    fn answer_at(ask: &PositionQuery, record: Head, highest: u64, cursor: Option<Cursor>) -> UserPosition {
        let head = Seq::at(highest);
        let start = match &ask.from {
            StartAt::After(seq) => *seq,
            StartAt::Cursor(_) => cursor.map_or(Seq::BEGINNING, |cursor| cursor.acked),
            // In an inbox that never had a message, the end is the beginning.
            StartAt::Latest if highest == record.first => Seq::BEGINNING,
            StartAt::Latest => head,
        };
        let more = highest > start.get().max(record.first);
        UserPosition { start, head, more, not_before_s: record.not_before_s }
    }

    /// The result for a record that cannot be read: a page will tell more, or fail.
    fn unknown(ask: &PositionQuery) -> UserPosition {
        let start = if let StartAt::After(seq) = &ask.from { *seq } else { Seq::BEGINNING };
        UserPosition { start, head: start, more: true, not_before_s: 0 }
    }

    /// Whether a disconnect is so far in the future that the clock that made it was wrong.
    fn is_ahead(&self, answers: &[UserPosition]) -> bool {
        let latest = self.clock.now().seconds() + REVOCATION_AHEAD_MAX_S;
        answers.iter().any(|answer| answer.not_before_s > latest)
    }

    /// Makes disconnects that are too far in the future count from now.
    fn correct(&self, batch: &[PositionQuery], answers: &mut [UserPosition]) -> Result<(), InboxError> {
        let now = self.clock.now().seconds();
        let _writer = self.writer.lock();
        let snapshot = self.db.snapshot();
        let mut pending = self.db.batch().durability(Some(PersistMode::SyncData));
        for (ask, answer) in batch.iter().zip(answers) {
            if answer.not_before_s <= now + REVOCATION_AHEAD_MAX_S {
                continue;
            }
            answer.not_before_s = now;
            if let Some(mut head) = self.head(&snapshot, &ask.user)? {
                head.not_before_s = now;
                pending.insert(&self.heads, head_key(&ask.user), head.encode());
            }
        }
        self.commit(pending)
    }

    /// Makes the head records of new users durable.
    fn make_heads(&self, users: &[UserId]) -> Result<(), InboxError> {
        if users.is_empty() {
            return Ok(());
        }
        let _writer = self.writer.lock();
        let snapshot = self.db.snapshot();
        let mut pending = self.db.batch().durability(Some(PersistMode::SyncData));
        for user in users {
            if self.head(&snapshot, user)?.is_none() {
                pending.insert(&self.heads, head_key(user), self.newborn.encode());
            }
        }
        self.commit(pending)
    }

    fn page(&self, user: &UserId, after: Seq, limit: PageLimit) -> Result<InboxPage, InboxError> {
        let now = self.clock.now();
        let snapshot = self.db.snapshot();
        let head = self.head(&snapshot, user)?.map_or(0, |record| record.head);
        let upto = after.max(Seq::at(head));
        let mut page = InboxPage { messages: Vec::new(), unreadable: Vec::new(), upto, more: false };
        let (mut bytes, mut looked_at) = (0, 0);
        let from = message_key(user, after.get().saturating_add(1));
        let to = message_key(user, u64::MAX);
        for entry in snapshot.range(&self.messages, from..=to) {
            let (key, value) = entry.into_inner().map_err(unreadable)?;
            let seq = seq_of(&key)?;
            if looked_at == limit.messages + PASSED_OVER {
                page.more = true;
                break;
            }
            looked_at += 1;
            let Ok((message, _)) = decode(seq, Bytes::copy_from_slice(&value)) else {
                page.unreadable.push(Seq::at(seq));
                page.upto = page.upto.max(Seq::at(seq));
                continue;
            };
            let full = page.messages.len() >= limit.messages || bytes + message.payload.len() > limit.bytes;
            if full && !page.messages.is_empty() {
                page.upto = Seq::at(message.seq.get() - 1);
                page.more = true;
                break;
            }
            page.upto = page.upto.max(message.seq);
            if !message.is_expired(now) {
                bytes += message.payload.len();
                page.messages.push(message);
            }
        }
        Ok(page)
    }

    fn profile(&self, user: &UserId) -> Result<Profile, InboxError> {
        let snapshot = self.db.snapshot();
        let Some(record) = self.head(&snapshot, user)? else { return Ok(Profile::default()) };
        let highest = self.highest(&snapshot, user, record)?;
        let mut cursors = Vec::new();
        for (device, cursor) in self.cursors(&snapshot, user)? {
            if let Ok(device) = DeviceId::parse(&device) {
                cursors.push((device, cursor.acked));
            }
        }
        let head = (highest > record.first).then(|| Seq::at(highest));
        Ok(Profile { head, not_before_s: record.not_before_s, cursors })
    }

    fn cursor(
        &self,
        snapshot: &Snapshot,
        user: &UserId,
        device: &DeviceId,
    ) -> Result<Option<Cursor>, InboxError> {
        let raw = snapshot.get(&self.cursors, cursor_key(user, device.as_str())).map_err(unreadable)?;
        // A cursor that cannot be read counts as none: losing a cursor costs repeats.
        Ok(raw.and_then(|raw| Cursor::decode(&raw).ok()))
    }

    fn cursors(&self, snapshot: &Snapshot, user: &UserId) -> Result<Vec<(String, Cursor)>, InboxError> {
        let prefix = prefix(user);
        let skip = prefix.len();
        snapshot
            .prefix(&self.cursors, prefix)
            .map(|entry| {
                let (key, value) = entry.into_inner().map_err(unreadable)?;
                let device = String::from_utf8_lossy(key.get(skip..).unwrap_or_default()).into_owned();
                Ok(Cursor::decode(&value).ok().map(|cursor| (device, cursor)))
            })
            .filter_map(Result::transpose)
            .collect()
    }

    fn update(&self, changes: &[Change]) -> Result<(), InboxError> {
        let _writer = self.writer.lock();
        let now = self.clock.now();
        let mut synced = false;
        let (mut snapshot, mut pending) = (self.db.snapshot(), self.db.batch());
        let mut touched: HashSet<&UserId> = HashSet::new();
        for change in changes {
            let (Change::Cursor { user, .. } | Change::NotBefore { user, .. } | Change::Shown { user, .. }) =
                change;
            if !touched.insert(user) {
                // A later change of the same user must see an earlier one.
                self.commit(std::mem::replace(&mut pending, self.db.batch()))?;
                snapshot = self.db.snapshot();
                touched = HashSet::from([user]);
            }
            match change {
                Change::Cursor { user, device, acked } => {
                    self.move_cursor(&snapshot, &mut pending, (user, device), *acked, now)?;
                }
                // An embedded store is restored while no process has it open, so every position
                // that clients know comes from this process.
                Change::Shown { .. } => {}
                Change::NotBefore { user, seconds } => {
                    let mut head = self.head(&snapshot, user)?.unwrap_or(self.newborn);
                    head.not_before_s = head.not_before_s.max(*seconds);
                    pending.insert(&self.heads, head_key(user), head.encode());
                    synced = true;
                }
            }
        }
        self.commit(pending)?;
        if synced {
            self.db.persist(PersistMode::SyncData).map_err(|error| {
                self.poisoned.send_replace(true);
                InboxError::Poisoned(error.to_string())
            })?;
        }
        Ok(())
    }

    fn move_cursor(
        &self,
        snapshot: &Snapshot,
        pending: &mut OwnedWriteBatch,
        (user, device): (&UserId, &DeviceId),
        acked: Seq,
        now: Millis,
    ) -> Result<(), InboxError> {
        let known = self.cursor(snapshot, user, device)?;
        if known.is_none() {
            let mut others = self.cursors(snapshot, user)?;
            if others.len() >= DEVICES_PER_USER {
                others.sort_by_key(|(_, cursor)| cursor.moved_at);
                pending.remove(&self.cursors, cursor_key(user, &others[0].0));
            }
        }
        let acked = known.map_or(acked, |cursor| cursor.acked.max(acked));
        pending.insert(
            &self.cursors,
            cursor_key(user, device.as_str()),
            Cursor { acked, moved_at: now }.encode(),
        );
        Ok(())
    }

    fn run_once(&self) -> Result<u64, InboxError> {
        let mut removed = 0;
        let mut after: Option<Vec<u8>> = None;
        loop {
            let keys = self.heads_after(after.as_deref())?;
            let Some(last) = keys.last() else { break };
            after = Some(last.clone());
            for user in keys.iter().filter_map(|key| user_of(key)) {
                loop {
                    let count = match self.clean_user(&user) {
                        Err(error @ InboxError::Corrupt(_)) => {
                            tracing::warn!(%error, %user, "expired messages stay");
                            0
                        }
                        count => count?,
                    };
                    removed += count as u64;
                    if count < JANITOR_BATCH {
                        break;
                    }
                }
            }
        }
        self.clean_cursors()?;
        Ok(removed)
    }

    /// The keys of the next head records after `after`.
    fn heads_after(&self, after: Option<&[u8]>) -> Result<Vec<Vec<u8>>, InboxError> {
        let snapshot = self.db.snapshot();
        let mut from = after.unwrap_or_default().to_vec();
        if after.is_some() {
            // The smallest key above it.
            from.push(0);
        }
        let keys = snapshot.range(&self.heads, from..).take(JANITOR_BATCH);
        keys.map(|entry| Ok(entry.key().map_err(unreadable)?.to_vec())).collect()
    }

    /// Removes the expired run at the bottom of one inbox, up to one batch, and raises the head
    /// record over it.
    fn clean_user(&self, user: &UserId) -> Result<usize, InboxError> {
        // First without the lock: nearly no user has anything to remove.
        if self.expired_run(&self.db.snapshot(), user)?.is_empty() {
            return Ok(0);
        }
        let _writer = self.writer.lock();
        let snapshot = self.db.snapshot();
        let run = self.expired_run(&snapshot, user)?;
        let (Some(mut head), Some(top)) = (self.head(&snapshot, user)?, run.last()) else { return Ok(0) };
        head.head = head.head.max(top.seq);
        let mut pending = self.db.batch();
        pending.insert(&self.heads, head_key(user), head.encode());
        for expired in &run {
            pending.remove(&self.messages, message_key(user, expired.seq));
            if let Some(id) = &expired.deduplicated {
                let key = fence_key(user, id);
                if self.fence(&snapshot, &key)?.is_some_and(|fence| fence.seq.get() == expired.seq) {
                    pending.remove(&self.fences, key);
                }
            }
        }
        self.commit(pending)?;
        Ok(run.len())
    }

    /// When an unreadable message expires is unknown. It goes with the next readable one above it.
    fn expired_run(&self, snapshot: &Snapshot, user: &UserId) -> Result<Vec<Expired>, InboxError> {
        let now = self.clock.now();
        let (mut run, mut upto) = (Vec::new(), 0);
        for entry in snapshot.prefix(&self.messages, prefix(user)).take(JANITOR_BATCH + PASSED_OVER) {
            let (key, value) = entry.into_inner().map_err(unreadable)?;
            let seq = seq_of(&key)?;
            let Ok((message, deduplicated)) = decode(seq, Bytes::copy_from_slice(&value)) else {
                run.push(Expired { seq, deduplicated: None });
                continue;
            };
            if !message.is_expired(now) || upto >= JANITOR_BATCH {
                break;
            }
            run.push(Expired { seq, deduplicated: deduplicated.then_some(message.id) });
            upto = run.len();
        }
        run.truncate(upto);
        Ok(run)
    }

    fn clean_cursors(&self) -> Result<(), InboxError> {
        let now = self.clock.now();
        let snapshot = self.db.snapshot();
        let mut stale = Vec::new();
        for entry in snapshot.iter(&self.cursors) {
            let (key, value) = entry.into_inner().map_err(unreadable)?;
            // A cursor that cannot be read is useless.
            if Cursor::decode(&value).map_or(true, |cursor| cursor.is_stale(now)) {
                stale.push(key);
            }
        }
        for batch in stale.chunks(JANITOR_BATCH) {
            let _writer = self.writer.lock();
            let mut pending = self.db.batch();
            for key in batch {
                // It may have been moved since the snapshot.
                let raw = self.cursors.get(key).map_err(unreadable)?;
                let stale = |raw: &[u8]| Cursor::decode(raw).map_or(true, |cursor| cursor.is_stale(now));
                if raw.is_some_and(|raw| stale(&raw)) {
                    pending.remove(&self.cursors, key.clone());
                }
            }
            self.commit(pending)?;
        }
        Ok(())
    }
}

/// A message that is to be removed.
struct Expired {
    seq: u64,
    /// Its idempotency key, if it has one.
    deduplicated: Option<MessageId>,
}

impl Append {
    fn numbered(self, seq: u64) -> Message {
        let Self { id, accepted_at, expires_at, payload, .. } = self;
        Message { seq: Seq::at(seq), id, accepted_at, expires_at, payload }
    }
}

#[derive(Clone, Copy)]
struct Fence {
    seq: Seq,
    expires_at: Millis,
    digest: [u8; 16],
}

impl Fence {
    fn outcome(&self, digest: [u8; 16]) -> Appended {
        if self.digest == digest { Appended::Duplicate(self.seq) } else { Appended::Conflict }
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(32);
        out.put_u64(self.seq.get());
        out.put_u64(self.expires_at.0);
        out.extend_from_slice(&self.digest);
        out
    }

    fn decode(mut raw: &[u8]) -> Result<Self, InboxError> {
        let (seq, expires_at) = (take_u64(&mut raw)?, take_u64(&mut raw)?);
        let digest = raw.try_into().map_err(|_| corrupt("a fence"))?;
        Ok(Self { seq: Seq::at(seq), expires_at: Millis(expires_at), digest })
    }
}

#[derive(Clone, Copy)]
struct Cursor {
    acked: Seq,
    moved_at: Millis,
}

impl Cursor {
    fn is_stale(&self, now: Millis) -> bool {
        self.moved_at.0.saturating_add(CURSOR_LIFE_MS) <= now.0
    }

    fn encode(self) -> Vec<u8> {
        let mut out = Vec::with_capacity(16);
        out.put_u64(self.acked.get());
        out.put_u64(self.moved_at.0);
        out
    }

    fn decode(mut raw: &[u8]) -> Result<Self, InboxError> {
        Ok(Self { acked: Seq::at(take_u64(&mut raw)?), moved_at: Millis(take_u64(&mut raw)?) })
    }
}

impl Head {
    fn beginning_at(moment: Millis) -> Self {
        Self { head: moment.0, first: moment.0, not_before_s: 0 }
    }

    fn encode(self) -> Vec<u8> {
        let mut out = Vec::with_capacity(24);
        out.put_u64(self.head);
        out.put_u64(self.first);
        out.put_u64(self.not_before_s);
        out
    }

    fn decode(mut raw: &[u8]) -> Result<Self, InboxError> {
        Ok(Self { head: take_u64(&mut raw)?, first: take_u64(&mut raw)?, not_before_s: take_u64(&mut raw)? })
    }
}

/// Version of the encoding of a message.
const MESSAGE_LAYOUT: u8 = 1;

/// Encodes a message into `out`, replacing its content.
fn put_message(out: &mut Vec<u8>, message: &Message, deduplicated: bool) {
    let id = message.id.as_str().as_bytes();
    out.clear();
    out.put_u8(MESSAGE_LAYOUT);
    out.put_u64(message.accepted_at.0);
    out.put_u64(message.expires_at.0);
    out.put_u8(u8::from(deduplicated));
    out.put_u8(u8::try_from(id.len()).unwrap_or(u8::MAX));
    out.put_slice(id);
    out.put_slice(&message.payload);
}

fn decode(seq: u64, mut raw: Bytes) -> Result<(Message, bool), InboxError> {
    if raw.len() < 19 || raw.get_u8() != MESSAGE_LAYOUT {
        return Err(corrupt("a message"));
    }
    let (accepted_at, expires_at) = (Millis(raw.get_u64()), Millis(raw.get_u64()));
    let (deduplicated, id_len) = (raw.get_u8() == 1, raw.get_u8() as usize);
    if raw.len() < id_len {
        return Err(corrupt("a message"));
    }
    let id = raw.split_to(id_len);
    let id = std::str::from_utf8(&id).ok().and_then(|id| MessageId::parse(id).ok());
    let id = id.ok_or_else(|| corrupt("a message id"))?;
    if !is_json(&raw) {
        return Err(corrupt("a payload"));
    }
    Ok((Message { seq: Seq::at(seq), id, accepted_at, expires_at, payload: raw }, deduplicated))
}

/// The user of a head record's key; `None` if the key is not one.
fn user_of(key: &[u8]) -> Option<UserId> {
    UserId::parse(std::str::from_utf8(key.get(HASH_BYTES..)?).ok()?).ok()
}

fn take_u64(raw: &mut &[u8]) -> Result<u64, InboxError> {
    if raw.len() < 8 { Err(corrupt("a record")) } else { Ok(raw.get_u64()) }
}

fn corrupt(what: &str) -> InboxError {
    InboxError::Corrupt(what.to_owned())
}

fn unreadable(error: fjall::Error) -> InboxError {
    InboxError::Unavailable(error.to_string())
}

/// Bytes of the user's hash before each key.
const HASH_BYTES: usize = 4;

/// FNV-1a, 32 bits (draft-eastlake-fnv). It is part of stored keys and must never change. Users
/// that collide only make their own look-ups slower.
fn hash(user: &UserId) -> [u8; HASH_BYTES] {
    let step = |hash: u32, byte: &u8| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193);
    user.as_str().as_bytes().iter().fold(0x811c_9dc5, step).to_be_bytes()
}

fn head_key(user: &UserId) -> Vec<u8> {
    let mut key = Vec::new();
    put_head_key(&mut key, user);
    key
}

fn put_head_key(key: &mut Vec<u8>, user: &UserId) {
    // Room for a zero byte and a number.
    key.reserve(HASH_BYTES + user.as_str().len() + 9);
    key.extend_from_slice(&hash(user));
    key.extend_from_slice(user.as_str().as_bytes());
}

fn prefix(user: &UserId) -> Vec<u8> {
    let mut key = head_key(user);
    key.push(0);
    key
}

fn message_key(user: &UserId, seq: u64) -> Vec<u8> {
    let mut key = Vec::new();
    put_message_key(&mut key, user, seq);
    key
}

/// Encodes a message's key into `key`, replacing its content.
fn put_message_key(key: &mut Vec<u8>, user: &UserId, seq: u64) {
    key.clear();
    put_head_key(key, user);
    key.put_u8(0);
    key.put_u64(seq);
}

fn seq_of(key: &[u8]) -> Result<u64, InboxError> {
    key.last_chunk::<8>().map(|raw| u64::from_be_bytes(*raw)).ok_or_else(|| corrupt("a message's key"))
}

fn fence_key(user: &UserId, id: &MessageId) -> Vec<u8> {
    let mut key = prefix(user);
    key.extend_from_slice(id.as_str().as_bytes());
    key
}

fn cursor_key(user: &UserId, device: &str) -> Vec<u8> {
    let mut key = prefix(user);
    key.extend_from_slice(device.as_bytes());
    key
}

#[cfg(test)]
mod tests {
    use super::super::conformance::{Bench, suite};
    use super::super::memory::MemoryInbox;
    use super::*;

    const START: Millis = Millis(1_795_380_000_000);

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn the_model_keeps_the_contract() {
        let clock = Clock::standing(START);
        suite(&Bench { inbox: Arc::new(MemoryInbox::new(clock.clone())), clock }).await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn the_embedded_store_keeps_the_contract() {
        let directory = tempfile::tempdir().unwrap();
        let clock = Clock::standing(START);
        let inbox = EmbeddedInbox::open(directory.path(), clock.clone()).unwrap();
        suite(&Bench { inbox: Arc::new(inbox), clock }).await;
    }

    #[test]
    fn the_layout_is_what_was_stored() {
        let user = |name: &str| UserId::parse(name).unwrap();
        // From the draft's own table: "a" and "foobar".
        assert_eq!(hash(&user("a")), 0xe40c_292cu32.to_be_bytes());
        assert_eq!(hash(&user("foobar")), 0xbf9c_f968u32.to_be_bytes());
        assert_eq!(message_key(&user("a"), 1), b"\xe4\x0c\x29\x2ca\0\0\0\0\0\0\0\0\x01");
    }

    #[test]
    fn a_store_of_an_earlier_layout_is_refused_and_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let earlier = Database::builder(directory.path()).open().unwrap();
        earlier.keyspace(EARLIER, KeyspaceCreateOptions::default).unwrap();
        drop(earlier);
        let opened = EmbeddedInbox::open(directory.path(), Clock::standing(START));
        assert!(matches!(opened.err(), Some(OpenError::Earlier)));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn what_was_answered_about_a_new_user_stands_after_a_crash() {
        let directory = tempfile::tempdir().unwrap();
        let users = ["begins", "goes on", "strange"].map(|name| UserId::parse(name).unwrap());
        let ask = async |inbox: &EmbeddedInbox, positions: [Seq; 3]| {
            let asks = users.iter().zip(positions);
            let asks = asks.map(|(user, at)| PositionQuery { user: user.clone(), from: StartAt::After(at) });
            <[UserPosition; 3]>::try_from(inbox.positions(asks.collect()).await.unwrap()).unwrap()
        };
        let first = EmbeddedInbox::open(directory.path(), Clock::standing(START)).unwrap();
        let strange = Seq::at(4_711);
        let answers = ask(&first, [Seq::BEGINNING, Seq::at(START.0), strange]).await;
        assert!(answers.iter().all(|answer| answer.head == Seq::at(START.0) && !answer.more));
        drop(first);
        // Meanwhile the clock was set back. Only the third user was told a number, and that number
        // stands.
        let earlier = Millis(START.0 - 60_000);
        let again = EmbeddedInbox::open(directory.path(), Clock::standing(earlier)).unwrap();
        let answers = ask(&again, [Seq::BEGINNING, Seq::BEGINNING, Seq::at(START.0)]).await;
        let (start, earlier) = (Seq::at(START.0), Seq::at(earlier.0));
        assert_eq!(answers.map(|answer| answer.head), [earlier, earlier, start]);
        assert!(answers.iter().all(|answer| !answer.more));
    }

    fn item(user: &str, id: &str, deduplicated: bool) -> Append {
        Append {
            user: UserId::parse(user).unwrap(),
            id: MessageId::parse(id).unwrap(),
            deduplicated,
            accepted_at: START,
            expires_at: START.plus_seconds(60),
            payload: Bytes::from_static(b"1"),
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn what_cannot_be_read_is_the_fault_of_its_own_user_and_number_alone() {
        let directory = tempfile::tempdir().unwrap();
        let clock = Clock::standing(START);
        let inbox = EmbeddedInbox::open(directory.path(), clock.clone()).unwrap();
        let store = &inbox.store;
        let (good, deduplicated, bad) =
            (item("alice", "good", false), item("bob", "again", true), item("eve", "x", false));
        // Damage the fence of a repeat, and a head record.
        store.fences.insert(fence_key(&deduplicated.user, &deduplicated.id), b"no fence").unwrap();
        store.heads.insert(head_key(&bad.user), b"no head").unwrap();
        store.cursors.insert(cursor_key(&good.user, "web"), b"no cursor").unwrap();
        for n in 0..3 {
            let batch = vec![good.clone(), bad.clone(), deduplicated.clone(), good.clone()];
            let outcomes = inbox.append(batch).await;
            let seq = |at: usize| match &outcomes[at] {
                Ok(Appended::Stored(message)) => message.seq.get() - START.0,
                other => panic!("{at}: {other:?}"),
            };
            assert_eq!((seq(0), seq(3)), (1 + 2 * n, 2 + 2 * n));
            assert!(matches!(outcomes[1], Err(InboxError::Corrupt(_))));
            assert!(n > 0 || seq(2) == 1, "{:?}", outcomes[2]);
        }
        // A sweep asks for many users: one damaged record must not hide the others.
        let after =
            |user: &UserId| PositionQuery { user: user.clone(), from: StartAt::After(Seq::at(START.0)) };
        let answers = inbox.positions(vec![after(&bad.user), after(&good.user)]).await.unwrap();
        assert!(answers[1].more);
        assert!(inbox.positions(vec![after(&bad.user)]).await.is_err());
        // Damage four messages: rubbish, cut off, payload that is not JSON, payload that is not
        // text.
        let value =
            |user: &UserId, n: u64| store.messages.get(message_key(user, START.0 + n)).unwrap().unwrap();
        let cut = value(&good.user, 3)[..5].to_vec();
        store.messages.insert(message_key(&good.user, START.0 + 2), b"").unwrap();
        store.messages.insert(message_key(&good.user, START.0 + 3), cut).unwrap();
        let mut not_json = value(&good.user, 4).to_vec();
        *not_json.last_mut().unwrap() = b'{';
        let mut not_text = not_json.clone();
        *not_text.last_mut().unwrap() = 0xff;
        store.messages.insert(message_key(&good.user, START.0 + 4), not_json).unwrap();
        store.messages.insert(message_key(&good.user, START.0 + 5), not_text).unwrap();
        let page =
            inbox.page(good.user.clone(), Seq::BEGINNING, PageLimit { messages: 10, bytes: 1_000 }).await;
        let page = page.unwrap();
        let numbers: Vec<u64> = page.messages.iter().map(|message| message.seq.get() - START.0).collect();
        let unreadable: Vec<u64> = page.unreadable.iter().map(|seq| seq.get() - START.0).collect();
        assert_eq!((numbers, unreadable), (vec![1, 6], vec![2, 3, 4, 5]));
        inbox.run_once().await.unwrap();
        // When the sixth has expired, those below it are removed too.
        clock.advance(60_000);
        inbox.run_once().await.unwrap();
        let kept =
            inbox.page(good.user.clone(), Seq::BEGINNING, PageLimit { messages: 10, bytes: 1_000 }).await;
        let kept = kept.unwrap();
        assert_eq!((kept.messages.len(), kept.unreadable.len(), kept.upto.get()), (0, 0, START.0 + 6));
        inbox.profile(good.user.clone()).await.unwrap();
        let ask = PositionQuery { user: good.user, from: StartAt::Cursor(DeviceId::parse("web").unwrap()) };
        assert!(
            inbox.positions(vec![ask]).await.unwrap()[0].start.is_beginning(),
            "a lost cursor costs repeats"
        );
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn memory_that_was_written_out_is_held_until_the_store_lets_go_and_then_freed() {
        let directory = tempfile::tempdir().unwrap();
        let inbox = EmbeddedInbox::open(directory.path(), Clock::standing(START)).unwrap();
        let first = Arc::downgrade(&inbox.store.messages.tree.active_memtable());
        let of_the_store = first.strong_count();
        let until = async |expected: &dyn Fn(usize) -> bool| {
            let counting = async {
                while !expected(first.strong_count()) {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            };
            tokio::time::timeout(Duration::from_secs(20), counting).await.expect("held, or freed, in time");
        };
        let freeing = tokio::spawn(inbox.clone().free_memory());
        until(&|count| count > of_the_store).await;
        for _ in 0..3 {
            inbox.append(vec![item("alice", "m", false)]).await.remove(0).unwrap();
            tokio::task::block_in_place(|| inbox.store.messages.rotate_memtable_and_wait()).unwrap();
        }
        until(&|count| count == 0).await;
        freeing.abort();
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_store_that_is_opened_again_goes_on_where_it_was() {
        let directory = tempfile::tempdir().unwrap();
        let clock = Clock::standing(START);
        let item = item("alice", "m", true);
        let first = EmbeddedInbox::open(directory.path(), clock.clone()).unwrap();
        let Ok(Appended::Stored(stored)) = first.append(vec![item.clone()]).await.remove(0) else { panic!() };
        assert!(matches!(EmbeddedInbox::open(directory.path(), clock.clone()), Err(OpenError::Locked)));
        drop(first);
        let again = EmbeddedInbox::open(directory.path(), clock).unwrap();
        assert_eq!(again.append(vec![item.clone()]).await.remove(0), Ok(Appended::Duplicate(stored.seq)));
        let fresh = Append { deduplicated: false, ..item };
        let Ok(Appended::Stored(next)) = again.append(vec![fresh]).await.remove(0) else { panic!() };
        assert_eq!(next.seq, stored.seq.next());
    }
}
