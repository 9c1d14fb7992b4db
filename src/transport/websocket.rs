//! WebSockets: tungstenite behind one type for each side.
//!
//! Unless told otherwise, tungstenite allocates a large read buffer per connection and does not
//! limit its write buffer. Both are set here. These buffers decide what an idle socket costs.

use std::io::{self, Read, Write};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use futures_util::{Sink, Stream};
use http::header::{
    CONNECTION, CONTENT_LENGTH, HeaderName, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL,
    SEC_WEBSOCKET_VERSION, TRANSFER_ENCODING, UPGRADE,
};
use http::{HeaderValue, Method, Request, Response, StatusCode, Version};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use hyper_util::server::conn::auto;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_tungstenite::tungstenite::error::{CapacityError, ProtocolError};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::handshake::machine::TryParse;
use tokio_tungstenite::tungstenite::protocol::frame::FrameHeader;
use tokio_tungstenite::tungstenite::protocol::frame::coding::{CloseCode as RawCloseCode, Data, OpCode};
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig, WebSocketContext};
use tokio_tungstenite::tungstenite::{Error, Message, Utf8Bytes};

use super::lazy_stream::LazyTcpStream;
use super::request::check_head;
use crate::wire::frame::SUBPROTOCOL;
use crate::wire::socket::{Incoming, Outgoing, SocketError};

/// Largest client frame and message, in bytes (docs/design.md, section 11).
pub const CLIENT_FRAME_MAX: usize = 4 * 1024;
/// Read buffer per connection, in bytes, allocated at once. Client frames are acks of 30 bytes.
const READ_BUFFER: usize = 256;
/// Bytes that are framed and not written. Above this the socket takes no more text and no more
/// answers to pings.
const HELD_MAX: usize = 16 * 1024;
/// Length of the nonce of a handshake, in bytes (RFC 6455, section 4.1).
const KEY_BYTES: usize = 16;
/// Room for the response to a handshake, with the subprotocol, and the welcome that is sent with
/// it, in bytes.
const ANSWER_ROOM: usize = 640;

fn server_config() -> WebSocketConfig {
    WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER)
        // Bounds control frames that were not written: a client may ping for ever and read nothing.
        .write_buffer_size(HELD_MAX)
        .max_write_buffer_size(2 * HELD_MAX)
        .max_message_size(Some(CLIENT_FRAME_MAX))
        .max_frame_size(Some(CLIENT_FRAME_MAX))
}

