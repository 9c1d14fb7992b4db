//! The session against a model of everything around it: an inbox that grows and expires, a live
//! path that loses, repeats and reorders, a socket that fills and drains, and a client that acks,
//! perhaps within a window, leaves and comes back.

mod examples;

use super::*;
use proptest::prelude::*;

const NEVER: Millis = Millis(u64::MAX);
const NOW: Millis = Millis(1_000);
/// The head that a new user begins with; nothing below it was ever a message.
const FIRST_HEAD: u64 = 100;

#[derive(Debug, Clone)]
enum Op {
    Append,
    /// The n-th youngest message ends.
    Expire(usize),
    /// The n-th youngest message is damaged.
    Damage(usize),
    /// The store is restored to what it was n messages ago; no number that was given is given
    /// again.
    Restore(usize),
    /// A live delivery of the n-th youngest message; those never named were lost.
    Deliver(usize),
    LoseSome,
    Full,
    Room,
    /// The inbox performs the read that is asked for; its answer is on the way.
    PerformRead,
    /// The answer arrives, also one of an earlier connection.
    DeliverPage,
    Sweep,
    Ack(u64),
    Reconnect(From),
}

#[derive(Debug, Clone, Copy)]
enum From {
    LastSeen,
    Beginning,
    AboveHead,
    /// A number from before this inbox began.
    BelowFirst,
    Latest,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => Just(Op::Append),
        2 => (0usize..8).prop_map(Op::Expire),
        1 => (0usize..4).prop_map(Op::Damage),
        1 => (1usize..6).prop_map(Op::Restore),
        8 => prop_oneof![4 => Just(0usize), 1 => 0usize..6].prop_map(Op::Deliver),
        1 => Just(Op::LoseSome),
        2 => Just(Op::Full),
        3 => Just(Op::Room),
        5 => Just(Op::PerformRead),
        5 => Just(Op::DeliverPage),
        2 => Just(Op::Sweep),
        2 => (0u64..160).prop_map(Op::Ack),
        1 => prop_oneof![3 => Just(From::LastSeen), 1 => Just(From::Beginning), 1 => Just(From::AboveHead), 1 => Just(From::BelowFirst),
                         1 => Just(From::Latest)].prop_map(Op::Reconnect),
    ]
}

/// What a message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Alive,
    /// Its life is over; or it was left out, or was never there.
    Gone,
    Unreadable,
}

/// The world around one session.
struct World {
    /// From `FIRST_HEAD + 1` upwards.
    inbox: Vec<State>,
    /// The highest number that was ever given.
    given: u64,
    page_limit: usize,
    window: Option<u32>,
    session: Session,
    asked: Option<(Seq, Option<u32>)>,
    in_flight: Option<Page<u64>>,
    client: Client,
    cursor: Seq,
    full: bool,
    before_reset: u64,
    /// The session is put to rest before each step, where it can be.
    rests: bool,
}

/// What the client of one connection saw.
#[derive(Debug, Default)]
struct Client {
    start: u64,
    /// The last number seen or told to be gone; where the next must follow on.
    at: u64,
    /// Nothing came yet and the start was the beginning.
    fresh: bool,
    received: Vec<u64>,
    /// What was received and not acked.
    unacked: Vec<u64>,
    caught_up: u32,
}

impl World {
    fn new(page_limit: usize, window: Option<u32>) -> Self {
        let mut world = Self {
            inbox: Vec::new(),
            given: FIRST_HEAD,
            page_limit,
            window,
            session: Session::start(
                StartPoint { start: Seq::BEGINNING, head: Seq::at(FIRST_HEAD), more: false, fresh: false },
                window,
                |_: Output<u64>| {},
            ),
            asked: None,
            in_flight: None,
            client: Client::default(),
            cursor: Seq::BEGINNING,
            full: false,
            before_reset: 0,
            rests: false,
        };
        world.connect(0);
        world
    }

    fn head(&self) -> u64 {
        FIRST_HEAD + self.inbox.len() as u64
    }

    fn alive(&self, seq: u64) -> bool {
        self.state(seq) == State::Alive
    }

    fn state(&self, seq: u64) -> State {
        let at = seq.checked_sub(FIRST_HEAD + 1).map(|at| at as usize);
        at.and_then(|at| self.inbox.get(at)).copied().unwrap_or(State::Gone)
    }

