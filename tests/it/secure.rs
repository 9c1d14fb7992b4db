//! TLS of listeners and between roles, and secrets that are turned while the cluster runs.

use std::path::{Path, PathBuf};

use futures_util::{SinkExt, StreamExt};
use rustls::version::{TLS12, TLS13};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

use ringpush::transport::tls::Identity;
use ringpush_testing::certificates::{Authority, Pair, dial};
use ringpush_testing::foreign::{Foreign, ReplicaSet, redis};
use ringpush_testing::{
    ADMIN_KEY, API_KEY, DEADLINE, Options, PEER_SECRET, Server, Socket, eventually, http,
};

type Secure = tokio_rustls::client::TlsStream<TcpStream>;

/// Options of a server that speaks TLS on push and collect.
fn over_tls(directory: &Path, pair: &Pair) -> Options {
    let (cert, key) = pair.write(directory);
    let (cert, key) = (cert.to_str().unwrap(), key.to_str().unwrap());
    Options::default()
        .with("push.tls.cert", cert)
        .with("push.tls.key", key)
        .with("collect.tls.cert", cert)
        .with("collect.tls.key", key)
}

async fn request(stream: &mut Secure, text: &str) -> http::Answer {
    stream.write_all(text.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    tokio::time::timeout(DEADLINE, stream.read_to_end(&mut answer)).await.unwrap().unwrap();
    http::parse(&answer)
}

async fn publish(authority: &Authority, server: &Server, body: &Value) -> http::Answer {
    let mut stream =
        dial(authority.client(None, &[&TLS13]), &server.at("collect"), "localhost").await.unwrap();
    let (key, body) = (server.key("api_key"), body.to_string());
    let text = format!(
        "POST /v1/messages HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {key}\r\nconnection: close\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    request(&mut stream, &text).await
}

async fn open(authority: &Authority, server: &Server, user: &str) -> WebSocketStream<Secure> {
    let stream =
        dial(authority.client(None, &[&TLS12, &TLS13]), &server.at("push"), "localhost").await.unwrap();
    let mut request = "wss://localhost/v1/ws".into_client_request().unwrap();
    let token = server.token(user).await;
    request.headers_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    tokio_tungstenite::client_async(request, stream).await.unwrap().0
}

async fn until(socket: &mut WebSocketStream<Secure>, kind: &str) -> Value {
    loop {
        let next = tokio::time::timeout(DEADLINE, socket.next()).await.expect("a frame in time");
        if let Message::Text(text) = next.unwrap().unwrap() {
            let frame: Value = serde_json::from_str(&text).unwrap();
            if frame["type"] == kind {
                return frame;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sockets_and_publishes_go_over_tls_and_nothing_else_does() {
    let (place, authority) = (tempfile::tempdir().unwrap(), Authority::make());
    let server = Server::with(over_tls(place.path(), &authority.sign(&["localhost", "127.0.0.1"]))).await;
    let mut alice = open(&authority, &server, "alice").await;
    until(&mut alice, "caught_up").await;
    // More than a record of TLS, and more than the kernel takes at once.
    let long: String = "0123456789".repeat(6_000);
    for n in 0..40 {
        let answer =
            publish(&authority, &server, &json!({"to": {"user": "alice"}, "payload": [n, long]})).await;
        assert_eq!(answer.status, 202, "{answer:?}");
    }
    for n in 0..40 {
        assert_eq!(until(&mut alice, "message").await["payload"], json!([n, long]));
    }
    alice.send(Message::Text(json!({"type": "ack", "seq": 40}).to_string().into())).await.unwrap();
    alice.close(None).await.unwrap();
    let closed = tokio::time::timeout(DEADLINE, async { while alice.next().await.is_some() {} }).await;
    closed.expect("the close handshake ends in time");
    server.nobody_is_left().await;
    // The commands find out by themselves; the authority is the system's, or the one that is named.
    let ca = authority.write(place.path());
    let published = std::process::Command::new(ringpush_testing::program())
        .args(["--data", server.directory.path().to_str().unwrap(), "publish", "alice", "1"])
        .env("SSL_CERT_FILE", &ca)
        .output()
        .unwrap();
    assert!(published.status.success(), "{}", String::from_utf8_lossy(&published.stderr));
    // TLS 1.2 too; HTTP/2 where the client asks for it.
    for (versions, alpn) in [(&[&TLS12][..], &b"http/1.1"[..]), (&[&TLS13], b"h2")] {
        let mut config = authority.client(None, versions);
        config.alpn_protocols = vec![alpn.to_vec()];
        let stream = dial(config, &server.at("collect"), "localhost").await.unwrap();
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(alpn));
    }
    // In the clear: told so, on both ports.
    for role in ["push", "collect"] {
        let answer = http::get(&server.at(role), "/", None).await;
        assert_eq!(answer.status, 400);
        assert!(String::from_utf8_lossy(&answer.body).contains("speaks TLS"), "{answer:?}");
    }
    // Somebody who does not know the authority does not talk to it.
    let stranger = Authority::make();
    assert!(dial(stranger.client(None, &[&TLS13]), &server.at("push"), "localhost").await.is_err());
    let expires = server.metric("ringpush_certificate_expiry_timestamp_seconds{use=\"push\"}").await;
    assert_eq!(expires, 4_070_908_800.0, "2099-01-01");
}

/// One file of configuration may serve all processes: what another role needs must not be there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_of_other_roles_need_not_be_there() {
    let nowhere = "/no/such/file";
    let redis = redis(&[]).await;
    let mut options = Options::registered_in(&format!("redis://127.0.0.1:{}", redis.port));
    options.environment.retain(|(name, _)| !name.ends_with("PEER__SECRET") && !name.ends_with("API_KEYS"));
    for key in ["push.tls.cert", "push.tls.key", "collect.tls.cert", "collect.tls.key", "peer.secret_file"] {
        options = options.with(key, nowhere);
    }
    let server =
        Server::with(options.with("collect.api_keys_file", nowhere).with("node.roles", "auth")).await;
    assert!(!token(&server, "alice").await.is_empty());
}

#[test]
fn a_certificate_that_is_in_use_may_end_and_another_one_that_has_ended_is_not_taken() {
    let (place, authority) = (tempfile::tempdir().unwrap(), Authority::make());
    let (cert, key) = authority.sign_until(&["localhost"], 2030).write(place.path());
    let read = |now_s, in_use| Identity::read(&cert, &key, now_s, in_use);
    let digest = read(1_800_000_000, None).unwrap().digest;
    let in_2031 = 1_924_992_000;
    let fault = read(in_2031, None).unwrap_err();
    assert!(fault.field == "cert" && fault.rule.contains("expired at 2030-01-01T00:00:00Z"), "{fault}");
    assert!(read(in_2031, Some(digest)).is_ok() && read(in_2031, Some([0; 32])).is_err());
    assert!(read(1_000_000_000, None).unwrap_err().rule.contains("is valid from 2020-01-01"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_makes_no_handshake_is_let_go() {
    let (place, authority) = (tempfile::tempdir().unwrap(), Authority::make());
    let server = Server::with(over_tls(place.path(), &authority.sign(&["localhost"]))).await;
    let mut silent = TcpStream::connect(server.at("push")).await.unwrap();
    let mut half = TcpStream::connect(server.at("collect")).await.unwrap();
    half.write_all(&[0x16, 3, 1]).await.unwrap();
    for stream in [&mut silent, &mut half] {
        let end = tokio::time::timeout(DEADLINE, stream.read_to_end(&mut Vec::new())).await;
        end.expect("it is closed in time").unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_are_turned_while_sockets_live_and_bad_ones_change_nothing() {
    let (place, authority) = (tempfile::tempdir().unwrap(), Authority::make());
    let (first, second) = (authority.sign(&["localhost"]), authority.sign(&["localhost"]));
    let server = Server::with(over_tls(place.path(), &first)).await;
    let mut alice = open(&authority, &server, "alice").await;
    until(&mut alice, "caught_up").await;
    let shown = async |role: &str| {
        let stream = dial(authority.client(None, &[&TLS13]), &server.at(role), "localhost").await.unwrap();
        stream.get_ref().1.peer_certificates().unwrap()[0].clone()
    };
    assert_eq!(shown("push").await, first.der());
    let reload = || ringpush_testing::signal(server.pid(), "HUP");
    let told = async |word: &str| {
        reload();
        eventually(word, async || server.log().contains(word)).await;
        assert_eq!((shown("push").await, shown("collect").await), (first.der(), first.der()), "{word}");
    };
    // Rubbish; the key of another certificate; one that has expired.
    Pair { cert: "rubbish".to_owned(), ..first.clone() }.write(place.path());
    told("holds no certificate in PEM").await;
    Pair { key: second.key.clone(), ..first.clone() }.write(place.path());
    told("is not the key of the certificate").await;
    authority.sign_until(&["localhost"], 2021).write(place.path());
    told("expired at 2021-01-01T00:00:00Z").await;
    std::fs::remove_file(place.path().join("key.pem")).unwrap();
    told("key.pem cannot be read").await;
    second.write(place.path());
    reload();
    eventually("the new certificate is shown", async || {
        (shown("push").await, shown("collect").await) == (second.der(), second.der())
    })
    .await;
    // Nobody noticed.
    let answer =
        publish(&authority, &server, &json!({"to": {"user": "alice"}, "payload": "still here"})).await;
    assert_eq!(answer.status, 202);
    assert_eq!(until(&mut alice, "message").await["payload"], "still here");
}

const PEER_NAME: &str = "peer.ringpush.test";

/// The options of one process of a cluster with mutual TLS between its roles. Its secrets come from
/// files, which may change.
fn peer(directory: &Path, n: usize, urls: (&str, &str), ca: &Path, pair: &Pair) -> Options {
    let own = directory.join(format!("push-{n}"));
    std::fs::create_dir_all(&own).unwrap();
    let (cert, key) = pair.write(&own);
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    let mut options = Options::registered_in(urls.0)
        .with("mongo.uri", urls.1)
        .with("peer.tls.cert", &path(&cert))
        .with("peer.tls.key", &path(&key))
        .with("peer.tls.ca", &path(ca))
        .with("peer.tls.name", PEER_NAME);
    let from_files = ["NODE__NAME", "PEER__SECRET", "AUTH__TOKEN_KEY", "COLLECT__API_KEYS"];
    options.environment.retain(|(name, _)| !from_files.iter().any(|file| name.ends_with(file)));
    options = options.with("node.name", &format!("push-{n}"));
    for file in ["peer.secrets", "auth.token_keys", "collect.api_keys"] {
        options = options.with(&format!("{file}_file"), &path(&directory.join(file)));
    }
    options
}

/// What the processes of a cluster have in common.
struct Common {
    place: tempfile::TempDir,
    redis: Foreign,
    set: ReplicaSet,
    authority: Authority,
    ca: PathBuf,
}

impl Common {
    async fn start() -> Self {
        let (place, authority) = (tempfile::tempdir().unwrap(), Authority::make());
        let ca = authority.write(place.path());
        let this = Self { redis: redis(&[]).await, set: ReplicaSet::start(1).await, ca, place, authority };
        this.secrets(&[PEER_SECRET]);
        this.token_keys(&[TOKEN_KEYS[0]]);
        this.api_keys(&[API_KEY]);
        this
    }

    fn file(&self, name: &str, text: &str) {
        // Renamed, so that nobody reads half of it.
        let (aside, path) = (self.place.path().join("aside"), self.place.path().join(name));
        std::fs::write(&aside, text).unwrap();
        std::fs::rename(&aside, &path).unwrap();
    }

    fn secrets(&self, all: &[&str]) {
        self.file("peer.secrets", &all.join("\n"));
    }

    fn api_keys(&self, all: &[&str]) {
        self.file("collect.api_keys", &all.join("\n"));
    }

    fn token_keys(&self, all: &[(&str, &str)]) {
        let listed: Vec<Value> = all.iter().map(|(kid, key)| json!({"kid": kid, "key": key})).collect();
        self.file("auth.token_keys", &Value::from(listed).to_string());
    }

    async fn node(&self, n: usize, pair: &Pair) -> Server {
        let redis = format!("redis://127.0.0.1:{}", self.redis.port);
        Server::with(peer(self.place.path(), n, (&redis, &self.set.uri()), &self.ca, pair)).await
    }
}

const TOKEN_KEYS: [(&str, &str); 2] =
    [("2026", "the-first-token-key-of-this-test-0"), ("2027", "the-second-token-key-of-this-test1")];

async fn token(server: &Server, user: &str) -> String {
    let body = json!({"user": user, "ttl_s": 3600});
    let answer = http::post(&server.at("auth"), "/v1/tokens", Some(ADMIN_KEY), &body).await;
    answer.json()["token"].as_str().unwrap().to_owned()
}

/// A user who belongs to this node.
fn user_of(node: &str) -> String {
    let ring = ringpush::ring::Ring::build(["push-0", "push-1"].map(|name| (name, 1.0)));
    let mut users = (0..).map(|n| format!("user-{n}"));
    users.find(|user| ring.owner_of(user) == Some(node)).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn roles_show_one_another_certificates_and_strangers_get_nowhere() {
    let common = Common::start().await;
    let pair = common.authority.sign(&[PEER_NAME]);
    let (first, second) = (common.node(0, &pair).await, common.node(1, &pair).await);
    for server in [&first, &second] {
        eventually("both nodes are members", async || {
            server.metric("ringpush_view_members{state=\"active\"}").await == 2.0
                && http::get(&server.at("ops"), "/readyz", None).await.status == 200
        })
        .await;
    }
    // A message that the first process takes and the second one delivers.
    let user = user_of("push-1");
    let token = token(&first, &user).await;
    let url = format!("ws://{}/v1/ws", second.at("push"));
    let mut socket = Socket::open(&url, Some(&token)).await;
    socket.caught_up().await;
    let body = json!({"to": {"user": user}, "payload": "over mutual TLS"});
    let answer = http::post(&first.at("collect"), "/v1/messages", Some(API_KEY), &body).await;
    assert_eq!(answer.status, 202, "{answer:?}");
    assert_eq!(socket.until("message").await.1["payload"], "over mutual TLS");
    assert_eq!(first.metric("ringpush_view_members{state=\"absent\"}").await, 0.0);
    // Without a certificate; with one of another name; of another authority; in the clear.
    let at = second.at("peer");
    let other_name = common.authority.sign(&["shop.example"]);
    let forged = Authority::make().sign(&[PEER_NAME]);
    for own in [None, Some(&other_name), Some(&forged)] {
        // A client of TLS 1.3 hears of a refused certificate with its first read.
        let refused = match dial(common.authority.client(own, &[&TLS13]), &at, PEER_NAME).await {
            Err(_) => true,
            Ok(mut stream) => {
                let _ = stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
                let mut answer = Vec::new();
                let read = tokio::time::timeout(DEADLINE, stream.read_to_end(&mut answer)).await;
                read.expect("it is closed in time").is_err() && answer.is_empty()
            }
        };
        assert!(refused, "{}", own.is_some());
    }
    assert_eq!(http::get(&at, "/", None).await.status, 400);
    let counted = second.metric("ringpush_credentials_refused_total{kind=\"peer_certificate\"}").await;
    assert!(counted >= 4.0, "{counted}");
    assert!(second.log().contains("certificate"), "{}", second.log());
}

/// A cluster of two processes, and a user whose messages go from the first to the second.
struct Turning {
    common: Common,
    servers: [Server; 2],
    user: String,
    url: String,
    socket: Socket,
    /// What the user and the publisher show.
    bearer: String,
    api_key: &'static str,
    sent: u64,
}

impl Turning {
    async fn start() -> Self {
        let common = Common::start().await;
        let pair = common.authority.sign(&[PEER_NAME]);
        let servers = [common.node(0, &pair).await, common.node(1, &pair).await];
        for server in &servers {
            eventually("both nodes are members", async || {
                server.metric("ringpush_view_members{state=\"active\"}").await == 2.0
                    && http::get(&server.at("ops"), "/readyz", None).await.status == 200
            })
            .await;
        }
        let user = user_of("push-1");
        let bearer = token(&servers[0], &user).await;
        let url = format!("ws://{}/v1/ws", servers[1].at("push"));
        let mut socket = Socket::open(&url, Some(&bearer)).await;
        socket.caught_up().await;
        Self { common, servers, user, url, socket, bearer, api_key: API_KEY, sent: 0 }
    }

    /// A message goes the whole way, a newcomer gets in, and both nodes know one another.
    async fn all_is_well(&mut self) {
        self.sent += 1;
        let body = json!({"to": {"user": self.user}, "payload": self.sent});
        let collect = self.servers[0].at("collect");
        let answer = http::post(&collect, "/v1/messages", Some(self.api_key), &body).await;
        assert_eq!(answer.status, 202, "{answer:?}");
        assert_eq!(self.socket.until("message").await.1["payload"], json!(self.sent));
        Socket::open(&self.url, Some(&self.bearer)).await.caught_up().await;
        // Messages go by a stream that is open; this is a call of its own, with a proof of its own.
        let path = format!("/v1/users/{}", self.user);
        let user = http::get(&collect, &path, Some(self.api_key)).await.json();
        assert_eq!(user["online"], true, "{user}");
        for server in &self.servers {
            assert_eq!(server.metric("ringpush_view_members{state=\"active\"}").await, 2.0);
        }
    }

    /// One server after the other takes what has changed, for the n-th time. It may do so by
    /// itself, before it is told to.
    async fn turned(&mut self, word: &str, times: usize) {
        for n in 0..self.servers.len() {
            let server = &self.servers[n];
            ringpush_testing::signal(server.pid(), "HUP");
            eventually(word, async || server.log().matches(word).count() == times).await;
            self.all_is_well().await;
        }
    }

    async fn refused(&self, kind: &str) -> f64 {
        let name = format!("ringpush_credentials_refused_total{{kind=\"{kind}\"}}");
        self.servers[0].metric(&name).await + self.servers[1].metric(&name).await
    }
}

/// Everything that can be turned is, one after the other, while messages come: nobody is refused,
/// and nothing is lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn secrets_are_turned_on_a_running_cluster_and_nobody_is_refused() {
    const NEW_PEER_SECRET: &str = "another-peer-secret-of-the-tests-0123456789";
    const NEW_API_KEY: &str = "another-api-key-of-the-tests-0123456789abcd";
    let mut cluster = Turning::start().await;
    cluster.all_is_well().await;
    let turns = [&[PEER_SECRET, NEW_PEER_SECRET][..], &[NEW_PEER_SECRET, PEER_SECRET], &[NEW_PEER_SECRET]];
    for (n, all) in turns.into_iter().enumerate() {
        cluster.common.secrets(all);
        cluster.turned("secrets were taken anew key=\"peer.secrets\"", n + 1).await;
    }
    let [old, new] = TOKEN_KEYS;
    for (n, all) in [&[old, new][..], &[new, old], &[new]].into_iter().enumerate() {
        if all.len() == 1 {
            cluster.bearer = token(&cluster.servers[0], &cluster.user).await;
        }
        cluster.common.token_keys(all);
        cluster.turned("secrets were taken anew key=\"auth.token_keys\"", n + 1).await;
    }
    for (n, all) in [&[API_KEY, NEW_API_KEY][..], &[NEW_API_KEY]].into_iter().enumerate() {
        cluster.api_key = if n == 0 { API_KEY } else { NEW_API_KEY };
        cluster.common.api_keys(all);
        cluster.turned("the API keys were taken anew", n + 1).await;
    }
    for n in 0..cluster.servers.len() {
        let own = cluster.common.place.path().join(format!("push-{n}"));
        cluster.common.authority.sign(&[PEER_NAME]).write(&own);
    }
    cluster.turned("the certificate was taken anew", 1).await;
    for kind in ["api_key", "token", "ticket", "peer_proof", "peer_certificate"] {
        assert_eq!(cluster.refused(kind).await, 0.0, "{kind}");
    }
    // What was turned is good for nothing any more.
    let body = json!({"to": {"user": cluster.user}, "payload": 0});
    let answer = http::post(&cluster.servers[0].at("collect"), "/v1/messages", Some(API_KEY), &body).await;
    assert_eq!(answer.status, 401);
    for server in &cluster.servers {
        let log = server.log();
        assert!(!log.contains("has no proof by our peer.secret"), "{log}");
        let secrets = [PEER_SECRET, NEW_PEER_SECRET, API_KEY, NEW_API_KEY, old.1, new.1];
        assert!(secrets.iter().all(|secret| !log.contains(secret)));
    }
}
