//! A thread that many wait for, and a remedy for when it could run and does not.
//!
//! Where one processor is held by a thread that computes, another thread that was waiting there can
//! stay behind it until the next tick, for four milliseconds, while other processors idle: a kernel
//! from 6.12 on leaves a thread that goes to sleep after more than its share on the queue of its
//! processor, and wakes it there. A thread that syncs sleeps three times for each sync. So whoever
//! finds such a thread late asks for it on the own processor, and then lets it run everywhere again
//! as before: a thread that is kept waiting moves at once, one that rightly sleeps does not notice.
//! Figures: docs/benchmarks.md.

use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, Pid, gettid, sched_getaffinity, sched_getcpu, sched_setaffinity};

/// So much later than expected is late: the wake-up of a thread on an idle processor takes a tenth
/// of it.
const TOLERANCE: Duration = Duration::from_micros(250);
/// Nothing is expected.
const NEVER: u64 = u64::MAX;

/// Watches a thread. Times are microseconds since it was made.
#[derive(Debug)]
pub struct Awaited {
    made: Instant,
    /// Its number; 0 before there is one.
    thread: AtomicI32,
    expected_us: AtomicU64,
    /// When it is late, or late again.
    late_us: AtomicU64,
}

impl Default for Awaited {
    fn default() -> Self {
        Self {
            made: Instant::now(),
            thread: AtomicI32::new(0),
            expected_us: AtomicU64::new(NEVER),
            late_us: AtomicU64::new(NEVER),
        }
    }
}

impl Awaited {
    /// It is the thread that calls.
    pub fn is_this_thread(&self) {
        self.thread.store(gettid().as_raw_nonzero().get(), Ordering::Relaxed);
    }

    /// From now on it should be heard of after `left`.
    pub fn expect_in(&self, left: Duration) {
        let expected = self.now_us() + micros(left);
        self.expected_us.store(expected, Ordering::Relaxed);
        self.late_us.store(expected + micros(TOLERANCE), Ordering::Relaxed);
    }

    /// It may sleep as long as it likes.
    pub fn expect_nothing(&self) {
        self.late_us.store(NEVER, Ordering::Relaxed);
    }

    /// Fetches the thread to the caller's processor if it is late, and answers whether it was;
    /// while it stays late, again after twice the time.
    pub fn fetch_if_late(&self) -> bool {
        let late = self.late_us.load(Ordering::Relaxed);
        // The clock is asked only if there is something to hold against it.
        if late == NEVER {
            return false;
        }
        let now = self.now_us();
        if now < late {
            return false;
        }
        let again = now + now.saturating_sub(self.expected_us.load(Ordering::Relaxed));
        // Of several who notice, one does it.
        if self.late_us.compare_exchange(late, again, Ordering::Relaxed, Ordering::Relaxed).is_err() {
            return false;
        }
        if let Some(thread) = Pid::from_raw(self.thread.load(Ordering::Relaxed)) {
            // Where it may not run here, or is gone, there is nothing to be done.
            let _ = fetch(thread);
        }
        true
    }

    fn now_us(&self) -> u64 {
        micros(self.made.elapsed())
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(NEVER)
}

/// Has a thread of this process run here, and from then on wherever it was allowed to.
fn fetch(thread: Pid) -> rustix::io::Result<()> {
    let allowed = sched_getaffinity(Some(thread))?;
    let here = sched_getcpu();
    if !allowed.is_set(here) {
        return Ok(());
    }
    let mut only_here = CpuSet::new();
    only_here.set(here);
    sched_setaffinity(Some(thread), &only_here)?;
    sched_setaffinity(Some(thread), &allowed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::mpsc;

    /// An awaited thread that sleeps until the sender is dropped, and where it may run.
    fn asleep() -> (Arc<Awaited>, mpsc::SyncSender<()>, std::thread::JoinHandle<CpuSet>) {
        let awaited = Arc::new(Awaited::default());
        let (wake, woken) = mpsc::sync_channel(1);
        let (ready, begun) = mpsc::sync_channel(1);
        let thread = std::thread::spawn({
            let awaited = Arc::clone(&awaited);
            move || {
                awaited.is_this_thread();
                ready.send(()).unwrap();
                woken.recv().unwrap_err();
                sched_getaffinity(None).unwrap()
            }
        });
        begun.recv().unwrap();
        (awaited, wake, thread)
    }

    #[test]
    fn a_late_thread_is_fetched_and_may_run_where_it_might_before() {
        let (awaited, wake, thread) = asleep();
        awaited.expect_in(Duration::ZERO);
        let deadline = Instant::now() + Duration::from_secs(10);
        while !awaited.fetch_if_late() {
            std::hint::spin_loop();
            assert!(Instant::now() < deadline, "it was never late");
        }
        drop(wake);
        assert_eq!(thread.join().unwrap(), sched_getaffinity(None).unwrap());
    }

    #[test]
    fn a_fetched_thread_keeps_to_where_it_may_run() {
        let (awaited, wake, thread) = asleep();
        let id = Pid::from_raw(awaited.thread.load(Ordering::Relaxed)).unwrap();
        // This thread stays where it is from here on, so that "here" means something.
        let (allowed, here) = (sched_getaffinity(None).unwrap(), sched_getcpu());
        let mut only_here = CpuSet::new();
        only_here.set(here);
        sched_setaffinity(None, &only_here).unwrap();
        fetch(id).unwrap();
        assert_eq!(sched_getaffinity(Some(id)).unwrap(), allowed);
        // One that may not run here keeps to where it may.
        if let Some(other) = (0..CpuSet::MAX_CPU).find(|cpu| allowed.is_set(*cpu) && *cpu != here) {
            let mut elsewhere = CpuSet::new();
            elsewhere.set(other);
            sched_setaffinity(Some(id), &elsewhere).unwrap();
            fetch(id).unwrap();
            assert_eq!(sched_getaffinity(Some(id)).unwrap(), elsewhere);
        }
        drop(wake);
        thread.join().unwrap();
    }

    #[test]
    fn only_what_is_expected_and_over_its_time_is_late() {
        let awaited = Awaited::default();
        assert!(!awaited.fetch_if_late(), "nothing is expected yet");
        awaited.expect_in(Duration::from_secs(3600));
        assert!(!awaited.fetch_if_late(), "there is time");
        // It was expected a minute ago.
        let minute = micros(Duration::from_secs(60));
        let awaited = Awaited { made: Instant::now() - Duration::from_micros(minute), ..Awaited::default() };
        awaited.expected_us.store(0, Ordering::Relaxed);
        awaited.late_us.store(0, Ordering::Relaxed);
        assert!(awaited.fetch_if_late());
        assert!(!awaited.fetch_if_late(), "one fetch is enough");
        let again = awaited.late_us.load(Ordering::Relaxed);
        assert!(again >= 2 * minute, "looked at again after twice the time, not at {again}");
        awaited.late_us.store(0, Ordering::Relaxed);
        awaited.expect_nothing();
        assert!(!awaited.fetch_if_late(), "it rests");
    }
}
