//! Topics with a log: many at a time (T3), what they cost a socket (T4) and its beginning (T5), one
//! that is hot on MongoDB (T6), messages to everyone beside those of inboxes (T7), and a burst that
//! makes all sockets slow.

use std::time::{Duration, Instant};

use crate::Options;
use crate::client::{Order, Publish, Report};
use crate::cluster::Cluster;
use crate::fanout::in_a_row;
use crate::measure::Spread;
use crate::opening::{self, Reads};
use crate::report::{Results, words};
use crate::servers::{self, LARGE, Load, SMALL, Server};

/// T3: how many topics, and messages to each.
const TOPICS: usize = 100;
const MESSAGES_EACH: u64 = 50;
/// T4 and T5: logs that each socket reads.
const LOGS_EACH: usize = 10;
/// T6: sockets that read the hot topic, about half of them on each of two nodes. So few that it is
/// the publishing that is measured.
const READERS: usize = 20;
/// So long after a start the first reads of topics are confirmed by the whole replica set.
const SETTLED: Duration = Duration::from_secs(11);
/// T7: the rate of the inbox messages.
const INBOX_RATE: f64 = 2_000.0;
/// What the burst to everyone has in all, in bytes, and how long it may take until all have it.
const BURST: usize = 1024 * 1024;
const BURST_MS: u64 = 300_000;

type Part = fn(&Options, &mut Results);

/// T3 to T7, or the part that `--only` names.
pub fn measure(options: &Options, results: &mut Results) {
    const PARTS: [(&str, Part); 7] = [
        ("many", many),
        ("shared", shared),
        ("mongo", on_mongo),
        ("own", own),
        ("fairness", fairness),
        ("burst", burst),
        ("hot", hot),
    ];
    for (name, part) in PARTS {
        if options.only.as_deref().is_none_or(|only| only == name) {
            part(options, results);
        }
    }
}

/// T4 and T5 with 100 topics, each user a member of ten.
fn shared(options: &Options, results: &mut Results) {
    opening::measure(options, results, &ten_each("shared"), join_shared(options));
}

/// The same on MongoDB.
fn on_mongo(options: &Options, results: &mut Results) {
    let reads = Reads { on_mongo: true, ..ten_each("shared, on MongoDB") };
    opening::measure(options, results, &reads, join_shared(options));
}

fn join_shared(options: &Options) -> impl Fn(&Server, &mut Load) + '_ {
    |server, load| {
        for topic in 0..TOPICS {
            let is_member = |user: &usize| (0..LOGS_EACH).any(|k| (user + k * 10) % TOPICS == topic);
            let members = (0..options.sockets).filter(is_member);
            joined(load, &servers::joins(&server.single, topic, members), 1);
        }
    }
}

/// What is asked of sockets that read ten logs each.
fn ten_each(which: &str) -> Reads {
    Reads {
        what: format!("ten logs, {which}"),
        most_kib: 1.0,
        most: "<= 1 KiB more",
        logs: TOPICS,
        publish: servers::to_a_topic,
        on_mongo: false,
    }
}

/// T4 and T5 with ten topics for each user, of which it is the only member.
fn own(options: &Options, results: &mut Results) {
    opening::measure(
        options,
        results,
        &Reads { logs: 0, ..ten_each("each with one reader") },
        |server, load| {
            for which in 0..LOGS_EACH {
                let plan =
                    Publish { users: 0..options.sockets, ..servers::joins_its_own(&server.single, which) };
                joined(load, &plan, options.sockets as u64);
            }
        },
    );
}

/// Repeats a plan until so many of its requests were answered well.
fn joined(load: &mut Load, plan: &Publish, count: u64) {
    let mut done = 0;
    while done < count {
        load.obey(&Order::Reset);
        let report = load.obey(&Order::Publish(plan.clone()));
        assert_eq!(report.refused, 0, "{report:?}");
        done += report.accepted;
    }
    load.obey(&Order::Reset);
}

/// T3, beside T1 in the same run.
fn many(options: &Options, results: &mut Results) {
    let (mut to_all, mut to_many) = (Vec::new(), Vec::new());
    let each = options.sockets / TOPICS;
    for _ in 0..options.runs {
        let everyone = servers::ringpush_for_everyone(SMALL, false);
        let mut load = Load::start();
        load.obey(&Order::Open((everyone.sockets)(0..options.sockets)));
        let single = Publish { connections: 1, users: 0..1, ..everyone.single.clone() };
        to_all.push(in_a_row(&mut load, single, MESSAGES_EACH, options.sockets as u64));
        drop((load, everyone));

        let server = servers::ringpush_for_topics(None);
        let mut load = Load::start();
        for topic in 0..TOPICS {
            let members = topic * each..(topic + 1) * each;
            joined(&mut load, &servers::joins(&server.single, topic, members), 1);
        }
        load.obey(&Order::Open((server.sockets)(0..each * TOPICS)));
        let single = Publish { users: 0..TOPICS, ..server.single.clone() };
        to_many.push(in_a_row(&mut load, single, MESSAGES_EACH * TOPICS as u64, each as u64));
    }
    let part = Spread::of(to_many.iter().zip(&to_all).map(|(many, all)| many / all));
    let measured = format!(
        "{} deliveries/s, {} of one to everyone: x {}",
        words(Spread::of(to_many), 0),
        words(Spread::of(to_all), 0),
        words(part, 2)
    );
    let met = part.map(|part| part.median >= 0.9);
    results.row("T3", "100 topics of 150 readers", measured, ">= 0.9 of T1's", met);
}

