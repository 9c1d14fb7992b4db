//! The rules of secrets, and what is shown of the settings in use.

use secrecy::ExposeSecret;
use std::collections::BTreeMap;
use std::path::Path;

use super::RoleName;
use super::api_keys::NamedKey;
use super::keys::{KEYS, Kind};
use super::reader::{Reader, read_secret_file};
use crate::role::auth::TokenKey;

impl Reader {
    pub(super) fn secrets(&mut self, development: bool, roles: &[RoleName]) -> Secrets {
        let secrets = Secrets {
            admin_key: self.text("auth.admin_key"),
            api_keys: self.list("collect.api_keys"),
            named_keys: self.named_keys(),
            peer_secrets: self.peer_secrets(),
        };
        if secrets.api_keys.iter().any(|key| key.is_empty() || !key.bytes().all(|b| b.is_ascii_graphic())) {
            self.faults.push("collect.api_keys: each key is printable ASCII without spaces".to_owned());
        }
        let listed = !self.list("peer.secrets").is_empty();
        let peer_name = if listed { "peer.secrets" } else { "peer.secret" };
        let peers = secrets.peer_secrets.iter().map(|secret| (peer_name, secret));
        let all = secrets.api_keys.iter().map(|key| ("collect.api_keys", key)).chain(peers);
        let all = all.chain([("auth.admin_key", &secrets.admin_key)]);
        if secrets.peer_secrets.iter().any(|secret| listed && secret.is_empty()) {
            self.faults.push("peer.secrets: one of them is empty".to_owned());
        }
        for (name, secret) in all.filter(|(_, secret)| !secret.is_empty()) {
            if secret.len() < SECRET_MIN_BYTES {
                self.faults.push(format!(
                    "{name}: is {} bytes long; at least {SECRET_MIN_BYTES} are needed, or it can be guessed (make one with: \
                     openssl rand -base64 32)",
                    secret.len()
                ));
            }
        }
        if development || self.for_command {
            return secrets;
        }
        let runs = |role| roles.contains(&role);
        let local = self.text("auth.mode") == "local";
        let verifies = runs(RoleName::Auth) || (local && (runs(RoleName::Push) || runs(RoleName::Dispatch)));
        let fetched = local && !self.text("auth.jwks_url").is_empty();
        let no_key = self.token_keys().is_empty() && !fetched;
        let missing = [
            ("auth.token_key", verifies && no_key),
            ("auth.admin_key", runs(RoleName::Auth) && secrets.admin_key.is_empty()),
            (
                "collect.api_keys",
                runs(RoleName::Collect) && secrets.api_keys.is_empty() && secrets.named_keys.is_empty(),
            ),
            // A process with the role auth alone does not ask another auth.
            (
                "peer.secret",
                roles.iter().any(|role| *role != RoleName::Auth) && secrets.peer_secrets.is_empty(),
            ),
        ];
        for (name, missing) in missing {
            if missing {
                let variable = name.to_uppercase().replace('.', "__");
                self.faults.push(format!(
                    "{name}: is required outside development (in the environment: RINGPUSH_{variable}; make one with: openssl \
                     rand -base64 32)"
                ));
            }
        }
        secrets
    }

    /// `peer.secrets`, or `peer.secret` alone. None if neither is set.
    fn peer_secrets(&mut self) -> Vec<String> {
        let (one, several) = (self.text("peer.secret"), self.list("peer.secrets"));
        if !one.is_empty() && !several.is_empty() {
            self.faults.push(
                "peer.secrets: peer.secret stands beside it; put it into peer.secrets, of which the first signs".to_owned(),
            );
        }
        if several.len() > SECRETS_MAX {
            self.faults.push(format!(
                "peer.secrets: has {} secrets; at most {SECRETS_MAX} are allowed",
                several.len()
            ));
        }
        if several.is_empty() && !one.is_empty() { vec![one] } else { several }
    }

    /// `auth.token_keys`, or `auth.token_key` alone. None if neither is set.
    pub(super) fn token_keys(&mut self) -> Vec<TokenKey> {
        let (one, several) = (self.text("auth.token_key"), self.value("auth.token_keys"));
        let Some(toml::Value::Array(entries)) = several else {
            self.fault_once("auth.token_keys: must be a list of tables: [[auth.token_keys]]".to_owned());
            return Vec::new();
        };
        if !one.is_empty() && !entries.is_empty() {
            self.fault_once(
                "auth.token_keys: auth.token_key stands beside it; put it into auth.token_keys, of which the first signs".to_owned(),
            );
        }
        if entries.len() > SECRETS_MAX {
            self.fault_once(format!(
                "auth.token_keys: has {} keys; at most {SECRETS_MAX} are allowed",
                entries.len()
            ));
            return Vec::new();
        }
        if entries.is_empty() {
            let key = TokenKey { key: one.clone().into(), kid: None };
            return if one.is_empty() { Vec::new() } else { vec![key] };
        }
        let keys: Vec<TokenKey> =
            entries.iter().enumerate().filter_map(|(n, entry)| self.listed_token_key(n, entry)).collect();
        let is_public = |key: &TokenKey| key.key.expose_secret().trim_start().starts_with("-----BEGIN");
        if keys.len() > 1
            && let Some(n) = keys.iter().position(|key| key.kid.is_none() && is_public(key))
        {
            // Those who fetch them tell them apart by it alone.
            self.fault_once(format!(
                "auth.token_keys[{n}].kid: is required where a public key stands beside others"
            ));
        }
        let kids: Vec<&String> = keys.iter().filter_map(|key| key.kid.as_ref()).collect();
        if let Some(kid) =
            kids.iter().enumerate().find_map(|(n, kid)| kids[..n].contains(kid).then_some(*kid))
        {
            self.fault_once(format!("auth.token_keys: kid {kid:?} is that of two keys"));
        }
        keys
    }

