//! The keys of development: made once, kept in `<data>/dev-keys.toml`, readable only by their
//! owner.

use std::fs::Permissions;
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::{Deserialize, Serialize};

use crate::config::{Config, NamedKey, VerifyBy};
use crate::role::collect::Scope;
use secrecy::{ExposeSecret, SecretString};

/// The four keys, configured or made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default)]
pub(crate) struct Keys {
    pub(crate) token_key: String,
    pub(crate) api_key: String,
    pub(crate) admin_key: String,
    pub(crate) peer_secret: String,
    /// Whether none of them was configured.
    #[serde(skip)]
    pub(crate) self_made: bool,
}

/// The secret of the first of `collect.keys` that publishes to anybody, if it is configured.
fn named_secret(config: &Config) -> Option<&SecretString> {
    let publishes = |key: &&NamedKey| key.settings.scopes.contains(&Scope::Publish);
    config.named_keys.iter().filter(publishes).find_map(|key| key.secret.as_ref())
}

impl Keys {
    /// The keys of the configuration. In development the missing ones come from the file, which is
    /// created or completed.
    pub(crate) fn of(config: &mut Config) -> Result<Self> {
        Self::with(config, |_| false)
    }

    /// The same for a command, which needs some of them: nothing is made where those that are
    /// configured are enough, so that the command runs where it may not write.
    pub(crate) fn with(config: &mut Config, is_enough: impl Fn(&Self) -> bool) -> Result<Self> {
        let text = |secret: &SecretString| secret.expose_secret().to_owned();
        let mut keys = Self {
            token_key: config.auth.token_keys.first().map(|first| text(&first.key)).unwrap_or_default(),
            api_key: config.api_keys.first().or_else(|| named_secret(config)).map(text).unwrap_or_default(),
            admin_key: text(&config.admin_key),
            peer_secret: config.peer_secrets.first().map(text).unwrap_or_default(),
            self_made: false,
        };
        keys.self_made = config.development && keys == Self::default();
        if config.development && !is_enough(&keys) {
            keys.complete(&config.data_dir)?;
        }
        if matches!(config.verify_by, VerifyBy::Jwks(_)) && config.auth.token_keys.is_empty() {
            // The tokens are another issuer's: one of ours would be refused everywhere.
            keys.token_key.clear();
        }
        if config.auth.token_keys.is_empty() && !keys.token_key.is_empty() {
            config.auth.token_keys.push(keys.token_key.as_str().into());
        }
        config.admin_key = keys.admin_key.as_str().into();
        if config.peer_secrets.is_empty() && !keys.peer_secret.is_empty() {
            config.peer_secrets.push(keys.peer_secret.as_str().into());
        }
        if config.api_keys.is_empty() && config.named_keys.is_empty() && !keys.api_key.is_empty() {
            config.api_keys.push(keys.api_key.as_str().into());
        }
        Ok(keys)
    }

    /// The keys as the greeting shows them. Configured keys belong to somebody and must not appear
    /// in a log.
    pub(crate) fn to_show(&self) -> Self {
        let shown = |own: &str, name: &str| {
            if own.starts_with(name) { own.to_owned() } else { "(configured)".to_owned() }
        };
        Self {
            token_key: shown(&self.token_key, TOKEN),
            api_key: shown(&self.api_key, API),
            admin_key: shown(&self.admin_key, ADMIN),
            peer_secret: shown(&self.peer_secret, PEER),
            self_made: self.self_made,
        }
    }

    fn complete(&mut self, data: &Path) -> Result<()> {
        let path = data.join("dev-keys.toml");
        let given = self.clone();
        loop {
            let found = read(&path)?;
            let fresh = found.is_none();
            let mut kept = found.unwrap_or_default();
            let before = kept.clone();
            *self = given.clone();
            let fill = |own: &mut String, kept: &mut String, prefix: &str| {
                if own.is_empty() {
                    if kept.is_empty() {
                        *kept = make(prefix);
                    }
                    own.clone_from(kept);
                }
            };
            fill(&mut self.token_key, &mut kept.token_key, TOKEN);
            fill(&mut self.api_key, &mut kept.api_key, API);
            fill(&mut self.admin_key, &mut kept.admin_key, ADMIN);
            fill(&mut self.peer_secret, &mut kept.peer_secret, PEER);
            // Of two processes that start at once, the second uses what the first has made.
            if kept == before || write(&path, &kept, fresh)? {
                return Ok(());
            }
        }
    }
}

const TOKEN: &str = "dev-token-";
const API: &str = "dev-api-";
const ADMIN: &str = "dev-admin-";
const PEER: &str = "dev-peer-";

/// 32 random bytes behind a name, so that a key that is found in a log says what it is.
fn make(prefix: &str) -> String {
    let random: [u8; 32] = rand::random();
    format!("{prefix}{}", URL_SAFE_NO_PAD.encode(random))
}

