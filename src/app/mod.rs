//! Assembly: the only place where adapters meet roles. `main` and the tests start a process in the
//! same way.

mod auth_http;
mod collect_grpc;
mod collect_http;
mod edge;
pub(crate) mod keys;
mod ops_http;
mod page;
mod peers;
mod push_http;
mod stores;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use axum::body::Body;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tower::util::BoxCloneSyncService;

use crate::clock::Clock;
use crate::config::{Config, Faults, RoleName, VerifyBy};
use crate::fallback::Fallback;
use crate::inbox::Inbox;
use crate::membership::{
    Departure, LeaseState, Member, Membership, MembershipError, NodeInfo, NodeState, Reached, View,
};
use crate::message::NodeId;
use crate::redis_url::{RedisServers, RedisUrl};
use crate::role::auth::Auth;
use crate::role::collect::{Collect, run_upkeep};
use crate::role::connect::{Connect, PublicUrls};
use crate::role::dispatch::Dispatch;
use crate::role::push::{Drain, Push, PushConfig, PushMetrics, PushParts};
use crate::role::reach::PeerProbe;
use crate::role::witness::{OwnNode, witness};
use crate::role::{DispatchService, VerifyService};
use crate::secret::page_code;
use crate::telemetry::{Gauge, Health, Metrics, Refusals};
use crate::ticket::TicketKey;
use crate::transport::http::{AnswerBody, Answers, HttpLimits, Listener, UpgradeHandler, bind, serve};
use crate::transport::peer::{self, FindPush};
use crate::wire::frame::ReconnectHint;

use collect_http::CollectEdge;
use edge::{Budgets, closed, guarded, root};
use keys::Keys;
use peers::{Proofs, PushNodes, routers};
use push_http::{ConnectEdge, PushEdge};
use stores::Opened;

/// The kernel's send buffer of a socket, in bytes (docs/design.md, section 11).
const SOCKET_SEND_BUFFER: u32 = 64 * 1024;
/// How long the last responses may take when the store has failed.
const LAST_ANSWERS: Duration = Duration::from_secs(2);
/// What a drain may take beyond its window: the last closes, the last cursors.
const DRAIN_OVERTIME: Duration = Duration::from_secs(8);
/// Most push nodes in one process.
pub const PUSH_NODES_MAX: usize = 64;

/// The bound addresses, as in `listen.json`.
#[derive(Debug, Clone, Default)]
pub struct Bound {
    /// The push nodes in node order.
    pub push: Vec<(NodeId, SocketAddr)>,
    /// The other roles, by name.
    pub others: Vec<(&'static str, SocketAddr)>,
    /// Whether several push nodes were requested: `push` is a list then.
    many: bool,
}

impl Bound {
    fn to_json(&self) -> serde_json::Value {
        let mut all = serde_json::Map::new();
        let mut push: Vec<serde_json::Value> =
            self.push.iter().map(|(_, at)| at.to_string().into()).collect();
        if self.many {
            all.insert("push".to_owned(), push.into());
        } else if let Some(one) = push.pop() {
            all.insert("push".to_owned(), one);
        }
        all.extend(self.others.iter().map(|(name, at)| ((*name).to_owned(), at.to_string().into())));
        all.into()
    }

    /// The bound address of a role.
    #[must_use]
    pub fn of(&self, name: &str) -> Option<SocketAddr> {
        self.others.iter().find(|(known, _)| *known == name).map(|(_, at)| *at)
    }
}

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
    poisoned: watch::Receiver<bool>,
    drain_window: Duration,
    listen_file: PathBuf,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It was asked to stop, and everything was finished.
    Stopped,
    /// The store failed; what is on disk is unknown.
    Poisoned,
}

/// A listener that is bound and not served yet.
struct Listening {
    listener: Listener,
    at: SocketAddr,
}

