//! The rules of interest, explored exhaustively: one node that begins to read a log, one router,
//! two messages, a registry that loses everything once and falls back once, and pauses of any
//! length anywhere.
//!
//! Time passes in steps of a second. The node may be kept from publishing, and the router from
//! looking, for as long as they like; a look may take as long. What is promised: once a tail has
//! looked for the second time, and nothing is on its way, it has every message without a sweep. It
//! is promised to a node whose bit stands in the registry, or that has never published anything. A
//! node whose bit does not come to the registry is cut off, and sweeps every three seconds instead.

use crate::explorer::{Model, breaks_without, holds};

/// When a router's knowledge is stale, and when a tail looks again, in seconds: `STALE_AFTER`, and
/// `LOOK_AGAIN` of push.
const STALE: u8 = 2;
const LOOK_AGAIN: u8 = 3;
const TIME_MAX: u8 = 6;
const MESSAGES: usize = 2;

/// The rule that is taken out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Without {
    Nothing,
    /// A tail looks again.
    SecondLook,
    /// A process without a bitmap is sent everything.
    UnknownIsSent,
    /// The bitmap of another process of the node does not count.
    OwnProcess,
    /// A router that has not looked for a while sends everything.
    StaleIsSent,
    /// A look is as old as its beginning.
    LookBegins,
    /// After a bit that was published late all tails look twice.
    LateLooks,
    /// After a loss of the registry it is published again, and all tails look twice.
    LossLooks,
    /// The same where it is seen only by what is published again: the registry had another bitmap.
    FallbackLooks,
}

const RULES: [Without; 8] = [
    Without::SecondLook,
    Without::UnknownIsSent,
    Without::OwnProcess,
    Without::StaleIsSent,
    Without::LookBegins,
    Without::LateLooks,
    Without::LossLooks,
    Without::FallbackLooks,
];

