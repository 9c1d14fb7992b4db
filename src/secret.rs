//! Keys derived from `peer.secret`, each for one use, so that what is made for one use never passes
//! for another.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use hmac::{Hmac, KeyInit, Mac};
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
