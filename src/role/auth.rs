//! Auth verifies tokens: a token in, a user out. Tokens are JWTs. The key decides the algorithm,
//! never the token's header.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};

use base64::Engine;
use base64::engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD};
use bytes::Bytes;
use futures_util::future::{Ready, ready};
use hmac::{Hmac, KeyInit, Mac};
use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, JwkSet, KeyOperations, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use parking_lot::RwLock;
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;
use sha2::Sha256;
use tokio::sync::Notify;

use super::issued_at_s;
use crate::clock::Clock;
use crate::message::{Millis, UserId};
use crate::telemetry::WAY;
use crate::wire::peer::{Identity, PeerError, VerifyRequest};

/// Shortest HS256 secret, in bytes: the length of the digest (RFC 7518, section 3.2).
pub const SECRET_MIN_BYTES: usize = 32;
/// Life of an issued token, in seconds: 1 s to 90 days.
pub const TOKEN_TTL_S: std::ops::RangeInclusive<u64> = 1..=90 * 24 * 3600;
/// Default life of an issued token, in seconds.
pub const TOKEN_TTL_DEFAULT_S: u64 = 3600;

/// How tokens are verified.
#[derive(Debug, Clone, Default)]
pub struct AuthConfig {
    /// An HS256 secret as it stands, or a public key in PEM.
    pub token_key: String,
    /// The `iss` that a token must have, if set.
    pub issuer: Option<String>,
    /// The `aud` that a token must have, if set.
    pub audience: Option<String>,
}

/// Why the configured key cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// It is too short to be a secret.
    #[error(
        "is {0} bytes long; an HS256 secret needs at least {SECRET_MIN_BYTES} (try: openssl rand -base64 32)"
    )]
    Short(usize),
    /// It is PEM, but not a public key of a supported algorithm.
    #[error("is PEM, but not a public key for RS256, ES256 or EdDSA; give the public half, BEGIN PUBLIC KEY")]
    NotAPublicKey,
    /// It is a public key in another form. Used as a secret, anybody would know it.
    #[error(
        "looks like a key in {0}; give the public key as PEM, from its first line on (BEGIN PUBLIC KEY), or make a \
         secret with: openssl rand -base64 32"
    )]
    Disguised(&'static str),
}

/// Why a token is refused. The text is for the client and contains no part of the token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
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
    /// The configured key.
    One(Box<Key>),
    /// Public keys of another issuer by `kid`; `None` until they were fetched.
    Fetched(RwLock<Option<HashMap<String, Key>>>),
}

struct Key {
    algorithm: Algorithm,
    verifying: DecodingKey,
    validation: Validation,
    fast_path: Option<HmacFastPath>,
    /// Set only if the key is a shared secret.
    signing: Option<EncodingKey>,
}

/// A fast path for HS256: a precomputed HMAC key, used only for tokens whose header is
/// byte-identical to one that `jsonwebtoken` has accepted. Everything else goes to the library. It
/// halves the cost of a token (docs/benchmarks/log.md).
struct HmacFastPath {
    keyed: Hmac<Sha256>,
    /// The header of a token that the library has accepted. The tokens of one issuer have the same
    /// header.
    header: OnceLock<Box<str>>,
}

impl HmacFastPath {
    fn new(secret: &[u8]) -> Option<Self> {
        Some(Self { keyed: Hmac::new_from_slice(secret).ok()?, header: OnceLock::new() })
    }

    /// The claims of a token with that header and a good signature; `None` sends the token to the
    /// library.
    fn claims(&self, token: &str) -> Option<Box<RawValue>> {
        let (message, signature) = token.rsplit_once('.')?;
        let (header, claims) = message.split_once('.')?;
        if **self.header.get()? != *header {
            return None;
        }
        let mut mac = self.keyed.clone();
        mac.update(message.as_bytes());
        mac.verify_slice(&URL_SAFE_NO_PAD.decode(signature).ok()?).ok()?;
        serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims).ok()?).ok()
    }

    fn remember(&self, token: &str) {
        if let Some((header, _)) = token.split_once('.') {
            let _ = self.header.set(header.into());
        }
    }
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

