//! Collect over HTTP.

use axum::middleware::from_fn_with_state;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::rejection::RawPathParamsRejection;
use axum::extract::{RawPathParams, State};
use axum::http::{HeaderMap, Method, Request, Response, StatusCode, Uri};
use axum::response::IntoResponse;
use axum::routing::{get, post};
use bytes::BytesMut;
use hyper::body::Incoming;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};
use tower::ServiceExt;

use super::audit::audited;
use super::edge::{
    HttpError, Routes, asset, bearer, closed, json, json_body, json_of, limit_in, refuse, root,
};
use super::senders::{Sender, Senders};
use super::traces::Traces;
use crate::inbox::InboxError;
use crate::live::Live;
use crate::membership::{Counts, Membership};
use crate::message::{DeviceId, Message, MessageId, Millis, NodeId, Recipients, Seq, UserId};
use crate::role::collect::{Addressed, Collect, HISTORY_PAGE, Lists, PUBLISH_DEADLINE, Scope, UserReport};
use crate::role::connect::PublicUrls;
use crate::role::strangers::Strangers;
use crate::transport::held::Budget;
use crate::transport::http::{Answers, RequestBody};
use crate::wire::http::{
    Problem, Publish, PublishLimits, Published, batch_body, history_body, parse_batch, parse_publish,
};
use crate::wire::rest::{
    ClusterNode, ClusterResponse, DeviceEntry, DeviceStatus, StatusResponse, UserResponse,
};

/// Path of a publish.
const MESSAGES: &str = "/v1/messages";
/// Largest body of one publish: 64 KiB of payload and 1000 recipients of 128 bytes, escaped in the
/// worst way.
const PUBLISH_BODY: usize = 1024 * 1024;
/// Largest body of a batch.
const BATCH_BODY: usize = 16 * 1024 * 1024;
/// Batches that are read and written at the same time: eight of the largest are 128 MiB.
const BATCHES_AT_ONCE: usize = 8;
/// How long a batch may wait for others before it is read.
const BATCH_WAIT: Duration = Duration::from_secs(5);
/// Recipients of a batch that wait to be stored at the same time. All batches together leave a
/// fifth of [`WAITING_APPENDS`](crate::inbox::group_commit::WAITING_APPENDS) to others.
const PART_RECIPIENTS: usize = 1_000;
const _: () =
    assert!(BATCHES_AT_ONCE * PART_RECIPIENTS <= crate::inbox::group_commit::WAITING_APPENDS / 5 * 4);
/// Default page size of history, in messages.
const HISTORY_LIMIT: usize = 100;

pub(super) struct CollectEdge {
    pub(super) collect: Collect,
    pub(super) membership: Arc<dyn Membership>,
    pub(super) urls: PublicUrls,
    pub(super) senders: Senders,
    pub(super) limits: Live<PublishLimits>,
    pub(super) traces: Traces,
    pub(super) strangers: Strangers,
    /// The memory budget of unanswered requests.
    pub(super) budget: Budget,
    batches: Semaphore,
}

impl CollectEdge {
    pub(super) fn new(
        collect: Collect,
        membership: Arc<dyn Membership>,
        urls: PublicUrls,
        senders: Senders,
        (limits, traces): (Live<PublishLimits>, Traces),
        strangers: Strangers,
        budget: Budget,
    ) -> Arc<Self> {
        let batches = Semaphore::new(BATCHES_AT_ONCE);
        Arc::new(Self { collect, membership, urls, senders, limits, traces, strangers, budget, batches })
    }

    /// Stores one publish of a sender; `None`: of the page of this machine.
    ///
    /// # Errors
    ///
    /// 422 if its topics have too many members; 403 and 429 for what the sender may not.
    pub(super) async fn publish(
        &self,
        publish: Publish,
        sender: Option<&Sender>,
    ) -> Result<Published, Problem> {
        if let Some(sender) = sender {
            sender.may_publish_to(&publish.to)?;
        }
        if !matches!(publish.to, Recipients::Topics { .. }) {
            if let Some(sender) = sender {
                sender.take(publish.to.users().len())?;
            }
            return Ok(self.collect.publish(publish).await);
        }
        // Boxed, for what it needs would be carried by every publish.
        Box::pin(self.publish_to_topics(publish, sender)).await
    }

