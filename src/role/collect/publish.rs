//! Publishes: whom they reach, and what became of them.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use tokio::time::Instant;

use super::members::Found;
use super::writers::Handed;
use super::{Collect, refusal};
use crate::colleagues::Colleague;
use crate::inbox::group_commit::PendingReceipt;
use crate::inbox::logs::{EVERYONES_LIFE, key};
use crate::inbox::{Append, Receipt};
use crate::message::{EventName, LogEntry, LogId, MessageId, Millis, Recipients, TopicName, UserId, Via};
use crate::tasks::raised_or_else;
use crate::trace::TraceParent;
use crate::wire::http::{FieldError, Problem, Publish, PublishError, Published, Stored, TopicOutcome};
use crate::wire::peer::{PeerError, Received, TopicWrite, TopicWritten};

/// Deadline of a publish, after which it is answered 503. The message may be stored nevertheless; a
/// repeat is safe.
pub const PUBLISH_DEADLINE: Duration = Duration::from_secs(10);
/// What a sender is told when the store fails, or does not answer.
const NOT_STORED: &str = "the message could not be stored; a repeat is safe under an id of your own";
const NO_ANSWER: &str = "the store did not answer in time; a repeat is safe under an id of your own";
/// How long after its acceptance a publish is still taken from another collect, in seconds: its
/// deadline, and how far clocks may differ.
pub(super) const LATEST_TAKEN_S: u64 = PUBLISH_DEADLINE.as_secs() + 2;
/// Most recipients of one request, the members of its topics counted.
pub const REQUEST_RECIPIENTS: usize = 10_000;
/// Members whose messages wait to be stored at the same time, of one publish.
const MEMBERS_AT_ONCE: usize = 1_000;
/// Lots of so many members that wait at the same time, of all publishes: 8,000 of the 10,000
/// appends that may wait.
pub(super) const LOTS_AT_ONCE: usize = 8;

/// A publish whose recipients are known.
pub struct Addressed {
    publish: Publish,
    groups: Groups,
}

/// How the recipients of each topic are reached, or why they cannot be.
type Groups = Vec<(LogId, Result<Way, PublishError>)>;

/// How a message reaches the recipients by one topic.
enum Way {
    /// By the inbox of each member.
    Members(Group),
    /// By the log: the life of the topic's name, and that of the message in seconds.
    Log { life: u64, ttl_s: u64 },
    /// As another collect finds out, which writes to this topic. It had a log a moment ago.
    Elsewhere,
}

/// The recipients by one topic.
struct Group {
    /// The server from which the members were read.
    primary: u64,
    /// Life of the message, in seconds.
    ttl_s: u64,
    /// The members, those who are left out among them.
    users: Arc<[UserId]>,
    /// Number of the others.
    count: usize,
}

impl Addressed {
    /// The number of its recipients.
    #[must_use]
    pub fn recipients(&self) -> usize {
        let ways = self.groups.iter().filter_map(|(_, way)| way.as_ref().ok());
        self.publish.to.users().len() + ways.map(Way::count).sum::<usize>()
    }
}

impl Way {
    /// What it counts for among the recipients: a log counts as one.
    fn count(&self) -> usize {
        match self {
            Self::Members(group) => group.count,
            Self::Log { .. } | Self::Elsewhere => 1,
        }
    }
}

/// A topic and its members, with the server from which they were read; or why they could not be.
type ListRead = Result<(u64, Found), PublishError>;

/// The lists of members that one request needs. Each is read once, and none is read after the
/// request's time or once it reaches too many.
pub struct Lists {
    deadline: Instant,
    read: HashMap<TopicName, ListRead>,
    /// Why no more is read.
    ended: Option<PublishError>,
    recipients: usize,
}

impl Default for Lists {
    fn default() -> Self {
        let deadline = Instant::now() + PUBLISH_DEADLINE;
        Self { deadline, read: HashMap::new(), ended: None, recipients: 0 }
    }
}

