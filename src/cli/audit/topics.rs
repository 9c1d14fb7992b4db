//! Topics in the audit: every (message, member) is accounted for, with joins and leaves under way.
//!
//! Who is a member at a moment is known from outside only between the beginning and the end of a
//! change. So a message is *due* to whoever was a member through the whole publish, *wrong* for
//! whoever was none through the whole publish, and may or may not come to the others.
//!
//! Every second topic has a log. There, whoever leaves gets no more of what was published before,
//! and may get a message until its node knows that it has left: around a leave, nothing is due.
//! Everyone is a topic with a log of which all users are members.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, bail};
use bytes::Bytes;
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::seq::IteratorRandom;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::book::UserBook;
use super::{Bench, PUBLISH_DEADLINE, REQUEST_DEADLINE};
use crate::backoff::between;

/// Time between two changes of members.
const CHANGE_EVERY: Duration = Duration::from_millis(200);

/// What the audit does with topics. Every second one has a log, and everyone is published to.
#[derive(Debug, Clone, Copy)]
pub struct TopicPlan {
    /// Number of topics.
    pub topics: usize,
    /// Members of each at the beginning.
    pub members: usize,
    /// Messages per second, each to one topic.
    pub rate: f64,
}

/// How long an attempt may go on after its answer was lost.
const ATTEMPT_LIFE: Duration = Duration::from_secs(40);
/// A publish that takes longer met a change of the primary. Who had left before it may then get it
/// by the list of the primary of before (docs/topics.md).
const SMOOTH: Duration = Duration::from_secs(2);

/// A message to a log that was published this long before a leave, and the time beside that its
/// client was away, may not come any more: its client may be on its way to another node, and is no
/// member when it is there.
const BEFORE_LEAVE: Duration = Duration::from_secs(35);
/// A node that was not told knows of a leave by its sweep, within this time.
const AFTER_LEAVE: Duration = Duration::from_secs(45);
/// The index of everyone among the topics.
const EVERYONE: usize = usize::MAX;
/// Time between two messages to everyone.
const EVERYONE_EVERY: Duration = Duration::from_secs(1);

/// How a request went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sent {
    Once,
    /// The first attempt was not answered, or not well.
    Repeated,
    Refused,
}

/// What was done.
#[derive(Default)]
pub(super) struct TopicBook {
    /// By message id.
    accepted: Mutex<HashMap<String, TopicMessage>>,
    /// The changes of each topic and user, in their order.
    changes: Mutex<HashMap<(usize, usize), Vec<Change>>>,
}

#[derive(Debug, Clone, Copy)]
struct TopicMessage {
    topic: usize,
    due: Instant,
    /// When it was first sent, and when it was accepted.
    sent: (Instant, Instant),
}

/// A user joined or left.
#[derive(Debug, Clone, Copy)]
struct Change {
    joins: bool,
    /// When it was first sent, and when it was answered.
    sent: (Instant, Instant),
}

/// Whether a message is due to a user.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Due {
    Yes,
    No,
    Perhaps,
}

/// By the changes of a user, whether a message that was sent between two moments is due. `in_log`:
/// the topic has a log, and how long the user's client was away at the most.
fn due(changes: &[Change], (began, ended): (Instant, Instant), in_log: Option<Duration>) -> Due {
    let crosses = |change: &Change| {
        let (before, after) = match in_log {
            Some(away) if !change.joins => (BEFORE_LEAVE + away, AFTER_LEAVE),
            _ => (Duration::ZERO, Duration::ZERO),
        };
        change.sent.0 <= ended + before && began <= change.sent.1 + after
    };
    if changes.iter().any(crosses) {
        return Due::Perhaps;
    }
    match changes.iter().rev().find(|change| change.sent.1 < began) {
        Some(Change { joins: true, .. }) => Due::Yes,
        _ => Due::No,
    }
}

/// What became of the messages to topics.
#[derive(Debug, Default)]
pub(super) struct TopicVerdict {
    messages: u64,
    /// Pairs of a message and a member that were due, and came once.
    once: u64,
    /// They came more than once.
    again: u64,
    lost: u64,
    /// They came to somebody who was no member.
    wrong: u64,
    /// Pairs with a change of the member, or of the primary, in the time of the publish.
    unclear: u64,
    /// Their client was away in the end.
    queued: u64,
    pub(super) late: u64,
    delays: Vec<Duration>,
}

impl TopicVerdict {
    pub(super) fn is_bad(&self) -> bool {
        self.again + self.lost + self.wrong + self.late > 0
    }

