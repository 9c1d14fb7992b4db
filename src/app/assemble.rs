//! Starting the roles, in the order in which they need one another.

use std::sync::Arc;

use anyhow::{Result, anyhow};
use tower::util::BoxCloneSyncService;

use super::collect_http::CollectEdge;
use super::listeners::Listeners;
use super::peers::{Collects, routers};
use super::senders::Senders;
use super::stores;
use super::stores::Opened;
use super::traces::Traces;
use super::{App, Shared};
use crate::clock::Clock;
use crate::colleagues::Colleague;
use crate::config::{Config, Faults, RoleName, VerifyBy, all_keys};
use crate::inbox::Stores;
use crate::membership::{LeaseState, MembershipError, NodeInfo, Reached, View};
use crate::message::NodeId;
use crate::role::auth::Auth;
use crate::role::collect::{Collect, Peers, Writers, run_upkeep};
use crate::role::dispatch::Dispatch;
use crate::role::push::{Push, PushConfig, PushMetrics, PushParts};
use crate::role::witness::witness;
use crate::role::{DispatchService, VerifyService};
use crate::telemetry::Gauge;
use crate::transport::peer::{self, FindPush};

impl App {
    /// Starts the roles in the order in which they need one another.
    pub(super) async fn assemble(
        &mut self,
        config: &Config,
        shared: &mut Shared,
        opened: Option<Opened>,
        mut listeners: Listeners,
    ) -> Result<()> {
        let opened = match opened {
            None if needs_inbox(config) => {
                Some(stores::inbox(config, &shared.clock, &self.health, &mut self.tasks).await?)
            }
            opened => opened,
        };
        if let Some(opened) = &opened {
            shared.store = Arc::clone(&opened.identity);
        }
        let shared = &*shared;
        self.health.set("inbox", true, if opened.is_some() { "reached" } else { "not needed here" });
        let fetches = matches!(config.verify_by, VerifyBy::Jwks(_)) && config.runs(RoleName::Auth);
        let verify = if fetches || config.runs(RoleName::Push) || config.runs(RoleName::Dispatch) {
            let own = shared.own_auth.as_ref();
            let told = (&self.health, &shared.metrics);
            let verify = stores::verify(config, own, &shared.clock, told, &mut self.tasks)?;
            Some(stores::timed(verify, shared.auth_times.clone()))
        } else {
            None
        };
        if let (Some(opened), Some(verify)) = (&opened, &verify)
            && config.runs(RoleName::Push)
        {
            self.start_pushes(config, shared, &opened.stores, verify).await?;
        }
        // Without a registry there is no other router to find: collect then has one of its own.
        let routes =
            config.runs(RoleName::Dispatch) || (config.redis.is_none() && config.runs(RoleName::Collect));
        let dispatch = routes.then(|| self.start_dispatch(shared));
        let collect = match &opened {
            Some(opened) if config.runs(RoleName::Collect) => {
                Some(self.start_collect(config, shared, opened, dispatch.clone()))
            }
            _ => None,
        };
        if let Some(listening) = listeners.peer.take() {
            let nodes = Arc::clone(&shared.nodes);
            let find: FindPush = Arc::new(move |name| {
                NodeId::parse(name).ok().and_then(|node| nodes.here.read().get(&node).cloned())
            });
            let push = config.runs(RoleName::Push).then_some(find);
            let writer = self.collect.clone().map(|collect| {
                BoxCloneSyncService::new(tower::service_fn(move |write| {
                    std::future::ready(Ok(collect.take_over(write)))
                }))
            });
            let verify = Arc::clone(&shared.proofs).verify();
            let routes = peer::routes(dispatch, push, writer, verify);
            self.serve_peers(listening, routes, shared.tls.peer_server());
        }
        // Only now that its peer port responds.
        if config.runs(RoleName::Dispatch) && !config.runs(RoleName::Push) && config.redis.is_some() {
            let info = node_info(config, shared, config.node.clone(), false);
            self.registered = Some((info.node.clone(), self.register(info, shared).await?));
        }
        self.join_colleagues(config, shared);
        if !self.nodes.is_empty() && config.redis.is_some() {
            let unreached = Gauge::default();
            let shown = unreached.clone();
            let help = "Nodes that are registered and that nobody has reached";
            shared.metrics.register(|r| r.register("peers_unreached", help, shown));
            self.health.set("peers", false, "not reached yet");
            let (views, ping) = (shared.membership.views(), Arc::clone(&shared.proofs).ping());
            self.tasks.spawn(witness(views, self.nodes.clone(), ping, self.health.clone(), unreached));
        }
        self.wait_for_view(config, shared).await;
        self.serve_all(config, shared, verify, collect, listeners);
        Ok(())
    }

