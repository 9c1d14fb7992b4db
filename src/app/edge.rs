//! What all HTTP listeners share: problems as responses, bearer tokens, bodies.

use std::net::IpAddr;
use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use axum::http::header::{
    ALLOW, AUTHORIZATION, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HOST,
    RETRY_AFTER, WWW_AUTHENTICATE, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use axum::middleware::Next;
use axum::response::IntoResponse;
use axum::routing::get;
use bytes::Bytes;
use hyper::body::Incoming;
use serde::Serialize;
use subtle::ConstantTimeEq;
use tower::ServiceExt;

use crate::transport::held::{Budget, Held, Spent};
use crate::transport::http::{Answers, BodyError, RequestBody, read_body};
use crate::transport::request::check_head;
use crate::wire::http::Problem;

/// Deadline for a body.
pub(super) const BODY_DEADLINE: Duration = Duration::from_secs(10);
/// Largest body of small requests, in bytes.
pub(super) const SMALL_BODY: usize = 16 * 1024;

/// Memory budget of the bodies of unanswered requests in one process, in bytes: eight batches of 16
/// MiB, and as much again for single publishes, 2,000 of 64 KiB.
const KNOWN_HELD: usize = 256 * 1024 * 1024;
/// The same for requests whose sender is unknown before they are read (`POST /v1/verify`): 4,096 of
/// 16 KiB. It is separate, so that strangers do not hold up callers with a key.
const STRANGERS_HELD: usize = 64 * 1024 * 1024;

/// The two memory budgets of a process.
#[derive(Clone)]
pub(super) struct Budgets {
    pub(super) known: Budget,
    pub(super) strangers: Budget,
}

impl Default for Budgets {
    fn default() -> Self {
        Self { known: Budget::of(KNOWN_HELD), strangers: Budget::of(STRANGERS_HELD) }
    }
}

/// A problem as a response.
pub(super) struct HttpError(pub(super) Problem);

impl From<Problem> for HttpError {
    fn from(problem: Problem) -> Self {
        Self(problem)
    }
}

impl IntoResponse for HttpError {
    fn into_response(self) -> Response<Body> {
        let Self(problem) = self;
        let status = StatusCode::from_u16(problem.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = Response::new(Body::from(problem.to_json()));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if let Some(seconds) = problem.retry_after_s {
            headers.insert(RETRY_AFTER, seconds.into());
        }
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

pub(super) fn refuse(status: u16, detail: impl Into<String>) -> HttpError {
    HttpError(Problem::new(status, detail))
}

/// A response with a value as JSON, which no cache may keep.
pub(super) fn json_of(status: StatusCode, value: &impl Serialize) -> Response<Body> {
    // The values are ours: text, numbers, lists.
    json(status, serde_json::to_vec(value).unwrap_or_default())
}

/// A JSON response that no cache may keep.
pub(super) fn json(status: StatusCode, body: impl Into<Body>) -> Response<Body> {
    let mut response = Response::new(body.into());
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// What our pages may load and connect to, and that no other page may frame them. A socket may be
/// on any host, because the template of the public URL decides where a client is sent.
const PAGE_POLICY: &str = "default-src 'self'; img-src 'self' data:; connect-src 'self' ws: wss:; base-uri 'none'; \
                           form-action 'none'; frame-ancestors 'none'";

/// A page or script of ours.
pub(super) fn asset(kind: &'static str, text: &'static str) -> Response<Body> {
    let mut response = Response::new(Body::from(text));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(PAGE_POLICY));
    response
}

/// Wraps a listener's service in what holds on every listener: a malformed head is refused, and
/// browsers must not guess the type of a response.
pub(super) fn guarded(service: impl Answers<Body>) -> impl Answers<Body> {
    tower::service_fn(move |request: Request<Incoming>| {
        let service = service.clone();
        async move {
            let mut response = match check_head(&request) {
                Err(why) => refuse(400, why).into_response(),
                // About the server as a whole (RFC 9110, section 9.3.7).
                Ok(()) if request.method() == Method::OPTIONS && request.uri().path() == "*" => options(),
                Ok(()) => service.oneshot(request).await?,
            };
            response.headers_mut().insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
            Ok(response)
        }
    })
}

/// The response to `OPTIONS /`, the check of load balancers.
pub(super) fn options() -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::NO_CONTENT;
    response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD, OPTIONS"));
    response
}

/// The root of a listener without a page: a word for people, and a response for load balancers.
pub(super) fn root(word: &'static str) -> Routes {
    axum::Router::new().route("/", get(async move || word).options(async || options()))
}

/// Refuses requests for another host on a listener that only this machine can reach. A web site can
/// make a name of its own resolve to this machine and then read the responses (DNS rebinding).
pub(super) async fn own_host(
    State(loopback): State<bool>,
    request: Request<Body>,
    next: Next,
) -> Response<Body> {
    // A load balancer's check returns nothing that could be read.
    let reads = request.method() != Method::HEAD && request.method() != Method::OPTIONS;
    if loopback && reads && !is_for_loopback(request.headers()) {
        return refuse(403, "this listener is for this machine: ask for it as 127.0.0.1 or localhost")
            .into_response();
    }
    next.run(request).await
}

/// Whether the host of a request is this machine. A request without a host comes from no browser.
pub(super) fn is_for_loopback(headers: &HeaderMap) -> bool {
    headers.get(HOST).is_none_or(|host| host.to_str().is_ok_and(is_loopback))
}

/// Whether the host of a URL or header, with a port or without, is this machine.
pub(super) fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    name.eq_ignore_ascii_case("localhost")
        || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Whether a request came through a proxy that says so; it need not come from this machine then.
pub(super) fn is_forwarded(headers: &HeaderMap) -> bool {
    headers.keys().any(|name| {
        let name = name.as_str();
        name == "forwarded" || name == "via" || name.starts_with("x-forwarded-") || name == "x-real-ip"
    })
}

/// The token of `Authorization: Bearer`. `None` if there is no such header, empty if nothing that
/// can be a token follows.
pub(super) fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(AUTHORIZATION)?.as_bytes();
    let scheme = value.split(|byte| *byte == b' ').next().unwrap_or_default();
    let token = std::str::from_utf8(&value[scheme.len()..]).unwrap_or_default().trim();
    scheme.eq_ignore_ascii_case(b"bearer").then_some(token)
}

/// Whether two secrets are equal, in constant time.
pub(super) fn same_secret(one: &str, other: &str) -> bool {
    one.as_bytes().ct_eq(other.as_bytes()).into()
}

/// Reads a JSON body of at most `limit` bytes. `held` must live until the request is answered.
pub(super) async fn json_body<B: RequestBody>(
    request: Request<B>,
    limit: usize,
    held: &mut Held,
) -> Result<Bytes, HttpError> {
    if let Some(coding) = request.headers().get(CONTENT_ENCODING)
        && !coding.as_bytes().eq_ignore_ascii_case(b"identity")
    {
        return Err(refuse(415, format!("the body must not be encoded: Content-Encoding is {coding:?}")));
    }
    if let Some(kind) = request.headers().get(CONTENT_TYPE) {
        let kind = kind.to_str().unwrap_or_default().split(';').next().unwrap_or_default().trim();
        if !kind.eq_ignore_ascii_case("application/json") && !kind.to_ascii_lowercase().ends_with("+json") {
            return Err(refuse(415, format!("the body must be application/json, not {kind:?}")));
        }
    }
    read_body(request.into_body(), limit, BODY_DEADLINE, held).await.map_err(|fault| match fault {
        BodyError::TooLarge => refuse(413, format!("the body is larger than {limit} bytes")),
        BodyError::Incomplete => refuse(408, "the body did not come whole and in time"),
        BodyError::Spent => refuse(503, Spent.to_string()),
    })
}

/// Reads the `limit` of a page, a number above 0. More than `most`, also a number that does not
/// fit, counts as `most`.
pub(super) fn limit_in(text: &str, most: usize) -> Option<usize> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    let count = digits.then(|| text.parse().unwrap_or(usize::MAX)).filter(|count| *count > 0);
    count.map(|count| count.min(most))
}

/// The response to an unknown path.
pub(super) async fn not_found() -> HttpError {
    refuse(404, "there is nothing at this path")
}

/// The response to a method that the path does not take; axum adds `Allow`.
pub(super) async fn wrong_method(method: Method) -> HttpError {
    refuse(405, format!("this path does not take {method}"))
}

/// A router that the accept loop can serve.
pub(super) type Routes = axum::Router;

/// Completes a router with the responses to what it does not know.
pub(super) fn closed(routes: Routes) -> Routes {
    routes.fallback(not_found).method_not_allowed_fallback(wrong_method)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(name: &'static str, value: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(name, HeaderValue::from_str(value).unwrap());
        headers
    }

    #[test]
    fn a_bearer_with_nothing_behind_it_is_an_empty_token_and_not_none() {
        for (value, token) in [
            ("Bearer abc", Some("abc")),
            ("bearer  abc ", Some("abc")),
            ("Bearer", Some("")),
            ("Bearer ", Some("")),
            ("Bearer \u{e9}", Some("\u{e9}")),
            ("Basic abc", None),
            ("Bearerabc", None),
        ] {
            assert_eq!(bearer(&with("authorization", value)), token, "{value:?}");
        }
        assert_eq!(bearer(&HeaderMap::new()), None);
    }

    #[test]
    fn this_machine_is_told_from_names_that_resolve_to_it_and_from_proxies() {
        for host in ["127.0.0.1:8080", "localhost", "LocalHost:1", "[::1]:8080", "127.9.9.9"] {
            assert!(is_for_loopback(&with("host", host)), "{host}");
        }
        for host in ["evil.example:8080", "localhost.evil.example", "10.0.0.1", "", "[::2]:1"] {
            assert!(!is_for_loopback(&with("host", host)), "{host:?}");
        }
        for name in ["forwarded", "via", "x-forwarded-for", "x-forwarded-proto", "x-real-ip"] {
            assert!(is_forwarded(&with(name, "x")), "{name}");
        }
        assert!(!is_forwarded(&with("host", "127.0.0.1")));
    }
}
