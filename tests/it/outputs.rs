//! The process outlives its surroundings: closed pipes, full disks, and signals that mean nothing
//! to it.

use std::fs::File;
use std::io::Read;
use std::process::{Command, Stdio};

use serde_json::json;

use ringpush_testing::{Options, Server, clean, command, program, signal};

/// A server whose standard error is `stderr`, with logs of every level that is not the libraries'.
async fn serving(stdout: Stdio, stderr: Stdio) -> Server {
    let directory = std::sync::Arc::new(tempfile::tempdir().unwrap());
    let mut command = command(directory.path(), &Options::default());
    command.stdout(stdout).stderr(stderr);
    Server::from(directory, Options::default(), command).await
}

/// Publishes, receives, acks, and ends in good order.
async fn works_and_drains(mut server: Server) {
    let mut socket = server.connect("alice", "").await;
    socket.caught_up().await;
    for n in 0..20 {
        let seq = server.publish("alice", json!(n)).await;
        assert_eq!(socket.messages(1).await, [json!(n)]);
        socket.ack(seq).await;
    }
    signal(server.pid(), "TERM");
    assert_eq!(socket.closed().await.code, 4302);
    assert_eq!(server.ended().await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_nobody_reads_any_more_stops_nothing() {
    let (reader, writer) = std::io::pipe().unwrap();
    let server = serving(Stdio::null(), writer.into()).await;
    drop(reader);
    works_and_drains(server).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_whose_reader_has_stopped_reading_stops_nothing() {
    let (reader, writer) = std::io::pipe().unwrap();
    let server = serving(Stdio::null(), writer.into()).await;
    // Far more lines than a pipe holds.
    for n in 0..2_000 {
        server.publish(&format!("user-{}", n % 10), json!(n)).await;
    }
    works_and_drains(server).await;
    drop(reader);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn outputs_on_a_full_disk_from_the_start_stop_nothing_and_lost_lines_are_counted() {
    let full = || File::options().write(true).open("/dev/full").unwrap();
    let server = serving(full().into(), full().into()).await;
    server.publish("alice", json!("counted")).await;
    assert!(server.metric("ringpush_log_lines_dropped_total").await > 0.0);
    works_and_drains(serving(full().into(), full().into()).await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_file_that_has_reached_its_limit_stops_nothing() {
    // One block of 512 bytes for the log; the store's files have no limit.
    let directory = std::sync::Arc::new(tempfile::tempdir().unwrap());
    let script = format!(
        "trap '' XFSZ; exec \"$0\" \"$@\" 2> >(ulimit -f 1; exec cat > {}/small)",
        directory.path().display()
    );
    let wrapper = ["bash", "-c", &script].map(str::to_owned).to_vec();
    let options = Options { wrapper, ..Options::default() };
    let command = command(directory.path(), &options);
    works_and_drains(Server::from(directory, Options::default(), command).await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn signals_that_mean_nothing_here_end_nothing() {
    let mut server = Server::start().await;
    let mut socket = server.connect("alice", "").await;
    socket.caught_up().await;
    for name in ["HUP", "USR1", "USR2", "XFSZ"] {
        signal(server.pid(), name);
        server.publish("alice", json!(name)).await;
        assert_eq!(socket.messages(1).await, [json!(name)]);
    }
    assert_eq!(server.terminate().await, 0);
}

/// A command with its output; its exit code, and what it said on standard error.
fn into(
    server: &Server,
    arguments: &[&str],
    input: &str,
    stdout: Stdio,
    stderr: Stdio,
) -> (Option<i32>, String) {
    let mut command = Command::new(program());
    clean(&mut command);
    command.env("RINGPUSH_DATA", server.directory.path()).args(arguments);
    let mut child = command.stdin(Stdio::piped()).stdout(stdout).stderr(stderr).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let _ = std::io::Write::write_all(&mut stdin, input.as_bytes());
    drop(stdin);
    let mut said = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        stderr.read_to_string(&mut said).unwrap();
    }
    (child.wait().unwrap().code(), said)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_end_quietly_where_their_output_is_closed_and_say_so_where_its_disk_is_full() {
    let server = Server::start().await;
    server.publish("alice", json!("hello")).await;
    let closed = || {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        Stdio::from(writer)
    };
    let full = || Stdio::from(File::options().write(true).open("/dev/full").unwrap());
    let printing = [
        &["ring"][..],
        &["ring", "alice"],
        &["token", "alice"],
        &["config", "check"],
        &["publish", "alice", "1"],
        &["listen", "alice"],
        &["audit", "--users", "1", "--rate", "1", "--for", "1s", "--settle", "1s"],
        &["--help"],
        &["--version"],
    ];
    for arguments in printing {
        let (code, said) = into(&server, arguments, "", closed(), Stdio::piped());
        assert_eq!(code, Some(0), "{arguments:?}: {said}");
        assert!(!said.contains("panicked") && !said.contains("standard output"), "{arguments:?}: {said}");
        let (code, said) = into(&server, arguments, "", full(), Stdio::piped());
        assert_eq!(code, Some(1), "{arguments:?}: {said}");
        let told: Vec<&str> = said.lines().filter(|line| line.contains("standard output")).collect();
        assert_eq!(told.len(), 1, "{arguments:?}: {said}");
    }
    // Those that speak on standard error do without it.
    for stderr in [closed(), full()] {
        assert_eq!(into(&server, &["publish", "alice", "-"], "1\n2\n", Stdio::null(), stderr).0, Some(0));
    }
    for stderr in [closed(), full()] {
        assert_eq!(into(&server, &["publish", "alice", "-"], "no json\n", Stdio::null(), stderr).0, Some(1));
    }
    for stderr in [closed(), full()] {
        assert_eq!(into(&server, &["serv"], "", Stdio::null(), stderr).0, Some(64));
    }
}
