//! The fallback entries of the nodes of one process.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::future::{BoxFuture, FutureExt, ready};
use parking_lot::RwLock;

use super::{Fallback, FallbackError, Hints, Holder, Which};
use crate::message::{NodeId, UserId};

/// Entries in memory. Cloned, it is the same set of entries.
#[derive(Clone, Default)]
pub struct LocalFallback {
    inner: Arc<Inner>,
}

#[derive(Default)]
struct Inner {
    /// The holders of each displaced user. There are one or two, so a list is better than a set.
    entries: RwLock<HashMap<UserId, Vec<Holder>>>,
    /// Size of `entries`, to be read for each batch without the lock.
    count: AtomicUsize,
}

impl LocalFallback {
    fn change(
        &self,
        act: impl FnOnce(&mut HashMap<UserId, Vec<Holder>>),
    ) -> BoxFuture<'_, Result<(), FallbackError>> {
        let mut entries = self.inner.entries.write();
        act(&mut entries);
        self.inner.count.store(entries.len(), Ordering::Release);
        ready(Ok(())).boxed()
    }
}

impl Fallback for LocalFallback {
    fn add(&self, holder: &Holder, users: Vec<UserId>) -> BoxFuture<'_, Result<(), FallbackError>> {
        self.change(|entries| {
            for user in users {
                let holders = entries.entry(user).or_default();
                if !holders.contains(holder) {
                    holders.push(holder.clone());
                }
            }
        })
    }

    fn remove(&self, holder: &Holder, which: Which) -> BoxFuture<'_, Result<(), FallbackError>> {
        let without = |holders: &mut Vec<Holder>| {
            holders.retain(|known| known != holder);
            !holders.is_empty()
        };
        self.change(|entries| match which {
            Which::All => entries.retain(|_, holders| without(holders)),
            Which::Users(users) => {
                for user in users {
                    if let Some(holders) = entries.get_mut(&user)
                        && !without(holders)
                    {
                        entries.remove(&user);
                    }
                }
            }
        })
    }

    /// Entries have no lease here.
    fn keep(&self, holder: &Holder) -> BoxFuture<'_, Result<usize, FallbackError>> {
        let entries = self.inner.entries.read();
        let size = entries.values().filter(|holders| holders.contains(holder)).count();
        ready(Ok(size)).boxed()
    }

    fn nodes_of(&self, users: Vec<UserId>) -> BoxFuture<'_, Result<Vec<Vec<NodeId>>, FallbackError>> {
        let entries = self.inner.entries.read();
        let nodes = |user| entries.get(user).into_iter().flatten().map(|holder: &Holder| holder.node.clone());
        let found = users.iter().map(|user| nodes(user).collect()).collect();
        ready(Ok(found)).boxed()
    }

    fn hints(&self) -> Hints {
        Hints { empty: self.inner.count.load(Ordering::Acquire) == 0, seen_after: Duration::ZERO }
    }
}

#[cfg(test)]
mod tests {
    use super::super::conformance::{self, Bench};
    use super::*;

    #[tokio::test]
    async fn it_keeps_the_contract() {
        let fallback = Arc::new(LocalFallback::default());
        conformance::suite(&Bench { own: Arc::clone(&fallback) as _, others: fallback }).await;
    }
}