    async fn publish_to_topics(
        &self,
        publish: Publish,
        sender: Option<&Sender>,
    ) -> Result<Published, Problem> {
        let mut lists = Lists::default();
        if let Some(sender) = sender {
            // Before anything is read for it, or made.
            sender.take(1)?;
        }
        let addressed = self.collect.address(publish, &mut lists).await;
        if let Some(sender) = sender {
            sender.take(addressed.recipients().saturating_sub(1))?;
        }
        match lists.problem() {
            Some(problem) => Err(problem),
            None => Ok(self.collect.publish_to(addressed, lists.deadline()).await),
        }
    }

    /// The sender of a request, who has a right.
    ///
    /// # Errors
    ///
    /// 401, 403.
    pub(super) fn authorize(&self, headers: &HeaderMap, right: &Scope) -> Result<Arc<Sender>, HttpError> {
        self.senders.find(bearer(headers), right).map_err(HttpError)
    }
}

pub(super) type Edge = State<Arc<CollectEdge>>;
/// Percent-decoded; axum refuses what is not UTF-8.
pub(super) type Path = Result<RawPathParams, RawPathParamsRejection>;
pub(super) type Answer = Result<Response<Body>, HttpError>;

/// The service on collect's port. A publish bypasses the router: what the router boxes and clones
/// for a request costs as much as everything else that a small publish needs before it waits to be
/// stored.
pub(super) fn front(edge: Arc<CollectEdge>, routes: Routes) -> impl Answers<Body> {
    tower::service_fn(move |request: Request<Incoming>| {
        let (edge, routes) = (Arc::clone(&edge), routes.clone());
        async move {
            if request.method() == Method::POST && request.uri().path() == MESSAGES {
                return Ok(publish(&edge, request).await.into_response());
            }
            routes.oneshot(request.map(Body::new)).await
        }
    })
}

pub(super) fn routes(edge: Arc<CollectEdge>) -> Routes {
    // `front` takes the publishes, so this only answers other methods.
    let publish_here =
        |State(edge): Edge, request: Request<Body>| async move { publish(&edge, request).await };
    closed(
        axum::Router::new()
            .route(MESSAGES, post(publish_here))
            .route("/v1/messages/batch", post(batch))
            .route("/v1/users/{user}/messages", get(history))
            .route("/v1/users/{user}/messages/{message}/status", get(status))
            .route("/v1/users/{user}", get(user).delete(forget))
            .route("/v1/users/{user}/sessions", axum::routing::delete(disconnect))
            .route("/v1/cluster", get(cluster))
            .merge(super::topics_http::routes())
            .route("/openapi.yaml", get(openapi))
            .layer(from_fn_with_state(Arc::clone(&edge), audited))
            .with_state(edge)
            .merge(super::console::routes())
            .merge(root("ringpush collect: POST /v1/messages, the console at /console/\n")),
    )
}

async fn publish<B: RequestBody>(edge: &CollectEdge, request: Request<B>) -> Answer {
    let began = Instant::now();
    let sender = edge.authorize(request.headers(), &Scope::Publish)?;
    let answer = publish_body(edge, request, Some(&sender)).await;
    edge.senders.published(&sender, status_of(&answer), began.elapsed());
    answer
}

fn status_of(answer: &Answer) -> u16 {
    match answer {
        Ok(response) => response.status().as_u16(),
        Err(HttpError(problem)) => problem.status,
    }
}

/// A publish of a sender; `None`: of the page of this machine.
pub(super) async fn publish_body<B: RequestBody>(
    edge: &CollectEdge,
    request: Request<B>,
    sender: Option<&Sender>,
) -> Answer {
    let mut held = edge.budget.hold();
    let trace = edge.traces.of_headers(request.headers());
    let body = json_body(request, PUBLISH_BODY, &mut held).await?;
    let publish = Publish { trace, ..parse_publish(&body, &edge.limits.get())? };
    // A large payload is a slice of the body; nothing else may keep the body alive.
    drop(body);
    Ok(published(&edge.publish(publish, sender).await?))
}

fn published(published: &Published) -> Response<Body> {
    match published.problem() {
        Some(problem) => HttpError(problem).into_response(),
        None => {
            let count = published.accepted.len() + published.topics.len();
            let mut body = BytesMut::with_capacity(96 + count * 48);
            published.put(&mut body);
            json(StatusCode::ACCEPTED, body.freeze())
        }
    }
}

