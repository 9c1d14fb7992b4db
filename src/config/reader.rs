//! Reading values from the sources, and collecting faults.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::Read;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::keys::{KEYS, Key, Kind, rule_of};
use super::{Faults, Sources};

/// Variables without the prefix `RINGPUSH_` that are read too.
pub(super) const READ_TOO: [&str; 3] = ["POD_NAME", "POD_IP", "RUST_LOG"];

/// Largest file with secrets, in bytes: 100 keys with names and scopes have a tenth of it.
const SECRET_FILE_MAX: u64 = 256 * 1024;
/// The ranks of the sources: a later one replaces what an earlier one has.
const FILE_RANK: u8 = 0;
const ENVIRONMENT_RANK: u8 = 1;
const COMMAND_LINE_RANK: u8 = 2;
/// How faults name the source of flags.
const COMMAND_LINE: &str = "the command line";

/// The environment as text. A variable that is not UTF-8 is a fault if its name is ours, and is
/// ignored otherwise.
pub(super) fn read_environment(
    all: impl Iterator<Item = (OsString, OsString)>,
) -> Result<Vec<(String, String)>, Faults> {
    let (mut environment, mut faults) = (Vec::new(), Vec::new());
    for (name, value) in all {
        let shown = name.to_string_lossy().into_owned();
        let is_ours = shown.starts_with("RINGPUSH_") || READ_TOO.contains(&shown.as_str());
        match (name.into_string(), value.into_string()) {
            (Ok(name), Ok(value)) => environment.push((name, value)),
            (Err(_), _) if is_ours => faults.push(format!("{shown}: the name of this variable is not UTF-8")),
            (_, Err(_)) if is_ours => {
                faults.push(format!("{shown}: the value of this variable is not UTF-8"))
            }
            _ => {}
        }
    }
    if faults.is_empty() { Ok(environment) } else { Err(Faults(faults)) }
}

/// The values that were found, and the faults.
pub(super) struct Reader {
    pub(super) values: BTreeMap<&'static str, toml::Value>,
    pub(super) faults: Vec<String>,
    /// For the host name and the pod's name.
    pub(super) environment: Vec<(String, String)>,
    pub(super) for_command: bool,
    /// Which source each value came from, as its rank.
    ranks: BTreeMap<&'static str, u8>,
    /// The files of secrets that are to be read, by key.
    files: BTreeMap<&'static str, PathBuf>,
}

impl Reader {
    pub(super) fn collect(sources: &Sources) -> Self {
        let mut reader = Self {
            values: BTreeMap::new(),
            faults: Vec::new(),
            environment: sources.environment.clone(),
            for_command: sources.for_command,
            ranks: BTreeMap::new(),
            files: BTreeMap::new(),
        };
        if let Some((name, text)) = &sources.file {
            reader.take_file(name, text);
        }
        for (name, value) in &sources.environment {
            reader.take_variable(name, value);
        }
        for (name, value) in &sources.flags {
            reader.take_text(name, value, COMMAND_LINE);
        }
        reader.read_secret_files();
        reader
    }

    pub(super) fn take_file(&mut self, file: &str, text: &str) {
        let table: toml::Table = match text.parse() {
            Ok(table) => table,
            Err(error) => {
                // The parser's own text quotes the line, which may contain a key.
                let before =
                    error.span().map_or(0, |span| text[..span.start.min(text.len())].matches('\n').count());
                return self.faults.push(format!(
                    "{file}: is not TOML: line {}: {}",
                    before + 1,
                    error.message()
                ));
            }
        };
        for (section, value) in table {
            match value {
                toml::Value::Table(entries) => {
                    if entries.is_empty()
                        && !KEYS.iter().any(|key| key.name.split('.').next() == Some(&section))
                    {
                        self.unknown(&section, file);
                    }
                    for (name, value) in entries {
                        self.take_entry(&format!("{section}.{name}"), value, file);
                    }
                }
                value => self.take(&section, value, file),
            }
        }
    }

    /// Takes an entry of a section, which may be a section itself, such as `push.tls`.
    fn take_entry(&mut self, name: &str, value: toml::Value, from: &str) {
        let beneath = format!("{name}.");
        match value {
            toml::Value::Table(entries) if KEYS.iter().any(|key| key.name.starts_with(&beneath)) => {
                for (inner, value) in entries {
                    self.take(&format!("{beneath}{inner}"), value, from);
                }
            }
            value => self.take(name, value, from),
        }
    }

    pub(super) fn take(&mut self, name: &str, value: toml::Value, from: &str) {
        match (KEYS.iter().find(|key| key.name == name), secret_of_file(name), value) {
            (Some(key), _, value) => self.place(key, FILE_RANK, value),
            (None, Some(key), toml::Value::String(path)) => self.place_file(key, FILE_RANK, &path),
            (None, Some(_), _) => self.faults.push(format!("{name}: must be the path of a file")),
            (None, None, _) => self.unknown(name, from),
        }
    }

