//! One session: a cursor over a user's inbox with a live tail.
//!
//! A pure state machine. It knows the number that it sent last and is in one of two states:
//! *behind* (it reads the inbox page by page) or *live* (it passes on live messages). A live
//! message that follows on is sent. An older one is ignored. One that jumps over a number, has
//! expired, or comes while the socket is full, makes the session read the inbox. Reconnect, move,
//! slow client, lost hint and restart are all these two states.
//!
//! A client may limit how far it is sent ahead of its acks (`window`). Without credit the session
//! behaves as with a full socket.
//!
//! `F` is the encoded frame of a message; the session never looks into it.
//!
//! The promise, tested against a model: on one connection every number above the start is sent
//! exactly once, in rising order, or is part of a gap that was told. When the inbox is idle, the
//! session ends up complete. Two exceptions: a session from the beginning is not told of numbers
//! missing below its first message, and after a reset the promise begins anew at the new position.

use std::collections::VecDeque;

use crate::message::{Millis, Seq};
use crate::wire::frame::GapReason;

/// A message as a session handles it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item<F> {
    /// Its position in the inbox.
    pub seq: Seq,
    /// From this time on it is not shown.
    pub expires_at: Millis,
    /// The encoded frame.
    pub frame: F,
}

/// The response of the inbox to "what comes after this position".
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page<F> {
    /// The position that the page was requested for.
    pub after: Seq,
    /// Unexpired messages in rising order.
    pub items: Vec<Item<F>>,
    /// Positions, in rising order, of messages that cannot be read.
    pub unreadable: Vec<Seq>,
    /// Every number above `after` and up to this one is in `items` or will never be shown.
    pub upto: Seq,
    /// The page was cut; there is more above `upto`.
    pub more: bool,
}

/// Where a session starts, as the inbox knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StartPoint {
    /// The position after which the session starts; zero is the beginning.
    pub start: Seq,
    /// The highest number that was assigned when the inbox was asked.
    pub head: Seq,
    /// Whether there is something after `start`.
    pub more: bool,
    /// The client was sent nothing before: what is missing below its first message needs no gap.
    pub fresh: bool,
}

/// An event for a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input<F> {
    /// A live message. It may be lost, repeated or out of order.
    Live(Item<F>),
    /// Live messages were dropped on the way here; only the inbox has them.
    Lost,
    /// The page that was requested.
    Page(Page<F>),
    /// The sweep found something after this position.
    MoreAfter(Seq),
    /// The sweep found that the first position is above everything in the inbox, because the store
    /// was restored. The session goes on after the second position.
    Reset(Seq, Seq),
    /// The socket is full; nothing may be sent for now.
    Blocked,
    /// The socket has room again.
    Writable,
    /// The client has handled everything up to this number.
    Ack(u64),
}

/// An action that a session wants. Actions must be performed in the order in which they are
/// emitted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output<F> {
    /// Send this frame.
    Send(F),
    /// Tell the client about numbers that will never come. With reason `Reset`, `before` may be at
    /// or below `after`: numbering goes on from `before`, and the client forgets what it had from
    /// there on.
    Gap {
        /// The last number before the gap.
        after: Seq,
        /// The next number that can come.
        before: Seq,
        /// Why the numbers are missing.
        reason: GapReason,
    },
    /// Tell the client that the backlog is delivered. This happens once in the life of a session; a
    /// later return to the inbox is internal.
    CaughtUp(Seq),
    /// Read the inbox after this position. At most one read is in flight.
    Read {
        /// The position.
        after: Seq,
        /// Most messages that can be sent; `None`: any number.
        most: Option<u32>,
    },
    /// Move the cursor of the device to this position.
    Cursor(Seq),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Live,
    /// `reading`: a page was requested and has not arrived.
    Behind {
        reading: bool,
    },
}