/// A bitmap, of one bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Map {
    None,
    /// Of an earlier process of the node.
    Earlier,
    Empty,
    Bit,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Message {
    Future,
    /// Stored, and at the router.
    Stored,
    Flying,
    Over,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct State {
    now: u8,
    messages: [Message; MESSAGES],
    /// What the registry has of the process.
    stored: Map,
    /// Whether the registry has lost everything, and whether the node knows.
    lost: bool,
    noticed: bool,
    /// Whether the registry has fallen back to an earlier bitmap, of which it tells nobody.
    fell_back: bool,
    /// Whether the process has ever published, and whether its bit.
    published: bool,
    bit_published: bool,
    /// When the place of the tail was taken, and where the tail is.
    began: Option<u8>,
    position: Option<u8>,
    look_at: Option<u8>,
    known: Map,
    looked_at: Option<u8>,
    /// A look of the router that is under way: what it read, and when it began.
    looking: Option<(Map, u8)>,
}

impl State {
    fn head(&self) -> u8 {
        self.messages.iter().filter(|message| **message != Message::Future).count() as u8
    }

    /// What the node publishes now.
    fn own(&self) -> Map {
        if self.began.is_some() { Map::Bit } else { Map::Empty }
    }

    fn sends(&self, without: Without) -> bool {
        let is_stale = self.looked_at.is_none_or(|at| self.now - at > STALE);
        let by_map = match self.known {
            Map::Bit => true,
            Map::Empty => false,
            Map::None => without != Without::UnknownIsSent,
            Map::Earlier => without != Without::OwnProcess,
        };
        by_map || (is_stale && without != Without::StaleIsSent)
    }

    fn look(&mut self) {
        if self.position.is_some() {
            self.position = Some(self.head());
        }
    }

    fn look_twice(&mut self) {
        self.look();
        if self.position.is_some() {
            self.look_at = Some(self.now + LOOK_AGAIN);
        }
    }
}

impl State {
    /// What becomes of the messages.
    fn message_steps(&self, without: Without, next: &mut Vec<Self>) {
        let mut add = |change: &dyn Fn(&mut Self)| {
            let mut state = *self;
            change(&mut state);
            next.push(state);
        };
        for n in 0..MESSAGES {
            let is_next = n == 0 || self.messages[n - 1] != Message::Future;
            match self.messages[n] {
                Message::Future if is_next => add(&|state| state.messages[n] = Message::Stored),
                Message::Stored if self.sends(without) => add(&|state| state.messages[n] = Message::Flying),
                Message::Stored => add(&|state| state.messages[n] = Message::Over),
                Message::Flying => add(&|state| {
                    state.messages[n] = Message::Over;
                    // A tail reads what is missing below a message that comes.
                    if state.position.is_some_and(|position| usize::from(position) <= n) {
                        state.position = Some(n as u8 + 1);
                    }
                }),
                _ => {}
            }
        }
    }
}

impl Model for State {
    type Rule = Without;
    const STATES_MAX: usize = 6_000_000;

    fn new() -> Self {
        Self {
            now: 0,
            messages: [Message::Future; MESSAGES],
            stored: Map::Earlier,
            lost: false,
            noticed: false,
            fell_back: false,
            published: false,
            bit_published: false,
            began: None,
            position: None,
            look_at: None,
            known: Map::None,
            looked_at: None,
            looking: None,
        }
    }

    fn broken(&self) -> Option<&'static str> {
        let nothing_flies =
            self.messages.iter().all(|message| matches!(message, Message::Future | Message::Over));
        let is_promised = (self.stored == Map::Bit && self.lost == self.noticed) || !self.published;
        let is_level = self.position.is_none_or(|position| position == self.head());
        let looked = self.position.is_some() && self.look_at.is_none();
        (nothing_flies && is_promised && looked && !is_level).then_some("a message waits for the sweep")
    }

    fn successors(&self, without: Without, next: &mut Vec<Self>) {
        let mut add = |change: &dyn Fn(&mut Self)| {
            let mut state = *self;
            change(&mut state);
            next.push(state);
        };
        // A look that is due comes before time goes on.
        if self.now < TIME_MAX && self.look_at.is_none_or(|at| at > self.now) {
            add(&|state| state.now += 1);
        }
        if self.look_at.is_some_and(|at| at <= self.now) {
            add(&|state| {
                state.look();
                state.look_at = None;
            });
        }
        match (self.began, self.position) {
            (None, _) => add(&|state| state.began = Some(state.now)),
            (Some(_), None) => add(&|state| {
                state.position = Some(state.head());
                state.look_at = (without != Without::SecondLook).then_some(state.now + LOOK_AGAIN);
            }),
            _ => {}
        }
        if self.stored != self.own() && (!self.lost || self.noticed) {
            add(&|state| {
                let is_late = state.began.is_some_and(|at| at < state.now) && !state.bit_published;
                state.stored = state.own();
                state.published = true;
                if is_late && without != Without::LateLooks
                    || state.bit_published && without != Without::FallbackLooks
                {
                    state.look_twice();
                }
                state.bit_published |= state.own() == Map::Bit;
            });
        }
        if self.stored == Map::Bit && !self.fell_back {
            add(&|state| {
                state.fell_back = true;
                state.stored = Map::Empty;
            });
        }
        if !self.lost {
            add(&|state| {
                state.lost = true;
                state.stored = Map::None;
            });
        }
        if self.lost && !self.noticed {
            add(&|state| {
                state.noticed = true;
                state.stored = state.own();
                state.published = true;
                state.bit_published |= state.own() == Map::Bit;
                if without != Without::LossLooks {
                    state.look_twice();
                }
            });
        }
        match self.looking {
            None => add(&|state| state.looking = Some((state.stored, state.now))),
            Some((map, began)) => add(&|state| {
                // What the registry has no more is kept.
                if map != Map::None {
                    state.known = map;
                }
                state.looked_at = Some(if without == Without::LookBegins { state.now } else { began });
                state.looking = None;
            }),
        }
        self.message_steps(without, next);
    }
}

#[test]
fn every_message_comes_without_a_sweep() {
    holds::<State>(Without::Nothing, 10_000);
}

#[test]
fn every_rule_of_interest_is_needed() {
    breaks_without::<State>(&RULES);
}
