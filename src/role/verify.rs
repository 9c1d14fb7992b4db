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

impl RemoteAuth {
    /// Asks by `ask`. An outage shows in `health`, in a metric and in the log.
    #[must_use]
    pub fn new(ask: Ask, clock: Clock, health: Health, metrics: &Metrics) -> Self {
        let unavailable = Counter::default();
        let shown = unavailable.clone();
        metrics.register(|r| r.register("auth_unavailable", "Verifications that auth did not answer", shown));
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
            let refused = |why: &str| PeerError::Unauthorized(why.to_owned());
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
            let problem = serde_json::from_slice::<Refused>(body).unwrap_or_default();
            let why = problem.detail.unwrap_or_else(|| "the token is not good".to_owned());
            Err(PeerError::Unauthorized(why))
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
struct Refused {
    detail: Option<String>,
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
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

    /// An auth that can be down and counts its calls.
    struct Bench {
        remote: RemoteAuth,
        down: Arc<AtomicBool>,
        asked: Arc<AtomicU32>,
        clock: Clock,
        health: Health,
        metrics: Metrics,
    }

    fn bench() -> Bench {
        let (down, asked) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
        let clock = Clock::standing(Millis(1_000_000));
        let (health, metrics) = (Health::default(), Metrics::default());
        let ask = tower::service_fn({
            let (down, asked) = (Arc::clone(&down), Arc::clone(&asked));
            move |body: Bytes| {
                asked.fetch_add(1, Ordering::Relaxed);
                let down = down.load(Ordering::Relaxed);
                async move {
                    let token = serde_json::from_slice::<Value>(&body).unwrap()["token"].clone();
                    match token.as_str() {
                        _ if down => Err("connection refused".to_owned()),
                        Some("html") => Ok((401, Bytes::from_static(b"<html>who are you?</html>"))),
                        Some("empty") => Ok((401, Bytes::new())),
                        Some("early") => {
                            let claims = json!({"iat": 1061, "exp": 2000});
                            Ok((200, Bytes::from(json!({"user": "early", "claims": claims}).to_string())))
                        }
                        Some("bad") => Ok((401, Bytes::from_static(b"{\"detail\":\"expired\"}"))),
                        Some("huge") => Ok((413, Bytes::from_static(b"{\"detail\":\"too large\"}"))),
                        Some("bare") => Ok((
                            200,
                            Bytes::from_static(
                                br#"{"user":"bare","expires_at":"1970-01-01T01:00:00Z","claims":{}}"#,
                            ),
                        )),
                        user => {
                            let answer = json!({"user": user, "claims": {"iat": 900, "exp": 2000}});
                            Ok((200, Bytes::from(answer.to_string())))
                        }
                    }
                }
            }
        });
        let remote = RemoteAuth::new(BoxCloneSyncService::new(ask), clock.clone(), health.clone(), &metrics);
        Bench { remote, down, asked, clock, health, metrics }
    }

    impl Bench {
        async fn verify(&self, token: &str) -> Result<Identity, PeerError> {
            self.remote.clone().verify(token.into()).await
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_known_token_passes_while_auth_is_down_until_it_expires() {
        let bench = bench();
        let identity = bench.verify("alice").await.unwrap();
        assert_eq!((identity.issued_at_s, identity.expires_at_s), (900, 2000));
        bench.down.store(true, Ordering::Relaxed);
        assert_eq!(bench.verify("alice").await.unwrap(), identity);
        assert_eq!(bench.asked.load(Ordering::Relaxed), 1);
        bench.clock.advance(1_000_000);
        assert!(matches!(bench.verify("alice").await, Err(PeerError::Unavailable(_))));
    }

    #[tokio::test(start_paused = true)]
    async fn any_401_refuses_its_token_and_is_no_outage() {
        let bench = bench();
        for token in ["html", "empty", "bad", "early"].repeat(10) {
            let refused = bench.verify(token).await;
            assert!(matches!(refused, Err(PeerError::Unauthorized(_))), "{token}: {refused:?}");
        }
        assert!(bench.verify("alice").await.is_ok(), "good ones are not shut out");
        assert!(bench.health.report().1["auth"].ok);
    }

    #[tokio::test(start_paused = true)]
    async fn that_auth_is_away_is_told_and_counted() {
        let bench = bench();
        assert!(bench.health.report().1["auth"].ok, "not asked yet");
        bench.down.store(true, Ordering::Relaxed);
        assert!(bench.verify("alice").await.is_err());
        let (ready, conditions) = bench.health.report();
        assert!(ready && !conditions["auth"].ok && conditions["auth"].detail.contains("auth.url"));
        assert!(bench.metrics.expose().1.contains("ringpush_auth_unavailable_total 1"));
        bench.down.store(false, Ordering::Relaxed);
        assert!(bench.verify("alice").await.is_ok());
        assert!(bench.health.report().1["auth"].ok);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_remembered_is_bounded_in_bytes_and_never_forgotten_whole() {
        let bench = bench();
        for n in 0..2 * CACHED_BYTES / ENTRY_BYTES {
            let identity = Identity {
                user: UserId::parse("somebody").unwrap(),
                issued_at_s: 0,
                expires_at_s: u64::MAX,
                claims: Bytes::from_static(&[b'x'; 5_000]),
            };
            let mut digest = [0; 32];
            digest[..8].copy_from_slice(&n.to_le_bytes());
            bench.remote.inner.known.insert(digest, identity);
        }
        let known = &bench.remote.inner.known;
        assert!(
            known.weight() <= CACHED_BYTES && known.len() > CACHED_BYTES as usize / 10_000,
            "{}",
            known.len()
        );
    }

    #[tokio::test(start_paused = true)]
    async fn an_auth_that_does_not_answer_is_left_alone_for_a_while() {
        let bench = bench();
        bench.down.store(true, Ordering::Relaxed);
        for n in 0..100 {
            assert!(matches!(bench.verify(&format!("user-{n}")).await, Err(PeerError::Unavailable(_))));
        }
        assert_eq!(bench.asked.load(Ordering::Relaxed), FAILURES);
        bench.down.store(false, Ordering::Relaxed);
        tokio::time::advance(REST_FIRST).await;
        assert!(bench.verify("alice").await.is_ok());
        assert!(bench.verify("bob").await.is_ok(), "once it has answered, it is asked as before");
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_needs_no_claims_and_a_token_too_large_is_no_outage() {
        let bench = bench();
        let identity = bench.verify("bare").await.unwrap();
        assert_eq!((identity.issued_at_s, identity.expires_at_s), (0, 3600));
        for _ in 0..FAILURES * 2 {
            assert_eq!(bench.verify("huge").await, Err(PeerError::Unauthorized("too large".to_owned())));
        }
        assert!(bench.verify("alice").await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_crowd_of_unknown_tokens_is_asked_about_a_few_at_a_time() {
        let (now, most) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
        let ask = tower::service_fn({
            let (now, most) = (Arc::clone(&now), Arc::clone(&most));
            move |_: Bytes| {
                let (now, most) = (Arc::clone(&now), Arc::clone(&most));
                async move {
                    most.fetch_max(now.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
                    tokio::time::sleep(Duration::from_millis(900)).await;
                    now.fetch_sub(1, Ordering::Relaxed);
                    Ok((401, Bytes::new()))
                }
            }
        });
        let (clock, metrics) = (Clock::standing(Millis(1_000_000)), Metrics::default());
        let health = Health::default();
        let remote = RemoteAuth::new(BoxCloneSyncService::new(ask), clock, health.clone(), &metrics);
        let asking = (0..2_000).map(|n| remote.clone().verify(format!("random-{n}").into()));
        let answers = futures_util::future::join_all(asking).await;
        assert_eq!(most.load(Ordering::Relaxed), QUESTIONS as u32);
        let waited = |one: &&Result<_, _>| matches!(one, Err(PeerError::Unavailable(_)));
        // Four rounds of 0.9 s were asked about. The others are told to come again, and auth does
        // not count as down.
        assert_eq!(answers.iter().filter(waited).count(), 2_000 - 4 * QUESTIONS);
        assert!(health.report().1["auth"].ok);
        assert!(matches!(remote.verify("next".into()).await, Err(PeerError::Unauthorized(_))));
    }

    #[tokio::test(start_paused = true)]
    async fn a_bad_token_is_an_answer_and_is_not_remembered() {
        let bench = bench();
        for _ in 0..FAILURES * 2 {
            assert_eq!(bench.verify("bad").await, Err(PeerError::Unauthorized("expired".to_owned())));
        }
        assert_eq!(bench.asked.load(Ordering::Relaxed), FAILURES * 2);
    }
}
