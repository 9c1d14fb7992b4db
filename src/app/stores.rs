//! Opens the adapters that a configuration names. Waits where waiting helps; otherwise refuses with
//! the key at fault.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use bytes::Bytes;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tower::ServiceExt;
use tower::util::BoxCloneSyncService;

use super::reload::LiveSettings;
use crate::client::http::HttpClient;
use crate::clock::Clock;
use crate::colleagues::redis::RedisColleagues;
use crate::colleagues::{Alone, Colleagues};
use crate::config::{Config, Faults, RoleName, VerifyBy};
use crate::fallback::Fallback;
use crate::fallback::local::LocalFallback;
use crate::fallback::redis::RedisFallback;
use crate::inbox::embedded::EmbeddedInbox;
use crate::inbox::mongo::{MongoInbox, MongoTimes, OpenError};
use crate::inbox::{Inbox, Janitor, Logs, Stores, Topics};
use crate::interest::Interest;
use crate::interest::local::Everywhere;
use crate::interest::redis::RedisInterest;
use crate::membership::Membership;
use crate::membership::keeper::Times;
use crate::membership::local::LocalMembership;
use crate::membership::redis::RedisMembership;
use crate::role::VerifyService;
use crate::role::auth::Auth;
use crate::role::verify::{RemoteAuth, register_unavailable};
use crate::telemetry::{Gauge, Health, Metrics, Outcome, TimingBy};
use crate::transport::redis::RedisLink;
use crate::transport::tls::read_file;
use crate::wire::peer::{PeerError, VerifyRequest};
use secrecy::ExposeSecret;

/// Delay between two tries to reach a store at start.
const RETRY: Duration = Duration::from_secs(1);
/// Deadline of a call to auth.
const VERIFY_DEADLINE: Duration = Duration::from_secs(2);
/// Time between two looks at the clock skew.
const SKEW_EVERY: Duration = Duration::from_secs(2);
/// Time between two checks of MongoDB.
const INBOX_EVERY: Duration = Duration::from_secs(2);
/// Time between two fetches of a JWKS, and the shortest time between two that unknown keys caused.
const JWKS_EVERY: Duration = Duration::from_secs(300);
const JWKS_REST: Duration = Duration::from_secs(10);

/// Largest response of an issuer or of auth that is read, in bytes.
const ISSUER_ANSWER: usize = 1024 * 1024;

/// A client for an issuer, whose word about a user is trusted. Warns if anybody on the way could
/// answer in its place.
fn issuer_client(key: &str, url: &str) -> HttpClient {
    let host = url.strip_prefix("http://").map(|rest| rest.split(['/', '?']).next().unwrap_or_default());
    if host.is_some_and(|host| !super::edge::is_loopback(host)) {
        tracing::warn!(
            "{key}: http:// goes over the network in the clear: whoever can change what passes there can be anybody"
        );
    }
    HttpClient::default().reading_at_most(ISSUER_ANSWER)
}

fn refused(why: impl Into<String>) -> anyhow::Error {
    Faults(vec![why.into()]).into()
}

/// What the nodes of a cluster know of one another: in Redis, or in this process.
pub(super) struct Registry {
    pub(super) membership: Arc<dyn Membership>,
    pub(super) fallback: Arc<dyn Fallback>,
    pub(super) interest: Arc<dyn Interest>,
    pub(super) colleagues: Arc<dyn Colleagues>,
}

