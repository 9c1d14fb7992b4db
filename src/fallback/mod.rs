//! The fallback: where users are who are, for now, connected to a node that does not own them.
//!
//! # The contract of a [`Fallback`]
//!
//! - A user stands in a holder's set from when [`Fallback::add`] answers until [`Fallback::remove`], or until nobody has
//!   called [`Fallback::keep`] for a lease. Adding twice and removing what is not there do nothing.
//! - [`Fallback::nodes_of`] answers every node whose set has the user. It may answer one too many for a moment; one too few
//!   only until [`Hints::seen_after`] has passed since `add` answered, so whoever adds reads the inbox again then.
//! - [`Fallback::keep`] answers the size of the set as it is stored: a wrong one twice running means that it was lost.
//!
//! Every adapter passes [`conformance::suite`].

pub mod conformance;
pub mod local;
pub mod redis;

use std::time::Duration;

use futures_util::future::BoxFuture;

use crate::message::{NodeId, UserId};

/// The port.
pub trait Fallback: Send + Sync + 'static {
    /// These users are displaced on `holder`.
    fn add(&self, holder: &Holder, users: Vec<UserId>) -> BoxFuture<'_, Result<(), FallbackError>>;

    /// These are no longer.
    fn remove(&self, holder: &Holder, which: Which) -> BoxFuture<'_, Result<(), FallbackError>>;

    /// Renews the lease of the holder's set; answers how many users stand in it.
    fn keep(&self, holder: &Holder) -> BoxFuture<'_, Result<usize, FallbackError>>;

    /// For each user, the nodes that have it; empty for nearly all.
    fn nodes_of(&self, users: Vec<UserId>) -> BoxFuture<'_, Result<Vec<Vec<NodeId>>, FallbackError>>;

    /// What is known here without asking anybody.
    fn hints(&self) -> Hints;
}

/// Whose set it is: one process of a node.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Holder {
    /// The node.
    pub node: NodeId,
    /// Which process of that name.
    pub incarnation: u64,
}

/// Which users leave a set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Which {
    /// These.
    Users(Vec<UserId>),
    /// All: the node has gone.
    All,
}

/// What is known of all sets without asking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hints {
    /// No holder has any entry: nobody need be asked.
    pub empty: bool,
    /// How long it takes at the most until an entry is seen everywhere.
    pub seen_after: Duration,
}

/// The entries cannot be reached.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the fallback entries cannot be reached: {0}")]
pub struct FallbackError(pub String);
