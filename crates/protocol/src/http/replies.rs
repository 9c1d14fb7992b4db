//! The responses to publishes, batches and history requests.

use bytes::{BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};

use super::problem::Problem;
use crate::frame::{put_history_item, put_id, put_number};
use crate::message::{Message, MessageId, Seq, UserId};

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
}

/// Why a message was not stored for one recipient.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublishError {
    /// HTTP status: 409 or 503.
    pub status: u16,
    /// An explanation for people.
    #[serde(default)]
    pub detail: String,
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
}

/// Where a message is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    /// Position in the recipient's inbox.
    pub seq: Seq,
    /// It was stored before under the same id.
    pub duplicate: bool,
}

impl Published {
    /// The problem to return, unless every recipient was served.
    #[must_use]
    pub fn problem(&self) -> Option<Problem> {
        let failed: Vec<&PublishError> = self.accepted.iter().filter_map(|(_, r)| r.as_ref().err()).collect();
        let first = *failed.iter().find(|refusal| refusal.status != 409).or(failed.first())?;
        let single = self.accepted.len() == 1;
        let detail = if single {
            first.detail.clone()
        } else {
            format!(
                "{} of {} recipients were not served; a repeat under this id stores only what is missing",
                failed.len(),
                self.accepted.len()
            )
        };
        Some(Problem {
            // An id that is not deduplicated must not be offered for a repeat.
            id: self.repeatable.then(|| self.id.as_str().to_owned()),
            accepted: Some(self.accepted.iter().map(as_accepted).collect()),
            ..Problem::new(first.status, detail)
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

/// The body of the response to a history request.
#[must_use]
pub fn history_body(messages: &[Message], next: Option<Seq>) -> Bytes {
    let mut out = BytesMut::with_capacity(messages.iter().map(|m| m.payload.len() + 200).sum::<usize>() + 32);
    out.put_slice(br#"{"messages":["#);
    for (n, message) in messages.iter().enumerate() {
        if n > 0 {
            out.put_u8(b',');
        }
        put_history_item(&mut out, message);
    }
    out.put_slice(br#"],"next":"#);
    match next {
        Some(seq) => put_number(&mut out, seq.get()),
        None => out.put_slice(b"null"),
    }
    out.put_u8(b'}');
    out.freeze()
}
