//! Assembly: the only place where adapters meet roles. `main` and the tests start a node the same way.

mod auth_http;
mod collect_http;
pub mod commands;
mod edge;
mod keys;
mod ops_http;
mod page;
mod push_http;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use parking_lot::RwLock;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tower::util::BoxCloneSyncService;

use crate::clock::Clock;
use crate::config::{Config, Faults, RoleName};
use crate::fallback::Fallback;
use crate::fallback::local::LocalFallback;
use crate::inbox::embedded::EmbeddedInbox;
use crate::inbox::{Inbox, Upkeep};
use crate::membership::local::LocalMembership;
use crate::membership::{Membership, NodeInfo};
use crate::message::NodeId;
use crate::role::auth::Auth;
use crate::role::collect::{Collect, run_upkeep};
use crate::role::connect::{Connect, PublicUrls};
use crate::role::dispatch::Dispatch;
use crate::role::push::{Drain, Push, PushConfig, PushMetrics, PushParts};
use crate::role::reach::Reach;
use crate::role::{Directory, PushService, VerifyService};
use crate::telemetry::{Health, Metrics};
use crate::ticket::TicketKey;
use crate::transport::http::{HttpLimits, bind, serve};
use crate::wire::frame::ReconnectHint;

use collect_http::CollectEdge;
use edge::{Routes, closed};
use keys::Keys;
use push_http::{ConnectEdge, PushEdge};

/// The kernel's send buffer of a socket, in bytes (DESIGN.md section 12).
const SOCKET_SEND_BUFFER: u32 = 64 * 1024;
/// How long the last answers may take when the store has failed.
const LAST_ANSWERS: Duration = Duration::from_secs(2);
/// Most push nodes in one process.
pub const PUSH_NODES_MAX: usize = 64;

/// The addresses that were bound, as `listen.json` has them.
#[derive(Debug, Clone, Default)]
pub struct Bound {
    /// Each push node, in node order.
    pub push: Vec<(NodeId, SocketAddr)>,
    /// The other roles, by name.
    pub others: Vec<(&'static str, SocketAddr)>,
    /// Whether several push nodes were asked for: then `push` is a list.
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

    /// The address of a role.
    #[must_use]
    pub fn of(&self, name: &str) -> Option<SocketAddr> {
        self.others.iter().find(|(known, _)| *known == name).map(|(_, at)| *at)
    }
}

/// A process that serves.
pub struct App {
    /// What was bound.
    pub bound: Bound,
    keys: Keys,
    tasks: JoinSet<()>,
    servers: JoinSet<()>,
    stop: CancellationToken,
    health: Health,
    pushes: Vec<Push>,
    poisoned: watch::Receiver<bool>,
    drain_window: Duration,
    listen_file: PathBuf,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It was asked to, and everything was done.
    Stopped,
    /// The store failed: what is on disk is no longer known.
    Poisoned,
}

/// The push nodes of this process, as dispatch finds them.
#[derive(Default)]
struct InProcess {
    nodes: RwLock<HashMap<NodeId, PushService>>,
}

impl Directory for InProcess {
    fn find(&self, node: &NodeId) -> Option<PushService> {
        self.nodes.read().get(node).cloned()
    }
}

/// One listener, bound but not served yet.
struct Listening {
    listener: TcpListener,
    at: SocketAddr,
}

/// What all roles of one process share.
struct Shared {
    clock: Clock,
    metrics: Metrics,
    membership: Arc<dyn Membership>,
    fallback: Arc<dyn Fallback>,
    inbox: Arc<dyn Inbox>,
    urls: PublicUrls,
    verify: VerifyService,
    ticket_key: TicketKey,
    directory: Arc<InProcess>,
    reach: Reach,
    health: Health,
}

impl App {
    /// Builds everything, binds, and serves: `push_nodes` push nodes, and the other roles that the configuration names.
    ///
    /// # Errors
    /// What could not be opened, bound or started, with the remedy.
    pub async fn start(mut config: Config, push_nodes: Option<usize>) -> Result<Self> {
        let faults = unsupported(&config);
        if !faults.is_empty() {
            return Err(Faults(faults).into());
        }
        let keys = Keys::of(&mut config)?;
        let clock = Clock::system();
        let auth =
            Auth::new(config.auth.clone(), clock.clone()).map_err(|f| anyhow!("auth.token_key: {f}"))?;
        let inbox = open_inbox(&config.data_dir, clock.clone())?;
        // The store's lock is ours now: what stands there is of a process that was killed.
        let listen_file = config.data_dir.join("listen.json");
        let _ = std::fs::remove_file(&listen_file);
        let listeners = Listeners::bind(&config, push_nodes)?;
        let bound = listeners.bound(push_nodes.is_some());
        let urls = match &config.public_url {
            Some(template) => PublicUrls::Template(template.clone()),
            None => own_urls(&bound),
        };
        let directory = Arc::new(InProcess::default());
        let health = Health::default();
        let shared = Shared {
            reach: Reach::new(Arc::clone(&directory) as _),
            directory,
            health: health.clone(),
            membership: Arc::new(LocalMembership::new(clock.clone())),
            fallback: Arc::new(LocalFallback::default()),
            inbox: Arc::new(inbox.clone()),
            verify: BoxCloneSyncService::new(auth.clone()),
            ticket_key: TicketKey::derive(&config.peer_secret),
            metrics: Metrics::default(),
            clock,
            urls,
        };
        let mut app = Self {
            keys,
            tasks: JoinSet::new(),
            servers: JoinSet::new(),
            stop: CancellationToken::new(),
            health,
            pushes: Vec::new(),
            poisoned: inbox.poisoned(),
            drain_window: config.drain_window,
            listen_file,
            bound,
        };
        app.assemble(&config, &shared, &auth, inbox, listeners).await?;
        app.health.set("inbox", true, "reached");
        app.health.set("view", true, "reached");
        write_listen(&app.listen_file, &app.bound)?;
        Ok(app)
    }

