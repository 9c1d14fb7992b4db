//! Configuration: a TOML file, then `RINGPUSH_SECTION__KEY`, then flags. Everything is read and
//! checked before anything is built, and every fault is reported.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::clock::Clock;
use crate::message::NodeId;
use crate::redis_url::RedisUrl;
use crate::role::auth::{Auth, AuthConfig};
use crate::role::push::{Origins, PushLimits};
use crate::wire::address::UrlTemplate;
use crate::wire::http::{PublishLimits, TTL_S};

/// The type of a key's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Text,
    Secret,
    List,
    SecretList,
    Number,
    Fraction,
    Switch,
}

/// A key: its name, its type, and its default as it stands in the file.
struct Key {
    name: &'static str,
    kind: Kind,
    default: &'static str,
}

const fn key(name: &'static str, kind: Kind, default: &'static str) -> Key {
    Key { name, kind, default }
}

/// All keys. Addresses are those of development; elsewhere the host is 0.0.0.0.
const KEYS: &[Key] = &[
    key("node.name", Kind::Text, "\"\""),
    key("node.roles", Kind::List, "[\"auth\", \"collect\", \"dispatch\", \"push\"]"),
    key("push.listen", Kind::Text, "\"127.0.0.1:8080\""),
    key("push.public_url", Kind::Text, "\"\""),
    key("push.origins", Kind::List, "[\"*\"]"),
    key("push.drain_window_s", Kind::Number, "60"),
    key("push.accept_per_s", Kind::Number, "4000"),
    key("push.weight", Kind::Fraction, "1.0"),
    key("collect.listen", Kind::Text, "\"127.0.0.1:8081\""),
    key("collect.api_keys", Kind::SecretList, "[]"),
    key("auth.listen", Kind::Text, "\"127.0.0.1:8082\""),
    key("auth.mode", Kind::Text, "\"local\""),
    key("auth.url", Kind::Text, "\"\""),
    key("auth.token_key", Kind::Secret, "\"\""),
    key("auth.jwks_url", Kind::Text, "\"\""),
    key("auth.admin_key", Kind::Secret, "\"\""),
    key("auth.issuer", Kind::Text, "\"\""),
    key("auth.audience", Kind::Text, "\"\""),
    key("auth.token_in_url", Kind::Switch, "false"),
    key("dispatch.listen", Kind::Text, "\"127.0.0.1:8083\""),
    key("peer.listen", Kind::Text, "\"127.0.0.1:7070\""),
    key("peer.secret", Kind::Secret, "\"\""),
    key("peer.advertise", Kind::Text, "\"\""),
    key("ops.listen", Kind::Text, "\"127.0.0.1:9090\""),
    key("redis.url", Kind::Secret, "\"\""),
    key("redis.prefix", Kind::Text, "\"ringpush\""),
    key("mongo.uri", Kind::Secret, "\"\""),
    key("mongo.database", Kind::Text, "\"ringpush\""),
    key("data.dir", Kind::Text, "\"./data\""),
    key("limits.message_bytes", Kind::Number, "65536"),
    key("limits.recipients", Kind::Number, "1000"),
    key("limits.batch", Kind::Number, "1000"),
    key("limits.message_ttl_s", Kind::Number, "604800"),
    key("limits.sessions_per_user", Kind::Number, "16"),
    key("limits.auth_deadline_ms", Kind::Number, "5000"),
    key("limits.ping_ms", Kind::Number, "25000"),
    key("limits.sweep_ms", Kind::Number, "30000"),
    key("limits.reconnect_jitter_ms", Kind::Number, "5000"),
    key("limits.client_frames_per_s", Kind::Number, "20000"),
    key("limits.janitor_ms", Kind::Number, "600000"),
    key("limits.head_trust_ms", Kind::Number, "600000"),
];

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
    /// `auth.admin_key`: the key that may issue tokens.
    pub admin_key: String,
    /// `collect.api_keys`: the keys that may publish.
    pub api_keys: Vec<String>,
    /// `peer.secret`, shared by all roles.
    pub peer_secret: String,
    /// `peer.advertise`: where other roles reach this process. `None`: derived from the listener.
    pub peer_advertise: Option<String>,
    /// `redis.url`; `None` keeps membership and fallback inside the process.
    pub redis: Option<RedisUrl>,
    /// `redis.prefix` of every key in Redis.
    pub redis_prefix: String,
    /// `mongo.uri`; empty selects the embedded store.
    pub mongo_uri: String,
    /// `mongo.database`.
    pub mongo_database: String,
    /// How long a user's head in memory is trusted. The other times of the inbox in MongoDB follow
    /// from it.
    pub head_trust: Duration,
    /// `data.dir`: the embedded store and the keys of development.
    pub data_dir: PathBuf,
    /// Limits of publishes.
    pub publish: PublishLimits,
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