    pub(super) fn to_json(&self) -> Value {
        json!({
            "messages": self.messages, "delivered_once": self.once, "delivered_again": self.again, "lost": self.lost,
            "to_strangers": self.wrong, "unclear": self.unclear, "queued": self.queued, "late": self.late,
            "delay_ms": super::verdict::percentiles(&self.delays),
        })
    }
}

impl Bench {
    /// Whether a topic has a log.
    fn has_log(&self, topic: usize) -> bool {
        topic % 2 == 1 && self.plan.topics.is_some()
    }

    /// What [`due`] asks about a topic and a user.
    fn in_log(&self, topic: usize, user: &UserBook) -> Option<Duration> {
        self.has_log(topic).then(|| user.away.iter().max().copied().unwrap_or_default())
    }

    fn topic(&self, n: usize) -> String {
        format!("audit-{}-{n}", self.run)
    }

    /// Makes the topics with their first members.
    ///
    /// # Errors
    ///
    /// One of them cannot be made.
    pub(super) async fn make_topics(&self, plan: TopicPlan) -> Result<()> {
        let mut random = StdRng::seed_from_u64(self.plan.seed);
        for topic in 0..plan.topics {
            let path = format!("/v1/topics/{}", self.topic(topic));
            let delivery = if self.has_log(topic) { "log" } else { "inbox" };
            let body = json!({ "delivery": delivery }).to_string();
            if self.sent("PUT", &path, body.into()).await == Sent::Refused {
                bail!("the topic {} cannot be made", self.topic(topic));
            }
            let members = (0..self.users.len()).choose_multiple(&mut random, plan.members);
            if !self.change_members(topic, &members, &[]).await {
                bail!("members cannot be added to {}", self.topic(topic));
            }
        }
        Ok(())
    }

    pub(super) async fn remove_topics(&self, plan: TopicPlan) {
        for topic in 0..plan.topics {
            self.sent("DELETE", &format!("/v1/topics/{}", self.topic(topic)), Bytes::new()).await;
        }
    }

    /// Adds and removes members, and writes down when.
    async fn change_members(&self, topic: usize, add: &[usize], remove: &[usize]) -> bool {
        let names = |users: &[usize]| -> Vec<&str> {
            users.iter().filter_map(|user| Some(self.users.get(*user)?.as_str())).collect()
        };
        let body = json!({"add": names(add), "remove": names(remove)}).to_string();
        let path = format!("/v1/topics/{}/members", self.topic(topic));
        let began = Instant::now();
        let done = self.sent("POST", &path, body.into()).await;
        let ended = match done {
            Sent::Once => Instant::now(),
            // An attempt whose answer was lost may be carried out later.
            Sent::Repeated => Instant::now() + ATTEMPT_LIFE,
            Sent::Refused => began + Duration::from_secs(24 * 3600),
        };
        let mut changes = self.book.topics.changes.lock();
        for (users, joins) in [(add, true), (remove, false)] {
            for user in users {
                changes.entry((topic, *user)).or_default().push(Change { joins, sent: (began, ended) });
            }
        }
        done != Sent::Refused
    }

    /// Sends a request until it is done, at one collect after another. Returns how it went.
    pub(super) async fn sent(&self, method: &str, path: &str, body: Bytes) -> Sent {
        let (began, mut tried) = (Instant::now(), false);
        // A change at one collect must be seen by the others.
        let first = rand::random_range(0..self.plan.publish.len());
        for base in self.plan.publish.iter().cycle().skip(first) {
            let url = format!("{base}{path}");
            let answer = self.http.send(method, &url, Some(&self.key), body.clone(), REQUEST_DEADLINE).await;
            match answer.map(|(status, _)| status) {
                Ok(200..=299) if tried => return Sent::Repeated,
                Ok(200..=299) => return Sent::Once,
                Ok(400..=499) => break,
                _ if began.elapsed() > PUBLISH_DEADLINE => break,
                _ => {}
            }
            tried = true;
            let rest = between(Duration::from_millis(50), Duration::from_millis(500), &mut rand::rng());
            tokio::time::sleep(rest).await;
        }
        Sent::Refused
    }

    /// Publishes to topics at the rate, and changes their members meanwhile.
    pub(super) async fn load_topics(self: Arc<Self>, plan: TopicPlan) {
        tokio::join!(self.publish_to_topics(plan), self.exchange_members(plan), self.publish_to_everyone());
    }

