//! How a connection ends.

use std::time::Duration;

use futures_util::{Sink, SinkExt, Stream, StreamExt};

use crate::wire::close::CloseCode;
use crate::wire::frame::{ReconnectHint, ServerFrame};
use crate::wire::refusal::{RefusalReason, Refused};
use crate::wire::socket::{Incoming, Outgoing, SocketError};

/// How long the end may take: the last frames out, the client's close in.
pub(super) const FAREWELL: Duration = Duration::from_secs(2);

/// Shortest time after which a client may come again whose user has too many sessions, in ms.
const CROWDED_MS: u64 = 60_000;

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
pub(super) enum End {
    /// The server closes it.
    Close(CloseCode, String),
    /// The server closes it, because a token or ticket is refused.
    Refused(Refused),
    /// The server closes it, because its user has too many sessions and none of this device.
    Crowded,
    /// The client closed it, or it broke.
    Gone,
}

impl End {
    pub(super) fn close(code: CloseCode, why: impl Into<String>) -> Self {
        Self::Close(code, why.into())
    }

    /// The name in metrics; `None` where nobody was refused.
    pub(super) fn name(&self) -> Option<&'static str> {
        match self {
            Self::Close(code, _) => Some(code.name()),
            Self::Refused(_) => Some("unauthorized"),
            Self::Crowded => Some("crowded"),
            Self::Gone => None,
        }
    }

    pub(super) fn refused(reason: RefusalReason, why: impl Into<String>) -> Self {
        Self::Refused(Refused::new(reason, why))
    }
}

impl From<SocketError> for End {
    fn from(error: SocketError) -> Self {
        error.close_code().map_or(Self::Gone, |code| Self::close(code, error.to_string()))
    }
}

/// Tells the reason, closes, and waits briefly for the client to close too.
pub(super) async fn farewell<S: Socket>(socket: &mut S, end: End, hint: ReconnectHint) {
    let (code, reason, why, hint) = match end {
        End::Close(code, why) => (code, code.name(), why, hint),
        End::Refused(Refused { reason, detail }) => (CloseCode::Unauthorized, reason.name(), detail, hint),
        End::Crowded => {
            let why = "this user has as many sessions here as are kept".to_owned();
            let later = ReconnectHint { min_ms: CROWDED_MS, max_ms: CROWDED_MS.max(hint.max_ms) * 2 };
            (CloseCode::RateLimited, CloseCode::RateLimited.name(), why, later)
        }
        End::Gone => {
            // The client closed first; the response to its close must be flushed.
            let _ = tokio::time::timeout(FAREWELL, socket.flush()).await;
            return;
        }
    };
    tracing::debug!(code = code.number(), why, "closing");
    let parting = async {
        if !matches!(code, CloseCode::Protocol | CloseCode::InvalidUtf8 | CloseCode::Normal) {
            let reconnect = CloseCode::may_reconnect(code.number()).then_some(hint);
            let frame = ServerFrame::Error {
                topic: None,
                code: code.name().to_owned(),
                reason: reason.to_owned(),
                message: why,
                reconnect,
            };
            socket.feed(Outgoing::Text(frame.encode())).await?;
        }
        socket.send(Outgoing::Close(code, reason)).await?;
        while let Some(Ok(incoming)) = socket.next().await {
            if incoming == Incoming::Closed {
                break;
            }
        }
        socket.close().await
    };
    let _: Result<Result<(), SocketError>, _> = tokio::time::timeout(FAREWELL, parting).await;
}
