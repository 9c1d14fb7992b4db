//! WebSockets: tungstenite behind one type for each side.
//!
//! Unless told otherwise, tungstenite allocates a large read buffer per connection and does not
//! limit its write buffer. Both are set here. These buffers decide what an idle socket costs.

mod handshake;

use std::io::{self, Read, Write};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Sink, Stream};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use hyper_util::server::conn::auto;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_tungstenite::tungstenite::error::{CapacityError, ProtocolError};
use tokio_tungstenite::tungstenite::protocol::frame::FrameHeader;
use tokio_tungstenite::tungstenite::protocol::frame::coding::{CloseCode as RawCloseCode, Data, OpCode};
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig, WebSocketContext};
use tokio_tungstenite::tungstenite::{Error, Message, Utf8Bytes};

use handshake::ANSWER_ROOM;
pub use handshake::{Handshake, HandshakeError, handshake, request_head};

use super::lazy_stream::LazyTcpStream;
use crate::wire::frame::AUTH_MAX_BYTES;
use crate::wire::socket::{Incoming, Outgoing, SocketError};

/// Largest client frame and message, in bytes (docs/design.md, section 11).
pub const CLIENT_FRAME_MAX: usize = AUTH_MAX_BYTES;
/// Read buffer per connection, in bytes, allocated at once. Client frames are acks of 30 bytes.
const READ_BUFFER: usize = 256;
/// Bytes that are framed and not written. Above this the socket takes no more text and no more
/// answers to pings.
const HELD_MAX: usize = 16 * 1024;

fn server_config() -> WebSocketConfig {
    WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER)
        // Bounds control frames that were not written: a client may ping for ever and read nothing.
        .write_buffer_size(HELD_MAX)
        .max_write_buffer_size(2 * HELD_MAX)
        .max_message_size(Some(CLIENT_FRAME_MAX))
        .max_frame_size(Some(CLIENT_FRAME_MAX))
}

/// The server's side of a socket, bare of everything that the handshake needed.
///
/// tungstenite's rules over a [`LazyTcpStream`], without the two wakers that tokio-tungstenite
/// keeps for each stream: one task both reads and writes here. Text is framed into the line itself,
/// whose memory is given back with the last byte of it; tungstenite's own buffer sees control
/// frames alone. An idle socket has nothing to write, and owns no room for it.
pub struct ServerSocket {
    /// Boxed, because it is passed from stage to stage.
    inner: Box<Inner>,
}

struct Inner {
    /// Cached `!rules.can_write()`: the close handshake has begun and no data frame may follow.
    write_closed: bool,
    /// tungstenite may hold a control frame that is not in the stream's buffer yet.
    control_pending: bool,
    /// No buffered input is left, so check readability before parsing.
    read_drained: bool,
    ended: bool,
    line: LazyTcpStream,
    rules: WebSocketContext,
}

impl ServerSocket {
    /// The socket on a connection whose handshake gets this response. The response is sent with the
    /// first frame or flush.
    pub fn answered(mut line: LazyTcpStream, answer: &Handshake) -> Self {
        answer.write(line.more_held(ANSWER_ROOM));
        Self::on(line)
    }

    /// The socket of a connection that hyper upgraded; `None` if that takes longer than `deadline`.
    pub async fn upgraded(upgrade: OnUpgrade, deadline: Duration) -> Option<Self> {
        let upgraded = tokio::time::timeout(deadline, upgrade).await.ok()?.ok()?;
        let parts = auto::upgrade::downcast::<TokioIo<LazyTcpStream>>(upgraded).ok()?;
        let mut line = parts.io.into_inner();
        line.give_back(&parts.read_buf);
        Some(Self::on(line))
    }

    fn on(line: LazyTcpStream) -> Self {
        let rules = WebSocketContext::new(Role::Server, Some(server_config()));
        let (write_closed, control_pending, read_drained, ended) = (false, false, false, false);
        Self { inner: Box::new(Inner { write_closed, control_pending, read_drained, ended, line, rules }) }
    }
}

/// The stream as tungstenite needs it: an operation that must wait returns `WouldBlock` and
/// registers the context's waker.
struct Now<'a, 'cx> {
    line: &'a mut LazyTcpStream,
    /// Without a context nothing is read and nothing is sent.
    cx: Option<&'a mut Context<'cx>>,
}

impl Now<'_, '_> {
    fn with<T>(
        &mut self,
        poll: impl FnOnce(Pin<&mut LazyTcpStream>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> io::Result<T> {
        match self.cx.as_mut().map(|cx| poll(Pin::new(self.line), cx)) {
            Some(Poll::Ready(result)) => result,
            Some(Poll::Pending) | None => Err(io::ErrorKind::WouldBlock.into()),
        }
    }
}

impl Read for Now<'_, '_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        let mut buffer = ReadBuf::new(room);
        self.with(|line, cx| line.poll_read(cx, &mut buffer))?;
        Ok(buffer.filled().len())
    }
}

