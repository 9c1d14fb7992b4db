//! Whole clusters by `scripts/cluster`: nodes that come, go and die under load (B9, B10), and
//! growth (B11).

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ringpush::ring::Ring;
use serde_json::Value;

use crate::Options;
use crate::client::{Order, Publish, Socket};
use crate::measure::{cpu_us, metric, program, root};
use crate::report::Results;
use crate::servers::{Load, Process, ringpush_publishes, ringpush_sockets};

/// The load of B9 and B10.
const USERS: usize = 12_000;
const RATE: usize = 2_000;
/// What one of the nodes of B9 and B10 takes per second: four of them share two cores with
/// everything else here, and a client that comes by the library costs all of these together some
/// three milliseconds.
const ACCEPTS: u32 = 300;
/// Sockets that one load client holds: the files of a process are bounded.
const SOCKETS_EACH: usize = 15_000;
/// The load of B11, messages per second.
const GROWTH_RATE: f64 = 2_000.0;

pub(crate) struct Cluster {
    directory: tempfile::TempDir,
    state: Value,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let _ = self.command(&["down"]).status();
    }
}

fn script() -> PathBuf {
    root().join("scripts/cluster")
}

impl Cluster {
    pub(crate) fn up(push: usize, options: &[&str]) -> Self {
        let mut this = Self { directory: tempfile::tempdir().unwrap(), state: Value::Null };
        let push = push.to_string();
        let program = program();
        let program = program.to_str().unwrap();
        let words = ["up", "--free-ports", "--quiet", "--program", program, "--push", &push];
        this.run(&[&words, options].concat());
        this
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(script());
        let directory = self.directory.path().join("cluster");
        command.args(words).env("CLUSTER_DIR", directory).env("CLUSTER_LOG", "warn");
        // A dozen processes share the cores: each has one worker, as under a limit of one core.
        command.env("TOKIO_WORKER_THREADS", "1");
        command
    }

    fn run(&mut self, words: &[&str]) {
        let output = self.command(words).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "scripts/cluster {words:?}: {said}");
        self.state =
            serde_json::from_slice(&self.command(&["status", "--json"]).output().unwrap().stdout).unwrap();
    }

    fn text(&self, path: &str) -> &str {
        self.state.pointer(path).and_then(Value::as_str).unwrap_or_else(|| panic!("no {path}"))
    }

    fn address(&self, process: &str, which: &str) -> SocketAddr {
        self.text(&format!("/processes/{process}/{which}")).trim_start_matches("http://").parse().unwrap()
    }

    fn pid(&self, process: &str) -> u32 {
        let pid = self.state["processes"][process]["pid"].as_u64();
        pid.unwrap_or_else(|| panic!("no process {process}")) as u32
    }

    /// The processor time of a process, in microseconds.
    pub(crate) fn cpu_us(&self, process: &str) -> u64 {
        cpu_us(self.pid(process))
    }

    /// The sockets of users, each at its owner among so many push nodes, as those of clients that
    /// asked first would be.
    pub(crate) fn sockets(&self, push: usize, users: std::ops::Range<usize>) -> Vec<Socket> {
        let names: Vec<String> = (0..push).map(|n| format!("push-{n}")).collect();
        let ring = Ring::build(names.iter().map(|name| (name.as_str(), 1.0)));
        let nowhere = SocketAddr::from(([127, 0, 0, 1], 1));
        let mut all = ringpush_sockets(nowhere, self.text("/keys/token"), users.clone());
        for (socket, n) in all.iter_mut().zip(users) {
            socket.at = self.address(ring.owner_of(&format!("user-{n:08}")).unwrap(), "at");
        }
        all
    }

    /// One message a request, to one collect and the other in turn.
    pub(crate) fn publishes(&self) -> Publish {
        let collects = ["collect-0", "collect-1"].map(|name| self.address(name, "at"));
        let (single, _) = ringpush_publishes(collects[0], self.text("/keys/api"));
        Publish { at: collects.to_vec(), ..single }
    }

    /// A counter or gauge of a process; None while it does not answer.
    fn metric(&self, process: &str, name: &str) -> Option<f64> {
        metric(self.address(process, "ops"), name)
    }

    /// Starts an audit; returns when its users are connected and it publishes.
    fn audit(&self, users: usize, rate: usize, seconds: usize) -> Audit {
        let mut command = Command::new(program());
        let publish =
            ["collect-0", "collect-1"].map(|name| self.text(&format!("/processes/{name}/at"))).join(",");
        let target = format!("http://127.0.0.1:{}", self.state["ports"]["nginx"]);
        command.args(["audit", "--json", "--target", &target, "--publish", &publish]);
        command.args(["--users", &users.to_string(), "--rate", &rate.to_string()]);
        command.args(["--for", &format!("{seconds}s"), "--settle", "60s", "--max-delay", "1h"]);
        for (name, value) in self.state["environment"].as_object().unwrap() {
            command.env(name, value.as_str().unwrap());
        }
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut said = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        said.read_line(&mut line).unwrap();
        assert!(line.contains("connected"), "{line}");
        std::thread::spawn(move || std::io::copy(&mut said, &mut std::io::stderr()));
        Audit(Process(child))
    }
}