/// Opens the registry.
pub(super) async fn registry(
    config: &Config,
    live: &LiveSettings,
    clock: &Clock,
    metrics: &Metrics,
    tasks: &mut JoinSet<()>,
) -> Result<Registry> {
    // Zero where there is no other clock.
    let skew = Gauge::default();
    let shown = skew.clone();
    metrics.register(|r| r.register("clock_skew_ms", "How far this clock is ahead of that of Redis", shown));
    let wanted = config.redis.as_ref().filter(|_| super::needs_view(config));
    let Some(url) = wanted else {
        return Ok(Registry {
            membership: Arc::new(LocalMembership::new(clock.clone())),
            fallback: Arc::new(LocalFallback::default()),
            interest: Arc::new(Everywhere),
            colleagues: Arc::new(Alone::default()),
        });
    };
    let times = Times::default();
    let ca = config.tls.redis_ca.as_ref().map(|path| read_file("ca", path));
    let ca = ca.transpose().map_err(|fault| refused(format!("redis.tls.{fault}")))?;
    let named = if ca.is_some() { "redis.url or redis.tls.ca" } else { "redis.url" };
    let link = || RedisLink::new(url, ca.as_deref()).map_err(|fault| refused(format!("{named}: {fault}")));
    let membership =
        RedisMembership::start(link()?, &config.redis_prefix, times, clock.clone(), live.entries.clone());
    membership.check().await.map_err(|fault| {
        refused(format!("redis.url: {fault}; check the user, the password and their rights"))
    })?;
    tasks.spawn(show_skew(membership.clone(), skew));
    let watched = membership.clone();
    tasks.spawn(async move { watched.watch_tasks().await });
    // Separate connections, so that a long list of displaced users does not delay a heartbeat.
    let (link, prefix) = (link()?, &config.redis_prefix);
    let fallback = RedisFallback::start(link.clone(), prefix, times.lease, times.poll);
    let watched = fallback.clone();
    tasks.spawn(async move { watched.watch_tasks().await });
    let routes = config.roles.contains(&RoleName::Dispatch);
    let interest = RedisInterest::start(link.clone(), prefix, times.lease, times.poll, routes);
    let watched = interest.clone();
    tasks.spawn(async move { watched.watch_tasks().await });
    let colleagues: Arc<dyn Colleagues> = if config.runs(RoleName::Collect) {
        let entries = live.entries.clone();
        let colleagues = RedisColleagues::start(link, prefix, times.lease, times.beat, entries);
        let watched = colleagues.clone();
        tasks.spawn(async move { watched.watch_tasks().await });
        Arc::new(colleagues)
    } else {
        Arc::new(Alone::default())
    };
    Ok(Registry {
        membership: Arc::new(membership),
        fallback: Arc::new(fallback),
        interest: Arc::new(interest),
        colleagues,
    })
}

async fn show_skew(membership: RedisMembership, skew: Gauge) {
    loop {
        skew.set(membership.skew_ms());
        tokio::time::sleep(SKEW_EVERY).await;
    }
}

/// The store by its ports, and whether it has failed for good.
pub(super) struct Opened {
    pub(super) stores: Stores,
    /// The upkeep of the inboxes, and that of the logs.
    pub(super) upkeep: [Arc<dyn Janitor>; 2],
    pub(super) poisoned: watch::Receiver<bool>,
    /// Identity of the store.
    pub(super) identity: Arc<str>,
}

pub(super) async fn inbox(
    config: &Config,
    clock: &Clock,
    health: &Health,
    tasks: &mut JoinSet<()>,
) -> Result<Opened> {
    if config.mongo_uri.expose_secret().is_empty() {
        let inbox = embedded(&config.data_dir, clock.clone())?;
        tasks.spawn(inbox.clone().free_memory());
        let (poisoned, identity) = (inbox.poisoned(), inbox.identity().into());
        let logs = inbox.logs();
        return Ok(opened(inbox, logs, poisoned, identity));
    }
    let times = MongoTimes { head_trust: config.head_trust };
    let fault = |fault: OpenError| refused(fault.to_string());
    let (uri, database) = (config.mongo_uri.expose_secret(), &config.mongo_database);
    let inbox = MongoInbox::new(uri, database, times, clock.clone()).await.map_err(fault)?;
    let mut told = false;
    let identity = loop {
        match inbox.prepare().await {
            Ok(identity) => break identity,
            Err(OpenError::Unreachable(why)) => {
                if !std::mem::replace(&mut told, true) {
                    tracing::warn!(why, "MongoDB cannot be reached yet; check mongo.uri");
                }
                tokio::time::sleep(RETRY).await;
            }
            Err(other) => return Err(fault(other)),
        }
    };
    tasks.spawn(watch_inbox(inbox.clone(), health.clone()));
    let (_, poisoned) = watch::channel(false);
    let identity = identity.into();
    let logs = inbox.logs();
    Ok(opened(inbox, logs, poisoned, identity))
}

fn opened<T: Inbox + Janitor + Topics + Clone>(
    inbox: T,
    logs: T,
    poisoned: watch::Receiver<bool>,
    identity: Arc<str>,
) -> Opened {
    let upkeep: [Arc<dyn Janitor>; 2] = [Arc::new(inbox.clone()), Arc::new(logs.clone())];
    let topics = Arc::new(inbox.clone());
    let stores = Stores { inbox: Arc::new(inbox), topics, logs: Logs::new(Arc::new(logs)) };
    Opened { stores, upkeep, poisoned, identity }
}

/// Shows whether MongoDB answers. Readiness does not depend on it, because another process would
/// have lost it too.
async fn watch_inbox(inbox: MongoInbox, health: Health) {
    let mut before = true;
    loop {
        tokio::time::sleep(INBOX_EVERY).await;
        let (answers, word) = match inbox.alive().await {
            Ok(()) => (true, "reached".to_owned()),
            Err(error) => (false, error.to_string()),
        };
        match (before, answers) {
            (true, false) => tracing::warn!(why = word, "MongoDB does not answer (check mongo.uri)"),
            (false, true) => tracing::info!("MongoDB (mongo.uri) answers again"),
            _ => {}
        }
        before = answers;
        health.note("inbox", answers, word);
    }
}

