//! One socket to the server, from its `welcome` on.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use http::HeaderValue;
use http::header::SEC_WEBSOCKET_PROTOCOL;
use ringpush_protocol::frame::{
    ClientFrame, LogAcks, LogPosition, ReceivedFrame, ReconnectHint, SUBPROTOCOL, ServerFrame,
};
use ringpush_protocol::message::{LogId, Millis, TopicName};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

use crate::books::Said;
use crate::dial::DialError;
use crate::ledger::LineId;

/// How long opening a line may take, its `welcome` included.
pub(crate) const OPEN_DEADLINE: Duration = Duration::from_secs(10);

/// How much later than announced a sign of life may come.
const GRACE: Duration = Duration::from_secs(5);

/// How long a close may take.
const CLOSE_DEADLINE: Duration = Duration::from_secs(1);
/// Time between two frames about watched topics.
const PACE: Duration = Duration::from_millis(120);
/// Topics in one ack, whose frame has at most 4 KiB: a name has up to 64 bytes, a number 16.
const TOPICS_ACKED: usize = 40;

/// The code of a line that broke without a close frame.
pub(crate) const LOST: u16 = 1006;

/// What the server said when the line began.
#[derive(Debug, Clone)]
pub(crate) struct Welcome {
    pub(crate) user: String,
    pub(crate) node: String,
    pub(crate) since: u64,
    /// The logs that are read here, each after a position; `None`: the server knows of none.
    pub(crate) logs: Option<Vec<(LogId, u64)>>,
    pub(crate) hint: ReconnectHint,
    /// The server's time now, and when the token expires: `None` from an earlier version.
    pub(crate) times: Option<(Millis, Millis)>,
    /// A server without heartbeats is asked for a sign of life this often.
    pub(crate) ask_every: Option<Duration>,
    /// After this silence the line is lost.
    silence: Duration,
}

/// A socket that has had its `welcome`.
pub(crate) struct Line {
    pub(crate) id: LineId,
    pub(crate) welcome: Welcome,
    pub(crate) is_caught_up: bool,
    /// The last number of the inbox that came here.
    pub(crate) seq: u64,
    /// The last acks that were said here.
    pub(crate) said: Said,
    /// Frames about watched topics that wait for their turn, and when that is.
    words: VecDeque<ClientFrame>,
    turn: Instant,
    /// `left`s that are due for what this side has ended, by topic.
    lefts: HashMap<TopicName, u32>,
    /// Frames and pings so far.
    pub(crate) heard: u64,
    /// The `reason` of an `error` frame, which precedes a close.
    reason: String,
    stream: WebSocketStream<MaybeTlsStream<TcpStream>>,
    heard_at: Instant,
}

/// What a line brings.
#[derive(Debug)]
pub(crate) enum Heard {
    /// A frame.
    Frame(Box<ReceivedFrame>),
    /// The line has ended: the close code, [`LOST`] if there was none, and why.
    Ended(u16, String),
}

