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
mod tests;
