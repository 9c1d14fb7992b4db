//! The members of topics. A membership stands in two keyspaces, by topic and by user, which are
//! written together. By user, the memberships in topics with a log stand in one record
//! ([`super::user_logs`]). Those in topics that deliver to inboxes have a row each: a user may have
//! a thousand, and no socket asks for them.

use std::collections::{HashMap, HashSet};

use fjall::{OwnedWriteBatch, Readable, Snapshot};

use super::records::{prefix, unreadable};
use super::topics::{TopicRecord, encode_membership, life_of, name_of};
use super::{JANITOR_BATCH, Store};
use crate::inbox::InboxError;
use crate::inbox::topics::{LogMembership, MEMBERS_LOT, MemberRefusal, MembersChange, MembersChanged, Topic};
use crate::message::{Seq, TopicName, UserId};
use crate::topic::{Delivery, INBOX_MEMBERS, INBOX_TOPICS, LOG_TOPICS};

fn members_prefix(topic: &TopicName) -> Vec<u8> {
    let mut key = topic.as_str().as_bytes().to_vec();
    key.push(0);
    key
}

fn member_key(topic: &TopicName, user: &UserId) -> Vec<u8> {
    let mut key = members_prefix(topic);
    key.extend_from_slice(user.as_str().as_bytes());
    key
}

fn membership_key(user: &UserId, topic: &TopicName) -> Vec<u8> {
    let mut key = prefix(user);
    key.extend_from_slice(topic.as_str().as_bytes());
    key
}

/// Users who join a topic.
struct Joining<'a> {
    record: TopicRecord,
    /// From where on the log is for them, if the topic has one.
    from: Option<Seq>,
    users: &'a [UserId],
    /// Those who can join no more.
    busy: &'a HashSet<UserId>,
}

impl Joining<'_> {
    /// Why a user cannot join; `room` is how many members the topic can take.
    fn refusal(&self, user: &UserId, room: usize) -> Option<MemberRefusal> {
        match self.from {
            _ if room == 0 => Some(MemberRefusal::TopicIsFull),
            _ if !self.busy.contains(user) => None,
            Some(_) => Some(MemberRefusal::TooManyLogs),
            None => Some(MemberRefusal::TooManyTopics),
        }
    }
}

impl Store {
    /// In lots, so that appends do not wait for a long list.
    pub(super) fn change(
        &self,
        name: &TopicName,
        change: &MembersChange,
    ) -> Result<MembersChanged, InboxError> {
        let (mut added, mut removed, mut refused) = (0, 0, Vec::new());
        let mut life = None;
        let lots = change.remove.chunks(MEMBERS_LOT).map(|lot| (lot, false));
        for (lot, joins) in lots.chain(change.add.chunks(MEMBERS_LOT).map(|lot| (lot, true))) {
            let is_log = change.from.is_some();
            let busy = if joins { self.users_with_many_topics(lot, is_log)? } else { HashSet::new() };
            let _writer = self.writer.lock();
            let snapshot = self.db.snapshot();
            let Some(mut record) = self.alive(&snapshot, name)? else {
                return Ok(if life.is_none() { MembersChanged::NoTopic } else { MembersChanged::Ended });
            };
            let is_other = (record.delivery == Delivery::Log) != is_log;
            if *life.get_or_insert(record.life) != record.life || is_other {
                return Ok(MembersChanged::Ended);
            }
            let mut pending = self.synced_batch();
            if joins {
                let joining = Joining { record, from: change.from, users: lot, busy: &busy };
                added += self.join(&snapshot, name, &joining, &mut pending, &mut refused)?;
            } else {
                removed += self.leave(&snapshot, (name, record), lot, &mut pending)?;
            }
            record.changes += 1;
            pending.insert(&self.topics, name.as_str(), record.encode());
            self.commit(pending)?;
        }
        Ok(MembersChanged::Done { added, removed, refused })
    }

    fn leave(
        &self,
        snapshot: &Snapshot,
        (name, record): (&TopicName, TopicRecord),
        users: &[UserId],
        pending: &mut OwnedWriteBatch,
    ) -> Result<u64, InboxError> {
        let mut count = 0;
        for user in users {
            let key = member_key(name, user);
            let leaves = self.is_member(snapshot, &key, record.life)?;
            if leaves {
                pending.remove(&self.topic_members, key);
                count += 1;
            }
            match record.delivery {
                Delivery::Log => self.change_user_logs(snapshot, pending, user, |found| {
                    found.leave(name);
                    Ok(())
                })?,
                Delivery::Inbox if leaves => pending.remove(&self.user_topics, membership_key(user, name)),
                Delivery::Inbox => {}
            }
        }
        Ok(count)
    }

    fn join(
        &self,
        snapshot: &Snapshot,
        name: &TopicName,
        joining: &Joining<'_>,
        pending: &mut OwnedWriteBatch,
        refused: &mut Vec<(UserId, MemberRefusal)>,
    ) -> Result<u64, InboxError> {
        let (life, from) = (joining.record.life, joining.from);
        let mut room = match from {
            Some(_) => usize::MAX,
            None => {
                let members = self.members_of(snapshot, (name, life), None, INBOX_MEMBERS)?.len();
                INBOX_MEMBERS.saturating_sub(members)
            }
        };
        let mut count = 0;
        for user in joining.users {
            let key = member_key(name, user);
            let mut joins = !self.is_member(snapshot, &key, life)?;
            if joins && let Some(why) = joining.refusal(user, room) {
                refused.push((user.clone(), why));
                joins = false;
            }
            let value = encode_membership(life, from);
            if joins {
                pending.insert(&self.topic_members, key, &*value);
                room -= 1;
                count += 1;
                // An earlier life of the name may have delivered to inboxes.
                let by_user = membership_key(user, name);
                if from.is_some() && snapshot.contains_key(&self.user_topics, &by_user).map_err(unreadable)? {
                    pending.remove(&self.user_topics, by_user);
                }
            }
            match from {
                Some(from) => self.change_user_logs(snapshot, pending, user, |found| {
                    if joins {
                        self.make_room(snapshot, &mut found.logs)?;
                        found.join(LogMembership { topic: name.clone(), life, from });
                    }
                    Ok(())
                })?,
                None if joins => pending.insert(&self.user_topics, membership_key(user, name), &*value),
                None => {}
            }
        }
        Ok(count)
    }

