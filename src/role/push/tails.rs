//! The tails of a node, and what is done for them: reading, telling readers, looking.
//!
//! Nothing here runs on the thread that brought a message. That thread steps the tail and queues
//! what the tail wants.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures_util::FutureExt;
use parking_lot::Mutex;
use quick_cache::Weighter;
use quick_cache::sync::Cache;
use tokio::sync::{Notify, OnceCell, Semaphore};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::PushMetrics;
use super::availability::Availability;
use super::log_readers::Wanted;
use super::outbound::Outbound;
use super::registry::SessionHandle;
use super::sweep::{SWEEP_EVERY_CUT_OFF, SWEEP_JITTER};
use super::tail::{Block, LogFrame, Reading, Tail, TailMemory, Wants, encoded, page_of};
use super::walks::Walks;
use crate::backoff::{Backoff, around};
use crate::clock::Clock;
use crate::inbox::logs::{EVERYONES_LIFE, key};
use crate::inbox::topics::TopicRecipients;
use crate::inbox::{Change, InboxError, PageLimit, StartAt, Stores};
use crate::interest::Buckets;
use crate::message::{LogId, Message, Seq, TopicName};
use crate::role::reads::Reads;
use crate::role::shown;
use crate::session::Input;
use crate::tasks::raised;
use crate::telemetry::WAY;
use crate::topic::Delivery;
use crate::wire::peer::LogHint;

/// Reads of logs at the same time: half of what the node reads of inboxes.
const READS_IN_FLIGHT: usize = 32;
/// A page that a tail reads.
const PAGE: PageLimit = PageLimit { messages: 256, bytes: 1024 * 1024 };
/// Numbers of a block, and its largest payload: as many of the largest messages.
const BLOCK: u64 = 64;
const BLOCK_PAGE: PageLimit = PageLimit { messages: BLOCK as usize, bytes: BLOCK as usize * 16 * 1024 };
/// Shortest time between two forced sweeps.
const FORCED_SWEEP_PAUSE: Duration = Duration::from_secs(10);
/// Blocks that are expected to be kept.
const BLOCKS: usize = 1_000;
/// Delay between two tries of a read that the store did not answer, at first and at most.
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(5);
/// A tail whose last reader left this long ago is dropped.
const IDLE: Duration = Duration::from_secs(60);
/// When a new tail looks again: by then every router knows that this log is read here, or sends
/// everything to all (`seen_after` of `interest::redis`, and 250 ms until it is published).
pub(super) const LOOK_AGAIN: Duration = Duration::from_secs(3);
/// Tails in one question.
const LOT: usize = 1_000;

/// The outcome of a read that the end of the node cut off.
fn ended() -> InboxError {
    InboxError::Unavailable("the node has ended".to_owned())
}

/// What is to be read.
enum Read {
    /// For a tail, what comes after a position.
    Page(Arc<Tail>, Seq),
    /// For a session, what it wants.
    Block(Weak<SessionHandle>, Wanted),
}

/// What is to be done.
enum Work {
    Read(Read),
    /// Looks at logs.
    Look(HashSet<LogId>),
}

/// What is queued.
#[derive(Default)]
struct WorkQueue {
    /// At most one of each tail and of each socket.
    reads: VecDeque<Read>,
    /// Logs that are looked at together: when a node has just started, all that its sockets read.
    looks: HashSet<LogId>,
}

impl WorkQueue {
    fn next(&mut self) -> Option<Work> {
        if self.looks.is_empty() {
            return self.reads.pop_front().map(Work::Read);
        }
        Some(Work::Look(std::mem::take(&mut self.looks)))
    }
}

/// A tail, once it is there.
struct Slot {
    life: u64,
    tail: Arc<OnceCell<Arc<Tail>>>,
}

/// The weight of a block, in bytes.
#[derive(Clone)]
struct Weight;

impl Weighter<(LogId, u64, u64), Block> for Weight {
    fn weight(&self, _: &(LogId, u64, u64), block: &Block) -> u64 {
        let of = |item: &crate::session::Item<LogFrame>| item.frame.frame.len() + size_of_val(item);
        (block.items.iter().map(of).sum::<usize>() + 200) as u64
    }
}

