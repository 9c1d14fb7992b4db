//! One connection: from the upgrade to the last frame, in one task.
//!
//! Three stages, each a function that takes the socket and passes it on: *unidentified* (a token
//! must
//! come), *attaching* (register, ask the inbox, send welcome), *serving*. The serving stage owns
//! the
//! socket, the session and the queue between them, and waits for one of five things:
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
//! The connection's task normally does all I/O. When it is idle and its mailbox is empty, the
//! thread
//! that delivers a live message writes it to the socket itself ([`InlineSend`]). Waking the task
//! would
//! cost more than the write, and most messages go to idle sessions
//! (docs/decisions/001-inline-sends.md). That is why there is no `select!` here: the state that a
//! send
//! needs must be reachable without running the task.
//!
//! # Locking
//!
//! One lock per session, held while the session is polled or written to, never across an await. An
//! inline sender uses `try_lock` and falls back to the mailbox.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, Sink, SinkExt, Stream, StreamExt};
use parking_lot::Mutex;
use tokio::time::{Instant, Sleep};
use tower::ServiceExt;
use tracing::Instrument;

use super::admission::{Admission, Known};
use super::mailbox::Mail;
use super::registry::{InlineSend, RegistrationGuard, SessionHandle};
use super::{Node, rebalance};
use crate::backoff::{Backoff, between};
use crate::inbox::{StartAt, UserPosition};
use crate::message::{DeviceId, Millis, Seq, UserId};
use crate::session::{Input, Item, Output, Session, StartPoint};
use crate::telemetry::{Counted, Credential, WAY};
use crate::wire::close::CloseCode;
use crate::wire::frame::{ClientFrame, ServerFrame, Since};
use crate::wire::peer::{PeerError, VerifyRequest};
use crate::wire::socket::{Incoming, Outgoing, SocketError};

/// Bytes queued for one socket above which its session reads the inbox instead. With one page (at
/// most 102 KiB, see [`sweep::PAGE`]) it stays below 256 KiB (docs/design.md, section 11).
const HIGH_WATER_BYTES: usize = 128 * 1024;
/// Bytes queued below which the session may send again.
const LOW_WATER_BYTES: usize = 32 * 1024;
/// Bytes given to the WebSocket layer before they must be flushed.
const FEED_BYTES: usize = 4 * 1024;
/// How long the end may take: the last frames out, the client's close in.
pub(super) const FAREWELL: Duration = Duration::from_secs(2);
/// How long a response to a handshake that is held back waits for the welcome.
const WELCOME_PATIENCE: Duration = Duration::from_millis(50);
/// Delay between two queries whether a new token was revoked, while the inbox does not respond; at
/// first and at most.
const REVOKED_RETRY_FIRST: Duration = Duration::from_millis(200);
const REVOKED_RETRY_MAX: Duration = Duration::from_secs(5);
/// Pings that may go unanswered.
const UNANSWERED_PINGS: u32 = 2;

/// A socket of any kind.
pub(super) trait Socket:
    Stream<Item = Result<Incoming, SocketError>> + Sink<Outgoing, Error = SocketError> + Unpin + Send
{
}
impl<S> Socket for S where
    S: Stream<Item = Result<Incoming, SocketError>> + Sink<Outgoing, Error = SocketError> + Unpin + Send
{
}

/// Why a connection ends.
#[derive(Debug, Clone, PartialEq, Eq)]
enum End {
    /// The server closes it.
    Close(CloseCode, String),
    /// The client closed it, or it broke.
    Gone,
}

impl End {
    fn close(code: CloseCode, why: impl Into<String>) -> Self {
        Self::Close(code, why.into())
    }
}

impl std::convert::From<SocketError> for End {
    fn from(fault: SocketError) -> Self {
        fault.close_code().map_or(Self::Gone, |code| Self::close(code, fault.to_string()))
    }
}

