//! Nodes that join, leave, and are restarted, under load.

use ringpush_testing::cluster::Cluster;
use ringpush_testing::eventually;
use ringpush_testing::foreign::redis_cli;

use crate::{SWEPT, load, moves_are_exact, rest};

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

/// With `scripts/test --all`.
mod more {
    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn all_nodes_are_restarted_one_by_one() {
        let mut cluster = Cluster::up(&[]).await;
        let audit = cluster.audit(&load("75s", SWEPT)).await;
        for node in ["push-2", "push-1", "push-0"] {
            rest(2).await;
            cluster.run(&["stop", node]).await;
            cluster.run(&["start", node]).await;
        }
        let report = audit.passes().await;
        assert_eq!(report["reconnects"], 0, "{report}");
        cluster.nothing_is_left().await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn the_later_of_two_processes_has_the_name() {
        let mut cluster = Cluster::up(&[]).await;
        let audit = cluster.audit(&load("45s", SWEPT)).await;
        rest(2).await;
        cluster.run(&["twin", "push-1"]).await;
        eventually("the earlier one is not ready", async || cluster.readiness("push-1").await.0 == 503).await;
        audit.passes().await;
        let (_, why) = cluster.readiness("push-1").await;
        assert!(why["conditions"]["membership"]["detail"].as_str().unwrap().contains("node.name"), "{why}");
        assert_eq!(cluster.readiness("push-1-twin").await.0, 200);
        cluster.nothing_is_left().await;
    }
}
