//! When a snapshot of the registry becomes the view in use, and when the old view is *held*
//! instead: pure rules.
//!
//! A registry fails for all nodes at once, and what it shows then is not what exists: an empty set
//! after a restart, or a few nodes while the others have yet to register. To act on that would move
//! nearly every user, twice. So the old view is kept
//!
//! - when the registry begins a new generation, or its epoch has gone back,
//! - when it was silent for [`Times::silence`],
//! - when more than one push node and more than [`VANISHED_PART`] of them vanish within a lease
//!   without a drain (leases that were renewed at different times end one after another),
//! - when it shows no push node at all,
//!
//! until it shows all nodes of the old view again, or has shown the same nodes for
//! [`Times::settle`]. A registry that shows all nodes of the old view has forgotten none of them.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use super::{Member, NodeState, Outsiders, View};
use crate::message::NodeId;

/// Part of the push nodes that may vanish at once without a drain.
pub const VANISHED_PART: f64 = 0.3;

/// The times of membership (docs/design.md, section 4). Tests use shorter ones in the same
/// proportion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Times {
    /// Time between two heartbeats, ± 20 %.
    pub beat: Duration,
    /// How long a node stays registered without a heartbeat.
    pub lease: Duration,
    /// Time between two snapshots, ± 20 %.
    pub poll: Duration,
    /// After this long without a snapshot the view is held.
    pub silence: Duration,
    /// Shortest time between two views, so that a storm of changes costs a few rebuilds.
    pub rebuild: Duration,
}

impl Default for Times {
    fn default() -> Self {
        Self {
            beat: Duration::from_secs(2),
            lease: Duration::from_secs(10),
            poll: Duration::from_secs(1),
            silence: Duration::from_secs(3),
            rebuild: Duration::from_millis(250),
        }
    }
}

impl Times {
    /// All times divided by `part`.
    #[must_use]
    pub fn shortened(self, part: u32) -> Self {
        Self {
            beat: self.beat / part,
            lease: self.lease / part,
            poll: self.poll / part,
            silence: self.silence / part,
            rebuild: self.rebuild / part,
        }
    }

    /// How long a registry must show the same nodes before a held view gives way. Every node that
    /// is alive has sent a heartbeat by then.
    #[must_use]
    pub fn settle(&self) -> Duration {
        self.lease + self.beat * 2
    }
}

/// What the registry showed at one time.
#[derive(Debug, Clone, PartialEq)]
pub struct Snapshot {
    /// Changes when the registry has forgotten everything.
    pub generation: Arc<str>,
    /// Rises with every change of the membership.
    pub epoch: u64,
    /// Every node that another node has reached, with or without the role push.
    pub nodes: Vec<Member>,
    /// The nodes that are registered and in no ring.
    pub outsiders: Outsiders,
}

/// Decides which view is in use. Times are durations since an arbitrary start.
#[derive(Debug)]
pub struct Keeper {
    times: Times,
    current: Arc<View>,
    heard: Option<Duration>,
    hold: Option<Hold>,
    /// Nodes that vanished without a drain, with the time, kept for one lease.
    vanished: HashMap<NodeId, Duration>,
    /// Members whose name a new process has that nobody has reached yet, with the incarnation of
    /// that process and the time when it was first seen.
    returning: HashMap<NodeId, (u64, Duration)>,
}

/// What the registry shows while another view is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Hold {
    shown: Option<u64>,
    since: Duration,
}

impl Keeper {
    /// A keeper that has seen no snapshot.
    #[must_use]
    pub fn new(times: Times) -> Self {
        let current = Arc::new(View::new("".into(), 0, Vec::new(), false));
        Self { times, current, heard: None, hold: None, vanished: HashMap::new(), returning: HashMap::new() }
    }

    /// The view in use.
    #[must_use]
    pub fn view(&self) -> &Arc<View> {
        &self.current
    }

    /// Takes a snapshot. Returns whether the view in use has changed.
    pub fn shown(&mut self, now: Duration, snapshot: Snapshot) -> bool {
        let silent = self.heard.is_some_and(|heard| now.saturating_sub(heard) > self.times.silence);
        self.heard = Some(now);
        let mut nodes = snapshot.nodes;
        nodes.extend(self.returning(now, &snapshot.outsiders));
        let outsiders = Arc::new(snapshot.outsiders);
        let next = View { outsiders, ..View::new(snapshot.generation, snapshot.epoch, nodes, false) };
        let same_nodes = next.digest == self.current.digest;
        self.note_vanished(now, &next);
        let first = self.current.generation.is_empty() || self.current.members.is_empty();
        let all_there = self.current.members.iter().all(|member| next.member(&member.info.node).is_some());
        if first || same_nodes || (all_there && next.epoch >= self.current.epoch) {
            return self.take(next);
        }
        match self.hold {
            None if silent || self.is_suspicious(&next) => self.begin(now, Some(next.digest), next),
            None => self.take(next),
            Some(hold) if hold.shown != Some(next.digest) => self.begin(now, Some(next.digest), next),
            Some(hold) if next.members.is_empty() || now - hold.since < self.times.settle() => {
                self.keep_with_routers_of(next)
            }
            Some(_) => self.take(next),
        }
    }

