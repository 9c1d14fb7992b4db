//! From values to a checked configuration: ranges, and relations between keys.

use ipnet::IpNet;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::keys::Kind;
use super::reader::Reader;
use super::secrets::without_passwords;
use super::{Config, Listeners, MESSAGE_BYTES_MAX, RoleName, VerifyBy};
use crate::clock::Clock;
use crate::message::NodeId;
use crate::redis_url::RedisUrl;
use crate::role::auth::{Auth, AuthConfig};
use crate::role::collect::{CollectLimits, LogLimits};
use crate::role::push::{LogReadingLimits, Origins, PushLimits};
use crate::role::strangers::StrangerRules;
use crate::telemetry::log_filter_fault;
use crate::topic::TopicPatterns;
use crate::wire::address::UrlTemplate;
use crate::wire::http::{PublishLimits, TTL_S};
use secrecy::SecretString;

impl Reader {
    pub(super) fn build(&mut self) -> Option<Config> {
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
        let collect = self.collect_limits();
        let push = self.push_limits();
        let drain_window = Duration::from_secs(self.number("push.drain_window_s", 1..=3600));
        let accept_per_s = self.number("push.accept_per_s", 0..=1_000_000) as u32;
        let weight = self.weight();
        let token_in_url = self.switch("auth.token_in_url");
        let janitor_every = self.millis("limits.janitor_ms", 100..=86_400_000);
        let data_dir = PathBuf::from(self.text("data.dir"));
        let (redis_prefix, mongo_database) = (self.word("redis.prefix"), self.database());
        let peer_advertise = self.advertise();
        let strangers = self.strangers();
        let head_trust = self.millis("limits.head_trust_ms", 50..=600_000);
        let tls = self.tls();
        let log_level = self.log_level();
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
            strangers,
            admin_key: secrets.admin_key.into(),
            api_keys: secrets.api_keys.into_iter().map(SecretString::from).collect(),
            named_keys: secrets.named_keys,
            peer_secrets: secrets.peer_secrets.into_iter().map(SecretString::from).collect(),
            tls,
            log_level,
            peer_advertise,
            redis,
            redis_prefix,
            mongo_uri: mongo_uri.into(),
            mongo_database,
            head_trust,
            data_dir,
            publish,
            collect,
            push,
            janitor_every,
            effective,
        })
    }

    /// As configured, else the pod's name, else the host's name without characters that are not
    /// allowed.
    pub(super) fn node_name(&mut self) -> Option<NodeId> {
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

    pub(super) fn redis(&mut self, url: &str) -> Option<RedisUrl> {
        if url.is_empty() {
            return None;
        }
        RedisUrl::parse(url).map_err(|rule| self.faults.push(format!("redis.url: {rule}"))).ok()
    }

    fn log_level(&mut self) -> String {
        let text = self.text("log.level");
        if let Some(fault) = log_filter_fault(&text) {
            self.faults.push(format!("log.level: {fault}"));
        }
        text
    }

    /// A name that becomes part of keys and names in a store.
    pub(super) fn word(&mut self, name: &'static str) -> String {
        let text = self.text(name);
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.:".contains(c);
        if text.is_empty() || text.len() > 60 || !text.chars().all(plain) {
            self.faults
                .push(format!("{name}: {text:?} must be 1 to 60 of A-Z, a-z, 0-9, '-', '_', '.' and ':'"));
        }
        text
    }

    /// A name that MongoDB allows on every system, with room for names of collections.
    pub(super) fn database(&mut self) -> String {
        let text = self.text("mongo.database");
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_".contains(c);
        if text.is_empty() || text.len() > 60 || !text.chars().all(plain) {
            self.faults
                .push(format!("mongo.database: {text:?} must be 1 to 60 of A-Z, a-z, 0-9, '-' and '_'"));
        }
        text
    }

    pub(super) fn advertise(&mut self) -> Option<String> {
        let text = self.text("peer.advertise");
        let (host, port) = text.rsplit_once(':').unwrap_or_default();
        if !text.is_empty() && (host.is_empty() || port.parse::<u16>().is_err()) {
            self.faults.push(format!("peer.advertise: {text:?} must be host:port, such as 10.0.0.7:7070"));
        }
        (!text.is_empty()).then_some(text)
    }

    pub(super) fn verify_by(&mut self) -> VerifyBy {
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

    pub(super) fn roles(&mut self, embedded: bool, alone: bool) -> Vec<RoleName> {
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

    pub(super) fn listeners(&mut self, development: bool) -> Listeners {
        Listeners {
            push: self.address("push.listen", development),
            collect: self.address("collect.listen", development),
            auth: self.address("auth.listen", development),
            dispatch: self.address("dispatch.listen", development),
            peer: self.address("peer.listen", development),
            ops: self.address("ops.listen", development),
        }
    }

    pub(super) fn public_url(&mut self, development: bool, roles: &[RoleName]) -> Option<UrlTemplate> {
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

    pub(super) fn origins(&mut self, development: bool) -> Origins {
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

    fn strangers(&mut self) -> StrangerRules {
        let listed = self.list("push.trusted_proxies");
        let mut proxies = Vec::with_capacity(listed.len());
        for network in listed.iter().filter(|network| *network != "off") {
            let one =
                network.parse::<IpNet>().ok().or_else(|| network.parse::<IpAddr>().ok().map(IpNet::from));
            match one {
                Some(net) => proxies.push(net),
                None => self.faults.push(format!(
                    "push.trusted_proxies: {network:?} must be an address or a network, such as 10.0.0.0/8; [] says that clients \
                     come directly"
                )),
            }
        }
        let is_off = listed.iter().any(|network| network == "off");
        if is_off && listed.len() > 1 {
            self.faults.push("push.trusted_proxies: \"off\" stands alone".to_owned());
        }
        StrangerRules {
            proxies: (!is_off).then_some(proxies),
            failures_per_min: self.number("limits.auth_failures_per_min", 1..=1_000_000) as u32,
            handshakes: self.number("limits.handshakes_per_address", 1..=1_000_000) as u32,
        }
    }

    pub(super) fn auth(&mut self) -> AuthConfig {
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
            token_keys: self.token_keys(),
            issuer: optional(self.text("auth.issuer")),
            audience: optional(self.text("auth.audience")),
        };
        if let Err((n, fault)) = Auth::new(config.clone(), Clock::system()) {
            let alone = !self.text("auth.token_key").is_empty();
            let name = if alone { "auth.token_key".to_owned() } else { format!("auth.token_keys[{n}].key") };
            self.faults.push(format!("{name}: {fault}"));
        }
        config
    }

    pub(super) fn publish_limits(&mut self) -> PublishLimits {
        PublishLimits {
            message_bytes: self.number("limits.message_bytes", 1..=MESSAGE_BYTES_MAX as u64) as usize,
            recipients: self.number("limits.recipients", 1..=1_000) as usize,
            batch: self.number("limits.batch", 1..=1_000) as usize,
        }
    }

    pub(super) fn collect_limits(&mut self) -> CollectLimits {
        CollectLimits {
            ttl_s: self.number("limits.message_ttl_s", TTL_S),
            member_lists_bytes: self.number("limits.member_lists_mib", 1..=65_536) * 1024 * 1024,
            open: self.open_topics(),
            logs: LogLimits {
                topic_bytes: self.number("limits.topic_message_bytes", 1..=65_536) as usize,
                everyone_bytes: self.number("limits.everyone_message_bytes", 1..=65_536) as usize,
                topic_per_s: self.number("limits.topic_per_s", 1..=1_000_000) as u32,
                everyone_per_s: self.number("limits.everyone_per_s", 1..=1_000_000) as u32,
            },
        }
    }

    fn open_topics(&mut self) -> TopicPatterns {
        let listed = self.list("topics.open");
        TopicPatterns::parse(listed.iter().map(String::as_str)).unwrap_or_else(|bad| {
            self.faults.push(format!(
                "topics.open: {bad:?} must be the name of a topic, or the beginning of names with one * behind, such as match-*"
            ));
            TopicPatterns::default()
        })
    }

    pub(super) fn push_limits(&mut self) -> PushLimits {
        PushLimits {
            auth_deadline: self.millis("limits.auth_deadline_ms", 100..=60_000),
            ping_every: self.millis("limits.ping_ms", 100..=3_600_000),
            sessions_per_user: self.number("limits.sessions_per_user", 1..=1_000) as usize,
            sessions_per_device: self.number("limits.sessions_per_device", 1..=1_000) as usize,
            sweep_every: self.millis("limits.sweep_ms", 100..=3_600_000),
            reconnect_jitter_ms: self.number("limits.reconnect_jitter_ms", 0..=60_000),
            client_frames_per_s: self.number("limits.client_frames_per_s", 1..=1_000_000) as u32,
            logs: LogReadingLimits {
                memory_bytes: self.number("limits.tail_mib", 1..=65_536) as usize * 1024 * 1024,
                fanout_bytes_per_s: self.number("limits.fanout_mib_per_s", 0..=65_536) * 1024 * 1024,
                outbound_bytes: self.number("limits.outbound_mib", 1..=1_048_576) as usize * 1024 * 1024,
                everyone_backlog: self.number("limits.everyone_backlog", 0..=1_000_000),
                position_every: self.millis("limits.topic_cursor_ms", 200..=3_600_000),
                positions_per_s: self.number("limits.topic_cursors_per_s", 1..=1_000_000) as u32,
            },
        }
    }

    pub(super) fn weight(&mut self) -> f64 {
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

    pub(super) fn switch(&mut self, name: &'static str) -> bool {
        match self.value(name) {
            Some(toml::Value::Boolean(on)) => on,
            _ => self.wrong(name, Kind::Switch).unwrap_or_default(),
        }
    }
}