impl Line {
    /// Opens a socket at `url`, says `auth` if one is given, and waits for `welcome`.
    ///
    /// # Errors
    ///
    /// The server refused, or did not answer within [`OPEN_DEADLINE`].
    pub(crate) async fn open(id: LineId, url: &str, auth: Option<String>) -> Result<Self, DialError> {
        let opening = async {
            let mut request =
                url.into_client_request().map_err(|error| DialError::Unreachable(error.to_string()))?;
            request.headers_mut().insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(SUBPROTOCOL));
            let config = WebSocketConfig::default().read_buffer_size(16 * 1024).write_buffer_size(0);
            let opened = tokio_tungstenite::connect_async_with_config(request, Some(config), true).await;
            let (mut stream, _) = opened.map_err(refused_upgrade)?;
            if let Some(auth) = auth {
                let said = stream.send(Message::Text(auth.into())).await;
                said.map_err(|error| DialError::Unreachable(error.to_string()))?;
            }
            let welcome = until_welcome(&mut stream).await?;
            Ok(Self {
                id,
                is_caught_up: false,
                seq: 0,
                said: Said::default(),
                words: VecDeque::new(),
                turn: Instant::now(),
                lefts: HashMap::new(),
                heard: 0,
                reason: String::new(),
                welcome,
                stream,
                heard_at: Instant::now(),
            })
        };
        let late = |_| DialError::Unreachable("no answer in time".to_owned());
        timeout(OPEN_DEADLINE, Box::pin(opening)).await.map_err(late)?
    }

    /// The next frame, or the end. Pings are answered; they count as a sign of life.
    pub(crate) async fn hear(&mut self) -> Heard {
        loop {
            // Counts from when something was received last, however often this is called anew.
            let deadline = self.heard_at + self.welcome.silence;
            let Ok(next) = timeout_at(deadline, self.stream.next()).await else {
                return Heard::Ended(LOST, "silent".to_owned());
            };
            self.heard_at = Instant::now();
            self.heard += 1;
            match next {
                Some(Ok(Message::Text(text))) => return self.parsed(text.as_bytes()),
                Some(Ok(Message::Close(frame))) => return self.closed(frame),
                Some(Ok(_)) => {}
                Some(Err(error)) => return Heard::Ended(LOST, error.to_string()),
                None => return Heard::Ended(LOST, std::mem::take(&mut self.reason)),
            }
        }
    }

    fn parsed(&mut self, text: &[u8]) -> Heard {
        match ReceivedFrame::parse(text) {
            Ok(frame) => {
                if let ReceivedFrame::Message(message) = &frame
                    && message.of.is_inbox()
                {
                    self.seq = self.seq.max(message.seq);
                }
                if let ReceivedFrame::Other(ServerFrame::Error { reason, .. }) = &frame {
                    self.reason.clone_from(reason);
                }
                Heard::Frame(Box::new(frame))
            }
            Err(error) => Heard::Ended(LOST, format!("rubbish: {error}")),
        }
    }

    fn closed(&mut self, frame: Option<tokio_tungstenite::tungstenite::protocol::CloseFrame>) -> Heard {
        let (code, said) = frame.map_or((1005, String::new()), |f| (f.code.into(), f.reason.to_string()));
        let reason = std::mem::take(&mut self.reason);
        Heard::Ended(code, if reason.is_empty() { said } else { reason })
    }

    /// Sends a text. A line that is gone is noticed by [`hear`](Self::hear).
    pub(crate) async fn say(&mut self, text: String) {
        let _ = timeout(OPEN_DEADLINE, self.stream.send(Message::Text(text.into()))).await;
    }

    /// Has a frame about a watched topic said when its turn comes: the server takes ten in a
    /// second. Not where it does not know of logs.
    pub(crate) fn say_later(&mut self, frame: ClientFrame) {
        if self.welcome.logs.is_none() {
            return;
        }
        if let ClientFrame::Unwatch(topic) = &frame {
            *self.lefts.entry(topic.clone()).or_default() += 1;
        }
        self.words.push_back(frame);
    }

    /// When the next of these frames is due.
    pub(crate) fn next_words(&self) -> Option<Instant> {
        (!self.words.is_empty()).then_some(self.turn)
    }

    /// Says the next of them, if it is due.
    pub(crate) async fn say_due(&mut self, now: Instant) {
        if self.next_words().is_some_and(|turn| turn <= now)
            && let Some(frame) = self.words.pop_front()
        {
            self.turn = now + PACE;
            self.say(frame.encode()).await;
        }
    }

    /// Whether a `left` answers what this side has ended itself.
    pub(crate) fn was_due(&mut self, topic: &TopicName) -> bool {
        self.lefts.get_mut(topic).filter(|due| **due > 0).map(|due| *due -= 1).is_some()
    }

    /// Says acks, if there are any. A server that knows of no logs is told of none.
    pub(crate) async fn say_acks(&mut self, acks: LogAcks) {
        let of_logs = self.welcome.logs.is_some() && (!acks.topics.is_empty() || acks.everyone.is_some());
        if of_logs {
            for part in parts(acks) {
                self.say(ClientFrame::AckLogs(Box::new(part)).encode()).await;
            }
        } else if let Some(seq) = acks.seq {
            self.say(ClientFrame::Ack(seq).encode()).await;
        }
    }

    /// Closes in good order, within a second.
    pub(crate) async fn close(mut self) {
        let closing = async {
            let _ = self.stream.close(None).await;
            while let Some(Ok(_)) = self.stream.next().await {}
        };
        let _ = timeout(CLOSE_DEADLINE, closing).await;
    }
}

