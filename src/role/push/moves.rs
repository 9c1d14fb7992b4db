//! Telling sessions of this node to move to the node that owns their user. The moves of a drain are
//! in `drain`; both write their frames through [`MoveOrders`].

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

use super::PushMetrics;
use super::availability::Availability;
use super::displaced::DisplacedSet;
use super::mailbox::MoveOrder;
use super::ownership::Ownership;
use super::reconnect::accepts;
use super::registry::{Registry, SessionHandle};
use crate::backoff::between;
use crate::membership::{Member, View};
use crate::message::NodeId;
use crate::role::connect::PublicUrls;
use crate::role::reach::PeerProbe;
use crate::tasks::raised;
use crate::wire::frame::{MoveReason, ServerFrame};

/// Time between two batches of moves.
pub(super) const MOVE_TICK: Duration = Duration::from_millis(100);
/// Longest jitter of a moved client.
pub(super) const MOVE_JITTER: Duration = Duration::from_secs(1);
/// How long a client that was told to leave may take after its jitter.
pub(super) const DRAIN_GRACE: Duration = Duration::from_secs(10);

/// Writes `move` frames.
pub(super) struct MoveOrders {
    urls: Arc<PublicUrls>,
    metrics: PushMetrics,
}

impl MoveOrders {
    /// Names nodes by `urls`.
    pub(super) fn new(urls: Arc<PublicUrls>, metrics: PushMetrics) -> Self {
        Self { urls, metrics }
    }

    /// Whether a public URL of `node` is known.
    pub(super) fn can_name(&self, node: &NodeId) -> bool {
        self.urls.of(node).is_some()
    }

    /// Puts the `move` frame into the session's mailbox. Returns whether a URL of the target is
    /// known.
    pub(super) fn send(
        &self,
        view: &View,
        handle: &SessionHandle,
        target: &Member,
        reason: MoveReason,
    ) -> bool {
        let Some(base) = self.urls.of(&target.info.node) else { return false };
        let after = between(Duration::ZERO, MOVE_JITTER, &mut rand::rng());
        // Two hops mean "keep the client": from a draining node, or the second time it was sent on.
        let hops = if reason == MoveReason::Drain { 2 } else { handle.arrival.hops.saturating_add(1).min(2) };
        let frame = ServerFrame::Move {
            url: format!("{base}?hops={hops}&epoch={}", view.epoch),
            node: target.info.node.to_string(),
            epoch: view.epoch,
            after_ms: u64::try_from(after.as_millis()).unwrap_or(0),
            reason,
        };
        let close_after = (reason == MoveReason::Drain).then_some(after + DRAIN_GRACE);
        handle.mailbox.move_to(MoveOrder { frame: frame.encode(), close_after });
        self.metrics.moves.inc();
        true
    }
}

/// Tells displaced sessions to move, at the pace of their targets.
pub(super) struct Mover {
    registry: Arc<Registry>,
    ownership: Arc<Ownership>,
    availability: Arc<Availability>,
    displaced: Arc<DisplacedSet>,
    probe: PeerProbe,
    orders: Arc<MoveOrders>,
    /// Sessions that attached to a node that does not own their user.
    attached: Mutex<Vec<Weak<SessionHandle>>>,
}

/// What to do about one displaced session now.
#[derive(Debug, PartialEq)]
enum Verdict<'a> {
    /// Tell it to move to this node.
    Move(&'a Member),
    /// Not yet.
    Wait,
    /// Nothing, until the view changes: [`Mover::walk`] then considers every session again.
    Stay,
}