    async fn publish_to_everyone(&self) {
        let (began, mut k) = (Instant::now(), 0);
        while began.elapsed() < self.plan.time {
            let due = began + EVERYONE_EVERY * k;
            if !self.is_due(due).await {
                break;
            }
            self.publish_to_topic(format!("audit-{}-e{k}", self.run), EVERYONE, due).await;
            k += 1;
        }
    }

    async fn publish_to_topics(self: &Arc<Self>, plan: TopicPlan) {
        let mut random = StdRng::seed_from_u64(self.plan.seed + 1);
        let began = Instant::now();
        let total = (plan.rate * self.plan.time.as_secs_f64()).ceil() as u64;
        let mut sending = JoinSet::new();
        for k in 0..total {
            let due = began + Duration::from_secs_f64(k as f64 / plan.rate);
            if !self.is_due(due).await {
                break;
            }
            let (bench, topic) = (Arc::clone(self), random.random_range(0..plan.topics));
            let id = format!("audit-{}-t{k}", self.run);
            sending.spawn(async move { bench.publish_to_topic(id, topic, due).await });
            while sending.try_join_next().is_some() {}
        }
        while sending.join_next().await.is_some() {}
    }

    async fn publish_to_topic(&self, id: String, topic: usize, due: Instant) {
        let to =
            if topic == EVERYONE { json!({"everyone": true}) } else { json!({"topic": self.topic(topic)}) };
        let body = json!({"to": to, "payload": 1, "id": id, "ttl_s": 3600});
        let began = Instant::now();
        if self.sent("POST", "/v1/messages", body.to_string().into()).await != Sent::Refused {
            let message = TopicMessage { topic, due, sent: (began, Instant::now()) };
            self.book.topics.accepted.lock().insert(id, message);
        } else {
            *self.book.refused.lock().entry("topic".to_owned()).or_default() += 1;
        }
    }

    /// Again and again, one member of a topic leaves and another user joins.
    async fn exchange_members(&self, plan: TopicPlan) {
        let mut random = StdRng::seed_from_u64(self.plan.seed + 2);
        let until = Instant::now() + self.plan.time;
        while Instant::now() < until && self.is_due(Instant::now() + CHANGE_EVERY).await {
            let topic = random.random_range(0..plan.topics);
            let (members, others): (Vec<usize>, Vec<usize>) = {
                let changes = self.book.topics.changes.lock();
                let is_member = |user: &usize| {
                    changes.get(&(topic, *user)).and_then(|all| all.last()).is_some_and(|last| last.joins)
                };
                (0..self.users.len()).partition(is_member)
            };
            let leaves = members.into_iter().choose(&mut random);
            let joins = others.into_iter().choose(&mut random);
            self.change_members(topic, joins.as_slice(), leaves.as_slice()).await;
        }
    }

    /// Whether every message has come to everybody to whom it is due.
    pub(super) fn topics_are_settled(&self) -> bool {
        let users = self.book.users.lock();
        let received: Vec<HashSet<&str>> =
            users.iter().map(|user| user.received.iter().map(|one| one.id.as_str()).collect()).collect();
        let (accepted, changes) = (self.book.topics.accepted.lock(), self.book.topics.changes.lock());
        accepted.iter().all(|(id, message)| {
            if message.topic == EVERYONE {
                return received.iter().all(|received| received.contains(id.as_str()));
            }
            changes.iter().filter(|((topic, _), _)| *topic == message.topic).all(|((_, user), all)| {
                due(all, message.sent, self.in_log(message.topic, &users[*user])) != Due::Yes
                    || received[*user].contains(id.as_str())
            })
        })
    }

    /// What explains that a message is due to a user: its topic, and the user's changes beside it.
    fn told(&self, message: &TopicMessage, changes: &[Change]) -> String {
        let sent = message.sent.0;
        let at = |when: Instant| {
            let (after, before) =
                (when.saturating_duration_since(sent), sent.saturating_duration_since(when));
            format!("{:+.1} s", after.as_secs_f64() - before.as_secs_f64())
        };
        let kind = match message.topic {
            EVERYONE => "everyone",
            topic if self.has_log(topic) => "a topic with a log",
            _ => "a topic without a log",
        };
        let changes: Vec<String> = changes
            .iter()
            .map(|change| {
                format!("{} at {}", if change.joins { "joined" } else { "left" }, at(change.sent.0))
            })
            .collect();
        format!("{kind}, accepted at {}; the user {}", at(message.sent.1), changes.join(", "))
    }

