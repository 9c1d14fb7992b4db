//! Topics as a model, for tests.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use futures_util::future::{BoxFuture, FutureExt, ready};
use parking_lot::Mutex;

use super::MemoryInbox;
use crate::inbox::InboxError;
use crate::inbox::topics::{
    MemberRefusal, MembersChange, MembersChanged, MembersVersion, PutTopic, Topic, TopicRecipients,
    TopicSettings, Topics,
};
use crate::message::{TopicName, UserId};
use crate::topic::{INBOX_MEMBERS, INBOX_TOPICS};

/// The topics of a [`MemoryInbox`].
#[derive(Default)]
pub(super) struct Directory {
    topics: Mutex<BTreeMap<TopicName, (Topic, BTreeSet<UserId>)>>,
    last_lives: Mutex<HashMap<TopicName, u64>>,
}

impl MemoryInbox {
    fn put_topic(&self, name: TopicName, settings: TopicSettings) -> PutTopic {
        let mut topics = self.directory.topics.lock();
        if let Some((topic, _)) = topics.get_mut(&name) {
            topic.ttl_s = settings.ttl_s.unwrap_or(topic.ttl_s);
            return PutTopic::Known(topic.clone());
        }
        let mut lives = self.directory.last_lives.lock();
        let life = lives.entry(name.clone()).or_default();
        *life += 1;
        let topic = Topic {
            name: name.clone(),
            delivery: settings.delivery,
            ttl_s: settings.ttl_s.unwrap_or(settings.default_ttl_s),
            created_at: self.clock.now(),
            version: MembersVersion { life: *life, changes: 0, draw: 0 },
        };
        topics.insert(name, (topic.clone(), BTreeSet::new()));
        PutTopic::Created(topic)
    }

    fn admit(&self, name: &TopicName, change: MembersChange) -> MembersChanged {
        let mut topics = self.directory.topics.lock();
        let all = |user: &UserId| topics.values().filter(|(_, members)| members.contains(user)).count();
        let counts: HashMap<UserId, usize> =
            change.add.iter().map(|user| (user.clone(), all(user))).collect();
        let Some((topic, members)) = topics.get_mut(name) else { return MembersChanged::NoTopic };
        let removed = change.remove.iter().filter(|user| members.remove(user)).count() as u64;
        let (mut added, mut refused) = (0, Vec::new());
        for user in change.add {
            if members.contains(&user) {
                continue;
            }
            if members.len() >= INBOX_MEMBERS {
                refused.push((user, MemberRefusal::TopicIsFull));
            } else if counts[&user] >= INBOX_TOPICS {
                refused.push((user, MemberRefusal::TooManyTopics));
            } else {
                members.insert(user);
                added += 1;
            }
        }
        topic.version.changes += 1;
        MembersChanged::Done { added, removed, refused }
    }
}

impl Topics for MemoryInbox {
    fn put(&self, topic: TopicName, settings: TopicSettings) -> BoxFuture<'_, Result<PutTopic, InboxError>> {
        ready(Ok(self.put_topic(topic, settings))).boxed()
    }

    fn topic(&self, topic: TopicName) -> BoxFuture<'_, Result<Option<Topic>, InboxError>> {
        ready(Ok(self.directory.topics.lock().get(&topic).map(|found| found.0.clone()))).boxed()
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
        let found = topics.values().map(|found| &found.0).filter(|topic| {
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
        let page = topics.get(&topic).map(|(_, members)| {
            let above = members.iter().filter(|user| after.as_ref().is_none_or(|after| *user > after));
            above.take(limit).cloned().collect()
        });
        ready(Ok(page)).boxed()
    }

    fn count_members(&self, topic: TopicName) -> BoxFuture<'_, Result<u64, InboxError>> {
        let count = self.directory.topics.lock().get(&topic).map_or(0, |found| found.1.len() as u64);
        ready(Ok(count)).boxed()
    }

    fn topics_of(&self, user: UserId) -> BoxFuture<'_, Result<Vec<Topic>, InboxError>> {
        let topics = self.directory.topics.lock();
        let of = topics.values().filter(|(_, members)| members.contains(&user));
        ready(Ok(of.map(|found| found.0.clone()).collect())).boxed()
    }

    fn recipients(
        &self,
        topic: TopicName,
        known: Option<MembersVersion>,
    ) -> BoxFuture<'_, Result<TopicRecipients, InboxError>> {
        let answer = match self.directory.topics.lock().get(&topic) {
            None => TopicRecipients::NoTopic,
            Some((topic, _)) if known == Some(topic.version) => TopicRecipients::Known(topic.clone()),
            Some((topic, members)) => TopicRecipients::Read(topic.clone(), members.iter().cloned().collect()),
        };
        ready(Ok(answer)).boxed()
    }
}
