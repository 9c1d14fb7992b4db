//! Whether this node takes sockets, and why not.

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::telemetry::Health;

/// Why a node takes no sockets although it does not drain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Bar {
    /// This node alone is cut off from the registry.
    CutOff,
    /// Another process has this node's name.
    Fenced,
}

impl Bar {
    /// What `/readyz` says.
    const fn detail(self) -> &'static str {
        match self {
            Self::CutOff => "cut off from Redis (redis.url) alone",
            Self::Fenced => "another process has this node's name (node.name)",
        }
    }
}

/// Two independent reasons to take no sockets: a drain, which never ends, and a [`Bar`].
pub(super) struct Availability {
    draining: CancellationToken,
    barred: watch::Sender<Option<Bar>>,
    health: Health,
}

impl Availability {
    /// A node that takes sockets. A bar shows in `health` as the condition `membership`.
    pub(super) fn new(health: Health) -> Self {
        Self { draining: CancellationToken::new(), barred: watch::Sender::new(None), health }
    }

    /// Whether the node neither drains nor is barred.
    pub(super) fn takes_sockets(&self) -> bool {
        !self.is_draining() && self.bar().is_none()
    }

    /// Whether the drain has begun.
    pub(super) fn is_draining(&self) -> bool {
        self.draining.is_cancelled()
    }

    /// Resolves when the drain begins.
    pub(super) async fn drain_begun(&self) {
        self.draining.cancelled().await;
    }

    /// Begins the drain, for good.
    pub(super) fn begin_drain(&self) {
        self.draining.cancel();
    }

    /// The bar, if there is one.
    pub(super) fn bar(&self) -> Option<Bar> {
        *self.barred.borrow()
    }

    /// Bars the node.
    pub(super) fn set_bar(&self, bar: Bar) {
        self.health.set("membership", false, bar.detail());
        self.barred.send_replace(Some(bar));
    }

    /// Removes the bar. Returns whether there was one.
    pub(super) fn lift_bar(&self) -> bool {
        let barred = self.barred.send_replace(None).is_some();
        if barred {
            self.health.set("membership", true, "registered again");
        }
        barred
    }
}