    async fn assemble(
        &mut self,
        config: &Config,
        shared: &Shared,
        auth: &Auth,
        upkeep: EmbeddedInbox,
        listeners: Listeners,
    ) -> Result<()> {
        let directory = Arc::clone(&shared.directory);
        let push_metrics = PushMetrics::register(&shared.metrics);
        let nodes: Vec<NodeId> = self.bound.push.iter().map(|(node, _)| node.clone()).collect();
        for node in nodes {
            let push =
                start_push(config, shared, node.clone(), push_metrics.clone(), &mut self.tasks).await?;
            directory.nodes.write().insert(node, BoxCloneSyncService::new(push.clone()));
            self.pushes.push(push);
        }
        let dispatch = Dispatch::start(
            Arc::clone(&shared.membership),
            Arc::clone(&shared.fallback),
            directory,
            &shared.metrics,
            &mut self.tasks,
        );
        let collect = Collect::start(
            Arc::clone(&shared.inbox),
            BoxCloneSyncService::new(dispatch),
            shared.membership.views(),
            shared.clock.clone(),
            &shared.metrics,
            &mut self.tasks,
        );
        if config.runs(RoleName::Collect) {
            let upkeep: Arc<dyn Upkeep> = Arc::new(upkeep);
            self.tasks.spawn(run_upkeep(upkeep, config.janitor_every));
        }
        let collect_edge = CollectEdge::new(
            collect,
            Arc::clone(&shared.membership),
            shared.urls.clone(),
            config.api_keys.clone(),
            config.publish,
        );
        self.serve_all(config, shared, auth, &collect_edge, listeners);
        Ok(())
    }

