//! HTTP as the RFCs have it, on every listener alike: what a proxy, a load balancer or a scanner
//! may send.

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use ringpush_testing::{DEADLINE, Options, Server, http};

/// Every listener that speaks HTTP to strangers.
const LISTENERS: [&str; 5] = ["push", "collect", "auth", "dispatch", "ops"];

/// Sends these bytes, and reads until there are `answers` whole answers; the connection stays open
/// meanwhile.
async fn answered(at: &str, bytes: &[u8], answers: usize) -> Vec<http::Answer> {
    let mut stream = TcpStream::connect(at).await.unwrap();
    // A server that refuses early closes while we still write: its answer is what counts.
    let _ = stream.write_all(bytes).await;
    let reading = async {
        let (mut heard, mut read) = (Vec::new(), Vec::new());
        while read.len() < answers {
            if stream.read_buf(&mut heard).await.unwrap_or(0) == 0 {
                panic!("closed after {} answers: {:?}", read.len(), String::from_utf8_lossy(&heard));
            }
            while let Some(length) = whole(&heard) {
                read.push(http::parse(&heard.drain(..length).collect::<Vec<_>>()));
            }
        }
        read
    };
    tokio::time::timeout(DEADLINE, reading).await.unwrap_or_else(|_| panic!("{at}: no answer in time"))
}

/// How long the first answer is, if it is whole.
fn whole(heard: &[u8]) -> Option<usize> {
    let head = heard.windows(4).position(|four| four == b"\r\n\r\n")? + 4;
    let text = String::from_utf8_lossy(&heard[..head]).to_lowercase();
    let length = text.split("content-length: ").nth(1).and_then(|rest| rest.split("\r\n").next());
    let length = head + length.map_or(0, |length| length.parse::<usize>().unwrap());
    (heard.len() >= length).then_some(length)
}

async fn status(at: &str, bytes: &[u8]) -> u16 {
    answered(at, bytes, 1).await[0].status
}

