//! Assembly: the only place where adapters meet roles. `main` and the tests start a process in the
//! same way.

mod assemble;
mod audit;
mod auth_http;
mod collect_grpc;
mod collect_http;
mod console;
mod edge;
mod gauges;
mod greeting;
pub(crate) mod keys;
mod listeners;
mod ops_http;
mod page;
mod peers;
mod push_http;
mod reload;
mod secure;
mod senders;
mod serve;
mod start;
mod stores;
mod topics_http;
mod traces;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, anyhow};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

pub use listeners::Bound;
pub use ops_http::serve_metrics;

use crate::clock::Clock;
use crate::colleagues::Colleagues;
use crate::config::Config;
use crate::fallback::Fallback;
use crate::interest::Interest;
use crate::membership::{Departure, Member, Membership, NodeState};
use crate::message::NodeId;
use crate::role::auth::Auth;
use crate::role::collect::Collect;
use crate::role::connect::PublicUrls;
use crate::role::push::{Drain, Push};
use crate::role::reach::PeerProbe;
use crate::role::strangers::Strangers;
use crate::role::witness::OwnNode;
use crate::telemetry::{Health, Metrics, Refusals, TimingBy};
use crate::transport::http::HttpLimits;

use assemble::needs_view;
use edge::Budgets;
use keys::Keys;
use peers::{Proofs, PushNodes};
use reload::LiveSettings;
pub use reload::{Reloader, SetLogLevel};
use secure::Tls;
use start::Prepared;

/// How long Redis may take to hear that this process leaves the collects.
const LEAVES_COLLEAGUES: Duration = Duration::from_secs(1);
/// How long the last responses may take when the store has failed.
const LAST_ANSWERS: Duration = Duration::from_secs(2);
/// What a drain may take beyond its window: the last closes, the last cursors.
const DRAIN_OVERTIME: Duration = Duration::from_secs(8);
/// Most push nodes in one process.
pub const PUSH_NODES_MAX: usize = 64;

/// A process that serves.
pub struct App {
    /// The bound addresses.
    pub bound: Bound,
    keys: Keys,
    tasks: JoinSet<()>,
    servers: JoinSet<()>,
    stop: CancellationToken,
    health: Health,
    pushes: Vec<Push>,
    collect: Option<Collect>,
    /// The registered nodes of this process.
    nodes: Vec<OwnNode>,
    /// Name and incarnation of a router that is not a push node.
    registered: Option<(NodeId, u64)>,
    membership: Arc<dyn Membership>,
    colleagues: Arc<dyn Colleagues>,
    poisoned: watch::Receiver<bool>,
    drain_window: Duration,
    listen_file: PathBuf,
    reloader: Option<Reloader>,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It was asked to stop, and everything was finished.
    Stopped,
    /// The store failed; what is on disk is unknown.
    Poisoned,
}

/// What all roles of a process share.
struct Shared {
    clock: Clock,
    metrics: Metrics,
    membership: Arc<dyn Membership>,
    fallback: Arc<dyn Fallback>,
    interest: Arc<dyn Interest>,
    colleagues: Arc<dyn Colleagues>,
    urls: PublicUrls,
    live: LiveSettings,
    tls: Tls,
    nodes: Arc<PushNodes>,
    reach: PeerProbe,
    health: Health,
    proofs: Arc<Proofs>,
    /// Identity of this process's store; empty if it has none.
    store: Arc<str>,
    /// The address at which other processes reach this one; empty if none has to.
    peer: Arc<str>,
    /// Set if this process verifies tokens itself.
    own_auth: Option<Auth>,
    auth_times: TimingBy<3>,
    refusals: Refusals,
    strangers: Strangers,
    budgets: Budgets,
}

impl App {
    /// Builds everything, binds and serves: `push_nodes` push nodes, and the other roles that the
    /// configuration names. Waits for stores that cannot be reached yet, and answers `/livez` and
    /// `/readyz` meanwhile.
    ///
    /// # Errors
    ///
    /// What could not be opened, bound or started, with the remedy.
    pub async fn start(config: Config, push_nodes: Option<usize>) -> Result<Self> {
        Prepared::new(config).await?.listen(push_nodes).await?.serve().await
    }

    /// What takes a changed configuration; `None` the second time.
    #[must_use]
    pub fn take_reloader(&mut self) -> Option<Reloader> {
        self.reloader.take()
    }

    /// Serves until `stop` resolves, then leaves in good order.
    ///
    /// # Errors
    ///
    /// A task ended that should not have. A panic is raised again.
    pub async fn run(mut self, stop: impl Future<Output = ()>) -> Result<Ended> {
        let failed = tokio::select! {
            () = stop => None,
            Ok(_) = self.poisoned.wait_for(|poisoned| *poisoned) => Some(Ok(Ended::Poisoned)),
            Some(ended) = self.tasks.join_next() => Some(Err(task_ended(ended))),
            Some(ended) = self.servers.join_next() => Some(Err(task_ended(ended))),
        };
        match failed {
            None => {
                self.leave().await;
                Ok(Ended::Stopped)
            }
            Some(outcome) => {
                self.health.set("inbox", outcome.is_err(), "the store failed");
                // Senders that wait get a 503 instead of a broken connection.
                self.stop_serving(LAST_ANSWERS).await;
                let _ = std::fs::remove_file(&self.listen_file);
                outcome
            }
        }
    }

    /// Out of the members first, then every session is sent away, then requests are finished.
    async fn leave(&mut self) {
        self.health.set("draining", false, "this process is leaving");
        let _ = std::fs::remove_file(&self.listen_file);
        if let Some((node, incarnation)) = &self.registered
            && let Err(error) = self.membership.depart(node, *incarnation, Departure::Left).await
        {
            tracing::warn!(%error, "leaving the registry failed; other processes see it when the lease ends");
        }
        // Others hand over no more publishes to topics once they have seen it, within two beats.
        let _ = tokio::time::timeout(LEAVES_COLLEAGUES, self.colleagues.leave()).await;
        let how = if self.has_others() { Drain::Move(self.drain_window) } else { Drain::Close };
        let leaving = self.pushes.iter().map(|push| push.drain(how));
        let all = futures_util::future::join_all(leaving);
        if tokio::time::timeout(self.drain_window + DRAIN_OVERTIME, all).await.is_err() {
            tracing::warn!("the drain window is over before all clients were told to move");
        }
        self.stop_serving(HttpLimits::default().shutdown).await;
        if let Some(collect) = &self.collect {
            let _ = tokio::time::timeout(LAST_ANSWERS, collect.handed_on()).await;
        }
        self.tasks.shutdown().await;
    }

    /// Whether a push node outside this process takes users.
    fn has_others(&self) -> bool {
        let view = Arc::clone(&self.membership.views().borrow());
        let own = |member: &&Member| self.pushes.iter().all(|push| *push.name() != member.info.node);
        view.members.iter().filter(own).any(|member| member.state == NodeState::Active)
    }

    async fn stop_serving(&mut self, within: Duration) {
        self.stop.cancel();
        let all = async { while self.servers.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(within, all).await;
    }

    /// The push nodes of this process, for tests.
    #[must_use]
    #[cfg(any(test, feature = "test-support"))]
    pub fn pushes(&self) -> &[Push] {
        &self.pushes
    }
}

fn task_ended(ended: Result<(), tokio::task::JoinError>) -> anyhow::Error {
    match ended {
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        _ => anyhow!("a part of the server ended though it never should"),
    }
}