/// Where devices without a position begin to read what goes to everyone, while its log has this
/// head. It is read once for all of them.
#[derive(Default)]
struct Newcomers {
    head: Seq,
    first: Arc<OnceCell<Result<Seq, InboxError>>>,
}

/// The tails of a node.
pub(super) struct Tails {
    stores: Stores,
    clock: Clock,
    metrics: PushMetrics,
    availability: Arc<Availability>,
    every: Duration,
    memory: Arc<TailMemory>,
    slots: Mutex<HashMap<LogId, Slot>>,
    /// What was read for sockets below the tails, by log, the draw of the tail and the number of
    /// the block. The last block of a log is kept as far as it went.
    blocks: Cache<(LogId, u64, u64), Block, Weight>,
    /// The reads of blocks, by log, the draw of the tail and the position that each begins after.
    block_reads: Reads<(LogId, u64, Seq), Result<Block, InboxError>>,
    /// How often blocks were thrown away because the store has something else by now.
    purges: AtomicU64,
    /// Where devices without a position begin to read what goes to everyone.
    newcomers: Mutex<Newcomers>,
    reads: Semaphore,
    walks: Walks,
    /// What waits for the sockets of this node.
    pub(super) outbound: Arc<Outbound>,
    works: Mutex<WorkQueue>,
    queued: Notify,
    forced: Notify,
    /// The logs that are read here are others: since when, at the earliest.
    pub(super) reads_changed: Notify,
    reads_changed_at: Mutex<Option<Instant>>,
    /// Routers may not know what is read here: it could not be published.
    is_unknown: AtomicBool,
    twice: Notify,
    sooner: Notify,
}

/// Limits of what tails hold and give out.
#[derive(Debug, Clone, Copy)]
pub struct LogReadingLimits {
    /// Bytes of frames and blocks that a node holds.
    pub memory_bytes: usize,
    /// Bytes that all walks of a node give to sockets per second; 0: any number.
    pub fanout_bytes_per_s: u64,
    /// Bytes that wait for all sockets of a node, beyond which logs give nothing.
    pub outbound_bytes: usize,
    /// Messages to everyone that a device without a position begins with.
    pub everyone_backlog: u64,
    /// Longest time until a position in a log is written, while its socket lives.
    pub position_every: Duration,
    /// Positions that are written per second, of sockets that live.
    pub positions_per_s: u32,
}

impl Default for LogReadingLimits {
    fn default() -> Self {
        Self {
            memory_bytes: 64 * 1024 * 1024,
            fanout_bytes_per_s: 64 * 1024 * 1024,
            outbound_bytes: 512 * 1024 * 1024,
            everyone_backlog: 20,
            position_every: Duration::from_secs(60),
            positions_per_s: 200,
        }
    }
}

/// Resolves at this moment; never where there is none.
pub(super) async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

impl Tails {
    /// Tails that read `stores`.
    pub(super) fn new(
        stores: Stores,
        (clock, metrics): (Clock, PushMetrics),
        availability: Arc<Availability>,
        every: Duration,
        limits: LogReadingLimits,
    ) -> Arc<Self> {
        let half = limits.memory_bytes / 2;
        let tails = Self {
            outbound: Outbound::new(limits.outbound_bytes, metrics.outbound.clone()),
            stores,
            clock,
            metrics,
            availability,
            every,
            memory: Arc::new(TailMemory::new(half)),
            slots: Mutex::default(),
            blocks: Cache::with_weighter(BLOCKS, half as u64, Weight),
            block_reads: Reads::new(|| Err(ended())),
            purges: AtomicU64::new(0),
            newcomers: Mutex::default(),
            reads: Semaphore::new(READS_IN_FLIGHT),
            walks: Walks::new(limits.fanout_bytes_per_s),
            works: Mutex::default(),
            queued: Notify::new(),
            forced: Notify::new(),
            reads_changed: Notify::new(),
            reads_changed_at: Mutex::default(),
            is_unknown: AtomicBool::new(false),
            twice: Notify::new(),
            sooner: Notify::new(),
        };
        Arc::new(tails)
    }

