//! Topics over HTTP, on the port of collect.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, Request, Response, StatusCode, Uri};
use axum::routing::{delete, get, put};

use super::collect_http::{
    Answer, CollectEdge, Edge, Path, history_query, limit_of, part_of, unavailable, user_of,
};
use super::edge::{HttpError, SMALL_BODY, json, json_body, json_of, refuse};
use crate::inbox::history::HistoryRange;
use crate::inbox::topics::{MembersChanged, PutTopic, Topic, TopicSettings};
use crate::message::{LogId, Seq, TopicName, UserId};
use crate::role::collect::Scope;
use crate::topic::Delivery;
use crate::wire::http::{MembersRequest, history_body, parse_members, parse_topic};
use crate::wire::rest::{
    MembersChangedResponse, MembersResponse, RefusedMember, TopicResponse, TopicsResponse,
};

/// Largest body of a change of members: 10,000 users of 128 bytes, escaped in the worst way.
const MEMBERS_BODY: usize = 8 * 1024 * 1024;
/// Default and largest page of topics and of members.
const PAGE: usize = 1_000;

pub(super) fn routes() -> axum::Router<Arc<CollectEdge>> {
    axum::Router::new()
        .route("/v1/topics", get(list))
        .route("/v1/topics/{topic}", put(make).get(show).delete(remove))
        .route("/v1/topics/{topic}/members", get(members).post(change))
        .route("/v1/topics/{topic}/messages", get(log_history))
        .route("/v1/topics/{topic}/messages/{seq}", delete(end_message))
        .route("/v1/everyone/messages", get(everyones_history))
        .route("/v1/users/{user}/topics", get(topics_of).delete(leave_all))
}

fn topic_of(path: &Path) -> Result<TopicName, HttpError> {
    TopicName::parse(part_of(path, "topic")?).map_err(|rule| refuse(422, rule.to_string()))
}

async fn no_topic(edge: &CollectEdge, name: &TopicName) -> HttpError {
    refuse(404, edge.collect.no_topic(name).await)
}

fn shown(topic: &Topic) -> TopicResponse {
    TopicResponse {
        topic: topic.name.to_string(),
        delivery: topic.delivery.name().to_owned(),
        ttl_s: topic.ttl_s,
        created_at: topic.created_at.rfc3339(),
        members: None,
        head: None,
        online: None,
    }
}

async fn make(State(edge): Edge, path: Path, request: Request<Body>) -> Answer {
    edge.authorize(request.headers(), &Scope::Topics)?;
    let name = topic_of(&path)?;
    let mut held = edge.budget.hold();
    let body = json_body(request, SMALL_BODY, &mut held).await?;
    let asked = parse_topic(&body)?;
    let settings = TopicSettings {
        delivery: asked.delivery,
        ttl_s: asked.ttl_s,
        default_ttl_s: edge.collect.limits().ttl_s,
    };
    let (status, topic) = match edge.collect.put_topic(name, settings).await.map_err(unavailable)? {
        PutTopic::Created(topic) => (StatusCode::CREATED, topic),
        PutTopic::Known(topic) => (StatusCode::OK, topic),
        PutTopic::Other(topic) => {
            let (name, delivery) = (topic.name, topic.delivery.name());
            let why = format!("{name:?} is there with the delivery {delivery}, which stays: remove it first");
            return Err(refuse(409, why));
        }
    };
    Ok(json_of(status, &shown(&topic)))
}

async fn show(State(edge): Edge, path: Path, headers: HeaderMap) -> Answer {
    edge.authorize(&headers, &Scope::Topics)?;
    let name = topic_of(&path)?;
    let topics = edge.collect.topics();
    let Some(topic) = topics.topic(name.clone()).await.map_err(unavailable)? else {
        return Err(no_topic(&edge, &name).await);
    };
    let mut answer = shown(&topic);
    answer.members = Some(topics.count_members(name.clone()).await.map_err(unavailable)?);
    if topic.delivery == Delivery::Log {
        let (head, online) = edge.collect.log_report(LogId::Topic(name)).await.map_err(unavailable)?;
        (answer.head, answer.online) = (Some(head.get()), Some(online));
    }
    Ok(json_of(StatusCode::OK, &answer))
}

