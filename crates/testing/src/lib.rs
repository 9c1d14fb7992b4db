//! Starts servers and foreign systems, and speaks to them as strangers would. For tests only.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stderr,
    clippy::disallowed_methods,
    missing_docs,
    unreachable_pub
)]

pub mod certificates;
pub mod cluster;
pub mod examples;
pub mod foreign;
pub mod http;
pub mod socket;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

pub use socket::Socket;

/// How long anything may take before a test gives up on it: long, for the machine may be busy.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// The program under test: Cargo puts it above the directory of the test binaries.
pub fn program() -> &'static str {
    static PROGRAM: OnceLock<String> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let tests = std::env::current_exe().unwrap();
        let program = tests.ancestors().nth(2).unwrap().join("ringpush");
        assert!(program.exists(), "{} is missing: cargo build", program.display());
        program.into_os_string().into_string().unwrap()
    })
}

/// The root of the repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Keys of servers that are not in development.
pub const API_KEY: &str = "api-key-of-the-tests-0123456789abcdef";
pub const ADMIN_KEY: &str = "admin-key-of-the-tests-0123456789abcdef";
pub const PEER_SECRET: &str = "peer-secret-of-the-tests-0123456789abcdef";

/// How a server is started.
#[derive(Default, Clone)]
pub struct Options {
    pub push_nodes: Option<usize>,
    /// A configuration file.
    pub config: Option<PathBuf>,
    pub environment: Vec<(String, String)>,
    /// Put before the program: `strace …`, `unshare …`.
    pub wrapper: Vec<String>,
}

impl Options {
    pub fn with(mut self, key: &str, value: &str) -> Self {
        let name = format!("RINGPUSH_{}", key.to_uppercase().replace('.', "__"));
        self.environment.push((name, value.to_owned()));
        self
    }

    /// All that must be configured where there is a registry; the inbox stays the embedded one.
    pub fn registered_in(redis_url: &str) -> Self {
        Self::default()
            .with("redis.url", redis_url)
            .with("node.name", "push-0")
            .with("push.public_url", "ws://127.0.0.1/n/{node}/v1/ws")
            .with("peer.listen", "127.0.0.1:0")
            .with("peer.secret", PEER_SECRET)
            .with("auth.token_key", "0123456789abcdef0123456789abcdef")
            .with("auth.admin_key", ADMIN_KEY)
            .with("collect.api_keys", API_KEY)
    }

    pub fn nodes(count: usize) -> Self {
        Self { push_nodes: Some(count), ..Self::default() }
    }
}

/// A running server; killed when it is dropped.
pub struct Server {
    pub directory: std::sync::Arc<tempfile::TempDir>,
    options: Options,
    child: Child,
    listening: Value,
    keys: toml::Table,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill_wrapped();
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- the server said:\n{}", self.log());
        }
    }
}

impl Server {
    pub async fn start() -> Self {
        Self::with(Options::default()).await
    }

    pub async fn with(options: Options) -> Self {
        Self::on(std::sync::Arc::new(tempfile::tempdir().unwrap()), options).await
    }

    /// On a directory that may have been used before.
    pub async fn on(directory: std::sync::Arc<tempfile::TempDir>, options: Options) -> Self {
        let command = command(directory.path(), &options);
        Self::from(directory, options, command).await
    }

