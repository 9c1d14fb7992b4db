//! Puts the components of a node together, in four groups.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;

use super::admission::Admitter;
use super::attach::Attacher;
use super::availability::Availability;
use super::config::LiveLimits;
use super::config::{PushConfig, PushLimits, PushMetrics, PushParts};
use super::connection::Connector;
use super::cursors::CursorWriter;
use super::displaced::DisplacedSet;
use super::drain::Drainer;
use super::interest::InterestWriter;
use super::lease::{GoneNotice, LeaseWatch};
use super::log_attach::{LogAttacher, MembershipReads};
use super::log_positions::LogPositions;
use super::moves::{MoveOrders, Mover};
use super::ownership::Ownership;
use super::page_reads::PageReads;
use super::reconnect::ReconnectWindow;
use super::refresh::Refresher;
use super::registry::Registry;
use super::serving::ServingContext;
use super::sweep::Sweeper;
use super::tails::Tails;
use super::welcome::Welcomer;
use crate::clock::Clock;
use crate::fallback::{Fallback, Holder};
use crate::inbox::{Inbox, Lookups, Stores};
use crate::interest::{Interest, Reader};
use crate::membership::LeaseState;
use crate::role::connect::PublicUrls;
use crate::role::reach::PeerProbe;

/// What nearly all components use.
pub(super) struct Base {
    holder: Holder,
    limits: PushLimits,
    live: Arc<LiveLimits>,
    drain_window: Duration,
    pub(super) metrics: PushMetrics,
    pub(super) registry: Arc<Registry>,
    pub(super) availability: Arc<Availability>,
    pub(super) ownership: Arc<Ownership>,
    pub(super) window: Arc<ReconnectWindow>,
}

impl Base {
    /// The base of the node `holder`.
    pub(super) fn new(config: &PushConfig, parts: &PushParts, holder: Holder) -> Self {
        let limits = config.limits;
        let live = Arc::clone(&config.live);
        let registry = Arc::new(Registry::new(Arc::clone(&live)));
        let availability = Arc::new(Availability::new(parts.health.clone()));
        let (name, views) = (holder.node.clone(), parts.membership.views());
        let ownership = Arc::new(Ownership::new(name, views, Arc::clone(&availability)));
        let (accept_per_s, jitter_ms) = (config.info.accept_per_s, limits.reconnect_jitter_ms);
        let window = Arc::new(ReconnectWindow::new(Arc::clone(&registry), accept_per_s, jitter_ms));
        let (drain_window, metrics) = (config.drain_window, parts.metrics.clone());
        Self { holder, limits, live, drain_window, metrics, registry, availability, ownership, window }
    }

    /// What runs connections.
    pub(super) fn connector(
        &self,
        reading: &Reading,
        placement: &Placement,
        admitter: &Arc<Admitter>,
        clock: Clock,
    ) -> Arc<Connector> {
        let tokens = &admitter.tokens;
        let attacher = Attacher {
            registry: Arc::clone(&self.registry),
            ownership: Arc::clone(&self.ownership),
            availability: Arc::clone(&self.availability),
            displaced: Arc::clone(&placement.displaced),
            mover: Arc::clone(&placement.mover),
            lookup: reading.lookups.positions.clone(),
            inbox: Arc::clone(&reading.inbox),
            cursors: Arc::clone(&reading.cursors),
        };
        let context = ServingContext {
            ping_every: self.limits.ping_every,
            live: Arc::clone(&self.live),
            metrics: self.metrics.clone(),
            clock: clock.clone(),
            cursors: Arc::clone(&reading.cursors),
            reads: Arc::clone(&reading.pages),
            displaced: Arc::clone(&placement.displaced),
            log_positions: Arc::clone(&reading.log_positions),
            logs: Arc::new(LogAttacher {
                stores: reading.stores.clone(),
                lookups: reading.lookups.clone(),
                tails: Arc::clone(&reading.tails),
                positions: Arc::clone(&reading.log_positions),
                everyone_backlog: self.limits.logs.everyone_backlog,
            }),
            refresher: Arc::new(Refresher {
                tokens: Arc::clone(tokens),
                lookup: reading.lookups.positions.clone(),
            }),
            welcomer: Welcomer {
                ownership: Arc::clone(&self.ownership),
                window: Arc::clone(&self.window),
                ping_every: self.limits.ping_every,
                clock,
            },
            window: Arc::clone(&self.window),
        };
        Arc::new(Connector {
            attacher,
            context: Arc::new(context),
            availability: Arc::clone(&self.availability),
            ownership: Arc::clone(&self.ownership),
            admitter: Arc::clone(admitter),
        })
    }
}

