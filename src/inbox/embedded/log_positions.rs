//! The positions of devices in logs of topics. Those of a device stand in one record: a device that
//! begins to read ten logs is one write, and one look.

use std::collections::HashMap;

use bytes::BufMut;
use fjall::{Keyspace, OwnedWriteBatch, PersistMode, Readable, Snapshot};

use super::Store;
use super::records::{cursor_key, device_of, prefix, put_name, take_u64, unreadable};
use crate::inbox::InboxError;
use crate::inbox::logs::{key, log_of};
use crate::message::{DeviceId, LogId, Seq, UserId};
use crate::topic::LOG_TOPICS;

/// Positions of one device that are kept: twice as many as it reads at the most.
const KEPT: usize = 2 * (LOG_TOPICS + 1);
/// Records of an earlier layout that are taken over in one commit.
const TAKEN_AT_ONCE: usize = 1_000;

fn encode(positions: &[(LogId, Seq)]) -> Vec<u8> {
    let mut out = Vec::with_capacity(positions.len() * 32);
    for (log, seq) in positions {
        put_name(&mut out, key(log).as_str());
        out.put_u64(seq.get());
    }
    out
}

/// What can be read. A position that cannot counts as none, which costs repeats.
fn decode(mut raw: &[u8]) -> Vec<(LogId, Seq)> {
    let mut found = Vec::new();
    while let Some((length, rest)) = raw.split_first() {
        let Some((name, rest)) = rest.split_at_checked(usize::from(*length)) else { break };
        raw = rest;
        let Ok(seq) = take_u64(&mut raw) else { break };
        if let Some(log) = log_named(name) {
            found.push((log, Seq::at(seq)));
        }
    }
    found
}

fn log_named(name: &[u8]) -> Option<LogId> {
    log_of(&UserId::parse(std::str::from_utf8(name).ok()?).ok()?)
}

/// Raises positions to these. They stand last; of more than [`KEPT`] the first are dropped, which
/// were not raised for longest, most likely of topics that were left. Losing one costs repeats.
/// That of everyone's log stays: a device without one begins with the last messages.
fn raise(known: &mut Vec<(LogId, Seq)>, logs: &[(LogId, Seq)]) {
    for (log, seq) in logs {
        let at = known.iter().position(|(known, _)| known == log);
        let before = at.map_or(Seq::BEGINNING, |at| known.remove(at).1);
        known.push((log.clone(), *seq.max(&before)));
    }
    while known.len() > KEPT
        && let Some(at) = known.iter().position(|(log, _)| *log != LogId::Everyone)
    {
        known.remove(at);
    }
}

impl Store {
    pub(super) fn log_positions_of(
        &self,
        user: &UserId,
        device: &DeviceId,
    ) -> Result<Vec<(LogId, Seq)>, InboxError> {
        let raw = self.device_logs.get(cursor_key(user, device.as_str())).map_err(unreadable)?;
        Ok(raw.map(|raw| decode(&raw)).unwrap_or_default())
    }

    /// Raises the positions of a device that is in no other change of this batch.
    pub(super) fn raise_positions(
        &self,
        snapshot: &Snapshot,
        pending: &mut OwnedWriteBatch,
        (user, device): (&UserId, &DeviceId),
        logs: &[(LogId, Seq)],
    ) -> Result<(), InboxError> {
        let place = cursor_key(user, device.as_str());
        let raw = snapshot.get(&self.device_logs, &place).map_err(unreadable)?;
        let mut positions = raw.map(|raw| decode(&raw)).unwrap_or_default();
        raise(&mut positions, logs);
        pending.insert(&self.device_logs, place, encode(&positions));
        Ok(())
    }

    /// Removes the positions of a device, whose cursor goes.
    pub(super) fn drop_positions(&self, pending: &mut OwnedWriteBatch, (user, device): (&UserId, &str)) {
        pending.remove(&self.device_logs, cursor_key(user, device));
    }

    /// Removes the positions of all devices of a user.
    pub(super) fn drop_all_positions(
        &self,
        snapshot: &Snapshot,
        pending: &mut OwnedWriteBatch,
        user: &UserId,
    ) -> Result<(), InboxError> {
        for entry in snapshot.prefix(&self.device_logs, prefix(user)) {
            pending.remove(&self.device_logs, entry.key().map_err(unreadable)?);
        }
        Ok(())
    }

