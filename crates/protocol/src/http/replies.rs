//! The responses to publishes, batches and history requests.

use bytes::{BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};

use super::problem::Problem;
use crate::frame::{OfLog, put_history_item, put_id, put_number};
use crate::message::{LogId, Message, MessageId, Seq, UserId};

/// The outcome for one recipient, as it is returned.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Accepted {
    /// The message is in the inbox, on stable storage.
    Stored {
        /// The recipient.
        user: String,
        /// Position in the recipient's inbox.
        seq: u64,
        /// It was stored before under the same id.
        duplicate: bool,
    },
    /// The message is not stored.
    Failed {
        /// The recipient.
        user: String,
        /// Why it is not stored.
        error: PublishError,
    },
    /// The message was stored for the members of a topic, or for some of them.
    Topic {
        /// The topic.
        topic: String,
        /// Members that the message is for.
        members: usize,
        /// Members in whose inbox it is.
        stored: usize,
        /// The others, and why.
        failed: Vec<FailedMember>,
    },
    /// The message is in the log of a topic, or of everyone, on stable storage.
    Log {
        /// Which log.
        #[serde(flatten)]
        of: OfLog,
        /// Position in the log.
        seq: u64,
        /// It was stored before under the same id.
        duplicate: bool,
    },
    /// The topic is not there, the message is not in its log, or it is not known for which of its
    /// members the message is stored.
    TopicFailed {
        /// The topic, or everyone.
        #[serde(flatten)]
        of: OfLog,
        /// Why it is not stored.
        error: PublishError,
    },
}

/// A member of a topic for whom a message was not stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailedMember {
    /// The member.
    pub user: String,
    /// Why it is not stored.
    pub error: PublishError,
}

/// Why a message was not stored for one recipient.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublishError {
    /// HTTP status: 404, 409, 413, 422, 429 or 503.
    pub status: u16,
    /// An explanation for people.
    #[serde(default)]
    pub detail: String,
    /// Whether the store failed, or did not answer. Known to the process that wrote, and told to
    /// nobody.
    #[serde(skip)]
    pub store_failed: bool,
}

impl PublishError {
    /// With an HTTP status and an explanation, where the store did not fail.
    #[must_use]
    pub fn new(status: u16, detail: impl Into<String>) -> Self {
        Self { status, detail: detail.into(), store_failed: false }
    }

    /// The store failed, or did not answer.
    #[must_use]
    pub fn of_store(detail: impl Into<String>) -> Self {
        Self { store_failed: true, ..Self::new(503, detail) }
    }
}

/// The outcome of one publish.
#[derive(Debug, Clone, PartialEq)]
pub struct Published {
    /// The sender's id, or the one made for it.
    pub id: MessageId,
    /// Whether a repeat under `id` is deduplicated.
    pub repeatable: bool,
    /// One entry per recipient, in the order given.
    pub accepted: Vec<(UserId, Result<Stored, PublishError>)>,
    /// One entry per topic, in the order given.
    pub topics: Vec<(LogId, Result<TopicOutcome, PublishError>)>,
}

/// What became of a publish to one topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TopicOutcome {
    /// It was stored for the members, or for some of them.
    Members {
        /// Members that the message is for.
        members: usize,
        /// Those for whom it is not stored.
        failed: Vec<(UserId, PublishError)>,
    },
    /// It stands in the log.
    Log(Stored),
}

impl TopicOutcome {
    fn failed(&self) -> &[(UserId, PublishError)] {
        match self {
            Self::Members { failed, .. } => failed,
            Self::Log(_) => &[],
        }
    }

    /// What it counts for among the recipients: a log counts as one.
    fn count(&self) -> usize {
        match self {
            Self::Members { members, .. } => *members,
            Self::Log(_) => 1,
        }
    }
}

/// Where a message is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    /// Position in the recipient's inbox, or in the log.
    pub seq: Seq,
    /// It was stored before under the same id.
    pub duplicate: bool,
}

impl Published {
    /// The problem to return, unless every recipient was served.
    #[must_use]
    pub fn problem(&self) -> Option<Problem> {
        let of_users = self.accepted.iter().filter_map(|(_, outcome)| outcome.as_ref().err());
        let of_topics = self.topics.iter().filter_map(|(_, outcome)| outcome.as_ref().err());
        let of_members = self.topics.iter().filter_map(|(_, outcome)| outcome.as_ref().ok());
        let of_members = of_members.flat_map(|topic| topic.failed().iter().map(|(_, error)| error));
        let failed: Vec<&PublishError> = of_users.chain(of_topics).chain(of_members).collect();
        // What a repeat mends goes before what it does not.
        let rank = |refusal: &&&PublishError| match refusal.status {
            503 => 0,
            409 => 3,
            429 => 1,
            _ => 2,
        };
        let first = *failed.iter().min_by_key(rank)?;
        // A topic that failed as a whole counts as one.
        let members = |(_, outcome): &(LogId, Result<TopicOutcome, PublishError>)| {
            outcome.as_ref().map_or(1, TopicOutcome::count)
        };
        let count = self.accepted.len() + self.topics.iter().map(members).sum::<usize>();
        let detail = if count == 1 {
            first.detail.clone()
        } else {
            format!(
                "{} of {count} recipients were not served; a repeat under this id stores only what is missing",
                failed.len(),
            )
        };
        let problem = Problem::new(first.status, detail);
        Some(Problem {
            // An id that is not deduplicated must not be offered for a repeat.
            id: self.repeatable.then(|| self.id.as_str().to_owned()),
            accepted: Some(
                self.accepted.iter().map(as_accepted).chain(self.topics.iter().map(as_topic)).collect(),
            ),
            // A budget of a log has room again within a second.
            retry_after_s: if first.status == 429 { Some(1) } else { problem.retry_after_s },
            ..problem
        })
    }

