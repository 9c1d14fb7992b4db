//! Positions, pages and profiles; cursors and times that rise.

use std::collections::HashSet;
use std::sync::Arc;

use bytes::Bytes;
use fjall::{OwnedWriteBatch, PersistMode, Readable, Snapshot};

use super::super::{
    Change, DEVICES_PER_USER, InboxError, InboxPage, PASSED_OVER, PageLimit, PositionQuery, Profile,
    REVOCATION_AHEAD_MAX_S, Sought, StartAt, UserPosition,
};
use super::records::{
    Cursor, Decoded, Head, cursor_key, decode, ended, fence_key, head_key, message_key, prefix, seq_of,
    unreadable,
};
use super::{ASKED_IN_A_ROW, Store};
use crate::message::{DeviceId, Message, Millis, Seq, UserId};
use crate::trace::TraceParent;

impl Store {
    /// Looks up each position. Also returns the users that need a head record before the result may
    /// be told.
    pub(super) fn positions(
        &self,
        batch: &[PositionQuery],
    ) -> Result<(Vec<UserPosition>, Vec<UserId>), InboxError> {
        let snapshot = self.db.snapshot();
        let (mut answers, mut strangers) = (Vec::with_capacity(batch.len()), Vec::new());
        for (n, ask) in batch.iter().enumerate() {
            if n % ASKED_IN_A_ROW == ASKED_IN_A_ROW - 1 {
                std::thread::yield_now();
            }
            let head = match self.head(&snapshot, &ask.user) {
                // One damaged record must not fail a whole batch.
                Err(error @ InboxError::Corrupt(_)) if batch.len() > 1 => {
                    tracing::warn!(%error, user = %ask.user, "the head record of a user cannot be read");
                    answers.push(Self::unknown(ask));
                    continue;
                }
                head => head?,
            };
            answers.push(match head {
                Some(record) => self.answer(&snapshot, ask, record)?,
                None => {
                    // A position that this store never assigned: the client will be told a number,
                    // which must then be durable.
                    if let StartAt::After(position) = &ask.from
                        && ![Seq::BEGINNING, Seq::at(self.newborn.head)].contains(position)
                    {
                        strangers.push(ask.user.clone());
                    }
                    Self::answer_at(ask, self.newborn, self.newborn.head, None)
                }
            });
            if !self.is_of_logs
                && let Some(answer) = answers.last_mut()
            {
                answer.memberships = self.changes_of(&snapshot, &ask.user)?;
            }
        }
        Ok((answers, strangers))
    }

    pub(super) fn answer(
        &self,
        snapshot: &Snapshot,
        ask: &PositionQuery,
        record: Head,
    ) -> Result<UserPosition, InboxError> {
        let highest = self.highest(snapshot, &ask.user, record)?;
        let cursor = match &ask.from {
            StartAt::Cursor(device) => self.cursor(snapshot, &ask.user, device)?,
            _ => None,
        };
        Ok(Self::answer_at(ask, record, highest, cursor))
    }

    pub(super) fn answer_at(
        ask: &PositionQuery,
        record: Head,
        highest: u64,
        cursor: Option<Cursor>,
    ) -> UserPosition {
        let head = Seq::at(highest);
        let start = match &ask.from {
            StartAt::After(seq) => *seq,
            StartAt::Cursor(_) => cursor.map_or(Seq::BEGINNING, |cursor| cursor.acked),
            // In an inbox that never had a message, the end is the beginning.
            StartAt::Latest if highest == record.first => Seq::BEGINNING,
            StartAt::Latest => head,
        };
        let more = highest > start.get().max(record.first);
        UserPosition { start, head, more, not_before_s: record.not_before_s, memberships: 0 }
    }

    /// The result for a record that cannot be read: a page will tell more, or fail.
    pub(super) fn unknown(ask: &PositionQuery) -> UserPosition {
        let start = if let StartAt::After(seq) = &ask.from { *seq } else { Seq::BEGINNING };
        UserPosition { start, head: start, more: true, not_before_s: 0, memberships: 0 }
    }

    /// Whether a disconnect is so far in the future that the clock that made it was wrong.
    pub(super) fn is_ahead(&self, answers: &[UserPosition]) -> bool {
        let latest = self.clock.now().seconds() + REVOCATION_AHEAD_MAX_S;
        answers.iter().any(|answer| answer.not_before_s > latest)
    }

