//! The client's side of a socket, on tungstenite.

use std::time::Duration;

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use http::HeaderValue;
use http::header::SEC_WEBSOCKET_PROTOCOL;
use ringpush_protocol::frame::SUBPROTOCOL;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

/// The client's side of a socket.
pub(crate) struct ClientSocket {
    inner: WebSocketStream<MaybeTlsStream<TcpStream>>,
    /// When something was received last, and how long silence may last.
    heard: Instant,
    silence: Duration,
}

/// Something that a client received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Heard {
    /// A text message.
    Text(Bytes),
    /// The server closed with this code; 1005 if it gave none.
    Closed(u16),
    /// The connection broke.
    Lost,
}

/// Why a socket could not be opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ConnectionError {
    /// The server answered with another status. 401 means that the token or ticket is refused.
    #[error("the server answered {0}")]
    Answered(u16),
    /// The server cannot be reached.
    #[error("{0}")]
    Unreachable(String),
}

/// Opens a socket at `url`, with a token if one is given. A server that says nothing for `deadline`
/// counts as lost, also after the upgrade, until [`ClientSocket::expect_life_within`] sets another
/// limit.
///
/// # Errors
///
/// [`ConnectionError`].
pub(crate) async fn open(
    url: &str,
    bearer: Option<&str>,
    deadline: Duration,
) -> Result<ClientSocket, ConnectionError> {
    let unreachable = |error: &dyn std::fmt::Display| ConnectionError::Unreachable(error.to_string());
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
        Ok(Err(Error::Http(response))) => Err(ConnectionError::Answered(response.status().as_u16())),
        Ok(Err(error)) => Err(unreachable(&error)),
        Err(_) => Err(unreachable(&"no answer in time")),
    }
}

impl ClientSocket {
    /// Receives the next message. Pings are answered.
    pub(crate) async fn hear(&mut self) -> Heard {
        loop {
            // Counts from when something was received last, however often this is called anew.
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

    /// From now on, silence of this length means that the connection is lost. Pings count as a sign
    /// of life.
    pub(crate) fn expect_life_within(&mut self, silence: Duration) {
        self.silence = silence;
    }

    /// Sends a text. Returns false if the connection is gone.
    pub(crate) async fn say(&mut self, text: String) -> bool {
        self.inner.send(Message::Text(text.into())).await.is_ok()
    }

    /// Closes in good order, within a second.
    pub(crate) async fn close(mut self) {
        let _ = tokio::time::timeout(Duration::from_secs(1), self.inner.close(None)).await;
    }
}
