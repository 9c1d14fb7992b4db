//! Two collects, one of which writes to a topic, whichever took the publish.

use serde_json::{Value, json};

use ringpush_testing::cluster::Cluster;
use ringpush_testing::{eventually, http};

const COLLECTS: [&str; 2] = ["collect-0", "collect-1"];

async fn call(cluster: &Cluster, by: &str, method: &str, path: &str, body: Value) -> http::Answer {
    let headers = [("content-type", "application/json")];
    let (at, body) = (cluster.address(by, "at"), body.to_string());
    http::request(&at, method, path, Some(cluster.key("api")), &headers, body.as_bytes()).await
}

async fn publish(cluster: &Cluster, by: &str, topic: &str, id: &str, payload: Value) -> http::Answer {
    let body = json!({"to": {"topic": topic}, "id": id, "payload": payload});
    call(cluster, by, "POST", "/v1/messages", body).await
}

async fn made(cluster: &Cluster, topic: &str, delivery: &str) {
    let path = format!("/v1/topics/{topic}");
    let made = call(cluster, "collect-0", "PUT", &path, json!({"delivery": delivery})).await;
    assert_eq!(made.status, 201, "{made:?}");
    let joined =
        call(cluster, "collect-0", "POST", &format!("{path}/members"), json!({"add": ["alice"]})).await;
    assert_eq!(joined.status, 202, "{joined:?}");
}

/// How many publishes each has handed to the other.
async fn handed_over(cluster: &Cluster) -> [f64; 2] {
    let name = "ringpush_handed_over_total";
    [cluster.metric(COLLECTS[0], name).await, cluster.metric(COLLECTS[1], name).await]
}

/// Publishes by both until one hands over to the other. Returns who writes, and who hands over.
async fn writer_of(cluster: &Cluster, topic: &str) -> [&'static str; 2] {
    let (before, mut found) = (handed_over(cluster).await, None);
    eventually("one hands its publishes to the other", async || {
        for by in COLLECTS {
            let sent = publish(cluster, by, topic, &ulid::Ulid::generate().to_string(), json!("looks")).await;
            assert_eq!(sent.status, 202, "{sent:?}");
        }
        let now = handed_over(cluster).await;
        found = (0..2).find(|n| now[*n] > before[*n]);
        found.is_some()
    })
    .await;
    let hands = found.unwrap();
    [COLLECTS[1 - hands], COLLECTS[hands]]
}

