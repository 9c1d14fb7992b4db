//! A tail with sockets that read it, against a model of the log: whatever is lost, repeated or
//! reordered on the way, and however slow a socket is, each is complete, once, and in order.

use std::collections::BTreeMap;

use bytes::Bytes;
use proptest::prelude::*;

use super::super::log_readers::{Act, LogReaders, LogStart, Next, Resting, Wanted, Why};
use super::super::registry::{Arrival, SessionHandle};
use super::*;
use crate::inbox::topics::LogMembership;
use crate::message::{DeviceId, LogEntry, MessageId, TopicName};
use crate::wire::frame::{ServerFrame, TopicState};

const NOW: Millis = Millis(1_000);
const HEAD: u64 = 100;
const LIFE: u64 = 2;

/// A message as the log has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Plain,
    Expired,
    /// Of an earlier life.
    Dead,
    /// Not for the user of the first socket.
    Excepting,
}

#[derive(Debug, Clone)]
enum Event {
    Publish(Kind),
    /// A live message arrives: one of the last, by its distance from the newest.
    Live(u64),
    /// The page that the tail wants arrives.
    Page,
    /// The sweep of the tail.
    Sweep,
    /// A socket joins, after the head or that far below it.
    Join(u64),
    /// A walk reaches a socket.
    Look(usize),
    /// A socket takes that many steps.
    Take(usize, usize),
    /// The block that a socket wants arrives.
    Block(usize),
    /// Frames are dropped for want of room.
    Trim,
}

fn event() -> impl Strategy<Value = Event> {
    let kind = prop_oneof![
        4 => Just(Kind::Plain),
        1 => Just(Kind::Expired),
        1 => Just(Kind::Dead),
        1 => Just(Kind::Excepting),
    ];
    prop_oneof![
        4 => kind.prop_map(Event::Publish),
        4 => (0..6u64).prop_map(Event::Live),
        2 => Just(Event::Page),
        1 => Just(Event::Sweep),
        1 => (0..30u64).prop_map(Event::Join),
        4 => (0..3usize).prop_map(Event::Look),
        4 => (0..3usize, 0..4usize).prop_map(|(at, steps)| Event::Take(at, steps)),
        2 => (0..3usize).prop_map(Event::Block),
        1 => Just(Event::Trim),
    ]
}

fn user(n: usize) -> UserId {
    UserId::parse(&format!("u{n}")).unwrap()
}

struct Socket {
    handle: Arc<SessionHandle>,
    /// Awake, or at rest.
    readers: Result<LogReaders, Resting>,
    wanted: Option<Wanted>,
    /// The number after which it began.
    after: u64,
    /// What the client was sent: the numbers of messages.
    sent: Vec<u64>,
    /// The last number that was sent or told to be missing.
    at: u64,
    excepted: Vec<u64>,
}

struct World {
    log: LogId,
    stored: BTreeMap<u64, Kind>,
    tail: Arc<Tail>,
    wanted: Option<Seq>,
    sockets: Vec<Socket>,
}

impl World {
    fn new() -> Self {
        let log = LogId::Topic(TopicName::parse("news").unwrap());
        let memory = Arc::new(TailMemory::new(1_000_000));
        let tail = Arc::new(Tail::new(log.clone(), LIFE, Seq::at(HEAD), memory));
        Self { log, stored: BTreeMap::new(), tail, wanted: None, sockets: Vec::new() }
    }

    fn head(&self) -> u64 {
        self.stored.keys().next_back().copied().unwrap_or(HEAD)
    }

    fn message(&self, n: u64) -> Message {
        let kind = self.stored[&n];
        let except = if kind == Kind::Excepting { vec![user(0)] } else { Vec::new() };
        let life = if kind == Kind::Dead { LIFE - 1 } else { LIFE };
        Message {
            trace: None,
            seq: Seq::at(n),
            id: MessageId::parse("m").unwrap(),
            accepted_at: Millis(0),
            expires_at: Millis(if kind == Kind::Expired { 0 } else { u64::MAX }),
            event: None,
            via: Some(Arc::new(Via::Log(LogEntry { life, except }))),
            payload: Bytes::from_static(b"1"),
        }
    }