    /// Makes disconnects that are too far in the future count from now.
    pub(super) fn correct(
        &self,
        batch: &[PositionQuery],
        answers: &mut [UserPosition],
    ) -> Result<(), InboxError> {
        let now = self.clock.now().seconds();
        let _writer = self.writer.lock();
        let snapshot = self.db.snapshot();
        let mut pending = self.db.batch().durability(Some(PersistMode::SyncData));
        for (ask, answer) in batch.iter().zip(answers) {
            if answer.not_before_s <= now + REVOCATION_AHEAD_MAX_S {
                continue;
            }
            answer.not_before_s = now;
            if let Some(mut head) = self.head(&snapshot, &ask.user)? {
                head.not_before_s = now;
                pending.insert(&self.heads, head_key(&ask.user), head.encode());
            }
        }
        self.commit(pending)
    }

    /// Makes the head records of new users durable.
    pub(super) fn make_heads(&self, users: &[UserId]) -> Result<(), InboxError> {
        if users.is_empty() {
            return Ok(());
        }
        let _writer = self.writer.lock();
        let snapshot = self.db.snapshot();
        let mut pending = self.db.batch().durability(Some(PersistMode::SyncData));
        for user in users {
            if self.head(&snapshot, user)?.is_none() {
                pending.insert(&self.heads, head_key(user), self.newborn.encode());
            }
        }
        self.commit(pending)
    }

    pub(super) fn page(&self, user: &UserId, after: Seq, limit: PageLimit) -> Result<InboxPage, InboxError> {
        let now = self.clock.now();
        let snapshot = self.db.snapshot();
        let head = self.head(&snapshot, user)?.map_or(0, |record| record.head);
        let upto = after.max(Seq::at(head));
        let mut page = InboxPage { messages: Vec::new(), unreadable: Vec::new(), upto, more: false };
        let (mut bytes, mut looked_at) = (0, 0);
        let from = message_key(user, after.get().saturating_add(1));
        let to = message_key(user, u64::MAX);
        for entry in snapshot.range(&self.messages, from..=to) {
            let (key, value) = entry.into_inner().map_err(unreadable)?;
            let seq = seq_of(&key)?;
            if looked_at == limit.messages + PASSED_OVER {
                page.more = true;
                break;
            }
            looked_at += 1;
            let Ok(decoded) = decode(seq, Bytes::copy_from_slice(&value)) else {
                page.unreadable.push(Seq::at(seq));
                page.upto = page.upto.max(Seq::at(seq));
                continue;
            };
            let message = self.traced(&snapshot, &key, decoded)?;
            let full = page.messages.len() >= limit.messages || bytes + message.payload.len() > limit.bytes;
            if full && !page.messages.is_empty() {
                page.upto = Seq::at(message.seq.get() - 1);
                page.more = true;
                break;
            }
            page.upto = page.upto.max(message.seq);
            if !message.is_expired(now) {
                bytes += message.payload.len();
                page.messages.push(message);
            }
        }
        Ok(page)
    }

    pub(super) fn stored(&self, user: &UserId, which: &Sought) -> Result<Option<Message>, InboxError> {
        let snapshot = self.db.snapshot();
        if let Sought::At(seq) = which {
            return self.stored_at(&snapshot, user, seq.get());
        }
        let mut newest: Option<Message> = None;
        for fence in which.fences() {
            let Some(fence) = self.fence(&snapshot, &fence_key(user, &fence))? else { continue };
            let found = self.stored_at(&snapshot, user, fence.seq.get())?;
            newest = newest.into_iter().chain(found).max_by_key(|message| message.seq);
        }
        Ok(newest)
    }

    fn stored_at(&self, snapshot: &Snapshot, user: &UserId, seq: u64) -> Result<Option<Message>, InboxError> {
        let key = message_key(user, seq);
        let Some(raw) = snapshot.get(&self.messages, &key).map_err(unreadable)? else { return Ok(None) };
        self.traced(snapshot, &key, decode(seq, Bytes::copy_from_slice(&raw))?).map(Some)
    }

    /// The message with its trace, if it belongs to one.
    fn traced(&self, snapshot: &Snapshot, key: &[u8], decoded: Decoded) -> Result<Message, InboxError> {
        let Decoded { mut message, is_traced, .. } = decoded;
        if is_traced {
            let raw = snapshot.get(&self.traces, key).map_err(unreadable)?;
            message.trace = raw.and_then(|raw| TraceParent::from_bytes(&raw)).map(Arc::new);
        }
        Ok(message)
    }

    pub(super) fn profile(&self, user: &UserId) -> Result<Profile, InboxError> {
        let snapshot = self.db.snapshot();
        let Some(record) = self.head(&snapshot, user)? else { return Ok(Profile::default()) };
        let highest = self.highest(&snapshot, user, record)?;
        let mut cursors = Vec::new();
        for (device, cursor) in self.cursors(&snapshot, user)? {
            if let Ok(device) = DeviceId::parse(&device) {
                cursors.push((device, cursor.acked));
            }
        }
        let head = (highest > record.first).then(|| Seq::at(highest));
        Ok(Profile { head, first: Seq::at(record.first), not_before_s: record.not_before_s, cursors })
    }

