//! The gRPC messages and their conversion. Stored and sent types are not the domain's; they are
//! checked where they enter.

use std::sync::Arc;
use std::time::Duration;

use super::http::{EXCEPT_PER_PUBLISH, PublishError, Stored, TopicOutcome};
use super::peer::{LiveMessage, LogHint, Presence, Revocation, TopicWrite, TopicWritten, ViewVersion};
use crate::message::{
    ClientName, DeviceId, EventName, LogEntry, LogId, Message, MessageId, Millis, NodeId, Seq, TopicName,
    UserId, Via,
};
use crate::trace::TraceParent;

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
            via: message.topic().map(|topic| topic.as_str().to_owned()),
            traceparent: trace_text(message),
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
            event: event_of(live.event)?,
            via: live
                .via
                .map(|topic| TopicName::parse(&topic).map(|topic| Arc::new(Via::Inbox(topic))))
                .transpose()
                .map_err(|_| ProtoError("via"))?,
            trace: trace_of(live.traceparent),
            payload: live.payload,
        };
        Ok(Self { user: user_of(&live.user)?, message: Arc::new(message) })
    }
}

/// Longest append id that is taken, in bytes; one of ours is a ULID of 26.
const APPEND_ID_MAX: usize = 64;

impl From<&TopicWrite> for peer::TopicWrite {
    fn from(write: &TopicWrite) -> Self {
        Self {
            log: Some((&write.log).into()),
            id: write.id.as_str().to_owned(),
            append_id: write.append_id.to_string(),
            accepted_at_ms: write.accepted_at.0,
            payload: write.payload.clone(),
            event: write.event.as_ref().map(|event| event.as_str().to_owned()),
            traceparent: write.trace.as_ref().map(ToString::to_string),
            ttl_s: write.ttl_s,
            except: write.except.iter().map(|user| user.as_str().to_owned()).collect(),
            left_ms: u64::try_from(write.left.as_millis()).unwrap_or(u64::MAX),
        }
    }
}

impl TryFrom<peer::TopicWrite> for TopicWrite {
    type Error = ProtoError;

    fn try_from(write: peer::TopicWrite) -> Result<Self, ProtoError> {
        // It names documents of the store.
        let is_id = |id: &str| !id.is_empty() && id.len() <= APPEND_ID_MAX && id.is_ascii();
        Ok(Self {
            log: write.log.ok_or(ProtoError("log"))?.try_into()?,
            id: MessageId::parse(&write.id).map_err(|_| ProtoError("id"))?,
            append_id: Some(write.append_id).filter(|id| is_id(id)).ok_or(ProtoError("append_id"))?.into(),
            accepted_at: Millis(write.accepted_at_ms),
            event: event_of(write.event)?,
            trace: trace_of(write.traceparent),
            payload: write.payload,
            ttl_s: write.ttl_s,
            except: Some(&write.except)
                .filter(|except| except.len() <= EXCEPT_PER_PUBLISH)
                .ok_or(ProtoError("except"))?
                .iter()
                .map(|user| user_of(user))
                .collect::<Result<_, _>>()?,
            left: Duration::from_millis(write.left_ms),
        })
    }
}

impl From<&TopicWritten> for peer::WriteAnswer {
    fn from(written: &TopicWritten) -> Self {
        use peer::write_answer::Answer;
        let answer = match written {
            Ok(TopicOutcome::Log(stored)) => {
                Answer::Log(peer::WrittenToLog { seq: stored.seq.get(), duplicate: stored.duplicate })
            }
            Ok(TopicOutcome::Members { members, failed }) => {
                let one = |(user, why): &(UserId, PublishError)| peer::NotStored {
                    user: user.as_str().to_owned(),
                    why: Some(why.into()),
                };
                let failed = failed.iter().map(one).collect();
                Answer::Members(peer::WrittenToMembers { members: *members as u64, failed })
            }
            Err(refusal) => Answer::Refusal(refusal.into()),
        };
        Self { answer: Some(answer) }
    }
}

impl TryFrom<peer::WriteAnswer> for TopicWritten {
    type Error = ProtoError;