async fn batch(State(edge): Edge, request: Request<Body>) -> Answer {
    let began = Instant::now();
    let sender = edge.authorize(request.headers(), &Scope::Publish)?;
    let mut statuses = Vec::new();
    let answer = Box::pin(batch_of(&edge, request, &sender, &mut statuses)).await;
    if answer.is_err() {
        statuses = vec![status_of(&answer)];
    }
    edge.senders.published_batch(&sender, &statuses, began.elapsed());
    answer
}

async fn batch_of(
    edge: &CollectEdge,
    request: Request<Body>,
    sender: &Sender,
    statuses: &mut Vec<u16>,
) -> Answer {
    let Ok(Ok(_permit)) = timeout(BATCH_WAIT, edge.batches.acquire()).await else {
        return Err(refuse(503, "too many batches are under way: send this one again"));
    };
    let mut held = edge.budget.hold();
    let trace = edge.traces.of_headers(request.headers());
    let body = json_body(request, BATCH_BODY, &mut held).await?;
    let traced = |publish| Publish { trace: trace.clone(), ..publish };
    let items = parse_batch(&body, &edge.limits.get())?;
    let items: Vec<_> = items.into_iter().map(|item| item.map(traced)).collect();
    let mut results = Vec::with_capacity(items.len());
    for part in parts(addressed(edge, items, sender).await) {
        let deadline = Instant::now() + PUBLISH_DEADLINE;
        let under_way = part.into_iter().map(|item| async {
            match item {
                Ok(publish) => Ok(edge.collect.publish_to(publish, deadline).await),
                Err(problem) => Err(problem),
            }
        });
        results.extend(futures_util::future::join_all(under_way).await);
    }
    let status = |result: &Result<Published, Problem>| match result {
        Ok(published) => published.problem().map_or(202, |problem| problem.status),
        Err(problem) => problem.status,
    };
    statuses.extend(results.iter().map(status));
    Ok(json(StatusCode::ACCEPTED, batch_body(&results)))
}

/// Finds out whom each publish of a batch reaches. From the one on that would be beyond what a
/// request may reach, none is stored.
async fn addressed(edge: &CollectEdge, items: Vec<Result<Publish, Problem>>, sender: &Sender) -> Vec<Item> {
    let (mut lists, mut found) = (Lists::default(), Vec::with_capacity(items.len()));
    for item in items {
        let addressed = match (item, lists.problem()) {
            (Err(problem), _) | (_, Some(problem)) => Err(problem),
            (Ok(publish), None) => match sender.may_publish_to(&publish.to).and_then(|()| sender.take(1)) {
                Ok(()) => Ok(Box::pin(edge.collect.address(publish, &mut lists)).await),
                Err(problem) => Err(problem),
            },
        };
        let addressed =
            addressed.and_then(|item| sender.take(item.recipients().saturating_sub(1)).map(|()| item));
        // Perhaps it was this one.
        found.push(match lists.problem() {
            Some(problem) => addressed.and(Err(problem)),
            None => addressed,
        });
    }
    found
}

/// A publish of a batch, or why it is not one.
type Item = Result<Addressed, Problem>;

/// Splits a batch into parts of at most [`PART_RECIPIENTS`] recipients.
fn parts(items: Vec<Item>) -> Vec<Vec<Item>> {
    let mut parts: Vec<Vec<Item>> = Vec::new();
    let mut left = 0usize;
    for item in items {
        let count = item.as_ref().map_or(0, Addressed::recipients);
        match parts.last_mut() {
            Some(part) if count <= left => {
                part.push(item);
                left -= count;
            }
            _ => {
                parts.push(vec![item]);
                left = PART_RECIPIENTS.saturating_sub(count);
            }
        }
    }
    parts
}

async fn history(State(edge): Edge, path: Path, headers: HeaderMap, uri: Uri) -> Answer {
    edge.authorize(&headers, &Scope::Read)?;
    let user = user_of(&path)?;
    let (after, limit) = history_query(uri.query().unwrap_or_default())?;
    let (messages, next) = edge.collect.history(user, after, limit).await.map_err(unavailable)?;
    Ok(json(StatusCode::OK, history_body(None, &messages, next)))
}

