//! What the machine refuses: a full disk, a taken port, a directory of somebody else.

use std::process::Command;

use futures_util::{StreamExt, stream};
use ringpush::clock::Clock;
use ringpush::message::UserId;
use ringpush::role::auth::{Auth, AuthConfig};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use ringpush_testing::{Options, Server, clean, command, http, program};

fn run(command: &mut Command) -> (i32, String) {
    let output = command.stderr(std::process::Stdio::piped()).output().unwrap();
    (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_taken_port_is_named_with_the_remedy() {
    let server = Server::start().await;
    let other = tempfile::tempdir().unwrap();
    let options = Options::default().with("collect.listen", &server.at("collect"));
    let (code, said) = run(&mut command(other.path(), &options));
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("collect.listen") && said.contains("in use"), "{said}");
    assert!(!other.path().join("listen.json").exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_data_directory_has_one_process() {
    let server = Server::start().await;
    let (code, said) = run(&mut command(server.directory.path(), &Options::default()));
    assert_eq!(code, 1, "{said}");
    assert!(
        said.contains("data.dir") && said.contains("another process") && said.contains("--data"),
        "{said}"
    );
    server.publish("alice", json!("still served")).await;
}

#[test]
fn a_data_directory_that_cannot_be_written_is_named() {
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("not-a-directory");
    std::fs::write(&file, "").unwrap();
    let mut command = Command::new(program());
    clean(&mut command);
    let (code, said) = run(command.arg("--data").arg(&file));
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("not-a-directory") && said.contains("--data DIR"), "{said}");
}

/// A disk of a few megabytes, in a mount namespace of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_loses_nothing_that_was_accepted() {
    let directory = std::sync::Arc::new(tempfile::tempdir().unwrap());
    let inbox = directory.path().join("inbox");
    std::fs::create_dir_all(&inbox).unwrap();
    let script = format!("mount -t tmpfs -o size=96m none {} && exec \"$0\" \"$@\"", inbox.display());
    let root =
        String::from_utf8(Command::new("id").arg("-u").output().unwrap().stdout).unwrap().trim() == "0";
    let mut wrapper =
        vec!["unshare", if root { "-m" } else { "-rm" }, "--propagation", "private", "sh", "-c"];
    wrapper.push(&script);
    let options = Options { wrapper: wrapper.into_iter().map(str::to_owned).collect(), ..Options::default() };
    let mut server = Server::on(directory, options).await;
    let mut socket = server.connect("alice", "").await;
    socket.caught_up().await;
    // Read beside the publishing: what stands in a socket that nobody reads goes with the process.
    let reader = tokio::spawn(async move {
        let mut seen = Vec::new();
        while let Some(message) = socket.message_or_end().await {
            seen.push(message["seq"].as_u64().unwrap());
        }
        seen
    });
    let payload = "x".repeat(60_000);
    let (mut accepted, mut refused) = (Vec::new(), 0);
    while refused == 0 && accepted.len() < 5_000 {
        let body = json!({"to": {"user": "alice"}, "payload": [accepted.len(), payload]});
        let at = server.at("collect");
        let key = server.key("api_key");
        let sending = http::post(&at, "/v1/messages", Some(&key), &body);
        let answer = sending.await;
        match answer.status {
            202 => accepted.push(answer.json()["accepted"][0]["seq"].as_u64().unwrap()),
            503 => {
                assert!(!answer.header("retry-after").is_empty(), "{answer:?}");
                refused += 1;
            }
            other => panic!("{other}: {answer:?}"),
        }
    }
    assert_eq!(refused, 1, "{} messages of 60 kB went onto a disk of 96 MB", accepted.len());
    assert!(!accepted.is_empty());
    assert_eq!(server.ended().await, 1, "a store that failed must not be served on");
    let log = server.log();
    assert!(log.contains("the store failed") && !log.contains("panicked"), "{log}");
    // What was accepted was delivered, in order.
    let seen = reader.await.unwrap();
    assert!(seen.windows(2).all(|pair| pair[1] == pair[0] + 1));
    assert!(seen.len() >= accepted.len() - 1, "{} of {} were seen", seen.len(), accepted.len());
}

/// Guards what docs/benchmarks.md measures; with room for another build and another allocator's
/// mood.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_socket_costs_little_memory() {
    const SOCKETS: usize = 5_000;
    const MOST_KIB: usize = 7;
    let server = Server::with(Options::default().with("push.accept_per_s", "0")).await;
    let config =
        AuthConfig { token_keys: vec![server.key("token_key").as_str().into()], ..AuthConfig::default() };
    let auth = Auth::new(config, Clock::system()).unwrap();
    let resident_kib = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").trim().parse::<usize>().unwrap()
    };
    let open = async |n: usize| {
        let user = UserId::parse(&format!("idle-{n}")).unwrap();
        let token = auth.issue(&user, 3600).unwrap().0;
        let mut socket = TcpStream::connect(server.at("push")).await.unwrap();
        let request = format!(
            "GET /v1/ws HTTP/1.1\r\nHost: t\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
             Authorization: Bearer {token}\r\n\r\n"
        );
        socket.write_all(request.as_bytes()).await.unwrap();
        let mut heard = Vec::new();
        while !String::from_utf8_lossy(&heard).contains("caught_up") {
            assert!(socket.read_buf(&mut heard).await.unwrap() > 0, "{}", String::from_utf8_lossy(&heard));
        }
        socket
    };
    // What the first ones bring about is not theirs: threads, tables, pages of the store.
    let _first: Vec<TcpStream> = stream::iter(0..100).map(&open).buffer_unordered(50).collect().await;
    let before = resident_kib();
    let sockets: Vec<TcpStream> =
        stream::iter(100..100 + SOCKETS).map(&open).buffer_unordered(50).collect().await;
    assert_eq!(sockets.len(), SOCKETS);
    let each = (resident_kib() - before) as f64 / SOCKETS as f64;
    eprintln!("{each:.2} KiB per idle socket");
    assert!(each <= MOST_KIB as f64, "{each:.2} KiB per idle socket");
}

