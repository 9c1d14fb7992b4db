//! A cluster beside what a user would pick instead (T9): three push nodes of ringpush on MongoDB,
//! and three nodes of Centrifuge's engine on its Redis broker with history, under the same load.

use crate::Options;
use crate::client::{Order, Publish, Report};
use crate::cluster::Cluster;
use crate::foreign;
use crate::measure::Spread;
use crate::report::{Results, words};
use crate::servers::{Load, centrifuges_on_redis};

/// The load of T9.
const NODES: usize = 3;
const SOCKETS: usize = 6_000;
const RATE: f64 = 2_000.0;
/// Messages that Redis keeps of a channel, so that a client that comes back reads what it missed.
const HISTORY: usize = 100;
const TARGET: &str = "own processor <= Centrifuge's own, p99 <= its p99 or 20 ms";

/// One window under load.
struct Window {
    /// Processor time per delivered message in microseconds: of the server's own processes, and of
    /// the store that it needs.
    own_us: f64,
    store_us: f64,
    report: Report,
}

/// T9.
pub fn measure(options: &Options, results: &mut Results) {
    let mut all: [Vec<Window>; 2] = Default::default();
    for run in 0..options.runs {
        println!("run {} of {}", run + 1, options.runs);
        all[0].push(ringpush(options));
        match centrifuge(options) {
            Ok(window) => all[1].push(window),
            Err(why) => drop(results.missing.insert("Centrifuge on Redis".to_owned(), why)),
        }
        for (name, windows) in ["ringpush", "Centrifuge"].iter().zip(&all) {
            if let Some(Window { own_us, store_us, report }) = windows.last() {
                println!(
                    "  {name}: own {own_us:.0} us, store {store_us:.0} us, p50 {:.2} ms, p99 {:.2} ms",
                    report.p50, report.p99
                );
            }
        }
    }
    let lost = |windows: &[Window]| -> u64 {
        windows.iter().map(|one| one.report.accepted.saturating_sub(one.report.received)).sum()
    };
    results.lost += lost(&all[0]);
    let spread = |which: usize, of: fn(&Window) -> f64| Spread::of(all[which].iter().map(of));
    let told = |which: usize| {
        format!(
            "own {} us a message, store {} us, p50 {} ms, p99 {} ms, lost {}",
            words(spread(which, |one| one.own_us), 0),
            words(spread(which, |one| one.store_us), 0),
            words(spread(which, |one| one.report.p50), 2),
            words(spread(which, |one| one.report.p99), 2),
            lost(&all[which])
        )
    };
    let measured = format!("ringpush {}; Centrifuge {}", told(0), told(1));
    let median = |which, of| spread(which, of).map(|spread| spread.median);
    let own = median(0, |one| one.own_us).zip(median(1, |one| one.own_us));
    let p99 = median(0, |one| one.report.p99).zip(median(1, |one| one.report.p99));
    let met = own.zip(p99).map(|(own, p99)| own.0 <= own.1 && (p99.0 <= p99.1 || p99.0 <= 20.0));
    results.row("T9", "a cluster beside Centrifuge on Redis", measured, TARGET, met);
}

/// What is published: at the steady rate, one message a request.
fn plan(options: &Options, single: &Publish) -> Publish {
    let (sockets, rate) = if options.quick { (options.sockets, RATE / 10.0) } else { (SOCKETS, RATE) };
    Publish { users: 0..sockets, rate: Some(rate), seconds: options.seconds * 3.0, ..single.clone() }
}

/// Publishes, and takes the processor time of both groups of processes before and after.
fn window(load: &mut Load, plan: Publish, own: impl Fn() -> u64, store: impl Fn() -> u64) -> Window {
    // A first second counts for nothing: connections are made in it.
    load.obey(&Order::Publish(Publish { seconds: 1.0, ..plan.clone() }));
    load.obey(&Order::Reset);
    let before = [own(), store()];
    let report = load.obey(&Order::Publish(plan));
    let per = |us: u64| us as f64 / report.received.max(1) as f64;
    Window { own_us: per(own() - before[0]), store_us: per(store() - before[1]), report }
}

fn ringpush(options: &Options) -> Window {
    let cluster = Cluster::up(NODES, &["--set", "push.accept_per_s=0"]);
    let plan = plan(options, &cluster.publishes());
    let mut load = Load::start();
    load.obey(&Order::Open(cluster.sockets(NODES, plan.users.clone())));
    let names = ["auth-0", "collect-0", "collect-1", "dispatch-0", "dispatch-1"];
    let own: Vec<String> =
        names.iter().map(ToString::to_string).chain((0..NODES).map(|n| format!("push-{n}"))).collect();
    window(
        &mut load,
        plan,
        || own.iter().map(|name| cluster.cpu_us(name)).sum(),
        || cluster.cpu_us("mongo-0") + cluster.cpu_us("redis"),
    )
}

fn centrifuge(options: &Options) -> Result<Window, String> {
    let redis = foreign::redis()?;
    let server = centrifuges_on_redis(NODES, &format!("127.0.0.1:{}", redis.port), HISTORY)?;
    let plan = plan(options, &server.single);
    let mut load = Load::start();
    load.obey(&Order::Open((server.sockets)(plan.users.clone())));
    Ok(window(&mut load, plan, || server.cpu_us(), || redis.cpu_us()))
}
