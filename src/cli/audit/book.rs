//! What the audit writes down: what was accepted, and what each user received.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::wire::frame::MoveReason;

/// What all tasks record.
#[derive(Default)]
pub(super) struct Book {
    /// By message id: recipient, position, and when it was due.
    pub(super) accepted: Mutex<HashMap<String, Accepted>>,
    pub(super) refused: Mutex<BTreeMap<String, u64>>,
    pub(super) users: Mutex<Vec<UserBook>>,
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
    pub(super) fn moved_by(&self, reason: MoveReason) -> bool {
        self.moves.iter().any(|one| one.reason == reason)
    }
}

#[derive(Clone)]
pub(super) struct Received {
    pub(super) id: String,
    pub(super) seq: u64,
    pub(super) at: Instant,
    pub(super) in_move: bool,
}
