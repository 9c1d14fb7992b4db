//! Redis and MongoDB, started for a run.

use std::process::{Command, Stdio};

use crate::measure::{cpu_us, root, wait_for};
use crate::servers::{Process, free_port, installed, listens};

/// A program of others, on a port of its own.
pub struct Foreign {
    pub port: u16,
    pub(super) process: Process,
    pub(super) _directory: tempfile::TempDir,
}

impl Foreign {
    /// Its processor time, in microseconds.
    pub fn cpu_us(&self) -> u64 {
        cpu_us(self.process.0.id())
    }
}

/// Redis, keeping nothing on disk.
pub fn redis() -> Result<Foreign, String> {
    let program = installed("redis-server").ok_or("not installed: redis-server is a Debian package")?;
    let (directory, port) = (tempfile::tempdir().unwrap(), free_port());
    let mut command = Command::new(program);
    command.args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]);
    let child = command.current_dir(directory.path()).stdout(Stdio::null()).spawn().unwrap();
    wait_for("redis-server", 20, || listens(([127, 0, 0, 1], port).into()));
    Ok(Foreign { port, process: Process(child), _directory: directory })
}

/// MongoDB as a replica set of one, on this machine; its URI.
pub fn mongod(runtime: &tokio::runtime::Runtime) -> Result<(Foreign, String), String> {
    use mongodb::bson::doc;
    let own = root().join("target/tools/mongod");
    let program = if own.is_file() { Some(own) } else { installed("mongod") };
    let program = program.ok_or("not installed: scripts/test puts a mongod into target/tools")?;
    let (directory, port) = (tempfile::tempdir().unwrap(), free_port());
    let mut command = Command::new(program);
    command.args(["--port", &port.to_string(), "--bind_ip", "127.0.0.1", "--replSet", "rs0", "--dbpath"]);
    command.arg(directory.path()).args(["--wiredTigerCacheSizeGB", "1"]).stdout(Stdio::null());
    let child = command.spawn().unwrap();
    wait_for("mongod", 30, || listens(([127, 0, 0, 1], port).into()));
    let direct = format!("mongodb://127.0.0.1:{port}/?directConnection=true");
    runtime.block_on(async {
        let admin = mongodb::Client::with_uri_str(direct).await.unwrap().database("admin");
        let members = vec![doc! { "_id": 0, "host": format!("127.0.0.1:{port}") }];
        let initiate = doc! { "replSetInitiate": { "_id": "rs0", "members": members } };
        admin.run_command(initiate).await.unwrap();
        while !admin.run_command(doc! { "hello": 1 }).await.unwrap().get_bool("isWritablePrimary").unwrap() {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    });
    let foreign = Foreign { port, process: Process(child), _directory: directory };
    Ok((foreign, format!("mongodb://127.0.0.1:{port}/?replicaSet=rs0")))
}

/// A mongod of its own, and how to reach it.
pub fn fresh_mongod() -> (Foreign, String) {
    mongod(&tokio::runtime::Runtime::new().unwrap()).expect("a mongod")
}
