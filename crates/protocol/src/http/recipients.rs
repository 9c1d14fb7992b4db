//! The recipients of a publish: `to`.

use std::ops::RangeInclusive;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::{FieldError, PublishLimits, UpTo, fault};
use crate::message::{LogId, Recipients, TopicName, UserId};

#[derive(Deserialize)]
struct RawTo<'a> {
    #[serde(default, borrow)]
    user: Option<&'a RawValue>,
    #[serde(default, borrow)]
    users: Option<&'a RawValue>,
    #[serde(default, borrow)]
    topic: Option<&'a RawValue>,
    #[serde(default, borrow)]
    topics: Option<&'a RawValue>,
    #[serde(default, borrow)]
    everyone: Option<&'a RawValue>,
    #[serde(default, borrow)]
    except: Option<&'a RawValue>,
}

pub(super) fn parse_to(
    raw: &RawValue,
    limits: &PublishLimits,
    faults: &mut Vec<FieldError>,
) -> Option<Recipients> {
    const FORM: &str = "must be an object with exactly one of \"user\", \"users\", \"topic\", \"topics\" and \"everyone\": true, and \
         \"except\" only beside the last three";
    let parsed =
        raw.get().starts_with('{').then(|| serde_json::from_str::<RawTo<'_>>(raw.get()).ok()).flatten();
    match parsed {
        Some(RawTo {
            user: Some(user),
            users: None,
            topic: None,
            topics: None,
            everyone: None,
            except: None,
        }) => parse_user(user, "/to/user", faults).map(Recipients::User),
        Some(RawTo {
            user: None,
            users: Some(users),
            topic: None,
            topics: None,
            everyone: None,
            except: None,
        }) => parse_users(users, "/to/users", 1..=limits.recipients, faults).map(Recipients::Users),
        Some(RawTo { user: None, users: None, topic: Some(topic), topics: None, everyone: None, except }) => {
            let topics = parse_topic_name(topic, "/to/topic", faults).map(|topic| vec![topic]);
            parse_except(topics, except, faults)
        }
        Some(RawTo {
            user: None,
            users: None,
            topic: None,
            topics: Some(topics),
            everyone: None,
            except,
        }) => parse_except(parse_topics(topics, faults), except, faults),
        Some(RawTo { user: None, users: None, topic: None, topics: None, everyone: Some(all), except }) => {
            let everyone = (all.get() == "true").then(|| vec![LogId::Everyone]);
            if everyone.is_none() {
                faults.push(fault("/to/everyone", "must be true"));
            }
            parse_except(everyone, except, faults)
        }
        _ => {
            faults.push(fault("/to", FORM));
            None
        }
    }
}

pub(super) fn parse_user(raw: &RawValue, pointer: &str, faults: &mut Vec<FieldError>) -> Option<UserId> {
    // Most ids need no unescaping; they are borrowed.
    let text: Option<std::borrow::Cow<'_, str>> = match serde_json::from_str::<&str>(raw.get()) {
        Ok(text) => Some(text.into()),
        Err(_) => serde_json::from_str::<String>(raw.get()).ok().map(Into::into),
    };
    let Some(text) = text else {
        faults.push(fault(pointer, "must be a string"));
        return None;
    };
    UserId::parse(&text).map_err(|rule| faults.push(fault(pointer, rule.to_string()))).ok()
}

/// A user that is named twice is stored once: both entries carry the id of the publish, so the
/// second one is a duplicate.
fn parse_users(
    raw: &RawValue,
    pointer: &str,
    allowed: RangeInclusive<usize>,
    faults: &mut Vec<FieldError>,
) -> Option<Vec<UserId>> {
    let Ok(UpTo { items: users, count }) = serde_json::from_str::<UpTo<'_>>(raw.get()) else {
        faults.push(fault(pointer, "must be a list of user ids"));
        return None;
    };
    if !allowed.contains(&count) {
        let detail = format!("must have {} to {} users, not {count}", allowed.start(), allowed.end());
        faults.push(fault(pointer, detail));
        return None;
    }
    let users = users.into_iter().enumerate();
    let read: Vec<UserId> =
        users.filter_map(|(n, user)| parse_user(user, &format!("{pointer}/{n}"), faults)).collect();
    (read.len() == count).then_some(read)
}

fn parse_topic_name(raw: &RawValue, pointer: &str, faults: &mut Vec<FieldError>) -> Option<LogId> {
    let Ok(text) = serde_json::from_str::<String>(raw.get()) else {
        faults.push(fault(pointer, "must be a string"));
        return None;
    };
    let name = TopicName::parse(&text).map_err(|rule| faults.push(fault(pointer, rule.to_string())));
    name.ok().map(LogId::Topic)
}

/// Most topics of one publish.
pub const TOPICS_PER_PUBLISH: usize = 100;
/// Most users that one publish to topics leaves out.
pub const EXCEPT_PER_PUBLISH: usize = 100;

fn parse_topics(raw: &RawValue, faults: &mut Vec<FieldError>) -> Option<Vec<LogId>> {
    let Ok(UpTo { items: topics, count }) = serde_json::from_str::<UpTo<'_>>(raw.get()) else {
        faults.push(fault("/to/topics", "must be a list of names of topics"));
        return None;
    };
    if topics.is_empty() || count > TOPICS_PER_PUBLISH {
        let detail = format!("must have 1 to {TOPICS_PER_PUBLISH} topics, not {count}");
        faults.push(fault("/to/topics", detail));
        return None;
    }
    let topics = topics.into_iter().enumerate();
    let read: Vec<LogId> =
        topics.filter_map(|(n, topic)| parse_topic_name(topic, &format!("/to/topics/{n}"), faults)).collect();
    (read.len() == count).then_some(read)
}

fn parse_except(
    topics: Option<Vec<LogId>>,
    except: Option<&RawValue>,
    faults: &mut Vec<FieldError>,
) -> Option<Recipients> {
    let except = match except {
        None => Some(Vec::new()),
        Some(raw) => parse_users(raw, "/to/except", 0..=EXCEPT_PER_PUBLISH, faults),
    };
    Some(Recipients::Topics { topics: topics?, except: except? })
}