impl Lists {
    /// When the request must be answered.
    #[must_use]
    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    /// The problem of a request that reaches more than [`REQUEST_RECIPIENTS`].
    #[must_use]
    pub fn problem(&self) -> Option<Problem> {
        let detail = || {
            format!(
                "a request reaches at most {REQUEST_RECIPIENTS} recipients, the members of topics counted: send it in \
                 parts"
            )
        };
        let fault = || FieldError { pointer: "/to".to_owned(), detail: detail() };
        (self.recipients > REQUEST_RECIPIENTS).then(|| Problem::fields(vec![fault()]))
    }
}

/// What the messages of one publish have in common.
struct Draft {
    id: MessageId,
    deduplicated: bool,
    accepted_at: Millis,
    event: Option<EventName>,
    trace: Option<Arc<TraceParent>>,
    /// Tells this publish from another one under the same id, if another process may write it.
    append_id: Option<Arc<str>>,
}

/// A publish to topics.
struct TopicPublish {
    draft: Draft,
    payload: Bytes,
    /// Life of the message in seconds, if the sender named one.
    ttl_s: Option<u64>,
    except: Vec<UserId>,
    deadline: Instant,
}

type Outcome = Result<Stored, PublishError>;

impl Collect {
    /// Finds out whom a publish reaches, until the request reaches too many.
    pub async fn address(&self, publish: Publish, lists: &mut Lists) -> Addressed {
        let Recipients::Topics { topics, except } = &publish.to else {
            lists.recipients += publish.to.users().len();
            return Addressed { publish, groups: Vec::new() };
        };
        let mut groups = Vec::with_capacity(topics.len());
        for log in topics {
            if lists.recipients > REQUEST_RECIPIENTS {
                break;
            }
            let way = match log {
                LogId::Topic(name) if self.is_written_elsewhere(log, name) => Ok(Way::Elsewhere),
                _ => self.way_of(log, publish.ttl_s, except, lists).await,
            };
            lists.recipients += way.as_ref().map_or(0, Way::count);
            groups.push((log.clone(), way));
        }
        Addressed { publish, groups }
    }

    /// Whether another collect reads the topic and writes to it. What counts here is the number of
    /// recipients, which is one for a log.
    fn is_written_elsewhere(&self, log: &LogId, name: &TopicName) -> bool {
        self.inner.members.had_a_log(name) && self.inner.writers.of(log).is_some()
    }

    async fn way_of(
        &self,
        log: &LogId,
        ttl_s: Option<u64>,
        except: &[UserId],
        lists: &mut Lists,
    ) -> Result<Way, PublishError> {
        match log {
            LogId::Everyone => {
                let ttl_s = ttl_s.unwrap_or_else(|| self.inner.limits.get().ttl_s);
                Ok(Way::Log { life: EVERYONES_LIFE, ttl_s })
            }
            LogId::Topic(name) => self.way(name, ttl_s, except, lists).await,
        }
    }

    /// How the members of a topic are reached, but for some users.
    async fn way(
        &self,
        name: &TopicName,
        ttl_s: Option<u64>,
        except: &[UserId],
        lists: &mut Lists,
    ) -> Result<Way, PublishError> {
        let (primary, Found { topic, members }) = match lists.read.get(name) {
            Some(read) => read.clone(),
            None => {
                let read = self.list(name, lists).await;
                lists.read.insert(name.clone(), read.clone());
                read
            }
        }?;
        let Some(users) = members else {
            // A longer life than the topic's is cut to it.
            let ttl_s = ttl_s.unwrap_or(topic.ttl_s).min(topic.ttl_s);
            return Ok(Way::Log { life: topic.version.life, ttl_s });
        };
        let count = users.iter().filter(|user| !except.contains(user)).count();
        Ok(Way::Members(Group { primary, ttl_s: ttl_s.unwrap_or(topic.ttl_s), users, count }))
    }

