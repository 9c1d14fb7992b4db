//! WebSockets: tungstenite behind one type for each side.
//!
//! tungstenite allocates its read buffer per connection and bounds its write buffer by nothing unless told: both are set
//! here. Its buffers decide what an idle socket costs.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Sink, SinkExt, Stream, StreamExt};
use http::header::{
    CONNECTION, HeaderMap, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL,
    SEC_WEBSOCKET_VERSION, UPGRADE,
};
use http::{HeaderValue, Request, Response, StatusCode};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use hyper_util::server::conn::auto;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::error::{CapacityError, ProtocolError};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::handshake::machine::TryParse;
use tokio_tungstenite::tungstenite::handshake::server::write_response;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode as RawCloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error, Message, Utf8Bytes};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

use super::line::Line;
use crate::wire::frame::SUBPROTOCOL;
use crate::wire::socket::{Incoming, Outgoing, SocketFault};

/// Largest client frame and message, in bytes (DESIGN.md section 12).
pub const CLIENT_FRAME_MAX: usize = 4 * 1024;
/// Eagerly allocated per connection; client frames are acks of 30 bytes.
const READ_BUFFER: usize = 256;
/// The layer writes by itself only above this; the connection feeds it less and flushes.
const WRITE_BUFFER: usize = 16 * 1024;
/// A full feed and the largest message frame: 4 KiB and 64 KiB of payload with its envelope fit twice.
const WRITE_BUFFER_MAX: usize = 160 * 1024;

/// The answer to a handshake, with the subprotocol.
const ANSWER_ROOM: usize = 192;

fn server_config() -> WebSocketConfig {
    WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER)
        .write_buffer_size(WRITE_BUFFER)
        .max_write_buffer_size(WRITE_BUFFER_MAX)
        .max_message_size(Some(CLIENT_FRAME_MAX))
        .max_frame_size(Some(CLIENT_FRAME_MAX))
}

/// Why a request is no handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoHandshake {
    /// It asks for no WebSocket, or for another version of it: 426.
    Upgrade(&'static str),
    /// It asks for one wrongly: 400.
    Bad(&'static str),
}

/// Reads the head of a request, as much of it as there is: what it says and how long it is, or None until it is whole.
///
/// # Errors
/// [`NoHandshake`], where no handshake begins like that.
pub fn request_head(read: &[u8]) -> Result<Option<(usize, Request<()>)>, NoHandshake> {
    Request::try_parse(read).map_err(|_| NoHandshake::Bad("a handshake is a GET of HTTP/1.1"))
}

/// Whether a request asks for a WebSocket; if so, the answer to it.
///
/// # Errors
/// [`NoHandshake`], with what is missing, for a person who opened the URL in a browser.
pub fn handshake(headers: &HeaderMap) -> Result<Response<()>, NoHandshake> {
    let has = |name, token: &str| {
        headers
            .get_all(name)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .any(|value| value.split(',').any(|part| part.trim().eq_ignore_ascii_case(token)))
    };
    if !has(CONNECTION, "upgrade") || !has(UPGRADE, "websocket") {
        return Err(NoHandshake::Upgrade("this is a WebSocket: open it with a WebSocket client"));
    }
    if !has(SEC_WEBSOCKET_VERSION, "13") {
        return Err(NoHandshake::Upgrade("Sec-WebSocket-Version must be 13"));
    }
    let key = headers.get(SEC_WEBSOCKET_KEY).ok_or(NoHandshake::Bad("Sec-WebSocket-Key is missing"))?;
    let accept = HeaderValue::from_str(&derive_accept_key(key.as_bytes()))
        .map_err(|_| NoHandshake::Bad("Sec-WebSocket-Key is bad"))?;
    let mut response = Response::new(());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let answer = response.headers_mut();
    answer.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    answer.insert(UPGRADE, HeaderValue::from_static("websocket"));
    answer.insert(SEC_WEBSOCKET_ACCEPT, accept);
    if has(SEC_WEBSOCKET_PROTOCOL, SUBPROTOCOL) {
        answer.insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(SUBPROTOCOL));
    } else if headers.contains_key(SEC_WEBSOCKET_PROTOCOL) {
        return Err(NoHandshake::Bad("the only subprotocol here is ringpush.v1.json"));
    }
    Ok(response)
}

