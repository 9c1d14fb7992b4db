//! Push over HTTP: the socket, connect, and the page. Dispatch offers connect alone.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use axum::body::Body;
use axum::extract::{RawPathParams, State};
use axum::http::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
    ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, LOCATION, ORIGIN, SEC_WEBSOCKET_VERSION, UPGRADE,
    VARY,
};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use axum::response::IntoResponse;
use axum::routing::{get, post};
use futures_util::future::{BoxFuture, FutureExt, ready};

use super::edge::{
    Budgets, HttpError, Routes, SMALL_BODY, bearer, closed, json, json_body, json_of, limit_in, not_found,
    refuse,
};
use crate::inbox::history::HistoryRange;
use crate::live::Live;
use crate::message::{LogId, NameError, Seq, TopicName};
use crate::role::connect::{Connect, ConnectError};
use crate::role::push::{Admission, AdmissionError, OWN_HISTORY_PAGE, Origins, Push, SocketRequest};
use crate::role::strangers::is_guess;
use crate::role::strangers::{Stranger, Strangers};
use crate::telemetry::{Credential, Refusals};
use crate::ticket::TICKET_LIFE_MS;
use crate::transport::http::PeerAddress;
use crate::transport::http::{ConnectionFuture, UpgradeHandler};
use crate::transport::lazy_stream::LazyTcpStream;
use crate::transport::websocket::{Handshake, HandshakeError, ServerSocket, handshake};
use crate::watching::WatchRights;
use crate::wire::address::node_in_path;
use crate::wire::frame::ReconnectHint;
use crate::wire::http::{FieldError, Problem, history_body, parse_connect};
use crate::wire::peer::Identity;
use crate::wire::refusal::{RefusalReason, Refused};
use crate::wire::rest::ConnectResponse;

const SOCKET_PATH: &str = "/v1/ws";
/// Deadline from the 101 to the upgraded socket.
const UPGRADE_DEADLINE: Duration = Duration::from_secs(5);

pub(super) struct PushEdge {
    pub(super) push: Push,
    pub(super) connect: ConnectEdge,
}

/// State of `POST /v1/connect`, on push and on dispatch.
pub(super) struct ConnectEdge {
    pub(super) connect: Connect,
    pub(super) origins: Live<Origins>,
    pub(super) strangers: Strangers,
    pub(super) hint: ReconnectHint,
    pub(super) refusals: Refusals,
    pub(super) budgets: Budgets,
    /// Set on push: clients are told to go away while the node drains.
    pub(super) push: Option<Push>,
}

impl ConnectEdge {
    /// Counts a refused token, and answers it.
    fn unauthorized(&self, refused: Refused, stranger: Option<&Stranger>) -> HttpError {
        self.refusals.note(Credential::Token, &refused.detail);
        let counted = stranger.filter(|_| is_guess(refused.reason));
        match counted.and_then(|stranger| stranger.failed(Instant::now())) {
            Some(after_s) => too_many(after_s),
            None => HttpError(Problem::refused(&refused)),
        }
    }

    /// The client by its address, if addresses are limited.
    fn stranger(&self, headers: &HeaderMap, peer: Option<PeerAddress>) -> Option<Stranger> {
        self.strangers.client(peer?.0, forwarded(headers))
    }

    fn fault(&self, fault: ConnectError, stranger: Option<&Stranger>) -> HttpError {
        match fault {
            ConnectError::Unauthorized(refused) => self.unauthorized(refused, stranger),
            ConnectError::Unavailable(why) => refuse(503, why),
        }
    }
}

type Answer = Result<Response<Body>, HttpError>;

pub(super) fn push_routes(edge: Arc<PushEdge>) -> Routes {
    axum::Router::new()
        .route(SOCKET_PATH, get(socket))
        .route("/n/{node}/v1/ws", get(socket))
        .route("/v1/connect", post(connect_on_push).options(preflight_on_push))
        .route("/v1/inbox/messages", get(own_history).options(preflight_on_push))
        .route("/v1/topics/{topic}/messages", get(topic_history).options(preflight_on_push))
        .route("/v1/everyone/messages", get(everyones_history).options(preflight_on_push))
        .with_state(edge)
}

pub(super) fn dispatch_routes(edge: Arc<ConnectEdge>) -> Routes {
    closed(
        axum::Router::new()
            .route("/v1/connect", post(connect_on_dispatch).options(preflight_on_dispatch))
            .with_state(edge),
    )
}

