//! A tail: what a node holds of one log for all its sockets.
//!
//! The log is read once, however many sockets read it here. A tail is a session of the node itself
//! ([`Session`]): it takes live messages, and reads the log where some are missing. It keeps the
//! last frames. Sockets take them from there, each at its own pace; what stands below is read in
//! blocks.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::time::Instant;

use super::registry::SessionHandle;
use crate::inbox::InboxPage;
use crate::inbox::logs::is_for;
use crate::message::{LogId, Message, Millis, Seq, UserId, Via};
use crate::role::shown;
use crate::session::{Input, Item, Output, Page, Session, StartPoint};
use crate::telemetry::WAY;
use crate::wire::frame::{GapReason, log_message_frame};

/// Most frames that a tail keeps.
const FRAMES: usize = 256;
/// Most bytes of frames that a tail keeps, if there is room for them among all tails.
const FRAME_BYTES: usize = 1024 * 1024;

/// A frame of a log, encoded once for all sockets of the node.
#[derive(Debug, Clone)]
pub(super) struct LogFrame {
    pub(super) seq: Seq,
    pub(super) frame: Bytes,
    /// Who does not get it.
    via: Option<Arc<Via>>,
    pub(super) accepted_at: Millis,
    /// It was found by a look at the store: its hint was lost.
    pub(super) is_found: bool,
}

impl LogFrame {
    /// Whether this user gets it.
    pub(super) fn is_for(&self, user: &UserId) -> bool {
        match self.via.as_deref() {
            Some(Via::Log(entry)) => is_for(Some(entry), user),
            _ => true,
        }
    }
}

/// A message of a log in the form of sessions.
pub(super) fn encoded(log: &LogId, message: &Message) -> Item<LogFrame> {
    let has_exceptions = message.log_entry().is_some_and(|entry| !entry.except.is_empty());
    let frame = LogFrame {
        seq: message.seq,
        frame: log_message_frame(log, message),
        via: message.via.clone().filter(|_| has_exceptions),
        accepted_at: message.accepted_at,
        is_found: false,
    };
    Item { seq: message.seq, expires_at: message.expires_at, frame }
}

/// What was read of a log below its tail, shared by all sockets that need it.
pub(super) type Block = Arc<Page<LogFrame>>;

/// A page of a log in the form of sessions.
pub(super) fn page_of(log: &LogId, after: Seq, page: InboxPage) -> Page<LogFrame> {
    if tracing::enabled!(target: WAY, tracing::Level::DEBUG) {
        for message in &page.messages {
            let (id, seq) = (&message.id, message.seq);
            tracing::debug!(target: WAY, step = 7, %log, %id, %seq, traceparent = shown(message), "read from a log");
        }
    }
    let items = page.messages.iter().map(|message| encoded(log, message)).collect();
    let InboxPage { unreadable, upto, more, .. } = page;
    Page { after, items, unreadable, upto, more }
}

/// Bytes of frames that all tails of a process keep together.
#[derive(Debug)]
pub(super) struct TailMemory {
    used: AtomicUsize,
    most: usize,
}

impl TailMemory {
    pub(super) fn new(most: usize) -> Self {
        Self { used: AtomicUsize::new(0), most }
    }

    fn is_full(&self) -> bool {
        self.used.load(Ordering::Relaxed) > self.most
    }
}

/// What a tail wants done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Wants {
    /// Read the log after this position.
    pub(super) read: Option<Seq>,
    /// Tell the readers: there are frames, or numbers that are gone.
    pub(super) walk: bool,
}

/// What a tail has after a position.
#[derive(Debug)]
pub(super) enum Held {
    /// The next frame, or that there is none.
    Page(Page<LogFrame>),
    /// The position is below what is held: a block is to be read.
    Below,
}

/// A tail. Its contract is in the module's documentation.
pub(super) struct Tail {
    pub(super) log: LogId,
    /// The life of the topic's name that is read.
    pub(super) life: u64,
    /// Tells it from every other tail of the log: one that was dropped knows of nothing that has
    /// changed since.
    pub(super) draw: u64,
    core: Mutex<Core>,
    /// The highest number that is held or gone, as the core has it.
    position: AtomicU64,
    /// How often the store was found to be restored below what was read, and where the tail went on
    /// the last time.
    resets: AtomicU64,
    reset_to: AtomicU64,
    /// The topic was removed.
    ended: AtomicBool,
    /// A walk is under way, or queued.
    pub(super) walking: AtomicBool,
    /// The readers have not been told of all yet.
    pub(super) moved: AtomicBool,
    pub(super) readers: Mutex<Vec<Weak<SessionHandle>>>,
    /// How often a walk has found a reader gone since those were taken out.
    pub(super) gone: AtomicUsize,
    count: AtomicUsize,
    /// When the last reader left.
    idle_since: Mutex<Instant>,
}

