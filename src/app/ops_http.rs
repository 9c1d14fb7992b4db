//! Ops over HTTP: health, metrics, and the dashboard.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::header::{ACCEPT, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderValue, Response, StatusCode};
use axum::middleware::from_fn_with_state;
use axum::routing::get;
use tokio_util::sync::CancellationToken;

use super::collect_http::cluster_report;
use super::edge::{Routes, asset, closed, guarded, json_of, options, own_host};
use super::listeners::{Listening, bind_one};
use crate::membership::Membership;
use crate::role::connect::PublicUrls;
use crate::telemetry::{Health, Metrics};
use crate::transport::http::{HttpLimits, serve};
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

async fn metrics(State(edge): Edge, headers: HeaderMap) -> Response<Body> {
    exposition(&edge.metrics, &headers)
}

/// The metrics, in OpenMetrics for whoever asks for it, as Prometheus does.
fn exposition(metrics: &Metrics, headers: &HeaderMap) -> Response<Body> {
    let accepted = headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
    let open = accepted.into_iter().any(|kinds| kinds.contains("application/openmetrics-text"));
    let (kind, text) = if open { metrics.expose() } else { metrics.expose_plain() };
    let mut response = Response::new(Body::from(text));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

/// What the dashboard shows.
async fn cluster(State(edge): Edge) -> Response<Body> {
    json_of(StatusCode::OK, &cluster_report(&*edge.membership, &edge.urls))
}

/// Serves `/livez` and `/metrics` of a command that is no server. Returns the address, and what
/// serves for as long as it is polled. `name` is the flag that holds the address.
///
/// # Errors
///
/// The address cannot be listened on, with the remedy.
pub fn serve_metrics(
    name: &'static str,
    at: SocketAddr,
    metrics: Metrics,
) -> anyhow::Result<(SocketAddr, impl Future<Output = ()>)> {
    let limits = HttpLimits::default();
    let Listening { listener, at } = bind_one(name, at, &limits)?;
    let exposed = move |headers: HeaderMap| async move { exposition(&metrics, &headers) };
    let routes = closed(
        axum::Router::new()
            .route("/livez", get(async || "ok\n"))
            .route("/metrics", get(exposed))
            .layer(from_fn_with_state(at.ip().is_loopback(), own_host)),
    );
    Ok((at, serve(listener, guarded(routes), None, None, limits, CancellationToken::new())))
}
