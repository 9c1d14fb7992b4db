//! The messages between roles. In one process they pass through a `tower::Service` as they are;
//! between processes the peer transport carries them.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;

use super::http::{PublishError, TopicOutcome};
use super::refusal::Refused;
use crate::message::{
    ClientName, DeviceId, EventName, LogId, Message, MessageId, Millis, NodeId, Seq, UserId,
};
use crate::trace::TraceParent;

/// The version of a view. It is sent with every peer call, so that both sides notice when their
/// views differ.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ViewVersion {
    /// Changes when the registry has forgotten everything.
    pub generation: Arc<str>,
    /// Rises with every change of the membership.
    pub epoch: u64,
    /// Hash over everything that decides about owners.
    pub digest: u64,
}

impl ViewVersion {
    /// Whether this version is something that `other` does not know: a later view, or one of
    /// another generation.
    #[must_use]
    pub fn is_news_to(&self, other: &Self) -> bool {
        // A process without a view knows nothing.
        let has_one = !self.generation.is_empty();
        has_one
            && self.digest != other.digest
            && (self.generation != other.generation || self.epoch > other.epoch)
    }
}

/// A stored message on its way to its user's sockets. It is a hint: it may be lost, repeated or
/// late without harm.
#[derive(Debug, Clone)]
pub struct LiveMessage {
    /// The user in whose inbox it is stored.
    pub user: UserId,
    /// The message as it is stored.
    pub message: Arc<Message>,
}

/// News about logs of topics on its way to the nodes. It is a hint as well.
#[derive(Debug, Clone)]
pub enum LogHint {
    /// A message that was stored in a log.
    Message {
        /// The log.
        log: LogId,
        /// The message as it is stored.
        message: Arc<Message>,
    },
    /// The memberships of these users in topics with a log have changed.
    Memberships(Vec<UserId>),
    /// The topic was removed, or a message of it has ended before its time: look at it.
    Look(LogId),
}

/// A request from collect to dispatch.
#[derive(Debug, Clone)]
pub enum DispatchRequest {
    /// Route these messages.
    Deliver {
        /// The messages, in the order in which they were stored.
        batch: Vec<LiveMessage>,
        /// Messages before these were dropped: every node must look into the inboxes.
        missed: bool,
        /// Version of the sender's view.
        stamp: ViewVersion,
    },
    /// Tell the nodes.
    Hint {
        /// The hints, in the order in which they arose.
        hints: Vec<LogHint>,
        /// Hints before these were dropped: every node must look at its logs.
        missed: bool,
        /// Version of the sender's view.
        stamp: ViewVersion,
    },
    /// Find the sessions of this user.
    Lookup(UserId),
    /// Count the sockets that read this log.
    Readers(LogId),
    /// Close the sockets of this user whose token was issued before a time.
    Disconnect(Revocation),
    /// Check that the process responds.
    Ping,
}

/// The response of dispatch.
#[derive(Debug, Clone)]
pub enum DispatchResponse {
    /// Accepted, or dropped with a mark that makes the node sweep.
    Done,
    /// The result of a look-up.
    Found {
        /// The owner in the view in use; `None` if there is no push node.
        owner: Option<NodeId>,
        /// The sessions on all nodes that were asked.
        sessions: Vec<Presence>,
    },
    /// The number of sockets on all nodes that were asked.
    Readers(u64),
}

/// A request from dispatch to a push node.
#[derive(Debug, Clone)]
pub enum PushRequest {
    /// Live messages for users that may be connected here.
    Deliver {
        /// The messages, in the order in which they were stored. They are shared with the sender,
        /// which may need them again.
        batch: Arc<[LiveMessage]>,
        /// Messages before these were dropped: look into the inboxes.
        sweep: bool,
        /// Version of the sender's view.
        stamp: ViewVersion,
    },
    /// News about logs.
    Hint {
        /// The hints, in the order in which they arose.
        hints: Arc<[LogHint]>,
        /// Hints before these were dropped: look at all logs that are read here.
        missed: bool,
        /// Version of the sender's view.
        stamp: ViewVersion,
    },
    /// The sender's view no longer has this node.
    Gone(ViewVersion),
    /// Check that the node responds.
    Ping,
    /// Find the sessions of this user on this node.
    Lookup(UserId),
    /// Count the sockets on this node that read this log.
    Readers(LogId),
    /// Close the sockets of this user whose token was issued before a time.
    Disconnect(Revocation),
}

/// The response of a push node.
#[derive(Debug, Clone)]
pub enum PushResponse {
    /// Accepted, by a node with this version of the view.
    Done(ViewVersion),
    /// The sessions of the user.
    Sessions(Vec<Presence>),
    /// The number of sockets.
    Readers(u64),
}

/// A publish to one topic, from the collect that took it to the one that writes to the topic.
#[derive(Debug, Clone)]
pub struct TopicWrite {
    /// The topic, of either kind, or everyone.
    pub log: LogId,
    /// The sender's id, or one that was made for it. It may be repeated.
    pub id: MessageId,
    /// Tells this publish from another one under the same id.
    pub append_id: Arc<str>,
    /// When it was accepted.
    pub accepted_at: Millis,
    /// What the message tells, if its sender named that.
    pub event: Option<EventName>,
    /// The trace that the message belongs to, if its sender named one.
    pub trace: Option<Arc<TraceParent>>,
    /// Valid JSON text.
    pub payload: Bytes,
    /// Life of the message in seconds, if the sender named one.
    pub ttl_s: Option<u64>,
    /// Users who do not get it.
    pub except: Vec<UserId>,
    /// How long its sender waits.
    pub left: Duration,
}

/// What became of a publish to one topic.
pub type TopicWritten = Result<TopicOutcome, PublishError>;

/// A publish that was received by the collect that writes it. It resolves to what became of it, or
/// to an error where that cannot be known any more.
pub struct Received(pub BoxFuture<'static, Result<TopicWritten, PeerError>>);

/// Tokens of a user that were issued before a time are refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Revocation {
    /// The user.
    pub user: UserId,
    /// A token with an earlier `iat` is refused; in whole seconds.
    pub not_before_s: u64,
}

/// One session of a user, as a node reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Presence {
    /// The device.
    pub device: DeviceId,
    /// The node that holds the session.
    pub node: NodeId,
    /// When the session began.
    pub connected_at: Millis,
    /// The last position that the device acked, as far as this node knows.
    pub acked: Seq,
    /// What the client says that it is.
    pub client: Option<ClientName>,
    /// The position up to which the session has sent everything; `None` if that is not known.
    pub sent: Option<Seq>,
}

/// A request to auth: is this token good?
#[derive(Clone, PartialEq, Eq)]
pub struct VerifyRequest {
    /// The token as the client gave it.
    pub token: Arc<str>,
}

impl std::fmt::Debug for VerifyRequest {
    /// Hides the token.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("VerifyRequest")
    }
}

/// What a good token says.
#[derive(Debug, Clone, PartialEq)]
pub struct Identity {
    /// `sub`.
    pub user: UserId,
    /// `iat` in whole seconds; zero if the token has none.
    pub issued_at_s: u64,
    /// `exp` in whole seconds.
    pub expires_at_s: u64,
    /// All claims, as JSON text.
    pub claims: Bytes,
}

/// Why a peer did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// It cannot be reached or cannot do it now; the caller may try again or ask another one.
    #[error("{0}")]
    Unavailable(String),
    /// The token is refused; the reason may be shown to the client.
    #[error("{0}")]
    Unauthorized(Refused),
}
