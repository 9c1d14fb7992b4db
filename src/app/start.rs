//! The stages of a start, each a type that is made from the one before: [`Prepared`] (what can be
//! refused at once), [`Listening`] (ports are bound, the registry is opened), then [`App`]
//! (serves).

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::assemble::{needs_inbox, needs_view, own_auth};
use super::edge::Budgets;
use super::gauges;
use super::keys::Keys;
use super::listeners::{Bound, Listeners, advertised, own_urls, write_listen};
use super::peers::{Proofs, PushNodes};
use super::reload::LiveSettings;
use super::secure::{Tls, TlsFilesRead};
use super::stores::{self, Opened, Registry};
use super::{App, Shared};
use crate::clock::Clock;
use crate::config::Config;
use crate::role::auth::Auth;
use crate::role::connect::PublicUrls;
use crate::role::reach::PeerProbe;
use crate::role::strangers::Strangers;
use crate::telemetry::{Health, Metrics, Refusals};
use secrecy::ExposeSecret;

/// The first stage: keys, the data directory, and the embedded store if the process has one.
pub(super) struct Prepared {
    config: Config,
    keys: Keys,
    clock: Clock,
    own_auth: Option<Auth>,
    live: LiveSettings,
    tls: TlsFilesRead,
    tasks: JoinSet<()>,
    opened: Option<Opened>,
    listen_file: PathBuf,
}

impl Prepared {
    /// # Errors
    ///
    /// What could not be opened, with the remedy.
    pub(super) async fn new(mut config: Config) -> Result<Self> {
        std::fs::create_dir_all(&config.data_dir).with_context(|| {
            let data = config.data_dir.display();
            format!("data.dir: {data} cannot be made; choose another with --data DIR")
        })?;
        let keys = Keys::of(&mut config)?;
        let clock = Clock::system();
        let own_auth = own_auth(&config, &clock)?;
        let tls = TlsFilesRead::of(&config, &clock, None)?;
        let live = LiveSettings::of(&config);
        let mut tasks = JoinSet::new();
        // The lock of the embedded store keeps a second process from this directory, so it comes
        // before the ports.
        let opened = if config.mongo_uri.expose_secret().is_empty() && needs_inbox(&config) {
            Some(stores::inbox(&config, &clock, &Health::default(), &mut tasks).await?)
        } else {
            None
        };
        let listen_file = config.data_dir.join("listen.json");
        // It belongs to a process that was killed.
        let _ = std::fs::remove_file(&listen_file);
        Ok(Self { config, keys, clock, own_auth, live, tls, tasks, opened, listen_file })
    }

    /// Binds the ports, opens the registry, and answers `/livez` and `/readyz` from then on.
    ///
    /// # Errors
    ///
    /// What could not be bound or opened, with the remedy.
    pub(super) async fn listen(self, push_nodes: Option<usize>) -> Result<Listening> {
        let Self { config, keys, clock, own_auth, live, tls, mut tasks, opened, listen_file } = self;
        let mut listeners = Listeners::bind(&config, push_nodes)?;
        let bound = listeners.bound(push_nodes.is_some(), &config);
        let (metrics, health) = (Metrics::default(), Health::default());
        for (name, needed) in [("view", needs_view(&config)), ("inbox", needs_inbox(&config))] {
            health.set(name, !needed, if needed { "not reached yet" } else { "not needed here" });
        }
        let Registry { membership, fallback, interest, colleagues } =
            stores::registry(&config, &live, &clock, &metrics, &mut tasks).await?;
        gauges::register(&metrics, &health, membership.views());
        let (refusals, auth_times) = (Refusals::register(&metrics), stores::auth_times(&metrics));
        let tls = Tls::new(tls, &metrics, &refusals)?;
        let strangers = Strangers::register(live.strangers.clone(), &metrics);
        let proofs = Proofs::new(live.calls.clone(), clock.clone(), refusals.clone(), tls.peer_client());
        let nodes = Arc::new(PushNodes::new(membership.views(), Arc::clone(&proofs)));
        let peer = listeners.peer.as_ref().map_or_else(String::new, |peer| advertised(&config, peer.at));
        let shared = Shared {
            urls: public_urls(&config, &bound),
            membership,
            fallback,
            interest,
            colleagues,
            live,
            tls,
            reach: PeerProbe::new(Arc::clone(&nodes) as _),
            nodes,
            health: health.clone(),
            metrics,
            clock,
            proofs,
            store: opened.as_ref().map_or_else(|| Arc::from(""), |opened| Arc::clone(&opened.identity)),
            peer: peer.into(),
            own_auth,
            auth_times,
            refusals,
            strangers,
            budgets: Budgets::default(),
        };
        let (_, never) = watch::channel(false);
        let mut app = App {
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
            colleagues: Arc::clone(&shared.colleagues),
            poisoned: opened.as_ref().map_or(never, |opened| opened.poisoned.clone()),
            drain_window: config.drain_window,
            listen_file,
            reloader: None,
            bound,
        };
        app.serve_ops(&shared, &mut listeners);
        Ok(Listening { config, app, shared, listeners, opened })
    }
}

/// The second stage: the ports are bound, and only ops answers.
pub(super) struct Listening {
    config: Config,
    app: App,
    shared: Shared,
    listeners: Listeners,
    opened: Option<Opened>,
}

impl Listening {
    /// Starts the roles. Waits for stores that cannot be reached yet.
    ///
    /// # Errors
    ///
    /// What could not be opened or started, with the remedy.
    pub(super) async fn serve(self) -> Result<App> {
        let Self { config, mut app, mut shared, listeners, opened } = self;
        app.assemble(&config, &mut shared, opened, listeners).await?;
        write_listen(&app.listen_file, &app.bound)?;
        Ok(app)
    }
}

fn public_urls(config: &Config, bound: &Bound) -> PublicUrls {
    match &config.public_url {
        Some(template) => PublicUrls::Template(template.clone()),
        None => own_urls(bound),
    }
}