struct Core {
    machine: Session,
    /// What is held of the numbers above `floor`, in rising order.
    frames: VecDeque<Item<LogFrame>>,
    unreadable: VecDeque<Seq>,
    bytes: usize,
    floor: Seq,
    memory: Arc<TailMemory>,
    /// A look has found that there is more: what is read next was not told by a hint.
    looked: bool,
}

impl Drop for Core {
    fn drop(&mut self) {
        self.memory.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl Core {
    fn push(&mut self, item: Item<LogFrame>) {
        let bytes = item.frame.frame.len();
        self.bytes += bytes;
        self.memory.used.fetch_add(bytes, Ordering::Relaxed);
        self.frames.push_back(item);
        // The newest stays: nearly all readers are about to take it.
        while self.frames.len() > 1
            && (self.frames.len() > FRAMES || self.bytes > FRAME_BYTES || self.memory.is_full())
        {
            self.pop();
        }
    }

    fn pop(&mut self) {
        if let Some(gone) = self.frames.pop_front() {
            let bytes = gone.frame.frame.len();
            self.bytes -= bytes;
            self.memory.used.fetch_sub(bytes, Ordering::Relaxed);
            self.floor = self.floor.max(gone.seq);
            while self.unreadable.front().is_some_and(|seq| *seq <= self.floor) {
                self.unreadable.pop_front();
            }
        }
    }

    fn clear(&mut self, floor: Seq) {
        while !self.frames.is_empty() {
            self.pop();
        }
        self.unreadable.clear();
        self.floor = floor;
    }
}

impl Tail {
    /// A tail that begins after `head`.
    pub(super) fn new(log: LogId, life: u64, head: Seq, memory: Arc<TailMemory>) -> Self {
        let start = StartPoint { start: head, head, more: false, fresh: true };
        let machine = Session::start::<LogFrame>(start, None, |_| ());
        let core = Core {
            machine,
            frames: VecDeque::new(),
            unreadable: VecDeque::new(),
            bytes: 0,
            floor: head,
            memory,
            looked: false,
        };
        Self {
            log,
            life,
            draw: rand::random(),
            core: Mutex::new(core),
            position: AtomicU64::new(head.get()),
            resets: AtomicU64::new(0),
            reset_to: AtomicU64::new(0),
            ended: AtomicBool::new(false),
            walking: AtomicBool::new(false),
            moved: AtomicBool::new(false),
            readers: Mutex::default(),
            gone: AtomicUsize::new(0),
            count: AtomicUsize::new(0),
            idle_since: Mutex::new(Instant::now()),
        }
    }

    /// The highest number that is held or gone.
    pub(super) fn position(&self) -> Seq {
        Seq::at(self.position.load(Ordering::Acquire))
    }

    /// Shows a frame to nobody any more, if it is held.
    pub(super) fn forget(&self, seq: Seq) {
        let mut core = self.core.lock();
        if let Ok(at) = core.frames.binary_search_by_key(&seq, |item| item.seq) {
            core.frames[at].expires_at = Millis(0);
        }
    }

    /// How often the store was restored below what was read here.
    pub(super) fn resets(&self) -> u64 {
        self.resets.load(Ordering::Acquire)
    }

    /// Where the tail went on after the store was restored the last time.
    pub(super) fn reset_to(&self) -> Seq {
        Seq::at(self.reset_to.load(Ordering::Acquire))
    }

    /// Whether the topic was removed.
    pub(super) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// The topic was removed: readers are told with the next walk.
    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::Release);
        self.moved.store(true, Ordering::SeqCst);
    }