impl Key {
    fn new(algorithm: Algorithm, verifying: DecodingKey, signing: Option<EncodingKey>) -> Self {
        let mut validation = Validation::new(algorithm);
        // Times are checked here, by our clock and without leeway; so are `aud` and `iss` where
        // they are configured.
        validation.validate_exp = false;
        validation.validate_aud = false;
        validation.required_spec_claims.clear();
        Self { algorithm, verifying, validation, fast_path: None, signing }
    }

    /// A key of a JWKS. `None` if its algorithm is not supported, or if `use`, `key_ops` or `alg`
    /// reserve it for something else (RFC 7517, sections 4.2 to 4.4).
    fn of_jwk(jwk: &Jwk) -> Option<Self> {
        let common = &jwk.common;
        let signs = common.public_key_use.as_ref().is_none_or(|usage| *usage == PublicKeyUse::Signature);
        let verifies = common.key_operations.as_ref().is_none_or(|all| all.contains(&KeyOperations::Verify));
        if !signs || !verifies {
            return None;
        }
        let algorithm = match &jwk.algorithm {
            AlgorithmParameters::RSA(_) => Algorithm::RS256,
            AlgorithmParameters::EllipticCurve(curve) if curve.curve == EllipticCurve::P256 => {
                Algorithm::ES256
            }
            AlgorithmParameters::OctetKeyPair(_) => Algorithm::EdDSA,
            _ => return None,
        };
        let named = common.key_algorithm.map(|named| named.to_string());
        if named.is_some_and(|named| named != format!("{algorithm:?}")) {
            return None;
        }
        Some(Self::new(algorithm, DecodingKey::from_jwk(jwk).ok()?, None))
    }

    fn read(text: &str) -> Result<Self, KeyError> {
        if !text.trim_start().starts_with("-----BEGIN") {
            if let Some(form) = disguise(text.as_bytes(), 0) {
                return Err(KeyError::Disguised(form));
            }
            return if text.len() < SECRET_MIN_BYTES {
                Err(KeyError::Short(text.len()))
            } else {
                let secret = text.as_bytes();
                let signing = EncodingKey::from_secret(secret);
                let key = Self::new(Algorithm::HS256, DecodingKey::from_secret(secret), Some(signing));
                Ok(Self { fast_path: HmacFastPath::new(secret), ..key })
            };
        }
        if text.contains("PRIVATE") {
            return Err(KeyError::NotAPublicKey);
        }
        let pem = text.as_bytes();
        let candidates = [
            (Algorithm::RS256, DecodingKey::from_rsa_pem(pem)),
            (Algorithm::ES256, DecodingKey::from_ec_pem(pem)),
            (Algorithm::EdDSA, DecodingKey::from_ed_pem(pem)),
        ];
        let found = candidates.into_iter().find_map(|(algorithm, key)| key.ok().map(|key| (algorithm, key)));
        let (algorithm, verifying) = found.ok_or(KeyError::NotAPublicKey)?;
        Ok(Self::new(algorithm, verifying, None))
    }

    /// Verifies the signature and returns the claims as they stand.
    fn claims(&self, token: &str) -> Result<Box<RawValue>, TokenError> {
        use jsonwebtoken::errors::ErrorKind;
        if let Some(claims) = self.fast_path.as_ref().and_then(|fast_path| fast_path.claims(token)) {
            return Ok(claims);
        }
        if has_critical_extension(token) {
            return Err(TokenError::Bad("the token has a crit header, which names what is not known here"));
        }
        let decoded = jsonwebtoken::decode(token, &self.verifying, &self.validation);
        let data = decoded.map_err(|error| match error.kind() {
            ErrorKind::InvalidSignature => "the token's signature is wrong",
            ErrorKind::InvalidAlgorithm | ErrorKind::InvalidAlgorithmName => {
                "the token's algorithm is not the one of the configured key"
            }
            _ => "this is not a token",
        })?;
        self.fast_path.iter().for_each(|fast_path| fast_path.remember(token));
        Ok(data.claims)
    }
}

