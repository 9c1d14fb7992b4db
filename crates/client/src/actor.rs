//! The task that holds the socket: connects, follows moves, and hands events to the application.

use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use ringpush_protocol::address::escape;
use ringpush_protocol::backoff::between;
use ringpush_protocol::close::CloseCode;
use ringpush_protocol::frame::{ClientFrame, GapReason, ReceivedFrame, ReconnectHint, ServerFrame, Since};
use ringpush_protocol::message::Seq;
use ringpush_protocol::rest::{ConnectRequest, ConnectResponse};
use tokio::sync::{mpsc, watch};

use crate::socket::{ClientSocket, ConnectionError, Heard, open};
use crate::{Acked, ClientConfig, Event};

/// How long opening a socket, or asking where to, may take.
const OPEN_DEADLINE: Duration = Duration::from_secs(10);

/// How often a move is tried before its next one is waited for.
const MOVE_TRIES: u32 = 3;

/// How much later than announced a ping may come.
const PING_GRACE: Duration = Duration::from_secs(5);

/// Where no server has said otherwise yet.
const FIRST_HINT: ReconnectHint = ReconnectHint { min_ms: 0, max_ms: 2_000 };

/// Longest wait between two tries of a server that cannot be reached.
const RETRY_MAX: Duration = Duration::from_secs(10);

pub(super) struct Actor {
    config: ClientConfig,
    /// The last number handed on, or told to be gone.
    last: Option<u64>,
    /// Resets that were handed on.
    resets: u64,
    hint: ReconnectHint,
    events: mpsc::Sender<Event>,
    acks: watch::Receiver<Acked>,
}

/// How serving one socket, and those it moved to, ended.
enum Ending {
    /// Come back, after the hint.
    Lost(String),
    /// Do not.
    Refused(u16),
    /// The application has gone.
    Dropped,
}

/// A move under way: the new socket is being opened, or has yet to catch up.
struct Moving {
    opening: BoxFuture<'static, Result<ClientSocket, ConnectionError>>,
}

impl Actor {
    /// The task of a client, before it runs.
    pub(super) fn new(
        config: ClientConfig,
        events: mpsc::Sender<Event>,
        acks: watch::Receiver<Acked>,
    ) -> Self {
        Self { last: None, resets: 0, hint: FIRST_HINT, config, events, acks }
    }

    pub(super) async fn run(mut self) {
        let mut failures = 0u32;
        loop {
            let (ending, served) = match self.connect().await {
                Ok(socket) => (self.serve(socket).await, true),
                Err(ending) => (ending, false),
            };
            failures = if served { 0 } else { failures + 1 };
            match ending {
                Ending::Dropped => return,
                Ending::Refused(code) => {
                    let _ = self.events.send(Event::Refused { code }).await;
                    return;
                }
                Ending::Lost(why) => {
                    let rest = self.rest(failures);
                    if self.events.send(Event::Waiting { why, rest }).await.is_err() {
                        return;
                    }
                    tokio::time::sleep(rest).await;
                }
            }
        }
    }

    /// Drawn from the server's hint; the longer it cannot be reached, the longer.
    fn rest(&self, failures: u32) -> Duration {
        let hint = self.hint;
        let longest = Duration::from_millis(hint.max_ms).max(Duration::from_millis(200 << failures.min(6)));
        between(Duration::from_millis(hint.min_ms), longest.min(RETRY_MAX), &mut rand::rng())
    }

    /// Where this connection is to start: after what was handed on, or where the application said.
    fn since(&self) -> Option<Since> {
        self.last.and_then(Seq::new).map(Since::After).or(self.config.since)
    }

    async fn connect(&mut self) -> Result<ClientSocket, Ending> {
        let token = (self.config.token)();
        if self.config.ask_first {
            let url = self.ask_where(&token).await?;
            return self.open(self.with_place(&url), None).await;
        }
        let base = self.config.target.trim_end_matches('/').replacen("http", "ws", 1);
        let url = self.with_place(&format!("{base}/v1/ws?device={}", escape(self.config.device.as_str())));
        self.open(url, Some(&token)).await
    }

