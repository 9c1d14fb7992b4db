//! Where tokens come from, and what is known about the one in use.

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::Mutex;

/// How long the application may take to answer with a token.
const PATIENCE: Duration = Duration::from_secs(30);

/// After so many fresh tokens in a row were refused, the client stops.
const REFUSALS_MAX: u32 = 2;

/// Why a token is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenReason {
    /// The client connects for the first time.
    First,
    /// The token in use will expire soon, or the application asked for another one.
    Expiring,
    /// The server refused the token.
    Expired,
    /// The server said that the token was revoked.
    Revoked,
}

impl TokenReason {
    /// The reason as the other client libraries name it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::First => "first",
            Self::Expiring => "expiring",
            Self::Expired => "expired",
            Self::Revoked => "revoked",
        }
    }
}

/// Why a [`TokenSource`] has no token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// There will be none: the client stops.
    #[error("{0}")]
    Refused(String),
    /// There is none now: the client asks again later.
    #[error("{0}")]
    Failed(String),
}

/// Gives the user's token when it is asked: before the first line, before the token in use expires,
/// and after a refusal. It is never asked twice at once. A `String` or `&'static str` is a source
/// whose token never changes; a closure that returns a future is one, too.
pub trait TokenSource: Send + Sync + 'static {
    /// Returns a token for the user, within 30 s.
    fn token(&self, why: TokenReason) -> BoxFuture<'_, Result<String, TokenError>>;
}

impl TokenSource for String {
    fn token(&self, _: TokenReason) -> BoxFuture<'_, Result<String, TokenError>> {
        std::future::ready(Ok(self.clone())).boxed()
    }
}

impl TokenSource for &'static str {
    fn token(&self, _: TokenReason) -> BoxFuture<'_, Result<String, TokenError>> {
        std::future::ready(Ok((*self).to_owned())).boxed()
    }
}

impl<F, T> TokenSource for F
where
    F: Fn(TokenReason) -> T + Send + Sync + 'static,
    T: Future<Output = Result<String, TokenError>> + Send + 'static,
{
    fn token(&self, why: TokenReason) -> BoxFuture<'_, Result<String, TokenError>> {
        self(why).boxed()
    }
}

/// A fault of the application's token source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum TokenFault {
    /// There will be no token.
    Refused(String),
    /// Ask again later: the name of the fault, and what happened.
    Later(&'static str, String),
}

/// The token in use.
pub(crate) struct Tokens {
    source: Arc<dyn TokenSource>,
    state: Mutex<Held>,
}

struct Held {
    token: Option<String>,
    why: TokenReason,
    /// No line has had a `welcome` with this token yet.
    is_fresh: bool,
    /// Fresh tokens that were refused in a row.
    refusals: u32,
}

impl Tokens {
    pub(crate) fn new(source: Arc<dyn TokenSource>) -> Self {
        let held = Held { token: None, why: TokenReason::First, is_fresh: false, refusals: 0 };
        Self { source, state: Mutex::new(held) }
    }

    /// The token in use, or a new one.
    pub(crate) async fn get(&self) -> Result<String, TokenFault> {
        let mut held = self.state.lock().await;
        if let Some(token) = &held.token {
            return Ok(token.clone());
        }
        let asked = tokio::time::timeout(PATIENCE, self.source.token(held.why)).await;
        let token = match asked {
            Err(_) => {
                return Err(TokenFault::Later("token_timeout", "no token came within 30 s".to_owned()));
            }
            Ok(Err(TokenError::Refused(why))) => return Err(TokenFault::Refused(why)),
            Ok(Err(TokenError::Failed(why))) => return Err(TokenFault::Later("token_failed", why)),
            Ok(Ok(token)) => token,
        };
        if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
            let rule = "a token is not empty, and printable ASCII without spaces";
            return Err(TokenFault::Later("token_rubbish", rule.to_owned()));
        }
        held.token = Some(token.clone());
        held.is_fresh = true;
        Ok(token)
    }

    /// Another token is to be asked for.
    pub(crate) async fn renew(&self) {
        let mut held = self.state.lock().await;
        held.token = None;
        held.why = TokenReason::Expiring;
    }

    /// A line has had its `welcome`.
    pub(crate) async fn accepted(&self) {
        let mut held = self.state.lock().await;
        held.is_fresh = false;
        held.refusals = 0;
        held.why = TokenReason::Expiring;
    }

    /// The server refused the token in use with this reason. Returns whether to try again with
    /// another one.
    pub(crate) async fn refused(&self, reason: &str) -> bool {
        let mut held = self.state.lock().await;
        held.refusals += u32::from(held.is_fresh);
        held.token = None;
        held.is_fresh = false;
        held.why = if reason == "token_revoked" { TokenReason::Revoked } else { TokenReason::Expired };
        held.refusals < REFUSALS_MAX
    }
}