fn embedded(data: &Path, clock: Clock) -> Result<EmbeddedInbox> {
    let directory = data.join("inbox");
    let problem =
        || format!("data.dir: {} cannot be written; choose another with --data DIR", data.display());
    std::fs::create_dir_all(&directory).with_context(problem)?;
    keep_to_owner(&directory).with_context(problem)?;
    EmbeddedInbox::open(&directory, clock).map_err(|error| anyhow!("data.dir: {}: {error}", data.display()))
}

/// Tightens what an earlier version left readable for others. The umask does so for what is created
/// from now on.
fn keep_to_owner(directory: &Path) -> std::io::Result<()> {
    std::fs::set_permissions(directory, Permissions::from_mode(0o700))?;
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            keep_to_owner(&entry.path())?;
        } else if kind.is_file() {
            std::fs::set_permissions(entry.path(), Permissions::from_mode(0o600))?;
        }
    }
    Ok(())
}

/// How long verifications take, by outcome.
pub(super) fn auth_times(metrics: &Metrics) -> TimingBy<3> {
    let name = ("auth_seconds", "From a token to whether it is good");
    TimingBy::register(metrics, name, "outcome", Outcome::NAMES)
}

/// Measures verifications.
pub(super) fn timed(verify: VerifyService, times: TimingBy<3>) -> VerifyService {
    BoxCloneSyncService::new(tower::service_fn(move |request: VerifyRequest| {
        let (verify, times) = (verify.clone(), times.clone());
        async move {
            let began = Instant::now();
            let answer = verify.oneshot(request).await;
            let outcome = match &answer {
                Ok(_) => Outcome::Accepted,
                Err(PeerError::Unauthorized(_)) => Outcome::Refused,
                Err(PeerError::Unavailable(_)) => Outcome::Unavailable,
            };
            times.at(outcome as usize).observe(began.elapsed());
            answer
        }
    }))
}

/// How push and connect verify tokens. `own` is this process's auth, if it has a key.
pub(super) fn verify(
    config: &Config,
    own: Option<&Auth>,
    clock: &Clock,
    (health, metrics): (&Health, &Metrics),
    tasks: &mut JoinSet<()>,
) -> Result<VerifyService> {
    if !matches!(config.verify_by, VerifyBy::Asking(_)) {
        register_unavailable(metrics);
    }
    match (&config.verify_by, own) {
        (VerifyBy::Key, Some(auth)) => Ok(BoxCloneSyncService::new(auth.clone())),
        (VerifyBy::Key, None) => Err(refused("auth.token_key: is required to verify tokens here")),
        (VerifyBy::Jwks(url), own) => {
            // The auth of this process, if it has no key of its own.
            let shared = own.filter(|_| config.auth.token_keys.is_empty()).cloned();
            let auth = shared.unwrap_or_else(|| Auth::fetched(config.auth.clone(), clock.clone()));
            tasks.spawn(fetch_keys(auth.clone(), url.clone(), health.clone()));
            Ok(BoxCloneSyncService::new(auth))
        }
        (VerifyBy::Asking(url), _) => {
            let (client, url) = (issuer_client("auth.url", url), format!("{url}/v1/verify"));
            let ask = tower::service_fn(move |body: Bytes| {
                let (client, url) = (client.clone(), url.clone());
                async move { client.send("POST", &url, None, body, VERIFY_DEADLINE).await }
            });
            Ok(BoxCloneSyncService::new(RemoteAuth::new(
                BoxCloneSyncService::new(ask),
                clock.clone(),
                health.clone(),
                metrics,
            )))
        }
    }
}

/// Fetches an issuer's keys periodically, and at once when a token names an unknown key.
async fn fetch_keys(auth: Auth, url: String, health: Health) {
    let client = issuer_client("auth.jwks_url", &url);
    loop {
        let answer = client.send("GET", &url, None, Bytes::new(), VERIFY_DEADLINE).await;
        let taken = match answer {
            Ok((200, body)) => auth.take_jwks(&body).map_err(str::to_owned),
            Ok((status, _)) => Err(format!("answered {status}")),
            Err(why) => Err(why),
        };
        let failed = taken.is_err();
        match taken {
            Ok(count) => health.note("jwks", true, format!("{count} keys")),
            Err(why) => {
                tracing::warn!(why, "the keys of the issuer cannot be fetched; check auth.jwks_url");
                health.note("jwks", false, why);
            }
        }
        tokio::time::sleep(if failed { RETRY } else { JWKS_REST }).await;
        if !failed {
            let _ = tokio::time::timeout(JWKS_EVERY, auth.unknown_key()).await;
        }
    }
}
