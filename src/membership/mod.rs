//! Membership: which push nodes there are, as one value that is swapped whole.
//!
//! # The contract of a [`Membership`]
//!
//! - [`Membership::views`] always holds the view in use. A view never changes once it is published.
//! - The epoch rises with every published change of the members or of what is known about them, and
//!   never falls within a generation. Counts travel beside the view and never raise it.
//! - A node that registers under a name that is taken wins it: its incarnation is higher, and the
//!   older process is told so.
//! - A draining node is out of the ring at once, and a member until it leaves.
//! - A view that is *held* is older than what the registry shows, and is kept on purpose (see
//!   [`keeper`]).
//! - A node that no other node has reached yet at the address that it advertises ([`Reached`]) is
//!   neither a member nor a router.
//! - A [`LeaseState`] tells a node when it has lost its place, when it has it again, and when
//!   another process took it for good.
//!
//! Every adapter passes the suite in `conformance` (feature `test-support`).

#[cfg(any(test, feature = "test-support"))]
pub mod conformance;
pub mod keeper;
pub mod local;
pub mod redis;

use std::sync::Arc;

use futures_util::future::BoxFuture;
use tokio::sync::watch;
use xxhash_rust::xxh3::Xxh3;

use crate::message::{NodeId, UserId};
use crate::ring::{self, Ring};
use crate::wire::peer::ViewVersion;

/// The port of membership.
pub trait Membership: Send + Sync + 'static {
    /// The view in use, and every later one.
    fn views(&self) -> watch::Receiver<Arc<View>>;

    /// Registers a node, and keeps it registered until it departs.
    fn join(&self, info: NodeInfo) -> BoxFuture<'_, Result<Registration, MembershipError>>;

    /// Takes this incarnation out of the ring, or out of the members.
    fn depart(
        &self,
        node: &NodeId,
        incarnation: u64,
        how: Departure,
    ) -> BoxFuture<'_, Result<(), MembershipError>>;

    /// Reports what a node of this process holds, and returns what each node reported last.
    fn counts(&self, own: Option<(NodeId, Counts)>) -> Vec<(NodeId, Counts)>;

    /// A peer has a newer view: look soon instead of at the next poll.
    fn refresh(&self);

    /// The secret that signs what the nodes of this process say of themselves has changed: say it
    /// again soon, instead of at the next heartbeat.
    fn sign_anew(&self) {}
}

/// How a node departs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Departure {
    /// It is draining: out of the ring, still a member.
    Draining,
    /// It has left: no longer a member.
    Left,
}

/// A node's registration.
#[derive(Debug, Clone)]
pub struct Registration {
    /// Incarnation of this process.
    pub incarnation: u64,
    /// The state of the node's lease.
    pub standing: watch::Receiver<LeaseState>,
    /// To be marked when another node has reached this one.
    pub proof: Reached,
}

/// Whether another node has reached a node at the address that it advertises. Until then the node
/// is in nobody's ring, because nobody could hand it a message. Cloned, it is the same mark.
#[derive(Debug, Clone)]
pub struct Reached(Arc<watch::Sender<bool>>);

impl Reached {
    /// Whether it is known already.
    #[must_use]
    pub fn new(already: bool) -> Self {
        Self(Arc::new(watch::Sender::new(already)))
    }

    /// Another node has reached it.
    pub fn note(&self) {
        self.0.send_if_modified(|reached| !std::mem::replace(reached, true));
    }

    /// What was proved before no longer counts: it must be reached again.
    pub fn forget(&self) {
        self.0.send_if_modified(|reached| std::mem::replace(reached, false));
    }

    /// Whether it was reached.
    #[must_use]
    pub fn is_noted(&self) -> bool {
        *self.0.borrow()
    }

    /// Resolves when it was reached.
    pub async fn noted(&self) {
        // Cannot fail: the sender is part of `self`.
        let _ = self.0.subscribe().wait_for(|reached| *reached).await;
    }
}

/// The state of a node's lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseState {
    /// It is a member for the n-th time. A higher number means that the registry had lost it in
    /// between.
    Member(u64),
    /// It could not renew its lease, which has run out by now.
    Lapsed,
    /// A later process has its name; this process will not be a member again.
    Fenced,
}

