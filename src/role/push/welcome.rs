//! The `welcome` frame.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::ownership::Ownership;
use super::reconnect::ReconnectWindow;
use super::registry::SessionHandle;
use crate::message::Seq;
use crate::wire::frame::ServerFrame;

/// Writes `welcome` frames.
pub(super) struct Welcomer {
    pub(super) ownership: Arc<Ownership>,
    pub(super) window: Arc<ReconnectWindow>,
    /// Time between two pings.
    pub(super) ping_every: Duration,
}

impl Welcomer {
    /// The frame for a session that starts after `start`.
    pub(super) fn frame(&self, handle: &SessionHandle, start: Seq) -> Bytes {
        let (generation, epoch) = self.ownership.version();
        ServerFrame::Welcome {
            user: handle.user.to_string(),
            device: handle.device.to_string(),
            node: self.ownership.node().to_string(),
            session: handle.id.to_string(),
            generation: generation.to_string(),
            epoch,
            since: start.get(),
            ping_every_ms: u64::try_from(self.ping_every.as_millis()).unwrap_or(u64::MAX),
            reconnect: self.window.hint(),
        }
        .encode()
    }
}
