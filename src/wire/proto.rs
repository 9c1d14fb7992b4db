//! The gRPC messages and their conversion. Stored and sent types are not the domain's; they are
//! checked where they enter.

use std::sync::Arc;

use super::peer::{LiveMessage, Presence, Revocation, ViewVersion};
use crate::message::{
    ClientName, DeviceId, EventName, Message, MessageId, Millis, NodeId, Seq, TopicName, UserId,
};

/// Messages between roles, from `proto/peer.proto`.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod peer {
    include!(concat!(env!("OUT_DIR"), "/messages/ringpush.peer.v1.rs"));
}

/// Messages of publishers, from `proto/collect.proto`.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod collect {
    include!(concat!(env!("OUT_DIR"), "/messages/ringpush.v1.rs"));
}

/// A peer message that this version does not understand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} is missing or breaks its rule")]
pub struct ProtoError(pub &'static str);

impl From<&ViewVersion> for peer::Stamp {
    fn from(stamp: &ViewVersion) -> Self {
        Self { generation: stamp.generation.to_string(), epoch: stamp.epoch, digest: stamp.digest }
    }
}

impl From<Option<peer::Stamp>> for ViewVersion {
    /// A missing version counts as one that knows nothing.
    fn from(stamp: Option<peer::Stamp>) -> Self {
        let stamp = stamp.unwrap_or_default();
        Self { generation: stamp.generation.into(), epoch: stamp.epoch, digest: stamp.digest }
    }
}

impl From<&LiveMessage> for peer::Live {
    fn from(live: &LiveMessage) -> Self {
        let message = &live.message;
        Self {
            user: live.user.as_str().to_owned(),
            seq: message.seq.get(),
            id: message.id.as_str().to_owned(),
            accepted_at_ms: message.accepted_at.0,
            expires_at_ms: message.expires_at.0,
            event: message.event.as_ref().map(|event| event.as_str().to_owned()),
            via: message.via.as_ref().map(|topic| topic.as_str().to_owned()),
            payload: message.payload.clone(),
        }
    }
}

impl TryFrom<peer::Live> for LiveMessage {
    type Error = ProtoError;

    fn try_from(live: peer::Live) -> Result<Self, ProtoError> {
        let message = Message {
            seq: Seq::new(live.seq).ok_or(ProtoError("seq"))?,
            id: MessageId::parse(&live.id).map_err(|_| ProtoError("id"))?,
            accepted_at: Millis(live.accepted_at_ms),
            expires_at: Millis(live.expires_at_ms),
            event: live
                .event
                .map(|event| EventName::parse(&event))
                .transpose()
                .map_err(|_| ProtoError("event"))?,
            via: live
                .via
                .map(|topic| TopicName::parse(&topic).map(Arc::new))
                .transpose()
                .map_err(|_| ProtoError("via"))?,
            payload: live.payload,
        };
        Ok(Self { user: user_of(&live.user)?, message: Arc::new(message) })
    }
}

/// Converts a whole batch.
///
/// # Errors
///
/// The first fault.
pub fn batch_of(messages: Vec<peer::Live>) -> Result<Vec<LiveMessage>, ProtoError> {
    messages.into_iter().map(LiveMessage::try_from).collect()
}

/// Converts a user id.
///
/// # Errors
///
/// [`ProtoError`].
pub fn user_of(text: &str) -> Result<UserId, ProtoError> {
    UserId::parse(text).map_err(|_| ProtoError("user"))
}

/// Converts a node name.
///
/// # Errors
///
/// [`ProtoError`].
pub fn node_of(text: &str) -> Result<NodeId, ProtoError> {
    NodeId::parse(text).map_err(|_| ProtoError("node"))
}

impl From<&Presence> for peer::Session {
    fn from(presence: &Presence) -> Self {
        Self {
            device: presence.device.as_str().to_owned(),
            node: presence.node.as_str().to_owned(),
            connected_at_ms: presence.connected_at.0,
            acked: presence.acked.get(),
            client: presence.client.as_ref().map(|client| client.as_str().to_owned()),
        }
    }
}

impl TryFrom<peer::Session> for Presence {
    type Error = ProtoError;

    fn try_from(session: peer::Session) -> Result<Self, ProtoError> {
        Ok(Self {
            device: DeviceId::parse(&session.device).map_err(|_| ProtoError("device"))?,
            node: node_of(&session.node)?,
            connected_at: Millis(session.connected_at_ms),
            acked: Seq::new(session.acked).ok_or(ProtoError("acked"))?,
            // Only shown to people.
            client: session.client.and_then(|client| ClientName::parse(&client).ok()),
        })
    }
}

impl From<&Revocation> for peer::Revocation {
    fn from(revocation: &Revocation) -> Self {
        Self { user: revocation.user.as_str().to_owned(), not_before_s: revocation.not_before_s }
    }
}

impl TryFrom<peer::Revocation> for Revocation {
    type Error = ProtoError;

    fn try_from(revocation: peer::Revocation) -> Result<Self, ProtoError> {
        Ok(Self { user: user_of(&revocation.user)?, not_before_s: revocation.not_before_s })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_live_message_comes_back_as_it_was(user in "[a-z用户]{1,20}", seq in 1u64..(1 << 53), payload in any::<Vec<u8>>()) {
            let message = Message {
                seq: Seq::at(seq),
                id: MessageId::parse("order-17").unwrap(),
                accepted_at: Millis(5),
                expires_at: Millis(u64::MAX),
                event: None,
                via: Some(Arc::new(TopicName::parse("match-7").unwrap())),
                payload: Bytes::from(payload),
            };
            let live = LiveMessage { user: UserId::parse(&user).unwrap(), message: Arc::new(message) };
            let back = LiveMessage::try_from(peer::Live::from(&live)).unwrap();
            prop_assert_eq!((back.user, back.message), (live.user, live.message));
        }
    }

    #[test]
    fn what_breaks_a_rule_is_refused() {
        assert_eq!(LiveMessage::try_from(peer::Live::default()).unwrap_err(), ProtoError("id"));
        let above = peer::Live { seq: 1 << 53, id: "m".into(), user: "a".into(), ..Default::default() };
        assert_eq!(LiveMessage::try_from(above).unwrap_err(), ProtoError("seq"));
        assert_eq!(ViewVersion::from(None), ViewVersion::default());
    }
}
