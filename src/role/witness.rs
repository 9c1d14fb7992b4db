//! Nodes that have registered and that nobody has reached yet. Whoever is registered calls each of them at the address that it gives;
//! a call that arrives there proves that address, and the secret on both sides, to the node that is called, which then says so in
//! the registry and becomes a member. Until then it is in nobody's ring: messages for its users could not be handed to it.
//!
//! A node that is alone calls itself. One that is not alone must be reached by another, or a node with an address that only it
//! understands would prove itself. So what a node has proved alone counts until another node is a member: from then on it must be
//! reached by that one. It keeps its place meanwhile, for one lease.

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

/// Between two calls of a node that was not reached.
const EVERY: Duration = Duration::from_secs(1);
/// How long one may take.
const CALL_DEADLINE: Duration = Duration::from_secs(1);
/// How long a node may take to be reached before it is told of: a beat.
const PATIENCE: Duration = Duration::from_secs(2);
/// Nodes called at once.
const AT_ONCE: usize = 32;

/// Calls a node at the address that it gives.
pub type Ping = Arc<dyn Fn(&Member) -> BoxFuture<'static, Result<(), PeerError>> + Send + Sync>;

/// A node of this process: its name, its address as others have it, and whether a call has reached it there.
pub type OwnNode = (NodeId, Arc<str>, Reached);

/// Calls candidates for as long as the process runs, and tells of those who are not reached, this process's own among them.
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
        // What has changed is looked at at once; otherwise those are called again who were not reached.
        let _ = timeout(EVERY, views.changed()).await;
    }
}

/// Whom to call: the candidates of others, and one's own where there is nobody else.
fn candidates(view: &View, own: &[OwnNode]) -> Vec<Member> {
    let is_own = |node: &NodeId| is_own(own, node);
    let outsiders = &view.outsiders;
    let alone = outsiders.strangers.is_empty()
        // A view may be held that shows nodes which have long gone.
        && view.shown.iter().all(is_own)
        && outsiders.candidates.iter().all(|candidate| is_own(&candidate.info.node));
    outsiders.candidates.iter().filter(|one| alone || !is_own(&one.info.node)).cloned().collect()
}

fn is_own(own: &[OwnNode], node: &NodeId) -> bool {
    own.iter().any(|(name, ..)| name == node)
}

/// Whether a node of another process is a member: it answers, and can call.
fn has_others(view: &View, own: &[OwnNode]) -> bool {
    let is_candidate = |node: &NodeId| view.outsiders.candidates.iter().any(|one| one.info.node == *node);
    !view.held && view.shown.iter().any(|node| !is_own(own, node) && !is_candidate(node))
}

/// What was told already, so that it is told once.
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
            // A moment ago all was well, and a call is on its way.
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
        // A held view shows those who have gone; the registry does not.
        let mut held = View::new("g".into(), 1, vec![node("push-7")], true);
        held.outsiders = Arc::new(Outsiders { candidates: vec![node("push-0")], strangers: Vec::new() });
        assert_eq!(asked(&held), [""; 0]);
        held.shown = Arc::new([]);
        assert_eq!(asked(&held), ["push-0"]);
    }
}