/// All of the rule of docs/design.md, section 6, that depends on the view and on how the client
/// came: no move while the view is held, none by a view that is older than the client's, and none
/// for a client that is to be kept (sent here on purpose, or sent on twice) until the view has
/// changed. [`Mover::tell_those_who_may`] adds the rest: the owner answers its peer port, the pace,
/// and once per owner incarnation.
fn verdict<'a>(view: &'a View, own: &NodeId, handle: &SessionHandle) -> Verdict<'a> {
    match view.owner(&handle.user) {
        None => Verdict::Stay,
        Some(owner) if owner.info.node == *own => Verdict::Stay,
        Some(_) if handle.arrival.keep_at == Some(view.digest) => Verdict::Stay,
        Some(_) if view.held || view.epoch < handle.arrival.client_epoch => Verdict::Wait,
        Some(owner) => Verdict::Move(owner),
    }
}

/// Moves to one target per second: half of what it accepts, divided among the nodes that may send
/// to it. The other half is left for clients that come by themselves.
pub(super) fn moves_per_s(view: &View, target: &Member) -> f64 {
    let accepts = accepts(target.info.accept_per_s);
    let senders = view.members.len().saturating_sub(1).max(1);
    f64::from(accepts) / 2.0 / senders as f64
}

impl Mover {
    /// Moves the sessions of `registry`.
    pub(super) fn new(
        registry: Arc<Registry>,
        ownership: Arc<Ownership>,
        availability: Arc<Availability>,
        displaced: Arc<DisplacedSet>,
        probe: PeerProbe,
        orders: Arc<MoveOrders>,
    ) -> Self {
        Self { registry, ownership, availability, displaced, probe, orders, attached: Mutex::default() }
    }

    /// Queues a newly attached session of a user that another node owns, for the next tick.
    pub(super) fn consider(&self, handle: &Arc<SessionHandle>) {
        self.attached.lock().push(Arc::downgrade(handle));
    }

    /// Tells sessions to move until the drain begins. Walks all sessions on a new view.
    pub(super) async fn run(self: Arc<Self>) {
        let mut views = self.ownership.views();
        let mut waiting: Vec<Weak<SessionHandle>> = Vec::new();
        let mut allowance: HashMap<NodeId, f64> = HashMap::new();
        let mut probes = JoinSet::new();
        let mut ticks = tokio::time::interval(MOVE_TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            tokio::select! {
                biased;
                // From then on only the drain tells sessions where to go.
                () = self.availability.drain_begun() => return std::future::pending().await,
                changed = views.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let view = Arc::clone(&views.borrow_and_update());
                    waiting = self.walk(&view);
                }
                Some(ended) = probes.join_next() => raised(ended),
                _ = ticks.tick() => {
                    waiting.append(&mut self.attached.lock());
                    if !waiting.is_empty() {
                        let view = Arc::clone(&views.borrow());
                        for target in self.tell_those_who_may(&view, &mut waiting, &mut allowance) {
                            let probe = self.probe.clone();
                            probes.spawn(async move {
                                probe.answers(&target).await;
                            });
                        }
                    } else if !allowance.is_empty() {
                        allowance.clear();
                    }
                }
            }
        }
    }

    /// All sessions whose user another node owns in this view. Has their fallback entries looked
    /// at, and those that are no longer needed.
    fn walk(&self, view: &View) -> Vec<Weak<SessionHandle>> {
        let handles = self.registry.all();
        let users = handles.iter().map(|handle| handle.user.clone());
        let is_displaced = |user: &crate::message::UserId| !self.ownership.owns(view, user);
        let dirty = users.filter(|user| is_displaced(user) || self.displaced.contains(user)).collect();
        self.displaced.mark_dirty(dirty);
        handles.iter().filter(|handle| is_displaced(&handle.user)).map(Arc::downgrade).collect()
    }

    /// Tells as many sessions as may move now. Returns the owners that must be probed first.
    fn tell_those_who_may(
        &self,
        view: &View,
        waiting: &mut Vec<Weak<SessionHandle>>,
        allowance: &mut HashMap<NodeId, f64>,
    ) -> HashSet<NodeId> {
        let mut to_probe = HashSet::new();
        for member in &view.members {
            let per_tick = moves_per_s(view, member) * MOVE_TICK.as_secs_f64();
            let left = allowance.entry(member.info.node.clone()).or_insert(0.0);
            // Unused allowance is not saved up, because a pause must not end in a burst. One move
            // is always possible.
            *left = per_tick.max(1.0);
        }
        waiting.retain(|weak| {
            let Some(handle) = weak.upgrade() else { return false };
            match verdict(view, self.ownership.node(), &handle) {
                Verdict::Stay => false,
                Verdict::Wait => true,
                Verdict::Move(owner) => {
                    // A result is believed for 1 s. Without one, the node is probed and the session
                    // waits.
                    match self.probe.known(&owner.info.node) {
                        Some(true) => {}
                        Some(false) => return true,
                        None => {
                            to_probe.insert(owner.info.node.clone());
                            return true;
                        }
                    }
                    let left = allowance.entry(owner.info.node.clone()).or_insert(0.0);
                    if *left < 1.0 {
                        return true;
                    }
                    if !self.orders.can_name(&owner.info.node) {
                        return true;
                    }
                    if handle.tell_once(&owner.info.node, owner.incarnation) {
                        *left -= 1.0;
                        self.orders.send(view, &handle, owner, MoveReason::Owner);
                    }
                    false
                }
            }
        });
        to_probe
    }
}

