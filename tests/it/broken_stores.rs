//! MongoDB restored, frozen, damaged or with too few rights, as clients, senders and whoever runs
//! it notice.

use std::time::Duration;

use futures_util::TryStreamExt;
use mongodb::bson::{Document, doc};
use serde_json::json;

use crate::cluster::started;
use ringpush_testing::foreign::{Foreign, ReplicaSet, mongod_path, redis, redis_cli};
use ringpush_testing::{API_KEY, DEADLINE, Options, Server, Socket, eventually, http};

/// A server on MongoDB, in which what takes half a minute or ten takes half a second or six.
fn on(set: &ReplicaSet) -> Options {
    Options::default()
        .with("mongo.uri", &set.uri())
        .with("limits.sweep_ms", "500")
        .with("limits.head_trust_ms", "6000")
        .with("push.public_url", "ws://127.0.0.1/n/{node}/v1/ws")
        .with("peer.secret", ringpush_testing::PEER_SECRET)
        .with("auth.token_key", "0123456789abcdef0123456789abcdef")
        .with("auth.admin_key", ringpush_testing::ADMIN_KEY)
        .with("collect.api_keys", API_KEY)
}

async fn inbox_of(set: &ReplicaSet) -> mongodb::Collection<Document> {
    mongodb::Client::with_uri_str(set.uri()).await.unwrap().database("ringpush").collection("inbox")
}

async fn publish(server: &Server, user: &str, n: u64) -> http::Answer {
    let body = json!({"to": {"user": user}, "payload": n, "id": format!("{user}-{n}")});
    http::post(&server.at("collect"), "/v1/messages", Some(API_KEY), &body).await
}

async fn seq(server: &Server, user: &str, n: u64) -> u64 {
    let answer = publish(server, user, n).await;
    assert_eq!(answer.status, 202, "{answer:?}");
    answer.json()["accepted"][0]["seq"].as_u64().unwrap()
}

async fn token(server: &Server, user: &str) -> String {
    let body = json!({"user": user, "ttl_s": 3600});
    let answer = http::post(&server.at("auth"), "/v1/tokens", Some(ringpush_testing::ADMIN_KEY), &body).await;
    answer.json()["token"].as_str().unwrap().to_owned()
}

async fn connect(server: &Server, user: &str, query: &str) -> Socket {
    let token = token(server, user).await;
    Socket::open(&format!("ws://{}/v1/ws{query}", server.at("push")), Some(&token)).await
}

