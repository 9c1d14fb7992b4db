//! Where Redis is: the forms of `redis.url`.

use ringpush_protocol::address::unescape;

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

#[cfg(test)]
mod tests {
    use super::*;

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
}
