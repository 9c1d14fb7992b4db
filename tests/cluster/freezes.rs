//! Processes and stores that stand still for a while, under load.

use futures_util::future::join_all;
use ringpush_testing::cluster::Cluster;
use ringpush_testing::{DEADLINE, Socket, eventually};

use crate::{FOUND_BY_SWEEP, SWEPT, load, rest};

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

/// With `scripts/test --all`.
mod more {
    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_frozen_node_thaws_and_has_missed_nothing() {
        let mut cluster = Cluster::up(&[]).await;
        // Its clients hold sockets that say nothing: what they are sent waits for the thaw.
        let audit = cluster.audit(&load("45s", FOUND_BY_SWEEP)).await;
        rest(2).await;
        cluster.run(&["signal", "push-1", "STOP"]).await;
        rest(20).await;
        cluster.run(&["signal", "push-1", "CONT"]).await;
        audit.passes().await;
        cluster.nothing_is_left().await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_frozen_collect_stores_nothing_twice() {
        let mut cluster = Cluster::up(&[]).await;
        let audit = cluster.audit(&load("40s", FOUND_BY_SWEEP)).await;
        rest(3).await;
        cluster.run(&["signal", "collect-0", "STOP"]).await;
        rest(20).await;
        cluster.run(&["signal", "collect-0", "CONT"]).await;
        audit.passes().await;
        cluster.nothing_is_left().await;
    }
}
