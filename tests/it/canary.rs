//! `ringpush audit`: ended before its time, and again and again as a canary.

use std::io::{BufRead, BufReader, Lines, Read};
use std::process::{Child, ChildStderr, Command, Stdio};

use serde_json::Value;

use ringpush_testing::{Server, clean, eventually, http, program, signal};

/// A running audit, killed when it is dropped.
struct Audit {
    child: Child,
    said: Lines<BufReader<ChildStderr>>,
}

impl Drop for Audit {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Audit {
    fn start(server: &Server, words: &[&str]) -> Self {
        let mut command = Command::new(program());
        clean(&mut command);
        command.arg("audit").args(words).arg("--data").arg(server.directory.path());
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let said = BufReader::new(child.stderr.take().unwrap()).lines();
        Self { child, said }
    }

    /// Waits for a line with this in it.
    fn says(&mut self, what: &str) -> String {
        self.said.by_ref().map(Result::unwrap).find(|line| line.contains(what)).expect(what)
    }

    /// Its exit status and what it printed, after SIGINT.
    fn ends(&mut self) -> (i32, String) {
        signal(self.child.id(), "INT");
        let mut text = String::new();
        self.child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
        (self.child.wait().unwrap().code().unwrap(), text)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_audit_that_is_interrupted_accounts_for_what_was_accepted() {
    let server = Server::start().await;
    let words = ["--json", "--users", "5", "--rate", "50", "--for", "10m", "--topics", "2", "--members", "3"];
    let mut audit = Audit::start(&server, &words);
    audit.says("5 users connected");
    eventually("it publishes", async || {
        server.metric("ringpush_publish_seconds_count{outcome=\"accepted\"}").await > 20.0
    })
    .await;
    let (code, text) = audit.ends();
    assert_eq!(code, 0, "{text}");
    let report: Value = serde_json::from_str(&text).unwrap();
    assert!(report["accepted"].as_u64().unwrap() > 10, "{report}");
    assert_eq!(report["accepted"], report["delivered_once"], "{report}");
    assert_eq!(report["topics"]["lost"], 0, "{report}");
    server.nobody_is_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_canary_shows_what_its_audits_saw_and_leaves_nothing() {
    let mut server = Server::start().await;
    let words = ["--users", "2", "--rate", "20", "--for", "1s", "--every", "2s", "--metrics", "127.0.0.1:0"];
    let mut canary = Audit::start(&server, &words);
    let at = canary.says("/metrics").split("http://").nth(1).unwrap().replace("/metrics", "");
    let value = async |name: &str| {
        let text = String::from_utf8(http::get(&at, "/metrics", None).await.body).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')).unwrap_or("-1");
        line.parse::<f64>().unwrap()
    };
    // What has not happened is shown as 0.
    assert_eq!(value("ringpush_canary_audits_total{outcome=\"broken\"}").await, 0.0);
    eventually("two audits have passed", async || {
        value("ringpush_canary_audits_total{outcome=\"passed\"}").await == 2.0
    })
    .await;
    // Between two audits: a cluster that is away is counted, and ends nothing.
    server.kill();
    assert!(value("ringpush_canary_messages_total{fate=\"delivered_once\"}").await >= 40.0);
    assert_eq!(value("ringpush_canary_messages_total{fate=\"lost\"}").await, 0.0);
    assert!(value("ringpush_canary_delay_seconds{quantile=\"0.5\"}").await > 0.0);
    assert!(value("ringpush_canary_passed_timestamp_seconds").await > 1.7e9);
    assert_eq!(http::get(&at, "/livez", None).await.status, 200);
    eventually("an audit has failed", async || {
        value("ringpush_canary_audits_total{outcome=\"failed\"}").await >= 1.0
    })
    .await;
    let server = server.kill_and_restart().await;
    eventually("audits pass again", async || {
        value("ringpush_canary_audits_total{outcome=\"passed\"}").await > 2.0
    })
    .await;
    assert_eq!(canary.ends().0, 0);
    server.nobody_is_left().await;
    // The same two users in every audit, forgotten in the end: of each a head record is left.
    let log = server.log();
    let acts = log.lines().filter(|line| line.contains("\"act\":\"forget_user\""));
    assert_eq!(acts.count(), 2, "{log}");
}

/// As in a pod, whose disk may not be written.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_audit_that_is_given_its_keys_writes_nothing() {
    let server = Server::start().await;
    let nowhere = tempfile::tempdir().unwrap();
    let mut command = Command::new(program());
    clean(&mut command);
    command.args(["audit", "--users", "2", "--rate", "10", "--for", "1s"]).current_dir(nowhere.path());
    command.arg(format!("--target=http://{}", server.at("push")));
    command.arg(format!("--publish=http://{}", server.at("collect")));
    command.env("RINGPUSH_AUTH__TOKEN_KEY", server.key("token_key"));
    command.env("RINGPUSH_COLLECT__API_KEYS", server.key("api_key"));
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(std::fs::read_dir(nowhere.path()).unwrap().count(), 0);
}
