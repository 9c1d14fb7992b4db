//! The first figures: idle memory, sockets per second, and single publishes delivered per second, for ringpush and, where
//! it is installed, for nginx with nchan, one after the other on this machine.
//!
//!     cargo bench --bench cluster -- [--sockets 15000] [--seconds 8] [--peer ringpush|nchan] [--rate 10000]
//!
//! The load client is this process: one thread, raw frames, ready-made requests. It prints the processor time that it took
//! itself, so that nobody has to guess what was measured. With `--rate` the publishes are sent at that pace, and latency
//! is counted from the moment when each was due.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::{LocalSet, spawn_local};

/// Publishers, each with one request in flight (BENCH.md).
const PUBLISHERS: usize = 64;
/// Sockets being opened at once (BENCH.md, B2).
const OPENING: usize = 200;

struct Options {
    sockets: usize,
    seconds: u64,
    peer: Option<String>,
    rate: Option<u64>,
}

type Publish = Box<dyn Fn(usize, &str) -> String>;

/// A server under load.
struct Server {
    name: &'static str,
    child: Child,
    push: String,
    collect: String,
    /// The request that opens the socket of user `n`.
    open: Box<dyn Fn(usize) -> String>,
    /// The request that publishes `payload` to user `n`.
    publish: Publish,
    _directory: tempfile::TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn main() {
    let options = options();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    println!(
        "{:<10} {:>12} {:>11} {:>12} {:>9} {:>12} {:>12} {:>9} {:>9}",
        "server",
        "KiB/socket",
        "sockets/s",
        "messages/s",
        "lost",
        "us CPU/msg",
        "client us",
        "p50 ms",
        "p99 ms"
    );
    for peer in ["ringpush", "nchan"] {
        if options.peer.as_deref().is_some_and(|only| only != peer) {
            continue;
        }
        let started = if peer == "ringpush" { start_ringpush(options.sockets) } else { start_nchan() };
        match started {
            Some(server) => LocalSet::new().block_on(&runtime, measure(&server, &options)),
            None => println!("{peer:<10} not installed: libnginx-mod-nchan and nginx are Debian packages"),
        }
    }
}

fn options() -> Options {
    let mut options = Options { sockets: 15_000, seconds: 8, peer: None, rate: None };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().unwrap_or_else(|| panic!("{argument} needs a value"));
        match argument.as_str() {
            "--sockets" => options.sockets = value().parse().unwrap(),
            "--seconds" => options.seconds = value().parse().unwrap(),
            "--rate" => options.rate = Some(value().parse().unwrap()),
            "--peer" => options.peer = Some(value()),
            // What cargo adds by itself.
            "--bench" => {}
            other => panic!("unknown option {other}"),
        }
    }
    options
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn start_ringpush(sockets: usize) -> Option<Server> {
    let directory = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_ringpush"));
    command.args(["serve", "--data"]).arg(directory.path()).stdout(Stdio::null()).stderr(Stdio::null());
    for role in ["PUSH", "COLLECT", "AUTH", "DISPATCH", "OPS"] {
        command.env(format!("RINGPUSH_{role}__LISTEN"), "127.0.0.1:0");
    }
    command.env("RINGPUSH_PUSH__ACCEPT_PER_S", "0");
    let child = command.spawn().unwrap();
    let listening = directory.path().join("listen.json");
    wait_for(|| listening.exists());
    let listening: serde_json::Value = serde_json::from_slice(&std::fs::read(listening).unwrap()).unwrap();
    let at = |role: &str| listening[role].as_str().unwrap().to_owned();
    let keys: toml::Table =
        std::fs::read_to_string(directory.path().join("dev-keys.toml")).unwrap().parse().unwrap();
    let tokens = tokens(keys["token_key"].as_str().unwrap(), sockets);
    let api_key = keys["api_key"].as_str().unwrap().to_owned();
    Some(Server {
        name: "ringpush",
        child,
        push: at("push"),
        collect: at("collect"),
        open: Box::new(move |n| upgrade("/v1/ws", &format!("Authorization: Bearer {}\r\n", tokens[n]))),
        publish: Box::new(move |n, payload| {
            let body = format!(r#"{{"to":{{"user":"user-{n:08}"}},"payload":{payload}}}"#);
            let length = body.len();
            format!(
                "POST /v1/messages HTTP/1.1\r\nHost: b\r\nAuthorization: Bearer {api_key}\r\n\
                 Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
            )
        }),
        _directory: directory,
    })
}

fn tokens(key: &str, count: usize) -> Vec<String> {
    use ringpush::clock::Clock;
    use ringpush::message::UserId;
    use ringpush::role::auth::{Auth, AuthConfig};
    let config = AuthConfig { token_key: key.to_owned(), ..AuthConfig::default() };
    let auth = Auth::new(config, Clock::system()).unwrap();
    (0..count)
        .map(|n| auth.issue(&UserId::parse(&format!("user-{n:08}")).unwrap(), 7200).unwrap().0)
        .collect()
}

/// One worker, no store, and the channel's buffer as small as it will go: nothing that it need not do.
fn start_nchan() -> Option<Server> {
    let module =
        ["/usr/lib/nginx/modules/ngx_nchan_module.so", "/usr/share/nginx/modules/ngx_nchan_module.so"]
            .into_iter()
            .find(|path| Path::new(path).exists())?;
    let nginx = ["/usr/sbin/nginx", "/usr/bin/nginx"].into_iter().find(|path| Path::new(path).exists())?;
    let directory = tempfile::tempdir().unwrap();
    let port = free_port();
    let here = directory.path().display();
    let config = format!(
        "load_module {module};\nworker_processes 1;\ndaemon off;\nmaster_process off;\npid {here}/pid;\n\
         error_log {here}/error.log;\nworker_rlimit_nofile 20000;\nevents {{ worker_connections 19000; }}\n\
         http {{ access_log off; client_body_temp_path {here}/b; proxy_temp_path {here}/p; fastcgi_temp_path {here}/f;\n\
         uwsgi_temp_path {here}/u; scgi_temp_path {here}/s; keepalive_requests 100000000;\n\
         nchan_max_reserved_memory 512m;\nserver {{ listen 127.0.0.1:{port} backlog=4096;\n\
         location ~ ^/sub/(.+)$ {{ nchan_subscriber websocket; nchan_channel_id $1; nchan_websocket_ping_interval 25; }}\n\
         location ~ ^/pub/(.+)$ {{ nchan_publisher http; nchan_channel_id $1; nchan_message_buffer_length 0; }}\n}}\n}}\n"
    );
    std::fs::write(directory.path().join("nginx.conf"), config).unwrap();
    let child = Command::new(nginx)
        .arg("-c")
        .arg(directory.path().join("nginx.conf"))
        .arg("-p")
        .arg(directory.path())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let at = format!("127.0.0.1:{port}");
    wait_for(|| std::net::TcpStream::connect(&at).is_ok());
    Some(Server {
        name: "nchan",
        child,
        push: at.clone(),
        collect: at,
        open: Box::new(|n| upgrade(&format!("/sub/user-{n:08}"), "")),
        publish: Box::new(|n, payload| {
            let length = payload.len();
            format!("POST /pub/user-{n:08} HTTP/1.1\r\nHost: b\r\nContent-Length: {length}\r\n\r\n{payload}")
        }),
        _directory: directory,
    })
}

fn upgrade(path: &str, more: &str) -> String {
    format!(
        "GET {path} HTTP/1.1\r\nHost: b\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{more}\r\n"
    )
}

fn wait_for(ready: impl Fn() -> bool) {
    let began = Instant::now();
    while !ready() {
        assert!(began.elapsed() < Duration::from_secs(20), "the server did not start");
        std::thread::yield_now();
    }
}

/// What the load client counts, shared by its tasks.
#[derive(Default)]
struct Counts {
    open: Cell<usize>,
    welcomed: Cell<usize>,
    received: Cell<u64>,
    sent: Cell<u64>,
    delays_us: RefCell<Vec<u32>>,
}

async fn measure(server: &Server, options: &Options) {
    let counts = Rc::new(Counts::default());
    let before_kib = resident_kib(server.child.id());
    let began = Instant::now();
    open_all(server, options.sockets, &counts).await;
    let opening = began.elapsed();
    let welcome = server.name == "ringpush";
    while welcome && counts.welcomed.get() < options.sockets {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let rate = options.sockets as f64 / if welcome { began.elapsed() } else { opening }.as_secs_f64();
    tokio::time::sleep(Duration::from_secs(3)).await;
    let idle_kib = (resident_kib(server.child.id()) as f64 - before_kib as f64) / options.sockets as f64;

    let already = counts.received.get();
    let (server_cpu, client_cpu) = (cpu_us(server.child.id()), cpu_us(std::process::id()));
    let began = Instant::now();
    publish(server, options, &counts).await;
    let deadline = Instant::now() + Duration::from_secs(10);
    while counts.received.get() - already < counts.sent.get() && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let took = began.elapsed().as_secs_f64();
    let (sent, received) = (counts.sent.get(), counts.received.get() - already);
    let mut delays = counts.delays_us.borrow_mut();
    delays.sort_unstable();
    let at = |part: f64| {
        delays.get((delays.len() as f64 * part) as usize).map_or(0.0, |us| f64::from(*us) / 1000.0)
    };
    println!(
        "{:<10} {:>12.2} {:>11.0} {:>12.0} {:>9} {:>12.1} {:>12.1} {:>9.2} {:>9.2}",
        server.name,
        idle_kib,
        rate,
        received as f64 / took,
        sent - received.min(sent),
        (cpu_us(server.child.id()) - server_cpu) as f64 / received as f64,
        (cpu_us(std::process::id()) - client_cpu) as f64 / received as f64,
        at(0.5),
        at(0.99),
    );
}

async fn open_all(server: &Server, sockets: usize, counts: &Rc<Counts>) {
    let next = Rc::new(Cell::new(0));
    let requests: Rc<Vec<String>> = Rc::new((0..sockets).map(|n| (server.open)(n)).collect());
    let mut openers = Vec::new();
    for _ in 0..OPENING {
        let (next, requests, counts, at) =
            (Rc::clone(&next), Rc::clone(&requests), Rc::clone(counts), server.push.clone());
        openers.push(spawn_local(async move {
            while next.get() < requests.len() {
                let n = next.replace(next.get() + 1);
                let mut stream = TcpStream::connect(&at).await.unwrap();
                stream.set_nodelay(true).unwrap();
                stream.write_all(requests[n].as_bytes()).await.unwrap();
                let rest = read_head(&mut stream).await;
                counts.open.set(counts.open.get() + 1);
                spawn_local(receive(stream, rest, Rc::clone(&counts)));
            }
        }));
    }
    for opener in openers {
        opener.await.unwrap();
    }
}

/// Reads the answer to the upgrade; returns what came behind it.
async fn read_head(stream: &mut TcpStream) -> Vec<u8> {
    let mut head = Vec::with_capacity(1024);
    loop {
        if stream.read_buf(&mut head).await.unwrap() == 0 {
            panic!("refused: {}", String::from_utf8_lossy(&head));
        }
        if let Some(end) = head.windows(4).position(|w| w == b"\r\n\r\n") {
            assert!(head.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&head));
            return head.split_off(end + 4);
        }
    }
}

thread_local! {
    static BEGAN: Instant = Instant::now();
}

fn now_us() -> u64 {
    BEGAN.with(|began| began.elapsed().as_micros() as u64)
}

/// Counts message frames, and their delays where they carry the moment when they were due.
async fn receive(mut stream: TcpStream, mut held: Vec<u8>, counts: Rc<Counts>) {
    let mut buffer = [0u8; 2048];
    loop {
        let mut at = 0;
        while let Some((payload, length)) = frame(&held[at..]) {
            take_frame(&held[at + payload..at + length], &counts);
            at += length;
        }
        held.drain(..at);
        if held.is_empty() {
            held = Vec::new();
        }
        match stream.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(count) => held.extend_from_slice(&buffer[..count]),
        }
    }
}

/// Where the payload of the first frame begins, and where the frame ends; None while it is not whole.
fn frame(bytes: &[u8]) -> Option<(usize, usize)> {
    let (head, length) = match *bytes.get(1)? & 0x7f {
        126 => (4, u16::from_be_bytes([*bytes.get(2)?, *bytes.get(3)?]) as usize),
        127 => panic!("no frame here is that long"),
        short => (2, short as usize),
    };
    (bytes.len() >= head + length).then_some((head, head + length))
}

fn take_frame(payload: &[u8], counts: &Counts) {
    if payload.starts_with(br#"{"type":"welcome""#) {
        counts.welcomed.set(counts.welcomed.get() + 1);
        return;
    }
    let Some(found) = payload.windows(5).position(|w| w == br#""at":"#) else { return };
    counts.received.set(counts.received.get() + 1);
    let digits = payload[found + 5..].iter().skip_while(|b| **b == b' ').take_while(|b| b.is_ascii_digit());
    let due = digits.fold(0u64, |n, b| n * 10 + u64::from(b - b'0'));
    if due > 0 {
        counts.delays_us.borrow_mut().push(now_us().saturating_sub(due).min(u64::from(u32::MAX)) as u32);
    }
}

async fn publish(server: &Server, options: &Options, counts: &Rc<Counts>) {
    let until = Instant::now() + Duration::from_secs(options.seconds);
    // At a pace: the moments that are due, taken by whichever publisher is free.
    let due: Rc<RefCell<VecDeque<u64>>> = Rc::default();
    if let Some(rate) = options.rate {
        let due = Rc::clone(&due);
        spawn_local(async move {
            let (began, mut made) = (now_us(), 0u64);
            while Instant::now() < until {
                let should = (now_us() - began) * rate / 1_000_000;
                while made < should {
                    due.borrow_mut().push_back(began + made * 1_000_000 / rate);
                    made += 1;
                }
                tokio::time::sleep(Duration::from_micros(500)).await;
            }
        });
    }
    let mut publishers = Vec::new();
    let next = Rc::new(Cell::new(0usize));
    for _ in 0..PUBLISHERS {
        let mut stream = TcpStream::connect(&server.collect).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let (counts, due, next) = (Rc::clone(counts), Rc::clone(&due), Rc::clone(&next));
        let (sockets, paced) = (options.sockets, options.rate.is_some());
        let template = template(server);
        publishers.push(spawn_local(async move {
            let mut answer = Vec::with_capacity(1024);
            let mut request = String::new();
            while Instant::now() < until {
                let at = match (paced, due.borrow_mut().pop_front()) {
                    (true, None) => None,
                    (true, Some(at)) => Some(at),
                    (false, _) => Some(0),
                };
                let Some(at) = at else {
                    tokio::time::sleep(Duration::from_micros(300)).await;
                    continue;
                };
                // A step coprime to the number of sockets visits all of them in no order that a cache could like.
                let n = next.replace((next.get() + 7_919) % sockets);
                fill(&mut request, &template, n, at);
                stream.write_all(request.as_bytes()).await.unwrap();
                read_answer(&mut stream, &mut answer).await;
                counts.sent.set(counts.sent.get() + 1);
            }
        }));
    }
    for publisher in publishers {
        publisher.await.unwrap();
    }
}

/// The request with places for the user and the moment, found by publishing to user 0 at moment 0.
fn template(server: &Server) -> String {
    // Twelve digits hold the moment, so the length of the body never changes.
    (server.publish)(0, r#"{"text":"a message of usual length, for one user","at":100000000000}"#)
}

fn fill(out: &mut String, template: &str, n: usize, at: u64) {
    use std::fmt::Write;
    out.clear();
    let user = template.find("user-00000000").unwrap() + 5;
    let moment = template.find("100000000000").unwrap();
    let (first, second) = (user.min(moment), user.max(moment));
    out.push_str(&template[..first]);
    let put = |out: &mut String, place: usize| {
        if place == user {
            write!(out, "{n:08}").unwrap();
            8
        } else {
            // Leading spaces, not zeros: it must stay JSON.
            write!(out, "{at:>12}").unwrap();
            12
        }
    };
    let skipped = put(out, first);
    out.push_str(&template[first + skipped..second]);
    let skipped = put(out, second);
    out.push_str(&template[second + skipped..]);
}

async fn read_answer(stream: &mut TcpStream, answer: &mut Vec<u8>) {
    answer.clear();
    loop {
        assert!(stream.read_buf(answer).await.unwrap() > 0, "the server closed");
        if let Some(end) = answer.windows(4).position(|w| w == b"\r\n\r\n") {
            let head = std::str::from_utf8(&answer[..end]).unwrap().to_ascii_lowercase();
            assert!(head.starts_with("http/1.1 20"), "{head}");
            let length = head.lines().find_map(|line| line.strip_prefix("content-length:"));
            let length: usize = length.map_or(0, |length| length.trim().parse().unwrap());
            if answer.len() >= end + 4 + length {
                return;
            }
        }
    }
}

fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").trim().parse().unwrap()
}

/// Processor time of a process, user and system, in microseconds; the kernel counts in ticks of 10 ms.
fn cpu_us(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    (fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()) * 10_000
}
