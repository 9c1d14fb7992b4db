//! Which primary the driver speaks to, and since when.

use std::sync::Arc;
use std::time::Duration;

use mongodb::event::EventHandler;
use mongodb::event::sdam::SdamEvent;
use mongodb::options::ServerAddress;
use mongodb::{ServerType, TopologyType};
use parking_lot::Mutex;

use crate::clock::Clock;

/// Follows the changes of the primary that the driver sees.
pub(super) struct Primary {
    clock: Clock,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    address: Option<ServerAddress>,
    since: Duration,
    changes: u64,
    /// The changes are not to be seen from here: routers stand between.
    hidden: bool,
}

impl Primary {
    pub(super) fn new(clock: Clock) -> Self {
        Self { clock, seen: Mutex::default() }
    }

    /// What the driver tells its changes to.
    pub(super) fn observer(self: Arc<Self>) -> EventHandler<SdamEvent> {
        EventHandler::callback(move |event| {
            let SdamEvent::TopologyDescriptionChanged(change) = event else { return };
            let now = &change.new_description;
            let mut servers = now.servers().into_values();
            let primary = servers.find(|server| server.server_type() == ServerType::RsPrimary);
            let mut seen = self.seen.lock();
            seen.hidden = matches!(now.topology_type(), TopologyType::Sharded | TopologyType::LoadBalanced);
            // One that steps down and is elected again counts as another.
            let address = primary.map(|primary| primary.address().clone());
            if seen.address != address {
                seen.address = address;
                seen.since = self.clock.uptime();
                seen.changes += 1;
            }
        })
    }

    /// How often the primary has come, gone or changed.
    pub(super) fn changes(&self) -> u64 {
        self.seen.lock().changes
    }

    /// Whether the primary may have changed within this time.
    pub(super) fn is_newer_than(&self, time: Duration) -> bool {
        let seen = self.seen.lock();
        seen.hidden || seen.address.is_none() || self.clock.uptime().saturating_sub(seen.since) < time
    }
}
