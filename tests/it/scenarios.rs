//! Whole clusters under load, behind nginx, with a real Redis and MongoDB; each ends in the audit.
//! `scripts/test` runs those of this file, `scripts/test --all` also those of `more`.

use std::time::Duration;

use futures_util::future::join_all;
use serde_json::Value;

use crate::support::cluster::Cluster;
use crate::support::foreign::redis_cli;
use crate::support::{DEADLINE, Socket, eventually};

#[path = "scenarios_more.rs"]
mod more;

/// 2,000 users, 500 messages per second; a message that takes longer than 15 s was found by a
/// sweep, which here is a fault.
const SWEPT: &str = "15s";
/// Where something in flight may be lost with the process that had it, and a sweep is what finds
/// it.
const FOUND_BY_SWEEP: &str = "40s";

fn load<'a>(seconds: &'a str, max_delay: &'a str) -> [&'a str; 8] {
    ["--users", "2000", "--rate", "500", "--for", seconds, "--max-delay", max_delay]
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_joins_and_only_those_move_whom_it_owns() {
    let mut cluster = Cluster::up(&[]).await;
    let audit = cluster.audit(&load("20s", SWEPT)).await;
    rest(2).await;
    let count = || redis_cli(cluster.redis_port(), &["info", "stats"]);
    let commands = |stats: String| -> u64 {
        let line =
            stats.lines().find_map(|line| line.strip_prefix("total_commands_processed:").map(str::to_owned));
        line.unwrap().trim().parse().unwrap()
    };
    let before = commands(count());
    rest(4).await;
    let per_message = (commands(count()) - before) as f64 / 2000.0;
    // Beats, polls and the commands of their scripts: some 40 per process and second, whatever the
    // load.
    assert!(per_message < 0.9, "{per_message} Redis commands per message in the steady state");
    for router in ["dispatch-0", "dispatch-1"] {
        assert_eq!(cluster.metric(router, "ringpush_dispatch_fallback_lookups_total").await, 0.0);
    }
    cluster.run(&["scale", "4"]).await;
    moves_are_exact(&audit.passes().await);
    cluster.nothing_is_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_leaves_and_only_its_users_move() {
    let mut cluster = Cluster::up(&["--push", "4"]).await;
    let audit = cluster.audit(&load("25s", SWEPT)).await;
    rest(3).await;
    cluster.run(&["scale", "3"]).await;
    let report = audit.passes().await;
    moves_are_exact(&report);
    assert_eq!(report["reconnects"], 0, "{report}");
    cluster.nothing_is_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_node_loses_nothing() {
    let mut cluster = Cluster::up(&[]).await;
    let audit = cluster.audit(&load("30s", SWEPT)).await;
    rest(3).await;
    cluster.run(&["kill", "push-1"]).await;
    let report = audit.passes().await;
    assert!(report["reconnects"].as_u64().unwrap() > 300, "{report}");
    assert_eq!(report["moved_though_owner_stayed"], 0, "{report}");
    cluster.nothing_is_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_emptied_redis_moves_nobody() {
    let cluster = Cluster::up(&[]).await;
    let audit = cluster.audit(&load("15s", SWEPT)).await;
    rest(3).await;
    let before = cluster.view().await;
    redis_cli(cluster.redis_port(), &["flushall"]);
    eventually("a new generation in use", async || {
        let view = cluster.view().await;
        view["generation"] != before["generation"]
            && view["held"] == false
            && view["digest"] == before["digest"]
    })
    .await;
    let report = audit.passes().await;
    assert_eq!((&report["moves"], &report["reconnects"]), (&0.into(), &0.into()), "{report}");
    cluster.nothing_is_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_steps_down_and_publishes_only_pause() {
    let cluster = Cluster::up(&["--mongo", "3"]).await;
    let audit = cluster.audit(&load("20s", FOUND_BY_SWEEP)).await;
    rest(3).await;
    let step_down = mongodb::bson::doc! { "replSetStepDown": 10, "secondaryCatchUpPeriodSecs": 5 };
    for port in cluster.mongo_ports() {
        let uri = format!("mongodb://127.0.0.1:{port}/?directConnection=true");
        let admin = mongodb::Client::with_uri_str(uri).await.unwrap().database("admin");
        let hello = admin.run_command(mongodb::bson::doc! { "hello": 1 }).await.unwrap();
        if hello.get_bool("isWritablePrimary").unwrap_or(false) {
            admin.run_command(step_down.clone()).await.unwrap();
            break;
        }
    }
    let report = audit.passes().await;
    assert_eq!(report["reconnects"], 0, "{report}");
    cluster.nothing_is_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_redis_is_not_felt() {
    let mut cluster = Cluster::up(&[]).await;
    let audit = cluster.audit(&load("30s", SWEPT)).await;
    rest(2).await;
    cluster.run(&["signal", "redis", "STOP"]).await;
    eventually("a held view", async || cluster.view().await["held"] == true).await;
    // Whoever comes now is displaced on two of three nodes and cannot be entered there: it is
    // served all the same.
    let tokens: Vec<String> =
        join_all((0..120).map(async |n| cluster.token(&format!("late-{n}")).await)).await;
    let opening = tokens.iter().enumerate().map(async |(n, token)| {
        let url = format!("ws://{}/n/push-{}/v1/ws?hops=2", cluster.balancer(), n % 3);
        let mut socket = Socket::open(&url, Some(token)).await;
        socket.caught_up().await;
        socket
    });
    let late = tokio::time::timeout(DEADLINE / 2, join_all(opening)).await;
    drop(late.expect("sockets that come while Redis hangs do not wait for it"));
    rest(12).await;
    for node in cluster.pushes() {
        let (status, why) = cluster.readiness(&node).await;
        assert_eq!(status, 200, "nobody is cut off alone: {why}");
    }
    cluster.run(&["signal", "redis", "CONT"]).await;
    eventually("a view that is not held", async || cluster.view().await["held"] == false).await;
    let report = audit.passes().await;
    assert_eq!((&report["moves"], &report["reconnects"]), (&0.into(), &0.into()), "{report}");
    cluster.nothing_is_left().await;
}