/// The server's side of a socket, bare of everything that the handshake needed.
pub struct ServerSocket {
    /// Boxed, for it is handed on from stage to stage.
    inner: Box<WebSocketStream<Line>>,
    /// Nothing that was read is left: more must come before there is a frame.
    dry: bool,
}

impl ServerSocket {
    /// The socket on a connection whose request for it has this answer, which leaves with the first frame or flush.
    pub async fn answered(mut line: Line, answer: &Response<()>) -> Option<Self> {
        let mut head = Vec::with_capacity(ANSWER_ROOM);
        write_response(&mut head, answer).ok()?;
        line.hold(head);
        Some(Self::on(line).await)
    }

    /// The socket after hyper answered; it comes within `deadline`, or not at all.
    pub async fn upgraded(upgrade: OnUpgrade, deadline: Duration) -> Option<Self> {
        let upgraded = tokio::time::timeout(deadline, upgrade).await.ok()?.ok()?;
        let parts = auto::upgrade::downcast::<TokioIo<Line>>(upgraded).ok()?;
        let mut line = parts.io.into_inner();
        line.give_back(&parts.read_buf);
        Some(Self::on(line).await)
    }

    async fn on(line: Line) -> Self {
        let inner = WebSocketStream::from_raw_socket(line, Role::Server, Some(server_config())).await;
        Self { inner: Box::new(inner), dry: false }
    }
}

impl Stream for ServerSocket {
    type Item = Result<Incoming, SocketFault>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.dry && self.inner.get_mut().poll_maybe_readable(cx).is_pending() {
            return Poll::Pending;
        }
        let next = self.inner.poll_next_unpin(cx);
        self.dry = next.is_pending();
        next.map(|next| next.map(|next| next.map(incoming).map_err(|error| fault(&error))))
    }
}

impl Sink<Outgoing> for ServerSocket {
    type Error = SocketFault;

    fn poll_ready(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), SocketFault>> {
        self.inner.poll_ready_unpin(cx).map_err(|error| fault(&error))
    }

    fn start_send(mut self: Pin<&mut Self>, outgoing: Outgoing) -> Result<(), SocketFault> {
        self.inner.start_send_unpin(message(outgoing)?).map_err(|error| fault(&error))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), SocketFault>> {
        self.inner.poll_flush_unpin(cx).map_err(|error| fault(&error))
    }

