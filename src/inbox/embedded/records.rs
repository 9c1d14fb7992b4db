//! The keys and values as they are stored.

use std::sync::Arc;

use bytes::{Buf, BufMut, Bytes};

use super::super::{Append, Appended, CURSOR_LIFE_MS, InboxError, is_json};
use crate::message::{EventName, LogEntry, Message, MessageId, Millis, Seq, TopicName, UserId, Via};

/// A head record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Head {
    /// Everything up to this number is gone for good.
    pub(super) head: u64,
    /// The value of `head` when the record was made.
    pub(super) first: u64,
    pub(super) not_before_s: u64,
}

impl Append {
    pub(super) fn numbered(self, seq: u64) -> Message {
        let Self { id, accepted_at, expires_at, event, via, trace, payload, .. } = self;
        Message { seq: Seq::at(seq), id, accepted_at, expires_at, event, via, trace, payload }
    }
}

#[derive(Clone, Copy)]
pub(super) struct Fence {
    pub(super) seq: Seq,
    pub(super) expires_at: Millis,
    pub(super) digest: [u8; 16],
}

impl Fence {
    pub(super) fn outcome(&self, digest: [u8; 16]) -> Appended {
        if self.digest == digest { Appended::Duplicate(self.seq) } else { Appended::Conflict }
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(32);
        out.put_u64(self.seq.get());
        out.put_u64(self.expires_at.0);
        out.extend_from_slice(&self.digest);
        out
    }

    pub(super) fn decode(mut raw: &[u8]) -> Result<Self, InboxError> {
        let (seq, expires_at) = (take_u64(&mut raw)?, take_u64(&mut raw)?);
        let digest = raw.try_into().map_err(|_| corrupt("a fence"))?;
        Ok(Self { seq: Seq::at(seq), expires_at: Millis(expires_at), digest })
    }
}

#[derive(Clone, Copy)]
pub(super) struct Cursor {
    pub(super) acked: Seq,
    pub(super) moved_at: Millis,
}

impl Cursor {
    pub(super) fn is_stale(&self, now: Millis) -> bool {
        self.moved_at.0.saturating_add(CURSOR_LIFE_MS) <= now.0
    }

    pub(super) fn encode(self) -> Vec<u8> {
        let mut out = Vec::with_capacity(16);
        out.put_u64(self.acked.get());
        out.put_u64(self.moved_at.0);
        out
    }

    pub(super) fn decode(mut raw: &[u8]) -> Result<Self, InboxError> {
        Ok(Self { acked: Seq::at(take_u64(&mut raw)?), moved_at: Millis(take_u64(&mut raw)?) })
    }
}

impl Head {
    pub(super) fn beginning_at(moment: Millis) -> Self {
        Self { head: moment.0, first: moment.0, not_before_s: 0 }
    }

    pub(super) fn encode(self) -> Vec<u8> {
        let mut out = Vec::with_capacity(24);
        out.put_u64(self.head);
        out.put_u64(self.first);
        out.put_u64(self.not_before_s);
        out
    }

    pub(super) fn decode(mut raw: &[u8]) -> Result<Self, InboxError> {
        Ok(Self { head: take_u64(&mut raw)?, first: take_u64(&mut raw)?, not_before_s: take_u64(&mut raw)? })
    }
}

/// Version of the encoding of a message.
pub(super) const MESSAGE_LAYOUT: u8 = 1;
/// Flag of a message whose idempotency key is remembered.
const DEDUPLICATED: u8 = 1;
/// Flag of a message that has an event: its length and text stand before the payload.
const HAS_EVENT: u8 = 2;
/// Flag of a message that came by a topic: its name stands next, in the same form.
const HAS_TOPIC: u8 = 4;
/// Flag of a message in a log: the life in which it was published stands next, then the number of
/// users who do not get it, and their names, each with its length before it.
const IN_LOG: u8 = 8;
/// Flag of a message that belongs to a trace, which stands in a keyspace of its own: a version that
/// knows no traces reads the message, and leaves the flag aside.
const HAS_TRACE: u8 = 16;