/// Runs one connection to its end. What a stage needs is boxed and freed with that stage, so that
/// an idle socket has no room for the stages before it (measured: 3.3 KB) or after it.
pub(super) fn run<S, F>(node: Arc<Node>, admission: Admission, socket: F) -> impl Future<Output = ()> + Send
where
    S: Socket + 'static,
    F: Future<Output = Option<S>> + Send,
{
    let span = tracing::debug_span!("connection", node = %node.name(), session = tracing::field::Empty);
    let began = Box::pin(begin(node, admission, socket, span.clone())).instrument(span.clone());
    async move {
        if let Some(serving) = began.await {
            Shared::serve(serving).instrument(span).await;
        }
    }
}

async fn begin<S: Socket + 'static>(
    node: Arc<Node>,
    admission: Admission,
    socket: impl Future<Output = Option<S>>,
    span: tracing::Span,
) -> Option<Arc<Shared<S>>> {
    let mut socket = socket.await?;
    let counted = Counted::in_gauge(&node.metrics.connections);
    match attached(&node, admission, &mut socket).await {
        Ok(attached) => {
            span.record("session", tracing::field::display(attached.handle.id));
            Some(Shared::new(Serving::begin(node, socket, attached, counted)))
        }
        Err(end) => {
            Box::pin(farewell(&node, &mut socket, end)).await;
            None
        }
    }
}

/// A client that has shown who it is and is registered.
struct Attached {
    known: Known,
    handle: RegistrationGuard,
    answer: UserPosition,
}

async fn attached<S: Socket>(node: &Node, admission: Admission, socket: &mut S) -> Result<Attached, End> {
    let Admission { identity, mut device, mut since, arrival } = admission;
    let known = match identity {
        Some(known) => known,
        None => {
            // The client waits for the response to the handshake before it shows a token.
            socket.flush().await?;
            Box::pin(identify(node, socket, &mut device, &mut since)).await?
        }
    };
    let device = device.unwrap_or_default();
    let handle = SessionHandle::new(known.user.clone(), device, known.issued_at_s, arrival, node.clock.now());
    let mut attaching = pin!(attach(node, handle, since));
    // Mostly it is ready in this turn and needs no timer.
    let attached = match attaching.as_mut().now_or_never() {
        Some(attached) => attached,
        None => match tokio::time::timeout(WELCOME_PATIENCE, attaching.as_mut()).await {
            Ok(attached) => attached,
            Err(_) => {
                // A client that has gone meanwhile is noticed by the next read.
                let _ = socket.flush().await;
                attaching.await
            }
        },
    };
    let (handle, answer) = attached?;
    if tracing::enabled!(target: WAY, tracing::Level::DEBUG) {
        let owner = node.views.borrow().owner(&handle.user).map(|owner| owner.info.node.to_string());
        tracing::debug!(target: WAY, step = 3, user = %handle.user, node = %node.name(), owner, "registered and welcome");
    }
    Ok(Attached { known, handle, answer })
}

/// Waits for the first frame, which must have a token.
async fn identify<S: Socket>(
    node: &Node,
    socket: &mut S,
    device: &mut Option<DeviceId>,
    since: &mut Option<Since>,
) -> Result<Known, End> {
    let limit = node.config.limits.auth_deadline;
    let first = tokio::select! {
        first = tokio::time::timeout(limit, first_text(socket)) => {
            first.map_err(|_| End::close(CloseCode::AuthTimeout, "no token came in time"))??
        }
        () = node.draining.cancelled() => return Err(End::close(CloseCode::Draining, "the node is leaving")),
    };
    let frame = ClientFrame::parse(&first).map_err(|why| End::close(CloseCode::BadFrame, why))?;
    let ClientFrame::Auth { token, device: named, since: from } = frame else {
        return Err(End::close(CloseCode::Unauthorized, "the first frame must be auth, with a token"));
    };
    *device = named.or(device.take());
    *since = from.or(since.take());
    verify(node, token).await
}