/// A request for a socket that is not the first of its connection, or that cannot be served.
async fn socket(State(edge): State<Arc<PushEdge>>, mut request: Request<Body>) -> Response<Body> {
    let upgrade = hyper::upgrade::on(&mut request);
    let (parts, _) = request.into_parts();
    let request = Request::from_parts(parts, ());
    if request.uri().path() != SOCKET_PATH && node_in_path(request.uri().path()).is_none() {
        return not_found().await.into_response();
    }
    match decide(&edge, &request).await {
        Ok((answer, admission)) => {
            let socket = ServerSocket::upgraded(upgrade, UPGRADE_DEADLINE);
            tokio::spawn(Box::pin(edge.push.serve(admission, socket)));
            answer.response().map(|()| Body::empty())
        }
        Err(refused) => *refused,
    }
}

/// The first request of a connection.
impl UpgradeHandler<Body> for PushEdge {
    fn is_for(&self, path: &str) -> bool {
        path == SOCKET_PATH || node_in_path(path).is_some()
    }

    fn wants_address(&self) -> bool {
        self.connect.strangers.are_limited()
    }

    fn take(
        &self,
        request: Request<()>,
        line: LazyTcpStream,
    ) -> BoxFuture<'_, Result<ConnectionFuture, (LazyTcpStream, Response<Body>)>> {
        async move {
            match decide(self, &request).await {
                Ok((answer, admission)) => {
                    let socket = ready(Some(ServerSocket::answered(line, &answer)));
                    Ok(self.push.serve(admission, socket).boxed())
                }
                Err(refused) => Err((line, *refused)),
            }
        }
        .boxed()
    }
}

/// Whether a request gets its socket. Returns the response in either case.
async fn decide(
    edge: &PushEdge,
    request: &Request<()>,
) -> Result<(Handshake, Admission), Box<Response<Body>>> {
    let refused = |refused: HttpError| Box::new(refused.into_response());
    let answer = match handshake(request) {
        Ok(answer) => answer,
        Err(HandshakeError::Bad(why)) => return Err(refused(refuse(400, why))),
        Err(HandshakeError::Upgrade(why)) => return Err(Box::new(upgrade_required(why))),
    };
    let stranger = edge.connect.stranger(request.headers(), request.extensions().get().copied());
    let socket_request = SocketRequest {
        node_in_path: node_in_path(request.uri().path()),
        query: request.uri().query().unwrap_or_default(),
        origin: origin_of(request.headers()),
        bearer: bearer(request.headers()),
        stranger: stranger.as_ref(),
    };
    match edge.push.admit(socket_request).await {
        Ok(admission) => Ok((answer, admission)),
        Err(AdmissionError::Redirect(url)) => Err(Box::new(redirect(&url))),
        Err(rejection) => Err(refused(rejected(rejection))),
    }
}

/// A 426 names what to upgrade to (RFC 9110, section 15.5.22; RFC 6455, section 4.4).
fn upgrade_required(why: &'static str) -> Response<Body> {
    let mut response = refuse(426, why).into_response();
    response.headers_mut().insert(UPGRADE, HeaderValue::from_static("websocket"));
    response.headers_mut().insert(SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
    response
}

fn redirect(url: &str) -> Response<Body> {
    let Ok(location) = HeaderValue::from_str(url) else {
        return refuse(503, "the owner's URL cannot be named").into_response();
    };
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::TEMPORARY_REDIRECT;
    response.headers_mut().insert(LOCATION, location);
    response
}

fn rejected(rejection: AdmissionError) -> HttpError {
    match rejection {
        AdmissionError::Unavailable(why) => refuse(503, why),
        AdmissionError::ForbiddenOrigin => {
            refuse(403, "pages of this origin may not open sockets (push.origins)")
        }
        AdmissionError::Unauthorized(refused) => HttpError(Problem::refused(&refused)),
        AdmissionError::Redirect(_) => refuse(503, "the node of this user is another one"),
        AdmissionError::TooMany(after_s) => too_many(after_s),
        AdmissionError::BadQuery(faults) => HttpError(Problem::fields(
            faults
                .into_iter()
                .map(|(name, detail)| FieldError { pointer: format!("?{name}"), detail })
                .collect(),
        )),
    }
}

/// The answer to an address with too many bad tokens, or too many sockets that wait for one.
fn too_many(after_s: u32) -> HttpError {
    let mut problem =
        Problem::new(429, "this address has shown too many bad tokens, or has too many sockets without one");
    problem.retry_after_s = Some(after_s);
    HttpError(problem)
}

/// What proxies say about the client's address.
pub(super) fn forwarded(headers: &HeaderMap) -> impl Iterator<Item = Cow<'_, str>> {
    // What a client wrote itself stands to the left: it must not hide what its proxy added.
    headers.get_all("x-forwarded-for").iter().map(|value| String::from_utf8_lossy(value.as_bytes()))
}

