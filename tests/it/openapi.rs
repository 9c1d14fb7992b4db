//! `docs/openapi.yaml` and `docs/frames.schema.json` say what the running server does.

use std::process::Command;

use ringpush_testing::{Server, root, tool};

/// Every operation is called and every answer validated, by a program that knows nothing of ours;
/// then with what is generated from the schemas, from a fixed seed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_documents_say_what_the_server_does() {
    let server = Server::start().await;
    let mut check = Command::new(tool("venv/bin/python"));
    check.arg(root().join("tests/openapi.py")).arg(server.directory.path().join("listen.json"));
    check.args([server.key("api_key"), server.key("admin_key"), server.token("alice").await]);
    check.current_dir(server.directory.path());
    let output = tokio::task::spawn_blocking(move || check.output()).await.unwrap().unwrap();
    let (said, wrong) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}\n{wrong}");
}