    fn serve_all(
        &mut self,
        config: &Config,
        shared: &Shared,
        auth: &Auth,
        collect: &Arc<CollectEdge>,
        listeners: Listeners,
    ) {
        let development = Arc::new(page::Development { auth: auth.clone(), collect: Arc::clone(collect) });
        for (push, listening) in self.pushes.clone().into_iter().zip(listeners.push) {
            let edge = PushEdge { connect: connect_edge(config, shared, Some(push.clone())), push };
            // Whoever can reach the port could have anybody's token: only where that is this machine alone.
            let own = config.development && listening.at.ip().is_loopback();
            let page = page::routes(own.then(|| Arc::clone(&development)));
            let routes = closed(push_http::push_routes(Arc::new(edge)).merge(page));
            self.serve(listening, routes, push_http_limits());
        }
        let plain = HttpLimits::default();
        if let Some(listening) = listeners.collect {
            self.serve(listening, collect_http::routes(Arc::clone(collect)), plain);
        }
        if let Some(listening) = listeners.auth {
            let edge = auth_http::AuthEdge { auth: auth.clone(), admin_key: config.admin_key.clone() };
            self.serve(listening, auth_http::routes(Arc::new(edge)), plain);
        }
        if let Some(listening) = listeners.dispatch {
            let edge = connect_edge(config, shared, None);
            self.serve(listening, push_http::dispatch_routes(Arc::new(edge)), plain);
        }
        let ops = ops_http::OpsEdge {
            health: self.health.clone(),
            metrics: shared.metrics.clone(),
            membership: Arc::clone(&shared.membership),
            urls: shared.urls.clone(),
        };
        self.serve(listeners.ops, ops_http::routes(Arc::new(ops)), plain);
    }

    fn serve(&mut self, listening: Listening, routes: Routes, limits: HttpLimits) {
        let service = routes.into_service();
        self.servers.spawn(serve(listening.listener, service, limits, self.stop.clone()));
    }

    /// Serves until `stop` resolves, then leaves in good order.
    ///
    /// # Errors
    /// A task that ended though it never should; a panic is raised again.
    pub async fn run(mut self, stop: impl Future<Output = ()>) -> Result<Ended> {
        let failed = tokio::select! {
            () = stop => None,
            _ = self.poisoned.wait_for(|poisoned| *poisoned) => Some(Ok(Ended::Poisoned)),
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
                // Senders that wait hear a 503 rather than a broken connection.
                self.stop_serving(LAST_ANSWERS).await;
                let _ = std::fs::remove_file(&self.listen_file);
                outcome
            }
        }
    }

    /// Nobody is outside this process to move to: sessions are closed over a few seconds, then requests are finished.
    async fn leave(&mut self) {
        self.health.set("draining", false, "this process is leaving");
        let _ = std::fs::remove_file(&self.listen_file);
        let leaving = self.pushes.iter().map(|push| push.drain(Drain::Close));
        let all = futures_util::future::join_all(leaving);
        if tokio::time::timeout(self.drain_window, all).await.is_err() {
            tracing::warn!("the drain window is over; some clients were not told");
        }
        self.stop_serving(HttpLimits::default().shutdown).await;
        self.tasks.shutdown().await;
    }

