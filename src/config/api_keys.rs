//! The rules of `collect.keys`: keys of senders with names, scopes and limits.

use std::collections::HashSet;

use secrecy::{ExposeSecret, SecretString};

use super::reader::Reader;
use super::secrets::{SECRET_MIN_BYTES, secret_in};
use crate::role::collect::{KeyRate, KeySettings, SCOPE_RULE, Scope};

/// Most keys, those of `collect.api_keys` counted; each has metrics of its own.
const KEYS_MAX: usize = 100;
/// Longest name of a key.
const NAME_MAX: usize = 64;

/// An entry of `collect.keys`.
#[derive(Debug, Clone)]
pub struct NamedKey {
    /// What the server knows of it.
    pub settings: KeySettings,
    /// The secret itself, if it is configured; commands publish with it.
    pub secret: Option<SecretString>,
}

/// All keys that may be used at collect: those of `collect.api_keys` have all scopes, and the names
/// `key-1`, `key-2` and so on.
#[must_use]
pub fn all_keys(plain: &[SecretString], named: &[NamedKey]) -> Vec<KeySettings> {
    let plain = plain.iter().enumerate().map(|(n, secret)| KeySettings {
        name: plain_name(n),
        digest: KeySettings::digest_of(secret.expose_secret()),
        scopes: Scope::all(),
        rate: None,
    });
    plain.chain(named.iter().map(|key| key.settings.clone())).collect()
}

/// The name of a key of `collect.api_keys`.
fn plain_name(n: usize) -> String {
    format!("key-{}", n + 1)
}

impl Reader {
    pub(super) fn named_keys(&mut self) -> Vec<NamedKey> {
        let Some(toml::Value::Array(entries)) = self.value("collect.keys") else {
            self.faults.push("collect.keys: must be a list of tables: [[collect.keys]]".to_owned());
            return Vec::new();
        };
        let plain = self.list("collect.api_keys");
        let count = entries.len() + plain.len();
        if count > KEYS_MAX {
            let all = "has, together with collect.api_keys,";
            self.faults.push(format!("collect.keys: {all} {count} keys; at most {KEYS_MAX} are allowed"));
            return Vec::new();
        }
        let mut digests: HashSet<[u8; 32]> = plain.iter().map(|key| KeySettings::digest_of(key)).collect();
        let mut names: HashSet<String> = (0..plain.len()).map(plain_name).collect();
        let mut keys = Vec::with_capacity(entries.len());
        for (n, entry) in entries.iter().enumerate() {
            let Some(table) = entry.as_table() else {
                self.faults.push(format!("collect.keys[{n}]: must be a table with name, secret and scopes"));
                continue;
            };
            let key = self.named_key(n, table);
            if let Some(key) = &key
                && !digests.insert(key.settings.digest)
            {
                let why = "is the secret of another key, which would have its scopes";
                self.faults.push(format!("collect.keys[{n}].secret: {why}"));
            }
            keys.extend(key);
            if let Some(name) = table.get("name").and_then(toml::Value::as_str)
                && !names.insert(name.to_owned())
            {
                self.faults.push(format!("collect.keys[{n}].name: {name:?} is the name of another key"));
            }
        }
        keys
    }

    fn named_key(&mut self, n: usize, table: &toml::Table) -> Option<NamedKey> {
        const KNOWN: [&str; 7] =
            ["name", "secret", "secret_file", "secret_sha256", "scopes", "rate_per_s", "burst"];
        let before = self.faults.len();
        let mut fault =
            |field: &str, rule: &str| self.faults.push(format!("collect.keys[{n}].{field}: {rule}"));
        for name in table.keys().filter(|name| !KNOWN.contains(&name.as_str())) {
            fault(name, &format!("no such field; there are {}", KNOWN.join(", ")));
        }
        let text = |name: &str| table.get(name).and_then(toml::Value::as_str);
        let name = text("name").unwrap_or_default();
        let is_name = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
        if !(1..=NAME_MAX).contains(&name.len()) || !name.bytes().all(is_name) {
            fault("name", "must be 1 to 64 characters of A-Z, a-z, 0-9, '.', '_' and '-'");
        }
        let secret = secret_in(table, "secret");
        let digest = digest_in(table, &secret).map_err(|(field, rule)| fault(&field, &rule)).ok();
        let mut scopes = Vec::new();
        match table.get("scopes").and_then(toml::Value::as_array) {
            Some(all) if !all.is_empty() => {
                for scope in all {
                    let shown = scope.as_str().map_or_else(|| scope.to_string(), str::to_owned);
                    match Scope::parse(&shown) {
                        Some(scope) => scopes.push(scope),
                        None => fault("scopes", &format!("{shown:?} {SCOPE_RULE}")),
                    }
                }
            }
            _ => fault("scopes", "must be a list of scopes, such as [\"publish\"]"),
        }
        let mut number = |name: &str| {
            let value = table.get(name)?;
            let number = value.as_integer().and_then(|n| u32::try_from(n).ok());
            let number = number.filter(|n| (1..=1_000_000).contains(n));
            if number.is_none() {
                fault(name, "must be an integer from 1 to 1000000");
            }
            number
        };
        let (per_s, burst) = (number("rate_per_s"), number("burst"));
        if table.contains_key("burst") && !table.contains_key("rate_per_s") {
            fault("burst", "stands beside rate_per_s");
        }
        if self.faults.len() > before {
            return None;
        }
        let rate = per_s.map(|per_s| KeyRate { per_s, burst: burst.unwrap_or(per_s) });
        let settings = KeySettings { name: name.to_owned(), digest: digest?, scopes, rate };
        Some(NamedKey { settings, secret: secret.ok().flatten().map(SecretString::from) })
    }
}

/// The digest of the secret of a key; or which field breaks which rule.
fn digest_in(
    table: &toml::Table,
    secret: &Result<Option<String>, (String, String)>,
) -> Result<[u8; 32], (String, String)> {
    let make_one = "make one with: openssl rand -base64 32";
    let named = |field: &str, rule: String| Err((field.to_owned(), rule));
    let secret = secret.as_ref().map_err(Clone::clone)?;
    let hex = table.get("secret_sha256").map(|value| value.as_str().unwrap_or_default());
    match (secret, hex) {
        (Some(_), Some(_)) => named("secret_sha256", "give secret or secret_sha256, not both".to_owned()),
        (None, None) => named("secret", format!("is required, or secret_file or secret_sha256 ({make_one})")),
        (Some(secret), None) => {
            if secret.len() >= SECRET_MIN_BYTES && secret.bytes().all(|b| b.is_ascii_graphic()) {
                return Ok(KeySettings::digest_of(secret));
            }
            let rule = "printable ASCII characters without spaces";
            named("secret", format!("must be a string of at least {SECRET_MIN_BYTES} {rule} ({make_one})"))
        }
        (None, Some(hex)) => digest_of_hex(hex).ok_or_else(|| {
            let rule = "must be 64 hexadecimal digits (printf %s SECRET | sha256sum)";
            ("secret_sha256".to_owned(), rule.to_owned())
        }),
    }
}

fn digest_of_hex(text: &str) -> Option<[u8; 32]> {
    let mut digest = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (n, byte) in digest.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(2 * n..2 * n + 2)?, 16).ok()?;
    }
    Some(digest)
}
