//! What a socket costs that reads logs (T4), and its beginning (T5), beside one that reads none:
//! with new devices, with the same devices when they come again to a server that was started anew
//! on its data, and when each log has messages that they have not seen.
//!
//! A device that is new is written down: what the store holds in memory until it has written its
//! tables counts among the memory of the former, and not of the latter.

use crate::Options;
use crate::client::{Order, Publish};
use crate::foreign;
use crate::measure::Spread;
use crate::report::{Results, words};
use crate::servers::{self, Load, Server};

/// What the sockets read, and what is asked of them.
pub struct Reads {
    pub what: String,
    /// How much more memory one may take than one that reads none, in KiB; and in words.
    pub most_kib: f64,
    pub most: &'static str,
    /// How many logs are published to, and how.
    pub logs: usize,
    pub publish: fn(&Publish) -> Publish,
    /// Whether the store is MongoDB; else it is the embedded one.
    pub on_mongo: bool,
}

/// Messages of each log that devices have not seen.
const MISSED: usize = 2;

/// T4 and T5. `join` makes the users members of topics before their sockets open.
pub fn measure(options: &Options, results: &mut Results, reads: &Reads, join: impl Fn(&Server, &mut Load)) {
    let mut new = [Opened::default(), Opened::default()];
    let mut again = [Opened::default(), Opened::default()];
    let (mut behind, mut pages) = (Opened::default(), Vec::new());
    for run in 0..options.runs * 2 {
        let with = run % 2;
        let mongod = reads.on_mongo.then(foreign::fresh_mongod);
        let mongo = mongod.as_ref().map(|(_, uri)| uri.as_str());
        let server = if with == 1 { servers::ringpush_for_topics(mongo) } else { servers::ringpush(mongo) };
        let mut load = Load::start();
        if with == 1 {
            join(&server, &mut load);
        }
        new[with].add(options, &server, &mut load);
        drop(load);
        let server = servers::ringpush_again(server, mongo, with == 1);
        again[with].add(options, &server, &mut Load::start());
        if with == 1 && reads.logs > 0 {
            miss(reads, &(reads.publish)(&server.single));
            let server = servers::ringpush_again(server, mongo, true);
            behind.add(options, &server, &mut Load::start());
            pages.push(server.metric("ringpush_inbox_pages_total"));
        }
    }
    let what = &reads.what;
    for (opened, who) in [(new, "new devices"), (again, "devices that come again")] {
        let [without, with] = &opened;
        let [without_kib, with_kib] = [without, with].map(|one| Spread::of(one.kib.clone()));
        let more = without_kib.zip(with_kib).map(|(without, with)| with.median - without.median);
        let [without_last, with_last] = [without, with].map(|one| Spread::of(one.last_kib.clone()));
        let last = without_last.zip(with_last).map(|(without, with)| with.median - without.median);
        let measured = format!(
            "{} KiB, {} KiB without: {:+.2} KiB; {:+.2} KiB for each of the last two thirds",
            words(with_kib, 2),
            words(without_kib, 2),
            more.unwrap_or(f64::NAN),
            last.unwrap_or(f64::NAN)
        );
        let met = more.map(|more| more <= reads.most_kib);
        results.row("T4", &format!("memory of a socket that reads {what}, {who}"), measured, reads.most, met);

        let [without_rate, with_rate] = [without, with].map(|one| Spread::of(one.rates.clone()));
        let part = without_rate.zip(with_rate).map(|(without, with)| with.median / without.median);
        let measured = format!(
            "{}/s, {}/s without: x {:.2}",
            words(with_rate, 0),
            words(without_rate, 0),
            part.unwrap_or(f64::NAN)
        );
        let met = part.map(|part| part >= 0.5);
        results.row("T5", &format!("sockets that open, of {what}, {who}"), measured, ">= 0.5 of B2's", met);
    }
    if reads.logs > 0 {
        let (rates, pages) = (Spread::of(behind.rates), Spread::of(pages));
        let measured = format!("{}/s, {} reads of the store", words(rates, 0), words(pages, 0));
        let what = format!("sockets that open, of {what}, behind by {MISSED} messages of each");
        results.row("T5", &what, measured, "stated", None);
    }
}

/// Publishes what the devices have not seen when they come again; a little more, if the last one is
/// not due in time.
fn miss(reads: &Reads, single: &Publish) {
    let (mut load, mut missing, rate) = (Load::start(), MISSED * reads.logs, 1_000.0);
    while missing > 0 {
        // The time may be over before the last message is due.
        let seconds = (missing as f64 + 0.5) / rate;
        let users = 0..reads.logs;
        let plan = Publish { users, connections: 1, own: false, rate: Some(rate), seconds, ..single.clone() };
        load.obey(&Order::Reset);
        missing = missing.saturating_sub(load.obey(&Order::Publish(plan)).accepted as usize);
    }
}

/// What was measured of sockets that opened, run by run.
#[derive(Default)]
struct Opened {
    /// Resident memory of the server, for each of them, in KiB.
    kib: Vec<f64>,
    /// The same of the last two thirds of them, when what is there once has come.
    last_kib: Vec<f64>,
    /// How many opened per second.
    rates: Vec<f64>,
}

impl Opened {
    fn add(&mut self, options: &Options, server: &Server, load: &mut Load) {
        let mut resident = vec![server.resident_kib() as f64];
        let (mut seconds, first) = (0.0, options.sockets / 3);
        for sockets in [0..first, first..options.sockets] {
            let opened = load.obey(&Order::Open((server.sockets)(sockets)));
            seconds += opened.seconds;
            load.obey(&Order::Listen { ms: 3_000, expect: u64::MAX });
            resident.push(server.resident_kib() as f64);
        }
        self.rates.push(options.sockets as f64 / seconds);
        self.kib.push((resident[2] - resident[0]) / options.sockets as f64);
        self.last_kib.push((resident[2] - resident[1]) / (options.sockets - first) as f64);
    }
}