async fn connect_on_push(State(edge): State<Arc<PushEdge>>, request: Request<Body>) -> Response<Body> {
    connect(&edge.connect, request).await
}

async fn connect_on_dispatch(State(edge): State<Arc<ConnectEdge>>, request: Request<Body>) -> Response<Body> {
    connect(&edge, request).await
}

async fn preflight_on_push(State(edge): State<Arc<PushEdge>>, headers: HeaderMap) -> Response<Body> {
    preflight(&edge.connect, &headers)
}

async fn preflight_on_dispatch(State(edge): State<Arc<ConnectEdge>>, headers: HeaderMap) -> Response<Body> {
    preflight(&edge, &headers)
}

/// An origin that cannot be read counts as one that is not listed.
fn origin_of(headers: &HeaderMap) -> Option<&str> {
    headers.get(ORIGIN).map(|origin| origin.to_str().unwrap_or("(not ASCII)"))
}

/// The response to a CORS preflight for connect.
fn preflight(edge: &ConnectEdge, headers: &HeaderMap) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::NO_CONTENT;
    if allow_origin(edge, headers, &mut response) {
        let answer = response.headers_mut();
        answer.insert(ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST"));
        answer.insert(ACCESS_CONTROL_ALLOW_HEADERS, HeaderValue::from_static("authorization, content-type"));
        answer.insert(ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("600"));
    }
    response
}

/// Lets a page of a listed origin read the response. Returns false if the origin is not listed.
fn allow_origin(edge: &ConnectEdge, headers: &HeaderMap, response: &mut Response<Body>) -> bool {
    response.headers_mut().append(VARY, HeaderValue::from_static("origin"));
    let Some(origin) = origin_of(headers) else { return true };
    let allowed = edge.origins.get().allows(Some(origin));
    if allowed && let Ok(value) = HeaderValue::from_str(origin) {
        response.headers_mut().insert(ACCESS_CONTROL_ALLOW_ORIGIN, value);
        // Or a page could not honour it.
        let exposed = HeaderValue::from_static("retry-after");
        response.headers_mut().insert(ACCESS_CONTROL_EXPOSE_HEADERS, exposed);
    }
    allowed
}

async fn connect(edge: &ConnectEdge, request: Request<Body>) -> Response<Body> {
    let headers = request.headers().clone();
    let mut response = match place(edge, request).await {
        Ok(response) => response,
        Err(refused) => refused.into_response(),
    };
    allow_origin(edge, &headers, &mut response);
    response
}

/// The user of the token of a request.
async fn identify(
    edge: &ConnectEdge,
    headers: &HeaderMap,
    stranger: Option<&Stranger>,
) -> Result<Identity, HttpError> {
    let token = bearer(headers).filter(|token| !token.is_empty()).ok_or_else(|| {
        let why = "a token is needed: Authorization: Bearer <token>";
        edge.unauthorized(Refused::new(RefusalReason::TokenMissing, why), stranger)
    })?;
    edge.connect.verify(token).await.map_err(|fault| edge.fault(fault, stranger))
}

async fn own_history(State(edge): State<Arc<PushEdge>>, request: Request<Body>) -> Response<Body> {
    shown_history(&edge, &request.into_parts().0, Ok(None)).await
}

/// The log of a topic, for a member.
async fn topic_history(
    State(edge): State<Arc<PushEdge>>,
    path: RawPathParams,
    request: Request<Body>,
) -> Response<Body> {
    let topic = path.iter().find(|(name, _)| *name == "topic").map(|(_, topic)| topic);
    let log = TopicName::parse(topic.unwrap_or_default()).map(|topic| Some(LogId::Topic(topic)));
    shown_history(&edge, &request.into_parts().0, log).await
}

/// The log of what goes to all users.
async fn everyones_history(State(edge): State<Arc<PushEdge>>, request: Request<Body>) -> Response<Body> {
    shown_history(&edge, &request.into_parts().0, Ok(Some(LogId::Everyone))).await
}

async fn shown_history(
    edge: &PushEdge,
    request: &Parts,
    log: Result<Option<LogId>, NameError>,
) -> Response<Body> {
    let (headers, query) = (&request.headers, request.uri.query().unwrap_or_default());
    let stranger = edge.connect.stranger(headers, request.extensions.get().copied());
    let mut response = match read_history(edge, headers, query, log, stranger.as_ref()).await {
        Ok(response) => response,
        Err(refused) => refused.into_response(),
    };
    allow_origin(&edge.connect, headers, &mut response);
    response
}

