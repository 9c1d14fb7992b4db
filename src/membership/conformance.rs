//! The conformance suite of membership: what every adapter must do. A failed expectation panics, as
//! in any test.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::missing_panics_doc)]

use std::sync::Arc;
use std::time::Duration;

use super::Delays;
use super::{
    Counts, Departure, LeaseState, Membership, MembershipError, NodeInfo, NodeState, Registration, View,
};
use crate::message::{NodeId, UserId};

/// One membership as two processes see it. In one process both may be the same.
pub struct Bench {
    /// Where the nodes register.
    pub own: Arc<dyn Membership>,
    /// Where the views are read.
    pub others: Arc<dyn Membership>,
}

/// How long a change may take to become visible.
const DEADLINE: Duration = Duration::from_secs(10);

/// Runs every part, on a membership that nobody has used.
pub async fn suite(bench: &Bench) {
    views_rise_and_a_draining_node_owns_nothing(bench).await;
    the_last_to_register_has_the_name(bench).await;
    counts_never_raise_the_epoch(bench).await;
    routers_are_no_members(bench).await;
}

fn info(name: &str) -> NodeInfo {
    NodeInfo {
        node: NodeId::parse(name).unwrap(),
        weight: 1.0,
        accept_per_s: 4000,
        peer: "127.0.0.1:7070".into(),
        push: true,
        dispatch: false,
        store: "".into(),
        ticket_in_auth: false,
    }
}

/// Registers a node and marks it as reached.
async fn join(membership: &Arc<dyn Membership>, info: NodeInfo) -> Registration {
    let registration = membership.join(info).await.unwrap();
    registration.proof.note();
    registration
}

impl Bench {
    /// Waits for a view that `holds` accepts.
    async fn until(&self, what: &str, holds: impl Fn(&View) -> bool) -> Arc<View> {
        let mut views = self.others.views();
        let found = tokio::time::timeout(DEADLINE, views.wait_for(|view| holds(view))).await;
        Arc::clone(&found.unwrap_or_else(|_| panic!("never seen: {what}")).unwrap())
    }
}

async fn views_rise_and_a_draining_node_owns_nothing(bench: &Bench) {
    let alice = UserId::parse("alice").unwrap();
    assert!(bench.others.views().borrow().owner(&alice).is_none());
    let zero = join(&bench.own, info("push-0")).await.incarnation;
    let one = join(&bench.own, info("push-1")).await.incarnation;
    let both = bench.until("two nodes", |view| view.members.len() == 2).await;
    assert!(!both.generation.is_empty() && both.epoch > 0 && !both.held);
    assert_eq!(both.members[0].info, info("push-0"));
    bench.own.depart(&info("push-0").node, zero, Departure::Draining).await.unwrap();
    let draining = bench.until("one that drains", |view| view.members[0].state == NodeState::Draining).await;
    assert!(draining.epoch > both.epoch && draining.digest != both.digest);
    assert_eq!(draining.owner(&alice).unwrap().info.node.as_str(), "push-1");
    assert_eq!(draining.members.len(), 2);
    bench.own.depart(&info("push-0").node, zero, Departure::Left).await.unwrap();
    let gone = bench.until("one that is left", |view| view.members.len() == 1).await;
    assert!(gone.epoch > draining.epoch);
    assert_eq!(gone.members[0].incarnation, one);
}

async fn the_last_to_register_has_the_name(bench: &Bench) {
    let node = info("push-2").node;
    let mut first = join(&bench.own, info("push-2")).await;
    assert_eq!(*first.standing.borrow(), LeaseState::Member(1));
    let second = join(&bench.others, info("push-2")).await;
    assert!(second.incarnation > first.incarnation);
    let fenced = first.standing.wait_for(|standing| *standing == LeaseState::Fenced);
    tokio::time::timeout(DEADLINE, fenced).await.expect("the first is told").unwrap();
    let refused = bench.own.depart(&node, first.incarnation, Departure::Left).await;
    assert_eq!(refused, Err(MembershipError::Fenced(node.clone())));
    let view = bench.until("the second", |view| view.member(&node).is_some()).await;
    assert_eq!(view.member(&node).unwrap().incarnation, second.incarnation);
    bench.others.depart(&node, second.incarnation, Departure::Left).await.unwrap();
    bench.until("none of them", |view| view.member(&node).is_none()).await;
}

async fn counts_never_raise_the_epoch(bench: &Bench) {
    let epoch = bench.others.views().borrow().epoch;
    let delays = Some(Delays { p50_ms: 0, p99_ms: 40 });
    let counts = Counts { sessions: 7, displaced: 1, delivered: 12, moves: 3, delays };
    let node = info("push-1").node;
    bench.own.counts(Some((node.clone(), counts)));
    let seen = async {
        while !bench.others.counts(None).contains(&(node.clone(), counts)) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(DEADLINE, seen).await.expect("the counts are seen");
    assert_eq!(bench.others.views().borrow().epoch, epoch);
}

async fn routers_are_no_members(bench: &Bench) {
    let members = bench.others.views().borrow().members.len();
    let router = NodeInfo { push: false, dispatch: true, ..info("dispatch-0") };
    let joined = join(&bench.own, router.clone()).await;
    let view = bench.until("a router", |view| !view.routers.is_empty()).await;
    assert_eq!(view.members.len(), members);
    assert_eq!((&view.routers[0].node, &view.routers[0].peer), (&router.node, &router.peer));
    bench.own.depart(&router.node, joined.incarnation, Departure::Left).await.unwrap();
    bench.until("no router", |view| view.routers.is_empty()).await;
}
