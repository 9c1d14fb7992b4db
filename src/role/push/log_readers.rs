//! What one socket reads of logs: a session for each, which take turns.
//!
//! Each is the same pure machine as the session of the inbox ([`Session`]). It never gets a message
//! pushed: told that its tail has moved, it asks for what comes next and is given one message at a
//! time, as long as the socket takes it. So a slow socket holds a few frames, however many logs it
//! reads, and a fast one is never behind.

mod resting;

use std::sync::Arc;

use bytes::Bytes;

use super::tail::{Block, Held, LogFrame, Reading, Tail};
use crate::inbox::topics::LogMembership;
use crate::message::{LogId, Millis, Seq, TopicName, UserId};
use crate::session::{Input, Output, Page, Session, StartPoint, Unacked};
use crate::telemetry::Path;
use crate::topic::LOG_TOPICS;
use crate::wire::frame::{GapReason, OfLog, ServerFrame, TopicState};

pub(super) use resting::Resting;

/// Why a socket reads a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Why {
    /// Everybody does.
    Everyone,
    /// The user is a member, and what stands up to here is not for this member.
    Member(Seq),
    /// The client asked for it, and its token allows it. Its position is stored nowhere.
    Watched,
}

impl Why {
    /// Up to where nothing is for the reader, who may know nothing of it.
    fn from(self) -> Seq {
        match self {
            Self::Member(from) => from,
            Self::Everyone | Self::Watched => Seq::BEGINNING,
        }
    }
}

/// Where a socket begins to read a log.
pub(super) struct LogStart {
    pub(super) reading: Reading,
    pub(super) why: Why,
    /// The position after which it begins.
    pub(super) after: Seq,
    /// The head as the store has it, if it is below `after`: the store was restored.
    pub(super) restored_to: Option<Seq>,
    /// The client was sent nothing of this log before.
    pub(super) fresh: bool,
    /// A position of the client below where it begins, which it is told of.
    pub(super) before_joining: Option<Seq>,
    /// How often the store was restored below what the tail had read, before all this was found
    /// out.
    pub(super) resets: u64,
}

struct Reader {
    reading: Reading,
    why: Why,
    session: Session,
    /// The session waits for what comes after its position.
    wants: bool,
    /// It has been level once.
    was_level: bool,
    /// Its first page was not empty: the client is told when it is level.
    had_backlog: bool,
    resets: u64,
    /// What was sent and not acked; kept if the client asked for a window.
    unacked: Option<Box<Unacked>>,
    /// The position after which it began.
    began: Seq,
}

impl Reader {
    /// Whether a watched topic is read in such a way that a membership can go on with it.
    fn can_become(&self, life: u64, from: Seq) -> bool {
        self.tail().life == life && self.began <= from
    }

    fn tail(&self) -> &Arc<Tail> {
        &self.reading.tail
    }
}

/// What a socket is to do, in this order.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Act {
    /// Send a message, which was accepted at this time and came this way; `None`: it waited for its
    /// user.
    Message(Bytes, Option<(Millis, Path)>),
    /// Send another frame.
    Frame(Box<ServerFrame>),
    /// The device has handled everything up to here.
    Acked(LogId, Seq),
}

impl Act {
    fn frame(frame: ServerFrame) -> Self {
        Self::Frame(Box::new(frame))
    }
}

/// What is to be read of the store for a socket.
#[derive(Debug, Clone)]
pub(super) struct Wanted {
    pub(super) tail: Arc<Tail>,
    pub(super) after: Seq,
    /// The resets of the tail at this moment.
    pub(super) resets: u64,
}

impl std::fmt::Debug for Tail {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "tail of {} at {}", self.log, self.position())
    }
}

/// The readers of one socket.
pub(super) struct LogReaders {
    user: UserId,
    /// The number of changes that the memberships in use have.
    memberships: u64,
    windowed: bool,
    all: Vec<Reader>,
    /// Whose turn it is.
    turn: usize,
    /// A read of the store for this socket is under way.
    is_reading: bool,
    /// What was read and not used yet.
    block: Option<(Arc<Tail>, Block)>,
    /// What was sent of topics that were left, in this life, until they are joined again.
    left: Vec<(TopicName, u64, Seq)>,
    inbox_is_level: bool,
    told_level: bool,
    /// On which way what is given now has come.
    path: Option<Path>,
}

