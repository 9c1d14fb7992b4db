//! Reading pages of the inbox for sessions that are behind.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::task::JoinSet;

use super::PushMetrics;
use super::mailbox::encoded;
use super::registry::SessionHandle;
use crate::backoff::Backoff;
use crate::inbox::{Inbox, InboxPage, PageLimit};
use crate::message::{Seq, UserId};
use crate::role::shown;
use crate::session::Page;
use crate::telemetry::WAY;
use crate::wire::close::CloseCode;

/// Concurrent page reads of one node.
const READS_IN_FLIGHT: usize = 64;
/// Size of a page: at most 256 frames with 150 bytes beside their payload, 38 KiB, and 64 KiB of
/// payload or one message. Together with the high-water mark of a session's queue it stays within
/// the outbound limit.
pub(super) const PAGE: PageLimit = PageLimit { messages: 256, bytes: 64 * 1024 };
/// Delay between two tries of a read that the inbox did not answer, at first and at most.
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(5);

/// A request for a page.
struct PageRequest {
    handle: Weak<SessionHandle>,
    after: Seq,
    /// Most messages that the session can use; `None`: any number.
    most: Option<u32>,
}

impl PageRequest {
    fn limit(&self) -> PageLimit {
        let most = self.most.map_or(PAGE.messages, |most| PAGE.messages.min(most as usize).max(1));
        PageLimit { messages: most, ..PAGE }
    }
}

/// Requests for pages. Each session has at most one, so the queue is bounded by the number of
/// sessions.
pub(super) struct PageReads {
    inbox: Arc<dyn Inbox>,
    metrics: PushMetrics,
    waiting: Mutex<VecDeque<PageRequest>>,
    requested: Notify,
}

impl PageReads {
    /// Reads from `inbox`.
    pub(super) fn new(inbox: Arc<dyn Inbox>, metrics: PushMetrics) -> Self {
        Self { inbox, metrics, waiting: Mutex::default(), requested: Notify::new() }
    }

    /// Requests the page after `after`, with at most `most` messages; it arrives in the session's
    /// mailbox.
    pub(super) fn request(&self, handle: &Arc<SessionHandle>, after: Seq, most: Option<u32>) {
        let request = PageRequest { handle: Arc::downgrade(handle), after, most };
        self.waiting.lock().push_back(request);
        self.requested.notify_one();
    }

    async fn next(&self) -> PageRequest {
        loop {
            let requested = self.requested.notified();
            if let Some(next) = self.waiting.lock().pop_front() {
                return next;
            }
            requested.await;
        }
    }

    /// Performs the reads, at most [`READS_IN_FLIGHT`] at a time, for ever.
    ///
    /// A read that panics ends its session: nothing else would bring that session on, because it
    /// waits for its page.
    pub(super) async fn run(self: Arc<Self>) {
        let mut in_flight = JoinSet::new();
        let mut readers = HashMap::new();
        loop {
            tokio::select! {
                request = self.next(), if in_flight.len() < READS_IN_FLIGHT => {
                    let handle = request.handle.clone();
                    let task = in_flight.spawn(Arc::clone(&self).read(request));
                    readers.insert(task.id(), handle);
                }
                Some(ended) = in_flight.join_next_with_id() => {
                    let id = ended.as_ref().map_or_else(|error| error.id(), |(id, ())| *id);
                    let handle = readers.remove(&id).and_then(|handle: Weak<SessionHandle>| handle.upgrade());
                    if let (Err(error), Some(handle)) = (ended, handle) {
                        tracing::error!(user = %handle.user, %error, "reading a page failed: the session ends");
                        handle.mailbox.close(CloseCode::Overloaded, "the inbox could not be read");
                    }
                }
            }
        }
    }

    /// Reads one page for a session that still exists. While the inbox does not respond, it tries
    /// again with growing delays.
    async fn read(self: Arc<Self>, request: PageRequest) {
        let PageRequest { handle, after, .. } = &request;
        let mut backoff = Backoff::new(RETRY_FIRST, RETRY_MAX);
        while let Some(user) = handle.upgrade().map(|handle| handle.user.clone()) {
            match self.inbox.page(user, *after, request.limit()).await {
                Ok(page) => {
                    self.metrics.pages.inc();
                    if let Some(handle) = handle.upgrade() {
                        self.report_unreadable(&handle.user, &page.unreadable);
                        tell_the_way(&handle, &page);
                        let items = page.messages.iter().map(encoded).collect();
                        let InboxPage { unreadable, upto, more, .. } = page;
                        handle.mailbox.page(Page { after: *after, items, unreadable, upto, more });
                    }
                    return;
                }
                Err(error) => {
                    tracing::debug!(%error, "a page could not be read; the session waits");
                    let delay = backoff.next(&mut rand::rng());
                    tokio::time::sleep(delay).await;
                }
            }
        }
    }

    /// Reports messages that cannot be read to the operator; their user gets a gap.
    fn report_unreadable(&self, user: &UserId, unreadable: &[Seq]) {
        for seq in unreadable {
            self.metrics.unreadable.inc();
            tracing::warn!(%user, %seq, "a message in the store cannot be read, and is passed over");
        }
    }
}

/// Says which messages were read for a session, to whoever follows them.
fn tell_the_way(handle: &SessionHandle, page: &InboxPage) {
    if !tracing::enabled!(target: WAY, tracing::Level::DEBUG) {
        return;
    }
    for message in &page.messages {
        let (user, device, id, seq) = (&handle.user, &handle.device, &message.id, message.seq);
        tracing::debug!(target: WAY, step = 7, %user, %id, %seq, %device, traceparent = shown(message), "read for a session");
    }
}
