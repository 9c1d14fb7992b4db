//! The inbox on the embedded store `fjall`, for one process alone.
//!
//! Four keyspaces hold messages and what belongs to them, and one describes the store itself. A key
//! begins with four bytes of the user's hash, the user id and a zero byte. No user id contains a
//! zero byte, so users never mix:
//!
//! | keyspace | key | value |
//! | --- | --- | --- |
//! | messages | hash user 0 seq | accepted, expires, flags, id, event, payload |
//! | heads | hash user | head, first, not before |
//! | fences | hash user 0 idempotency key | seq, expires, payload digest |
//! | cursors | hash user 0 device | acked, moved at |
//!
//! Five more hold topics:
//!
//! | keyspace | key | value |
//! | --- | --- | --- |
//! | topics | topic | delivery, life, last life, changes, ttl, made at |
//! | topic_members | topic 0 user | life; where its log begins for the member |
//! | user_topics | hash user 0 topic | life, of a topic without a log |
//! | user_logs | hash user | how often the memberships in logs have changed; the memberships |
//! | device_logs | hash user 0 device | positions: the length of each log's key, the key, the seq |
//!
//! The logs of topics have keyspaces of their own for messages, heads and fences, of the same form,
//! and a writer's lock of their own ([`EmbeddedInbox::logs`]): an inbox never waits for a log.
//!
//! The traces that messages belong to stand in keyspaces of their own, under the key of the
//! message: an earlier version reads the messages without them.
//!
//! The hash is only for speed. fjall keeps the first four bytes of a key beside its pointer, and
//! names of users begin alike; without the hash every comparison in the memtable went to memory
//! (docs/benchmarks/log.md).
//!
//! # Copied back
//!
//! Each start leaves a note in the store and in a file beside its directory. A store whose note is
//! another than that of the file, or whose directory is another one than it was written in, has
//! been copied: perhaps an older state was put back. Numbers above that state may have been given
//! before. So every inbox and log goes on above the moment at which the copy was opened first, or
//! the moment of the note, whichever is later. That is above all numbers that were given before:
//! they begin at a moment and grow by one a message. A client whose position lies above what was
//! put back is told so when it attaches. Where the file system is put back as a whole, nothing can
//! be seen (docs/operations.md).
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

mod append;
mod janitor;
mod lives;
mod log_positions;
mod members;
mod read;
mod records;
mod topics;
mod user_logs;

use std::collections::HashMap;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fjall::{AbstractTree, Database, Keyspace, KeyspaceCreateOptions, PersistMode};
use futures_util::future::{BoxFuture, FutureExt};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::{
    Append, Appended, Appender, Change, Device, GroupCommit, Inbox, InboxError, InboxPage, Janitor,
    PageLimit, PositionQuery, Positions, Profile, Sought, UserPosition, WriteObserver,
};
use crate::clock::Clock;
use crate::message::{Message, Millis, Seq, UserId};

use lives::Lives;
use records::Head;

/// Heads kept in memory, at most twice this number: 2 x 100,000 x about 100 bytes = 20 MB.
const HEADS_IN_MEMORY: usize = 100_000;
/// The keyspace with the identity of the store.
const ABOUT: &str = "about.1";
const IDENTITY: &[u8] = b"identity";
/// The directory that the store was written in, in the keyspace about the store.
const PLACE: &[u8] = b"place";
/// The notes of the last start and of the one before, in the same keyspace.
const NOTE: &[u8] = b"note";
const NOTE_BEFORE: &[u8] = b"note before";
/// The moment above which numbers go on, in the same keyspace: eight bytes, big-endian.
const ABOVE: &[u8] = b"above";
/// The layout of the keys is part of the keyspaces' names: a store of another layout is refused,
/// not misread.
const KEYSPACES: [&str; 4] = ["messages.2", "heads.2", "fences.2", "cursors.2"];
/// The keyspaces of topics. A version without topics does not open them.
const TOPIC_KEYSPACES: [&str; 3] = ["topics.1", "topic_members.1", "user_topics.1"];
/// The keyspaces of logs. A version without logs does not open them.
const LOG_KEYSPACES: [&str; 3] = ["topic_messages.1", "topic_heads.1", "topic_fences.1"];
/// The keyspaces of what users have to do with logs.
const LOG_USER_KEYSPACES: [&str; 2] = ["user_logs.1", "device_logs.1"];
/// How often the memberships of users in logs have changed, of an earlier layout: the memberships
/// stood in [`TOPIC_KEYSPACES`], in a row each.
const EARLIER_CHANGES: &str = "user_changes.1";
/// Positions of an earlier layout: hash, user, 0, device, 0, log, and the seq as the value.
const EARLIER_POSITIONS: &str = "log_positions.1";
/// The keyspaces of traces, of messages in inboxes and in logs.
const TRACE_KEYSPACES: [&str; 2] = ["traces.1", "topic_traces.1"];
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
    /// The store of the logs; `None` in that store itself.
    logs: Option<Arc<Store>>,
}

