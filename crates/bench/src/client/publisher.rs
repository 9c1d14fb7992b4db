//! The side of the load client that publishes.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::time::{Duration, Instant};

use mio::net::TcpStream;
use mio::{Events, Interest, Token};

use super::{BUFFER, Client, GRACE, MOMENT, NUMBER, Publish, USER, find};

pub(super) struct Publisher {
    pub(super) stream: TcpStream,
    pub(super) out: Vec<u8>,
    pub(super) written: usize,
    pub(super) held: Vec<u8>,
    /// Messages in each request that is under way.
    pub(super) under_way: VecDeque<u64>,
}

/// Tokens from here on are publishers.
pub(super) const PUBLISHERS: usize = 1 << 20;

impl Publisher {
    pub(super) fn write(&mut self) {
        while self.written < self.out.len() {
            match self.stream.write(&self.out[self.written..]) {
                Ok(count) => self.written += count,
                Err(_) => return,
            }
        }
        self.out.clear();
        self.written = 0;
    }
}

/// A request's parts, its places found once.
pub(super) struct Request {
    pub(super) head: (String, String),
    pub(super) before: String,
    /// What is between the places, and which place comes then.
    pub(super) item: Vec<(String, Option<Place>)>,
    pub(super) between: String,
    pub(super) after: String,
    pub(super) item_length: usize,
}

#[derive(Clone, Copy)]
pub(super) enum Place {
    User,
    Moment,
    Number,
}

impl Request {
    pub(super) fn new(plan: &Publish) -> Self {
        let (head, rest) = plan.head.split_once("{LENGTH}").unwrap_or((&plan.head, ""));
        let mut item = Vec::new();
        let mut left = plan.item.as_str();
        let places = [(USER, Place::User), (MOMENT, Place::Moment), (NUMBER, Place::Number)];
        while let Some((at, mark, place)) = places
            .iter()
            .filter_map(|(mark, place)| left.find(mark).map(|at| (at, *mark, *place)))
            .min_by_key(|it| it.0)
        {
            item.push((left[..at].to_owned(), Some(place)));
            left = &left[at + mark.len()..];
        }
        item.push((left.to_owned(), None));
        Self {
            head: (head.to_owned(), rest.to_owned()),
            before: plan.before.clone(),
            item,
            between: plan.between.clone(),
            after: plan.after.clone(),
            item_length: plan.item.len(),
        }
    }

    pub(super) fn begin(&self, out: &mut Vec<u8>, count: usize) {
        let between = self.between.len() * (count - 1);
        let length = self.before.len() + self.item_length * count + between + self.after.len();
        if !self.head.0.is_empty() {
            let _ = write!(out, "{}{length}{}", self.head.0, self.head.1);
        }
        out.extend_from_slice(self.before.as_bytes());
    }

    /// Every place is as wide as its mark, with spaces in front: it must stay JSON, and as long as
    /// it was said to be.
    pub(super) fn item(&self, out: &mut Vec<u8>, k: usize, user: usize, at: u64, number: u64) {
        if k > 0 {
            out.extend_from_slice(self.between.as_bytes());
        }
        for (text, place) in &self.item {
            out.extend_from_slice(text.as_bytes());
            let _ = match place {
                Some(Place::User) => write!(out, "{user:08}"),
                Some(Place::Moment) => write!(out, "{at:>12}"),
                Some(Place::Number) => write!(out, "{number:>10}"),
                None => Ok(()),
            };
        }
    }

    pub(super) fn end(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(self.after.as_bytes());
    }
}

/// Whether the first whole answer is good, and how long it is.
pub(super) fn http_answer(bytes: &[u8]) -> Result<Option<(bool, usize)>, String> {
    let Some(end) = find(bytes, b"\r\n\r\n") else { return Ok(None) };
    let head = std::str::from_utf8(&bytes[..end]).map_err(|error| error.to_string())?;
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
    });
    let whole = end + 4 + length.unwrap_or(0);
    Ok((bytes.len() >= whole).then(|| (head.as_bytes()[9] == b'2', whole)))
}

