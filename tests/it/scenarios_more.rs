//! The other scenarios: `scripts/test --all`.

use serde_json::json;

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
async fn a_killed_dispatch_is_replaced_by_the_other() {
    let mut cluster = Cluster::up(&[]).await;
    // What was in flight is found by a sweep.
    let audit = cluster.audit(&load("20s", FOUND_BY_SWEEP)).await;
    rest(3).await;
    cluster.run(&["kill", "dispatch-0"]).await;
    rest(5).await;
    cluster.run(&["start", "dispatch-0"]).await;
    rest(2).await;
    // For a moment there is none: what collect stores then reaches nobody but by the sweep that is
    // asked for afterwards.
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
async fn a_node_cut_off_from_redis_alone_sends_its_users_away() {
    let mut cluster = Cluster::up(&["--proxy", "push-1"]).await;
    let audit = cluster.audit(&load("70s", SWEPT)).await;
    rest(2).await;
    cluster.run(&["signal", "proxy-push-1", "STOP"]).await;
    eventually("the node is not ready", async || cluster.readiness("push-1").await.0 == 503).await;
    let (_, why) = cluster.readiness("push-1").await;
    assert_eq!(why["conditions"]["membership"]["ok"], false, "{why}");
    rest(25).await;
    assert_eq!(cluster.metric("push-1", "ringpush_sessions").await, 0.0, "its users have gone to the others");
    cluster.run(&["signal", "proxy-push-1", "CONT"]).await;
    eventually("the node is ready again", async || cluster.readiness("push-1").await.0 == 200).await;
    audit.passes().await;
    cluster.nothing_is_left().await;
}

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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn auth_may_be_down_for_those_it_knows() {
    let mut cluster = Cluster::up(&[]).await;
    let token = cluster.token("stranger").await;
    // Tokens that only the killed node had seen have to wait for auth, too.
    let audit = cluster.audit(&load("40s", "75s")).await;
    rest(2).await;
    cluster.run(&["kill", "auth-0"]).await;
    let url = format!("ws://{}/v1/ws", cluster.balancer());
    assert_eq!(Socket::try_open(&url, Some(&token), &[]).await.err(), Some(503), "a new token has to wait");
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_never_follows_a_move_is_served_where_it_is() {
    let cluster = Cluster::up(&[]).await;
    let audit = cluster.audit(&load("20s", SWEPT)).await;
    // Of enough users, some will belong to the new node.
    let mut sockets = Vec::new();
    for n in 0..150 {
        let user = format!("stubborn-{n}");
        let token = cluster.token(&user).await;
        let url = format!("ws://{}/v1/ws?since=latest", cluster.balancer());
        let mut socket = Socket::open(&url, Some(&token)).await;
        socket.caught_up().await;
        sockets.push((user, socket));
    }
    // One message for each, some before, some while and some after the view changes; none that
    // follows it would show a gap.
    let publishing = async {
        for (user, _) in &sockets {
            cluster.publish(user, json!("one")).await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let mut scaling = cluster.command(&["scale", "4"]);
    let (scaled, ()) = tokio::join!(scaling.status(), publishing);
    assert!(scaled.unwrap().success());
    let began = std::time::Instant::now();
    for (user, socket) in &mut sockets {
        assert_eq!(socket.until("message").await.1["payload"], "one", "{user}");
        assert!(began.elapsed() < Duration::from_secs(8), "only a sweep has found what {user} was sent");
    }
    for round in 0..3 {
        rest(2).await;
        for (user, _) in &sockets {
            cluster.publish(user, json!(round)).await;
        }
        for (user, socket) in &mut sockets {
            assert_eq!(socket.until("message").await.1["payload"], round, "{user}");
        }
    }
    audit.passes().await;
    drop(sockets);
    cluster.nothing_is_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_reads_nothing_for_a_minute_resumes_without_loss() {
    let cluster = Cluster::up(&[]).await;
    let audit = cluster.audit(&load("65s", SWEPT)).await;
    let token = cluster.token("sleeper").await;
    let url = format!("ws://{}/v1/ws", cluster.balancer());
    let mut socket = Socket::open(&url, Some(&token)).await;
    socket.caught_up().await;
    let padding = "x".repeat(2_000);
    for n in 0..2_000 {
        cluster.publish("sleeper", json!({"n": n, "padding": padding})).await;
    }
    rest(60).await;
    let mut seen = 0;
    let mut last = 0;
    while seen < 2_000 {
        match socket.message_or_end().await {
            Some(message) => {
                assert_eq!(message["payload"]["n"], seen, "in order, each once");
                last = message["seq"].as_u64().unwrap();
                seen += 1;
            }
            // Closed for want of a sign of life: it comes back.
            None => socket = Socket::open(&format!("{url}?since={last}"), Some(&token)).await,
        }
    }
    audit.passes().await;
    drop(socket);
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
    assert!(began.elapsed() < Duration::from_secs(8), "only a sweep has found them: {:?}", began.elapsed());
    drop(sockets);
    cluster.nothing_is_left().await;
}
