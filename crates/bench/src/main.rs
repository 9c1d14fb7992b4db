//! The benchmark of the whole: ringpush beside its peers and beside the limit, all in one run on
//! one machine.
//!
//! ```text
//! cargo build --release --workspace
//! target/release/ringpush-bench [SCENARIO…] [--json FILE] [--svg DIR] [--runs 3] [--seconds 6]
//! [--sockets 15000] [--quick]
//! ```
//!
//! `--only` names one server, or of `topics` one part. Scenarios: `peers` (B1 to B4), `mongo` (B5),
//! `ring` (B6), `router` (B7, B8), `moves` (B9, B10), `growth` (B11), `slow` (B12), `fanout` (T1,
//! T2, T4, T5), `topics` (T3 to T7), `beside` (T9); without any, all. Targets are those of the
//! table in docs/benchmarks.md. Exits 1 if anything was lost.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    unreachable_pub,
    clippy::print_stdout,
    clippy::print_stderr
)]
// A bench lets time pass on purpose, and its orders are few.
#![allow(clippy::disallowed_methods, clippy::large_enum_variant)]

mod beside;
mod client;
mod cluster;
mod fanout;
mod foreign;
mod limit;
mod measure;
mod opening;
mod peers;
mod plot;
mod report;
mod router;
mod servers;
mod topics;

use std::path::PathBuf;
use std::process::ExitCode;

use report::Results;

/// As the program: what is measured inside this process is to cost what it costs there.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// What was asked for.
pub struct Options {
    pub scenarios: Vec<String>,
    pub json: Option<PathBuf>,
    pub svg: Option<PathBuf>,
    pub only: Option<String>,
    pub sockets: usize,
    pub seconds: f64,
    pub runs: usize,
    pub quick: bool,
}

const SCENARIOS: [&str; 10] =
    ["peers", "mongo", "ring", "router", "moves", "growth", "slow", "fanout", "topics", "beside"];

fn main() -> ExitCode {
    // As the program.
    let _ = rustix::thread::disable_transparent_huge_pages(true);
    let first = std::env::args().nth(1).unwrap_or_default();
    match first.as_str() {
        "--load-client" => client::run(),
        "--limit" => limit::run(std::env::args().nth(2).unwrap().parse().unwrap()),
        "--sink" => router::sink(),
        _ => return measure_all(&options()),
    }
    ExitCode::SUCCESS
}

fn measure_all(options: &Options) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let now = ringpush::clock::Clock::system().now().rfc3339();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut results = Results {
        machine: measure::machine(),
        date: now[..10].to_owned(),
        command: format!("ringpush-bench {}", arguments.join(" ")),
        ..Results::default()
    };
    for scenario in SCENARIOS {
        if !options.scenarios.is_empty() && !options.scenarios.iter().any(|wanted| wanted == scenario) {
            continue;
        }
        match scenario {
            "peers" => peers::compare(options, &mut results),
            "mongo" => peers::on_mongo(options, &mut results, &runtime),
            "ring" => router::ring(&mut results),
            "router" => router::measure(options, &mut results, &runtime),
            "moves" => cluster::moves(options, &mut results),
            "growth" => cluster::growth(options, &mut results),
            "slow" => peers::slow_readers(options, &mut results),
            "topics" => topics::measure(options, &mut results),
            "beside" => beside::measure(options, &mut results),
            _ => fanout::measure(options, &mut results),
        }
        if let Some(path) = &options.json {
            results.write_json(path);
        }
    }
    results.print_servers();
    if let Some(directory) = &options.svg {
        results.write_svg(directory);
    }
    if results.lost > 0 {
        println!("{} messages were lost", results.lost);
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn options() -> Options {
    let mut options = Options {
        scenarios: Vec::new(),
        json: None,
        svg: None,
        only: None,
        sockets: 15_000,
        seconds: 6.0,
        runs: 3,
        quick: false,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().unwrap_or_else(|| usage(&argument));
        match argument.as_str() {
            "--json" => options.json = Some(value().into()),
            "--svg" => options.svg = Some(value().into()),
            "--only" => options.only = Some(value()),
            "--sockets" => options.sockets = value().parse().unwrap_or_else(|_| usage(&argument)),
            "--seconds" => options.seconds = value().parse().unwrap_or_else(|_| usage(&argument)),
            "--runs" => options.runs = value().parse().unwrap_or_else(|_| usage(&argument)),
            "--quick" => {
                (options.quick, options.sockets, options.seconds, options.runs) = (true, 1_000, 1.0, 1);
            }
            scenario if SCENARIOS.contains(&scenario) => options.scenarios.push(argument),
            _ => usage(&argument),
        }
    }
    options
}

fn usage(word: &str) -> ! {
    eprintln!(
        "{word:?} is not understood: [{}] [--only SERVER] [--json FILE] [--svg DIR] [--runs N] [--seconds S] [--sockets N] [--quick]",
        SCENARIOS.join("|")
    );
    std::process::exit(64)
}
