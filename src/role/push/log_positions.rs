//! Writing the positions of devices in logs. A position that is not written yet counts on this
//! node; one that is lost costs repeats.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use super::registry::SessionHandle;
use super::tails::LogReadingLimits;
use crate::backoff::between;
use crate::inbox::{Change, Inbox};
use crate::message::{DeviceId, LogId, Seq, UserId};

/// Time between two looks at what is due.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// Devices in one write.
const BATCH: usize = 1_000;

type Device = (UserId, DeviceId);

/// The positions of a device that the store does not have.
struct Unwritten {
    logs: HashMap<LogId, Seq>,
    due: Instant,
    /// It is written with the next look, whatever the pace.
    hurries: bool,
}

#[derive(Default)]
struct State {
    moved: HashMap<Device, Unwritten>,
    /// Those of a write that is under way.
    writing: HashMap<Device, HashMap<LogId, Seq>>,
}

/// Writes positions: soon where a socket ends, else now and then.
pub(super) struct LogPositions {
    inbox: Arc<dyn Inbox>,
    limits: LogReadingLimits,
    state: Mutex<State>,
}

impl LogPositions {
    /// Writes to `inbox`.
    pub(super) fn new(inbox: Arc<dyn Inbox>, limits: LogReadingLimits) -> Self {
        Self { inbox, limits, state: Mutex::default() }
    }

    /// A device has handled everything in a log up to a position.
    pub(super) fn note(&self, handle: &SessionHandle, log: &LogId, seq: Seq) {
        let every = self.limits.position_every;
        let mut state = self.state.lock();
        let device = (handle.user.clone(), handle.device.clone());
        let unwritten = state.moved.entry(device).or_insert_with(|| Unwritten {
            logs: HashMap::new(),
            // At other times for each, or sockets that came together would write together.
            due: Instant::now() + between(every / 2, every, &mut rand::rng()),
            hurries: false,
        });
        let known = unwritten.logs.entry(log.clone()).or_default();
        *known = seq.max(*known);
    }

    /// A socket of a device ends, moves, or its cursor is written: what is known of it is written
    /// with the next look.
    pub(super) fn hurry(&self, user: &UserId, device: &DeviceId) {
        let mut state = self.state.lock();
        if state.moved.is_empty() {
            return;
        }
        if let Some(unwritten) = state.moved.get_mut(&(user.clone(), device.clone())) {
            (unwritten.due, unwritten.hurries) = (Instant::now(), true);
        }
    }

    /// The positions of a device that are not written yet, or are being written.
    pub(super) fn pending(&self, user: &UserId, device: &DeviceId) -> Vec<(LogId, Seq)> {
        let state = self.state.lock();
        let device = (user.clone(), device.clone());
        let writing = state.writing.get(&device).into_iter().flatten();
        let moved = state.moved.get(&device).into_iter().flat_map(|unwritten| &unwritten.logs);
        writing.chain(moved).map(|(log, seq)| (log.clone(), *seq)).collect()
    }

    /// Takes what is due: all that hurries, and `most` of the rest, the oldest first.
    fn take_due(&self, now: Instant, most: usize) -> Vec<(Device, HashMap<LogId, Seq>)> {
        let mut state = self.state.lock();
        let mut due: Vec<(bool, Instant, Device)> = state
            .moved
            .iter()
            .filter(|(_, unwritten)| unwritten.due <= now)
            .map(|(device, unwritten)| (!unwritten.hurries, unwritten.due, device.clone()))
            .collect();
        due.sort_by_key(|(rests, at, _)| (*rests, *at));
        let hurry = due.partition_point(|(rests, ..)| !rests);
        due.truncate(hurry.saturating_add(most));
        let taken: Vec<_> = due
            .into_iter()
            .map(|(_, at, device)| (at, device))
            .filter_map(|(_, device)| Some((device.clone(), state.moved.remove(&device)?.logs)))
            .collect();
        state.writing.extend(taken.iter().cloned());
        taken
    }

    async fn write(&self, due: Vec<(Device, HashMap<LogId, Seq>)>) {
        for lot in due.chunks(BATCH) {
            let change = |((user, device), logs): &(Device, HashMap<LogId, Seq>)| Change::Positions {
                user: user.clone(),
                device: device.clone(),
                logs: logs.iter().map(|(log, seq)| (log.clone(), *seq)).collect(),
            };
            if let Err(error) = self.inbox.update(lot.iter().map(change).collect()).await {
                tracing::debug!(%error, "positions in logs could not be written; they are kept");
                self.keep(lot);
            }
        }
        self.state.lock().writing.clear();
    }

    /// These could not be written: they are kept for the next time, unless they moved meanwhile.
    fn keep(&self, failed: &[(Device, HashMap<LogId, Seq>)]) {
        let mut state = self.state.lock();
        for (device, logs) in failed {
            let again = || Unwritten { logs: HashMap::new(), due: Instant::now(), hurries: true };
            let unwritten = state.moved.entry(device.clone()).or_insert_with(again);
            for (log, seq) in logs {
                let known = unwritten.logs.entry(log.clone()).or_default();
                *known = (*seq).max(*known);
            }
        }
    }

    /// Writes all.
    pub(super) async fn flush(&self) {
        let all = self.take_due(Instant::now() + self.limits.position_every, usize::MAX);
        self.write(all).await;
    }

    /// Writes what is due, for ever.
    pub(super) async fn run(self: Arc<Self>) {
        let per_look = f64::from(self.limits.positions_per_s) * LOOK_EVERY.as_secs_f64();
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let due = self.take_due(Instant::now(), per_look.ceil() as usize);
            if !due.is_empty() {
                self.write(due).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::registry::Arrival;
    use super::*;
    use crate::clock::Clock;
    use crate::inbox::memory::MemoryInbox;
    use crate::message::Millis;

    #[tokio::test]
    async fn a_position_is_known_until_the_store_has_it_and_written_soon_where_a_socket_ends() {
        let inbox = Arc::new(MemoryInbox::new(Clock::system()));
        let positions = LogPositions::new(Arc::clone(&inbox) as _, LogReadingLimits::default());
        let user = UserId::parse("alice").unwrap();
        let device = DeviceId::default();
        let handle = SessionHandle::new(user.clone(), device.clone(), None, 0, Arrival::default(), Millis(0));
        positions.note(&handle, &LogId::Everyone, Seq::at(7));
        positions.note(&handle, &LogId::Everyone, Seq::at(5));
        assert_eq!(positions.pending(&user, &device), [(LogId::Everyone, Seq::at(7))]);
        assert!(positions.take_due(Instant::now(), 9).is_empty(), "not yet");
        let later = Instant::now() + LogReadingLimits::default().position_every;
        assert!(positions.take_due(later, 0).is_empty(), "beyond the pace");
        positions.hurry(&user, &device);
        let due = positions.take_due(Instant::now(), 0);
        assert_eq!(positions.pending(&user, &device), [(LogId::Everyone, Seq::at(7))], "being written");
        positions.keep(&due);
        positions.flush().await;
        assert!(positions.pending(&user, &device).is_empty());
        assert_eq!(inbox.log_positions(user, device).await, Ok(vec![(LogId::Everyone, Seq::at(7))]));
    }
}
