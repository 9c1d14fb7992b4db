//! Public addresses: the template that names a node to clients, and the paths and queries of a
//! socket request.

use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, utf8_percent_encode};

use super::frame::Since;
use crate::message::{DeviceId, NodeId};

/// Characters that are escaped in a path segment or a query value.
const RESERVED: &AsciiSet = &CONTROLS
    .add(b' ')
    .add(b'"')
    .add(b'#')
    .add(b'%')
    .add(b'&')
    .add(b'+')
    .add(b'/')
    .add(b'<')
    .add(b'=')
    .add(b'>')
    .add(b'?')
    .add(b'`')
    .add(b'{')
    .add(b'}');

/// Escapes `text` for a path segment or a query value.
#[must_use]
pub fn escape(text: &str) -> String {
    utf8_percent_encode(text, RESERVED).to_string()
}

/// Reverses [`escape`]. Returns `None` if the bytes are not UTF-8.
#[must_use]
pub fn unescape(text: &str) -> Option<String> {
    percent_decode_str(text).decode_utf8().ok().map(std::borrow::Cow::into_owned)
}

/// Builds the public URL of a node's socket from a template and a checked node id, never from what
/// a client or a store says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UrlTemplate {
    before: String,
    after: Option<String>,
}

impl UrlTemplate {
    /// Parses a template such as `wss://push.example.com/n/{node}/v1/ws`.
    ///
    /// # Errors
    ///
    /// The rule that the template breaks.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        if !(text.starts_with("ws://") || text.starts_with("wss://")) {
            return Err("must begin with ws:// or wss://");
        }
        if text.contains(['?', '#', ' ']) {
            return Err("must not contain '?', '#' or spaces: queries are added");
        }
        match text.split_once("{node}") {
            Some((_, after)) if after.contains("{node}") => Err("must contain {node} once"),
            Some((before, after)) => Ok(Self { before: before.into(), after: Some(after.into()) }),
            None => Err("must contain {node}, which stands for the name of the node, \
                         such as wss://push.example.com/n/{node}/v1/ws"),
        }
    }

    /// A URL that does not depend on the node: the node's own address, as in development.
    #[must_use]
    pub fn fixed(url: &str) -> Self {
        Self { before: url.to_owned(), after: None }
    }

    /// The URL of `node`.
    #[must_use]
    pub fn url(&self, node: &NodeId) -> String {
        match &self.after {
            Some(after) => format!("{}{node}{after}", self.before),
            None => self.before.clone(),
        }
    }
}

/// Where Redis is, as `redis.url` says it.
#[derive(Clone, PartialEq, Eq)]
pub struct RedisUrl {
    /// Whether every server is spoken to over TLS (`rediss…`).
    pub tls: bool,
    /// The user of `user:password@`; empty if there is none.
    pub username: String,
    /// The password; empty where there is none.
    pub password: String,
    /// The servers, and how they are organised.
    pub servers: RedisServers,
}

/// The servers of a `redis.url`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RedisServers {
    /// One server, and the number of its database.
    One((String, u16), i64),
    /// Sentinels, and the name of the master that they know.
    Sentinel(Vec<(String, u16)>, String),
    /// Some nodes of a Redis Cluster.
    Cluster(Vec<(String, u16)>),
}

impl std::fmt::Debug for RedisUrl {
    /// Hides the password.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RedisUrl({:?})", self.servers)
    }
}

/// Default port of a Redis server and of a Sentinel.
const REDIS_PORT: u16 = 6379;
const SENTINEL_PORT: u16 = 26379;