/// What all roles of a process share.
struct Shared {
    clock: Clock,
    metrics: Metrics,
    membership: Arc<dyn Membership>,
    fallback: Arc<dyn Fallback>,
    urls: PublicUrls,
    ticket_key: TicketKey,
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
    refusals: Refusals,
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
    pub async fn start(mut config: Config, push_nodes: Option<usize>) -> Result<Self> {
        std::fs::create_dir_all(&config.data_dir).with_context(|| {
            let data = config.data_dir.display();
            format!("data.dir: {data} cannot be made; choose another with --data DIR")
        })?;
        let keys = Keys::of(&mut config)?;
        let clock = Clock::system();
        let own_auth = own_auth(&config, &clock)?;
        let mut tasks = JoinSet::new();
        // The lock of the embedded store keeps a second process from this directory, so it comes
        // before the ports.
        let opened = if config.mongo_uri.is_empty() && needs_inbox(&config) {
            Some(stores::inbox(&config, &clock, &Health::default(), &mut tasks).await?)
        } else {
            None
        };
        let listen_file = config.data_dir.join("listen.json");
        // It belongs to a process that was killed.
        let _ = std::fs::remove_file(&listen_file);
        let mut listeners = Listeners::bind(&config, push_nodes)?;
        let bound = listeners.bound(push_nodes.is_some());
        let (metrics, health) = (Metrics::default(), Health::default());
        for (name, needed) in [("view", needs_view(&config)), ("inbox", needs_inbox(&config))] {
            health.set(name, !needed, if needed { "not reached yet" } else { "not needed here" });
        }
        let (membership, fallback) = stores::registry(&config, &clock, &metrics, &mut tasks).await?;
        let refusals = Refusals::register(&metrics);
        let proofs = Proofs::new(&config.peer_secret, clock.clone(), refusals.clone());
        let nodes = Arc::new(PushNodes::new(membership.views(), Arc::clone(&proofs)));
        let urls = match &config.public_url {
            Some(template) => PublicUrls::Template(template.clone()),
            None => own_urls(&bound),
        };
        let peer = listeners.peer.as_ref().map_or_else(String::new, |peer| advertised(&config, peer.at));
        let mut shared = Shared {
            membership,
            fallback,
            ticket_key: TicketKey::derive(&config.peer_secret),
            reach: PeerProbe::new(Arc::clone(&nodes) as _),
            nodes,
            health: health.clone(),
            metrics,
            clock,
            urls,
            proofs,
            store: opened.as_ref().map_or_else(|| Arc::from(""), |opened| Arc::clone(&opened.identity)),
            peer: peer.into(),
            own_auth,
            refusals,
            budgets: Budgets::default(),
        };
        let (_, never) = watch::channel(false);
        let mut app = Self {
            keys,
            tasks,
            servers: JoinSet::new(),
            stop: CancellationToken::new(),
            health,
            pushes: Vec::new(),
            collect: None,
            nodes: Vec::new(),
            registered: None,
            membership: Arc::clone(&shared.membership),
            poisoned: opened.as_ref().map_or(never, |opened| opened.poisoned.clone()),
            drain_window: config.drain_window,
            listen_file,
            bound,
        };
        app.serve_ops(&shared, &mut listeners);
        app.assemble(&config, &mut shared, opened, listeners).await?;
        write_listen(&app.listen_file, &app.bound)?;
        Ok(app)
    }

    /// Starts the roles in the order in which they need one another.
    async fn assemble(
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
            Some(stores::verify(config, own, &shared.clock, told, &mut self.tasks)?)
        } else {
            None
        };
        if let (Some(opened), Some(verify)) = (&opened, &verify)
            && config.runs(RoleName::Push)
        {
            self.start_pushes(config, shared, &opened.inbox, verify).await?;
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
            let verify = Arc::clone(&shared.proofs).verify();
            self.serve_peers(listening, peer::routes(dispatch, push, verify));
        }
        // Only now that its peer port responds.
        if config.runs(RoleName::Dispatch) && !config.runs(RoleName::Push) && config.redis.is_some() {
            let info = node_info(config, shared, config.node.clone(), false);
            self.registered = Some((info.node.clone(), self.register(info, shared).await?));
        }
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