    /// Ends the connection after the last frame: nothing more is written, and what still comes is thrown away until the
    /// peer ends too. A socket that is dropped with bytes unread is reset, and the peer would lose our close frame.
    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), SocketFault>> {
        ready!(self.inner.poll_flush_unpin(cx)).map_err(|error| fault(&error))?;
        let mut stream = Pin::new(self.inner.get_mut());
        ready!(stream.as_mut().poll_shutdown(cx)).map_err(|_| SocketFault::Gone)?;
        let mut space = [0u8; 1024];
        loop {
            let mut buffer = ReadBuf::new(&mut space);
            match ready!(stream.as_mut().poll_read(cx, &mut buffer)) {
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

fn message(outgoing: Outgoing) -> Result<Message, SocketFault> {
    Ok(match outgoing {
        Outgoing::Text(text) => {
            Message::Text(Utf8Bytes::try_from(text).map_err(|_| SocketFault::InvalidUtf8)?)
        }
        Outgoing::Ping => Message::Ping(Bytes::new()),
        Outgoing::Close(code) => Message::Close(Some(CloseFrame {
            code: RawCloseCode::from(code.number()),
            reason: Utf8Bytes::from_static(code.name()),
        })),
    })
}

fn fault(error: &Error) -> SocketFault {
    match error {
        Error::Capacity(CapacityError::MessageTooLong { .. }) => SocketFault::TooBig,
        Error::Utf8(_) => SocketFault::InvalidUtf8,
        Error::Protocol(ProtocolError::ResetWithoutClosingHandshake | ProtocolError::SendAfterClosing) => {
            SocketFault::Gone
        }
        Error::Protocol(_) => SocketFault::Protocol,
        _ => SocketFault::Gone,
    }
}

/// The client's side of a socket.
pub struct ClientSocket {
    inner: WebSocketStream<MaybeTlsStream<TcpStream>>,
    /// When something was heard last, and for how long nothing may be.
    heard: Instant,
    silence: Duration,
}

/// What a client hears.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Heard {
    /// A text message.
    Text(Bytes),
    /// The server closed, with this code; 1005 where it gave none.
    Closed(u16),
    /// The connection broke.
    Lost,
}

/// Why a socket could not be opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpenFault {
    /// The server answered something else; 401 means that the token or ticket is not good.
    #[error("the server answered {0}")]
    Answered(u16),
    /// It cannot be reached.
    #[error("{0}")]
    Unreachable(String),
}

/// Opens a socket at `url`, with a token if one is given. Until [`ClientSocket::expect_life_within`] says otherwise, a server
/// that says nothing for `deadline` counts as lost, also after the upgrade.
///
/// # Errors
/// [`OpenFault`].
pub async fn open(url: &str, bearer: Option<&str>, deadline: Duration) -> Result<ClientSocket, OpenFault> {
    let unreachable = |error: &dyn std::fmt::Display| OpenFault::Unreachable(error.to_string());
    let mut request = url.into_client_request().map_err(|error| unreachable(&error))?;
    let headers = request.headers_mut();
    headers.insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(SUBPROTOCOL));
    if let Some(bearer) = bearer {
        let value =
            HeaderValue::from_str(&format!("Bearer {bearer}")).map_err(|error| unreachable(&error))?;
        headers.insert(http::header::AUTHORIZATION, value);
    }
    let config = WebSocketConfig::default().read_buffer_size(16 * 1024).write_buffer_size(0);
    let opening = tokio_tungstenite::connect_async_with_config(request, Some(config), true);
    match tokio::time::timeout(deadline, opening).await {
        Ok(Ok((inner, _))) => Ok(ClientSocket { inner, heard: Instant::now(), silence: deadline }),
        Ok(Err(Error::Http(response))) => Err(OpenFault::Answered(response.status().as_u16())),
        Ok(Err(error)) => Err(unreachable(&error)),
        Err(_) => Err(unreachable(&"no answer in time")),
    }
}

impl ClientSocket {
    /// The next thing heard; pings are answered below.
    pub async fn hear(&mut self) -> Heard {
        loop {
            // From when something was heard last, however often this is asked anew meanwhile.
            let Ok(next) = timeout_at(self.heard + self.silence, self.inner.next()).await else {
                return Heard::Lost;
            };
            self.heard = Instant::now();
            match next {
                Some(Ok(Message::Text(text))) => return Heard::Text(text.into()),
                Some(Ok(Message::Close(frame))) => {
                    return Heard::Closed(frame.map_or(1005, |f| f.code.into()));
                }
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return Heard::Lost,
            }
        }
    }

    /// From now on a server that says nothing for this long, not even a ping, counts as lost.
    pub fn expect_life_within(&mut self, silence: Duration) {
        self.silence = silence;
    }

    /// Says something; false if the connection is gone.
    pub async fn say(&mut self, text: String) -> bool {
        self.inner.send(Message::Text(text.into())).await.is_ok()
    }

    /// Closes in good order, within a second.
    pub async fn close(mut self) {
        let _ = tokio::time::timeout(Duration::from_secs(1), self.inner.close(None)).await;
    }
}
