//! The console on collect: a page whose script calls the documented API with the visitor's key. The
//! page itself holds nothing, so it is for whoever reaches the port.

use axum::body::Body;
use axum::http::header::LOCATION;
use axum::http::{HeaderValue, Response, StatusCode};
use axum::routing::get;

use super::edge::{Routes, asset, options};

pub(super) fn routes() -> Routes {
    const SCRIPT: &str = "text/javascript; charset=utf-8";
    const STYLE: &str = "text/css; charset=utf-8";
    let page = async || asset("text/html; charset=utf-8", include_str!("../../web/console.html"));
    axum::Router::new()
        .route("/console", get(async || moved()))
        .route("/console/", get(page).options(async || options()))
        .route("/console/console.js", get(async || asset(SCRIPT, include_str!("../../web/console.js"))))
        .route("/console/console.css", get(async || asset(STYLE, include_str!("../../web/console.css"))))
        .route("/console/page.css", get(async || asset(STYLE, include_str!("../../web/page.css"))))
}

fn moved() -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::PERMANENT_REDIRECT;
    response.headers_mut().insert(LOCATION, HeaderValue::from_static("/console/"));
    response
}
