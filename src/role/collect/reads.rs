//! Reads of one thing that many ask for at the same time. Each is answered by a read that began
//! after it had asked, and one such read answers all who wait for it.

use std::collections::HashMap;
use std::hash::Hash;

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};
use parking_lot::Mutex;

type Read<T> = Shared<BoxFuture<'static, T>>;

/// The reads under way, by what is read.
pub(super) struct Reads<K, T: Clone> {
    under_way: Mutex<HashMap<K, Turn<T>>>,
}

/// A read that has begun, and the one after it, which begins when that one has ended.
struct Turn<T: Clone> {
    running: Read<T>,
    next: Option<Read<T>>,
}

impl<K, T: Clone> Default for Reads<K, T> {
    fn default() -> Self {
        Self { under_way: Mutex::default() }
    }
}

impl<K: Eq + Hash + Clone, T: Clone + Send + Sync + 'static> Reads<K, T> {
    /// The outcome of a read that begins now or later: one that `read` makes, or one that another
    /// caller waits for and that has not begun.
    pub(super) async fn get(&self, of: &K, read: impl FnOnce() -> BoxFuture<'static, T>) -> T {
        let outcome = self.turn(of, read).await;
        let mut under_way = self.under_way.lock();
        if under_way.get(of).is_some_and(Turn::is_over) {
            under_way.remove(of);
        }
        outcome
    }

    fn turn(&self, of: &K, read: impl FnOnce() -> BoxFuture<'static, T>) -> Read<T> {
        let mut under_way = self.under_way.lock();
        let Some(turn) = under_way.get_mut(of) else {
            let running = read().shared();
            under_way.insert(of.clone(), Turn { running: running.clone(), next: None });
            return running;
        };
        if turn.running.peek().is_some()
            && let Some(next) = turn.next.take()
        {
            // It may have begun.
            turn.running = next;
        }
        if turn.running.peek().is_some() {
            turn.running = read().shared();
            return turn.running.clone();
        }
        let running = turn.running.clone();
        let next = turn.next.get_or_insert_with(|| {
            let read = read();
            async move {
                running.await;
                read.await
            }
            .boxed()
            .shared()
        });
        next.clone()
    }
}

impl<T: Clone> Turn<T> {
    fn is_over(&self) -> bool {
        self.running.peek().is_some() && self.next.as_ref().is_none_or(|next| next.peek().is_some())
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
            Self { reads: Arc::default(), begun: Arc::default(), permits: Arc::new(Semaphore::new(0)) }
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
    async fn one_that_gives_up_holds_up_nobody() {
        let bench = Bench::new();
        let first = bench.ask(1);
        bench.settle().await;
        let second = bench.ask(1);
        bench.settle().await;
        first.abort();
        bench.settle().await;
        bench.permits.add_permits(2);
        assert_eq!(second.await.unwrap(), 2, "after the first, which is read to its end");
    }
}