    /// Keeps a value; a source of a higher rank replaces what another has, also the file of the
    /// secret.
    fn place(&mut self, key: &'static Key, rank: u8, value: toml::Value) {
        if self.files.contains_key(key.name) && self.ranks.get(key.name) == Some(&rank) {
            self.both(key);
        }
        self.files.remove(key.name);
        self.ranks.insert(key.name, rank);
        self.values.insert(key.name, value);
    }

    fn place_file(&mut self, key: &'static Key, rank: u8, path: &str) {
        if self.values.contains_key(key.name) && self.ranks.get(key.name) == Some(&rank) {
            self.both(key);
        }
        self.values.remove(key.name);
        self.ranks.insert(key.name, rank);
        self.files.insert(key.name, PathBuf::from(path));
    }

    fn both(&mut self, key: &Key) {
        let name = key.name;
        self.faults.push(format!("{name}_file: {name} stands beside it; give one of the two"));
    }

    /// Whether one of the roles of this process uses this secret. One file of configuration may
    /// serve all processes, and the secrets of other roles need not be there.
    fn is_needed(&self, name: &str) -> bool {
        let Some(toml::Value::Array(roles)) = self.values.get("node.roles") else { return true };
        let runs = |role: &str| roles.iter().any(|one| one.as_str().is_some_and(|one| one.trim() == role));
        match name {
            "auth.admin_key" => runs("auth"),
            "auth.token_key" | "auth.token_keys" => runs("auth") || runs("push") || runs("dispatch"),
            "collect.api_keys" | "collect.keys" => runs("collect"),
            "peer.secret" | "peer.secrets" => runs("push") || runs("collect") || runs("dispatch"),
            _ => true,
        }
    }

    /// Reads the secrets that stand in files of their own.
    fn read_secret_files(&mut self) {
        for (name, path) in std::mem::take(&mut self.files) {
            let Some(key) = KEYS.iter().find(|key| key.name == name) else { continue };
            let read = read_secret_file(&path).and_then(|text| {
                let value = match key.kind {
                    Kind::SecretList => lines_of(&text),
                    Kind::SecretTables => tables_of(&text),
                    _ => Some(toml::Value::String(text.trim_end_matches(['\r', '\n']).to_owned())),
                };
                value.ok_or_else(|| match key.kind {
                    Kind::SecretTables => "holds no JSON array of objects".to_owned(),
                    _ => "holds no list: one secret in each line, or a JSON array".to_owned(),
                })
            });
            match read {
                Ok(value) => drop(self.values.insert(key.name, value)),
                Err(_) if !self.is_needed(name) => {}
                Err(why) => self.faults.push(format!("{name}_file: {} {why}", path.display())),
            }
        }
    }

    pub(super) fn unknown(&mut self, name: &str, from: &str) {
        let nearest = KEYS
            .iter()
            .map(|key| key.name)
            .max_by(|a, b| strsim::jaro_winkler(a, name).total_cmp(&strsim::jaro_winkler(b, name)));
        let nearest = nearest.map_or(String::new(), |key| format!("; did you mean {key}?"));
        self.faults.push(format!("{name}: no such key (in {from}){nearest}"));
    }

    /// Reads `RINGPUSH_SECTION__KEY`. Names without the double underscore are not ours; Kubernetes
    /// injects such.
    pub(super) fn take_variable(&mut self, name: &str, value: &str) {
        if let Some(rest) = name.strip_prefix("RINGPUSH_")
            && rest.contains("__")
        {
            let key = rest.to_lowercase().replace("__", ".");
            match (KEYS.iter().find(|known| known.name == key), secret_of_file(&key)) {
                (Some(known), _) => self.take_text(known.name, value, name),
                (None, Some(known)) => self.place_file(known, ENVIRONMENT_RANK, value),
                (None, None) => self.unknown(&key, name),
            }
        }
    }

    pub(super) fn take_text(&mut self, name: &'static str, text: &str, from: &str) {
        let Some(key) = KEYS.iter().find(|key| key.name == name) else { return };
        let value = match key.kind {
            Kind::Text | Kind::Secret => Some(toml::Value::String(text.to_owned())),
            Kind::List | Kind::SecretList => list_of(text),
            Kind::SecretTables => tables_of(text),
            Kind::Number => text.trim().parse().ok().map(toml::Value::Integer),
            Kind::Fraction => text.trim().parse().ok().map(toml::Value::Float),
            Kind::Switch => text.trim().parse().ok().map(toml::Value::Boolean),
        };
        match value {
            Some(value) if from == COMMAND_LINE => self.place(key, COMMAND_LINE_RANK, value),
            Some(value) => self.place(key, ENVIRONMENT_RANK, value),
            None if key.kind.is_secret() => {
                self.faults.push(format!("{name}: (from {from}) {}", rule_of(key.kind)));
            }
            None => self.faults.push(format!("{name}: {text:?} (from {from}) {}", rule_of(key.kind))),
        }
    }

