//! The four roles: what should happen to a user or a message. Roles never import one another. They
//! talk through `tower::Service` with the values of [`crate::wire::peer`], so that a role does not
//! notice whether another one is in the same process.

pub mod auth;
mod backlog;
pub mod collect;
pub mod connect;
pub mod dispatch;
pub mod push;
pub mod reach;
mod reads;
pub mod strangers;
pub mod verify;
pub mod witness;

use tower::util::BoxCloneSyncService;

use crate::colleagues::Colleague;
use crate::message::{Message, Millis, NodeId};
use crate::trace::TraceParent;
use crate::wire::peer::{
    DispatchRequest, DispatchResponse, Identity, PeerError, PushRequest, PushResponse, Received, TopicWrite,
    VerifyRequest,
};

/// How far in the future an `iat` may lie, in seconds. A token from further ahead would survive
/// disconnects until then.
pub const IAT_AHEAD_MAX_S: u64 = 60;

/// Auth, as push and connect see it.
pub type VerifyService = BoxCloneSyncService<VerifyRequest, Identity, PeerError>;
/// Dispatch, as collect sees it.
pub type DispatchService = BoxCloneSyncService<DispatchRequest, DispatchResponse, PeerError>;
/// A push node, as dispatch sees it.
pub type PushService = BoxCloneSyncService<PushRequest, PushResponse, PeerError>;

/// A collect, as another one sees it: it answers when it has received a publish to a topic.
pub type WriterService = BoxCloneSyncService<TopicWrite, Received, PeerError>;

/// When a token was issued, for comparison with disconnects: at most now, and zero if the token
/// does not say.
///
/// # Errors
///
/// `iat` is more than [`IAT_AHEAD_MAX_S`] in the future.
/// The trace of a message in a log line, if it has one.
fn shown(message: &Message) -> Option<tracing::field::DisplayValue<&TraceParent>> {
    message.trace.as_deref().map(tracing::field::display)
}

fn issued_at_s(iat: Option<u64>, now: Millis) -> Result<u64, &'static str> {
    let iat = iat.unwrap_or(0);
    if iat > now.seconds().saturating_add(IAT_AHEAD_MAX_S) {
        return Err("the token's iat lies in the future (it counts seconds, by a clock that is right)");
    }
    Ok(iat.min(now.seconds()))
}

/// Finds the service of a collect in another process.
pub trait WriterDirectory: Send + Sync + 'static {
    /// The service of this process, if its address is one.
    fn find(&self, colleague: &Colleague) -> Option<WriterService>;
}

/// Finds the service of a push node: the role itself in this process, its peer port elsewhere.
pub trait PeerDirectory: Send + Sync + 'static {
    /// The service of `node`, if it is known.
    fn find(&self, node: &NodeId) -> Option<PushService>;

    /// The service of `node`, if it runs in this process and answers without waiting.
    fn here(&self, _node: &NodeId) -> Option<PushService> {
        None
    }
}
