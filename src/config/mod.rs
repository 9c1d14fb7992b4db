//! Configuration: a TOML file, then `RINGPUSH_SECTION__KEY`, then flags. Everything is read and
//! checked before anything is built, and every fault is reported.

mod api_keys;
mod keys;
mod reader;
mod rules;
mod secrets;
mod tls;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::message::NodeId;
use crate::redis_url::RedisUrl;
use crate::role::auth::AuthConfig;
use crate::role::collect::CollectLimits;
use crate::role::push::{Origins, PushLimits};
use crate::role::strangers::StrangerRules;
use crate::wire::address::UrlTemplate;
use crate::wire::http::PublishLimits;
use secrecy::{ExposeSecret, SecretString};

pub use api_keys::{NamedKey, all_keys};
use keys::KEYS;
use reader::{Reader, read_environment};
pub use tls::{PeerTls, TlsConfig, TlsFiles};

/// Largest payload that can be configured (`limits.message_bytes`), in bytes.
pub const MESSAGE_BYTES_MAX: usize = 65_536;

/// A role.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum RoleName {
    /// Verifies tokens.
    Auth,
    /// Takes publishes.
    Collect,
    /// Routes messages.
    Dispatch,
    /// Holds sockets.
    Push,
}

impl RoleName {
    fn parse(text: &str) -> Option<Self> {
        match text.trim() {
            "auth" => Some(Self::Auth),
            "collect" => Some(Self::Collect),
            "dispatch" => Some(Self::Dispatch),
            "push" => Some(Self::Push),
            _ => None,
        }
    }

    /// The name in configuration.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Auth => "auth",
            Self::Collect => "collect",
            Self::Dispatch => "dispatch",
            Self::Push => "push",
        }
    }
}

/// A checked configuration.
#[derive(Debug, Clone)]
pub struct Config {
    /// Neither Redis nor MongoDB is configured.
    pub development: bool,
    /// `node.name`.
    pub node: NodeId,
    /// `node.roles`.
    pub roles: Vec<RoleName>,
    /// The listening addresses.
    pub listen: Listeners,
    /// `push.public_url`; `None` in development, where each node has its own address.
    pub public_url: Option<UrlTemplate>,
    /// `push.origins`.
    pub origins: Origins,
    /// `push.drain_window_s`.
    pub drain_window: Duration,
    /// `push.accept_per_s`: new sockets per second and node; 0 is no limit.
    pub accept_per_s: u32,
    /// `push.weight`: this node's share, relative to 1.0.
    pub weight: f64,
    /// How tokens are verified. The key is empty if development has yet to make it.
    pub auth: AuthConfig,
    /// How push and dispatch verify tokens.
    pub verify_by: VerifyBy,
    /// `auth.token_in_url`: whether a token may stand in the URL.
    pub token_in_url: bool,
    /// Limits on clients that have not shown who they are, by address.
    pub strangers: StrangerRules,
    /// `auth.admin_key`: the key that may issue tokens.
    pub admin_key: SecretString,
    /// `collect.api_keys`: the keys that may publish.
    pub api_keys: Vec<SecretString>,
    /// `collect.keys`: keys with names, scopes and limits.
    pub named_keys: Vec<NamedKey>,
    /// `peer.secret` or `peer.secrets`, shared by all roles: the first signs, each verifies. Empty
    /// if development has yet to make it.
    pub peer_secrets: Vec<SecretString>,
    /// The files of TLS.
    pub tls: TlsConfig,
    /// `log.level`: a level, or directives as in `RUST_LOG`.
    pub log_level: String,
    /// `peer.advertise`: where other roles reach this process. `None`: derived from the listener.
    pub peer_advertise: Option<String>,
    /// `redis.url`; `None` keeps membership and fallback inside the process.
    pub redis: Option<RedisUrl>,
    /// `redis.prefix` of every key in Redis.
    pub redis_prefix: String,
    /// `mongo.uri`; empty selects the embedded store.
    pub mongo_uri: SecretString,
    /// `mongo.database`.
    pub mongo_database: String,
    /// How long a user's head in memory is trusted. The other times of the inbox in MongoDB follow
    /// from it.
    pub head_trust: Duration,
    /// `data.dir`: the embedded store and the keys of development.
    pub data_dir: PathBuf,
    /// Limits of publishes.
    pub publish: PublishLimits,
    /// Limits of collect.
    pub collect: CollectLimits,
    /// Limits of sessions.
    pub push: PushLimits,
    /// Time between two runs of the janitor.
    pub janitor_every: Duration,
    /// Every key with its value, without secrets.
    pub effective: BTreeMap<&'static str, String>,
}

