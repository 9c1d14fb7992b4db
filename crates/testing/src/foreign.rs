//! Real servers of others, on free ports of loopback; killed when they are dropped.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use super::{DEADLINE, signal};

/// A port that nobody has at the moment.
pub fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A foreign program with a directory of its own.
pub struct Foreign {
    pub directory: tempfile::TempDir,
    pub port: u16,
    command: Vec<String>,
    child: Option<Child>,
}

impl Drop for Foreign {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default();
            let tail: Vec<&str> = log.lines().rev().take(20).collect();
            eprintln!(
                "--- {} said:\n{}",
                self.command[0],
                tail.into_iter().rev().collect::<Vec<_>>().join("\n")
            );
        }
    }
}

impl Foreign {
    /// Starts a program once its words are known; `{port}` and `{dir}` stand for its own.
    pub async fn start(words: &[&str]) -> Self {
        let (directory, port) = (tempfile::tempdir().unwrap(), free_port());
        let dir = directory.path().to_str().unwrap().to_owned();
        let fill = |word: &&str| word.replace("{port}", &port.to_string()).replace("{dir}", &dir);
        let mut this = Self { command: words.iter().map(fill).collect(), directory, port, child: None };
        this.start_again().await;
        this
    }

    /// The same program on the same port, with what it kept.
    pub async fn start_again(&mut self) {
        let log = self.directory.path().join("log");
        let log = std::fs::File::options().create(true).append(true).open(log).unwrap();
        let child = Command::new(&self.command[0])
            .args(&self.command[1..])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap_or_else(|error| {
                panic!("{}: {error}; run scripts/test, which installs it", self.command[0])
            });
        self.child = Some(child);
        let began = Instant::now();
        while std::net::TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            assert!(began.elapsed() < DEADLINE, "{} does not listen", self.command[0]);
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    }

    pub fn signal(&self, name: &str) {
        signal(self.child.as_ref().unwrap().id(), name);
    }

    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Redis, keeping nothing on disk.
pub async fn redis(extra: &[&str]) -> Foreign {
    let mut words = vec!["redis-server", "--port", "{port}", "--bind", "127.0.0.1", "--dir", "{dir}"];
    words.extend(["--save", "", "--appendonly", "no"]);
    words.extend(extra);
    Foreign::start(&words).await
}

/// `redis-cli` against that port; what it printed.
pub fn redis_cli(port: u16, words: &[&str]) -> String {
    let output = Command::new("redis-cli").args(["-p", &port.to_string()]).args(words).output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// The mongod that `scripts/test` installs.
pub fn mongod_path() -> PathBuf {
    let path = super::root().join("target/tools/mongod");
    assert!(path.exists(), "{} is missing: run scripts/test, which installs it", path.display());
    path
}

/// A MongoDB replica set on loopback.
pub struct ReplicaSet {
    pub members: Vec<Foreign>,
}

impl ReplicaSet {
    /// With an election as soon as a primary is missed for a second and a half.
    pub async fn start(count: usize) -> Self {
        let path = mongod_path();
        let words = ["--port", "{port}", "--bind_ip", "127.0.0.1", "--dbpath", "{dir}", "--replSet", "rs0"];
        let small = [
            "--wiredTigerCacheSizeGB",
            "0.25",
            "--oplogSize",
            "64",
            "--setParameter",
            "diagnosticDataCollectionEnabled=false",
            // So that a test may have it fail a command.
            "--setParameter",
            "enableTestCommands=1",
        ];
        let words: Vec<&str> = [path.to_str().unwrap()].into_iter().chain(words).chain(small).collect();
        let mut members = Vec::new();
        for _ in 0..count {
            members.push(Foreign::start(&words).await);
        }
        let this = Self { members };
        let hosts: Vec<_> = this
            .members
            .iter()
            .enumerate()
            .map(|(n, member)| mongodb::bson::doc! { "_id": n as i32, "host": format!("127.0.0.1:{}", member.port) })
            .collect();
        let config = mongodb::bson::doc! {
            "_id": "rs0", "members": hosts,
            "settings": { "electionTimeoutMillis": 1500, "heartbeatIntervalMillis": 300 },
        };
        this.command(0, mongodb::bson::doc! { "replSetInitiate": config }).await;
        this.primary().await;
        this
    }

    pub fn uri(&self) -> String {
        let hosts: Vec<String> =
            self.members.iter().map(|member| format!("127.0.0.1:{}", member.port)).collect();
        format!("mongodb://{}/?replicaSet=rs0", hosts.join(","))
    }

    /// A command to one member, whatever its state.
    pub async fn command(&self, member: usize, command: mongodb::bson::Document) -> mongodb::bson::Document {
        let uri = format!("mongodb://127.0.0.1:{}/?directConnection=true", self.members[member].port);
        let client = mongodb::Client::with_uri_str(uri).await.unwrap();
        client.database("admin").run_command(command).await.unwrap_or_default()
    }

    /// Which member is the primary, once there is one.
    pub async fn primary(&self) -> usize {
        let began = Instant::now();
        loop {
            for (n, member) in self.members.iter().enumerate() {
                if member.child.is_some() {
                    let hello = self.command(n, mongodb::bson::doc! { "hello": 1 }).await;
                    if hello.get_bool("isWritablePrimary").unwrap_or(false) {
                        return n;
                    }
                }
            }
            assert!(began.elapsed() < DEADLINE, "no primary was elected");
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    }

    /// The primary steps down; another is elected.
    pub async fn step_down(&self) {
        let primary = self.primary().await;
        self.command(primary, mongodb::bson::doc! { "replSetStepDown": 10, "secondaryCatchUpPeriodSecs": 5 })
            .await;
    }
}
