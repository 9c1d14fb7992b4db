//! The keys that verify tokens, and how they are read.

use std::sync::OnceLock;

use base64::Engine;
use base64::engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD};
use hmac::{Hmac, KeyInit, Mac};
use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, KeyOperations, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Validation};
use serde_json::Value;
use serde_json::value::RawValue;
use sha2::Sha256;

use super::TokenError;

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

pub(super) struct Key {
    pub(super) algorithm: Algorithm,
    pub(super) verifying: DecodingKey,
    pub(super) validation: Validation,
    pub(super) fast_path: Option<HmacFastPath>,
    /// Set only if the key is a shared secret.
    pub(super) signing: Option<EncodingKey>,
}

/// A fast path for HS256: a precomputed HMAC key, used only for tokens whose header is
/// byte-identical to one that `jsonwebtoken` has accepted. Everything else goes to the library. It
/// halves the cost of a token (docs/benchmarks/log.md).
pub(super) struct HmacFastPath {
    pub(super) keyed: Hmac<Sha256>,
    /// The header of a token that the library has accepted. The tokens of one issuer have the same
    /// header.
    pub(super) header: OnceLock<Box<str>>,
}

impl HmacFastPath {
    pub(super) fn new(secret: &[u8]) -> Option<Self> {
        Some(Self { keyed: Hmac::new_from_slice(secret).ok()?, header: OnceLock::new() })
    }

    /// The claims of a token with that header and a good signature; `None` sends the token to the
    /// library.
    pub(super) fn claims(&self, token: &str) -> Option<Box<RawValue>> {
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

    pub(super) fn remember(&self, token: &str) {
        if let Some((header, _)) = token.split_once('.') {
            let _ = self.header.set(header.into());
        }
    }
}

impl Key {
    pub(super) fn new(algorithm: Algorithm, verifying: DecodingKey, signing: Option<EncodingKey>) -> Self {
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
    pub(super) fn of_jwk(jwk: &Jwk) -> Option<Self> {
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

    pub(super) fn read(text: &str) -> Result<Self, KeyError> {
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
    pub(super) fn claims(&self, token: &str) -> Result<Box<RawValue>, TokenError> {
        use jsonwebtoken::errors::ErrorKind;
        if let Some(claims) = self.fast_path.as_ref().and_then(|fast_path| fast_path.claims(token)) {
            return Ok(claims);
        }
        if has_critical_extension(token) {
            return Err(TokenError::Bad("the token has a crit header, which names what is not known here"));
        }
        let decoded = jsonwebtoken::decode(token, &self.verifying, &self.validation);
        let data = decoded.map_err(|error| match error.kind() {
            ErrorKind::InvalidSignature => TokenError::Bad("the token's signature is wrong"),
            ErrorKind::InvalidAlgorithm | ErrorKind::InvalidAlgorithmName => {
                TokenError::Bad("the token's algorithm is not the one of the configured key")
            }
            _ => TokenError::Malformed,
        })?;
        self.fast_path.iter().for_each(|fast_path| fast_path.remember(token));
        Ok(data.claims)
    }
}

/// Whether a token's header has `crit`. A verifier that does not know what it names must refuse the
/// token (RFC 7515, section 4.1.11).
pub(super) fn has_critical_extension(token: &str) -> bool {
    let header = token.split('.').next().and_then(|header| URL_SAFE_NO_PAD.decode(header).ok());
    let header = header.and_then(|header| serde_json::from_slice::<Value>(&header).ok());
    header.is_some_and(|header| header.get("crit").is_some())
}

/// Layers of encoding around a key that are looked through.
pub(super) const WRAPPINGS: u32 = 3;

/// Length of the shortest public key in DER, in bytes: Ed25519. Random secrets of 32 bytes are
/// shorter.
pub(super) const DER_MIN_BYTES: usize = 44;

/// The form of a text that is a public key and not a secret. What anybody may have must not sign
/// tokens.
pub(super) fn disguise(text: &[u8], depth: u32) -> Option<&'static str> {
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
pub(super) fn is_der(bytes: &[u8]) -> bool {
    let (length, content) = match bytes {
        [0x30, short @ 0..=0x7f, rest @ ..] => (usize::from(*short), rest),
        [0x30, 0x81, one, rest @ ..] => (usize::from(*one), rest),
        [0x30, 0x82, high, low, rest @ ..] => (usize::from(*high) << 8 | usize::from(*low), rest),
        _ => return false,
    };
    bytes.len() >= DER_MIN_BYTES && content.len() == length && matches!(content.first(), Some(0x30 | 0x02))
}

pub(super) fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    let pair = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    digits.len().is_multiple_of(2).then(|| digits.chunks(2).map(pair).collect()).flatten()
}

/// Shortest HS256 secret, in bytes: the length of the digest (RFC 7518, section 3.2).
pub const SECRET_MIN_BYTES: usize = 32;
