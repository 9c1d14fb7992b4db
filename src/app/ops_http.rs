//! Ops over HTTP: health, metrics, and the dashboard.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderValue, Response, StatusCode};
use axum::middleware::from_fn_with_state;
use axum::routing::get;

use super::collect_http::cluster_report;
use super::edge::{Routes, asset, closed, json_of, options, own_host};
use crate::membership::Membership;
use crate::role::connect::PublicUrls;
use crate::telemetry::{Health, Metrics};
use crate::wire::rest::{ReadyCondition, ReadyResponse};

pub(super) struct OpsEdge {
    pub(super) health: Health,
    pub(super) metrics: Metrics,
    pub(super) membership: Arc<dyn Membership>,
    pub(super) urls: PublicUrls,
}

type Edge = State<Arc<OpsEdge>>;

pub(super) fn routes(edge: Arc<OpsEdge>, loopback: bool) -> Routes {
    closed(
        axum::Router::new()
            .route("/livez", get(async || "ok\n"))
            .route("/readyz", get(ready))
            .route("/metrics", get(metrics))
            .route("/cluster", get(cluster))
            .route(
                "/",
                get(async || asset("text/html; charset=utf-8", include_str!("../../web/dashboard.html")))
                    .options(async || options()),
            )
            .route(
                "/dashboard.js",
                get(async || asset("text/javascript; charset=utf-8", include_str!("../../web/dashboard.js"))),
            )
            .route(
                "/page.css",
                get(async || asset("text/css; charset=utf-8", include_str!("../../web/page.css"))),
            )
            .layer(from_fn_with_state(loopback, own_host))
            .with_state(edge),
    )
}

async fn ready(State(edge): Edge) -> Response<Body> {
    let (ready, conditions) = edge.health.report();
    let shown = conditions.into_iter();
    let shown = shown.map(|(name, it)| (name.to_owned(), ReadyCondition { ok: it.ok, detail: it.detail }));
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    json_of(status, &ReadyResponse { ready, conditions: shown.collect() })
}

async fn metrics(State(edge): Edge) -> Response<Body> {
    let (kind, text) = edge.metrics.expose();
    let mut response = Response::new(Body::from(text));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

/// What the dashboard shows.
async fn cluster(State(edge): Edge) -> Response<Body> {
    json_of(StatusCode::OK, &cluster_report(&*edge.membership, &edge.urls))
}