/// The state machine of one session.
#[derive(Debug, Clone)]
pub struct Session {
    sent: Seq,
    acked: Seq,
    /// The position before the last reset: an ack of a number up to here that was not sent since is
    /// an old one, still on its way.
    before_reset: Seq,
    phase: Phase,
    /// Something up to here may be missing from the read in flight: if it stays above `sent`, the
    /// session reads again. [`Seq::MAX`]: how far is unknown.
    unread: Seq,
    full: bool,
    told_caught_up: bool,
    /// The session started at the beginning and has sent nothing, so numbers missing below the
    /// first message need no gap.
    untouched: bool,
    /// Set if the client asked for a window. Boxed: most clients do not.
    credit: Option<Box<Credit>>,
}

/// How far a client may be sent ahead of its acks.
#[derive(Debug, Clone)]
struct Credit {
    window: u32,
    sent: Unacked,
    /// What was sent of other logs on the same socket and is not acked.
    elsewhere: u32,
}

impl Credit {
    fn new(window: u32) -> Self {
        Self { window, sent: Unacked::default(), elsewhere: 0 }
    }

    fn free(&self) -> u32 {
        self.window.saturating_sub(self.sent.count).saturating_sub(self.elsewhere)
    }
}

/// The numbers of a log that were sent and not acked.
#[derive(Debug, Clone, Default)]
pub struct Unacked {
    /// As runs: first and last.
    runs: VecDeque<(Seq, Seq)>,
    count: u32,
}

impl Unacked {
    /// How many they are.
    #[must_use]
    pub const fn count(&self) -> u32 {
        self.count
    }

    /// A number was sent, above all before.
    pub fn send(&mut self, seq: Seq) {
        self.count += 1;
        match self.runs.back_mut() {
            Some((_, last)) if last.next() == seq => *last = seq,
            _ => self.runs.push_back((seq, seq)),
        }
    }

    /// Everything up to a number is acked.
    pub fn ack(&mut self, upto: Seq) {
        while let Some((first, last)) = self.runs.front_mut().filter(|(first, _)| *first <= upto) {
            let acked = (*last).min(upto);
            self.count -= u32::try_from(acked.get() - first.get() + 1).unwrap_or(u32::MAX);
            *first = acked.next();
            if *first > *last {
                self.runs.pop_front();
            }
        }
    }

    /// Nothing is to be acked any more.
    pub fn clear(&mut self) {
        self.runs.clear();
        self.count = 0;
    }
}

/// A session that is live, waits for nothing and limits nothing, in little memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AtRest {
    /// Everything up to here was sent or passed over.
    pub sent: Seq,
    /// How far the last ack is below that, or [`NOTHING_ACKED`].
    unacked: u32,
    untouched: bool,
}

const NOTHING_ACKED: u32 = u32::MAX;

impl Session {
    /// The same session as one at rest, if it can be.
    #[must_use]
    pub fn at_rest(&self) -> Option<AtRest> {
        let Self { sent, acked, before_reset, phase, full, told_caught_up, untouched, ref credit, .. } =
            *self;
        // What was announced is read: `unread` says nothing any more.
        let rests = phase == Phase::Live
            && !full
            && told_caught_up
            && before_reset.is_beginning()
            && credit.is_none();
        let unacked = match acked.is_beginning() {
            true => NOTHING_ACKED,
            false => u32::try_from(sent.get().checked_sub(acked.get())?).ok()?,
        };
        let is_told = acked.is_beginning() || unacked != NOTHING_ACKED;
        (rests && is_told).then_some(AtRest { sent, unacked, untouched })
    }

    /// The session that was at rest.
    #[must_use]
    pub fn resumed(rest: AtRest) -> Self {
        let AtRest { sent, unacked, untouched } = rest;
        let acked = match unacked {
            NOTHING_ACKED => Seq::BEGINNING,
            unacked => Seq::at(sent.get().saturating_sub(unacked.into())),
        };
        Self {
            sent,
            acked,
            before_reset: Seq::BEGINNING,
            phase: Phase::Live,
            unread: Seq::BEGINNING,
            full: false,
            told_caught_up: true,
            untouched,
            credit: None,
        }
    }