/// Encodes a message into `out`, replacing its content.
pub(super) fn put_message(out: &mut Vec<u8>, message: &Message, deduplicated: bool) {
    let id = message.id.as_str().as_bytes();
    out.clear();
    out.put_u8(MESSAGE_LAYOUT);
    out.put_u64(message.accepted_at.0);
    out.put_u64(message.expires_at.0);
    let (event, topic) = (message.event.as_ref(), message.topic());
    let entry = message.log_entry();
    let flag = |is_set: bool, flag: u8| if is_set { flag } else { 0 };
    out.put_u8(
        flag(deduplicated, DEDUPLICATED)
            | flag(event.is_some(), HAS_EVENT)
            | flag(topic.is_some(), HAS_TOPIC)
            | flag(entry.is_some(), IN_LOG)
            | flag(message.trace.is_some(), HAS_TRACE),
    );
    out.put_u8(u8::try_from(id.len()).unwrap_or(u8::MAX));
    out.put_slice(id);
    [event.map(EventName::as_str), topic.map(TopicName::as_str)]
        .into_iter()
        .flatten()
        .for_each(|name| put_name(out, name));
    if let Some(LogEntry { life, except }) = entry {
        out.put_u64(*life);
        out.put_u8(u8::try_from(except.len()).unwrap_or(u8::MAX));
        except.iter().for_each(|user| put_name(out, user.as_str()));
    }
    out.put_slice(&message.payload);
}

/// The encoding of a message that ends at a time; `None` if it ends earlier, or cannot be read.
pub(super) fn ended(raw: &[u8], at: Millis) -> Option<Vec<u8>> {
    const EXPIRES: std::ops::Range<usize> = 9..17;
    let expires_at = u64::from_be_bytes(raw.get(EXPIRES)?.try_into().ok()?);
    if raw.first() != Some(&MESSAGE_LAYOUT) || expires_at <= at.0 {
        return None;
    }
    let mut changed = raw.to_vec();
    changed.get_mut(EXPIRES)?.copy_from_slice(&at.0.to_be_bytes());
    Some(changed)
}

/// Appends a name, with its length before it. A name has at most 255 bytes.
pub(super) fn put_name(out: &mut Vec<u8>, name: &str) {
    out.put_u8(u8::try_from(name.len()).unwrap_or(u8::MAX));
    out.put_slice(name.as_bytes());
}

/// A message as it is stored.
pub(super) struct Decoded {
    /// Without its trace.
    pub(super) message: Message,
    /// Its idempotency key is remembered.
    pub(super) deduplicated: bool,
    /// It belongs to a trace, which stands elsewhere.
    pub(super) is_traced: bool,
}

pub(super) fn decode(seq: u64, mut raw: Bytes) -> Result<Decoded, InboxError> {
    if raw.len() < 19 || raw.get_u8() != MESSAGE_LAYOUT {
        return Err(corrupt("a message"));
    }
    let (accepted_at, expires_at) = (Millis(raw.get_u64()), Millis(raw.get_u64()));
    let (flags, id_len) = (raw.get_u8(), raw.get_u8() as usize);
    let id = take_text(&mut raw, id_len)?;
    let id = std::str::from_utf8(&id).ok().and_then(|id| MessageId::parse(id).ok());
    let id = id.ok_or_else(|| corrupt("a message id"))?;
    let event = take_name(flags & HAS_EVENT != 0, &mut raw)?;
    let event = event.map(|name| EventName::parse(&name)).transpose().map_err(|_| corrupt("an event"))?;
    let topic = take_name(flags & HAS_TOPIC != 0, &mut raw)?;
    let topic = topic.map(|name| TopicName::parse(&name)).transpose().map_err(|_| corrupt("a topic"))?;
    let entry = if flags & IN_LOG != 0 { Some(take_entry(&mut raw)?) } else { None };
    let via = topic.map(Via::Inbox).or(entry.map(Via::Log)).map(Arc::new);
    if !is_json(&raw) {
        return Err(corrupt("a payload"));
    }
    let (seq, trace) = (Seq::at(seq), None);
    let message = Message { seq, id, accepted_at, expires_at, event, via, trace, payload: raw };
    Ok(Decoded { message, deduplicated: flags & DEDUPLICATED != 0, is_traced: flags & HAS_TRACE != 0 })
}

fn take_text(raw: &mut Bytes, length: usize) -> Result<Bytes, InboxError> {
    if raw.len() < length { Err(corrupt("a message")) } else { Ok(raw.split_to(length)) }
}

