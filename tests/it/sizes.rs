//! Requests that are huge, slow or never whole: what they may hold together, and for how long.

use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{self, StreamExt};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::{Value, json};
use tokio::net::TcpStream;

use ringpush_testing::{DEADLINE, Server, http};

/// Streams of one connection, as many as the server allows.
const STREAMS: usize = 1_000;
/// What each sends of a message of nearly that size, which then never ends: as much as one may
/// have.
const PIECE: usize = 300_000;

fn resident_mb(server: &Server) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").trim().parse::<usize>().unwrap() / 1024
}

/// In place of a `grpc-status`: the server has closed the connection, as HTTP/2 lets it with one
/// whose streams it must end by the hundred.
const CLOSED: u16 = 999;

/// A connection's worth of calls that begin a message and never end it; how each was answered, as
/// `grpc-status`.
async fn calls_that_never_end(at: &str, path: &str, key: Option<&str>) -> Vec<u16> {
    let stream = TcpStream::connect(at).await.unwrap();
    let (client, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    let connection = tokio::spawn(connection);
    let call = |_| {
        let (mut client, key) = (client.clone(), key.map(str::to_owned));
        let uri = format!("http://{at}{path}");
        async move {
            let length = (PIECE as u32 + 1_000).to_be_bytes();
            let begun = [&[0][..], &length, &vec![0x12; PIECE]].concat();
            let pieces: Vec<Result<Frame<Bytes>, std::convert::Infallible>> =
                begun.chunks(16_000).map(|piece| Ok(Frame::data(Bytes::copy_from_slice(piece)))).collect();
            let body = StreamBody::new(stream::iter(pieces).chain(stream::pending()));
            let mut request =
                Request::post(uri).header("content-type", "application/grpc").header("te", "trailers");
            if let Some(key) = key {
                request = request.header("authorization", format!("Bearer {key}"));
            }
            match client.send_request(request.body(body).unwrap()).await {
                Ok(answer) => grpc_status(answer).await,
                Err(_) => CLOSED,
            }
        }
    };
    let all = stream::iter(0..STREAMS).map(call).buffer_unordered(STREAMS).collect().await;
    connection.abort();
    all
}

async fn grpc_status(answer: Response<hyper::body::Incoming>) -> u16 {
    let of = |headers: &hyper::HeaderMap| {
        headers.get("grpc-status").map(|status| status.to_str().unwrap().parse::<u16>().unwrap())
    };
    if let Some(status) = of(answer.headers()) {
        return status;
    }
    match answer.into_body().collect().await {
        Ok(body) => body.trailers().and_then(of).expect("every call has a status"),
        Err(_) => CLOSED,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_of_a_strangers_call_is_read_before_the_key() {
    let server = Server::start().await;
    let before = resident_mb(&server);
    for path in ["/ringpush.v1.Collect/Publish", "/ringpush.v1.Collect/PublishStream"] {
        let at = server.at("collect");
        let both = async {
            tokio::join!(
                calls_that_never_end(&at, path, None),
                calls_that_never_end(&at, path, Some("wrong"))
            )
        };
        let (one, two) = tokio::time::timeout(DEADLINE, both).await.expect("answered at once");
        let count = |code: u16| one.iter().chain(&two).filter(|status| **status == code).count();
        assert!(
            count(16) > 0 && count(16) + count(CLOSED) == 2 * STREAMS,
            "unauthenticated: {one:?} {two:?}"
        );
    }
    let grown = resident_mb(&server) - before;
    assert!(grown < 100, "{grown} MB");
    server.publish("alice", json!(1)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_that_never_end_hold_no_more_than_their_budget_and_not_for_ever() {
    let server = Server::start().await;
    let (at, key) = (server.at("collect"), server.key("api_key"));
    let before = resident_mb(&server);
    let calls = |path: &'static str| {
        let (at, key) = (at.clone(), key.clone());
        tokio::spawn(async move { calls_that_never_end(&at, path, Some(&key)).await })
    };
    let (one, two) = (calls("/ringpush.v1.Collect/Publish"), calls("/ringpush.v1.Collect/PublishStream"));
    let mut most = 0;
    let both = async { tokio::join!(one, two) };
    tokio::pin!(both);
    let (one, two) = loop {
        tokio::select! {
            both = &mut both => break both,
            () = tokio::time::sleep(Duration::from_millis(50)) => most = most.max(resident_mb(&server)),
        }
    };
    let (one, two) = (one.unwrap(), two.unwrap());
    let count = |code: u16| one.iter().chain(&two).filter(|status| **status == code).count();
    assert_eq!(count(4) + count(14), 2 * STREAMS, "too late, or too much: {one:?} {two:?}");
    assert!(count(4) > 0 && count(14) > 0, "{} {}", count(4), count(14));
    // The budget is 256 MiB of messages; besides them there is what they came in.
    assert!(most - before < 500, "{most} MB");
    server.publish("alice", json!("served again")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_reaches_no_more_than_ten_thousand_and_costs_no_more_than_it_says() {
    let server = Server::start().await;
    let batch = |items: usize, recipients: usize| {
        let users: Vec<String> = (0..recipients).map(|n| format!("u{n}")).collect();
        let item = json!({"to": {"users": users}, "payload": 1});
        json!({"messages": vec![item; items]})
    };
    let send = async |body: Value| {
        http::post(&server.at("collect"), "/v1/messages/batch", Some(&server.key("api_key")), &body).await
    };
    let before = resident_mb(&server);
    let huge = batch(1_000, 1_000);
    let sending = (0..8).map(|_| send(huge.clone()));
    for answer in futures_util::future::join_all(sending).await {
        assert_eq!(answer.status, 202);
        let results = answer.json()["results"].as_array().unwrap().clone();
        let (within, beyond) = results.split_at(10);
        assert!(within.iter().all(|one| one["accepted"].is_array() || one["error"]["status"] == 503));
        assert!(
            beyond.len() == 990 && beyond.iter().all(|one| one["error"]["status"] == 422),
            "{}",
            beyond[0]
        );
    }
    let grown = resident_mb(&server) - before;
    assert!(grown < 250, "{grown} MB");
    // As much as is allowed is stored, and others are served meanwhile.
    let small = json!({"to": {"user": "a"}, "payload": 1});
    let (full, beside) = tokio::join!(send(batch(10, 1_000)), server.try_publish(&small));
    assert_eq!((full.status, beside.status), (202, 202));
    let results = full.json()["results"].as_array().unwrap().clone();
    assert!(
        results.iter().all(|result| result["accepted"].as_array().unwrap().len() == 1_000),
        "{}",
        results[0]
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_payload_that_would_kill_its_readers_is_refused_wherever_it_comes() {
    let server = Server::start().await;
    let deep = "[".repeat(30_000) + &"]".repeat(30_000);
    let headers = [("content-type", "application/json")];
    let send = async |path: &str, body: String| {
        let at = server.at("collect");
        http::request(&at, "POST", path, Some(&server.key("api_key")), &headers, body.as_bytes()).await
    };
    let one = |payload: &str| format!(r#"{{"to":{{"user":"alice"}},"payload":{payload}}}"#);
    let refused = send("/v1/messages", one(&deep)).await;
    assert_eq!((refused.status, refused.pointers()), (422, vec!["/payload".to_owned()]));
    let batch = format!(r#"{{"messages":[{},{}]}}"#, one(&deep), one("1"));
    let mixed = send("/v1/messages/batch", batch).await.json();
    assert_eq!(mixed["results"][0]["error"]["status"], 422);
    assert!(mixed["results"][1]["accepted"][0]["seq"].is_u64());
    let at_the_limit = "[".repeat(128) + &"]".repeat(128);
    assert_eq!(send("/v1/messages", one(&at_the_limit)).await.status, 202);
}
