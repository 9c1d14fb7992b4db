//! Binding the listeners, and the addresses that are shown.

use std::net::SocketAddr;
use std::path::Path;

use anyhow::{Context, Result, anyhow};

use crate::config::{Config, RoleName};
use crate::message::NodeId;
use crate::redis_url::{RedisServers, RedisUrl};
use crate::role::connect::PublicUrls;
use crate::transport::http::{HttpLimits, Listener, bind};

/// The kernel's send buffer of a socket, in bytes (docs/design.md, section 11).
pub(super) const SOCKET_SEND_BUFFER: u32 = 64 * 1024;

/// The bound addresses, as in `listen.json`.
#[derive(Debug, Clone, Default)]
pub struct Bound {
    /// The push nodes in node order.
    pub push: Vec<(NodeId, SocketAddr)>,
    /// The other roles, by name.
    pub others: Vec<(&'static str, SocketAddr)>,
    /// Whether several push nodes were requested: `push` is a list then.
    pub(super) many: bool,
    /// The roles whose listeners speak TLS.
    pub(super) tls: Vec<&'static str>,
}

impl Bound {
    pub(super) fn to_json(&self) -> serde_json::Value {
        let mut all = serde_json::Map::new();
        let mut push: Vec<serde_json::Value> =
            self.push.iter().map(|(_, at)| at.to_string().into()).collect();
        if self.many {
            all.insert("push".to_owned(), push.into());
        } else if let Some(one) = push.pop() {
            all.insert("push".to_owned(), one);
        }
        all.extend(self.others.iter().map(|(name, at)| ((*name).to_owned(), at.to_string().into())));
        if !self.tls.is_empty() {
            all.insert("tls".to_owned(), self.tls.clone().into());
        }
        all.into()
    }

    /// `secure` if the listener of this role speaks TLS, else `plain`.
    pub(super) fn scheme<'a>(&self, role: &str, plain: &'a str, secure: &'a str) -> &'a str {
        if self.tls.contains(&role) { secure } else { plain }
    }

    /// The bound address of a role.
    #[must_use]
    pub fn of(&self, name: &str) -> Option<SocketAddr> {
        self.others.iter().find(|(known, _)| *known == name).map(|(_, at)| *at)
    }
}

/// A listener that is bound and not served yet.
pub(super) struct Listening {
    pub(super) listener: Listener,
    pub(super) at: SocketAddr,
}

pub(super) fn push_http_limits() -> HttpLimits {
    HttpLimits { send_buffer: Some(SOCKET_SEND_BUFFER), ..HttpLimits::default() }
}

/// In development every node is reached at its own address.
pub(super) fn own_urls(bound: &Bound) -> PublicUrls {
    let scheme = bound.scheme("push", "ws", "wss");
    let url = |node: &NodeId, at: &SocketAddr| {
        let mut at = *at;
        if at.ip().is_unspecified() {
            at.set_ip(if at.is_ipv4() {
                [127, 0, 0, 1].into()
            } else {
                std::net::Ipv6Addr::LOCALHOST.into()
            });
        }
        format!("{scheme}://{at}/n/{node}/v1/ws")
    };
    PublicUrls::Own(bound.push.iter().map(|(node, at)| (node.clone(), url(node, at))).collect())
}

/// Written aside and renamed, so that nobody reads half of it.
pub(super) fn write_listen(path: &Path, bound: &Bound) -> Result<()> {
    let aside = path.with_extension("json.new");
    std::fs::write(&aside, format!("{}\n", bound.to_json()))
        .and_then(|()| std::fs::rename(&aside, path))
        .with_context(|| format!("data.dir: {} cannot be written", path.display()))
}

/// Every listener of the roles of this process.
pub(super) struct Listeners {
    pub(super) names: Vec<NodeId>,
    pub(super) push: Vec<Listening>,
    pub(super) collect: Option<Listening>,
    pub(super) auth: Option<Listening>,
    pub(super) dispatch: Option<Listening>,
    /// Set if other processes can reach this one.
    pub(super) peer: Option<Listening>,
    pub(super) ops: Option<Listening>,
}

impl Listeners {
    pub(super) fn bind(config: &Config, push_nodes: Option<usize>) -> Result<Self> {
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
            peer: (config.redis.is_some()
                && [RoleName::Push, RoleName::Dispatch, RoleName::Collect]
                    .iter()
                    .any(|role| config.runs(*role)))
            .then(|| bind_one("peer.listen", listen.peer, &plain))
            .transpose()?,
            ops: Some(bind_one("ops.listen", listen.ops, &plain)?),
        })
    }

    pub(super) fn bound(&self, many: bool, config: &Config) -> Bound {
        let push = self.names.iter().cloned().zip(self.push.iter().map(|listening| listening.at)).collect();
        let named = [
            ("collect", &self.collect),
            ("auth", &self.auth),
            ("dispatch", &self.dispatch),
            ("peer", &self.peer),
            ("ops", &self.ops),
        ];
        let others =
            named.into_iter().filter_map(|(name, listening)| Some((name, listening.as_ref()?.at))).collect();
        let secure = [("push", &config.tls.push), ("collect", &config.tls.collect)];
        let tls = secure.into_iter().filter_map(|(role, files)| files.as_ref().map(|_| role)).collect();
        Bound { push, others, many, tls }
    }
}

/// Consecutive ports, passing over those of other listeners of this configuration; with port 0 each
/// its own.
pub(super) fn bind_push(config: &Config, count: usize) -> Result<Vec<Listening>> {
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

pub(super) fn bind_one(name: &'static str, at: SocketAddr, limits: &HttpLimits) -> Result<Listening> {
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

/// The address of the peer port as other processes reach it: as configured, from the pod, or the
/// address that this machine uses towards Redis.
pub(super) fn advertised(config: &Config, at: SocketAddr) -> String {
    if let Some(configured) = &config.peer_advertise {
        return configured.clone();
    }
    if !at.ip().is_unspecified() {
        return at.to_string();
    }
    let pod = std::env::var("POD_IP").ok().and_then(|ip| ip.parse().ok());
    let ip = pod.or_else(|| ip_towards(config.redis.as_ref()?)).unwrap_or(at.ip());
    SocketAddr::new(ip, at.port()).to_string()
}

/// Nothing is sent: connecting a datagram socket only selects the source address.
pub(super) fn ip_towards(redis: &RedisUrl) -> Option<std::net::IpAddr> {
    let (host, port) = match &redis.servers {
        RedisServers::One(host, _) => host.clone(),
        RedisServers::Sentinel(hosts, _) | RedisServers::Cluster(hosts) => hosts.first()?.clone(),
    };
    let socket = std::net::UdpSocket::bind(("0.0.0.0", 0)).ok()?;
    socket.connect((host.as_str(), port)).ok()?;
    Some(socket.local_addr().ok()?.ip())
}
