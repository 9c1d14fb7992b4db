//! Membership: which push nodes there are, as one value that is swapped whole.
//!
//! # The contract of a [`Membership`]
//!
//! - [`Membership::views`] always holds the last view in use; a view never changes once it is published.
//! - The epoch rises with every published change of the members or what is known of them, and never falls within a
//!   generation. Counts travel beside the view and never raise it.
//! - A node that registers under a name that is taken wins it: its incarnation is higher, and the older one is told so.
//! - A draining node is out of the ring at once, and still a member until it leaves.
//! - A view that is *held* is older than what the registry shows, and is kept on purpose (see [`keeper`]).
//! - A node that nobody has reached yet at the address that it gives ([`Reached`]) is no member, and no router.
//! - A node is told by its [`LeaseState`] when it lost its place, when it has it again, and when another took it for good.
//!
//! Every adapter passes [`conformance::suite`].

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

/// The port.
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

    /// Reports what a node holds, and answers what each reported last.
    fn counts(&self, own: Option<(NodeId, Counts)>) -> Vec<(NodeId, Counts)>;

    /// Somebody has seen a newer view: look soon, rather than at the next turn.
    fn refresh(&self);
}

/// How a node goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Departure {
    /// It is leaving: out of the ring, still a member.
    Draining,
    /// It has left: no member any more.
    Left,
}

/// A node's place among the members.
#[derive(Debug, Clone)]
pub struct Registration {
    /// Which process of that name this is.
    pub incarnation: u64,
    /// How it stands with it now, and from now on.
    pub standing: watch::Receiver<LeaseState>,
    /// To be told when somebody else has reached the node.
    pub proof: Reached,
}

/// Whether a call from outside has reached a node at the address that it advertises. Until then it is in nobody's ring: others could not
/// hand it a message. Cloned, it is the same.
#[derive(Debug, Clone)]
pub struct Reached(Arc<watch::Sender<bool>>);

impl Reached {
    fn new(already: bool) -> Self {
        Self(Arc::new(watch::Sender::new(already)))
    }

    /// A call has reached it.
    pub fn note(&self) {
        self.0.send_if_modified(|reached| !std::mem::replace(reached, true));
    }

    /// Whatever call has reached it proves nothing any more: it must be reached again.
    pub fn forget(&self) {
        self.0.send_if_modified(|reached| std::mem::replace(reached, false));
    }

    /// Whether one has.
    #[must_use]
    pub fn is_noted(&self) -> bool {
        *self.0.borrow()
    }

    /// Resolves when one has.
    pub async fn noted(&self) {
        // The sender is here.
        let _ = self.0.subscribe().wait_for(|reached| *reached).await;
    }
}

/// How a registered node stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseState {
    /// It is a member, for the n-th time: a higher number means that the registry had lost it in between.
    Member(u64),
    /// Its lease has run out, as far as it can tell: it could not renew it.
    Lapsed,
    /// A later process has its name; this one will not be a member again.
    Fenced,
}

/// Why membership did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MembershipError {
    /// A later process has this node's name.
    #[error("another process has registered as {0}; give each node a name of its own (node.name)")]
    Fenced(NodeId),
    /// The registry cannot be reached.
    #[error("membership cannot be reached: {0}")]
    Unavailable(String),
    /// The nodes that are registered have another store.
    #[error(
        "redis.prefix: {node} is registered there with another store ({theirs}; here {ours}): two clusters share one \
         redis.prefix, or mongo.uri and mongo.database are not the same everywhere"
    )]
    OtherStore {
        /// Who is registered.
        node: String,
        /// The identity of its store.
        theirs: String,
        /// Of the store of this process.
        ours: String,
    },
}

/// What a node says of itself.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeInfo {
    /// Its stable name.
    pub node: NodeId,
    /// Its share of the users, 1.0 is one share.
    pub weight: f64,
    /// New sockets that it takes per second; 0 is no limit.
    pub accept_per_s: u32,
    /// Where its peer port is, as others reach it; empty where there is no need to.
    pub peer: Arc<str>,
    /// Whether it holds sockets: only such nodes stand in the ring.
    pub push: bool,
    /// Whether it routes.
    pub dispatch: bool,
    /// The identity of its store; empty where it has none.
    pub store: Arc<str>,
}

/// Who stands in the registry and is in no ring.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Outsiders {
    /// Nodes that know our secret, and that nobody has reached yet at the address that they give.
    pub candidates: Vec<Member>,
    /// Nodes that do not know our secret, as far as their entries show.
    pub strangers: Vec<NodeId>,
}

/// A node that routes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Router {
    /// Its name.
    pub node: NodeId,
    /// Which process of that name.
    pub incarnation: u64,
    /// Where its peer port is.
    pub peer: Arc<str>,
}

/// Whether a member takes users.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeState {
    /// It does.
    Active,
    /// It is leaving: its users move away.
    Draining,
}

impl NodeState {
    /// As it is shown.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Draining => "draining",
        }
    }
}

/// One member of a view.
#[derive(Debug, Clone, PartialEq)]
pub struct Member {
    /// What it says of itself.
    pub info: NodeInfo,
    /// Which process of that name.
    pub incarnation: u64,
    /// Whether it takes users.
    pub state: NodeState,
}

/// What a node holds at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Sessions.
    pub sessions: u64,
    /// Users whose sessions are here though another node owns them: the moves under way.
    pub displaced: u64,
    /// Messages handed to sockets since the process began.
    pub delivered: u64,
    /// Moves told since the process began.
    pub moves: u64,
}

/// Everything that is decided by membership, as one immutable value.
#[derive(Debug, Clone)]
pub struct View {
    /// Changes when the registry forgot everything.
    pub generation: Arc<str>,
    /// Rises with every change.
    pub epoch: u64,
    /// The push nodes, in the order of their names.
    pub members: Vec<Member>,
    /// The nodes that route, in the order of their names.
    pub routers: Vec<Router>,
    /// Over the active members.
    pub ring: Ring,
    /// The position among the members of each name on the ring, in the order of the names.
    on_ring: Vec<usize>,
    /// Over ids, weights and states: two views that differ in any of them differ here.
    pub digest: u64,
    /// The registry shows something else, and this older view is kept on purpose.
    pub held: bool,
    /// Members of a held view that the registry does not show: users are not sent there.
    pub absent: Vec<NodeId>,
    /// Who else stands in the registry.
    pub outsiders: Arc<Outsiders>,
    /// All members and routers that the registry shows, also where this view is an older one.
    pub shown: Arc<[NodeId]>,
}

/// The version of the arithmetic: part of the digest, so that two that count differently are seen.
const SCHEME: &[u8] = b"xxh3_64/512/1";

impl View {
    /// Builds the view of these nodes: the push nodes among them are its members.
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

    /// Who sees what, in three words.
    #[must_use]
    pub fn stamp(&self) -> ViewVersion {
        ViewVersion { generation: Arc::clone(&self.generation), epoch: self.epoch, digest: self.digest }
    }

    /// The node that owns `user`; None while there is no active push node.
    #[must_use]
    pub fn owner(&self, user: &UserId) -> Option<&Member> {
        self.owner_at(ring::key(user.as_str()))
    }

    /// The node that owns this place on the ring.
    #[must_use]
    pub fn owner_at(&self, key: u64) -> Option<&Member> {
        self.members.get(self.owner_position(key)?)
    }

    /// The same, as its position among the members.
    #[must_use]
    pub fn owner_position(&self, key: u64) -> Option<usize> {
        self.on_ring.get(self.ring.owner_index(key)?).copied()
    }

    /// This view without some of its members: what is left owns their users.
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
