//! The bodies of the HTTP interfaces, and the problems that are returned.
//!
//! A publish is parsed in one pass. Its payload stays a slice of the body, byte for byte.

mod problem;
mod recipients;
mod replies;
mod requests;
mod topics;

use bytes::Bytes;
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use std::sync::Arc;

pub use problem::{FieldError, Problem};
pub use recipients::{EXCEPT_PER_PUBLISH, TOPICS_PER_PUBLISH};
pub use replies::{
    Accepted, FailedMember, PublishError, Published, Stored, TopicOutcome, batch_body, history_body,
};
pub use requests::{TokenRequest, parse_connect, parse_token_request, parse_verify_request};
pub use topics::{MEMBERS_PER_CALL, MembersRequest, TopicRequest, parse_members, parse_topic};

use crate::message::{EventName, MessageId, Recipients};
use crate::trace::TraceParent;

use problem::TOO_LARGE;
use recipients::{parse_to, parse_user};

/// Life of a message, in seconds (docs/design.md, section 11).
pub const TTL_S: std::ops::RangeInclusive<u64> = 1..=30 * 24 * 3600;

/// The limits that a publish is checked against.
#[derive(Debug, Clone, Copy)]
pub struct PublishLimits {
    /// Largest payload, in bytes as sent.
    pub message_bytes: usize,
    /// Most recipients of one publish.
    pub recipients: usize,
    /// Most publishes in one batch.
    pub batch: usize,
}

/// A publish that is well-formed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Publish {
    /// The recipients.
    pub to: Recipients,
    /// What the message tells, if the sender named that.
    pub event: Option<EventName>,
    /// Valid JSON text, byte for byte as sent.
    pub payload: Bytes,
    /// Life of the message, in seconds; `None` if the sender named none.
    pub ttl_s: Option<u64>,
    /// The sender's id, if it gave one.
    pub id: Option<MessageId>,
    /// The trace that the publish belongs to, if its sender named one in a header.
    pub trace: Option<Arc<TraceParent>>,
}

/// Tells `null` from an absent field where `null` is a value. Elsewhere the two are the same.
fn present<'de: 'a, 'a, D: Deserializer<'de>>(from: D) -> Result<Option<&'a RawValue>, D::Error> {
    <&RawValue>::deserialize(from).map(Some)
}

#[derive(Deserialize)]
struct RawPublish<'a> {
    #[serde(default, borrow, deserialize_with = "present")]
    to: Option<&'a RawValue>,
    #[serde(default, borrow, deserialize_with = "present")]
    payload: Option<&'a RawValue>,
    #[serde(default, borrow)]
    ttl_s: Option<&'a RawValue>,
    #[serde(default, borrow)]
    id: Option<&'a RawValue>,
    #[serde(default, borrow)]
    event: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct RawBatch<'a> {
    #[serde(default, borrow, deserialize_with = "present")]
    messages: Option<&'a RawValue>,
}

/// Parses a JSON object; serde alone would accept an array.
///
/// # Errors
///
/// 400 if it is not JSON, 422 if it is not an object of this shape.
pub fn parse_object<'a, T: Deserialize<'a>>(body: &'a [u8], pointer: &str) -> Result<T, Problem> {
    let looks = body.trim_ascii_start().first();
    if looks.is_some_and(|byte| *byte != b'{') && serde_json::from_slice::<&RawValue>(body).is_ok() {
        return Err(Problem::fields(vec![fault(pointer, "must be a JSON object")]));
    }
    serde_json::from_slice(body).map_err(|error| match error.classify() {
        serde_json::error::Category::Data => Problem::fields(vec![fault(pointer, error.to_string())]),
        _ => Problem::new(400, format!("the body is not JSON: {error}")),
    })
}

fn fault(pointer: impl Into<String>, detail: impl Into<String>) -> FieldError {
    FieldError { pointer: pointer.into(), detail: detail.into() }
}

/// Payloads of at least this many bytes are not copied out of the body. The read buffer of a
/// connection is at least twice as large.
const SHARED_PAYLOAD: usize = 4 * 1024;

