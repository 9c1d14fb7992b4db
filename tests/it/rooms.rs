//! The house keeps its order: arrows point down only, and each foreign crate has one door.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Each room with the rooms that it may know. `app` and `main` may know all.
const MAY_KNOW: &[(&str, &[&str])] = &[
    // Tier 0: pure. `message`, `topic`, `trace`, `watching`, `backoff` and most of `wire` are the
    // crate `ringpush-protocol`.
    ("ring", &[]),
    ("redis_url", &[]),
    ("wire", &["message", "trace"]),
    ("secret", &[]),
    ("ticket", &["message", "watching", "secret"]),
    ("peer_proof", &["message", "secret"]),
    ("session", &["message", "wire"]),
    // For tests alone: visits every state of a model.
    ("explorer", &[]),
    // Tier 1: one door per foreign system.
    ("clock", &["message"]),
    ("telemetry", &[]),
    ("live", &[]),
    ("library", &[]),
    ("tasks", &[]),
    ("membership", &["message", "ring", "clock", "backoff", "wire", "transport", "peer_proof"]),
    ("fallback", &["message", "clock", "backoff", "transport"]),
    ("interest", &["message", "backoff", "transport", "explorer"]),
    ("colleagues", &["message", "backoff", "transport", "peer_proof"]),
    ("inbox", &["message", "topic", "trace", "clock", "backoff", "tasks", "explorer"]),
    ("transport", &["wire", "redis_url"]),
    // Tier 2: what should happen. A role knows users, not sockets: it does not know transport.
    (
        "role",
        &[
            "message",
            "topic",
            "trace",
            "watching",
            "ring",
            "backoff",
            "wire",
            "ticket",
            "session",
            "clock",
            "live",
            "telemetry",
            "tasks",
            "membership",
            "fallback",
            "interest",
            "colleagues",
            "inbox",
        ],
    ),
    // Tier 3: assembly. Configuration composes, and starts nothing.
    ("config", &["message", "topic", "clock", "role", "wire", "redis_url", "telemetry"]),
];

/// Foreign crates and the only places that may name them.
const DOORS: &[(&str, &[&str])] = &[
    ("hashring", &["ring.rs"]),
    ("fjall", &["inbox/embedded/"]),
    ("redis", &["transport/redis.rs"]),
    ("rustls", &["transport/tls.rs", "transport/tls/"]),
    ("tokio_rustls", &["transport/tls.rs", "transport/lazy_stream.rs", "transport/peer.rs"]),
    ("x509_parser", &["transport/tls.rs"]),
    ("mongodb", &["inbox/mongo/"]),
    ("tonic", &["transport/peer.rs", "transport/peer/", "app/collect_grpc.rs", "app/serve.rs"]),
    ("tokio_tungstenite", &["transport/websocket.rs", "transport/websocket/"]),
    ("hyper_util", &["transport/"]),
    ("jsonwebtoken", &["role/auth/"]),
    ("prometheus_client", &["telemetry.rs", "telemetry/", "role/"]),
    ("clap", &["cli/options.rs", "main.rs"]),
    ("axum", &["app/"]),
    ("toml", &["config/", "app/keys.rs"]),
    ("anyhow", &["app/", "cli/", "main.rs", "telemetry.rs"]),
    ("indicatif", &["cli/publish.rs"]),
];

fn sources() -> BTreeMap<PathBuf, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = BTreeMap::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                found.insert(path.strip_prefix(&root).unwrap().to_owned(), text);
            }
        }
    }
    assert!(found.len() > 20, "the sources were not found");
    found
}

/// `role/push/mod.rs` -> `role`, `session/tests.rs` -> `session`.
fn room(path: &Path) -> String {
    let first = path.components().next().unwrap().as_os_str().to_str().unwrap();
    first.trim_end_matches(".rs").to_owned()
}

/// Code without comments; tests of a room may look where they like.
fn code(text: &str) -> impl Iterator<Item = &str> {
    let end = text.find("#[cfg(test)]\nmod tests {").unwrap_or(text.len());
    text[..end].lines().filter(|line| !line.trim_start().starts_with("//"))
}

