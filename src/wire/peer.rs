//! What the roles say to one another. In one process these values pass through a `tower::Service` as they are; between
//! processes they are carried by the peer transport.

use std::sync::Arc;

use bytes::Bytes;

use crate::message::{DeviceId, Message, Millis, NodeId, Seq, UserId};

/// Which view somebody has: two that differ in it see different nodes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ViewVersion {
    /// Changes when the registry forgot everything.
    pub generation: Arc<str>,
    /// Rises with every change.
    pub epoch: u64,
    /// Over what decides about owners.
    pub digest: u64,
}

impl ViewVersion {
    /// Whether whoever has this knows something that `other` does not: a later view, or one of another generation.
    #[must_use]
    pub fn is_news_to(&self, other: &Self) -> bool {
        // Who has no view yet knows nothing.
        let has_one = !self.generation.is_empty();
        has_one
            && self.digest != other.digest
            && (self.generation != other.generation || self.epoch > other.epoch)
    }
}

/// One stored message on its way to its user's sockets. A hint: it may be lost, repeated or late without harm.
#[derive(Debug, Clone)]
pub struct LiveMessage {
    /// Whose inbox it stands in.
    pub user: UserId,
    /// What was stored there.
    pub message: Arc<Message>,
}

/// To dispatch, from collect.
#[derive(Debug, Clone)]
pub enum DispatchRequest {
    /// Hand these on to wherever their users are.
    Deliver {
        /// In the order they were stored.
        batch: Vec<LiveMessage>,
        /// Something before this was dropped: every node must look into the inboxes.
        missed: bool,
        /// The sender's view.
        stamp: ViewVersion,
    },
    /// Where is this user connected?
    Lookup(UserId),
    /// Close the sockets of this user whose token was issued before this moment.
    Disconnect(Revocation),
    /// Are you there?
    Ping,
}

/// The answer of dispatch.
#[derive(Debug, Clone)]
pub enum DispatchResponse {
    /// Taken, or dropped with a mark that makes the node look for itself.
    Done,
    /// The owner by arithmetic, and every session found.
    Found {
        /// By the view in use; None where there is no push node.
        owner: Option<NodeId>,
        /// On all nodes asked.
        sessions: Vec<Presence>,
    },
}

/// To a push node, from dispatch.
#[derive(Debug, Clone)]
pub enum PushRequest {
    /// Live messages for users that may be here.
    Deliver {
        /// In the order they were stored; shared with the sender, who may need them again.
        batch: Arc<[LiveMessage]>,
        /// Something before this was dropped: look into the inboxes.
        sweep: bool,
        /// The sender's view.
        stamp: ViewVersion,
    },
    /// The sender's view has this node no more.
    Gone(ViewVersion),
    /// Are you there?
    Ping,
    /// Is this user here?
    Lookup(UserId),
    /// Close the sockets of this user whose token was issued before this moment.
    Disconnect(Revocation),
}

/// The answer of a push node.
#[derive(Debug, Clone)]
pub enum PushResponse {
    /// Taken, by a node that has this view.
    Done(ViewVersion),
    /// The sessions of the user that was asked for.
    Sessions(Vec<Presence>),
}

/// Tokens of a user issued before a moment are no longer good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Revocation {
    /// Whose.
    pub user: UserId,
    /// Whole seconds: a token with an earlier `iat` is refused.
    pub not_before_s: u64,
}

/// One session of a user, as a node reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Presence {
    /// Which device.
    pub device: DeviceId,
    /// Where.
    pub node: NodeId,
    /// Since when.
    pub connected_at: Millis,
    /// What it has acked, as far as this node knows.
    pub acked: Seq,
}

/// To auth: is this token good?
#[derive(Clone, PartialEq, Eq)]
pub struct VerifyRequest {
    /// The token as the client gave it.
    pub token: Arc<str>,
}

impl std::fmt::Debug for VerifyRequest {
    /// A token never reaches a log.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("VerifyRequest")
    }
}

/// What a good token says.
#[derive(Debug, Clone, PartialEq)]
pub struct Identity {
    /// Its `sub`.
    pub user: UserId,
    /// Its `iat`, whole seconds; zero where it has none.
    pub issued_at_s: u64,
    /// Its `exp`, whole seconds.
    pub expires_at_s: u64,
    /// All its claims, as JSON text.
    pub claims: Bytes,
}

/// Why a peer did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// It cannot be reached, or cannot do it now: try again, or another.
    #[error("{0}")]
    Unavailable(String),
    /// The token is not good; the reason is for the client.
    #[error("{0}")]
    Unauthorized(String),
}
