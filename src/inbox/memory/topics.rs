//! Topics as a model, for tests.

use std::collections::{BTreeMap, HashMap};

use futures_util::future::{BoxFuture, FutureExt, ready};
use parking_lot::Mutex;

use super::MemoryInbox;
use crate::inbox::InboxError;
use crate::inbox::topics::{
    LogMembership, MemberRefusal, MembersChange, MembersChanged, MembersVersion, Memberships, PutTopic,
    Topic, TopicRecipients, TopicSettings, Topics,
};
use crate::message::{Seq, TopicName, UserId};
use crate::topic::{Delivery, INBOX_MEMBERS, INBOX_TOPICS, LOG_TOPICS};

/// The topics of a [`MemoryInbox`].
#[derive(Default)]
pub(super) struct Directory {
    topics: Mutex<BTreeMap<TopicName, Entry>>,
    last_lives: Mutex<HashMap<TopicName, u64>>,
    /// How often the memberships of a user in topics with a log have changed.
    versions: Mutex<HashMap<UserId, u64>>,
}

struct Entry {
    topic: Topic,
    /// The members, and from where on a log is for them.
    members: BTreeMap<UserId, Seq>,
}

impl Entry {
    fn is_log(&self) -> bool {
        self.topic.delivery == Delivery::Log
    }
}

impl Directory {
    pub(super) fn version_of(&self, user: &UserId) -> u64 {
        self.versions.lock().get(user).copied().unwrap_or(0)
    }
}

impl MemoryInbox {
    fn put_topic(&self, name: TopicName, settings: TopicSettings) -> PutTopic {
        let mut topics = self.directory.topics.lock();
        if let Some(Entry { topic, .. }) = topics.get_mut(&name) {
            if settings.is_other_than(topic) {
                return PutTopic::Other(topic.clone());
            }
            topic.ttl_s = settings.ttl_s.unwrap_or(topic.ttl_s);
            return PutTopic::Known(topic.clone());
        }
        let mut lives = self.directory.last_lives.lock();
        let life = lives.entry(name.clone()).or_default();
        *life += 1;
        let topic = Topic {
            name: name.clone(),
            delivery: settings.delivery.unwrap_or(Delivery::Inbox),
            ttl_s: settings.ttl_s.unwrap_or(settings.default_ttl_s),
            created_at: self.clock.now(),
            version: MembersVersion { life: *life, changes: 0, draw: 0 },
        };
        topics.insert(name, Entry { topic: topic.clone(), members: BTreeMap::new() });
        PutTopic::Created(topic)
    }

    fn admit(&self, name: &TopicName, change: MembersChange) -> MembersChanged {
        let mut topics = self.directory.topics.lock();
        let is_log = topics.get(name).is_some_and(Entry::is_log);
        let all = |user: &UserId| {
            let same = topics.values().filter(|entry| entry.is_log() == is_log);
            same.filter(|entry| entry.members.contains_key(user)).count()
        };
        let counts: HashMap<UserId, usize> =
            change.add.iter().map(|user| (user.clone(), all(user))).collect();
        let Some(Entry { topic, members }) = topics.get_mut(name) else { return MembersChanged::NoTopic };
        if is_log != change.from.is_some() {
            return MembersChanged::Ended;
        }
        if is_log {
            let mut versions = self.directory.versions.lock();
            for user in change.add.iter().chain(&change.remove) {
                *versions.entry(user.clone()).or_default() += 1;
            }
        }
        let removed = change.remove.iter().filter(|user| members.remove(*user).is_some()).count() as u64;
        let (mut added, mut refused) = (0, Vec::new());
        for user in change.add {
            if members.contains_key(&user) {
                continue;
            }
            if !is_log && members.len() >= INBOX_MEMBERS {
                refused.push((user, MemberRefusal::TopicIsFull));
            } else if !is_log && counts[&user] >= INBOX_TOPICS {
                refused.push((user, MemberRefusal::TooManyTopics));
            } else if is_log && counts[&user] >= LOG_TOPICS {
                refused.push((user, MemberRefusal::TooManyLogs));
            } else {
                members.insert(user, change.from.unwrap_or_default());
                added += 1;
            }
        }
        topic.version.changes += 1;
        MembersChanged::Done { added, removed, refused }
    }

