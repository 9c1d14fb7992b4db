//! Handshakes: in pieces, never finished, from strangers, and what is checked before the upgrade.

use serde_json::json;

use ringpush_testing::socket::Raw;
use ringpush_testing::{Options, Server, Socket, http};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_for_sockets_are_checked_before_the_upgrade() {
    let server = Server::with(Options::default().with("push.origins", r#"["https://shop.example"]"#)).await;
    let (at, token) = (server.at("push"), server.token("alice").await);
    let url = format!("ws://{at}/v1/ws");
    for (origin, opens) in [("https://shop.example", true), ("https://evil.example", false), ("null", false)]
    {
        let opened = Socket::try_open(&url, Some(&token), &[("origin", origin)]).await;
        assert_eq!(opened.err(), (!opens).then_some(403), "{origin}");
    }
    for query in ["device=no%20spaces", "since=-1", "since=soon", "hops=x", "redirect=ftp"] {
        assert_eq!(
            Socket::try_open(&format!("{url}?{query}"), Some(&token), &[]).await.err(),
            Some(422),
            "{query}"
        );
    }
    let offered =
        Socket::try_open(&url, Some(&token), &[("sec-websocket-protocol", "x, ringpush.v1.json")]).await;
    assert!(offered.is_ok());
    let plain = http::get(&at, "/v1/ws", Some(&token)).await;
    assert_eq!((plain.status, plain.header("upgrade"), plain.pointers().len()), (426, "websocket", 0));
    let forbidden =
        http::request(&at, "POST", "/v1/connect", Some(&token), &[("origin", "https://evil.example")], b"");
    assert_eq!(forbidden.await.status, 403);
    let headers = [("origin", "https://shop.example"), ("access-control-request-method", "POST")];
    let preflight = http::request(&at, "OPTIONS", "/v1/connect", None, &headers, b"").await;
    assert_eq!(preflight.header("access-control-allow-origin"), "https://shop.example");
    assert!(preflight.header("access-control-allow-headers").contains("authorization"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handshake_may_come_in_pieces_after_a_refusal_and_with_a_frame_behind_it() {
    let server = Server::start().await;
    let (at, token) = (server.at("push"), server.token("alice").await);
    let ping = Raw::frame(0x81, br#"{"type":"ping"}"#);
    // The first request of a connection, the second after one that was refused, and one that may
    // have a body.
    for (refused, more) in [(0, ""), (1, ""), (2, ""), (0, "content-length: 0\r\n")] {
        let mut raw = Raw::connect(&at).await;
        for _ in 0..refused {
            raw.write(Raw::request("nonsense", "").as_bytes()).await;
            let answer = raw.answer().await;
            assert_eq!((answer.status, answer.json()["status"].as_u64()), (401, Some(401)));
        }
        raw.write([Raw::request(&token, more).as_bytes(), &ping].concat().as_slice()).await;
        raw.upgraded().await;
        for kind in ["welcome", "caught_up", "pong"] {
            assert_eq!(raw.text().await["type"], kind, "after {refused}, {more}");
        }
    }
    let mut raw = Raw::connect(&at).await;
    for piece in Raw::request(&token, "").as_bytes().chunks(40) {
        raw.write(piece).await;
        // A round trip elsewhere: time enough, mostly, for the piece to be read by itself.
        assert_eq!(server.get("/v1/cluster").await.status, 200);
    }
    raw.upgraded().await;
    assert_eq!(raw.text().await["type"], "welcome");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_handshakes_that_are_never_finished_are_let_go() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let server = Server::start().await;
    let mut halves = Vec::new();
    for n in 0..200 {
        let mut stream = tokio::net::TcpStream::connect(server.at("push")).await.unwrap();
        let part: &[u8] = if n % 2 == 0 { b"" } else { b"GET /v1/ws HTTP/1.1\r\nHost: x\r\n" };
        stream.write_all(part).await.unwrap();
        halves.push(stream);
    }
    let mut socket = server.connect("alice", "").await;
    socket.caught_up().await;
    for mut half in halves {
        let mut rest = Vec::new();
        let ended = tokio::time::timeout(ringpush_testing::DEADLINE, half.read_to_end(&mut rest)).await;
        assert!(ended.is_ok(), "a handshake that is never finished must end");
    }
    server.publish("alice", json!(1)).await;
    assert_eq!(socket.messages(1).await, [json!(1)]);
    let fds = std::fs::read_dir(format!("/proc/{}/fd", server.pid())).unwrap().count();
    assert!(fds < 100, "{fds} files are open");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revoked_token_drives_nobody_out() {
    let server = Server::start().await;
    let stolen = server.token("alice").await;
    let path = "/v1/users/alice/sessions";
    let gone =
        http::request(&server.at("collect"), "DELETE", path, Some(&server.key("api_key")), &[], b"").await;
    assert_eq!(gone.status, 202);
    let mut rightful = server.connect("alice", "").await;
    rightful.caught_up().await;
    let url = format!("ws://{}/v1/ws", server.at("push"));
    for _ in 0..20 {
        assert_eq!(Socket::open(&url, Some(&stolen)).await.closed().await.code, 4501);
    }
    server.publish("alice", json!(1)).await;
    assert_eq!(rightful.messages(1).await, [json!(1)]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_port_that_others_can_reach_hands_out_no_tokens() {
    let server = Server::with(Options::default().with("push.listen", "0.0.0.0:0")).await;
    let at = server.at("push").replace("0.0.0.0", "127.0.0.1");
    let headers = [("content-type", "application/json")];
    let token = http::request(&at, "POST", "/dev/token", None, &headers, br#"{"user":"admin"}"#).await;
    assert_eq!(token.status, 404, "{token:?}");
    let local = Server::start().await;
    let (at, code) = (local.at("push"), ringpush::secret::page_code(&local.key("peer_secret")));
    let asked = async |path: &str, more: &[(&str, &str)]| {
        let headers = [&[("content-type", "application/json")], more].concat();
        http::request(&at, "POST", path, None, &headers, br#"{"user":"alice"}"#).await.status
    };
    let with = format!("/dev/token?code={code}");
    assert_eq!(asked("/dev/token", &[("x-ringpush-code", &code)]).await, 200);
    assert_eq!(asked(&with, &[]).await, 200);
    assert_eq!(asked("/dev/token", &[]).await, 403, "without the code that the greeting prints");
    assert_eq!(asked("/dev/token?code=guessed", &[]).await, 403);
    // A proxy on this machine hands on what comes from elsewhere.
    for header in ["forwarded", "x-forwarded-for", "x-forwarded-host", "via"] {
        assert_eq!(asked(&with, &[(header, "192.0.2.1")]).await, 403, "{header}");
    }
    assert_eq!(asked(&with, &[("origin", "http://evil.example")]).await, 403);
    let publish = json!({"to": {"user": "alice"}, "payload": 1});
    let published = http::post(&at, &format!("/dev/publish?code={code}"), None, &publish).await;
    assert_eq!(published.status, 202);
    assert_eq!(http::post(&at, "/dev/publish", None, &publish).await.status, 403);
}

/// Whoever has configured a key has users of its own, whatever the stores are.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_with_keys_of_somebody_hands_out_no_tokens() {
    for (key, value) in [
        ("auth.token_key", "0123456789abcdef0123456789abcdef"),
        ("collect.api_keys", ringpush_testing::API_KEY),
        ("peer.secret", ringpush_testing::PEER_SECRET),
    ] {
        let server = Server::with(Options::default().with(key, value)).await;
        let secret = if key == "peer.secret" { value.to_owned() } else { server.key("peer_secret") };
        let path = format!("/dev/token?code={}", ringpush::secret::page_code(&secret));
        let answer = http::post(&server.at("push"), &path, None, &json!({"user": "alice"})).await;
        assert_eq!(answer.status, 404, "{key}");
        let shown = http::get(&server.at("push"), "/dev", None).await.json();
        assert_eq!(shown["development"], false);
    }
}

/// Strangers knock far beyond the budget, and whoever brings a good token is served all the same;
/// what was refused is counted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_do_not_spend_the_budget_of_those_who_are_known() {
    let server = Server::with(Options::default().with("push.accept_per_s", "5")).await;
    let url = format!("ws://{}/v1/ws", server.at("push"));
    let mut refused = Vec::new();
    for n in 0..60 {
        let token = (n % 2 == 0).then_some("not-a-token");
        match Socket::try_open(&url, token, &[]).await {
            Ok(_) => assert_eq!(token, None, "a bad token is refused"),
            Err(status) => refused.push(status),
        }
    }
    assert!(refused.contains(&401) && refused.contains(&503), "strangers were too many: {refused:?}");
    for n in 0..8 {
        let mut known = server.connect(&format!("user-{n}"), "").await;
        known.expect("welcome").await;
    }
    assert!(server.metric("ringpush_credentials_refused_total{kind=\"token\"}").await >= 1.0);
}
