//! The keys of development: made once, kept in `<data>/dev-keys.toml`, readable by their owner alone.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::{Deserialize, Serialize};

use crate::config::Config;

/// The four keys, whether they were configured or made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default)]
pub(super) struct Keys {
    pub(super) token_key: String,
    pub(super) api_key: String,
    pub(super) admin_key: String,
    pub(super) peer_secret: String,
}

impl Keys {
    /// Those of the configuration; in development the others from the file, which is made or completed.
    pub(super) fn of(config: &mut Config) -> Result<Self> {
        let mut keys = Self {
            token_key: config.auth.token_key.clone(),
            api_key: config.api_keys.first().cloned().unwrap_or_default(),
            admin_key: config.admin_key.clone(),
            peer_secret: config.peer_secret.clone(),
        };
        if config.development {
            keys.complete(&config.data_dir)?;
        }
        config.auth.token_key.clone_from(&keys.token_key);
        config.admin_key.clone_from(&keys.admin_key);
        config.peer_secret.clone_from(&keys.peer_secret);
        if config.api_keys.is_empty() && !keys.api_key.is_empty() {
            config.api_keys.push(keys.api_key.clone());
        }
        Ok(keys)
    }

    fn complete(&mut self, data: &Path) -> Result<()> {
        let missing = |keys: &Self| {
            [&keys.token_key, &keys.api_key, &keys.admin_key, &keys.peer_secret]
                .iter()
                .any(|key| key.is_empty())
        };
        if !missing(self) {
            return Ok(());
        }
        let path = data.join("dev-keys.toml");
        let mut kept = read(&path)?;
        let before = kept.clone();
        let fill = |own: &mut String, kept: &mut String, prefix: &str| {
            if own.is_empty() {
                if kept.is_empty() {
                    *kept = make(prefix);
                }
                own.clone_from(kept);
            }
        };
        fill(&mut self.token_key, &mut kept.token_key, "dev-token");
        fill(&mut self.api_key, &mut kept.api_key, "dev-api");
        fill(&mut self.admin_key, &mut kept.admin_key, "dev-admin");
        fill(&mut self.peer_secret, &mut kept.peer_secret, "dev-peer");
        if kept != before {
            write(&path, &kept)?;
        }
        Ok(())
    }
}

/// 32 random bytes behind a name, so that a key found in a log says what it is.
fn make(prefix: &str) -> String {
    let random: [u8; 32] = rand::random();
    format!("{prefix}-{}", URL_SAFE_NO_PAD.encode(random))
}

fn read(path: &PathBuf) -> Result<Keys> {
    match std::fs::read_to_string(path) {
        Ok(text) => toml::from_str(&text).with_context(|| {
            format!(
                "{} is damaged; delete it to have new keys made (tokens made before stop working)",
                path.display()
            )
        }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Keys::default()),
        Err(error) => Err(error).with_context(|| {
            format!("{} cannot be read; choose another directory with --data DIR", path.display())
        }),
    }
}

/// Written aside and renamed, so that no reader sees half of it.
fn write(path: &Path, keys: &Keys) -> Result<()> {
    let problem =
        || format!("{} cannot be written; choose another directory with --data DIR", path.display());
    std::fs::create_dir_all(path.parent().unwrap_or(Path::new("."))).with_context(problem)?;
    let aside = path.with_extension(format!("toml.{}", std::process::id()));
    let text = format!(
        "# Made by ringpush for development on this machine. Not for anything else.\n{}",
        toml::to_string(keys)?
    );
    let mut options = std::fs::OpenOptions::new();
    let mut file =
        options.write(true).create(true).truncate(true).mode(0o600).open(&aside).with_context(problem)?;
    file.write_all(text.as_bytes()).with_context(problem)?;
    std::fs::rename(&aside, path).with_context(problem)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Sources;
    use std::os::unix::fs::PermissionsExt;

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
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let table: toml::Table = std::fs::read_to_string(path).unwrap().parse().unwrap();
        assert_eq!(table["token_key"].as_str(), Some(first.token_key.as_str()));
    }

    #[test]
    fn a_configured_key_is_used_and_not_written() {
        let data = tempfile::tempdir().unwrap();
        let mut configured = config(data.path(), "[collect]\napi_keys = [\"mine\", \"other\"]");
        let keys = Keys::of(&mut configured).unwrap();
        assert_eq!(keys.api_key, "mine");
        assert_eq!(configured.api_keys, ["mine", "other"]);
        let text = std::fs::read_to_string(data.path().join("dev-keys.toml")).unwrap();
        assert!(text.contains("api_key = \"\""), "{text}");
    }
}
