//! The page on the push port, and what only development gives it: a token for any user, and publishing.
//!
//! Any web site that a developer visits can send requests to a port of this machine, under any host name that it makes
//! resolve here. So the development paths answer only to a loopback host name and to pages of that same host.

use std::net::IpAddr;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::header::{HOST, ORIGIN};
use axum::http::{HeaderMap, Request, Response, StatusCode};
use axum::routing::{get, post};

use super::auth_http::issue_body;
use super::collect_http::{CollectEdge, publish_body};
use super::edge::{Refused, Routes, asset, json, refuse};
use crate::role::auth::Auth;

/// What the page may use in development.
pub(super) struct Development {
    pub(super) auth: Auth,
    pub(super) collect: Arc<CollectEdge>,
}

type Edge = State<Option<Arc<Development>>>;
type Answer = Result<Response<Body>, Refused>;

pub(super) fn routes(development: Option<Arc<Development>>) -> Routes {
    axum::Router::new()
        .route("/", get(async || asset("text/html; charset=utf-8", include_str!("../../web/index.html"))))
        .route(
            "/page.js",
            get(async || asset("text/javascript; charset=utf-8", include_str!("../../web/page.js"))),
        )
        .route(
            "/page.css",
            get(async || asset("text/css; charset=utf-8", include_str!("../../web/page.css"))),
        )
        .route("/dev", get(is_development))
        .route("/dev/token", post(token))
        .route("/dev/publish", post(publish))
        .with_state(development)
}

/// Tells the page whether it may choose a user.
async fn is_development(State(edge): Edge, headers: HeaderMap) -> Answer {
    let development = edge.is_some() && from_this_machine(&headers);
    Ok(json(StatusCode::OK, format!(r#"{{"development":{development}}}"#)))
}

async fn token(State(edge): Edge, request: Request<Body>) -> Answer {
    issue_body(&allowed(edge, &request)?.auth, request).await
}

async fn publish(State(edge): Edge, request: Request<Body>) -> Answer {
    publish_body(&allowed(edge, &request)?.collect, request).await
}

fn allowed(edge: Option<Arc<Development>>, request: &Request<Body>) -> Result<Arc<Development>, Refused> {
    match edge {
        Some(edge) if from_this_machine(request.headers()) => Ok(edge),
        Some(_) => Err(refuse(403, "only this machine's own page may use this")),
        None => Err(refuse(404, "there is nothing at this path")),
    }
}

fn from_this_machine(headers: &HeaderMap) -> bool {
    let text = |name| headers.get(name).and_then(|value: &axum::http::HeaderValue| value.to_str().ok());
    let Some(host) = text(HOST) else { return false };
    is_loopback(host) && text(ORIGIN).is_none_or(|origin| origin == format!("http://{host}"))
}

fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    name == "localhost" || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
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
    }
}