    fn memberships(&self, user: &UserId) -> Memberships {
        let topics = self.directory.topics.lock();
        let of = |entry: &Entry| {
            let from = *entry.members.get(user)?;
            Some(LogMembership { topic: entry.topic.name.clone(), life: entry.topic.version.life, from })
        };
        let logs = topics.values().filter(|entry| entry.is_log()).filter_map(of).collect();
        Memberships { version: self.directory.version_of(user), logs }
    }
}

impl Topics for MemoryInbox {
    fn put(&self, topic: TopicName, settings: TopicSettings) -> BoxFuture<'_, Result<PutTopic, InboxError>> {
        ready(Ok(self.put_topic(topic, settings))).boxed()
    }

    fn topic(&self, topic: TopicName) -> BoxFuture<'_, Result<Option<Topic>, InboxError>> {
        ready(Ok(self.directory.topics.lock().get(&topic).map(|found| found.topic.clone()))).boxed()
    }

    fn topics_named(&self, names: Vec<TopicName>) -> BoxFuture<'_, Result<Vec<Option<Topic>>, InboxError>> {
        let topics = self.directory.topics.lock();
        let found = names.iter().map(|name| topics.get(name).map(|found| found.topic.clone()));
        ready(Ok(found.collect())).boxed()
    }

    fn remove(&self, topic: TopicName) -> BoxFuture<'_, Result<bool, InboxError>> {
        ready(Ok(self.directory.topics.lock().remove(&topic).is_some())).boxed()
    }

    fn list(
        &self,
        prefix: String,
        after: Option<TopicName>,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<Topic>, InboxError>> {
        let topics = self.directory.topics.lock();
        let found = topics.values().map(|found| &found.topic).filter(|topic| {
            topic.name.as_str().starts_with(&prefix) && after.as_ref().is_none_or(|after| topic.name > *after)
        });
        ready(Ok(found.take(limit).cloned().collect())).boxed()
    }

    fn change_members(
        &self,
        topic: TopicName,
        change: MembersChange,
    ) -> BoxFuture<'_, Result<MembersChanged, InboxError>> {
        ready(Ok(self.admit(&topic, change))).boxed()
    }

    fn members(
        &self,
        topic: TopicName,
        after: Option<UserId>,
        limit: usize,
    ) -> BoxFuture<'_, Result<Option<Vec<UserId>>, InboxError>> {
        let topics = self.directory.topics.lock();
        let page = topics.get(&topic).map(|entry| {
            let above = entry.members.keys().filter(|user| after.as_ref().is_none_or(|after| *user > after));
            above.take(limit).cloned().collect()
        });
        ready(Ok(page)).boxed()
    }

    fn count_members(&self, topic: TopicName) -> BoxFuture<'_, Result<u64, InboxError>> {
        let count = self.directory.topics.lock().get(&topic).map_or(0, |found| found.members.len() as u64);
        ready(Ok(count)).boxed()
    }

    fn topics_of(&self, user: UserId) -> BoxFuture<'_, Result<Vec<Topic>, InboxError>> {
        let topics = self.directory.topics.lock();
        let of = topics.values().filter(|entry| entry.members.contains_key(&user));
        ready(Ok(of.map(|found| found.topic.clone()).collect())).boxed()
    }

    fn log_memberships(&self, users: Vec<UserId>) -> BoxFuture<'_, Result<Vec<Memberships>, InboxError>> {
        ready(Ok(users.iter().map(|user| self.memberships(user)).collect())).boxed()
    }

    fn recipients(
        &self,
        topic: TopicName,
        known: Option<MembersVersion>,
    ) -> BoxFuture<'_, Result<TopicRecipients, InboxError>> {
        let answer = match self.directory.topics.lock().get(&topic) {
            None => TopicRecipients::NoTopic,
            Some(entry) if entry.is_log() => TopicRecipients::Log(entry.topic.clone()),
            Some(Entry { topic, .. }) if known == Some(topic.version) => {
                TopicRecipients::Known(topic.clone())
            }
            Some(Entry { topic, members }) => {
                TopicRecipients::Read(topic.clone(), members.keys().cloned().collect())
            }
        };
        ready(Ok(answer)).boxed()
    }
}