    /// Takes news about logs. Messages go to tails that are read here.
    pub(super) fn take(&self, hint: &LogHint) {
        match hint {
            LogHint::Message { log, message } => self.live(log, message),
            LogHint::Look(log) => self.look_at(log),
            LogHint::Memberships(_) => {}
        }
    }

    fn live(&self, log: &LogId, message: &Message) {
        if message.expires_at.0 == 0 {
            // It was ended before its time, and may stand in any block that was read of the log.
            self.purge_blocks(log);
        }
        let Some(tail) = self.find(log) else { return };
        let (id, seq) = (&message.id, message.seq);
        tracing::debug!(target: WAY, step = 7, %log, %id, %seq, readers = tail.count(), traceparent = shown(message), "fed to the tail of a log");
        let life = message.log_entry().map_or(EVERYONES_LIFE, |entry| entry.life);
        if life > tail.life {
            // It is not passed over: whoever reads the later life must find it above its position.
            return self.look_at(log);
        }
        let mut item = encoded(log, message);
        if life != tail.life {
            // Its number counts, and it is shown to nobody.
            item.expires_at = crate::message::Millis(0);
        }
        if item.expires_at <= self.clock.now() {
            tail.forget(item.seq);
        }
        self.step(&tail, Input::Live(item));
    }

    /// The tail of a log, if it is there.
    fn find(&self, log: &LogId) -> Option<Arc<Tail>> {
        self.slots.lock().get(log).and_then(|slot| slot.tail.get().cloned())
    }

    /// Number of sockets that read a log here.
    pub(super) fn readers(&self, log: &LogId) -> u64 {
        self.find(log).map_or(0, |tail| tail.count() as u64)
    }

    fn look_at(&self, log: &LogId) {
        if self.slots.lock().contains_key(log) {
            self.queue_look(log.clone());
        }
    }

    fn queue_read(&self, read: Read) {
        self.works.lock().reads.push_back(read);
        self.queued.notify_one();
    }

    fn queue_look(&self, log: LogId) {
        self.works.lock().looks.insert(log);
        self.queued.notify_one();
    }

    async fn next_work(&self) -> Work {
        loop {
            let queued = self.queued.notified();
            if let Some(next) = self.works.lock().next() {
                return next;
            }
            queued.await;
        }
    }

    fn step(&self, tail: &Arc<Tail>, input: Input<LogFrame>) {
        let resets = tail.resets();
        let Wants { read, walk } = tail.step(input, self.clock.now());
        if tail.resets() != resets {
            // The store was restored: what is kept may be of messages that it has no more.
            self.purge_blocks(&tail.log);
        }
        if let Some(after) = read {
            self.queue_read(Read::Page(Arc::clone(tail), after));
        }
        if walk {
            self.walks.tell(tail);
        }
    }

    /// Has the readers of all tails told.
    fn tell_all(&self) {
        let slots = self.slots.lock();
        for tail in slots.values().filter_map(|slot| slot.tail.get()) {
            tail.moved.store(true, Ordering::SeqCst);
            self.walks.tell(tail);
        }
    }

    fn note_change(&self) {
        self.reads_changed_at.lock().get_or_insert_with(Instant::now);
        self.reads_changed.notify_one();
    }

    /// The logs that are read here, or are about to be, and when the earliest change was that is
    /// not published yet, if there is one.
    pub(super) fn buckets(&self) -> (Buckets, Option<Instant>) {
        let changed_at = self.reads_changed_at.lock().take();
        (Buckets::of(self.slots.lock().keys()), changed_at)
    }

    /// Whether routers know what is read here. If not, all tails look every three seconds.
    pub(super) fn are_known(&self, known: bool) {
        if self.is_unknown.swap(!known, Ordering::SeqCst) == known && !known {
            self.sooner.notify_one();
        }
    }

    /// All tails look now, and again when every router knows which logs are read here.
    pub(super) fn look_twice(&self) {
        self.purge_all_blocks();
        self.twice.notify_one();
    }

