//! The servers that are measured: ringpush in the form that a scenario needs, and its peers, each
//! with a configuration that is fair to it. What each one is given, and why, is in
//! `docs/benchmarks.md`.

use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use crate::client::{MOMENT, NUMBER, Order, Publish, Report, Socket, USER};
use crate::measure::{cpu_us, metric, program, resident_kib, root, wait_for};

/// Publishers of single messages, each with one request in flight (docs/benchmarks.md).
pub const PUBLISHERS: usize = 64;
/// Messages in a batch.
pub const BATCH: usize = 100;

/// A process that dies with its owner.
pub struct Process(pub Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A server under load.
pub struct Server {
    pub name: &'static str,
    /// What was measured: versions and settings, for the report.
    pub what: String,
    processes: Vec<Process>,
    /// The sockets of these users.
    pub sockets: Box<dyn Fn(std::ops::Range<usize>) -> Vec<Socket>>,
    pub single: Publish,
    pub batch: Publish,
    /// Where ringpush shows its metrics.
    ops: Option<SocketAddr>,
    directory: tempfile::TempDir,
}

impl Server {
    /// A counter or gauge of ringpush, with its labels; 0 if it has none of that name.
    pub fn metric(&self, name: &str) -> f64 {
        self.ops.and_then(|ops| metric(ops, name)).unwrap_or(0.0)
    }

    /// Of all its processes, in KiB.
    pub fn resident_kib(&self) -> u64 {
        self.processes.iter().map(|one| resident_kib(one.0.id())).sum()
    }

    /// Of all its processes, in microseconds.
    pub fn cpu_us(&self) -> u64 {
        self.processes.iter().map(|one| cpu_us(one.0.id())).sum()
    }
}

/// The load client's process.
pub struct Load {
    process: Process,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Load {
    pub fn start() -> Self {
        let mut child = again("--load-client", &[]);
        let (orders, answers) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        Self { process: Process(child), orders, answers }
    }

    /// Tells it to begin; [`Load::report`] waits for the end.
    pub fn order(&mut self, order: &Order) {
        writeln!(self.orders, "{}", serde_json::to_string(order).unwrap()).unwrap();
    }

    pub fn report(&mut self) -> Report {
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        assert!(!line.is_empty(), "the load client ended: {:?}", self.process.0.try_wait());
        let report: Report = serde_json::from_str(&line).unwrap();
        assert_eq!(report.error, None, "{report:?}");
        report
    }

    pub fn obey(&mut self, order: &Order) -> Report {
        self.order(order);
        self.report()
    }
}

/// The bare loop of `limit.rs`, as a process of its own.
pub struct Limit {
    process: Process,
    /// Held, since it says after each order how much it wrote.
    said: BufReader<ChildStdout>,
    at: SocketAddr,
}

impl Limit {
    /// A loop whose frames have a payload of so many bytes, and what ringpush puts around it.
    pub fn start(bytes: usize) -> Self {
        let mut process = Process(again("--limit", &[bytes.to_string()]));
        let mut said = BufReader::new(process.0.stdout.take().unwrap());
        let mut line = String::new();
        said.read_line(&mut line).unwrap();
        Self { process, said, at: line.trim().parse().unwrap() }
    }

    pub fn sockets(&self, count: usize) -> Vec<Socket> {
        let upgrade = "GET / HTTP/1.1\r\nUpgrade: websocket\r\n\r\n";
        let socket = |_| Socket { at: self.at, upgrade: upgrade.to_owned(), say: None, ready: String::new() };
        (0..count).map(socket).collect()
    }

    /// Writes one message to each of its sockets. Returns after how many ms the last one had it.
    pub fn once(&mut self, load: &mut Load, sockets: usize) -> f64 {
        load.obey(&Order::Reset);
        load.order(&Order::Gather { ms: 10_000, copies: sockets as u64 });
        let began = std::time::Instant::now();
        writeln!(self.process.0.stdin.as_mut().unwrap(), "0").unwrap();
        let report = load.report();
        let ms = began.elapsed().as_secs_f64() * 1_000.0;
        assert_eq!(report.received, sockets as u64, "{report:?}");
        self.said.read_line(&mut String::new()).unwrap();
        ms
    }

    /// Writes to all of its sockets for so long. Returns what `load` received of it, and the loop's
    /// processor time in microseconds.
    pub fn write(&mut self, load: &mut Load, seconds: f64) -> (Report, f64) {
        writeln!(self.process.0.stdin.as_mut().unwrap(), "{seconds}").unwrap();
        let cpu = cpu_us(self.process.0.id());
        let report = load.obey(&Order::Listen { ms: (seconds * 1000.0) as u64, expect: u64::MAX });
        self.said.read_line(&mut String::new()).unwrap();
        (report, (cpu_us(self.process.0.id()) - cpu) as f64)
    }
}

/// This program again, as something else.
pub fn again(role: &str, more: &[String]) -> Child {
    let program = std::env::current_exe().unwrap();
    Command::new(program).arg(role).args(more).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
}

/// The payload that is measured where nothing else is said, in bytes; and a large one.
pub const SMALL: usize = 120;
pub const LARGE: usize = 4_096;

/// A payload of so many bytes, or of as many as it has at least.
fn payload(bytes: usize) -> String {
    let with =
        |more: &str| format!(r#"{{"text":"your order has been paid{more}","at":{MOMENT},"k":{NUMBER}}}"#);
    with(&" ".repeat(bytes.saturating_sub(with("").len())))
}

fn upgrade(path: &str, more: &str) -> String {
    format!(
        "GET {path} HTTP/1.1\r\nHost: b\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{more}\r\n"
    )
}

/// Over HTTP, one message in each request.
fn over_http(at: SocketAddr, path: &str, headers: &str, item: String) -> Publish {
    Publish {
        at: vec![at],
        connections: PUBLISHERS,
        pipelined: 1,
        head: format!(
            "POST {path} HTTP/1.1\r\nHost: b\r\n{headers}Content-Type: application/json\r\n\
             Content-Length: {{LENGTH}}\r\n\r\n"
        ),
        before: String::new(),
        item,
        between: String::new(),
        after: String::new(),
        batch: 1,
        answer: None,
        users: 0..1,
        favour: None,
        seconds: 1.0,
        rate: None,
        own: true,
    }
}

/// Tokens for the users, signed by ringpush's own auth.
pub fn tokens(key: &str, users: std::ops::Range<usize>) -> Vec<String> {
    use ringpush::clock::Clock;
    use ringpush::message::UserId;
    use ringpush::role::auth::{Auth, AuthConfig};
    let config = AuthConfig { token_keys: vec![key.into()], ..AuthConfig::default() };
    let auth = Auth::new(config, Clock::system()).unwrap();
    users.map(|n| auth.issue(&UserId::parse(&format!("user-{n:08}")).unwrap(), 7200).unwrap().0).collect()
}

/// The sockets of users on a ringpush push node.
pub fn ringpush_sockets(at: SocketAddr, key: &str, users: std::ops::Range<usize>) -> Vec<Socket> {
    let open = |token: String| Socket {
        at,
        upgrade: upgrade("/v1/ws", &format!("Authorization: Bearer {token}\r\n")),
        say: None,
        ready: r#""type":"caught_up""#.to_owned(),
    };
    tokens(key, users).into_iter().map(open).collect()
}

/// Publishes to ringpush's collect: one message a request, or many.
pub fn ringpush_publishes(collect: SocketAddr, api_key: &str) -> (Publish, Publish) {
    let bytes = SMALL;
    let headers = format!("Authorization: Bearer {api_key}\r\n");
    let item = format!(r#"{{"to":{{"user":"user-{USER}"}},"payload":{}}}"#, payload(bytes));
    let single = over_http(collect, "/v1/messages", &headers, item.clone());
    let batch = Publish {
        connections: 8,
        before: r#"{"messages":["#.to_owned(),
        between: ",".to_owned(),
        after: "]}".to_owned(),
        batch: BATCH,
        ..over_http(collect, "/v1/messages/batch", &headers, item)
    };
    (single, batch)
}

/// All roles in one process; `mongo` for the inbox, or the embedded one.
pub fn ringpush(mongo: Option<&str>) -> Server {
    ringpush_with(emptied(), mongo, &[])
}

fn emptied() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

/// The limits that guard against a mistaken sender, far away.
const NO_LIMITS: [(&str, &str); 3] = [
    ("LIMITS__EVERYONE_PER_S", "1000000"),
    ("LIMITS__TOPIC_PER_S", "1000000"),
    ("LIMITS__FANOUT_MIB_PER_S", "0"),
];

/// All roles in one process, where each publish goes to everyone and each socket reads logs;
/// without limits, or with those of the defaults.
pub fn ringpush_for_everyone(bytes: usize, limited: bool) -> Server {
    let server = ringpush_with_logs(emptied(), None, limited);
    Server { single: everyones(&server.single, bytes), ..server }
}

/// Publishes to everyone where the given plan publishes to a user.
pub fn to_everyone(single: &Publish) -> Publish {
    everyones(single, SMALL)
}

fn everyones(single: &Publish, bytes: usize) -> Publish {
    let item = format!(r#"{{"to":{{"everyone":true}},"payload":{}}}"#, payload(bytes));
    Publish { item, ..single.clone() }
}

/// All roles in one process, where each publish goes to a topic `t-N`, and each socket is ready
/// when it is level with all of its logs.
pub fn ringpush_for_topics(mongo: Option<&str>) -> Server {
    ringpush_for_topics_in(emptied(), mongo)
}

fn ringpush_for_topics_in(directory: tempfile::TempDir, mongo: Option<&str>) -> Server {
    let server = ringpush_with_logs(directory, mongo, false);
    Server { single: to_a_topic(&server.single), ..server }
}

/// Kills the process, and starts another one on its data. `reads` says whether it was one of
/// [`ringpush_for_topics`], or of [`ringpush()`].
pub fn ringpush_again(
    Server { directory, processes, .. }: Server,
    mongo: Option<&str>,
    reads: bool,
) -> Server {
    drop(processes);
    std::fs::remove_file(listening_of(&directory)).unwrap();
    if reads { ringpush_for_topics_in(directory, mongo) } else { ringpush_with(directory, mongo, &[]) }
}

fn listening_of(directory: &tempfile::TempDir) -> PathBuf {
    directory.path().join("listen.json")
}

fn ringpush_with_logs(directory: tempfile::TempDir, mongo: Option<&str>, limited: bool) -> Server {
    let open = ("TOPICS__OPEN", "t-*");
    let server = match limited {
        true => ringpush_with(directory, mongo, &[open]),
        false => ringpush_with(directory, mongo, &[&NO_LIMITS[..], &[open]].concat()),
    };
    let sockets = server.sockets;
    Server { sockets: Box::new(move |users| sockets(users).into_iter().map(reads_logs).collect()), ..server }
}

/// The socket of a client that knows of logs, ready when it is level with all of them.
pub fn reads_logs(socket: Socket) -> Socket {
    Socket {
        upgrade: socket.upgrade.replacen("/v1/ws", "/v1/ws?topics=auth", 1),
        say: Some(r#"{"type":"auth","topics":true}"#.to_owned()),
        ready: r#""all":true"#.to_owned(),
        ..socket
    }
}

/// Publishes nothing, but makes the user a member of the topic `t-USER-which`: the topic of one.
pub fn joins_its_own(single: &Publish, which: usize) -> Publish {
    let body = format!(r#"{{"add":["user-{USER}"]}}"#);
    let head = single.head.replacen("/v1/messages", &format!("/v1/topics/t-{USER}-{which}/members"), 1);
    let item = format!("{}{body}", head.replace("{LENGTH}", &body.len().to_string()));
    Publish { head: String::new(), item, own: false, ..single.clone() }
}

/// Publishes to the topic `t-N` where the given plan publishes to a user.
pub fn to_a_topic(single: &Publish) -> Publish {
    let item = format!(r#"{{"to":{{"topic":"t-{USER}"}},"payload":{}}}"#, payload(SMALL));
    Publish { item, ..single.clone() }
}

/// Of a server whose publishes go to everyone: publishes to inboxes, and one to everyone each
/// second, with a payload that the load client does not count.
pub fn inbox_and_everyone(server: &Server) -> (Publish, Publish) {
    let inbox = format!(r#"{{"to":{{"user":"user-{USER}"}},"payload":{}}}"#, payload(SMALL));
    let text = format!(r#"{{"text":"{}"}}"#, "x".repeat(SMALL - 11));
    let everyone = format!(r#"{{"to":{{"everyone":true}},"payload":{text}}}"#);
    let plan = |item| Publish { item, ..server.single.clone() };
    let everyone = Publish { connections: 1, rate: Some(1.0), own: false, ..plan(everyone) };
    (plan(inbox), everyone)
}

/// Makes so many users members of the topic `t-TOPIC`, by one request.
pub fn joins(single: &Publish, topic: usize, users: impl Iterator<Item = usize>) -> Publish {
    let users: Vec<String> = users.map(|n| format!(r#""user-{n:08}""#)).collect();
    let head = single.head.replacen("/v1/messages", &format!("/v1/topics/t-{topic:08}/members"), 1);
    let item = format!(r#"{{"add":[{}]}}"#, users.join(","));
    Publish { head, item, own: false, connections: 1, rate: Some(100.0), seconds: 0.015, ..single.clone() }
}

fn ringpush_with(directory: tempfile::TempDir, mongo: Option<&str>, more: &[(&str, &str)]) -> Server {
    let mut command = Command::new(program());
    command.args(["serve", "--log-filter", "warn", "--data"]).arg(directory.path());
    // The records of the audit log are written whatever the filter says.
    let said = std::fs::File::create(directory.path().join("said.log")).unwrap();
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(said);
    for role in ["PUSH", "COLLECT", "AUTH", "DISPATCH", "OPS"] {
        command.env(format!("RINGPUSH_{role}__LISTEN"), "127.0.0.1:0");
    }
    let (token_key, api_key) =
        ("0123456789abcdef0123456789abcdef", "bench-api-key-0123456789abcdef0123456789");
    for (key, value) in [
        ("PUSH__ACCEPT_PER_S", "0"),
        ("AUTH__TOKEN_KEY", token_key),
        ("AUTH__ADMIN_KEY", "bench-admin-key-0123456789abcdef0123456789"),
        ("COLLECT__API_KEYS", api_key),
        ("PEER__SECRET", "bench-peer-secret-0123456789abcdef0123456789"),
        ("PUSH__PUBLIC_URL", "ws://127.0.0.1/n/{node}/v1/ws"),
        ("MONGO__URI", mongo.unwrap_or_default()),
    ]
    .iter()
    .chain(more)
    {
        command.env(format!("RINGPUSH_{key}"), value);
    }
    let child = command.spawn().unwrap();
    let listening = listening_of(&directory);
    wait_for("ringpush", 30, || listening.exists());
    let listening: serde_json::Value = serde_json::from_slice(&std::fs::read(listening).unwrap()).unwrap();
    let at = |role: &str| -> SocketAddr { listening[role].as_str().unwrap().parse().unwrap() };
    let (single, batch) = ringpush_publishes(at("collect"), api_key);
    let (push, ops) = (at("push"), at("ops"));
    Server {
        name: if mongo.is_some() { "ringpush on MongoDB" } else { "ringpush" },
        what: format!("ringpush {}, all roles in one process", env!("CARGO_PKG_VERSION")),
        processes: vec![Process(child)],
        sockets: Box::new(move |users| ringpush_sockets(push, token_key, users)),
        single,
        batch,
        ops: Some(ops),
        directory,
    }
}

/// A Debian program, wherever it was put.
pub(crate) fn installed(name: &str) -> Option<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default();
    let places = path.split(':').chain(["/usr/sbin", "/usr/bin", "/usr/local/bin"]);
    places.map(|place| Path::new(place).join(name)).find(|path| path.is_file())
}

/// The first line that a program says of its version.
fn version(program: &Path, word: &str) -> String {
    let output = Command::new(program).arg(word).output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    String::from_utf8_lossy(&said).lines().next().unwrap_or_default().trim().to_owned()
}

pub(crate) fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn filled(template: &str, directory: &Path, port: u16, other: u16) -> String {
    template
        .replace("@DIR@", directory.to_str().unwrap())
        .replace("@PORT@", &port.to_string())
        .replace("@OTHER@", &other.to_string())
}

pub(crate) fn listens(at: SocketAddr) -> bool {
    std::net::TcpStream::connect(at).is_ok()
}

/// nginx with nchan: one worker, no store, no token.
pub fn nchan(bytes: usize) -> Result<Server, String> {
    const MISSING: &str = "not installed: nginx and libnginx-mod-nchan are Debian packages";
    let module = ["/usr/lib/nginx/modules", "/usr/share/nginx/modules"]
        .map(|place| Path::new(place).join("ngx_nchan_module.so"))
        .into_iter()
        .find(|path| path.exists())
        .ok_or(MISSING)?;
    let nginx = installed("nginx").ok_or(MISSING)?;
    let (directory, port) = (tempfile::tempdir().unwrap(), free_port());
    let config = filled(include_str!("../peers/nchan.conf"), directory.path(), port, 0)
        .replace("@MODULE@", module.to_str().unwrap());
    std::fs::write(directory.path().join("nginx.conf"), config).unwrap();
    let mut command = Command::new(&nginx);
    command.arg("-c").arg(directory.path().join("nginx.conf")).arg("-p").arg(directory.path());
    let child = command.stderr(Stdio::null()).spawn().unwrap();
    let at = SocketAddr::from(([127, 0, 0, 1], port));
    wait_for("nchan", 20, || listens(at));
    let single = over_http(at, &format!("/pub/user-{USER}"), "", payload(bytes));
    // The user stands in the path here: one message a request, its head a part of the message.
    let single = Publish {
        item: format!(
            "{}{}",
            single.head.replace("{LENGTH}", &payload(bytes).len().to_string()),
            payload(bytes)
        ),
        head: String::new(),
        ..single
    };
    Ok(Server {
        name: "nchan",
        what: format!("{}, nchan of Debian, one worker", version(&nginx, "-v")),
        processes: vec![Process(child)],
        sockets: Box::new(move |users| {
            let open = |n| Socket {
                at,
                upgrade: upgrade(&format!("/sub/user-{n:08}"), ""),
                say: None,
                ready: String::new(),
            };
            users.map(open).collect()
        }),
        // It has no batches: as many requests in one write as it was measured to like best.
        batch: Publish { connections: 4, pipelined: 16, ..single.clone() },
        single,
        ops: None,
        directory,
    })
}

/// NATS: subscribers over its WebSocket, publishers over its TCP protocol; no store, no token.
pub fn nats(bytes: usize) -> Result<Server, String> {
    let program = installed("nats-server").ok_or("not installed: nats-server is a Debian package")?;
    let (directory, port, websocket) = (tempfile::tempdir().unwrap(), free_port(), free_port());
    let config = filled(include_str!("../peers/nats.conf"), directory.path(), port, websocket);
    let file = directory.path().join("nats.conf");
    std::fs::write(&file, config).unwrap();
    let child = Command::new(&program).arg("-c").arg(&file).stderr(Stdio::null()).spawn().unwrap();
    let (at, sockets_at) = (([127, 0, 0, 1], port).into(), SocketAddr::from(([127, 0, 0, 1], websocket)));
    wait_for("nats-server", 20, || listens(at) && listens(sockets_at));
    let single = Publish {
        head: String::new(),
        item: format!("PUB user-{USER} {}\r\n{}\r\n", payload(bytes).len(), payload(bytes)),
        after: "PING\r\n".to_owned(),
        answer: Some("PONG\r\n".to_owned()),
        ..over_http(at, "", "", String::new())
    };
    Ok(Server {
        name: "NATS",
        what: version(&program, "--version"),
        processes: vec![Process(child)],
        sockets: Box::new(move |users| {
            let open = |n| Socket {
                at: sockets_at,
                upgrade: upgrade("/", ""),
                say: Some(format!("CONNECT {{\"verbose\":false}}\r\nSUB user-{n:08} 1\r\nPING\r\n")),
                ready: "PONG".to_owned(),
            };
            users.map(open).collect()
        }),
        batch: Publish { connections: 4, batch: 64, ..single.clone() },
        single,
        ops: None,
        directory,
    })
}

/// Centrifuge, the engine of Centrifugo, behind the small server of
/// `crates/bench/peers/centrifuge`; a token is verified.
pub fn centrifuge(history: usize, small: bool, bytes: usize) -> Result<Server, String> {
    let options: &[&str] = if small { &["-small"] } else { &[] };
    let name = match (history > 0, small) {
        (false, _) => "Centrifuge",
        (true, false) => "Centrifuge, history",
        (true, true) => "Centrifuge, history, tuned",
    };
    centrifuges(name, 1, history, options, bytes)
}

/// So many nodes of Centrifuge that know of each other by this Redis, which keeps the history, too.
/// The sockets, and the publishes, go to one after another.
pub fn centrifuges_on_redis(count: usize, redis: &str, history: usize) -> Result<Server, String> {
    centrifuges("Centrifuge on Redis", count, history, &["-redis", redis], SMALL)
}

fn centrifuges(
    name: &'static str,
    count: usize,
    history: usize,
    options: &[&str],
    bytes: usize,
) -> Result<Server, String> {
    let go =
        installed("go").or_else(|| installed("../go/bin/go")).ok_or("not installed: it is built with go")?;
    let root = root();
    let program = root.join("target/peers/centrifuge");
    let mut build = Command::new(&go);
    build
        .args(["build", "-o"])
        .arg(&program)
        .arg(".")
        .current_dir(root.join("crates/bench/peers/centrifuge"));
    let built = build.output().map_err(|error| error.to_string())?;
    if !built.status.success() {
        return Err(format!("not built: {}", String::from_utf8_lossy(&built.stderr)));
    }
    let key = "0123456789abcdef0123456789abcdef";
    let mut nodes = Vec::new();
    let mut processes = Vec::new();
    for _ in 0..count {
        let at = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let mut command = Command::new(&program);
        command.args(["-listen", &at.to_string(), "-key", key, "-history", &history.to_string()]);
        if count > 1 {
            // As the processes of a cluster of ringpush: each as under a limit of one core.
            command.env("GOMAXPROCS", "1");
        }
        processes.push(Process(command.args(options).stderr(Stdio::null()).spawn().unwrap()));
        wait_for("centrifuge", 20, || listens(at));
        nodes.push(at);
    }
    let item = format!(r#"{{"channel":"user-{USER}","data":{}}}"#, payload(bytes));
    let single = Publish { at: nodes.clone(), ..over_http(nodes[0], "/api/publish", "", item.clone()) };
    let batch = Publish {
        at: nodes.clone(),
        connections: 4,
        pipelined: 16,
        before: "[".to_owned(),
        between: ",".to_owned(),
        after: "]".to_owned(),
        batch: BATCH,
        ..over_http(nodes[0], "/api/batch", "", item)
    };
    let manifest = include_str!("../peers/centrifuge/go.mod");
    let module = manifest.lines().find(|line| line.contains("centrifugal/centrifuge v")).unwrap_or_default();
    Ok(Server {
        name,
        what: format!("{}, {}", module.trim(), version(&go, "version")),
        processes,
        sockets: Box::new(move |users| {
            let open = |(n, token): (usize, String)| Socket {
                at: nodes[n % nodes.len()],
                upgrade: upgrade("/connection", ""),
                say: Some(format!(r#"{{"id":1,"connect":{{"token":"{token}"}}}}"#)),
                ready: r#""connect":"#.to_owned(),
            };
            tokens(key, users).into_iter().enumerate().map(open).collect()
        }),
        single,
        batch,
        ops: None,
        directory: tempfile::tempdir().unwrap(),
    })
}
