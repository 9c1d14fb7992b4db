//! Proves the addresses of nodes that have registered and that no other node has reached yet
//! (candidates). Every registered process calls each candidate at the address that it advertises. A
//! call that arrives proves the address, and the secret on both sides, to the candidate, which then
//! says so in the registry and becomes a member. Until then it is in nobody's ring, because
//! messages for its users could not be handed to it.
//!
//! A node that is alone calls itself. A node that is not alone must be reached by another one;
//! otherwise a node with an address that only it understands would prove itself. So what a node has
//! proved alone counts only until another node is a member. From then on that one must reach it;
//! meanwhile the node keeps its place, for one lease.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{BoxFuture, join_all};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use crate::membership::{Member, Reached, View};
use crate::message::NodeId;
use crate::telemetry::{Gauge, Health};
use crate::wire::peer::PeerError;

/// Delay between two calls of a candidate.
const EVERY: Duration = Duration::from_secs(1);
/// Deadline of a call.
const CALL_DEADLINE: Duration = Duration::from_secs(1);
/// How long a node may take to be reached before that is logged: one heartbeat.
const PATIENCE: Duration = Duration::from_secs(2);
/// Candidates called at the same time.
const AT_ONCE: usize = 32;

/// Calls a node at the address that it advertises.
pub type Ping = Arc<dyn Fn(&Member) -> BoxFuture<'static, Result<(), PeerError>> + Send + Sync>;

/// A node of this process: its name, the address that it advertises, and whether it was reached.
pub type OwnNode = (NodeId, Arc<str>, Reached);

/// Calls candidates as long as the process runs, and reports nodes that are not reached, including
/// this process's own.
pub async fn witness(
    mut views: watch::Receiver<Arc<View>>,
    own: Vec<OwnNode>,
    ping: Ping,
    health: Health,
    unreached: Gauge,
) {
    let mut told = Told { began: Instant::now(), was_reached: false, own: false, others: HashSet::new() };
    let mut proved_alone = false;
    loop {
        let view = Arc::clone(&views.borrow_and_update());
        if proved_alone && has_others(&view, &own) {
            proved_alone = false;
            own.iter().for_each(|(.., reached)| reached.forget());
            told.begin_again();
        }
        let to_call = candidates(&view, &own);
        proved_alone |= to_call.iter().any(|member| is_own(&own, &member.info.node));
        for part in to_call.chunks(AT_ONCE) {
            let calls = part.iter().map(|member| timeout(CALL_DEADLINE, ping(member)));
            for (member, called) in part.iter().zip(join_all(calls).await) {
                match called {
                    Ok(Ok(())) => {}
                    Ok(Err(fault)) => told.not_reached(member, &fault.to_string()),
                    Err(_) => told.not_reached(member, "no answer in time"),
                }
            }
        }
        let others = view.outsiders.candidates.len() + view.outsiders.strangers.len();
        unreached.set(i64::try_from(others).unwrap_or(i64::MAX));
        told.own(&own, &view, &health);
        // A new view is acted on at once; otherwise candidates are called again.
        let _ = timeout(EVERY, views.changed()).await;
    }
}

/// The nodes to call: the candidates of other processes, and one's own if there is nobody else.
fn candidates(view: &View, own: &[OwnNode]) -> Vec<Member> {
    let is_own = |node: &NodeId| is_own(own, node);
    let outsiders = &view.outsiders;
    let alone = outsiders.strangers.is_empty()
        // A held view may show nodes that have long gone.
        && view.shown.iter().all(is_own)
        && outsiders.candidates.iter().all(|candidate| is_own(&candidate.info.node));
    outsiders.candidates.iter().filter(|one| alone || !is_own(&one.info.node)).cloned().collect()
}

fn is_own(own: &[OwnNode], node: &NodeId) -> bool {
    own.iter().any(|(name, ..)| name == node)
}

/// Whether a node of another process is a member, which can call.
fn has_others(view: &View, own: &[OwnNode]) -> bool {
    let is_candidate = |node: &NodeId| view.outsiders.candidates.iter().any(|one| one.info.node == *node);
    !view.held && view.shown.iter().any(|node| !is_own(own, node) && !is_candidate(node))
}

/// What was logged already, so that it is logged once.
struct Told {
    /// Since when this process's own nodes wait to be reached.
    began: Instant,
    /// They were reached before that.
    was_reached: bool,
    own: bool,
    others: HashSet<(NodeId, u64)>,
}

impl Told {
    fn not_reached(&mut self, member: &Member, why: &str) {
        let key = (member.info.node.clone(), member.incarnation);
        if self.others.len() < 1_000 && self.others.insert(key) {
            tracing::warn!(
                node = %member.info.node,
                peer = &*member.info.peer,
                why,
                "a node is not reached at the address that it gives, and takes no users: check its peer.advertise, \
                 and that peer.secret is the same everywhere"
            );
        }
    }

