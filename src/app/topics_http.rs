//! Topics over HTTP, on the port of collect.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, Request, StatusCode, Uri};
use axum::routing::{get, put};

use super::collect_http::{Answer, CollectEdge, Edge, Path, part_of, unavailable, user_of};
use super::edge::{HttpError, SMALL_BODY, json, json_body, json_of, refuse};
use crate::inbox::topics::{MembersChange, MembersChanged, PutTopic, Topic, TopicSettings};
use crate::message::{TopicName, UserId};
use crate::wire::http::{MembersRequest, parse_members, parse_topic};
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
        .route("/v1/users/{user}/topics", get(topics_of).delete(leave_all))
}

fn topic_of(path: &Path) -> Result<TopicName, HttpError> {
    TopicName::parse(part_of(path, "topic")?).map_err(|rule| refuse(422, rule.to_string()))
}

async fn no_topic(edge: &CollectEdge, name: &TopicName) -> HttpError {
    refuse(404, edge.collect.no_topic(name).await)
}

fn shown(topic: &Topic, members: Option<u64>) -> TopicResponse {
    TopicResponse {
        topic: topic.name.to_string(),
        delivery: topic.delivery.name().to_owned(),
        ttl_s: topic.ttl_s,
        created_at: topic.created_at.rfc3339(),
        members,
    }
}

async fn make(State(edge): Edge, path: Path, request: Request<Body>) -> Answer {
    edge.authorize(request.headers())?;
    let name = topic_of(&path)?;
    let mut held = edge.budget.hold();
    let body = json_body(request, SMALL_BODY, &mut held).await?;
    let asked = parse_topic(&body)?;
    let settings = TopicSettings {
        delivery: asked.delivery,
        ttl_s: asked.ttl_s,
        default_ttl_s: edge.collect.limits().ttl_s,
    };
    let (status, topic) = match edge.collect.topics().put(name, settings).await.map_err(unavailable)? {
        PutTopic::Created(topic) => (StatusCode::CREATED, topic),
        PutTopic::Known(topic) => (StatusCode::OK, topic),
    };
    Ok(json_of(status, &shown(&topic, None)))
}

async fn show(State(edge): Edge, path: Path, headers: HeaderMap) -> Answer {
    edge.authorize(&headers)?;
    let name = topic_of(&path)?;
    let topics = edge.collect.topics();
    let Some(topic) = topics.topic(name.clone()).await.map_err(unavailable)? else {
        return Err(no_topic(&edge, &name).await);
    };
    let members = topics.count_members(name).await.map_err(unavailable)?;
    Ok(json_of(StatusCode::OK, &shown(&topic, Some(members))))
}

async fn remove(State(edge): Edge, path: Path, headers: HeaderMap) -> Answer {
    edge.authorize(&headers)?;
    let name = topic_of(&path)?;
    if !edge.collect.topics().remove(name.clone()).await.map_err(unavailable)? {
        return Err(no_topic(&edge, &name).await);
    }
    Ok(json(StatusCode::ACCEPTED, "{}"))
}

async fn list(State(edge): Edge, headers: HeaderMap, uri: Uri) -> Answer {
    edge.authorize(&headers)?;
    let (after, limit) = page_query(&uri, TopicName::parse)?;
    let topics = edge.collect.topics().list(String::new(), after, limit + 1).await.map_err(unavailable)?;
    Ok(json_of(StatusCode::OK, &page_of_topics(topics, limit)))
}

/// A page of at most `limit` of these topics.
fn page_of_topics(mut topics: Vec<Topic>, limit: usize) -> TopicsResponse {
    let more = topics.len() > limit;
    topics.truncate(limit);
    let next = topics.last().filter(|_| more).map(|topic| topic.name.to_string());
    TopicsResponse { topics: topics.iter().map(|topic| shown(topic, None)).collect(), next }
}

async fn change(State(edge): Edge, path: Path, request: Request<Body>) -> Answer {
    edge.authorize(request.headers())?;
    let name = topic_of(&path)?;
    let mut held = edge.budget.hold();
    let body = json_body(request, MEMBERS_BODY, &mut held).await?;
    let MembersRequest { add, remove } = parse_members(&body)?;
    drop(body);
    let change = MembersChange { add, remove };
    let changed = edge.collect.change_members(name.clone(), change).await;
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

async fn members(State(edge): Edge, path: Path, headers: HeaderMap, uri: Uri) -> Answer {
    edge.authorize(&headers)?;
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
    edge.authorize(&headers)?;
    let topics = edge.collect.topics().topics_of(user_of(&path)?).await.map_err(unavailable)?;
    Ok(json_of(StatusCode::OK, &page_of_topics(topics, usize::MAX)))
}

async fn leave_all(State(edge): Edge, path: Path, headers: HeaderMap) -> Answer {
    edge.authorize(&headers)?;
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
            "after" => {
                after = Some(parse(&text).map_err(|rule| refuse(422, format!("after: {rule}")))?);
            }
            "limit" => {
                let count = text.parse::<usize>().ok().filter(|count| (1..=PAGE).contains(count));
                let rule = || refuse(422, format!("limit: must be an integer from 1 to {PAGE}"));
                limit = count.ok_or_else(rule)?;
            }
            _ => {}
        }
    }
    Ok((after, limit))
}