impl RedisUrl {
    /// Parses `redis://`, `rediss://`, `redis+sentinel://h:p,h:p/NAME`, `redis+cluster://h:p,h:p`,
    /// and the latter two with `rediss+`.
    ///
    /// # Errors
    ///
    /// The rule that the text breaks, without any part of the text: it may contain a password.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        const FORMS: &str = "must be redis://HOST:PORT, rediss://HOST:PORT, redis+sentinel://HOST:PORT,HOST:PORT/NAME or \
                             redis+cluster://HOST:PORT,HOST:PORT";
        let (scheme, rest) = text.split_once("://").ok_or(FORMS)?;
        let tls = scheme.starts_with("rediss");
        let kind = scheme.strip_prefix(if tls { "rediss" } else { "redis" }).ok_or(FORMS)?;
        let (account, rest) = rest.rsplit_once('@').map_or(("", rest), |(account, rest)| (account, rest));
        let (username, password) = account.split_once(':').unwrap_or((account, ""));
        let clear = |text: &str| unescape(text).ok_or("holds an account that is not UTF-8 when unescaped");
        let (hosts, path) = rest.split_once('/').unwrap_or((rest, ""));
        let path = path.split('?').next().unwrap_or_default();
        let servers = match kind {
            "" => {
                let database = if path.is_empty() { Ok(0) } else { path.parse() };
                let database = database.map_err(|_| "must end in the number of a database, or in nothing")?;
                let mut hosts = servers_of(hosts, REDIS_PORT)?;
                match (hosts.pop(), hosts.is_empty()) {
                    (Some(host), true) => RedisServers::One(host, database),
                    _ => return Err("must name one host; several are redis+sentinel:// or redis+cluster://"),
                }
            }
            "+sentinel" if path.is_empty() => {
                return Err("must end in the name of the master that the Sentinels know: /NAME");
            }
            "+sentinel" => RedisServers::Sentinel(servers_of(hosts, SENTINEL_PORT)?, path.to_owned()),
            "+cluster" => RedisServers::Cluster(servers_of(hosts, REDIS_PORT)?),
            _ => return Err(FORMS),
        };
        Ok(Self { tls, username: clear(username)?, password: clear(password)?, servers })
    }
}

fn servers_of(hosts: &str, default_port: u16) -> Result<Vec<(String, u16)>, &'static str> {
    hosts
        .split(',')
        .map(|host| {
            // An IPv6 address stands in brackets, and may end in the only ']'.
            let (name, port) = match host.rsplit_once(':') {
                Some((name, port)) if !port.ends_with(']') => {
                    (name, port.parse().map_err(|_| "names a port that is no number from 1 to 65535")?)
                }
                _ => (host, default_port),
            };
            let name = name.trim_start_matches('[').trim_end_matches(']');
            if name.is_empty() || port == 0 {
                return Err("names no host, or port 0");
            }
            Ok((name.to_owned(), port))
        })
        .collect()
}

/// The query of a socket request.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SocketQuery {
    /// `device`.
    pub device: Option<DeviceId>,
    /// `since`: where to start.
    pub since: Option<Since>,
    /// `ticket`, from `connect`.
    pub ticket: Option<String>,
    /// `hops`: how often this client was sent on.
    pub hops: u32,
    /// `epoch` of the view that sent it on.
    pub epoch: u64,
    /// `redirect=http`: a 307 instead of a `move` frame.
    pub redirect_http: bool,
    /// `access_token`. It is used only where the configuration allows it.
    pub access_token: Option<String>,
}

impl SocketQuery {
    /// Parses a raw query. Unknown parameters are ignored.
    ///
    /// # Errors
    ///
    /// Every faulty parameter with the rule that it breaks.
    pub fn parse(query: &str) -> Result<Self, Vec<(&'static str, String)>> {
        let mut read = Self::default();
        let mut faults = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, raw) = pair.split_once('=').unwrap_or((pair, ""));
            let Some(value) = unescape(&raw.replace('+', " ")) else {
                faults.push(("query", format!("the value of {name:?} is not UTF-8")));
                continue;
            };
            if let Err(fault) = read.take(name, value) {
                faults.push(fault);
            }
        }
        if faults.is_empty() { Ok(read) } else { Err(faults) }
    }

    fn take(&mut self, name: &str, value: String) -> Result<(), (&'static str, String)> {
        match name {
            "device" => self.device = Some(DeviceId::parse(&value).map_err(|f| ("device", f.to_string()))?),
            "since" => self.since = Some(Since::parse(&value).map_err(|rule| ("since", rule.to_owned()))?),
            "ticket" => self.ticket = Some(value),
            "access_token" => self.access_token = Some(value),
            "hops" => {
                self.hops = value.parse().map_err(|_| ("hops", "hops is a small integer".to_owned()))?
            }
            "epoch" => self.epoch = value.parse().map_err(|_| ("epoch", "epoch is an integer".to_owned()))?,
            "redirect" if value == "http" => self.redirect_http = true,
            "redirect" => return Err(("redirect", "redirect is \"http\" or absent".to_owned())),
            _ => {}
        }
        Ok(())
    }
}