    async fn list(&self, name: &TopicName, lists: &mut Lists) -> ListRead {
        if let Some(ended) = &lists.ended {
            return Err(ended.clone());
        }
        // Before the members are read.
        let primary = self.inner.topics.primary();
        // Near names are looked for once in a request.
        let hints = !lists.read.values().any(|read| read.as_ref().is_err_and(|error| error.status == 404));
        let reading = self.inner.members.of(name, hints);
        let read = match tokio::time::timeout_at(lists.deadline, reading).await {
            Ok(read) => read.map(|found| (primary, found)),
            Err(_) => Err(refusal(503, "the members of the topics could not be read in time")),
        };
        // A store that does not answer once is not asked again for this request.
        lists.ended = read.as_ref().err().filter(|error| error.status == 503).cloned();
        read
    }

    /// Stores a publish for each of its recipients. Returns the outcome of each.
    /// For members of topics it is tried until the deadline.
    pub async fn publish_to(&self, addressed: Addressed, deadline: Instant) -> Published {
        let Addressed { publish, groups } = addressed;
        if groups.is_empty() {
            return self.publish(publish).await;
        }
        // Boxed, for what it needs would be carried by every publish.
        Box::pin(self.publish_to_topics(publish, groups, deadline)).await
    }

    async fn publish_to_topics(&self, publish: Publish, groups: Groups, deadline: Instant) -> Published {
        let except = match publish.to {
            Recipients::Topics { except, .. } => except,
            _ => Vec::new(),
        };
        let mut publish = TopicPublish {
            draft: Draft {
                id: publish.id.unwrap_or_else(new_id),
                // It may be repeated under its id, also one that was made for it.
                deduplicated: true,
                accepted_at: self.inner.clock.now(),
                event: publish.event,
                trace: publish.trace,
                append_id: None,
            },
            payload: publish.payload,
            ttl_s: publish.ttl_s,
            except,
            deadline,
        };
        let mut topics = Vec::with_capacity(groups.len());
        for (name, way) in groups {
            // One that is named twice is a repeat the second time.
            publish.draft.append_id = Some(ulid::Ulid::generate().to_string().into());
            let outcome = match way {
                Ok(way) => self.write(&publish, &name, way).await,
                Err(refusal) => Err(refusal),
            };
            if let Err(refusal) = &outcome {
                self.count(&Err(refusal.clone()));
            }
            topics.push((name, outcome));
        }
        Published { id: publish.draft.id, repeatable: true, accepted: Vec::new(), topics }
    }

    /// Has a publish to a topic written by the collect that it belongs to, or writes it here.
    async fn write(&self, publish: &TopicPublish, log: &LogId, way: Way) -> TopicWritten {
        if Instant::now() >= publish.deadline {
            return Err(refusal(
                503,
                "there was no time left for this topic; a repeat under this id is safe",
            ));
        }
        if let Some(writer) = self.inner.writers.of(log)
            && let Some(written) = self.hand(publish, log, &writer).await
        {
            self.inner.handing_on.metrics.handed_over.inc();
            return written;
        }
        let way = match way {
            Way::Elsewhere => {
                let mut lists = Lists { deadline: publish.deadline, ..Lists::default() };
                self.way_of(log, publish.ttl_s, &publish.except, &mut lists).await?
            }
            way => way,
        };
        self.write_here(publish, log, way).await
    }

    /// Hands a publish over, and waits for what becomes of it. `None` if that is not known: it is
    /// written here then, and if it was written there, too, it is stored once, by its fence.
    async fn hand(&self, publish: &TopicPublish, log: &LogId, writer: &Colleague) -> Option<TopicWritten> {
        let writers = &self.inner.writers;
        let Handed::Received(received, _room) = writers.hand(writer, publish.handed(log)).await else {
            return None;
        };
        match tokio::time::timeout_at(publish.deadline, received.0).await {
            // Its store may be away where this one's is not.
            Ok(Ok(Err(refusal))) if refusal.status == 503 => {
                writers.pass_over(writer, &refusal.detail);
                None
            }
            Ok(Ok(written)) => Some(written),
            Ok(Err(fault)) => {
                writers.pass_over(writer, &fault.to_string());
                None
            }
            Err(_) => Some(Err(refusal(
                503,
                "the collect that writes to this topic did not answer in time; a repeat under this id is safe",
            ))),
        }
    }