/// A page of a log, or of the user's inbox.
async fn read_history(
    edge: &PushEdge,
    headers: &HeaderMap,
    query: &str,
    log: Result<Option<LogId>, NameError>,
    stranger: Option<&Stranger>,
) -> Answer {
    check_origin(&edge.connect, headers)?;
    let identity = identify(&edge.connect, headers, stranger).await?;
    if edge.push.has_revoked(&identity.user, identity.issued_at_s).await {
        let refused = Refused::new(RefusalReason::TokenRevoked, "the token was revoked");
        return Err(edge.connect.unauthorized(refused, stranger));
    }
    let (range, limit) = history_query(query)?;
    let user = &identity.user;
    let log = log.map_err(|rule| refuse(422, rule.to_string()))?;
    let page = match &log {
        None => edge.push.history(user, range, limit).await.map(Some),
        Some(log) => {
            let rights = WatchRights::of_claims(&identity.claims);
            edge.push.log_history(user, log, range, limit, rights.as_ref()).await
        }
    };
    let page = page.map_err(|error| {
        tracing::warn!(%error, "a user's own history could not be read");
        refuse(503, "the inbox cannot be read now")
    })?;
    // The same, whether there is such a topic or not.
    let not_for_you = || {
        refuse(
            403,
            "the user is no member of such a topic with a log, and the token's claim watch allows none",
        )
    };
    let (messages, next) = page.ok_or_else(not_for_you)?;
    Ok(json(StatusCode::OK, history_body(log.as_ref(), &messages, next)))
}

/// `after` or `before`, and `limit`.
fn history_query(query: &str) -> Result<(HistoryRange, usize), HttpError> {
    let (mut after, mut before, mut limit) = (None, None, OWN_HISTORY_PAGE);
    let fault = |name: &str, rule: &str| {
        let field = FieldError { pointer: format!("?{name}"), detail: rule.to_owned() };
        HttpError(Problem::fields(vec![field]))
    };
    for (name, text) in form_urlencoded::parse(query.as_bytes()) {
        let seq = || {
            let rule = "must be an integer from 0 to 2^53 - 1";
            text.parse().ok().and_then(Seq::new).ok_or_else(|| fault(&name, rule))
        };
        match &*name {
            // As if it were not there.
            _ if text.is_empty() => {}
            "after" => after = Some(seq()?),
            "before" => before = Some(seq()?),
            "limit" => {
                let rule = || fault("limit", "must be an integer of 1 or more; 100 are given");
                limit = limit_in(&text, OWN_HISTORY_PAGE).ok_or_else(rule)?;
            }
            _ => {}
        }
    }
    match (after, before) {
        (Some(_), Some(_)) => Err(fault("before", "give either after or before, not both")),
        (None, Some(before)) => Ok((HistoryRange::Before(before), limit)),
        (after, None) => Ok((HistoryRange::After(after.unwrap_or_default()), limit)),
    }
}

fn check_origin(edge: &ConnectEdge, headers: &HeaderMap) -> Result<(), HttpError> {
    if edge.origins.get().allows(origin_of(headers)) {
        return Ok(());
    }
    let why = "pages of this origin may not connect (push.origins)";
    edge.refusals.note(Credential::Origin, why);
    Err(refuse(403, why))
}

async fn place(edge: &ConnectEdge, request: Request<Body>) -> Answer {
    check_origin(edge, request.headers())?;
    if edge.push.as_ref().is_some_and(|push| !push.takes_sockets()) {
        return Err(refuse(503, "this node is leaving; another one answers"));
    }
    let peer = request.extensions().get().copied();
    let stranger = edge.stranger(request.headers(), peer);
    let identity = identify(edge, request.headers(), stranger.as_ref()).await?;
    let mut held = edge.budgets.known.hold();
    let device = parse_connect(&json_body(request, SMALL_BODY, &mut held).await?)?;
    let place =
        edge.connect.place(identity, device).await.map_err(|fault| edge.fault(fault, stranger.as_ref()))?;
    if let Some(push) = &edge.push
        && push.has_revoked(&place.user, place.token_iat_s).await
    {
        let refused = Refused::new(RefusalReason::TokenRevoked, "the token was revoked");
        return Err(edge.unauthorized(refused, stranger.as_ref()));
    }
    let hint = edge.push.as_ref().map_or(edge.hint, Push::reconnect_hint);
    let answer = ConnectResponse {
        url: format!("{}?ticket={}", place.socket, place.ticket),
        socket: place.ticket_in_auth.then_some(place.socket),
        ticket: place.ticket_in_auth.then_some(place.ticket),
        node: place.node.to_string(),
        generation: place.generation.to_string(),
        epoch: place.epoch,
        expires_in_ms: TICKET_LIFE_MS,
        reconnect: Some(hint),
    };
    Ok(json_of(StatusCode::OK, &answer))
}