async fn first_text<S: Socket>(socket: &mut S) -> Result<Bytes, End> {
    loop {
        match socket.next().await {
            Some(Ok(Incoming::Text(text))) => return Ok(text),
            Some(Ok(Incoming::Alive)) => {}
            Some(Ok(Incoming::Binary)) => {
                return Err(End::close(CloseCode::BadFrame, "text is due, not binary"));
            }
            Some(Ok(Incoming::Closed)) | None => return Err(End::Gone),
            Some(Err(fault)) => return Err(fault.into()),
        }
    }
}

async fn verify(node: &Node, token: String) -> Result<Known, End> {
    match node.verify.clone().oneshot(VerifyRequest { token: token.into() }).await {
        Ok(identity) => Ok(identity.into()),
        Err(PeerError::Unauthorized(why)) => {
            node.refusals.note(Credential::Token, &why);
            Err(End::close(CloseCode::Unauthorized, why))
        }
        Err(PeerError::Unavailable(_)) => {
            Err(End::close(CloseCode::Overloaded, "tokens cannot be verified now"))
        }
    }
}

/// Registers, enters the fallback set if displaced, and asks the inbox for the start position, in
/// this order.
async fn attach(
    node: &Node,
    handle: Arc<SessionHandle>,
    since: Option<Since>,
) -> Result<(RegistrationGuard, UserPosition), End> {
    let mut registered = node.registry.register(Arc::clone(&handle));
    let displaced = !node.owns(&node.views.borrow(), &handle.user);
    if displaced {
        Box::pin(rebalance::enter(node, &handle.user)).await;
        node.moves.consider(&handle);
    }
    registered.when_last(on_last(node));
    let from = match since {
        None => StartAt::Cursor(handle.device.clone()),
        Some(Since::After(position)) => StartAt::After(position),
        Some(Since::Latest) => StartAt::Latest,
    };
    let mut answer = node.asks.ask(handle.user.clone(), from).await.map_err(|error| {
        tracing::debug!(%error, "a session could not attach");
        End::close(CloseCode::Overloaded, "the inbox cannot be read now")
    })?;
    if since.is_none()
        && let Some(acked) =
            node.cursors.pending(&handle.user, &handle.device).filter(|acked| *acked > answer.start)
    {
        // The device acked this here a moment ago, so a client that comes straight back need not
        // see it again. Never above the head of the response: what was stored since is in the
        // mailbox. If there is more, the head is some number above the old start, and the page
        // tells the rest.
        answer.start = acked.min(answer.head);
    }
    if handle.token_iat_s() < answer.not_before_s {
        return Err(End::close(CloseCode::Unauthorized, "the token was revoked"));
    }
    if !node.takes_sockets() {
        return Err(End::close(CloseCode::Draining, "the node is leaving"));
    }
    // Only when this session is known to be good: a revoked token must not close other sessions.
    if registered.crowded
        && let Some(oldest) = node.registry.evict_excess(&handle)
    {
        oldest.mailbox.close(CloseCode::Replaced, "this user opened more sessions than are kept");
    }
    Ok((registered, answer))
}

/// When the last session of a user ends, the user may no longer belong in the fallback set.
fn on_last(node: &Node) -> impl FnOnce(&crate::message::UserId) + Send + Sync + 'static {
    let displaced = Arc::clone(&node.displaced);
    move |user| displaced.leave(user)
}

/// Tells the reason, closes, and waits briefly for the client to close too.
async fn farewell<S: Socket>(node: &Node, socket: &mut S, end: End) {
    let End::Close(code, why) = end else {
        // The client closed first; the response to its close must be flushed.
        let _ = tokio::time::timeout(FAREWELL, socket.flush()).await;
        return;
    };
    tracing::debug!(code = code.number(), why, "closing");
    let parting = async {
        if !matches!(code, CloseCode::Protocol | CloseCode::InvalidUtf8 | CloseCode::Normal) {
            let reconnect = CloseCode::may_reconnect(code.number()).then(|| node.hint());
            let frame = ServerFrame::Error { code: code.name().to_owned(), message: why, reconnect };
            socket.feed(Outgoing::Text(frame.encode())).await?;
        }
        socket.send(Outgoing::Close(code)).await?;
        while let Some(Ok(incoming)) = socket.next().await {
            if incoming == Incoming::Closed {
                break;
            }
        }
        socket.close().await
    };
    let _: Result<Result<(), SocketError>, _> = tokio::time::timeout(FAREWELL, parting).await;
}

