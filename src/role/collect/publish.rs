//! Publishes: whom they reach, and what became of them.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::{Collect, refusal};
use crate::inbox::group_commit::PendingReceipt;
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

/// A publish whose recipients are known.
pub struct Addressed {
    publish: Publish,
    groups: Vec<(TopicName, Result<Group, PublishError>)>,
}

/// The recipients by one topic.
struct Group {
    /// Life of the message, in seconds.
    ttl_s: u64,
    users: Vec<UserId>,
}

impl Addressed {
    /// The number of its recipients.
    #[must_use]
    pub fn recipients(&self) -> usize {
        let members = self.groups.iter().filter_map(|(_, group)| group.as_ref().ok());
        self.publish.to.users().len() + members.map(|group| group.users.len()).sum::<usize>()
    }

    /// Why a request with so many recipients is refused.
    #[must_use]
    pub fn too_many(count: usize) -> Problem {
        let detail = format!(
            "a request reaches at most {REQUEST_RECIPIENTS} recipients, the members of topics counted, not {count}: send \
             it in parts"
        );
        Problem::fields(vec![FieldError { pointer: "/to".to_owned(), detail }])
    }
}

/// What the messages of one publish have in common.
struct Draft {
    id: MessageId,
    deduplicated: bool,
    accepted_at: Millis,
    event: Option<EventName>,
}

type Outcome = Result<Stored, PublishError>;

impl Collect {
    /// Finds out whom a publish reaches.
    pub async fn address(&self, publish: Publish) -> Addressed {
        let Recipients::Topics { topics, except } = &publish.to else {
            return Addressed { publish, groups: Vec::new() };
        };
        let mut groups = Vec::with_capacity(topics.len());
        for name in topics {
            let group = self.inner.members.of(name).await.map(|(topic, users)| Group {
                ttl_s: publish.ttl_s.unwrap_or(topic.ttl_s),
                users: users.iter().filter(|user| !except.contains(user)).cloned().collect(),
            });
            groups.push((name.clone(), group));
        }
        Addressed { publish, groups }
    }

    /// Stores a publish for each of its recipients. Returns the outcome of each.
    pub async fn publish_to(&self, addressed: Addressed) -> Published {
        let Addressed { publish, groups } = addressed;
        if groups.is_empty() {
            return self.publish(publish).await;
        }
        // It may be repeated under its id, also one that was made for it.
        let draft = Draft {
            id: publish.id.unwrap_or_else(new_id),
            deduplicated: true,
            accepted_at: self.inner.clock.now(),
            event: publish.event,
        };
        let deadline = Instant::now() + PUBLISH_DEADLINE;
        let mut topics = Vec::with_capacity(groups.len());
        for (name, group) in groups {
            let outcome = match group {
                Ok(group) => Ok(self.publish_by(&draft, &name, group, &publish.payload, deadline).await),
                Err(refusal) => {
                    self.count(&Err(refusal.clone()));
                    Err(refusal)
                }
            };
            topics.push((name, outcome));
        }
        Published { id: draft.id, repeatable: true, accepted: Vec::new(), topics }
    }

    /// Stores a message for the members of one topic.
    async fn publish_by(
        &self,
        draft: &Draft,
        topic: &TopicName,
        group: Group,
        payload: &Bytes,
        deadline: Instant,
    ) -> TopicOutcome {
        let mut outcome = TopicOutcome { members: group.users.len(), failed: Vec::new() };
        for lot in group.users.chunks(MEMBERS_AT_ONCE) {
            let submit = |(n, user): (usize, &UserId)| {
                // They share the payload, and one of them accounts for it.
                let bytes = if n == 0 { payload.len() } else { 0 };
                let append = draft.append(user, Some(topic), group.ttl_s, payload.clone());
                (user.clone(), self.submit(append, bytes))
            };
            let waiting: Vec<_> = lot.iter().enumerate().map(submit).collect();
            for (user, waiter) in waiting {
                let stored = self.outcome(waiter, deadline).await;
                outcome.failed.extend(stored.err().map(|refusal| (user, refusal)));
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
    fn append(&self, user: &UserId, via: Option<&TopicName>, ttl_s: u64, payload: Bytes) -> Append {
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
