//! Several push nodes: connect names the right one, a socket elsewhere is told to move, and nothing
//! is missed on the way.

use std::time::Duration;

use ringpush::client::{Item, State};
use ringpush::ring::Ring;
use serde_json::json;

use ringpush_testing::{Options, Server, Socket, eventually, http};

/// The number of the node that owns a user among `push-0` to `push-2`, by the arithmetic that
/// everybody shares.
fn owner_of(user: &str) -> usize {
    let ring = Ring::build(["push-0", "push-1", "push-2"].map(|name| (name, 1.0)));
    ring.owner_of(user).unwrap().strip_prefix("push-").unwrap().parse().unwrap()
}

async fn three() -> Server {
    Server::with(Options::nodes(3)).await
}

async fn connect(server: &Server, at: &str, token: &str) -> http::Answer {
    let answer = http::post(at, "/v1/connect", Some(token), &json!({"device": "web-1"})).await;
    assert_eq!(answer.status, 200, "{answer:?} by {}", server.at("push"));
    answer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connect_answers_the_owner_and_a_ticket_that_opens_one_socket_once() {
    let server = three().await;
    for user in ["alice", "bob", "用户42", "user-00000000", "user-00000001"] {
        let token = server.token(user).await;
        let owner = owner_of(user);
        for at in [server.push(0), server.push(2), server.at("dispatch")] {
            let answer = connect(&server, &at, &token).await.json();
            assert_eq!(answer["node"], format!("push-{owner}"), "{user}");
            assert_eq!(answer["expires_in_ms"], 30_000);
            assert!(
                answer["generation"].is_string()
                    && answer["epoch"].is_u64()
                    && answer["reconnect"].is_object()
            );
            let url = answer["url"].as_str().unwrap();
            assert!(url.contains(&server.push(owner)), "{url}");
            let mut socket = Socket::open(&format!("{url}&since=0"), None).await;
            let welcome = socket.expect("welcome").await;
            assert_eq!((&welcome["user"], &welcome["device"]), (&json!(user), &json!("web-1")));
            assert_eq!(Socket::try_open(url, None, &[]).await.err(), Some(401), "a ticket is taken once");
        }
    }
    let token = server.token("alice").await;
    let url = connect(&server, &server.push(0), &token).await.json()["url"].as_str().unwrap().to_owned();
    let elsewhere = url.replace(&server.push(owner_of("alice")), &server.push((owner_of("alice") + 1) % 3));
    assert_eq!(Socket::try_open(&elsewhere, None, &[]).await.err(), Some(401), "a ticket is for one process");
    let changed = url.replace("?ticket=", "?ticket=x");
    assert_eq!(Socket::try_open(&changed, None, &[]).await.err(), Some(401));
    for (token, status) in [(None, 401), (Some("nonsense"), 401)] {
        assert_eq!(http::post(&server.push(0), "/v1/connect", token, &json!({})).await.status, status);
    }
    let ticket = url.split_once("ticket=").unwrap().1;
    let as_token = http::post(&server.push(0), "/v1/connect", Some(ticket), &json!({})).await;
    assert_eq!(as_token.status, 401, "a ticket is never a token");
    let bad = http::post(&server.push(0), "/v1/connect", Some(&token), &json!({"device": "no spaces"})).await;
    assert_eq!((bad.status, bad.pointers()), (422, vec!["/device".to_owned()]));
    let empty = http::request(&server.push(0), "POST", "/v1/connect", Some(&token), &[], b"").await;
    assert_eq!(empty.status, 200, "the body is optional");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_socket_on_another_node_is_told_to_move_and_between_the_two_nothing_is_missing() {
    let server = three().await;
    let token = server.token("alice").await;
    let wrong = (owner_of("alice") + 1) % 3;
    let first = server.publish("alice", json!(0)).await;
    let mut old = Socket::open(&format!("ws://{}/v1/ws", server.push(wrong)), Some(&token)).await;
    assert_eq!(old.expect("welcome").await["node"], format!("push-{wrong}"));
    assert_eq!(old.expect("message").await["seq"], first);
    let (between, order) = old.until("move").await;
    assert!(between.iter().all(|frame| frame["type"] == "caught_up"), "{between:?}");
    assert_eq!(
        (&order["node"], &order["reason"]),
        (&json!(format!("push-{}", owner_of("alice"))), &json!("owner"))
    );
    assert!(order["after_ms"].as_u64().unwrap() <= 1_000);
    let url = order["url"].as_str().unwrap();
    assert!(url.contains("hops=1") && url.contains(&format!("epoch={}", order["epoch"])), "{url}");
    // While it has not moved, live messages come to where it is.
    server.publish_all("alice", (1..4).map(|n| json!(n))).await;
    assert_eq!(old.messages(3).await.len(), 3);
    let mut new = Socket::open(&format!("{url}&since={}", old.last), Some(&token)).await;
    assert_eq!(new.expect("welcome").await["since"], old.last);
    server.publish_all("alice", (4..7).map(|n| json!(n))).await;
    new.until("caught_up").await;
    let last = server.publish("alice", json!(7)).await;
    // Both deliver until the old one is closed; the new one has every number after the old one's
    // last at the move.
    old.messages(4).await;
    assert_eq!((old.last, first + 7), (last, last));
    while new.last < last {
        new.frame().await;
    }
    old.close().await;
    let seq = server.publish("alice", json!(8)).await;
    assert_eq!(new.expect("message").await["seq"], seq);
    new.is_quiet(Duration::from_millis(1_200)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_was_sent_on_twice_is_kept_where_it_is() {
    let server = three().await;
    let token = server.token("alice").await;
    let owner = owner_of("alice");
    let wrong = (owner + 1) % 3;
    let kept = format!("ws://{}/v1/ws?hops=2", server.push(wrong));
    // By a load balancer that sent another node's path here: kept too, for it would only come back.
    let strayed = format!("ws://{}/n/push-{owner}/v1/ws", server.push(wrong));
    let mut sockets = Vec::new();
    for url in [kept, strayed] {
        let mut socket = Socket::open(&url, Some(&token)).await;
        socket.caught_up().await;
        sockets.push(socket);
    }
    eventually("the fallback entry", async || {
        let nodes = server.get("/v1/cluster").await.json()["nodes"].clone();
        nodes[wrong]["displaced"] == 1 && nodes[wrong]["sessions"] == 2
    })
    .await;
    let seq = server.publish("alice", json!(1)).await;
    for socket in &mut sockets {
        assert_eq!(socket.expect("message").await["seq"], seq);
        socket.is_quiet(Duration::from_millis(1_100)).await;
    }
    drop(sockets);
    eventually("no displaced users", async || {
        let nodes = server.get("/v1/cluster").await.json()["nodes"].clone();
        (0..3).all(|n| nodes[n]["displaced"] == 0 && nodes[n]["sessions"] == 0)
    })
    .await;
    server.nobody_is_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_asks_for_it_gets_a_redirect() {
    let server = three().await;
    let token = server.token("alice").await;
    let owner = owner_of("alice");
    let headers = [
        ("connection", "Upgrade"),
        ("upgrade", "websocket"),
        ("sec-websocket-version", "13"),
        ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ];
    let path = "/v1/ws?redirect=http&device=web-1&since=0";
    let at = server.push((owner + 1) % 3);
    let answer = http::request(&at, "GET", path, Some(&token), &headers, b"").await;
    assert_eq!(answer.status, 307, "{answer:?}");
    let location = answer.header("location");
    assert!(location.contains(&server.push(owner)) && location.contains("device=web-1"), "{location}");
    let mut socket = Socket::open(location, Some(&token)).await;
    let welcome = socket.expect("welcome").await;
    assert_eq!((&welcome["node"], &welcome["since"]), (&json!(format!("push-{owner}")), &json!(0)));
    let stays = Socket::try_open(&format!("ws://{}{path}", server.push(owner)), Some(&token), &[]).await;
    assert!(stays.is_ok(), "the owner itself does not redirect");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_client_library_follows_moves_and_hands_each_message_on_once() {
    let server = three().await;
    let users: Vec<String> = (0..12).map(|n| format!("mover-{n}")).collect();
    let mut clients = Vec::new();
    for user in &users {
        let token = server.token(user).await;
        let client = ringpush::client::connect(format!("http://{}", server.push(0)), token);
        let client = client.device("mover").ask_first(false).start().unwrap();
        clients.push(client);
    }
    let publishing = async {
        for n in 0..200 {
            for user in &users {
                server.publish(user, json!(n)).await;
            }
        }
    };
    let receiving = futures_util::future::join_all(clients.iter_mut().map(async |client| {
        let (mut seen, mut last) = (0u64, 0);
        while seen < 200 {
            match client.next().await.expect("the client goes on") {
                Some(Item::Message(message)) => {
                    assert_eq!(message.payload.get(), seen.to_string(), "each once and in order");
                    assert!(last == 0 || message.seq == last + 1);
                    last = message.seq;
                    seen += 1;
                }
                other => panic!("{other:?}"),
            }
        }
        match client.state() {
            State::CatchingUp { node, .. } | State::Live { node } | State::Moving { node, .. } => node,
            other => panic!("{other:?}"),
        }
    }));
    let (nodes, ()) = tokio::join!(receiving, publishing);
    for (user, node) in users.iter().zip(nodes) {
        assert_eq!(node, format!("push-{}", owner_of(user)), "{user} ended up with its owner");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leaving_closes_every_socket_with_a_reason_and_exits_cleanly() {
    let mut server = three().await;
    let mut sockets = Vec::new();
    for n in 0..30 {
        let token = server.token(&format!("user-{n}")).await;
        let mut socket =
            Socket::open(&format!("ws://{}/v1/ws?hops=2", server.push(n % 3)), Some(&token)).await;
        socket.caught_up().await;
        sockets.push(socket);
    }
    let closing = futures_util::future::join_all(sockets.iter_mut().map(Socket::closed));
    let (code, closed) = tokio::join!(server.terminate(), closing);
    assert_eq!(code, 0, "{}", server.log());
    for closed in closed {
        assert_eq!((closed.code, closed.reconnect), (4302, true));
    }
}
