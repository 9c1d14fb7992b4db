//! Taking a changed configuration without a restart.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::collect_http::CollectEdge;
use super::keys::Keys;
use super::secure::{Tls, TlsFilesRead};
use crate::clock::Clock;
use crate::config::{Config, Faults, all_keys};
use crate::live::Live;
use crate::membership::Membership;
use crate::peer_proof::{EntryKey, call_keys};
use crate::redis_url::RedisUrl;
use crate::role::auth::Auth;
use crate::role::collect::{CollectLimits, KeySettings};
use crate::role::push::{LiveLimits, Origins};
use crate::role::strangers::StrangerRules;
use crate::secret::SharedKeys;
use crate::telemetry::audit;
use crate::ticket::TicketKey;
use crate::wire::http::PublishLimits;
use secrecy::{ExposeSecret, SecretString};

/// The keys of the configuration that are taken while the process runs.
const TAKEN: [&str; 32] = [
    "collect.api_keys",
    "collect.keys",
    "collect.tls.cert",
    "collect.tls.key",
    "push.origins",
    "push.trusted_proxies",
    "push.tls.cert",
    "push.tls.key",
    "auth.token_key",
    "auth.token_keys",
    "auth.admin_key",
    "peer.secret",
    "peer.secrets",
    "peer.tls.cert",
    "peer.tls.key",
    "peer.tls.ca",
    "peer.tls.name",
    "log.level",
    "limits.message_bytes",
    "limits.recipients",
    "limits.batch",
    "limits.message_ttl_s",
    "limits.topic_message_bytes",
    "limits.everyone_message_bytes",
    "limits.topic_per_s",
    "limits.everyone_per_s",
    "limits.sessions_per_user",
    "limits.sessions_per_device",
    "limits.auth_deadline_ms",
    "limits.client_frames_per_s",
    "limits.auth_failures_per_min",
    "limits.handshakes_per_address",
];

/// What a running process takes anew, each where it is used. Cloned, it is the same.
#[derive(Clone)]
pub(super) struct LiveSettings {
    pub(super) origins: Live<Origins>,
    pub(super) publish: Live<PublishLimits>,
    pub(super) collect: Live<CollectLimits>,
    pub(super) sessions: Arc<LiveLimits>,
    pub(super) strangers: Live<StrangerRules>,
    pub(super) admin_key: Live<SecretString>,
    pub(super) tickets: TicketKey,
    pub(super) entries: EntryKey,
    pub(super) calls: SharedKeys,
}

impl LiveSettings {
    pub(super) fn of(config: &Config) -> Self {
        let secrets = config.peer_secret_texts();
        Self {
            origins: Live::new(config.origins.clone()),
            publish: Live::new(config.publish),
            collect: Live::new(config.collect.clone()),
            sessions: Arc::new(LiveLimits::of(&config.push)),
            strangers: Live::new(config.strangers.clone()),
            admin_key: Live::new(config.admin_key.clone()),
            tickets: TicketKey::derive(&secrets),
            entries: EntryKey::derive(&secrets),
            calls: call_keys(&secrets),
        }
    }

    fn take(&self, config: &Config) {
        self.origins.set(config.origins.clone());
        self.publish.set(config.publish);
        self.collect.set(config.collect.clone());
        self.sessions.take(&config.push);
        self.strangers.set(config.strangers.clone());
        self.admin_key.set(config.admin_key.clone());
        let secrets = config.peer_secret_texts();
        self.tickets.replace(&secrets);
        self.entries.replace(&secrets);
        self.calls.replace(&secrets);
    }
}

/// Sets the level of the log. An error says what is wrong with it.
pub type SetLogLevel = Box<dyn Fn(&str) -> Result<(), String> + Send>;

/// Takes what can change while a process runs. What cannot is told.
pub struct Reloader {
    parts: Parts,
    /// The values in use, without secrets.
    effective: BTreeMap<&'static str, String>,
    keys: Vec<KeySettings>,
    /// The digests of the secrets that are taken.
    secrets: BTreeMap<&'static str, Vec<[u8; 32]>>,
    /// What a restart alone takes, and shows no value: `redis.url` and `mongo.uri`.
    stores: (Option<RedisUrl>, [u8; 32]),
    log_level: (String, Option<SetLogLevel>),
    /// The faults that were told last: each is told once.
    told: Option<String>,
}

/// The parts of the process that take settings.
pub(super) struct Parts {
    pub(super) live: LiveSettings,
    pub(super) tls: Tls,
    pub(super) auth: Option<Auth>,
    pub(super) collect: Option<Arc<CollectEdge>>,
    pub(super) membership: Arc<dyn Membership>,
    pub(super) clock: Clock,
}

impl Reloader {
    pub(super) fn new(config: &Config, parts: Parts) -> Self {
        Self {
            parts,
            effective: config.effective.clone(),
            keys: all_keys(&config.api_keys, &config.named_keys),
            secrets: secrets(config),
            stores: stores(config),
            log_level: (config.log_level.clone(), None),
            told: None,
        }
    }

