//! Bodies of the requests that publish nothing.

use serde::Deserialize;
use serde_json::value::RawValue;

use super::{Problem, fault, parse_object, parse_user, present};
use crate::message::{DeviceId, UserId};
use crate::watching::{WATCH_RULE, WatchRights};

/// Parses the body of `POST /v1/connect`. An empty body is the default device.
///
/// # Errors
///
/// 400 or 422.
pub fn parse_connect(body: &[u8]) -> Result<DeviceId, Problem> {
    #[derive(Deserialize)]
    struct Connect {
        device: Option<serde_json::Value>,
    }
    if body.trim_ascii().is_empty() {
        return Ok(DeviceId::default());
    }
    match parse_object::<Connect>(body, "")?.device {
        None => Ok(DeviceId::default()),
        Some(serde_json::Value::String(text)) => {
            DeviceId::parse(&text).map_err(|rule| Problem::fields(vec![fault("/device", rule.to_string())]))
        }
        Some(_) => Err(Problem::fields(vec![fault("/device", "must be a string")])),
    }
}

/// What `POST /v1/tokens` asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenRequest {
    /// The user of the token.
    pub user: UserId,
    /// Life of the token in seconds, if it is named.
    pub ttl_s: Option<u64>,
    /// What the token allows to watch, if it says so.
    pub watch: Option<WatchRights>,
}

/// Parses the body of `POST /v1/tokens`, whose token lives `life_s` seconds.
///
/// # Errors
///
/// 400 or 422.
pub fn parse_token_request(
    body: &[u8],
    life_s: std::ops::RangeInclusive<u64>,
) -> Result<TokenRequest, Problem> {
    #[derive(Deserialize)]
    struct Raw<'a> {
        #[serde(default, borrow, deserialize_with = "present")]
        user: Option<&'a RawValue>,
        #[serde(default, borrow)]
        ttl_s: Option<&'a RawValue>,
        #[serde(default, borrow)]
        watch: Option<&'a RawValue>,
    }
    let raw: Raw<'_> = parse_object(body, "")?;
    let mut faults = Vec::new();
    let user = match raw.user {
        Some(user) => parse_user(user, "/user", &mut faults),
        None => {
            faults.push(fault("/user", "is required: the id of a user"));
            None
        }
    };
    let ttl_s = raw.ttl_s.map(|raw| raw.get().parse::<u64>().ok().filter(|ttl| life_s.contains(ttl)));
    if ttl_s == Some(None) {
        let detail = format!("must be an integer from {} to {} seconds", life_s.start(), life_s.end());
        faults.push(fault("/ttl_s", detail));
    }
    let patterns = |raw: &RawValue| serde_json::from_str::<Vec<String>>(raw.get()).map_err(|_| WATCH_RULE);
    let read = raw.watch.map(|raw| WatchRights::parse(patterns(raw)?.iter().map(String::as_str)));
    let watch = read.transpose().unwrap_or_else(|rule| {
        faults.push(fault("/watch", rule));
        None
    });
    match user {
        Some(user) if faults.is_empty() => Ok(TokenRequest { user, ttl_s: ttl_s.flatten(), watch }),
        _ => Err(Problem::fields(faults)),
    }
}

/// Parses the body of `POST /v1/verify`.
///
/// # Errors
///
/// 400 or 422.
pub fn parse_verify_request(body: &[u8]) -> Result<String, Problem> {
    #[derive(Deserialize)]
    struct Raw {
        token: Option<serde_json::Value>,
    }
    match parse_object::<Raw>(body, "")?.token {
        Some(serde_json::Value::String(token)) => Ok(token),
        _ => Err(Problem::fields(vec![fault("/token", "must be a string")])),
    }
}
