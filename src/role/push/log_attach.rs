//! Which logs a session reads and where it begins in each: when it attaches, and when the
//! memberships of its user change.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::log_positions::LogPositions;
use super::log_readers::{LogReaders, LogStart, Why};
use super::registry::{Registry, SessionHandle};
use super::tail::Reading;
use super::tails::Tails;
use crate::backoff::Backoff;
use crate::inbox::logs::EVERYONES_LIFE;
use crate::inbox::topics::{LogMembership, Memberships};
use crate::inbox::{InboxError, Lookups, StartAt, Stores};
use crate::message::{LogId, Seq, TopicName, UserId};
use crate::topic::Delivery;
use crate::wire::frame::{LogOptions, LogPosition, WatchSince};

/// Users whose memberships are read again in one question.
const LOT: usize = 1_000;
/// Time between two such questions.
const LOT_EVERY: Duration = Duration::from_millis(250);
/// Delay between two tries while the store does not respond, at first and at most.
const RETRY_FIRST: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(5);

/// Where a session begins in logs, when it attaches.
pub(super) struct LogsAttached {
    pub(super) readers: Box<LogReaders>,
    pub(super) starts: Vec<LogStart>,
}

/// Finds out which logs a session reads.
pub(super) struct LogAttacher {
    pub(super) stores: Stores,
    pub(super) lookups: Lookups,
    pub(super) tails: Arc<Tails>,
    pub(super) positions: Arc<LogPositions>,
    pub(super) everyone_backlog: u64,
}

/// What is known of where a device stands.
struct Stands {
    /// As the client says.
    told: HashMap<LogId, Seq>,
    /// As it acked before.
    stored: HashMap<LogId, Seq>,
    /// The device is new, and begins with what comes from now on.
    begins_at_heads: bool,
}

impl Stands {
    fn of(&self, log: &LogId) -> Option<Seq> {
        self.told.get(log).or_else(|| self.stored.get(log)).copied()
    }
}

impl LogAttacher {
    /// Whether the user is a member of topics with a log: what a client that does not know of logs
    /// misses.
    pub(super) async fn has_memberships(&self, user: &UserId) -> Result<bool, InboxError> {
        Ok(!self.lookups.memberships.ask(user.clone()).await?.logs.is_empty())
    }

    /// Begins to read the logs of a session. `changes` is how often the user's memberships have
    /// changed, `new_at_end` that the device has no cursor and begins with what comes from now on.
    pub(super) async fn attach(
        &self,
        handle: &Arc<SessionHandle>,
        options: &LogOptions,
        (changes, new_at_end, windowed): (u64, bool, bool),
    ) -> Result<LogsAttached, InboxError> {
        let user = &handle.user;
        let memberships = async {
            match changes {
                0 => Ok(Memberships::default()),
                _ => self.lookups.memberships.ask(user.clone()).await,
            }
        };
        let stands = self.stands(handle, options, new_at_end);
        let (memberships, stands) = tokio::try_join!(memberships, stands)?;
        if memberships.version < changes {
            // A server that was replaced answered, and no sweep would ask again.
            return Err(InboxError::Unavailable("the memberships that were read are outdated".to_owned()));
        }
        handle.set_memberships(memberships.version);
        let mut readers = LogReaders::new(user.clone(), memberships.version, windowed);
        readers.reserve(memberships.logs.len() + 1);
        let (mut starts, mut begun) = (Vec::with_capacity(memberships.logs.len() + 1), Vec::new());
        let logs: Vec<(LogId, u64)> = memberships.logs.iter().map(read_of).collect();
        self.tails.prepare(&logs).await?;
        for (membership, (log, life)) in memberships.logs.iter().zip(logs) {
            let Some(reading) = self.tails.read(&log, life, handle).await? else { continue };
            let start = self.member_start(reading, membership, &stands).await?;
            if stands.begins_at_heads && stands.of(&log).is_none() {
                begun.push((log, start.after));
            }
            starts.push(start);
        }
        if let Some(reading) = self.tails.read(&LogId::Everyone, EVERYONES_LIFE, handle).await? {
            let start = self.everyones_start(reading, &stands).await?;
            if stands.of(&LogId::Everyone).is_none() {
                begun.push((LogId::Everyone, start.after));
            }
            starts.push(start);
        }
        if !begun.is_empty() {
            // Before the client is told: a device that is known would else skip what comes until
            // its first ack.
            let (user, device) = (user.clone(), handle.device.clone());
            self.positions.begin((user, device), begun).await?;
        }
        Ok(LogsAttached { readers: Box::new(readers), starts })
    }