    /// By a command that serves on the directory.
    pub async fn from(
        directory: std::sync::Arc<tempfile::TempDir>,
        options: Options,
        mut command: Command,
    ) -> Self {
        let data = directory.path().to_owned();
        // What a killed process left would be taken for this one's, until this one has the store's
        // lock.
        let _ = std::fs::remove_file(data.join("listen.json"));
        let mut child = command.spawn().expect("the program starts");
        let began = Instant::now();
        let listening = loop {
            if let Ok(text) = std::fs::read(data.join("listen.json")) {
                break serde_json::from_slice(&text).unwrap();
            }
            let ended = child.try_wait().unwrap();
            let late = began.elapsed() > DEADLINE;
            if ended.is_some() || late {
                let log = std::fs::read_to_string(data.join("log")).unwrap_or_default();
                panic!("the server did not start ({ended:?}):\n{log}");
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        // Made in development alone; elsewhere whoever starts it knows them.
        let keys = std::fs::read_to_string(data.join("dev-keys.toml")).unwrap_or_default().parse().unwrap();
        Self { directory, options, child, listening, keys }
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn key(&self, name: &str) -> String {
        let variable = format!("__{}", name.to_uppercase());
        let given =
            self.options.environment.iter().find(|(key, _)| key.trim_end_matches('S').ends_with(&variable));
        match given {
            Some((_, value)) => value.clone(),
            None => self.keys[name].as_str().unwrap().to_owned(),
        }
    }

    /// The address of a role; of push, the first node.
    pub fn at(&self, role: &str) -> String {
        let at = &self.listening[role];
        at.as_str().or_else(|| at[0].as_str()).unwrap().to_owned()
    }

    /// The address of the n-th push node.
    pub fn push(&self, n: usize) -> String {
        self.listening["push"][n].as_str().unwrap().to_owned()
    }

    /// Killed without a word, and started again on the same directory and ports.
    pub async fn kill_and_restart(mut self) -> Self {
        self.kill();
        let options = self.pinned();
        Self::on(std::sync::Arc::clone(&self.directory), options).await
    }

    /// The options that give the next process the same addresses.
    pub fn pinned(&self) -> Options {
        let mut options = self.options.clone();
        let roles = ["push", "collect", "auth", "dispatch", "ops"];
        for role in roles.into_iter().filter(|role| !self.listening[role].is_null()) {
            options = options.with(&format!("{role}.listen"), &self.at(role));
        }
        options
    }

    /// A wrapper that waits for the program, as faketime does, would leave it behind.
    fn kill_wrapped(&self) {
        if !self.options.wrapper.is_empty() {
            let _ = Command::new("pkill").args(["-KILL", "-P", &self.pid().to_string()]).status();
        }
    }

    pub fn kill(&mut self) {
        self.kill_wrapped();
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGTERM, and the exit code that came of it.
    pub async fn terminate(&mut self) -> i32 {
        signal(self.child.id(), "TERM");
        self.ended().await
    }

    /// Waits until it ends by itself.
    pub async fn ended(&mut self) -> i32 {
        let began = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code().unwrap_or(-1);
            }
            assert!(began.elapsed() < DEADLINE, "it did not end");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub async fn token(&self, user: &str) -> String {
        self.token_for(user, 3600).await
    }

    pub async fn token_for(&self, user: &str, ttl_s: u64) -> String {
        let body = json!({"user": user, "ttl_s": ttl_s});
        let answer = http::post(&self.at("auth"), "/v1/tokens", Some(&self.key("admin_key")), &body).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.json()["token"].as_str().unwrap().to_owned()
    }

    /// Publishes one payload; its seq.
    pub async fn publish(&self, user: &str, payload: Value) -> u64 {
        let answer = self.try_publish(&json!({"to": {"user": user}, "payload": payload})).await;
        assert_eq!(answer.status, 202, "{answer:?}");
        answer.json()["accepted"][0]["seq"].as_u64().unwrap()
    }

    /// Publishes to a server whose key was configured.
    pub async fn publish_as(&self, user: &str, key: &str) {
        let body = json!({"to": {"user": user}, "payload": 1});
        let answer = http::post(&self.at("collect"), "/v1/messages", Some(key), &body).await;
        assert_eq!(answer.status, 202, "{answer:?}");
    }

    pub async fn try_publish(&self, body: &Value) -> http::Answer {
        http::post(&self.at("collect"), "/v1/messages", Some(&self.key("api_key")), body).await
    }

    /// Publishes the payloads in one batch; the seqs.
    pub async fn publish_all(&self, user: &str, payloads: impl IntoIterator<Item = Value>) -> Vec<u64> {
        let messages: Vec<Value> =
            payloads.into_iter().map(|payload| json!({"to": {"user": user}, "payload": payload})).collect();
        let body = json!({ "messages": messages });
        let answer =
            http::post(&self.at("collect"), "/v1/messages/batch", Some(&self.key("api_key")), &body).await;
        assert_eq!(answer.status, 202, "{answer:?}");
        let results = answer.json()["results"].as_array().unwrap().clone();
        results.iter().map(|result| result["accepted"][0]["seq"].as_u64().unwrap()).collect()
    }

    /// Sends JSON to collect.
    pub async fn put(&self, path: &str, body: &Value) -> http::Answer {
        self.send("PUT", path, body).await
    }

    /// Sends JSON to collect, by any method.
    pub async fn send(&self, method: &str, path: &str, body: &Value) -> http::Answer {
        let headers = [("content-type", "application/json")];
        let body = if body.is_null() { String::new() } else { body.to_string() };
        http::request(
            &self.at("collect"),
            method,
            path,
            Some(&self.key("api_key")),
            &headers,
            body.as_bytes(),
        )
        .await
    }

    pub async fn get(&self, path: &str) -> http::Answer {
        http::get(&self.at("collect"), path, Some(&self.key("api_key"))).await
    }

    /// Connects as `user`, with a token in the request, to the first push node.
    pub async fn connect(&self, user: &str, query: &str) -> Socket {
        let token = self.token(user).await;
        Socket::open(&format!("ws://{}/v1/ws{query}", self.at("push")), Some(&token)).await
    }

    /// A counter or gauge of `/metrics`.
    pub async fn metric(&self, name: &str) -> f64 {
        let answer = http::get(&self.at("ops"), "/metrics", None).await;
        let text = String::from_utf8(answer.body).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("{name} ")));
        line.unwrap_or_else(|| panic!("{name} is not among the metrics:\n{text}")).parse().unwrap()
    }

    /// Waits until no session and no connection task is left.
    pub async fn nobody_is_left(&self) {
        let began = Instant::now();
        loop {
            let left = self.metric("ringpush_sessions").await + self.metric("ringpush_connections").await;
            if left == 0.0 {
                return;
            }
            assert!(began.elapsed() < DEADLINE, "{left} sessions and connections are left");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// A command that serves on `data`, each listener on a port of its own.
pub fn command(data: &Path, options: &Options) -> Command {
    let mut words = options.wrapper.clone();
    words.push(program().to_owned());
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]).arg("serve").arg("--data").arg(data);
    if let Some(config) = &options.config {
        command.arg("--config").arg(config);
    }
    if let Some(count) = options.push_nodes {
        command.args(["--push-nodes", &count.to_string()]);
    }
    clean(&mut command);
    for role in ["PUSH", "COLLECT", "AUTH", "DISPATCH", "OPS"] {
        command.env(format!("RINGPUSH_{role}__LISTEN"), "127.0.0.1:0");
    }
    command.env("RUST_LOG", "ringpush=debug");
    command.envs(options.environment.iter().cloned());
    let log = File::options().create(true).append(true).open(data.join("log")).unwrap();
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    command
}

/// Nothing of the tester's own environment may reach the program.
pub fn clean(command: &mut Command) {
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("RINGPUSH_") || name == "POD_NAME")
    {
        command.env_remove(name);
    }
}

pub fn signal(pid: u32, name: &str) {
    let status = Command::new("kill").arg(format!("-{name}")).arg(pid.to_string()).status().unwrap();
    assert!(status.success());
}

/// Waits for a condition that nothing announces.
pub async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let began = Instant::now();
    while !holds().await {
        assert!(began.elapsed() < DEADLINE, "{what} did not come about");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Something that `scripts/test` installs; a test that needs it fails where it is missing.
pub fn tool(name: &str) -> PathBuf {
    let path = root().join("target/tools").join(name);
    assert!(path.exists(), "{} is missing: run scripts/test, which installs it", path.display());
    path
}