#[cfg(test)]
mod tests {
    use super::super::registry::Arrival;
    use super::*;
    use crate::membership::{NodeInfo, NodeState};
    use crate::message::{DeviceId, Millis, UserId};

    fn view(names: &[&str], epoch: u64, held: bool) -> View {
        let members = names
            .iter()
            .map(|name| Member {
                info: NodeInfo {
                    node: NodeId::parse(name).unwrap(),
                    weight: 1.0,
                    accept_per_s: 4000,
                    peer: "".into(),
                    push: true,
                    dispatch: false,
                    store: "".into(),
                    ticket_in_auth: false,
                },
                incarnation: 1,
                state: NodeState::Active,
            })
            .collect();
        View::new("g".into(), epoch, members, held)
    }

    fn handle(arrival: Arrival) -> Arc<SessionHandle> {
        // alice belongs to push-3 of five (the golden values of the ring).
        SessionHandle::new(UserId::parse("alice").unwrap(), DeviceId::default(), None, 0, arrival, Millis(0))
    }

    const FIVE: [&str; 5] = ["push-0", "push-1", "push-2", "push-3", "push-4"];

    fn judged(view: &View, own: &str, arrival: Arrival) -> &'static str {
        match verdict(view, &NodeId::parse(own).unwrap(), &handle(arrival)) {
            Verdict::Move(owner) => {
                assert_eq!(owner.info.node.as_str(), "push-3");
                "move"
            }
            Verdict::Wait => "wait",
            Verdict::Stay => "stay",
        }
    }

    #[test]
    fn a_session_is_moved_only_when_it_may_be() {
        let now = view(&FIVE, 8, false);
        let plain = Arrival::default();
        assert_eq!(judged(&now, "push-0", plain), "move");
        assert_eq!(judged(&now, "push-3", plain), "stay");
        assert_eq!(judged(&view(&FIVE, 8, true), "push-0", plain), "wait");
        assert_eq!(judged(&now, "push-0", Arrival { client_epoch: 9, ..plain }), "wait");
        assert_eq!(judged(&now, "push-0", Arrival { keep_at: Some(now.digest), ..plain }), "stay");
        assert_eq!(judged(&now, "push-0", Arrival { keep_at: Some(7), ..plain }), "move");
        assert_eq!(judged(&view(&[], 8, false), "push-0", plain), "stay");
    }

    #[test]
    fn the_pace_is_half_of_what_the_target_accepts_shared_by_those_who_send() {
        let now = view(&FIVE, 8, false);
        assert!((moves_per_s(&now, &now.members[0]) - 500.0).abs() < 1e-9);
        let two = view(&FIVE[..2], 8, false);
        assert!((moves_per_s(&two, &two.members[0]) - 2000.0).abs() < 1e-9);
    }
}