    async fn stop_serving(&mut self, within: Duration) {
        self.stop.cancel();
        let all = async { while self.servers.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(within, all).await;
    }

    /// The push nodes of this process, for tests that play with one of them.
    #[must_use]
    pub fn pushes(&self) -> &[Push] {
        &self.pushes
    }

    /// What a newcomer is shown: how to see it work, and the keys of development.
    #[must_use]
    pub fn greeting(&self, program: &str) -> String {
        let at = |name: &str| self.bound.of(name).map_or_else(String::new, |at| at.to_string());
        let page = self.bound.push.first().map_or_else(String::new, |(_, at)| at.to_string());
        let pushes: Vec<String> =
            self.bound.push.iter().map(|(node, at)| format!("{node} ws://{at}/v1/ws")).collect();
        let Keys { token_key, api_key, admin_key, peer_secret } = self.keys.to_show();
        format!(
            "ringpush {version} is ready: development, embedded store\n\n\
             \x20 page    http://{page}/\n\
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

/// What the configuration may say and this build cannot do yet: refused, rather than quietly done otherwise.
fn unsupported(config: &Config) -> Vec<String> {
    let wanted = [
        (
            !config.redis_url.is_empty(),
            "redis.url: this build keeps membership inside one process; leave it empty",
        ),
        (!config.mongo_uri.is_empty(), "mongo.uri: this build has the embedded inbox only; leave it empty"),
        (
            config.auth_elsewhere,
            "auth.mode, auth.jwks_url: this build verifies tokens with auth.token_key only",
        ),
        (
            !(config.runs(RoleName::Push)
                && config.runs(RoleName::Collect)
                && config.runs(RoleName::Dispatch)),
            "node.roles: this build runs push, collect and dispatch in one process; name all of them",
        ),
    ];
    wanted.into_iter().filter(|(wanted, _)| *wanted).map(|(_, fault)| fault.to_owned()).collect()
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

fn connect_edge(config: &Config, shared: &Shared, push: Option<Push>) -> ConnectEdge {
    ConnectEdge {
        connect: Connect::new(
            shared.verify.clone(),
            shared.membership.views(),
            shared.urls.clone(),
            shared.ticket_key.clone(),
            shared.reach.clone(),
            shared.clock.clone(),
        ),
        origins: config.origins.clone(),
        hint: ReconnectHint { min_ms: 0, max_ms: config.push.reconnect_jitter_ms },
        push,
    }
}

async fn start_push(
    config: &Config,
    shared: &Shared,
    node: NodeId,
    metrics: PushMetrics,
    tasks: &mut JoinSet<()>,
) -> Result<Push> {
    let info = NodeInfo {
        node,
        weight: config.weight,
        accept_per_s: config.accept_per_s,
        peer: "".into(),
        push: true,
        dispatch: false,
    };
    let push = PushConfig {
        info,
        drain_window: config.drain_window,
        origins: config.origins.clone(),
        token_in_url: config.token_in_url,
        limits: config.push,
    };
    let parts = PushParts {
        inbox: Arc::clone(&shared.inbox),
        verify: shared.verify.clone(),
        membership: Arc::clone(&shared.membership),
        fallback: Arc::clone(&shared.fallback),
        reach: shared.reach.clone(),
        health: shared.health.clone(),
        urls: shared.urls.clone(),
        ticket_key: shared.ticket_key.clone(),
        clock: shared.clock.clone(),
        metrics,
    };
    Push::start(push, parts, tasks).await.map_err(|error| anyhow!("node.name: {error}"))
}

fn open_inbox(data: &Path, clock: Clock) -> Result<EmbeddedInbox> {
    let directory = data.join("inbox");
    std::fs::create_dir_all(&directory).with_context(|| {
        format!("data.dir: {} cannot be written; choose another with --data DIR", data.display())
    })?;
    EmbeddedInbox::open(&directory, clock).map_err(|error| anyhow!("data.dir: {}: {error}", data.display()))
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

/// Written aside and renamed: who waits for the file reads all of it.
fn write_listen(path: &Path, bound: &Bound) -> Result<()> {
    let aside = path.with_extension("json.new");
    std::fs::write(&aside, format!("{}\n", bound.to_json()))
        .and_then(|()| std::fs::rename(&aside, path))
        .with_context(|| format!("data.dir: {} cannot be written", path.display()))
}

/// Every listener of the roles that run here.
struct Listeners {
    names: Vec<NodeId>,
    push: Vec<Listening>,
    collect: Option<Listening>,
    auth: Option<Listening>,
    dispatch: Option<Listening>,
    ops: Listening,
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
            ops: bind_one("ops.listen", listen.ops, &plain)?,
        })
    }

    fn bound(&self, many: bool) -> Bound {
        let push = self.names.iter().cloned().zip(self.push.iter().map(|listening| listening.at)).collect();
        let named = [("collect", &self.collect), ("auth", &self.auth), ("dispatch", &self.dispatch)];
        let mut others: Vec<(&'static str, SocketAddr)> =
            named.into_iter().filter_map(|(name, listening)| Some((name, listening.as_ref()?.at))).collect();
        others.push(("ops", self.ops.at));
        Bound { push, others, many }
    }
}

/// Consecutive ports, passing over those that other listeners of this configuration have; with port 0 each its own.
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
