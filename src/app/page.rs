//! The page on the push port, and what only development gives it: a token for any user, and
//! publishing.
//!
//! Any web site that a developer visits can send requests to a port of this machine, under any host
//! name that it makes resolve here. Any proxy on this machine can pass requests on from elsewhere.
//! So the development paths only answer requests for a loopback host name, from pages of that host,
//! that no proxy has passed on, with the code that the server printed at start.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::header::{HOST, ORIGIN};
use axum::http::{HeaderMap, Method, Request, Response, StatusCode};
use axum::middleware::from_fn_with_state;
use axum::response::IntoResponse;
use axum::routing::{get, post};

use super::auth_http::issue_body;
use super::collect_http::{CollectEdge, publish_body};
use super::edge::{
    HttpError, Routes, asset, is_for_loopback, is_forwarded, json, not_found, options, own_host, refuse,
    same_secret,
};
use crate::library;
use crate::role::auth::Auth;
use crate::role::push::Push;
use crate::telemetry::audit;

/// The header with the code; in a query it is `code`.
const CODE: &str = "x-ringpush-code";

/// What the page may use in development.
pub(super) struct Development {
    pub(super) auth: Auth,
    pub(super) collect: Arc<CollectEdge>,
    /// The code in the URL that the greeting prints.
    pub(super) code: String,
}

/// State of the page's routes.
#[derive(Clone)]
pub(super) struct Page {
    /// `None` outside development.
    pub(super) development: Option<Arc<Development>>,
    /// A load balancer that asks for `/` is told whether this node takes sockets.
    pub(super) push: Push,
    /// Whether only this machine can reach the listener.
    pub(super) loopback: bool,
}

type Edge = State<Page>;
type Answer = Result<Response<Body>, HttpError>;

pub(super) fn routes(page: Page) -> Routes {
    let loopback = page.loopback;
    axum::Router::new()
        .route("/", get(index).options(index))
        .route("/page.js", get(async || script(include_str!("../../web/page.js"))))
        .route("/client/{module}", get(client_module))
        .route(
            "/page.css",
            get(async || asset("text/css; charset=utf-8", include_str!("../../web/page.css"))),
        )
        .route("/dev", get(is_development))
        .route("/dev/token", post(token))
        .route("/dev/publish", post(publish))
        .layer(from_fn_with_state(loopback, own_host))
        .with_state(page)
}

fn script(text: &'static str) -> Response<Body> {
    asset("text/javascript; charset=utf-8", text)
}

/// A module of the client library, as its package has it.
async fn client_module(Path(module): Path<String>) -> Response<Body> {
    match library::JAVASCRIPT.iter().find(|(name, _)| *name == module) {
        Some((_, text)) => script(text),
        None => not_found().await.into_response(),
    }
}

/// The page for a browser. For a load balancer, whether the node takes sockets.
async fn index(State(page): Edge, method: Method) -> Response<Body> {
    if method != Method::GET && !page.push.takes_sockets() {
        return refuse(503, "this node is leaving; another one takes sockets").into_response();
    }
    if method == Method::OPTIONS {
        return options();
    }
    asset("text/html; charset=utf-8", include_str!("../../web/index.html"))
}

/// Tells the page whether it may choose a user, and whether it has the code for that.
async fn is_development(State(page): Edge, request: Request<Body>) -> Answer {
    let here = page.development.as_ref().filter(|_| from_this_machine(request.headers()));
    let code = here.is_some_and(|development| has_code(development, &request));
    let development = here.is_some();
    Ok(json(StatusCode::OK, format!(r#"{{"development":{development},"code":{code}}}"#)))
}

async fn token(State(page): Edge, request: Request<Body>) -> Answer {
    let development = allowed(page, &request)?;
    let held = development.collect.budget.hold();
    let (answer, user) = issue_body(&development.auth, request, held).await?;
    audit("issue_token", &[("key", "page"), ("outcome", "done"), ("user", user.as_str())]);
    Ok(answer)
}

async fn publish(State(page): Edge, request: Request<Body>) -> Answer {
    publish_body(&allowed(page, &request)?.collect, request, None).await
}

fn allowed(page: Page, request: &Request<Body>) -> Result<Arc<Development>, HttpError> {
    let development = page.development.ok_or_else(|| refuse(404, "there is nothing at this path"))?;
    if !from_this_machine(request.headers()) {
        return Err(refuse(403, "only this machine's own page may use this, and through no proxy"));
    }
    if !has_code(&development, request) {
        return Err(refuse(
            403,
            "open the page by the URL that the server printed at start: it has the code",
        ));
    }
    Ok(development)
}

fn has_code(development: &Development, request: &Request<Body>) -> bool {
    let header = request.headers().get(CODE).and_then(|code| code.to_str().ok());
    let pairs = request.uri().query().unwrap_or_default().split('&');
    let given = header.or_else(|| pairs.filter_map(|pair| pair.strip_prefix("code=")).next());
    given.is_some_and(|given| same_secret(given, &development.code))
}

fn from_this_machine(headers: &HeaderMap) -> bool {
    let text = |name| headers.get(name).and_then(|value: &axum::http::HeaderValue| value.to_str().ok());
    let Some(host) = text(HOST) else { return false };
    is_for_loopback(headers)
        && !is_forwarded(headers)
        && text(ORIGIN).is_none_or(|origin| origin == format!("http://{host}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    #[test]
    fn only_this_machines_own_page_counts() {
        let with = |host: &str, origin: Option<&str>| {
            let mut headers = HeaderMap::new();
            headers.insert(HOST, HeaderValue::from_str(host).unwrap());
            if let Some(origin) = origin {
                headers.insert(ORIGIN, HeaderValue::from_str(origin).unwrap());
            }
            from_this_machine(&headers)
        };
        assert!(with("127.0.0.1:8080", None) && with("localhost:8080", Some("http://localhost:8080")));
        assert!(with("[::1]:8080", Some("http://[::1]:8080")));
        assert!(!with("evil.example:8080", Some("http://evil.example:8080")), "a name that resolves here");
        assert!(!with("127.0.0.1:8080", Some("https://evil.example")));
        assert!(!with("127.0.0.1:8080", Some("null")));
        let mut forwarded = HeaderMap::new();
        forwarded.insert(HOST, HeaderValue::from_static("127.0.0.1:8080"));
        assert!(from_this_machine(&forwarded));
        forwarded.insert("x-forwarded-for", HeaderValue::from_static("192.0.2.1"));
        assert!(!from_this_machine(&forwarded), "a proxy on this machine");
    }
}
