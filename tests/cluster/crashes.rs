//! Processes and stores that die, or lose what they held, under load.

use ringpush_testing::cluster::Cluster;
use ringpush_testing::foreign::redis_cli;
use ringpush_testing::{Socket, eventually};

use crate::{FOUND_BY_SWEEP, SWEPT, load, rest};

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

/// With `scripts/test --all`.
mod more {
    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_killed_dispatch_is_replaced_by_the_other() {
        let mut cluster = Cluster::up(&[]).await;
        // What was in flight is found by a sweep.
        let audit = cluster.audit(&load("20s", FOUND_BY_SWEEP)).await;
        rest(3).await;
        cluster.run(&["kill", "dispatch-0"]).await;
        rest(5).await;
        cluster.run(&["start", "dispatch-0"]).await;
        rest(2).await;
        // For a moment there is none: what collect stores then reaches nobody but by the sweep
        // that is asked for afterwards.
        cluster.run(&["kill", "dispatch-1"]).await;
        cluster.run(&["kill", "dispatch-0"]).await;
        rest(2).await;
        cluster.run(&["start", "dispatch-0"]).await;
        cluster.run(&["start", "dispatch-1"]).await;
        audit.passes().await;
        cluster.nothing_is_left().await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_killed_collect_loses_nothing_it_accepted() {
        let mut cluster = Cluster::up(&[]).await;
        let audit = cluster.audit(&load("15s", FOUND_BY_SWEEP)).await;
        for _ in 0..2 {
            rest(3).await;
            cluster.run(&["kill", "collect-1"]).await;
            cluster.run(&["start", "collect-1"]).await;
        }
        audit.passes().await;
        cluster.nothing_is_left().await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_redis_that_was_away_comes_back_empty() {
        let mut cluster = Cluster::up(&[]).await;
        let audit = cluster.audit(&load("50s", SWEPT)).await;
        rest(2).await;
        cluster.run(&["kill", "redis"]).await;
        rest(30).await;
        cluster.run(&["start", "redis"]).await;
        eventually("a view that is not held", async || cluster.view().await["held"] == false).await;
        let report = audit.passes().await;
        assert_eq!((&report["moves"], &report["reconnects"]), (&0.into(), &0.into()), "{report}");
        cluster.nothing_is_left().await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn auth_may_be_down_for_those_it_knows() {
        let mut cluster = Cluster::up(&[]).await;
        let token = cluster.token("stranger").await;
        // Tokens that only the killed node had seen have to wait for auth, too.
        let audit = cluster.audit(&load("40s", "75s")).await;
        rest(2).await;
        cluster.run(&["kill", "auth-0"]).await;
        let url = format!("ws://{}/v1/ws", cluster.balancer());
        assert_eq!(
            Socket::try_open(&url, Some(&token), &[]).await.err(),
            Some(503),
            "a new token has to wait"
        );
        // Its users come back with tokens that are known.
        cluster.run(&["kill", "push-2"]).await;
        cluster.run(&["start", "push-2"]).await;
        rest(25).await;
        cluster.run(&["start", "auth-0"]).await;
        audit.passes().await;
        eventually("new tokens pass again", async || Socket::try_open(&url, Some(&token), &[]).await.is_ok())
            .await;
        cluster.nothing_is_left().await;
    }
}
