//! The roles as processes of their own: behind nginx, over gRPC, and when they are started wrongly.

use std::time::Duration;

use ringpush::transport::peer::Dial;
use ringpush::wire::proto::collect as message;
use serde_json::json;
use tonic::Request;
use tonic::metadata::MetadataValue;
use tonic::transport::Channel;

use ringpush_testing::cluster::Cluster;
use ringpush_testing::foreign::{Foreign, ReplicaSet, free_port, mongod_path, redis};
use ringpush_testing::{DEADLINE, Socket, clean, eventually, http, program};

#[allow(clippy::all, clippy::pedantic)]
mod calls {
    include!(concat!(env!("OUT_DIR"), "/calls/ringpush.v1.rs"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_name_leads_to_every_node_and_nowhere_else() {
    let cluster = Cluster::up(&[]).await;
    let token = cluster.token("alice").await;
    let balancer = cluster.balancer();
    // By connect, with a ticket, to the owner.
    let connect = http::post(&balancer, "/v1/connect", Some(&token), &json!({})).await;
    assert_eq!(connect.status, 200, "{connect:?}");
    let place = connect.json();
    let ring = ringpush::ring::Ring::build(["push-0", "push-1", "push-2"].map(|name| (name, 1.0)));
    assert_eq!(place["node"].as_str(), ring.owner_of("alice"));
    let mut socket = Socket::open(place["url"].as_str().unwrap(), None).await;
    assert_eq!(socket.expect("welcome").await["node"], place["node"]);
    let seq = cluster.publish("alice", json!("hello")).await;
    assert_eq!(socket.until("message").await.1["seq"], seq);
    // Each node by its path, and only a node.
    for node in ["push-0", "push-1", "push-2"] {
        let mut socket = Socket::open(&format!("ws://{balancer}/n/{node}/v1/ws?hops=2"), Some(&token)).await;
        assert_eq!(socket.expect("welcome").await["node"], node);
    }
    let unknown = http::get(&balancer, "/n/push-9/v1/ws", None).await;
    assert_eq!((unknown.status, unknown.header("retry-after")), (503, "1"));
    for path in [
        "/n/169.254.169.254/v1/ws",
        "/n/push-0.evil/v1/ws",
        "/n/push-0/../v1/ws/x",
        "/n/PUSH-0/v1/ws",
        "/n//v1/ws",
    ] {
        let answer = http::get(&balancer, path, None).await;
        assert!(
            [400, 404, 426].contains(&answer.status) || answer.status == 400,
            "{path}: {}",
            answer.status
        );
    }
    // Whoever is not a peer is told so, and does nothing.
    let peer = cluster.state["push"]["peer"].as_u64().unwrap();
    let host = cluster.state["processes"]["push-0"]["host"].as_str().unwrap();
    let remote = ringpush::transport::peer::RemotePush::new(
        &format!("{host}:{peer}"),
        "push-0",
        Dial { sign: std::sync::Arc::new(|_| "1.forged".to_owned()), tls: None },
    );
    let asked =
        tower::ServiceExt::oneshot(remote.unwrap().service(), ringpush::wire::peer::PushRequest::Ping);
    let refused = asked.await.unwrap_err().to_string();
    assert!(refused.contains("peer.secret"), "{refused}");
    // No query, and so no ticket, in the load balancer's log.
    let log = cluster.log("nginx");
    assert!(log.contains("/v1/ws") && !log.contains("ticket="), "{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn publishers_may_speak_grpc() {
    let server = ringpush_testing::Server::start().await;
    let channel =
        Channel::from_shared(format!("http://{}", server.at("collect"))).unwrap().connect().await.unwrap();
    let key: MetadataValue<_> = format!("Bearer {}", server.key("api_key")).parse().unwrap();
    let mut client = calls::collect_client::CollectClient::with_interceptor(
        channel.clone(),
        move |mut request: Request<()>| {
            request.metadata_mut().insert("authorization", key.clone());
            Ok(request)
        },
    );
    let publish = |users: &[&str], payload: &str, id: &str| message::PublishRequest {
        users: users.iter().map(|user| (*user).to_owned()).collect(),
        payload_json: payload.to_owned().into(),
        id: id.to_owned(),
        ..Default::default()
    };
    let mut alice = server.connect("alice", "").await;
    alice.caught_up().await;
    let first = client.publish(publish(&["alice"], r#"{"a": 1}"#, "one")).await.unwrap().into_inner();
    assert_eq!((first.id.as_str(), first.accepted.len(), first.error), ("one", 1, None));
    let shown = alice.until("message").await.1;
    assert_eq!((&shown["seq"], &shown["payload"]), (&json!(first.accepted[0].seq), &json!({"a": 1})));
    let requests = vec![
        publish(&["alice"], r#"{"a": 1}"#, "one"),
        publish(&["alice"], "2", "one"),
        publish(&["alice", "bob"], "3", ""),
        publish(&["alice"], "not json", ""),
        publish(&[], "4", ""),
    ];
    let answers = client.publish_stream(futures_util::stream::iter(requests)).await.unwrap();
    let mut answers = answers.into_inner();
    let mut results = Vec::new();
    while let Some(result) = answers.message().await.unwrap() {
        results.push(result);
    }
    assert_eq!(results.len(), 5, "in order, one for each");
    assert!(results[0].accepted[0].duplicate && results[0].accepted[0].seq == first.accepted[0].seq);
    assert_eq!(results[1].error.as_ref().unwrap().status, 409);
    assert_eq!(results[2].accepted.iter().map(|one| one.user.as_str()).collect::<Vec<_>>(), ["alice", "bob"]);
    assert_eq!(results[3].error.as_ref().unwrap().status, 422);
    assert!(results[4].error.as_ref().unwrap().detail.contains("/users"));
    let body = json!({"add": ["alice"]});
    let key = server.key("api_key");
    server.put("/v1/topics/news", &json!({})).await;
    let at = server.at("collect");
    ringpush_testing::http::post(&at, "/v1/topics/news/members", Some(&key), &body).await;
    let to_topics = |topics: &[&str], except: &[&str]| message::PublishRequest {
        topics: topics.iter().map(|topic| (*topic).to_owned()).collect(),
        except: except.iter().map(|user| (*user).to_owned()).collect(),
        ..publish(&[], "5", "t")
    };
    let by_topic = client.publish(to_topics(&["news"], &[])).await.unwrap().into_inner();
    assert_eq!(by_topic.error, None);
    let accepted = &by_topic.accepted[0];
    assert_eq!((accepted.topic.as_str(), accepted.members, accepted.stored), ("news", 1, 1));
    assert_eq!(alice.until("message").await.1["payload"], 3);
    assert_eq!(alice.until("message").await.1["via"], "news");
    let except = client.publish(to_topics(&["news"], &["alice"])).await.unwrap().into_inner();
    assert_eq!((except.accepted[0].members, except.error), (0, None));
    let unknown = client.publish(to_topics(&["new"], &[])).await.unwrap().into_inner();
    assert_eq!(unknown.accepted[0].error.as_ref().unwrap().status, 404);
    let both = message::PublishRequest { topics: vec!["news".to_owned()], ..publish(&["bob"], "6", "") };
    let refused = client.publish(both).await.unwrap().into_inner();
    assert!(refused.error.unwrap().detail.contains("/users"));
    let stranger =
        calls::collect_client::CollectClient::new(channel).publish(publish(&["alice"], "1", "")).await;
    assert_eq!(stranger.unwrap_err().code(), tonic::Code::Unauthenticated);
}

/// A program that runs on for so long after it has warned is one that waits.
const WAITS: Duration = Duration::from_secs(2);

/// What the program says when it is started with these keys, and its exit code; None if it runs on.
pub(crate) async fn started(keys: &[(&str, &str)]) -> (Option<i32>, String) {
    let data = tempfile::tempdir().unwrap();
    let mut command = std::process::Command::new(program());
    clean(&mut command);
    command.args(["serve", "--data", data.path().to_str().unwrap()]);
    let secret = "0123456789abcdef0123456789abcdef";
    let all = [
        ("AUTH__TOKEN_KEY", secret),
        ("AUTH__ADMIN_KEY", ringpush_testing::ADMIN_KEY),
        ("COLLECT__API_KEYS", ringpush_testing::API_KEY),
        ("PEER__SECRET", ringpush_testing::PEER_SECRET),
        ("PUSH__PUBLIC_URL", "ws://127.0.0.1/n/{node}/v1/ws"),
        ("NODE__NAME", "push-0"),
    ];
    let listen = ["PUSH", "COLLECT", "AUTH", "DISPATCH", "PEER", "OPS"]
        .map(|role| (format!("{role}__LISTEN"), "127.0.0.1:0"));
    for (name, value) in all
        .iter()
        .copied()
        .chain(listen.iter().map(|(name, at)| (name.as_str(), *at)))
        .chain(keys.iter().copied())
    {
        command.env(format!("RINGPUSH_{name}"), value);
    }
    let said = std::fs::File::create(data.path().join("said")).unwrap();
    let mut child = command.stdout(std::process::Stdio::null()).stderr(said).spawn().unwrap();
    let began = std::time::Instant::now();
    let mut warned = None;
    let code = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status.code();
        }
        let said = std::fs::read_to_string(data.path().join("said")).unwrap();
        // A warning that names the key is what one that waits is expected to say. One that is about
        // to end may have said it too, so it is given time for that.
        let since = warned
            .or_else(|| (said.contains("WARN") && said.contains("check ")).then(std::time::Instant::now));
        warned = since;
        if since.is_some_and(|since| since.elapsed() > WAITS) {
            let _ = child.kill();
            let _ = child.wait();
            break None;
        }
        assert!(began.elapsed() < DEADLINE, "it neither ends nor says why it waits: {said}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    (code, std::fs::read_to_string(data.path().join("said")).unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_configured_wrongly_is_refused_or_told_with_its_key() {
    let guarded = redis(&["--requirepass", "secret"]).await;
    let open = redis(&[]).await;
    let set = ReplicaSet::start(1).await;
    let mongod = mongod_path();
    let alone = Foreign::start(&[
        mongod.to_str().unwrap(),
        "--port",
        "{port}",
        "--bind_ip",
        "127.0.0.1",
        "--dbpath",
        "{dir}",
    ])
    .await;
    let redis_url = format!("redis://127.0.0.1:{}", open.port);
    let mongo_uri = set.uri();
    let nobody = free_port();
    let cases: Vec<(Option<i32>, &str, &str, String, String)> = vec![
        (
            Some(64),
            "redis.url",
            "password",
            format!("redis://:wrong@127.0.0.1:{}", guarded.port),
            mongo_uri.clone(),
        ),
        (Some(64), "redis.url", "redis://HOST", "127.0.0.1:6379".to_owned(), mongo_uri.clone()),
        (None, "redis.url", "cannot be", format!("redis://127.0.0.1:{nobody}"), mongo_uri.clone()),
        (
            Some(64),
            "mongo.uri",
            "--replSet",
            redis_url.clone(),
            format!("mongodb://127.0.0.1:{}", alone.port),
        ),
        (
            Some(64),
            "mongo.uri",
            "password",
            redis_url.clone(),
            mongo_uri.replace("mongodb://", "mongodb://u:wrong@"),
        ),
        (Some(64), "mongo.uri", "", redis_url.clone(), "mongo".to_owned()),
        (
            None,
            "mongo.uri",
            "cannot be",
            redis_url.clone(),
            format!("mongodb://127.0.0.1:{nobody}/?replicaSet=rs0"),
        ),
    ];
    for (expected, key, word, redis_url, mongo_uri) in cases {
        let (code, said) = started(&[("REDIS__URL", &redis_url), ("MONGO__URI", &mongo_uri)]).await;
        assert_eq!(code, expected, "{key} {redis_url} {mongo_uri}: {said}");
        assert!(said.contains(key) && said.contains(word), "{key}, {word}: {said}");
        assert!(!said.contains("wrong@"), "a password is told: {said}");
    }
    let (code, said) =
        started(&[("REDIS__URL", &redis_url), ("MONGO__URI", &mongo_uri), ("PUSH__PUBLIC_URL", "ws://x/ws")])
            .await;
    assert!(code == Some(64) && said.contains("{node}"), "{said}");
    let (code, said) = started(&[("MONGO__URI", &mongo_uri), ("NODE__ROLES", "push")]).await;
    assert!(code == Some(64) && said.contains("redis.url"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disconnect_and_a_look_up_reach_every_node() {
    let cluster = Cluster::up(&[]).await;
    let token = cluster.token("alice").await;
    let mut sockets = Vec::new();
    for node in ["push-0", "push-1", "push-2"] {
        let url = format!("ws://{}/n/{node}/v1/ws?hops=2&device={node}", cluster.balancer());
        let mut socket = Socket::open(&url, Some(&token)).await;
        socket.caught_up().await;
        sockets.push(socket);
    }
    let collect = cluster.address("collect-1", "at");
    eventually("all three are found", async || {
        let report = http::get(&collect, "/v1/users/alice", Some(cluster.key("api"))).await.json();
        report["devices"].as_array().unwrap().len() == 3
    })
    .await;
    let path = "/v1/users/alice/sessions";
    let answer = http::request(&collect, "DELETE", path, Some(cluster.key("api")), &[], b"").await;
    assert_eq!(answer.status, 202);
    for socket in &mut sockets {
        assert_eq!(socket.closed().await.code, 4501);
    }
    let refused = Socket::try_open(&format!("ws://{}/v1/ws", cluster.balancer()), Some(&token), &[]).await;
    match refused {
        Ok(mut socket) => assert_eq!(socket.closed().await.code, 4501),
        Err(status) => assert_eq!(status, 401),
    }
}
