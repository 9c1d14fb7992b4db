//! The house keeps its order: arrows point down only, and each foreign crate has one door.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Each room with the rooms that it may know. `app` and `main` may know all.
const MAY_KNOW: &[(&str, &[&str])] = &[
    // Tier 0: pure.
    ("message", &[]),
    ("ring", &[]),
    ("backoff", &[]),
    ("wire", &["message"]),
    ("secret", &[]),
    ("ticket", &["message", "secret"]),
    ("peer_proof", &["message", "secret"]),
    ("session", &["message", "wire"]),
    // Tier 1: one door per foreign system.
    ("clock", &["message"]),
    ("telemetry", &[]),
    ("thread", &[]),
    ("membership", &["message", "ring", "clock", "backoff", "wire", "transport", "peer_proof"]),
    ("fallback", &["message", "clock", "backoff", "transport"]),
    ("inbox", &["message", "clock", "backoff"]),
    ("transport", &["wire"]),
    ("client", &["message", "wire", "backoff", "transport"]),
    // Tier 2: what should happen. A role knows users, not sockets: it does not know transport.
    (
        "role",
        &[
            "message",
            "ring",
            "backoff",
            "wire",
            "ticket",
            "session",
            "clock",
            "telemetry",
            "thread",
            "membership",
            "fallback",
            "inbox",
        ],
    ),
    // Tier 3: assembly. Configuration composes, and starts nothing.
    ("config", &["message", "clock", "role", "wire"]),
];

/// Foreign crates and the only places that may name them.
const DOORS: &[(&str, &[&str])] = &[
    ("hashring", &["ring.rs"]),
    ("fjall", &["inbox/embedded.rs"]),
    ("redis", &["transport/redis.rs"]),
    ("mongodb", &["inbox/mongo/"]),
    ("tonic", &["transport/peer.rs", "app/collect_grpc.rs"]),
    ("tokio_tungstenite", &["transport/websocket.rs"]),
    ("hyper_util", &["transport/"]),
    ("hyper_rustls", &["transport/http.rs"]),
    ("jsonwebtoken", &["role/auth.rs", "role/auth_tests.rs"]),
    ("prometheus_client", &["telemetry.rs", "role/"]),
    ("clap", &["main.rs"]),
    ("axum", &["app/"]),
    ("toml", &["config.rs", "config_tests.rs", "app/keys.rs"]),
    ("anyhow", &["app/", "main.rs", "telemetry.rs"]),
    ("indicatif", &["app/commands.rs"]),
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

/// `role/push/mod.rs` -> `role`, `session_tests.rs` -> `session`.
fn room(path: &Path) -> String {
    let first = path.components().next().unwrap().as_os_str().to_str().unwrap();
    first.trim_end_matches(".rs").trim_end_matches("_tests").to_owned()
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
        if ["app", "main", "lib"].contains(&own.as_str()) || path.to_str().unwrap().ends_with("_tests.rs") {
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
        let own = name.split(['/', '.']).next().unwrap().trim_end_matches("_tests");
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
    const TIER_0: [&str; 8] =
        ["message", "ring", "backoff", "wire", "secret", "ticket", "peer_proof", "session"];
    for (path, text) in sources().into_iter().filter(|(path, _)| TIER_0.contains(&room(path).as_str())) {
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
    let manifest: toml::Table = std::fs::read_to_string(root.join("Cargo.toml")).unwrap().parse().unwrap();
    let reasons = std::fs::read_to_string(root.join("docs/dependencies.md")).unwrap();
    for section in ["dependencies", "dev-dependencies"] {
        for name in manifest[section].as_table().unwrap().keys() {
            assert!(reasons.contains(&format!("`{name}`")), "docs/dependencies.md does not say why {name}");
        }
    }
}