async fn remove(State(edge): Edge, path: Path, headers: HeaderMap) -> Answer {
    edge.authorize(&headers, &Scope::Topics)?;
    let name = topic_of(&path)?;
    if !edge.collect.remove_topic(name.clone()).await.map_err(unavailable)? {
        return Err(no_topic(&edge, &name).await);
    }
    Ok(json(StatusCode::ACCEPTED, "{}"))
}

async fn list(State(edge): Edge, headers: HeaderMap, uri: Uri) -> Answer {
    edge.authorize(&headers, &Scope::Topics)?;
    let (after, limit) = page_query(&uri, TopicName::parse)?;
    let topics = edge.collect.topics().list(String::new(), after, limit + 1).await.map_err(unavailable)?;
    Ok(json_of(StatusCode::OK, &page_of_topics(topics, limit)))
}

/// A page of at most `limit` of these topics.
fn page_of_topics(mut topics: Vec<Topic>, limit: usize) -> TopicsResponse {
    let more = topics.len() > limit;
    topics.truncate(limit);
    let next = topics.last().filter(|_| more).map(|topic| topic.name.to_string());
    TopicsResponse { topics: topics.iter().map(shown).collect(), next }
}

async fn change(State(edge): Edge, path: Path, request: Request<Body>) -> Answer {
    edge.authorize(request.headers(), &Scope::Topics)?;
    let name = topic_of(&path)?;
    let mut held = edge.budget.hold();
    let body = json_body(request, MEMBERS_BODY, &mut held).await?;
    let MembersRequest { add, remove } = parse_members(&body)?;
    drop(body);
    let changed = edge.collect.change_members(name.clone(), add, remove).await;
    match changed.map_err(unavailable)? {
        MembersChanged::NoTopic => Err(no_topic(&edge, &name).await),
        MembersChanged::Ended => Err(refuse(
            409,
            format!("the topic {name:?} was removed meanwhile: look at it, and send this again"),
        )),
        MembersChanged::Done { added, removed, refused } => {
            let refused = refused
                .into_iter()
                .map(|(user, why)| RefusedMember { user: user.to_string(), detail: why.to_string() })
                .collect();
            let answer = MembersChangedResponse { added, removed, refused };
            Ok(json_of(StatusCode::ACCEPTED, &answer))
        }
    }
}

async fn log_history(State(edge): Edge, path: Path, headers: HeaderMap, uri: Uri) -> Answer {
    edge.authorize(&headers, &Scope::Read)?;
    let name = topic_of(&path)?;
    let found = page_of_log(&edge, &LogId::Topic(name.clone()), &uri).await?;
    if let Some(page) = found {
        return Ok(page);
    }
    Err(match edge.collect.topics().topic(name.clone()).await.map_err(unavailable)? {
        None => no_topic(&edge, &name).await,
        Some(_) => {
            refuse(404, format!("{name:?} has no log: its messages stand in the inboxes of its members"))
        }
    })
}

async fn end_message(State(edge): Edge, path: Path, headers: HeaderMap) -> Answer {
    edge.authorize(&headers, &Scope::Topics)?;
    let name = topic_of(&path)?;
    let seq = part_of(&path, "seq")?.parse().ok().and_then(Seq::new);
    let seq = seq.ok_or_else(|| refuse(422, "seq: must be an integer from 0 to 2^53 - 1"))?;
    if edge.collect.end_message(&name, seq).await.map_err(unavailable)? {
        return Ok(json(StatusCode::ACCEPTED, "{}"));
    }
    Err(match edge.collect.topics().topic(name.clone()).await.map_err(unavailable)? {
        None => no_topic(&edge, &name).await,
        Some(_) => {
            refuse(404, format!("{name:?} has no message {seq} in a log: it never had, or it has expired"))
        }
    })
}

