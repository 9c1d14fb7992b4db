//! Messages to a topic go to the nodes whose sockets read it, and to no others.

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

/// Publishes, and waits until each of these sockets has it.
async fn reaches(cluster: &Cluster, sockets: &mut [&mut Socket], n: u64) {
    let sent = call(cluster, "POST", "/v1/messages", json!({"to": {"topic": "news"}, "payload": n})).await;
    assert_eq!(sent.status, 202, "{sent:?}");
    for socket in sockets {
        assert_eq!(socket.until("message").await.1["payload"], n);
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
    // What a look at the store has found was not told by a router.
    let found = async || {
        let mut found = 0.0;
        for node in cluster.pushes() {
            found += cluster.metric(&node, "ringpush_delivery_seconds_count{path=\"swept\"}").await;
        }
        found
    };
    join(&cluster, "alice").await;
    let mut alice = open(&cluster, "alice").await;
    let mut n = 0;
    let before = spared().await;
    eventually("two of the three nodes are spared", async || {
        n += 1;
        reaches(&cluster, &mut [&mut alice], n).await;
        spared().await >= before + 4.0
    })
    .await;
    // The registry loses everything: its view is held for a moment, in which routers send to all.
    // They keep the bitmaps that they know, and nodes publish again.
    redis_cli(cluster.redis_port(), &["FLUSHALL"]);
    let (before, missed) = (spared().await, found().await);
    eventually("they are spared again", async || {
        n += 1;
        reaches(&cluster, &mut [&mut alice], n).await;
        spared().await >= before + 20.0
    })
    .await;
    // The tails look, too, because the registry has begun anew, and may find one on its way.
    let by_looks = found().await - missed;
    assert!(by_looks <= 2.0, "{by_looks} of at least 20 were found by a look, and not told");
    // Others on other nodes begin to read it, and get what comes from then on.
    let mut others = Vec::new();
    for other in 0..6 {
        join(&cluster, &format!("other-{other}")).await;
        others.push(open(&cluster, &format!("other-{other}")).await);
    }
    let mut all = vec![&mut alice];
    all.extend(&mut others);
    eventually("a message that all have by a router", async || {
        let before = found().await;
        n += 1;
        reaches(&cluster, &mut all, n).await;
        found().await == before
    })
    .await;
    let (before, missed) = (spared().await, found().await);
    for _ in 0..20 {
        n += 1;
        reaches(&cluster, &mut all, n).await;
    }
    assert!(spared().await < before + 40.0, "more than one node reads it now");
    // A tail that has just begun looks once more, and may find one for all of its sockets.
    let by_looks = found().await - missed;
    assert!(by_looks <= 7.0, "{by_looks} of 140 deliveries were found by a look, and not told");
    drop((alice, others));
    cluster.nothing_is_left().await;
}