    /// Appends the body of a 202.
    pub fn put(&self, out: &mut BytesMut) {
        out.put_slice(br#"{"id":"#);
        put_id(out, self.id.as_str());
        out.put_slice(br#","accepted":["#);
        for (n, (user, outcome)) in self.accepted.iter().enumerate() {
            if n > 0 {
                out.put_u8(b',');
            }
            put_accepted(out, user, outcome);
        }
        // There are users or topics, never both.
        for (n, topic) in self.topics.iter().enumerate() {
            if n > 0 {
                out.put_u8(b',');
            }
            out.put_slice(&serde_json::to_vec(&as_topic(topic)).unwrap_or_default());
        }
        out.put_slice(b"]}");
    }
}

pub(super) fn as_accepted((user, outcome): &(UserId, Result<Stored, PublishError>)) -> Accepted {
    let user = user.as_str().to_owned();
    match outcome {
        Ok(stored) => Accepted::Stored { user, seq: stored.seq.get(), duplicate: stored.duplicate },
        Err(error) => Accepted::Failed { user, error: error.clone() },
    }
}

fn as_topic((log, outcome): &(LogId, Result<TopicOutcome, PublishError>)) -> Accepted {
    let of = OfLog::from(log);
    let failed = |(user, error): &(UserId, PublishError)| FailedMember {
        user: user.as_str().to_owned(),
        error: error.clone(),
    };
    match outcome {
        Ok(TopicOutcome::Log(stored)) => {
            Accepted::Log { of, seq: stored.seq.get(), duplicate: stored.duplicate }
        }
        Ok(TopicOutcome::Members { members, failed: all }) => Accepted::Topic {
            topic: log.to_string(),
            members: *members,
            stored: members - all.len(),
            failed: all.iter().map(failed).collect(),
        },
        Err(error) => Accepted::TopicFailed { of, error: error.clone() },
    }
}

pub(super) fn put_accepted(out: &mut BytesMut, user: &UserId, outcome: &Result<Stored, PublishError>) {
    out.put_slice(br#"{"user":"#);
    put_string(out, user.as_str());
    match outcome {
        Ok(stored) => {
            out.put_slice(br#","seq":"#);
            put_number(out, stored.seq.get());
            out.put_slice(if stored.duplicate {
                br#","duplicate":true}"#
            } else {
                br#","duplicate":false}"#
            });
        }
        Err(refusal) => {
            out.put_slice(br#","error":"#);
            out.put_slice(&serde_json::to_vec(refusal).unwrap_or_default());
            out.put_u8(b'}');
        }
    }
}

pub(super) fn put_string(out: &mut BytesMut, text: &str) {
    out.put_slice(&serde_json::to_vec(text).unwrap_or_default());
}

/// The body of the response to a batch: one result per publish, in the order sent.
#[must_use]
pub fn batch_body(results: &[Result<Published, Problem>]) -> Bytes {
    let mut out = BytesMut::with_capacity(results.len() * 110 + 16);
    out.put_slice(br#"{"results":["#);
    for (n, result) in results.iter().enumerate() {
        if n > 0 {
            out.put_u8(b',');
        }
        match result.as_ref().map(|published| (published, published.problem())) {
            Ok((published, None)) => published.put(&mut out),
            Ok((_, Some(problem))) => put_error(&mut out, &problem),
            Err(problem) => put_error(&mut out, problem),
        }
    }
    out.put_slice(b"]}");
    out.freeze()
}

pub(super) fn put_error(out: &mut BytesMut, problem: &Problem) {
    out.put_slice(br#"{"error":"#);
    out.put_slice(&problem.to_json());
    out.put_u8(b'}');
}

/// The body of the response to a history request, of an inbox or of this log.
#[must_use]
pub fn history_body(log: Option<&LogId>, messages: &[Message], next: Option<Seq>) -> Bytes {
    let mut out = BytesMut::with_capacity(messages.iter().map(|m| m.payload.len() + 200).sum::<usize>() + 32);
    out.put_slice(br#"{"messages":["#);
    for (n, message) in messages.iter().enumerate() {
        if n > 0 {
            out.put_u8(b',');
        }
        put_history_item(&mut out, log, message);
    }
    out.put_slice(br#"],"next":"#);
    match next {
        Some(seq) => put_number(&mut out, seq.get()),
        None => out.put_slice(b"null"),
    }
    out.put_u8(b'}');
    out.freeze()
}