    async fn stands(
        &self,
        handle: &SessionHandle,
        options: &LogOptions,
        begins_at_heads: bool,
    ) -> Result<Stands, InboxError> {
        let topics = options.topics.iter().map(|(topic, seq)| (LogId::Topic(topic.clone()), *seq));
        let told = topics.chain(options.everyone.map(|seq| (LogId::Everyone, seq))).collect();
        let (user, device) = (handle.user.clone(), handle.device.clone());
        let mut stored: HashMap<LogId, Seq> = HashMap::new();
        let pending = self.positions.pending(&user, &device);
        for (log, seq) in self.lookups.log_positions.ask((user, device)).await?.into_iter().chain(pending) {
            let known = stored.entry(log).or_default();
            *known = seq.max(*known);
        }
        Ok(Stands { told, stored, begins_at_heads })
    }

    async fn member_start(
        &self,
        reading: Reading,
        membership: &LogMembership,
        stands: &Stands,
    ) -> Result<LogStart, InboxError> {
        let (log, resets) = (reading.tail.log.clone(), reading.tail.resets());
        let from = membership.from;
        let position = stands.of(&log);
        let after = match position {
            Some(position) => position.max(from),
            None if stands.begins_at_heads => from.max(reading.tail.position()),
            None => from,
        };
        let restored_to = self.restored_to(&reading, after).await?;
        Ok(LogStart {
            reading,
            why: Why::Member(from),
            after,
            restored_to,
            fresh: position.is_none_or(|position| position < from),
            before_joining: stands.told.get(&log).copied().filter(|told| *told < from),
            resets,
        })
    }

    async fn everyones_start(&self, reading: Reading, stands: &Stands) -> Result<LogStart, InboxError> {
        let (head, resets) = (reading.tail.position(), reading.tail.resets());
        let position = stands.of(&LogId::Everyone);
        let after = match position {
            Some(position) => position,
            None if stands.begins_at_heads => head,
            None => self.tails.first_of_last(&reading.tail, self.everyone_backlog).await?,
        };
        let restored_to = self.restored_to(&reading, after).await?;
        let (why, fresh) = (Why::Everyone, position.is_none_or(|position| position.is_beginning()));
        Ok(LogStart { reading, why, after, restored_to, fresh, before_joining: None, resets })
    }

    /// The head of the store, if a position is above it. Only the store may say so; a tail may be
    /// behind.
    async fn restored_to(&self, reading: &Reading, after: Seq) -> Result<Option<Seq>, InboxError> {
        if after <= reading.tail.position() {
            return Ok(None);
        }
        let log = reading.tail.log.clone();
        let answers = self.stores.logs.positions(vec![(log, StartAt::After(after))]).await?;
        Ok(answers.first().filter(|answer| answer.head < after).map(|answer| answer.head))
    }

    /// Begins to read topics that a user has joined, for one session.
    pub(super) async fn join(
        &self,
        handle: &Arc<SessionHandle>,
        joined: Vec<(LogMembership, Option<Seq>)>,
    ) -> Result<Vec<LogStart>, InboxError> {
        let stands = self.stands(handle, &LogOptions::default(), false).await?;
        let mut starts = Vec::with_capacity(joined.len());
        let logs: Vec<(LogId, u64)> = joined.iter().map(|(membership, _)| read_of(membership)).collect();
        self.tails.prepare(&logs).await?;
        for ((membership, sent), (log, life)) in joined.into_iter().zip(logs) {
            let Some(reading) = self.tails.read(&log, life, handle).await? else { continue };
            let mut start = self.member_start(reading, &membership, &stands).await?;
            if let Some(sent) = sent.filter(|sent| *sent > start.after) {
                (start.after, start.fresh) = (sent, false);
            }
            starts.push(start);
        }
        Ok(starts)
    }

