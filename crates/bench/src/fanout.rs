//! One message for all sockets of a node: how long until the last one has it, message after
//! message, and what a socket costs that reads logs.

use crate::Options;
use crate::client::{Order, Publish, Socket};
use crate::opening::{self, Reads};
use crate::report::{Results, words};
use crate::servers::{self, LARGE, Limit, Load, SMALL, Server};

/// Messages that are published one at a time in one run, after a first one that counts for nothing,
/// and messages that are published one after another without waiting for the sockets.
const ALONE: usize = 20;
const IN_A_ROW: u64 = 50;
/// How long all sockets may take to have one message, in ms.
const DEADLINE_MS: u64 = 20_000;

type Start = fn(usize) -> Result<Server, String>;

/// Everyone on ringpush, and one channel with as many subscribers on its peers.
const SERVERS: [(&str, Start); 4] = [
    ("ringpush", |bytes| Ok(servers::ringpush_for_everyone(bytes, false))),
    ("nchan", servers::nchan),
    ("NATS", servers::nats),
    ("Centrifuge", |bytes| servers::centrifuge(0, false, bytes)),
];

/// What is measured with payloads of one length, and under which names it is noted.
struct Payloads {
    bytes: usize,
    in_a_row: u64,
    rate: &'static str,
    of_limit: &'static str,
    ms: &'static str,
    of_time: &'static str,
}

const PAYLOADS: [Payloads; 2] = [
    Payloads {
        bytes: SMALL,
        in_a_row: IN_A_ROW,
        rate: "fanout_s",
        of_limit: "fanout_limit",
        ms: "fanout_ms",
        of_time: "fanout_time",
    },
    Payloads {
        bytes: LARGE,
        in_a_row: IN_A_ROW / 5,
        rate: "fanout_4k_s",
        of_limit: "fanout_4k_limit",
        ms: "fanout_4k_ms",
        of_time: "fanout_4k_time",
    },
];

/// T1, T2, T4 and T5, and T1 and T2 with large payloads.
pub fn measure(options: &Options, results: &mut Results) {
    for payloads in &PAYLOADS {
        for run in 0..options.runs {
            println!("payloads of {} bytes, run {} of {}", payloads.bytes, run + 1, options.runs);
            let limit = limit(options, payloads.bytes);
            println!("  the limit: {:.0} messages/s; {:.1} ms for one to each socket", limit.0, limit.1);
            results.note("the limit", payloads.rate, limit.0);
            results.note("the limit", payloads.ms, limit.1);
            for (name, start) in SERVERS {
                if options.only.as_deref().is_some_and(|only| only != name) {
                    continue;
                }
                match start(payloads.bytes) {
                    Ok(server) => to_all(name, &server, options, results, payloads, limit),
                    Err(why) => drop(results.missing.insert(name.to_owned(), why)),
                }
            }
        }
        hold_against_targets(payloads, results);
    }
    if options.only.as_deref().is_none_or(|only| only == "ringpush") {
        let everyone = Reads {
            what: "the log of everyone".to_owned(),
            most_kib: 64.0 / 1024.0,
            most: "<= 64 bytes more",
            logs: 1,
            publish: servers::to_everyone,
            on_mongo: false,
        };
        opening::measure(options, results, &everyone, |_, _| ());
    }
}

fn hold_against_targets(payloads: &Payloads, results: &mut Results) {
    let spread = |results: &Results, key| results.servers.get("ringpush")?.values.get(key).copied();
    let (part, time) = (spread(results, payloads.of_limit), spread(results, payloads.of_time));
    let ratios = SERVERS[1..].iter().map(|(peer, _)| (*peer, results.ratio(payloads.rate, "ringpush", peer)));
    let ratios: Vec<_> = ratios.collect();
    let beside: String =
        ratios.iter().map(|(peer, ratio)| format!(", of {peer}'s {}", words(*ratio, 2))).collect();
    let ahead = ratios.iter().all(|(_, ratio)| ratio.is_none_or(|ratio| ratio.median >= 1.0));
    let large = if payloads.bytes == LARGE { ", payloads of 4 KiB" } else { "" };
    let measured = format!("of the limit {}{beside}", words(part, 2));
    let met = part.map(|part| part.median >= 0.85 && ahead);
    let what = format!("messages to everyone{large}");
    results.row("T1", &what, measured, ">= 0.85 of the limit, ahead of its peers", met);
    let measured = format!("of the bare loop's time {}", words(time, 2));
    let met = time.map(|time| time.median <= 1.25);
    let what = format!("one message to everyone{large}");
    results.row("T2", &what, measured, "<= 1.25 of the bare loop's time", met);
}