/// Why membership could not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MembershipError {
    /// A later process has this node's name.
    #[error("another process has registered as {0}; give each node a name of its own (node.name)")]
    Fenced(NodeId),
    /// The registry cannot be reached.
    #[error("membership cannot be reached: {0}")]
    Unavailable(String),
    /// The registered nodes have another store.
    #[error(
        "redis.prefix: {node} is registered there with another store ({theirs}; here {ours}): two clusters share one \
         redis.prefix, or mongo.uri and mongo.database are not the same everywhere"
    )]
    OtherStore {
        /// A registered node.
        node: String,
        /// Identity of that node's store.
        theirs: String,
        /// Identity of this process's store.
        ours: String,
    },
}

/// What a node says of itself.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeInfo {
    /// Its stable name.
    pub node: NodeId,
    /// Its share of the users, relative to 1.0.
    pub weight: f64,
    /// New sockets that it accepts per second; 0 is no limit.
    pub accept_per_s: u32,
    /// Address of its peer port, as other nodes reach it; empty if no node has to.
    pub peer: Arc<str>,
    /// Whether it has the role push. Only such nodes are in the ring.
    pub push: bool,
    /// Whether it has the role dispatch.
    pub dispatch: bool,
    /// Identity of its store; empty if it has none.
    pub store: Arc<str>,
    /// Whether its push role takes a ticket in an `auth` frame.
    pub ticket_in_auth: bool,
}

/// Nodes that are registered and in no ring.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Outsiders {
    /// Nodes with a good proof that no other node has reached yet.
    pub candidates: Vec<Member>,
    /// Nodes whose entry has no good proof: they have another `peer.secret`.
    pub strangers: Vec<NodeId>,
}

/// A node with the role dispatch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Router {
    /// Its name.
    pub node: NodeId,
    /// Incarnation of its process.
    pub incarnation: u64,
    /// Address of its peer port.
    pub peer: Arc<str>,
}

/// Whether a member takes users.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeState {
    /// It takes users.
    Active,
    /// It is leaving: its users are moved away.
    Draining,
}

impl NodeState {
    /// The word in HTTP responses.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Draining => "draining",
        }
    }
}

/// A member of a view.
#[derive(Debug, Clone, PartialEq)]
pub struct Member {
    /// What it says of itself.
    pub info: NodeInfo,
    /// Incarnation of its process.
    pub incarnation: u64,
    /// Whether it takes users.
    pub state: NodeState,
}

/// What a node holds now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Number of sessions.
    pub sessions: u64,
    /// Number of users with a session here that another node owns.
    pub displaced: u64,
    /// Messages sent to sockets since the process started.
    pub delivered: u64,
    /// `move` frames sent since the process started.
    pub moves: u64,
    /// How long deliveries took in the last minute; `None` if there were none.
    pub delays: Option<Delays>,
}

/// Quantiles of the time from the acceptance of a message to its way into the socket, in ms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Delays {
    /// Half of them took at most as long.
    pub p50_ms: u64,
    /// Of a hundred, 99 took at most as long.
    pub p99_ms: u64,
}

/// Everything that membership decides, as one immutable value.
#[derive(Debug, Clone)]
pub struct View {
    /// Changes when the registry has forgotten everything.
    pub generation: Arc<str>,
    /// Rises with every change of the membership.
    pub epoch: u64,
    /// The push nodes, sorted by name.
    pub members: Vec<Member>,
    /// The dispatch nodes, sorted by name.
    pub routers: Vec<Router>,
    /// The ring over the active members.
    pub ring: Ring,
    /// For each name on the ring, in order, its index among the members.
    on_ring: Vec<usize>,
    /// Hash over names, weights and states: two views that differ in any of them have different
    /// digests.
    pub digest: u64,
    /// The registry shows something else; this older view is kept on purpose.
    pub held: bool,
    /// Members of a held view that the registry does not show. Users are not sent there.
    pub absent: Vec<NodeId>,
    /// The nodes that are registered and in no ring.
    pub outsiders: Arc<Outsiders>,
    /// All members and routers that the registry shows, also if this view is an older one.
    pub shown: Arc<[NodeId]>,
}

/// Version of the computation. It is part of the digest, so that two processes that compute
/// differently notice it.
const SCHEME: &[u8] = b"xxh3_64/512/1";