/// Variables without the prefix `RINGPUSH_` that are read too.
const READ_TOO: [&str; 3] = ["POD_NAME", "POD_IP", "RUST_LOG"];

/// The environment as text. A variable that is not UTF-8 is a fault if its name is ours, and is
/// ignored otherwise.
fn read_environment(
    all: impl Iterator<Item = (OsString, OsString)>,
) -> Result<Vec<(String, String)>, Faults> {
    let (mut environment, mut faults) = (Vec::new(), Vec::new());
    for (name, value) in all {
        let shown = name.to_string_lossy().into_owned();
        let is_ours = shown.starts_with("RINGPUSH_") || READ_TOO.contains(&shown.as_str());
        match (name.into_string(), value.into_string()) {
            (Ok(name), Ok(value)) => environment.push((name, value)),
            (Err(_), _) if is_ours => faults.push(format!("{shown}: the name of this variable is not UTF-8")),
            (_, Err(_)) if is_ours => {
                faults.push(format!("{shown}: the value of this variable is not UTF-8"))
            }
            _ => {}
        }
    }
    if faults.is_empty() { Ok(environment) } else { Err(Faults(faults)) }
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

/// The values that were found, and the faults.
struct Reader {
    values: BTreeMap<&'static str, toml::Value>,
    faults: Vec<String>,
    /// For the host name and the pod's name.
    environment: Vec<(String, String)>,
    for_command: bool,
}

impl Reader {
    fn collect(sources: &Sources) -> Self {
        let mut reader = Self {
            values: BTreeMap::new(),
            faults: Vec::new(),
            environment: sources.environment.clone(),
            for_command: sources.for_command,
        };
        if let Some((name, text)) = &sources.file {
            reader.take_file(name, text);
        }
        for (name, value) in &sources.environment {
            reader.take_variable(name, value);
        }
        for (name, value) in &sources.flags {
            reader.take_text(name, value, "the command line");
        }
        reader
    }

    fn take_file(&mut self, file: &str, text: &str) {
        let table: toml::Table = match text.parse() {
            Ok(table) => table,
            Err(error) => {
                // The parser's own text quotes the line, which may contain a key.
                let before =
                    error.span().map_or(0, |span| text[..span.start.min(text.len())].matches('\n').count());
                return self.faults.push(format!(
                    "{file}: is not TOML: line {}: {}",
                    before + 1,
                    error.message()
                ));
            }
        };
        for (section, value) in table {
            match value {
                toml::Value::Table(entries) => {
                    if entries.is_empty()
                        && !KEYS.iter().any(|key| key.name.split('.').next() == Some(&section))
                    {
                        self.unknown(&section, file);
                    }
                    for (name, value) in entries {
                        self.take(&format!("{section}.{name}"), value, file);
                    }
                }
                value => self.take(&section, value, file),
            }
        }
    }

    fn take(&mut self, name: &str, value: toml::Value, from: &str) {
        match KEYS.iter().find(|key| key.name == name) {
            Some(key) => drop(self.values.insert(key.name, value)),
            None => self.unknown(name, from),
        }
    }

    fn unknown(&mut self, name: &str, from: &str) {
        let nearest = KEYS
            .iter()
            .map(|key| key.name)
            .max_by(|a, b| strsim::jaro_winkler(a, name).total_cmp(&strsim::jaro_winkler(b, name)));
        let nearest = nearest.map_or(String::new(), |key| format!("; did you mean {key}?"));
        self.faults.push(format!("{name}: no such key (in {from}){nearest}"));
    }

    /// Reads `RINGPUSH_SECTION__KEY`. Names without the double underscore are not ours; Kubernetes
    /// injects such.
    fn take_variable(&mut self, name: &str, value: &str) {
        if let Some(rest) = name.strip_prefix("RINGPUSH_")
            && let Some((section, key)) = rest.split_once("__")
        {
            let key = format!("{}.{}", section.to_lowercase(), key.to_lowercase());
            match KEYS.iter().find(|known| known.name == key) {
                Some(known) => self.take_text(known.name, value, name),
                None => self.unknown(&key, name),
            }
        }
    }

    fn take_text(&mut self, name: &'static str, text: &str, from: &str) {
        let Some(key) = KEYS.iter().find(|key| key.name == name) else { return };
        let value = match key.kind {
            Kind::Text | Kind::Secret => Some(toml::Value::String(text.to_owned())),
            Kind::List | Kind::SecretList => list_of(text),
            Kind::Number => text.trim().parse().ok().map(toml::Value::Integer),
            Kind::Fraction => text.trim().parse().ok().map(toml::Value::Float),
            Kind::Switch => text.trim().parse().ok().map(toml::Value::Boolean),
        };
        match value {
            Some(value) => drop(self.values.insert(name, value)),
            None if matches!(key.kind, Kind::Secret | Kind::SecretList) => {
                self.faults.push(format!("{name}: (from {from}) {}", rule_of(key.kind)));
            }
            None => self.faults.push(format!("{name}: {text:?} (from {from}) {}", rule_of(key.kind))),
        }
    }

    fn value(&mut self, name: &'static str) -> Option<toml::Value> {
        if let Some(value) = self.values.get(name) {
            return Some(value.clone());
        }
        let default = KEYS.iter().find(|key| key.name == name)?.default;
        format!("v = {default}").parse::<toml::Table>().ok()?.remove("v")
    }

    fn wrong<T>(&mut self, name: &'static str, kind: Kind) -> Option<T> {
        self.faults.push(format!("{name}: {}", rule_of(kind)));
        None
    }

    fn text(&mut self, name: &'static str) -> String {
        match self.value(name) {
            Some(toml::Value::String(text)) => text,
            _ => self.wrong(name, Kind::Text).unwrap_or_default(),
        }
    }

    fn list(&mut self, name: &'static str) -> Vec<String> {
        let items = match self.value(name) {
            Some(toml::Value::Array(items)) => items,
            _ => return self.wrong(name, Kind::List).unwrap_or_default(),
        };
        let texts: Option<Vec<String>> = items.iter().map(|item| item.as_str().map(str::to_owned)).collect();
        texts.or_else(|| self.wrong(name, Kind::List)).unwrap_or_default()
    }

    fn number(&mut self, name: &'static str, range: std::ops::RangeInclusive<u64>) -> u64 {
        match self.value(name) {
            Some(toml::Value::Integer(n)) if u64::try_from(n).is_ok_and(|n| range.contains(&n)) => {
                n.unsigned_abs()
            }
            _ => {
                self.faults.push(format!(
                    "{name}: must be an integer from {} to {}",
                    range.start(),
                    range.end()
                ));
                *range.start()
            }
        }
    }

    fn millis(&mut self, name: &'static str, range: std::ops::RangeInclusive<u64>) -> Duration {
        Duration::from_millis(self.number(name, range))
    }

    fn address(&mut self, name: &'static str, development: bool) -> SocketAddr {
        let mut text = self.text(name);
        if !development && !self.values.contains_key(name) {
            text = text.replace("127.0.0.1", "0.0.0.0");
        }
        text.parse().unwrap_or_else(|_| {
            self.faults
                .push(format!("{name}: {text:?} must be address:port, such as 127.0.0.1:8080 or [::]:8080"));
            SocketAddr::from(([127, 0, 0, 1], 0))
        })
    }

    fn build(&mut self) -> Option<Config> {
        let (redis_url, mongo_uri) = (self.text("redis.url"), self.text("mongo.uri"));
        let development = redis_url.is_empty() && mongo_uri.is_empty();
        let node = self.node_name();
        let roles = self.roles(mongo_uri.is_empty(), redis_url.is_empty());
        if !mongo_uri.is_empty()
            && !mongo_uri.starts_with("mongodb://")
            && !mongo_uri.starts_with("mongodb+srv://")
        {
            self.faults.push("mongo.uri: must begin with mongodb:// or mongodb+srv://".to_owned());
        }
        let redis = self.redis(&redis_url);
        let listen = self.listeners(development);
        let public_url = self.public_url(development, &roles);
        let origins = self.origins(development);
        let auth = self.auth();
        let verify_by = self.verify_by();
        let secrets = self.secrets(development, &roles);
        let publish = self.publish_limits();
        let push = self.push_limits();
        let drain_window = Duration::from_secs(self.number("push.drain_window_s", 1..=3600));
        let accept_per_s = self.number("push.accept_per_s", 0..=1_000_000) as u32;
        let weight = self.weight();
        let token_in_url = self.switch("auth.token_in_url");
        let janitor_every = self.millis("limits.janitor_ms", 100..=86_400_000);
        let data_dir = PathBuf::from(self.text("data.dir"));
        let (redis_prefix, mongo_database) = (self.word("redis.prefix"), self.database());
        let peer_advertise = self.advertise();
        let head_trust = self.millis("limits.head_trust_ms", 50..=600_000);
        let mut effective = self.effective(development);
        if let Some(node) = &node {
            effective.insert("node.name", format!("\"{node}\""));
        }
        Some(Config {
            development,
            node: node?,
            roles,
            listen,
            public_url,
            origins,
            drain_window,
            accept_per_s,
            weight,
            auth,
            verify_by,
            token_in_url,
            admin_key: secrets.admin_key,
            api_keys: secrets.api_keys,
            peer_secret: secrets.peer_secret,
            peer_advertise,
            redis,
            redis_prefix,
            mongo_uri,
            mongo_database,
            head_trust,
            data_dir,
            publish,
            push,
            janitor_every,
            effective,
        })
    }

    /// As configured, else the pod's name, else the host's name without characters that are not
    /// allowed.
    fn node_name(&mut self) -> Option<NodeId> {
        let configured = self.text("node.name");
        if !configured.is_empty() {
            return NodeId::parse(&configured)
                .map_err(|rule| self.faults.push(format!("node.name: {configured:?}: {rule}")))
                .ok();
        }
        let of = |name: &str| {
            self.environment.iter().find(|(known, _)| known == name).map(|found| found.1.clone())
        };
        let host = of("POD_NAME")
            .or_else(|| of("HOSTNAME"))
            .or_else(|| std::fs::read_to_string("/proc/sys/kernel/hostname").ok())
            .unwrap_or_default();
        let cleaned: String = host
            .trim()
            .to_lowercase()
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
            .take(crate::message::NODE_MAX_BYTES)
            .collect();
        NodeId::parse(&cleaned).or_else(|_| NodeId::parse("push-0")).ok()
    }

    fn redis(&mut self, url: &str) -> Option<RedisUrl> {
        if url.is_empty() {
            return None;
        }
        RedisUrl::parse(url).map_err(|rule| self.faults.push(format!("redis.url: {rule}"))).ok()
    }

    /// A name that becomes part of keys and names in a store.
    fn word(&mut self, name: &'static str) -> String {
        let text = self.text(name);
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.:".contains(c);
        if text.is_empty() || text.len() > 60 || !text.chars().all(plain) {
            self.faults
                .push(format!("{name}: {text:?} must be 1 to 60 of A-Z, a-z, 0-9, '-', '_', '.' and ':'"));
        }
        text
    }

    /// A name that MongoDB allows on every system, with room for names of collections.
    fn database(&mut self) -> String {
        let text = self.text("mongo.database");
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_".contains(c);
        if text.is_empty() || text.len() > 60 || !text.chars().all(plain) {
            self.faults
                .push(format!("mongo.database: {text:?} must be 1 to 60 of A-Z, a-z, 0-9, '-' and '_'"));
        }
        text
    }

    fn advertise(&mut self) -> Option<String> {
        let text = self.text("peer.advertise");
        let (host, port) = text.rsplit_once(':').unwrap_or_default();
        if !text.is_empty() && (host.is_empty() || port.parse::<u16>().is_err()) {
            self.faults.push(format!("peer.advertise: {text:?} must be host:port, such as 10.0.0.7:7070"));
        }
        (!text.is_empty()).then_some(text)
    }

    fn verify_by(&mut self) -> VerifyBy {
        let (mode, url, jwks) = (self.text("auth.mode"), self.text("auth.url"), self.text("auth.jwks_url"));
        let mut checked = |name: &str, url: String| {
            if !url.starts_with("http://") && !url.starts_with("https://") {
                let url = without_passwords(&url);
                self.faults.push(format!("{name}: {url:?} must begin with http:// or https://"));
            }
            url.trim_end_matches('/').to_owned()
        };
        match mode.as_str() {
            // An empty URL is reported where the mode is read.
            "remote" if !url.is_empty() => VerifyBy::Asking(checked("auth.url", url)),
            "local" if !jwks.is_empty() => VerifyBy::Jwks(checked("auth.jwks_url", jwks)),
            _ => VerifyBy::Key,
        }
    }

    fn roles(&mut self, embedded: bool, alone: bool) -> Vec<RoleName> {
        let mut roles = Vec::new();
        for name in self.list("node.roles") {
            match RoleName::parse(&name) {
                Some(role) => roles.push(role),
                None => self.faults.push(format!(
                    "node.roles: {name:?} is not a role; the roles are auth, collect, dispatch and push"
                )),
            }
        }
        roles.sort();
        roles.dedup();
        if roles.is_empty() {
            self.faults.push("node.roles: at least one role must run".to_owned());
        }
        let routed = [RoleName::Push, RoleName::Collect, RoleName::Dispatch];
        let here = routed.iter().filter(|role| roles.contains(role)).count();
        if alone && !embedded && here != 0 && here != routed.len() {
            self.faults.push(
                "redis.url: is empty, and without it push, collect and dispatch find one another in one process only; \
                 set redis.url, or node.roles with all three"
                    .to_owned(),
            );
        }
        if embedded && roles.contains(&RoleName::Collect) != roles.contains(&RoleName::Push) {
            self.faults.push(
                "mongo.uri: is empty, and the embedded inbox is not shared: collect and push must then run in one \
                 process; set mongo.uri, or node.roles with both"
                    .to_owned(),
            );
        }
        roles
    }

    fn listeners(&mut self, development: bool) -> Listeners {
        Listeners {
            push: self.address("push.listen", development),
            collect: self.address("collect.listen", development),
            auth: self.address("auth.listen", development),
            dispatch: self.address("dispatch.listen", development),
            peer: self.address("peer.listen", development),
            ops: self.address("ops.listen", development),
        }
    }

    fn public_url(&mut self, development: bool, roles: &[RoleName]) -> Option<UrlTemplate> {
        let text = self.text("push.public_url");
        if text.is_empty() {
            let needed = roles.iter().any(|role| matches!(role, RoleName::Push | RoleName::Dispatch));
            if needed && !development && !self.for_command {
                self.faults.push(
                    "push.public_url: is required outside development: the public URL of a node's socket, \
                     such as wss://push.example.com/n/{node}/v1/ws"
                        .to_owned(),
                );
            }
            return None;
        }
        UrlTemplate::parse(&text).map_err(|rule| self.faults.push(format!("push.public_url: {rule}"))).ok()
    }

    fn origins(&mut self, development: bool) -> Origins {
        let listed = self.list("push.origins");
        let any = listed.iter().any(|origin| origin == "*");
        if any && !development && self.values.contains_key("push.origins") {
            self.faults.push(
                "push.origins: \"*\" is for development only; list the origins of your pages, such as \
                 [\"https://shop.example.com\"]"
                    .to_owned(),
            );
        }
        for origin in listed.iter().filter(|origin| *origin != "*") {
            let scheme = origin.starts_with("http://") || origin.starts_with("https://");
            let path = origin.splitn(4, '/').nth(3).is_some();
            if !scheme || path {
                let origin = without_passwords(origin);
                self.faults.push(format!(
                    "push.origins: {origin:?} must be scheme, host and port only, such as https://shop.example.com"
                ));
            }
        }
        // Outside development nothing is allowed that is not listed.
        if any && development {
            Origins::Any
        } else {
            Origins::Listed(listed.into_iter().filter(|o| o != "*").collect())
        }
    }

    fn auth(&mut self) -> AuthConfig {
        let mode = self.text("auth.mode");
        match mode.as_str() {
            "local" => {}
            "remote" if self.text("auth.url").is_empty() => {
                self.faults.push("auth.url: is required with auth.mode = \"remote\"".to_owned());
            }
            "remote" => {}
            _ => self.faults.push(format!("auth.mode: {mode:?} must be \"local\" or \"remote\"")),
        }
        let optional = |text: String| (!text.is_empty()).then_some(text);
        let config = AuthConfig {
            token_key: self.text("auth.token_key"),
            issuer: optional(self.text("auth.issuer")),
            audience: optional(self.text("auth.audience")),
        };
        if !config.token_key.is_empty()
            && let Err(fault) = Auth::new(config.clone(), Clock::system())
        {
            self.faults.push(format!("auth.token_key: {fault}"));
        }
        config
    }

    fn secrets(&mut self, development: bool, roles: &[RoleName]) -> Secrets {
        let secrets = Secrets {
            admin_key: self.text("auth.admin_key"),
            api_keys: self.list("collect.api_keys"),
            peer_secret: self.text("peer.secret"),
        };
        if secrets.api_keys.iter().any(|key| key.is_empty() || !key.bytes().all(|b| b.is_ascii_graphic())) {
            self.faults.push("collect.api_keys: each key is printable ASCII without spaces".to_owned());
        }
        let admin = [("auth.admin_key", &secrets.admin_key), ("peer.secret", &secrets.peer_secret)];
        let all = secrets.api_keys.iter().map(|key| ("collect.api_keys", key)).chain(admin);
        for (name, secret) in all.filter(|(_, secret)| !secret.is_empty()) {
            if secret.len() < SECRET_MIN_BYTES {
                self.faults.push(format!(
                    "{name}: is {} bytes long; at least {SECRET_MIN_BYTES} are needed, or it can be guessed (make one with: \
                     openssl rand -base64 32)",
                    secret.len()
                ));
            }
        }
        if development || self.for_command {
            return secrets;
        }
        let runs = |role| roles.contains(&role);
        let local = self.text("auth.mode") == "local";
        let verifies = runs(RoleName::Auth) || (local && (runs(RoleName::Push) || runs(RoleName::Dispatch)));
        let fetched = local && !self.text("auth.jwks_url").is_empty();
        let no_key = self.text("auth.token_key").is_empty() && !fetched;
        let missing = [
            ("auth.token_key", verifies && no_key),
            ("auth.admin_key", runs(RoleName::Auth) && secrets.admin_key.is_empty()),
            ("collect.api_keys", runs(RoleName::Collect) && secrets.api_keys.is_empty()),
            // A process with the role auth alone does not ask another auth.
            (
                "peer.secret",
                roles.iter().any(|role| *role != RoleName::Auth) && secrets.peer_secret.is_empty(),
            ),
        ];
        for (name, missing) in missing {
            if missing {
                let variable = name.to_uppercase().replace('.', "__");
                self.faults.push(format!(
                    "{name}: is required outside development (in the environment: RINGPUSH_{variable}; make one with: openssl \
                     rand -base64 32)"
                ));
            }
        }
        secrets
    }

    fn publish_limits(&mut self) -> PublishLimits {
        PublishLimits {
            message_bytes: self.number("limits.message_bytes", 1..=65_536) as usize,
            recipients: self.number("limits.recipients", 1..=1_000) as usize,
            batch: self.number("limits.batch", 1..=1_000) as usize,
            ttl_s: self.number("limits.message_ttl_s", TTL_S),
        }
    }

    fn push_limits(&mut self) -> PushLimits {
        PushLimits {
            auth_deadline: self.millis("limits.auth_deadline_ms", 100..=60_000),
            ping_every: self.millis("limits.ping_ms", 100..=3_600_000),
            sessions_per_user: self.number("limits.sessions_per_user", 1..=1_000) as usize,
            sweep_every: self.millis("limits.sweep_ms", 100..=3_600_000),
            reconnect_jitter_ms: self.number("limits.reconnect_jitter_ms", 0..=60_000),
            client_frames_per_s: self.number("limits.client_frames_per_s", 1..=1_000_000) as u32,
        }
    }

    fn weight(&mut self) -> f64 {
        let weight = match self.value("push.weight") {
            Some(toml::Value::Float(weight)) => weight,
            Some(toml::Value::Integer(weight)) => weight as f64,
            _ => f64::NAN,
        };
        if !(0.01..=100.0).contains(&weight) {
            self.faults.push("push.weight: must be a number from 0.01 to 100".to_owned());
        }
        weight
    }

    fn switch(&mut self, name: &'static str) -> bool {
        match self.value(name) {
            Some(toml::Value::Boolean(on)) => on,
            _ => self.wrong(name, Kind::Switch).unwrap_or_default(),
        }
    }

    fn effective(&mut self, development: bool) -> BTreeMap<&'static str, String> {
        KEYS.iter()
            .map(|key| {
                let set = self.values.contains_key(key.name);
                let mut value = self.value(key.name);
                if key.name == "push.origins" && !set && !development {
                    // Outside development nothing is allowed that is not listed.
                    value = Some(toml::Value::Array(Vec::new()));
                }
                let shown = match key.kind {
                    Kind::Secret if value.as_ref().and_then(toml::Value::as_str) == Some("") => {
                        "\"\"".to_owned()
                    }
                    Kind::SecretList
                        if value.as_ref().and_then(toml::Value::as_array).is_some_and(Vec::is_empty) =>
                    {
                        "[]".to_owned()
                    }
                    Kind::Secret | Kind::SecretList => "\"(set)\"".to_owned(),
                    _ => value.map_or_else(String::new, |value| without_passwords(&value.to_string())),
                };
                let elsewhere = !development && !set && key.name.ends_with(".listen");
                (key.name, if elsewhere { shown.replace("127.0.0.1", "0.0.0.0") } else { shown })
            })
            .collect()
    }
}

