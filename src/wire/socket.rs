//! What passes between a connection and the socket under it, whatever the socket is made of.

use bytes::Bytes;

use super::close::CloseCode;

/// One thing that came in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Incoming {
    /// A whole text message: valid UTF-8.
    Text(Bytes),
    /// A whole binary message; clients have no use for one here.
    Binary,
    /// A ping or pong of the WebSocket layer: a sign of life. Pings are answered below.
    Alive,
    /// The peer closed; the answer to it is sent below.
    Closed,
}

/// One thing to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outgoing {
    /// A text message: valid UTF-8, shared rather than copied.
    Text(Bytes),
    /// A ping of the WebSocket layer.
    Ping,
    /// The last frame, with the code and its reason: nothing follows it.
    Close(CloseCode, &'static str),
}

/// Why a socket ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SocketError {
    /// The connection is gone.
    #[error("the connection is gone")]
    Gone,
    /// The peer broke the rules of RFC 6455.
    #[error("the peer broke the WebSocket protocol")]
    Protocol,
    /// Text that is not UTF-8.
    #[error("text that is not UTF-8")]
    InvalidUtf8,
    /// A frame or message over the limit.
    #[error("a frame or message over the limit")]
    TooBig,
}

impl SocketError {
    /// The code to close with, where there is still somebody to tell.
    #[must_use]
    pub const fn close_code(self) -> Option<CloseCode> {
        match self {
            Self::Gone => None,
            Self::Protocol => Some(CloseCode::Protocol),
            Self::InvalidUtf8 => Some(CloseCode::InvalidUtf8),
            Self::TooBig => Some(CloseCode::TooBig),
        }
    }
}