    fn connect(&mut self, start: u64) {
        self.client = Client { start, at: start, fresh: start == 0, ..Client::default() };
        self.asked = None;
        self.before_reset = 0;
        self.full = false;
        let head = self.head();
        let more = head > start.max(FIRST_HEAD);
        let standing = StartPoint { start: Seq::at(start), head: Seq::at(head), more, fresh: false };
        let mut outputs = Vec::new();
        self.session = Session::start(standing, self.window, |o| outputs.push(o));
        self.take(outputs);
    }

    fn step(&mut self, input: Input<u64>) {
        let mut outputs = Vec::new();
        if let Some(rest) = self.session.at_rest().filter(|_| self.rests) {
            self.session = Session::resumed(rest);
        }
        self.session.step(input, NOW, |o| outputs.push(o));
        self.take(outputs);
    }

    fn take(&mut self, outputs: Vec<Output<u64>>) {
        for output in outputs {
            match output {
                Output::Send(seq) => {
                    assert!(!self.full, "sent {seq} into a full socket");
                    let follows = self.client.fresh || seq == self.client.at + 1;
                    assert!(follows && seq > self.client.at, "{seq} after {}", self.client.at);
                    self.client.at = seq;
                    self.client.fresh = false;
                    self.client.received.push(seq);
                    self.client.unacked.push(seq);
                    let ahead = self.client.unacked.len();
                    assert!(self.window.is_none_or(|window| ahead <= window as usize), "{ahead} ahead");
                }
                Output::Gap { after, before, reason } => {
                    let stands = after.get() == self.client.at;
                    // As a first message may, it comes to a client that has seen nothing without a
                    // gap before it.
                    let first = self.client.fresh && reason == GapReason::Unreadable;
                    assert!(
                        stands || first,
                        "a gap begins where the client stands: {after} {}",
                        self.client.at
                    );
                    match reason {
                        GapReason::Expired => {
                            assert!(before > after.next());
                            for gone in after.get() + 1..before.get() {
                                assert!(!self.alive(gone), "{gone} was said to be gone and is not");
                            }
                        }
                        GapReason::Joined | GapReason::Excepted => {
                            panic!("a session knows nothing of topics")
                        }
                        GapReason::Unreadable => {
                            assert_eq!(before.get(), after.get() + 2);
                            assert_eq!(self.state(after.get() + 1), State::Unreadable);
                            self.client.fresh = false;
                        }
                        GapReason::Reset => {
                            assert!(before <= after && before.get() == self.head() + 1);
                            self.client.unacked.clear();
                            self.before_reset = after.get();
                        }
                    }
                    self.client.at = before.get() - 1;
                }
                Output::CaughtUp(seq) => {
                    self.client.caught_up += 1;
                    assert_eq!(seq.get(), if self.client.fresh { 0 } else { self.client.at });
                }
                Output::Read { after, most } => {
                    let free = self.window.map(|window| window - self.client.unacked.len() as u32);
                    assert_eq!(most, free, "a page is cut to the credit");
                    assert!(self.window.is_none_or(|window| free.unwrap() * 2 >= window));
                    assert!(self.asked.is_none() && !self.full, "one read at a time, and none without room");
                    self.asked = Some((after, most));
                }
                Output::Cursor(seq) => {
                    assert!(seq > self.cursor || seq.get() <= self.client.at);
                    assert!(seq.get() <= self.client.at.max(self.client.start));
                    self.cursor = self.cursor.max(seq);
                }
            }
        }
    }

    fn item(&self, seq: u64) -> Item<u64> {
        let expires_at = if self.alive(seq) { NEVER } else { NOW };
        Item { seq: Seq::at(seq), expires_at, frame: seq }
    }

    fn perform_read(&mut self) {
        let Some((after, most)) = self.asked else { return };
        let limit = most.map_or(self.page_limit, |most| self.page_limit.min(most as usize));
        let numbers: Vec<u64> = (after.get().max(FIRST_HEAD) + 1..=self.head()).collect();
        let cut = numbers.len() > limit;
        let looked_at = &numbers[..numbers.len().min(limit)];
        self.in_flight = Some(Page {
            after,
            items: looked_at.iter().filter(|n| self.alive(**n)).map(|n| self.item(*n)).collect(),
            unreadable: looked_at
                .iter()
                .filter(|n| self.state(**n) == State::Unreadable)
                .map(|n| Seq::at(*n))
                .collect(),
            upto: Seq::at(looked_at.last().copied().unwrap_or(self.head())),
            more: cut,
        });
    }

