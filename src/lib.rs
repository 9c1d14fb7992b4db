//! ringpush: a WebSocket push cluster.
//!
//! A business system posts a message for a user; it is written down, and every device of that user has it a moment later,
//! on whichever node its socket lives. Three ideas carry it. *The inbox is the truth; routing is a hint*: any live
//! delivery may be lost, repeated or late without harm. *A session is a cursor over the inbox with a live tail*:
//! reconnect, move, slow client and restart are the same two states. *Owner is arithmetic*: every node computes where a
//! user belongs, and nobody looks it up.
//!
//! # The rooms, in reading order
//!
//! Tier 0 is pure: no clock, no tasks, no I/O, no randomness of its own.
//!
//! - [`message`]: the nouns.
//! - [`ring`]: who owns a key.
//! - [`session`]: one session's life, the heart of it all.
//! - [`secret`], [`ticket`], [`peer_proof`]: what is signed with the secret that all roles share.
//! - [`backoff`]: jittered delays.
//! - [`wire`]: every byte agreed with others.
//!
//! Tier 1 has one door for each foreign system.
//!
//! - [`inbox`]: the truth, with its contract; on `fjall`, and in memory as the model.
//! - [`membership`], [`fallback`]: which nodes there are, and who is displaced.
//! - [`transport`]: hyper and tungstenite. [`client`]: the client library.
//! - [`clock`], [`telemetry`], [`thread`]: the time of day; logs, metrics, health; a thread that many wait for.
//!
//! Tier 2 says what should happen: [`role`], four of them, which never import one another.
//!
//! Tier 3 puts it together: [`config`] and [`app`].
//!
//! Arrows point down only; `tests/it/rooms.rs` holds the house to it.

pub mod app;
pub mod backoff;
pub mod client;
pub mod clock;
pub mod config;
pub mod fallback;
pub mod inbox;
pub mod membership;
pub mod message;
pub mod peer_proof;
pub mod ring;
pub mod role;
pub mod secret;
pub mod session;
pub mod telemetry;
pub mod thread;
pub mod ticket;
pub mod transport;
pub mod wire;
