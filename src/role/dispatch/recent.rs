//! The views of the last 30 s: who owns a user now, or did a moment ago.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use crate::interest::Reader;
use crate::membership::View;
use crate::message::NodeId;
use crate::ring;
use crate::role::shown;
use crate::telemetry::WAY;
use crate::wire::peer::LiveMessage;

/// How long the owners of an earlier view still get messages: three leases (docs/design.md, section
/// 7).
pub const RECENT_VIEW_LIFE: Duration = Duration::from_secs(30);

/// Most views that are remembered, including the one in use.
pub const RECENT_VIEWS: usize = 8;

/// The views of the last 30 s, the one in use first.
pub(super) struct Recent {
    pub(super) source: watch::Receiver<Arc<View>>,
    pub(super) current: Arc<View>,
    /// Superseded views, youngest first, with the time when they were superseded.
    pub(super) earlier: VecDeque<(Arc<View>, Instant)>,
}

impl Recent {
    /// Takes over a new view. Returns whether there was one.
    pub(super) fn refresh(&mut self) -> bool {
        let known = self.earlier.len();
        let mut changed = false;
        if self.source.has_changed().unwrap_or(false) {
            let next = Arc::clone(&self.source.borrow_and_update());
            let superseded = std::mem::replace(&mut self.current, next);
            // A view that differs only in its routers has the same owners.
            if !superseded.ring.is_empty() && superseded.digest != self.current.digest {
                self.earlier.push_front((superseded, Instant::now()));
                self.earlier.truncate(RECENT_VIEWS - 1);
            }
            changed = true;
        }
        while self.earlier.back().is_some_and(|(_, since)| since.elapsed() > RECENT_VIEW_LIFE) {
            self.earlier.pop_back();
        }
        changed || known != self.earlier.len()
    }

    /// The nodes of all these views.
    pub(super) fn nodes(&self) -> Vec<NodeId> {
        let views = std::iter::once(&self.current).chain(self.earlier.iter().map(|(view, _)| view));
        let all = views.flat_map(|view| view.members.iter().map(|member| &member.info.node));
        let mut nodes: Vec<NodeId> = Vec::new();
        for node in all {
            if !nodes.contains(node) {
                nodes.push(node.clone());
            }
        }
        nodes
    }

    /// The processes of these nodes: of a node that is in several views, the one of the youngest.
    pub(super) fn readers(&self) -> Vec<Reader> {
        let views = std::iter::once(&self.current).chain(self.earlier.iter().map(|(view, _)| view));
        let mut readers: Vec<Reader> = Vec::new();
        for member in views.flat_map(|view| view.members.iter()) {
            if !readers.iter().any(|known| known.node == member.info.node) {
                readers.push(Reader { node: member.info.node.clone(), incarnation: member.incarnation });
            }
        }
        readers
    }

    /// Whether a node is in one of these views.
    pub(super) fn has(&self, node: &NodeId) -> bool {
        self.current.member(node).is_some()
            || self.earlier.iter().any(|(view, _)| view.member(node).is_some())
    }

    /// Calls `each` with the nodes that own this key now or did in the last 30 s, the current owner
    /// first.
    pub(super) fn owners(&self, key: u64, mut each: impl FnMut(&NodeId)) {
        let owner = self.current.owner_at(key).map(|member| &member.info.node);
        if let Some(owner) = owner {
            each(owner);
        }
        self.earlier_owners(key, owner, each);
    }

    /// Calls `each` with the other nodes that owned this key in the last 30 s.
    pub(super) fn earlier_owners(&self, key: u64, owner: Option<&NodeId>, mut each: impl FnMut(&NodeId)) {
        let mut seen: Vec<&NodeId> = Vec::new();
        for (view, _) in &self.earlier {
            if let Some(earlier) = view.owner_at(key).map(|member| &member.info.node)
                && Some(earlier) != owner
                && !seen.contains(&earlier)
            {
                seen.push(earlier);
                each(earlier);
            }
        }
    }

    /// Groups a batch by the nodes that it goes to. Also returns how many messages go nowhere.
    pub(super) fn sort(&self, batch: Vec<LiveMessage>) -> (Vec<(NodeId, Vec<LiveMessage>)>, u64) {
        let members = &self.current.members;
        let mut of_owners: Vec<Vec<LiveMessage>> = members.iter().map(|_| Vec::new()).collect();
        let mut of_others: HashMap<NodeId, Vec<LiveMessage>> = HashMap::new();
        let mut unowned = 0;
        for live in batch {
            let key = ring::key(live.user.as_str());
            let position = self.current.owner_position(key);
            let owner = position.map(|at| &members[at].info.node);
            let mut is_sent = owner.is_some();
            self.earlier_owners(key, owner, |node| {
                is_sent = true;
                note_routed(&live, node);
                of_others.entry(node.clone()).or_default().push(live.clone());
            });
            unowned += u64::from(!is_sent);
            if let (Some(at), Some(node)) = (position, owner) {
                note_routed(&live, node);
                of_owners[at].push(live);
            }
        }
        let named = members.iter().map(|member| member.info.node.clone()).zip(of_owners);
        (named.filter(|(_, batch)| !batch.is_empty()).chain(of_others).collect(), unowned)
    }
}

pub(super) fn note_routed(live: &LiveMessage, node: &NodeId) {
    tracing::debug!(target: WAY, step = 6, user = %live.user, id = %live.message.id, seq = %live.message.seq, %node, traceparent = shown(&live.message), "routed");
}