    pub(super) fn cursor(
        &self,
        snapshot: &Snapshot,
        user: &UserId,
        device: &DeviceId,
    ) -> Result<Option<Cursor>, InboxError> {
        let raw = snapshot.get(&self.cursors, cursor_key(user, device.as_str())).map_err(unreadable)?;
        // A cursor that cannot be read counts as none: losing a cursor costs repeats.
        Ok(raw.and_then(|raw| Cursor::decode(&raw).ok()))
    }

    pub(super) fn cursors(
        &self,
        snapshot: &Snapshot,
        user: &UserId,
    ) -> Result<Vec<(String, Cursor)>, InboxError> {
        let prefix = prefix(user);
        let skip = prefix.len();
        snapshot
            .prefix(&self.cursors, prefix)
            .map(|entry| {
                let (key, value) = entry.into_inner().map_err(unreadable)?;
                let device = String::from_utf8_lossy(key.get(skip..).unwrap_or_default()).into_owned();
                Ok(Cursor::decode(&value).ok().map(|cursor| (device, cursor)))
            })
            .filter_map(Result::transpose)
            .collect()
    }

    pub(super) fn update(&self, changes: &[Change]) -> Result<(), InboxError> {
        let _writer = self.writer.lock();
        let now = self.clock.now();
        let mut synced = false;
        let (mut snapshot, mut pending) = (self.db.snapshot(), self.db.batch());
        let mut touched: HashSet<&UserId> = HashSet::new();
        for change in changes {
            let (Change::Cursor { user, .. }
            | Change::Begin { user, .. }
            | Change::NotBefore { user, .. }
            | Change::Positions { user, .. }
            | Change::End { user, .. }
            | Change::Shown { user, .. }) = change;
            if !touched.insert(user) {
                // A later change of the same user must see an earlier one.
                self.commit(std::mem::replace(&mut pending, self.db.batch()))?;
                snapshot = self.db.snapshot();
                touched = HashSet::from([user]);
            }
            match change {
                Change::Cursor { user, device, acked } => {
                    self.move_cursor(&snapshot, &mut pending, (user, device), *acked, now)?;
                }
                Change::Begin { user, device, at } => {
                    if self.head(&snapshot, user)?.is_none() {
                        pending.insert(&self.heads, head_key(user), self.newborn.encode());
                    }
                    self.move_cursor(&snapshot, &mut pending, (user, device), *at, now)?;
                    synced = true;
                }
                Change::Positions { user, device, logs } => {
                    // The positions of a device go with its cursor, so it has one.
                    self.move_cursor(&snapshot, &mut pending, (user, device), Seq::BEGINNING, now)?;
                    self.raise_positions(&snapshot, &mut pending, (user, device), logs)?;
                    synced = true;
                }
                Change::End { user, seq, at } => {
                    let key = message_key(user, seq.get());
                    let raw = snapshot.get(&self.messages, &key).map_err(unreadable)?;
                    if let Some(raw) = raw.and_then(|raw| ended(&raw, *at)) {
                        pending.insert(&self.messages, key, raw);
                        synced = true;
                    }
                }
                // An embedded store is restored while no process has it open, so every position
                // that clients know comes from this process.
                Change::Shown { .. } => {}
                Change::NotBefore { user, seconds } => {
                    let mut head = self.head(&snapshot, user)?.unwrap_or(self.newborn);
                    head.not_before_s = head.not_before_s.max(*seconds);
                    pending.insert(&self.heads, head_key(user), head.encode());
                    synced = true;
                }
            }
        }
        self.commit(pending)?;
        if synced {
            self.db.persist(PersistMode::SyncData).map_err(|error| {
                self.poisoned.send_replace(true);
                InboxError::Poisoned(error.to_string())
            })?;
        }
        Ok(())
    }

    pub(super) fn move_cursor(
        &self,
        snapshot: &Snapshot,
        pending: &mut OwnedWriteBatch,
        (user, device): (&UserId, &DeviceId),
        acked: Seq,
        now: Millis,
    ) -> Result<(), InboxError> {
        let known = self.cursor(snapshot, user, device)?;
        if known.is_none() {
            let mut others = self.cursors(snapshot, user)?;
            if others.len() >= DEVICES_PER_USER {
                others.sort_by_key(|(_, cursor)| cursor.moved_at);
                pending.remove(&self.cursors, cursor_key(user, &others[0].0));
                self.drop_positions(pending, (user, &others[0].0));
            }
        }
        let acked = known.map_or(acked, |cursor| cursor.acked.max(acked));
        pending.insert(
            &self.cursors,
            cursor_key(user, device.as_str()),
            Cursor { acked, moved_at: now }.encode(),
        );
        Ok(())
    }
}
