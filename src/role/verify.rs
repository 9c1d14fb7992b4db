//! Verification by another process. Known tokens pass from a cache until they expire. An auth that
//! does not answer is left alone for a while (a circuit breaker), so that new sockets do not wait
//! for it one by one.

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, TryFutureExt};
use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;
use quick_cache::Weighter;
use quick_cache::sync::Cache;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};
use tower::ServiceExt;
use tower::util::BoxCloneSyncService;

use super::issued_at_s;
use crate::clock::Clock;
use crate::message::{Millis, UserId};
use crate::telemetry::{Health, Metrics};
use crate::wire::peer::{Identity, PeerError, VerifyRequest};
use crate::wire::refusal::{RefusalReason, Refused};
use crate::wire::rest::{self, VerifyResponse};

/// Size of the cache, in bytes: 100,000 tokens with claims of 500 bytes. The least used are
/// evicted.
const CACHED_BYTES: u64 = 64 * 1024 * 1024;
/// Expected number of entries in the cache.
const CACHED: usize = 100_000;
/// Bytes of an entry besides its claims and the user's name.
const ENTRY_BYTES: u64 = 160;
/// Failures in a row that open the breaker.
const FAILURES: u32 = 5;
/// How long the breaker stays open, at first and at most.
const REST_FIRST: Duration = Duration::from_millis(500);
const REST_MAX: Duration = Duration::from_secs(10);

/// Concurrent calls to auth of one process. Further callers wait here, not in auth's memory.
const QUESTIONS: usize = 256;
/// How long a caller waits for its turn.
const TURN_DEADLINE: Duration = Duration::from_secs(3);

/// Sends the body of `POST /v1/verify`. Returns status and body.
pub type Ask = BoxCloneSyncService<Bytes, (u16, Bytes), String>;

/// Verifies tokens by asking auth. Cheap to clone.
#[derive(Clone)]
pub struct RemoteAuth {
    inner: Arc<Inner>,
}

struct Inner {
    ask: Ask,
    clock: Clock,
    known: Cache<[u8; 32], Identity, Weight>,
    breaker: Mutex<Breaker>,
    turns: Semaphore,
    health: Health,
    /// Whether auth answered the last call; `None` before the first call.
    answers: Mutex<Option<bool>>,
    /// Calls that auth did not answer, or answered in a form that cannot be read.
    unavailable: Counter,
}

/// The weight of a cached identity, in bytes.
#[derive(Clone)]
struct Weight;

impl Weighter<[u8; 32], Identity> for Weight {
    fn weight(&self, _: &[u8; 32], identity: &Identity) -> u64 {
        ENTRY_BYTES + (identity.claims.len() + identity.user.as_str().len()) as u64
    }
}

/// A circuit breaker: closed until [`FAILURES`] in a row; then open for a time that doubles with
/// each further failure, after which one call is let through.
#[derive(Debug, Default)]
struct Breaker {
    failures: u32,
    open_until: Option<Instant>,
}

impl Breaker {
    /// Whether a call may be made now.
    fn allows(&mut self, now: Instant) -> bool {
        match self.open_until {
            Some(until) if now < until => false,
            Some(_) => {
                // Other callers wait for the result of this one.
                self.open_until = Some(now + REST_FIRST);
                true
            }
            None => true,
        }
    }

    fn note(&mut self, answered: bool, now: Instant) {
        if answered {
            *self = Self::default();
            return;
        }
        self.failures = self.failures.saturating_add(1);
        if self.failures >= FAILURES {
            let doublings = (self.failures - FAILURES).min(16);
            self.open_until = Some(now + (REST_FIRST * (1 << doublings)).min(REST_MAX));
        }
    }
}

/// Registers the counter of verifications that auth did not answer. It stays 0 where tokens are
/// verified without asking.
pub fn register_unavailable(metrics: &Metrics) -> Counter {
    let counter = Counter::default();
    let shown = counter.clone();
    metrics.register(|r| r.register("auth_unavailable", "Verifications that auth did not answer", shown));
    counter
}

impl RemoteAuth {
    /// Asks by `ask`. An outage shows in `health`, in a metric and in the log.
    #[must_use]
    pub fn new(ask: Ask, clock: Clock, health: Health, metrics: &Metrics) -> Self {
        let unavailable = register_unavailable(metrics);
        health.note("auth", true, "not asked yet");
        let known = Cache::with_weighter(CACHED, CACHED_BYTES, Weight);
        let inner = Inner {
            ask,
            clock,
            known,
            breaker: Mutex::default(),
            turns: Semaphore::new(QUESTIONS),
            health,
            answers: Mutex::default(),
            unavailable,
        };
        Self { inner: Arc::new(inner) }
    }