    fn try_from(answer: peer::WriteAnswer) -> Result<Self, ProtoError> {
        use peer::write_answer::Answer;
        Ok(match answer.answer {
            Some(Answer::Log(log)) => {
                let seq = Seq::new(log.seq).ok_or(ProtoError("seq"))?;
                Ok(TopicOutcome::Log(Stored { seq, duplicate: log.duplicate }))
            }
            Some(Answer::Members(written)) => {
                let one = |failed: peer::NotStored| {
                    Ok((user_of(&failed.user)?, failed.why.ok_or(ProtoError("why"))?.try_into()?))
                };
                let failed: Vec<_> =
                    written.failed.into_iter().map(one).collect::<Result<_, ProtoError>>()?;
                let members = usize::try_from(written.members).map_err(|_| ProtoError("members"))?;
                if failed.len() > members {
                    return Err(ProtoError("failed"));
                }
                Ok(TopicOutcome::Members { members, failed })
            }
            Some(Answer::Refusal(refusal)) => Err(refusal.try_into()?),
            Some(Answer::Received(_)) | None => return Err(ProtoError("answer")),
        })
    }
}

impl From<&PublishError> for peer::Refusal {
    fn from(error: &PublishError) -> Self {
        Self { status: error.status.into(), detail: error.detail.clone() }
    }
}

impl TryFrom<peer::Refusal> for PublishError {
    type Error = ProtoError;

    fn try_from(refusal: peer::Refusal) -> Result<Self, ProtoError> {
        let status = u16::try_from(refusal.status).ok().filter(|status| (400..600).contains(status));
        Ok(Self::new(status.ok_or(ProtoError("status"))?, refusal.detail))
    }
}

fn trace_text(message: &Message) -> Option<String> {
    message.trace.as_ref().map(ToString::to_string)
}

/// A trace is only passed on: one that cannot be read is worth no message.
fn trace_of(text: Option<String>) -> Option<Arc<TraceParent>> {
    text.as_deref().and_then(TraceParent::parse).map(Arc::new)
}

fn event_of(event: Option<String>) -> Result<Option<EventName>, ProtoError> {
    event.map(|event| EventName::parse(&event)).transpose().map_err(|_| ProtoError("event"))
}

impl From<&LogId> for peer::Log {
    fn from(log: &LogId) -> Self {
        Self { topic: log.topic().map(|topic| topic.as_str().to_owned()) }
    }
}

impl TryFrom<peer::Log> for LogId {
    type Error = ProtoError;

    fn try_from(log: peer::Log) -> Result<Self, ProtoError> {
        match log.topic {
            Some(topic) => TopicName::parse(&topic).map(Self::Topic).map_err(|_| ProtoError("topic")),
            None => Ok(Self::Everyone),
        }
    }
}

impl From<&LogHint> for peer::Hint {
    fn from(hint: &LogHint) -> Self {
        use peer::hint::About;
        Self {
            about: Some(match hint {
                LogHint::Message { log, message } => {
                    let entry = message.log_entry().cloned().unwrap_or_default();
                    About::Message(peer::LogMessage {
                        log: Some(log.into()),
                        seq: message.seq.get(),
                        id: message.id.as_str().to_owned(),
                        accepted_at_ms: message.accepted_at.0,
                        expires_at_ms: message.expires_at.0,
                        payload: message.payload.clone(),
                        event: message.event.as_ref().map(|event| event.as_str().to_owned()),
                        life: entry.life,
                        except: entry.except.iter().map(|user| user.as_str().to_owned()).collect(),
                        traceparent: trace_text(message),
                    })
                }
                LogHint::Memberships(users) => About::Memberships(peer::Users {
                    users: users.iter().map(|user| user.as_str().to_owned()).collect(),
                }),
                LogHint::Look(log) => About::Look(log.into()),
            }),
        }
    }
}

impl TryFrom<peer::Hint> for LogHint {
    type Error = ProtoError;

    fn try_from(hint: peer::Hint) -> Result<Self, ProtoError> {
        use peer::hint::About;
        Ok(match hint.about.ok_or(ProtoError("about"))? {
            About::Message(sent) => {
                let except = sent.except.iter().map(|user| user_of(user)).collect::<Result<_, _>>()?;
                let message = Message {
                    seq: Seq::new(sent.seq).ok_or(ProtoError("seq"))?,
                    id: MessageId::parse(&sent.id).map_err(|_| ProtoError("id"))?,
                    accepted_at: Millis(sent.accepted_at_ms),
                    expires_at: Millis(sent.expires_at_ms),
                    event: event_of(sent.event)?,
                    via: Some(Arc::new(Via::Log(LogEntry { life: sent.life, except }))),
                    trace: trace_of(sent.traceparent),
                    payload: sent.payload,
                };
                let log = sent.log.ok_or(ProtoError("log"))?.try_into()?;
                Self::Message { log, message: Arc::new(message) }
            }
            About::Memberships(all) => {
                let users = all.users.iter().map(|user| user_of(user)).collect::<Result<_, _>>()?;
                Self::Memberships(users)
            }
            About::Look(log) => Self::Look(log.try_into()?),
        })
    }
}

