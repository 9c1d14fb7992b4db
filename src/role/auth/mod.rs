//! Auth verifies tokens: a token in, a user out. Tokens are JWTs. The key decides the algorithm,
//! never the token's header.

mod keys;

use std::collections::HashMap;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::future::{Ready, ready};
use jsonwebtoken::jwk::{Jwk, JwkSet};
use jsonwebtoken::{Algorithm, Header};
use parking_lot::RwLock;
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;
use tokio::sync::Notify;

pub use keys::{KeyError, SECRET_MIN_BYTES};

use super::issued_at_s;
use crate::clock::Clock;
use crate::message::{Millis, UserId};
use crate::telemetry::WAY;
use crate::watching::WatchRights;
use crate::wire::peer::{Identity, PeerError, VerifyRequest};
use crate::wire::refusal::{RefusalReason, Refused};
use secrecy::{ExposeSecret, SecretString};

use keys::Key;

/// Life of an issued token, in seconds: 1 s to 90 days.
pub const TOKEN_TTL_S: std::ops::RangeInclusive<u64> = 1..=90 * 24 * 3600;
/// Default life of an issued token, in seconds.
pub const TOKEN_TTL_DEFAULT_S: u64 = 3600;

/// A configured key.
#[derive(Debug, Clone)]
pub struct TokenKey {
    /// An HS256 secret as it stands, or a public key in PEM.
    pub key: SecretString,
    /// The `kid` of the tokens that are signed with it, if they have one.
    pub kid: Option<String>,
}

impl From<&str> for TokenKey {
    fn from(key: &str) -> Self {
        Self { key: key.into(), kid: None }
    }
}

/// How tokens are verified.
#[derive(Debug, Clone, Default)]
pub struct AuthConfig {
    /// The keys: the first signs, and each verifies.
    pub token_keys: Vec<TokenKey>,
    /// The `iss` that a token must have, if set.
    pub issuer: Option<String>,
    /// The `aud` that a token must have, if set.
    pub audience: Option<String>,
}

/// Why a token is refused. The text is for the client and contains no part of the token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// It has not the form of a token.
    #[error("this is not a token")]
    Malformed,
    /// Its time is over.
    #[error("the token has expired")]
    Expired,
    /// The token is bad, for this reason.
    #[error("{0}")]
    Bad(&'static str),
    /// It was signed with a key that this server does not have.
    #[error("the token was signed with a key that is not known here")]
    UnknownKey,
    /// The keys were not fetched yet.
    #[error("the keys of the issuer could not be fetched yet")]
    NoKeys,
}

impl TokenError {
    /// The reason on the wire; `None` if it says nothing about the token.
    #[must_use]
    pub fn reason(self) -> Option<RefusalReason> {
        match self {
            Self::Malformed => Some(RefusalReason::TokenMalformed),
            Self::Expired => Some(RefusalReason::TokenExpired),
            Self::Bad(_) | Self::UnknownKey => Some(RefusalReason::TokenInvalid),
            Self::NoKeys => None,
        }
    }
}

impl From<&'static str> for TokenError {
    fn from(reason: &'static str) -> Self {
        Self::Bad(reason)
    }
}

/// No token can be issued, because only a public key is configured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this server verifies with a public key and cannot sign; issue tokens where the private key is")]
pub struct SigningError;

/// The role auth. Cheap to clone.
#[derive(Clone)]
pub struct Auth {
    inner: Arc<Inner>,
}

struct Inner {
    keys: Keys,
    config: AuthConfig,
    clock: Clock,
    unknown_key: Notify,
}

/// The keys that verify tokens.
enum Keys {
    /// The configured keys with their `kid`; the first signs.
    Own(RwLock<Arc<OwnKeys>>),
    /// Public keys of another issuer by `kid`; `None` until they were fetched.
    Fetched(RwLock<Option<HashMap<String, Key>>>),
}

type OwnKeys = Vec<(Option<String>, Key)>;

/// Reads the configured keys. An error says which of them cannot be used.
fn own_keys(config: &[TokenKey]) -> Result<Arc<OwnKeys>, (usize, KeyError)> {
    let read = |(n, given): (usize, &TokenKey)| {
        let key = Key::read(given.key.expose_secret()).map_err(|fault| (n, fault))?;
        Ok((given.kid.clone(), key))
    };
    config.iter().enumerate().map(read).collect::<Result<OwnKeys, _>>().map(Arc::new)
}

/// The claims that are checked. All others pass through unread.
#[derive(Deserialize)]
struct Claims {
    sub: Option<Value>,
    exp: Option<Value>,
    iat: Option<Value>,
    nbf: Option<Value>,
    iss: Option<Value>,
    aud: Option<Value>,
}

impl Auth {
    /// Reads the configured keys.
    ///
    /// # Errors
    ///
    /// The number of the key that cannot be used, from 0, and why, with the remedy.
    pub fn new(config: AuthConfig, clock: Clock) -> Result<Self, (usize, KeyError)> {
        let keys = Keys::Own(RwLock::new(own_keys(&config.token_keys)?));
        Ok(Self { inner: Arc::new(Inner { keys, config, clock, unknown_key: Notify::new() }) })
    }