    /// Takes over what stands in the earlier layout, and removes it there. A start that is cut off
    /// goes on with the rest next time.
    pub(super) fn take_earlier_positions(&self, earlier: &Keyspace) -> fjall::Result<()> {
        let snapshot = self.db.snapshot();
        let mut entries = snapshot.iter(earlier).peekable();
        let mut count = 0;
        while entries.peek().is_some() {
            let mut pending = self.db.batch().durability(Some(PersistMode::SyncData));
            let mut taken: HashMap<Vec<u8>, Vec<(LogId, Seq)>> = HashMap::new();
            for entry in entries.by_ref().take(TAKEN_AT_ONCE) {
                let (place, value) = entry.into_inner()?;
                if let Some((device, log)) = earlier_place(&place)
                    && let Ok(seq) = take_u64(&mut &*value)
                {
                    taken.entry(device).or_default().push((log, Seq::at(seq)));
                }
                pending.remove(earlier, place);
                count += 1;
            }
            for (device, logs) in taken {
                let known = self.device_logs.get(&device)?;
                let mut positions = known.map(|raw| decode(&raw)).unwrap_or_default();
                raise(&mut positions, &logs);
                pending.insert(&self.device_logs, device, encode(&positions));
            }
            pending.commit()?;
        }
        if count > 0 {
            tracing::info!(count, "positions of devices in logs were taken over from an earlier version");
        }
        Ok(())
    }
}

/// The key of the device, and the log, of a record of the earlier layout.
fn earlier_place(place: &[u8]) -> Option<(Vec<u8>, LogId)> {
    let (user, rest) = device_of(place)?;
    let (device, log) = rest.split_once('\0')?;
    Some((cursor_key(&user, device), log_named(log.as_bytes())?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::message::TopicName;

    proptest! {
        #[test]
        fn positions_are_read_as_they_were_written_and_what_is_cut_off_costs_the_rest_alone(
            seqs in proptest::collection::vec(any::<u64>(), 0..12), cut in 0usize..400,
        ) {
            let log = |n: usize| match n {
                0 => LogId::Everyone,
                n => LogId::Topic(TopicName::parse(&format!("topic.{n}")).unwrap()),
            };
            let all: Vec<(LogId, Seq)> = seqs.iter().enumerate().map(|(n, seq)| (log(n), Seq::at(*seq))).collect();
            let raw = encode(&all);
            prop_assert_eq!(&decode(&raw), &all);
            let part = decode(&raw[..cut.min(raw.len())]);
            prop_assert!(all.starts_with(&part));
        }

        #[test]
        fn nothing_that_stands_there_panics(raw in proptest::collection::vec(any::<u8>(), 0..300)) {
            decode(&raw);
            earlier_place(&raw);
        }

        #[test]
        fn a_position_never_falls(before in any::<u64>(), then in any::<u64>()) {
            let mut known = vec![(LogId::Everyone, Seq::at(before))];
            raise(&mut known, &[(LogId::Everyone, Seq::at(then))]);
            prop_assert_eq!(known, vec![(LogId::Everyone, Seq::at(before.max(then)))]);
        }

        #[test]
        fn the_positions_that_were_raised_last_are_kept(raised in proptest::collection::vec(0usize..400, 1..900)) {
            let log = |n: usize| LogId::Topic(TopicName::parse(&format!("t{n}")).unwrap());
            let mut known = vec![(LogId::Everyone, Seq::at(7))];
            for n in &raised {
                raise(&mut known, &[(log(*n), Seq::at(1))]);
            }
            prop_assert!(known.len() <= KEPT);
            let mut last: Vec<usize> = Vec::new();
            for n in raised.iter().rev() {
                if !last.contains(n) && last.len() < KEPT - 1 {
                    last.push(*n);
                }
            }
            let topics = last.into_iter().rev().map(log);
            let expected: Vec<LogId> = std::iter::once(LogId::Everyone).chain(topics).collect();
            prop_assert_eq!(known.into_iter().map(|(log, _)| log).collect::<Vec<_>>(), expected);
        }
    }
}