    /// As the store answers: at most `most` messages.
    fn page(&self, after: u64, most: usize) -> Page<LogFrame> {
        let (mut items, mut upto, mut more) = (Vec::new(), after.max(HEAD), false);
        for (n, kind) in self.stored.range(after + 1..) {
            if items.len() == most {
                more = true;
                break;
            }
            upto = *n;
            if matches!(kind, Kind::Plain | Kind::Excepting) {
                items.push(encoded(&self.log, &self.message(*n)));
            }
        }
        Page { after: Seq::at(after), items, unreadable: Vec::new(), upto: Seq::at(upto), more }
    }

    fn step(&mut self, input: Input<LogFrame>) {
        let wants = self.tail.step(input, NOW);
        self.wanted = wants.read.or(self.wanted);
    }

    fn act(&mut self, event: Event) {
        match event {
            Event::Publish(kind) => {
                self.stored.insert(self.head() + 1, kind);
            }
            Event::Live(back) => {
                let Some(n) = self.head().checked_sub(back).filter(|n| self.stored.contains_key(n)) else {
                    return;
                };
                let mut item = encoded(&self.log, &self.message(n));
                if self.stored[&n] == Kind::Dead {
                    item.expires_at = Millis(0);
                }
                self.step(Input::Live(item));
            }
            Event::Page => {
                if let Some(after) = self.wanted.take() {
                    let page = self.page(after.get(), 3);
                    self.step(Input::Page(page));
                }
            }
            Event::Sweep => {
                let position = self.tail.position();
                if position.get() < self.head() {
                    self.step(Input::MoreAfter(position));
                }
            }
            Event::Join(back) if self.sockets.len() < 3 => self.join(back),
            Event::Join(_) => {}
            Event::Look(at) => self.look(at),
            Event::Take(at, steps) => {
                (0..steps).take_while(|_| self.take(at)).count();
            }
            Event::Block(at) => self.block(at),
            Event::Trim => self.tail.core.lock().pop(),
        }
    }

    fn join(&mut self, back: u64) {
        let handle = SessionHandle::new(
            user(self.sockets.len()),
            DeviceId::default(),
            None,
            0,
            Arrival::default(),
            NOW,
        );
        let after = (self.tail.position().get() - back.min(self.tail.position().get() - HEAD)).max(HEAD);
        let start = LogStart {
            reading: self.tail.join(&handle),
            why: Why::Member(Seq::at(after)),
            after: Seq::at(after),
            restored_to: None,
            fresh: false,
            before_joining: None,
            resets: 0,
        };
        let mut readers = LogReaders::new(handle.user.clone(), 0, false);
        let mut acts = Vec::new();
        readers.begin(start, &mut acts);
        readers.inbox_is_level(&mut acts);
        let (sent, readers) = (Vec::new(), Ok(readers));
        let socket = Socket { handle, readers, wanted: None, after, sent, at: after, excepted: Vec::new() };
        self.sockets.push(socket);
        self.performed(self.sockets.len() - 1, acts);
    }

    fn of_socket(&mut self, at: usize, act: impl FnOnce(&mut LogReaders, &mut Vec<Act>)) {
        let Some(mut socket) = (at < self.sockets.len()).then(|| self.sockets.remove(at)) else { return };
        let mut acts = Vec::new();
        let mut readers = socket.readers.unwrap_or_else(|resting| resting.wake(&socket.handle));
        act(&mut readers, &mut acts);
        // As soon as they can.
        socket.readers = if readers.can_rest(&socket.handle) { Err(readers.rest()) } else { Ok(readers) };
        self.sockets.insert(at, socket);
        self.performed(at, acts);
    }

    /// One at rest is woken only if there is news.
    fn look(&mut self, at: usize) {
        let readers = self.sockets.get(at).map(|socket| &socket.readers);
        if !matches!(readers, Some(Err(resting)) if !resting.has_news()) {
            self.of_socket(at, |readers, acts| readers.look(NOW, acts));
        }
    }

    /// Takes one step. Returns whether there was one to take.
    fn take(&mut self, at: usize) -> bool {
        let mut next = None;
        self.of_socket(at, |readers, acts| next = readers.next(NOW, acts));
        match next {
            None => false,
            Some(Next::Given) => true,
            Some(Next::Read(wanted)) => {
                assert!(self.sockets[at].wanted.replace(wanted).is_none(), "one read at a time");
                true
            }
        }
    }

