//! One server after another under the same load: B1 to B5 and B12.

use std::time::Duration;

use crate::Options;
use crate::client::{Order, Publish, Report};
use crate::foreign;
use crate::report::{Results, words};
use crate::servers::{self, Limit, Load, SMALL, Server};

/// The steady rate of B4, messages per second.
const STEADY: f64 = 10_000.0;
/// The steady rate of B5.
const STEADY_ON_MONGO: f64 = 3_000.0;
/// How long sockets are left alone before their memory is looked at.
const IDLE: Duration = Duration::from_secs(3);
/// B12: slow readers among how many, and how much of the load goes to them.
const SLOW: usize = 10;
const SLOW_AMONG: usize = 10_000;
const SLOW_EVERY: u64 = 5;
const SLOW_RATE: f64 = 5_000.0;

type Start = fn() -> Result<Server, String>;

/// Every server, in the order of the table.
const SERVERS: [(&str, Start); 6] = [
    ("ringpush", || Ok(servers::ringpush(None))),
    ("nchan", || servers::nchan(SMALL)),
    ("NATS", || servers::nats(SMALL)),
    ("Centrifuge", || servers::centrifuge(0, false, SMALL)),
    ("Centrifuge, history", || servers::centrifuge(100, false, SMALL)),
    ("Centrifuge, history, tuned", || servers::centrifuge(100, true, SMALL)),
];

pub fn compare(options: &Options, results: &mut Results) {
    // Sockudo speaks another protocol, and no package of its binary is to be had here.
    results
        .missing
        .insert("Sockudo".to_owned(), "not measured: no harness for its protocol (Pusher)".to_owned());
    for run in 0..options.runs {
        println!("run {} of {}", run + 1, options.runs);
        let limit = limit(options, results);
        for (name, start) in SERVERS {
            if options.only.as_deref().is_some_and(|only| only != name) {
                continue;
            }
            match start() {
                Ok(server) => under_load(&server, options, results, limit),
                Err(why) => drop(results.missing.insert(name.to_owned(), why)),
            }
        }
    }
    hold_against_targets(results);
}

fn hold_against_targets(results: &mut Results) {
    let median = |results: &Results, key| results.median("ringpush", key);
    let ratio = |results: &Results, key, peer| results.ratio(key, "ringpush", peer);
    let at_least = |ratio: Option<crate::measure::Spread>| ratio.map(|ratio| ratio.median >= 1.0);

    let memory = ratio(results, "kib", "nchan");
    let kib = median(results, "kib");
    let measured = format!("{} KiB, of nchan's {}", shown(kib, 2), words(memory, 2));
    let met = memory.zip(kib).map(|(memory, kib)| memory.median <= 0.5 && kib <= 6.0);
    results.row("B1", "memory per idle socket", measured, "<= 6 KiB, <= half of nchan's", met);

    let sockets = ratio(results, "sockets_s", "nchan");
    let measured = format!("{}/s, of nchan's {}", shown(median(results, "sockets_s"), 0), words(sockets, 2));
    results.row("B2", "sockets accepted", measured, ">= nchan", at_least(sockets));

    let single = ratio(results, "single_s", "nchan");
    let measured = format!("{}/s, of nchan's {}", shown(median(results, "single_s"), 0), words(single, 2));
    results.row("B3", "single publishes", measured, ">= nchan", at_least(single));

    let batch = ratio(results, "batch_s", "Centrifuge, history, tuned");
    let nats = words(ratio(results, "batch_s", "NATS"), 2);
    let rate = shown(median(results, "batch_s"), 0);
    let measured = format!("{rate}/s, of Centrifuge's {}, of NATS's {nats}", words(batch, 2));
    results.row("B3", "batches of 100", measured, ">= Centrifuge with history, tuned", at_least(batch));

    let p99 = median(results, "steady_p99");
    let cpu = ratio(results, "steady_us", "Centrifuge");
    let nats = words(ratio(results, "steady_us", "NATS"), 2);
    let measured =
        format!("p99 {} ms, CPU of Centrifuge's {}, of NATS's {nats}", shown(p99, 2), words(cpu, 2));
    let met = p99.zip(cpu).map(|(p99, cpu)| p99 <= 5.0 && cpu.median <= 1.0);
    results.row("B4", "10,000/s, steady", measured, "p99 <= 5 ms, CPU <= Centrifuge", met);
}

