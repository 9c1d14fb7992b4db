//! What is measured, and what the kernel says of a process.

use std::io::Read;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The root of the repository, where this was built.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The program that is measured: `ringpush` beside this one.
pub fn program() -> PathBuf {
    let program = std::env::current_exe().unwrap().with_file_name("ringpush");
    assert!(
        program.exists(),
        "{} is missing; build it first: cargo build --release --workspace",
        program.display()
    );
    program
}

/// Resident memory, in KiB.
pub fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.map_or(0, |line| line.trim().trim_end_matches(" kB").trim().parse().unwrap())
}

/// Processor time of a process, user and system, in microseconds; the kernel counts in ticks of 10
/// ms.
pub fn cpu_us(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let Some((_, rest)) = stat.rsplit_once(')') else { return 0 };
    let fields: Vec<&str> = rest.split_whitespace().collect();
    (fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()) * 10_000
}

/// Waits for something that nothing announces.
pub fn wait_for(what: &str, seconds: u64, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < Duration::from_secs(seconds), "{what} did not come about in {seconds} s");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A counter or gauge that ringpush shows at its ops port, with its labels; None while it does not
/// answer.
pub fn metric(at: SocketAddr, name: &str) -> Option<f64> {
    let mut stream = std::net::TcpStream::connect_timeout(&at, Duration::from_millis(500)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(2))).ok()?;
    std::io::Write::write_all(
        &mut stream,
        b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n",
    )
    .ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    text.lines().find_map(|line| line.strip_prefix(&format!("{name} ")))?.trim().parse().ok()
}

/// The machine, in a line.
pub fn machine() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let info = read("/proc/cpuinfo");
    let model = info.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or(": unknown");
    let memory = read("/proc/meminfo");
    let kib = memory.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0);
    format!(
        "{} processors, {}, {} GB, Linux {}",
        info.matches("processor\t").count(),
        model.trim_start_matches(['\t', ' ', ':']),
        kib.div_ceil(1024 * 1024),
        read("/proc/sys/kernel/osrelease").trim()
    )
}

/// The middle of three or more, with the least and the most.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Spread {
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = values.into_iter().filter(|value| value.is_finite()).collect();
        sorted.sort_by(f64::total_cmp);
        let median = *sorted.get(sorted.len() / 2)?;
        Some(Self { median, min: sorted[0], max: *sorted.last()? })
    }
}