/// Messages and keys are for their owner alone, whatever the umask of whoever starts the server;
/// what an earlier version left open is tightened.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_kept_is_readable_by_its_owner_alone() {
    use std::os::unix::fs::PermissionsExt;
    let mode = |path: &std::path::Path| std::fs::symlink_metadata(path).unwrap().permissions().mode() & 0o777;
    let all = |root: &std::path::Path| {
        let (mut folders, mut found) = (vec![root.to_owned()], Vec::new());
        while let Some(folder) = folders.pop() {
            found.push((folder.clone(), mode(&folder)));
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() { folders.push(path) } else { found.push((path.clone(), mode(&path))) }
            }
        }
        found
    };
    let wrapper = ["sh", "-c", "umask 0; exec \"$0\" \"$@\""].map(str::to_owned).to_vec();
    let mut server = Server::with(Options { wrapper, ..Options::default() }).await;
    server.publish("alice", json!("private")).await;
    let inbox = server.directory.path().join("inbox");
    let closed = |found: &[(std::path::PathBuf, u32)]| {
        found.iter().all(|(path, mode)| *mode == if path.is_dir() { 0o700 } else { 0o600 })
    };
    assert!(closed(&all(&inbox)), "{:?}", all(&inbox));
    let keys = server.directory.path().join("dev-keys.toml");
    assert_eq!(mode(&keys), 0o600);
    assert_eq!(server.terminate().await, 0);
    for (path, _) in all(&inbox) {
        let open = if path.is_dir() { 0o755 } else { 0o644 };
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(open)).unwrap();
    }
    std::fs::set_permissions(&keys, std::fs::Permissions::from_mode(0o644)).unwrap();
    let again = Server::on(std::sync::Arc::clone(&server.directory), Options::default()).await;
    assert!(closed(&all(&inbox)), "{:?}", all(&inbox));
    assert_eq!(mode(&keys), 0o600);
    let log = again.log();
    assert!(log.lines().any(|line| line.contains("WARN") && line.contains("dev-keys.toml")), "{log}");
}
