//! Writing the cursors of devices, coalesced.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::registry::SessionHandle;
use crate::inbox::{Change, Inbox};
use crate::message::{DeviceId, Seq, UserId};
use crate::telemetry::WAY;

/// Time between two writes.
const WRITE_EVERY: Duration = Duration::from_millis(200);
/// Cursors in one write.
const BATCH: usize = 1_000;

/// The cursors that moved since they were last written: one entry per device, however many acks.
pub(super) struct CursorWriter {
    inbox: Arc<dyn Inbox>,
    moved: Mutex<HashMap<(UserId, DeviceId), Seq>>,
}

impl CursorWriter {
    /// Writes to `inbox`.
    pub(super) fn new(inbox: Arc<dyn Inbox>) -> Self {
        Self { inbox, moved: Mutex::default() }
    }

    /// A device has acked everything up to `acked`.
    pub(super) fn note(&self, handle: &SessionHandle, acked: Seq) {
        tracing::debug!(target: WAY, step = 8, user = %handle.user, device = %handle.device, seq = %acked, "acked");
        let mut moved = self.moved.lock();
        let cursor = moved.entry((handle.user.clone(), handle.device.clone())).or_default();
        // Two sessions of one device may ack in turn.
        *cursor = acked.max(*cursor);
    }

    /// The cursor of a device that is not written yet.
    pub(super) fn pending(&self, user: &UserId, device: &DeviceId) -> Option<Seq> {
        self.moved.lock().get(&(user.clone(), device.clone())).copied()
    }

    /// Writes the cursors that moved. What cannot be written is kept for the next time, unless it
    /// moved again meanwhile.
    pub(super) async fn flush(&self) {
        let moved = std::mem::take(&mut *self.moved.lock());
        if moved.is_empty() {
            return;
        }
        let moved: Vec<((UserId, DeviceId), Seq)> = moved.into_iter().collect();
        for batch in moved.chunks(BATCH) {
            let change = |((user, device), acked): &((UserId, DeviceId), Seq)| Change::Cursor {
                user: user.clone(),
                device: device.clone(),
                acked: *acked,
            };
            if let Err(error) = self.inbox.update(batch.iter().map(change).collect()).await {
                tracing::debug!(%error, "cursors could not be written; they are kept");
                let mut kept = self.moved.lock();
                for (device, acked) in batch {
                    kept.entry(device.clone()).or_insert(*acked);
                }
            }
        }
    }

    /// Writes every [`WRITE_EVERY`], for ever.
    pub(super) async fn run(self: Arc<Self>) {
        loop {
            tokio::time::sleep(WRITE_EVERY).await;
            self.flush().await;
        }
    }
}