/// An event of the serving stage.
enum Event {
    Room,
    Mail(Box<Mail>),
    Frame(Incoming),
    Refreshed(Result<Known, End>),
    Timer,
    Fault(SocketError),
    Over,
}

/// A session that serves, shared by its task and by threads that send inline; empty when it has
/// ended.
struct Shared<S>(Mutex<Option<Serving<S>>>);

impl<S: Socket + 'static> Shared<S> {
    fn new(serving: Serving<S>) -> Arc<Self> {
        let handle = Arc::clone(&serving.handle);
        let shared = Arc::new(Self(Mutex::new(Some(serving))));
        let weak = Arc::downgrade(&shared);
        handle.served_by(weak);
        shared
    }

    async fn serve(self: Arc<Self>) {
        poll_fn(|cx| self.poll_end(cx)).await.await;
    }

    /// Serves. Ready with the end of the connection, which is boxed then, so that idle sockets have
    /// no room for it.
    fn poll_end(&self, cx: &mut Context<'_>) -> Poll<BoxFuture<'static, ()>> {
        let mut place = self.0.lock();
        let Some(serving) = place.as_mut() else { return Poll::Pending };
        serving.is_task(cx.waker());
        let end = loop {
            let event = ready!(serving.poll_event(cx));
            if let Err(end) = serving.take(event) {
                break end;
            }
        };
        place.take().map_or(Poll::Pending, |serving| Poll::Ready(serving.part(end).boxed()))
    }
}

impl<S: Socket + 'static> InlineSend for Shared<S> {
    fn send(&self, item: Item<Bytes>) -> Option<Item<Bytes>> {
        match self.0.try_lock().as_deref_mut() {
            Some(Some(serving)) => serving.send_at_once(item),
            _ => Some(item),
        }
    }
}

/// The serving stage. The fields that an inline send needs come first, so that fewer cache lines of
/// an idle session are loaded.
#[repr(C)]
struct Serving<S> {
    node: Arc<Node>,
    socket: S,
    session: Session,
    queue: VecDeque<Outgoing>,
    /// Bytes in the queue, and bytes given to the WebSocket layer that are not known to be written.
    queued_bytes: usize,
    unflushed_bytes: usize,
    /// Wakes the task that serves.
    task: Option<Waker>,
    /// An event that happened during an inline send, for the task.
    noticed: Option<Box<Event>>,
    handle: RegistrationGuard,
    /// The kernel takes no more bytes for now.
    blocked: bool,
    told_full: bool,
    frames_first: bool,
    /// The timer was polled since it was set, and holds the task's waker.
    timer_asked: bool,
    unanswered: u32,
    frames_this_second: u32,
    second_began: Instant,
    refresh: Option<BoxFuture<'static, Result<Known, End>>>,
    timer: Pin<Box<Sleep>>,
    next_ping: Instant,
    token_ends: Instant,
    close_at: Option<Instant>,
    _counted: (Counted, Counted),
}