struct Secrets {
    admin_key: String,
    api_keys: Vec<String>,
    peer_secret: String,
}

fn rule_of(kind: Kind) -> &'static str {
    match kind {
        Kind::Text | Kind::Secret => "must be a string",
        Kind::List | Kind::SecretList => "must be a list of strings",
        Kind::Number => "must be an integer",
        Kind::Fraction => "must be a number",
        Kind::Switch => "must be true or false",
    }
}

/// Shortest key or secret, in bytes: the length of the digest. Somebody who sees a ticket can try
/// secrets offline.
const SECRET_MIN_BYTES: usize = 32;

/// The text without user and password of every URL in it.
fn without_passwords(text: &str) -> String {
    let mut parts = text.split("://");
    let mut shown = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        // A password may contain characters that should be encoded, so everything before the last @
        // is left out.
        let end = part.find(['"', ' ']).unwrap_or(part.len());
        let (url, rest) = part.split_at(end);
        shown.push_str("://");
        match url.rsplit_once('@') {
            Some((_, host)) => shown.push_str(&format!("(set)@{host}{rest}")),
            None => shown.push_str(part),
        }
    }
    shown
}

/// A JSON array, or values separated by commas.
fn list_of(text: &str) -> Option<toml::Value> {
    let items: Vec<String> = if text.trim_start().starts_with('[') {
        serde_json::from_str(text).ok()?
    } else {
        text.split(',').map(str::trim).filter(|item| !item.is_empty()).map(str::to_owned).collect()
    };
    Some(toml::Value::Array(items.into_iter().map(toml::Value::String).collect()))
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