impl Auth {
    /// Reads the configured key.
    ///
    /// # Errors
    ///
    /// [`KeyError`] with the remedy.
    pub fn new(config: AuthConfig, clock: Clock) -> Result<Self, KeyError> {
        let keys = Keys::One(Box::new(Key::read(&config.token_key)?));
        Ok(Self { inner: Arc::new(Inner { keys, config, clock, unknown_key: Notify::new() }) })
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

    /// Verifies a token with the key that its `kid` names. A token without `kid` is verified with
    /// the only key there is.
    fn claims(&self, token: &str) -> Result<Box<RawValue>, TokenError> {
        match &self.inner.keys {
            Keys::One(key) => key.claims(token),
            Keys::Fetched(known) => {
                let known = known.read();
                let keys = known.as_ref().ok_or(TokenError::NoKeys)?;
                let header = jsonwebtoken::decode_header(token);
                let kid = header.map_err(|_| TokenError::Bad("this is not a token"))?.kid;
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
        let claims = claims.ok_or("this is not a token")?;
        let expires_at_s = self.check(&claims)?;
        let user = claims.sub.as_ref().and_then(Value::as_str).and_then(|sub| UserId::parse(sub).ok());
        let user = user.ok_or("the token's sub is not a user id")?;
        tracing::debug!(target: WAY, step = 2, %user, "token verified");
        let issued_at_s = issued_at_s(seconds(claims.iat.as_ref())?, self.inner.clock.now())?;
        let claims = Bytes::from(String::from(Box::<str>::from(raw)));
        Ok(Identity { user, issued_at_s, expires_at_s, claims })
    }

    /// Checks the claims. Returns when the token expires.
    fn check(&self, claims: &Claims) -> Result<u64, &'static str> {
        let now_s = self.inner.clock.now().seconds();
        let expires_at_s = seconds(claims.exp.as_ref())?.ok_or("the token has no exp")?;
        if expires_at_s <= now_s {
            return Err("the token has expired");
        }
        if seconds(claims.nbf.as_ref())?.is_some_and(|nbf| nbf > now_s) {
            return Err("the token is not valid yet");
        }
        let config = &self.inner.config;
        let iss = claims.iss.as_ref().and_then(Value::as_str);
        if config.issuer.as_deref().is_some_and(|issuer| iss != Some(issuer)) {
            return Err("the token is of another issuer");
        }
        if config.audience.as_deref().is_some_and(|aud| !is_for(claims.aud.as_ref(), aud)) {
            return Err("the token is for another audience");
        }
        Ok(expires_at_s)
    }

    /// Signs a token for `user` that lives `ttl_s` seconds. Returns it with its expiry.
    ///
    /// # Errors
    ///
    /// [`SigningError`] if only a public key is configured.
    pub fn issue(&self, user: &UserId, ttl_s: u64) -> Result<(String, Millis), SigningError> {
        let Keys::One(key) = &self.inner.keys else { return Err(SigningError) };
        let signing = key.signing.as_ref().ok_or(SigningError)?;
        let now = self.inner.clock.now();
        let exp = now.seconds() + ttl_s;
        let mut claims = serde_json::json!({"sub": user.as_str(), "iat": now.seconds(), "exp": exp});
        let config = &self.inner.config;
        for (name, value) in [("iss", &config.issuer), ("aud", &config.audience)] {
            if let Some(value) = value {
                claims[name] = value.as_str().into();
            }
        }
        let token = jsonwebtoken::encode(&Header::new(Algorithm::HS256), &claims, signing)
            .map_err(|_| SigningError)?;
        Ok((token, Millis(exp * 1000)))
    }

    /// The public keys that verify tokens (RFC 7517); none if the key is a shared secret.
    #[must_use]
    pub fn jwks(&self) -> Value {
        let public = |key: &Key| match key.signing {
            Some(_) => None,
            None => Jwk::from_decoding_key(&key.verifying, Some(key.algorithm)).ok(),
        };
        let keys: Vec<Jwk> = match &self.inner.keys {
            Keys::One(key) => public(key).into_iter().collect(),
            Keys::Fetched(known) => {
                known.read().iter().flatten().filter_map(|(_, key)| public(key)).collect()
            }
        };
        serde_json::json!({ "keys": keys })
    }
}

/// Whether a token's header has `crit`. A verifier that does not know what it names must refuse the
/// token (RFC 7515, section 4.1.11).
fn has_critical_extension(token: &str) -> bool {
    let header = token.split('.').next().and_then(|header| URL_SAFE_NO_PAD.decode(header).ok());
    let header = header.and_then(|header| serde_json::from_slice::<Value>(&header).ok());
    header.is_some_and(|header| header.get("crit").is_some())
}

/// Layers of encoding around a key that are looked through.
const WRAPPINGS: u32 = 3;
/// Length of the shortest public key in DER, in bytes: Ed25519. Random secrets of 32 bytes are
/// shorter.
const DER_MIN_BYTES: usize = 44;

/// The form of a text that is a public key and not a secret. What anybody may have must not sign
/// tokens.
fn disguise(text: &[u8], depth: u32) -> Option<&'static str> {
    let trimmed = text.strip_prefix("\u{feff}".as_bytes()).unwrap_or(text).trim_ascii();
    let has = |word: &str| trimmed.windows(word.len()).any(|window| window == word.as_bytes());
    if has("-----BEGIN") || (has("BEGIN ") && has(" KEY")) {
        return Some("PEM that does not begin with its first line");
    }
    if trimmed.starts_with(b"{") && serde_json::from_slice::<serde_json::Map<String, Value>>(trimmed).is_ok()
    {
        return Some("JSON (a JWK)");
    }
    if ["ssh-", "ecdsa-sha2-", "sk-ssh-"].iter().any(|kind| trimmed.starts_with(kind.as_bytes())) {
        return Some("the form of SSH");
    }
    if is_der(trimmed) {
        return Some("DER");
    }
    if depth == WRAPPINGS {
        return None;
    }
    let one_line: Vec<u8> = trimmed.iter().copied().filter(|byte| !byte.is_ascii_whitespace()).collect();
    let bare = String::from_utf8_lossy(&one_line);
    let bare = bare.trim_end_matches('=');
    let decoded = [STANDARD_NO_PAD.decode(bare).ok(), URL_SAFE_NO_PAD.decode(bare).ok(), from_hex(bare)];
    decoded.iter().flatten().find_map(|inner| disguise(inner, depth + 1)).map(|_| "base64 or hexadecimal")
}

/// Whether these bytes are one SEQUENCE of DER with an INTEGER or another SEQUENCE first, as every
/// form of key and certificate is.
fn is_der(bytes: &[u8]) -> bool {
    let (length, content) = match bytes {
        [0x30, short @ 0..=0x7f, rest @ ..] => (usize::from(*short), rest),
        [0x30, 0x81, one, rest @ ..] => (usize::from(*one), rest),
        [0x30, 0x82, high, low, rest @ ..] => (usize::from(*high) << 8 | usize::from(*low), rest),
        _ => return false,
    };
    bytes.len() >= DER_MIN_BYTES && content.len() == length && matches!(content.first(), Some(0x30 | 0x02))
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    let pair = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    digits.len().is_multiple_of(2).then(|| digits.chunks(2).map(pair).collect()).flatten()
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
        ready(self.verify(&request.token).map_err(|fault| match fault {
            TokenError::NoKeys => PeerError::Unavailable(fault.to_string()),
            TokenError::UnknownKey | TokenError::Bad(_) => PeerError::Unauthorized(fault.to_string()),
        }))
    }
}

#[cfg(test)]
#[path = "auth_tests.rs"]
mod tests;
