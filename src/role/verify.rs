//! Verifying by asking another process: known tokens pass from a cache until they expire, and an auth that does not answer
//! is left alone for a while (a circuit breaker), so that a crowd of new sockets does not wait for it one by one.

use std::collections::HashMap;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, TryFutureExt};
use parking_lot::Mutex;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::time::Instant;
use tower::ServiceExt;
use tower::util::BoxCloneSyncService;

use crate::clock::Clock;
use crate::message::{Millis, UserId};
use crate::wire::peer::{Identity, PeerFault, VerifyRequest};

/// Tokens remembered, about 600 bytes each: 60 MB.
const CACHED: usize = 100_000;
/// Failures in a row after which auth is left alone.
const FAILURES: u32 = 5;
/// For how long, at first and at the most.
const REST_FIRST: Duration = Duration::from_millis(500);
const REST_MAX: Duration = Duration::from_secs(10);

/// Sends the body of `POST /v1/verify`; answers status and body.
pub type Ask = BoxCloneSyncService<Bytes, (u16, Bytes), String>;

/// See the room's comment. Cheap to clone.
#[derive(Clone)]
pub struct RemoteAuth {
    inner: Arc<Inner>,
}

struct Inner {
    ask: Ask,
    clock: Clock,
    known: Mutex<HashMap<[u8; 32], Identity>>,
    breaker: Mutex<Breaker>,
}

/// Closed until [`FAILURES`] in a row; then open for a time that doubles with each further failure, when one call is let
/// through to see.
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
                // Others wait until this one is answered.
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
    /// Asks by `ask`.
    #[must_use]
    pub fn new(ask: Ask, clock: Clock) -> Self {
        let inner = Inner { ask, clock, known: Mutex::default(), breaker: Mutex::default() };
        Self { inner: Arc::new(inner) }
    }

    async fn verify(self, token: Arc<str>) -> Result<Identity, PeerFault> {
        let inner = &self.inner;
        let digest: [u8; 32] = Sha256::digest(token.as_bytes()).into();
        let now_s = inner.clock.now().seconds();
        if let Some(known) = inner.known.lock().get(&digest).filter(|known| known.expires_at_s > now_s) {
            return Ok(known.clone());
        }
        if !inner.breaker.lock().allows(Instant::now()) {
            return Err(PeerFault::Unavailable("auth did not answer a moment ago (auth.url)".to_owned()));
        }
        let body = Bytes::from(json!({ "token": &*token }).to_string());
        let answer = inner.ask.clone().oneshot(body).map_err(PeerFault::Unavailable).await;
        let answer = answer.and_then(|(status, body)| read(status, &body));
        let answered = !matches!(answer, Err(PeerFault::Unavailable(_)));
        inner.breaker.lock().note(answered, Instant::now());
        if let Ok(identity) = &answer {
            inner.remember(digest, identity.clone(), now_s);
        }
        answer
    }
}

impl Inner {
    fn remember(&self, digest: [u8; 32], identity: Identity, now_s: u64) {
        let mut known = self.known.lock();
        if known.len() >= CACHED {
            known.retain(|_, identity| identity.expires_at_s > now_s);
            if known.len() >= CACHED {
                known.clear();
            }
        }
        known.insert(digest, identity);
    }
}

fn read(status: u16, body: &[u8]) -> Result<Identity, PeerFault> {
    let bad =
        || PeerFault::Unavailable(format!("auth (auth.url) answered {status} and nothing that can be read"));
    let answer: Value = serde_json::from_slice(body).map_err(|_| bad())?;
    match status {
        200 => {
            let claims = &answer["claims"];
            let user = answer["user"].as_str().and_then(|user| UserId::parse(user).ok()).ok_or_else(bad)?;
            let seconds = |name: &str| claims[name].as_f64().map(|seconds| seconds.max(0.0) as u64);
            let expires_at = answer["expires_at"].as_str().and_then(Millis::parse_rfc3339);
            Ok(Identity {
                user,
                issued_at_s: seconds("iat").unwrap_or(0),
                expires_at_s: expires_at.map(Millis::seconds).or_else(|| seconds("exp")).ok_or_else(bad)?,
                claims: Bytes::from(claims.to_string()),
            })
        }
        // 413: a token too large to be looked at is at fault itself. Any other answer is of something that is not auth.
        401 | 413 => {
            let why = answer["detail"].as_str().unwrap_or("the token is not good");
            Err(PeerFault::Unauthorized(why.to_owned()))
        }
        _ => Err(bad()),
    }
}

impl tower::Service<VerifyRequest> for RemoteAuth {
    type Response = Identity;
    type Error = PeerFault;
    type Future = BoxFuture<'static, Result<Identity, PeerFault>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), PeerFault>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: VerifyRequest) -> Self::Future {
        self.clone().verify(request.token).boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

    /// An auth that can be down, and counts what it is asked.
    struct Bench {
        remote: RemoteAuth,
        down: Arc<AtomicBool>,
        asked: Arc<AtomicU32>,
        clock: Clock,
    }

    fn bench() -> Bench {
        let (down, asked) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
        let clock = Clock::standing(Millis(1_000_000));
        let ask = tower::service_fn({
            let (down, asked) = (Arc::clone(&down), Arc::clone(&asked));
            move |body: Bytes| {
                asked.fetch_add(1, Ordering::Relaxed);
                let down = down.load(Ordering::Relaxed);
                async move {
                    let token = serde_json::from_slice::<Value>(&body).unwrap()["token"].clone();
                    match token.as_str() {
                        _ if down => Err("connection refused".to_owned()),
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
        let remote = RemoteAuth::new(BoxCloneSyncService::new(ask), clock.clone());
        Bench { remote, down, asked, clock }
    }

    impl Bench {
        async fn verify(&self, token: &str) -> Result<Identity, PeerFault> {
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
        assert!(matches!(bench.verify("alice").await, Err(PeerFault::Unavailable(_))));
    }

    #[tokio::test(start_paused = true)]
    async fn an_auth_that_does_not_answer_is_left_alone_for_a_while() {
        let bench = bench();
        bench.down.store(true, Ordering::Relaxed);
        for n in 0..100 {
            assert!(matches!(bench.verify(&format!("user-{n}")).await, Err(PeerFault::Unavailable(_))));
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
            assert_eq!(bench.verify("huge").await, Err(PeerFault::Unauthorized("too large".to_owned())));
        }
        assert!(bench.verify("alice").await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_bad_token_is_an_answer_and_is_not_remembered() {
        let bench = bench();
        for _ in 0..FAILURES * 2 {
            assert_eq!(bench.verify("bad").await, Err(PeerFault::Unauthorized("expired".to_owned())));
        }
        assert_eq!(bench.asked.load(Ordering::Relaxed), FAILURES * 2);
    }
}
