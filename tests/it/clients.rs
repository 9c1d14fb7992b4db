//! Clients in other languages, as a user would write them from the README, and the page in a real
//! browser.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use serde_json::json;

use ringpush_testing::cluster::Cluster;
use ringpush_testing::{Options, Server, eventually, program, tool};

/// A client program that prints `ready`, then a line per message: its payload.
struct Program {
    child: Child,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Program {
    fn start(command: &mut Command) -> Self {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, lines }
    }

    fn line(&mut self) -> String {
        self.lines.next().expect("the client goes on").unwrap()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn receives_acks_and_resumes(script: &str, interpreter: std::path::PathBuf, modules: Option<&str>) {
    let server = Server::with(Options::default().with("limits.reconnect_jitter_ms", "100")).await;
    let mut server = server.kill_and_restart().await;
    let path = format!("{}/examples/{script}", env!("CARGO_MANIFEST_DIR"));
    let token = server.token("alice").await;
    let url = format!("ws://{}/v1/ws", server.at("push"));
    let mut command = Command::new(interpreter);
    command.arg(path).env("RINGPUSH_URL", &url).env("RINGPUSH_TOKEN", token);
    if let Some(modules) = modules {
        command.env("NODE_PATH", modules);
    }
    server.publish("alice", json!("before")).await;
    let mut program = Program::start(&mut command);
    assert_eq!(program.line(), "\"before\"");
    server.publish_all("alice", (0..50).map(|n| json!(n))).await;
    for n in 0..50 {
        assert_eq!(program.line(), n.to_string());
    }
    server = server.kill_and_restart().await;
    let seqs = server.publish_all("alice", (50..100).map(|n| json!(n))).await;
    for n in 50..100 {
        assert_eq!(program.line(), n.to_string(), "resumed where it was");
    }
    eventually("its acks", async || {
        server.get("/v1/users/alice").await.json()["devices"][0]["acked"] == seqs[49]
    })
    .await;
}

/// A host that vanishes closes nothing: that no ping comes is all that tells.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_hears_nothing_for_a_ping_and_five_seconds_comes_back() {
    let server = Server::with(Options::default().with("limits.ping_ms", "4000")).await;
    let mut listening = Command::new(program());
    ringpush_testing::clean(&mut listening);
    listening.args(["listen", "alice", "--data"]).arg(server.directory.path());
    let mut listening = listening.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(listening.stderr.take().unwrap()).lines();
    let mut until = |word: &str| while !said.next().expect("it goes on").unwrap().contains(word) {};
    until("caught up");
    ringpush_testing::signal(server.pid(), "STOP");
    let began = std::time::Instant::now();
    until("next try");
    let silent = began.elapsed();
    ringpush_testing::signal(server.pid(), "CONT");
    // The last thing heard may be as old as a ping; twice a ping would be 13 s.
    assert!((5.0..11.0).contains(&silent.as_secs_f64()), "{silent:?}");
    until("connected");
    listening.kill().unwrap();
    listening.wait().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_python_client_of_ten_lines_misses_nothing() {
    receives_acks_and_resumes("client.py", tool("venv/bin/python"), None).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_client_of_ten_lines_misses_nothing() {
    let modules = tool("node_modules");
    receives_acks_and_resumes("client.mjs", "node".into(), modules.to_str()).await;
}

#[test]
fn the_protocol_page_shows_the_minimal_clients_as_they_are() {
    let root = env!("CARGO_MANIFEST_DIR");
    let page = std::fs::read_to_string(format!("{root}/docs/protocol.md")).unwrap();
    for script in ["client.py", "client.mjs"] {
        let text = std::fs::read_to_string(format!("{root}/examples/{script}")).unwrap();
        assert!(page.contains(text.trim()), "docs/protocol.md shows another {script} than examples/");
    }
}

/// Runs a script of tests/browser, which must succeed.
async fn in_chromium(script: &str, environment: &[(&str, String)]) {
    let root = env!("CARGO_MANIFEST_DIR");
    let shots = format!("{root}/target/browser");
    std::fs::create_dir_all(&shots).unwrap();
    let mut command = tokio::process::Command::new("node");
    command.arg(format!("{root}/tests/browser/{script}")).kill_on_drop(true);
    command.env("RINGPUSH_MODULES", tool("node_modules")).env("RINGPUSH_SHOTS", shots);
    command.envs(environment.iter().map(|(name, value)| (*name, value)));
    let output = command.output().await.unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let wrong = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}\n{wrong}");
    eprintln!("{said}");
}

/// The page and the dashboard in headless Chromium: the steps are in tests/browser.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_page_works_in_a_real_browser() {
    in_chromium("page.mjs", &[("RINGPUSH_PROGRAM", program().to_owned())]).await;
}

/// The console: the cluster live, and five cases of "nothing came".
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_console_tells_why_nothing_came() {
    in_chromium("console.mjs", &[("RINGPUSH_PROGRAM", program().to_owned())]).await;
}

/// The client library in the tabs of a browser, separate and shared: closed, killed, frozen, hidden
/// and offline ones, and one from the back/forward cache.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_library_works_in_the_tabs_of_a_real_browser() {
    in_chromium("tabs.mjs", &[("RINGPUSH_PROGRAM", program().to_owned())]).await;
}

/// The example of a notification bell: badge, list, history, tabs, log out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_example_of_a_bell_works_as_its_readme_says() {
    in_chromium("bell.mjs", &[("RINGPUSH_PROGRAM", program().to_owned())]).await;
}

/// The hooks of `@ringpush/client/react` in StrictMode.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_library_works_in_react() {
    in_chromium("react.mjs", &[("RINGPUSH_PROGRAM", program().to_owned())]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_dashboard_shows_a_cluster_that_is_scaled() {
    let cluster = Cluster::up(&[]).await;
    let audit = cluster.audit(&["--users", "500", "--rate", "200", "--for", "10m"]).await;
    let environment = [
        ("RINGPUSH_OPS", format!("http://{}/", cluster.address("dispatch-0", "ops"))),
        ("RINGPUSH_SCALE", cluster.script().display().to_string()),
        ("CLUSTER_DIR", cluster.directory().display().to_string()),
        ("RINGPUSH_USERS", "500".to_owned()),
    ];
    in_chromium("scaling.mjs", &environment).await;
    audit.ends_and_passes().await;
    cluster.nothing_is_left().await;
}