    /// Begins to read a log in this life for a session; `None` if it is known that the life is
    /// over.
    ///
    /// # Errors
    ///
    /// The store's.
    pub(super) async fn read(
        &self,
        log: &LogId,
        life: u64,
        handle: &Arc<SessionHandle>,
    ) -> Result<Option<Reading>, InboxError> {
        loop {
            let Some((cell, _)) = self.slot(log, life) else { return Ok(None) };
            let was_there = cell.initialized();
            let tail = match cell.get_or_try_init(|| self.made(log, life)).await {
                Ok(tail) => Arc::clone(tail),
                Err(error) => {
                    self.forget_empty(log, &cell);
                    return Err(error);
                }
            };
            if !was_there {
                // What passed before it stood in its place is found by this look.
                self.queue_look(log.clone());
            }
            let slots = self.slots.lock();
            match slots.get(log) {
                // Under the lock: an idle tail must not be dropped now.
                Some(slot) if Arc::ptr_eq(&slot.tail, &cell) => return Ok(Some(tail.join(handle))),
                _ => {}
            }
        }
    }

    /// Makes those of these tails for which there is no place yet, by one question to the store.
    /// For the others [`Self::read`] waits, and it makes what is not made here: if there are fewer
    /// than two, that is as good.
    ///
    /// # Errors
    ///
    /// The store's.
    pub(super) async fn prepare(&self, logs: &[(LogId, u64)]) -> Result<(), InboxError> {
        let missing: Vec<&(LogId, u64)> = {
            let slots = self.slots.lock();
            logs.iter().filter(|(log, _)| !slots.contains_key(log)).collect()
        };
        if missing.len() < 2 {
            return Ok(());
        }
        // Their heads are read after their places are there.
        let place = |(log, life): &(LogId, u64)| {
            let (cell, is_new) = self.slot(log, *life)?;
            is_new.then(|| (log.clone(), *life, cell))
        };
        let places: Vec<_> = missing.into_iter().filter_map(place).collect();
        if places.is_empty() {
            return Ok(());
        }
        let names: Vec<LogId> = places.iter().map(|(log, ..)| log.clone()).collect();
        match self.stores.logs.heads(&names).await {
            Ok(heads) => {
                for ((log, life, cell), head) in places.into_iter().zip(heads) {
                    let tail = Tail::new(log.clone(), life, head, Arc::clone(&self.memory));
                    // Otherwise a session that waits for this one alone makes it.
                    if cell.set(Arc::new(tail)).is_ok() {
                        self.queue_look(log);
                    }
                }
                Ok(())
            }
            Err(error) => {
                places.into_iter().for_each(|(log, _, cell)| self.forget_empty(&log, &cell));
                Err(error)
            }
        }
    }

    /// Takes out a place in which no tail could be made, unless another one is made there.
    fn forget_empty(&self, log: &LogId, cell: &Arc<OnceCell<Arc<Tail>>>) {
        let mut slots = self.slots.lock();
        // Two: the place itself, and the caller.
        let is_unused = Arc::strong_count(cell) == 2 && !cell.initialized();
        if is_unused && slots.get(log).is_some_and(|slot| Arc::ptr_eq(&slot.tail, cell)) {
            slots.remove(log);
            self.note_change();
        }
    }

    /// The place of a tail of this life, and whether it was made by this call; `None` if a later
    /// life is read here.
    fn slot(&self, log: &LogId, life: u64) -> Option<(Arc<OnceCell<Arc<Tail>>>, bool)> {
        let mut slots = self.slots.lock();
        match slots.get(log) {
            Some(slot) if slot.life == life => Some((Arc::clone(&slot.tail), false)),
            Some(slot) if slot.life > life => None,
            earlier => {
                if let Some(tail) = earlier.and_then(|slot| slot.tail.get()) {
                    tail.end();
                    self.walks.tell(tail);
                }
                let slot = Slot { life, tail: Arc::default() };
                let cell = Arc::clone(&slot.tail);
                slots.insert(log.clone(), slot);
                self.note_change();
                Some((cell, true))
            }
        }
    }