    /// Accounts for every message and member.
    ///
    /// # Errors
    ///
    /// What is stored cannot be asked for.
    pub(super) async fn topic_verdict(&self, users: &[UserBook]) -> Result<TopicVerdict> {
        let accepted = std::mem::take(&mut *self.book.topics.accepted.lock());
        let changes = std::mem::take(&mut *self.book.topics.changes.lock());
        let mut verdict = TopicVerdict { messages: accepted.len() as u64, ..TopicVerdict::default() };
        let mut missing: HashMap<usize, Vec<&str>> = HashMap::new();
        for (n, user) in users.iter().enumerate() {
            let mut arrivals: HashMap<&str, (u64, Instant)> = HashMap::new();
            for one in user.received.iter().filter(|one| accepted.contains_key(&one.id)) {
                arrivals.entry(&one.id).or_insert((0, one.at)).0 += 1;
            }
            for (id, message) in &accepted {
                let of = changes.get(&(message.topic, n)).map(Vec::as_slice).unwrap_or_default();
                let due = match message.topic {
                    EVERYONE => Due::Yes,
                    topic => due(of, message.sent, self.in_log(topic, user)),
                };
                match (due, arrivals.get(id.as_str())) {
                    (_, Some((2.., _))) => verdict.again += 1,
                    (Due::No, Some(_)) if message.sent.1 - message.sent.0 < SMOOTH => verdict.wrong += 1,
                    (Due::Perhaps, _) | (Due::No, Some(_)) => verdict.unclear += 1,
                    (Due::Yes, Some((_, at))) => {
                        verdict.once += 1;
                        let delay = at.saturating_duration_since(message.due);
                        verdict.late += u64::from(self.plan.max_delay.is_some_and(|max| delay > max));
                        verdict.delays.push(delay);
                    }
                    (Due::Yes, None) => missing.entry(n).or_default().push(id),
                    _ => {}
                }
            }
        }
        for (user, ids) in missing {
            let mut stored = self.stored(user).await?;
            if !users[user].ready || users[user].refused.is_some() {
                let of = |id: &&str| accepted.get(*id).map(|message| message.topic);
                let logs: HashSet<usize> = ids.iter().filter_map(of).collect();
                for topic in logs.into_iter().filter(|topic| *topic == EVERYONE || self.has_log(*topic)) {
                    let path = match topic {
                        EVERYONE => "/v1/everyone/messages".to_owned(),
                        topic => format!("/v1/topics/{}/messages", self.topic(topic)),
                    };
                    stored.extend(self.stored_in(&path).await?);
                }
            }
            for id in ids {
                let is_away = !users[user].ready || users[user].refused.is_some();
                if is_away && stored.contains(id) {
                    verdict.queued += 1;
                } else {
                    let of = accepted.get(id).map(|message| {
                        let changes = changes.get(&(message.topic, user)).map(Vec::as_slice);
                        self.told(message, changes.unwrap_or_default())
                    });
                    let of = of.unwrap_or_default();
                    super::super::terminal::say(format_args!("lost: {id} of {}: {of}", self.users[user]));
                    verdict.lost += 1;
                }
            }
        }
        verdict.delays.sort_unstable();
        Ok(verdict)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_due_to_whoever_was_a_member_through_the_whole_publish() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let change = |joins: bool, began: u64, ended: u64| Change { joins, sent: (at(began), at(ended)) };
        let all = [change(true, 10, 20), change(false, 100, 110), change(true, 200, 210)];
        for (began, ended, expected) in [
            (0, 5, Due::No),
            (5, 15, Due::Perhaps),
            (20, 30, Due::Perhaps),
            (21, 99, Due::Yes),
            (30, 100, Due::Perhaps),
            (30, 150, Due::Perhaps),
            (111, 199, Due::No),
            (211, 300, Due::Yes),
            (30, 300, Due::Perhaps),
        ] {
            assert_eq!(due(&all, (at(began), at(ended)), None), expected, "{began} to {ended}");
        }
        assert_eq!(due(&[], (at(0), at(1)), None), Due::No);
        let second = 1_000;
        let leave = [change(true, 10, 20), change(false, 100 * second, 100 * second + 10)];
        for (at_s, away_s, expected) in [
            (20, 0, Due::Yes),
            (60, 0, Due::Yes),
            (60, 20, Due::Perhaps),
            (80, 0, Due::Perhaps),
            (130, 0, Due::Perhaps),
            (150, 0, Due::No),
        ] {
            let sent = (at(at_s * second), at(at_s * second + 5));
            assert_eq!(due(&leave, sent, Some(Duration::from_secs(away_s))), expected, "{at_s} s, in a log");
        }
    }
}
