//! Checking the new token of a session that is served.

use std::sync::Arc;
use std::time::Duration;

use super::end::End;
use super::tokens::{Known, TokenCheck};
use crate::backoff::Backoff;
use crate::inbox::{Lookup, PositionQuery, StartAt, UserPosition};
use crate::message::{Seq, UserId};
use crate::wire::close::CloseCode;
use crate::wire::peer::PeerError;
use crate::wire::refusal::RefusalReason;

/// Delay between two queries whether a token was revoked, while the inbox does not respond; at
/// first and at most.
const RETRY_FIRST: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(5);

/// Verifies the tokens of sessions, and that they were not revoked.
pub(super) struct Refresher {
    pub(super) tokens: Arc<TokenCheck>,
    pub(super) lookup: Lookup<PositionQuery, UserPosition>,
}

impl Refresher {
    /// Verifies a token.
    ///
    /// # Errors
    ///
    /// Why the connection must end.
    pub(super) async fn verify(&self, token: &str) -> Result<Known, End> {
        self.tokens.verify(token).await.map_err(|error| match error {
            PeerError::Unauthorized(refused) => End::Refused(refused),
            PeerError::Unavailable(_) => End::close(CloseCode::Overloaded, "tokens cannot be verified now"),
        })
    }

    /// Verifies a new token for `user`, whose session is at `position`. Takes as long as the inbox
    /// does not respond; the session goes on with its old token meanwhile.
    ///
    /// # Errors
    ///
    /// Why the connection must end.
    pub(super) async fn refresh(
        self: Arc<Self>,
        token: String,
        user: UserId,
        position: Seq,
    ) -> Result<Known, End> {
        let known = self.verify(&token).await?;
        if known.user != user {
            return Err(End::refused(RefusalReason::TokenInvalid, "the new token is of another user"));
        }
        if known.issued_at_s < self.not_before_s(user, position).await {
            return Err(End::refused(RefusalReason::TokenRevoked, "the token was revoked"));
        }
        Ok(known)
    }

    /// Since when tokens of this user count. Asked again with growing delays while the inbox does
    /// not respond.
    async fn not_before_s(&self, user: UserId, position: Seq) -> u64 {
        let mut backoff = Backoff::new(RETRY_FIRST, RETRY_MAX);
        loop {
            match self.lookup.ask(PositionQuery { user: user.clone(), from: StartAt::After(position) }).await
            {
                Ok(answer) => return answer.not_before_s,
                Err(error) => tracing::debug!(%error, "whether a new token was revoked cannot be asked now"),
            }
            let delay = backoff.next(&mut rand::rng());
            tokio::time::sleep(delay).await;
        }
    }
}
