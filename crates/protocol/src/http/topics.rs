//! The bodies of requests about topics.

use std::collections::HashSet;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::{FieldError, Problem, UpTo, fault, parse_object, parse_ttl, parse_user};
use crate::message::UserId;
use crate::topic::Delivery;

/// Most users in one change of members, those that join and those that leave together.
pub const MEMBERS_PER_CALL: usize = 10_000;
/// Faults of a list that are told. A list of 10,000 bad names would fill a megabyte.
const FAULTS_TOLD: usize = 100;

/// The body of `PUT /v1/topics/{topic}`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TopicRequest {
    /// How messages reach the members, if the sender says so.
    pub delivery: Option<Delivery>,
    /// Life of messages whose sender names none, in seconds.
    pub ttl_s: Option<u64>,
}

/// Parses the body of `PUT /v1/topics/{topic}`.
///
/// # Errors
///
/// 400 or 422.
pub fn parse_topic(body: &[u8]) -> Result<TopicRequest, Problem> {
    #[derive(Deserialize)]
    struct Raw<'a> {
        #[serde(default, borrow)]
        delivery: Option<&'a RawValue>,
        #[serde(default, borrow)]
        ttl_s: Option<&'a RawValue>,
    }
    // No body says nothing, as an empty object does.
    let raw: Raw<'_> = parse_object(if body.is_empty() { b"{}" } else { body }, "")?;
    let mut faults = Vec::new();
    let named = raw.delivery.map(|raw| serde_json::from_str::<String>(raw.get()).unwrap_or_default());
    let delivery = named.map(|name| Delivery::parse(&name));
    if delivery == Some(None) {
        faults.push(fault("/delivery", "must be \"inbox\" or \"log\""));
    }
    let delivery = delivery.flatten();
    let ttl_s = parse_ttl(raw.ttl_s, "/ttl_s", &mut faults);
    if faults.is_empty() { Ok(TopicRequest { delivery, ttl_s }) } else { Err(Problem::fields(faults)) }
}

/// The body of `POST /v1/topics/{topic}/members`. No user is in both lists, and none twice in one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MembersRequest {
    /// Users that join.
    pub add: Vec<UserId>,
    /// Users that leave.
    pub remove: Vec<UserId>,
}

/// Parses the body of `POST /v1/topics/{topic}/members`.
///
/// # Errors
///
/// 400 or 422.
pub fn parse_members(body: &[u8]) -> Result<MembersRequest, Problem> {
    #[derive(Deserialize)]
    struct Raw<'a> {
        #[serde(default, borrow)]
        add: Option<&'a RawValue>,
        #[serde(default, borrow)]
        remove: Option<&'a RawValue>,
    }
    let raw: Raw<'_> = parse_object(body, "")?;
    let mut faults = Vec::new();
    let (add, add_count) = parse_list(raw.add, "/add", &mut faults);
    let (remove, remove_count) = parse_list(raw.remove, "/remove", &mut faults);
    let count = add_count + remove_count;
    if count > MEMBERS_PER_CALL {
        let detail =
            format!("\"add\" and \"remove\" have at most {MEMBERS_PER_CALL} users together, not {count}");
        let pointer = if add_count > 0 { "/add" } else { "/remove" };
        return Err(Problem::fields(vec![fault(pointer, detail)]));
    }
    if count == 0 && faults.is_empty() {
        faults.push(fault("", "must have \"add\" or \"remove\": a list of user ids"));
    }
    let leaving: HashSet<&UserId> = remove.iter().collect();
    for (n, user) in add.iter().enumerate().filter(|(_, user)| leaving.contains(user)) {
        faults.push(fault(format!("/add/{n}"), format!("{user:?} is in \"remove\" as well")));
        if faults.len() > FAULTS_TOLD {
            break;
        }
    }
    if faults.is_empty() {
        Ok(MembersRequest { add: distinct(add), remove: distinct(remove) })
    } else {
        Err(Problem::fields(faults))
    }
}

fn distinct(mut users: Vec<UserId>) -> Vec<UserId> {
    users.sort_unstable();
    users.dedup();
    users
}

