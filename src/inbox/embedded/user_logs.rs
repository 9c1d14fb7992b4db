//! The memberships of a user in topics with a log. They stand in one record, which a socket that
//! opens reads in one look, whatever their number. Whether each of the topics goes on is looked up
//! besides.

use std::collections::HashMap;

use bytes::BufMut;
use fjall::{Keyspace, OwnedWriteBatch, PersistMode, Readable, Snapshot};

use super::Store;
use super::records::{corrupt, head_key, prefix, put_name, take_u64, unreadable, user_of};
use super::topics::{membership_of, name_of};
use crate::inbox::InboxError;
use crate::inbox::topics::{LogMembership, Memberships};
use crate::message::{Seq, TopicName, UserId};
use crate::topic::LOG_TOPICS;

/// Users of an earlier layout that are taken over in one commit.
const TAKEN_AT_ONCE: usize = 1_000;

/// What stands in the record of a user.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct UserLogs {
    /// How often the memberships have changed.
    pub(super) changes: u64,
    /// At most one for a topic.
    pub(super) logs: Vec<LogMembership>,
}

impl UserLogs {
    /// Replaces the membership in the same topic, if there is one.
    pub(super) fn join(&mut self, membership: LogMembership) {
        self.leave(&membership.topic);
        self.logs.push(membership);
    }

    pub(super) fn leave(&mut self, topic: &TopicName) {
        self.logs.retain(|known| known.topic != *topic);
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(8 + self.logs.len() * 48);
        out.put_u64(self.changes);
        for LogMembership { topic, life, from } in &self.logs {
            put_name(&mut out, topic.as_str());
            out.put_u64(*life);
            out.put_u64(from.get());
        }
        out
    }

    fn decode(mut raw: &[u8]) -> Result<Self, InboxError> {
        let changes = take_u64(&mut raw)?;
        let mut logs = Vec::new();
        while let Some((length, rest)) = raw.split_first() {
            let part = rest.split_at_checked(usize::from(*length));
            let (name, rest) = part.ok_or_else(|| corrupt("the memberships of a user"))?;
            raw = rest;
            let topic = name_of(name).ok_or_else(|| corrupt("the memberships of a user"))?;
            logs.push(LogMembership { topic, life: take_u64(&mut raw)?, from: Seq::at(take_u64(&mut raw)?) });
        }
        Ok(Self { changes, logs })
    }
}

/// Removes the memberships in lives of topics that are over.
fn keep_living(
    logs: &mut Vec<LogMembership>,
    goes_on: impl Fn(&LogMembership) -> Result<bool, InboxError>,
) -> Result<(), InboxError> {
    let mut over = Vec::new();
    for membership in logs.iter() {
        if !goes_on(membership)? {
            over.push(membership.topic.clone());
        }
    }
    logs.retain(|known| !over.contains(&known.topic));
    Ok(())
}

impl Store {
    /// Also those in lives of topics that are over.
    pub(super) fn user_logs_of(&self, snapshot: &Snapshot, user: &UserId) -> Result<UserLogs, InboxError> {
        let raw = snapshot.get(&self.user_logs, head_key(user)).map_err(unreadable)?;
        raw.map_or_else(|| Ok(UserLogs::default()), |raw| UserLogs::decode(&raw))
    }

    /// Changes the memberships of a user who is in no other change of this batch. The number of
    /// changes rises even if nothing has changed, so that a repeat mends what a crash left.
    pub(super) fn change_user_logs(
        &self,
        snapshot: &Snapshot,
        pending: &mut OwnedWriteBatch,
        user: &UserId,
        change: impl FnOnce(&mut UserLogs) -> Result<(), InboxError>,
    ) -> Result<(), InboxError> {
        let mut found = self.user_logs_of(snapshot, user)?;
        change(&mut found)?;
        found.changes += 1;
        self.put_user_logs(pending, user, &found);
        Ok(())
    }

    pub(super) fn put_user_logs(&self, pending: &mut OwnedWriteBatch, user: &UserId, found: &UserLogs) {
        pending.insert(&self.user_logs, head_key(user), found.encode());
    }

    /// How often the memberships of a user have changed.
    pub(super) fn changes_of(&self, snapshot: &Snapshot, user: &UserId) -> Result<u64, InboxError> {
        let raw = snapshot.get(&self.user_logs, head_key(user)).map_err(unreadable)?;
        raw.map_or(Ok(0), |raw| take_u64(&mut &*raw))
    }

    /// The memberships of a user in lives of topics that go on.
    pub(super) fn memberships(&self, user: &UserId) -> Result<Memberships, InboxError> {
        let snapshot = self.db.snapshot();
        let UserLogs { changes, mut logs } = self.user_logs_of(&snapshot, user)?;
        keep_living(&mut logs, |one| Ok(self.life_now(&one.topic)? == one.life))?;
        Ok(Memberships { version: changes, logs })
    }