/// All that reads or writes the inbox.
pub(super) struct Reading {
    pub(super) stores: Stores,
    pub(super) inbox: Arc<dyn Inbox>,
    pub(super) lookups: Lookups,
    pub(super) pages: Arc<PageReads>,
    pub(super) cursors: Arc<CursorWriter>,
    pub(super) sweeper: Arc<Sweeper>,
    pub(super) tails: Arc<Tails>,
    pub(super) interest: Arc<InterestWriter>,
    pub(super) memberships: Arc<MembershipReads>,
    pub(super) log_positions: Arc<LogPositions>,
}

impl Reading {
    /// Starts its tasks in `tasks`.
    pub(super) fn start(
        base: &Base,
        (stores, interest): (Stores, Arc<dyn Interest>),
        clock: Clock,
        tasks: &mut JoinSet<()>,
    ) -> Self {
        let inbox = Arc::clone(&stores.inbox);
        let lookups = Lookups::new(&stores, tasks);
        let pages = Arc::new(PageReads::new(Arc::clone(&inbox), base.metrics.clone()));
        tasks.spawn(Arc::clone(&pages).run());
        let cursors = Arc::new(CursorWriter::new(Arc::clone(&inbox)));
        tasks.spawn(Arc::clone(&cursors).run());
        let memberships = Arc::new(MembershipReads::new(stores.clone(), Arc::clone(&base.registry)));
        tasks.spawn(Arc::clone(&memberships).run());
        let sweeper = Arc::new(Sweeper::new(
            Arc::clone(&inbox),
            Arc::clone(&base.registry),
            Arc::clone(&base.availability),
            base.metrics.clone(),
            base.limits.sweep_every,
            Arc::clone(&memberships),
        ));
        tasks.spawn(Arc::clone(&sweeper).run());
        let tails = Tails::new(
            stores.clone(),
            (clock, base.metrics.clone()),
            Arc::clone(&base.availability),
            base.limits.sweep_every,
            base.limits.logs,
        );
        tasks.spawn(Arc::clone(&tails).run());
        let reader = Reader { node: base.holder.node.clone(), incarnation: base.holder.incarnation };
        let interest = Arc::new(InterestWriter::new(interest, reader, Arc::clone(&tails)));
        tasks.spawn(Arc::clone(&interest).run());
        let log_positions = Arc::new(LogPositions::new(Arc::clone(&inbox), base.limits.logs));
        tasks.spawn(Arc::clone(&log_positions).run());
        Self { stores, inbox, lookups, pages, cursors, sweeper, tails, interest, memberships, log_positions }
    }
}

/// All that decides where sessions belong.
pub(super) struct Placement {
    pub(super) displaced: Arc<DisplacedSet>,
    pub(super) mover: Arc<Mover>,
    pub(super) drainer: Arc<Drainer>,
    pub(super) notice: Arc<GoneNotice>,
}

impl Placement {
    /// Starts its tasks in `tasks`.
    pub(super) fn start(
        base: &Base,
        reading: &Reading,
        fallback: Arc<dyn Fallback>,
        probe: PeerProbe,
        urls: &Arc<PublicUrls>,
        tasks: &mut JoinSet<()>,
    ) -> Self {
        let displaced = Arc::new(DisplacedSet::new(
            fallback,
            base.holder.clone(),
            Arc::clone(&base.registry),
            Arc::clone(&base.ownership),
            Arc::clone(&reading.sweeper),
        ));
        tasks.spawn(Arc::clone(&displaced).run());
        tasks.spawn(Arc::clone(&displaced).renew());
        let orders = Arc::new(MoveOrders::new(Arc::clone(urls), base.metrics.clone()));
        let mover = Arc::new(Mover::new(
            Arc::clone(&base.registry),
            Arc::clone(&base.ownership),
            Arc::clone(&base.availability),
            Arc::clone(&displaced),
            probe,
            Arc::clone(&orders),
        ));
        tasks.spawn(Arc::clone(&mover).run());
        let drainer = Arc::new(Drainer::new(
            Arc::clone(&base.registry),
            Arc::clone(&base.ownership),
            Arc::clone(&displaced),
            orders,
            base.drain_window,
        ));
        Self { displaced, mover, drainer, notice: Arc::default() }
    }

    /// What watches the node's lease.
    pub(super) fn watch(
        &self,
        base: &Base,
        reading: &Reading,
        lease: watch::Receiver<LeaseState>,
    ) -> LeaseWatch {
        LeaseWatch {
            lease,
            notice: Arc::clone(&self.notice),
            ownership: Arc::clone(&base.ownership),
            availability: Arc::clone(&base.availability),
            displaced: Arc::clone(&self.displaced),
            interest: Arc::clone(&reading.interest),
            sweeper: Arc::clone(&reading.sweeper),
            drainer: Arc::clone(&self.drainer),
        }
    }
}