/// The valid users of a list, and how many entries it has.
fn parse_list(raw: Option<&RawValue>, pointer: &str, faults: &mut Vec<FieldError>) -> (Vec<UserId>, usize) {
    let Some(raw) = raw else { return (Vec::new(), 0) };
    let Ok(UpTo { items, count }) = serde_json::from_str::<UpTo<'_, MEMBERS_PER_CALL>>(raw.get()) else {
        faults.push(fault(pointer, "must be a list of user ids"));
        return (Vec::new(), 0);
    };
    let mut users = Vec::with_capacity(items.len());
    for (n, item) in items.into_iter().enumerate() {
        users.extend(parse_user(item, &format!("{pointer}/{n}"), faults));
        if faults.len() > FAULTS_TOLD {
            break;
        }
    }
    (users, count)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pointers(problem: Problem) -> (u16, Vec<String>) {
        (problem.status, problem.errors.into_iter().map(|fault| fault.pointer).collect())
    }

    #[test]
    fn a_topic_is_described_and_its_faults_are_named() {
        let asked = |delivery, ttl_s| Ok(TopicRequest { delivery, ttl_s });
        assert_eq!(parse_topic(b"{}"), asked(None, None));
        assert_eq!(
            parse_topic(br#"{"delivery":"inbox","ttl_s":60}"#),
            asked(Some(Delivery::Inbox), Some(60))
        );
        assert_eq!(parse_topic(br#"{"delivery":"log"}"#), asked(Some(Delivery::Log), None));
        for (body, pointer) in [
            (r#"{"delivery":"mail"}"#, "/delivery"),
            (r#"{"delivery":7}"#, "/delivery"),
            (r#"{"ttl_s":0}"#, "/ttl_s"),
            (r#"{"ttl_s":"60"}"#, "/ttl_s"),
            ("[]", ""),
        ] {
            assert_eq!(
                pointers(parse_topic(body.as_bytes()).unwrap_err()),
                (422, vec![pointer.to_owned()]),
                "{body}"
            );
        }
        let nothing = TopicRequest { delivery: None, ttl_s: None };
        assert_eq!((parse_topic(b"").unwrap(), parse_topic(b"{}").unwrap()), (nothing, nothing));
        assert_eq!(parse_topic(b" ").unwrap_err().status, 400);
    }

    #[test]
    fn members_are_read_once_each_and_bad_ones_are_named() {
        let names = |users: &[UserId]| users.iter().map(|user| user.as_str().to_owned()).collect::<Vec<_>>();
        let read = parse_members(r#"{"add":["b","a","b"],"remove":["用户"]}"#.as_bytes()).unwrap();
        assert_eq!(
            (names(&read.add), names(&read.remove)),
            (vec!["a".into(), "b".into()], vec!["用户".into()])
        );
        for (body, expected) in [
            ("{}", vec![""]),
            (r#"{"add":[]}"#, vec![""]),
            (r#"{"add":"a"}"#, vec!["/add"]),
            (r#"{"add":["a","",7]}"#, vec!["/add/1", "/add/2"]),
            (r#"{"add":["a","b"],"remove":["b"]}"#, vec!["/add/1"]),
        ] {
            assert_eq!(pointers(parse_members(body.as_bytes()).unwrap_err()).1, expected, "{body}");
        }
    }

    #[test]
    fn a_call_has_at_most_ten_thousand_members_and_tells_at_most_a_hundred_faults() {
        let list = |count: usize| (0..count).map(|n| format!("\"u{n}\"")).collect::<Vec<_>>().join(",");
        let both = |add: usize, more: &str| format!(r#"{{"add":[{}],"remove":[{more}]}}"#, list(add));
        assert_eq!(parse_members(both(9_999, "\"x\"").as_bytes()).unwrap().add.len(), 9_999);
        let (status, faults) = pointers(parse_members(both(10_000, "\"x\"").as_bytes()).unwrap_err());
        assert_eq!((status, faults), (422, vec!["/add".to_owned()]));
        let bad = format!(r#"{{"add":[{}]}}"#, vec!["\"\""; 9_000].join(","));
        assert_eq!(pointers(parse_members(bad.as_bytes()).unwrap_err()).1.len(), FAULTS_TOLD + 1);
    }
}
