//! The server's side of the opening handshake (RFC 6455, section 4.2).

use base64::{Engine, engine::general_purpose::STANDARD};
use http::header::{
    CONNECTION, CONTENT_LENGTH, HeaderName, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL,
    SEC_WEBSOCKET_VERSION, TRANSFER_ENCODING, UPGRADE,
};
use http::{HeaderValue, Method, Request, Response, StatusCode, Version};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::handshake::machine::TryParse;

use super::super::request::check_head;
use crate::wire::frame::SUBPROTOCOL;

/// Length of the nonce of a handshake, in bytes (RFC 6455, section 4.1).
pub(super) const KEY_BYTES: usize = 16;

/// Room for the response to a handshake, with the subprotocol, and the welcome that is sent with
/// it, in bytes.
pub(super) const ANSWER_ROOM: usize = 640;

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
    pub(super) accept: HeaderValue,
    /// Whether the client offered our subprotocol.
    pub(super) subprotocol: bool,
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
    pub(super) fn write(&self, head: &mut Vec<u8>) {
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
