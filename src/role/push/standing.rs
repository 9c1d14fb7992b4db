//! What this node does when it has lost its place among the members, and when it has it again.
//!
//! - Another process took its name (*fenced*): it closes its sessions over the drain window and
//!   stays,
//!   not ready. If it exited, its supervisor would start it again and it would fence the other one.
//! - It cannot reach the registry and a router says that it has left the view (*cut off*): other
//!   nodes
//!   own its users now. It sends its sessions there, sweeps every 3 s meanwhile, and takes no new
//!   sockets until it is registered again.
//! - It is registered again, or the registry has forgotten everything: it writes its entries there
//!   again, and every session checks its inbox.

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::time::Instant;

use super::{Node, rebalance};
use crate::membership::LeaseState;

/// How long a router's word is remembered by a node that does not know yet that its lease has run
/// out.
const GONE_REMEMBERED: Duration = Duration::from_secs(20);

/// Why a node takes no sockets although it does not drain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Bar {
    /// This node alone is cut off from the registry.
    CutOff,
    /// Another process has this node's name.
    Fenced,
}

/// A router says that its view no longer has this node.
pub(super) fn gone(node: &Node) {
    *node.told_gone.lock() = Some(Instant::now());
    node.gone.notify_one();
}

/// Watches the node's lease as long as the node runs.
pub(super) async fn watch(node: Arc<Node>) {
    let (mut standing, mut views) = (node.standing.clone(), node.views.clone());
    let mut times = 1;
    let mut told = true;
    let mut generation = Arc::clone(&views.borrow_and_update().generation);
    let mut leaving: BoxFuture<'static, ()> = std::future::pending().boxed();
    loop {
        tokio::select! {
            () = node.draining.cancelled() => return std::future::pending().await,
            () = &mut leaving => leaving = std::future::pending().boxed(),
            () = node.gone.notified() => {}
            changed = views.changed() => {
                if changed.is_err() {
                    return;
                }
                let now = Arc::clone(&views.borrow_and_update().generation);
                if !generation.is_empty() && now != generation {
                    regained(&node);
                }
                generation = now;
            }
            // Membership has ended: the last state holds, and what it began is finished.
            changed = standing.changed(), if told => told = changed.is_ok(),
        }
        let bar = *node.barred.borrow();
        match *standing.borrow_and_update() {
            LeaseState::Member(n) if n > times => {
                times = n;
                *node.told_gone.lock() = None;
                if node.barred.send_replace(None).is_some() {
                    tracing::info!(node = %node.name(), "registered again: this node takes sockets");
                    node.health.set("membership", true, "registered again");
                    leaving = std::future::pending().boxed();
                }
                regained(&node);
            }
            LeaseState::Lapsed if bar.is_none() && is_told_gone(&node) => {
                tracing::warn!(node = %node.name(), "cut off from Redis (redis.url) alone: its sessions move away");
                node.health.set("membership", false, "cut off from Redis (redis.url) alone");
                node.barred.send_replace(Some(Bar::CutOff));
                node.sweep_now.notify_one();
                leaving = rebalance::evacuate(Arc::clone(&node)).boxed();
            }
            LeaseState::Fenced if bar != Some(Bar::Fenced) => {
                node.health.set("membership", false, "another process has this node's name (node.name)");
                node.barred.send_replace(Some(Bar::Fenced));
                leaving = rebalance::close_over_window(Arc::clone(&node)).boxed();
            }
            _ => {}
        }
    }
}

fn is_told_gone(node: &Node) -> bool {
    node.told_gone.lock().is_some_and(|told| told.elapsed() < GONE_REMEMBERED)
}

/// Entries in the registry may be lost, and messages sent meanwhile may have gone elsewhere.
fn regained(node: &Node) {
    node.displaced.write_again();
    node.sweep_now.notify_one();
}