impl LogReaders {
    /// Readers of nothing. `memberships` is the number of changes that the memberships to come
    /// have.
    pub(super) fn new(user: UserId, memberships: u64, windowed: bool) -> Self {
        Self {
            user,
            memberships,
            windowed,
            all: Vec::new(),
            turn: 0,
            is_reading: false,
            block: None,
            left: Vec::new(),
            inbox_is_level: false,
            told_level: false,
            path: None,
        }
    }

    /// Makes room for so many logs, and no more: a socket keeps it for as long as it lives.
    pub(super) fn reserve(&mut self, logs: usize) {
        self.all.reserve_exact(logs);
    }

    /// Begins to read a log.
    pub(super) fn begin(&mut self, start: LogStart, out: &mut Vec<Act>) {
        let LogStart { reading, why, after, restored_to, fresh, before_joining, resets } = start;
        let tail = &reading.tail;
        let log = tail.log.clone();
        if let Some(position) = before_joining.filter(|position| *position < after) {
            out.push(Act::frame(gap(&log, position, after.next(), GapReason::Joined)));
        }
        let head = restored_to.unwrap_or_else(|| tail.position().max(after));
        let point =
            StartPoint { start: after, head, more: head > after, fresh: fresh && before_joining.is_none() };
        let (mut wants, had_backlog) = (false, point.more);
        let session = Session::start::<LogFrame>(point, None, |output| match output {
            Output::Read { .. } => wants = true,
            Output::Gap { after, before, reason } => out.push(Act::frame(gap(&log, after, before, reason))),
            _ => {}
        });
        let was_level = session.is_live();
        let unacked = self.windowed.then(Box::default);
        let began = after;
        self.all.push(Reader {
            reading,
            why,
            session,
            wants,
            was_level,
            had_backlog,
            resets,
            unacked,
            began,
        });
    }

    /// Ends the reading of a log.
    fn end(&mut self, at: usize, out: &mut Vec<Act>) {
        let reader = self.all.remove(at);
        if self.block.as_ref().is_some_and(|(of, _)| Arc::ptr_eq(of, reader.tail())) {
            self.block = None;
        }
        if let Some(topic) = reader.tail().log.topic() {
            out.push(Act::frame(topic_frame(topic, TopicState::Left, None)));
        }
    }

    /// The memberships of the user have changed. Returns those that are to be joined, with what was
    /// sent of them on this socket. `anew`: the store was restored, and counts changes anew.
    pub(super) fn compare(
        &mut self,
        (version, anew): (u64, bool),
        now_members: &[LogMembership],
        out: &mut Vec<Act>,
    ) -> Vec<(LogMembership, Option<Seq>)> {
        if version < self.memberships && !anew {
            return Vec::new();
        }
        self.memberships = version;
        for at in (0..self.all.len()).rev() {
            let reader = &self.all[at];
            let (Some(topic), Why::Member(from)) = (reader.tail().log.topic(), reader.why) else { continue };
            let life = reader.tail().life;
            let stays =
                now_members.iter().any(|one| one.topic == *topic && one.life == life && one.from <= from);
            if !stays {
                let sent = (topic.clone(), life, reader.session.position());
                self.left.retain(|(topic, ..)| *topic != sent.0);
                self.left.push(sent);
                self.end(at, out);
            }
        }
        for one in now_members {
            self.become_member(&one.topic, one.life, one.from, out);
        }
        let is_new = |one: &&LogMembership| {
            !self.all.iter().any(|reader| reader.tail().log.topic() == Some(&one.topic))
        };
        let with_sent = |one: &LogMembership| {
            let same = self.left.iter().find(|(topic, life, _)| *topic == one.topic && *life == one.life);
            (one.clone(), same.map(|(.., seq)| *seq))
        };
        let joined = now_members.iter().filter(is_new).map(with_sent).collect();
        // Older ones are of no use: what is published meanwhile makes up for it.
        let excess = self.left.len().saturating_sub(LOG_TOPICS);
        self.left.drain(..excess);
        joined
    }

    /// Begins to read a topic for a client that watches it.
    pub(super) fn watched(&mut self, start: LogStart, out: &mut Vec<Act>) {
        if let Some(topic) = start.reading.tail.log.topic() {
            out.push(Act::frame(topic_frame(topic, TopicState::Watching, Some(start.after))));
        }
        self.begin(start, out);
    }

    /// How far a topic was read, if it is read, for whatever reason.
    pub(super) fn position(&self, topic: &TopicName) -> Option<Seq> {
        self.of_topic(topic).map(|at| self.all[at].session.position())
    }