    /// A new tail. It begins at the head, which is read after its place is there.
    async fn made(&self, log: &LogId, life: u64) -> Result<Arc<Tail>, InboxError> {
        let head = self.stores.logs.head(log).await?;
        Ok(Arc::new(Tail::new(log.clone(), life, head, Arc::clone(&self.memory))))
    }

    /// The position before the first message among the last `count` numbers of everyone's log; the
    /// head if there is none. A device that begins below would be told later of a gap, where
    /// nothing has ever been.
    ///
    /// # Errors
    ///
    /// The store's.
    pub(super) async fn first_of_last(&self, everyone: &Tail, count: u64) -> Result<Seq, InboxError> {
        let head = everyone.position();
        let known = {
            let mut newcomers = self.newcomers.lock();
            if newcomers.head != head {
                *newcomers = Newcomers { head, first: Arc::default() };
            }
            Arc::clone(&newcomers.first)
        };
        let first = known.get_or_init(|| self.read_first_of_last(everyone, head, count)).await.clone();
        if first.is_err() {
            // All who waited are told so; who comes later reads again.
            let mut newcomers = self.newcomers.lock();
            if Arc::ptr_eq(&newcomers.first, &known) {
                newcomers.first = Arc::default();
            }
        }
        first
    }

    async fn read_first_of_last(&self, everyone: &Tail, head: Seq, count: u64) -> Result<Seq, InboxError> {
        let mut after = Seq::at(head.get().saturating_sub(count));
        loop {
            let page = self.stores.logs.page(&everyone.log, everyone.life, after, BLOCK_PAGE).await?;
            let message = page.messages.first().map(|message| message.seq);
            match message.into_iter().chain(page.unreadable.first().copied()).min() {
                Some(first) => return Ok(Seq::at(first.get().saturating_sub(1)).min(head)),
                None if page.more && page.upto < head => after = page.upto,
                None => return Ok(head),
            }
        }
    }

    /// The position before the newest message of a log, among its last numbers; the head if there
    /// is none.
    ///
    /// # Errors
    ///
    /// The store's.
    pub(super) async fn before_newest(&self, tail: &Tail) -> Result<Seq, InboxError> {
        let head = tail.position();
        let mut after = Seq::at(head.get().saturating_sub(BLOCK));
        let mut newest = None;
        loop {
            let page = self.stores.logs.page(&tail.log, tail.life, after, BLOCK_PAGE).await?;
            newest = page.messages.last().map(|message| message.seq).or(newest);
            if !page.more || page.upto >= head || page.upto <= after {
                break;
            }
            after = page.upto;
        }
        Ok(newest.map_or(head, |seq| Seq::at(seq.get() - 1)))
    }

    /// Sockets were given so many bytes of logs.
    pub(super) fn given(&self, bytes: usize) {
        self.walks.given(bytes);
    }

    /// Reads what a session wants of the store. It arrives in its mailbox.
    pub(super) fn request(&self, handle: &Arc<SessionHandle>, wanted: Wanted) {
        self.queue_read(Read::Block(Arc::downgrade(handle), wanted));
    }

    /// All tails look soon, because hints were dropped.
    pub(super) fn force(&self) {
        self.purge_all_blocks();
        self.forced.notify_one();
    }