    /// Removes memberships whose lives are over. Of each user, the topics are given with the life
    /// that goes on, or 0.
    pub(super) fn end_user_logs(
        &self,
        snapshot: &Snapshot,
        pending: &mut OwnedWriteBatch,
        ended: &HashMap<&UserId, HashMap<&TopicName, u64>>,
    ) {
        for (user, topics) in ended {
            let mut found = match self.user_logs_of(snapshot, user) {
                Ok(found) => found,
                Err(error) => {
                    tracing::warn!(%error, %user, "the memberships of a user cannot be read");
                    continue;
                }
            };
            let before = found.logs.len();
            found.logs.retain(|known| topics.get(&known.topic).is_none_or(|life| known.life == *life));
            if found.logs.len() < before {
                self.put_user_logs(pending, user, &found);
            }
        }
    }

    /// Where there are as many as a user can have, those in lives of topics that are over do not
    /// wait for the janitor.
    pub(super) fn make_room(
        &self,
        snapshot: &Snapshot,
        logs: &mut Vec<LogMembership>,
    ) -> Result<(), InboxError> {
        if logs.len() < LOG_TOPICS {
            return Ok(());
        }
        keep_living(logs, |one| Ok(self.alive_in(snapshot, &one.topic, one.life)?.is_some()))
    }

    /// Takes over what stands in the earlier layout, and removes it there. A start that is cut off
    /// goes on with the rest next time. `changes` has the number of changes of each user, whose
    /// memberships stand beside those in topics that deliver to inboxes.
    pub(super) fn take_earlier_memberships(&self, changes: &Keyspace) -> fjall::Result<()> {
        let snapshot = self.db.snapshot();
        let mut entries = snapshot.iter(changes).peekable();
        let mut count = 0;
        while entries.peek().is_some() {
            let mut pending = self.db.batch().durability(Some(PersistMode::SyncData));
            for entry in entries.by_ref().take(TAKEN_AT_ONCE) {
                let (place, value) = entry.into_inner()?;
                if let Some(user) = user_of(&place) {
                    let raw = self.user_logs.get(head_key(&user))?;
                    let mut found = raw.and_then(|raw| UserLogs::decode(&raw).ok()).unwrap_or_default();
                    found.changes += take_u64(&mut &*value).unwrap_or(1);
                    let prefix = prefix(&user);
                    for row in snapshot.prefix(&self.user_topics, &prefix) {
                        let (key, value) = row.into_inner()?;
                        let topic = name_of(key.get(prefix.len()..).unwrap_or_default());
                        if let (Some(topic), Ok((life, Some(from)))) = (topic, membership_of(&value)) {
                            found.join(LogMembership { topic, life, from });
                            pending.remove(&self.user_topics, key);
                        }
                    }
                    self.put_user_logs(&mut pending, &user, &found);
                    count += 1;
                }
                pending.remove(changes, place);
            }
            pending.commit()?;
        }
        if count > 0 {
            tracing::info!(count, "memberships of users in logs were taken over from an earlier version");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn membership(n: usize, life: u64, from: u64) -> LogMembership {
        LogMembership { topic: TopicName::parse(&format!("topic.{n}")).unwrap(), life, from: Seq::at(from) }
    }

    proptest! {
        #[test]
        fn memberships_are_read_as_they_were_written_and_what_is_cut_off_is_an_error(
            changes in any::<u64>(),
            made in proptest::collection::vec((0usize..6, any::<u64>(), any::<u64>()), 0..12),
            cut in 0usize..400,
        ) {
            let mut all = UserLogs { changes, logs: Vec::new() };
            for (n, life, from) in made {
                all.join(membership(n, life, from));
            }
            let raw = all.encode();
            prop_assert_eq!(UserLogs::decode(&raw).unwrap(), all.clone());
            // Cut between two memberships, the first ones are read; elsewhere it is an error.
            if let Ok(part) = UserLogs::decode(&raw[..cut.min(raw.len())]) {
                prop_assert_eq!(part.encode(), &raw[..cut.min(raw.len())]);
                prop_assert!(all.logs.starts_with(&part.logs));
            }
        }

        #[test]
        fn nothing_that_stands_there_panics(raw in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = UserLogs::decode(&raw);
        }

        #[test]
        fn the_last_membership_of_a_topic_counts(
            steps in proptest::collection::vec((0usize..4, proptest::option::of(any::<u64>())), 0..40),
        ) {
            let (mut found, mut expected) = (UserLogs::default(), std::collections::BTreeMap::new());
            for (n, life) in steps {
                match life {
                    Some(life) => {
                        found.join(membership(n, life, 1));
                        expected.insert(n, life);
                    }
                    None => {
                        found.leave(&membership(n, 0, 1).topic);
                        expected.remove(&n);
                    }
                }
            }
            found.logs.sort_by(|one, other| one.topic.cmp(&other.topic));
            let expected: Vec<LogMembership> =
                expected.into_iter().map(|(n, life)| membership(n, life, 1)).collect();
            prop_assert_eq!(found.logs, expected);
        }
    }
}
