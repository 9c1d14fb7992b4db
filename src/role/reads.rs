//! Reads of one thing that many ask for at the same time. Each is answered by a read that began
//! after it had asked, and one such read answers all who wait for it.
//!
//! A read is a task of its own: it goes on to its end when nobody waits for it any more. Half a
//! read would keep its connection to the store.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};
use parking_lot::Mutex;

use crate::tasks::raised_or_else;

type Read<T> = Shared<BoxFuture<'static, T>>;

/// The reads under way, by what is read.
pub(super) struct Reads<K, T: Clone> {
    under_way: Arc<Mutex<HashMap<K, Turn<T>>>>,
    /// What stands for the outcome of a read that was cancelled, because the process ends.
    cancelled: fn() -> T,
}

/// A read that has begun, and the one after it, which begins when that one has ended.
struct Turn<T: Clone> {
    running: Read<T>,
    next: Option<Read<T>>,
}

/// Takes a turn out when its last read has ended, however it ended.
struct Ends<K: Eq + Hash, T: Clone> {
    under_way: Arc<Mutex<HashMap<K, Turn<T>>>>,
    of: K,
}

impl<K: Eq + Hash, T: Clone> Drop for Ends<K, T> {
    fn drop(&mut self) {
        let mut under_way = self.under_way.lock();
        if let Some(turn) = under_way.get_mut(&self.of) {
            match turn.next.take() {
                Some(next) => turn.running = next,
                None => drop(under_way.remove(&self.of)),
            }
        }
    }
}

impl<K: Eq + Hash + Clone + Send + 'static, T: Clone + Send + Sync + 'static> Reads<K, T> {
    pub(super) fn new(cancelled: fn() -> T) -> Self {
        Self { under_way: Arc::default(), cancelled }
    }

    /// The outcome of a read that begins now or later: one that `read` makes, or one that another
    /// caller waits for and that has not begun.
    pub(super) async fn get(&self, of: &K, read: impl FnOnce() -> BoxFuture<'static, T>) -> T {
        self.turn(of, read).await
    }

    fn turn(&self, of: &K, read: impl FnOnce() -> BoxFuture<'static, T>) -> Read<T> {
        let mut under_way = self.under_way.lock();
        match under_way.get_mut(of) {
            None => {
                let running = self.begin(of, None, read());
                under_way.insert(of.clone(), Turn { running: running.clone(), next: None });
                running
            }
            Some(Turn { next: Some(next), .. }) => next.clone(),
            Some(turn) => {
                let next = self.begin(of, Some(turn.running.clone()), read());
                turn.next = Some(next.clone());
                next
            }
        }
    }

    /// Begins a read, behind another one. It takes its place in the turn when that one has ended:
    /// until then it has read nothing.
    fn begin(&self, of: &K, behind: Option<Read<T>>, read: BoxFuture<'static, T>) -> Read<T> {
        let ends = Ends { under_way: Arc::clone(&self.under_way), of: of.clone() };
        let task = tokio::spawn(async move {
            if let Some(behind) = behind {
                behind.await;
            }
            let _ends = ends;
            read.await
        });
        let cancelled = self.cancelled;
        async move { raised_or_else(task.await, cancelled) }.boxed().shared()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::sync::Semaphore;

    use super::*;

    /// What is read is the number of the read. Each waits for a permit.
    struct Bench {
        reads: Arc<Reads<u8, usize>>,
        begun: Arc<AtomicUsize>,
        permits: Arc<Semaphore>,
    }

    impl Bench {
        fn new() -> Self {
            Self {
                reads: Arc::new(Reads::new(|| 0)),
                begun: Arc::default(),
                permits: Arc::new(Semaphore::new(0)),
            }
        }

        fn ask(&self, of: u8) -> tokio::task::JoinHandle<usize> {
            let (reads, begun, permits) =
                (Arc::clone(&self.reads), Arc::clone(&self.begun), Arc::clone(&self.permits));
            tokio::spawn(async move {
                let read = move || {
                    async move {
                        let number = begun.fetch_add(1, Ordering::SeqCst) + 1;
                        permits.acquire().await.unwrap().forget();
                        number
                    }
                    .boxed()
                };
                reads.get(&of, read).await
            })
        }

        async fn settle(&self) {
            for _ in 0..20 {
                tokio::task::yield_now().await;
            }
        }
    }

    #[tokio::test]
    async fn who_asks_during_a_read_shares_the_next_one() {
        let bench = Bench::new();
        let first = bench.ask(1);
        bench.settle().await;
        let later = [bench.ask(1), bench.ask(1), bench.ask(1)];
        let other = bench.ask(2);
        bench.settle().await;
        assert_eq!(bench.begun.load(Ordering::SeqCst), 2, "one of each");
        bench.permits.add_permits(2);
        assert_eq!((first.await.unwrap(), other.await.unwrap()), (1, 2));
        bench.settle().await;
        let last = bench.ask(1);
        bench.settle().await;
        bench.permits.add_permits(1);
        for one in later {
            assert_eq!(one.await.unwrap(), 3);
        }
        bench.permits.add_permits(1);
        assert_eq!(last.await.unwrap(), 4, "the third had begun when it asked");
        assert!(bench.reads.under_way.lock().is_empty());
    }

    #[tokio::test]
    async fn a_read_goes_on_to_its_end_when_nobody_waits_for_it() {
        let bench = Bench::new();
        let first = bench.ask(1);
        bench.settle().await;
        let second = bench.ask(1);
        bench.settle().await;
        first.abort();
        second.abort();
        bench.permits.add_permits(2);
        bench.settle().await;
        assert_eq!(bench.begun.load(Ordering::SeqCst), 2);
        assert!(bench.reads.under_way.lock().is_empty());
        assert_eq!(bench.permits.available_permits(), 0);
    }
}
