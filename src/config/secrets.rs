//! The rules of secrets, and what is shown of the settings in use.

use std::collections::BTreeMap;

use super::RoleName;
use super::api_keys::NamedKey;
use super::keys::{KEYS, Kind};
use super::reader::Reader;

impl Reader {
    pub(super) fn secrets(&mut self, development: bool, roles: &[RoleName]) -> Secrets {
        let secrets = Secrets {
            admin_key: self.text("auth.admin_key"),
            api_keys: self.list("collect.api_keys"),
            named_keys: self.named_keys(),
            peer_secret: self.text("peer.secret"),
        };
        if secrets.api_keys.iter().any(|key| key.is_empty() || !key.bytes().all(|b| b.is_ascii_graphic())) {
            self.faults.push("collect.api_keys: each key is printable ASCII without spaces".to_owned());
        }
        let admin = [("auth.admin_key", &secrets.admin_key), ("peer.secret", &secrets.peer_secret)];
        let all = secrets.api_keys.iter().map(|key| ("collect.api_keys", key)).chain(admin);
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
        let no_key = self.text("auth.token_key").is_empty() && !fetched;
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
                roles.iter().any(|role| *role != RoleName::Auth) && secrets.peer_secret.is_empty(),
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
    pub(super) peer_secret: String,
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