fn shown(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
}

/// Messages per second of the bare loop.
fn limit(options: &Options, results: &mut Results) -> f64 {
    let mut limit = Limit::start(SMALL);
    let mut load = Load::start();
    let opened = load.obey(&Order::Open(limit.sockets(options.sockets)));
    results.note("the limit", "sockets_s", options.sockets as f64 / opened.seconds);
    let (report, cpu) = limit.write(&mut load, options.seconds);
    let rate = report.received as f64 / options.seconds;
    results.note("the limit", "single_s", rate);
    results.note("the limit", "single_us", cpu / report.received.max(1) as f64);
    results.note("the limit", "client_us", report.cpu_us as f64 / report.received.max(1) as f64);
    println!("  the limit: {rate:.0} messages/s");
    rate
}

/// B1 to B4 for one server.
fn under_load(server: &Server, options: &Options, results: &mut Results, limit: f64) {
    let name = server.name;
    results.servers.entry(name.to_owned()).or_default().what.clone_from(&server.what);
    let mut load = Load::start();
    let sockets = (server.sockets)(0..options.sockets);
    let (before, cpu) = (server.resident_kib(), server.cpu_us());
    let opened = load.obey(&Order::Open(sockets));
    results.note(name, "sockets_s", options.sockets as f64 / opened.seconds);
    let open_us = (server.cpu_us() - cpu) as f64 / options.sockets as f64;
    results.note(name, "open_us", open_us);
    results.note(name, "open_client_us", opened.cpu_us as f64 / options.sockets as f64);
    std::thread::sleep(IDLE);
    results.note(name, "kib", (server.resident_kib() as f64 - before as f64) / options.sockets as f64);
    let plan =
        |plan: &Publish| Publish { users: 0..options.sockets, seconds: options.seconds, ..plan.clone() };

    let (single, cpu) = publish(server, &mut load, plan(&server.single));
    note_throughput(results, name, ["single_s", "single_limit", "single_us"], &single, cpu, limit);
    let (batch, cpu) = publish(server, &mut load, plan(&server.batch));
    note_throughput(results, name, ["batch_s", "batch_limit", "batch_us"], &batch, cpu, limit);
    let rate = if options.quick { STEADY / 20.0 } else { STEADY };
    let (steady, cpu) = publish(server, &mut load, Publish { rate: Some(rate), ..plan(&server.single) });
    results.note(name, "steady_us", cpu / steady.received.max(1) as f64);
    results.note(name, "steady_p50", steady.p50);
    results.note(name, "steady_p99", steady.p99);
    results.note(name, "client_us", single.cpu_us as f64 / single.received.max(1) as f64);
    let lost: u64 = [&single, &batch, &steady].map(missing).iter().sum();
    results.note(name, "lost", lost as f64);
    if name.starts_with("ringpush") {
        results.lost += lost;
    }
    println!(
        "  {name}: {:.2} KiB, {:.0} sockets/s ({open_us:.0} us), single {:.0}/s ({:.1} us), batch {:.0}/s, p99 {:.2} ms, lost {lost}",
        results.servers[name].runs["kib"].last().unwrap(),
        options.sockets as f64 / opened.seconds,
        rate_of(&single),
        results.servers[name].runs["single_us"].last().unwrap(),
        rate_of(&batch),
        steady.p99
    );
}

/// What was accepted and did not come; what was refused is no loss, but no throughput either.
fn missing(report: &Report) -> u64 {
    report.accepted.saturating_sub(report.received) + report.lost_sockets as u64
}

fn rate_of(report: &Report) -> f64 {
    report.received as f64 / report.seconds
}

/// Runs one publish; the report, and the server's processor time in microseconds.
fn publish(server: &Server, load: &mut Load, plan: Publish) -> (Report, f64) {
    load.obey(&Order::Reset);
    let cpu = server.cpu_us();
    let report = load.obey(&Order::Publish(plan));
    (report, (server.cpu_us() - cpu) as f64)
}

