//! Verifying the tokens of clients.

use std::sync::Arc;

use tower::ServiceExt;

use crate::message::UserId;
use crate::role::VerifyService;
use crate::telemetry::{Credential, Refusals};
use crate::watching::WatchRights;
use crate::wire::peer::{Identity, PeerError, VerifyRequest};

/// A client that has shown who it is.
#[derive(Debug, Clone)]
pub(super) struct Known {
    pub(super) user: UserId,
    /// `iat` of the token in whole seconds; zero if it has none.
    pub(super) issued_at_s: u64,
    /// `exp` of the token in whole seconds.
    pub(super) expires_at_s: u64,
    /// What it allows to watch, if it says so.
    pub(super) watch: Option<Arc<WatchRights>>,
}

impl From<Identity> for Known {
    fn from(identity: Identity) -> Self {
        let Identity { user, issued_at_s, expires_at_s, claims } = identity;
        let watch = WatchRights::of_claims(&claims).map(Arc::new);
        Self { user, issued_at_s, expires_at_s, watch }
    }
}

/// Verifies tokens, and counts those that are refused.
pub(super) struct TokenCheck {
    verify: VerifyService,
    refusals: Refusals,
}

impl TokenCheck {
    /// Verifies by `verify`.
    pub(super) fn new(verify: VerifyService, refusals: Refusals) -> Self {
        Self { verify, refusals }
    }

    /// Verifies a token.
    ///
    /// # Errors
    ///
    /// The token is refused, or tokens cannot be verified now.
    pub(super) async fn verify(&self, token: &str) -> Result<Known, PeerError> {
        match self.verify.clone().oneshot(VerifyRequest { token: token.into() }).await {
            Ok(identity) => Ok(identity.into()),
            Err(error) => {
                if let PeerError::Unauthorized(refused) = &error {
                    self.refusals.note(Credential::Token, &refused.detail);
                }
                Err(error)
            }
        }
    }

    /// Counts a credential of a client that was refused.
    pub(super) fn refuse(&self, kind: Credential, why: &str) {
        self.refusals.note(kind, why);
    }
}
