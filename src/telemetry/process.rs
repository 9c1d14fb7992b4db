//! What is shown of the process itself: its version, its memory, its files.

use std::sync::atomic::AtomicI64;

use prometheus_client::metrics::family::Family;

use super::{Gauge, Metrics};

/// The revision of the sources, if the build was told (`RINGPUSH_COMMIT`).
const COMMIT: &str = match option_env!("RINGPUSH_COMMIT") {
    Some(commit) => commit,
    None => "unknown",
};

/// Registers what is shown of the process. It is read when the metrics are asked for.
pub fn register(metrics: &Metrics) {
    let build: Family<[(&'static str, &'static str); 2], Gauge<i64, AtomicI64>> = Family::default();
    build.get_or_create(&[("version", env!("CARGO_PKG_VERSION")), ("commit", COMMIT)]).set(1);
    let resident: Gauge<i64, AtomicI64> = Gauge::default();
    let files: Gauge<i64, AtomicI64> = Gauge::default();
    let most_files: Gauge<i64, AtomicI64> = Gauge::default();
    metrics.register(|r| {
        r.register("build_info", "Always 1; the labels say which build this is", build);
        r.register("process_resident_bytes", "Memory of the process in RAM", resident.clone());
        r.register("open_files", "Files and sockets that the process has open", files.clone());
        r.register("open_files_limit", "Most files and sockets that it may have open", most_files.clone());
    });
    metrics.before_each_look(move || {
        // Elsewhere than on Linux these stay at zero.
        resident.set(resident_bytes().unwrap_or_default());
        files.set(open_files().unwrap_or_default());
        most_files.set(open_files_limit().unwrap_or_default());
    });
}

fn resident_bytes() -> Option<i64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: i64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(kib * 1024)
}

fn open_files() -> Option<i64> {
    // Linux 6.2 and later say it in the directory's size; counting takes long where there are many.
    let directory = std::fs::metadata("/proc/self/fd").ok()?;
    if directory.len() > 0 {
        return i64::try_from(directory.len()).ok();
    }
    i64::try_from(std::fs::read_dir("/proc/self/fd").ok()?.count()).ok()
}

fn open_files_limit() -> Option<i64> {
    let limits = std::fs::read_to_string("/proc/self/limits").ok()?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}