    /// From now on `log.level` is taken too.
    pub fn sets_log_level(&mut self, set: SetLogLevel) {
        self.log_level.1 = Some(set);
    }

    /// Takes a configuration that was read again. One with a fault changes nothing.
    pub fn apply(&mut self, read: Result<Config, Faults>) {
        match read.map_err(|faults| faults.to_string()).and_then(|config| self.check(config)) {
            Ok(config) => {
                self.told = None;
                self.take(config);
            }
            Err(faults) => {
                if self.told.as_ref() != Some(&faults) {
                    tracing::error!(%faults, "the configuration was read again and has faults: nothing changes");
                    self.told = Some(faults);
                }
            }
        }
    }

    /// Does all that can fail, and changes something only when nothing can fail any more.
    fn check(&mut self, mut config: Config) -> Result<Config, String> {
        // In development keys that are not configured are made.
        Keys::of(&mut config).map_err(|error| error.to_string())?;
        let Parts { clock, tls, auth, .. } = &self.parts;
        let files = TlsFilesRead::of(&config, clock, Some(tls)).map_err(|faults| faults.to_string())?;
        let swap_tls = tls.replacement(files).map_err(|faults| faults.to_string())?;
        let (level, set) = &self.log_level;
        if config.log_level != *level {
            match set {
                Some(set) => {
                    set(&config.log_level).map_err(|why| format!("log.level: {why}"))?;
                    tracing::info!(
                        level = config.log_level,
                        "the level of the log was taken anew (log.level)"
                    );
                }
                None => tracing::warn!("log.level has changed; RUST_LOG or --log-filter stands above it"),
            }
        }
        self.log_level.0.clone_from(&config.log_level);
        swap_tls();
        if let Some(auth) = auth.as_ref().filter(|_| !config.auth.token_keys.is_empty()) {
            // The keys were read once when the configuration was.
            let replaced = auth.replace_keys(&config.auth.token_keys);
            replaced.map_err(|(n, fault)| format!("{}: {fault}", config.token_key_name(n)))?;
        }
        Ok(config)
    }

    fn take(&mut self, config: Config) {
        self.parts.live.take(&config);
        let keys = all_keys(&config.api_keys, &config.named_keys);
        if let Some(collect) = self.parts.collect.as_ref().filter(|_| keys != self.keys) {
            let names: Vec<&str> = keys.iter().map(|key| key.name.as_str()).collect();
            tracing::info!(keys = names.join(", "), "the API keys were taken anew (collect.keys)");
            collect.senders.replace(keys.clone());
            audit("reload_keys", &[("keys", &names.join(","))]);
        }
        self.keys = keys;
        let secrets = secrets(&config);
        for (name, digests) in &secrets {
            let before = self.secrets.get(name);
            if before.is_some_and(|before| before.is_empty() != digests.is_empty()) {
                // From own keys to those of an issuer, or back.
                tracing::warn!(key = name, "has changed, and is taken by a restart alone");
            } else if before != Some(digests) {
                tracing::info!(key = name, valid = digests.len(), "secrets were taken anew");
                audit("reload_keys", &[("keys", name)]);
            }
        }
        if self.secrets.get("peer.secrets") != secrets.get("peer.secrets") {
            self.parts.membership.sign_anew();
        }
        self.secrets = secrets;
        for (name, value) in &config.effective {
            if self.effective.get(name) == Some(value) {
                continue;
            }
            if !TAKEN.contains(name) {
                tracing::warn!(key = name, "has changed, and is taken by a restart alone");
            } else if name.starts_with("limits.") || ["push.origins", "push.trusted_proxies"].contains(name) {
                tracing::info!(key = name, value, "was taken anew");
            }
        }
        self.effective.clone_from(&config.effective);
        let stores = stores(&config);
        if stores.0 != self.stores.0 {
            tracing::warn!(key = "redis.url", "has changed, and is taken by a restart alone");
        }
        if stores.1 != self.stores.1 {
            tracing::warn!(key = "mongo.uri", "has changed, and is taken by a restart alone");
        }
        self.stores = stores;
    }
}

/// The digests of the secrets that are taken anew, by key of the configuration.
fn secrets(config: &Config) -> BTreeMap<&'static str, Vec<[u8; 32]>> {
    let digest = |secret: &SecretString| KeySettings::digest_of(secret.expose_secret());
    let token_keys = config.auth.token_keys.iter().map(|given| digest(&given.key)).collect();
    BTreeMap::from([
        ("auth.token_keys", token_keys),
        ("auth.admin_key", vec![digest(&config.admin_key)]),
        ("peer.secrets", config.peer_secrets.iter().map(digest).collect()),
    ])
}

fn stores(config: &Config) -> (Option<RedisUrl>, [u8; 32]) {
    (config.redis.clone(), KeySettings::digest_of(config.mongo_uri.expose_secret()))
}