    pub(super) async fn start_pushes(
        &mut self,
        config: &Config,
        shared: &Shared,
        stores: &Stores,
        verify: &VerifyService,
    ) -> Result<()> {
        let metrics = PushMetrics::register(&shared.metrics);
        let nodes: Vec<NodeId> = self.bound.push.iter().map(|(node, _)| node.clone()).collect();
        for node in nodes {
            let parts = PushParts {
                stores: stores.clone(),
                verify: verify.clone(),
                membership: Arc::clone(&shared.membership),
                fallback: Arc::clone(&shared.fallback),
                interest: Arc::clone(&shared.interest),
                reach: shared.reach.clone(),
                health: shared.health.clone(),
                urls: shared.urls.clone(),
                ticket_key: shared.live.tickets.clone(),
                clock: shared.clock.clone(),
                metrics: metrics.clone(),
                refusals: shared.refusals.clone(),
            };
            let push = PushConfig {
                info: node_info(config, shared, node.clone(), true),
                drain_window: config.drain_window,
                origins: shared.live.origins.clone(),
                token_in_url: config.token_in_url,
                limits: config.push,
                live: Arc::clone(&shared.live.sessions),
            };
            let started = Push::start(push, parts, &mut self.tasks).await;
            let push = started.map_err(|error| unregistered(&error, "node.name"))?;
            self.is_registered(shared, push.name(), push.incarnation(), push.reached().clone());
            shared.nodes.here.write().insert(node, BoxCloneSyncService::new(push.clone()));
            self.pushes.push(push);
        }
        let (displaced, pushes) = (Gauge::<i64>::default(), self.pushes.clone());
        let shown = displaced.clone();
        let help = "Users with a session here that another node owns";
        shared.metrics.register(|r| r.register("displaced_users", help, shown));
        shared.metrics.before_each_look(move || {
            let count: u64 = pushes.iter().map(|push| push.counts().displaced).sum();
            displaced.set(i64::try_from(count).unwrap_or(i64::MAX));
        });
        Ok(())
    }

    pub(super) fn start_dispatch(&mut self, shared: &Shared) -> DispatchService {
        BoxCloneSyncService::new(Dispatch::start(
            Arc::clone(&shared.membership),
            Arc::clone(&shared.fallback),
            Arc::clone(&shared.interest),
            Arc::clone(&shared.nodes) as _,
            &shared.metrics,
            &mut self.tasks,
        ))
    }

    pub(super) fn start_collect(
        &mut self,
        config: &Config,
        shared: &Shared,
        opened: &Opened,
        dispatch: Option<DispatchService>,
    ) -> Arc<CollectEdge> {
        let views = shared.membership.views();
        let dispatch = dispatch.unwrap_or_else(|| routers(views.clone(), Arc::clone(&shared.proofs)));
        let directory = Arc::new(Collects::new(Arc::clone(&shared.proofs)));
        let writers =
            Writers::new(config.node.clone(), Arc::clone(&shared.colleagues), directory, &shared.metrics);
        let collect = Collect::start(
            opened.stores.clone(),
            shared.live.collect.clone(),
            Peers { dispatch, writers },
            views,
            shared.clock.clone(),
            &shared.metrics,
            &mut self.tasks,
        );
        self.collect = Some(collect.clone());
        for upkeep in &opened.upkeep {
            self.tasks.spawn(run_upkeep(Arc::clone(upkeep), config.janitor_every));
        }
        CollectEdge::new(
            collect,
            Arc::clone(&shared.membership),
            shared.urls.clone(),
            Senders::new(
                all_keys(&config.api_keys, &config.named_keys),
                &shared.metrics,
                shared.refusals.clone(),
            ),
            (shared.live.publish.clone(), Traces::register(&shared.metrics)),
            shared.strangers.clone(),
            shared.budgets.known.clone(),
        )
    }