/// Why a request is not a handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HandshakeError {
    /// It does not ask for a WebSocket, or for another version: 426.
    Upgrade(&'static str),
    /// It asks for a WebSocket in a wrong way: 400.
    Bad(&'static str),
}

/// Parses the head of a request. Returns it with its length, or `None` if it is not complete.
///
/// # Errors
///
/// [`HandshakeError`], if no handshake begins like this.
pub fn request_head(read: &[u8]) -> Result<Option<(usize, Request<()>)>, HandshakeError> {
    Request::try_parse(read).map_err(|_| HandshakeError::Bad("a handshake is a GET of HTTP/1.1"))
}

/// The response to a handshake.
#[derive(Debug)]
pub struct Handshake {
    accept: HeaderValue,
    /// Whether the client offered our subprotocol.
    subprotocol: bool,
}

impl Handshake {
    /// The response for hyper.
    #[must_use]
    pub fn response(&self) -> Response<()> {
        let mut response = Response::new(());
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        response.headers_mut().extend(self.fields());
        response
    }

    /// The response as bytes, for a socket without hyper.
    fn write(&self, head: &mut Vec<u8>) {
        head.extend_from_slice(b"HTTP/1.1 101 Switching Protocols\r\n");
        for (name, value) in self.fields() {
            for part in [name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"] {
                head.extend_from_slice(part);
            }
        }
        head.extend_from_slice(b"\r\n");
    }

    fn fields(&self) -> impl Iterator<Item = (HeaderName, HeaderValue)> {
        let subprotocol = (SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(SUBPROTOCOL));
        [
            (CONNECTION, HeaderValue::from_static("Upgrade")),
            (UPGRADE, HeaderValue::from_static("websocket")),
            (SEC_WEBSOCKET_ACCEPT, self.accept.clone()),
        ]
        .into_iter()
        .chain(self.subprotocol.then_some(subprotocol))
    }
}

/// Checks that a request is a handshake (RFC 6455, section 4.2.1). Returns the response to it.
///
/// # Errors
///
/// [`HandshakeError`] with what is missing, for a person who opened the URL in a browser.
pub fn handshake<B>(request: &Request<B>) -> Result<Handshake, HandshakeError> {
    check_head(request).map_err(HandshakeError::Bad)?;
    let headers = request.headers();
    let has = |name, is: &dyn Fn(&str) -> bool| {
        headers
            .get_all(name)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .any(|value| value.split(',').any(|part| is(part.trim())))
    };
    if !has(CONNECTION, &|token| token.eq_ignore_ascii_case("upgrade"))
        || !has(UPGRADE, &|token| token.eq_ignore_ascii_case("websocket"))
    {
        return Err(HandshakeError::Upgrade("this is a WebSocket: open it with a WebSocket client"));
    }
    if request.method() != Method::GET || request.version() != Version::HTTP_11 {
        return Err(HandshakeError::Bad("a handshake is a GET of HTTP/1.1"));
    }
    if headers.get(CONTENT_LENGTH).is_some_and(|length| length != "0")
        || headers.contains_key(TRANSFER_ENCODING)
    {
        return Err(HandshakeError::Bad("a handshake has no body"));
    }
    let one = |name| {
        let mut all = headers.get_all(name).iter();
        all.next().filter(|_| all.next().is_none())
    };
    if one(SEC_WEBSOCKET_VERSION).is_none_or(|version| version != "13") {
        return Err(HandshakeError::Upgrade("Sec-WebSocket-Version must be 13"));
    }
    let key = one(SEC_WEBSOCKET_KEY).ok_or(HandshakeError::Bad("there must be one Sec-WebSocket-Key"))?;
    if STANDARD.decode(key).map_or(true, |nonce| nonce.len() != KEY_BYTES) {
        return Err(HandshakeError::Bad("Sec-WebSocket-Key must be the base64 of 16 bytes"));
    }
    let accept = HeaderValue::from_str(&derive_accept_key(key.as_bytes()))
        .map_err(|_| HandshakeError::Bad("Sec-WebSocket-Key is bad"))?;
    // Names of subprotocols are compared as they are.
    let subprotocol = has(SEC_WEBSOCKET_PROTOCOL, &|offered| offered == SUBPROTOCOL);
    if !subprotocol && headers.contains_key(SEC_WEBSOCKET_PROTOCOL) {
        return Err(HandshakeError::Bad("the only subprotocol here is ringpush.v1.json"));
    }
    Ok(Handshake { accept, subprotocol })
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

/// The order of the fields matters: sending a text touches only the first cache line.
#[repr(C)]
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
            Outgoing::Close(code) => self.inner.control(Message::Close(Some(CloseFrame {
                code: RawCloseCode::from(code.number()),
                reason: Utf8Bytes::from_static(code.name()),
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
mod tests {
    use super::*;
    use crate::wire::close::CloseCode;
    use futures_util::{SinkExt, StreamExt};
    use tokio::net::TcpStream;
    use tokio_tungstenite::WebSocketStream;

    /// A socket, and a client's end of it that has asked for nothing yet.
    async fn pair() -> (ServerSocket, WebSocketStream<TcpStream>) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let line = LazyTcpStream::new(listener.accept().await.unwrap().0.into_std().unwrap(), Vec::new());
        (ServerSocket::on(line), WebSocketStream::from_raw_socket(client, Role::Client, None).await)
    }

    fn text(n: usize) -> String {
        format!("{n}{}", "-".repeat(n % 5_000))
    }

    #[tokio::test]
    async fn texts_come_whole_and_in_order_past_pings_while_the_socket_is_full() {
        const TEXTS: usize = 4_000;
        let (server, client) = pair().await;
        let (mut says, mut hears) = server.split();
        let (mut asks, mut listens) = client.split();
        let mut near = tokio::spawn(async move {
            let saying = async {
                for n in 0..TEXTS {
                    says.feed(Outgoing::Text(text(n).into())).await.unwrap();
                    if n % 7 == 0 {
                        says.feed(Outgoing::Ping).await.unwrap();
                    }
                }
                says.send(Outgoing::Close(CloseCode::Draining)).await.unwrap();
            };
            let hearing = async {
                let mut pings = 0;
                while let Some(Ok(incoming)) = hears.next().await {
                    pings += usize::from(incoming == Incoming::Alive);
                }
                pings
            };
            tokio::join!(saying, hearing).1
        });
        // Nobody reads the ten megabytes until the near end is full, or the client's pings are.
        for _ in 0..2_000 {
            asks.feed(Message::Ping(Bytes::from_static(b"are you there"))).await.unwrap();
        }
        asks.flush().await.unwrap();
        assert!(tokio::time::timeout(Duration::from_millis(50), &mut near).await.is_err());
        let (mut texts, mut pings, mut pongs, mut code) = (0, 0, 0, None);
        while let Some(Ok(message)) = listens.next().await {
            match message {
                Message::Text(heard) => {
                    assert_eq!(heard.as_str(), text(texts));
                    texts += 1;
                }
                Message::Ping(_) => pings += 1,
                Message::Pong(said) => {
                    assert_eq!(&said[..], b"are you there");
                    pongs += 1;
                }
                Message::Close(frame) => code = frame.map(|frame| u16::from(frame.code)),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!((texts, pings, code), (TEXTS, TEXTS.div_ceil(7), Some(CloseCode::Draining.number())));
        assert!(pongs >= 1, "the last ping is answered");
        assert!(near.await.unwrap() >= 2_000, "each ping was a sign of life");
    }

    #[tokio::test]
    async fn nothing_is_said_after_a_close_and_nothing_that_is_not_text() {
        let (mut server, mut client) = pair().await;
        let bad = server.send(Outgoing::Text(Bytes::from_static(b"\xff"))).await;
        assert_eq!(bad, Err(SocketError::InvalidUtf8));
        server.send(Outgoing::Close(CloseCode::Normal)).await.unwrap();
        let late = server.send(Outgoing::Text(Bytes::from_static(b"late"))).await;
        assert_eq!(late, Err(SocketError::Gone));
        assert!(matches!(client.next().await, Some(Ok(Message::Close(_)))));
    }

    #[tokio::test]
    async fn a_close_is_answered_with_the_flush_after_it() {
        let (mut server, mut client) = pair().await;
        client.close(None).await.unwrap();
        assert_eq!(server.next().await, Some(Ok(Incoming::Closed)));
        let late = server.feed(Outgoing::Text(Bytes::from_static(b"late"))).await;
        assert_eq!(late, Err(SocketError::Gone), "a text would stand behind the answer");
        server.flush().await.unwrap();
        let answer = tokio::time::timeout(Duration::from_secs(10), client.next()).await;
        assert!(matches!(answer, Ok(Some(Ok(Message::Close(_))))), "{answer:?}");
        assert_eq!(server.next().await, None);
    }

    #[tokio::test]
    async fn an_idle_socket_owns_no_room_to_write() {
        let (mut server, mut client) = pair().await;
        server.send(Outgoing::Text("hello".into())).await.unwrap();
        assert_eq!(client.next().await.unwrap().unwrap().into_text().unwrap().as_str(), "hello");
        assert_eq!(server.inner.line.more_held(0).capacity(), 0);
    }

    /// The example of RFC 6455, section 1.3, with headers left out or added.
    fn asked(version: Version, method: Method, without: &str, with: &[(&'static str, &str)]) -> Request<()> {
        let mut request = Request::builder().version(version).method(method).uri("/v1/ws");
        for (name, value) in [
            ("host", "push.example.com"),
            ("connection", "keep-alive, Upgrade"),
            ("upgrade", "websocket"),
            ("sec-websocket-version", "13"),
            ("sec-websocket-protocol", SUBPROTOCOL),
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ] {
            if name != without {
                request = request.header(name, value);
            }
        }
        for (name, value) in with {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap()
    }

    #[test]
    fn the_answer_is_the_same_with_and_without_hyper() {
        let answer = handshake(&asked(Version::HTTP_11, Method::GET, "", &[])).unwrap();
        let mut head = Vec::new();
        answer.write(&mut head);
        let (length, read) = Response::try_parse(&head).unwrap().unwrap();
        assert_eq!((length, read.status()), (head.len(), answer.response().status()));
        assert_eq!(read.headers(), answer.response().headers());
        assert_eq!(read.headers()[SEC_WEBSOCKET_ACCEPT], "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }

    #[test]
    fn what_is_no_handshake_is_refused_with_400_and_another_version_with_426() {
        let key = |value: &'static str| {
            handshake(&asked(
                Version::HTTP_11,
                Method::GET,
                "sec-websocket-key",
                &[("sec-websocket-key", value)],
            ))
        };
        for bad in
            ["", "c2hvcnQ=", "not base64 at all!!!!!!", "dGhlIHNhbXBsZSBub25jZQ", "dGhlIHNhbXBsZSBub25jZSE="]
        {
            assert!(matches!(key(bad), Err(HandshakeError::Bad(_))), "{bad}");
        }
        let with = |without, with: &[(&'static str, &str)]| {
            handshake(&asked(Version::HTTP_11, Method::GET, without, with)).map(drop)
        };
        for twice in ["host", "sec-websocket-key", "origin"] {
            let headers = [(twice, "dGhlIHNhbXBsZSBub25jZQ=="), ("origin", "https://a.example")];
            assert!(matches!(with("", &headers), Err(HandshakeError::Bad(_))), "{twice}");
        }
        for missing in ["host", "sec-websocket-key"] {
            assert!(matches!(with(missing, &[]), Err(HandshakeError::Bad(_))), "{missing}");
        }
        for version in ["13, 8", "8", "", "013"] {
            let other = with("sec-websocket-version", &[("sec-websocket-version", version)]);
            assert!(matches!(other, Err(HandshakeError::Upgrade(_))), "{version}");
        }
        for other in ["RINGPUSH.v1.json", "ringpush.v1"] {
            let offered = with("sec-websocket-protocol", &[("sec-websocket-protocol", other)]);
            assert!(matches!(offered, Err(HandshakeError::Bad(_))), "{other}");
        }
        assert!(matches!(with("", &[("content-length", "5")]), Err(HandshakeError::Bad(_))));
        for (version, method) in [(Version::HTTP_10, Method::GET), (Version::HTTP_11, Method::HEAD)] {
            let refused = handshake(&asked(version, method, "", &[]));
            assert!(matches!(refused, Err(HandshakeError::Bad(_))));
        }
    }
}