    /// Begins a session. A start above the head means that the client knew another inbox: it is
    /// told so, and the session goes on from the head. `window` is how many messages may be sent
    /// ahead of the client's acks.
    pub fn start<F>(start_point: StartPoint, window: Option<u32>, mut out: impl FnMut(Output<F>)) -> Self {
        let mut session = Self {
            sent: start_point.start,
            acked: Seq::BEGINNING,
            before_reset: Seq::BEGINNING,
            phase: Phase::Live,
            unread: Seq::BEGINNING,
            full: false,
            told_caught_up: false,
            untouched: start_point.fresh || start_point.start.is_beginning(),
            credit: window.map(|window| Box::new(Credit::new(window))),
        };
        if start_point.start > start_point.head {
            let before = start_point.head.next();
            out(Output::Gap { after: start_point.start, before, reason: GapReason::Reset });
            session.sent = start_point.head;
            session.before_reset = start_point.start;
        }
        if start_point.more {
            session.fall_behind(Seq::BEGINNING, &mut out);
        } else {
            session.skip_to(start_point.head, &mut out);
            session.go_live(&mut out);
        }
        session
    }

    /// Handles one event at the time `now`.
    pub fn step<F>(&mut self, input: Input<F>, now: Millis, mut out: impl FnMut(Output<F>)) {
        match input {
            Input::Live(item) => self.live(item, now, &mut out),
            Input::Lost => self.fall_behind(Seq::MAX, &mut out),
            Input::Page(page) => self.page(page, now, &mut out),
            Input::MoreAfter(position) if position == self.sent => self.fall_behind(Seq::MAX, &mut out),
            Input::MoreAfter(_) => {}
            Input::Reset(position, to) if position == self.sent && to < position => {
                // A client that was sent nothing has nothing to forget.
                if !self.untouched {
                    out(Output::Gap { after: position, before: to.next(), reason: GapReason::Reset });
                }
                self.before_reset = position;
                self.sent = to;
                self.acked = self.acked.min(to);
                self.credit.iter_mut().for_each(|credit| credit.sent.clear());
                self.fall_behind(Seq::MAX, &mut out);
            }
            Input::Reset(..) => {}
            Input::Blocked => self.full = true,
            Input::Writable => {
                self.full = false;
                self.read_if_room(&mut out);
            }
            Input::Ack(seq) => self.ack(seq, &mut out),
        }
    }

    /// Everything up to here was sent or passed over.
    #[must_use]
    pub const fn position(&self) -> Seq {
        self.sent
    }

    /// The last position that the client acked on this socket.
    #[must_use]
    pub const fn acked(&self) -> Seq {
        self.acked
    }

    /// How many more messages may be sent on this socket, if the client limits that.
    #[must_use]
    pub fn free(&self) -> Option<u32> {
        self.credit.as_ref().map(|credit| credit.free())
    }

    /// So many messages of other logs were sent on this socket and are not acked.
    pub fn count_elsewhere<F>(&mut self, unacked: u32, mut out: impl FnMut(Output<F>)) {
        if let Some(credit) = &mut self.credit {
            credit.elsewhere = unacked;
            self.read_if_room(&mut out);
        }
    }

    /// Whether the backlog was delivered once.
    #[must_use]
    pub const fn was_caught_up(&self) -> bool {
        self.told_caught_up
    }

    /// Whether the session is live.
    #[must_use]
    pub fn is_live(&self) -> bool {
        self.phase == Phase::Live
    }

    fn live<F>(&mut self, item: Item<F>, now: Millis, out: &mut impl FnMut(Output<F>)) {
        if item.seq <= self.sent {
            return;
        }
        let follows = item.seq == self.sent.next() && item.expires_at > now;
        if self.phase == Phase::Live && follows && !self.full && self.has_credit() {
            self.send(item, out);
        } else {
            self.fall_behind(item.seq, out);
        }
    }