    /// Replaces the configured keys: the first signs from now on, and each verifies. Does nothing
    /// where the keys are fetched.
    ///
    /// # Errors
    ///
    /// As [`Auth::new`]. The keys in use then stay.
    pub fn replace_keys(&self, config: &[TokenKey]) -> Result<(), (usize, KeyError)> {
        let keys = own_keys(config)?;
        if let Keys::Own(own) = &self.inner.keys {
            *own.write() = keys;
        }
        Ok(())
    }

    /// An auth whose keys are fetched later: see [`Auth::take_jwks`].
    #[must_use]
    pub fn fetched(config: AuthConfig, clock: Clock) -> Self {
        let keys = Keys::Fetched(RwLock::new(None));
        Self { inner: Arc::new(Inner { keys, config, clock, unknown_key: Notify::new() }) }
    }

    /// Resolves when a token with an unknown key was seen: the issuer may have a new key.
    pub async fn unknown_key(&self) {
        self.inner.unknown_key.notified().await;
    }

    /// Replaces the keys by those of a JWKS (RFC 7517). Returns how many can be used.
    ///
    /// # Errors
    ///
    /// It is not a JWKS, or has no usable key. The keys in use then stay.
    pub fn take_jwks(&self, text: &[u8]) -> Result<usize, &'static str> {
        let set: JwkSet = serde_json::from_slice(text).map_err(|_| "this is no JWKS")?;
        let read = |jwk: &Jwk| {
            let key = Key::of_jwk(jwk)?;
            Some((jwk.common.key_id.clone().unwrap_or_default(), key))
        };
        let keys: HashMap<String, Key> = set.keys.iter().filter_map(read).collect();
        if keys.is_empty() {
            return Err("the JWKS holds no key for RS256, ES256 or EdDSA");
        }
        let count = keys.len();
        if let Keys::Fetched(known) = &self.inner.keys {
            *known.write() = Some(keys);
        }
        Ok(count)
    }

    /// Verifies a token with the key that its `kid` names. A token without `kid`, and a `kid` that
    /// the configuration does not name, is tried with each configured key; of fetched keys there
    /// must be one alone.
    fn claims(&self, token: &str) -> Result<Box<RawValue>, TokenError> {
        match &self.inner.keys {
            Keys::Own(own) => {
                let own = Arc::clone(&own.read());
                match &own[..] {
                    [] => Err(TokenError::NoKeys),
                    [(_, key)] => key.claims(token),
                    all => claims_by_any(all, token),
                }
            }
            Keys::Fetched(known) => {
                let known = known.read();
                let keys = known.as_ref().ok_or(TokenError::NoKeys)?;
                let header = jsonwebtoken::decode_header(token);
                let kid = header.map_err(|_| TokenError::Malformed)?.kid;
                let found = match &kid {
                    Some(kid) => keys.get(kid),
                    None if keys.len() == 1 => keys.values().next(),
                    None => None,
                };
                found.ok_or(TokenError::UnknownKey)?.claims(token)
            }
        }
    }

    /// Verifies a token.
    ///
    /// # Errors
    ///
    /// What is wrong with it, for the client; never a part of it.
    pub fn verify(&self, token: &str) -> Result<Identity, TokenError> {
        let raw = self.claims(token).inspect_err(|fault| {
            if *fault == TokenError::UnknownKey {
                self.inner.unknown_key.notify_one();
            }
        })?;
        // serde would accept an array for a struct.
        let claims = Some(raw.get()).filter(|text| text.trim_start().starts_with('{'));
        let claims: Option<Claims> = claims.and_then(|text| serde_json::from_str(text).ok());
        let claims = claims.ok_or(TokenError::Malformed)?;
        let expires_at_s = self.check(&claims)?;
        let user = claims.sub.as_ref().and_then(Value::as_str).and_then(|sub| UserId::parse(sub).ok());
        let user = user.ok_or("the token's sub is not a user id")?;
        tracing::debug!(target: WAY, step = 2, %user, "token verified");
        let issued_at_s = issued_at_s(seconds(claims.iat.as_ref())?, self.inner.clock.now())?;
        let claims = Bytes::from(String::from(Box::<str>::from(raw)));
        Ok(Identity { user, issued_at_s, expires_at_s, claims })
    }

    /// Checks the claims. Returns when the token expires.
    fn check(&self, claims: &Claims) -> Result<u64, TokenError> {
        let now_s = self.inner.clock.now().seconds();
        let expires_at_s = seconds(claims.exp.as_ref())?.ok_or("the token has no exp")?;
        if expires_at_s <= now_s {
            return Err(TokenError::Expired);
        }
        if seconds(claims.nbf.as_ref())?.is_some_and(|nbf| nbf > now_s) {
            return Err("the token is not valid yet".into());
        }
        let config = &self.inner.config;
        let iss = claims.iss.as_ref().and_then(Value::as_str);
        if config.issuer.as_deref().is_some_and(|issuer| iss != Some(issuer)) {
            return Err("the token is of another issuer".into());
        }
        if config.audience.as_deref().is_some_and(|aud| !is_for(claims.aud.as_ref(), aud)) {
            return Err("the token is for another audience".into());
        }
        Ok(expires_at_s)
    }

    /// Signs a token for `user` that lives `ttl_s` seconds. Returns it with its expiry.
    ///
    /// # Errors
    ///
    /// [`SigningError`] if only a public key is configured.
    pub fn issue(&self, user: &UserId, ttl_s: u64) -> Result<(String, Millis), SigningError> {
        self.issue_with(user, ttl_s, None)
    }

    /// The same, with the right to watch topics.
    ///
    /// # Errors
    ///
    /// [`SigningError`] if only a public key is configured.
    pub fn issue_with(
        &self,
        user: &UserId,
        ttl_s: u64,
        watch: Option<&WatchRights>,
    ) -> Result<(String, Millis), SigningError> {
        let Keys::Own(own) = &self.inner.keys else { return Err(SigningError) };
        let own = Arc::clone(&own.read());
        let (kid, key) = own.first().ok_or(SigningError)?;
        let signing = key.signing.as_ref().ok_or(SigningError)?;
        let now = self.inner.clock.now();
        let exp = now.seconds() + ttl_s;
        let mut claims = serde_json::json!({"sub": user.as_str(), "iat": now.seconds(), "exp": exp});
        if let Some(rights) = watch {
            claims["watch"] = rights.patterns().collect();
        }
        let config = &self.inner.config;
        for (name, value) in [("iss", &config.issuer), ("aud", &config.audience)] {
            if let Some(value) = value {
                claims[name] = value.as_str().into();
            }
        }
        let mut header = Header::new(Algorithm::HS256);
        header.kid.clone_from(kid);
        let token = jsonwebtoken::encode(&header, &claims, signing).map_err(|_| SigningError)?;
        Ok((token, Millis(exp * 1000)))
    }

    /// The public keys that verify tokens (RFC 7517); a shared secret is not among them.
    #[must_use]
    pub fn jwks(&self) -> Value {
        let public = |kid: Option<&String>, key: &Key| {
            let mut jwk = match key.signing {
                Some(_) => return None,
                None => Jwk::from_decoding_key(&key.verifying, Some(key.algorithm)).ok()?,
            };
            if let Some(kid) = kid.filter(|kid| !kid.is_empty()) {
                jwk.common.key_id = Some(kid.clone());
            }
            Some(jwk)
        };
        let keys: Vec<Jwk> = match &self.inner.keys {
            Keys::Own(own) => own.read().iter().filter_map(|(kid, key)| public(kid.as_ref(), key)).collect(),
            Keys::Fetched(known) => {
                known.read().iter().flatten().filter_map(|(kid, key)| public(Some(kid), key)).collect()
            }
        };
        serde_json::json!({ "keys": keys })
    }
}

