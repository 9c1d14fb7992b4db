//! Colleagues: the processes with the role collect. One of them writes to a topic, whoever took the
//! publish, so that writers do not take each other's numbers.
//!
//! # The contract of [`Colleagues`]
//!
//! - What it shows may be late, incomplete, or different in each process. Whoever acts on it must
//!   be right nevertheless: a publish that two processes write is stored once, by its fence.
//! - Who has joined is shown to others within two beats. It is no longer shown one lease after its
//!   last beat, and within two beats after it has left, or rests.
//! - A registry that cannot be reached changes nothing: what was last seen is shown on.
//! - Joining and leaving raise no epoch: no user moves.

pub mod redis;

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{BoxFuture, FutureExt, ready};
use tokio::sync::watch;

use crate::message::NodeId;

/// A process with the role collect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Colleague {
    /// Its name.
    pub node: NodeId,
    /// Incarnation of the process.
    pub incarnation: u64,
    /// Address of its peer port.
    pub peer: Arc<str>,
}

/// The port of the colleagues.
pub trait Colleagues: Send + Sync + 'static {
    /// All that are known, sorted by name, this process among them once it has joined.
    fn all(&self) -> watch::Receiver<Arc<[Colleague]>>;

    /// Registers this process, and keeps it registered until it leaves.
    fn join(&self, own: Colleague);

    /// Takes this process out for so long: what writes to its store fails.
    fn rest(&self, length: Duration);

    /// Takes this process out for good. Resolves when the registry was told, or cannot be told.
    fn leave(&self) -> BoxFuture<'_, ()>;

    /// Whether this process takes publishes of others: it does not rest, and has not left.
    fn is_there(&self) -> bool;
}

/// A process that has no colleagues: there is no registry.
#[derive(Debug)]
pub struct Alone {
    nobody: watch::Sender<Arc<[Colleague]>>,
}

impl Default for Alone {
    fn default() -> Self {
        Self { nobody: watch::Sender::new(Arc::default()) }
    }
}

impl Colleagues for Alone {
    fn all(&self) -> watch::Receiver<Arc<[Colleague]>> {
        self.nobody.subscribe()
    }

    fn join(&self, _: Colleague) {}

    fn rest(&self, _: Duration) {}

    fn leave(&self) -> BoxFuture<'_, ()> {
        ready(()).boxed()
    }

    fn is_there(&self) -> bool {
        true
    }
}