struct Audit(Process);

impl Audit {
    fn report(mut self) -> Value {
        let mut text = String::new();
        self.0.0.stdout.take().unwrap().read_to_string(&mut text).unwrap();
        serde_json::from_str(&text).unwrap_or_else(|_| panic!("the audit said {text:?}"))
    }
}

/// B9 and B10.
pub fn moves(options: &Options, results: &mut Results) {
    let (users, rate, seconds) = if options.quick { (300, 100, 12) } else { (USERS, RATE, 40) };
    // A drain window as it is by default; the scenarios have a shorter one, for which moves would
    // go faster than that.
    let accepts = format!("push.accept_per_s={ACCEPTS}");
    let mut cluster = Cluster::up(3, &["--set", &accepts, "--set", "push.drain_window_s=60"]);
    let before = Duration::from_secs(if options.quick { 2 } else { 6 });

    let audit = cluster.audit(users, rate, seconds);
    std::thread::sleep(before);
    let lookups: f64 = ["dispatch-0", "dispatch-1"]
        .iter()
        .map(|name| cluster.metric(name, "ringpush_dispatch_fallback_lookups_total").unwrap())
        .sum();
    results.row("B8", "Redis look-ups in the steady state", format!("{lookups}"), "0", Some(lookups == 0.0));
    cluster.run(&["scale", "4"]);
    note_move(results, "a node joins", "3 -> 4 nodes", &audit.report());

    let audit = cluster.audit(users, rate, seconds);
    std::thread::sleep(before);
    cluster.run(&["scale", "3"]);
    note_move(results, "a node leaves", "4 -> 3 nodes", &audit.report());

    cluster.run(&["scale", "4"]);
    let audit = cluster.audit(users, rate, seconds + 5);
    std::thread::sleep(before);
    let survivors: Vec<SocketAddr> =
        ["push-0", "push-2", "push-3"].iter().map(|name| cluster.address(name, "ops")).collect();
    let stop = Arc::new(AtomicBool::new(false));
    let watching = std::thread::spawn({
        let stop = Arc::clone(&stop);
        move || fastest_accept(&survivors, &stop)
    });
    cluster.run(&["kill", "push-1"]);
    let report = audit.report();
    stop.store(true, Ordering::Relaxed);
    note_kill(results, &report, watching.join().unwrap());
}