/// Verifies a token with several keys: that of its `kid` first. If none verifies it, the error is
/// that of the first key that was tried.
fn claims_by_any(all: &[(Option<String>, Key)], token: &str) -> Result<Box<RawValue>, TokenError> {
    let kid = jsonwebtoken::decode_header(token).map_err(|_| TokenError::Malformed)?.kid;
    let named = |known: &&(Option<String>, Key)| kid.is_some() && known.0 == kid;
    let others = all.iter().filter(|known| !named(known));
    let mut fault = None;
    for (_, key) in all.iter().filter(named).chain(others) {
        match key.claims(token) {
            Ok(claims) => return Ok(claims),
            Err(error) => fault = fault.or(Some(error)),
        }
    }
    Err(fault.unwrap_or(TokenError::NoKeys))
}

/// A claim in whole seconds, as in RFC 7519: a number, perhaps with a fraction.
fn seconds(claim: Option<&Value>) -> Result<Option<u64>, &'static str> {
    match claim {
        None => Ok(None),
        Some(Value::Number(n)) if n.is_u64() => Ok(n.as_u64()),
        Some(Value::Number(n)) => {
            n.as_f64().filter(|s| *s >= 0.0).map(|s| Some(s as u64)).ok_or("the token holds a bad time")
        }
        Some(_) => Err("the token holds a bad time"),
    }
}

fn is_for(claim: Option<&Value>, audience: &str) -> bool {
    match claim {
        Some(Value::String(one)) => one == audience,
        Some(Value::Array(all)) => all.iter().any(|one| one.as_str() == Some(audience)),
        _ => false,
    }
}

impl tower::Service<VerifyRequest> for Auth {
    type Response = Identity;
    type Error = PeerError;
    type Future = Ready<Result<Identity, PeerError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), PeerError>> {
        Poll::Ready(Ok(()))
    }

    /// It takes some microseconds and never waits.
    fn call(&mut self, request: VerifyRequest) -> Self::Future {
        ready(self.verify(&request.token).map_err(|fault| match fault.reason() {
            None => PeerError::Unavailable(fault.to_string()),
            Some(reason) => PeerError::Unauthorized(Refused::new(reason, fault.to_string())),
        }))
    }
}

#[cfg(test)]
mod tests;