pub(super) fn history_query(query: &str) -> Result<(Seq, usize), HttpError> {
    let (mut after, mut limit) = (Seq::BEGINNING, HISTORY_LIMIT);
    for (name, text) in form_urlencoded::parse(query.as_bytes()) {
        match &*name {
            // As if it were not there.
            _ if text.is_empty() => {}
            "after" => {
                let seq = text.parse().ok().and_then(Seq::new);
                after = seq.ok_or_else(|| refuse(422, "after: must be an integer from 0 to 2^53 - 1"))?;
            }
            "limit" => limit = limit_of(&text, HISTORY_PAGE.messages)?,
            _ => {}
        }
    }
    Ok((after, limit))
}

/// Reads the `limit` of a page. More than `most`, also a number that does not fit, counts as
/// `most`.
///
/// # Errors
///
/// 422: it is no number above 0.
pub(super) fn limit_of(text: &str, most: usize) -> Result<usize, HttpError> {
    let rule = || refuse(422, format!("limit: must be an integer from 1 to {most}"));
    limit_in(text, most).ok_or_else(rule)
}

async fn user(State(edge): Edge, path: Path, headers: HeaderMap) -> Answer {
    edge.authorize(&headers, &Scope::Users)?;
    let user = user_of(&path)?;
    let report = edge.collect.user(user.clone()).await.map_err(unavailable)?;
    Ok(json_of(StatusCode::OK, &user_report(&user, &report)))
}

async fn forget(State(edge): Edge, path: Path, headers: HeaderMap) -> Answer {
    edge.authorize(&headers, &Scope::Users)?;
    edge.collect.forget(user_of(&path)?).await.map_err(unavailable)?;
    Ok(json(StatusCode::ACCEPTED, "{}"))
}

/// What became of a message on each device of its user.
async fn status(State(edge): Edge, path: Path, headers: HeaderMap) -> Answer {
    edge.authorize(&headers, &Scope::Read)?;
    let user = user_of(&path)?;
    let which = part_of(&path, "message")?;
    let seq = which.parse().ok().and_then(Seq::new).filter(|seq| !seq.is_beginning());
    let id = MessageId::parse(which).map_err(|rule| refuse(422, rule.to_string()))?;
    let found = edge.collect.stored(&user, seq, id).await.map_err(unavailable)?;
    let why = || {
        let why = "no such message of this user is stored: there never was one, it was removed after its expiry, or its sender gave it no id";
        refuse(404, why)
    };
    let message = found.ok_or_else(why)?;
    let report = edge.collect.user(user).await.map_err(unavailable)?;
    Ok(json_of(StatusCode::OK, &status_of_message(&message, &report, edge.collect.now())))
}

fn status_of_message(message: &Message, report: &UserReport, now: Millis) -> StatusResponse {
    let mut devices: BTreeMap<&str, DeviceStatus> = BTreeMap::new();
    let of = |device: &DeviceId, acked: Seq| DeviceStatus {
        device: device.as_str().to_owned(),
        online: false,
        node: None,
        sent: None,
        acked: acked >= message.seq,
    };
    for (device, acked) in &report.profile.cursors {
        devices.insert(device.as_str(), of(device, *acked));
    }
    for session in &report.sessions {
        let shown =
            devices.entry(session.device.as_str()).or_insert_with(|| of(&session.device, session.acked));
        let sent = session.sent.map(|sent| sent >= message.seq);
        // Of several sessions of a device, one that has sent it is enough.
        if !shown.online || sent > shown.sent {
            (shown.node, shown.sent) = (Some(session.node.to_string()), sent);
        }
        shown.online = true;
        shown.acked |= session.acked >= message.seq;
    }
    let state = match devices.values().any(|device| device.acked) {
        true => "acked",
        false if message.is_expired(now) => "expired",
        false => "waiting",
    };
    StatusResponse {
        seq: message.seq.get(),
        id: message.id.as_str().to_owned(),
        accepted_at: message.accepted_at.rfc3339(),
        expires_at: message.expires_at.rfc3339(),
        event: message.event.as_ref().map(|event| event.as_str().to_owned()),
        traceparent: message.trace.as_ref().map(ToString::to_string),
        via: message.topic().map(|topic| topic.as_str().to_owned()),
        state: state.to_owned(),
        devices: devices.into_values().collect(),
    }
}

