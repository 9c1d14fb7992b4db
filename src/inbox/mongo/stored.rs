//! The documents in MongoDB, and their names.

use std::sync::Arc;

use bytes::Bytes;
use mongodb::bson::spec::BinarySubtype;
use mongodb::bson::{Binary, Bson, Document, doc};
use serde::{Deserialize, Serialize};

use crate::inbox::{Append, InboxError, is_json};
use crate::message::{EventName, LogEntry, Message, MessageId, Millis, Seq, TopicName, UserId, Via};
use crate::trace::TraceParent;

/// The collection of head records and messages.
pub(super) const INBOX: &str = "inbox";
/// The same for the logs of topics. The name of a topic stands there as the user.
pub(super) const LOGS: &str = "topic_messages";
/// The collection of cursors.
pub(super) const CURSORS: &str = "cursors";

/// The collection of topics, and that of their members.
pub(super) const TOPICS: &str = "topics";
pub(super) const MEMBERS: &str = "members";

/// The collection that says which store this is.
pub(super) const ABOUT: &str = "about";

/// A message. The head record of its user is at n = 0.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct StoredMessage {
    #[serde(rename = "_id")]
    pub(super) place: Place,
    /// Id of the append that wrote it: tells one's own from another's after a lost response.
    pub(super) a: String,
    /// Id of the message.
    pub(super) i: String,
    /// When it was accepted, ms.
    pub(super) at: i64,
    /// When it expires, ms.
    pub(super) x: i64,
    /// Event, if the sender named one.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(super) e: Option<String>,
    /// Topic by which the recipient was reached, if it was one.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(super) v: Option<String>,
    /// In a log: the life of the topic's name in which it was published.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(super) l: Option<i64>,
    /// In a log: users who do not get it.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub(super) ex: Vec<String>,
    /// The trace that the message belongs to, if its sender named one.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(super) t: Option<Binary>,
    /// Payload.
    pub(super) p: Binary,
    /// The idempotency key; unset when it is given up.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(super) f: Option<String>,
    /// Digest of the payload, if there is an idempotency key.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(super) d: Option<Binary>,
}

/// The `_id` of a message.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Place {
    pub(super) u: String,
    pub(super) n: i64,
}

/// A head record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct HeadRecord {
    /// Every number up to this one was removed or never assigned.
    pub(super) head: u64,
    /// The initial value of `head`: no message ever had a number up to it.
    pub(super) first: u64,
    pub(super) not_before_s: u64,
    /// Numbers up to this one were sent to a client before the store was restored.
    pub(super) shown: u64,
    /// Every number up to this one has expired: for readers of logs alone.
    pub(super) gone: u64,
    /// How often the user's memberships in topics with a log have changed.
    pub(super) memberships: u64,
}

