//! What was measured, as a table for people, JSON for programs, and pictures.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;

use crate::measure::Spread;
use crate::plot;

/// One row of docs/benchmarks.md.
#[derive(Serialize)]
pub struct Row {
    pub id: &'static str,
    pub what: String,
    /// In words; with min and max where there were several runs.
    pub measured: String,
    pub target: &'static str,
    /// None where there is nothing to hold it against, as when a peer is missing.
    pub met: Option<bool>,
}

/// The figures of one server, each over all runs.
#[derive(Serialize, Default)]
pub struct Figures {
    pub what: String,
    pub values: BTreeMap<&'static str, Spread>,
    /// Run by run, for the ratios.
    #[serde(skip)]
    pub runs: BTreeMap<&'static str, Vec<f64>>,
}

/// Everything.
#[derive(Serialize, Default)]
pub struct Results {
    pub machine: String,
    pub date: String,
    pub command: String,
    pub servers: BTreeMap<String, Figures>,
    /// Which were not measured, and why.
    pub missing: BTreeMap<String, String>,
    pub rows: Vec<Row>,
    /// Delays through a move: moment in s, p50, p99 in ms.
    pub through_a_move: BTreeMap<String, Vec<[f64; 3]>>,
    /// Anything lost, anywhere.
    pub lost: u64,
}

/// The figures that are shown for each server, in this order: key, heading, digits.
pub const COLUMNS: [(&str, &str, usize); 15] = [
    ("kib", "KiB/socket", 2),
    ("sockets_s", "sockets/s", 0),
    ("open_us", "us/socket", 1),
    ("open_client_us", "client us", 1),
    ("single_s", "single/s", 0),
    ("single_limit", "of limit", 2),
    ("single_us", "us CPU", 1),
    ("batch_s", "batch/s", 0),
    ("batch_limit", "of limit", 2),
    ("batch_us", "us CPU", 1),
    ("steady_us", "10k us CPU", 1),
    ("steady_p50", "p50 ms", 2),
    ("steady_p99", "p99 ms", 2),
    ("client_us", "client us", 1),
    ("lost", "lost", 0),
];

impl Results {
    /// Notes a figure of one run of a server.
    pub fn note(&mut self, server: &str, key: &'static str, value: f64) {
        let figures = self.servers.entry(server.to_owned()).or_default();
        figures.runs.entry(key).or_default().push(value);
        let spread = Spread::of(figures.runs[key].iter().copied());
        figures.values.extend(spread.map(|spread| (key, spread)));
    }

    /// The ratio of two servers in the same figure, pair by pair.
    pub fn ratio(&self, key: &str, one: &str, other: &str) -> Option<Spread> {
        let runs = |name: &str| self.servers.get(name).and_then(|figures| figures.runs.get(key));
        Spread::of(runs(one)?.iter().zip(runs(other)?).map(|(a, b)| a / b))
    }

    pub fn median(&self, server: &str, key: &str) -> Option<f64> {
        Some(self.servers.get(server)?.values.get(key)?.median)
    }

    pub fn row(
        &mut self,
        id: &'static str,
        what: &str,
        measured: String,
        target: &'static str,
        met: Option<bool>,
    ) {
        let word = met.map_or("", |met| if met { "  met" } else { "  NOT MET" });
        println!("{id:<4} {what}: {measured}  (target: {target}){word}");
        self.rows.push(Row { id, what: what.to_owned(), measured, target, met });
    }

    /// The table of docs/benchmarks.md: every server beside the limit.
    pub fn print_servers(&self) {
        if self.servers.is_empty() {
            return;
        }
        println!("\nMedians of all runs; all on {}", self.machine);
        print!("{:<28}", "server");
        COLUMNS.iter().for_each(|(_, heading, _)| print!(" {heading:>11}"));
        println!();
        for (name, figures) in &self.servers {
            print!("{name:<28}");
            for (key, _, digits) in COLUMNS {
                match figures.values.get(key) {
                    Some(spread) => print!(" {:>11.digits$}", spread.median),
                    None => print!(" {:>11}", "-"),
                }
            }
            println!();
        }
        self.missing.iter().for_each(|(name, why)| println!("{name:<28} {why}"));
        println!();
    }

    pub fn write_json(&self, path: &Path) {
        std::fs::write(path, serde_json::to_string_pretty(self).unwrap()).unwrap();
    }

    pub fn write_svg(&self, directory: &Path) {
        std::fs::create_dir_all(directory).unwrap();
        let bars = |key: &str| -> Vec<(String, f64)> {
            let of =
                |(name, figures): (&String, &Figures)| Some((name.clone(), figures.values.get(key)?.median));
            self.servers.iter().filter_map(of).collect()
        };
        let pictures = [
            ("throughput-single.svg", "Messages per second, published one by one", "single_s"),
            ("throughput-batch.svg", "Messages per second, published in batches", "batch_s"),
            ("memory.svg", "KiB of resident memory per idle socket", "kib"),
            ("sockets.svg", "Sockets opened per second", "sockets_s"),
            ("fanout.svg", "Deliveries per second of messages to 15,000 sockets", "fanout_s"),
            ("fanout-4k.svg", "The same with payloads of 4 KiB", "fanout_4k_s"),
            ("latency.svg", "p99 of the delay at 10,000 messages/s, in ms", "steady_p99"),
        ];
        for (file, title, key) in pictures {
            let bars = bars(key);
            if !bars.is_empty() {
                std::fs::write(directory.join(file), plot::bars(title, &bars)).unwrap();
            }
        }
        for (name, series) in &self.through_a_move {
            let title = format!("Delay while {name}, in ms");
            std::fs::write(
                directory.join(format!("{}.svg", name.replace(' ', "-"))),
                plot::lines(&title, series),
            )
            .unwrap();
        }
    }
}

/// A spread in words.
pub fn words(spread: Option<Spread>, digits: usize) -> String {
    match spread {
        Some(Spread { median, min, max }) => format!("{median:.digits$} ({min:.digits$}-{max:.digits$})"),
        None => "not measured".to_owned(),
    }
}
