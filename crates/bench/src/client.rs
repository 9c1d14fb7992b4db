//! The load client: a process of its own, one thread, raw frames, ready-made requests. It is told
//! what to do by lines of JSON on its standard input and answers each with one line, so that what
//! is measured shares nothing with it but the machine.
//!
//! At a steady rate a message's delay counts from the moment when it was due, whoever was busy
//! then.

mod publisher;

use std::io::{BufRead, Read, Write};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};
use rustix::io::Errno;
use rustix::net::{self, AddressFamily, SocketFlags, SocketType};
use serde::{Deserialize, Serialize};

use crate::measure::cpu_us;
use publisher::{PUBLISHERS, Publisher};

/// Sockets that are opened at once (docs/benchmarks.md, B2).
pub const OPENING: usize = 200;
/// How long what is under way may take when the time is over.
const GRACE: Duration = Duration::from_secs(10);
/// Sockets from one source address.
const SOCKETS_PER_SOURCE: usize = 4_000;
/// Bytes read at once.
const BUFFER: usize = 64 * 1024;
/// What stands for the moment when a message was due, in a message's template: twelve places.
pub const MOMENT: &str = "{__MOMENT__}";
/// What stands for the message's number, ten places.
pub const NUMBER: &str = "{_NUMBER_}";
/// What stands for the user's number, eight places.
pub const USER: &str = "{_USER_}";

/// What the load client is told.
#[derive(Serialize, Deserialize)]
pub enum Order {
    /// Open sockets; answered when all are ready.
    Open(Vec<Socket>),
    /// Publish; answered when all that was accepted has arrived, or is given up.
    Publish(Publish),
    /// Read no more from the first `n` sockets, until the order comes again with 0.
    Stall(usize),
    /// Read for this long, in ms, or until `expect` messages have come.
    Listen { ms: u64, expect: u64 },
    /// Read for this long, in ms, or until so many copies of messages have come.
    Gather { ms: u64, copies: u64 },
    /// Look at the order of what comes from now on: by the number that ringpush gives.
    InSequence,
    /// Forget what was counted.
    Reset,
}

/// One socket to open.
#[derive(Serialize, Deserialize)]
pub struct Socket {
    pub at: SocketAddr,
    /// The whole request for the upgrade.
    pub upgrade: String,
    /// What to say in a text frame when it is open.
    pub say: Option<String>,
    /// A text that is in the frame which says that all is well; empty: the upgrade says so.
    pub ready: String,
}

/// How to publish.
#[derive(Serialize, Deserialize, Clone)]
pub struct Publish {
    pub at: Vec<SocketAddr>,
    pub connections: usize,
    /// Requests under way on each connection.
    pub pipelined: usize,
    /// Before the body; `{LENGTH}` stands for its length. Empty where the protocol has no head.
    pub head: String,
    pub before: String,
    /// One message; with [`USER`], [`MOMENT`] and [`NUMBER`].
    pub item: String,
    pub between: String,
    pub after: String,
    /// Messages in one request.
    pub batch: usize,
    /// The end of an answer where it is not HTTP.
    pub answer: Option<String>,
    pub users: std::ops::Range<usize>,
    /// Every n-th message goes to one of the first so many users instead.
    pub favour: Option<(u64, usize)>,
    pub seconds: f64,
    /// Messages per second; None: as many as go.
    pub rate: Option<f64>,
    /// How many of them are to arrive on this client's own sockets; false: they are not waited for.
    pub own: bool,
}

/// What the load client answers.
#[derive(Serialize, Deserialize, Debug, Default, Clone)]
pub struct Report {
    pub error: Option<String>,
    /// From the first connect until the last socket was ready.
    pub seconds: f64,
    pub sockets: usize,
    /// Messages whose request was answered well.
    pub accepted: u64,
    /// Messages that came, each counted once.
    pub received: u64,
    /// Messages that came again.
    pub repeated: u64,
    pub refused: u64,
    /// Sockets that were closed though nobody asked for it.
    pub lost_sockets: usize,
    pub cpu_us: u64,
    /// In ms, by messages that were meant for sockets that read.
    pub p50: f64,
    pub p99: f64,
    pub max: f64,
    /// The longest delay of any copy, in ms: when the last socket had a message that goes to all.
    pub last: f64,
    /// Messages that came behind one with a higher number, if that is looked at.
    pub backwards: u64,
}

