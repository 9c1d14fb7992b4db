//! Taking a changed configuration without a restart.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::collect_http::CollectEdge;
use super::keys::Keys;
use crate::config::{Config, Faults, all_keys};
use crate::role::collect::KeySettings;
use secrecy::ExposeSecret;

/// The keys of the configuration that are taken while the process runs.
const TAKEN: [&str; 2] = ["collect.api_keys", "collect.keys"];

/// Takes what can change while a process runs. What cannot is told.
pub struct Reloader {
    collect: Option<Arc<CollectEdge>>,
    /// The values in use, without secrets.
    effective: BTreeMap<&'static str, String>,
    keys: Vec<KeySettings>,
    /// The digests of secrets, by key of the configuration.
    secrets: [(&'static str, [u8; 32]); 4],
    /// The faults that were told last: each is told once.
    told: Option<String>,
}

impl Reloader {
    pub(super) fn new(config: &Config, collect: Option<Arc<CollectEdge>>) -> Self {
        let keys = all_keys(&config.api_keys, &config.named_keys);
        Self { collect, effective: config.effective.clone(), keys, secrets: secrets(config), told: None }
    }

    /// Takes a configuration that was read again. One with a fault changes nothing.
    pub fn apply(&mut self, read: Result<Config, Faults>) {
        let read = read.map_err(|faults| faults.to_string());
        let config = read.and_then(|mut config| {
            // In development keys that are not configured are made.
            Keys::of(&mut config).map(|_| config).map_err(|error| error.to_string())
        });
        let config = match config {
            Ok(config) => config,
            Err(faults) => {
                if self.told.as_ref() != Some(&faults) {
                    tracing::error!(%faults, "the configuration was read again and has faults: nothing changes");
                    self.told = Some(faults);
                }
                return;
            }
        };
        self.told = None;
        let keys = all_keys(&config.api_keys, &config.named_keys);
        if let Some(collect) = self.collect.as_ref().filter(|_| keys != self.keys) {
            let names: Vec<&str> = keys.iter().map(|key| key.name.as_str()).collect();
            tracing::info!(keys = names.join(", "), "the API keys were taken anew (collect.keys)");
            collect.senders.replace(keys.clone());
        }
        self.keys = keys;
        for (name, value) in &config.effective {
            if self.effective.get(name) != Some(value) && !TAKEN.contains(name) {
                tracing::warn!(key = name, "has changed, and is taken by a restart alone");
            }
        }
        let secrets = secrets(&config);
        for ((name, digest), (_, before)) in secrets.iter().zip(&self.secrets) {
            if digest != before {
                tracing::warn!(key = name, "has changed, and is taken by a restart alone");
            }
        }
        self.secrets = secrets;
        self.effective = config.effective;
    }
}

/// The digests of the secrets that are taken at the start alone.
fn secrets(config: &Config) -> [(&'static str, [u8; 32]); 4] {
    [
        ("peer.secret", &config.peer_secret),
        ("auth.token_key", &config.auth.token_key),
        ("auth.admin_key", &config.admin_key),
        ("mongo.uri", &config.mongo_uri),
    ]
    .map(|(name, secret)| (name, KeySettings::digest_of(secret.expose_secret())))
}