/// The node in the path `/n/{node}/v1/ws`. `None` for other paths and for names that no node can
/// have.
#[must_use]
pub fn node_in_path(path: &str) -> Option<&str> {
    path.strip_prefix("/n/")?.strip_suffix("/v1/ws").filter(|node| NodeId::parse(node).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::Seq;
    use proptest::prelude::*;

    #[test]
    fn a_template_names_any_node_and_nothing_else() {
        let template = UrlTemplate::parse("wss://push.example.com/n/{node}/v1/ws").unwrap();
        let node = NodeId::parse("push-2").unwrap();
        assert_eq!(template.url(&node), "wss://push.example.com/n/push-2/v1/ws");
        for bad in [
            "",
            "https://x/{node}",
            "wss://x/ws",
            "wss://x/{node}/{node}",
            "wss://x/{node}?a=b",
            "wss:// x/{node}",
        ] {
            assert!(UrlTemplate::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_query_is_read_whole_or_every_fault_is_named() {
        let query = SocketQuery::parse("device=web-1&since=41&hops=2&epoch=8&redirect=http&x=y").unwrap();
        assert_eq!(query.since, Some(Since::After(Seq::new(41).unwrap())));
        assert_eq!((query.hops, query.epoch, query.redirect_http), (2, 8, true));
        let faults = SocketQuery::parse("device=a%20b&since=-1&hops=many").unwrap_err();
        assert_eq!(faults.iter().map(|f| f.0).collect::<Vec<_>>(), ["device", "since", "hops"]);
    }

    #[test]
    fn every_form_of_a_redis_url_is_read() {
        let host = |name: &str, port| (name.to_owned(), port);
        let plain = RedisUrl::parse("redis://:p%40ss@r.example/3").unwrap();
        assert_eq!((plain.username.as_str(), plain.password.as_str(), plain.tls), ("", "p@ss", false));
        assert_eq!(plain.servers, RedisServers::One(host("r.example", 6379), 3));
        assert!(!format!("{plain:?}").contains("p@ss"));
        let sentinel = RedisUrl::parse("rediss+sentinel://u:p@a:1,b/main").unwrap();
        assert!(sentinel.tls && sentinel.username == "u");
        assert_eq!(
            sentinel.servers,
            RedisServers::Sentinel(vec![host("a", 1), host("b", 26379)], "main".into())
        );
        let cluster = RedisUrl::parse("redis+cluster://[::1]:7000,b:7001").unwrap();
        assert_eq!(cluster.servers, RedisServers::Cluster(vec![host("::1", 7000), host("b", 7001)]));
        for bad in [
            "",
            "r:6379",
            "http://r",
            "redis://",
            "redis://a,b",
            "redis://a/x",
            "redis://a:port",
            "redis+sentinel://a:1",
            "redis+other://a",
        ] {
            assert!(RedisUrl::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_path_names_a_node() {
        assert_eq!(node_in_path("/n/push-2/v1/ws"), Some("push-2"));
        assert_eq!(node_in_path("/v1/ws"), None);
        for no_node in ["a/b", "", "..", "VM", "%70ush-0", "push_0"] {
            assert_eq!(node_in_path(&format!("/n/{no_node}/v1/ws")), None, "{no_node}");
        }
    }

    proptest! {
        #[test]
        fn what_is_escaped_comes_back(text in "\\PC{0,40}") {
            let escaped = escape(&text);
            prop_assert!(!escaped.contains(['/', '?', '&', ' ']));
            prop_assert_eq!(unescape(&escaped), Some(text));
        }
    }
}
