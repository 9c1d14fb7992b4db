//! A whole cluster by `scripts/cluster`, and the audit that runs against it.

use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::{Mutex, MutexGuard};

use super::{http, program, root};

/// One cluster at a time: two of them on two cores would measure each other.
static TURN: Mutex<()> = Mutex::const_new(());

pub struct Cluster {
    directory: tempfile::TempDir,
    pub state: Value,
    _turn: MutexGuard<'static, ()>,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let kept = std::env::temp_dir().join("ringpush-failed-cluster");
            let _ = std::process::Command::new("rm").arg("-rf").arg(&kept).status();
            let _ = std::process::Command::new("cp").arg("-r").arg(self.directory.path()).arg(&kept).status();
            eprintln!("--- the logs of the cluster are kept in {}", kept.display());
        }
        let _ = std::process::Command::new(script())
            .arg("down")
            .env("CLUSTER_DIR", self.directory.path().join("cluster"))
            .status();
    }
}

fn script() -> PathBuf {
    root().join("scripts/cluster")
}

impl Cluster {
    pub async fn up(options: &[&str]) -> Self {
        let turn = TURN.lock().await;
        let mut this = Self { directory: tempfile::tempdir().unwrap(), state: Value::Null, _turn: turn };
        let up = ["up", "--free-ports", "--quiet", "--program", program()];
        this.run(&[&up, options].concat()).await;
        this
    }

    /// The script, and the directory that its `CLUSTER_DIR` is to be.
    pub fn script(&self) -> PathBuf {
        script()
    }

    pub fn directory(&self) -> PathBuf {
        self.directory.path().join("cluster")
    }