async fn everyones_history(State(edge): Edge, headers: HeaderMap, uri: Uri) -> Answer {
    edge.authorize(&headers, &Scope::Read)?;
    let found = page_of_log(&edge, &LogId::Everyone, &uri).await?;
    found.ok_or_else(|| refuse(404, "there is no log of everyone"))
}

/// A page of a log, if there is one.
async fn page_of_log(
    edge: &CollectEdge,
    log: &LogId,
    uri: &Uri,
) -> Result<Option<Response<Body>>, HttpError> {
    let query = uri.query().unwrap_or_default();
    let (after, limit) = history_query(query)?;
    let named = |name: &str| {
        form_urlencoded::parse(query.as_bytes()).find(|(key, text)| key == name && !text.is_empty())
    };
    let range = match named("before") {
        None => HistoryRange::After(after),
        Some(_) if named("after").is_some() => {
            return Err(refuse(422, "before: give either after or before, not both"));
        }
        Some((_, text)) => {
            let before = text.parse().ok().and_then(Seq::new);
            let rule = || refuse(422, "before: must be an integer from 0 to 2^53 - 1");
            HistoryRange::Before(before.ok_or_else(rule)?)
        }
    };
    let found = edge.collect.log_history(log, range, limit).await.map_err(unavailable)?;
    Ok(found.map(|(messages, next)| json(StatusCode::OK, history_body(Some(log), &messages, next))))
}

async fn members(State(edge): Edge, path: Path, headers: HeaderMap, uri: Uri) -> Answer {
    edge.authorize(&headers, &Scope::Topics)?;
    let name = topic_of(&path)?;
    let (after, limit) = page_query(&uri, UserId::parse)?;
    let found = edge.collect.topics().members(name.clone(), after, limit + 1).await.map_err(unavailable)?;
    let Some(mut users) = found else { return Err(no_topic(&edge, &name).await) };
    let more = users.len() > limit;
    users.truncate(limit);
    let next = users.last().filter(|_| more).map(UserId::to_string);
    let members = users.iter().map(UserId::to_string).collect();
    Ok(json_of(StatusCode::OK, &MembersResponse { members, next }))
}

async fn topics_of(State(edge): Edge, path: Path, headers: HeaderMap) -> Answer {
    edge.authorize(&headers, &Scope::Users)?;
    let topics = edge.collect.topics().topics_of(user_of(&path)?).await.map_err(unavailable)?;
    Ok(json_of(StatusCode::OK, &page_of_topics(topics, usize::MAX)))
}

async fn leave_all(State(edge): Edge, path: Path, headers: HeaderMap) -> Answer {
    edge.authorize(&headers, &Scope::Users)?;
    let removed = edge.collect.leave_all(user_of(&path)?).await.map_err(unavailable)?;
    Ok(json_of(StatusCode::ACCEPTED, &MembersChangedResponse { removed, ..Default::default() }))
}

/// `after` and `limit` of a query.
fn page_query<T, E: std::fmt::Display>(
    uri: &Uri,
    parse: impl Fn(&str) -> Result<T, E>,
) -> Result<(Option<T>, usize), HttpError> {
    let (mut after, mut limit) = (None, PAGE);
    for (name, text) in form_urlencoded::parse(uri.query().unwrap_or_default().as_bytes()) {
        match &*name {
            // As if it were not there.
            _ if text.is_empty() => {}
            "after" => {
                after = Some(parse(&text).map_err(|rule| refuse(422, format!("after: {rule}")))?);
            }
            "limit" => limit = limit_of(&text, PAGE)?,
            _ => {}
        }
    }
    Ok((after, limit))
}
