//! Redis: one connection, made when it is needed and made anew after it failed. It knows scripts
//! and values, not nodes.

use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use redis::aio::{ConnectionLike, MultiplexedConnection};
use redis::cluster::ClusterClient;
use redis::cluster_async::ClusterConnection;
use redis::sentinel::{SentinelClient, SentinelClientBuilder, SentinelServerType};
use redis::{
    AsyncConnectionConfig, Client, ConnectionAddr, IntoConnectionInfo, RedisConnectionInfo, TlsCertificates,
    TlsMode, Value,
};
use tokio::sync::{Mutex, Notify};
use tokio::task::JoinSet;

use crate::redis_url::{RedisServers, RedisUrl};

/// How long one call may take, connecting included: well below a lease, so that several tries fit
/// into one.
pub const CALL_DEADLINE: Duration = Duration::from_millis(1_500);
/// The same for a Redis Cluster, which is asked who has a key's slot: nodes that do not answer are
/// passed over one by one, each after [`CLUSTER_PATIENCE`].
const CLUSTER_DEADLINE: Duration = Duration::from_secs(4);
/// How long one node of a cluster may take to connect, or to answer.
const CLUSTER_PATIENCE: Duration = Duration::from_millis(700);
/// Rest after a subscription was lost; the poll goes on meanwhile.
const SUBSCRIBE_REST: Duration = Duration::from_secs(2);

/// Why Redis did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RedisError {
    /// It cannot be reached, or did not answer in time.
    #[error("Redis cannot be reached: {0}")]
    Unreachable(String),
    /// It answered with an error that waiting does not mend, such as a wrong password.
    #[error("Redis refused: {0}")]
    Refused(String),
    /// It takes nothing for now, as when its memory is full.
    #[error("Redis takes nothing for now: {0}")]
    ForNow(String),
}

/// A script. It is sent once and then called by its digest.
pub struct Script(redis::Script);

impl Script {
    /// A script with this Lua text.
    #[must_use]
    pub fn new(text: &str) -> Self {
        Self(redis::Script::new(text))
    }
}

/// A response of Redis.
#[derive(Debug, Clone, PartialEq)]
pub enum Reply {
    /// Nil.
    Nil,
    /// An integer.
    Int(i64),
    /// A string of any bytes.
    Bytes(Vec<u8>),
    /// A list.
    List(Vec<Reply>),
}

impl Reply {
    fn of(value: Value) -> Self {
        match value {
            Value::Int(n) => Self::Int(n),
            Value::Boolean(is) => Self::Int(i64::from(is)),
            Value::BulkString(bytes) => Self::Bytes(bytes),
            Value::SimpleString(text) => Self::Bytes(text.into_bytes()),
            Value::Okay => Self::Bytes(b"OK".to_vec()),
            Value::Array(all) | Value::Set(all) => Self::List(all.into_iter().map(Self::of).collect()),
            Value::Map(pairs) => Self::List(
                pairs.into_iter().flat_map(|(key, value)| [Self::of(key), Self::of(value)]).collect(),
            ),
            _ => Self::Nil,
        }
    }

    /// The number, also if it came as text; zero for anything else.
    #[must_use]
    pub fn int(&self) -> u64 {
        match self {
            Self::Int(n) => u64::try_from(*n).unwrap_or(0),
            Self::Bytes(_) => self.text().parse().unwrap_or(0),
            _ => 0,
        }
    }

    /// The text; empty for anything else.
    #[must_use]
    pub fn text(&self) -> &str {
        std::str::from_utf8(self.bytes()).unwrap_or("")
    }

    /// The bytes; empty for anything else.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        if let Self::Bytes(bytes) = self { bytes } else { &[] }
    }

    /// The items of a list; empty for anything else.
    #[must_use]
    pub fn items(&self) -> &[Reply] {
        if let Self::List(items) = self { items } else { &[] }
    }
}

/// A connection that is made when it is needed. Cloned, it is the same connection.
#[derive(Clone)]
pub struct RedisLink {
    inner: Arc<Inner>,
}

struct Inner {
    source: Source,
    connection: Mutex<Option<Connection>>,
}

enum Source {
    One(Client),
    Sentinel(Mutex<SentinelClient>),
    Cluster(ClusterClient),
}

#[derive(Clone)]
enum Connection {
    Single(MultiplexedConnection),
    Cluster(ClusterConnection),
}

