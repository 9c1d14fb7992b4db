//! The serving stage of a connection: from `welcome` to the last frame.
//!
//! It owns the socket, the session and the queue between them, and waits for one of five things:
//!
//! 1. the socket takes more of what is queued,
//! 2. mail: live messages, a page, orders of the node,
//! 3. a frame of the client,
//! 4. the result of a `refresh`,
//! 5. its timer: the next ping, the end of the token, the end after a drain.
//!
//! Writing comes first, so that a queue never grows while the socket would take it. Mail and frames
//! take turns.
//!
//! # Inline sends
//!
//! The connection's task normally does all I/O. If nobody holds the session's lock and the mailbox
//! is empty, the thread that delivers a live message runs the session and writes what it sends
//! ([`InlineSend`], called from `deliver` in [`push`](super) by [`SessionHandle::send_inline`]).
//! Waking the task would cost more than the write, and most messages go to idle sessions
//! (docs/decisions/001-inline-sends.md). That is why there is no `select!` here: the state that a
//! send needs must be reachable without running the task.
//!
//! # Locking
//!
//! One lock per session, held while the session is polled or written to, never across an await. An
//! inline sender uses `try_lock` and falls back to the mailbox.

mod clocks;
mod logs;
mod watching;

use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::sink::SinkExt;
use parking_lot::Mutex;
use tokio::time::{Instant, Sleep};

use super::PushMetrics;
use super::config::LiveLimits;
use super::connection::read_frame;
use super::cursors::CursorWriter;
use super::displaced::DisplacedSet;
use super::end::{End, Socket, farewell};
use super::log_attach::{LogAttacher, LogsAttached, Watched, shown};
use super::log_positions::LogPositions;
use super::log_readers::{Act, LogReaders, LogStart, Next, Resting};
use super::mailbox::{InboxFrame, LogMail, Mail};
use super::outbound::Waiting;
use super::page_reads::PageReads;
use super::reconnect::ReconnectWindow;
use super::refresh::Refresher;
use super::registry::{InlineSend, RegistrationGuard, SessionHandle};
use super::tokens::Known;
use super::welcome::Welcomer;
use crate::backoff::between;
use crate::clock::Clock;
use crate::inbox::UserPosition;
use crate::message::{Millis, Seq, TopicName};
use crate::session::{Input, Item, Output, Session, StartPoint};
use crate::telemetry::Counted;
use crate::wire::close::CloseCode;
use crate::wire::frame::{ClientFrame, OfLog, ServerFrame};
use crate::wire::refusal::RefusalReason;
use crate::wire::socket::{Incoming, Outgoing, SocketError};
use clocks::Clocks;
use watching::Watching;

/// Bytes queued for one socket above which its session reads the inbox instead. With one page (at
/// most 102 KiB, see [`PAGE`](super::page_reads::PAGE)) it stays below 256 KiB (docs/design.md,
/// section 11).
const HIGH_WATER_BYTES: usize = 128 * 1024;
/// Bytes queued below which the session may send again.
const LOW_WATER_BYTES: usize = 32 * 1024;
/// The WebSocket layer is flushed once this many bytes or more were given to it. Frames of logs are
/// taken until as many are queued: one or two.
const FEED_BYTES: usize = 4 * 1024;
/// The same while little waits for all sockets of the node together. A write of several frames
/// costs the kernel less than as many writes.
const FEED_BYTES_AT_EASE: usize = 16 * 1024;
/// Pings that may go unanswered.
const UNANSWERED_PINGS: u32 = 2;

/// Frames of logs that one poll takes before it looks whether others should have their turn. The
/// last lot may go beyond it.
const LOG_FRAMES_PER_POLL: usize = 32;

/// What all sessions of a node use while they serve.
pub(super) struct ServingContext {
    pub(super) ping_every: Duration,
    pub(super) live: Arc<LiveLimits>,
    pub(super) metrics: PushMetrics,
    pub(super) clock: Clock,
    pub(super) cursors: Arc<CursorWriter>,
    pub(super) log_positions: Arc<LogPositions>,
    pub(super) logs: Arc<LogAttacher>,
    pub(super) reads: Arc<PageReads>,
    pub(super) refresher: Arc<Refresher>,
    pub(super) welcomer: Welcomer,
    pub(super) window: Arc<ReconnectWindow>,
    pub(super) displaced: Arc<DisplacedSet>,
}