    /// Passes an event to the machine.
    pub(super) fn step(&self, mut input: Input<LogFrame>, now: Millis) -> Wants {
        let mut core = self.core.lock();
        let is_look = matches!(input, Input::MoreAfter(_));
        if let Input::Page(page) = &mut input
            && core.looked
        {
            page.items.iter_mut().for_each(|item| item.frame.is_found = true);
            core.looked = page.more;
        }
        let before = core.machine.position();
        // The expiry of what is sent stands in the input alone.
        let expiries: Vec<(Seq, Millis)> = match &input {
            Input::Live(item) => vec![(item.seq, item.expires_at)],
            Input::Page(page) => page.items.iter().map(|item| (item.seq, item.expires_at)).collect(),
            _ => Vec::new(),
        };
        let mut expiries = expiries.into_iter();
        let (mut wants, mut outputs) = (Wants::default(), Vec::new());
        core.machine.step(input, now, |output| outputs.push(output));
        for output in outputs {
            match output {
                Output::Send(frame) => {
                    let expires_at = expiries.find(|(seq, _)| *seq == frame.seq).map(|(_, at)| at);
                    let expires_at = expires_at.unwrap_or(Millis(u64::MAX));
                    core.push(Item { seq: frame.seq, expires_at, frame });
                }
                Output::Gap { before, reason: GapReason::Unreadable, .. } => {
                    core.unreadable.push_back(Seq::at(before.get().saturating_sub(1)));
                }
                Output::Read { after, .. } => wants.read = Some(after),
                // Numbers that are gone, of which readers find nothing; the rest is for clients.
                Output::Gap { .. } | Output::CaughtUp(_) | Output::Cursor(_) => {}
            }
        }
        core.looked |= is_look && wants.read.is_some();
        let position = core.machine.position();
        if position < before {
            // The store was restored to a state below.
            core.clear(position);
            self.reset_to.store(position.get(), Ordering::Release);
            self.resets.fetch_add(1, Ordering::AcqRel);
        }
        self.position.store(position.get(), Ordering::Release);
        wants.walk |= position != before;
        if wants.walk {
            self.moved.store(true, Ordering::SeqCst);
        }
        wants
    }

    /// The first frame after a position, or that there is none up to the tail's position.
    pub(super) fn after(&self, after: Seq) -> Held {
        let core = self.core.lock();
        let position = core.machine.position();
        if after < core.floor {
            return Held::Below;
        }
        let from = core.frames.partition_point(|item| item.seq <= after);
        let next = core.frames.get(from);
        let upto = next.map_or(position, |item| item.seq).max(after);
        let is_passed = |seq: &&Seq| **seq > after && **seq <= upto;
        Held::Page(Page {
            after,
            items: next.cloned().into_iter().collect(),
            unreadable: core.unreadable.iter().filter(is_passed).copied().collect(),
            upto,
            more: upto < position,
        })
    }

    /// Adds a reader.
    pub(super) fn join(self: &Arc<Self>, handle: &Arc<SessionHandle>) -> Reading {
        self.count.fetch_add(1, Ordering::AcqRel);
        self.readers.lock().push(Arc::downgrade(handle));
        Reading { tail: Arc::clone(self), handle: Arc::downgrade(handle) }
    }

    /// A reader has left.
    fn left(&self) {
        if self.count.fetch_sub(1, Ordering::AcqRel) == 1 {
            *self.idle_since.lock() = Instant::now();
        }
    }

    /// Number of readers.
    pub(super) fn count(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }

    /// When the last reader left, if there is none.
    pub(super) fn idle_since(&self) -> Option<Instant> {
        (self.count() == 0).then(|| *self.idle_since.lock())
    }
}

/// A reader of a tail, until it is dropped.
pub(super) struct Reading {
    pub(super) tail: Arc<Tail>,
    handle: Weak<SessionHandle>,
}

impl Drop for Reading {
    fn drop(&mut self) {
        // Of a socket that ends, the entry is removed by a walk, with others: all leave at once
        // when a node drains. Of one that goes on, it must go now.
        if self.handle.strong_count() > 0 {
            // One entry alone: a watched topic that is joined meanwhile has another of the socket.
            let mut readers = self.tail.readers.lock();
            if let Some(at) = readers.iter().position(|reader| reader.ptr_eq(&self.handle)) {
                readers.swap_remove(at);
            }
        }
        self.tail.left();
    }
}

/// A reader of a socket at rest. It is told of what comes, and counted, as before.
pub(super) struct RestingReading {
    pub(super) tail: Arc<Tail>,
}

impl Reading {
    /// The same reader, at rest.
    pub(super) fn rest(mut self) -> RestingReading {
        // It keeps its entry.
        self.handle = Weak::new();
        self.tail.count.fetch_add(1, Ordering::AcqRel);
        RestingReading { tail: Arc::clone(&self.tail) }
    }
}

impl RestingReading {
    /// The same reader, awake. `handle` is that of its socket.
    pub(super) fn wake(self, handle: &Arc<SessionHandle>) -> Reading {
        self.tail.count.fetch_add(1, Ordering::AcqRel);
        Reading { tail: Arc::clone(&self.tail), handle: Arc::downgrade(handle) }
    }
}

impl Drop for RestingReading {
    fn drop(&mut self) {
        self.tail.left();
    }
}

#[cfg(test)]
mod tests;