impl RedisLink {
    /// A link that is not connected yet. `ca` is the certificate of the authority in PEM that signs
    /// that of the server; without it the authorities of the system are trusted.
    ///
    /// # Errors
    ///
    /// What is wrong with the URL or the certificate.
    pub fn new(url: &RedisUrl, ca: Option<&[u8]>) -> Result<Self, RedisError> {
        let source = source(url, ca).map_err(|error| RedisError::Refused(error.to_string()))?;
        Ok(Self { inner: Arc::new(Inner { source, connection: Mutex::new(None) }) })
    }

    /// Runs a script.
    ///
    /// # Errors
    ///
    /// [`RedisError`]; it is then unknown whether the script ran.
    pub async fn run(&self, script: &Script, keys: &[&str], args: &[&[u8]]) -> Result<Reply, RedisError> {
        let mut call = script.0.prepare_invoke();
        for key in keys {
            call.key(*key);
        }
        for arg in args {
            call.arg(*arg);
        }
        self.exchange(async |mut connection| match &mut connection {
            Connection::Single(single) => call.invoke_async(single).await,
            Connection::Cluster(cluster) => call.invoke_async(cluster).await,
        })
        .await
    }

    /// Sends commands of one hash slot together, each as a list of words. Returns the responses in
    /// order.
    ///
    /// # Errors
    ///
    /// [`RedisError`].
    pub async fn send(&self, commands: Vec<Vec<Vec<u8>>>) -> Result<Vec<Reply>, RedisError> {
        let mut pipeline = redis::pipe();
        for words in &commands {
            let mut words = words.iter();
            pipeline.cmd(std::str::from_utf8(words.next().map_or(b"PING", Vec::as_slice)).unwrap_or("PING"));
            for word in words {
                pipeline.arg(word.as_slice());
            }
        }
        let answer = self
            .exchange(async |mut connection| {
                let link: &mut dyn ConnectionLike = match &mut connection {
                    Connection::Single(single) => single,
                    Connection::Cluster(cluster) => cluster,
                };
                let answers = link.req_packed_commands(&pipeline, 0, commands.len()).await?;
                // A command that failed must not count as an empty response.
                Value::Array(answers).extract_error()
            })
            .await?;
        Ok(if let Reply::List(all) = answer { all } else { Vec::new() })
    }

    async fn exchange(
        &self,
        act: impl AsyncFnOnce(Connection) -> redis::RedisResult<Value>,
    ) -> Result<Reply, RedisError> {
        let whole = async {
            let connection = self.connection().await?;
            act(connection).await.map(Reply::of).map_err(|error| self.fault(&error))
        };
        let deadline = match self.inner.source {
            Source::Cluster(_) => CLUSTER_DEADLINE,
            _ => CALL_DEADLINE,
        };
        match tokio::time::timeout(deadline, whole).await {
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(fault)) => {
                if matches!(fault, RedisError::Unreachable(_)) {
                    self.drop_connection();
                }
                Err(fault)
            }
            Err(_) => {
                self.drop_connection();
                Err(RedisError::Unreachable("no answer in time".to_owned()))
            }
        }
    }

    fn fault(&self, error: &redis::RedisError) -> RedisError {
        let broken = error.is_io_error()
            || error.is_timeout()
            || error.is_connection_dropped()
            || error.is_unrecoverable_error();
        // After a failover the old master says READONLY; a new connection finds the new master.
        let elsewhere =
            error.code().is_some_and(|code| matches!(code, "READONLY" | "LOADING" | "MASTERDOWN"));
        match error.code() {
            Some("NOAUTH" | "WRONGPASS" | "NOPERM") => RedisError::Refused(error.to_string()),
            Some("OOM" | "MISCONF" | "NOREPLICAS" | "BUSY") => RedisError::ForNow(error.to_string()),
            _ if broken || elsewhere => RedisError::Unreachable(error.to_string()),
            _ => RedisError::Refused(error.to_string()),
        }
    }

    /// The next call connects again. Whoever holds the lock is about to replace the connection
    /// anyway.
    fn drop_connection(&self) {
        if let Ok(mut connection) = self.inner.connection.try_lock() {
            *connection = None;
        }
    }

    async fn connection(&self) -> Result<Connection, RedisError> {
        let mut kept = self.inner.connection.lock().await;
        if let Some(connection) = &*kept {
            return Ok(connection.clone());
        }
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(CALL_DEADLINE))
            .set_response_timeout(Some(CALL_DEADLINE));
        let made = match &self.inner.source {
            Source::One(client) => {
                client.get_multiplexed_async_connection_with_config(&config).await.map(Connection::Single)
            }
            Source::Sentinel(client) => {
                let mut client = client.lock().await;
                client.get_async_connection_with_config(&config).await.map(Connection::Single)
            }
            Source::Cluster(client) => client.get_async_connection().await.map(Connection::Cluster),
        };
        let made = made.map_err(|error| match error.code() {
            Some("NOAUTH" | "WRONGPASS" | "NOPERM") => RedisError::Refused(error.to_string()),
            // The server's reason for a failed AUTH follows the library's.
            _ if error.to_string().contains("assword") => RedisError::Refused(error.to_string()),
            _ => RedisError::Unreachable(error.to_string()),
        })?;
        *kept = Some(made.clone());
        Ok(made)
    }

    /// Wakes `heard` whenever something is published on `channel`. It is only a hint: messages may
    /// be missed, and a Redis Cluster is not listened to at all.
    pub async fn listen(self, channel: String, heard: Arc<Notify>) {
        loop {
            let client = match &self.inner.source {
                Source::One(client) => Ok(client.clone()),
                Source::Sentinel(client) => client.lock().await.async_get_client().await,
                Source::Cluster(_) => return std::future::pending().await,
            };
            if let Ok(client) = client
                && let Ok(mut listening) = client.get_async_pubsub().await
                && listening.subscribe(&channel).await.is_ok()
            {
                let mut messages = listening.on_message();
                while messages.next().await.is_some() {
                    heard.notify_one();
                }
            }
            tokio::time::sleep(SUBSCRIBE_REST).await;
        }
    }
}