/// A client that has shown who it is and is registered.
pub(super) struct Attached {
    pub(super) known: Known,
    pub(super) handle: RegistrationGuard,
    pub(super) position: UserPosition,
    /// Where a device without a cursor was made to begin.
    pub(super) began: Option<Seq>,
    /// A `heartbeat` frame comes beside each ping.
    pub(super) heartbeat: bool,
    /// Most messages that are sent ahead of the client's acks.
    pub(super) window: Option<u32>,
    /// What it reads of logs, if the client understands them.
    pub(super) logs: Option<LogsAttached>,
    /// What the client would get if it understood it.
    pub(super) missing: &'static [&'static str],
    /// When its socket was accepted.
    pub(super) accepted_at: Instant,
}

/// An event of the serving stage.
enum Event {
    /// The queue has drained to [`LOW_WATER_BYTES`].
    HasRoom,
    Mail(Box<Mail>),
    Frame(Incoming),
    Refreshed(Result<Known, End>),
    /// The logs that the user has joined, by the number of changes.
    Joined(u64, Vec<LogStart>),
    /// A topic that the client watches from now on, or that cannot be watched.
    Watched(TopicName, Watched),
    Timer,
    Fault(SocketError),
    Over,
}

/// A session that serves, shared by its task and by threads that send inline; empty when it has
/// ended.
pub(super) struct Shared<S>(Mutex<Option<Serving<S>>>);

impl<S: Socket + 'static> Shared<S> {
    pub(super) fn new(serving: Serving<S>) -> Arc<Self> {
        let handle = Arc::clone(&serving.handle);
        let shared = Arc::new(Self(Mutex::new(Some(serving))));
        let weak = Arc::downgrade(&shared);
        handle.served_by(weak);
        shared
    }

    pub(super) async fn serve(self: Arc<Self>) {
        poll_fn(|cx| self.poll_end(cx)).await.await;
    }

    /// Serves. Ready with the end of the connection. The end is boxed only when it comes, so that a
    /// serving connection reserves no memory for it.
    fn poll_end(&self, cx: &mut Context<'_>) -> Poll<BoxFuture<'static, ()>> {
        let mut place = self.0.lock();
        let Some(serving) = place.as_mut() else { return Poll::Pending };
        serving.set_task(cx.waker());
        let end = loop {
            let Poll::Ready(event) = serving.poll_event(cx) else {
                serving.rest_of_logs();
                return Poll::Pending;
            };
            if let Err(end) = serving.handle_event(event) {
                break end;
            }
        };
        place.take().map_or(Poll::Pending, |serving| Poll::Ready(serving.leave(end).boxed()))
    }
}

impl<S: Socket + 'static> InlineSend for Shared<S> {
    fn send(&self, item: Item<InboxFrame>) -> Option<Item<InboxFrame>> {
        match self.0.try_lock().as_deref_mut() {
            Some(Some(serving)) => serving.send_inline(item),
            _ => Some(item),
        }
    }

    fn look_at_logs(&self) -> bool {
        match self.0.try_lock().as_deref_mut() {
            Some(Some(serving)) => serving.look_inline(),
            _ => false,
        }
    }
}