    async fn open(&self, url: String, token: Option<&str>) -> Result<ClientSocket, Ending> {
        match open(&url, token, OPEN_DEADLINE).await {
            Ok(socket) => Ok(socket),
            // A ticket that was used or ran out is no reason to give up: the next try asks for
            // another.
            Err(ConnectionError::Answered(401)) if token.is_some() => Err(Ending::Refused(4501)),
            Err(ConnectionError::Answered(403)) => Err(Ending::Refused(4503)),
            Err(fault) => Err(Ending::Lost(fault.to_string())),
        }
    }

    async fn ask_where(&self, token: &str) -> Result<String, Ending> {
        let url = format!("{}/v1/connect", self.config.target.trim_end_matches('/'));
        let request = ConnectRequest { device: self.config.device.as_str().to_owned() };
        let body = Bytes::from(serde_json::to_vec(&request).unwrap_or_default());
        match self.config.http.send("POST", &url, Some(token), body, OPEN_DEADLINE).await {
            Ok((200, body)) => serde_json::from_slice::<ConnectResponse>(&body)
                .map(|answer| answer.url)
                .map_err(|error| Ending::Lost(format!("the answer to connect cannot be read: {error}"))),
            Ok((401, _)) => Err(Ending::Refused(4501)),
            Ok((status, _)) => Err(Ending::Lost(format!("connect was answered {status}"))),
            Err(why) => Err(Ending::Lost(why)),
        }
    }

    /// Adds `since` to a URL that has a query already.
    fn with_place(&self, url: &str) -> String {
        match self.since() {
            Some(Since::After(seq)) => format!("{url}&since={seq}"),
            Some(Since::Latest) => format!("{url}&since=latest"),
            None => url.to_owned(),
        }
    }

    /// Serves a socket, and during a move two of them.
    async fn serve(&mut self, mut socket: ClientSocket) -> Ending {
        let mut moving: Option<Moving> = None;
        let mut next: Option<ClientSocket> = None;
        loop {
            tokio::select! {
                heard = socket.hear() => match self.take(heard).await {
                    Ok(Taken::Move(order)) if next.is_none() => moving = Some(self.begin_move(&order)),
                    Ok(Taken::Welcome(ping_every)) => socket.expect_life_within(silence(ping_every)),
                    Ok(_) => {}
                    // The old socket ended while the new one is there: go on with that.
                    Err(Ending::Lost(_)) if next.is_some() => {
                        if let Some(new) = next.take() {
                            socket = new;
                        }
                    }
                    Err(ending) => return ending,
                },
                heard = hear(&mut next) => match self.take(heard).await {
                    Ok(Taken::CaughtUp) => {
                        if let Some(new) = next.take() {
                            std::mem::replace(&mut socket, new).close().await;
                            self.repeat_ack(&mut socket).await;
                        }
                    }
                    Ok(Taken::Welcome(ping_every)) => {
                        if let Some(new) = &mut next {
                            new.expect_life_within(silence(ping_every));
                        }
                    }
                    Ok(_) => {}
                    Err(Ending::Dropped) => return Ending::Dropped,
                    Err(_) => next = None,
                },
                opened = opened(&mut moving) => {
                    moving = None;
                    next = opened.ok();
                }
                changed = self.acks.changed() => {
                    if changed.is_err() {
                        socket.close().await;
                        return Ending::Dropped;
                    }
                    self.repeat_ack(&mut socket).await;
                }
            }
        }
    }

    /// Acks are cumulative: the newest says it all, also to a socket that has not heard the earlier
    /// ones.
    async fn repeat_ack(&mut self, socket: &mut ClientSocket) {
        let newest = *self.acks.borrow_and_update();
        // What was acked before a reset was of other numbers.
        if newest.resets == self.resets && newest.seq > 0 {
            socket.say(ClientFrame::Ack(newest.seq).encode()).await;
        }
    }

    /// Waits as told, then opens the new socket; the old one is served meanwhile.
    fn begin_move(&self, order: &MoveOrder) -> Moving {
        let url = format!("{}&device={}", order.url, escape(self.config.device.as_str()));
        // What is handed on until the new socket opens is sent twice, and told apart by its number.
        let url = self.with_place(&url);
        let (token, hint, after) = ((self.config.token)(), self.hint, Duration::from_millis(order.after_ms));
        let opening = async move {
            tokio::time::sleep(after).await;
            let mut tries = 1;
            loop {
                match open(&url, Some(&token), OPEN_DEADLINE).await {
                    Ok(socket) => return Ok(socket),
                    Err(fault) if tries >= MOVE_TRIES => return Err(fault),
                    Err(_) => tries += 1,
                }
                let (min, max) = (Duration::from_millis(hint.min_ms), Duration::from_millis(hint.max_ms));
                let rest = between(min, max, &mut rand::rng());
                tokio::time::sleep(rest).await;
            }
        };
        Moving { opening: opening.boxed() }
    }

