//! Membership inside one process, for the embedded default and for tests. Nothing can be lost here,
//! so there are no leases and no holds.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use futures_util::future::{BoxFuture, FutureExt, ready};
use parking_lot::Mutex;
use tokio::sync::watch;

use super::{
    Counts, Departure, LeaseState, Member, Membership, MembershipError, NodeInfo, NodeState, Reached,
    Registration, View,
};
use crate::clock::Clock;
use crate::message::NodeId;

/// Membership inside one process. Cloned, it is the same membership.
#[derive(Clone)]
pub struct LocalMembership {
    inner: Arc<Inner>,
}

struct Inner {
    clock: Clock,
    /// Locked while a view is built and published, so that views appear in the order of their
    /// epochs.
    members: Mutex<BTreeMap<NodeId, Member>>,
    /// The lease state of the process that has a name now.
    standings: Mutex<HashMap<NodeId, watch::Sender<LeaseState>>>,
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
            inner: Arc::new(Inner {
                clock,
                members: Mutex::default(),
                standings: Mutex::default(),
                counts: Mutex::default(),
                published,
            }),
        }
    }

    /// Changes the members, and publishes the next view if anything has changed.
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

    /// Sets the lease state of the process that has this name, for tests.
    #[cfg(any(test, feature = "test-support"))]
    pub fn set_standing(&self, node: &NodeId, standing: LeaseState) {
        if let Some(told) = self.inner.standings.lock().get(node) {
            told.send_replace(standing);
        }
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

    fn join(&self, info: NodeInfo) -> BoxFuture<'_, Result<Registration, MembershipError>> {
        let now = self.inner.clock.now().0;
        let node = info.node.clone();
        let incarnation = self.change(|members| {
            let incarnation = members.get(&info.node).map_or(now, |known| now.max(known.incarnation + 1));
            let member = Member { info: info.clone(), incarnation, state: NodeState::Active };
            members.insert(info.node.clone(), member);
            incarnation
        });
        let (told, standing) = watch::channel(LeaseState::Member(1));
        if let Some(earlier) = self.inner.standings.lock().insert(node, told) {
            earlier.send_replace(LeaseState::Fenced);
        }
        // Within one process there is no address that could lead elsewhere.
        ready(Ok(Registration { incarnation, standing, proof: Reached::new(true) })).boxed()
    }

    fn depart(
        &self,
        node: &NodeId,
        incarnation: u64,
        how: Departure,
    ) -> BoxFuture<'_, Result<(), MembershipError>> {
        if how == Departure::Left {
            self.inner.counts.lock().remove(node);
        }
        self.change_own(node, incarnation, |members| match how {
            Departure::Left => drop(members.remove(node)),
            Departure::Draining => {
                if let Some(member) = members.get_mut(node) {
                    member.state = NodeState::Draining;
                }
            }
        })
    }

    fn counts(&self, own: Option<(NodeId, Counts)>) -> Vec<(NodeId, Counts)> {
        let mut counts = self.inner.counts.lock();
        counts.extend(own);
        counts.iter().map(|(node, counts)| (node.clone(), *counts)).collect()
    }

    /// The published view is always the newest.
    fn refresh(&self) {}
}

#[cfg(test)]
mod tests {
    use super::super::conformance::{self, Bench};
    use super::*;

    #[tokio::test]
    async fn it_keeps_the_contract() {
        let membership = Arc::new(LocalMembership::new(Clock::system()));
        conformance::suite(&Bench { own: Arc::clone(&membership) as _, others: membership }).await;
    }
}
