//! Nodes that see different things for a while, under load.

use std::time::Duration;

use ringpush_testing::cluster::Cluster;
use ringpush_testing::{Socket, eventually};
use serde_json::json;

use crate::{SWEPT, load, moves_are_exact, rest};

/// With `scripts/test --all`.
mod more {
    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_node_cut_off_from_redis_alone_sends_its_users_away() {
        let mut cluster = Cluster::up(&["--proxy", "push-1"]).await;
        let audit = cluster.audit(&load("70s", SWEPT)).await;
        rest(2).await;
        cluster.run(&["signal", "proxy-push-1", "STOP"]).await;
        eventually("the node is not ready", async || cluster.readiness("push-1").await.0 == 503).await;
        let (_, why) = cluster.readiness("push-1").await;
        assert_eq!(why["conditions"]["membership"]["ok"], false, "{why}");
        rest(25).await;
        assert_eq!(
            cluster.metric("push-1", "ringpush_sessions").await,
            0.0,
            "its users have gone to the others"
        );
        cluster.run(&["signal", "proxy-push-1", "CONT"]).await;
        eventually("the node is ready again", async || cluster.readiness("push-1").await.0 == 200).await;
        audit.passes().await;
        cluster.nothing_is_left().await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn routers_that_disagree_cost_a_copy_and_no_message() {
        let mut cluster = Cluster::up(&["--proxy", "dispatch-1"]).await;
        let audit = cluster.audit(&load("25s", SWEPT)).await;
        rest(2).await;
        cluster.run(&["signal", "proxy-dispatch-1", "STOP"]).await;
        cluster.run(&["scale", "4"]).await;
        rest(5).await;
        cluster.run(&["signal", "proxy-dispatch-1", "CONT"]).await;
        moves_are_exact(&audit.passes().await);
        cluster.nothing_is_left().await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_node_that_sees_a_join_late_is_still_sent_to() {
        let mut cluster = Cluster::up(&["--proxy", "push-1"]).await;
        // Its users are sent to it as their owner of a moment ago.
        let audit = cluster.audit(&load("25s", "5s")).await;
        rest(2).await;
        cluster.run(&["signal", "proxy-push-1", "STOP"]).await;
        cluster.run(&["scale", "4"]).await;
        rest(6).await;
        cluster.run(&["signal", "proxy-push-1", "CONT"]).await;
        audit.passes().await;
        cluster.nothing_is_left().await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn what_a_node_missed_before_it_saw_a_join_is_read_when_it_sees_it() {
        let mut cluster = Cluster::up(&["--proxy", "push-1"]).await;
        let ring = |count: usize| {
            ringpush::ring::Ring::build(
                (0..count).map(|n| ["push-0", "push-1", "push-2", "push-3"][n]).map(|name| (name, 1.0)),
            )
        };
        let (three, four) = (ring(3), ring(4));
        let leaves =
            |user: &String| three.owner_of(user) == Some("push-1") && four.owner_of(user) == Some("push-3");
        let mut sockets = Vec::new();
        for user in (0..).map(|n| format!("late-{n}")).filter(leaves).take(20) {
            let token = cluster.token(&user).await;
            // They ignore every move, so that none of them reads its inbox elsewhere.
            let mut socket =
                Socket::open(&format!("ws://{}/n/push-1/v1/ws", cluster.balancer()), Some(&token)).await;
            socket.caught_up().await;
            sockets.push((user, socket));
        }
        cluster.run(&["signal", "proxy-push-1", "STOP"]).await;
        cluster.run(&["scale", "4"]).await;
        // A router that has just begun knows no earlier owners.
        for router in ["dispatch-0", "dispatch-1"] {
            cluster.run(&["kill", router]).await;
        }
        for router in ["dispatch-0", "dispatch-1"] {
            cluster.run(&["start", router]).await;
        }
        for (user, _) in &sockets {
            cluster.publish(user, json!("one")).await;
        }
        rest(1).await;
        cluster.run(&["signal", "proxy-push-1", "CONT"]).await;
        let began = std::time::Instant::now();
        for (user, socket) in &mut sockets {
            assert_eq!(socket.until("message").await.1["payload"], "one", "{user}");
        }
        // It sees nobody missing, and believes the join at once; a sweep would take up to 36 s.
        assert!(
            began.elapsed() < Duration::from_secs(8),
            "only a sweep has found them: {:?}",
            began.elapsed()
        );
        drop(sockets);
        cluster.nothing_is_left().await;
    }
}