/// The most sockets that any of these nodes took in one second.
fn fastest_accept(nodes: &[SocketAddr], stop: &AtomicBool) -> f64 {
    let mut most = 0.0f64;
    let mut seen: BTreeMap<SocketAddr, (Instant, f64)> = BTreeMap::new();
    while !stop.load(Ordering::Relaxed) {
        for node in nodes {
            let Some(count) = metric(*node, "ringpush_welcomed_total") else { continue };
            let now = Instant::now();
            if let Some((at, before)) = seen.get(node)
                && now - *at >= Duration::from_secs(1)
            {
                most = most.max((count - before) / (now - *at).as_secs_f64());
                seen.insert(*node, (now, count));
            }
            seen.entry(*node).or_insert((now, count));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    most
}

fn number(report: &Value, path: &str) -> f64 {
    report.pointer(path).and_then(Value::as_f64).unwrap_or(f64::NAN)
}

fn note_move(results: &mut Results, name: &str, what: &str, report: &Value) {
    let of = |path: &str| number(report, path);
    let (lost, again) = (of("/lost"), of("/delivered_again") + of("/out_of_order"));
    let (moved, changed, p99) = (of("/moved_users"), of("/owner_changed_users"), of("/delay_in_move_ms/p99"));
    let measured = format!(
        "moved {moved} of {changed}, others {}, lost {lost}, repeated {again}, p99 in the move {p99:.0} ms (all {:.0} ms)",
        of("/moved_though_owner_stayed"),
        of("/delay_ms/p99")
    );
    let exact = moved == changed && of("/moved_though_owner_stayed") == 0.0;
    let met = exact && lost + again == 0.0 && p99 <= 250.0;
    results.lost += lost as u64;
    let series = report["delay_series"].as_array().cloned().unwrap_or_default();
    let point = |point: &Value| [0, 1, 2].map(|n| point[n].as_f64().unwrap_or(0.0));
    results.through_a_move.insert(name.to_owned(), series.iter().map(point).collect());
    results.row("B9", what, measured, "exact, lost 0, repeated 0, p99 <= 250 ms", Some(met));
}

fn note_kill(results: &mut Results, report: &Value, fastest: f64) {
    let of = |path: &str| number(report, path);
    let (lost, back) = (of("/lost"), of("/away_ms/max"));
    let measured = format!(
        "lost {lost}, repeated {}, {} clients back after {back:.0} ms at the latest, no node took more than {fastest:.0} sockets/s",
        of("/delivered_again"),
        of("/away_ms/count")
    );
    results.lost += lost as u64;
    // What two seconds allow may come at once, and one second more within the second that was
    // looked at.
    let budget = f64::from(ACCEPTS) * 3.0;
    let met = lost == 0.0 && back <= 15_000.0 && fastest <= budget;
    results.row(
        "B10",
        "kill -9 of one of 4 nodes",
        measured,
        "lost 0, back in 15 s, within the budget",
        Some(met),
    );
}

/// One point of B11.
struct Point {
    push: usize,
    sockets: usize,
    /// Of the push processes, per delivered message; what they cost without messages is taken off.
    us: f64,
    /// Of all processes of ours, likewise.
    all_us: f64,
    idle_cores: f64,
}

/// B11.
pub fn growth(options: &Options, results: &mut Results) {
    let plan: &[(usize, usize)] =
        if options.quick { &[(1, 200), (2, 400)] } else { &[(1, 1_000), (1, 15_000), (6, 60_000)] };
    let points: Vec<Point> =
        plan.iter().map(|(push, sockets)| grown(options, results, *push, *sockets)).collect();
    let (first, last) = (&points[0], &points[points.len() - 1]);
    let shown: Vec<String> = points
        .iter()
        .map(|p| {
            let Point { push, sockets, us, all_us, idle_cores } = p;
            format!("{sockets} sockets on {push}: {us:.1} us in push, {all_us:.1} us in all (idle {idle_cores:.2} cores)")
        })
        .collect();
    let part = last.us / first.us;
    let measured = format!("{}; x {part:.2}", shown.join("; "));
    results.row(
        "B11",
        "CPU per message as it grows",
        measured,
        "within 15 %",
        Some((0.85..=1.15).contains(&part)),
    );
}

fn grown(options: &Options, results: &mut Results, push: usize, sockets: usize) -> Point {
    let cluster = Cluster::up(push, &["--set", "push.accept_per_s=0"]);
    let names: Vec<String> = (0..push).map(|n| format!("push-{n}")).collect();
    let mut loads = Vec::new();
    for first in (0..sockets).step_by(SOCKETS_EACH) {
        let users = first..(first + SOCKETS_EACH).min(sockets);
        let mut load = Load::start();
        load.obey(&Order::Open(cluster.sockets(push, users)));
        loads.push(load);
    }
    let pushes: Vec<u32> = names.iter().map(|name| cluster.pid(name)).collect();
    let others =
        ["auth-0", "collect-0", "collect-1", "dispatch-0", "dispatch-1"].map(|name| cluster.pid(name));
    let cpu = |pids: &[u32]| pids.iter().map(|pid| cpu_us(*pid)).sum::<u64>() as f64;
    let seconds = options.seconds * 2.0;
    let ms = (seconds * 1000.0) as u64;
    let mut window = |publish: Option<Publish>| {
        let (began, before) = (Instant::now(), [cpu(&pushes), cpu(&others)]);
        for load in &mut loads {
            load.obey(&Order::Reset);
            load.order(&Order::Listen { ms, expect: u64::MAX });
        }
        let accepted = publish.map(|plan| Load::start().obey(&Order::Publish(plan)).accepted);
        let received: u64 = loads.iter_mut().map(|load| load.report().received).sum();
        let took = began.elapsed().as_secs_f64();
        let spent = [cpu(&pushes) - before[0], cpu(&others) - before[1]];
        (accepted.unwrap_or(0), received, spent.map(|us| us / took))
    };
    let (_, _, idle) = window(None);
    let plan = Publish {
        users: 0..sockets,
        // What is published last has a second to arrive.
        seconds: seconds - 1.0,
        rate: Some(if options.quick { GROWTH_RATE / 10.0 } else { GROWTH_RATE }),
        own: false,
        ..cluster.publishes()
    };
    let (accepted, received, busy) = window(Some(plan));
    results.lost += accepted.saturating_sub(received);
    let per_message = |us_per_s: f64| us_per_s * seconds / received.max(1) as f64;
    Point {
        push,
        sockets,
        us: per_message(busy[0] - idle[0]),
        all_us: per_message(busy[0] + busy[1] - idle[0] - idle[1]),
        idle_cores: (idle[0] + idle[1]) / 1e6,
    }
}
