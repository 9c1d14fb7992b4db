//! Messages to a topic go to the nodes whose sockets read it, and to no others.

use std::time::Duration;

use serde_json::{Value, json};

use ringpush_testing::cluster::Cluster;
use ringpush_testing::foreign::redis_cli;
use ringpush_testing::{Socket, eventually, http};

async fn call(cluster: &Cluster, method: &str, path: &str, body: Value) -> http::Answer {
    let headers = [("content-type", "application/json")];
    let at = cluster.address("collect-0", "at");
    http::request(&at, method, path, Some(cluster.key("api")), &headers, body.to_string().as_bytes()).await
}

async fn join(cluster: &Cluster, user: &str) {
    let done = call(cluster, "POST", "/v1/topics/news/members", json!({"add": [user]})).await;
    assert_eq!(done.status, 202, "{done:?}");
}

async fn open(cluster: &Cluster, user: &str) -> Socket {
    let url = format!("ws://{}/v1/ws?topics=auth&begin=latest", cluster.balancer());
    let mut socket = Socket::open(&url, Some(&cluster.token(user).await)).await;
    socket.say(&json!({"type": "auth", "topics": true})).await;
    socket.expect("welcome").await;
    socket
}

/// Publishes, and waits until each of these sockets has it; much sooner than a sweep would find it.
async fn reaches(cluster: &Cluster, sockets: &mut [&mut Socket], n: u64) {
    let sent = call(cluster, "POST", "/v1/messages", json!({"to": {"topic": "news"}, "payload": n})).await;
    assert_eq!(sent.status, 202, "{sent:?}");
    for socket in sockets {
        let message = tokio::time::timeout(Duration::from_secs(10), socket.until("message")).await;
        assert_eq!(message.expect("it comes without a sweep").1["payload"], n);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_to_a_topic_goes_to_the_nodes_that_read_it() {
    let cluster = Cluster::up(&[]).await;
    let spared = async || {
        let name = "ringpush_dispatch_hints_spared_total";
        cluster.metric("dispatch-0", name).await + cluster.metric("dispatch-1", name).await
    };
    let made = call(&cluster, "PUT", "/v1/topics/news", json!({"delivery": "log"})).await;
    assert_eq!(made.status, 201, "{made:?}");
    join(&cluster, "alice").await;
    let mut alice = open(&cluster, "alice").await;
    for n in 0..20 {
        reaches(&cluster, &mut [&mut alice], n).await;
    }
    let before = spared().await;
    assert!(before > 0.0, "two of the three nodes read nothing");
    // The registry loses everything: routers keep what they know, and nodes publish again.
    redis_cli(cluster.redis_port(), &["FLUSHALL"]);
    for n in 20..40 {
        reaches(&cluster, &mut [&mut alice], n).await;
    }
    // Others on other nodes begin to read it, and get what comes from then on.
    let mut others = Vec::new();
    for n in 0..6 {
        join(&cluster, &format!("other-{n}")).await;
        others.push(open(&cluster, &format!("other-{n}")).await);
    }
    for n in 40..60 {
        let mut all = vec![&mut alice];
        all.extend(&mut others);
        reaches(&cluster, &mut all, n).await;
    }
    // And whoever reads a topic no more is spared again, a minute after its last reader has left.
    drop((alice, others));
    eventually("nobody reads it", async || {
        call(&cluster, "GET", "/v1/topics/news", Value::Null).await.json()["online"] == 0
    })
    .await;
    cluster.nothing_is_left().await;
}