    fn listed_token_key(&mut self, n: usize, entry: &toml::Value) -> Option<TokenKey> {
        const KNOWN: [&str; 3] = ["key", "key_file", "kid"];
        let at = |field: &str, rule: &str| format!("auth.token_keys[{n}].{field}: {rule}");
        let Some(table) = entry.as_table() else {
            self.fault_once(format!(
                "auth.token_keys[{n}]: must be a table with key or key_file, and perhaps kid"
            ));
            return None;
        };
        for name in table.keys().filter(|name| !KNOWN.contains(&name.as_str())) {
            self.fault_once(at(name, &format!("no such field; there are {}", KNOWN.join(", "))));
        }
        let kid = table.get("kid").map(|kid| kid.as_str().unwrap_or_default());
        if kid.is_some_and(|kid| {
            kid.is_empty() || kid.len() > KID_MAX || !kid.bytes().all(|b| b.is_ascii_graphic())
        }) {
            self.fault_once(at("kid", "must be 1 to 64 printable ASCII characters without spaces"));
        }
        match secret_in(table, "key") {
            Ok(Some(key)) => Some(TokenKey { key: key.into(), kid: kid.map(str::to_owned) }),
            Ok(None) => {
                self.fault_once(at("key", "is required, or key_file"));
                None
            }
            Err((field, why)) => {
                self.fault_once(at(&field, &why));
                None
            }
        }
    }

    /// Rules that are looked at twice report a fault once.
    fn fault_once(&mut self, fault: String) {
        if !self.faults.contains(&fault) {
            self.faults.push(fault);
        }
    }

    pub(super) fn effective(&mut self, development: bool) -> BTreeMap<&'static str, String> {
        KEYS.iter()
            .map(|key| {
                let set = self.values.contains_key(key.name);
                let mut value = self.value(key.name);
                if key.name == "push.origins" && !set && !development {
                    // Outside development nothing is allowed that is not listed.
                    value = Some(toml::Value::Array(Vec::new()));
                }
                let shown = match key.kind {
                    Kind::Secret if value.as_ref().and_then(toml::Value::as_str) == Some("") => {
                        "\"\"".to_owned()
                    }
                    Kind::SecretList | Kind::SecretTables
                        if value.as_ref().and_then(toml::Value::as_array).is_some_and(Vec::is_empty) =>
                    {
                        "[]".to_owned()
                    }
                    Kind::Secret | Kind::SecretList | Kind::SecretTables => "\"(set)\"".to_owned(),
                    _ => value.map_or_else(String::new, |value| without_passwords(&value.to_string())),
                };
                let elsewhere = !development && !set && key.name.ends_with(".listen");
                (key.name, if elsewhere { shown.replace("127.0.0.1", "0.0.0.0") } else { shown })
            })
            .collect()
    }
}

pub(super) struct Secrets {
    pub(super) admin_key: String,
    pub(super) api_keys: Vec<String>,
    pub(super) named_keys: Vec<NamedKey>,
    pub(super) peer_secrets: Vec<String>,
}

/// Most secrets or keys that are valid at the same time: a rotation has two, one that was not
/// finished a few more.
const SECRETS_MAX: usize = 16;
/// Longest `kid`, in bytes.
const KID_MAX: usize = 64;

/// The secret of a table that may have it as `field` or in a file named `field_file`; or which
/// field breaks which rule.
pub(super) fn secret_in(table: &toml::Table, field: &str) -> Result<Option<String>, (String, String)> {
    let file = format!("{field}_file");
    match (table.get(field), table.get(&file)) {
        (Some(_), Some(_)) => Err((file, format!("{field} stands beside it; give one of the two"))),
        (None, None) => Ok(None),
        (Some(secret), None) => {
            let text = secret.as_str().filter(|text| !text.is_empty());
            text.map(|text| Some(text.to_owned()))
                .ok_or_else(|| (field.to_owned(), "must be a string".to_owned()))
        }
        (None, Some(path)) => {
            let Some(path) = path.as_str() else {
                return Err((file, "must be the path of a file".to_owned()));
            };
            match read_secret_file(Path::new(path)) {
                Ok(text) => Ok(Some(text.trim_end_matches(['\r', '\n']).to_owned())),
                Err(why) => Err((file, format!("{path} {why}"))),
            }
        }
    }
}

/// Shortest key or secret, in bytes: the length of the digest. Somebody who sees a ticket can try
/// secrets offline.
pub(super) const SECRET_MIN_BYTES: usize = 32;

/// The text without user and password of every URL in it.
pub(super) fn without_passwords(text: &str) -> String {
    let mut parts = text.split("://");
    let mut shown = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        // A password may contain characters that should be encoded, so everything before the last @
        // is left out.
        let end = part.find(['"', ' ']).unwrap_or(part.len());
        let (url, rest) = part.split_at(end);
        shown.push_str("://");
        match url.rsplit_once('@') {
            Some((_, host)) => shown.push_str(&format!("(set)@{host}{rest}")),
            None => shown.push_str(part),
        }
    }
    shown
}