    /// One command of the script; the state is read again.
    pub async fn run(&mut self, words: &[&str]) {
        let at = self.directory();
        let output = Command::new(script()).args(words).env("CLUSTER_DIR", &at).output().await.unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "scripts/cluster {words:?}: {said}");
        let output =
            Command::new(script()).args(["status", "--json"]).env("CLUSTER_DIR", &at).output().await.unwrap();
        self.state = serde_json::from_slice(&output.stdout).unwrap();
    }

    pub fn balancer(&self) -> String {
        format!("127.0.0.1:{}", self.state["ports"]["nginx"])
    }

    pub fn redis_port(&self) -> u16 {
        self.state["ports"]["redis"].as_u64().unwrap() as u16
    }

    pub fn mongo_ports(&self) -> Vec<u16> {
        self.state["ports"]["mongo"]
            .as_array()
            .unwrap()
            .iter()
            .map(|port| port.as_u64().unwrap() as u16)
            .collect()
    }

    /// One command of the script, to be run beside something else; the state is not read again.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(script());
        command.args(words).env("CLUSTER_DIR", self.directory());
        command
    }

    /// `host:port` of a process's listener: `at` for its role's, `ops` for health and metrics.
    pub fn address(&self, name: &str, which: &str) -> String {
        self.state["processes"][name][which].as_str().unwrap().trim_start_matches("http://").to_owned()
    }

    /// What a process has logged.
    pub fn log(&self, name: &str) -> String {
        std::fs::read_to_string(self.directory.path().join("cluster").join(name).join("log")).unwrap()
    }

    pub fn key(&self, name: &str) -> &str {
        self.state["keys"][name].as_str().unwrap()
    }

    /// The push nodes that run.
    pub fn pushes(&self) -> Vec<String> {
        let processes = self.state["processes"].as_object().unwrap();
        let runs =
            |(name, process): &(&String, &Value)| name.starts_with("push-") && process["alive"] == true;
        processes.iter().filter(runs).map(|(name, _)| name.clone()).collect()
    }

    pub async fn metric(&self, process: &str, name: &str) -> f64 {
        let answer = http::get(&self.address(process, "ops"), "/metrics", None).await;
        let text = String::from_utf8(answer.body).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("{name} ")));
        line.unwrap_or_else(|| panic!("{process} has no {name}")).parse().unwrap()
    }

    pub async fn readiness(&self, process: &str) -> (u16, Value) {
        let answer = http::get(&self.address(process, "ops"), "/readyz", None).await;
        (answer.status, answer.json())
    }

    pub async fn view(&self) -> Value {
        http::get(&self.address("collect-0", "at"), "/v1/cluster", Some(self.key("api"))).await.json()
    }

    pub async fn token(&self, user: &str) -> String {
        let body = serde_json::json!({"user": user, "ttl_s": 3600});
        let answer =
            http::post(&self.address("auth-0", "at"), "/v1/tokens", Some(self.key("admin")), &body).await;
        answer.json()["token"].as_str().unwrap().to_owned()
    }

    pub async fn publish(&self, user: &str, payload: Value) -> u64 {
        let body = serde_json::json!({"to": {"user": user}, "payload": payload});
        let at = self.address("collect-0", "at");
        let answer = http::post(&at, "/v1/messages", Some(self.key("api")), &body).await;
        assert_eq!(answer.status, 202, "{answer:?}");
        answer.json()["accepted"][0]["seq"].as_u64().unwrap()
    }

    /// The environment in which the program's commands speak to this cluster.
    pub fn environment(&self) -> Vec<(String, String)> {
        let all = self.state["environment"].as_object().unwrap();
        all.iter().map(|(name, value)| (name.clone(), value.as_str().unwrap().to_owned())).collect()
    }

    /// Starts an audit, and returns when all its users are connected and it publishes.
    pub async fn audit(&self, options: &[&str]) -> Audit {
        self.audit_at(&self.balancer(), options).await
    }

    /// The same, with clients that ask at this address where to go.
    pub async fn audit_at(&self, address: &str, options: &[&str]) -> Audit {
        let publish =
            format!("http://{},http://{}", self.address("collect-0", "at"), self.address("collect-1", "at"));
        let target = format!("http://{address}");
        let mut command = Command::new(program());
        command.args(["audit", "--json", "--target", &target, "--publish", &publish]).args(options);
        command.env_clear().envs(self.environment()).stdin(Stdio::null());
        // For the audits whose clients are a library in another language.
        command.env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.env("RINGPUSH_WS", super::tool("node_modules").parent().unwrap());
        let mut child =
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
        let mut said = BufReader::new(child.stderr.take().unwrap()).lines();
        let first = said.next_line().await.unwrap();
        let first = first.expect("the audit says that it is connected");
        assert!(first.contains("connected"), "{first}");
        eprintln!("{first}");
        let later = Arc::new(parking_lot::Mutex::new(String::new()));
        let kept = Arc::clone(&later);
        tokio::spawn(async move {
            while let Ok(Some(line)) = said.next_line().await {
                kept.lock().push_str(&format!("{line}\n"));
            }
        });
        Audit { child, said: later }
    }

    /// After an audit: every gauge is back, and nothing is left in Redis.
    pub async fn nothing_is_left(&self) {
        super::eventually("every session has ended", async || {
            let mut left = 0.0;
            for node in self.pushes() {
                left += self.metric(&node, "ringpush_sessions").await;
                left += self.metric(&node, "ringpush_connections").await;
            }
            left == 0.0
        })
        .await;
        super::eventually("no fallback entry is left", async || {
            super::foreign::redis_cli(self.redis_port(), &["--scan", "--pattern", "*fallback*"]).is_empty()
        })
        .await;
    }
}

pub struct Audit {
    child: Child,
    said: Arc<parking_lot::Mutex<String>>,
}

impl Audit {
    /// Ends the load before its time, and waits for the report as [`Audit::passes`] does: for what
    /// happens while an audit runs, and takes as long as it takes.
    pub async fn ends_and_passes(self) -> Value {
        super::signal(self.child.id().expect("it runs until it is told to end"), "INT");
        self.passes().await
    }

    /// Waits for the end; the report, which must say that nothing was lost, repeated, late or out
    /// of order.
    pub async fn passes(mut self) -> Value {
        let mut text = String::new();
        self.child.stdout.take().unwrap().read_to_string(&mut text).await.unwrap();
        let status = self.child.wait().await.unwrap();
        eprintln!("{text}");
        assert!(status.success(), "the audit failed: {text}\n{}", self.said.lock());
        let report: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(report["accepted"], report["delivered_once"], "{text}");
        assert_eq!(report["refused"], serde_json::json!({}), "{text}");
        if !report["topics"].is_null() {
            assert!(report["topics"]["delivered_once"].as_u64().unwrap() > 500, "{text}");
        }
        report
    }
}