/// Parses the body of one publish.
///
/// # Errors
///
/// 400 not JSON, 413 payload over the limit, 422 wrong fields.
pub fn parse_publish(body: &Bytes, limits: &PublishLimits) -> Result<Publish, Problem> {
    let raw: RawPublish<'_> = parse_object(body, "")?;
    let mut faults = Vec::new();
    let to = match raw.to {
        Some(to) => parse_to(to, limits, &mut faults),
        None => {
            faults.push(fault(
                "/to",
                "is required: {\"user\":\"…\"}, {\"users\":[…]}, {\"topic\":\"…\"}, {\"topics\":[…]} or {\"everyone\":true}",
            ));
            None
        }
    };
    let payload = parse_payload(raw.payload, body, limits, &mut faults);
    let ttl_s = parse_ttl(raw.ttl_s, "/ttl_s", &mut faults);
    let id = raw.id.and_then(|raw| parse_id(raw, &mut faults));
    let event = raw.event.and_then(|raw| parse_event(raw, &mut faults));
    match (to, payload) {
        (Some(to), Some(payload)) if faults.is_empty() => {
            Ok(Publish { to, event, payload, ttl_s, id, trace: None })
        }
        _ => Err(Problem::fields(faults)),
    }
}

fn parse_payload(
    raw: Option<&RawValue>,
    body: &Bytes,
    limits: &PublishLimits,
    faults: &mut Vec<FieldError>,
) -> Option<Bytes> {
    let Some(raw) = raw else {
        faults.push(fault("/payload", "is required: any JSON value, null included"));
        return None;
    };
    let text = raw.get().as_bytes();
    if text.len() > limits.message_bytes {
        let detail = format!("{TOO_LARGE}{} bytes; at most {} are allowed", text.len(), limits.message_bytes);
        faults.push(fault("/payload", detail));
        return None;
    }
    if !is_shallow(text) {
        faults.push(fault("/payload", TOO_DEEP));
        return None;
    }
    // A slice keeps the whole body and its read buffer alive. That pays only for a large payload
    // that makes up most of the body.
    let shared = text.len() >= SHARED_PAYLOAD && body.len() <= 2 * text.len();
    Some(if shared { body.slice_ref(text) } else { Bytes::copy_from_slice(text) })
}

/// Most levels of nesting of a payload, the default of common parsers (serde_json among them). A
/// client whose parser dies of a payload would get it again for ever.
pub const PAYLOAD_LEVELS: usize = 128;
/// Detail of a payload that is nested deeper.
pub const TOO_DEEP: &str =
    "is nested more than 128 levels deep, which the parsers of many clients do not take";

/// Whether valid JSON text is nested no deeper than [`PAYLOAD_LEVELS`].
#[must_use]
pub fn is_shallow(json: &[u8]) -> bool {
    let opens = |byte: &&u8| matches!(byte, b'[' | b'{');
    // Nearly all payloads have fewer brackets than that, inside or outside of strings.
    if json.iter().filter(opens).count() <= PAYLOAD_LEVELS {
        return true;
    }
    let (mut level, mut in_string, mut escaped) = (0usize, false, false);
    for byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            _ if in_string => {}
            b'[' | b'{' => level += 1,
            b']' | b'}' => level = level.saturating_sub(1),
            _ => {}
        }
        if level > PAYLOAD_LEVELS {
            return false;
        }
    }
    true
}

fn parse_ttl(raw: Option<&RawValue>, pointer: &str, faults: &mut Vec<FieldError>) -> Option<u64> {
    let ttl_s = raw?.get().parse::<u64>().ok().filter(|ttl_s| TTL_S.contains(ttl_s));
    if ttl_s.is_none() {
        let detail = format!("must be an integer from {} to {} seconds", TTL_S.start(), TTL_S.end());
        faults.push(fault(pointer, detail));
    }
    ttl_s
}

