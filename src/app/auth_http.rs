//! Auth over HTTP.

use std::sync::Arc;
use std::time::Instant;

use axum::body::Body;
use axum::extract::State;
use axum::http::{Request, Response, StatusCode};
use axum::routing::{get, post};

use super::audit::caller;
use super::edge::{
    Budgets, HttpError, Routes, SMALL_BODY, bearer, closed, json, json_body, json_of, refuse, same_secret,
};
use crate::live::Live;
use crate::message::Millis;
use crate::message::UserId;
use crate::role::auth::{Auth, TOKEN_TTL_DEFAULT_S, TOKEN_TTL_S};
use crate::role::strangers::Strangers;
use crate::telemetry::audit;
use crate::telemetry::{Credential, Outcome, Refusals, TimingBy};
use crate::transport::held::Held;
use crate::wire::http::{Problem, TokenRequest, parse_token_request, parse_verify_request};
use crate::wire::refusal::Refused;
use crate::wire::rest::{TokenResponse, VerifyResponse};
use secrecy::{ExposeSecret, SecretString};

pub(super) struct AuthEdge {
    pub(super) auth: Auth,
    /// How long verifications take, by outcome.
    pub(super) times: TimingBy<3>,
    pub(super) admin_key: Live<SecretString>,
    pub(super) strangers: Strangers,
    pub(super) refusals: Refusals,
    pub(super) budgets: Budgets,
}

type Edge = State<Arc<AuthEdge>>;
type Answer = Result<Response<Body>, HttpError>;

pub(super) fn routes(edge: Arc<AuthEdge>) -> Routes {
    closed(
        axum::Router::new()
            .route("/v1/verify", post(verify))
            .route("/v1/tokens", post(issue))
            .route("/.well-known/jwks.json", get(jwks))
            .with_state(edge),
    )
}

async fn verify(State(edge): Edge, request: Request<Body>) -> Answer {
    let mut held = edge.budgets.strangers.hold();
    let body = json_body(request, SMALL_BODY, &mut held).await?;
    let token = parse_verify_request(&body)?;
    let began = Instant::now();
    let verified = edge.auth.verify(&token);
    let outcome = match verified.as_ref().map_err(|fault| fault.reason()) {
        Ok(_) => Outcome::Accepted,
        Err(Some(_)) => Outcome::Refused,
        Err(None) => Outcome::Unavailable,
    };
    edge.times.at(outcome as usize).observe(began.elapsed());
    let identity = verified.map_err(|fault| match fault.reason() {
        None => refuse(503, fault.to_string()),
        Some(reason) => {
            let refused = Refused::new(reason, fault.to_string());
            edge.refusals.note(Credential::Token, &refused.detail);
            HttpError(Problem::refused(&refused))
        }
    })?;
    let answer = VerifyResponse {
        user: identity.user.to_string(),
        expires_at: Some(Millis(identity.expires_at_s.saturating_mul(1000)).rfc3339()),
        claims: serde_json::from_slice(&identity.claims).ok(),
    };
    Ok(json_of(StatusCode::OK, &answer))
}

async fn issue(State(edge): Edge, request: Request<Body>) -> Answer {
    let given = bearer(request.headers()).unwrap_or_default();
    if !same_secret(given, edge.admin_key.get().expose_secret()) {
        let why = "the admin key is needed: Authorization: Bearer <admin key>";
        edge.refusals.note(Credential::AdminKey, why);
        return Err(refuse(401, why));
    }
    let address = caller(&edge.strangers, &request);
    let (answer, user) = issue_body(&edge.auth, request, edge.budgets.known.hold()).await?;
    audit(
        "issue_token",
        &[("key", "admin"), ("address", &address), ("outcome", "done"), ("user", user.as_str())],
    );
    Ok(answer)
}

/// Issues a token to a caller with the admin key. Returns the answer, and for whom the token is.
pub(super) async fn issue_body(
    auth: &Auth,
    request: Request<Body>,
    mut held: Held,
) -> Result<(Response<Body>, UserId), HttpError> {
    let body = json_body(request, SMALL_BODY, &mut held).await?;
    let TokenRequest { user, ttl_s, watch } = parse_token_request(&body, TOKEN_TTL_S)?;
    let issued = auth.issue_with(&user, ttl_s.unwrap_or(TOKEN_TTL_DEFAULT_S), watch.as_ref());
    let (token, expires_at) = issued.map_err(|fault| refuse(403, fault.to_string()))?;
    let answer = TokenResponse { token, expires_at: expires_at.rfc3339() };
    Ok((json_of(StatusCode::OK, &answer), user))
}

async fn jwks(State(edge): Edge) -> Response<Body> {
    json(StatusCode::OK, edge.auth.jwks().to_string())
}