    /// No snapshot could be had. Returns whether the view in use has changed.
    pub fn silent(&mut self, now: Duration) -> bool {
        let silent = self.heard.is_some_and(|heard| now.saturating_sub(heard) > self.times.silence);
        if !silent || self.hold.is_some() || self.current.members.is_empty() {
            return false;
        }
        self.hold = Some(Hold { shown: None, since: now });
        self.current = Arc::new(View { held: true, ..(*self.current).clone() });
        true
    }

    /// Members that were restarted and have yet to be reached. They keep their place for a lease;
    /// otherwise their users would be moved away and back.
    fn returning(&mut self, now: Duration, outsiders: &Outsiders) -> Vec<Member> {
        let candidates = &outsiders.candidates;
        let is_candidate = |node: &NodeId, incarnation| {
            candidates.iter().any(|one| one.info.node == *node && one.incarnation == incarnation)
        };
        self.returning.retain(|node, (incarnation, _)| is_candidate(node, *incarnation));
        let mut kept = Vec::new();
        for candidate in candidates {
            let node = &candidate.info.node;
            let known = self.returning.get(node).copied();
            let is_member = self.current.member(node).is_some();
            let (_, since) = match known {
                None if !is_member => continue,
                known => known.unwrap_or((candidate.incarnation, now)),
            };
            self.returning.insert(node.clone(), (candidate.incarnation, since));
            if now.saturating_sub(since) <= self.times.lease && is_member {
                kept.push(candidate.clone());
            }
        }
        kept
    }

    fn note_vanished(&mut self, now: Duration, next: &View) {
        let lease = self.times.lease;
        self.vanished.retain(|node, at| now.saturating_sub(*at) <= lease && next.member(node).is_none());
        let gone = |m: &&Member| m.state == NodeState::Active && next.member(&m.info.node).is_none();
        for member in self.current.members.iter().filter(gone) {
            self.vanished.entry(member.info.node.clone()).or_insert(now);
        }
    }

    fn is_suspicious(&self, next: &View) -> bool {
        let current = &self.current;
        let active = current.members.iter().filter(|m| m.state == NodeState::Active);
        // Nodes that this view has lost already count as well.
        let earlier = self.vanished.keys().filter(|node| current.member(node).is_none());
        let before = active.count() + earlier.count();
        next.members.is_empty()
            || next.generation != current.generation
            || next.epoch < current.epoch
            || self.vanished.len() as f64 > (before as f64 * VANISHED_PART).max(1.0)
    }

    fn take(&mut self, next: View) -> bool {
        let held = self.hold.take().is_some();
        // A member that is no longer waited for leaves without a change in the registry.
        let same = next.generation == self.current.generation
            && next.epoch == self.current.epoch
            && next.digest == self.current.digest;
        if same && !held {
            return false;
        }
        self.current = Arc::new(next);
        true
    }

    fn begin(&mut self, now: Duration, shown: Option<u64>, next: View) -> bool {
        self.hold = Some(Hold { shown, since: now });
        self.keep_with_routers_of(next)
    }

