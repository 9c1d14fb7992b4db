//! The four roles: what should happen to a user or a message. Roles never import one another; they talk through
//! `tower::Service` with the values of [`crate::wire::peer`], so that it makes no difference to one role whether
//! another is in the same process.

pub mod auth;
mod backlog;
pub mod collect;
pub mod connect;
pub mod dispatch;
pub mod push;
pub mod reach;
pub mod verify;

use tower::util::BoxCloneSyncService;

use crate::message::NodeId;
use crate::wire::peer::{
    DispatchRequest, DispatchResponse, Identity, PeerFault, PushRequest, PushResponse, VerifyRequest,
};

/// Auth, as push and connect see it.
pub type VerifyService = BoxCloneSyncService<VerifyRequest, Identity, PeerFault>;
/// Dispatch, as collect sees it.
pub type DispatchService = BoxCloneSyncService<DispatchRequest, DispatchResponse, PeerFault>;
/// One push node, as dispatch sees it.
pub type PushService = BoxCloneSyncService<PushRequest, PushResponse, PeerFault>;

/// Finds the service of a push node: the role itself in this process, its peer port elsewhere.
pub trait Directory: Send + Sync + 'static {
    /// The service of `node`, if it is known.
    fn find(&self, node: &NodeId) -> Option<PushService>;

    /// The service of `node`, if the role is in this process and answers without waiting.
    fn here(&self, _node: &NodeId) -> Option<PushService> {
        None
    }
}