/// Messages one at a time, each when the last socket has the one before, and then many in a row.
fn to_all(
    name: &'static str,
    server: &Server,
    options: &Options,
    results: &mut Results,
    payloads: &Payloads,
    limit: (f64, f64),
) {
    let mut load = Load::start();
    let users = if name == "ringpush" { options.sockets } else { 1 };
    load.obey(&Order::Open(repeated((server.sockets)(0..users), options.sockets)));
    let mut times: Vec<f64> = (0..=ALONE).map(|_| one(&mut load, server, options.sockets)).collect();
    times.remove(0);
    times.sort_by(f64::total_cmp);
    let median = times[times.len() / 2];
    let single = Publish { connections: 1, users: 0..1, ..server.single.clone() };
    let rate = in_a_row(&mut load, single, payloads.in_a_row, options.sockets as u64);
    println!("  {name}: {rate:.0} deliveries/s; the last socket has a message after {median:.1} ms");
    results.servers.entry(name.to_owned()).or_default().what.clone_from(&server.what);
    results.note(name, payloads.rate, rate);
    results.note(name, payloads.ms, median);
    results.note(name, payloads.of_limit, rate / limit.0);
    results.note(name, payloads.of_time, median / limit.1);
}

/// The sockets, or as many copies of the only one.
fn repeated(sockets: Vec<Socket>, count: usize) -> Vec<Socket> {
    if sockets.len() == count {
        return sockets;
    }
    let text = serde_json::to_string(&sockets[0]).unwrap();
    (0..count).map(|_| serde_json::from_str(&text).unwrap()).collect()
}

/// Publishes one message. Returns how long it took until the last socket had it, in ms.
fn one(load: &mut Load, server: &Server, sockets: usize) -> f64 {
    load.obey(&Order::Reset);
    let plan =
        Publish { connections: 1, users: 0..1, rate: Some(100.0), seconds: 0.015, ..server.single.clone() };
    // The time may be over before the message is due.
    while load.obey(&Order::Publish(plan.clone())).accepted == 0 {}
    let report = load.obey(&Order::Gather { ms: DEADLINE_MS, copies: sockets as u64 });
    assert_eq!(report.received + report.repeated, sockets as u64, "{report:?}");
    report.last
}

/// Publishes so many messages one after another, each for so many sockets. Returns how many
/// deliveries there were per second, from the first publish until the last socket had the last one.
pub fn in_a_row(load: &mut Load, single: Publish, count: u64, sockets: u64) -> f64 {
    load.obey(&Order::Reset);
    let rate = (200 * count.min(100)) as f64;
    let plan = Publish { rate: Some(rate), seconds: (count as f64 + 0.5) / rate, own: false, ..single };
    let began = std::time::Instant::now();
    let accepted = load.obey(&Order::Publish(plan)).accepted;
    let copies = accepted * sockets;
    let report = load.obey(&Order::Gather { ms: DEADLINE_MS, copies });
    let seconds = began.elapsed().as_secs_f64();
    assert_eq!(report.received + report.repeated, copies, "{report:?}");
    copies as f64 / seconds
}

/// Of the bare loop to as many sockets: messages per second while it writes on and on, and the time
/// in ms for one message to each.
fn limit(options: &Options, bytes: usize) -> (f64, f64) {
    let (mut limit, mut load, seconds) = (Limit::start(bytes), Load::start(), options.seconds.min(3.0));
    load.obey(&Order::Open(limit.sockets(options.sockets)));
    let mut rounds: Vec<f64> = (0..=ALONE).map(|_| limit.once(&mut load, options.sockets)).collect();
    rounds.remove(0);
    rounds.sort_by(f64::total_cmp);
    load.obey(&Order::Reset);
    (limit.write(&mut load, seconds).0.received as f64 / seconds, rounds[rounds.len() / 2])
}