    fn begin_again(&mut self) {
        (self.began, self.was_reached, self.own) = (Instant::now(), true, false);
    }

    fn own(&mut self, own: &[OwnNode], view: &View, health: &Health) {
        let missing: Vec<&OwnNode> = own.iter().filter(|(.., reached)| !reached.is_noted()).collect();
        let Some((node, peer, _)) = missing.first() else {
            return health.set("peers", true, "others reach this process");
        };
        let late = self.began.elapsed() >= PATIENCE;
        if self.was_reached && !late {
            // All was well a moment ago, and a call is on its way.
            return;
        }
        let why = match view.outsiders.strangers.len() {
            0 => format!("no other node has reached {node} at {peer} (peer.advertise)"),
            count => format!(
                "{count} other nodes have another peer.secret, and none has reached {node} at {peer} (peer.secret, \
                 peer.advertise)"
            ),
        };
        health.set("peers", false, why.clone());
        if !self.own && late {
            self.own = true;
            tracing::warn!("this node takes no users, or will lose them: {why}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::membership::{NodeInfo, NodeState, Outsiders};

    fn node(name: &str) -> Member {
        let info = NodeInfo {
            node: NodeId::parse(name).unwrap(),
            weight: 1.0,
            accept_per_s: 1,
            peer: "".into(),
            push: true,
            dispatch: false,
            store: "".into(),
            ticket_in_auth: false,
        };
        Member { info, incarnation: 1, state: NodeState::Active }
    }

    fn called(members: &[&str], candidates: &[&str], strangers: &[&str]) -> Vec<String> {
        let all = |names: &[&str]| names.iter().map(|name| node(name)).collect::<Vec<_>>();
        let strangers = all(strangers).into_iter().map(|one| one.info.node).collect();
        let mut view = View::new("g".into(), 1, all(members), false);
        view.outsiders = Arc::new(Outsiders { candidates: all(candidates), strangers });
        asked(&view)
    }

    fn own() -> Vec<OwnNode> {
        let membership = crate::membership::local::LocalMembership::new(crate::clock::Clock::system());
        let joined = futures_util::FutureExt::now_or_never(crate::membership::Membership::join(
            &membership,
            node("push-0").info,
        ));
        vec![(node("push-0").info.node, "".into(), joined.unwrap().unwrap().proof)]
    }

    fn asked(view: &View) -> Vec<String> {
        let found = super::candidates(view, &own());
        found.into_iter().map(|member| member.info.node.to_string()).collect()
    }

    #[test]
    fn only_a_member_of_another_process_can_vouch_for_a_node() {
        let own = |view: &View| has_others(view, &own());
        let view = |members: &[&str], candidates: &[&str], held| {
            let all = |names: &[&str]| names.iter().map(|name| node(name)).collect::<Vec<_>>();
            let mut view = View::new("g".into(), 1, all(members), held);
            view.outsiders = Arc::new(Outsiders { candidates: all(candidates), strangers: Vec::new() });
            view
        };
        assert!(!own(&view(&["push-0"], &[], false)) && !own(&view(&["push-0"], &["push-1"], false)));
        assert!(
            !own(&view(&["push-0", "push-1"], &["push-1"], false)),
            "it keeps its place, and may be dead"
        );
        assert!(!own(&view(&["push-0", "push-1"], &[], true)), "nobody knows who is there now");
        assert!(own(&view(&["push-0", "push-1"], &[], false)));
    }

    #[test]
    fn others_are_called_and_oneself_only_where_there_is_nobody_else() {
        assert_eq!(called(&[], &["push-0"], &[]), ["push-0"], "alone");
        assert_eq!(called(&[], &["push-0", "push-1"], &[]), ["push-1"]);
        assert_eq!(called(&["push-1"], &["push-0"], &[]), [""; 0], "push-1 is to reach it");
        assert_eq!(
            called(&[], &["push-0"], &["push-1"]),
            [""; 0],
            "of two with different secrets, which is odd?"
        );
        assert_eq!(called(&["push-0"], &["push-1", "push-2"], &[]), ["push-1", "push-2"]);
        // A held view shows nodes that have gone; the registry does not.
        let mut held = View::new("g".into(), 1, vec![node("push-7")], true);
        held.outsiders = Arc::new(Outsiders { candidates: vec![node("push-0")], strangers: Vec::new() });
        assert_eq!(asked(&held), [""; 0]);
        held.shown = Arc::new([]);
        assert_eq!(asked(&held), ["push-0"]);
    }
}