    /// Begins to read a topic that a client watches.
    pub(super) async fn watch(
        &self,
        handle: &Arc<SessionHandle>,
        topic: &TopicName,
        since: WatchSince,
    ) -> Result<Watched, InboxError> {
        let log = LogId::Topic(topic.clone());
        let found = self.stores.topics.topic(topic.clone()).await?;
        let Some(topic) = found.filter(|topic| topic.delivery == Delivery::Log) else {
            return Ok(Watched::NoLog);
        };
        let life = topic.version.life;
        let Some(reading) = self.tails.read(&log, life, handle).await? else { return Ok(Watched::NoLog) };
        let resets = reading.tail.resets();
        let (after, fresh) = match since {
            WatchSince::After(after) => (after, after.is_beginning()),
            WatchSince::Latest => (reading.tail.position(), true),
            WatchSince::Last => (self.tails.before_newest(&reading.tail).await?, true),
        };
        let restored_to = self.restored_to(&reading, after).await?;
        let why = Why::Watched;
        let start = LogStart { reading, why, after, restored_to, fresh, before_joining: None, resets };
        Ok(Watched::Begins(Box::new(start)))
    }
}

/// The outcome of [`LogAttacher::watch`].
pub(super) enum Watched {
    /// The session may begin to read.
    Begins(Box<LogStart>),
    /// There is no topic of that name that has a log.
    NoLog,
}

/// The log, and its life, that a member reads.
fn read_of(membership: &LogMembership) -> (LogId, u64) {
    (LogId::Topic(membership.topic.clone()), membership.life)
}

/// What `welcome` says of the logs.
pub(super) fn shown(starts: &[LogStart]) -> Vec<(LogId, LogPosition)> {
    let position = |start: &LogStart| {
        let tail = &start.reading.tail;
        let after = start.restored_to.unwrap_or(start.after);
        (tail.log.clone(), LogPosition { after: after.get(), head: tail.position().max(after).get() })
    };
    starts.iter().map(position).collect()
}

/// Reads memberships again that have changed, in lots.
pub(super) struct MembershipReads {
    stores: Stores,
    registry: Arc<Registry>,
    changed: Mutex<HashSet<UserId>>,
    /// Those of them whose changes are counted anew.
    anew: Mutex<HashSet<UserId>>,
    noted: Notify,
}

impl MembershipReads {
    pub(super) fn new(stores: Stores, registry: Arc<Registry>) -> Self {
        Self { stores, registry, changed: Mutex::default(), anew: Mutex::default(), noted: Notify::new() }
    }

    /// The memberships of a user may have changed.
    pub(super) fn note(&self, user: &UserId) {
        if self.registry.has(user) {
            self.changed.lock().insert(user.clone());
            self.noted.notify_one();
        }
    }

    /// The number of changes of a session's user was read.
    pub(super) fn compare(&self, handle: &SessionHandle, changes: u64) {
        if changes < handle.memberships() {
            // The store was restored, or a server that was replaced has answered; then the next
            // look finds a higher number again.
            self.anew.lock().insert(handle.user.clone());
        }
        if changes != handle.memberships() {
            self.note(&handle.user);
        }
    }

    /// Reads what was noted, for ever.
    pub(super) async fn run(self: Arc<Self>) {
        let mut backoff = Backoff::new(RETRY_FIRST, RETRY_MAX);
        loop {
            self.noted.notified().await;
            loop {
                let lot: Vec<UserId> = {
                    let mut changed = self.changed.lock();
                    let mut taken = 0;
                    let mut first = |_: &UserId| {
                        taken += 1;
                        taken <= LOT
                    };
                    changed.extract_if(&mut first).collect()
                };
                if lot.is_empty() {
                    break;
                }
                let rest = match self.stores.topics.log_memberships(lot.clone()).await {
                    Ok(found) => {
                        backoff.reset();
                        for (user, memberships) in lot.iter().zip(found) {
                            let memberships = Arc::new(memberships);
                            let anew = self.anew.lock().remove(user);
                            self.registry.for_user(user, |handle| {
                                if anew {
                                    handle.count_memberships_anew(memberships.version);
                                }
                                handle.set_memberships(memberships.version);
                                handle.mailbox.memberships(Arc::clone(&memberships), anew);
                            });
                        }
                        LOT_EVERY
                    }
                    Err(error) => {
                        tracing::debug!(%error, "memberships could not be read again");
                        self.changed.lock().extend(lot);
                        backoff.next(&mut rand::rng())
                    }
                };
                tokio::time::sleep(rest).await;
            }
        }
    }
}