fn note_throughput(
    results: &mut Results,
    name: &str,
    [rate, part, us]: [&'static str; 3],
    report: &Report,
    cpu: f64,
    limit: f64,
) {
    results.note(name, rate, rate_of(report));
    results.note(name, part, rate_of(report) / limit);
    results.note(name, us, cpu / report.received.max(1) as f64);
}

/// B5: the same with the inbox in MongoDB.
pub fn on_mongo(options: &Options, results: &mut Results, runtime: &tokio::runtime::Runtime) {
    let (mongod, uri) = match foreign::mongod(runtime) {
        Ok(started) => started,
        Err(why) => {
            results.row("B5", "on MongoDB", why, ">= 12,000/s, p99 <= 20 ms", None);
            return;
        }
    };
    let (mut rates, mut delays) = (Vec::new(), Vec::new());
    for _ in 0..options.runs {
        let server = servers::ringpush(Some(&uri));
        let mut load = Load::start();
        load.obey(&Order::Open((server.sockets)(0..options.sockets)));
        let plan =
            |plan: &Publish| Publish { users: 0..options.sockets, seconds: options.seconds, ..plan.clone() };
        let (batch, cpu) = publish(&server, &mut load, plan(&server.batch));
        rates.push(rate_of(&batch));
        results.note(server.name, "batch_s", rate_of(&batch));
        results.note(server.name, "batch_us", cpu / batch.received.max(1) as f64);
        let rate = if options.quick { STEADY_ON_MONGO / 20.0 } else { STEADY_ON_MONGO };
        let (steady, _) = publish(&server, &mut load, Publish { rate: Some(rate), ..plan(&server.single) });
        delays.push(steady.p99);
        results.lost += missing(&batch) + missing(&steady);
    }
    drop(mongod);
    let (rate, p99) = (crate::measure::Spread::of(rates), crate::measure::Spread::of(delays));
    let measured = format!("batches of 100 {}/s, p99 {} ms at 3,000/s", words(rate, 0), words(p99, 1));
    let met = rate.zip(p99).map(|(rate, p99)| rate.median >= 12_000.0 && p99.median <= 20.0);
    results.row("B5", "on MongoDB", measured, ">= 12,000/s, p99 <= 20 ms", met);
}

/// B12: some read nothing while much is sent to them; the others must not feel it.
pub fn slow_readers(options: &Options, results: &mut Results) {
    let sockets = if options.quick { options.sockets } else { SLOW_AMONG };
    let seconds = options.seconds * 3.0;
    let (mut p99s, mut grown) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
    let mut incomplete = 0;
    for run in 0..options.runs * 2 {
        let slow = run % 2;
        let server = servers::ringpush(None);
        let mut load = Load::start();
        load.obey(&Order::Open((server.sockets)(0..sockets)));
        let rate = if options.quick { SLOW_RATE / 10.0 } else { SLOW_RATE };
        let plan = Publish {
            users: 0..sockets,
            favour: Some((SLOW_EVERY, SLOW)),
            rate: Some(rate),
            seconds,
            own: false,
            ..server.single.clone()
        };
        load.obey(&Order::Stall(SLOW * slow));
        let before = server.resident_kib();
        let (report, _) = publish(&server, &mut load, plan);
        grown[slow].push((server.resident_kib() as f64 - before as f64) / 1024.0);
        p99s[slow].push(report.p99);
        load.obey(&Order::Stall(0));
        let whole = load.obey(&Order::Listen { ms: 30_000, expect: report.accepted });
        incomplete += missing(&whole);
    }
    results.lost += incomplete;
    let [reading, not_reading] = p99s.map(|all| crate::measure::Spread::of(all).unwrap());
    let [grown, grown_slow] = grown.map(|all| crate::measure::Spread::of(all).unwrap());
    let more = grown_slow.median - grown.median;
    let part = not_reading.median / reading.median;
    let measured = format!(
        "the others' p99 {} ms for {} ms, x {part:.2}; memory {more:+.1} MB; missing in the end {incomplete}",
        words(Some(not_reading), 2),
        words(Some(reading), 2)
    );
    let met = part <= 1.1 && more <= 10.0 && incomplete == 0;
    results.row(
        "B12",
        "10 slow readers among 10,000",
        measured,
        "p99 within 10 %, 10 MB, complete",
        Some(met),
    );
}
