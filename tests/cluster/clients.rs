//! Clients that do not follow, or do not read, under load.

use std::time::Duration;

use ringpush::ring::Ring;
use ringpush_testing::cluster::{Audit, Cluster};
use ringpush_testing::examples::{Language, Program};
use ringpush_testing::{Socket, eventually, tool};
use serde_json::json;

use crate::{SWEPT, load, rest};

/// 200 clients of a library in a process of its own, accounted for like the Rust ones.
async fn library(cluster: &Cluster, clients: &str, program: &str) -> Audit {
    let load = ["--users", "200", "--rate", "100", "--for", "15s", "--max-delay", SWEPT];
    let topics = ["--topics", "10", "--members", "20", "--topic-rate", "5"];
    let plan = [&load[..], &topics[..]].concat();
    cluster.audit(&[&plan[..], &["--clients", clients, "--client-program", program]].concat()).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_javascript_library_loses_and_repeats_nothing_when_a_node_joins() {
    let mut cluster = Cluster::up(&[]).await;
    let audit = library(&cluster, "js", "node").await;
    rest(2).await;
    cluster.run(&["scale", "4"]).await;
    let report = audit.passes().await;
    assert!(report["moved_users"].as_u64().unwrap() > 10, "{report}");
    cluster.nothing_is_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_python_library_loses_and_repeats_nothing_when_a_node_is_killed() {
    let mut cluster = Cluster::up(&[]).await;
    let python = tool("venv/bin/python");
    let audit = library(&cluster, "python", python.to_str().unwrap()).await;
    rest(2).await;
    cluster.run(&["kill", "push-1"]).await;
    let report = audit.passes().await;
    assert!(report["reconnects"].as_u64().unwrap() > 10, "{report}");
    cluster.nothing_is_left().await;
}

/// The README's examples as printed, but for the name of a user who moves: each goes on where it
/// was, without a line of network code.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_examples_of_the_readme_follow_a_cluster_that_is_scaled() {
    const NODES: [&str; 4] = ["push-0", "push-1", "push-2", "push-3"];
    let mut cluster = Cluster::up(&[]).await;
    let ring = |count: usize| Ring::build(NODES[..count].iter().map(|node| (*node, 1.0)));
    let (before, after) = (ring(3), ring(4));
    let moves = |user: &String| before.owner_of(user) != after.owner_of(user);
    // The devices of the examples have names of their own, and some the same.
    let users = (0..).map(|n| format!("alice-{n}")).filter(moves);
    let url = format!("http://{}", cluster.balancer());
    let mut examples = Vec::new();
    for (language, user) in [Language::JavaScript, Language::Python, Language::Rust].into_iter().zip(users) {
        cluster.publish(&user, json!("before")).await;
        let mut example = Program::example(language, &url, &cluster.token(&user).await, &user);
        assert_eq!(example.line(), "before", "{language:?}");
        examples.push((language, user, example));
    }
    cluster.run(&["scale", "4"]).await;
    for n in 0..30 {
        for (_, user, _) in &examples {
            cluster.publish(user, json!(n)).await;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    for (language, _, example) in &mut examples {
        for n in 0..30 {
            assert_eq!(example.line(), n.to_string(), "{language:?}");
        }
    }
    eventually("they have moved", async || cluster.metric("push-3", "ringpush_sessions").await == 3.0).await;
    drop(examples);
    cluster.nothing_is_left().await;
}

/// With `scripts/test --all`.
mod more {
    use super::*;

    /// A host that vanishes closes nothing and answers nothing; here it is a process that stands
    /// still. The clients ask a living node where to go: this balancer has no health checks, and
    /// would hand some of them to the one that stands still.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn after_a_host_has_vanished_the_clients_of_every_library_are_back_within_40_s() {
        let cluster = Cluster::up(&[]).await;
        let python = tool("venv/bin/python");
        let plan = ["--users", "60", "--rate", "30", "--for", "10m", "--settle", "60s"];
        let mut audits = Vec::new();
        for library in [
            &["--clients", "rust"][..],
            &["--clients", "js", "--client-program", "node"],
            &["--clients", "python", "--client-program", python.to_str().unwrap()],
        ] {
            let asked = cluster.address("push-0", "at");
            audits.push(cluster.audit_at(&asked, &[&plan[..], library].concat()).await);
        }
        let sessions = async |nodes: &[&str]| {
            let mut sum = 0.0;
            for node in nodes {
                sum += cluster.metric(node, "ringpush_sessions").await;
            }
            sum
        };
        assert_eq!(sessions(&["push-0", "push-1", "push-2"]).await, 180.0);
        assert!(sessions(&["push-1"]).await > 30.0);
        cluster.command(&["signal", "push-1", "STOP"]).status().await.unwrap();
        let began = std::time::Instant::now();
        while sessions(&["push-0", "push-2"]).await < 180.0 {
            let gone = began.elapsed();
            assert!(
                gone < Duration::from_secs(40),
                "{} are elsewhere",
                sessions(&["push-0", "push-2"]).await
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        eprintln!("all are elsewhere after {:?}", began.elapsed());
        cluster.command(&["signal", "push-1", "CONT"]).status().await.unwrap();
        for audit in audits {
            audit.ends_and_passes().await;
        }
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
}
