//! Topics and their members.
//!
//! A membership stands in two keyspaces, by topic and by user, which are written together. A row of
//! another life than its topic's counts nowhere; the janitor removes it.

use bytes::BufMut;
use fjall::{OwnedWriteBatch, PersistMode, Readable, Snapshot};
use futures_util::future::BoxFuture;

use super::records::{corrupt, take_u64, unreadable};
use super::{EmbeddedInbox, Store};
use crate::inbox::InboxError;
use crate::inbox::topics::{
    MembersChange, MembersChanged, MembersVersion, Memberships, PutTopic, Topic, TopicRecipients,
    TopicSettings, Topics,
};
use crate::message::{Millis, Seq, TopicName, UserId};
use crate::topic::Delivery;

/// Version of the encoding of a topic.
const TOPIC_LAYOUT: u8 = 1;
/// The bytes of the deliveries.
const DELIVERIES: [(u8, Delivery); 2] = [(0, Delivery::Inbox), (1, Delivery::Log)];

/// A topic as it is stored. It stays when the topic ends, so that no life is given twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TopicRecord {
    pub(super) delivery: Delivery,
    /// 0 while the name is free.
    pub(super) life: u64,
    /// The last life that was given.
    last: u64,
    pub(super) changes: u64,
    ttl_s: u64,
    created_at: Millis,
}

impl TopicRecord {
    pub(super) fn encode(self) -> Vec<u8> {
        let mut out = Vec::with_capacity(42);
        out.put_u8(TOPIC_LAYOUT);
        let byte = DELIVERIES.iter().find(|(_, delivery)| *delivery == self.delivery);
        out.put_u8(byte.map_or(u8::MAX, |(byte, _)| *byte));
        for number in [self.life, self.last, self.changes, self.ttl_s, self.created_at.0] {
            out.put_u64(number);
        }
        out
    }

    fn decode(raw: &[u8]) -> Result<Self, InboxError> {
        let [TOPIC_LAYOUT, delivery, raw @ ..] = raw else { return Err(corrupt("a topic")) };
        let delivery = DELIVERIES.iter().find(|(byte, _)| byte == delivery);
        let delivery = delivery.ok_or_else(|| corrupt("a topic"))?.1;
        let mut raw = raw;
        let mut next = || take_u64(&mut raw);
        Ok(Self {
            delivery,
            life: next()?,
            last: next()?,
            changes: next()?,
            ttl_s: next()?,
            created_at: Millis(next()?),
        })
    }

    fn is_alive(&self) -> bool {
        self.life != 0
    }

    pub(super) fn named(self, name: TopicName) -> Topic {
        Topic {
            name,
            delivery: self.delivery,
            ttl_s: self.ttl_s,
            created_at: self.created_at,
            version: MembersVersion { life: self.life, changes: self.changes, draw: 0 },
        }
    }
}

pub(super) fn name_of(key: &[u8]) -> Option<TopicName> {
    TopicName::parse(std::str::from_utf8(key).ok()?).ok()
}

pub(super) fn life_of(mut raw: &[u8]) -> Result<u64, InboxError> {
    take_u64(&mut raw)
}

/// The life in a membership, and from where on a log is for the member.
pub(super) fn membership_of(mut raw: &[u8]) -> Result<(u64, Option<Seq>), InboxError> {
    let life = take_u64(&mut raw)?;
    Ok((life, take_u64(&mut raw).ok().map(Seq::at)))
}

pub(super) fn encode_membership(life: u64, from: Option<Seq>) -> Vec<u8> {
    let mut out = life.to_be_bytes().to_vec();
    out.extend(from.into_iter().flat_map(|from| from.get().to_be_bytes()));
    out
}

impl Store {
    fn record(&self, snapshot: &Snapshot, name: &TopicName) -> Result<Option<TopicRecord>, InboxError> {
        let raw = snapshot.get(&self.topics, name.as_str()).map_err(unreadable)?;
        raw.map(|raw| TopicRecord::decode(&raw)).transpose()
    }