/// A publish, as bytes.
fn publish(server: &Server, user: &str) -> Vec<u8> {
    let body = json!({"to": {"user": user}, "payload": 1}).to_string();
    let head = format!(
        "POST /v1/messages HTTP/1.1\r\nHost: c\r\nAuthorization: Bearer {}\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n",
        server.key("api_key"),
        body.len()
    );
    [head.into_bytes(), body.into_bytes()].concat()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_is_answered_whatever_else_has_begun_to_come() {
    let server = Server::start().await;
    for rest in ["\r\n", "POST /v1/mess", "GET / HTTP/1.1\r\nHost:", "\x01"] {
        let bytes = [publish(&server, "alice"), rest.as_bytes().to_vec()].concat();
        assert_eq!(status(&server.at("collect"), &bytes).await, 202, "{rest:?}");
    }
    for listener in LISTENERS {
        let at = server.at(listener);
        for rest in ["\r\n", "GET /x HTTP/1.1\r\nHo"] {
            let request = format!("GET /nothing HTTP/1.1\r\nHost: {at}\r\n\r\n{rest}");
            assert_eq!(status(&at, request.as_bytes()).await, 404, "{listener} {rest:?}");
        }
        // Two whole ones: both are answered, in order.
        let two = format!("GET /nothing HTTP/1.1\r\nHost: {at}\r\n\r\n").repeat(2);
        assert!(answered(&at, two.as_bytes(), 2).await.iter().all(|answer| answer.status == 404));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_head_that_cannot_be_served_is_answered_before_the_connection_is_closed() {
    let server = Server::start().await;
    for listener in LISTENERS {
        let at = server.at(listener);
        let many = format!("GET / HTTP/1.1\r\nHost: x\r\n{}\r\n", "X-A: b\r\n".repeat(300));
        let long = format!("GET /{} HTTP/1.1\r\nHost: x\r\n\r\n", "a".repeat(70_000));
        for (what, bytes, expected) in [
            ("a bad head", "GET / HTTP/1.1\r\nHost x\r\n\r\n", 400),
            ("a bad method", "G@T / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
            ("300 headers", many.as_str(), 431),
            ("70 kB of path", long.as_str(), 414),
        ] {
            assert_eq!(status(&at, bytes.as_bytes()).await, expected, "{listener}: {what}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_has_one_host_and_a_path_that_can_be_read() {
    let server = Server::start().await;
    for listener in LISTENERS {
        let at = server.at(listener);
        for (what, head) in [
            ("no host", "GET /nothing HTTP/1.1\r\n"),
            ("two hosts", "GET /nothing HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: 127.0.0.1\r\n"),
            ("a host that is none", "GET /nothing HTTP/1.1\r\nHost: a b\r\n"),
            ("two origins", "GET /nothing HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: a\r\nOrigin: a\r\n"),
            ("a percent sign that escapes nothing", "GET /v1/%zz HTTP/1.1\r\nHost: 127.0.0.1\r\n"),
            ("one at the end", "GET /v1/users/a% HTTP/1.1\r\nHost: 127.0.0.1\r\n"),
        ] {
            let answer = &answered(&at, format!("{head}\r\n").as_bytes(), 1).await[0];
            assert_eq!(answer.status, 400, "{listener}: {what}");
            assert!(answer.pointers().is_empty());
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_load_balancer_that_looks_at_the_root_hears_that_somebody_is_there() {
    let server = Server::start().await;
    for listener in LISTENERS {
        let at = server.at(listener);
        for request in [
            "OPTIONS / HTTP/1.0\r\n\r\n",
            "HEAD / HTTP/1.0\r\n\r\n",
            "OPTIONS / HTTP/1.1\r\nHost: balancer.example\r\n\r\n",
            "OPTIONS * HTTP/1.1\r\nHost: balancer.example\r\n\r\n",
        ] {
            let mut stream = TcpStream::connect(&at).await.unwrap();
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut heard = vec![0; 12];
            stream.read_exact(&mut heard).await.unwrap();
            let heard = String::from_utf8(heard).unwrap();
            assert!(heard[9..].starts_with('2'), "{listener}: {request:?}: {heard}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_closes_its_half_gets_its_answer() {
    let server = Server::start().await;
    let mut requests: Vec<(String, Vec<u8>, &str)> = LISTENERS
        .map(|listener| {
            let at = server.at(listener);
            let request = format!("GET /nothing HTTP/1.1\r\nHost: {at}\r\n\r\n").into_bytes();
            (at, request, "HTTP/1.1 404")
        })
        .into();
    requests.push((server.at("collect"), publish(&server, "alice"), "HTTP/1.1 202"));
    for (at, request, expected) in requests {
        let mut stream = TcpStream::connect(&at).await.unwrap();
        stream.write_all(&request).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut heard = String::new();
        // Until the server has closed too: no connection is left behind.
        tokio::time::timeout(DEADLINE, stream.read_to_string(&mut heard)).await.unwrap().unwrap();
        assert!(heard.starts_with(expected), "{heard:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_is_taken_as_it_stands_or_not_at_all() {
    let server = Server::start().await;
    let key = server.key("api_key");
    let body = json!({"to": {"user": "alice"}, "payload": 1}).to_string();
    for path in ["/v1/messages", "/v1/messages/batch"] {
        for coding in ["gzip", "br", "identity, gzip", "GZIP"] {
            let headers = [("content-type", "application/json"), ("content-encoding", coding)];
            let at = server.at("collect");
            let answer = http::request(&at, "POST", path, Some(&key), &headers, body.as_bytes()).await;
            assert_eq!(answer.status, 415, "{path} {coding}");
        }
    }
    let headers = [("content-type", "application/json"), ("content-encoding", "identity")];
    let at = server.at("collect");
    let plain = http::request(&at, "POST", "/v1/messages", Some(&key), &headers, body.as_bytes()).await;
    assert_eq!(plain.status, 202);
    let verify = [("content-type", "application/json"), ("content-encoding", "gzip")];
    let verified = http::request(&server.at("auth"), "POST", "/v1/verify", None, &verify, b"{}").await;
    assert_eq!(verified.status, 415);
    // A field that is null is one that is not there; a payload that is null is a value.
    for body in [
        json!({"to": {"user": "alice", "users": null}, "payload": null, "id": null, "ttl_s": null}),
        json!({"to": {"users": ["alice"], "user": null}, "payload": 1, "id": null}),
    ] {
        assert_eq!(server.try_publish(&body).await.status, 202, "{body}");
    }
    let without = server.try_publish(&json!({"to": null, "payload": 1})).await;
    assert_eq!(without.status, 422);
}

/// A request for a socket, with lines left out and added.
fn upgrade(path: &str, without: &str, with: &str) -> String {
    let lines = [
        format!("GET {path} HTTP/1.1"),
        "Host: push.example.com".to_owned(),
        "Connection: Upgrade".to_owned(),
        "Upgrade: websocket".to_owned(),
        "Sec-WebSocket-Version: 13".to_owned(),
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==".to_owned(),
    ];
    let kept = lines.iter().filter(|line| without.is_empty() || !line.starts_with(without));
    let head: Vec<&str> = kept.map(String::as_str).chain(with.lines()).collect();
    format!("{}\r\n\r\n", head.join("\r\n"))
}

/// The headers of a handshake, besides the host.
const HANDSHAKE: [(&str, &str); 4] = [
    ("connection", "Upgrade"),
    ("upgrade", "websocket"),
    ("sec-websocket-version", "13"),
    ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handshake_that_is_none_is_refused_before_the_upgrade() {
    let server = Server::start().await;
    let at = server.at("push");
    let path = "/v1/ws";
    for (what, request, expected) in [
        ("a good one", upgrade(path, "", ""), 101),
        ("HTTP/1.0", upgrade(path, "", "").replace("HTTP/1.1", "HTTP/1.0"), 400),
        ("HEAD", String::new(), 400),
        ("no host", upgrade(path, "Host", ""), 400),
        ("two hosts", upgrade(path, "", "Host: push.example.com"), 400),
        ("two origins", upgrade(path, "", "Origin: https://a\nOrigin: https://b"), 400),
        ("no key", upgrade(path, "Sec-WebSocket-Key", ""), 400),
        ("an empty key", upgrade(path, "Sec-WebSocket-Key", "Sec-WebSocket-Key:"), 400),
        ("a short key", upgrade(path, "Sec-WebSocket-Key", "Sec-WebSocket-Key: c2hvcnQ="), 400),
        ("a key that is no base64", upgrade(path, "Sec-WebSocket-Key", "Sec-WebSocket-Key: !!!"), 400),
        ("two keys", upgrade(path, "", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="), 400),
        ("two versions", upgrade(path, "Sec-WebSocket-Version", "Sec-WebSocket-Version: 13, 8"), 426),
        ("version 8", upgrade(path, "Sec-WebSocket-Version", "Sec-WebSocket-Version: 8"), 426),
        ("a subprotocol of another case", upgrade(path, "", "Sec-WebSocket-Protocol: Ringpush.V1.json"), 400),
        ("a body", upgrade(path, "", "Content-Length: 4"), 400),
        ("a bearer with nothing behind it", upgrade(path, "", "Authorization: Bearer"), 401),
        ("one with a space", upgrade(path, "", "Authorization: Bearer "), 401),
        ("one that is no text", upgrade(path, "", "Authorization: Bearer é"), 401),
        ("a node above", upgrade("/n/../v1/ws", "", ""), 404),
        ("no node", upgrade("/n//v1/ws", "", ""), 404),
        ("a node of no name", upgrade("/n/VM/v1/ws", "", ""), 404),
        ("an escape of nothing", upgrade("/n/%zz/v1/ws", "", ""), 400),
    ] {
        if what == "HEAD" {
            // Its answer has a length and no body.
            let answer = http::request(&at, "HEAD", path, None, &HANDSHAKE, b"").await;
            assert_eq!(answer.status, expected, "{what}");
            continue;
        }
        let answer = &answered(&at, request.as_bytes(), 1).await[0];
        assert_eq!(answer.status, expected, "{what}");
        if expected == 426 {
            assert_eq!(answer.header("sec-websocket-version"), "13");
        }
        // The same as the second request of its connection, which hyper reads.
        let second = format!("GET /nothing HTTP/1.1\r\nHost: {at}\r\n\r\n{request}");
        assert_eq!(answered(&at, second.as_bytes(), 2).await[1].status, expected, "{what}, second");
    }
    server.nobody_is_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_are_what_they_say_and_pages_are_shown_in_no_frame() {
    let server = Server::start().await;
    for listener in LISTENERS {
        let at = server.at(listener);
        for path in ["/", "/nothing", "/v1/%zz"] {
            let answer = http::get(&at, path, None).await;
            assert_eq!(answer.header("x-content-type-options"), "nosniff", "{listener} {path}");
        }
    }
    assert_eq!(server.try_publish(&json!({})).await.header("x-content-type-options"), "nosniff");
    for listener in ["push", "ops"] {
        let policy =
            http::get(&server.at(listener), "/", None).await.header("content-security-policy").to_owned();
        assert!(
            policy.contains("frame-ancestors 'none'") && policy.contains("default-src 'self'"),
            "{policy}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ops_and_pages_of_this_machine_are_not_for_other_hosts() {
    let server = Server::start().await;
    for (listener, paths) in
        [("push", &["/", "/page.js", "/dev"][..]), ("ops", &["/", "/metrics", "/readyz", "/cluster"])]
    {
        let at = server.at(listener);
        for path in paths {
            let asked =
                |host: &str| format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
            for host in [at.as_str(), "localhost", "[::1]:1"] {
                assert_eq!(status(&at, asked(host).as_bytes()).await, 200, "{listener}{path} {host}");
            }
            for host in ["evil.example", "127.0.0.1.evil.example:9090", "10.0.0.1"] {
                assert_eq!(status(&at, asked(host).as_bytes()).await, 403, "{listener}{path} {host}");
            }
        }
    }
    // Behind a load balancer on the same machine the socket itself has the balancer's name.
    let socket = upgrade("/v1/ws", "", "");
    assert_eq!(status(&server.at("push"), socket.as_bytes()).await, 101);
    // A listener that others reach has names that only they know.
    let open = Server::with(Options::default().with("ops.listen", "0.0.0.0:0")).await;
    let at = open.at("ops").replace("0.0.0.0", "127.0.0.1");
    assert_eq!(status(&at, b"GET /livez HTTP/1.1\r\nHost: pod-7\r\n\r\n").await, 200);
}

/// A stranger's body is not waited for: the token decides before a byte of it is read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_asks_for_a_place_is_known_before_the_body_is_read() {
    let server = Server::start().await;
    let head = |token: &str| {
        format!(
            "POST /v1/connect HTTP/1.1\r\nHost: c\r\nAuthorization: Bearer {token}\r\nContent-Type: application/json\r\n\
             Content-Length: 100\r\n\r\n{{"
        )
    };
    assert_eq!(status(&server.at("push"), head("x").as_bytes()).await, 401);
    // A good one has until its deadline.
    let whole = head(&server.token("alice").await).replace("100", "2") + "}";
    assert_eq!(status(&server.at("push"), whole.as_bytes()).await, 200);
}