fn parse_id(raw: &RawValue, faults: &mut Vec<FieldError>) -> Option<MessageId> {
    let Ok(text) = serde_json::from_str::<String>(raw.get()) else {
        faults.push(fault("/id", "must be a string"));
        return None;
    };
    MessageId::parse(&text).map_err(|rule| faults.push(fault("/id", rule.to_string()))).ok()
}

fn parse_event(raw: &RawValue, faults: &mut Vec<FieldError>) -> Option<EventName> {
    let Ok(text) = serde_json::from_str::<String>(raw.get()) else {
        faults.push(fault("/event", "must be a string"));
        return None;
    };
    EventName::parse(&text).map_err(|rule| faults.push(fault("/event", rule.to_string()))).ok()
}

/// Parses the body of a batch. Each item stands alone, but that the one with which more than
/// [`BATCH_RECIPIENTS`] are reached is refused, and those after it.
///
/// # Errors
///
/// A fault of the batch as a whole.
pub fn parse_batch(body: &Bytes, limits: &PublishLimits) -> Result<Vec<Result<Publish, Problem>>, Problem> {
    let raw: RawBatch<'_> = parse_object(body, "")?;
    let items = raw.messages.and_then(|raw| serde_json::from_str::<UpTo<'_>>(raw.get()).ok());
    let Some(UpTo { items, count }) = items else {
        return Err(Problem::fields(vec![fault("/messages", "must be a list of publishes")]));
    };
    if items.is_empty() || count > limits.batch {
        let detail = format!("must have 1 to {} messages, not {count}", limits.batch);
        return Err(Problem::fields(vec![fault("/messages", detail)]));
    }
    let (mut all, mut recipients) = (Vec::with_capacity(items.len()), 0);
    for item in &items {
        if recipients > BATCH_RECIPIENTS {
            all.push(Err(beyond_the_batch()));
            continue;
        }
        // Each item gets a copy of its own, so that one item that waits does not keep the whole
        // batch alive.
        let parsed = parse_publish(&Bytes::copy_from_slice(item.get().as_bytes()), limits);
        // A faulty item counts by its errors, at least one.
        recipients += parsed.as_ref().map_or_else(
            |problem| problem.errors.len().saturating_sub(1),
            |publish| publish.to.users().len(),
        );
        all.push(if recipients > BATCH_RECIPIENTS { Err(beyond_the_batch()) } else { parsed });
    }
    Ok(all)
}

fn beyond_the_batch() -> Problem {
    let detail = format!("a batch reaches at most {BATCH_RECIPIENTS} recipients together: send it in parts");
    Problem::fields(vec![fault("/to", detail)])
}

/// Most recipients of all publishes of a batch together. Each costs about 400 bytes while it waits
/// to be stored: 4 MB.
pub const BATCH_RECIPIENTS: usize = 10_000;
/// Items of a list of a publish that are parsed: more than any limit of such a list allows.
const LIST_ITEMS: usize = 1_000;

/// A list, parsed as far as it may be used, and its length. Items beyond are only counted.
struct UpTo<'a, const MOST: usize = LIST_ITEMS> {
    items: Vec<&'a RawValue>,
    count: usize,
}

impl<'de: 'a, 'a, const MOST: usize> Deserialize<'de> for UpTo<'a, MOST> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Visitor<'a, const MOST: usize>(std::marker::PhantomData<&'a ()>);
        impl<'de: 'a, 'a, const MOST: usize> serde::de::Visitor<'de> for Visitor<'a, MOST> {
            type Value = UpTo<'a, MOST>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a list")
            }

            fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
                let mut items = Vec::new();
                while items.len() < MOST {
                    match list.next_element::<&RawValue>()? {
                        Some(item) => items.push(item),
                        None => return Ok(UpTo { count: items.len(), items }),
                    }
                }
                let mut count = items.len();
                while list.next_element::<serde::de::IgnoredAny>()?.is_some() {
                    count += 1;
                }
                Ok(UpTo { items, count })
            }
        }
        from.deserialize_seq(Visitor(std::marker::PhantomData))
    }
}

#[cfg(test)]
mod tests;