/// How tokens are verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VerifyBy {
    /// With `auth.token_key`.
    Key,
    /// With keys fetched from this URL.
    Jwks(String),
    /// By asking the auth at this URL.
    Asking(String),
}

/// The listening addresses.
#[derive(Debug, Clone, Copy)]
pub struct Listeners {
    /// Sockets, connect, page.
    pub push: SocketAddr,
    /// Publishing.
    pub collect: SocketAddr,
    /// Tokens.
    pub auth: SocketAddr,
    /// Connect on dispatch.
    pub dispatch: SocketAddr,
    /// Calls between roles.
    pub peer: SocketAddr,
    /// Health, metrics, dashboard.
    pub ops: SocketAddr,
}

/// All faults of a configuration, one line each.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.join("\n"))]
pub struct Faults(pub Vec<String>);

/// The sources of values; later ones override earlier ones.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// Name and text of the file.
    pub file: Option<(String, String)>,
    /// The environment.
    pub environment: Vec<(String, String)>,
    /// Flags: key and value, as in the environment.
    pub flags: Vec<(&'static str, String)>,
    /// For a command that is not the server: keys that only the server needs may be missing.
    pub for_command: bool,
}

impl Sources {
    /// The sources of this process, with a file if one is given.
    ///
    /// # Errors
    ///
    /// The file cannot be read.
    pub fn of_process(file: Option<&std::path::Path>) -> Result<Self, Faults> {
        let file = match file {
            None => None,
            Some(path) => {
                let name = path.display().to_string();
                let text = std::fs::read_to_string(path)
                    .map_err(|error| Faults(vec![format!("{name}: cannot be read: {error}")]))?;
                Some((name, text))
            }
        };
        Ok(Self { file, environment: read_environment(std::env::vars_os())?, ..Self::default() })
    }
}

impl Config {
    /// Reads and checks everything.
    ///
    /// # Errors
    ///
    /// Every fault.
    pub fn load(sources: &Sources) -> Result<Self, Faults> {
        let mut reader = Reader::collect(sources);
        let config = reader.build();
        match config {
            Some(config) if reader.faults.is_empty() => Ok(config),
            _ => Err(Faults(reader.faults)),
        }
    }

    /// Whether a role runs in this process.
    #[must_use]
    pub fn runs(&self, role: RoleName) -> bool {
        self.roles.contains(&role)
    }

    /// The texts of [`Config::peer_secrets`].
    #[must_use]
    pub fn peer_secret_texts(&self) -> Vec<&str> {
        self.peer_secrets.iter().map(ExposeSecret::expose_secret).collect()
    }

    /// The name of the key that holds the token key of this number, from 0.
    #[must_use]
    pub fn token_key_name(&self, n: usize) -> String {
        match self.effective.get("auth.token_keys").map(String::as_str) {
            None | Some("[]") => "auth.token_key".to_owned(),
            Some(_) => format!("auth.token_keys[{n}].key"),
        }
    }

    /// The effective configuration as TOML, without secrets.
    #[must_use]
    pub fn to_toml(&self) -> String {
        let mut out = String::new();
        let mut section = "";
        for key in KEYS {
            let (of, name) = key.name.split_once('.').unwrap_or(("", key.name));
            if of != section {
                if !section.is_empty() {
                    out.push('\n');
                }
                out.push_str(&format!("[{of}]\n"));
                section = of;
            }
            let value = self.effective.get(key.name).map_or(key.default, String::as_str);
            out.push_str(&format!("{name} = {value}\n"));
        }
        out
    }
}

#[cfg(test)]
mod tests;