    /// Does what is queued, and sweeps, for ever.
    pub(super) async fn run(self: Arc<Self>) {
        let mut under_way = JoinSet::new();
        for _ in 0..tokio::runtime::Handle::current().metrics().num_workers() {
            let tails = Arc::clone(&self);
            under_way.spawn(async move { tails.walks.run().await });
        }
        let mut again: VecDeque<(Instant, LogId)> = VecDeque::new();
        let mut next_sweep = Instant::now() + self.pause();
        let mut not_before = Instant::now();
        let mut all_again = None;
        loop {
            let look_again = again.front().map_or(next_sweep, |(at, _)| (*at).min(next_sweep));
            tokio::select! {
                work = self.next_work() => {
                    if let Work::Look(logs) = &work {
                        let at = Instant::now() + LOOK_AGAIN;
                        again.extend(logs.iter().map(|log| (at, log.clone())));
                    }
                    under_way.spawn(Arc::clone(&self).work(work));
                }
                Some(ended) = under_way.join_next() => raised(ended),
                () = self.twice.notified() => {
                    all_again = Some(Instant::now() + LOOK_AGAIN);
                    under_way.spawn(Arc::clone(&self).sweep_all());
                }
                () = sleep_until(all_again) => {
                    all_again = None;
                    under_way.spawn(Arc::clone(&self).sweep_all());
                }
                // From this moment on, not from the next sweep on.
                () = self.sooner.notified() => next_sweep = next_sweep.min(Instant::now() + self.pause()),
                () = self.outbound.has_room_again() => self.tell_all(),
                () = self.forced_after(not_before) => {
                    not_before = Instant::now() + FORCED_SWEEP_PAUSE;
                    self.metrics.forced_sweeps.inc();
                    under_way.spawn(Arc::clone(&self).sweep_all());
                }
                () = tokio::time::sleep_until(look_again) => {
                    let now = Instant::now();
                    let due = again.partition_point(|(at, _)| *at <= now);
                    if due > 0 {
                        let logs = again.drain(..due).map(|(_, log)| log).collect();
                        under_way.spawn(Arc::clone(&self).work(Work::Look(logs)));
                    }
                    if next_sweep <= now {
                        next_sweep = now + self.pause();
                        under_way.spawn(Arc::clone(&self).sweep_all());
                    }
                }
            }
        }
    }

    async fn forced_after(&self, not_before: Instant) {
        tokio::time::sleep_until(not_before).await;
        self.forced.notified().await;
    }

    /// Time until the next sweep.
    fn pause(&self) -> Duration {
        let is_known = self.availability.bar().is_none() && !self.is_unknown.load(Ordering::SeqCst);
        // Routers do not know this node, or not what it reads, and messages pass it by.
        let every = if is_known { self.every } else { SWEEP_EVERY_CUT_OFF.min(self.every) };
        around(every, SWEEP_JITTER, &mut rand::rng())
    }

    async fn work(self: Arc<Self>, work: Work) {
        match work {
            Work::Read(Read::Page(tail, after)) => self.read_page(tail, after).await,
            Work::Read(Read::Block(handle, wanted)) => self.read_block(handle, wanted).await,
            Work::Look(logs) => {
                let tails: Vec<Arc<Tail>> = logs.iter().filter_map(|log| self.find(log)).collect();
                self.sweep(&tails).await;
            }
        }
    }

    /// Reads a page for a tail that is behind. While the store does not respond, it tries again
    /// with growing delays.
    async fn read_page(self: Arc<Self>, tail: Arc<Tail>, after: Seq) {
        let mut backoff = Backoff::new(RETRY_FIRST, RETRY_MAX);
        // Until nobody has read it for long: what it asked for is forgotten with it.
        while !tail.has_ended() && !self.drop_if_unread(&tail) {
            let page = {
                let Ok(_permit) = self.reads.acquire().await else { return };
                self.stores.logs.page(&tail.log, tail.life, after, PAGE).await
            };
            match page {
                // What follows is of a later life: that of this tail is over.
                Ok(page) if page.more && page.upto <= after => {
                    self.sweep(std::slice::from_ref(&tail)).await;
                }
                Ok(page) => {
                    self.metrics.pages.inc();
                    self.report_unreadable(&tail.log, &page.unreadable);
                    let page = page_of(&tail.log, after, page);
                    return self.step(&tail, Input::Page(page));
                }
                Err(error) => tracing::debug!(%error, log = %tail.log, "a page of a log could not be read"),
            }
            let delay = backoff.next(&mut rand::rng());
            tokio::time::sleep(delay).await;
        }
    }

    fn report_unreadable(&self, log: &LogId, unreadable: &[Seq]) {
        for seq in unreadable {
            self.metrics.unreadable.inc();
            tracing::warn!(%log, %seq, "a message in a log cannot be read, and is passed over");
        }
    }

