//! What is shown of the process and of the view in use, read when the metrics are asked for.

use std::sync::Arc;

use tokio::sync::watch;

use crate::membership::{NodeState, View};
use crate::telemetry::{Family, Gauge, Health, Metrics, process};

/// Registers them.
pub(super) fn register(metrics: &Metrics, health: &Health, views: watch::Receiver<Arc<View>>) {
    process::register(metrics);
    health.register(metrics);
    let held: Gauge = Gauge::default();
    let members: Family<[(&'static str, &'static str); 1], Gauge> = Family::default();
    metrics.register(|r| {
        r.register(
            "view_held",
            "Whether an earlier view is kept because the registry cannot be trusted",
            held.clone(),
        );
        r.register("view_members", "Push nodes in the view in use, by state", members.clone());
    });
    metrics.before_each_look(move || {
        let view = Arc::clone(&views.borrow());
        held.set(i64::from(view.held));
        for state in [NodeState::Active, NodeState::Draining] {
            let count = view.members.iter().filter(|member| member.state == state).count();
            let name = if state == NodeState::Active { "active" } else { "draining" };
            members.get_or_create(&[("state", name)]).set(count as i64);
        }
        members.get_or_create(&[("state", "absent")]).set(view.absent.len() as i64);
    });
}
