//! A connection before it serves: from the upgrade to `welcome`.
//!
//! Three stages, each a function that takes the socket and passes it on: *unidentified* (a token
//! must come), *attaching* (see [`attach`](super::attach)), *serving* (see
//! [`serving`](super::serving)).

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{FutureExt, SinkExt, StreamExt};
use tracing::Instrument;

use tokio::time::Instant;

use super::admission::{Admission, AdmissionError, Admitter};
use super::attach::{Attacher, not_now};
use super::availability::Availability;
use super::end::{End, Socket, farewell};
use super::log_attach::LogsAttached;
use super::ownership::Ownership;
use super::registry::{Arrival, SessionHandle};
use super::serving::{Attached, Serving, ServingContext, Shared};
use super::tokens::Known;
use crate::inbox::UserPosition;
use crate::message::Seq;
use crate::role::strangers::Stranger;
use crate::role::strangers::is_guess;
use crate::telemetry::{Counted, WAY};
use crate::wire::close::CloseCode;
use crate::wire::frame::{AuthCredential, AuthFrame, ClientFrame, LogOptions, SessionOptions};
use crate::wire::refusal::RefusalReason;
use crate::wire::socket::Incoming;

/// How long a response to a handshake that is held back waits for the welcome.
const WELCOME_PATIENCE: Duration = Duration::from_millis(50);

/// Runs connections.
pub(super) struct Connector {
    pub(super) attacher: Attacher,
    pub(super) context: Arc<ServingContext>,
    pub(super) availability: Arc<Availability>,
    pub(super) ownership: Arc<Ownership>,
    pub(super) admitter: Arc<Admitter>,
}

/// Runs one connection to its end. What a stage needs is boxed and freed with that stage, so that
/// an idle socket has no room for the stages before it (measured: 3.3 KB) or after it.
pub(super) fn run<S, F>(
    connector: Arc<Connector>,
    admission: Admission,
    socket: F,
) -> impl Future<Output = ()> + Send
where
    S: Socket + 'static,
    F: Future<Output = Option<S>> + Send,
{
    let node = connector.ownership.node();
    let span = tracing::debug_span!("connection", %node, session = tracing::field::Empty);
    let began = Box::pin(begin(connector, admission, socket, span.clone())).instrument(span.clone());
    async move {
        if let Some(serving) = began.await {
            Shared::serve(serving).instrument(span).await;
        }
    }
}

async fn begin<S: Socket + 'static>(
    connector: Arc<Connector>,
    admission: Admission,
    socket: impl Future<Output = Option<S>>,
    span: tracing::Span,
) -> Option<Arc<Shared<S>>> {
    let mut socket = socket.await?;
    let accepted_at = Instant::now();
    let context = Arc::clone(&connector.context);
    let counted = Counted::in_gauge(&context.metrics.connections);
    match connector.attached(admission, &mut socket, accepted_at).await {
        Ok(attached) => {
            span.record("session", tracing::field::display(attached.handle.id));
            Some(Shared::new(Serving::begin(context, socket, attached, counted)))
        }
        Err(end) => {
            if let Some(reason) = end.name() {
                context.metrics.sockets_refused.get_or_create(&[("reason", reason)]).inc();
            }
            Box::pin(farewell(&mut socket, end, context.window.hint())).await;
            None
        }
    }
}

impl Connector {
    async fn attached<S: Socket>(
        &self,
        admission: Admission,
        socket: &mut S,
        accepted_at: Instant,
    ) -> Result<Attached, End> {
        let Admission { identity, mut options, mut arrival, topics_in_auth, stranger, waiting } = admission;
        let known = match identity {
            Some(known) if !topics_in_auth => known,
            identity => {
                // The client waits for the response to the handshake before it shows a token.
                socket.flush().await?;
                let identified = Box::pin(self.identify(socket, identity, &mut options, &mut arrival)).await;
                identified.map_err(|end| counted(stranger.as_ref(), end))?
            }
        };
        drop(waiting);
        let SessionOptions { device, since, begin, heartbeat, window, client, logs } = options;
        let now = self.context.clock.now();
        let handle = SessionHandle::new(
            known.user.clone(),
            device.unwrap_or_default(),
            client,
            known.issued_at_s,
            arrival,
            now,
        );
        let mut attaching = pin!(self.attacher.attach(handle, since, begin));
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
        let (handle, position, began) = attached?;
        let (logs, missing) =
            Box::pin(self.attach_logs(&handle, logs.as_deref(), &position, (began, window))).await?;
        if tracing::enabled!(target: WAY, tracing::Level::DEBUG) {
            let (view, node) = (self.ownership.view(), self.ownership.node());
            let owner = view.owner(&handle.user).map(|owner| owner.info.node.to_string());
            tracing::debug!(target: WAY, step = 3, user = %handle.user, %node, owner, "registered and welcome");
        }
        let heartbeat = heartbeat.unwrap_or(false);
        Ok(Attached { known, handle, position, began, heartbeat, window, logs, missing, accepted_at })
    }