struct Store {
    /// This is the store of the logs: what belongs to users is in the other one.
    is_of_logs: bool,
    db: Database,
    messages: Keyspace,
    heads: Keyspace,
    fences: Keyspace,
    traces: Keyspace,
    cursors: Keyspace,
    topics: Keyspace,
    lives: Arc<Lives>,
    topic_members: Keyspace,
    user_topics: Keyspace,
    user_logs: Keyspace,
    device_logs: Keyspace,
    clock: Clock,
    /// Made once and kept in the store: tells this store from every other.
    identity: String,
    /// The head record of users that are new to this process.
    newborn: Head,
    /// Numbers go on above this one: the store was copied at that moment. 0 if it never was.
    above: u64,
    writer: Mutex<Writer>,
    poisoned: Arc<watch::Sender<bool>>,
}

/// Tells a directory from every other, also from one that took its place: its number in the file
/// system, and when it was made, where the file system knows that.
fn place_of(directory: &Path) -> std::io::Result<String> {
    let about = std::fs::metadata(directory)?;
    let made = about.created().ok().and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok());
    Ok(format!("{} {}", about.ino(), made.map_or(0, |at| at.as_nanos())))
}

/// The file with the note of the last start, beside the directory of the store.
fn note_beside(directory: &Path) -> PathBuf {
    let mut name = directory.file_name().unwrap_or_default().to_owned();
    name.push(".note");
    directory.with_file_name(name)
}

