//! The fallback entries of the nodes of one process.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::future::{BoxFuture, FutureExt, ready};
use parking_lot::RwLock;

use super::{Fallback, FallbackError};
use crate::message::{NodeId, UserId};

/// See the room's comment. Cloned, it is the same set of entries.
#[derive(Clone, Default)]
pub struct LocalFallback {
    inner: Arc<Inner>,
}

#[derive(Default)]
struct Inner {
    /// The nodes of each displaced user: one or two, so a list serves better than a set.
    entries: RwLock<HashMap<UserId, Vec<NodeId>>>,
    /// The size of `entries`, to be asked for each batch without the lock.
    count: AtomicUsize,
}

impl LocalFallback {
    fn change(
        &self,
        act: impl FnOnce(&mut HashMap<UserId, Vec<NodeId>>),
    ) -> BoxFuture<'_, Result<(), FallbackError>> {
        let mut entries = self.inner.entries.write();
        act(&mut entries);
        self.inner.count.store(entries.len(), Ordering::Release);
        ready(Ok(())).boxed()
    }
}

impl Fallback for LocalFallback {
    fn add(&self, node: &NodeId, users: Vec<UserId>) -> BoxFuture<'_, Result<(), FallbackError>> {
        self.change(|entries| {
            for user in users {
                let nodes = entries.entry(user).or_default();
                if !nodes.contains(node) {
                    nodes.push(node.clone());
                }
            }
        })
    }

    fn remove(&self, node: &NodeId, users: Vec<UserId>) -> BoxFuture<'_, Result<(), FallbackError>> {
        self.change(|entries| {
            for user in users {
                if let Some(nodes) = entries.get_mut(&user) {
                    nodes.retain(|known| known != node);
                    if nodes.is_empty() {
                        entries.remove(&user);
                    }
                }
            }
        })
    }

    fn forget(&self, node: &NodeId) -> BoxFuture<'_, Result<(), FallbackError>> {
        self.change(|entries| {
            entries.retain(|_, nodes| {
                nodes.retain(|known| known != node);
                !nodes.is_empty()
            });
        })
    }

    fn nodes_of(&self, users: Vec<UserId>) -> BoxFuture<'_, Result<Vec<Vec<NodeId>>, FallbackError>> {
        let entries = self.inner.entries.read();
        let found = users.iter().map(|user| entries.get(user).cloned().unwrap_or_default()).collect();
        ready(Ok(found)).boxed()
    }

    fn is_empty(&self) -> bool {
        self.inner.count.load(Ordering::Acquire) == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn entries_come_and_go_by_node() {
        let fallback = LocalFallback::default();
        let user = |name: &str| UserId::parse(name).unwrap();
        let (zero, one) = (NodeId::parse("push-0").unwrap(), NodeId::parse("push-1").unwrap());
        assert!(fallback.is_empty());
        fallback.add(&zero, vec![user("a"), user("b"), user("a")]).await.unwrap();
        fallback.add(&one, vec![user("a")]).await.unwrap();
        let found = fallback.nodes_of(vec![user("a"), user("b"), user("c")]).await.unwrap();
        assert_eq!(found, [vec![zero.clone(), one.clone()], vec![zero.clone()], vec![]]);
        fallback.remove(&zero, vec![user("a"), user("c")]).await.unwrap();
        assert_eq!(fallback.nodes_of(vec![user("a")]).await.unwrap(), [vec![one.clone()]]);
        fallback.forget(&one).await.unwrap();
        fallback.remove(&zero, vec![user("b")]).await.unwrap();
        assert!(fallback.is_empty());
    }
}