    /// Reads the block around a position for a session that still exists. If the topic ends or the
    /// store is restored meanwhile, the session is told that there is none.
    async fn read_block(self: Arc<Self>, handle: Weak<SessionHandle>, wanted: Wanted) {
        let Wanted { tail, after, resets } = wanted;
        let tell = |block| {
            if let Some(handle) = handle.upgrade() {
                handle.mailbox.log_block(Arc::clone(&tail), block);
            }
        };
        let mut backoff = Backoff::new(RETRY_FIRST, RETRY_MAX);
        while handle.strong_count() > 0 {
            match self.block(&tail, after).await {
                _ if tail.has_ended() || tail.resets() != resets => return tell(None),
                Ok(block) if block.upto > after => return tell(Some(block)),
                // A server that was just replaced may not have it yet.
                Ok(_) => {}
                Err(error) => tracing::debug!(%error, log = %tail.log, "a block of a log could not be read"),
            }
            let delay = backoff.next(&mut rand::rng());
            tokio::time::sleep(delay).await;
        }
    }

    /// The block around a position, or what follows the position, if the block was cut below it
    /// because its messages are large. Sockets that want the same at the same time share a read.
    async fn block(self: &Arc<Self>, tail: &Arc<Tail>, after: Seq) -> Result<Block, InboxError> {
        let first = Seq::at(after.get() / BLOCK * BLOCK);
        let place = (tail.log.clone(), tail.draw, after.get() / BLOCK);
        if let Some(block) = self.blocks.get(&place).filter(|block| block.upto > after) {
            return Ok(block);
        }
        let block = self.read_together(tail, first).await?;
        if block.upto > after || after == first {
            return Ok(block);
        }
        self.read_together(tail, after).await
    }

    async fn read_together(self: &Arc<Self>, tail: &Arc<Tail>, after: Seq) -> Result<Block, InboxError> {
        let (this, tail) = (Arc::clone(self), Arc::clone(tail));
        let of = (tail.log.clone(), tail.draw, after);
        self.block_reads.get(&of, move || async move { this.read_after(&tail, after).await }.boxed()).await
    }

    /// Reads what follows a position, up to the end of its block, and keeps it if it is a block
    /// from its beginning.
    async fn read_after(&self, tail: &Tail, after: Seq) -> Result<Block, InboxError> {
        let number = after.get() / BLOCK;
        let last = Seq::at((number + 1) * BLOCK);
        let place = after.get().is_multiple_of(BLOCK).then(|| (tail.log.clone(), tail.draw, number));
        let whole = |place| self.blocks.get(place).filter(|block| block.upto >= last);
        // The read before this one may have read all of it.
        if let Some(block) = place.as_ref().and_then(whole) {
            return Ok(block);
        }
        let Ok(_permit) = self.reads.acquire().await else { return Err(ended()) };
        let purges = self.purges.load(Ordering::SeqCst);
        let page = self.stores.logs.page(&tail.log, tail.life, after, BLOCK_PAGE).await?;
        self.metrics.pages.inc();
        let mut page = page_of(&tail.log, after, page);
        // What begins above the block is kept as it is: a long run that has expired is passed over
        // at once.
        if page.items.first().is_some_and(|item| item.seq <= last) {
            page.items.retain(|item| item.seq <= last);
            page.unreadable.retain(|seq| *seq <= last);
            page.upto = page.upto.min(last);
        }
        let block = Arc::new(page);
        if let Some(place) = place {
            self.blocks.insert(place.clone(), Arc::clone(&block));
            if self.purges.load(Ordering::SeqCst) != purges {
                // What was thrown away meanwhile may have been read before.
                self.blocks.remove(&place);
            }
        }
        Ok(block)
    }

    /// Throws away what was read of a log.
    fn purge_blocks(&self, log: &LogId) {
        self.purges.fetch_add(1, Ordering::SeqCst);
        self.blocks.retain(|(of, ..), _| of != log);
    }

    /// Throws away what was read of all logs: a hint that a message was ended may be lost.
    fn purge_all_blocks(&self) {
        self.purges.fetch_add(1, Ordering::SeqCst);
        self.blocks.clear();
    }

