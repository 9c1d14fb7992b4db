//! Renewing the lease of a node of this process.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::Instant;

use super::super::{Counts, LeaseState, NodeInfo, NodeState, Reached};
use super::entries::StoredInfo;
use super::{Beaten, Inner, JITTER};
use crate::backoff::around;

/// A node of this process.
pub(super) struct Own {
    pub(super) info: NodeInfo,
    pub(super) incarnation: u64,
    pub(super) state: Mutex<(NodeState, Counts)>,
    pub(super) standing: watch::Sender<LeaseState>,
    pub(super) proof: Reached,
    /// Held during every call about this node: a heartbeat that overtook a `leave` would register
    /// the node again.
    pub(super) turn: tokio::sync::Mutex<Turn>,
}

/// Whether a node still sends heartbeats.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    Beating,
    Left,
}

/// Renews a node's lease as long as it has one, in a task of its own.
pub(super) async fn keep_beating(inner: Arc<Inner>, own: Arc<Own>) {
    let mut soon = inner.beat_soon.subscribe();
    let mut renewed = Instant::now();
    let mut times = 1;
    let mut said_reached = false;
    let mut answered = true;
    loop {
        let pause = around(inner.times.beat, JITTER, &mut rand::rng());
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            Ok(()) = soon.changed() => {}
            // Others wait to hear that the node was reached.
            () = own.proof.noted(), if answered && !said_reached => {}
        }
        let turn = own.turn.lock().await;
        if *turn == Turn::Left {
            return;
        }
        let (state, counts) = *own.state.lock();
        let sent = Instant::now();
        let reached = own.proof.is_noted();
        let said = StoredInfo::text(&own.info, state, reached, &inner.entries);
        let beaten = inner.beat(&own.info, own.incarnation, &said, counts).await;
        answered = beaten.is_ok();
        match beaten {
            Ok(Beaten::Fenced) => {
                tracing::warn!(
                    node = %own.info.node,
                    "another process has registered under this node's name (node.name): this one takes no more sockets"
                );
                own.standing.send_replace(LeaseState::Fenced);
                return;
            }
            Ok(Beaten::Renewed { was_member, .. }) => {
                said_reached = reached;
                // The heartbeat that registered it again may have been one whose response was lost.
                let was_lost = !was_member || renewed.elapsed() > inner.times.lease;
                renewed = sent;
                times += u64::from(was_lost);
                let now = LeaseState::Member(times);
                own.standing.send_if_modified(|known| std::mem::replace(known, now) != now);
                if was_lost {
                    tracing::info!(node = %own.info.node, "registered again");
                }
            }
            Ok(Beaten::OtherStore { node, theirs }) => {
                inner.complain(format!(
                    "{node} is registered with another store ({theirs}; here {}): this node is not registered again until it \
                     has gone (mongo.uri, mongo.database, redis.prefix)",
                    own.info.store
                ));
                own.lapse(renewed.elapsed() > inner.times.lease);
            }
            Err(fault) => {
                tracing::debug!(%fault, "a heartbeat was not answered");
                own.lapse(renewed.elapsed() > inner.times.lease);
            }
        }
    }
}

impl Own {
    /// The lease could not be renewed; `over` says whether it has run out.
    pub(super) fn lapse(&self, over: bool) {
        if over {
            self.standing
                .send_if_modified(|known| std::mem::replace(known, LeaseState::Lapsed) != LeaseState::Lapsed);
        }
    }
}