    /// The topics that are watched.
    pub(super) fn watches(&self) -> Vec<TopicName> {
        let watched = self.all.iter().filter(|reader| reader.why == Why::Watched);
        watched.filter_map(|reader| reader.tail().log.topic().cloned()).collect()
    }

    /// Ends the watching of a topic. A membership is not ended by that.
    pub(super) fn unwatch(&mut self, topic: &TopicName, out: &mut Vec<Act>) {
        if let Some(at) = self.of_topic(topic).filter(|at| self.all[*at].why == Why::Watched) {
            self.end(at, out);
        }
    }

    fn of_topic(&self, topic: &TopicName) -> Option<usize> {
        self.all.iter().position(|reader| reader.tail().log.topic() == Some(topic))
    }

    /// A watched topic becomes a membership where it is, unless it began after the member did, or
    /// in another life: then it ends, to be joined anew.
    fn become_member(&mut self, topic: &TopicName, life: u64, from: Seq, out: &mut Vec<Act>) {
        let Some(at) = self.of_topic(topic).filter(|at| self.all[*at].why == Why::Watched) else { return };
        let reader = &mut self.all[at];
        if reader.can_become(life, from) {
            reader.why = Why::Member(from);
            let position = reader.session.position();
            out.push(Act::frame(topic_frame(topic, TopicState::Joined, Some(position))));
        } else {
            self.end(at, out);
        }
    }

    /// The user has joined a topic. Nothing happens if the socket reads it already, or the
    /// memberships have changed again.
    pub(super) fn joined(&mut self, version: u64, start: LogStart, out: &mut Vec<Act>) {
        if version != self.memberships {
            return;
        }
        let log = start.reading.tail.log.clone();
        if let (Some(topic), Why::Member(from)) = (log.topic(), start.why) {
            // It was watched while this was found out.
            self.become_member(topic, start.reading.tail.life, from, out);
        }
        if self.all.iter().any(|reader| reader.tail().log == log) {
            return;
        }
        if let Some(topic) = log.topic() {
            self.left.retain(|(left, ..)| left != topic);
            out.push(Act::frame(topic_frame(topic, TopicState::Joined, Some(start.after))));
        }
        self.begin(start, out);
    }

    /// Tails may have moved.
    pub(super) fn look(&mut self, now: Millis, out: &mut Vec<Act>) {
        for at in (0..self.all.len()).rev() {
            if self.all[at].tail().has_ended() {
                self.end(at, out);
            }
        }
        for at in 0..self.all.len() {
            let reader = &self.all[at];
            let (position, tail) = (reader.session.position(), reader.tail());
            let (resets, to) = (tail.resets(), tail.reset_to());
            if resets != reader.resets {
                self.all[at].resets = resets;
                if position > to {
                    self.step(at, Input::Reset(position, to), now, out);
                }
            }
            let reader = &self.all[at];
            let position = reader.session.position();
            if position < reader.tail().position() && !reader.wants {
                self.step(at, Input::MoreAfter(position), now, out);
            }
        }
        self.look_whether_level(out);
    }

    /// The inbox is level.
    pub(super) fn inbox_is_level(&mut self, out: &mut Vec<Act>) {
        self.inbox_is_level = true;
        self.look_whether_level(out);
    }

    fn look_whether_level(&mut self, out: &mut Vec<Act>) {
        let is_level = |reader: &Reader| reader.was_level || reader.why == Why::Watched;
        if !self.told_level && self.inbox_is_level && self.all.iter().all(is_level) {
            self.told_level = true;
            out.push(Act::frame(ServerFrame::CaughtUp { seq: None, of: OfLog::default(), all: true }));
        }
    }

    /// Takes what was read of the store; `None`: what was asked for is not there any more.
    pub(super) fn take_block(&mut self, tail: Arc<Tail>, page: Option<Block>) {
        self.is_reading = false;
        self.block = page.map(|page| (tail, page));
    }

    /// Gives the next reader that waits what comes next. Returns `None` when nobody waits, or what
    /// is to be read first.
    pub(super) fn next(&mut self, now: Millis, out: &mut Vec<Act>) -> Option<Next> {
        let count = self.all.len();
        for n in 0..count {
            let at = (self.turn + n) % count;
            if !self.all[at].wants {
                continue;
            }
            let after = self.all[at].session.position();
            let tail = Arc::clone(self.all[at].tail());
            let (page, path) = match tail.after(after) {
                Held::Page(page) => {
                    let is_found = page.items.first().is_some_and(|item| item.frame.is_found);
                    (page, if is_found { Path::Swept } else { Path::Live })
                }
                Held::Below => match self.of_block(&tail, after) {
                    Some(page) => (page, Path::Behind),
                    // One read at a time for each socket; others that are held go on.
                    None if self.is_reading => continue,
                    None => {
                        self.is_reading = true;
                        let resets = self.all[at].resets;
                        return Some(Next::Read(Wanted { tail, after, resets }));
                    }
                },
            };
            self.turn = at + 1;
            self.all[at].wants = false;
            self.path = self.all[at].was_level.then_some(path);
            self.step(at, Input::Page(page), now, out);
            self.look_whether_level(out);
            return Some(Next::Given);
        }
        None
    }

