//! The `welcome` frame.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::ownership::Ownership;
use super::reconnect::ReconnectWindow;
use super::registry::SessionHandle;
use super::tokens::Known;
use crate::clock::Clock;
use crate::message::{LogId, Millis, Seq};
use crate::wire::frame::{LogPosition, WelcomeFrame};

/// What this version understands beyond the first one (docs/protocol.md).
const FEATURES: [&str; 6] = ["heartbeat", "window", "begin", "ticket", "history", "topics"];

/// Where a session stands in logs.
pub(super) type Standing = [(LogId, LogPosition)];

/// Writes `welcome` frames.
pub(super) struct Welcomer {
    pub(super) ownership: Arc<Ownership>,
    pub(super) window: Arc<ReconnectWindow>,
    /// Time between two pings.
    pub(super) ping_every: Duration,
    pub(super) clock: Clock,
}

impl Welcomer {
    /// The frame for a session that starts after `start`; `began` if its device was made to begin
    /// there, `heartbeat` if the client asked for heartbeats, `logs` if it understands logs, and
    /// `missing`, what it would get if it understood it.
    pub(super) fn frame(
        &self,
        handle: &SessionHandle,
        known: &Known,
        (start, began, heartbeat): (Seq, Option<Seq>, bool),
        (logs, missing): (Option<&Standing>, &[&str]),
    ) -> Bytes {
        let topics = |logs: &Standing| {
            logs.iter().filter_map(|(log, at)| Some((log.topic()?.to_string(), *at))).collect::<Vec<_>>()
        };
        let topics = logs.map(topics);
        let everyone = logs.into_iter().flatten().find(|(log, _)| *log == LogId::Everyone);
        let (generation, epoch) = self.ownership.version();
        let ping_every_ms = u64::try_from(self.ping_every.as_millis()).unwrap_or(u64::MAX);
        let mut session = [0; ulid::ULID_LEN];
        WelcomeFrame {
            user: handle.user.as_str(),
            device: handle.device.as_str(),
            node: self.ownership.node().as_str(),
            session: handle.id.array_to_str(&mut session),
            generation: &generation,
            epoch,
            since: start.get(),
            ping_every_ms,
            reconnect: self.window.hint(),
            token_expires_at: &Millis(known.expires_at_s.saturating_mul(1000)).rfc3339(),
            server_time: &self.clock.now().rfc3339(),
            features: &FEATURES,
            heartbeat_ms: heartbeat.then_some(ping_every_ms),
            began: began.map(Seq::get),
            topics: topics.as_ref().map(|all| all.iter().map(|(name, at)| (name.as_str(), *at)).collect()),
            everyone: everyone.map(|(_, at)| *at),
            missing,
        }
        .encode()
    }
}
