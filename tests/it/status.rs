//! What became of a message: the answer for whoever is asked why nothing came.

use serde_json::{Value, json};

use ringpush_testing::{Server, eventually};

async fn status(server: &Server, which: &str) -> Value {
    let answer = server.get(&format!("/v1/users/alice/messages/{which}/status")).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_is_followed_from_waiting_to_acked_on_each_device() {
    let server = Server::start().await;
    let sent = server
        .try_publish(&json!({"to": {"user": "alice"}, "payload": 1, "id": "order-17", "event": "order.paid"}))
        .await
        .json();
    let seq = sent["accepted"][0]["seq"].as_u64().unwrap();
    let waiting = status(&server, "order-17").await;
    assert_eq!(
        (&waiting["seq"], &waiting["id"], &waiting["event"], &waiting["state"], &waiting["devices"]),
        (&json!(seq), &json!("order-17"), &json!("order.paid"), &json!("waiting"), &json!([]))
    );
    assert_eq!(status(&server, &seq.to_string()).await, waiting, "by number, too");
    // A client that is out of credit is online, and was not sent it.
    let first = server.publish("alice", json!(2)).await;
    let mut slow = server.connect("alice", "?device=slow&window=1").await;
    slow.until("message").await;
    let mut web = server.connect("alice", "?device=web").await;
    web.messages(2).await;
    eventually("the second was sent to one of them", async || {
        let devices = status(&server, &first.to_string()).await["devices"].clone();
        devices[0]["sent"] == json!(false) && devices[1]["sent"] == json!(true)
    })
    .await;
    web.ack(seq).await;
    eventually("one device has acked the first", async || {
        status(&server, "order-17").await["state"] == json!("acked")
    })
    .await;
    let devices = status(&server, "order-17").await["devices"].clone();
    assert_eq!(
        (&devices[0]["device"], &devices[0]["acked"], &devices[1]["device"], &devices[1]["acked"]),
        (&json!("slow"), &json!(false), &json!("web"), &json!(true))
    );
    assert!(devices[1]["node"].is_string() && devices[1]["online"] == true, "{devices}");
    let user = server.get("/v1/users/alice").await.json();
    assert_eq!((&user["devices"][0]["lag"], &user["devices"][1]["lag"]), (&json!(2), &json!(1)), "{user}");
    web.close().await;
    eventually("the device is away", async || {
        let devices = status(&server, "order-17").await["devices"].clone();
        devices[1]["online"] == json!(false) && devices[1]["sent"].is_null()
    })
    .await;
    // By way of a topic, under the id of its sender.
    server.put("/v1/topics/team", &json!({})).await;
    let members = server.send("POST", "/v1/topics/team/members", &json!({"add": ["alice"]})).await;
    assert_eq!(members.status, 202, "{members:?}");
    let sent = json!({"to": {"topic": "team"}, "payload": 3, "id": "team-1"});
    assert_eq!(server.try_publish(&sent).await.status, 202);
    let through = status(&server, "team-1").await;
    assert_eq!((&through["id"], &through["via"]), (&json!("team-1"), &json!("team")));
    for nothing in ["order-18", "9007199254740991", "1"] {
        let answer = server.get(&format!("/v1/users/alice/messages/{nothing}/status")).await;
        assert_eq!(answer.status, 404, "{nothing}: {answer:?}");
    }
    assert_eq!(server.get("/v1/users/bob/messages/order-17/status").await.status, 404);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_nobody_fetched_in_time_has_expired() {
    let server = Server::start().await;
    let short = json!({"to": {"user": "alice"}, "payload": 1, "id": "short", "ttl_s": 1});
    server.try_publish(&short).await;
    eventually("it has expired", async || status(&server, "short").await["state"] == json!("expired")).await;
}