    async fn verify(self, token: Arc<str>) -> Result<Identity, PeerError> {
        let inner = &self.inner;
        let digest: [u8; 32] = Sha256::digest(token.as_bytes()).into();
        let now_s = inner.clock.now().seconds();
        if let Some(known) = inner.known.get(&digest) {
            if known.expires_at_s > now_s {
                return Ok(known);
            }
            inner.known.remove(&digest);
        }
        let Ok(Ok(_turn)) = timeout(TURN_DEADLINE, inner.turns.acquire()).await else {
            // This is not a failure of auth.
            return Err(PeerError::Unavailable("too many tokens wait to be verified".to_owned()));
        };
        if !inner.breaker.lock().allows(Instant::now()) {
            return Err(PeerError::Unavailable("auth did not answer a moment ago (auth.url)".to_owned()));
        }
        let request = rest::VerifyRequest { token: &token };
        let body = Bytes::from(serde_json::to_vec(&request).unwrap_or_default());
        let answer = inner.ask.clone().oneshot(body).map_err(PeerError::Unavailable).await;
        let answer = answer.and_then(|(status, body)| read(status, &body, inner.clock.now()));
        inner.note(&answer);
        if let Ok(identity) = &answer {
            inner.known.insert(digest, identity.clone());
        }
        answer
    }
}

impl Inner {
    /// Counts the result. Logs once when auth stops answering and once when it answers again.
    fn note(&self, answer: &Result<Identity, PeerError>) {
        let away = match answer {
            Err(PeerError::Unavailable(why)) => Some(why),
            _ => None,
        };
        self.breaker.lock().note(away.is_none(), Instant::now());
        let before = self.answers.lock().replace(away.is_none());
        match away {
            Some(why) => {
                self.unavailable.inc();
                if before != Some(false) {
                    tracing::warn!(
                        why,
                        "tokens cannot be verified: auth (auth.url) does not answer; cached tokens still pass"
                    );
                }
                self.health.note("auth", false, format!("auth (auth.url) is away: {why}"));
            }
            None if before == Some(true) => {}
            None => {
                tracing::info!("auth (auth.url) answers");
                self.health.note("auth", true, "answers");
            }
        }
    }
}

fn read(status: u16, body: &[u8], now: Millis) -> Result<Identity, PeerError> {
    let bad =
        || PeerError::Unavailable(format!("auth (auth.url) answered {status} and nothing that can be read"));
    // The status decides: a refusal needs no body, and a proxy's has a body of its own. 413 means
    // that the token itself is too large. Any other answer does not come from auth.
    match status {
        200 => {
            let answer: VerifyResponse = serde_json::from_slice(body).map_err(|_| bad())?;
            let claims = answer.claims.map_or_else(|| "{}".to_owned(), |claims| claims.get().to_owned());
            let times: Times = serde_json::from_str(&claims).map_err(|_| bad())?;
            let seconds = |time: Option<f64>| time.map(|seconds| seconds.max(0.0) as u64);
            let expires_at = answer.expires_at.as_deref().and_then(Millis::parse_rfc3339);
            let refused = |why: &str| PeerError::Unauthorized(Refused::new(RefusalReason::TokenInvalid, why));
            Ok(Identity {
                user: UserId::parse(&answer.user).map_err(|_| bad())?,
                issued_at_s: issued_at_s(seconds(times.iat), now).map_err(refused)?,
                expires_at_s: expires_at
                    .map(Millis::seconds)
                    .or_else(|| seconds(times.exp))
                    .ok_or_else(bad)?,
                claims: Bytes::from(claims),
            })
        }
        401 | 413 => {
            let problem = serde_json::from_slice::<Refusal>(body).unwrap_or_default();
            let why = problem.detail.unwrap_or_else(|| "the token is not good".to_owned());
            let reason = RefusalReason::parse(problem.reason.as_deref());
            Err(PeerError::Unauthorized(Refused::new(reason, why)))
        }
        _ => Err(bad()),
    }
}

/// The claims that count here, in seconds since the epoch.
#[derive(Deserialize)]
struct Times {
    iat: Option<f64>,
    exp: Option<f64>,
}

/// The part of a problem that a client may be told.
#[derive(Default, Deserialize)]
struct Refusal {
    detail: Option<String>,
    reason: Option<String>,
}

impl tower::Service<VerifyRequest> for RemoteAuth {
    type Response = Identity;
    type Error = PeerError;
    type Future = BoxFuture<'static, Result<Identity, PeerError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), PeerError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: VerifyRequest) -> Self::Future {
        self.clone().verify(request.token).boxed()
    }
}

#[cfg(test)]
mod tests;