    /// The next message of the block that was read, or that there is none in it.
    fn of_block(&mut self, tail: &Arc<Tail>, after: Seq) -> Option<Page<LogFrame>> {
        let is_it = |(of, block): &&(Arc<Tail>, Block)| Arc::ptr_eq(of, tail) && block.after <= after;
        let (_, block) = self.block.as_ref().filter(is_it)?;
        if block.upto <= after {
            // It tells nothing more.
            self.block = None;
            return None;
        }
        let next = block.items.iter().find(|item| item.seq > after);
        let upto = next.map_or(block.upto, |item| item.seq);
        let is_passed = |seq: &&Seq| **seq > after && **seq <= upto;
        Some(Page {
            after,
            items: next.cloned().into_iter().collect(),
            unreadable: block.unreadable.iter().filter(is_passed).copied().collect(),
            upto,
            // At its end the tail is asked again.
            more: true,
        })
    }

    /// The client has handled everything up to a number of a log. Not if the log is not read.
    pub(super) fn ack(&mut self, log: &LogId, seq: u64, now: Millis, out: &mut Vec<Act>) {
        if let Some(at) = self.all.iter().position(|reader| reader.tail().log == *log) {
            self.step(at, Input::Ack(seq), now, out);
            let acked = self.all[at].session.acked();
            self.all[at].unacked.iter_mut().for_each(|unacked| unacked.ack(acked));
        }
    }

    /// Messages of logs that were sent and not acked, if the client limits that.
    pub(super) fn unacked(&self) -> u32 {
        self.all.iter().filter_map(|reader| reader.unacked.as_deref()).map(Unacked::count).sum()
    }

    fn step(&mut self, at: usize, input: Input<LogFrame>, now: Millis, out: &mut Vec<Act>) {
        let Self { all, user, path, .. } = self;
        let Reader { reading, why, session, wants, was_level, had_backlog, unacked, .. } = &mut all[at];
        let log = &reading.tail.log;
        if matches!(input, Input::Reset(..)) {
            unacked.iter_mut().for_each(|unacked| unacked.clear());
        }
        session.step(input, now, |output| match output {
            Output::Send(frame) if frame.is_for(user) => {
                unacked.iter_mut().for_each(|unacked| unacked.send(frame.seq));
                out.push(Act::Message(frame.frame, path.map(|path| (frame.accepted_at, path))));
            }
            Output::Send(frame) => {
                let after = Seq::at(frame.seq.get().saturating_sub(1));
                out.push(Act::frame(gap(log, after, frame.seq.next(), GapReason::Excepted)));
            }
            Output::Gap { after, before, reason } => out.push(Act::frame(gap(log, after, before, reason))),
            Output::Read { .. } => *wants = true,
            Output::Cursor(_) if *why == Why::Watched => {}
            Output::Cursor(acked) => out.push(Act::Acked(log.clone(), acked)),
            // It is told below, with the position.
            Output::CaughtUp(_) => {}
        });
        if session.is_live() && !std::mem::replace(was_level, true) && *had_backlog {
            let seq = Some(session.position().get());
            out.push(Act::frame(ServerFrame::CaughtUp { seq, of: log.into(), all: false }));
        }
    }
}

/// The outcome of [`LogReaders::next`].
#[derive(Debug)]
pub(super) enum Next {
    /// A reader was given what comes next.
    Given,
    /// This is to be read first.
    Read(Wanted),
}

fn gap(log: &LogId, after: Seq, before: Seq, reason: GapReason) -> ServerFrame {
    ServerFrame::Gap { of: log.into(), after: after.get(), before: before.get(), reason }
}

/// The frame that tells what has become of a topic.
pub(super) fn topic_frame(topic: &TopicName, state: TopicState, after: Option<Seq>) -> ServerFrame {
    ServerFrame::Topic { topic: topic.to_string(), state, after: after.map(Seq::get) }
}
