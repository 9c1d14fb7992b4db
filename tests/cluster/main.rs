//! Whole clusters under load, behind nginx, with a real Redis and MongoDB; each test ends in the
//! audit. `scripts/test` runs those outside of the modules named `more`, `scripts/test --all` all.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs, unreachable_pub)]

mod clients;
mod crashes;
mod freezes;
mod partitions;
mod scaling;

use std::time::Duration;

use serde_json::Value;

/// 2,000 users, 500 messages per second, and beside them 100 topics of 50 members whose members
/// change five times a second; a message that takes longer than 15 s was found by a sweep, which
/// here is a fault.
const SWEPT: &str = "15s";
/// Where something in flight may be lost with the process that had it, and a sweep is what finds
/// it.
const FOUND_BY_SWEEP: &str = "40s";

fn load<'a>(seconds: &'a str, max_delay: &'a str) -> Vec<&'a str> {
    let users = ["--users", "2000", "--rate", "500", "--for", seconds, "--max-delay", max_delay];
    [&users[..], &["--topics", "100", "--members", "50", "--topic-rate", "10"]].concat()
}

async fn rest(seconds: u64) {
    tokio::time::sleep(Duration::from_secs(seconds)).await;
}

/// Moved users are exactly those whose owner changed.
fn moves_are_exact(report: &Value) {
    assert!(report["owner_changed_users"].as_u64().unwrap() > 100, "{report}");
    assert_eq!(report["moved_users"], report["owner_changed_users"], "{report}");
    assert_eq!(report["moved_though_owner_stayed"], 0, "{report}");
    assert_eq!(report["moves"], report["moved_users"], "each once: {report}");
}