impl Client {
    pub(super) fn publish(&mut self, plan: &Publish) -> Result<(), String> {
        self.connect_publishers(plan)?;
        let request = Request::new(plan);
        let began = Instant::now();
        let base_us = self.now_us();
        let until = began + Duration::from_secs_f64(plan.seconds);
        let (mut due, mut made) = (VecDeque::new(), 0u64);
        let mut events = Events::with_capacity(1024);
        loop {
            let over = Instant::now() >= until;
            if let Some(rate) = plan.rate {
                let should = ((self.now_us() - base_us) as f64 * rate / 1e6) as u64;
                while made < should && !over {
                    due.push_back(base_us + (made as f64 * 1e6 / rate) as u64);
                    made += 1;
                }
            }
            self.fill(plan, &request, &mut due, over);
            let idle = self.publishers.iter().all(|one| one.under_way.is_empty());
            if over && idle && due.is_empty() {
                break;
            }
            if Instant::now() > until + GRACE {
                return Err("publishes were not answered".to_owned());
            }
            // At a pace the next message may be due any moment.
            let wait =
                if plan.rate.is_some() { Duration::from_micros(500) } else { Duration::from_millis(50) };
            self.turn(&mut events, wait)?;
            for event in &events {
                if let Some(n) = event.token().0.checked_sub(PUBLISHERS) {
                    self.hear(n, plan)?;
                }
            }
        }
        let deadline = Instant::now() + GRACE;
        while plan.own && self.report.received < self.report.accepted && Instant::now() < deadline {
            self.turn(&mut events, Duration::from_millis(2))?;
        }
        self.report.seconds = began.elapsed().as_secs_f64();
        for mut one in std::mem::take(&mut self.publishers) {
            let _ = self.poll.registry().deregister(&mut one.stream);
        }
        Ok(())
    }

    fn connect_publishers(&mut self, plan: &Publish) -> Result<(), String> {
        for n in 0..plan.connections {
            let at = plan.at[n % plan.at.len()];
            let stream = std::net::TcpStream::connect(at).map_err(|error| error.to_string())?;
            stream.set_nodelay(true).unwrap();
            if plan.answer.is_some() {
                // NATS says INFO first, and wants to know who speaks.
                let mut hello = [0; 4096];
                let _ = (&stream).read(&mut hello).map_err(|error| error.to_string())?;
                (&stream).write_all(b"CONNECT {\"verbose\":false}\r\n").map_err(|error| error.to_string())?;
            }
            stream.set_nonblocking(true).unwrap();
            let mut stream = TcpStream::from_std(stream);
            let both = Interest::READABLE | Interest::WRITABLE;
            self.poll.registry().register(&mut stream, Token(PUBLISHERS + n), both).unwrap();
            self.publishers.push(Publisher {
                stream,
                out: Vec::new(),
                written: 0,
                held: Vec::new(),
                under_way: VecDeque::new(),
            });
        }
        Ok(())
    }

    /// Gives requests to whichever connection has room for one, another one first each time, and
    /// writes what there is to write: a server closes a connection that shows no request for some
    /// seconds.
    fn fill(&mut self, plan: &Publish, request: &Request, due: &mut VecDeque<u64>, over: bool) {
        let count = self.publishers.len();
        self.first_publisher = (self.first_publisher + 1) % count;
        for n in (self.first_publisher..count).chain(0..self.first_publisher) {
            while self.publishers[n].under_way.len() < plan.pipelined {
                let count = match plan.rate {
                    None if over => 0,
                    None => plan.batch,
                    // Fewer, where fewer are due: a message does not wait for company.
                    Some(_) => plan.batch.min(due.len()),
                };
                if count == 0 {
                    break;
                }
                let mut out = std::mem::take(&mut self.publishers[n].out);
                request.begin(&mut out, count);
                for k in 0..count {
                    let at = due.pop_front().unwrap_or_else(|| self.now_us());
                    let (number, user) = (self.next_number, self.user(plan));
                    self.next_number += 1;
                    request.item(&mut out, k, user, at, number);
                }
                request.end(&mut out);
                let one = &mut self.publishers[n];
                one.out = out;
                one.under_way.push_back(count as u64);
            }
            self.publishers[n].write();
        }
    }

    /// A step coprime to the number of users visits all of them in no order that a cache could
    /// like.
    fn user(&mut self, plan: &Publish) -> usize {
        let count = plan.users.len() as u64;
        if let Some((every, favoured)) = plan.favour
            && self.next_number.is_multiple_of(every)
        {
            return plan.users.start + usize::try_from(self.next_number / every).unwrap() % favoured;
        }
        self.next_user = (self.next_user + 7_919) % count;
        plan.users.start + usize::try_from(self.next_user).unwrap()
    }

    fn hear(&mut self, n: usize, plan: &Publish) -> Result<(), String> {
        let one = &mut self.publishers[n];
        one.write();
        loop {
            match one.stream.read(&mut self.buffer) {
                Ok(0) => return Err("a publisher's connection was closed".to_owned()),
                Ok(count) => {
                    one.held.extend_from_slice(&self.buffer[..count]);
                    if count < BUFFER {
                        break;
                    }
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error.to_string()),
            }
        }
        let mut at = 0;
        loop {
            let answer = match &plan.answer {
                Some(mark) => find(&one.held[at..], mark.as_bytes()).map(|found| (true, found + mark.len())),
                None => http_answer(&one.held[at..])?,
            };
            let Some((good, used)) = answer else { break };
            at += used;
            let count = one.under_way.pop_front().ok_or("an answer to nothing")?;
            if good {
                self.report.accepted += count;
            } else {
                self.report.refused += count;
            }
        }
        one.held.drain(..at);
        Ok(())
    }
}
