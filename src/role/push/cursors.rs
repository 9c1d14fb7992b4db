//! Writing the cursors of devices, coalesced.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::registry::SessionHandle;
use crate::inbox::{Change, Device, Inbox};
use crate::message::{DeviceId, Seq, UserId};
use crate::telemetry::WAY;

/// Time between two writes.
const WRITE_EVERY: Duration = Duration::from_millis(200);
/// Cursors in one write.
const BATCH: usize = 1_000;

/// The cursors that the store does not have yet: one entry per device, however many acks.
pub(super) struct CursorWriter {
    inbox: Arc<dyn Inbox>,
    unwritten: Mutex<Unwritten>,
}

#[derive(Default)]
struct Unwritten {
    /// Those that moved since the last write began.
    moved: HashMap<Device, Seq>,
    /// Those of a write that is under way.
    writing: HashMap<Device, Seq>,
}

impl Unwritten {
    fn note(&mut self, device: Device, acked: Seq) {
        let cursor = self.moved.entry(device).or_default();
        // Two sessions of one device may ack in turn.
        *cursor = acked.max(*cursor);
    }

    fn of(&self, device: &Device) -> Option<Seq> {
        self.moved.get(device).max(self.writing.get(device)).copied()
    }

    /// Begins a write of all that moved.
    fn begin(&mut self) -> Vec<(Device, Seq)> {
        let moved: Vec<_> = std::mem::take(&mut self.moved).into_iter().collect();
        self.writing.extend(moved.iter().cloned());
        moved
    }

    /// These could not be written: they are kept for the next time, unless they moved meanwhile.
    fn keep(&mut self, failed: &[(Device, Seq)]) {
        for (device, acked) in failed {
            self.moved.entry(device.clone()).or_insert(*acked);
        }
    }
}

impl CursorWriter {
    /// Writes to `inbox`.
    pub(super) fn new(inbox: Arc<dyn Inbox>) -> Self {
        Self { inbox, unwritten: Mutex::default() }
    }

    /// A device has acked everything up to `acked`.
    pub(super) fn note(&self, handle: &SessionHandle, acked: Seq) {
        tracing::debug!(target: WAY, step = 8, user = %handle.user, device = %handle.device, seq = %acked, "acked");
        self.unwritten.lock().note((handle.user.clone(), handle.device.clone()), acked);
    }

    /// The cursor of a device that is not written yet, or is being written.
    pub(super) fn pending(&self, user: &UserId, device: &DeviceId) -> Option<Seq> {
        self.unwritten.lock().of(&(user.clone(), device.clone()))
    }

    /// Writes the cursors that moved.
    pub(super) async fn flush(&self) {
        let moved = self.unwritten.lock().begin();
        for batch in moved.chunks(BATCH) {
            let change = |((user, device), acked): &(Device, Seq)| Change::Cursor {
                user: user.clone(),
                device: device.clone(),
                acked: *acked,
            };
            if let Err(error) = self.inbox.update(batch.iter().map(change).collect()).await {
                tracing::debug!(%error, "cursors could not be written; they are kept");
                self.unwritten.lock().keep(batch);
            }
        }
        if !moved.is_empty() {
            self.unwritten.lock().writing.clear();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_is_known_until_the_store_has_it() {
        let device = |name| (UserId::parse("alice").unwrap(), DeviceId::parse(name).unwrap());
        let mut unwritten = Unwritten::default();
        unwritten.note(device("web"), Seq::at(7));
        unwritten.note(device("web"), Seq::at(5));
        assert_eq!(unwritten.of(&device("web")), Some(Seq::at(7)));
        let written = unwritten.begin();
        assert_eq!(unwritten.of(&device("web")), Some(Seq::at(7)), "while it is being written");
        unwritten.note(device("web"), Seq::at(9));
        unwritten.keep(&written);
        unwritten.writing.clear();
        assert_eq!(unwritten.of(&device("web")), Some(Seq::at(9)));
        assert_eq!(unwritten.begin(), [(device("web"), Seq::at(9))]);
        unwritten.writing.clear();
        assert_eq!(unwritten.of(&device("web")), None);
    }
}