fn source(url: &RedisUrl, ca: Option<&[u8]>) -> redis::RedisResult<Source> {
    let certificates = || ca.map(|ca| TlsCertificates { client_tls: None, root_cert: Some(ca.to_vec()) });
    let address = |(host, port): &(String, u16)| {
        if url.tls {
            ConnectionAddr::TcpTls { host: host.clone(), port: *port, insecure: false, tls_params: None }
        } else {
            ConnectionAddr::Tcp(host.clone(), *port)
        }
    };
    let mut account = RedisConnectionInfo::default();
    if !url.username.is_empty() {
        account = account.set_username(&url.username);
    }
    if !url.password.is_empty() {
        account = account.set_password(&url.password);
    }
    match &url.servers {
        RedisServers::One(host, database) => {
            let info = address(host).into_connection_info()?.set_redis_settings(account.set_db(*database));
            let client = match certificates() {
                None => Client::open(info)?,
                Some(certificates) => Client::build_with_tls(info, certificates)?,
            };
            Ok(Source::One(client))
        }
        RedisServers::Sentinel(hosts, master) => {
            let mut builder =
                SentinelClientBuilder::new(hosts.iter().map(address), master, SentinelServerType::Master)?;
            if url.tls {
                builder = builder
                    .set_client_to_redis_tls_mode(TlsMode::Secure)
                    .set_client_to_sentinel_tls_mode(TlsMode::Secure);
            }
            if !url.username.is_empty() {
                builder = builder.set_client_to_redis_username(&url.username);
            }
            if !url.password.is_empty() {
                builder = builder.set_client_to_redis_password(&url.password);
            }
            if let Some(certificates) = certificates() {
                builder = builder
                    .set_client_to_redis_certificates(certificates.clone())
                    .set_client_to_sentinel_certificates(certificates);
            }
            Ok(Source::Sentinel(Mutex::new(builder.build()?)))
        }
        RedisServers::Cluster(hosts) => {
            let nodes: redis::RedisResult<Vec<_>> = hosts
                .iter()
                .map(|host| Ok(address(host).into_connection_info()?.set_redis_settings(account.clone())))
                .collect();
            let mut builder = ClusterClient::builder(nodes?)
                .connection_timeout(CLUSTER_PATIENCE)
                .response_timeout(CLUSTER_PATIENCE)
                .retries(1);
            if !url.username.is_empty() {
                builder = builder.username(&url.username);
            }
            if !url.password.is_empty() {
                builder = builder.password(&url.password);
            }
            if let Some(certificates) = certificates() {
                builder = builder.certs(certificates);
            }
            Ok(Source::Cluster(builder.build()?))
        }
    }
}

/// Watches tasks for as long as it is polled, and raises their panics. A task may end in another
/// way: a node that has left, or was fenced, sends no more heartbeats.
pub async fn raise_panics(tasks: &parking_lot::Mutex<JoinSet<()>>) {
    loop {
        match poll_fn(|cx| tasks.lock().poll_join_next(cx)).await {
            Some(Err(error)) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Some(_) => {}
            None => std::future::pending().await,
        }
    }
}