/// A name with its length before it, where there is one.
fn take_name(is_there: bool, raw: &mut Bytes) -> Result<Option<String>, InboxError> {
    if !is_there {
        return Ok(None);
    }
    let length = raw.first().copied().unwrap_or_default() as usize;
    raw.advance(raw.len().min(1));
    let name = take_text(raw, length)?;
    String::from_utf8(name.to_vec()).map(Some).map_err(|_| corrupt("a name"))
}

/// What a message in a log has besides.
fn take_entry(raw: &mut Bytes) -> Result<LogEntry, InboxError> {
    if raw.len() < 9 {
        return Err(corrupt("a message of a log"));
    }
    let (life, count) = (raw.get_u64(), raw.get_u8());
    let mut except = Vec::with_capacity(count.into());
    for _ in 0..count {
        let name = take_name(true, raw)?.and_then(|name| UserId::parse(&name).ok());
        except.push(name.ok_or_else(|| corrupt("a user who is left out"))?);
    }
    Ok(LogEntry { life, except })
}

/// The user of a head record's key; `None` if the key is not one.
pub(super) fn user_of(key: &[u8]) -> Option<UserId> {
    UserId::parse(std::str::from_utf8(key.get(HASH_BYTES..)?).ok()?).ok()
}

/// The user and the device of a cursor's key; `None` if the key is not one.
pub(super) fn device_of(key: &[u8]) -> Option<(UserId, &str)> {
    let text = std::str::from_utf8(key.get(HASH_BYTES..)?).ok()?;
    let (user, device) = text.split_once('\0')?;
    Some((UserId::parse(user).ok()?, device))
}

pub(super) fn take_u64(raw: &mut &[u8]) -> Result<u64, InboxError> {
    if raw.len() < 8 { Err(corrupt("a record")) } else { Ok(raw.get_u64()) }
}

pub(super) fn corrupt(what: &str) -> InboxError {
    InboxError::Corrupt(what.to_owned())
}

pub(super) fn unreadable(error: fjall::Error) -> InboxError {
    InboxError::Unavailable(error.to_string())
}

/// Bytes of the user's hash before each key.
pub(super) const HASH_BYTES: usize = 4;

/// FNV-1a, 32 bits (draft-eastlake-fnv). It is part of stored keys and must never change. Users
/// that collide only make their own look-ups slower.
pub(super) fn hash(user: &UserId) -> [u8; HASH_BYTES] {
    let step = |hash: u32, byte: &u8| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193);
    user.as_str().as_bytes().iter().fold(0x811c_9dc5, step).to_be_bytes()
}

pub(super) fn head_key(user: &UserId) -> Vec<u8> {
    let mut key = Vec::new();
    put_head_key(&mut key, user);
    key
}

pub(super) fn put_head_key(key: &mut Vec<u8>, user: &UserId) {
    // Room for a zero byte and a number.
    key.reserve(HASH_BYTES + user.as_str().len() + 9);
    key.extend_from_slice(&hash(user));
    key.extend_from_slice(user.as_str().as_bytes());
}

pub(super) fn prefix(user: &UserId) -> Vec<u8> {
    let mut key = head_key(user);
    key.push(0);
    key
}

pub(super) fn message_key(user: &UserId, seq: u64) -> Vec<u8> {
    let mut key = Vec::new();
    put_message_key(&mut key, user, seq);
    key
}

/// Encodes a message's key into `key`, replacing its content.
pub(super) fn put_message_key(key: &mut Vec<u8>, user: &UserId, seq: u64) {
    key.clear();
    put_head_key(key, user);
    key.put_u8(0);
    key.put_u64(seq);
}

pub(super) fn seq_of(key: &[u8]) -> Result<u64, InboxError> {
    key.last_chunk::<8>().map(|raw| u64::from_be_bytes(*raw)).ok_or_else(|| corrupt("a message's key"))
}

pub(super) fn fence_key(user: &UserId, fence: &str) -> Vec<u8> {
    let mut key = prefix(user);
    key.extend_from_slice(fence.as_bytes());
    key
}

pub(super) fn cursor_key(user: &UserId, device: &str) -> Vec<u8> {
    let mut key = prefix(user);
    key.extend_from_slice(device.as_bytes());
    key
}
