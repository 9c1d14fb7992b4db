//! ringpush: a WebSocket push cluster.
//!
//! A business system posts a message for a user. ringpush stores it, and every device of that user
//! has it a moment later, on whichever node its socket lives. Three ideas carry this. *The inbox is
//! the truth; routing is a hint*: a live delivery may be lost, repeated or late without harm. *A
//! session is a cursor over the inbox with a live tail*: reconnect, move, slow client and restart
//! are the same two states. *The owner is computed*: every node computes where a user belongs, and
//! nobody looks it up.
//!
//! `docs/architecture.md` has the map with the life cycles of a connection, a message and a node;
//! `docs/glossary.md` defines the terms.
//!
//! # The modules, in reading order
//!
//! Tier 0 is pure: no clock, no tasks, no I/O, no randomness of its own.
//!
//! - [`message`], [`topic`], [`watching`]: the nouns.
//! - [`ring`]: who owns a key.
//! - [`session`]: one session's life; the most important file.
//! - [`secret`], [`ticket`], [`peer_proof`]: what is signed with the secret that all roles share.
//! - [`redis_url`]: the forms of `redis.url`. [`backoff`]: delays with jitter.
//! - [`wire`]: every byte that is agreed with other programs.
//!
//! Tier 1 has one adapter for each foreign system.
//!
//! - [`inbox`]: the contract of the inbox; on MongoDB, on fjall, and in memory as a model.
//! - [`membership`], [`fallback`]: which nodes there are, and who is displaced; in Redis and in
//!   memory.
//! - [`transport`]: hyper, tungstenite, tonic, Redis, and a TCP stream of our own.
//! - [`client`]: the client library.
//! - [`clock`], [`telemetry`]: the time of day; logs, metrics, health.
//! - [`live`]: settings that may change while the process runs.
//! - `library`: the client libraries in JavaScript and Python, as text.
//! - `tasks`: panics of tasks are raised again.
//!
//! Tier 2 says what should happen: [`role`], four roles that never import one another, and what
//! they share.
//!
//! Tier 3 assembles: [`config`], [`app`], and the commands in [`cli`].
//!
//! Imports point downwards only; `tests/it/rooms.rs` checks that.

pub mod app;
pub mod cli;
pub mod clock;
pub mod colleagues;
pub mod config;
#[cfg(test)]
mod explorer;
pub mod fallback;
pub mod inbox;
pub mod interest;
mod library;
pub mod live;
pub mod membership;
pub mod peer_proof;
pub mod redis_url;
pub mod ring;
pub mod role;
pub mod secret;
pub mod session;
mod tasks;
pub mod telemetry;
pub mod ticket;
pub mod transport;
pub mod wire;

pub use ringpush_client as client;
pub use ringpush_protocol::{backoff, message, topic, trace, watching};
