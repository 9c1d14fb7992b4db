//! The alerts, their runbooks and the dashboard: by Prometheus itself, on a cluster that is broken.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use ringpush_testing::foreign::{Foreign, ReplicaSet, free_port, redis};
use ringpush_testing::{ADMIN_KEY, API_KEY, Options, Server, Socket, command, eventually, http, root};

fn rules() -> String {
    std::fs::read_to_string(root().join("k8s/chart/files/alerts.yaml")).unwrap()
}

fn dashboard() -> Value {
    let text = std::fs::read_to_string(root().join("k8s/chart/files/dashboard.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// The expressions of the dashboard.
fn shown() -> Vec<String> {
    let all = dashboard()["panels"].as_array().unwrap().clone();
    let targets = all.iter().filter_map(|panel| panel["targets"].as_array()).flatten();
    targets.map(|target| target["expr"].as_str().unwrap().to_owned()).collect()
}

/// The values of a key of the rules.
fn values(key: &str) -> Vec<String> {
    let (key, rules) = (format!("{key}: "), rules());
    let lines = rules.lines().filter_map(|line| line.trim_start_matches([' ', '-']).strip_prefix(&key));
    lines.map(str::to_owned).collect()
}

fn promtool(directory: &Path, words: &[&str]) {
    let output = Command::new("promtool").args(words).current_dir(directory).output();
    let output = output.expect("promtool is of Debian's package prometheus, which scripts/test installs");
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "promtool {words:?}: {said}");
}

#[test]
fn each_alert_fires_and_does_not_and_has_a_runbook() {
    let place = tempfile::tempdir().unwrap();
    let tests = std::fs::read_to_string(root().join("tests/alerts.yaml")).unwrap();
    promtool(&root(), &["check", "rules", "k8s/chart/files/alerts.yaml"]);
    promtool(&root(), &["test", "rules", "tests/alerts.yaml"]);
    let (alerts, runbooks) = (values("alert"), values("runbook_url"));
    assert!(alerts.len() >= 12 && runbooks.len() == alerts.len(), "{alerts:?}");
    for (alert, runbook) in alerts.iter().zip(&runbooks) {
        for outcome in ["fires", "does not fire"] {
            assert!(tests.contains(&format!("name: {alert} {outcome}\n")), "{alert} {outcome}");
        }
        let text = std::fs::read_to_string(root().join(runbook)).unwrap_or_else(|e| panic!("{runbook}: {e}"));
        for part in ["## What it means", "## What to look at", "## What to do"] {
            assert!(text.contains(part), "{runbook} does not say {part}");
        }
        let slo = std::fs::read_to_string(root().join("docs/slo.md")).unwrap();
        assert!(slo.contains(&format!("`{alert}`")), "docs/slo.md does not name {alert}");
    }
    // The expressions of the dashboard are ones of Prometheus, too.
    let recorded: String = shown()
        .iter()
        .enumerate()
        .map(|(n, expr)| format!("  - {{record: 'dashboard:{n}', expr: '{expr}'}}\n"))
        .collect();
    std::fs::write(
        place.path().join("shown.yaml"),
        format!("groups:\n- name: dashboard\n  rules:\n{recorded}"),
    )
    .unwrap();
    promtool(place.path(), &["check", "rules", "shown.yaml"]);
}

/// A cluster of four processes, one for each role.
struct Roles {
    redis: Foreign,
    set: ReplicaSet,
    auth: Server,
    push: Server,
    dispatch: Server,
    collect: Server,
}

impl Roles {
    async fn start() -> Self {
        let (redis, set) = (redis(&[]).await, ReplicaSet::start(1).await);
        let options = |role: &str| options(&redis, &set, role);
        let auth = Server::with(options("auth")).await;
        let remote = |options: Options| remote(options, &auth);
        let push = Server::with(remote(options("push"))).await;
        let dispatch = Server::with(remote(options("dispatch"))).await;
        let collect = Server::with(options("collect")).await;
        for server in [&push, &dispatch, &collect] {
            eventually("all have found one another", async || {
                let log = server.log();
                log.contains("members=1 routers=1") || log.contains("members=1 routers=2")
            })
            .await;
        }
        Self { redis, set, auth, push, dispatch, collect }
    }

    async fn token(&self, user: &str) -> String {
        let body = json!({"user": user, "ttl_s": 3600});
        let answer = http::post(&self.auth.at("auth"), "/v1/tokens", Some(ADMIN_KEY), &body).await;
        answer.json()["token"].as_str().unwrap().to_owned()
    }

    async fn open(&self, token: &str) -> Result<Socket, u16> {
        Socket::try_open(&format!("ws://{}/v1/ws", self.push.at("push")), Some(token), &[]).await
    }

    async fn publish(&self, user: &str) {
        let body = json!({"to": {"user": user}, "payload": 1});
        let answer = http::post(&self.collect.at("collect"), "/v1/messages", Some(API_KEY), &body).await;
        assert_eq!(answer.status, 202, "{answer:?}");
    }
}

fn options(redis: &Foreign, set: &ReplicaSet, role: &str) -> Options {
    let mut options = Options::registered_in(&format!("redis://127.0.0.1:{}", redis.port));
    options.environment.retain(|(name, _)| name != "RINGPUSH_NODE__NAME");
    options
        .with("mongo.uri", &set.uri())
        .with("node.roles", role)
        .with("node.name", &format!("{role}-0"))
        .with("limits.sweep_ms", "500")
}

fn options_without(mut options: Options, key: &str) -> Options {
    options.environment.retain(|(name, _)| !name.ends_with(key));
    options
}

fn remote(options: Options, auth: &Server) -> Options {
    options.with("auth.mode", "remote").with("auth.url", &format!("http://{}", auth.at("auth")))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_rules_and_dashboard_name_is_measured_by_a_running_cluster() {
    let cluster = Roles::start().await;
    let token = cluster.token("alice").await;
    let mut alice = cluster.open(&token).await.unwrap();
    cluster.publish("alice").await;
    alice.until("message").await;
    // Reasons and keys are shown from the first time on.
    assert_eq!(cluster.open("bad").await.err(), Some(401));
    let mut measured = BTreeSet::new();
    for server in [&cluster.auth, &cluster.push, &cluster.dispatch, &cluster.collect] {
        let text = http::get(&server.at("ops"), "/metrics", None).await.body;
        let text = String::from_utf8(text).unwrap();
        let names = text.lines().filter(|line| !line.starts_with('#'));
        measured.extend(names.map(|line| line.split(['{', ' ']).next().unwrap().to_owned()));
    }
    // Those of the canary: tests/it/canary.rs sees them.
    for name in ["audits_total", "passed_timestamp_seconds"] {
        measured.insert(format!("ringpush_canary_{name}"));
    }
    // Only with a certificate: tests/it/secure.rs sees it.
    measured.insert("ringpush_certificate_expiry_timestamp_seconds".to_owned());
    let expressions = rules() + &shown().join("\n");
    let mut named = BTreeSet::new();
    for word in expressions.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':')) {
        if word.starts_with("ringpush_") {
            named.insert(word);
        }
    }
    assert!(named.len() > 20, "{named:?}");
    for name in named {
        assert!(measured.contains(name), "{name} is not in /metrics: {measured:?}");
    }
}

/// Prometheus with these rules, which looks at these servers every second. What an alert waits for
/// is left out: a test has no minutes.
async fn prometheus(directory: &Path, targets: &[String]) -> Foreign {
    let rules: String = rules()
        .lines()
        .map(|line| match line.trim_start().strip_prefix("for: ") {
            Some(_) => format!("{}for: 0s\n", &line[..line.len() - line.trim_start().len()]),
            None => format!("{line}\n"),
        })
        .collect();
    std::fs::write(directory.join("rules.yaml"), rules).unwrap();
    let config = json!({
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": ["rules.yaml"],
        "scrape_configs": [{"job_name": "ringpush", "static_configs": [{"targets": targets}]}],
    });
    // YAML takes JSON.
    std::fs::write(directory.join("prometheus.yml"), config.to_string()).unwrap();
    let config = format!("--config.file={}", directory.join("prometheus.yml").display());
    let listen = "--web.listen-address=127.0.0.1:{port}";
    Foreign::start(&["prometheus", &config, listen, "--storage.tsdb.path={dir}/data"]).await
}

async fn fires(prometheus: &Foreign, alert: &str) -> bool {
    let at = format!("127.0.0.1:{}", prometheus.port);
    let answer = http::get(&at, "/api/v1/alerts", None).await;
    if answer.status == 503 {
        // It is starting.
        return false;
    }
    let alerts = answer.json();
    let all = alerts["data"]["alerts"].as_array().cloned().unwrap_or_default();
    all.iter().any(|one| one["labels"]["alertname"] == alert && one["state"] == "firing")
}

/// A process that never becomes ready; killed when it is dropped.
struct Killed(std::process::Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Three of them, and what their runbooks say.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_that_is_broken_is_told_and_the_runbook_mends_it() {
    let mut cluster = Roles::start().await;
    // A node whose peer.advertise leads nowhere.
    let lost = remote(options(&cluster.redis, &cluster.set, "push"), &cluster.auth);
    let lost = lost.with("node.name", "push-1").with("peer.advertise", "127.0.0.1:9");
    let (place, ops) = (tempfile::tempdir().unwrap(), format!("127.0.0.1:{}", free_port()));
    let cut_off = Killed(command(place.path(), &lost.clone().with("ops.listen", &ops)).spawn().unwrap());
    let servers = [&cluster.push, &cluster.dispatch, &cluster.collect];
    let targets: Vec<String> = servers.map(|server| server.at("ops")).into_iter().chain([ops]).collect();
    let prometheus = prometheus(place.path(), &targets).await;
    eventually("the node that is cut off is told", async || fires(&prometheus, "RingpushNodeCutOff").await)
        .await;
    assert!(
        !fires(&prometheus, "RingpushHintsLost").await
            && !fires(&prometheus, "RingpushAuthUnavailable").await
    );
    // Hints are dropped: no dispatch runs.
    let (alice, bob) = (cluster.token("alice").await, cluster.token("bob").await);
    let mut socket = cluster.open(&alice).await.unwrap();
    socket.caught_up().await;
    cluster.dispatch.kill();
    eventually("lost hints are told", async || {
        cluster.publish("alice").await;
        socket.until("message").await;
        fires(&prometheus, "RingpushHintsLost").await
    })
    .await;
    // Auth is away.
    cluster.auth.kill();
    eventually("auth that is away is told", async || {
        assert!(cluster.open(&bob).await.err().is_some_and(|status| status == 503));
        fires(&prometheus, "RingpushAuthUnavailable").await
    })
    .await;
    // What the runbooks say: start auth, start dispatch, set peer.advertise to an address that is
    // one.
    cluster.auth = cluster.auth.kill_and_restart().await;
    let again = cluster.dispatch.kill_and_restart().await;
    drop(cut_off);
    let mended = Server::with(options_without(lost, "PEER__ADVERTISE")).await;
    eventually("the node takes users", async || {
        http::get(&mended.at("ops"), "/readyz", None).await.status == 200
    })
    .await;
    eventually("auth answers again", async || {
        Socket::try_open(&format!("ws://{}/v1/ws", cluster.push.at("push")), Some(&bob), &[]).await.is_ok()
    })
    .await;
    eventually("messages come live again", async || {
        let live = "ringpush_delivery_seconds_count{path=\"live\"}";
        let before = cluster.push.metric(live).await;
        let body = json!({"to": {"user": "alice"}, "payload": 2});
        let answer = http::post(&cluster.collect.at("collect"), "/v1/messages", Some(API_KEY), &body).await;
        assert_eq!(answer.status, 202);
        socket.until("message").await;
        cluster.push.metric(live).await > before
    })
    .await;
    drop(again);
}
