//! The queue of one push node, and the task that empties it.

use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio_util::task::AbortOnDropHandle;
use tower::ServiceExt;

use super::super::PushService;
use super::super::backlog::{Backlog, Queued};
use super::{CALL_DEADLINE, Inner};
use crate::message::NodeId;
use crate::wire::peer::{LiveMessage, LogHint, PeerError, PushRequest, PushResponse, ViewVersion};

/// Delay after a failed call, so that a dead node costs nothing.
pub(super) const FAILURE_REST: Duration = Duration::from_millis(100);

/// One node's queue and the task that empties it.
pub(super) struct PeerQueue<T> {
    pub(super) backlog: Arc<Backlog<T>>,
    pub(super) task: AbortOnDropHandle<()>,
}

/// What goes to a node in a queue of its own.
pub(super) trait Lane: Queued {
    /// The request that brings a batch.
    fn request(batch: Arc<[Self]>, missed: bool, stamp: ViewVersion) -> PushRequest;

    /// The node that took this batch has a newer view than this router.
    fn heard_of(dispatch: &Inner, news: ViewVersion, batch: &[Self]);
}

impl Lane for LiveMessage {
    fn request(batch: Arc<[Self]>, sweep: bool, stamp: ViewVersion) -> PushRequest {
        PushRequest::Deliver { batch, sweep, stamp }
    }

    fn heard_of(dispatch: &Inner, news: ViewVersion, batch: &[Self]) {
        dispatch.heard_of(news, batch.to_vec());
    }
}

impl Lane for LogHint {
    fn request(hints: Arc<[Self]>, missed: bool, stamp: ViewVersion) -> PushRequest {
        PushRequest::Hint { hints, missed, stamp }
    }

    fn heard_of(dispatch: &Inner, news: ViewVersion, batch: &[Self]) {
        dispatch.heard_of_by_hint(news, batch.to_vec());
    }
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

pub(super) fn request_of<T: Lane>(
    batch: Vec<T>,
    missed: bool,
    stamp: &ViewVersion,
) -> (PushRequest, Arc<[T]>) {
    let batch: Arc<[T]> = batch.into();
    (T::request(Arc::clone(&batch), missed, stamp.clone()), batch)
}

/// Acts on a node's response to a batch. Returns whether the node took it.
pub(super) fn settle<T: Lane>(
    dispatch: &Inner,
    node: &NodeId,
    stamp: &ViewVersion,
    batch: &[T],
    answer: Result<PushResponse, PeerError>,
) -> bool {
    match answer {
        Ok(PushResponse::Done(theirs)) if theirs.is_news_to(stamp) => {
            T::heard_of(dispatch, theirs, batch);
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

pub(super) async fn run_queue<T: Lane>(node: NodeId, backlog: Arc<Backlog<T>>, dispatch: Weak<Inner>) {
    loop {
        let (batch, sweep) = backlog.take().await;
        let Some(inner) = dispatch.upgrade() else { return };
        let stamp = inner.recent.lock().current.stamp();
        let service = inner.directory.find(&node);
        drop(inner);
        let (request, batch) = request_of(batch, sweep, &stamp);
        let answer = call(service, &node, request).await;
        let Some(inner) = dispatch.upgrade() else { return };
        if !settle(&inner, &node, &stamp, &batch, answer) {
            drop(inner);
            tokio::time::sleep(FAILURE_REST).await;
            backlog.mark_missed();
        }
    }
}
