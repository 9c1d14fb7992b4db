//! Interest: which push nodes read which logs of topics. A message to a topic is sent to them
//! alone.
//!
//! Each node publishes a bitmap of [`BUCKETS`] buckets of logs. A router looks at the bitmaps of
//! all nodes again and again.
//!
//! # The contract of an [`Interest`]
//!
//! - A router that is wrong about a node may only be wrong by sending too much. So a node whose
//!   bitmap is not known is sent everything; the last bitmap known of a process is kept, whatever
//!   became of it in the store; and a router that has not seen the bitmaps for [`STALE_AFTER`]
//!   sends everything to all.
//! - A bit that was published is seen by every router within [`redis::seen_after`], or that
//!   router sends everything. A node that begins to read a log looks at it twice: when its place is
//!   taken, and when that time has passed since the bit was published.
//! - To read nothing is an empty bitmap, not none.
//!
//! `rule` is what a router knows, without a clock or a store; `model` tries every order in which
//! these rules can meet.

pub mod local;
#[cfg(test)]
mod model;
pub mod redis;
mod rule;

use std::sync::Arc;

use futures_util::future::BoxFuture;

pub use rule::{BUCKETS, Buckets, STALE_AFTER};

use crate::message::{LogId, NodeId};

/// The port of the interest.
pub trait Interest: Send + Sync + 'static {
    /// Publishes what a process of a node reads, in place of what it published before. Returns
    /// whether something else was there.
    ///
    /// # Errors
    ///
    /// The store cannot be reached; the next call publishes it all.
    fn publish(&self, reader: &Reader, buckets: Arc<Buckets>) -> BoxFuture<'_, Result<bool, InterestError>>;

    /// Whether a process of a node may read a log.
    fn may_read(&self, reader: &Reader, log: &LogId) -> bool;
}

/// One process of a push node.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reader {
    /// The node.
    pub node: NodeId,
    /// Incarnation of its process.
    pub incarnation: u64,
}

/// The bitmaps cannot be reached.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the interest bitmaps cannot be reached: {0}")]
pub struct InterestError(pub String);