/// Makes the n-th socket, with an address of its own for every few thousand: an address has 28,000
/// ports to one server, and when half of them are taken the kernel looks through them all for each
/// socket, a millisecond of this client's time. Another process has other addresses, for ports that
/// were used stay taken for a minute.
fn make(n: usize) -> std::io::Result<OwnedFd> {
    let process = 1 + (std::process::id() % 254) as u8;
    let source = u8::try_from(2 + n / SOCKETS_PER_SOURCE).unwrap();
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = net::socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?;
    net::bind(&socket, &SocketAddr::from(([127, process, 0, source], 0)))?;
    Ok(socket)
}

fn connect(socket: OwnedFd, to: SocketAddr) -> std::io::Result<TcpStream> {
    match net::connect(&socket, &to) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(TcpStream::from_std(socket.into())),
        Err(error) => Err(error.into()),
    }
}

/// Reads orders until its input ends.
pub fn run() {
    let mut client = Client::new();
    for line in std::io::stdin().lock().lines() {
        let order: Order = serde_json::from_str(&line.unwrap()).unwrap();
        let report = client.obey(order);
        println!("{}", serde_json::to_string(&report).unwrap());
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Stage {
    Upgrading,
    Waiting,
    Ready,
    Gone,
}

struct Subscriber {
    stream: TcpStream,
    /// What came and was not whole.
    held: Vec<u8>,
    stage: Stage,
    stalled: bool,
    upgrade: String,
    say: Option<String>,
    ready: String,
    /// The highest number of a message that came, if the order is looked at.
    highest: u64,
}

struct Client {
    poll: Poll,
    began: Instant,
    subscribers: Vec<Subscriber>,
    publishers: Vec<Publisher>,
    first_publisher: usize,
    opening: usize,
    ready: usize,
    buffer: Vec<u8>,
    seen: Vec<u64>,
    delays_us: Vec<u32>,
    /// Numbers go on from one publish to the next.
    next_number: u64,
    next_user: u64,
    looks_at_order: bool,
    report: Report,
}

impl Client {
    fn new() -> Self {
        Self {
            poll: Poll::new().unwrap(),
            began: Instant::now(),
            subscribers: Vec::new(),
            publishers: Vec::new(),
            first_publisher: 0,
            opening: 0,
            ready: 0,
            buffer: vec![0; BUFFER],
            seen: Vec::new(),
            delays_us: Vec::new(),
            next_number: 1,
            next_user: 0,
            looks_at_order: false,
            report: Report::default(),
        }
    }

    fn obey(&mut self, order: Order) -> Report {
        let mut cpu = cpu_us(std::process::id());
        let done = match order {
            Order::Open(sockets) => self.make(sockets.len()).and_then(|made| {
                cpu = cpu_us(std::process::id());
                self.open(made.into_iter().zip(sockets))
            }),
            Order::Publish(plan) => self.publish(&plan),
            Order::Stall(count) => self.stall(count),
            Order::Listen { ms, expect } => self.listen(Duration::from_millis(ms), |r| r.received >= expect),
            Order::Gather { ms, copies } => {
                self.listen(Duration::from_millis(ms), |r| r.received + r.repeated >= copies)
            }
            Order::InSequence => {
                self.looks_at_order = true;
                Ok(())
            }
            Order::Reset => {
                self.report = Report::default();
                self.seen.clear();
                self.delays_us.clear();
                Ok(())
            }
        };
        self.report.error = done.err();
        self.report.sockets = self.ready;
        self.report.cpu_us = cpu_us(std::process::id()) - cpu;
        self.report.lost_sockets = self.subscribers.iter().filter(|one| one.stage == Stage::Gone).count();
        let mut delays = self.delays_us.clone();
        delays.sort_unstable();
        let at = |part: f64| {
            let n = ((delays.len() as f64 * part) as usize).min(delays.len().saturating_sub(1));
            delays.get(n).map_or(0.0, |us| f64::from(*us) / 1000.0)
        };
        (self.report.p50, self.report.p99, self.report.max) = (at(0.5), at(0.99), at(1.0));
        self.report.clone()
    }

    fn now_us(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_micros()).unwrap()
    }

    /// Sockets to connect, made before the clock runs: they are no work of the server's, and this
    /// one thread needs longer for a new connection than a server does.
    fn make(&self, count: usize) -> Result<Vec<OwnedFd>, String> {
        let first = self.subscribers.len();
        (first..first + count).map(make).collect::<Result<_, _>>().map_err(|error| error.to_string())
    }

    fn open(&mut self, mut sockets: impl ExactSizeIterator<Item = (OwnedFd, Socket)>) -> Result<(), String> {
        let (began, first) = (Instant::now(), self.subscribers.len());
        let wanted = first + sockets.len();
        let mut events = Events::with_capacity(1024);
        let mut heard = Instant::now();
        while self.ready < wanted {
            while self.opening < OPENING
                && let Some((made, socket)) = sockets.next()
            {
                let n = self.subscribers.len();
                let mut stream = connect(made, socket.at).map_err(|error| error.to_string())?;
                let Socket { mut upgrade, say, ready, .. } = socket;
                // On one machine a connection is there when `connect` returns: the request may go
                // at once.
                let asked =
                    !upgrade.is_empty() && stream.write(upgrade.as_bytes()).is_ok_and(|n| n == upgrade.len());
                if asked {
                    upgrade.clear();
                }
                let interest = if asked { Interest::READABLE } else { Interest::WRITABLE };
                self.poll.registry().register(&mut stream, Token(n), interest).unwrap();
                let stage = Stage::Upgrading;
                self.subscribers.push(Subscriber {
                    stream,
                    held: Vec::new(),
                    stage,
                    stalled: false,
                    upgrade,
                    say,
                    ready,
                    highest: 0,
                });
                self.opening += 1;
            }
            self.turn(&mut events, Duration::from_millis(100))?;
            if !events.is_empty() {
                heard = Instant::now();
            }
            if heard.elapsed() > GRACE {
                return Err(format!("only {} of {wanted} sockets became ready", self.ready));
            }
        }
        self.report.seconds = began.elapsed().as_secs_f64();
        Ok(())
    }

    /// Waits for events and handles those of sockets; those of publishers stay in `events`.
    fn turn(&mut self, events: &mut Events, wait: Duration) -> Result<(), String> {
        match self.poll.poll(events, Some(wait)) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => return Ok(()),
            other => other.map_err(|error| error.to_string())?,
        }
        for event in &*events {
            let n = event.token().0;
            if n < PUBLISHERS {
                if event.is_writable() && self.subscribers[n].stage == Stage::Upgrading {
                    self.ask_for_upgrade(n)?;
                }
                if event.is_readable() && !self.subscribers[n].stalled {
                    self.read(n)?;
                }
            }
        }
        Ok(())
    }

    fn ask_for_upgrade(&mut self, n: usize) -> Result<(), String> {
        let one = &mut self.subscribers[n];
        if one.upgrade.is_empty() {
            return Ok(());
        }
        if let Some(error) = one.stream.take_error().map_err(|error| error.to_string())? {
            return Err(format!("a socket could not be opened: {error}"));
        }
        let _ = one.stream.set_nodelay(true);
        let request = std::mem::take(&mut one.upgrade);
        one.stream.write_all(request.as_bytes()).map_err(|error| error.to_string())?;
        self.poll.registry().reregister(&mut one.stream, Token(n), Interest::READABLE).unwrap();
        Ok(())
    }

    fn read(&mut self, n: usize) -> Result<(), String> {
        loop {
            let one = &mut self.subscribers[n];
            if one.stage == Stage::Gone {
                return Ok(());
            }
            let mut buffer = std::mem::take(&mut self.buffer);
            let read = one.stream.read(&mut buffer);
            let done = match read {
                Ok(0) => {
                    self.gone(n);
                    Ok(true)
                }
                Ok(count) if self.subscribers[n].held.is_empty() => {
                    let used = self.take(n, &buffer[..count]);
                    used.map(|used| {
                        self.subscribers[n].held.extend_from_slice(&buffer[used..count]);
                        count < BUFFER
                    })
                }
                Ok(count) => {
                    let mut held = std::mem::take(&mut self.subscribers[n].held);
                    held.extend_from_slice(&buffer[..count]);
                    self.take(n, &held).map(|used| {
                        held.drain(..used);
                        // An idle socket keeps nothing.
                        self.subscribers[n].held = if held.is_empty() { Vec::new() } else { held };
                        count < BUFFER
                    })
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(true),
                Err(_) => {
                    self.gone(n);
                    Ok(true)
                }
            };
            self.buffer = buffer;
            if done? {
                return Ok(());
            }
        }
    }

    fn gone(&mut self, n: usize) {
        let one = &mut self.subscribers[n];
        self.ready -= usize::from(one.stage == Stage::Ready);
        self.opening -= usize::from(matches!(one.stage, Stage::Upgrading | Stage::Waiting));
        one.stage = Stage::Gone;
    }

    /// Takes what is whole; how many bytes that was.
    fn take(&mut self, n: usize, bytes: &[u8]) -> Result<usize, String> {
        let mut at = 0;
        if self.subscribers[n].stage == Stage::Upgrading {
            let Some(end) = find(bytes, b"\r\n\r\n") else { return Ok(0) };
            if !bytes.starts_with(b"HTTP/1.1 101") {
                return Err(format!("an upgrade was answered {}", String::from_utf8_lossy(bytes)));
            }
            at = end + 4;
            let say = self.subscribers[n].say.take();
            if let Some(say) = say {
                self.say(n, 1, say.as_bytes())?;
            }
            let one = &mut self.subscribers[n];
            one.stage = Stage::Waiting;
            if one.ready.is_empty() {
                self.is_ready(n);
            }
        }
        while let Some((opcode, payload, length)) = frame(&bytes[at..]) {
            let payload = &bytes[at + payload..at + length];
            match opcode {
                8 => self.gone(n),
                9 => self.say(n, 10, payload)?,
                1 | 2 => self.take_text(n, payload)?,
                _ => {}
            }
            at += length;
        }
        Ok(at)
    }

    fn is_ready(&mut self, n: usize) {
        self.subscribers[n].stage = Stage::Ready;
        self.opening -= 1;
        self.ready += 1;
    }

    /// A frame of this opcode; masked with zeros, which leaves the payload as it is.
    fn say(&mut self, n: usize, opcode: u8, payload: &[u8]) -> Result<(), String> {
        let mut frame = vec![0x80 | opcode];
        match u8::try_from(payload.len()) {
            Ok(short) if short < 126 => frame.push(0x80 | short),
            _ => {
                frame.push(0x80 | 126);
                frame.extend_from_slice(&u16::try_from(payload.len()).unwrap().to_be_bytes());
            }
        }
        frame.extend_from_slice(&[0; 4]);
        frame.extend_from_slice(payload);
        // So little always fits; a socket that is gone is noticed when it is read.
        let _ = self.subscribers[n].stream.write(&frame);
        Ok(())
    }

    fn take_text(&mut self, n: usize, payload: &[u8]) -> Result<(), String> {
        let one = &mut self.subscribers[n];
        if one.stage == Stage::Waiting {
            if find(payload, one.ready.as_bytes()).is_some() {
                self.is_ready(n);
            }
            return Ok(());
        }
        if payload == b"{}" {
            // Centrifuge's ping.
            return self.say(n, 1, b"{}");
        }
        if payload == b"PING\r\n" {
            return self.say(n, 1, b"PONG\r\n");
        }
        if self.looks_at_order {
            self.look_at_order(n, payload);
        }
        let mut at = 0;
        while let Some(found) = find(&payload[at..], br#""at":"#) {
            at += found + 5;
            let (due, _) = digits(&payload[at..]);
            let Some(found) = find(&payload[at..], br#""k":"#) else { break };
            at += found + 4;
            let (number, used) = digits(&payload[at..]);
            at += used;
            self.count(n, number, due);
        }
        Ok(())
    }

    fn look_at_order(&mut self, n: usize, payload: &[u8]) {
        let Some(found) = find(payload, br#""seq":"#) else { return };
        if find(payload, br#""type":"message""#).is_some() {
            let (number, highest) = (digits(&payload[found + 6..]).0, &mut self.subscribers[n].highest);
            self.report.backwards += u64::from(number <= *highest);
            *highest = number.max(*highest);
        }
    }

    fn count(&mut self, n: usize, number: u64, due: u64) {
        let (word, bit) = (usize::try_from(number / 64).unwrap(), 1u64 << (number % 64));
        if word >= self.seen.len() {
            self.seen.resize(word + 4096, 0);
        }
        let delay = (due > 0 && !self.subscribers[n].stalled).then(|| self.now_us().saturating_sub(due));
        self.report.last = self.report.last.max(delay.unwrap_or(0) as f64 / 1000.0);
        // Ready-made frames all have the number 0.
        if number > 0 && self.seen[word] & bit != 0 {
            self.report.repeated += 1;
            return;
        }
        self.seen[word] |= bit;
        self.report.received += 1;
        if let Some(delay) = delay {
            self.delays_us.push(u32::try_from(delay).unwrap_or(u32::MAX));
        }
    }

    fn stall(&mut self, count: usize) -> Result<(), String> {
        for n in 0..self.subscribers.len() {
            let was = std::mem::replace(&mut self.subscribers[n].stalled, n < count);
            if was && n >= count {
                // Its events have passed by. What it reads now is old: it stays out of the delays.
                self.subscribers[n].stalled = true;
                self.read(n)?;
                self.subscribers[n].stalled = false;
            }
        }
        Ok(())
    }

    fn listen(&mut self, time: Duration, done: impl Fn(&Report) -> bool) -> Result<(), String> {
        let (until, mut events) = (Instant::now() + time, Events::with_capacity(1024));
        while Instant::now() < until && !done(&self.report) {
            self.turn(&mut events, Duration::from_millis(20))?;
        }
        Ok(())
    }
}

/// The opcode of the first frame, where its payload begins, and where it ends; None while it is not
/// whole.
fn frame(bytes: &[u8]) -> Option<(u8, usize, usize)> {
    let (head, length) = match *bytes.get(1)? & 0x7f {
        126 => (4, u16::from_be_bytes([*bytes.get(2)?, *bytes.get(3)?]) as usize),
        127 => {
            let raw: [u8; 8] = bytes.get(2..10)?.try_into().ok()?;
            (10, usize::try_from(u64::from_be_bytes(raw)).ok()?)
        }
        short => (2, short as usize),
    };
    (bytes.len() >= head + length).then_some((bytes[0] & 0x0f, head, head + length))
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    memchr::memmem::find(bytes, what)
}

/// The number behind any spaces, and how many bytes that was.
fn digits(bytes: &[u8]) -> (u64, usize) {
    let spaces = bytes.iter().take_while(|byte| **byte == b' ').count();
    let digits = bytes[spaces..].iter().take_while(|byte| byte.is_ascii_digit());
    let (number, count) = digits.fold((0u64, 0), |(n, count), b| (n * 10 + u64::from(b - b'0'), count + 1));
    (number, spaces + count)
}