    /// Takes a publish that another collect has handed over. Returns at once; what it returns
    /// resolves to what became of the publish.
    #[must_use]
    pub fn take_over(&self, write: TopicWrite) -> Received {
        let this = self.clone();
        // It is written whether or not the other one still waits.
        let writing = tokio::spawn(async move {
            let deadline = Instant::now() + write.left.min(PUBLISH_DEADLINE);
            let publish = TopicPublish {
                draft: Draft {
                    id: write.id,
                    deduplicated: true,
                    accepted_at: write.accepted_at,
                    event: write.event,
                    trace: write.trace,
                    append_id: Some(write.append_id),
                },
                payload: write.payload,
                ttl_s: write.ttl_s,
                except: write.except,
                deadline,
            };
            // Its sender was answered long ago, and the topic may have been removed and made anew
            // since.
            let is_late = this.inner.clock.now() > write.accepted_at.plus_seconds(LATEST_TAKEN_S);
            if is_late || write.left.is_zero() {
                return Err(refusal(503, "the publish comes too late; a repeat under its id is safe"));
            }
            let mut lists = Lists { deadline, ..Lists::default() };
            let written = match this.way_of(&write.log, publish.ttl_s, &publish.except, &mut lists).await {
                Ok(way) => this.write_here(&publish, &write.log, way).await,
                Err(refusal) => Err(refusal),
            };
            if store_failed(&written) {
                this.inner.writers.rest();
            }
            written
        });
        let stopping = || PeerError::Unavailable("this process is stopping".to_owned());
        Received(async move { raised_or_else(writing.await.map(Ok), || Err(stopping())) }.boxed())
    }

    async fn write_here(&self, publish: &TopicPublish, log: &LogId, way: Way) -> TopicWritten {
        match (way, log) {
            (Way::Members(group), LogId::Topic(name)) => self.publish_to_members(publish, name, group).await,
            (Way::Members(_), LogId::Everyone) => unreachable!("everyone has a log"),
            (Way::Elsewhere, _) => unreachable!("it was read before"),
            (Way::Log { life, ttl_s }, log) => {
                self.publish_to_log(publish, log, life, ttl_s).await.map(TopicOutcome::Log)
            }
        }
    }

    /// Stores a message in a log.
    async fn publish_to_log(&self, publish: &TopicPublish, log: &LogId, life: u64, ttl_s: u64) -> Outcome {
        let most = self.inner.limits.get().logs.bytes_of(log);
        let bytes = publish.payload.len();
        if bytes > most {
            return Err(refusal(413, format!("the payload has {bytes} bytes; {log} takes at most {most}")));
        }
        if !self.inner.rates.try_take(log, Instant::now()) {
            return Err(refusal(
                429,
                format!("too many messages to {log} in one second; repeat after a moment"),
            ));
        }
        let via = Arc::new(Via::Log(LogEntry { life, except: publish.except.clone() }));
        let append = publish.draft.append(&key(log), Some(&via), ttl_s, publish.payload.clone());
        let submitted = self.inner.log_appender.submit(append, bytes);
        let submitted = submitted.map_err(|busy| refusal(503, format!("{busy}; repeat after a moment")));
        // A refusal is counted by the caller.
        let stored = match submitted {
            Ok(waiter) => wait_until(publish.deadline, waiter).await,
            Err(refusal) => Err(refusal),
        };
        if stored.is_ok() {
            self.count(&stored);
        }
        stored
    }