/// The serving stage.
pub(super) struct Serving<S> {
    context: Arc<ServingContext>,
    socket: S,
    session: Session,
    queue: VecDeque<Outgoing>,
    /// Bytes in the queue.
    queued_bytes: usize,
    /// Bytes given to the WebSocket layer that are not known to be written.
    unflushed_bytes: usize,
    /// The same two, as they count for the node.
    waiting: Waiting,
    /// Wakes the task that serves.
    task: Option<Waker>,
    /// An event that happened during an inline send, for the task.
    noticed: Option<Box<Event>>,
    handle: RegistrationGuard,
    /// The kernel takes no more bytes for now.
    blocked: bool,
    told_full: bool,
    frames_first: bool,
    heartbeat: bool,
    /// The timer was polled since it was set, and holds the task's waker.
    timer_asked: bool,
    unanswered: u32,
    frames_this_second: u32,
    second_began: Instant,
    refresh: Option<BoxFuture<'static, Result<Known, End>>>,
    /// What is read of logs.
    logs: OfLogs,
    timer: Pin<Box<Sleep>>,
    next_ping: Instant,
    token_ends: Instant,
    close_at: Option<Instant>,
    clocks: Clocks,
    _counted: (Counted, Counted),
}

/// What a session reads of logs.
enum OfLogs {
    /// Nothing: the client does not understand them.
    Nothing,
    Awake(Box<Logs>),
    /// There is no news for the client.
    Resting(Resting),
}

impl OfLogs {
    /// The readers, if they are awake.
    fn awake(&mut self) -> Option<&mut Logs> {
        match self {
            Self::Awake(logs) => Some(logs),
            Self::Nothing | Self::Resting(_) => None,
        }
    }

    /// Whether the client understands them.
    const fn are_read(&self) -> bool {
        !matches!(self, Self::Nothing)
    }
}

/// What a session reads of logs, awake.
struct Logs {
    readers: LogReaders,
    inbox_was_level: bool,
    /// Topics that the user has joined, being found out.
    joining: Option<BoxFuture<'static, (u64, Vec<LogStart>)>>,
    watching: Watching,
    /// What readers want done, in their order; empty between two events.
    acts: Vec<Act>,
}

impl<S: Socket> Serving<S> {
    /// Sends `welcome` and begins to serve. `connection` counts the connection.
    pub(super) fn begin(
        context: Arc<ServingContext>,
        socket: S,
        attached: Attached,
        connection: Counted,
    ) -> Self {
        let Attached { known, handle, position, began, heartbeat, window, logs, missing, accepted_at } =
            attached;
        let session_counted = Counted::in_gauge(&context.metrics.sessions);
        let now = Instant::now();
        // The first ping comes at a random time; otherwise a restarted node would ping all clients
        // at the same time for ever.
        let next_ping = now + between(Duration::ZERO, context.ping_every, &mut rand::rng());
        let token_ends = now + until(known.expires_at_s, context.clock.now());
        let positions = logs.as_ref().map(|logs| shown(&logs.starts));
        let welcome = context.welcomer.frame(
            &handle,
            &known,
            (position.start, began, heartbeat),
            (positions.as_deref(), missing),
        );
        let mut outputs = Vec::with_capacity(2);
        let start =
            StartPoint { start: position.start, head: position.head, more: position.more, fresh: false };
        let session = Session::start(start, window, |output| outputs.push(output));
        let waiting = Waiting::new(&context.logs.tails.outbound);
        let mut this = Self {
            timer: Box::pin(tokio::time::sleep_until(next_ping.min(token_ends))),
            context,
            socket,
            handle,
            session,
            queue: VecDeque::new(),
            queued_bytes: 0,
            unflushed_bytes: 0,
            waiting,
            blocked: false,
            told_full: false,
            frames_first: false,
            heartbeat,
            refresh: None,
            logs: OfLogs::Nothing,
            timer_asked: false,
            task: None,
            noticed: None,
            next_ping,
            unanswered: 0,
            token_ends,
            close_at: None,
            clocks: Clocks::default(),
            frames_this_second: 0,
            second_began: now,
            _counted: (connection, session_counted),
        };
        this.context.metrics.welcomed.inc();
        this.push(Outgoing::Text(welcome));
        this.context.metrics.attach.observe(accepted_at.elapsed());
        if let Some(LogsAttached { readers, starts }) = logs {
            this.begin_logs(*readers, starts, known.watch);
        }
        outputs.into_iter().for_each(|output| this.perform(output));
        this.handle.set_position(this.session.position());
        this.look_whether_level();
        this.look_at_logs();
        this
    }