    /// Those who can join no more. Without the writer's lock: it may take long, and the limit is
    /// soft.
    fn users_with_many_topics(&self, users: &[UserId], logs: bool) -> Result<HashSet<UserId>, InboxError> {
        let snapshot = self.db.snapshot();
        let mut found = HashSet::new();
        for user in users {
            // Those of topics that have ended count until they are removed: then it is looked
            // closely.
            let is_busy = if logs {
                let mut known = self.user_logs_of(&snapshot, user)?.logs;
                self.make_room(&snapshot, &mut known)?;
                known.len() >= LOG_TOPICS
            } else {
                let rows = snapshot.prefix(&self.user_topics, prefix(user)).take(INBOX_TOPICS).count();
                let is_same = |topic: &&Topic| topic.delivery == Delivery::Inbox;
                rows == INBOX_TOPICS && self.topics_of(user)?.iter().filter(is_same).count() >= INBOX_TOPICS
            };
            if is_busy {
                found.insert(user.clone());
            }
        }
        Ok(found)
    }

    fn is_member(&self, snapshot: &Snapshot, key: &[u8], life: u64) -> Result<bool, InboxError> {
        let raw = snapshot.get(&self.topic_members, key).map_err(unreadable)?;
        Ok(raw.map(|raw| life_of(&raw)).transpose()? == Some(life))
    }

    pub(super) fn members_of(
        &self,
        snapshot: &Snapshot,
        (name, life): (&TopicName, u64),
        after: Option<&UserId>,
        limit: usize,
    ) -> Result<Vec<UserId>, InboxError> {
        let prefix = members_prefix(name);
        let mut from = prefix.clone();
        if let Some(after) = after {
            from = member_key(name, after);
            from.push(0);
        }
        let mut found = Vec::new();
        for entry in snapshot.range(&self.topic_members, from..) {
            let (key, value) = entry.into_inner().map_err(unreadable)?;
            let Some(user) = key.strip_prefix(prefix.as_slice()) else { break };
            if found.len() == limit {
                break;
            }
            if life_of(&value)? == life
                && let Some(user) = std::str::from_utf8(user).ok().and_then(|user| UserId::parse(user).ok())
            {
                found.push(user);
            }
        }
        Ok(found)
    }

    pub(super) fn topics_of(&self, user: &UserId) -> Result<Vec<Topic>, InboxError> {
        let snapshot = self.db.snapshot();
        let prefix = prefix(user);
        let mut found = Vec::new();
        for entry in snapshot.prefix(&self.user_topics, &prefix) {
            let (key, value) = entry.into_inner().map_err(unreadable)?;
            let Some(name) = name_of(key.get(prefix.len()..).unwrap_or_default()) else { continue };
            if let Some(record) = self.alive_in(&snapshot, &name, life_of(&value)?)? {
                found.push(record.named(name));
            }
        }
        for LogMembership { topic, life, .. } in self.user_logs_of(&snapshot, user)?.logs {
            if let Some(record) = self.alive_in(&snapshot, &topic, life)? {
                found.push(record.named(topic));
            }
        }
        found.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(found)
    }

    /// Removes the memberships of lives that are over.
    pub(super) fn clean_topics(&self) -> Result<(), InboxError> {
        let snapshot = self.db.snapshot();
        let mut over = Vec::new();
        let mut topic: Option<(TopicName, u64)> = None;
        for entry in snapshot.iter(&self.topic_members) {
            let (key, value) = entry.into_inner().map_err(unreadable)?;
            let mut parts = key.splitn(2, |byte| *byte == 0);
            let name = parts.next().and_then(name_of);
            let user = parts.next().and_then(|user| std::str::from_utf8(user).ok());
            let (Some(name), Some(user)) = (name, user.and_then(|user| UserId::parse(user).ok())) else {
                continue;
            };
            if topic.as_ref().is_none_or(|known| known.0 != name) {
                let alive = self.alive(&snapshot, &name)?;
                topic = Some((name.clone(), alive.map_or(u64::MAX, |record| record.life)));
            }
            if life_of(&value)? < topic.as_ref().map_or(0, |known| known.1) {
                over.push((name, user));
            }
        }
        for lot in over.chunks(JANITOR_BATCH) {
            let _writer = self.writer.lock();
            let snapshot = self.db.snapshot();
            let mut pending = self.db.batch();
            let mut ended: HashMap<&UserId, HashMap<&TopicName, u64>> = HashMap::new();
            for (name, user) in lot {
                // The user may have joined the next life since.
                let key = member_key(name, user);
                let life = self.alive(&snapshot, name)?.map_or(0, |record| record.life);
                if !self.is_member(&snapshot, &key, life)? {
                    pending.remove(&self.topic_members, key);
                    // The lives of a name may have been of both deliveries.
                    pending.remove(&self.user_topics, membership_key(user, name));
                    ended.entry(user).or_default().insert(name, life);
                }
            }
            self.end_user_logs(&snapshot, &mut pending, &ended);
            self.commit(pending)?;
        }
        Ok(())
    }
}