    /// What the session reads of logs, and what it misses because its client does not know of them.
    async fn attach_logs(
        &self,
        handle: &Arc<SessionHandle>,
        options: Option<&LogOptions>,
        position: &UserPosition,
        (began, window): (Option<Seq>, Option<u32>),
    ) -> Result<(Option<LogsAttached>, &'static [&'static str]), End> {
        let logs = &self.context.logs;
        let changes = position.memberships;
        handle.set_memberships(changes);
        let Some(options) = options else {
            if changes > 0 && logs.has_memberships(&handle.user).await.map_err(not_now)? {
                self.context.metrics.topic_unaware.inc();
                return Ok((None, &["topics"]));
            }
            return Ok((None, &[]));
        };
        let asked = (changes, began.is_some(), window.is_some());
        Ok((Some(logs.attach(handle, options, asked).await.map_err(not_now)?), &[]))
    }

    /// Waits for the first frame, which must have a token unless the client is `known`.
    async fn identify<S: Socket>(
        &self,
        socket: &mut S,
        known: Option<Known>,
        options: &mut SessionOptions,
        arrival: &mut Arrival,
    ) -> Result<Known, End> {
        let limit = self.context.live.auth_deadline();
        let first = tokio::select! {
            first = tokio::time::timeout(limit, first_text(socket)) => {
                first.map_err(|_| End::close(CloseCode::AuthTimeout, "no token came in time"))??
            }
            () = self.availability.drain_begun() => {
                return Err(End::close(CloseCode::Draining, "the node is leaving"));
            }
        };
        let frame = read_frame(&first)?;
        let ClientFrame::Auth(auth) = frame else {
            let why = "the first frame must be auth, with a token or a ticket";
            return Err(End::refused(RefusalReason::TokenMissing, why));
        };
        let AuthFrame { credential, options: asked } = *auth;
        *options = asked.or(std::mem::take(options));
        match credential {
            None => known.ok_or_else(|| {
                End::refused(RefusalReason::TokenMissing, "auth needs \"token\" or \"ticket\", a string")
            }),
            Some(AuthCredential::Token(token)) => {
                let other = self.context.refresher.verify(&token).await?;
                if known.is_some_and(|known| known.user != other.user) {
                    let why = "the token is of another user than the one that came with the request";
                    return Err(End::refused(RefusalReason::TokenInvalid, why));
                }
                Ok(other)
            }
            Some(AuthCredential::Ticket(_)) if known.is_some() => {
                Err(End::close(CloseCode::BadFrame, "a token or a ticket came with the request already"))
            }
            Some(AuthCredential::Ticket(ticket)) => {
                self.admitter.redeem(&ticket, arrival, options).map_err(|error| match error {
                    AdmissionError::Unauthorized(refused) => End::Refused(refused),
                    _ => End::close(CloseCode::Overloaded, "this node takes no more sockets this second"),
                })
            }
        }
    }
}

/// The same end, or another one if the client's address has shown many bad tokens before.
fn counted(stranger: Option<&Stranger>, end: End) -> End {
    match (&end, stranger) {
        (End::Refused(refused), Some(stranger))
            if is_guess(refused.reason) && stranger.failed(std::time::Instant::now()).is_some() =>
        {
            End::close(CloseCode::RateLimited, "too many bad tokens came from this address")
        }
        _ => end,
    }
}

/// Reads a frame that is no larger than its kind may be.
pub(super) fn read_frame(text: &[u8]) -> Result<ClientFrame, End> {
    let frame = ClientFrame::parse(text).map_err(|why| {
        let fits = text.len() <= ClientFrame::max_bytes_of(text);
        let code = if fits { CloseCode::BadFrame } else { CloseCode::TooBig };
        End::close(code, why)
    })?;
    if text.len() > frame.max_bytes() {
        return Err(End::close(CloseCode::TooBig, "a frame over the limit"));
    }
    Ok(frame)
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
            Some(Err(error)) => return Err(error.into()),
        }
    }
}