    fn block(&mut self, at: usize) {
        let Some(wanted) = self.sockets.get_mut(at).and_then(|socket| socket.wanted.take()) else { return };
        // Blocks have fixed bounds of four numbers here.
        let first = wanted.after.get() / 4 * 4;
        let mut page = self.page(first, 4);
        if page.items.first().is_some_and(|item| item.seq.get() <= first + 4) {
            page.items.retain(|item| item.seq.get() <= first + 4);
            page.upto = page.upto.min(Seq::at(first + 4));
        }
        let tail = Arc::clone(&self.tail);
        self.of_socket(at, |readers, _| readers.take_block(tail, Some(Arc::new(page))));
    }

    fn performed(&mut self, at: usize, acts: Vec<Act>) {
        for act in acts {
            let socket = &mut self.sockets[at];
            let frame = match act {
                Act::Message(frame, _) => {
                    let frame: serde_json::Value = serde_json::from_slice(&frame).unwrap();
                    let n = frame["seq"].as_u64().unwrap();
                    assert_eq!(n, socket.at + 1, "in order, and nothing is left out without a gap");
                    socket.at = n;
                    socket.sent.push(n);
                    continue;
                }
                Act::Frame(frame) => *frame,
                Act::Acked(..) => panic!("nobody acks"),
            };
            match frame {
                ServerFrame::Gap { after, before, reason, .. } => {
                    assert_eq!(after, socket.at, "a gap begins where the client stands");
                    for n in after + 1..before {
                        let excepted = self.stored[&n] == Kind::Excepting && at == 0;
                        let gone = matches!(self.stored[&n], Kind::Expired | Kind::Dead);
                        match reason {
                            GapReason::Excepted => assert!(excepted, "{n}"),
                            GapReason::Expired => assert!(gone, "{n} is not gone"),
                            other => panic!("{other:?}"),
                        }
                    }
                    if reason == GapReason::Excepted {
                        socket.excepted.push(after + 1);
                    }
                    socket.at = before - 1;
                }
                ServerFrame::CaughtUp { .. } => {}
                other => panic!("{other:?}"),
            }
        }
    }

    /// Nothing more is published: all that is wanted comes, and each socket takes what there is.
    fn settle(&mut self) {
        for _ in 0..10_000 {
            self.act(Event::Sweep);
            while self.wanted.is_some() {
                self.act(Event::Page);
            }
            let mut moved = false;
            for at in 0..self.sockets.len() {
                self.act(Event::Look(at));
                self.block(at);
                while self.take(at) {
                    moved = true;
                    self.block(at);
                }
            }
            if !moved && self.tail.position().get() == self.head() {
                return;
            }
        }
        panic!("it never becomes level");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_000, ..ProptestConfig::default() })]

    #[test]
    fn every_socket_is_complete_once_and_in_order(events in prop::collection::vec(event(), 0..120)) {
        let mut world = World::new();
        world.join(0);
        events.into_iter().for_each(|event| world.act(event));
        world.settle();
        let head = world.head();
        for (at, socket) in world.sockets.iter().enumerate() {
            let gets = |kind: Kind| kind == Kind::Plain || kind == Kind::Excepting && at != 0;
            let all = world.stored.range(socket.after + 1..);
            let expected: Vec<u64> = all.filter(|(_, kind)| gets(**kind)).map(|(n, _)| *n).collect();
            prop_assert_eq!(&socket.sent, &expected, "socket {}", at);
            prop_assert_eq!(socket.at, head);
            prop_assert_eq!(socket.excepted.is_empty(), at != 0 || !world.stored.values().any(|kind| *kind == Kind::Excepting));
            prop_assert!(Arc::strong_count(&socket.handle) > 0);
            prop_assert!(socket.readers.is_err(), "all are level, and rest");
        }
        prop_assert_eq!(world.tail.count(), world.sockets.len());
        prop_assert_eq!(world.tail.readers.lock().len(), world.sockets.len());
        world.sockets.clear();
        prop_assert_eq!(world.tail.count(), 0);
    }
}

