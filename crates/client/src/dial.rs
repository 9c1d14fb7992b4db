//! Opening lines: a token, the place of the user's node, a socket there.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::HeaderMap;
use ringpush_protocol::address::escape;
use ringpush_protocol::frame::{
    AuthCredential, AuthFrame, Begin, ClientFrame, ReconnectHint, SessionOptions, Since,
};
use ringpush_protocol::message::{ClientName, DeviceId, Seq};
use ringpush_protocol::rest::{ConnectRequest, ConnectResponse};

use crate::books::Positions;
use crate::http::HttpClient;
use crate::line::{Line, OPEN_DEADLINE};
use crate::options::Options;
use crate::tokens::{TokenFault, Tokens};

/// How this library names itself in `auth`.
const CLIENT: &str = concat!("ringpush-rust/", env!("CARGO_PKG_VERSION"));

/// Longest `Retry-After` that is believed, in seconds: a day.
const RETRY_AFTER_MAX_S: u64 = 86_400;

/// Why there is no line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum DialError {
    /// There is no token.
    Token(TokenFault),
    /// The server refused by a close code, or by an HTTP status.
    Refused { code: u16, reason: String, retry_after: Option<Duration>, hint: Option<ReconnectHint> },
    /// The server cannot be reached.
    Unreachable(String),
}

impl DialError {
    /// An HTTP answer that is a refusal.
    pub(crate) fn answered(status: u16, headers: &HeaderMap, body: &Bytes) -> Self {
        #[derive(serde::Deserialize, Default)]
        struct Refusal {
            #[serde(default)]
            reason: String,
        }
        let refusal: Refusal = serde_json::from_slice(body).unwrap_or_default();
        let after: Option<u64> =
            headers.get(http::header::RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
        let after = after.map(|seconds| Duration::from_secs(seconds.min(RETRY_AFTER_MAX_S)));
        let reason = match status {
            401 | 403 => refusal.reason,
            _ if refusal.reason.is_empty() => format!("answered {status}"),
            _ => refusal.reason,
        };
        Self::Refused { code: status, reason, retry_after: after, hint: None }
    }
}

/// Opens the lines of one client.
pub(crate) struct Dialer {
    url: String,
    pub(crate) device: DeviceId,
    pub(crate) user: Option<String>,
    since: Option<Since>,
    begin: Option<Begin>,
    pub(crate) window: u32,
    ask_first: bool,
    http: HttpClient,
    pub(crate) tokens: Tokens,
    opened: AtomicU64,
}

impl Dialer {
    pub(crate) fn new(options: Options, device: DeviceId) -> Self {
        Self {
            url: options.url.trim_end_matches('/').to_owned(),
            device,
            user: options.user,
            since: options.since,
            begin: options.begin,
            window: options.window,
            ask_first: options.ask_first,
            http: options.http.unwrap_or_default(),
            tokens: Tokens::new(options.token),
            opened: AtomicU64::new(0),
        }
    }

    /// Opens a line at the user's node, after these positions.
    pub(crate) async fn open(&self, positions: Positions) -> Result<Line, DialError> {
        let token = self.tokens.get().await.map_err(DialError::Token)?;
        let place = if self.ask_first { self.place(&token).await? } else { None };
        let Some(place) = place else {
            let url = format!("{}/v1/ws", self.url.replacen("http", "ws", 1));
            return self.open_at(&url, Some(AuthCredential::Token(token)), positions).await;
        };
        match (place.socket, place.ticket) {
            (Some(socket), Some(ticket)) => {
                self.open_at(&socket, Some(AuthCredential::Ticket(ticket)), positions).await
            }
            _ => self.open_at(&place.url, None, positions).await,
        }
    }

    /// Opens the line that a move names.
    pub(crate) async fn open_moved(&self, url: &str, positions: Positions) -> Result<Line, DialError> {
        let token = self.tokens.get().await.map_err(DialError::Token)?;
        self.open_at(url, Some(AuthCredential::Token(token)), positions).await
    }

    async fn open_at(
        &self,
        url: &str,
        credential: Option<AuthCredential>,
        positions: Positions,
    ) -> Result<Line, DialError> {
        let since = positions.inbox.and_then(Seq::new).map(Since::After).or(self.since);
        let options = SessionOptions {
            device: Some(self.device.clone()),
            since,
            begin: if since.is_none() { self.begin } else { None },
            heartbeat: Some(true),
            window: Some(self.window),
            client: ClientName::parse(CLIENT).ok(),
            logs: Some(Box::new(positions.logs)),
        };
        let id = self.opened.fetch_add(1, Ordering::Relaxed);
        match credential {
            Some(credential) => {
                let auth = ClientFrame::Auth(Box::new(AuthFrame { credential: Some(credential), options }));
                Line::open(id, url, Some(auth.encode())).await
            }
            None => Line::open(id, &format!("{url}{}", query_of(&options)), None).await,
        }
    }

    /// Where the user's node is. `None` where the server has no such call, or where it cannot be
    /// reached by it: then the socket itself will tell.
    async fn place(&self, token: &str) -> Result<Option<ConnectResponse>, DialError> {
        let url = format!("{}/v1/connect", self.url);
        let request = ConnectRequest { device: self.device.as_str().to_owned() };
        let body = Bytes::from(serde_json::to_vec(&request).unwrap_or_default());
        let Ok(answer) = self.http.exchange("POST", &url, Some(token), body, OPEN_DEADLINE).await else {
            return Ok(None);
        };
        match answer.status().as_u16() {
            200 => Ok(serde_json::from_slice(answer.body()).ok()),
            404 | 405 => Ok(None),
            status => Err(DialError::answered(status, answer.headers(), answer.body())),
        }
    }
}

/// The options behind the ticket of a URL, whose query has begun. The ticket names the device.
fn query_of(options: &SessionOptions) -> String {
    let mut query = String::from("&heartbeat=1");
    if let Some(window) = options.window {
        query.push_str(&format!("&window={window}"));
    }
    match (options.since, options.begin) {
        (Some(Since::After(seq)), _) => query.push_str(&format!("&since={seq}")),
        (Some(Since::Latest), _) => query.push_str("&since=latest"),
        (None, Some(Begin::Latest)) => query.push_str("&begin=latest"),
        (None, Some(Begin::Oldest)) => query.push_str("&begin=oldest"),
        (None, None) => {}
    }
    query.push_str(&format!("&client={}", escape(CLIENT)));
    query
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    #[test]
    fn a_retry_after_without_end_is_no_wait_without_end() {
        let after = |text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(http::header::RETRY_AFTER, HeaderValue::from_static(text));
            match DialError::answered(503, &headers, &Bytes::new()) {
                DialError::Refused { retry_after, .. } => retry_after,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(after("7"), Some(Duration::from_secs(7)));
        assert_eq!(after("18446744073709551615"), Some(Duration::from_secs(RETRY_AFTER_MAX_S)));
        assert_eq!(after("tomorrow"), None);
    }
}