    async fn start_pushes(
        &mut self,
        config: &Config,
        shared: &Shared,
        inbox: &Arc<dyn Inbox>,
        verify: &VerifyService,
    ) -> Result<()> {
        let metrics = PushMetrics::register(&shared.metrics);
        let nodes: Vec<NodeId> = self.bound.push.iter().map(|(node, _)| node.clone()).collect();
        for node in nodes {
            let parts = PushParts {
                inbox: Arc::clone(inbox),
                verify: verify.clone(),
                membership: Arc::clone(&shared.membership),
                fallback: Arc::clone(&shared.fallback),
                reach: shared.reach.clone(),
                health: shared.health.clone(),
                urls: shared.urls.clone(),
                ticket_key: shared.ticket_key.clone(),
                clock: shared.clock.clone(),
                metrics: metrics.clone(),
                refusals: shared.refusals.clone(),
            };
            let push = PushConfig {
                info: node_info(config, shared, node.clone(), true),
                drain_window: config.drain_window,
                origins: config.origins.clone(),
                token_in_url: config.token_in_url,
                limits: config.push,
            };
            let started = Push::start(push, parts, &mut self.tasks).await;
            let push = started.map_err(|error| unregistered(&error, "node.name"))?;
            self.is_registered(shared, push.name(), push.incarnation(), push.reached().clone());
            shared.nodes.here.write().insert(node, BoxCloneSyncService::new(push.clone()));
            self.pushes.push(push);
        }
        Ok(())
    }

    fn start_dispatch(&mut self, shared: &Shared) -> DispatchService {
        BoxCloneSyncService::new(Dispatch::start(
            Arc::clone(&shared.membership),
            Arc::clone(&shared.fallback),
            Arc::clone(&shared.nodes) as _,
            &shared.metrics,
            &mut self.tasks,
        ))
    }

    fn start_collect(
        &mut self,
        config: &Config,
        shared: &Shared,
        opened: &Opened,
        dispatch: Option<DispatchService>,
    ) -> Arc<CollectEdge> {
        let views = shared.membership.views();
        let dispatch = dispatch.unwrap_or_else(|| routers(views.clone(), Arc::clone(&shared.proofs)));
        let collect = Collect::start(
            Arc::clone(&opened.inbox),
            dispatch,
            views,
            shared.clock.clone(),
            &shared.metrics,
            &mut self.tasks,
        );
        self.collect = Some(collect.clone());
        self.tasks.spawn(run_upkeep(Arc::clone(&opened.upkeep), config.janitor_every));
        CollectEdge::new(
            collect,
            Arc::clone(&shared.membership),
            shared.urls.clone(),
            config.api_keys.clone(),
            config.publish,
            (shared.refusals.clone(), shared.budgets.known.clone()),
        )
    }