    /// Stores a message for the members of one topic. If another server has taken over since they
    /// were read, they may have been outdated, and are read again.
    async fn publish_to_members(
        &self,
        publish: &TopicPublish,
        topic: &TopicName,
        mut group: Group,
    ) -> Result<TopicOutcome, PublishError> {
        let (mut members, mut failed) = self.store_for(publish, topic, &group, &HashSet::new()).await;
        let mut known: HashSet<UserId> = HashSet::new();
        while group.primary != self.inner.topics.primary() {
            if Instant::now() > publish.deadline {
                return Err(refusal(
                    503,
                    "the store has changed its primary; a repeat under this id is safe",
                ));
            }
            known.extend(group.users.iter().cloned());
            let mut lists = Lists { deadline: publish.deadline, ..Lists::default() };
            group = match self.way(topic, publish.ttl_s, &publish.except, &mut lists).await {
                Ok(Way::Members(group)) => group,
                // It has ended meanwhile; it was published to before.
                Ok(Way::Log { .. } | Way::Elsewhere) => break,
                Err(error) if error.status == 404 => break,
                Err(error) => return Err(error),
            };
            let more = self.store_for(publish, topic, &group, &known).await;
            members += more.0;
            failed.extend(more.1);
        }
        Ok(TopicOutcome::Members { members, failed })
    }

    /// Stores a message for the members of a group who are not known to have it. Returns how many
    /// they are, and for whom it is not stored.
    async fn store_for(
        &self,
        publish: &TopicPublish,
        topic: &TopicName,
        group: &Group,
        known: &HashSet<UserId>,
    ) -> (usize, Vec<(UserId, PublishError)>) {
        let is_meant = |user: &&UserId| !publish.except.contains(user) && !known.contains(*user);
        let users: Vec<&UserId> = group.users.iter().filter(is_meant).collect();
        let via = Arc::new(Via::Inbox(topic.clone()));
        let mut failed = Vec::new();
        for lot in users.chunks(MEMBERS_AT_ONCE) {
            // Lots beyond those would only be refused for want of room.
            let turn = tokio::time::timeout_at(publish.deadline, self.inner.lots.acquire()).await;
            let mut waiting = Vec::with_capacity(lot.len());
            // They share the payload, and the first accounts for it: where there is no room for
            // that one, there is none for the others.
            let mut room = match turn {
                Ok(Ok(_)) => Ok(()),
                _ => {
                    Err(refusal(503, "too many messages to topics wait to be stored; repeat after a moment"))
                }
            };
            for (n, user) in lot.iter().enumerate() {
                let bytes = if n == 0 { publish.payload.len() } else { 0 };
                let append = publish.draft.append(user, Some(&via), group.ttl_s, publish.payload.clone());
                let submitted = room.clone().and_then(|()| self.submit(append, bytes));
                if n == 0
                    && let Err(refusal) = &submitted
                {
                    room = Err(refusal.clone());
                }
                waiting.push((*user, submitted));
            }
            for (user, waiter) in waiting {
                let stored = self.outcome(waiter, publish.deadline).await;
                failed.extend(stored.err().map(|refusal| (user.clone(), refusal)));
            }
        }
        (users.len(), failed)
    }

    /// Stores a publish for each of the users that it names. Returns the outcome of each.
    pub async fn publish(&self, publish: Publish) -> Published {
        // Only an id that may be repeated is deduplicated: the sender's own, or one under which the
        // rest of a publish to several users is repeated.
        let deduplicated = publish.id.is_some() || matches!(publish.to, Recipients::Users(_));
        let draft = Draft {
            id: publish.id.unwrap_or_else(new_id),
            deduplicated,
            accepted_at: self.inner.clock.now(),
            event: publish.event,
            trace: publish.trace,
            append_id: None,
        };
        let ttl_s = publish.ttl_s.unwrap_or_else(|| self.inner.limits.get().ttl_s);
        let count = publish.to.users().len();
        // The last recipient takes the payload itself; sharing it would cost an allocation.
        let mut payload = publish.payload;
        let bytes = payload.len();
        let waiting: Vec<(UserId, Result<PendingReceipt, PublishError>)> = publish
            .to
            .users()
            .iter()
            .enumerate()
            .map(|(n, user)| {
                let last = n + 1 == count;
                let payload = if last { std::mem::take(&mut payload) } else { payload.clone() };
                let append = draft.append(user, None, ttl_s, payload);
                (user.clone(), self.submit(append, if last { bytes } else { 0 }))
            })
            .collect();
        let deadline = Instant::now() + PUBLISH_DEADLINE;
        let mut accepted = Vec::with_capacity(waiting.len());
        for (user, waiter) in waiting {
            accepted.push((user, self.outcome(waiter, deadline).await));
        }
        Published { id: draft.id, repeatable: deduplicated, accepted, topics: Vec::new() }
    }

