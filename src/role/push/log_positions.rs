//! Writing the positions of devices in logs. A position that is not written yet counts on this
//! node; one that is lost costs repeats.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use super::registry::SessionHandle;
use super::tails::LogReadingLimits;
use crate::backoff::between;
use crate::inbox::{Change, Device, Inbox, InboxError};
use crate::message::{DeviceId, LogId, Seq, UserId};

/// Time between two looks at what is due.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// Devices in one write.
const BATCH: usize = 1_000;
/// Devices that wait for their first position. More are refused, as sessions that cannot attach.
const BEGINNING_MAX: usize = 8_000;

/// The positions of a device that the store does not have.
struct Unwritten {
    logs: HashMap<LogId, Seq>,
    due: Instant,
    /// It is written with the next look, whatever the pace.
    hurries: bool,
}

/// The first positions of a device, and who waits until they are on stable storage.
struct Beginning {
    begins: Change,
    written: oneshot::Sender<Result<(), InboxError>>,
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
    beginning: Mutex<Vec<Beginning>>,
    begun: Notify,
}

impl LogPositions {
    /// Writes to `inbox`.
    pub(super) fn new(inbox: Arc<dyn Inbox>, limits: LogReadingLimits) -> Self {
        let (state, beginning) = (Mutex::default(), Mutex::default());
        Self { inbox, limits, state, beginning, begun: Notify::new() }
    }

    /// Writes where a device begins. Devices that come together share a write, since each write is
    /// synced. Returns when it is on stable storage.
    ///
    /// # Errors
    ///
    /// The store's, or too many devices wait.
    pub(super) async fn begin(
        &self,
        (user, device): (UserId, DeviceId),
        logs: Vec<(LogId, Seq)>,
    ) -> Result<(), InboxError> {
        let busy = || InboxError::Unavailable("too many devices begin to read logs at once".to_owned());
        let (written, answer) = oneshot::channel();
        {
            let mut beginning = self.beginning.lock();
            if beginning.len() >= BEGINNING_MAX {
                return Err(busy());
            }
            let begins = Change::Positions { user, device, logs };
            beginning.push(Beginning { begins, written });
        }
        self.begun.notify_one();
        answer.await.unwrap_or_else(|_| Err(busy()))
    }

    /// Writes first positions, one batch after another, for ever.
    async fn write_beginnings(&self) {
        loop {
            self.begun.notified().await;
            loop {
                let batch: Vec<Beginning> = {
                    let mut beginning = self.beginning.lock();
                    let count = beginning.len().min(BATCH);
                    beginning.drain(..count).collect()
                };
                if batch.is_empty() {
                    break;
                }
                let (changes, waiting): (Vec<Change>, Vec<_>) =
                    batch.into_iter().map(|one| (one.begins, one.written)).unzip();
                let written = self.inbox.update(changes).await;
                for one in waiting {
                    // A session that has gone meanwhile wants no answer.
                    let _ = one.send(written.clone());
                }
            }
        }
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

    /// Writes first positions, and what is due, for ever.
    pub(super) async fn run(self: Arc<Self>) {
        tokio::join!(self.write_beginnings(), self.write_due());
    }

    async fn write_due(&self) {
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
        let stored = inbox.log_positions(vec![(user, device)]).await;
        assert_eq!(stored, Ok(vec![vec![(LogId::Everyone, Seq::at(7))]]));
    }

    #[tokio::test]
    async fn devices_that_begin_together_are_all_written_before_they_go_on_and_too_many_are_refused() {
        let inbox = Arc::new(MemoryInbox::new(Clock::system()));
        let positions = LogPositions::new(Arc::clone(&inbox) as _, LogReadingLimits::default());
        let user = |n: usize| UserId::parse(&format!("user-{n}")).unwrap();
        let begin = |n| positions.begin((user(n), DeviceId::default()), vec![(LogId::Everyone, Seq::at(3))]);
        // More than two batches, none of which is written yet.
        let mut waiting: Vec<_> = (0..BEGINNING_MAX).map(|n| Box::pin(begin(n))).collect();
        for one in &mut waiting {
            assert!(futures_util::poll!(one.as_mut()).is_pending());
        }
        assert!(matches!(begin(BEGINNING_MAX).await, Err(InboxError::Unavailable(_))));
        let all = async {
            for (n, one) in waiting.into_iter().enumerate() {
                assert_eq!(one.await, Ok(()));
                let stored = inbox.log_positions(vec![(user(n), DeviceId::default())]).await;
                assert_eq!(stored, Ok(vec![vec![(LogId::Everyone, Seq::at(3))]]));
            }
        };
        tokio::select! {
            () = all => {}
            () = positions.write_beginnings() => unreachable!("it goes on for ever"),
        }
    }
}
