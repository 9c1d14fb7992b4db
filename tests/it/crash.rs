//! Killed at any moment: what was answered 202 is there, once, in order, without a hole.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rand::{Rng, SeedableRng, rngs::StdRng};
use ringpush::client::http::HttpClient;
use ringpush::client::{Inbox, Item, connect};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use ringpush_testing::{Options, Server, http};

/// Rounds of publishing, killing and starting again.
const ROUNDS: usize = 50;
const USERS: usize = 5;

/// What a publisher was told: user, seq and the payload's number.
type Told = Vec<(usize, u64, u64)>;

/// Publishes one after the other until the server is gone; only what was answered 202 counts.
async fn publish_until_killed(at: String, key: String, numbers: Arc<AtomicU64>) -> Told {
    let mut told = Told::new();
    let Ok(mut stream) = TcpStream::connect(&at).await else { return told };
    loop {
        let n = numbers.fetch_add(1, Ordering::Relaxed);
        let user = n as usize % USERS;
        let body = json!({"to": {"user": format!("user-{user}")}, "payload": n}).to_string();
        let request = format!(
            "POST /v1/messages HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        if stream.write_all(request.as_bytes()).await.is_err() {
            return told;
        }
        let mut answer = Vec::new();
        while !answer.ends_with(b"]}") {
            match stream.read_buf(&mut answer).await {
                Ok(0) | Err(_) => return told,
                Ok(_) => {}
            }
        }
        let answer = http::parse(&answer);
        assert_eq!(answer.status, 202, "{answer:?}");
        told.push((user, answer.json()["accepted"][0]["seq"].as_u64().unwrap(), n));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_accepted_survives_fifty_kills() {
    let seed: u64 = rand::random();
    eprintln!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let numbers = Arc::new(AtomicU64::new(0));
    let mut accepted: Vec<BTreeMap<u64, u64>> = vec![BTreeMap::new(); USERS];
    let mut server = Server::start().await;
    for _ in 0..ROUNDS {
        let publishers: Vec<_> = (0..8)
            .map(|_| {
                let (at, key) = (server.at("collect"), server.key("api_key"));
                tokio::spawn(publish_until_killed(at, key, Arc::clone(&numbers)))
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(random.random_range(5..120))).await;
        server.kill();
        for publisher in publishers {
            for (user, seq, n) in publisher.await.unwrap() {
                let before = accepted[user].insert(seq, n);
                assert_eq!(before, None, "seq {seq} of user {user} was given twice");
            }
        }
        server = Server::on(Arc::clone(&server.directory), Options::default()).await;
    }
    let total: usize = accepted.iter().map(BTreeMap::len).sum();
    assert!(total > ROUNDS * 4, "only {total} messages were accepted: nothing was tested");
    for (user, accepted) in accepted.iter().enumerate() {
        check_inbox(&server, user, accepted).await;
    }
}

/// Dense, and every accepted message in its place.
async fn check_inbox(server: &Server, user: usize, accepted: &BTreeMap<u64, u64>) {
    let mut stored: BTreeMap<u64, u64> = BTreeMap::new();
    let mut after = 0;
    loop {
        let page =
            server.get(&format!("/v1/users/user-{user}/messages?after={after}&limit=1000")).await.json();
        for message in page["messages"].as_array().unwrap() {
            stored.insert(message["seq"].as_u64().unwrap(), message["payload"].as_u64().unwrap());
        }
        match page["next"].as_u64() {
            Some(next) => after = next,
            None => break,
        }
    }
    let numbers: Vec<u64> = stored.keys().copied().collect();
    assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1), "user {user} has a hole");
    for (seq, n) in accepted {
        assert_eq!(stored.get(seq), Some(n), "seq {seq} of user {user} was accepted");
    }
    let payloads: std::collections::HashSet<&u64> = stored.values().collect();
    assert_eq!(payloads.len(), stored.len(), "user {user} has a message twice");
}

/// A kill leaves the page cache: only the order of the system calls shows that the disk was asked
/// first.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_202_leaves_before_a_sync_that_began_after_its_append() {
    let directory = Arc::new(tempfile::tempdir().unwrap());
    let trace = directory.path().join("trace");
    let calls = "trace=write,writev,pwrite64,sendto,sendmsg,fdatasync,fsync";
    let wrapper = ["strace", "-f", "-ttt", "-y", "-s", "400", "-e", calls, "-o", trace.to_str().unwrap()];
    let options = Options { wrapper: wrapper.map(str::to_owned).to_vec(), ..Options::default() };
    let mut server = Server::on(directory, options).await;
    let mut seqs = Vec::new();
    for n in 0..40 {
        seqs.push(server.publish("alice", json!(format!("traced-{n:04}"))).await);
    }
    assert_eq!(terminate_traced(&mut server).await, 0);
    let trace = std::fs::read_to_string(trace).unwrap();
    let events = traced(&trace);
    for (n, seq) in seqs.iter().enumerate() {
        let append = events
            .iter()
            .position(|e| matches!(e, Traced::Append(text) if text.contains(&format!("traced-{n:04}"))));
        let append = append.unwrap_or_else(|| panic!("message {n} was never written"));
        let answer = events
            .iter()
            .position(|e| matches!(e, Traced::UserPosition(text) if text.contains(&seq.to_string())));
        let answer = answer.unwrap_or_else(|| panic!("message {n} was never answered"));
        let began = events[append..answer].iter().position(|e| matches!(e, Traced::SyncBegins(_)));
        let began =
            append + began.unwrap_or_else(|| panic!("no sync between the append and the 202 of message {n}"));
        let Traced::SyncBegins(thread) = &events[began] else { unreachable!() };
        let ended = events[began..answer].iter().any(|e| matches!(e, Traced::SyncEnds(by) if by == thread));
        assert!(ended, "the 202 of message {n} left before its sync had ended");
    }
}