    pub(super) fn value(&mut self, name: &'static str) -> Option<toml::Value> {
        if let Some(value) = self.values.get(name) {
            return Some(value.clone());
        }
        let default = KEYS.iter().find(|key| key.name == name)?.default;
        format!("v = {default}").parse::<toml::Table>().ok()?.remove("v")
    }

    pub(super) fn wrong<T>(&mut self, name: &'static str, kind: Kind) -> Option<T> {
        self.faults.push(format!("{name}: {}", rule_of(kind)));
        None
    }

    pub(super) fn text(&mut self, name: &'static str) -> String {
        match self.value(name) {
            Some(toml::Value::String(text)) => text,
            _ => self.wrong(name, Kind::Text).unwrap_or_default(),
        }
    }

    pub(super) fn list(&mut self, name: &'static str) -> Vec<String> {
        let items = match self.value(name) {
            Some(toml::Value::Array(items)) => items,
            _ => return self.wrong(name, Kind::List).unwrap_or_default(),
        };
        let texts: Option<Vec<String>> = items.iter().map(|item| item.as_str().map(str::to_owned)).collect();
        texts.or_else(|| self.wrong(name, Kind::List)).unwrap_or_default()
    }

    pub(super) fn number(&mut self, name: &'static str, range: std::ops::RangeInclusive<u64>) -> u64 {
        match self.value(name) {
            Some(toml::Value::Integer(n)) if u64::try_from(n).is_ok_and(|n| range.contains(&n)) => {
                n.unsigned_abs()
            }
            _ => {
                self.faults.push(format!(
                    "{name}: must be an integer from {} to {}",
                    range.start(),
                    range.end()
                ));
                *range.start()
            }
        }
    }

    pub(super) fn millis(&mut self, name: &'static str, range: std::ops::RangeInclusive<u64>) -> Duration {
        Duration::from_millis(self.number(name, range))
    }

    pub(super) fn address(&mut self, name: &'static str, development: bool) -> SocketAddr {
        let mut text = self.text(name);
        if !development && !self.values.contains_key(name) {
            text = text.replace("127.0.0.1", "0.0.0.0");
        }
        text.parse().unwrap_or_else(|_| {
            self.faults
                .push(format!("{name}: {text:?} must be address:port, such as 127.0.0.1:8080 or [::]:8080"));
            SocketAddr::from(([127, 0, 0, 1], 0))
        })
    }
}

/// The key whose secret the file named by `name` holds: `peer.secret_file` is that of
/// `peer.secret`.
fn secret_of_file(name: &str) -> Option<&'static Key> {
    let secret = name.strip_suffix("_file")?;
    KEYS.iter().find(|key| key.kind.is_secret() && key.name == secret)
}

/// Reads a file with a secret. An error says what is wrong with the file.
pub(super) fn read_secret_file(path: &Path) -> Result<String, String> {
    let mut text = String::new();
    let read = std::fs::File::open(path)
        .and_then(|file| file.take(SECRET_FILE_MAX + 1).read_to_string(&mut text))
        .map_err(|error| format!("cannot be read: {error}"))?;
    if read as u64 > SECRET_FILE_MAX {
        return Err(format!("is larger than {SECRET_FILE_MAX} bytes"));
    }
    if text.trim().is_empty() {
        return Err("is empty".to_owned());
    }
    Ok(text)
}

/// A JSON array, or one secret in each line.
fn lines_of(text: &str) -> Option<toml::Value> {
    if text.trim_start().starts_with('[') {
        return list_of(text);
    }
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    Some(toml::Value::Array(lines.map(|line| toml::Value::String(line.to_owned())).collect()))
}

/// A JSON array of objects.
fn tables_of(text: &str) -> Option<toml::Value> {
    let value: serde_json::Value = serde_json::from_str(text).ok()?;
    let all = value.as_array()?;
    if !all.iter().all(serde_json::Value::is_object) {
        return None;
    }
    toml::Value::try_from(all).ok()
}

/// A JSON array, or values separated by commas.
pub(super) fn list_of(text: &str) -> Option<toml::Value> {
    let items: Vec<String> = if text.trim_start().starts_with('[') {
        serde_json::from_str(text).ok()?
    } else {
        text.split(',').map(str::trim).filter(|item| !item.is_empty()).map(str::to_owned).collect()
    };
    Some(toml::Value::Array(items.into_iter().map(toml::Value::String).collect()))
}