/// A number as MongoDB stores it.
pub(super) fn int(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

fn binary(bytes: &[u8]) -> Binary {
    Binary { subtype: BinarySubtype::Generic, bytes: bytes.to_vec() }
}

/// The `_id` of user and number.
pub(super) fn id(user: &UserId, n: u64) -> Document {
    doc! { "u": user.as_str(), "n": int(n) }
}

/// A filter for every `_id` of a user above `n`.
pub(super) fn ids_above(user: &UserId, n: u64) -> Document {
    doc! { "$gt": id(user, n), "$lt": { "u": user.as_str(), "n": Bson::MaxKey } }
}

impl StoredMessage {
    pub(super) fn new(append: &Append, append_id: &str, n: u64) -> Self {
        let via = append.via.as_deref();
        let entry = match via {
            Some(Via::Log(entry)) => Some(entry),
            _ => None,
        };
        Self {
            place: Place { u: append.user.as_str().to_owned(), n: int(n) },
            a: append_id.to_owned(),
            i: append.id.as_str().to_owned(),
            at: int(append.accepted_at.0),
            x: int(append.expires_at.0),
            e: append.event.as_ref().map(|event| event.as_str().to_owned()),
            v: via.and_then(Via::inbox).map(|topic| topic.as_str().to_owned()),
            l: entry.map(|entry| int(entry.life)),
            ex: entry
                .map(|entry| entry.except.iter().map(|user| user.as_str().to_owned()).collect())
                .unwrap_or_default(),
            t: append.trace.as_deref().map(|trace| binary(&trace.to_bytes())),
            p: binary(&append.payload),
            f: append.deduplicated.then(|| append.fence()),
            d: append.deduplicated.then(|| binary(&append.digest())),
        }
    }

    /// A bridge: an expired message at `n`, after which numbers were left out.
    pub(super) fn bridge(user: &UserId, n: u64) -> Self {
        Self {
            place: Place { u: user.as_str().to_owned(), n: int(n) },
            a: String::new(),
            i: "bridge".to_owned(),
            at: 0,
            x: 0,
            e: None,
            v: None,
            l: None,
            ex: Vec::new(),
            t: None,
            p: binary(&[]),
            f: None,
            d: None,
        }
    }

    /// Whether a document is a bridge.
    pub(super) fn is_bridge(document: &Document) -> bool {
        integer(document, "x") == Some(0)
    }

    pub(super) fn n(&self) -> u64 {
        self.place.n.max(0).unsigned_abs()
    }

    pub(super) fn is_expired(&self, now: Millis) -> bool {
        self.x <= int(now.0)
    }

    pub(super) fn into_message(self) -> Result<Message, InboxError> {
        let place = self.place.clone();
        let corrupt = || InboxError::Corrupt(format!("message {} of {:?}", place.n, place.u));
        let (n, is_bridge) = (self.n(), self.x == 0);
        if !is_bridge && !is_json(&self.p.bytes) {
            return Err(corrupt());
        }
        let topic = self.v.map(|topic| TopicName::parse(&topic)).transpose().map_err(|_| corrupt())?;
        let except = self.ex.iter().map(|user| UserId::parse(user)).collect::<Result<_, _>>();
        let entry = match self.l {
            Some(life) => {
                Some(LogEntry { life: life.max(0).unsigned_abs(), except: except.map_err(|_| corrupt())? })
            }
            None => None,
        };
        let via = topic.map(Via::Inbox).or(entry.map(Via::Log));
        Ok(Message {
            seq: Seq::new(n).ok_or_else(corrupt)?,
            id: MessageId::parse(&self.i).map_err(|_| corrupt())?,
            accepted_at: Millis(self.at.max(0).unsigned_abs()),
            expires_at: Millis(self.x.max(0).unsigned_abs()),
            event: self.e.map(|event| EventName::parse(&event)).transpose().map_err(|_| corrupt())?,
            via: via.map(Arc::new),
            // What a later version may write there is not worth a message.
            trace: self.t.and_then(|raw| TraceParent::from_bytes(&raw.bytes)).map(Arc::new),
            payload: Bytes::from(self.p.bytes),
        })
    }
}

impl HeadRecord {
    pub(super) fn read(document: &Document) -> Self {
        let number = |name: &str| number(document, name);
        let (head, first) = (number("head"), number("first"));
        let (not_before_s, shown) = (number("nb"), number("shown"));
        Self { head, first, not_before_s, shown, gone: number("gone"), memberships: number("mv") }
    }
}

/// A field that counts; 0 where it is missing or no such number.
pub(super) fn number(document: &Document, name: &str) -> u64 {
    integer(document, name).unwrap_or(0).max(0).unsigned_abs()
}

/// An integer of any numeric type. Tools that copy documents may turn an Int64 into a Double or an
/// Int32, and MongoDB treats the three as the same key.
pub(super) fn integer(document: &Document, name: &str) -> Option<i64> {
    match *document.get(name)? {
        Bson::Int64(n) => Some(n),
        Bson::Int32(n) => Some(i64::from(n)),
        // Only doubles that are exact.
        Bson::Double(n) if n.fract() == 0.0 && n.abs() <= EXACT => Some(n as i64),
        _ => None,
    }
}

/// 2^53.
const EXACT: f64 = 9_007_199_254_740_992.0;

/// The user and number of a document's `_id`.
pub(super) fn place_of(document: &Document) -> Option<(&str, u64)> {
    let place = document.get_document("_id").ok()?;
    Some((place.get_str("u").ok()?, u64::try_from(integer(place, "n")?).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_read_in_each_type_that_mongodb_takes_for_it() {
        let place = |n: Bson| doc! { "_id": { "u": "alice", "n": n } };
        for n in [Bson::Int64(7), Bson::Int32(7), Bson::Double(7.0)] {
            assert_eq!(place_of(&place(n)), Some(("alice", 7)));
        }
        for n in [Bson::Double(7.5), Bson::Double(f64::NAN), Bson::Double(1e300), Bson::Int32(-1), Bson::Null]
        {
            assert_eq!(place_of(&place(n)), None);
        }
        let record = HeadRecord::read(&doc! { "head": 5.0, "first": 3i32, "nb": "x" });
        assert_eq!((record.head, record.first, record.not_before_s), (5, 3, 0));
        assert!(StoredMessage::is_bridge(&doc! { "x": 0.0 }) && !StoredMessage::is_bridge(&doc! {}));
    }
}