/// Every device with a cursor or a session. A device with several sessions shows the youngest.
fn user_report(user: &UserId, report: &UserReport) -> UserResponse {
    let mut devices: BTreeMap<&str, DeviceEntry> = BTreeMap::new();
    let entry = |device: &DeviceId, acked: Seq| DeviceEntry {
        device: device.as_str().to_owned(),
        acked: acked.get(),
        connected_at: None,
        node: None,
        client: None,
        lag: 0,
    };
    for (device, acked) in &report.profile.cursors {
        devices.insert(device.as_str(), entry(device, *acked));
    }
    let mut sessions: Vec<_> = report.sessions.iter().collect();
    sessions.sort_by_key(|session| session.connected_at);
    for session in sessions {
        let device = &session.device;
        let shown = devices.entry(device.as_str()).or_insert_with(|| entry(device, Seq::BEGINNING));
        shown.acked = shown.acked.max(session.acked.get());
        shown.connected_at = Some(session.connected_at.rfc3339());
        shown.node = Some(session.node.to_string());
        shown.client = session.client.as_ref().map(|client| client.as_str().to_owned());
    }
    let (head, first) = (report.profile.head.map_or(0, Seq::get), report.profile.first.get());
    devices.values_mut().for_each(|device| device.lag = head.saturating_sub(device.acked.max(first)));
    UserResponse {
        user: user.to_string(),
        owner: report.owner.as_ref().map(NodeId::to_string),
        online: !report.sessions.is_empty(),
        devices: devices.into_values().collect(),
        head: report.profile.head.map(Seq::get),
    }
}

/// The description of the HTTP interfaces, without a key.
async fn openapi() -> Response<Body> {
    asset("application/yaml", include_str!("../../docs/openapi.yaml"))
}

async fn disconnect(State(edge): Edge, path: Path, headers: HeaderMap) -> Answer {
    edge.authorize(&headers, &Scope::Users)?;
    edge.collect.disconnect(user_of(&path)?).await.map_err(unavailable)?;
    Ok(json(StatusCode::ACCEPTED, "{}"))
}

async fn cluster(State(edge): Edge, headers: HeaderMap) -> Answer {
    edge.authorize(&headers, &Scope::Cluster)?;
    Ok(json_of(StatusCode::OK, &cluster_report(&*edge.membership, &edge.urls)))
}

/// The push nodes of the view in use.
pub(super) fn cluster_report(membership: &dyn Membership, urls: &PublicUrls) -> ClusterResponse {
    let view = Arc::clone(&membership.views().borrow());
    let counts: BTreeMap<NodeId, Counts> = membership.counts(None).into_iter().collect();
    let shares: BTreeMap<&str, f64> = view.ring.shares().into_iter().collect();
    let nodes = view.members.iter().map(|member| {
        let node = &member.info.node;
        let held = counts.get(node).copied().unwrap_or_default();
        ClusterNode {
            node: node.to_string(),
            incarnation: member.incarnation,
            state: member.state.as_str().to_owned(),
            weight: member.info.weight,
            share: shares.get(node.as_str()).copied().unwrap_or(0.0),
            sessions: held.sessions,
            displaced: held.displaced,
            delivered: held.delivered,
            moves: held.moves,
            delivery_p50_ms: held.delays.map(|delays| delays.p50_ms),
            delivery_p99_ms: held.delays.map(|delays| delays.p99_ms),
            url: urls.of(node),
        }
    });
    ClusterResponse {
        generation: view.generation.to_string(),
        epoch: view.epoch,
        digest: format!("{:016x}", view.digest),
        held: view.held,
        nodes: nodes.collect(),
    }
}

pub(super) fn user_of(path: &Path) -> Result<UserId, HttpError> {
    UserId::parse(part_of(path, "user")?).map_err(|rule| refuse(422, rule.to_string()))
}

/// A part of the path, by its name in the route.
pub(super) fn part_of<'a>(path: &'a Path, part: &str) -> Result<&'a str, HttpError> {
    let path = path.as_ref().map_err(|_| refuse(422, format!("the {part} in the path is not UTF-8")))?;
    Ok(path.iter().find(|(name, _)| *name == part).map(|(_, raw)| raw).unwrap_or_default())
}

pub(super) fn unavailable(error: InboxError) -> HttpError {
    tracing::warn!(%error, "the inbox could not be asked");
    refuse(503, "the inbox cannot be asked now")
}
