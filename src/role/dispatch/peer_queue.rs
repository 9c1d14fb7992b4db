//! The queue of one push node, and the task that empties it.

use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio_util::task::AbortOnDropHandle;
use tower::ServiceExt;

use super::super::PushService;
use super::super::backlog::Backlog;
use super::{CALL_DEADLINE, Inner};
use crate::message::NodeId;
use crate::wire::peer::{LiveMessage, PeerError, PushRequest, PushResponse, ViewVersion};

/// Delay after a failed call, so that a dead node costs nothing.
pub(super) const FAILURE_REST: Duration = Duration::from_millis(100);

/// One node's queue and the task that empties it.
pub(super) struct PeerQueue {
    pub(super) backlog: Arc<Backlog>,
    pub(super) task: AbortOnDropHandle<()>,
}

pub(super) async fn call(
    service: Option<PushService>,
    node: &NodeId,
    request: PushRequest,
) -> Result<PushResponse, PeerError> {
    let service = service.ok_or_else(|| PeerError::Unavailable(format!("{node} is not known here")))?;
    tokio::time::timeout(CALL_DEADLINE, service.oneshot(request)).await.unwrap_or_else(|_| Err(silent(node)))
}

pub(super) fn silent(node: &NodeId) -> PeerError {
    PeerError::Unavailable(format!("{node} did not answer in time"))
}

pub(super) fn deliver_request(
    batch: Vec<LiveMessage>,
    sweep: bool,
    stamp: &ViewVersion,
) -> (PushRequest, Arc<[LiveMessage]>) {
    let batch: Arc<[LiveMessage]> = batch.into();
    (PushRequest::Deliver { batch: Arc::clone(&batch), sweep, stamp: stamp.clone() }, batch)
}

/// Acts on a node's response to a batch. Returns whether the node took it.
pub(super) fn settle(
    dispatch: &Inner,
    node: &NodeId,
    stamp: &ViewVersion,
    batch: &[LiveMessage],
    answer: Result<PushResponse, PeerError>,
) -> bool {
    match answer {
        Ok(PushResponse::Done(theirs)) if theirs.is_news_to(stamp) => {
            dispatch.heard_of(theirs, batch.to_vec());
            true
        }
        Ok(_) => true,
        Err(fault) => {
            tracing::debug!(%node, %fault, "a batch was not taken; the node will look into the inboxes");
            dispatch.metrics.dropped.inc_by(batch.len() as u64);
            false
        }
    }
}

pub(super) async fn run_queue(node: NodeId, backlog: Arc<Backlog>, dispatch: Weak<Inner>) {
    loop {
        let (batch, sweep) = backlog.take().await;
        let Some(inner) = dispatch.upgrade() else { return };
        let stamp = inner.recent.lock().current.stamp();
        let service = inner.directory.find(&node);
        drop(inner);
        let (request, batch) = deliver_request(batch, sweep, &stamp);
        let answer = call(service, &node, request).await;
        let Some(inner) = dispatch.upgrade() else { return };
        if !settle(&inner, &node, &stamp, &batch, answer) {
            drop(inner);
            tokio::time::sleep(FAILURE_REST).await;
            backlog.mark_missed();
        }
    }
}