    fn submit(&self, append: Append, bytes: usize) -> Result<PendingReceipt, PublishError> {
        let submitted = self.inner.appender.submit(append, bytes);
        submitted.map_err(|busy| refusal(503, format!("{busy}; repeat after a moment")))
    }

    async fn outcome(&self, waiter: Result<PendingReceipt, PublishError>, deadline: Instant) -> Outcome {
        let outcome = match waiter {
            Ok(waiter) => wait_until(deadline, waiter).await,
            Err(refusal) => Err(refusal),
        };
        self.count(&outcome);
        outcome
    }

    fn count(&self, outcome: &Outcome) {
        let metrics = &self.inner.handing_on.metrics;
        match outcome {
            Ok(stored) if stored.duplicate => metrics.duplicates.inc(),
            Ok(_) => metrics.stored.inc(),
            Err(_) => metrics.refused.inc(),
        };
    }
}

impl TopicPublish {
    /// As it is handed to the collect that writes to this topic.
    fn handed(&self, log: &LogId) -> TopicWrite {
        let Draft { id, accepted_at, event, trace, append_id, .. } = &self.draft;
        TopicWrite {
            log: log.clone(),
            id: id.clone(),
            append_id: append_id.clone().unwrap_or_default(),
            accepted_at: *accepted_at,
            event: event.clone(),
            trace: trace.clone(),
            payload: self.payload.clone(),
            ttl_s: self.ttl_s,
            except: self.except.clone(),
            left: self.deadline.saturating_duration_since(Instant::now()),
        }
    }
}

impl Draft {
    fn append(&self, user: &UserId, via: Option<&Arc<Via>>, ttl_s: u64, payload: Bytes) -> Append {
        Append {
            user: user.clone(),
            id: self.id.clone(),
            deduplicated: self.deduplicated,
            accepted_at: self.accepted_at,
            expires_at: self.accepted_at.plus_seconds(ttl_s),
            event: self.event.clone(),
            via: via.cloned(),
            trace: self.trace.clone(),
            append_id: self.append_id.clone(),
            payload,
        }
    }
}

fn new_id() -> MessageId {
    // A ULID has 26 printable characters, which is always a valid id.
    let mut characters = [0; ulid::ULID_LEN];
    let text = ulid::Ulid::generate().array_to_str(&mut characters);
    MessageId::parse(text).unwrap_or_else(|_| unreachable!("a ULID is an id"))
}

/// Whether the store failed for a publish to a topic, or for one of its members.
fn store_failed(written: &TopicWritten) -> bool {
    match written {
        Ok(TopicOutcome::Log(_)) => false,
        Ok(TopicOutcome::Members { failed, .. }) => failed.iter().any(|(_, refusal)| refusal.store_failed),
        Err(refusal) => refusal.store_failed,
    }
}

async fn wait_until(deadline: Instant, receipt: PendingReceipt) -> Outcome {
    match tokio::time::timeout_at(deadline, receipt).await {
        Ok(Ok(Ok(Receipt::Stored(seq)))) => Ok(Stored { seq, duplicate: false }),
        Ok(Ok(Ok(Receipt::Duplicate(seq)))) => Ok(Stored { seq, duplicate: true }),
        Ok(Ok(Ok(Receipt::Conflict))) => {
            Err(refusal(409, "this id was used for another payload or event to this user or topic"))
        }
        Ok(Ok(Err(error))) => {
            tracing::warn!(%error, "a message could not be stored");
            Err(PublishError::of_store(NOT_STORED))
        }
        Ok(Err(_)) => Err(refusal(503, "the server is stopping; a repeat is safe under an id of your own")),
        Err(_) => Err(PublishError::of_store(NO_ANSWER)),
    }
}
