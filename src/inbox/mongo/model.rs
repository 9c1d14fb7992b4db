//! The rules of append, janitor and reader, explored exhaustively on a model of one user's inbox:
//! two writers, a reader, a failover with rollback, stale majority reads after it, a lost response,
//! and pauses of any length. A second reader would change nothing: readers touch neither the store
//! nor one another, and this one reads at any time. A writer that crashes is one that takes no
//! further step.
//!
//! The store has two layers: what a majority has (`durable`, never lost) and what the primary has
//! besides (lost when it fails). A majority read shows what was known to be committed, which after
//! a failover may be less than what is. Time passes in steps of ten minutes, between any two other
//! steps. Every interleaving up to the bounds is visited. Each rule of [`Without`] that is taken
//! out is found to break a promise.

use crate::explorer::{Model, breaks_without, holds};

/// The life of a head in memory, when a response is late, and how long removal waits: one step
/// after another, as 10, 30 and 60 minutes follow on one another in `MongoTimes`.
const TRUST: u8 = 1;
const VERIFY: u8 = 2;
const REMOVAL: u8 = 3;
const TIME_MAX: u8 = 4;
/// The initial number of the head record.
const FIRST: u8 = 0;

/// The rule that is taken out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Without {
    Nothing,
    /// n goes in only when n-1 is known to be durable.
    Order,
    /// After a duplicate key, only one's own append id counts as stored.
    OwnAppend,
    /// After an ambiguous answer the same n again.
    SameNumber,
    /// Decisions are based on majority reads.
    MajorityReads,
    /// The head record is raised before anything is removed.
    RaiseFirst,
    /// Removal waits an hour.
    RemovalDelay,
    /// A head in memory is trusted for ten minutes, and a late response is verified.
    HeadAge,
    /// Only an unbroken run from the head record upwards is removed.
    UnbrokenRun,
    /// Nothing is taken out, and the reader is one of a log: it begins above `gone`. Without
    /// failovers and lost responses, or there would be too many states.
    OfLogs,
    /// The same, and `gone` is raised over a run that is broken.
    OfLogsUnbrokenRun,
}

const RULES: [Without; 8] = [
    Without::Order,
    Without::OwnAppend,
    Without::SameNumber,
    Without::MajorityReads,
    Without::RaiseFirst,
    Without::RemovalDelay,
    Without::HeadAge,
    Without::UnbrokenRun,
];

/// A publish: 0 and 1 belong to the first writer, in this order; 2 to the second.
type Publish = u8;
const PUBLISHES: usize = 3;

/// Most numbers that are assigned: each publish at most twice.
const NUMBERS: u8 = 7;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Doc {
    publish: Publish,
    expired: bool,
}

/// Documents by their number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
struct Docs([Option<Doc>; NUMBERS as usize]);

impl Docs {
    fn get(&self, n: u8) -> Option<Doc> {
        self.0.get(usize::from(n)).copied().flatten()
    }

    fn set(&mut self, n: u8, doc: Option<Doc>) {
        self.0[usize::from(n)] = doc;
    }

    /// In rising order.
    fn all(&self) -> impl DoubleEndedIterator<Item = (u8, Doc)> {
        (0..NUMBERS).filter_map(|n| Some((n, self.get(n)?)))
    }