    fn deliver_page(&mut self) {
        if let Some(page) = self.in_flight.take() {
            if self.asked.is_some_and(|(after, _)| after == page.after) {
                self.asked = None;
            }
            self.step(Input::Page(page));
        }
    }

    fn ack(&mut self, seq: u64) {
        let sent = self.session.position().get();
        // An ack of the numbers before a reset says nothing about those after it.
        let stale = seq > sent && seq <= self.before_reset;
        let upto = if stale { 0 } else { seq.min(sent) };
        self.client.unacked.retain(|unacked| *unacked > upto);
        self.step(Input::Ack(seq));
    }

    fn apply(&mut self, op: Op) {
        let youngest = |back: usize| self.head().checked_sub(back as u64).filter(|n| *n > FIRST_HEAD);
        match op {
            Op::Append => {
                while self.head() < self.given {
                    self.inbox.push(State::Gone);
                }
                self.inbox.push(State::Alive);
                self.given = self.head();
            }
            Op::Expire(back) => {
                if let Some(seq) = youngest(back).filter(|seq| self.alive(*seq)) {
                    self.inbox[(seq - FIRST_HEAD - 1) as usize] = State::Gone;
                }
            }
            Op::Damage(back) => {
                if let Some(seq) = youngest(back).filter(|seq| !self.client.received.contains(seq)) {
                    self.inbox[(seq - FIRST_HEAD - 1) as usize] = State::Unreadable;
                }
            }
            Op::Restore(count) => {
                self.inbox.truncate(self.inbox.len().saturating_sub(count));
                // What was read of the other state arrives, or not; here it does not, so that it is
                // not told apart.
                self.in_flight = None;
            }
            Op::Deliver(back) => {
                if let Some(seq) = youngest(back) {
                    self.step(Input::Live(self.item(seq)));
                }
            }
            Op::LoseSome => self.step(Input::Lost),
            Op::Full => {
                self.full = true;
                self.step(Input::Blocked);
            }
            Op::Room => {
                self.full = false;
                self.step(Input::Writable);
            }
            Op::PerformRead => self.perform_read(),
            // An answer that was performed for an earlier connection must not be taken for this
            // one's: the connection drops it with the session it was for, so here it only arrives
            // while its question stands.
            Op::DeliverPage if self.full || self.asked.is_none() => {}
            Op::DeliverPage => self.deliver_page(),
            Op::Sweep => {
                let position = self.session.position();
                match position.get().cmp(&self.head()) {
                    std::cmp::Ordering::Less => self.step(Input::MoreAfter(position)),
                    std::cmp::Ordering::Equal => {}
                    std::cmp::Ordering::Greater if position.is_beginning() => {}
                    std::cmp::Ordering::Greater => {
                        self.step(Input::Reset(position, Seq::at(self.head())));
                    }
                }
            }
            Op::Ack(seq) => self.ack(seq),
            Op::Reconnect(from) => {
                self.check_so_far();
                self.in_flight = None;
                let start = match from {
                    From::LastSeen => self.client.received.last().copied().unwrap_or(self.client.start),
                    From::Beginning => 0,
                    From::AboveHead => self.head() + 50,
                    From::BelowFirst => FIRST_HEAD / 2,
                    From::Latest => self.head(),
                };
                self.connect(start);
            }
        }
    }

    fn check_so_far(&self) {
        assert!(self.client.received.is_sorted_by(|a, b| a < b), "{:?}", self.client.received);
        assert!(self.client.caught_up <= 1);
    }

    /// The inbox rests: after one sweep everything that lives must have arrived.
    fn settle(&mut self) {
        self.apply(Op::Room);
        for _ in 0..self.inbox.len() * 2 + 8 {
            self.perform_read();
            self.deliver_page();
            self.apply(Op::Ack(u64::MAX));
            self.apply(Op::Sweep);
        }
        self.check_so_far();
        assert!(self.session.is_live());
        assert_eq!(self.client.caught_up, 1);
        let from = if self.client.start > FIRST_HEAD { self.client.start } else { FIRST_HEAD };
        for seq in from + 1..=self.head() {
            assert!(!self.alive(seq) || self.client.received.contains(&seq), "{seq} never came");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn whatever_happens_every_message_comes_once_and_in_order(
            ops in proptest::collection::vec(op(), 1..120), page_limit in 1usize..6,
            window in proptest::option::of(1u32..7), rests in any::<bool>()) {
        let mut world = World::new(page_limit, window);
        world.rests = rests;
        for op in ops {
            world.apply(op);
        }
        world.settle();
    }
}
