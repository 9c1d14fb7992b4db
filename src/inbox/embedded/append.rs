//! Appending and committing, under the writer's lock.

use std::collections::HashMap;
use std::sync::Arc;

use fjall::{OwnedWriteBatch, PersistMode, Readable, Snapshot};

use super::super::{Append, Appended, InboxError};
use super::records::{
    Fence, Head, fence_key, head_key, prefix, put_message, put_message_key, seq_of, unreadable,
};
use super::{Heads, Store, Writer};
use crate::message::UserId;

/// The outcome of each item of a batch.
pub(super) type Outcomes = Vec<Result<Appended, InboxError>>;

impl Store {
    pub(super) fn append(&self, batch: Vec<Append>) -> Result<Outcomes, InboxError> {
        let mut writer = self.writer.lock();
        let outcomes = self.append_as(&mut writer, batch);
        if outcomes.is_err() {
            // The heads in memory count messages that were not stored.
            writer.heads = Heads::default();
        }
        outcomes
    }

    pub(super) fn append_as(&self, writer: &mut Writer, batch: Vec<Append>) -> Result<Outcomes, InboxError> {
        let now = self.clock.now();
        let snapshot = self.db.snapshot();
        let mut pending = self.db.batch().durability(Some(PersistMode::SyncData));
        let mut fences: HashMap<Vec<u8>, Fence> = HashMap::new();
        let mut outcomes = Vec::with_capacity(batch.len());
        // fjall copies what it is given, so the buffers are reused.
        let (mut key, mut value) = (Vec::new(), Vec::new());
        for item in batch {
            let fence = item.deduplicated.then(|| (fence_key(&item.user, &item.fence()), item.digest()));
            if let Some((key, digest)) = &fence {
                let known = match fences.get(key) {
                    Some(fence) => Some(*fence),
                    None => self.fence(&snapshot, key).unwrap_or_else(|error| {
                        tracing::warn!(%error, user = %item.user, "the record of an idempotency key cannot be read; the message is stored");
                        None
                    }),
                };
                if let Some(fence) = known.filter(|fence| fence.expires_at > now) {
                    outcomes.push(Ok(fence.outcome(*digest)));
                    continue;
                }
            }
            let seq = match self.next_number(writer, &snapshot, &item.user, &mut pending) {
                Ok(seq) => seq,
                // A damaged record of one user must not fail the others.
                Err(error @ InboxError::Corrupt(_)) => {
                    outcomes.push(Err(error));
                    continue;
                }
                Err(error) => return Err(error),
            };
            put_message_key(&mut key, &item.user, seq);
            let message = item.numbered(seq);
            put_message(&mut value, &message, fence.is_some());
            pending.insert(&self.messages, &*key, &*value);
            if let Some(trace) = &message.trace {
                pending.insert(&self.traces, &*key, trace.to_bytes());
            }
            if let Some((key, digest)) = fence {
                let fence = Fence { seq: message.seq, expires_at: message.expires_at, digest };
                pending.insert(&self.fences, &*key, fence.encode());
                fences.insert(key, fence);
            }
            outcomes.push(Ok(Appended::Stored(Arc::new(message))));
        }
        self.commit(pending)?;
        Ok(outcomes)
    }

    /// The number of a user's next message, from memory or from the store. The head record of a new
    /// user joins the batch.
    pub(super) fn next_number(
        &self,
        writer: &mut Writer,
        snapshot: &Snapshot,
        user: &UserId,
        pending: &mut OwnedWriteBatch,
    ) -> Result<u64, InboxError> {
        if let Some(number) = writer.heads.next(user) {
            return Ok(number);
        }
        let last = match self.head(snapshot, user)? {
            Some(head) => self.highest(snapshot, user, head)?.max(self.above),
            None => {
                pending.insert(&self.heads, head_key(user), self.newborn.encode());
                self.newborn.head
            }
        };
        writer.heads.put(user.clone(), last + 1);
        Ok(last + 1)
    }

    pub(super) fn commit(&self, pending: OwnedWriteBatch) -> Result<(), InboxError> {
        pending.commit().map_err(|error| {
            self.poisoned.send_replace(true);
            InboxError::Poisoned(error.to_string())
        })
    }

    pub(super) fn head(&self, snapshot: &Snapshot, user: &UserId) -> Result<Option<Head>, InboxError> {
        snapshot
            .get(&self.heads, head_key(user))
            .map_err(unreadable)?
            .map(|raw| Head::decode(&raw))
            .transpose()
    }

    pub(super) fn highest(&self, snapshot: &Snapshot, user: &UserId, head: Head) -> Result<u64, InboxError> {
        match snapshot.prefix(&self.messages, prefix(user)).next_back() {
            Some(last) => Ok(head.head.max(seq_of(&last.key().map_err(unreadable)?)?)),
            None => Ok(head.head),
        }
    }

    pub(super) fn fence(&self, snapshot: &Snapshot, key: &[u8]) -> Result<Option<Fence>, InboxError> {
        snapshot.get(&self.fences, key).map_err(unreadable)?.map(|raw| Fence::decode(&raw)).transpose()
    }
}