    /// The ring stays. The routers are taken from the snapshot: no user depends on which routers
    /// there are.
    fn keep_with_routers_of(&mut self, next: View) -> bool {
        let nodes = self.current.members.iter().map(|member| &member.info.node);
        let absent: Vec<_> = nodes.filter(|node| next.member(node).is_none()).cloned().collect();
        let routers = if next.routers.is_empty() { self.current.routers.clone() } else { next.routers };
        let (current, outsiders, shown) = (&self.current, next.outsiders, next.shown);
        let changed = !current.held
            || routers != current.routers
            || absent != current.absent
            || outsiders != current.outsiders
            || shown != current.shown;
        if changed {
            let current = (**current).clone();
            self.current = Arc::new(View { held: true, routers, absent, outsiders, shown, ..current });
        }
        changed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::membership::NodeInfo;
    use crate::message::NodeId;
    use proptest::prelude::*;

    fn node(name: &str, state: NodeState) -> Member {
        let info = NodeInfo {
            node: NodeId::parse(name).unwrap(),
            weight: 1.0,
            accept_per_s: 4000,
            peer: "".into(),
            push: name.starts_with("push"),
            dispatch: name.starts_with("dispatch"),
            store: "".into(),
        };
        Member { info, incarnation: 1, state }
    }

    fn snapshot(generation: &str, epoch: u64, names: &[&str]) -> Snapshot {
        let nodes = names.iter().map(|name| node(name, NodeState::Active)).collect();
        Snapshot { generation: generation.into(), epoch, nodes, outsiders: Outsiders::default() }
    }

    fn at(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    fn names(keeper: &Keeper) -> Vec<String> {
        keeper.view().members.iter().map(|m| m.info.node.to_string()).collect()
    }

    fn keeper(names: &[&str]) -> Keeper {
        let mut keeper = Keeper::new(Times::default());
        assert!(keeper.shown(at(0.0), snapshot("g", 10, names)));
        keeper
    }

    const FIVE: [&str; 5] = ["push-0", "push-1", "push-2", "push-3", "push-4"];

    #[test]
    fn ordinary_changes_are_taken_at_once() {
        let mut keeper = keeper(&FIVE[..3]);
        assert!(!keeper.shown(at(1.0), snapshot("g", 10, &FIVE[..3])), "nothing new");
        assert!(keeper.shown(at(2.0), snapshot("g", 11, &FIVE[..4])));
        assert!(keeper.shown(at(3.0), snapshot("g", 12, &FIVE[1..4])), "one of four may die");
        assert_eq!((names(&keeper).len(), keeper.view().held), (3, false));
    }

    #[test]
    fn a_mass_death_is_not_believed_until_it_has_lasted() {
        let mut keeper = keeper(&FIVE);
        assert!(keeper.shown(at(1.0), snapshot("g", 11, &FIVE[..3])));
        assert!(keeper.view().held && names(&keeper).len() == 5);
        assert_eq!(keeper.view().absent.len(), 2);
        assert_eq!(keeper.view().epoch, 10, "it is the old view");
        assert!(!keeper.shown(at(14.0), snapshot("g", 11, &FIVE[..3])), "13 s are not enough");
        assert!(keeper.shown(at(15.1), snapshot("g", 11, &FIVE[..3])));
        assert!(!keeper.view().held && names(&keeper).len() == 3);
    }

    #[test]
    fn a_mass_death_is_one_also_when_leases_end_one_after_another() {
        let mut keeper = keeper(&FIVE);
        assert!(keeper.shown(at(1.0), snapshot("g", 11, &FIVE[..4])), "one of five may die");
        assert!(keeper.shown(at(2.0), snapshot("g", 12, &FIVE[..3])));
        assert!(keeper.view().held && names(&keeper).len() == 4);
        assert!(keeper.shown(at(3.0), snapshot("g", 13, &FIVE)), "they are back");
        assert!(!keeper.view().held);
        // A lease apart, they count as separate failures.
        assert!(keeper.shown(at(4.0), snapshot("g", 14, &FIVE[..4])) && !keeper.view().held);
        for second in 5..15 {
            assert!(!keeper.shown(at(f64::from(second)), snapshot("g", 14, &FIVE[..4])));
        }
        assert!(keeper.shown(at(15.0), snapshot("g", 15, &FIVE[..3])) && !keeper.view().held);
    }

    #[test]
    fn a_hold_begins_anew_when_something_else_is_shown_and_ends_when_the_old_nodes_are_back() {
        let mut keeper = keeper(&FIVE);
        keeper.shown(at(1.0), snapshot("g", 11, &FIVE[..2]));
        keeper.shown(at(10.0), snapshot("g", 12, &FIVE[..3]));
        assert!(!keeper.shown(at(20.0), snapshot("g", 12, &FIVE[..3])), "ten seconds of this");
        assert!(keeper.shown(at(21.0), snapshot("g", 13, &FIVE)));
        assert!(!keeper.view().held && keeper.view().epoch == 13);
    }

    #[test]
    fn nodes_that_said_they_leave_are_no_mass_death() {
        let mut keeper = keeper(&FIVE);
        let mut draining = snapshot("g", 11, &FIVE);
        draining.nodes.iter_mut().take(4).for_each(|node| node.state = NodeState::Draining);
        assert!(keeper.shown(at(1.0), draining));
        assert!(keeper.shown(at(2.0), snapshot("g", 12, &FIVE[4..])));
        assert!(!keeper.view().held);
    }

    #[test]
    fn an_emptied_registry_changes_nothing_for_ever() {
        let mut keeper = keeper(&FIVE);
        for second in 1..1000 {
            keeper.shown(at(f64::from(second)), snapshot("h", 20, &[]));
            assert!(keeper.view().held && names(&keeper).len() == 5);
        }
        assert!(keeper.shown(at(1001.0), snapshot("h", 21, &FIVE)));
        assert_eq!((&*keeper.view().generation, keeper.view().held), ("h", false));
    }

    #[test]
    fn silence_holds_the_view_and_the_first_word_after_it_is_not_believed() {
        let mut keeper = keeper(&FIVE[..3]);
        assert!(!keeper.silent(at(2.0)));
        assert!(keeper.silent(at(3.5)) && keeper.view().held);
        assert!(!keeper.silent(at(9.0)), "once is enough");
        keeper.shown(at(30.0), snapshot("g", 11, &FIVE[..2]));
        assert!(keeper.view().held && names(&keeper).len() == 3);
        assert!(keeper.shown(at(31.0), snapshot("g", 12, &FIVE[..3])));
        assert!(!keeper.view().held);
        assert!(keeper.silent(at(35.0)) && keeper.view().held);
        assert!(keeper.shown(at(36.0), snapshot("g", 13, &FIVE)), "nobody is missing, and two have come");
        assert!(!keeper.view().held && names(&keeper).len() == 5);
    }

    #[test]
    fn routers_come_and_go_while_the_ring_is_held() {
        let mut keeper = keeper(&["push-0", "push-1", "push-2", "dispatch-0"]);
        assert!(keeper.shown(at(1.0), snapshot("h", 1, &["push-0", "dispatch-1"])));
        assert_eq!(names(&keeper).len(), 3);
        assert_eq!(keeper.view().routers[0].node.as_str(), "dispatch-1");
    }

    #[test]
    fn a_member_that_was_started_again_keeps_its_place_for_a_lease_until_it_is_reached() {
        let candidate = |name: &str, incarnation| Member { incarnation, ..node(name, NodeState::Active) };
        let shown = |epoch, names: &[&str], candidates: Vec<Member>| Snapshot {
            outsiders: Outsiders { candidates, strangers: Vec::new() },
            ..snapshot("g", epoch, names)
        };
        let mut keeper = keeper(&FIVE);
        // A node that was never a member is in no ring before it was reached.
        keeper.shown(at(1.0), shown(11, &FIVE, vec![candidate("push-9", 9)]));
        assert_eq!((names(&keeper).len(), keeper.view().outsiders.candidates.len()), (5, 1));
        keeper.shown(at(2.0), shown(12, &FIVE[1..], vec![candidate("push-0", 2)]));
        assert_eq!(names(&keeper).len(), 5);
        assert_eq!(keeper.view().members[0].incarnation, 2, "it is where the new process is");
        let mut reached = keeper;
        keeper = Keeper { returning: reached.returning.clone(), ..Keeper::new(Times::default()) };
        keeper.current = Arc::clone(reached.view());
        reached.shown(at(3.0), shown(13, &FIVE, Vec::new()));
        assert!(names(&reached).len() == 5 && reached.returning.is_empty());
        // A node that is never reached loses its place once, whatever it registers meanwhile.
        for (second, epoch) in [(8.0, 13), (12.0, 14), (12.5, 14), (40.0, 16)] {
            keeper.shown(at(second), shown(epoch, &FIVE[1..], vec![candidate("push-0", 2)]));
            assert_eq!(names(&keeper).len(), if second <= 12.0 { 5 } else { 4 }, "{second}");
        }
    }

    proptest! {
        /// Whatever is shown: no view loses all push nodes, and a view that is not held is what was
        /// shown last.
        #[test]
        fn the_rules_hold_whatever_is_shown(steps in proptest::collection::vec((0u8..32, 0u8..3, 0.1f64..20.0), 1..60)) {
            let mut keeper = keeper(&FIVE);
            let (mut now, mut epoch) = (0.0, 10);
            for (set, generation, pause) in steps {
                now += pause;
                epoch += 1;
                let shown: Vec<&str> =
                    FIVE.iter().enumerate().filter(|(n, _)| set & (1 << n) != 0).map(|(_, name)| *name).collect();
                let generation = format!("g{generation}");
                keeper.shown(at(now), snapshot(&generation, epoch, &shown));
                prop_assert!(!keeper.view().members.is_empty());
                if !keeper.view().held {
                    prop_assert_eq!(names(&keeper), shown);
                    prop_assert_eq!(&*keeper.view().generation, generation.as_str());
                }
            }
        }
    }
}
