//! What the audit writes down: what was accepted, and what each user received.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use super::topics::TopicBook;
use crate::wire::frame::MoveReason;

/// A move that took longer than this does not count in the percentiles.
const MOVE_LIFE: Duration = Duration::from_secs(15);

/// What happened to a client.
pub(super) enum Happened {
    /// A message came: its id, its number, and the topic in whose log it has that number.
    Message(String, u64, Option<String>),
    /// Numbers of the inbox between these two will never come.
    Gap(u64, u64),
    /// It has a line on this node, and the backlog is on its way.
    Welcome(String),
    /// The backlog of its line on this node is delivered.
    Live(String),
    /// It was told to move to this node.
    Moving(String, MoveReason),
    /// It has lost its line, or could not have one.
    Waiting,
    /// The server closed with this code for good; 0 if it was not the server.
    Refused(u16),
}

/// What all tasks record.
#[derive(Default)]
pub(super) struct Book {
    /// By message id: recipient, position, and when it was due.
    pub(super) accepted: Mutex<HashMap<String, Accepted>>,
    pub(super) refused: Mutex<BTreeMap<String, u64>>,
    pub(super) topics: TopicBook,
    pub(super) users: Mutex<Vec<UserBook>>,
}

impl Book {
    /// Writes down what happened to the client of a user.
    pub(super) fn note(&self, user: usize, happened: Happened) {
        let mut users = self.users.lock();
        let Some(own) = users.get_mut(user) else { return };
        match happened {
            Happened::Message(id, seq, log) => {
                let in_move = own.moving_since.is_some_and(|since| since.elapsed() < MOVE_LIFE);
                own.received.push(Received { id, seq, log, at: Instant::now(), in_move });
            }
            Happened::Gap(after, before) => own.gaps.push((after, before)),
            Happened::Welcome(node) => own.is_on(node),
            Happened::Live(node) => {
                own.is_on(node);
                own.ready = true;
                own.moving_since = None;
                own.away.extend(own.away_since.take().map(|since| since.elapsed()));
            }
            Happened::Moving(to, reason) => {
                let at = Instant::now();
                own.moving_since = Some(at);
                own.moves.push(Moved { at, from: own.is_on.clone(), to, reason });
            }
            Happened::Waiting => {
                own.reconnects += 1;
                own.away_since.get_or_insert_with(Instant::now);
            }
            Happened::Refused(code) => own.refused = Some(code),
        }
    }
}

pub(super) struct Accepted {
    pub(super) user: usize,
    pub(super) seq: u64,
    pub(super) due: Instant,
}

#[derive(Default, Clone)]
pub(super) struct UserBook {
    pub(super) received: Vec<Received>,
    pub(super) gaps: Vec<(u64, u64)>,
    pub(super) ready: bool,
    /// The node of the user's first socket, and of the last one.
    pub(super) began_on: Option<String>,
    pub(super) is_on: String,
    pub(super) moves: Vec<Moved>,
    pub(super) reconnects: u64,
    pub(super) refused: Option<u16>,
    pub(super) moving_since: Option<Instant>,
    /// Since its socket was lost, until it has caught up on another one.
    pub(super) away_since: Option<Instant>,
    pub(super) away: Vec<Duration>,
}

/// Users that were told to move, by an owner's change or by a drain.
#[derive(Clone)]
pub(super) struct Moved {
    pub(super) at: Instant,
    pub(super) from: String,
    pub(super) to: String,
    pub(super) reason: MoveReason,
}

impl UserBook {
    fn is_on(&mut self, node: String) {
        self.began_on.get_or_insert_with(|| node.clone());
        self.is_on = node;
    }

    pub(super) fn moved_by(&self, reason: MoveReason) -> bool {
        self.moves.iter().any(|one| one.reason == reason)
    }
}

#[derive(Clone)]
pub(super) struct Received {
    pub(super) id: String,
    pub(super) seq: u64,
    /// The topic in whose log it has that number; `None`: in the inbox.
    pub(super) log: Option<String>,
    pub(super) at: Instant,
    pub(super) in_move: bool,
}
