//! What the machine refuses: a full disk, a taken port, a directory of somebody else.

use std::process::Command;

use serde_json::json;

use crate::support::{Options, PROGRAM, Server, clean, command, http};

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
    let mut command = Command::new(PROGRAM);
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