    async fn leave(self, end: End) {
        let Self { context, mut socket, handle, logs, clocks, _counted, .. } = self;
        clocks.end(&context);
        if logs.are_read() {
            context.log_positions.hurry(&handle.user, &handle.device);
        }
        // Unregister before the farewell: the place is free at once.
        drop(handle);
        drop(logs);
        farewell(&mut socket, end, context.window.hint()).await;
    }

    /// From now on `waker` wakes the task that serves.
    fn set_task(&mut self, waker: &Waker) {
        if !self.task.as_ref().is_some_and(|known| known.will_wake(waker)) {
            self.task = Some(waker.clone());
            self.timer_asked = false;
        }
    }

    /// Sends a live message on behalf of the task, or returns it: then it must go through the
    /// mailbox (mail or an event comes before it, or the task has not run yet).
    fn send_inline(&mut self, item: Item<InboxFrame>) -> Option<Item<InboxFrame>> {
        if self.noticed.is_some() || !self.handle.mailbox.is_empty() {
            return Some(item);
        }
        // Taken out, because `poll_write` borrows all of `self`. The socket keeps this waker: what
        // does not fit now is written by the task.
        let Some(task) = self.task.take() else { return Some(item) };
        self.step(Input::Live(item));
        if let Poll::Ready(event) = self.poll_write(&mut Context::from_waker(&task)) {
            self.noticed = Some(Box::new(event));
            task.wake_by_ref();
        }
        self.task = Some(task);
        None
    }

    /// Looks at the logs on behalf of the task and writes. Returns false if the task must look.
    fn look_inline(&mut self) -> bool {
        match &self.logs {
            OfLogs::Nothing => return true,
            OfLogs::Resting(resting) if !resting.has_news() => return true,
            OfLogs::Resting(_) | OfLogs::Awake(_) => {}
        }
        if self.noticed.is_some() || !self.handle.mailbox.is_empty() {
            return false;
        }
        let Some(task) = self.task.take() else { return false };
        self.look_at_logs();
        if let Poll::Ready(event) = self.poll_write(&mut Context::from_waker(&task)) {
            self.noticed = Some(Box::new(event));
            task.wake_by_ref();
        }
        self.task = Some(task);
        self.rest_of_logs();
        true
    }

    fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        if let Some(event) = self.noticed.take() {
            return Poll::Ready(*event);
        }
        if let Poll::Ready(event) = self.poll_write(cx) {
            return Poll::Ready(event);
        }
        // Mail first after a frame or a pause, frames first after mail.
        let frames_first = std::mem::take(&mut self.frames_first);
        if frames_first && let Poll::Ready(event) = self.poll_frame(cx) {
            return Poll::Ready(event);
        }
        if let Poll::Ready(mail) = self.handle.mailbox.poll_take(cx) {
            self.frames_first = true;
            return Poll::Ready(Event::Mail(mail));
        }
        if !frames_first && let Poll::Ready(event) = self.poll_frame(cx) {
            return Poll::Ready(event);
        }
        if let Some(refresh) = &mut self.refresh
            && let Poll::Ready(refreshed) = refresh.poll_unpin(cx)
        {
            self.refresh = None;
            return Poll::Ready(Event::Refreshed(refreshed));
        }
        if let Some(logs) = self.logs.awake()
            && let Some(joining) = &mut logs.joining
            && let Poll::Ready((changes, starts)) = joining.poll_unpin(cx)
        {
            logs.joining = None;
            return Poll::Ready(Event::Joined(changes, starts));
        }
        if let Some(logs) = self.logs.awake()
            && let Poll::Ready((topic, watched)) = logs.watching.poll(cx)
        {
            return Poll::Ready(Event::Watched(topic, watched));
        }
        self.poll_timer(cx)
    }

    /// `Sleep` keeps the waker it was last polled with, so it is not polled again before its
    /// deadline.
    fn poll_timer(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        if self.timer_asked && !self.timer.is_elapsed() {
            return Poll::Pending;
        }
        // `unconstrained`: with an exhausted coop budget `poll` would not store the waker.
        let elapsed = pin!(tokio::task::unconstrained(self.timer.as_mut())).poll(cx);
        self.timer_asked = elapsed.is_pending();
        elapsed.map(|()| Event::Timer)
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        self.socket.poll_next_unpin(cx).map(|next| match next {
            Some(Ok(incoming)) => Event::Frame(incoming),
            Some(Err(fault)) => Event::Fault(fault),
            None => Event::Over,
        })
    }

    /// Writes as much as the socket takes. Ready with [`Event::HasRoom`] when a full queue has
    /// drained.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        let mut frames = 0;
        loop {
            let feed = self.feed_bytes();
            while self.unflushed_bytes < feed && !self.queue.is_empty() {
                match self.socket.poll_ready_unpin(cx) {
                    Poll::Ready(Ok(())) => {}
                    Poll::Ready(Err(fault)) => return Poll::Ready(Event::Fault(fault)),
                    Poll::Pending => break,
                }
                let Some(next) = self.queue.pop_front() else { break };
                let bytes = size(&next);
                self.queued_bytes -= bytes;
                self.unflushed_bytes += bytes;
                if let Err(fault) = self.socket.start_send_unpin(next) {
                    return Poll::Ready(Event::Fault(fault));
                }
            }
            if self.unflushed_bytes == 0 {
                // The socket takes more. Logs give it, up to what is flushed at once.
                if frames >= LOG_FRAMES_PER_POLL {
                    cx.waker().wake_by_ref();
                    break;
                }
                let taken = self.take_of_logs();
                frames += taken;
                if taken == 0 {
                    break;
                }
                continue;
            }
            match self.socket.poll_flush_unpin(cx) {
                Poll::Ready(Ok(())) => {
                    self.unflushed_bytes = 0;
                    if std::mem::take(&mut self.blocked) {
                        // A full socket has room again: somebody reads, which is a sign of life.
                        self.has_answered();
                    }
                }
                Poll::Ready(Err(fault)) => return Poll::Ready(Event::Fault(fault)),
                Poll::Pending => {
                    self.blocked = true;
                    break;
                }
            }
        }
        if self.queue.is_empty() {
            // Freed, not kept: the allocator gives the next socket the same block, which is still
            // in the cache.
            self.queue = VecDeque::new();
        }
        self.waiting.set(self.queued_bytes + self.unflushed_bytes);
        if self.told_full && self.queued_bytes + self.unflushed_bytes <= LOW_WATER_BYTES {
            self.told_full = false;
            return Poll::Ready(Event::HasRoom);
        }
        Poll::Pending
    }

    /// Bytes that the WebSocket layer is given before it is flushed.
    fn feed_bytes(&self) -> usize {
        if self.context.logs.tails.outbound.is_at_ease() { FEED_BYTES_AT_EASE } else { FEED_BYTES }
    }

    fn handle_event(&mut self, event: Event) -> Result<(), End> {
        match event {
            Event::HasRoom => self.step(Input::Writable),
            Event::Mail(mail) => self.handle_mail(*mail)?,
            Event::Frame(incoming) => self.handle_frame(incoming)?,
            Event::Refreshed(known) => self.refreshed(known?)?,
            Event::Joined(changes, starts) => self.joined(changes, starts),
            Event::Watched(topic, watched) => self.watched(topic, watched),
            Event::Timer => self.timer()?,
            Event::Fault(fault) => return Err(fault.into()),
            Event::Over => return Err(End::Gone),
        }
        Ok(())
    }

    fn handle_mail(&mut self, mail: Mail) -> Result<(), End> {
        if let Some(orders) = mail.orders {
            if let Some((code, why)) = orders.close {
                return Err(match code {
                    CloseCode::Unauthorized => End::refused(RefusalReason::TokenRevoked, why),
                    code => End::close(code, why),
                });
            }
            if let Some(order) = orders.move_to {
                if self.logs.are_read() {
                    self.context.log_positions.hurry(&self.handle.user, &self.handle.device);
                }
                self.push(Outgoing::Text(order.frame));
                self.clocks.moved();
                if let Some(after) = order.close_after {
                    self.close_at = Some(Instant::now() + after);
                    self.reset_timer();
                }
            }
        }
        // Before live messages: they carry numbers of the restored store, and would move the
        // position that the reset names.
        if let Some((position, to)) = mail.reset {
            self.step(Input::Reset(position, to));
            self.handle.set_acked(self.session.acked());
        }
        if let Some(page) = mail.page {
            self.step(Input::Page(page));
        }
        for item in mail.live {
            self.step(Input::Live(item));
        }
        // After the live messages, because those in the mailbox came before the loss.
        if mail.lost {
            self.step(Input::Lost);
        }
        if let Some(position) = mail.more_after {
            self.step(Input::MoreAfter(position));
        }
        if let Some(mail) = mail.logs {
            self.handle_log_mail(*mail);
        }
        Ok(())
    }

    fn handle_frame(&mut self, incoming: Incoming) -> Result<(), End> {
        self.has_answered();
        self.count_frame()?;
        let text = match incoming {
            Incoming::Alive => return Ok(()),
            Incoming::Closed => return Err(End::Gone),
            Incoming::Binary => return Err(End::close(CloseCode::BadFrame, "text is due, not binary")),
            Incoming::Text(text) => text,
        };
        match read_frame(&text)? {
            ClientFrame::Ack(seq) => {
                self.clocks.acked(seq, &self.context);
                self.step(Input::Ack(seq));
            }
            ClientFrame::AckLogs(acks) => self.acked(*acks),
            ClientFrame::Watch(topic, since) => self.watch(topic, since)?,
            ClientFrame::Unwatch(topic) => self.unwatch(&topic),
            ClientFrame::Ping => self.reply(&ServerFrame::Pong),
            ClientFrame::Refresh(token) => self.begin_refresh(token)?,
            ClientFrame::Auth(_) => {
                return Err(End::close(CloseCode::BadFrame, "auth comes once; refresh brings a new token"));
            }
        }
        Ok(())
    }

    /// There was a sign of life.
    fn has_answered(&mut self) {
        if self.unanswered > 0 {
            self.handle.set_silent(false);
        }
        self.unanswered = 0;
    }

    fn count_frame(&mut self) -> Result<(), End> {
        if self.second_began.elapsed() >= Duration::from_secs(1) {
            self.second_began = Instant::now();
            self.frames_this_second = 0;
        }
        self.frames_this_second += 1;
        if self.frames_this_second > self.context.live.client_frames_per_s() {
            return Err(End::close(CloseCode::RateLimited, "too many frames in one second"));
        }
        Ok(())
    }

    /// Checks in the background that the new token is valid and not revoked.
    fn begin_refresh(&mut self, token: String) -> Result<(), End> {
        if self.refresh.is_some() {
            return Err(End::close(CloseCode::RateLimited, "one refresh at a time"));
        }
        let (user, position) = (self.handle.user.clone(), self.session.position());
        self.refresh = Some(Arc::clone(&self.context.refresher).refresh(token, user, position).boxed());
        Ok(())
    }

    fn refreshed(&mut self, known: Known) -> Result<(), End> {
        self.handle.set_token_iat_s(known.issued_at_s);
        self.token_ends = Instant::now() + until(known.expires_at_s, self.context.clock.now());
        self.reset_timer();
        self.may_watch(known.watch);
        let expires_at = Millis(known.expires_at_s.saturating_mul(1000)).rfc3339();
        self.reply(&ServerFrame::Refreshed { expires_at });
        Ok(())
    }

    fn timer(&mut self) -> Result<(), End> {
        let now = Instant::now();
        if self.token_ends <= now {
            return Err(match self.refresh {
                None => End::refused(RefusalReason::TokenExpired, "the token has expired"),
                // The client has done its part.
                Some(_) => End::close(CloseCode::Overloaded, "the new token cannot be checked now"),
            });
        }
        if self.close_at.is_some_and(|at| at <= now) {
            return Err(End::close(CloseCode::Draining, "the node is leaving"));
        }
        if self.next_ping <= now {
            if self.unanswered >= UNANSWERED_PINGS {
                return Err(End::close(CloseCode::HeartbeatTimeout, "two pings without a sign of life"));
            }
            self.unanswered += 1;
            self.handle.set_silent(true);
            self.next_ping = now + self.context.ping_every;
            self.push(Outgoing::Ping);
            if self.heartbeat && !self.told_full {
                self.push(Outgoing::Text(ServerFrame::Heartbeat.encode()));
            }
        }
        self.reset_timer();
        Ok(())
    }

    fn reset_timer(&mut self) {
        let next = self.next_ping.min(self.token_ends);
        self.timer_asked = false;
        self.timer.as_mut().reset(self.close_at.map_or(next, |at| at.min(next)));
    }

    /// Passes one event to the session and performs its actions.
    fn step(&mut self, input: Input<InboxFrame>) {
        let now = self.context.clock.now();
        let Self { session, queue, queued_bytes, handle, context, logs, clocks, .. } = self;
        let has_logs = logs.are_read();
        clocks.begin(&input, context, handle);
        session.step(input, now, |output| {
            clocks.note(&output, now, context);
            perform(output, queue, queued_bytes, (handle, has_logs), context);
        });
        self.handle.set_position(self.session.position());
        self.look_whether_full();
        self.look_whether_level();
    }

    fn look_whether_full(&mut self) {
        if !self.told_full && self.queued_bytes + self.unflushed_bytes >= HIGH_WATER_BYTES {
            self.told_full = true;
            self.context.metrics.demoted.inc();
            self.step(Input::Blocked);
        }
    }

    /// Queues the answer to a frame of the client. Not if the client reads nothing, because it
    /// could make us queue without end.
    fn reply(&mut self, frame: &ServerFrame) {
        if !self.told_full {
            self.push(Outgoing::Text(frame.encode()));
            self.look_whether_full();
        }
    }

    fn perform(&mut self, output: Output<InboxFrame>) {
        let handle = (&*self.handle, self.logs.are_read());
        perform(output, &mut self.queue, &mut self.queued_bytes, handle, &self.context);
    }

    fn push(&mut self, outgoing: Outgoing) {
        push(&mut self.queue, &mut self.queued_bytes, outgoing);
    }
}

