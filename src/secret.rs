//! Keys derived from `peer.secret`, each for one use, so that what is made for one use never passes
//! for another.

use std::sync::Arc;

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use hmac::{Hmac, KeyInit, Mac};
use parking_lot::RwLock;
use sha2::Sha256;

/// A key that is ready to sign and verify; it is cloned for each message.
pub type Keyed = Hmac<Sha256>;

/// The key for one use: HMAC-SHA256 of the use's name under the secret that all roles share.
#[must_use]
pub fn derived(peer_secret: &str, usage: &[u8]) -> Keyed {
    let mut derivation = keyed(peer_secret.as_bytes());
    derivation.update(usage);
    keyed(&derivation.finalize().into_bytes())
}

/// The MAC of `text` in base64, as it stands in a URL or a header.
#[must_use]
pub fn mac(key: &Keyed, text: &str) -> String {
    let mut mac = key.clone();
    mac.update(text.as_bytes());
    URL_SAFE_NO_PAD.encode(mac.finalize().into_bytes())
}

/// Whether `given` is the MAC of `text`, in constant time.
#[must_use]
pub fn is_mac(key: &Keyed, text: &str, given: &str) -> bool {
    let Ok(given) = URL_SAFE_NO_PAD.decode(given) else { return false };
    let mut expected = key.clone();
    expected.update(text.as_bytes());
    expected.verify_slice(&given).is_ok()
}

/// The keys for one use, one from each secret that is valid at present. The first signs, and each
/// verifies. Cloned, they are the same keys: what replaces them replaces them everywhere.
#[derive(Clone)]
pub struct SharedKeys {
    usage: &'static [u8],
    keys: Arc<RwLock<Arc<[Keyed]>>>,
}

impl SharedKeys {
    /// The keys for `usage`, derived from these secrets. There is at least one.
    #[must_use]
    pub fn derive(secrets: &[&str], usage: &'static [u8]) -> Self {
        let keys = secrets.iter().map(|secret| derived(secret, usage)).collect();
        Self { usage, keys: Arc::new(RwLock::new(keys)) }
    }

    /// Replaces the secrets.
    pub fn replace(&self, secrets: &[&str]) {
        *self.keys.write() = secrets.iter().map(|secret| derived(secret, self.usage)).collect();
    }

    /// The MAC of `text` under the first key.
    #[must_use]
    pub fn mac(&self, text: &str) -> String {
        let keys = Arc::clone(&self.keys.read());
        keys.first().map_or_else(String::new, |key| mac(key, text))
    }

    /// Whether `given` is the MAC of `text` under one of the keys.
    #[must_use]
    pub fn is_mac(&self, text: &str, given: &str) -> bool {
        let keys = Arc::clone(&self.keys.read());
        keys.iter().any(|key| is_mac(key, text, given))
    }
}

/// The code that opens the page of development. It stays the same as long as the secret does.
#[must_use]
pub fn page_code(peer_secret: &str) -> String {
    let code = derived(peer_secret, b"ringpush development page, version 1").finalize().into_bytes();
    URL_SAFE_NO_PAD.encode(&code[..16])
}

fn keyed(key: &[u8]) -> Keyed {
    // HMAC takes a key of any length; the error exists for other MACs. The fallback key would
    // verify nothing.
    Keyed::new_from_slice(key).unwrap_or_else(|_| Keyed::new(&Default::default()))
}