impl<S: Socket> Serving<S> {
    fn begin(node: Arc<Node>, socket: S, attached: Attached, connection: Counted) -> Self {
        let Attached { known, handle, answer } = attached;
        let session_counted = Counted::in_gauge(&node.metrics.sessions);
        let now = Instant::now();
        // The first ping comes at a random time; otherwise a restarted node would ping all clients
        // at the same time for ever.
        let next_ping = now + between(Duration::ZERO, node.config.limits.ping_every, &mut rand::rng());
        let token_ends = now + until(known.expires_at_s, node.clock.now());
        let welcome = Outgoing::Text(welcome(&node, &handle, answer.start));
        let mut outputs = Vec::with_capacity(2);
        let standing = StartPoint { start: answer.start, head: answer.head, more: answer.more };
        let session = Session::start(standing, |output| outputs.push(output));
        let mut this = Self {
            timer: Box::pin(tokio::time::sleep_until(next_ping.min(token_ends))),
            node,
            socket,
            handle,
            session,
            queue: VecDeque::new(),
            queued_bytes: 0,
            unflushed_bytes: 0,
            blocked: false,
            told_full: false,
            frames_first: false,
            refresh: None,
            timer_asked: false,
            task: None,
            noticed: None,
            next_ping,
            unanswered: 0,
            token_ends,
            close_at: None,
            frames_this_second: 0,
            second_began: now,
            _counted: (connection, session_counted),
        };
        this.node.metrics.welcomed.inc();
        this.push(welcome);
        outputs.into_iter().for_each(|output| this.perform(output));
        this.handle.set_position(this.session.position());
        this
    }

    async fn part(self, end: End) {
        let Self { node, mut socket, handle, _counted, .. } = self;
        // Unregister before the farewell: the place is free at once.
        drop(handle);
        farewell(&node, &mut socket, end).await;
    }

    /// From now on `waker` wakes the task that serves.
    fn is_task(&mut self, waker: &Waker) {
        if !self.task.as_ref().is_some_and(|known| known.will_wake(waker)) {
            self.task = Some(waker.clone());
            self.timer_asked = false;
        }
    }

    /// Sends a live message on behalf of the task, or returns it if something must come before it.
    fn send_at_once(&mut self, item: Item<Bytes>) -> Option<Item<Bytes>> {
        if self.noticed.is_some() || !self.handle.mailbox.is_empty() {
            return Some(item);
        }
        let Some(task) = self.task.take() else { return Some(item) };
        self.step(Input::Live(item));
        if let Poll::Ready(event) = self.poll_write(&mut Context::from_waker(&task)) {
            self.noticed = Some(Box::new(event));
            task.wake_by_ref();
        }
        self.task = Some(task);
        None
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
        self.poll_timer(cx)
    }

    /// `Sleep` keeps the waker it was last polled with, so it is not polled again before its
    /// deadline.
    fn poll_timer(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        if self.timer_asked && !self.timer.is_elapsed() {
            return Poll::Pending;
        }
        // `unconstrained`: with an exhausted coop budget `poll` would not store the waker.
        let rung = pin!(tokio::task::unconstrained(self.timer.as_mut())).poll(cx);
        self.timer_asked = rung.is_pending();
        rung.map(|()| Event::Timer)
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        self.socket.poll_next_unpin(cx).map(|next| match next {
            Some(Ok(incoming)) => Event::Frame(incoming),
            Some(Err(fault)) => Event::Fault(fault),
            None => Event::Over,
        })
    }

