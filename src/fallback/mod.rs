//! The fallback: where users are who are, for now, connected to a node that does not own them.
//!
//! # The contract of a [`Fallback`]
//!
//! - A user stands in a node's set from when [`Fallback::add`] answers until [`Fallback::remove`] or
//!   [`Fallback::forget`]. Adding twice and removing what is not there do nothing.
//! - [`Fallback::nodes_of`] answers every node whose set has the user. It may answer one too many for a moment, never
//!   one too few once `add` has answered.

pub mod local;

use futures_util::future::BoxFuture;

use crate::message::{NodeId, UserId};

/// The port.
pub trait Fallback: Send + Sync + 'static {
    /// These users are displaced on `node`.
    fn add(&self, node: &NodeId, users: Vec<UserId>) -> BoxFuture<'_, Result<(), FallbackError>>;

    /// These are no longer.
    fn remove(&self, node: &NodeId, users: Vec<UserId>) -> BoxFuture<'_, Result<(), FallbackError>>;

    /// The node has gone, with all its entries.
    fn forget(&self, node: &NodeId) -> BoxFuture<'_, Result<(), FallbackError>>;

    /// For each user, the nodes that have it; empty for nearly all.
    fn nodes_of(&self, users: Vec<UserId>) -> BoxFuture<'_, Result<Vec<Vec<NodeId>>, FallbackError>>;

    /// Whether no node has any entry, as far as is known here without asking: then nobody need be asked.
    fn is_empty(&self) -> bool;
}

/// The entries cannot be reached.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the fallback entries cannot be reached: {0}")]
pub struct FallbackError(pub String);