    fn top(&self) -> u8 {
        self.all().next_back().map_or(FIRST, |(n, _)| n)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
struct Layer {
    docs: Docs,
    head: u8,
}

impl Layer {
    fn top(&self) -> u8 {
        self.docs.top().max(self.head)
    }
}

/// The state of a writer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum At {
    /// It has no head that it trusts.
    NeedsHead,
    /// It is about to insert at `n`.
    Inserts {
        n: u8,
    },
    /// Its insert is in flight, and will be executed once or never.
    Waits {
        n: u8,
    },
    /// The insert was executed; the response is this: stored, or duplicate key.
    Answered {
        n: u8,
        stored: bool,
    },
    Done,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Writer {
    /// The current publish, and the one after its last.
    next: Publish,
    end: Publish,
    at: At,
    /// The highest number known to be durable, and when that was read.
    known: u8,
    read_at: u8,
}

/// A reader: everything up to `upto` was seen or told to be gone; `saw` has the numbers that were
/// seen, as bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
struct Reader {
    upto: u8,
    saw: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct State {
    durable: Layer,
    /// On the primary, and not yet on a majority.
    loose: Docs,
    /// What majority reads show.
    shown: Layer,
    writers: [Writer; 2],
    reader: Reader,
    /// When the janitor first saw the run up to a number expired: one of its marks. Each mark waits
    /// for itself (`janitor`), and is seen at any time.
    seen: Option<(u8, u8)>,
    time: u8,
    failovers: u8,
    lost_answers: u8,
    acked: [Option<u8>; PUBLISHES],
    /// Which publishes have expired.
    expired: [bool; PUBLISHES],
}

/// Failovers, and lost responses, in one history.
const FAILOVERS: u8 = 1;
const LOST_ANSWERS: u8 = 1;

impl Model for State {
    type Rule = Without;
    const STATES_MAX: usize = 6_000_000;

    fn new() -> Self {
        let writer = |next, end| Writer { next, end, at: At::NeedsHead, known: 0, read_at: 0 };
        Self {
            durable: Layer::default(),
            loose: Docs::default(),
            shown: Layer::default(),
            writers: [writer(0, 2), writer(2, 3)],
            reader: Reader::default(),
            seen: None,
            time: 0,
            failovers: 0,
            lost_answers: 0,
            acked: [None; PUBLISHES],
            expired: [false; PUBLISHES],
        }
    }

    /// The promise that this state breaks.
    fn broken(&self) -> Option<&'static str> {
        let head = self.durable.head;
        for (publish, n) in self.acked.iter().enumerate() {
            let Some(n) = *n else { continue };
            let there = self.durable.docs.get(n);
            if there.is_none() && head < n {
                return Some("what was acknowledged is not durable");
            }
            // A document at or below the head record counts nowhere: a late insert may have put it
            // there.
            if head < n && there.is_some_and(|doc| usize::from(doc.publish) != publish) {
                return Some("an acknowledged number belongs to another");
            }
            if self.acked.iter().filter(|other| **other == Some(n)).count() > 1 {
                return Some("a number was given twice");
            }
            if head >= n && !self.expired[publish] {
                return Some("a message that lives counts as removed");
            }
        }
        let alive = |(n, doc): &(u8, Doc)| !doc.expired && *n > head;
        let passed_by = |(n, _): (u8, Doc)| n <= self.reader.upto && self.reader.saw & (1 << n) == 0;
        if self.durable.docs.all().filter(alive).any(passed_by) {
            return Some("a reader has passed by a message that lives");
        }
        for publish in 0..PUBLISHES as u8 {
            if self.durable.docs.all().filter(alive).filter(|(_, doc)| doc.publish == publish).count() > 1 {
                return Some("a publish is stored twice");
            }
        }
        None
    }

    fn successors(&self, without: Without, next: &mut Vec<Self>) {
        for w in 0..2 {
            self.writer_steps(w, without, next);
        }
        self.reader_steps(without, next);
        self.store_steps(without, next);
        self.janitor_steps(without, next);
        if self.time < TIME_MAX {
            next.push(Self { time: self.time + 1, ..*self });
        }
    }
}

impl State {
    /// The document on the primary: what the unique index is checked against.
    fn on_primary(&self, n: u8) -> Option<Doc> {
        self.loose.get(n).or_else(|| self.durable.docs.get(n))
    }

    fn with(&self, change: impl FnOnce(&mut Self)) -> Self {
        let mut next = *self;
        change(&mut next);
        next
    }

    fn writer_steps(&self, w: usize, without: Without, next: &mut Vec<Self>) {
        let writer = self.writers[w];
        let publish = writer.next;
        match writer.at {
            At::NeedsHead => next.push(self.with(|s| {
                let head = if without == Without::MajorityReads {
                    s.loose.top().max(s.durable.top())
                } else {
                    s.shown.top()
                };
                let at = At::Inserts { n: head + 1 };
                s.writers[w] = Writer { known: head, read_at: s.time, at, ..writer };
            })),
            At::Inserts { n } => {
                let stale = self.time - writer.read_at > TRUST && without != Without::HeadAge;
                next.push(
                    self.with(|s| s.writers[w].at = if stale { At::NeedsHead } else { At::Waits { n } }),
                );
                // Another process writes too: first look at what stands above the known head.
                let above = (n..NUMBERS).take_while(|n| self.shown.docs.get(*n).is_some()).last();
                if let Some(top) = above.filter(|top| !stale && top + 1 < NUMBERS) {
                    next.push(self.with(|s| s.writers[w].at = At::Waits { n: top + 1 }));
                }
            }
            At::Waits { n } => next.push(self.with(|s| {
                let stored = s.on_primary(n).is_none();
                if stored {
                    s.loose.set(n, Some(Doc { publish, expired: false }));
                    // Both at once, neither waiting for the other: the upper one may be there
                    // alone.
                    let both = writer.end - writer.next > 1 && s.on_primary(n + 1).is_none();
                    if without == Without::Order && both {
                        s.loose.set(n + 1, Some(Doc { publish: publish + 1, expired: false }));
                        s.loose.set(n, None);
                    }
                }
                s.writers[w].at = At::Answered { n, stored };
            })),
            At::Answered { n, stored: true } => {
                // Acknowledged only when a majority has it.
                if self.shown.docs.get(n).is_some_and(|doc| doc.publish == publish) {
                    self.acknowledge(w, n, without, next);
                }
                if self.lost_answers < LOST_ANSWERS && without != Without::OfLogs {
                    next.push(self.with(|s| {
                        s.lost_answers += 1;
                        s.again(w, n, without);
                    }));
                }
            }
            At::Answered { n, stored: false } => self.look(w, n, publish, without, next),
            At::Done => {}
        }
    }

    /// After a lost response.
    fn again(&mut self, w: usize, n: u8, without: Without) {
        let another = without == Without::SameNumber;
        self.writers[w].at = if another { At::NeedsHead } else { At::Waits { n } };
    }

    /// After a duplicate key: whose document is it?
    fn look(&self, w: usize, n: u8, publish: Publish, without: Without, next: &mut Vec<Self>) {
        let found =
            if without == Without::MajorityReads { self.on_primary(n) } else { self.shown.docs.get(n) };
        match found {
            Some(doc) if doc.publish == publish && without != Without::OwnAppend => {
                self.acknowledge(w, n, without, next);
            }
            Some(_) => {
                next.push(self.with(|s| s.writers[w].at = At::NeedsHead));
                // Or it goes on above, still by the head that it has read.
                if n + 1 < NUMBERS {
                    next.push(self.with(|s| s.writers[w].at = At::Waits { n: n + 1 }));
                }
            }
            // As far as a majority shows, nothing stands there: the same number again.
            None => next.push(self.with(|s| s.again(w, n, without))),
        }
    }

    fn acknowledge(&self, w: usize, n: u8, without: Without, next: &mut Vec<Self>) {
        let late = self.time - self.writers[w].read_at > VERIFY && without != Without::HeadAge;
        if late && self.durable.head >= n {
            // Void: it starts over as another append.
            next.push(self.with(|s| s.writers[w].at = At::NeedsHead));
            return;
        }
        next.push(self.with(|s| {
            let writer = &mut s.writers[w];
            s.acked[usize::from(writer.next)] = Some(n);
            writer.known = n;
            writer.next += 1;
            writer.at = if writer.next == writer.end { At::Done } else { At::Inserts { n: n + 1 } };
        }));
    }

    /// A page: the head record first, then what stands above it.
    fn reader_steps(&self, without: Without, next: &mut Vec<Self>) {
        // What a reader of a log also knows to have expired: `gone` is raised when a run is seen.
        // All see it at once here; whoever sees an older one reads more.
        let of_log = matches!(without, Without::OfLogs | Without::OfLogsUnbrokenRun);
        let gone = self.seen.filter(|_| of_log).map_or(0, |(upto, _)| upto);
        let from = self.reader.upto.max(self.shown.head).max(gone);
        let upto = self.shown.docs.top().max(self.shown.head).max(gone);
        if upto > self.reader.upto {
            let page = self.shown.docs.all().filter(|(n, _)| *n > from).fold(0, |bits, (n, _)| bits | 1 << n);
            next.push(self.with(|s| s.reader = Reader { upto, saw: s.reader.saw | page }));
        }
    }

    fn store_steps(&self, without: Without, next: &mut Vec<Self>) {
        // Replication, in the order in which the primary executed.
        if let Some((n, doc)) = self.loose.all().next() {
            next.push(self.with(|s| {
                s.loose.set(n, None);
                s.durable.docs.set(n, Some(doc));
            }));
        }
        if self.shown != self.durable {
            next.push(self.with(|s| s.shown = s.durable));
        }
        if self.failovers < FAILOVERS && without != Without::OfLogs {
            // What no majority had is rolled back, and majority reads may show less than there is
            // for a while.
            next.push(self.with(|s| {
                s.failovers += 1;
                s.loose = Docs::default();
            }));
        }
        if self.durable.docs.all().any(|(_, doc)| !doc.expired) {
            next.push(self.with(|s| {
                for layer in [&mut s.durable, &mut s.shown] {
                    for doc in layer.docs.0.iter_mut().flatten() {
                        doc.expired = true;
                        s.expired[usize::from(doc.publish)] = true;
                    }
                }
            }));
        }
    }

    fn janitor_steps(&self, without: Without, next: &mut Vec<Self>) {
        let whole = matches!(without, Without::UnbrokenRun | Without::OfLogsUnbrokenRun);
        let mut run = self.shown.head;
        for (n, doc) in self.shown.docs.all().filter(|(n, _)| *n > self.shown.head) {
            if !doc.expired || (n != run + 1 && !whole) {
                break;
            }
            run = n;
        }
        // Without the rule, a number that does not exist yet is passed over too.
        let run = if whole && run > self.shown.head { run + 1 } else { run };
        if self.seen.is_none() && run > self.durable.head {
            next.push(self.with(|s| s.seen = Some((run, s.time))));
        }
        let delay = if without == Without::RemovalDelay { 0 } else { REMOVAL };
        if let Some((upto, since)) = self.seen
            && self.time - since >= delay
        {
            next.push(self.with(|s| {
                s.seen = None;
                if without != Without::RaiseFirst {
                    s.durable.head = s.durable.head.max(upto);
                }
                (0..=upto).for_each(|n| s.durable.docs.set(n, None));
                s.shown = s.durable;
            }));
        }
    }
}

#[test]
fn the_rules_hold_in_every_order_of_events() {
    holds::<State>(Without::Nothing, 1_000_000);
}

#[test]
fn a_reader_of_a_log_passes_by_no_message_that_lives() {
    holds::<State>(Without::OfLogs, 10_000);
    breaks_without::<State>(&[Without::OfLogsUnbrokenRun]);
}

#[test]
fn every_rule_that_is_taken_out_breaks_a_promise() {
    breaks_without::<State>(&RULES);
}