    pub(super) fn alive(
        &self,
        snapshot: &Snapshot,
        name: &TopicName,
    ) -> Result<Option<TopicRecord>, InboxError> {
        Ok(self.record(snapshot, name)?.filter(TopicRecord::is_alive))
    }

    /// The life of a topic as it is now; 0 if it has none.
    pub(super) fn life_now(&self, name: &TopicName) -> Result<u64, InboxError> {
        self.lives.of(name, || {
            let raw = self.topics.get(name.as_str()).map_err(unreadable)?;
            raw.map_or(Ok(0), |raw| Ok(TopicRecord::decode(&raw)?.life))
        })
    }

    /// The topic, if it is in this life of its name.
    pub(super) fn alive_in(
        &self,
        snapshot: &Snapshot,
        name: &TopicName,
        life: u64,
    ) -> Result<Option<TopicRecord>, InboxError> {
        Ok(self.alive(snapshot, name)?.filter(|record| record.life == life))
    }

    pub(super) fn synced_batch(&self) -> OwnedWriteBatch {
        self.db.batch().durability(Some(PersistMode::SyncData))
    }

    fn put_topic(&self, name: TopicName, settings: TopicSettings) -> Result<PutTopic, InboxError> {
        let _writer = self.writer.lock();
        let known = self.record(&self.db.snapshot(), &name)?;
        let is_new = !known.is_some_and(|record| record.is_alive());
        let record = match known.filter(TopicRecord::is_alive) {
            Some(record) if settings.is_other_than(&record.named(name.clone())) => {
                return Ok(PutTopic::Other(record.named(name)));
            }
            Some(record) => TopicRecord { ttl_s: settings.ttl_s.unwrap_or(record.ttl_s), ..record },
            None => {
                let life = known.map_or(0, |record| record.last) + 1;
                TopicRecord {
                    delivery: settings.delivery.unwrap_or(Delivery::Inbox),
                    life,
                    last: life,
                    changes: 0,
                    ttl_s: settings.ttl_s.unwrap_or(settings.default_ttl_s),
                    created_at: self.clock.now(),
                }
            }
        };
        let mut pending = self.synced_batch();
        pending.insert(&self.topics, name.as_str(), record.encode());
        let committed = self.commit(pending);
        if is_new {
            self.lives.changed();
        }
        committed?;
        let topic = record.named(name);
        Ok(if is_new { PutTopic::Created(topic) } else { PutTopic::Known(topic) })
    }

    fn remove_topic(&self, name: &TopicName) -> Result<bool, InboxError> {
        let _writer = self.writer.lock();
        let Some(record) = self.alive(&self.db.snapshot(), name)? else { return Ok(false) };
        let mut pending = self.synced_batch();
        pending.insert(&self.topics, name.as_str(), TopicRecord { life: 0, ..record }.encode());
        let committed = self.commit(pending);
        self.lives.changed();
        committed?;
        Ok(true)
    }

    fn list_topics(
        &self,
        prefix: &str,
        after: Option<&TopicName>,
        limit: usize,
    ) -> Result<Vec<Topic>, InboxError> {
        let mut from = prefix.as_bytes().to_vec();
        if let Some(after) = after
            && after.as_str().as_bytes() >= from.as_slice()
        {
            // The smallest name above it.
            from = [after.as_str().as_bytes(), &[0]].concat();
        }
        let mut found = Vec::new();
        for entry in self.db.snapshot().range(&self.topics, from..) {
            let (key, value) = entry.into_inner().map_err(unreadable)?;
            if found.len() == limit || !key.starts_with(prefix.as_bytes()) {
                break;
            }
            // A topic of a newer version is not shown.
            let Ok(record) = TopicRecord::decode(&value) else { continue };
            if let Some(name) = name_of(&key).filter(|_| record.is_alive()) {
                found.push(record.named(name));
            }
        }
        Ok(found)
    }