/// strace stands between us and the program: the signal goes to the program, the exit code comes
/// through strace.
async fn terminate_traced(server: &mut Server) -> i32 {
    let children =
        std::process::Command::new("pgrep").args(["-P", &server.pid().to_string()]).output().unwrap();
    let pid: u32 = String::from_utf8(children.stdout).unwrap().trim().parse().unwrap();
    ringpush_testing::signal(pid, "TERM");
    server.ended().await
}

enum Traced {
    Append(String),
    SyncBegins(String),
    SyncEnds(String),
    UserPosition(String),
}

/// The calls in the order of their beginning; strace splits one that is interrupted by another
/// thread's.
fn traced(trace: &str) -> Vec<Traced> {
    let mut events = Vec::new();
    for line in trace.lines() {
        let Some((thread, rest)) = line.split_once(' ') else { continue };
        let call = rest.trim_start().split_once(' ').map_or("", |(_, call)| call);
        let resumed = call.starts_with("<... f");
        let sync = call.starts_with("fdatasync(") || call.starts_with("fsync(");
        if sync {
            events.push(Traced::SyncBegins(thread.to_owned()));
        }
        if (sync && !call.contains("<unfinished")) || resumed {
            events.push(Traced::SyncEnds(thread.to_owned()));
        } else if call.contains("HTTP/1.1 202") {
            events.push(Traced::UserPosition(call.to_owned()));
        } else if call.contains("/inbox/") && call.contains("traced-") {
            events.push(Traced::Append(call.to_owned()));
        }
    }
    events
}

/// Three clients that resume, a publisher that repeats under the same id, and a server that is
/// killed three times.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_resume_miss_nothing_through_kills() {
    const MESSAGES: u64 = 600;
    // A short jitter, and the same addresses after each start.
    let server = Server::with(Options::default().with("limits.reconnect_jitter_ms", "100")).await;
    let mut server = server.kill_and_restart().await;
    let clients: Vec<_> = (0..3)
        .map(|n| {
            let auth = signer(&server);
            let token = move |_| std::future::ready(Ok(auth.issue(&user_id(), 3600).unwrap().0));
            let client = connect(format!("http://{}", server.at("push")), token);
            let client = client.device(format!("device-{n}")).ask_first(n == 0).start().unwrap();
            tokio::spawn(receive_all(client, MESSAGES))
        })
        .collect();
    let published = Arc::new(AtomicU64::new(0));
    let done = Arc::new(AtomicBool::new(false));
    let publisher = tokio::spawn(publish_with_repeats(
        server.at("collect"),
        server.key("api_key"),
        MESSAGES,
        Arc::clone(&published),
        Arc::clone(&done),
    ));
    for part in 1..=3 {
        let began = Instant::now();
        while published.load(Ordering::Relaxed) < part * MESSAGES / 4 {
            assert!(began.elapsed() < ringpush_testing::DEADLINE * 3, "publishing stands still");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        server = server.kill_and_restart().await;
    }
    publisher.await.unwrap();
    assert!(done.load(Ordering::Relaxed));
    for client in clients {
        let received = client.await.unwrap();
        assert_eq!(received, (0..MESSAGES).collect::<Vec<_>>(), "each once and in order");
    }
}

fn user_id() -> ringpush::message::UserId {
    ringpush::message::UserId::parse("alice").unwrap()
}

fn signer(server: &Server) -> ringpush::role::auth::Auth {
    use ringpush::role::auth::{Auth, AuthConfig};
    let config =
        AuthConfig { token_keys: vec![server.key("token_key").as_str().into()], ..AuthConfig::default() };
    Auth::new(config, ringpush::clock::Clock::system()).unwrap()
}

async fn receive_all(mut client: Inbox, count: u64) -> Vec<u64> {
    let mut received = Vec::new();
    let reading = async {
        while (received.len() as u64) < count {
            match client.next().await {
                Ok(Some(Item::Message(message))) => received.push(message.json().unwrap()),
                other => panic!("a gap, a refusal or an end: {other:?}"),
            }
        }
    };
    let within = tokio::time::timeout(Duration::from_secs(120), reading).await;
    assert!(within.is_ok(), "only {} of {count} messages came", received.len());
    received
}

async fn publish_with_repeats(
    at: String,
    key: String,
    count: u64,
    published: Arc<AtomicU64>,
    done: Arc<AtomicBool>,
) {
    let client = HttpClient::default();
    let url = format!("http://{at}/v1/messages");
    for n in 0..count {
        let body: Value = json!({"to": {"user": "alice"}, "payload": n, "id": format!("n-{n}")});
        let began = Instant::now();
        loop {
            assert!(began.elapsed() < ringpush_testing::DEADLINE * 3, "message {n} cannot be published");
            let sent =
                client.send("POST", &url, Some(&key), body.to_string().into(), Duration::from_secs(5)).await;
            match sent {
                Ok((202, _)) => break,
                Ok((503, _)) | Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                Ok((status, answer)) => panic!("{status} {answer:?}"),
            }
        }
        published.fetch_add(1, Ordering::Relaxed);
    }
    done.store(true, Ordering::Relaxed);
}