    fn page<F>(&mut self, page: Page<F>, now: Millis, out: &mut impl FnMut(Output<F>)) {
        if self.phase != (Phase::Behind { reading: true }) {
            return;
        }
        if page.after != self.sent {
            // The position was reset while the page was being read.
            self.phase = Phase::Behind { reading: false };
            return self.read_if_room(out);
        }
        let mut unreadable = page.unreadable.into_iter().peekable();
        for item in page.items {
            if !self.has_credit() {
                // The rest of the page is read again when there is credit.
                self.phase = Phase::Behind { reading: false };
                self.unread = Seq::MAX;
                return self.read_if_room(out);
            }
            while let Some(seq) = unreadable.next_if(|seq| *seq < item.seq) {
                self.pass_unreadable(seq, out);
            }
            if item.seq > self.sent && item.expires_at > now {
                self.skip_to(Seq::new(item.seq.get() - 1).unwrap_or(self.sent), out);
                self.send(item, out);
            }
        }
        unreadable.for_each(|seq| self.pass_unreadable(seq, out));
        self.skip_to(page.upto, out);
        self.phase = Phase::Behind { reading: false };
        if page.more || self.unread > self.sent {
            self.read_if_room(out);
        } else {
            self.go_live(out);
        }
    }

    /// Marks everything up to `position` as gone and tells the client, unless it was never sent
    /// anything below either.
    fn skip_to<F>(&mut self, position: Seq, out: &mut impl FnMut(Output<F>)) {
        if position > self.sent {
            if !self.untouched {
                out(Output::Gap { after: self.sent, before: position.next(), reason: GapReason::Expired });
            }
            self.sent = position;
        }
    }

    /// Tells of a message that nobody will ever see, also to a client that was sent nothing yet.
    fn pass_unreadable<F>(&mut self, seq: Seq, out: &mut impl FnMut(Output<F>)) {
        if seq > self.sent {
            let after = Seq::new(seq.get() - 1).unwrap_or(self.sent);
            self.skip_to(after, out);
            out(Output::Gap { after, before: seq.next(), reason: GapReason::Unreadable });
            self.sent = seq;
            self.untouched = false;
        }
    }

    fn send<F>(&mut self, item: Item<F>, out: &mut impl FnMut(Output<F>)) {
        self.sent = item.seq;
        self.untouched = false;
        self.credit.iter_mut().for_each(|credit| credit.sent.send(item.seq));
        out(Output::Send(item.frame));
    }

    /// The inbox has something, up to `announced`, that will not arrive as a live message.
    fn fall_behind<F>(&mut self, announced: Seq, out: &mut impl FnMut(Output<F>)) {
        self.unread = self.unread.max(announced);
        if self.phase == Phase::Live {
            self.phase = Phase::Behind { reading: false };
        }
        self.read_if_room(out);
    }

    fn has_credit(&self) -> bool {
        self.credit.as_ref().is_none_or(|credit| credit.free() > 0)
    }

    /// Begins a read, unless the socket is full, less than half of the window is free, or a read is
    /// in flight. It will include all that was announced before, so `unread` starts over.
    fn read_if_room<F>(&mut self, out: &mut impl FnMut(Output<F>)) {
        let has_room = self.credit.as_ref().is_none_or(|credit| credit.free() * 2 >= credit.window);
        if !self.full && has_room && self.phase == (Phase::Behind { reading: false }) {
            self.phase = Phase::Behind { reading: true };
            self.unread = Seq::BEGINNING;
            out(Output::Read { after: self.sent, most: self.credit.as_ref().map(|credit| credit.free()) });
        }
    }

    fn go_live<F>(&mut self, out: &mut impl FnMut(Output<F>)) {
        self.phase = Phase::Live;
        if !self.told_caught_up {
            self.told_caught_up = true;
            out(Output::CaughtUp(if self.untouched { Seq::BEGINNING } else { self.sent }));
        }
    }

    /// An ack above the last number sent counts as that number, unless it is of the numbers before
    /// a reset. One that goes back is ignored.
    fn ack<F>(&mut self, seq: u64, out: &mut impl FnMut(Output<F>)) {
        let sent = if self.untouched { Seq::BEGINNING } else { self.sent };
        let named = Seq::new(seq).unwrap_or(Seq::MAX);
        if named > sent && named <= self.before_reset {
            return;
        }
        let acked = named.min(sent);
        if acked > self.acked {
            self.acked = acked;
            out(Output::Cursor(acked));
        }
        if let Some(credit) = &mut self.credit {
            credit.sent.ack(acked);
            self.read_if_room(out);
        }
    }
}

#[cfg(test)]
mod tests;
