//! Removal of expired messages and of unused cursors.

use bytes::Bytes;
use fjall::{PersistMode, Readable, Snapshot};

use super::super::{InboxError, PASSED_OVER, fence_of};
use super::records::{
    Cursor, Decoded, decode, device_of, fence_key, head_key, message_key, prefix, seq_of, unreadable, user_of,
};
use super::{JANITOR_BATCH, Store};
use crate::message::{Millis, UserId};

impl Store {
    pub(super) fn run_once(&self) -> Result<u64, InboxError> {
        let mut removed = 0;
        let mut after: Option<Vec<u8>> = None;
        loop {
            let keys = self.heads_after(after.as_deref())?;
            let Some(last) = keys.last() else { break };
            after = Some(last.clone());
            for user in keys.iter().filter_map(|key| user_of(key)) {
                loop {
                    let count = match self.clean_user(&user, Over::At(self.clock.now())) {
                        Err(error @ InboxError::Corrupt(_)) => {
                            tracing::warn!(%error, %user, "expired messages of a user could not be removed");
                            0
                        }
                        count => count?,
                    };
                    removed += count as u64;
                    if count < JANITOR_BATCH {
                        break;
                    }
                }
            }
        }
        if !self.is_of_logs {
            self.clean_cursors()?;
            self.clean_topics()?;
        }
        Ok(removed)
    }

    /// The keys of the next head records after `after`.
    pub(super) fn heads_after(&self, after: Option<&[u8]>) -> Result<Vec<Vec<u8>>, InboxError> {
        let snapshot = self.db.snapshot();
        let mut from = after.unwrap_or_default().to_vec();
        if after.is_some() {
            // The smallest key above it.
            from.push(0);
        }
        let keys = snapshot.range(&self.heads, from..).take(JANITOR_BATCH);
        keys.map(|entry| Ok(entry.key().map_err(unreadable)?.to_vec())).collect()
    }

    /// Removes all messages and cursors of a user, in lots.
    pub(super) fn forget(&self, user: &UserId) -> Result<(), InboxError> {
        let snapshot = self.db.snapshot();
        if let Some(head) = self.head(&snapshot, user)? {
            // What comes from now on stays.
            let upto = self.highest(&snapshot, user, head)?;
            while self.clean_user(user, Over::Upto(upto))? > 0 {}
        }
        let _writer = self.writer.lock();
        let mut pending = self.db.batch().durability(Some(PersistMode::SyncData));
        for entry in self.db.snapshot().prefix(&self.cursors, prefix(user)) {
            pending.remove(&self.cursors, entry.key().map_err(unreadable)?);
        }
        self.drop_all_positions(&self.db.snapshot(), &mut pending, user)?;
        self.commit(pending)
    }

    /// Removes the run at the bottom of one inbox that is over, up to one batch, and raises the
    /// head record over it.
    fn clean_user(&self, user: &UserId, over: Over) -> Result<usize, InboxError> {
        // First without the lock: nearly no user has anything to remove.
        if self.run_that_is_over(&self.db.snapshot(), user, over)?.is_empty() {
            return Ok(0);
        }
        let _writer = self.writer.lock();
        let snapshot = self.db.snapshot();
        let run = self.run_that_is_over(&snapshot, user, over)?;
        let (Some(mut head), Some(top)) = (self.head(&snapshot, user)?, run.last()) else { return Ok(0) };
        head.head = head.head.max(top.seq);
        let mut pending = self.db.batch();
        pending.insert(&self.heads, head_key(user), head.encode());
        for expired in &run {
            pending.remove(&self.messages, message_key(user, expired.seq));
            if expired.is_traced {
                pending.remove(&self.traces, message_key(user, expired.seq));
            }
            if let Some(fence) = &expired.fence {
                let key = fence_key(user, fence);
                if self.fence(&snapshot, &key)?.is_some_and(|fence| fence.seq.get() == expired.seq) {
                    pending.remove(&self.fences, key);
                }
            }
        }
        self.commit(pending)?;
        Ok(run.len())
    }

    /// When an unreadable message expires is unknown. It goes with the next readable one above it.
    fn run_that_is_over(
        &self,
        snapshot: &Snapshot,
        user: &UserId,
        over: Over,
    ) -> Result<Vec<Expired>, InboxError> {
        let (mut run, mut upto) = (Vec::new(), 0);
        for entry in snapshot.prefix(&self.messages, prefix(user)).take(JANITOR_BATCH + PASSED_OVER) {
            let (key, value) = entry.into_inner().map_err(unreadable)?;
            let seq = seq_of(&key)?;
            let Ok(Decoded { message, deduplicated, is_traced }) =
                decode(seq, Bytes::copy_from_slice(&value))
            else {
                run.push(Expired { seq, fence: None, is_traced: true });
                if matches!(over, Over::Upto(last) if seq <= last) {
                    upto = run.len();
                }
                continue;
            };
            let is_over = match over {
                Over::At(now) => message.is_expired(now),
                Over::Upto(last) => seq <= last,
            };
            if !is_over || upto >= JANITOR_BATCH {
                break;
            }
            let fence = deduplicated.then(|| fence_of(message.via.as_deref(), &message.id));
            run.push(Expired { seq, fence, is_traced });
            upto = run.len();
        }
        run.truncate(upto);
        Ok(run)
    }

    pub(super) fn clean_cursors(&self) -> Result<(), InboxError> {
        let now = self.clock.now();
        let snapshot = self.db.snapshot();
        let mut stale = Vec::new();
        for entry in snapshot.iter(&self.cursors) {
            let (key, value) = entry.into_inner().map_err(unreadable)?;
            // A cursor that cannot be read is useless.
            if Cursor::decode(&value).map_or(true, |cursor| cursor.is_stale(now)) {
                stale.push(key);
            }
        }
        for batch in stale.chunks(JANITOR_BATCH) {
            let _writer = self.writer.lock();
            let mut pending = self.db.batch();
            for key in batch {
                // It may have been moved since the snapshot.
                let raw = self.cursors.get(key).map_err(unreadable)?;
                let stale = |raw: &[u8]| Cursor::decode(raw).map_or(true, |cursor| cursor.is_stale(now));
                if raw.is_some_and(|raw| stale(&raw)) {
                    pending.remove(&self.cursors, key.clone());
                    if let Some((user, device)) = device_of(key) {
                        self.drop_positions(&mut pending, (&user, device));
                    }
                }
            }
            self.commit(pending)?;
        }
        Ok(())
    }
}

/// Which messages of an inbox are to be removed.
#[derive(Debug, Clone, Copy)]
enum Over {
    /// Those that have expired at this time.
    At(Millis),
    /// All up to this number.
    Upto(u64),
}

/// A message that is to be removed.
struct Expired {
    seq: u64,
    /// Its idempotency key, if it has one.
    fence: Option<String>,
    /// It may belong to a trace.
    is_traced: bool,
}
