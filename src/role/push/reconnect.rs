//! The hint that clients get for their next reconnect.

use std::sync::Arc;

use super::registry::Registry;
use crate::wire::frame::ReconnectHint;

/// The accept rate of a node without a limit, for pacing (docs/design.md, section 6).
const UNLIMITED_ACCEPT_PER_S: u32 = 4_000;
/// Longest window in which clients are told to reconnect, in ms.
const RECONNECT_MAX_MS: u64 = 60_000;

/// Sockets per second that a node with this limit accepts; 0 is no limit.
pub(super) fn accepts(limit: u32) -> u32 {
    if limit == 0 { UNLIMITED_ACCEPT_PER_S } else { limit }
}

/// Computes the hint from the sessions that this node holds.
pub(super) struct ReconnectWindow {
    registry: Arc<Registry>,
    accept_per_s: u32,
    jitter_ms: u64,
}

impl ReconnectWindow {
    /// `jitter_ms` is the shortest window.
    pub(super) fn new(registry: Arc<Registry>, accept_per_s: u32, jitter_ms: u64) -> Self {
        Self { registry, accept_per_s, jitter_ms }
    }

    /// The hint for a client whose connection ends now.
    pub(super) fn hint(&self) -> ReconnectHint {
        let sessions = self.registry.len();
        ReconnectHint { min_ms: 0, max_ms: window_ms(sessions, self.accept_per_s, self.jitter_ms) }
    }
}

/// The window in ms: long enough that this node's sessions fit into what one node accepts.
pub(super) fn window_ms(sessions: usize, accept_per_s: u32, jitter_ms: u64) -> u64 {
    jitter_ms.max((sessions as u64 * 1000 / u64::from(accepts(accept_per_s))).min(RECONNECT_MAX_MS))
}
