//! Membership inside one process: for the embedded default and for tests. There is nothing that could be lost, so
//! there are no leases and no holds; everything else is as the contract has it.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use futures_util::future::{BoxFuture, FutureExt, ready};
use parking_lot::Mutex;
use tokio::sync::watch;

use super::{Counts, Member, Membership, MembershipError, NodeInfo, NodeState, View};
use crate::clock::Clock;
use crate::message::NodeId;

/// See the room's comment. Cloned, it is the same membership.
#[derive(Clone)]
pub struct LocalMembership {
    inner: Arc<Inner>,
}

struct Inner {
    clock: Clock,
    /// Locked while a view is built and published, so that views appear in the order of their epochs.
    members: Mutex<BTreeMap<NodeId, Member>>,
    counts: Mutex<HashMap<NodeId, Counts>>,
    published: watch::Sender<Arc<View>>,
}

impl LocalMembership {
    /// A new generation without members.
    #[must_use]
    pub fn new(clock: Clock) -> Self {
        let generation: Arc<str> = ulid::Ulid::generate().to_string().into();
        let empty = View::new(generation, clock.now().0, Vec::new(), false);
        let published = watch::Sender::new(Arc::new(empty));
        Self {
            inner: Arc::new(Inner { clock, members: Mutex::default(), counts: Mutex::default(), published }),
        }
    }

    /// Changes the members and, if anything came of it, publishes the next view.
    fn change<T>(&self, act: impl FnOnce(&mut BTreeMap<NodeId, Member>) -> T) -> T {
        let mut members = self.inner.members.lock();
        let before = members.clone();
        let answer = act(&mut members);
        if *members != before {
            self.inner.published.send_modify(|view| {
                let epoch = (view.epoch + 1).max(self.inner.clock.now().0);
                let all = members.values().cloned().collect();
                *view = Arc::new(View::new(Arc::clone(&view.generation), epoch, all, false));
            });
        }
        answer
    }

    fn change_own(
        &self,
        node: &NodeId,
        incarnation: u64,
        act: impl FnOnce(&mut BTreeMap<NodeId, Member>),
    ) -> BoxFuture<'static, Result<(), MembershipError>> {
        let outcome = self.change(|members| match members.get(node) {
            Some(member) if member.incarnation > incarnation => Err(MembershipError::Fenced(node.clone())),
            Some(_) => {
                act(members);
                Ok(())
            }
            None => Ok(()),
        });
        ready(outcome).boxed()
    }
}

impl Membership for LocalMembership {
    fn views(&self) -> watch::Receiver<Arc<View>> {
        self.inner.published.subscribe()
    }

    fn join(&self, info: NodeInfo) -> BoxFuture<'_, Result<u64, MembershipError>> {
        let now = self.inner.clock.now().0;
        let incarnation = self.change(|members| {
            let incarnation = members.get(&info.node).map_or(now, |known| now.max(known.incarnation + 1));
            let member = Member { info: info.clone(), incarnation, state: NodeState::Active };
            members.insert(info.node.clone(), member);
            incarnation
        });
        ready(Ok(incarnation)).boxed()
    }

    fn drain(&self, node: &NodeId, incarnation: u64) -> BoxFuture<'_, Result<(), MembershipError>> {
        self.change_own(node, incarnation, |members| {
            if let Some(member) = members.get_mut(node) {
                member.state = NodeState::Draining;
            }
        })
    }

    fn leave(&self, node: &NodeId, incarnation: u64) -> BoxFuture<'_, Result<(), MembershipError>> {
        self.inner.counts.lock().remove(node);
        self.change_own(node, incarnation, |members| {
            members.remove(node);
        })
    }

    fn counts(&self, own: Option<(NodeId, Counts)>) -> Vec<(NodeId, Counts)> {
        let mut counts = self.inner.counts.lock();
        counts.extend(own);
        counts.iter().map(|(node, counts)| (node.clone(), *counts)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{Millis, UserId};

    fn info(name: &str) -> NodeInfo {
        NodeInfo { node: NodeId::parse(name).unwrap(), weight: 1.0, accept_per_s: 4000 }
    }

    #[tokio::test]
    async fn views_rise_and_a_draining_node_owns_nothing() {
        let membership = LocalMembership::new(Clock::standing(Millis(1000)));
        let views = membership.views();
        assert!(views.borrow().owner(&UserId::parse("alice").unwrap()).is_none());
        let zero = membership.join(info("push-0")).await.unwrap();
        membership.join(info("push-1")).await.unwrap();
        let both = Arc::clone(&views.borrow());
        assert_eq!(both.members.len(), 2);
        membership.drain(&info("push-0").node, zero).await.unwrap();
        let draining = Arc::clone(&views.borrow());
        assert!(draining.epoch > both.epoch && draining.digest != both.digest);
        assert_eq!(draining.owner(&UserId::parse("alice").unwrap()).unwrap().info.node.as_str(), "push-1");
        assert_eq!(draining.members.len(), 2);
        membership.leave(&info("push-0").node, zero).await.unwrap();
        assert_eq!(views.borrow().members.len(), 1);
    }

    #[tokio::test]
    async fn the_last_to_register_has_the_name() {
        let membership = LocalMembership::new(Clock::standing(Millis(1000)));
        let first = membership.join(info("push-0")).await.unwrap();
        let second = membership.join(info("push-0")).await.unwrap();
        assert!(second > first);
        let node = info("push-0").node;
        assert_eq!(membership.leave(&node, first).await, Err(MembershipError::Fenced(node.clone())));
        assert_eq!(membership.views().borrow().member(&node).unwrap().incarnation, second);
    }

    #[tokio::test]
    async fn counts_never_raise_the_epoch() {
        let membership = LocalMembership::new(Clock::standing(Millis(1000)));
        membership.join(info("push-0")).await.unwrap();
        let epoch = membership.views().borrow().epoch;
        let counts = Counts { sessions: 7, displaced: 1 };
        let all = membership.counts(Some((info("push-0").node, counts)));
        assert_eq!(all, [(info("push-0").node, counts)]);
        assert_eq!(membership.views().borrow().epoch, epoch);
    }
}