fn perform(
    output: Output<InboxFrame>,
    queue: &mut VecDeque<Outgoing>,
    queued_bytes: &mut usize,
    (handle, has_logs): (&Arc<SessionHandle>, bool),
    context: &ServingContext,
) {
    let frame = match output {
        Output::Send(frame) => {
            context.metrics.delivered.inc();
            frame.bytes
        }
        Output::Gap { after, before, reason } => {
            let of = OfLog::default();
            ServerFrame::Gap { of, after: after.get(), before: before.get(), reason }.encode()
        }
        Output::CaughtUp(seq) => {
            ServerFrame::CaughtUp { seq: Some(seq.get()), of: OfLog::default(), all: false }.encode()
        }
        Output::Read { after, most } => return context.reads.request(handle, after, most),
        Output::Cursor(acked) => {
            handle.set_acked(acked);
            if has_logs {
                context.log_positions.hurry(&handle.user, &handle.device);
            }
            return context.cursors.note(handle, acked);
        }
    };
    push(queue, queued_bytes, Outgoing::Text(frame));
}

fn push(queue: &mut VecDeque<Outgoing>, queued_bytes: &mut usize, outgoing: Outgoing) {
    *queued_bytes += size(&outgoing);
    queue.push_back(outgoing);
}

/// The bytes that a frame counts for in the queue's limit.
fn size(outgoing: &Outgoing) -> usize {
    match outgoing {
        Outgoing::Text(text) => text.len(),
        Outgoing::Ping | Outgoing::Close(..) => 2,
    }
}

/// Time from now until this second of the epoch; at most a year, because timers have a horizon.
fn until(seconds: u64, now: Millis) -> Duration {
    const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);
    Duration::from_millis(seconds.saturating_mul(1000).saturating_sub(now.0)).min(YEAR)
}