    /// A router is not a push node, but it is registered as well.
    async fn register(&mut self, info: NodeInfo, shared: &Shared) -> Result<u64> {
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
    fn is_registered(&mut self, shared: &Shared, node: &NodeId, incarnation: u64, reached: Reached) {
        shared.proofs.is_here(node.clone(), incarnation, reached.clone());
        self.nodes.push((node.clone(), Arc::clone(&shared.peer), reached));
    }

    /// Waits until the registry was seen once. From then on the view is kept, whatever happens.
    async fn wait_for_view(&mut self, config: &Config, shared: &Shared) {
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

    fn serve_ops(&mut self, shared: &Shared, listeners: &mut Listeners) {
        let ops = ops_http::OpsEdge {
            health: self.health.clone(),
            metrics: shared.metrics.clone(),
            membership: Arc::clone(&shared.membership),
            urls: shared.urls.clone(),
        };
        if let Some(listening) = listeners.ops.take() {
            let loopback = listening.at.ip().is_loopback();
            self.serve(listening, ops_http::routes(Arc::new(ops), loopback), HttpLimits::default());
        }
    }

    fn serve_all(
        &mut self,
        config: &Config,
        shared: &Shared,
        verify: Option<VerifyService>,
        collect: Option<Arc<CollectEdge>>,
        listeners: Listeners,
    ) {
        let development = shared.own_auth.clone().zip(collect.clone());
        // Only if no key is configured: otherwise there are real users.
        let development = development.filter(|_| self.keys.self_made && config.verify_by == VerifyBy::Key);
        let code = page_code(&config.peer_secret);
        let development =
            development.map(|(auth, collect)| Arc::new(page::Development { auth, collect, code }));
        for (push, listening) in self.pushes.clone().into_iter().zip(listeners.push) {
            let Some(verify) = &verify else { break };
            let connect = connect_edge(config, shared, verify, Some(push.clone()));
            let edge = PushEdge { connect, push: push.clone() };
            // Whoever reaches the port could get anybody's token, so only this machine may reach
            // it.
            let loopback = listening.at.ip().is_loopback();
            let development = development.clone().filter(|_| config.development && loopback);
            let page = page::routes(page::Page { development, push, loopback });
            let edge = Arc::new(edge);
            let routes = closed(push_http::push_routes(Arc::clone(&edge)).merge(page));
            self.serve_sockets(listening, routes, edge);
        }
        let plain = HttpLimits::default();
        if let (Some(listening), Some(edge)) = (listeners.collect, collect) {
            let routes = collect_grpc::with_grpc(collect_http::routes(Arc::clone(&edge)), Arc::clone(&edge));
            self.serve(listening, collect_http::front(edge, routes), plain);
        }
        if let (Some(listening), Some(auth)) = (listeners.auth, &shared.own_auth) {
            let edge = auth_http::AuthEdge {
                auth: auth.clone(),
                admin_key: config.admin_key.clone(),
                refusals: shared.refusals.clone(),
                budgets: shared.budgets.clone(),
            };
            let routes = auth_http::routes(Arc::new(edge)).merge(root("ringpush auth: POST /v1/verify\n"));
            self.serve(listening, routes, plain);
        }
        if let (Some(listening), Some(verify)) = (listeners.dispatch, &verify) {
            let edge = connect_edge(config, shared, verify, None);
            let routes = push_http::dispatch_routes(Arc::new(edge));
            self.serve(listening, routes.merge(root("ringpush dispatch: POST /v1/connect\n")), plain);
        }
    }

    fn serve_peers<B: AnswerBody>(&mut self, listening: Listening, routes: impl Answers<B>) {
        let limits = HttpLimits::default();
        self.servers.spawn(serve(listening.listener, routes, None, limits, self.stop.clone()));
    }

    fn serve(&mut self, listening: Listening, service: impl Answers<Body>, limits: HttpLimits) {
        let service = guarded(service);
        self.servers.spawn(serve(listening.listener, service, None, limits, self.stop.clone()));
    }

    fn serve_sockets(
        &mut self,
        listening: Listening,
        service: impl Answers<Body>,
        edge: Arc<dyn UpgradeHandler<Body>>,
    ) {
        let (service, limits) = (guarded(service), push_http_limits());
        let serving = serve(listening.listener, service, Some(edge), limits, self.stop.clone());
        self.servers.spawn(serving);
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
            tracing::warn!(%error, "the others will find out when the lease ends");
        }
        let how = if self.has_others() { Drain::Move(self.drain_window) } else { Drain::Close };
        let leaving = self.pushes.iter().map(|push| push.drain(how));
        let all = futures_util::future::join_all(leaving);
        if tokio::time::timeout(self.drain_window + DRAIN_OVERTIME, all).await.is_err() {
            tracing::warn!("the drain window is over; some clients were not told");
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

    /// What a newcomer is shown: how to try it, and the keys of development.
    #[must_use]
    pub fn greeting(&self, program: &str) -> String {
        let at = |name: &str| self.bound.of(name).map_or_else(String::new, |at| at.to_string());
        let page = self.bound.push.first().map_or_else(String::new, |(_, at)| at.to_string());
        let pushes: Vec<String> =
            self.bound.push.iter().map(|(node, at)| format!("{node} ws://{at}/v1/ws")).collect();
        let code = if self.keys.self_made {
            format!("?code={}", page_code(&self.keys.peer_secret))
        } else {
            String::new()
        };
        let Keys { token_key, api_key, admin_key, peer_secret, .. } = self.keys.to_show();
        format!(
            "ringpush {version} is ready: development, embedded store\n\n\
             \x20 page    http://{page}/{code}\n\
             \x20 token   {program} token alice\n\
             \x20 curl    curl http://{collect}/v1/messages -H 'Authorization: Bearer {api_key}' \
             -H 'Content-Type: application/json' -d '{{\"to\":{{\"user\":\"alice\"}},\"payload\":{{\"text\":\"hello\"}}}}'\n\n\
             \x20 push     {pushes}\n\
             \x20 collect  http://{collect}   api key      {api_key}\n\
             \x20 auth     http://{auth}   admin key    {admin_key}\n\
             \x20 dispatch http://{dispatch}   token key    {token_key}\n\
             \x20 ops      http://{ops}   peer secret  {peer_secret}\n",
            version = env!("CARGO_PKG_VERSION"),
            pushes = pushes.join("\n           "),
            collect = at("collect"),
            auth = at("auth"),
            dispatch = at("dispatch"),
            ops = at("ops"),
        )
    }
}

/// Why a node could not be registered, with the key at fault.
fn unregistered(error: &MembershipError, key: &str) -> anyhow::Error {
    match error {
        MembershipError::OtherStore { .. } => Faults(vec![error.to_string()]).into(),
        _ => anyhow!("{key}: {error}"),
    }
}

fn needs_inbox(config: &Config) -> bool {
    config.runs(RoleName::Push) || config.runs(RoleName::Collect)
}

fn needs_view(config: &Config) -> bool {
    needs_inbox(config) || config.runs(RoleName::Dispatch)
}

/// The auth of this process: if it has the role, and if push or dispatch verify tokens themselves.
fn own_auth(config: &Config, clock: &Clock) -> Result<Option<Auth>> {
    let wanted = config.runs(RoleName::Auth) || config.verify_by == VerifyBy::Key;
    if config.auth.token_key.is_empty() {
        // It issues nothing: it verifies with the keys of another issuer, once they were fetched.
        let fetches = matches!(config.verify_by, VerifyBy::Jwks(_));
        return Ok(fetches.then(|| Auth::fetched(config.auth.clone(), clock.clone())));
    }
    let auth = Auth::new(config.auth.clone(), clock.clone()).map_err(|f| anyhow!("auth.token_key: {f}"))?;
    Ok(wanted.then_some(auth))
}

fn node_info(config: &Config, shared: &Shared, node: NodeId, push: bool) -> NodeInfo {
    NodeInfo {
        node,
        weight: config.weight,
        accept_per_s: config.accept_per_s,
        peer: Arc::clone(&shared.peer),
        push,
        dispatch: config.runs(RoleName::Dispatch),
        store: if push { Arc::clone(&shared.store) } else { Arc::from("") },
    }
}

/// The address of the peer port as other processes reach it: as configured, from the pod, or the
/// address that this machine uses towards Redis.
fn advertised(config: &Config, at: SocketAddr) -> String {
    if let Some(configured) = &config.peer_advertise {
        return configured.clone();
    }
    if !at.ip().is_unspecified() {
        return at.to_string();
    }
    let pod = std::env::var("POD_IP").ok().and_then(|ip| ip.parse().ok());
    let ip = pod.or_else(|| ip_towards(config.redis.as_ref()?)).unwrap_or(at.ip());
    SocketAddr::new(ip, at.port()).to_string()
}

/// Nothing is sent: connecting a datagram socket only selects the source address.
fn ip_towards(redis: &RedisUrl) -> Option<std::net::IpAddr> {
    let (host, port) = match &redis.servers {
        RedisServers::One(host, _) => host.clone(),
        RedisServers::Sentinel(hosts, _) | RedisServers::Cluster(hosts) => hosts.first()?.clone(),
    };
    let socket = std::net::UdpSocket::bind(("0.0.0.0", 0)).ok()?;
    socket.connect((host.as_str(), port)).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

fn task_ended(ended: Result<(), tokio::task::JoinError>) -> anyhow::Error {
    match ended {
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        _ => anyhow!("a part of the server ended though it never should"),
    }
}

fn push_http_limits() -> HttpLimits {
    HttpLimits { send_buffer: Some(SOCKET_SEND_BUFFER), ..HttpLimits::default() }
}

fn connect_edge(config: &Config, shared: &Shared, verify: &VerifyService, push: Option<Push>) -> ConnectEdge {
    ConnectEdge {
        connect: Connect::new(
            verify.clone(),
            shared.membership.views(),
            shared.urls.clone(),
            shared.ticket_key.clone(),
            shared.reach.clone(),
            shared.clock.clone(),
        ),
        origins: config.origins.clone(),
        hint: ReconnectHint { min_ms: 0, max_ms: config.push.reconnect_jitter_ms },
        refusals: shared.refusals.clone(),
        budgets: shared.budgets.clone(),
        push,
    }
}

/// In development every node is reached at its own address.
fn own_urls(bound: &Bound) -> PublicUrls {
    let url = |node: &NodeId, at: &SocketAddr| {
        let mut at = *at;
        if at.ip().is_unspecified() {
            at.set_ip(if at.is_ipv4() {
                [127, 0, 0, 1].into()
            } else {
                std::net::Ipv6Addr::LOCALHOST.into()
            });
        }
        format!("ws://{at}/n/{node}/v1/ws")
    };
    PublicUrls::Own(bound.push.iter().map(|(node, at)| (node.clone(), url(node, at))).collect())
}

/// Written aside and renamed, so that nobody reads half of it.
fn write_listen(path: &Path, bound: &Bound) -> Result<()> {
    let aside = path.with_extension("json.new");
    std::fs::write(&aside, format!("{}\n", bound.to_json()))
        .and_then(|()| std::fs::rename(&aside, path))
        .with_context(|| format!("data.dir: {} cannot be written", path.display()))
}

/// Every listener of the roles of this process.
struct Listeners {
    names: Vec<NodeId>,
    push: Vec<Listening>,
    collect: Option<Listening>,
    auth: Option<Listening>,
    dispatch: Option<Listening>,
    /// Set if other processes can reach this one.
    peer: Option<Listening>,
    ops: Option<Listening>,
}

impl Listeners {
    fn bind(config: &Config, push_nodes: Option<usize>) -> Result<Self> {
        let plain = HttpLimits::default();
        let one = |role: RoleName, name: &'static str, at: SocketAddr| {
            config.runs(role).then(|| bind_one(name, at, &plain)).transpose()
        };
        let listen = &config.listen;
        let names = match push_nodes {
            _ if !config.runs(RoleName::Push) => Vec::new(),
            None => vec![config.node.clone()],
            Some(count) => (0..count).filter_map(|n| NodeId::parse(&format!("push-{n}")).ok()).collect(),
        };
        Ok(Self {
            push: bind_push(config, names.len())?,
            names,
            collect: one(RoleName::Collect, "collect.listen", listen.collect)?,
            auth: one(RoleName::Auth, "auth.listen", listen.auth)?,
            dispatch: one(RoleName::Dispatch, "dispatch.listen", listen.dispatch)?,
            peer: (config.redis.is_some()
                && (config.runs(RoleName::Push) || config.runs(RoleName::Dispatch)))
            .then(|| bind_one("peer.listen", listen.peer, &plain))
            .transpose()?,
            ops: Some(bind_one("ops.listen", listen.ops, &plain)?),
        })
    }

    fn bound(&self, many: bool) -> Bound {
        let push = self.names.iter().cloned().zip(self.push.iter().map(|listening| listening.at)).collect();
        let named = [
            ("collect", &self.collect),
            ("auth", &self.auth),
            ("dispatch", &self.dispatch),
            ("peer", &self.peer),
            ("ops", &self.ops),
        ];
        let others =
            named.into_iter().filter_map(|(name, listening)| Some((name, listening.as_ref()?.at))).collect();
        Bound { push, others, many }
    }
}

/// Consecutive ports, passing over those of other listeners of this configuration; with port 0 each
/// its own.
fn bind_push(config: &Config, count: usize) -> Result<Vec<Listening>> {
    let listen = &config.listen;
    let taken = [listen.collect, listen.auth, listen.dispatch, listen.peer, listen.ops].map(|at| at.port());
    let mut at = listen.push;
    let mut bound = Vec::with_capacity(count);
    for _ in 0..count {
        bound.push(bind_one("push.listen", at, &push_http_limits())?);
        if at.port() != 0 {
            at.set_port(at.port().saturating_add(1));
            while taken.contains(&at.port()) {
                at.set_port(at.port().saturating_add(1));
            }
        }
    }
    Ok(bound)
}

fn bind_one(name: &'static str, at: SocketAddr, limits: &HttpLimits) -> Result<Listening> {
    let listener = bind(at, limits).map_err(|error| match error.kind() {
        std::io::ErrorKind::AddrInUse => {
            anyhow!("{name}: {at} is in use by another program; stop it, or set {name} to another port (0 picks a free one)")
        }
        _ => anyhow!("{name}: {at} cannot be listened on: {error}"),
    })?;
    let at = listener.local_addr().with_context(|| format!("{name}: {at}"))?;
    tracing::info!(%at, "listening for {name}");
    Ok(Listening { listener, at })
}