impl View {
    /// Builds the view of these nodes. Its members are the push nodes among them.
    #[must_use]
    pub fn new(generation: Arc<str>, epoch: u64, mut nodes: Vec<Member>, held: bool) -> Self {
        nodes.sort_by(|a, b| a.info.node.cmp(&b.info.node));
        let routers = nodes
            .iter()
            .filter(|m| m.info.dispatch && m.state == NodeState::Active)
            .map(|m| Router {
                node: m.info.node.clone(),
                incarnation: m.incarnation,
                peer: Arc::clone(&m.info.peer),
            })
            .collect();
        let shown = nodes.iter().map(|node| node.info.node.clone()).collect();
        let mut members = nodes;
        members.retain(|member| member.info.push);
        let active = members.iter().filter(|m| m.state == NodeState::Active);
        let ring = Ring::build(active.map(|m| (m.info.node.as_str(), m.info.weight)));
        let position = |(name, _): (&str, f64)| members.partition_point(|m| m.info.node.as_str() < name);
        let on_ring = ring.shares().into_iter().map(position).collect();
        let mut digest = Xxh3::new();
        digest.update(SCHEME);
        for member in &members {
            digest.update(member.info.node.as_str().as_bytes());
            digest.update(&[0, u8::from(member.state == NodeState::Active)]);
            digest.update(&member.info.weight.to_le_bytes());
        }
        let (digest, absent, outsiders) = (digest.digest(), Vec::new(), Arc::default());
        Self { generation, epoch, members, routers, ring, on_ring, digest, held, absent, outsiders, shown }
    }

    /// The version of this view. Sent with every peer call, so that both sides notice when their
    /// views differ.
    #[must_use]
    pub fn stamp(&self) -> ViewVersion {
        ViewVersion { generation: Arc::clone(&self.generation), epoch: self.epoch, digest: self.digest }
    }

    /// The node that owns `user`; `None` while there is no active push node.
    #[must_use]
    pub fn owner(&self, user: &UserId) -> Option<&Member> {
        self.owner_at(ring::key(user.as_str()))
    }

    /// The node that owns this key.
    #[must_use]
    pub fn owner_at(&self, key: u64) -> Option<&Member> {
        self.members.get(self.owner_position(key)?)
    }

    /// The index of the owner of this key among the members.
    #[must_use]
    pub fn owner_position(&self, key: u64) -> Option<usize> {
        self.on_ring.get(self.ring.owner_index(key)?).copied()
    }

    /// This view without some of its members; the others own their users.
    #[must_use]
    pub fn without(&self, nodes: &[NodeId]) -> Self {
        let left = self.members.iter().filter(|member| !nodes.contains(&member.info.node)).cloned().collect();
        let routers = self.routers.clone();
        Self { routers, ..Self::new(Arc::clone(&self.generation), self.epoch, left, self.held) }
    }

    /// The member of this name.
    #[must_use]
    pub fn member(&self, node: &NodeId) -> Option<&Member> {
        let at = self.members.binary_search_by(|m| m.info.node.cmp(node)).ok()?;
        self.members.get(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn member((n, weight, push, active): (u8, f64, bool, bool)) -> Member {
        let node = NodeId::parse(&format!("push-{n}")).unwrap();
        let info = NodeInfo {
            node,
            weight,
            accept_per_s: 1,
            peer: "".into(),
            push,
            dispatch: true,
            store: "".into(),
            ticket_in_auth: false,
        };
        let state = if active { NodeState::Active } else { NodeState::Draining };
        Member { info, incarnation: 1, state }
    }

    proptest! {
        #[test]
        fn the_owner_is_the_member_that_the_ring_names(
            nodes in prop::collection::btree_map(any::<u8>(), (0.0..2.0, any::<bool>(), any::<bool>()), 0..12),
            keys in prop::collection::vec(any::<u64>(), 20),
        ) {
            let nodes = nodes.into_iter().map(|(n, (weight, push, active))| member((n, weight, push, active)));
            let view = View::new("g".into(), 1, nodes.collect(), false);
            for key in keys {
                let owner = view.owner_at(key);
                prop_assert_eq!(owner.map(|owner| owner.info.node.as_str()), view.ring.owner(key));
                prop_assert!(owner.is_none_or(|owner| owner.info.push && owner.state == NodeState::Active));
            }
        }
    }
}
