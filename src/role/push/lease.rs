//! What this node does when it has lost its place among the members, and when it has it again.
//!
//! - Another process took its name (*fenced*): it closes its sessions over the drain window and
//!   stays, not ready. If it exited, its supervisor would start it again and it would fence the
//!   other one.
//! - It cannot reach the registry and a router says that it has left the view (*cut off*): other
//!   nodes own its users now. It sends its sessions there, sweeps every 3 s meanwhile, and takes no
//!   new sockets until it is registered again.
//! - It is registered again, or the registry has forgotten everything: it writes its entries there
//!   again, and every session checks its inbox.

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::availability::{Availability, Bar};
use super::displaced::DisplacedSet;
use super::drain::Drainer;
use super::interest::InterestWriter;
use super::ownership::Ownership;
use super::sweep::Sweeper;
use crate::membership::LeaseState;

/// How long a router's word is remembered by a node that does not know yet that its lease has run
/// out.
const GONE_REMEMBERED: Duration = Duration::from_secs(20);

/// What routers say about this node.
#[derive(Default)]
pub(super) struct GoneNotice {
    /// When a router last said that its view no longer has this node.
    at: Mutex<Option<Instant>>,
    noted: Notify,
}

impl GoneNotice {
    /// A router says that its view no longer has this node.
    pub(super) fn note(&self) {
        *self.at.lock() = Some(Instant::now());
        self.noted.notify_one();
    }

    fn forget(&self) {
        *self.at.lock() = None;
    }

    fn is_recent(&self) -> bool {
        self.at.lock().is_some_and(|at| at.elapsed() < GONE_REMEMBERED)
    }
}

/// Watches the node's lease.
pub(super) struct LeaseWatch {
    pub(super) lease: watch::Receiver<LeaseState>,
    pub(super) notice: Arc<GoneNotice>,
    pub(super) ownership: Arc<Ownership>,
    pub(super) availability: Arc<Availability>,
    pub(super) displaced: Arc<DisplacedSet>,
    pub(super) interest: Arc<InterestWriter>,
    pub(super) sweeper: Arc<Sweeper>,
    pub(super) drainer: Arc<Drainer>,
}

impl LeaseWatch {
    /// Acts on every change until the drain begins.
    pub(super) async fn run(mut self) {
        let mut views = self.ownership.views();
        let mut times = 1;
        let mut told = true;
        let mut generation = Arc::clone(&views.borrow_and_update().generation);
        let mut leaving: BoxFuture<'static, ()> = std::future::pending().boxed();
        loop {
            tokio::select! {
                () = self.availability.drain_begun() => return std::future::pending().await,
                () = &mut leaving => leaving = std::future::pending().boxed(),
                () = self.notice.noted.notified() => {}
                changed = views.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let now = Arc::clone(&views.borrow_and_update().generation);
                    if !generation.is_empty() && now != generation {
                        self.write_again();
                    }
                    generation = now;
                }
                // Membership has ended: the last state holds, and what it began is finished.
                changed = self.lease.changed(), if told => told = changed.is_ok(),
            }
            let state = *self.lease.borrow_and_update();
            if let Some(next) = self.act(state, &mut times) {
                leaving = next;
            }
        }
    }

    /// Acts on the state of the lease. Returns what the node does from now on, if that changes.
    fn act(&self, state: LeaseState, times: &mut u64) -> Option<BoxFuture<'static, ()>> {
        let (bar, node) = (self.availability.bar(), self.ownership.node());
        match state {
            LeaseState::Member(n) if n > *times => {
                *times = n;
                self.notice.forget();
                let stays = self.availability.lift_bar();
                if stays {
                    tracing::info!(%node, "registered again: this node takes sockets");
                }
                self.write_again();
                stays.then(|| std::future::pending().boxed())
            }
            LeaseState::Lapsed if bar.is_none() && self.notice.is_recent() => {
                tracing::warn!(%node, "cut off from Redis (redis.url) alone: its sessions move away");
                self.availability.set_bar(Bar::CutOff);
                self.sweeper.force();
                Some(Arc::clone(&self.drainer).evacuate().boxed())
            }
            LeaseState::Fenced if bar != Some(Bar::Fenced) => {
                self.availability.set_bar(Bar::Fenced);
                Some(Arc::clone(&self.drainer).close_over_window().boxed())
            }
            _ => None,
        }
    }

    /// Entries in the registry may be lost, and messages sent meanwhile may have gone elsewhere.
    fn write_again(&self) {
        self.displaced.write_again();
        self.interest.write_again();
        self.sweeper.force();
    }
}