    async fn take(&mut self, heard: Heard) -> Result<Taken, Ending> {
        match heard {
            Heard::Lost => Err(Ending::Lost("the connection was lost".to_owned())),
            Heard::Closed(code) if CloseCode::may_reconnect(code) => {
                Err(Ending::Lost(format!("the server closed with {code}")))
            }
            Heard::Closed(code) => Err(Ending::Refused(code)),
            Heard::Text(text) => match ReceivedFrame::parse(&text) {
                Ok(frame) => self.take_frame(frame).await,
                Err(error) => {
                    Err(Ending::Lost(format!("the server sent something else than a frame: {error}")))
                }
            },
        }
    }

    async fn take_frame(&mut self, frame: ReceivedFrame) -> Result<Taken, Ending> {
        let event = match frame {
            ReceivedFrame::Unknown => return Ok(Taken::Nothing),
            ReceivedFrame::Message(message) => {
                if self.last.is_some_and(|last| message.seq <= last) {
                    return Ok(Taken::Nothing);
                }
                self.last = Some(message.seq);
                Event::Message(message)
            }
            ReceivedFrame::Other(ServerFrame::Gap { after, before, reason }) => {
                let known = reason != GapReason::Reset && self.last.is_some_and(|last| before <= last + 1);
                if known {
                    return Ok(Taken::Nothing);
                }
                self.last = Some(before.saturating_sub(1));
                self.resets += u64::from(reason == GapReason::Reset);
                Event::Gap { after, before, reason }
            }
            ReceivedFrame::Other(ServerFrame::CaughtUp { seq }) => {
                self.tell(Event::CaughtUp(seq)).await?;
                return Ok(Taken::CaughtUp);
            }
            ReceivedFrame::Other(ServerFrame::Welcome { node, since, reconnect, ping_every_ms, .. }) => {
                self.hint = reconnect;
                // Where this client began holds for all its sockets: `latest` would mean another
                // moment on each.
                self.last.get_or_insert(since);
                self.tell(Event::Welcome { node, since }).await?;
                return Ok(Taken::Welcome(Duration::from_millis(ping_every_ms)));
            }
            ReceivedFrame::Other(ServerFrame::Move { url, node, after_ms, reason, .. }) => {
                self.tell(Event::Moving { node, reason }).await?;
                return Ok(Taken::Move(MoveOrder { url, after_ms }));
            }
            ReceivedFrame::Other(ServerFrame::Error { reconnect, .. }) => {
                self.hint = reconnect.unwrap_or(self.hint);
                return Ok(Taken::Nothing);
            }
            ReceivedFrame::Other(
                ServerFrame::Refreshed { .. } | ServerFrame::Pong | ServerFrame::Heartbeat,
            ) => {
                return Ok(Taken::Nothing);
            }
        };
        self.tell(event).await?;
        Ok(Taken::Nothing)
    }

    async fn tell(&self, event: Event) -> Result<(), Ending> {
        self.events.send(event).await.map_err(|_| Ending::Dropped)
    }
}

/// What a frame asks of the one who serves.
enum Taken {
    Nothing,
    /// The server will ping this often.
    Welcome(Duration),
    CaughtUp,
    Move(MoveOrder),
}

/// The server pings on schedule, whatever else it sends: one ping that does not come means that its
/// host, or the network, has gone without a word.
fn silence(ping_every: Duration) -> Duration {
    ping_every + PING_GRACE
}

struct MoveOrder {
    url: String,
    after_ms: u64,
}

async fn hear(socket: &mut Option<ClientSocket>) -> Heard {
    match socket {
        Some(socket) => socket.hear().await,
        None => std::future::pending().await,
    }
}

async fn opened(moving: &mut Option<Moving>) -> Result<ClientSocket, ConnectionError> {
    match moving {
        Some(moving) => (&mut moving.opening).await,
        None => std::future::pending().await,
    }
}