    /// Writes as much as the socket takes. Ready with [`Event::Room`] when a full queue has
    /// drained.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        loop {
            while self.unflushed_bytes < FEED_BYTES && !self.queue.is_empty() {
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
                break;
            }
            match self.socket.poll_flush_unpin(cx) {
                Poll::Ready(Ok(())) => {
                    self.unflushed_bytes = 0;
                    if std::mem::take(&mut self.blocked) {
                        // A full socket has room again: somebody reads, which is a sign of life.
                        self.unanswered = 0;
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
            // Frees the memory as well: memory that another socket has just used is still in the
            // cache.
            self.queue = VecDeque::new();
        }
        if self.told_full && self.queued_bytes + self.unflushed_bytes <= LOW_WATER_BYTES {
            self.told_full = false;
            return Poll::Ready(Event::Room);
        }
        Poll::Pending
    }

    fn take(&mut self, event: Event) -> Result<(), End> {
        match event {
            Event::Room => self.step(Input::Writable),
            Event::Mail(mail) => self.take_mail(*mail)?,
            Event::Frame(incoming) => self.take_frame(incoming)?,
            Event::Refreshed(known) => self.refreshed(known?)?,
            Event::Timer => self.timer()?,
            Event::Fault(fault) => return Err(fault.into()),
            Event::Over => return Err(End::Gone),
        }
        Ok(())
    }

    fn take_mail(&mut self, mail: Mail) -> Result<(), End> {
        if let Some(orders) = mail.orders {
            if let Some((code, why)) = orders.close {
                return Err(End::close(code, why));
            }
            if let Some(order) = orders.move_to {
                self.push(Outgoing::Text(order.frame));
                if let Some(after) = order.close_after {
                    self.close_at = Some(Instant::now() + after);
                    self.reset_timer();
                }
            }
        }
        // Before live messages: these belong to the store as it is now and would move the position
        // that the reset is about.
        if let Some((position, to)) = mail.reset {
            self.step(Input::Reset(position, to));
        }
        if let Some(page) = mail.page {
            self.step(Input::Page(page));
        }
        for item in mail.live {
            self.step(Input::Live(item));
        }
        if mail.lost {
            self.step(Input::Lost);
        }
        if let Some(position) = mail.more_after {
            self.step(Input::MoreAfter(position));
        }
        Ok(())
    }

    fn take_frame(&mut self, incoming: Incoming) -> Result<(), End> {
        self.unanswered = 0;
        self.count_frame()?;
        let text = match incoming {
            Incoming::Alive => return Ok(()),
            Incoming::Closed => return Err(End::Gone),
            Incoming::Binary => return Err(End::close(CloseCode::BadFrame, "text is due, not binary")),
            Incoming::Text(text) => text,
        };
        match ClientFrame::parse(&text).map_err(|why| End::close(CloseCode::BadFrame, why))? {
            ClientFrame::Ack(seq) => self.step(Input::Ack(seq)),
            ClientFrame::Ping => self.reply(&ServerFrame::Pong),
            ClientFrame::Refresh(token) => self.begin_refresh(token)?,
            ClientFrame::Auth { .. } => {
                return Err(End::close(CloseCode::BadFrame, "auth comes once; refresh brings a new token"));
            }
        }
        Ok(())
    }

    fn count_frame(&mut self) -> Result<(), End> {
        if self.second_began.elapsed() >= Duration::from_secs(1) {
            self.second_began = Instant::now();
            self.frames_this_second = 0;
        }
        self.frames_this_second += 1;
        if self.frames_this_second > self.node.config.limits.client_frames_per_s {
            return Err(End::close(CloseCode::RateLimited, "too many frames in one second"));
        }
        Ok(())
    }

    /// Verifies the new token beside the serving, and that it was not revoked.
    fn begin_refresh(&mut self, token: String) -> Result<(), End> {
        if self.refresh.is_some() {
            return Err(End::close(CloseCode::RateLimited, "one refresh at a time"));
        }
        let node = Arc::clone(&self.node);
        let (user, position) = (self.handle.user.clone(), self.session.position());
        self.refresh = Some(
            async move {
                let known = verify(&node, token).await?;
                if known.user != user {
                    return Err(End::close(CloseCode::Unauthorized, "the new token is of another user"));
                }
                let not_before_s = not_before_s(&node, user, position).await;
                if known.issued_at_s < not_before_s {
                    return Err(End::close(CloseCode::Unauthorized, "the token was revoked"));
                }
                Ok(known)
            }
            .boxed(),
        );
        Ok(())
    }

    fn refreshed(&mut self, known: Known) -> Result<(), End> {
        self.handle.set_token_iat_s(known.issued_at_s);
        self.token_ends = Instant::now() + until(known.expires_at_s, self.node.clock.now());
        self.reset_timer();
        let expires_at = Millis(known.expires_at_s.saturating_mul(1000)).rfc3339();
        self.reply(&ServerFrame::Refreshed { expires_at });
        Ok(())
    }

    fn timer(&mut self) -> Result<(), End> {
        let now = Instant::now();
        if self.token_ends <= now {
            return Err(match self.refresh {
                None => End::close(CloseCode::Unauthorized, "the token has expired"),
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
            self.next_ping = now + self.node.config.limits.ping_every;
            self.push(Outgoing::Ping);
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
    fn step(&mut self, input: Input<Bytes>) {
        let now = self.node.clock.now();
        let Self { session, queue, queued_bytes, handle, node, .. } = self;
        session.step(input, now, |output| perform(output, queue, queued_bytes, handle, node));
        self.handle.set_position(self.session.position());
        self.look_whether_full();
    }

    fn look_whether_full(&mut self) {
        if !self.told_full && self.queued_bytes + self.unflushed_bytes >= HIGH_WATER_BYTES {
            self.told_full = true;
            self.node.metrics.demoted.inc();
            self.step(Input::Blocked);
        }
    }

    /// Queues the answer to a frame of the client. Not if the client reads nothing, because it could make us
    /// queue without end.
    fn reply(&mut self, frame: &ServerFrame) {
        if !self.told_full {
            self.push(Outgoing::Text(frame.encode()));
            self.look_whether_full();
        }
    }

    fn perform(&mut self, output: Output<Bytes>) {
        perform(output, &mut self.queue, &mut self.queued_bytes, &self.handle, &self.node);
    }

    fn push(&mut self, outgoing: Outgoing) {
        push(&mut self.queue, &mut self.queued_bytes, outgoing);
    }
}

fn perform(
    output: Output<Bytes>,
    queue: &mut VecDeque<Outgoing>,
    queued_bytes: &mut usize,
    handle: &Arc<SessionHandle>,
    node: &Node,
) {
    let frame = match output {
        Output::Send(frame) => {
            node.metrics.delivered.inc();
            frame
        }
        Output::Gap { after, before, reason } => {
            ServerFrame::Gap { after: after.get(), before: before.get(), reason }.encode()
        }
        Output::CaughtUp(seq) => ServerFrame::CaughtUp { seq: seq.get() }.encode(),
        Output::Read(after) => return node.reads.request(handle, after),
        Output::Cursor(acked) => {
            handle.set_acked(acked);
            return node.cursors.note(handle, acked);
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
        Outgoing::Ping | Outgoing::Close(_) => 2,
    }
}

fn welcome(node: &Node, handle: &SessionHandle, start: Seq) -> Bytes {
    let view = node.views.borrow();
    let limits = &node.config.limits;
    ServerFrame::Welcome {
        user: handle.user.to_string(),
        device: handle.device.to_string(),
        node: node.name().to_string(),
        session: handle.id.to_string(),
        generation: view.generation.to_string(),
        epoch: view.epoch,
        since: start.get(),
        ping_every_ms: u64::try_from(limits.ping_every.as_millis()).unwrap_or(u64::MAX),
        reconnect: node.hint(),
    }
    .encode()
}

/// Since when tokens of this user count. Asked again with growing delays while the inbox does not
/// respond: until then the new token is not known to be good, and the session goes on with the old
/// one.
async fn not_before_s(node: &Node, user: UserId, position: Seq) -> u64 {
    let mut backoff = Backoff::new(REVOKED_RETRY_FIRST, REVOKED_RETRY_MAX);
    loop {
        match node.asks.ask(user.clone(), StartAt::After(position)).await {
            Ok(answer) => return answer.not_before_s,
            Err(error) => tracing::debug!(%error, "whether a new token was revoked cannot be asked now"),
        }
        let pause = backoff.next(&mut rand::rng());
        tokio::time::sleep(pause).await;
    }
}

/// Time from now until this second of the epoch; at most a year, because timers have a horizon.
fn until(seconds: u64, now: Millis) -> Duration {
    const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);
    Duration::from_millis(seconds.saturating_mul(1000).saturating_sub(now.0)).min(YEAR)
}
