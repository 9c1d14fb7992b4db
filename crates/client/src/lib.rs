//! The client library of ringpush: receives the messages of a user, each once and in order, and
//! acks what the application has handled.
//!
//! [`connect`] names a server and where tokens come from, [`Options::start`] begins to connect, and
//! [`Inbox::next`] waits for the next message. The library reconnects, resumes, follows moves and
//! renews the token by itself; docs/protocol.md says what the server promises.
//!
//! ```no_run
//! use ringpush_client::{Item, connect};
//!
//! # async fn receive() -> Result<(), Box<dyn std::error::Error>> {
//! let mut inbox = connect("http://127.0.0.1:8080", "TOKEN").device("worker-1").start()?;
//! while let Some(item) = inbox.next().await? {
//!     match item {
//!         Item::Message(message) => println!("{} {}", message.seq, message.payload),
//!         Item::Gap(gap) => println!("{} to {} will never come", gap.after + 1, gap.before - 1),
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! A task holds the line (a socket), or two of them during a move: the new one is opened first, and
//! the old one is closed when the new one has caught up. What both bring is told apart by `seq`.

mod actor;
mod books;
mod clock;
mod dial;
pub mod http;
mod inbox;
mod items;
mod ledger;
mod line;
mod options;
mod tokens;

pub use inbox::{Inbox, InboxHandle, Notices};
pub use items::{Gap, Item, Message, Notice, State, Stopped};
pub use options::{AckWhen, Options, OptionsError, connect};
pub use ringpush_protocol::frame::{Begin, GapReason, MoveReason, Since, WatchSince};
pub use ringpush_protocol::message::{NameError, Seq};
pub use tokens::{TokenError, TokenReason, TokenSource};

/// The examples of the README, compiled as documentation tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