/// Replaces the file with the note of the last start; it is on the disk when this returns.
fn write_note(path: &Path, note: &str) -> std::io::Result<()> {
    let fresh = path.with_extension("note.new");
    let mut file = std::fs::File::create(&fresh)?;
    file.write_all(note.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(fresh, path)?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    std::fs::File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
}

/// Leaves the notes of this start, and returns the moment above which numbers go on. A note is a
/// moment and a random word.
fn above_copies(db: &Database, about: &Keyspace, directory: &Path, now: Millis) -> fjall::Result<u64> {
    let (place, beside) = (place_of(directory)?, note_beside(directory));
    let text = |key: &[u8]| -> fjall::Result<Option<String>> {
        Ok(about.get(key)?.map(|raw| String::from_utf8_lossy(&raw).into_owned()))
    };
    let (known, before, found) = (text(NOTE)?, text(NOTE_BEFORE)?, std::fs::read_to_string(&beside).ok());
    // The process may have ended between the two: then the file has the note of the start before.
    let is_the_last = found.is_none() || found == known || found == before;
    let moved = text(PLACE)?.is_some_and(|before| before != place);
    let above = about.get(ABOVE)?.and_then(|raw| raw.as_ref().try_into().ok().map(u64::from_be_bytes));
    let mut above = above.unwrap_or(0);
    if moved || !is_the_last {
        let noted = found.as_deref().and_then(|note| note.split(' ').next()?.parse().ok()).unwrap_or(0);
        above = above.max(now.0).max(noted);
        tracing::warn!(
            directory = %directory.display(),
            above,
            "the store was copied here: numbers go on above this moment, and clients whose position is gone are told"
        );
    }
    let note = format!("{} {}", now.0, ulid::Ulid::generate());
    let mut pending = db.batch().durability(Some(PersistMode::SyncData));
    pending.insert(about, PLACE, place.as_bytes());
    pending.insert(about, ABOVE, above.to_be_bytes());
    pending.insert(about, NOTE_BEFORE, found.or(known).unwrap_or_default().as_bytes());
    pending.insert(about, NOTE, note.as_bytes());
    pending.commit()?;
    write_note(&beside, &note)?;
    Ok(above)
}

impl Store {
    /// The store of the logs, beside this one.
    fn of_logs(&self) -> fjall::Result<Self> {
        let keyspace = |name: &str| self.db.keyspace(name, KeyspaceCreateOptions::default);
        let [messages, heads, fences] = LOG_KEYSPACES;
        Ok(Self {
            is_of_logs: true,
            db: self.db.clone(),
            messages: keyspace(messages)?,
            heads: keyspace(heads)?,
            fences: keyspace(fences)?,
            traces: keyspace(TRACE_KEYSPACES[1])?,
            cursors: self.cursors.clone(),
            topics: self.topics.clone(),
            lives: Arc::clone(&self.lives),
            topic_members: self.topic_members.clone(),
            user_topics: self.user_topics.clone(),
            user_logs: self.user_logs.clone(),
            device_logs: self.device_logs.clone(),
            clock: self.clock.clone(),
            identity: self.identity.clone(),
            newborn: self.newborn,
            above: self.above,
            writer: Mutex::default(),
            poisoned: Arc::clone(&self.poisoned),
        })
    }
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
        let open = || -> fjall::Result<Option<(Store, Store)>> {
            let db = Database::builder(directory).open()?;
            if db.keyspace_exists(EARLIER) {
                return Ok(None);
            }
            let keyspace = |name: &str| db.keyspace(name, KeyspaceCreateOptions::default);
            let [messages, heads, fences, cursors] = KEYSPACES;
            let [topics, topic_members, user_topics] = TOPIC_KEYSPACES;
            let [user_logs, device_logs] = LOG_USER_KEYSPACES;
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
            let above = above_copies(&db, &about, directory, clock.now())?;
            let store = Store {
                is_of_logs: false,
                identity,
                messages: keyspace(messages)?,
                heads: keyspace(heads)?,
                fences: keyspace(fences)?,
                traces: keyspace(TRACE_KEYSPACES[0])?,
                cursors: keyspace(cursors)?,
                topics: keyspace(topics)?,
                lives: Arc::default(),
                topic_members: keyspace(topic_members)?,
                user_topics: keyspace(user_topics)?,
                user_logs: keyspace(user_logs)?,
                device_logs: keyspace(device_logs)?,
                db: db.clone(),
                newborn: Head::beginning_at(clock.now()),
                above,
                clock,
                writer: Mutex::default(),
                poisoned: Arc::new(watch::Sender::new(false)),
            };
            if db.keyspace_exists(EARLIER_POSITIONS) {
                let earlier = keyspace(EARLIER_POSITIONS)?;
                store.take_earlier_positions(&earlier)?;
                db.delete_keyspace(earlier)?;
            }
            if db.keyspace_exists(EARLIER_CHANGES) {
                let earlier = keyspace(EARLIER_CHANGES)?;
                store.take_earlier_memberships(&earlier)?;
                db.delete_keyspace(earlier)?;
            }
            let logs = store.of_logs()?;
            Ok(Some((store, logs)))
        };
        match open() {
            Ok(Some((store, logs))) => Ok(Self { store: Arc::new(store), logs: Some(Arc::new(logs)) }),
            Ok(None) => Err(OpenError::Earlier),
            Err(fjall::Error::Locked) => Err(OpenError::Locked),
            Err(error) => Err(OpenError::Failed(error.to_string())),
        }
    }

    /// The store of the logs of topics, for [`Logs`](crate::inbox::Logs).
    #[must_use]
    pub fn logs(&self) -> Self {
        Self { store: Arc::clone(self.logs.as_ref().unwrap_or(&self.store)), logs: None }
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
            let Store { cursors, topics, topic_members, user_topics, user_logs, device_logs, .. } =
                &*self.store;
            let of_users = [cursors, topics, topic_members, user_topics, user_logs, device_logs];
            let stores = [Some(&self.store), self.logs.as_ref()].into_iter().flatten();
            let of_messages =
                stores.flat_map(|store| [&store.messages, &store.heads, &store.fences, &store.traces]);
            for keyspace in of_users.into_iter().chain(of_messages) {
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

    fn stored(&self, user: UserId, which: Sought) -> BoxFuture<'_, Result<Option<Message>, InboxError>> {
        self.run(move |store| store.stored(&user, &which))
    }

    fn update(&self, changes: Vec<Change>) -> BoxFuture<'_, Result<(), InboxError>> {
        self.run(move |store| store.update(&changes))
    }

    fn forget(&self, user: UserId) -> BoxFuture<'_, Result<(), InboxError>> {
        self.run(move |store| store.forget(&user))
    }

    fn log_positions(&self, devices: Vec<Device>) -> BoxFuture<'_, Result<Vec<Positions>, InboxError>> {
        let of = |store: &Store, devices: &[Device]| {
            devices.iter().map(|(user, device)| store.log_positions_of(user, device)).collect()
        };
        if devices.len() == 1 {
            // On the caller's thread, like a position that is looked up alone.
            return async move { of(&self.store, &devices) }.boxed();
        }
        self.run(move |store| of(store, &devices))
    }

    fn appender(self: Arc<Self>, observer: Arc<dyn WriteObserver>, tasks: &mut JoinSet<()>) -> Appender {
        Appender::on_thread(self, GATHERING, observer, tasks)
    }

    fn gathers_lookups(&self) -> bool {
        false
    }
}

impl Janitor for EmbeddedInbox {
    fn run_once(&self) -> BoxFuture<'_, Result<u64, InboxError>> {
        self.run(Store::run_once)
    }
}

#[cfg(test)]
mod tests;
