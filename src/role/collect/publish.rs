//! Publishes: whom they reach, and what became of them.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::{Collect, refusal};
use crate::inbox::group_commit::PendingReceipt;
use crate::inbox::topics::Topic;
use crate::inbox::{Append, Receipt};
use crate::message::{EventName, MessageId, Millis, Recipients, TopicName, UserId};
use crate::wire::http::{FieldError, Problem, Publish, PublishError, Published, Stored, TopicOutcome};

/// Deadline of a publish, after which it is answered 503. The message may be stored nevertheless; a
/// repeat is safe.
pub const PUBLISH_DEADLINE: Duration = Duration::from_secs(10);
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
    groups: Vec<(TopicName, Result<Group, PublishError>)>,
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
        let members = self.groups.iter().filter_map(|(_, group)| group.as_ref().ok());
        self.publish.to.users().len() + members.map(|group| group.count).sum::<usize>()
    }
}

/// A topic and its members, with the server from which they were read; or why they could not be.
type ListRead = Result<(u64, Topic, Arc<[UserId]>), PublishError>;

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
        for name in topics {
            if lists.recipients > REQUEST_RECIPIENTS {
                break;
            }
            let group = self.group(name, publish.ttl_s, except, lists).await;
            lists.recipients += group.as_ref().map_or(0, |group| group.count);
            groups.push((name.clone(), group));
        }
        Addressed { publish, groups }
    }

    /// The members of a topic, but for some users.
    async fn group(
        &self,
        name: &TopicName,
        ttl_s: Option<u64>,
        except: &[UserId],
        lists: &mut Lists,
    ) -> Result<Group, PublishError> {
        let (primary, topic, users) = match lists.read.get(name) {
            Some(read) => read.clone(),
            None => {
                let read = self.list(name, lists).await;
                lists.read.insert(name.clone(), read.clone());
                read
            }
        }?;
        let count = users.iter().filter(|user| !except.contains(user)).count();
        Ok(Group { primary, ttl_s: ttl_s.unwrap_or(topic.ttl_s), users, count })
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
            Ok(read) => read.map(|(topic, users)| (primary, topic, users)),
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

    async fn publish_to_topics(
        &self,
        publish: Publish,
        groups: Vec<(TopicName, Result<Group, PublishError>)>,
        deadline: Instant,
    ) -> Published {
        let except = match publish.to {
            Recipients::Topics { except, .. } => except,
            _ => Vec::new(),
        };
        let publish = TopicPublish {
            draft: Draft {
                id: publish.id.unwrap_or_else(new_id),
                // It may be repeated under its id, also one that was made for it.
                deduplicated: true,
                accepted_at: self.inner.clock.now(),
                event: publish.event,
            },
            payload: publish.payload,
            ttl_s: publish.ttl_s,
            except,
            deadline,
        };
        let mut topics = Vec::with_capacity(groups.len());
        for (name, group) in groups {
            let outcome = match group {
                Ok(group) => self.publish_to_members(&publish, &name, group).await,
                Err(refusal) => Err(refusal),
            };
            if let Err(refusal) = &outcome {
                self.count(&Err(refusal.clone()));
            }
            topics.push((name, outcome));
        }
        Published { id: publish.draft.id, repeatable: true, accepted: Vec::new(), topics }
    }

    /// Stores a message for the members of one topic. If another server has taken over since they
    /// were read, they may have been outdated, and are read again.
    async fn publish_to_members(
        &self,
        publish: &TopicPublish,
        topic: &TopicName,
        mut group: Group,
    ) -> Result<TopicOutcome, PublishError> {
        let mut outcome = self.store_for(publish, topic, &group, &HashSet::new()).await;
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
            group = match self.group(topic, publish.ttl_s, &publish.except, &mut lists).await {
                Ok(group) => group,
                // It has ended meanwhile; it was published to before.
                Err(error) if error.status == 404 => break,
                Err(error) => return Err(error),
            };
            let more = self.store_for(publish, topic, &group, &known).await;
            outcome.members += more.members;
            outcome.failed.extend(more.failed);
        }
        Ok(outcome)
    }

    /// Stores a message for the members of a group who are not known to have it.
    async fn store_for(
        &self,
        publish: &TopicPublish,
        topic: &TopicName,
        group: &Group,
        known: &HashSet<UserId>,
    ) -> TopicOutcome {
        let is_meant = |user: &&UserId| !publish.except.contains(user) && !known.contains(*user);
        let users: Vec<&UserId> = group.users.iter().filter(is_meant).collect();
        let via = Arc::new(topic.clone());
        let mut outcome = TopicOutcome { members: users.len(), failed: Vec::new() };
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
                outcome.failed.extend(stored.err().map(|refusal| (user.clone(), refusal)));
            }
        }
        outcome
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
        };
        let ttl_s = publish.ttl_s.unwrap_or(self.inner.limits.ttl_s);
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

impl Draft {
    fn append(&self, user: &UserId, via: Option<&Arc<TopicName>>, ttl_s: u64, payload: Bytes) -> Append {
        Append {
            user: user.clone(),
            id: self.id.clone(),
            deduplicated: self.deduplicated,
            accepted_at: self.accepted_at,
            expires_at: self.accepted_at.plus_seconds(ttl_s),
            event: self.event.clone(),
            via: via.cloned(),
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

async fn wait_until(deadline: Instant, receipt: PendingReceipt) -> Outcome {
    match tokio::time::timeout_at(deadline, receipt).await {
        Ok(Ok(Ok(Receipt::Stored(seq)))) => Ok(Stored { seq, duplicate: false }),
        Ok(Ok(Ok(Receipt::Duplicate(seq)))) => Ok(Stored { seq, duplicate: true }),
        Ok(Ok(Ok(Receipt::Conflict))) => {
            Err(refusal(409, "this id was used for another payload or event to this user"))
        }
        Ok(Ok(Err(error))) => {
            tracing::warn!(%error, "a message could not be stored");
            Err(refusal(503, "the message could not be stored; a repeat is safe under an id of your own"))
        }
        Ok(Err(_)) => Err(refusal(503, "the server is stopping; a repeat is safe under an id of your own")),
        Err(_) => {
            Err(refusal(503, "the store did not answer in time; a repeat is safe under an id of your own"))
        }
    }
}
