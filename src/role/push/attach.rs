//! Attaching: registers a session and finds out where it starts.
//!
//! The order matters: register, enter the fallback set if displaced, ask the inbox from the cursor,
//! go live. What is stored after the question comes as a live message or is reported as missing;
//! what was stored before it is in the response. Nothing falls in between.

use std::sync::Arc;

use super::availability::Availability;
use super::cursors::CursorWriter;
use super::displaced::DisplacedSet;
use super::end::End;
use super::moves::Mover;
use super::ownership::Ownership;
use super::registry::{RegistrationGuard, Registry, Room, SessionHandle};
use crate::inbox::{Change, Inbox, InboxError, Lookup, PositionQuery, StartAt, UserPosition};
use crate::message::Seq;
use crate::wire::close::CloseCode;
use crate::wire::frame::{Begin, Since};
use crate::wire::refusal::RefusalReason;

/// Attaches sessions to this node.
pub(super) struct Attacher {
    pub(super) registry: Arc<Registry>,
    pub(super) ownership: Arc<Ownership>,
    pub(super) availability: Arc<Availability>,
    pub(super) displaced: Arc<DisplacedSet>,
    pub(super) mover: Arc<Mover>,
    pub(super) lookup: Lookup<PositionQuery, UserPosition>,
    pub(super) inbox: Arc<dyn Inbox>,
    pub(super) cursors: Arc<CursorWriter>,
}

impl Attacher {
    /// Attaches one session. It stays registered until the returned guard is dropped.
    pub(super) async fn attach(
        &self,
        handle: Arc<SessionHandle>,
        since: Option<Since>,
        begin: Option<Begin>,
    ) -> Result<(RegistrationGuard, UserPosition, Option<Seq>), End> {
        let mut registered = self.registry.register(Arc::clone(&handle));
        if !self.ownership.owns_now(&handle.user) {
            Box::pin(self.displaced.enter(&handle.user)).await;
            self.mover.consider(&handle);
        }
        let displaced = Arc::clone(&self.displaced);
        registered.when_last(move |user| displaced.leave(user));
        let (position, began) = self.start_position(&handle, since, begin).await?;
        if handle.token_iat_s() < position.not_before_s {
            return Err(End::refused(RefusalReason::TokenRevoked, "the token was revoked"));
        }
        if !self.availability.takes_sockets() {
            return Err(End::close(CloseCode::Draining, "the node is leaving"));
        }
        // Only when this session is known to be good: a revoked token must not close other
        // sessions.
        if registered.crowded {
            match self.registry.make_room(&handle) {
                Room::Enough => {}
                Room::InPlaceOf(other) => {
                    let why = "this device opened more sessions than are kept";
                    other.mailbox.close(CloseCode::Replaced, why);
                }
                Room::None => return Err(End::Crowded),
            }
        }
        Ok((registered, position, began))
    }

    async fn start_position(
        &self,
        handle: &SessionHandle,
        since: Option<Since>,
        begin: Option<Begin>,
    ) -> Result<(UserPosition, Option<Seq>), End> {
        if since.is_none() && begin == Some(Begin::Latest) && !self.has_cursor(handle).await? {
            return self.begin_at_latest(handle).await;
        }
        let from = match since {
            None => StartAt::Cursor(handle.device.clone()),
            Some(Since::After(position)) => StartAt::After(position),
            Some(Since::Latest) => StartAt::Latest,
        };
        let mut position =
            self.lookup.ask(PositionQuery { user: handle.user.clone(), from }).await.map_err(not_now)?;
        let pending = self.cursors.pending(&handle.user, &handle.device);
        if since.is_none()
            && let Some(acked) = pending.filter(|acked| *acked > position.start)
        {
            // The device acked this here a moment ago, so a client that comes straight back need
            // not see it again. Never above the head of the response: what was stored since is in
            // the mailbox. If there is more, the head is some number above the old start, and the
            // page tells the rest.
            position.start = acked.min(position.head);
        }
        Ok((position, None))
    }

    /// Whether the device has a cursor, stored or on its way to the store.
    async fn has_cursor(&self, handle: &SessionHandle) -> Result<bool, End> {
        if self.cursors.pending(&handle.user, &handle.device).is_some() {
            return Ok(true);
        }
        let profile = self.inbox.profile(handle.user.clone()).await.map_err(not_now)?;
        Ok(profile.cursors.iter().any(|(device, _)| *device == handle.device))
    }

    /// The device begins after the last message. That becomes its cursor, on stable storage, before
    /// the client is told: else what comes until its first ack would be skipped after a reconnect.
    async fn begin_at_latest(&self, handle: &SessionHandle) -> Result<(UserPosition, Option<Seq>), End> {
        let query = PositionQuery { user: handle.user.clone(), from: StartAt::Latest };
        let position = self.lookup.ask(query).await.map_err(not_now)?;
        let (user, device) = (handle.user.clone(), handle.device.clone());
        let begins = Change::Begin { user, device, at: position.start };
        self.inbox.update(vec![begins]).await.map_err(not_now)?;
        Ok((position, Some(position.start)))
    }
}

/// The end of a connection that could not attach because the store does not answer.
pub(super) fn not_now(error: InboxError) -> End {
    tracing::debug!(%error, "a session could not attach");
    End::close(CloseCode::Overloaded, "the inbox cannot be read now")
}
