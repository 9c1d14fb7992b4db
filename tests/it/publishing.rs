//! Publishing: what is stored, what is refused, and what the answers say.

use serde_json::{Value, json};

use ringpush_testing::{Server, http};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn numbers_rise_by_one_and_history_shows_every_byte() {
    let server = Server::start().await;
    let body = r#"{"to":{"user":"alice"},"payload": { "b" : 1.50, "a":"\u00e9" } ,"id":"order-17"}"#;
    let headers = [("content-type", "application/json; charset=utf-8")];
    let key = server.key("api_key");
    let sent =
        http::request(&server.at("collect"), "POST", "/v1/messages", Some(&key), &headers, body.as_bytes())
            .await;
    assert_eq!(sent.status, 202, "{sent:?}");
    assert_eq!(sent.json()["id"], "order-17");
    let first = sent.json()["accepted"][0]["seq"].as_u64().unwrap();
    assert_eq!(server.publish("alice", Value::Null).await, first + 1);
    let history = server.get("/v1/users/alice/messages").await;
    let text = String::from_utf8(history.body.clone()).unwrap();
    assert!(text.contains(r#""payload":{ "b" : 1.50, "a":"\u00e9" }}"#), "{text}");
    assert_eq!(history.json()["messages"][1]["payload"], Value::Null);
    assert_eq!(history.json()["next"], Value::Null);
    let user = server.get("/v1/users/alice").await.json();
    assert_eq!(user["head"], first + 1);
    assert_eq!(user["online"], false);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repeat_under_the_same_id_is_stored_once() {
    let server = Server::start().await;
    let publish = json!({"to": {"user": "alice"}, "payload": {"n": 1}, "id": "once"});
    let first = server.try_publish(&publish).await.json();
    let again = server.try_publish(&publish).await;
    assert_eq!(again.status, 202);
    assert_eq!(again.json()["accepted"][0]["seq"], first["accepted"][0]["seq"]);
    assert_eq!(again.json()["accepted"][0]["duplicate"], true);
    let other = json!({"to": {"user": "alice"}, "payload": {"n": 2}, "id": "once"});
    let conflict = server.try_publish(&other).await;
    assert_eq!((conflict.status, conflict.pointers().len()), (409, 0));
    let spaced = r#"{"to":{"user":"alice"},"payload":{"n": 1},"id":"once"}"#;
    let headers = [("content-type", "application/json")];
    let key = server.key("api_key");
    let at = server.at("collect");
    let answer = http::request(&at, "POST", "/v1/messages", Some(&key), &headers, spaced.as_bytes()).await;
    assert_eq!(answer.status, 409, "payloads are compared byte for byte");
    assert_eq!(server.get("/v1/users/alice/messages").await.json()["messages"].as_array().unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publish_to_several_is_answered_in_their_order_and_repeats_only_what_is_missing() {
    let server = Server::start().await;
    let to = |users: &[&str]| json!({"to": {"users": users}, "payload": 1, "id": "many"});
    let first = server.try_publish(&to(&["bob", "alice"])).await;
    assert_eq!(first.status, 202);
    let accepted = first.json()["accepted"].clone();
    assert_eq!((&accepted[0]["user"], &accepted[1]["user"]), (&json!("bob"), &json!("alice")));
    let more = server.try_publish(&to(&["carol", "bob"])).await.json()["accepted"].clone();
    assert_eq!((&more[0]["duplicate"], &more[1]["duplicate"]), (&json!(false), &json!(true)));
    assert_eq!(more[1]["seq"], accepted[0]["seq"]);
    let conflicting = json!({"to": {"users": ["dave", "bob"]}, "payload": 2, "id": "many"});
    let conflict = server.try_publish(&conflicting).await;
    assert_eq!(conflict.status, 409);
    let problem = conflict.json();
    assert_eq!(problem["id"], "many");
    assert!(problem["accepted"][0]["seq"].is_u64(), "dave has it: {problem}");
    assert_eq!(problem["accepted"][1]["error"]["status"], 409);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_item_of_a_batch_stands_alone() {
    let server = Server::start().await;
    let messages = json!({"messages": [
        {"to": {"user": "alice"}, "payload": 1},
        {"to": {"user": ""}, "payload": 1},
        {"to": {"user": "alice"}, "payload": 2, "id": "x"},
        {"to": {"user": "alice"}, "payload": 3, "id": "x"},
        {"to": {"user": "alice"}, "payload": "x".repeat(70_000)},
    ]});
    let answer =
        http::post(&server.at("collect"), "/v1/messages/batch", Some(&server.key("api_key")), &messages)
            .await;
    assert_eq!(answer.status, 202, "{answer:?}");
    let results = answer.json()["results"].clone();
    let first = results[0]["accepted"][0]["seq"].as_u64().unwrap();
    assert_eq!(results[1]["error"]["status"], 422);
    assert_eq!(results[1]["error"]["errors"][0]["pointer"], "/to/user");
    assert_eq!(results[2]["accepted"][0]["seq"], first + 1);
    assert_eq!(results[3]["error"]["status"], 409);
    assert_eq!(results[4]["error"]["status"], 413);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_publishes_are_refused_by_name_and_leave_nothing() {
    let server = Server::start().await;
    let (at, key) = (server.at("collect"), server.key("api_key"));
    let json_type = ("content-type", "application/json");
    let send = async |body: &str| {
        http::request(&at, "POST", "/v1/messages", Some(&key), &[json_type], body.as_bytes()).await
    };
    let users = |count: usize| json!({"to": {"users": vec!["u"; count]}, "payload": 1}).to_string();
    let large = format!(r#"{{"to":{{"user":"a"}},"payload":"{}"}}"#, "x".repeat(65 * 1024));
    for (body, status, pointer) in [
        ("not json", 400, None),
        ("{", 400, None),
        ("[]", 422, Some("")),
        ("{}", 422, Some("/to")),
        (r#"{"to":{"user":"a"}}"#, 422, Some("/payload")),
        (r#"{"to":{"topic":"a","user":"b"},"payload":1}"#, 422, Some("/to")),
        (r#"{"to":{"user":7},"payload":1}"#, 422, Some("/to/user")),
        (r#"{"to":{"user":""},"payload":1}"#, 422, Some("/to/user")),
        (r#"{"to":{"user":"a\u0000b"},"payload":1}"#, 422, Some("/to/user")),
        (r#"{"to":{"user":"a"},"payload":1,"ttl_s":0}"#, 422, Some("/ttl_s")),
        (r#"{"to":{"user":"a"},"payload":1,"ttl_s":99999999}"#, 422, Some("/ttl_s")),
        (&users(1001), 422, Some("/to/users")),
        (&large, 413, Some("/payload")),
    ] {
        let answer = send(body).await;
        assert_eq!(answer.status, status, "{}: {answer:?}", &body[..body.len().min(80)]);
        assert_eq!(answer.pointers().first().map(String::as_str), pointer, "{}", &body[..body.len().min(80)]);
    }
    let huge = "x".repeat(2 * 1024 * 1024);
    assert_eq!(send(&huge).await.status, 413);
    let text =
        http::request(&at, "POST", "/v1/messages", Some(&key), &[("content-type", "text/plain")], b"{}")
            .await;
    assert_eq!((text.status, text.pointers().len()), (415, 0));
    assert_eq!(server.get("/v1/users/a").await.json()["head"], Value::Null, "nothing was stored");
    assert_eq!(server.publish("a", json!(1)).await, server.get("/v1/users/a").await.json()["head"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_and_unknown_paths_are_told_so() {
    let server = Server::start().await;
    let at = server.at("collect");
    for key in [None, Some("wrong"), Some(server.key("admin_key").as_str())] {
        let answer = http::post(&at, "/v1/messages", key, &json!({"to": {"user": "a"}, "payload": 1})).await;
        assert_eq!((answer.status, answer.pointers().len()), (401, 0));
        assert_eq!(http::get(&at, "/v1/users/a", key).await.status, 401);
        assert_eq!(http::get(&at, "/v1/cluster", key).await.status, 401);
    }
    let nowhere = server.get("/v2/everything").await;
    assert_eq!((nowhere.status, nowhere.pointers().len()), (404, 0));
    let method = server.get("/v1/messages").await;
    assert_eq!((method.status, method.header("allow"), method.pointers().len()), (405, "POST", 0));
    assert_eq!(server.get("/v1/users/a%01b").await.status, 422);
    let not_utf8 = server.get("/v1/users/%ff").await;
    assert_eq!((not_utf8.status, not_utf8.pointers().len()), (422, 0));
    assert_eq!(server.get("/v1/users/a/messages?after=-1").await.status, 422);
    assert_eq!(server.get("/v1/users/a/messages?limit=0").await.status, 422);
    let odd = server.get("/v1/users/a%2Fb%20%E7%94%A8").await;
    assert_eq!((odd.status, &odd.json()["user"]), (200, &json!("a/b 用")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn history_is_read_page_by_page() {
    let server = Server::start().await;
    let seqs = server.publish_all("alice", (0..25).map(|n| json!(n))).await;
    assert!(seqs.windows(2).all(|pair| pair[1] == pair[0] + 1));
    let (mut after, mut seen) = (0, Vec::new());
    loop {
        let page = server.get(&format!("/v1/users/alice/messages?after={after}&limit=10")).await.json();
        seen.extend(page["messages"].as_array().unwrap().iter().map(|m| m["seq"].as_u64().unwrap()));
        match page["next"].as_u64() {
            Some(next) => after = next,
            None => break,
        }
    }
    assert_eq!(seen, seqs);
    let all = server.get("/v1/users/alice/messages?limit=5000").await.json();
    assert_eq!(all["messages"].as_array().unwrap().len(), 25, "more than 1000 counts as 1000");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_cluster_is_shown_as_it_is() {
    let server = Server::with(ringpush_testing::Options::nodes(3)).await;
    let cluster = server.get("/v1/cluster").await.json();
    let nodes = cluster["nodes"].as_array().unwrap();
    assert_eq!(
        nodes.iter().map(|n| n["node"].as_str().unwrap()).collect::<Vec<_>>(),
        ["push-0", "push-1", "push-2"]
    );
    let shares: f64 = nodes.iter().map(|n| n["share"].as_f64().unwrap()).sum();
    assert!((shares - 1.0).abs() < 1e-9);
    assert!(nodes.iter().all(|n| n["state"] == "active" && n["weight"] == 1.0 && n["incarnation"].is_u64()));
    assert_eq!(cluster["held"], false);
    assert!(nodes[1]["url"].as_str().unwrap().contains(&server.push(1)));
    // alice's owner on push-0, push-1 and push-2 follows from the arithmetic alone.
    let ring = ringpush::ring::Ring::build(["push-0", "push-1", "push-2"].map(|name| (name, 1.0)));
    let user = server.get("/v1/users/alice").await.json();
    assert_eq!(user["owner"].as_str(), ring.owner_of("alice"));
}
