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
                    Some("bad") => Ok((
                        401,
                        Bytes::from_static(b"{\"detail\":\"expired\",\"reason\":\"token_expired\"}"),
                    )),
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
        assert_eq!(
            bench.verify("huge").await,
            Err(PeerError::Unauthorized(Refused::new(RefusalReason::TokenInvalid, "too large")))
        );
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
        assert_eq!(
            bench.verify("bad").await,
            Err(PeerError::Unauthorized(Refused::new(RefusalReason::TokenExpired, "expired")))
        );
    }
    assert_eq!(bench.asked.load(Ordering::Relaxed), FAILURES * 2);
}
