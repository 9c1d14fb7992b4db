//! The client library: connect, move, resume, ack. Each message is handed on once and in order.
//!
//! A [`Client`] is a handle; a task behind it holds the socket, or two of them during a move: the
//! new one is opened first, and the old one closed when the new one has caught up. What both
//! deliver is told apart by `seq`.

mod actor;
pub mod http;
mod socket;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::actor::Actor;
use crate::http::HttpClient;
use ringpush_protocol::frame::{GapReason, MessageFrame, MoveReason, Since};
use ringpush_protocol::message::DeviceId;

/// Events waiting for the application; then the socket is read no further.
const EVENTS: usize = 256;

/// Where tokens come from: asked again for each connection.
pub type TokenSource = Arc<dyn Fn() -> String + Send + Sync>;

/// Who connects, and where.
#[derive(Clone)]
pub struct ClientConfig {
    /// Any push node or the load balancer, such as `http://127.0.0.1:8080`.
    pub target: String,
    /// The user's token.
    pub token: TokenSource,
    /// The device.
    pub device: DeviceId,
    /// Where to start; None is the device's own cursor.
    pub since: Option<Since>,
    /// Ask `POST /v1/connect` for the right node first. Otherwise any node is taken, and moves are
    /// followed.
    pub ask_first: bool,
    /// Asks it. Clones of one share their connections; one each would cost every client 100 KiB of
    /// trusted roots.
    pub http: HttpClient,
}

/// What happens to a client.
#[derive(Debug)]
pub enum Event {
    /// A message that was not handed on before.
    Message(MessageFrame),
    /// The backlog is delivered.
    CaughtUp(u64),
    /// Numbers that will never come.
    Gap {
        /// The last one before the hole.
        after: u64,
        /// The next that can come.
        before: u64,
        /// Why they are missing.
        reason: GapReason,
    },
    /// A socket is open and welcome.
    Welcome {
        /// On which node.
        node: String,
        /// Where it starts.
        since: u64,
    },
    /// The server says to move there.
    Moving {
        /// Which node.
        node: String,
        /// The reason for the move.
        reason: MoveReason,
    },
    /// The connection was lost, or could not be made; the next try comes after this.
    Waiting {
        /// What happened.
        why: String,
        /// Until the next try.
        rest: Duration,
    },
    /// The server closed with a code that says not to come back, or refused the token. The last
    /// event.
    Refused {
        /// The close code, or 4501 for a 401.
        code: u16,
    },
}

/// What the application has taken: up to `seq`, in the numbers that hold since so many resets.
/// After one, smaller numbers count again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Acked {
    resets: u64,
    seq: u64,
}

/// A connection that reconnects, moves and resumes. Dropping it ends the connection.
pub struct Client {
    events: mpsc::Receiver<Event>,
    /// Acks are cumulative, so only the newest counts, and saying one never waits.
    acks: watch::Sender<Acked>,
    /// Resets that the application was told of.
    resets: u64,
    task: JoinHandle<()>,
}

impl Client {
    /// Begins to connect.
    #[must_use]
    pub fn start(config: ClientConfig) -> Self {
        let (to_app, events) = mpsc::channel(EVENTS);
        let (acks, from_app) = watch::channel(Acked::default());
        let actor = Actor::new(config, to_app, from_app);
        Self { events, acks, resets: 0, task: tokio::spawn(actor.run()) }
    }

    /// The next event; None after the last one.
    pub async fn next(&mut self) -> Option<Event> {
        let event = self.events.recv().await;
        if let Some(Event::Gap { reason: GapReason::Reset, .. }) = &event {
            self.resets += 1;
        }
        event
    }

    /// Says that everything up to `seq` was taken by the application.
    pub fn ack(&self, seq: u64) {
        let acked = Acked { resets: self.resets, seq };
        self.acks.send_if_modified(|newest| {
            let newer = acked > *newest;
            *newest = acked.max(*newest);
            newer
        });
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.task.abort();
    }
}