/// The store is restored and numbers go on above what was sent, before a socket was looked at.
#[test]
fn a_socket_that_is_looked_at_late_is_told_of_a_reset_all_the_same() {
    let mut world = World::new();
    (0..5).for_each(|_| world.act(Event::Publish(Kind::Plain)));
    world.join(0);
    world.settle();
    assert_eq!(world.sockets[0].at, HEAD + 5);
    // Three are gone, and what comes next stands above all that were shown.
    world.stored.retain(|n, _| *n <= HEAD + 2);
    world.step(Input::Reset(Seq::at(HEAD + 5), Seq::at(HEAD + 2)));
    let is_news = |socket: &Socket| matches!(&socket.readers, Err(resting) if resting.has_news());
    assert!(is_news(&world.sockets[0]), "also while the tail stands below");
    world.stored.insert(HEAD + 6, Kind::Plain);
    world.wanted = None;
    let page = Page {
        after: Seq::at(HEAD + 2),
        items: vec![encoded(&world.log, &world.message(HEAD + 6))],
        unreadable: Vec::new(),
        upto: Seq::at(HEAD + 6),
        more: false,
    };
    world.step(Input::Page(page));
    assert_eq!(world.tail.position(), Seq::at(HEAD + 6));
    let (mut acts, socket) = (Vec::new(), world.sockets.remove(0));
    let Err(resting) = socket.readers else { panic!("it was level") };
    let mut readers = resting.wake(&socket.handle);
    readers.look(NOW, &mut acts);
    while matches!(readers.next(NOW, &mut acts), Some(Next::Given)) {}
    let told = acts.iter().any(|act| {
        matches!(act, Act::Frame(frame) if matches!(**frame, ServerFrame::Gap { reason: GapReason::Reset, before, .. } if before == HEAD + 3))
    });
    assert!(told, "{acts:?}");
    assert!(matches!(acts.last(), Some(Act::Message(..))), "and the next message follows at once: {acts:?}");
}

/// A watched topic of which the user becomes a member: it goes on only where nothing that the
/// member is to get lies before the beginning of the watching, and in the same life.
#[test]
fn a_watched_topic_that_began_too_late_is_joined_anew() {
    let mut world = World::new();
    (0..5).for_each(|_| world.act(Event::Publish(Kind::Plain)));
    let topic = world.log.topic().unwrap().clone();
    let life = world.tail.life;
    let member = |life, from| LogMembership { topic: topic.clone(), life, from: Seq::at(from) };
    let watched_from = |after: u64| {
        let handle = SessionHandle::new(user(9), DeviceId::default(), None, 0, Arrival::default(), NOW);
        let start = LogStart {
            reading: world.tail.join(&handle),
            why: Why::Watched,
            after: Seq::at(after),
            restored_to: None,
            fresh: true,
            before_joining: None,
            resets: 0,
        };
        let mut readers = LogReaders::new(user(9), 0, false);
        let mut acts = Vec::new();
        readers.watched(start, &mut acts);
        readers
    };
    for (after, joins, anew) in [
        (HEAD + 2, member(life, HEAD + 2), false),
        (HEAD + 1, member(life, HEAD + 2), false),
        (HEAD + 3, member(life, HEAD + 2), true),
        (HEAD + 2, member(life + 1, HEAD + 2), true),
    ] {
        let (mut readers, mut acts) = (watched_from(after), Vec::new());
        let joined = readers.compare((1, false), std::slice::from_ref(&joins), &mut acts);
        assert_eq!(!joined.is_empty(), anew, "{after} {joins:?}");
        let state = |act: &Act| match act {
            Act::Frame(frame) => match &**frame {
                ServerFrame::Topic { state, .. } => Some(*state),
                _ => None,
            },
            _ => None,
        };
        let told: Vec<TopicState> = acts.iter().filter_map(state).collect();
        assert_eq!(told, [if anew { TopicState::Left } else { TopicState::Joined }]);
        assert_eq!(readers.position(&topic).is_none(), anew);
    }
}

/// A client that asked to watch a topic is made a member of it meanwhile: the reader that is not
/// needed goes, and the socket goes on to be told.
#[test]
fn a_reader_that_goes_leaves_the_other_one_of_its_socket() {
    let world = World::new();
    let handle = |n| SessionHandle::new(user(n), DeviceId::default(), None, 0, Arrival::default(), NOW);
    let (one, other) = (handle(0), handle(1));
    let (watched, of_other, joined) = (world.tail.join(&one), world.tail.join(&other), world.tail.join(&one));
    drop(watched);
    let told = |handle: &Arc<SessionHandle>| {
        let weak = Arc::downgrade(handle);
        world.tail.readers.lock().iter().filter(|reader| reader.ptr_eq(&weak)).count()
    };
    assert_eq!((told(&one), told(&other), world.tail.count()), (1, 1, 2));
    drop((joined, of_other));
    assert_eq!((told(&one), told(&other), world.tail.count()), (0, 0, 0));
}