    fn recipients(
        &self,
        name: TopicName,
        known: Option<MembersVersion>,
    ) -> Result<TopicRecipients, InboxError> {
        let snapshot = self.db.snapshot();
        let Some(record) = self.alive(&snapshot, &name)? else { return Ok(TopicRecipients::NoTopic) };
        let topic = record.named(name);
        if topic.delivery == Delivery::Log {
            return Ok(TopicRecipients::Log(topic));
        }
        if known == Some(topic.version) {
            return Ok(TopicRecipients::Known(topic));
        }
        let members = self.members_of(&snapshot, (&topic.name, record.life), None, usize::MAX)?;
        Ok(TopicRecipients::Read(topic, members))
    }
}

impl Topics for EmbeddedInbox {
    fn put(&self, topic: TopicName, settings: TopicSettings) -> BoxFuture<'_, Result<PutTopic, InboxError>> {
        self.run(move |store| store.put_topic(topic, settings))
    }

    fn topic(&self, topic: TopicName) -> BoxFuture<'_, Result<Option<Topic>, InboxError>> {
        self.run(move |store| {
            Ok(store.alive(&store.db.snapshot(), &topic)?.map(|record| record.named(topic)))
        })
    }

    fn topics_named(&self, names: Vec<TopicName>) -> BoxFuture<'_, Result<Vec<Option<Topic>>, InboxError>> {
        self.run(move |store| {
            let snapshot = store.db.snapshot();
            let find = |name: TopicName| Ok(store.alive(&snapshot, &name)?.map(|record| record.named(name)));
            names.into_iter().map(find).collect()
        })
    }

    fn log_memberships(&self, users: Vec<UserId>) -> BoxFuture<'_, Result<Vec<Memberships>, InboxError>> {
        if let [user] = users.as_slice() {
            // On the caller's thread, like a position that is looked up alone.
            let user = user.clone();
            return Box::pin(async move { self.store.memberships(&user).map(|found| vec![found]) });
        }
        self.run(move |store| users.iter().map(|user| store.memberships(user)).collect())
    }

    fn remove(&self, topic: TopicName) -> BoxFuture<'_, Result<bool, InboxError>> {
        self.run(move |store| store.remove_topic(&topic))
    }

    fn list(
        &self,
        prefix: String,
        after: Option<TopicName>,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<Topic>, InboxError>> {
        self.run(move |store| store.list_topics(&prefix, after.as_ref(), limit))
    }

    fn change_members(
        &self,
        topic: TopicName,
        change: MembersChange,
    ) -> BoxFuture<'_, Result<MembersChanged, InboxError>> {
        self.run(move |store| store.change(&topic, &change))
    }

    fn members(
        &self,
        topic: TopicName,
        after: Option<UserId>,
        limit: usize,
    ) -> BoxFuture<'_, Result<Option<Vec<UserId>>, InboxError>> {
        self.run(move |store| {
            let snapshot = store.db.snapshot();
            let Some(record) = store.alive(&snapshot, &topic)? else { return Ok(None) };
            store.members_of(&snapshot, (&topic, record.life), after.as_ref(), limit).map(Some)
        })
    }

    fn count_members(&self, topic: TopicName) -> BoxFuture<'_, Result<u64, InboxError>> {
        self.run(move |store| {
            let snapshot = store.db.snapshot();
            let Some(record) = store.alive(&snapshot, &topic)? else { return Ok(0) };
            Ok(store.members_of(&snapshot, (&topic, record.life), None, usize::MAX)?.len() as u64)
        })
    }

    fn topics_of(&self, user: UserId) -> BoxFuture<'_, Result<Vec<Topic>, InboxError>> {
        self.run(move |store| store.topics_of(&user))
    }

    fn recipients(
        &self,
        topic: TopicName,
        known: Option<MembersVersion>,
    ) -> BoxFuture<'_, Result<TopicRecipients, InboxError>> {
        self.run(move |store| store.recipients(topic, known))
    }
}