/// Puts a backup in the place of what is stored, at one moment.
async fn put_back(set: &ReplicaSet, backup: &[Document]) {
    let client = mongodb::Client::with_uri_str(set.uri()).await.unwrap();
    let stored = client.database("ringpush").collection::<Document>("inbox");
    let put = async || {
        let mut session = client.start_session().await?;
        session.start_transaction().await?;
        stored.delete_many(doc! {}).session(&mut session).await?;
        stored.insert_many(backup).session(&mut session).await?;
        session.commit_transaction().await
    };
    // The server raises the pulse of its marker meanwhile, which may end the transaction.
    let is_put = async || match put().await {
        Ok(()) => true,
        Err(error) if error.contains_label(mongodb::error::TRANSIENT_TRANSACTION_ERROR) => false,
        Err(error) => panic!("{error}"),
    };
    eventually("the backup is put back", is_put).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_restored_while_no_process_runs_is_all_there() {
    let set = ReplicaSet::start(1).await;
    let stored = inbox_of(&set).await;
    let mut server = Server::with(on(&set)).await;
    for n in 0..5 {
        seq(&server, "alice", n).await;
    }
    let backup: Vec<Document> = stored.find(doc! {}).await.unwrap().try_collect().await.unwrap();
    for way in [Restored::IntoAnotherCollection, Restored::IntoTheSame] {
        let last = seq(&server, "alice", 5).await;
        assert_eq!(server.terminate().await, 0);
        match way {
            Restored::IntoAnotherCollection => stored.drop().await.unwrap(),
            Restored::IntoTheSame => drop(stored.delete_many(doc! {}).await.unwrap()),
        }
        for document in &backup {
            stored.insert_one(document).await.unwrap();
        }
        if matches!(way, Restored::IntoTheSame) {
            // As docs/operations.md has it, for a snapshot.
            let marker = doc! { "_id": { "u": "", "n": 0i64 } };
            let told = stored.update_one(marker, doc! { "$set": { "of": "restored" } }).await.unwrap();
            assert_eq!(told.matched_count, 1);
        }
        server = Server::with(on(&set)).await;
        let new = seq(&server, "alice", 20).await;
        assert!(new > last, "{new} is not above {last}");
        let mut alice = connect(&server, "alice", "?since=0").await;
        let (messages, _) = alice.until("caught_up").await;
        let payloads: Vec<u64> = messages.iter().filter_map(|frame| frame["payload"].as_u64()).collect();
        assert_eq!(payloads, [0, 1, 2, 3, 4, 20]);
        let mut away = connect(&server, "alice", &format!("?device=other&since={last}")).await;
        let (messages, _) = away.until("caught_up").await;
        let payloads: Vec<u64> = messages.iter().filter_map(|frame| frame["payload"].as_u64()).collect();
        assert_eq!(payloads, [20], "{messages:?}");
        let gap = messages.iter().find(|frame| frame["type"] == "gap").expect("it is told");
        assert_eq!((gap["after"].as_u64(), gap["before"].as_u64()), (Some(last), Some(new)), "{gap}");
    }
}

/// Where a backup is put.
enum Restored {
    /// As `mongorestore --drop` does.
    IntoAnotherCollection,
    /// As a snapshot is.
    IntoTheSame,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_restore_clients_are_told_and_hear_what_comes() {
    let set = ReplicaSet::start(1).await;
    let server = Server::with(on(&set)).await;
    let stored = inbox_of(&set).await;
    let mut shown = Vec::new();
    for n in 0..5 {
        shown.push(seq(&server, "alice", n).await);
    }
    let backup: Vec<Document> = stored.find(doc! {}).await.unwrap().try_collect().await.unwrap();
    for n in 5..10 {
        shown.push(seq(&server, "alice", n).await);
    }
    let mut alice = connect(&server, "alice", "").await;
    assert_eq!(alice.caught_up().await.len(), 10);
    let pulse = async || {
        let marker = stored.find_one(doc! { "_id": { "u": "", "n": 0i64 } }).await.unwrap().unwrap();
        marker.get_i64("pulse").unwrap()
    };
    let backed_up = backup.iter().find_map(|document| document.get_i64("pulse").ok()).unwrap();
    eventually("a look tells this state from the backup", async || pulse().await > backed_up).await;
    put_back(&set, &backup).await;
    let (_, gap) = alice.until("gap").await;
    assert_eq!((gap["reason"].as_str(), gap["after"].as_u64()), (Some("reset"), Some(shown[9])), "{gap}");
    assert_eq!(gap["before"].as_u64(), Some(shown[4] + 1), "{gap}");
    let mut position = shown[4];
    for n in 20..25 {
        let given = seq(&server, "alice", n).await;
        assert!(!shown.contains(&given), "{given} was given before");
        shown.push(given);
        // In order, each number once, unless a gap stands between.
        loop {
            let frame = alice.frame().await;
            match frame["type"].as_str() {
                Some("gap") => {
                    assert_eq!(
                        (frame["after"].as_u64(), frame["reason"].as_str()),
                        (Some(position), Some("expired"))
                    );
                    position = frame["before"].as_u64().unwrap() - 1;
                }
                Some("message") => {
                    assert_eq!(
                        (frame["seq"].as_u64(), frame["payload"].as_u64()),
                        (Some(position + 1), Some(n))
                    );
                    position += 1;
                    break;
                }
                _ => {}
            }
        }
        assert_eq!(position, given);
    }
    // One who was away, with a position that is gone: told, and complete.
    let mut away = connect(&server, "alice", &format!("?device=other&since={}", shown[9])).await;
    let (messages, _) = away.until("caught_up").await;
    let payloads: Vec<u64> = messages.iter().filter_map(|frame| frame["payload"].as_u64()).collect();
    assert_eq!(payloads, [20, 21, 22, 23, 24]);
    assert!(messages.iter().any(|frame| frame["type"] == "gap"), "{messages:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_cannot_be_read_is_a_gap_and_holds_nobody_up() {
    let set = ReplicaSet::start(1).await;
    let server = Server::with(on(&set)).await;
    let seqs =
        [seq(&server, "alice", 0).await, seq(&server, "alice", 1).await, seq(&server, "alice", 2).await];
    let place = doc! { "_id": { "u": "alice", "n": seqs[1] as i64 } };
    inbox_of(&set).await.update_one(place, doc! { "$set": { "p": "not what it was" } }).await.unwrap();
    let mut alice = connect(&server, "alice", "").await;
    let (frames, _) = alice.until("caught_up").await;
    let payloads: Vec<u64> = frames.iter().filter_map(|frame| frame["payload"].as_u64()).collect();
    assert_eq!(payloads, [0, 2]);
    let gap = frames.iter().find(|frame| frame["type"] == "gap").expect("it is told");
    assert_eq!((gap["after"].as_u64(), gap["before"].as_u64()), (Some(seqs[0]), Some(seqs[2])));
    assert_eq!(gap["reason"], "unreadable");
    let page = http::get(&server.at("collect"), "/v1/users/alice/messages", Some(API_KEY)).await;
    assert_eq!(page.json()["messages"].as_array().unwrap().len(), 2);
    assert!(server.metric("ringpush_unreadable_total").await >= 1.0);
    let log = server.log();
    assert!(
        log.lines().any(|line| line.contains("WARN")
            && line.contains("alice")
            && line.contains(&seqs[1].to_string()))
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_mongod_is_shown_and_named() {
    let set = ReplicaSet::start(1).await;
    let server = Server::with(on(&set)).await;
    seq(&server, "alice", 0).await;
    let shown = async || http::get(&server.at("ops"), "/readyz", None).await;
    assert_eq!(shown().await.json()["conditions"]["inbox"]["ok"], true);
    set.members[0].signal("STOP");
    let told = async || {
        let answer = shown().await;
        assert_eq!(answer.status, 200, "another process would lose it too");
        let inbox = answer.json()["conditions"]["inbox"].clone();
        let detail = inbox["detail"].as_str().unwrap_or_default().to_owned();
        inbox["ok"] == false && detail.contains("mongo.uri") && detail.contains("timed out")
    };
    eventually("it is shown", told).await;
    let named = async || server.log().lines().any(|line| line.contains("WARN") && line.contains("mongo.uri"));
    eventually("it is logged", named).await;
    set.members[0].signal("CONT");
    eventually("it is back", async || shown().await.json()["conditions"]["inbox"]["ok"] == true).await;
    eventually("publishes are taken", async || publish(&server, "alice", 1).await.status == 202).await;
}

/// Whether a new token was revoked is not known while MongoDB does not answer: it is taken when it
/// does, and the old one serves until then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_the_inbox_cannot_be_asked_no_refresh_is_taken_for_good() {
    let set = ReplicaSet::start(1).await;
    let mut options = on(&set);
    options.environment.push(("RUST_LOG".to_owned(), "info,ringpush=debug".to_owned()));
    let server = Server::with(options).await;
    let mut alice = connect(&server, "alice", "").await;
    alice.caught_up().await;
    let token = token(&server, "alice").await;
    set.members[0].signal("STOP");
    alice.say(&json!({"type": "refresh", "token": token})).await;
    let asked = async || server.log().contains("whether a new token was revoked cannot be asked now");
    eventually("it was asked", asked).await;
    alice.is_quiet(Duration::from_millis(100)).await;
    set.members[0].signal("CONT");
    alice.expect("refreshed").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_mongodb_does_not_take_is_refused_under_its_key() {
    let (redis, set) = (redis(&[]).await, ReplicaSet::start(1).await);
    let redis_url = format!("redis://127.0.0.1:{}", redis.port);
    let start = async |uri: &str, database: &str| {
        started(&[("REDIS__URL", &redis_url), ("MONGO__URI", uri), ("MONGO__DATABASE", database)]).await
    };
    for name in ["a.b", "a/b", "a b", "$a", "", &"a".repeat(64)] {
        let (code, said) = start(&set.uri(), name).await;
        assert!(code == Some(64) && said.contains("mongo.database"), "{name:?}: {code:?} {said}");
    }
    // One that differs in case alone from one that is there.
    let other = mongodb::Client::with_uri_str(set.uri()).await.unwrap();
    other.database("Ringpush").collection::<Document>("x").insert_one(doc! {}).await.unwrap();
    let (code, said) = start(&set.uri(), "ringpush").await;
    assert!(code == Some(64) && said.contains("mongo.database"), "{code:?} {said}");
    for option in ["compressors=zlib", "Compressors=snappy,zstd"] {
        let (code, said) = start(&format!("{}&{option}", set.uri()), "another").await;
        assert!(code == Some(64) && said.contains("mongo.uri") && said.contains("not built in"), "{said}");
    }
}

/// The rights that docs/operations.md lists, and no others: all works with them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_rights_that_are_documented_are_enough() {
    let documented = include_str!("../../docs/operations.md");
    let line = |begins: &str| {
        let line = documented.lines().find(|line| line.trim().starts_with(begins));
        line.unwrap_or_else(|| panic!("docs/operations.md has no line {begins:?}")).trim().to_owned()
    };
    let redis = redis(&["--requirepass", "root"]).await;
    let cli = |words: &[&str]| redis_cli(redis.port, &[&["--no-auth-warning", "-a", "root"], words].concat());
    let rights = line("ACL SETUSER ringpush");
    let words: Vec<String> = rights.replace("PASSWORD", "secret").split(' ').map(str::to_owned).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    assert_eq!(cli(&words), "OK");
    let set = with_users().await;
    let root = format!("mongodb://root:root@127.0.0.1:{}/?directConnection=true", set.port);
    let admin = mongodb::Client::with_uri_str(root).await.unwrap().database("admin");
    assert!(line("db.createUser").contains(r#"roles: [{role: "readWrite", db: "ringpush"}]"#));
    let user = doc! { "createUser": "ringpush", "pwd": "secret", "roles": [{ "role": "readWrite", "db": "ringpush" }] };
    admin.run_command(user).await.unwrap();
    let uri = format!("mongodb://ringpush:secret@127.0.0.1:{}/?replicaSet=rs0", set.port);
    let url = format!("redis://ringpush:secret@127.0.0.1:{}", redis.port);
    let mut options = Options::registered_in(&url).with("mongo.uri", &uri);
    options = options.with("limits.janitor_ms", "200").with("limits.head_trust_ms", "300");
    let mut server = Server::with(options).await;
    let mut alice = connect(&server, "alice", "").await;
    alice.caught_up().await;
    let seq = seq(&server, "alice", 1).await;
    assert_eq!(alice.messages(1).await, [json!(1)]);
    alice.ack(seq).await;
    eventually("the ack is written", async || {
        let answer = http::get(&server.at("collect"), "/v1/users/alice", Some(API_KEY)).await;
        answer.json()["devices"][0]["acked"] == seq
    })
    .await;
    let path = "/v1/users/alice/sessions";
    let gone = http::request(&server.at("collect"), "DELETE", path, Some(API_KEY), &[], b"").await;
    assert_eq!(gone.status, 202);
    assert_eq!(server.terminate().await, 0);
    let log = server.log();
    for refused in
        ["NOPERM", "not authorized", "requires authentication", "could not be removed", "cannot be read"]
    {
        assert!(!log.contains(refused), "{refused}: {log}");
    }
}

/// A replica set of one that asks for users, with an administrator.
async fn with_users() -> Foreign {
    let keys = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(keys.path(), "0123456789abcdef0123456789abcdef").unwrap();
    std::process::Command::new("chmod").arg("600").arg(keys.path()).status().unwrap();
    let (_, path) = keys.keep().unwrap();
    let mongod = mongod_path();
    let words =
        ["--port", "{port}", "--bind_ip", "127.0.0.1", "--dbpath", "{dir}", "--replSet", "rs0", "--keyFile"];
    let words = [&[mongod.to_str().unwrap()][..], &words, &[path.to_str().unwrap()]].concat();
    let set = Foreign::start(&words).await;
    let direct = format!("mongodb://127.0.0.1:{}/?directConnection=true", set.port);
    let admin = mongodb::Client::with_uri_str(direct).await.unwrap().database("admin");
    let config = doc! { "_id": "rs0", "members": [{ "_id": 0, "host": format!("127.0.0.1:{}", set.port) }] };
    admin.run_command(doc! { "replSetInitiate": config }).await.unwrap();
    // From this machine, and before there is any user, the first may be made.
    let root = doc! { "createUser": "root", "pwd": "root", "roles": ["root"] };
    let made = async || admin.run_command(root.clone()).await.is_ok();
    tokio::time::timeout(DEADLINE, eventually("the first user", made)).await.unwrap();
    let _ = std::fs::remove_file(path);
    set
}