async fn history(cluster: &Cluster, topic: &str) -> Vec<Value> {
    let path = match topic {
        "team" => "/v1/users/alice/messages?limit=1000".to_owned(),
        topic => format!("/v1/topics/{topic}/messages?limit=1000"),
    };
    let page = call(cluster, "collect-0", "GET", &path, Value::Null).await;
    assert_eq!(page.status, 200, "{page:?}");
    let all = page.json()["messages"].as_array().unwrap().clone();
    all.into_iter().map(|message| message["payload"].clone()).filter(|payload| *payload != "looks").collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_collect_writes_to_a_topic_whoever_took_the_publish() {
    let cluster = Cluster::up(&["--push", "1"]).await;
    for (topic, delivery) in [("news", "log"), ("team", "inbox")] {
        made(&cluster, topic, delivery).await;
        let [writer, other] = writer_of(&cluster, topic).await;
        let before = handed_over(&cluster).await;
        for n in 0..10 {
            for by in [writer, other] {
                let sent = publish(&cluster, by, topic, &format!("{topic}-{by}-{n}"), json!([n, by])).await;
                assert_eq!(sent.status, 202, "{sent:?}");
                let accepted = &sent.json()["accepted"][0];
                assert_eq!(accepted["topic"], topic, "{accepted}");
                if topic == "news" {
                    assert_eq!(accepted["duplicate"], false, "{accepted}");
                } else {
                    assert_eq!(accepted["stored"], 1, "{accepted}");
                }
            }
        }
        let after = handed_over(&cluster).await;
        // A receipt may be late on a slow machine: then it is written by whoever took it.
        let handed = after[0] + after[1] - before[0] - before[1];
        assert!((1.0..=10.0).contains(&handed), "{before:?} {after:?}");
        let sent: Vec<Value> = (0..10).flat_map(|n| [json!([n, writer]), json!([n, other])]).collect();
        assert_eq!(history(&cluster, topic).await, sent);
        // A repeat, and a conflict, are told by whoever is asked.
        let again = publish(&cluster, other, topic, &format!("{topic}-{writer}-3"), json!([3, writer])).await;
        assert_eq!(again.status, 202, "{again:?}");
        let conflict = publish(&cluster, other, topic, &format!("{topic}-{writer}-3"), json!("other")).await;
        assert_eq!(conflict.status, 409, "{conflict:?}");
        assert_eq!(history(&cluster, topic).await.len(), 20);
    }
    cluster.nothing_is_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_writer_that_stands_still_is_passed_over_and_nothing_is_stored_twice() {
    let mut cluster = Cluster::up(&["--push", "1"]).await;
    made(&cluster, "news", "log").await;
    let [writer, other] = writer_of(&cluster, "news").await;
    cluster.run(&["signal", writer, "STOP"]).await;
    for n in 0..3 {
        let sent = publish(&cluster, other, "news", &format!("id-{n}"), json!(n)).await;
        assert_eq!(sent.status, 202, "{sent:?}");
        let accepted = &sent.json()["accepted"][0];
        assert!(accepted["seq"].as_u64().is_some() && accepted["duplicate"] == false, "{accepted}");
    }
    // What it was handed while it stood still it writes now, or finds written.
    cluster.run(&["signal", writer, "CONT"]).await;
    let [again, _] = writer_of(&cluster, "news").await;
    assert_eq!(again, writer);
    assert_eq!(history(&cluster, "news").await, [json!(0), json!(1), json!(2)]);
    // One that leaves hands its topics to the other at once.
    cluster.run(&["stop", writer]).await;
    let sent = publish(&cluster, other, "news", "last", json!("last")).await;
    assert_eq!(sent.status, 202, "{sent:?}");
    assert_eq!(history_by(&cluster, other).await, 4);
    cluster.nothing_is_left().await;
}

/// What the writer cannot store is written by the other, which is told of it, and soon nothing is
/// handed to the writer: its publishes go to the other as well.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_writer_that_loses_its_store_leaves_its_topics_to_the_other() {
    let mut cluster =
        Cluster::up(&["--push", "1", "--store-proxy", "collect-0", "--store-proxy", "collect-1"]).await;
    for (topic, delivery) in [("news", "log"), ("team", "inbox")] {
        made(&cluster, topic, delivery).await;
        let [writer, other] = writer_of(&cluster, topic).await;
        let link = format!("store-proxy-{writer}");
        cluster.run(&["kill", &link]).await;
        for n in 0..3 {
            let sent = publish(&cluster, other, topic, &format!("{topic}-{n}"), json!(n)).await;
            assert_eq!(sent.status, 202, "{sent:?}");
            let accepted = &sent.json()["accepted"][0];
            assert!(accepted["seq"].is_u64() || accepted["stored"] == 1, "{accepted}");
        }
        let before = handed_over(&cluster).await;
        for n in 3..6 {
            let sent = publish(&cluster, other, topic, &format!("{topic}-{n}"), json!(n)).await;
            assert_eq!(sent.status, 202, "{sent:?}");
        }
        assert_eq!(handed_over(&cluster).await, before, "nothing is handed to who cannot write");
        cluster.run(&["start", &link]).await;
        eventually("the writer has its store again", async || cluster.readiness(writer).await.0 == 200).await;
        // It hands what it takes to the other, until it has rested.
        let sent = publish(&cluster, writer, topic, &format!("{topic}-6"), json!(6)).await;
        assert_eq!(sent.status, 202, "{sent:?}");
        assert_eq!(history(&cluster, topic).await, (0..7).map(|n| json!(n)).collect::<Vec<_>>());
    }
    cluster.nothing_is_left().await;
}

async fn history_by(cluster: &Cluster, by: &str) -> usize {
    let page = call(cluster, by, "GET", "/v1/topics/news/messages?limit=1000", Value::Null).await;
    let all = page.json()["messages"].as_array().unwrap().clone();
    all.iter().filter(|message| message["payload"] != "looks").count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_limit_of_a_topic_is_counted_by_its_writer() {
    let cluster = Cluster::up(&["--push", "1", "--set", "limits.topic_per_s=1"]).await;
    made(&cluster, "news", "log").await;
    let mut n = 0;
    // Each collect alone would take a message a second.
    eventually("the second of two within a second is refused, though another collect took it", async || {
        n += 1;
        let first = publish(&cluster, "collect-0", "news", &format!("a-{n}"), json!(n)).await;
        let second = publish(&cluster, "collect-1", "news", &format!("b-{n}"), json!(n)).await;
        let refused = |answer: &http::Answer| answer.status == 429;
        !refused(&first) && refused(&second)
    })
    .await;
    cluster.nothing_is_left().await;
}