#[test]
fn arrows_point_down_only() {
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        let own = room(&path);
        if ["app", "cli", "main", "lib"].contains(&own.as_str()) || path.ends_with("tests.rs") {
            continue;
        }
        let Some((_, allowed)) = MAY_KNOW.iter().find(|(name, _)| *name == own) else {
            wrong.push(format!("{}: {own} is no room: MAY_KNOW in this file lists them", path.display()));
            continue;
        };
        for line in code(&text) {
            for known in line.split("crate::").skip(1) {
                let named: String = known.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                if !named.is_empty() && named != own && !allowed.contains(&named.as_str()) {
                    wrong.push(format!("{}: {own} must not know {named}: {}", path.display(), line.trim()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn roles_do_not_know_one_another() {
    const ROLES: [&str; 4] = ["auth", "collect", "dispatch", "push"];
    for (path, text) in sources().into_iter().filter(|(path, _)| path.starts_with("role")) {
        let name = path.to_str().unwrap().trim_start_matches("role/");
        let own = name.split(['/', '.']).next().unwrap();
        for other in ROLES.iter().filter(|role| **role != own && own != "mod") {
            for line in code(&text) {
                for arrow in [format!("role::{other}"), format!("super::{other}::")] {
                    assert!(
                        !line.contains(&arrow),
                        "{}: {own} must not know {other}: {line}",
                        path.display()
                    );
                }
            }
        }
    }
}

#[test]
fn each_foreign_crate_has_its_door() {
    for (path, text) in sources() {
        let shown = path.to_str().unwrap();
        for (foreign, doors) in DOORS {
            let named = code(&text).any(|line| {
                line.split(|c: char| !(c.is_alphanumeric() || c == '_' || c == ':')).any(|word| {
                    word.starts_with(&format!("{foreign}::")) || word == *foreign && line.contains("use ")
                })
            });
            let open = doors.iter().any(|door| shown.starts_with(door));
            assert!(!named || open, "{shown} names {foreign}, whose door is {doors:?}");
        }
    }
}

#[test]
fn pure_rooms_have_no_clock_no_tasks_and_no_io() {
    const TIER_0: [&str; 7] = ["ring", "redis_url", "wire", "secret", "ticket", "peer_proof", "session"];
    let own = sources().into_iter().filter(|(path, _)| TIER_0.contains(&room(path).as_str()));
    let protocol = all_sources().into_iter().filter(|(path, _)| path.starts_with("crates/protocol"));
    for (path, text) in own.chain(protocol) {
        for line in code(&text) {
            for word in [
                "tokio",
                "async ",
                ".await",
                "std::fs",
                "std::net",
                "Instant::now",
                "rand::rng",
                "rand::random",
            ] {
                assert!(!line.contains(word), "{}: a pure room has no {word}: {line}", path.display());
            }
        }
    }
}

#[test]
fn every_dependency_has_its_reason() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let reasons = std::fs::read_to_string(root.join("docs/dependencies.md")).unwrap();
    let mut manifests = vec![root.join("Cargo.toml")];
    for entry in std::fs::read_dir(root.join("crates")).unwrap() {
        manifests.push(entry.unwrap().path().join("Cargo.toml"));
    }
    for path in manifests {
        let manifest: toml::Table = std::fs::read_to_string(path).unwrap().parse().unwrap();
        for section in ["dependencies", "dev-dependencies"] {
            for name in manifest.get(section).and_then(toml::Value::as_table).into_iter().flatten() {
                let name = name.0;
                let is_ours = name.starts_with("ringpush");
                assert!(
                    is_ours || reasons.contains(&format!("`{name}`")),
                    "docs/dependencies.md does not say why {name}"
                );
            }
        }
    }
}

/// Every Rust file of the repository, by its path from the root.
fn all_sources() -> BTreeMap<PathBuf, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = BTreeMap::new();
    let mut folders: Vec<PathBuf> =
        ["src", "tests", "benches", "crates", "fuzz"].iter().map(|name| root.join(name)).collect();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() && !path.ends_with("target") {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                found.insert(path.strip_prefix(root).unwrap().to_owned(), text);
            }
        }
    }
    found
}

/// The comment lines of a file, with their numbers.
fn comments(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let numbered = text.lines().enumerate().map(|(n, line)| (n + 1, line));
    numbered.filter(|(_, line)| line.trim_start().starts_with("//"))
}

#[test]
fn comments_have_at_most_a_hundred_columns() {
    let mut wrong = Vec::new();
    for (path, text) in all_sources() {
        for (n, line) in comments(&text).filter(|(_, line)| line.chars().count() > 100) {
            wrong.push(format!("{}:{n}: {} columns", path.display(), line.chars().count()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// A sentence that only points elsewhere, or only repeats the question that a type answers.
#[test]
fn no_comment_stands_for_a_sentence() {
    const POINTERS: [&str; 10] = [
        "See the module",
        "See above",
        "See the room",
        "/// Whose.",
        "/// Which.",
        "/// Why.",
        "/// Where.",
        "/// Who.",
        "/// Of them.",
        "/// The same.",
    ];
    let mut wrong = Vec::new();
    for (path, text) in all_sources().into_iter().filter(|(path, _)| !path.ends_with("it/rooms.rs")) {
        for (n, line) in comments(&text) {
            let line = line.trim_start();
            let points = POINTERS.iter().any(|pointer| {
                if pointer.starts_with('/') { line == *pointer } else { line.contains(pointer) }
            });
            if points || line.starts_with("/// Answers ") {
                wrong.push(format!("{}:{n}: {line}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Documents and source files that a comment or a document names.
#[test]
fn what_is_referred_to_is_in_the_repository() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut texts: Vec<(PathBuf, String)> = all_sources().into_iter().collect();
    let mut folders = vec![root.join("docs"), root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() && folder != root {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "md") {
                let text = std::fs::read_to_string(&path).unwrap();
                texts.push((path.strip_prefix(root).unwrap().to_owned(), text));
            }
        }
    }
    let mut wrong = Vec::new();
    for (path, text) in texts {
        for (n, line) in text.lines().enumerate() {
            let is_comment =
                line.trim_start().starts_with("//") || path.extension().is_some_and(|e| e == "md");
            let words = line.split(|c: char| !(c.is_alphanumeric() || "./_-".contains(c)));
            for word in words.filter(|_| is_comment).map(|word| word.trim_end_matches('.')) {
                let is_ours = ["docs/", "src/", "tests/", "benches/", "crates/", "config/", "scripts/"]
                    .iter()
                    .any(|folder| word.starts_with(folder));
                let is_file = [".md", ".rs", ".toml", ".svg"].iter().any(|end| word.ends_with(end));
                if is_ours && is_file && !root.join(word).exists() {
                    wrong.push(format!("{}:{}: {word}", path.display(), n + 1));
                }
                if is_file && word.len() > 3 && word.chars().all(|c| c.is_uppercase() || c == '.') {
                    // Names in capitals are documents at the root.
                    wrong.extend((!root.join(word).exists()).then(|| format!("{}: {word}", path.display())));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
