//! The positions of devices in logs of topics.

use fjall::{OwnedWriteBatch, Readable, Snapshot};

use super::Store;
use super::records::{cursor_key, head_key, prefix, take_u64, unreadable};
use crate::inbox::InboxError;
use crate::inbox::logs::{key, log_of};
use crate::message::{DeviceId, LogId, Seq, UserId};

/// The key below which all positions of a device stand.
fn device_prefix(user: &UserId, device: &str) -> Vec<u8> {
    let mut all = cursor_key(user, device);
    all.push(0);
    all
}

fn position_key(user: &UserId, device: &DeviceId, log: &LogId) -> Vec<u8> {
    let mut place = device_prefix(user, device.as_str());
    place.extend_from_slice(key(log).as_str().as_bytes());
    place
}

impl Store {
    pub(super) fn log_positions_of(
        &self,
        user: &UserId,
        device: &DeviceId,
    ) -> Result<Vec<(LogId, Seq)>, InboxError> {
        let below = device_prefix(user, device.as_str());
        let mut found = Vec::new();
        for entry in self.db.snapshot().prefix(&self.log_positions, &below) {
            let (key, value) = entry.into_inner().map_err(unreadable)?;
            let name = std::str::from_utf8(key.get(below.len()..).unwrap_or_default());
            let log = name.ok().and_then(|name| UserId::parse(name).ok()).and_then(|name| log_of(&name));
            // A position that cannot be read counts as none, which costs repeats.
            if let (Some(log), Ok(seq)) = (log, take_u64(&mut &*value)) {
                found.push((log, Seq::at(seq)));
            }
        }
        Ok(found)
    }

    pub(super) fn raise_positions(
        &self,
        snapshot: &Snapshot,
        pending: &mut OwnedWriteBatch,
        (user, device): (&UserId, &DeviceId),
        logs: &[(LogId, Seq)],
    ) -> Result<(), InboxError> {
        for (log, seq) in logs {
            let place = position_key(user, device, log);
            let known = snapshot.get(&self.log_positions, &place).map_err(unreadable)?;
            let known = known.and_then(|raw| take_u64(&mut &*raw).ok()).unwrap_or(0);
            pending.insert(&self.log_positions, place, seq.get().max(known).to_be_bytes());
        }
        Ok(())
    }

    /// Removes the positions of a device, whose cursor goes.
    pub(super) fn drop_positions(
        &self,
        snapshot: &Snapshot,
        pending: &mut OwnedWriteBatch,
        (user, device): (&UserId, &str),
    ) -> Result<(), InboxError> {
        for entry in snapshot.prefix(&self.log_positions, device_prefix(user, device)) {
            pending.remove(&self.log_positions, entry.key().map_err(unreadable)?);
        }
        Ok(())
    }

    /// Removes the positions of all devices of a user.
    pub(super) fn drop_all_positions(
        &self,
        snapshot: &Snapshot,
        pending: &mut OwnedWriteBatch,
        user: &UserId,
    ) -> Result<(), InboxError> {
        for entry in snapshot.prefix(&self.log_positions, prefix(user)) {
            pending.remove(&self.log_positions, entry.key().map_err(unreadable)?);
        }
        Ok(())
    }

    /// How often the memberships of a user in topics with a log have changed.
    pub(super) fn changes_of(&self, snapshot: &Snapshot, user: &UserId) -> Result<u64, InboxError> {
        let raw = snapshot.get(&self.user_changes, head_key(user)).map_err(unreadable)?;
        raw.map_or(Ok(0), |raw| take_u64(&mut &*raw))
    }
}