/// Frames are taken whole or not at all, so that a text can be put between two of them.
impl Write for Now<'_, '_> {
    fn write(&mut self, frames: &[u8]) -> io::Result<usize> {
        if self.line.held() >= HELD_MAX {
            self.flush()?;
        }
        self.line.more_held(frames.len()).extend_from_slice(frames);
        Ok(frames.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.with(|line, cx| line.poll_flush(cx))
    }
}

/// Turns `WouldBlock` into Pending.
fn waits<T>(result: Result<T, Error>) -> Poll<Result<T, Error>> {
    match result {
        Err(Error::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => Poll::Pending,
        result => Poll::Ready(result),
    }
}

impl Inner {
    fn poll_message(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Message, Error>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        if self.read_drained && self.line.poll_maybe_readable(cx).is_pending() {
            return Poll::Pending;
        }
        let next = waits(self.rules.read(&mut Now { line: &mut self.line, cx: Some(cx) }));
        self.read_drained = next.is_pending();
        self.write_closed = !self.rules.can_write();
        next.map(|next| {
            self.ended = next.is_err();
            // An answer to this message waits for the next read or flush.
            self.control_pending |= !matches!(next, Ok(Message::Text(_) | Message::Binary(_)));
            match next {
                Err(Error::AlreadyClosed | Error::ConnectionClosed) => None,
                next => Some(next),
            }
        })
    }

    fn poll_flushed(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SocketError>> {
        if self.control_pending {
            let said = ready!(waits(self.rules.flush(&mut Now { line: &mut self.line, cx: Some(cx) })));
            // tungstenite reports the end with the last frame. The frame is in the stream and may
            // not be sent yet.
            if let Err(error) = said
                && !matches!(error, Error::ConnectionClosed)
            {
                return Poll::Ready(Err(fault(&error)));
            }
            self.control_pending = false;
        }
        Pin::new(&mut self.line).poll_flush(cx).map_err(|_| SocketError::Gone)
    }

    /// Frames a text. It is sent with the next flush.
    fn text(&mut self, text: &Bytes) -> Result<(), SocketError> {
        if self.write_closed {
            return Err(SocketError::Gone);
        }
        std::str::from_utf8(text).map_err(|_| SocketError::InvalidUtf8)?;
        let header = FrameHeader { opcode: OpCode::Data(Data::Text), ..FrameHeader::default() };
        let length = text.len() as u64;
        let held = self.line.more_held(header.len(length) + text.len());
        header.format(length, held).map_err(|error| fault(&error))?;
        held.extend_from_slice(text);
        Ok(())
    }

    /// Queues a control frame. It is sent with the next flush.
    fn control(&mut self, message: Message) -> Result<(), SocketError> {
        self.control_pending = true;
        let said = waits(self.rules.write(&mut Now { line: &mut self.line, cx: None }, message));
        self.write_closed = !self.rules.can_write();
        match said {
            // It stays for the next flush.
            Poll::Pending => Ok(()),
            Poll::Ready(said) => said.map_err(|error| fault(&error)),
        }
    }
}

impl Stream for ServerSocket {
    type Item = Result<Incoming, SocketError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let next = self.inner.poll_message(cx);
        next.map(|next| next.map(|next| next.map(incoming).map_err(|error| fault(&error))))
    }
}

impl Sink<Outgoing> for ServerSocket {
    type Error = SocketError;

    fn poll_ready(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), SocketError>> {
        if self.inner.line.held() < HELD_MAX { Poll::Ready(Ok(())) } else { self.inner.poll_flushed(cx) }
    }

    fn start_send(mut self: Pin<&mut Self>, outgoing: Outgoing) -> Result<(), SocketError> {
        match outgoing {
            Outgoing::Text(text) => self.inner.text(&text),
            Outgoing::Ping => self.inner.control(Message::Ping(Bytes::new())),
            Outgoing::Close(code, reason) => self.inner.control(Message::Close(Some(CloseFrame {
                code: RawCloseCode::from(code.number()),
                reason: Utf8Bytes::from_static(reason),
            }))),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), SocketError>> {
        self.inner.poll_flushed(cx)
    }

    /// Ends the connection after the last frame: nothing more is written, and what still arrives is
    /// discarded until the peer ends too. A socket that is dropped with unread bytes is reset, and
    /// the peer would lose our close frame.
    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), SocketError>> {
        ready!(self.inner.poll_flushed(cx))?;
        let mut line = Pin::new(&mut self.inner.line);
        ready!(line.as_mut().poll_shutdown(cx)).map_err(|_| SocketError::Gone)?;
        let mut space = [0u8; 1024];
        loop {
            let mut buffer = ReadBuf::new(&mut space);
            match ready!(line.as_mut().poll_read(cx, &mut buffer)) {
                Ok(()) if !buffer.filled().is_empty() => {}
                _ => return Poll::Ready(Ok(())),
            }
        }
    }
}

fn incoming(message: Message) -> Incoming {
    match message {
        Message::Text(text) => Incoming::Text(text.into()),
        Message::Binary(_) => Incoming::Binary,
        Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => Incoming::Alive,
        Message::Close(_) => Incoming::Closed,
    }
}

fn fault(error: &Error) -> SocketError {
    match error {
        Error::Capacity(CapacityError::MessageTooLong { .. }) => SocketError::TooBig,
        Error::Utf8(_) => SocketError::InvalidUtf8,
        Error::Protocol(ProtocolError::ResetWithoutClosingHandshake | ProtocolError::SendAfterClosing) => {
            SocketError::Gone
        }
        Error::Protocol(_) => SocketError::Protocol,
        _ => SocketError::Gone,
    }
}

#[cfg(test)]
mod tests;