    async fn sweep_all(self: Arc<Self>) {
        let all: Vec<Arc<Tail>> = {
            let mut slots = self.slots.lock();
            let before = slots.len();
            // Places that nobody makes a tail in: whoever wanted to has gone, or the store failed.
            slots.retain(|_, slot| slot.tail.initialized() || Arc::strong_count(&slot.tail) > 1);
            if slots.len() < before {
                self.note_change();
            }
            slots.values().filter_map(|slot| slot.tail.get().cloned()).collect()
        };
        self.sweep(&all).await;
        for tail in &all {
            self.drop_if_unread(tail);
            // Readers are compared with their tail, also where nothing has moved.
            tail.moved.store(true, Ordering::SeqCst);
            self.walks.tell(tail);
        }
    }

    /// Asks for each of these tails whether there is more, and whether its topic lives.
    async fn sweep(&self, tails: &[Arc<Tail>]) {
        for lot in tails.chunks(LOT) {
            if let Err(error) = self.ask(lot).await {
                tracing::debug!(%error, "logs could not be looked at; the sweep comes round again");
            }
        }
    }

    async fn ask(&self, tails: &[Arc<Tail>]) -> Result<(), InboxError> {
        let asked: Vec<(&Arc<Tail>, Seq)> = tails.iter().map(|tail| (tail, tail.position())).collect();
        let queries = asked.iter().map(|(tail, at)| (tail.log.clone(), StartAt::After(*at))).collect();
        let answers = self.stores.logs.positions(queries).await?;
        for ((tail, position), answer) in asked.into_iter().zip(answers) {
            self.metrics.swept.inc();
            if answer.more {
                self.step(tail, Input::MoreAfter(position));
            } else if answer.head < position {
                let shown = Change::Shown { user: key(&tail.log), upto: position };
                self.stores.logs.store().update(vec![shown]).await?;
                let head = answer.head;
                tracing::warn!(log = %tail.log, %position, %head, "a log was read further than the store has it (a restore)");
                self.step(tail, Input::Reset(position, head));
            }
        }
        let named: Vec<(&Arc<Tail>, TopicName)> =
            tails.iter().filter_map(|tail| Some((tail, tail.log.topic()?.clone()))).collect();
        if named.is_empty() {
            return Ok(());
        }
        let names = named.iter().map(|(_, name)| name.clone()).collect();
        for ((tail, _), topic) in named.into_iter().zip(self.stores.topics.topics_named(names).await?) {
            let life = topic.filter(|topic| topic.delivery == Delivery::Log);
            if life.map(|topic| topic.version.life) != Some(tail.life) && self.is_over(tail).await? {
                self.end(tail);
            }
        }
        Ok(())
    }

    /// Whether the life that a tail reads is over. It is asked in the way that a publish asks,
    /// which is not deceived by a server that was replaced.
    async fn is_over(&self, tail: &Tail) -> Result<bool, InboxError> {
        let Some(name) = tail.log.topic() else { return Ok(false) };
        Ok(match self.stores.topics.recipients(name.clone(), None).await? {
            TopicRecipients::NoTopic => true,
            TopicRecipients::Log(topic) | TopicRecipients::Known(topic) | TopicRecipients::Read(topic, _) => {
                topic.version.life > tail.life
            }
        })
    }

    /// The life that a tail reads is over.
    fn end(&self, tail: &Arc<Tail>) {
        self.take_out(tail, |_| true);
        tail.end();
        self.walks.tell(tail);
    }

    fn drop_if_unread(&self, tail: &Arc<Tail>) -> bool {
        self.take_out(tail, |tail| tail.idle_since().is_some_and(|since| since.elapsed() >= IDLE))
    }

    /// Takes a tail out, if it is there and `only` says so. Returns whether it was.
    fn take_out(&self, tail: &Arc<Tail>, only: impl Fn(&Tail) -> bool) -> bool {
        let mut slots = self.slots.lock();
        let is_it =
            |slot: &Slot| slot.tail.get().is_some_and(|known| Arc::ptr_eq(known, tail) && only(known));
        slots.get(&tail.log).is_some_and(is_it) && slots.remove(&tail.log).is_some()
    }
}
