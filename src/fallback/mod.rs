//! The fallback: where users are who are connected, for now, to a node that does not own them.
//!
//! # The contract of a [`Fallback`]
//!
//! - A user is in a holder's set from the time when [`Fallback::add`] returns until
//!   [`Fallback::remove`], or until nobody has called [`Fallback::keep`] for a lease. Adding twice
//!   and removing what is not there do nothing.
//! - [`Fallback::nodes_of`] returns every node whose set has the user. For a moment it may return
//!   one too many. It may return one too few only until [`Hints::seen_after`] has passed since
//!   `add` returned, so whoever adds a user reads the inbox again then.
//! - [`Fallback::keep`] returns the size of the set as it is stored. A wrong size twice running
//!   means that the set was lost.
//!
//! Every adapter passes the suite in `conformance` (feature `test-support`).

#[cfg(any(test, feature = "test-support"))]
pub mod conformance;
pub mod local;
pub mod redis;

use std::time::Duration;

use futures_util::future::BoxFuture;

use crate::message::{NodeId, UserId};

/// The port of the fallback.
pub trait Fallback: Send + Sync + 'static {
    /// Enters users that are displaced on `holder`.
    fn add(&self, holder: &Holder, users: Vec<UserId>) -> BoxFuture<'_, Result<(), FallbackError>>;

    /// Removes users that no longer are.
    fn remove(&self, holder: &Holder, which: Which) -> BoxFuture<'_, Result<(), FallbackError>>;

    /// Renews the lease of the holder's set. Returns the number of users in it.
    fn keep(&self, holder: &Holder) -> BoxFuture<'_, Result<usize, FallbackError>>;

    /// For each user, the nodes whose set has it. Empty for nearly all users.
    fn nodes_of(&self, users: Vec<UserId>) -> BoxFuture<'_, Result<Vec<Vec<NodeId>>, FallbackError>>;

    /// What is known here without asking the store.
    fn hints(&self) -> Hints;
}

/// The owner of a set: one process of a node.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Holder {
    /// The node.
    pub node: NodeId,
    /// Incarnation of its process.
    pub incarnation: u64,
}

/// Which users leave a set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Which {
    /// These users.
    Users(Vec<UserId>),
    /// All users: the node has left.
    All,
}

/// What is known about all sets without asking the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hints {
    /// No holder has any entry, so no look-up is needed.
    pub empty: bool,
    /// Longest time until an entry is visible everywhere.
    pub seen_after: Duration,
}

/// The store of the entries cannot be reached.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the fallback entries cannot be reached: {0}")]
pub struct FallbackError(pub String);