fn read(path: &Path) -> Result<Option<Keys>> {
    if let Ok(about) = std::fs::metadata(path)
        && about.permissions().mode() & 0o077 != 0
    {
        let shown = path.display();
        let tightened = std::fs::set_permissions(path, Permissions::from_mode(0o600));
        tightened
            .with_context(|| format!("{shown} can be read by others; make it yours alone (chmod 600)"))?;
        tracing::warn!(
            "{shown} could be read by others of this machine, and no longer can: delete it to have new keys made"
        );
    }
    match std::fs::read_to_string(path) {
        Ok(text) => toml::from_str(&text).map(Some).map_err(|_| {
            anyhow!(
                "{} is damaged; delete it to have new keys made (tokens made before stop working)",
                path.display()
            )
        }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| {
            format!("{} cannot be read; choose another directory with --data DIR", path.display())
        }),
    }
}

/// Writes the file aside and renames it, so that no reader sees half of it. A `fresh` file does not
/// replace one that another process has made meanwhile; then this returns false.
fn write(path: &Path, keys: &Keys, fresh: bool) -> Result<bool> {
    let problem =
        || format!("{} cannot be written; choose another directory with --data DIR", path.display());
    std::fs::create_dir_all(path.parent().unwrap_or(Path::new("."))).with_context(problem)?;
    let aside = path.with_extension(format!("toml.{:016x}", rand::random::<u64>()));
    let text = format!(
        "# Made by ringpush for development on this machine. Not for anything else.\n{}",
        toml::to_string(keys)?
    );
    let mut options = std::fs::OpenOptions::new();
    let mut file =
        options.write(true).create(true).truncate(true).mode(0o600).open(&aside).with_context(problem)?;
    file.write_all(text.as_bytes()).with_context(problem)?;
    if !fresh {
        return std::fs::rename(&aside, path).map(|()| true).with_context(problem);
    }
    let placed = std::fs::hard_link(&aside, path);
    let _ = std::fs::remove_file(&aside);
    match placed {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(false),
        placed => placed.map(|()| true).with_context(problem),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Sources;

    fn config(data: &Path, file: &str) -> Config {
        let text = format!("{file}\n[data]\ndir = \"{}\"", data.display());
        Config::load(&Sources { file: Some(("t".into(), text)), ..Sources::default() }).unwrap()
    }

    #[test]
    fn keys_are_made_once_and_kept_to_their_owner() {
        let data = tempfile::tempdir().unwrap();
        let first = Keys::of(&mut config(data.path(), "")).unwrap();
        assert_eq!(Keys::of(&mut config(data.path(), "")).unwrap(), first);
        assert!(first.token_key.len() >= 32 && first.api_key != first.admin_key);
        let path = data.path().join("dev-keys.toml");
        let mode = || std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(), 0o600);
        std::fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        assert_eq!(Keys::of(&mut config(data.path(), "")).unwrap(), first);
        assert_eq!(mode(), 0o600, "tightened");
        let table: toml::Table = std::fs::read_to_string(&path).unwrap().parse().unwrap();
        assert_eq!(table["token_key"].as_str(), Some(first.token_key.as_str()));
    }

    #[test]
    fn of_many_that_start_at_once_all_have_the_same_keys() {
        let data = tempfile::tempdir().unwrap();
        let start = std::sync::Barrier::new(8);
        let all: Vec<Keys> = std::thread::scope(|scope| {
            let starting: Vec<_> = (0..8)
                .map(|_| {
                    scope.spawn(|| {
                        start.wait();
                        Keys::of(&mut config(data.path(), "")).unwrap()
                    })
                })
                .collect();
            starting.into_iter().map(|one| one.join().unwrap()).collect()
        });
        assert!(all.windows(2).all(|pair| pair[0] == pair[1]));
    }

    const MINE: [&str; 2] = ["a-key-of-mine-with-32-bytes-in-it", "another-one-with-at-least-32-bytes"];

    #[test]
    fn a_configured_key_is_used_and_not_written() {
        let data = tempfile::tempdir().unwrap();
        let mut configured = config(
            data.path(),
            "[collect]\napi_keys = [\"a-key-of-mine-with-32-bytes-in-it\", \"another-one-with-at-least-32-bytes\"]",
        );
        let keys = Keys::of(&mut configured).unwrap();
        assert_eq!(keys.api_key, MINE[0]);
        assert_eq!(keys.to_show().api_key, "(configured)");
        assert_eq!(keys.to_show().admin_key, keys.admin_key);
        assert_eq!(configured.api_keys.iter().map(|key| key.expose_secret()).collect::<Vec<_>>(), MINE);
        let text = std::fs::read_to_string(data.path().join("dev-keys.toml")).unwrap();
        assert!(text.contains("api_key = \"\""), "{text}");
    }
}
