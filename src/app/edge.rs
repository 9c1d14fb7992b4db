//! What all HTTP edges share: problems as answers, bearers, bodies.

use std::time::Duration;

use axum::body::Body;
use axum::http::header::{
    AUTHORIZATION, CACHE_CONTROL, CONTENT_TYPE, HeaderName, RETRY_AFTER, WWW_AUTHENTICATE,
};
use axum::http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use axum::response::IntoResponse;
use bytes::Bytes;

use crate::transport::http::{BodyFault, RequestBody, read_body};
use crate::wire::http::Problem;

/// How long a sender may take to send a body.
pub(super) const BODY_DEADLINE: Duration = Duration::from_secs(10);
/// Body of anything small: a token, a device.
pub(super) const SMALL_BODY: usize = 16 * 1024;

/// A problem as an answer.
pub(super) struct Refused(pub(super) Problem);

impl From<Problem> for Refused {
    fn from(problem: Problem) -> Self {
        Self(problem)
    }
}

impl IntoResponse for Refused {
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

pub(super) fn refuse(status: u16, detail: impl Into<String>) -> Refused {
    Refused(Problem::new(status, detail))
}

/// A JSON answer that no cache may keep.
pub(super) fn json(status: StatusCode, body: impl Into<Body>) -> Response<Body> {
    let mut response = Response::new(body.into());
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// A page or a script of ours.
pub(super) fn asset(kind: &'static str, text: &'static str) -> Response<Body> {
    let mut response = Response::new(Body::from(text));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert(HeaderName::from_static("x-content-type-options"), HeaderValue::from_static("nosniff"));
    response
}

/// The token of `Authorization: Bearer`.
pub(super) fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(token.trim())
}

/// Whether two secrets are the same, in a time that does not tell where they differ.
pub(super) fn same_secret(one: &str, other: &str) -> bool {
    one.len() == other.len() && one.bytes().zip(other.bytes()).fold(0, |sum, (a, b)| sum | (a ^ b)) == 0
}

/// Reads a JSON body of at most `limit` bytes.
pub(super) async fn json_body<B: RequestBody>(request: Request<B>, limit: usize) -> Result<Bytes, Refused> {
    if let Some(kind) = request.headers().get(CONTENT_TYPE) {
        let kind = kind.to_str().unwrap_or_default().split(';').next().unwrap_or_default().trim();
        if !kind.eq_ignore_ascii_case("application/json") && !kind.to_ascii_lowercase().ends_with("+json") {
            return Err(refuse(415, format!("the body must be application/json, not {kind:?}")));
        }
    }
    read_body(request.into_body(), limit, BODY_DEADLINE).await.map_err(|fault| match fault {
        BodyFault::TooLarge => refuse(413, format!("the body is larger than {limit} bytes")),
        BodyFault::Incomplete => refuse(408, "the body did not come whole and in time"),
    })
}

/// The answer to a path that there is not.
pub(super) async fn not_found() -> Refused {
    refuse(404, "there is nothing at this path")
}

/// The answer to a method that the path does not take; axum adds `Allow`.
pub(super) async fn wrong_method(method: Method) -> Refused {
    refuse(405, format!("this path does not take {method}"))
}

/// A router as the service that the accept loop wants.
pub(super) type Routes = axum::Router;

/// Ends a router in the answers that every edge gives to what it does not know.
pub(super) fn closed(routes: Routes) -> Routes {
    routes.fallback(not_found).method_not_allowed_fallback(wrong_method)
}