    /// From now on publishes to topics may be handed to the collect of this process.
    fn join_colleagues(&self, config: &Config, shared: &Shared) {
        if self.collect.is_none() || config.redis.is_none() {
            return;
        }
        let node = config.node.clone();
        // Calls name the node and its incarnation. Where another role has registered both, they are
        // that role's.
        let incarnation = shared.proofs.incarnation_here(&node).unwrap_or_else(|| {
            let incarnation = shared.clock.now().0;
            shared.proofs.is_here(node.clone(), incarnation, Reached::new(true));
            incarnation
        });
        shared.colleagues.join(Colleague { node, incarnation, peer: Arc::clone(&shared.peer) });
    }

    /// A router is not a push node, but it is registered as well.
    pub(super) async fn register(&mut self, info: NodeInfo, shared: &Shared) -> Result<u64> {
        let joined = self.membership.join(info.clone()).await;
        let registration = joined.map_err(|error| unregistered(&error, "redis.url"))?;
        self.is_registered(shared, &info.node, registration.incarnation, registration.proof.clone());
        let health = self.health.clone();
        let mut standing = registration.standing;
        self.tasks.spawn(async move {
            while standing.wait_for(|standing| *standing == LeaseState::Fenced).await.is_ok() {
                health.set("membership", false, "another process has this node's name (node.name)");
                std::future::pending::<()>().await;
            }
            std::future::pending::<()>().await;
        });
        Ok(registration.incarnation)
    }

    /// A node of this process was registered: calls for it are accepted from now on.
    pub(super) fn is_registered(
        &mut self,
        shared: &Shared,
        node: &NodeId,
        incarnation: u64,
        reached: Reached,
    ) {
        shared.proofs.is_here(node.clone(), incarnation, reached.clone());
        self.nodes.push((node.clone(), Arc::clone(&shared.peer), reached));
    }

    /// Waits until the registry was seen once. From then on the view is kept, whatever happens.
    pub(super) async fn wait_for_view(&mut self, config: &Config, shared: &Shared) {
        if !needs_view(config) {
            return;
        }
        let mut views = shared.membership.views();
        let own: Vec<NodeId> = self.bound.push.iter().map(|(node, _)| node.clone()).collect();
        let seen = |view: &Arc<View>| {
            !view.generation.is_empty() && own.iter().all(|node| view.member(node).is_some() || view.held)
        };
        let _ = views.wait_for(seen).await;
        self.health.set("view", true, "reached");
        let health = self.health.clone();
        self.tasks.spawn(async move {
            while views.changed().await.is_ok() {
                let held = views.borrow_and_update().held;
                let word =
                    if held { "held: the registry is lost, or shows something else" } else { "in use" };
                health.note("view", !held, word);
            }
            std::future::pending::<()>().await;
        });
    }
}

/// Why a node could not be registered, with the key at fault.
pub(super) fn unregistered(error: &MembershipError, key: &str) -> anyhow::Error {
    match error {
        MembershipError::OtherStore { .. } => Faults(vec![error.to_string()]).into(),
        _ => anyhow!("{key}: {error}"),
    }
}

pub(super) fn needs_inbox(config: &Config) -> bool {
    config.runs(RoleName::Push) || config.runs(RoleName::Collect)
}

pub(super) fn needs_view(config: &Config) -> bool {
    needs_inbox(config) || config.runs(RoleName::Dispatch)
}

/// The auth of this process: if it has the role, and if push or dispatch verify tokens themselves.
pub(super) fn own_auth(config: &Config, clock: &Clock) -> Result<Option<Auth>> {
    let wanted = config.runs(RoleName::Auth) || config.verify_by == VerifyBy::Key;
    if config.auth.token_keys.is_empty() {
        // It issues nothing: it verifies with the keys of another issuer, once they were fetched.
        let fetches = matches!(config.verify_by, VerifyBy::Jwks(_));
        return Ok(fetches.then(|| Auth::fetched(config.auth.clone(), clock.clone())));
    }
    let auth = Auth::new(config.auth.clone(), clock.clone());
    let auth = auth.map_err(|(n, fault)| anyhow!("{}: {fault}", config.token_key_name(n)))?;
    Ok(wanted.then_some(auth))
}

pub(super) fn node_info(config: &Config, shared: &Shared, node: NodeId, push: bool) -> NodeInfo {
    NodeInfo {
        node,
        weight: config.weight,
        accept_per_s: config.accept_per_s,
        peer: Arc::clone(&shared.peer),
        push,
        dispatch: config.runs(RoleName::Dispatch),
        store: if push { Arc::clone(&shared.store) } else { Arc::from("") },
        ticket_in_auth: push,
    }
}