/// Converts hints. One that a newer version has sent and this one does not know is left out.
///
/// # Errors
///
/// The first fault.
pub fn hints_of(hints: Vec<peer::Hint>) -> Result<Vec<LogHint>, ProtoError> {
    hints.into_iter().filter(|hint| hint.about.is_some()).map(LogHint::try_from).collect()
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
            sent: presence.sent.map(Seq::get),
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
            sent: session.sent.and_then(Seq::new),
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
                via: Some(Arc::new(Via::Inbox(TopicName::parse("match-7").unwrap()))),
                trace: TraceParent::parse("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01").map(Arc::new),
                payload: Bytes::from(payload),
            };
            let live = LiveMessage { user: UserId::parse(&user).unwrap(), message: Arc::new(message) };
            let back = LiveMessage::try_from(peer::Live::from(&live)).unwrap();
            prop_assert_eq!((back.user, back.message), (live.user, live.message.clone()));
            let entry = LogEntry { life: seq, except: vec![UserId::parse(&user).unwrap()] };
            let in_log = Arc::new(Message { via: Some(Arc::new(Via::Log(entry))), ..(*live.message).clone() });
            for log in [LogId::Everyone, LogId::Topic(TopicName::parse("news").unwrap())] {
                let hint = LogHint::Message { log: log.clone(), message: Arc::clone(&in_log) };
                let back = LogHint::try_from(peer::Hint::from(&hint)).unwrap();
                let LogHint::Message { log: of, message } = back else { panic!("{back:?}") };
                prop_assert_eq!((of, message), (log, Arc::clone(&in_log)));
            }
        }
    }

    #[test]
    fn what_breaks_a_rule_is_refused() {
        assert_eq!(LiveMessage::try_from(peer::Live::default()).unwrap_err(), ProtoError("id"));
        let above = peer::Live { seq: 1 << 53, id: "m".into(), user: "a".into(), ..Default::default() };
        assert_eq!(LiveMessage::try_from(above).unwrap_err(), ProtoError("seq"));
        assert_eq!(ViewVersion::from(None), ViewVersion::default());
    }

    fn user(name: &str) -> UserId {
        UserId::parse(name).unwrap()
    }

    #[test]
    fn a_publish_to_a_topic_and_its_outcome_come_back_as_they_were() {
        let write = TopicWrite {
            log: LogId::Topic(TopicName::parse("news").unwrap()),
            id: MessageId::parse("order-17").unwrap(),
            append_id: "01K0000000000000000000000".into(),
            accepted_at: Millis(5),
            event: EventName::parse("paid").ok(),
            trace: TraceParent::parse("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
                .map(Arc::new),
            payload: Bytes::from_static(b"[1]"),
            ttl_s: Some(60),
            except: vec![user("alice")],
            left: Duration::from_millis(9_500),
        };
        let sent = peer::TopicWrite::from(&write);
        let back = TopicWrite::try_from(sent.clone()).unwrap();
        assert_eq!(format!("{back:?}"), format!("{write:?}"));
        let many = vec!["bob".to_owned(); EXCEPT_PER_PUBLISH + 1];
        for bad in [
            peer::TopicWrite { log: None, ..sent.clone() },
            peer::TopicWrite { append_id: String::new(), ..sent.clone() },
            peer::TopicWrite { append_id: "a".repeat(APPEND_ID_MAX + 1), ..sent.clone() },
            peer::TopicWrite { except: many, ..sent.clone() },
            peer::TopicWrite { id: "\n".to_owned(), ..sent.clone() },
        ] {
            assert!(TopicWrite::try_from(bad).is_err());
        }
        let refusal = PublishError::new(409, "other payload");
        let outcomes: [TopicWritten; 3] = [
            Ok(TopicOutcome::Log(Stored { seq: Seq::at(7), duplicate: true })),
            Ok(TopicOutcome::Members { members: 2, failed: vec![(user("bob"), refusal.clone())] }),
            Err(refusal),
        ];
        for outcome in outcomes {
            let sent = peer::WriteAnswer::from(&outcome);
            assert_eq!(TopicWritten::try_from(sent).unwrap(), outcome);
        }
        let received = peer::write_answer::Answer::Received(peer::Received {});
        assert!(TopicWritten::try_from(peer::WriteAnswer { answer: Some(received) }).is_err());
        assert!(PublishError::try_from(peer::Refusal { status: 202, detail: String::new() }).is_err());
    }
}
