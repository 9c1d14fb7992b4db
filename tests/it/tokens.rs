//! Tokens: issued, verified, revoked, run out.

use std::time::Duration;

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::{Value, json};

use ringpush_testing::foreign::Foreign;
use ringpush_testing::{Options, Server, Socket, eventually, http};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_issued_token_is_verified_and_others_are_not() {
    let server = Server::start().await;
    let auth = server.at("auth");
    let token = server.token("alice").await;
    let verify = async |token: &str| http::post(&auth, "/v1/verify", None, &json!({ "token": token })).await;
    let good = verify(&token).await;
    assert_eq!((good.status, &good.json()["user"]), (200, &json!("alice")));
    assert_eq!(good.json()["claims"]["sub"], "alice");
    let part = |value: Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let none = format!("{}.{}.", part(json!({"alg": "none"})), token.split('.').nth(1).unwrap());
    for bad in ["", "x", none.as_str(), &token[..token.len() - 2], &format!("{token}x")] {
        assert_eq!(verify(bad).await.status, 401, "{bad}");
    }
    assert_eq!(http::post(&auth, "/v1/verify", None, &json!({"token": 7})).await.pointers(), ["/token"]);
    let jwks = http::get(&auth, "/.well-known/jwks.json", None).await;
    assert_eq!(jwks.json(), json!({"keys": []}), "a shared secret is never shown");
    let wrong = http::post(&auth, "/v1/tokens", Some("wrong"), &json!({"user": "alice"})).await;
    assert_eq!(wrong.status, 401);
    let admin = server.key("admin_key");
    for (body, pointer) in [
        (json!({}), "/user"),
        (json!({"user": ""}), "/user"),
        (json!({"user": "a", "ttl_s": 0}), "/ttl_s"),
        (json!({"user": "a", "ttl_s": "1h"}), "/ttl_s"),
    ] {
        let answer = http::post(&auth, "/v1/tokens", Some(&admin), &body).await;
        assert_eq!((answer.status, answer.pointers()), (422, vec![pointer.to_owned()]), "{body}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_public_key_verifies_and_does_not_sign() {
    let pem = include_str!("../keys/ed-public.pem");
    let server = Server::with(Options::default().with("auth.token_key", pem)).await;
    let private = jsonwebtoken::EncodingKey::from_ed_pem(include_bytes!("../keys/ed-private.pem")).unwrap();
    let claims = json!({"sub": "alice", "exp": 4_000_000_000u64});
    let header = jsonwebtoken::Header::new(jsonwebtoken::Algorithm::EdDSA);
    let token = jsonwebtoken::encode(&header, &claims, &private).unwrap();
    let mut socket = Socket::open(&format!("ws://{}/v1/ws", server.at("push")), Some(&token)).await;
    assert_eq!(socket.expect("welcome").await["user"], "alice");
    let (admin, body) = (server.key("admin_key"), json!({"user": "a"}));
    assert_eq!(http::post(&server.at("auth"), "/v1/tokens", Some(&admin), &body).await.status, 403);
    let jwks = http::get(&server.at("auth"), "/.well-known/jwks.json", None).await.json();
    assert_eq!(jwks["keys"][0]["crv"], "Ed25519");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_ends_with_its_token_unless_it_is_refreshed() {
    let server = Server::start().await;
    let url = format!("ws://{}/v1/ws", server.at("push"));
    let mut ends = Socket::open(&url, Some(&server.token_for("alice", 2).await)).await;
    let mut stays = Socket::open(&url, Some(&server.token_for("alice", 2).await)).await;
    ends.caught_up().await;
    stays.caught_up().await;
    stays.say(&json!({"type": "refresh", "token": server.token("alice").await})).await;
    let refreshed = stays.expect("refreshed").await;
    assert!(refreshed["expires_at"].as_str().unwrap().ends_with('Z'));
    assert_eq!(ends.closed().await.code, 4501);
    let seq = server.publish("alice", json!("still here")).await;
    assert_eq!(stays.expect("message").await["seq"], seq);
    stays.say(&json!({"type": "refresh", "token": server.token("bob").await})).await;
    assert_eq!(stays.closed().await.code, 4501, "a refresh does not change the user");
    server.nobody_is_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disconnect_closes_every_socket_and_refuses_every_token_until_then() {
    let server = Server::with(Options::nodes(3)).await;
    let old = server.token("alice").await;
    let mut sockets = Vec::new();
    for n in 0..3 {
        let mut socket = Socket::open(&format!("ws://{}/v1/ws?hops=2", server.push(n)), Some(&old)).await;
        socket.caught_up().await;
        sockets.push(socket);
    }
    let bob = server.token("bob").await;
    let mut other = Socket::open(&format!("ws://{}/v1/ws?hops=2", server.push(0)), Some(&bob)).await;
    other.caught_up().await;
    let path = "/v1/users/alice/sessions";
    let gone =
        http::request(&server.at("collect"), "DELETE", path, Some(&server.key("api_key")), &[], b"").await;
    assert_eq!(gone.status, 202, "{gone:?}");
    for socket in &mut sockets {
        let closed = socket.closed().await;
        assert_eq!((closed.code, closed.error.as_deref()), (4501, Some("unauthorized")));
    }
    other.is_quiet(Duration::from_millis(50)).await;
    let url = format!("ws://{}/v1/ws", server.push(0));
    assert_eq!(Socket::open(&url, Some(&old)).await.closed().await.code, 4501);
    let new = server.token("alice").await;
    assert_eq!(Socket::open(&url, Some(&new)).await.expect("welcome").await["user"], "alice");
}

/// An issuer with a private key of its own: its public half stands in one server's configuration,
/// and another fetches it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_may_be_fetched_from_the_issuer() {
    let public = include_str!("../keys/ec-public.pem");
    let issuer = Server::with(Options::default().with("auth.token_key", public)).await;
    let jwks = format!("http://{}/.well-known/jwks.json", issuer.at("auth"));
    let server = Server::with(Options::default().with("auth.jwks_url", &jwks)).await;
    let private = jsonwebtoken::EncodingKey::from_ec_pem(include_bytes!("../keys/ec-private.pem")).unwrap();
    let header = jsonwebtoken::Header::new(jsonwebtoken::Algorithm::ES256);
    let claims = json!({"sub": "alice", "exp": 4_000_000_000u64});
    let token = jsonwebtoken::encode(&header, &claims, &private).unwrap();
    let url = format!("ws://{}/v1/ws", server.at("push"));
    eventually("the keys are there", async || Socket::try_open(&url, Some(&token), &[]).await.is_ok()).await;
    let stranger = jsonwebtoken::EncodingKey::from_secret(public.as_bytes());
    let forged = jsonwebtoken::encode(&jsonwebtoken::Header::default(), &claims, &stranger).unwrap();
    assert_eq!(Socket::try_open(&url, Some(&forged), &[]).await.err(), Some(401));
}

/// The keys stand in a file that a web server of somebody else shows. One that is too large is
/// refused and named; keys that were turned are fetched because a token names one of them, also
/// where it is only asked about.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_are_bounded_and_turned_keys_are_fetched_when_a_token_is_asked_about() {
    let keys_of = async |pem: &str, kid: &str| {
        let issuer = Server::with(Options::default().with("auth.token_key", pem)).await;
        let mut keys = http::get(&issuer.at("auth"), "/.well-known/jwks.json", None).await.json();
        keys["keys"][0]["kid"] = json!(kid);
        keys
    };
    let (old, new) = (
        keys_of(include_str!("../keys/ec-public.pem"), "old").await,
        keys_of(include_str!("../keys/ed-public.pem"), "new").await,
    );
    let site =
        Foreign::start(&["python3", "-m", "http.server", "--bind", "127.0.0.1", "-d", "{dir}", "{port}"])
            .await;
    let file = site.directory.path().join("keys.json");
    let shown = |text: &[u8]| std::fs::write(&file, text).unwrap();
    shown(format!("{old}{}", " ".repeat(1024 * 1024)).as_bytes());
    let url = format!("http://127.0.0.1:{}/keys.json", site.port);
    let server = Server::with(Options::default().with("auth.jwks_url", &url)).await;
    eventually("keys that are too large are named", async || {
        server.log().contains("larger than 1048576 bytes")
    })
    .await;
    let claims = json!({"sub": "alice", "exp": 4_000_000_000u64});
    let token = |algorithm, keys: &Value, key: &jsonwebtoken::EncodingKey| {
        let mut header = jsonwebtoken::Header::new(algorithm);
        header.kid = Some(keys["keys"][0]["kid"].as_str().unwrap().to_owned());
        jsonwebtoken::encode(&header, &claims, key).unwrap()
    };
    let first = jsonwebtoken::EncodingKey::from_ec_pem(include_bytes!("../keys/ec-private.pem")).unwrap();
    let first = token(jsonwebtoken::Algorithm::ES256, &old, &first);
    let second = jsonwebtoken::EncodingKey::from_ed_pem(include_bytes!("../keys/ed-private.pem")).unwrap();
    let second = token(jsonwebtoken::Algorithm::EdDSA, &new, &second);
    let at = server.at("auth");
    let answer =
        async |token: &str| http::post(&at, "/v1/verify", None, &json!({ "token": token })).await.status;
    assert_eq!(answer(&first).await, 503, "no key was fetched");
    shown(old.to_string().as_bytes());
    eventually("the keys are there", async || answer(&first).await == 200).await;
    assert_eq!(answer(&second).await, 401, "a key that is not known");
    shown(new.to_string().as_bytes());
    eventually("the turned keys are fetched", async || answer(&second).await == 200).await;
    assert_eq!(answer(&first).await, 401, "its key is no longer shown");
}