/// The same acks in frames of at most [`TOPICS_ACKED`] topics.
fn parts(acks: LogAcks) -> Vec<LogAcks> {
    let LogAcks { seq, topics, everyone } = acks;
    let mut all = vec![LogAcks { seq, topics: Vec::new(), everyone }];
    for topic in topics {
        if all.last().is_some_and(|last| last.topics.len() >= TOPICS_ACKED) {
            all.push(LogAcks::default());
        }
        if let Some(last) = all.last_mut() {
            last.topics.push(topic);
        }
    }
    all
}

async fn until_welcome(
    stream: &mut WebSocketStream<MaybeTlsStream<TcpStream>>,
) -> Result<Welcome, DialError> {
    let (mut reason, mut hint) = (String::new(), None);
    loop {
        let text = match stream.next().await {
            Some(Ok(Message::Text(text))) => text,
            Some(Ok(Message::Close(frame))) => {
                let (code, said) =
                    frame.map_or((1005, String::new()), |f| (f.code.into(), f.reason.to_string()));
                let reason = if reason.is_empty() { said } else { reason };
                return Err(DialError::Refused { code, reason, retry_after: None, hint });
            }
            Some(Ok(_)) => continue,
            Some(Err(error)) => return Err(DialError::Unreachable(error.to_string())),
            None => return Err(DialError::Unreachable("the connection was lost".to_owned())),
        };
        match ReceivedFrame::parse(text.as_bytes()) {
            Ok(ReceivedFrame::Other(ServerFrame::Error { reason: why, reconnect, .. })) => {
                (reason, hint) = (why, reconnect);
            }
            Ok(ReceivedFrame::Other(frame)) => {
                if let Some(welcome) = Welcome::of(frame) {
                    return Ok(welcome);
                }
            }
            Ok(_) => {}
            Err(error) => return Err(DialError::Unreachable(format!("rubbish: {error}"))),
        }
    }
}

impl Welcome {
    fn of(frame: ServerFrame) -> Option<Self> {
        let ServerFrame::Welcome {
            user,
            node,
            since,
            ping_every_ms,
            reconnect,
            token_expires_at,
            server_time,
            heartbeat_ms,
            topics,
            everyone,
            ..
        } = frame
        else {
            return None;
        };
        let every = Duration::from_millis(heartbeat_ms.unwrap_or(ping_every_ms).max(1));
        let times = Millis::parse_rfc3339(&server_time).zip(Millis::parse_rfc3339(&token_expires_at));
        let ask_every = heartbeat_ms.is_none().then_some(every);
        let logs = topics.map(|topics| {
            let named = |(name, at): (String, LogPosition)| {
                Some((LogId::Topic(TopicName::parse(&name).ok()?), at.after))
            };
            let everyone = everyone.map(|at| (LogId::Everyone, at.after));
            topics.into_iter().filter_map(named).chain(everyone).collect()
        });
        let hint = reconnect;
        Some(Self { user, node, since, logs, hint, times, ask_every, silence: every + GRACE })
    }
}

fn refused_upgrade(error: Error) -> DialError {
    match error {
        Error::Http(response) => {
            let (head, body) = response.into_parts();
            DialError::answered(head.status.as_u16(), &head.headers, &Bytes::from(body.unwrap_or_default()))
        }
        error => DialError::Unreachable(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn acks_of_many_topics_fit_into_their_frames() {
        let name = |n: usize| TopicName::parse(&format!("{}{n:04}", "x".repeat(60))).unwrap();
        let topics: Vec<_> = (0..100).map(|n| (name(n), 9_007_199_254_740_991)).collect();
        let acks = LogAcks { seq: Some(7), topics: topics.clone(), everyone: Some(8) };
        let parts = parts(acks);
        let said: Vec<_> = parts.iter().flat_map(|part| part.topics.clone()).collect();
        assert_eq!((said, parts[0].seq, parts[0].everyone), (topics, Some(7), Some(8)));
        assert!(parts[1..].iter().all(|part| part.seq.is_none() && part.everyone.is_none()));
        for part in parts {
            let frame = ClientFrame::AckLogs(Box::new(part));
            assert!(frame.encode().len() <= frame.max_bytes());
        }
    }
}