/// T7: with the limits of the defaults. The messages to everyone come from a client of their own,
/// and their payload has no number, so they are not counted among the others.
fn fairness(options: &Options, results: &mut Results) {
    let mut p99s = [Vec::new(), Vec::new()];
    let rate = if options.quick { INBOX_RATE / 10.0 } else { INBOX_RATE };
    for run in 0..options.runs * 2 {
        let with = run % 2;
        let server = servers::ringpush_for_everyone(SMALL, true);
        let (mut load, mut other) = (Load::start(), Load::start());
        load.obey(&Order::Open((server.sockets)(0..options.sockets)));
        let (inbox, everyone) = servers::inbox_and_everyone(&server);
        let plan =
            Publish { users: 0..options.sockets, rate: Some(rate), seconds: options.seconds * 3.0, ..inbox };
        if with == 1 {
            let seconds = plan.seconds;
            other.order(&Order::Publish(Publish { seconds, ..everyone }));
        }
        let report = load.obey(&Order::Publish(plan));
        if with == 1 {
            let sent = other.report();
            assert!(sent.accepted + 2 >= (options.seconds * 3.0) as u64, "{sent:?}");
        }
        results.lost += report.accepted.saturating_sub(report.received);
        p99s[with].push(report.p99);
    }
    let [alone, beside] = p99s.map(Spread::of);
    let measured = format!("p99 {} ms, {} ms without", words(beside, 1), words(alone, 1));
    let what = "inbox messages at 2,000/s, one to everyone each second";
    results.row("T7", what, measured, "p99 <= 20 ms", beside.map(|beside| beside.median <= 20.0));
}

/// A megabyte for everyone at once, more than any socket takes before its client reads.
fn burst(options: &Options, results: &mut Results) {
    let server = servers::ringpush_for_everyone(LARGE, false);
    let mut load = Load::start();
    load.obey(&Order::Open((server.sockets)(0..options.sockets)));
    let before = server.resident_kib();
    let count = (BURST / LARGE) as f64;
    let single = Publish { connections: 1, users: 0..1, own: false, ..server.single.clone() };
    let rate = 5_000.0;
    load.obey(&Order::Reset);
    let began = Instant::now();
    let plan = Publish { rate: Some(rate), seconds: (count + 0.5) / rate, ..single };
    let accepted = load.obey(&Order::Publish(plan)).accepted;
    let copies = accepted * options.sockets as u64;
    load.order(&Order::Gather { ms: BURST_MS, copies });
    let (report, most) = watched(&mut load, &server);
    let level = began.elapsed().as_secs_f64();
    results.lost += copies.saturating_sub(report.received + report.repeated);
    let by = |path: &str| server.metric(&format!("ringpush_delivery_seconds_count{{path=\"{path}\"}}"));
    let measured = format!(
        "{accepted} messages of 4 KiB; all level after {level:.1} s, {:.0} deliveries/s; at most {:+.0} MB; {:.0} deliveries from the tail, {:.0} read from the store",
        copies as f64 / level,
        (most as f64 - before as f64) / 1024.0,
        by("live"),
        by("behind") + by("swept"),
    );
    results.row("T1", "a burst of 1 MB to all sockets", measured, "stated", None);
}

/// Waits for the load's report. Returns it, and the most that the server had in memory meanwhile,
/// in KiB.
fn watched(load: &mut Load, server: &Server) -> (Report, u64) {
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| load.report());
        let mut most = 0;
        while !waiting.is_finished() {
            most = most.max(server.resident_kib());
            std::thread::sleep(Duration::from_millis(20));
        }
        (waiting.join().unwrap(), most)
    })
}

/// T6: as fast as it goes, to one topic by two collects.
fn hot(options: &Options, results: &mut Results) {
    let (mut rates, mut p99s, mut backwards, mut lost) = (Vec::new(), Vec::new(), 0, 0);
    for _ in 0..options.runs {
        let cluster = Cluster::up(
            2,
            &[
                "--set",
                "push.accept_per_s=0",
                "--set",
                "limits.topic_per_s=1000000",
                "--set",
                "topics.open=t-*",
            ],
        );
        let inbox = cluster.publishes();
        let mut load = Load::start();
        joined(&mut load, &servers::joins(&inbox, 0, 0..READERS), 1);
        let sockets = cluster.sockets(2, 0..READERS).into_iter().map(servers::reads_logs).collect();
        load.obey(&Order::Open(sockets));
        load.obey(&Order::InSequence);
        std::thread::sleep(SETTLED);
        let plan =
            Publish { users: 0..1, seconds: options.seconds, own: false, ..servers::to_a_topic(&inbox) };
        let sent = load.obey(&Order::Publish(plan));
        let copies = sent.accepted * READERS as u64;
        let report = load.obey(&Order::Gather { ms: 20_000, copies });
        rates.push(sent.accepted as f64 / options.seconds);
        p99s.push(report.last);
        backwards += report.backwards;
        lost += copies.saturating_sub(report.received + report.repeated);
    }
    results.lost += lost;
    let measured = format!(
        "{} publishes/s, each to {READERS} sockets, the last copy after {} ms; lost {lost}, out of order {backwards}",
        words(Spread::of(rates), 0),
        words(Spread::of(p99s), 0)
    );
    let met = Some(lost + backwards == 0);
    results.row("T6", "one hot topic, two collects, MongoDB", measured, "stated; lost 0, order kept", met);
}
