//! What ringpush agrees with other programs, as pure values: text in, values out, and back. The
//! server, the client library and the tools share it. docs/protocol.md describes it in prose.
//!
//! - [`message`]: the nouns.
//! - [`frame`]: the frames of the client WebSocket. [`close`]: the close codes.
//! - [`http`]: the requests of the HTTP interfaces, and problems. [`rest`]: the responses.
//! - [`refusal`]: why a token or ticket is refused.
//! - [`topic`]: how messages to topics reach their members. [`watching`]: who may read one without
//!   being a member.
//! - [`address`]: public URLs, and the query of a socket request.
//! - [`backoff`]: the delays with jitter that both sides use.
//!
//! ```
//! use ringpush_protocol::frame::{ClientFrame, ReceivedFrame};
//!
//! let frame = ReceivedFrame::parse(
//!     br#"{"type":"message","seq":43,"id":"order-17","accepted_at":"2026-11-22T20:49:26.123Z",
//!         "expires_at":"2026-11-29T20:49:26.123Z","payload":{"text":"hello"}}"#,
//! )?;
//! let ReceivedFrame::Message(message) = frame else { panic!("another frame") };
//! assert_eq!(message.payload.get(), r#"{"text":"hello"}"#);
//! assert_eq!(ClientFrame::Ack(message.seq).encode(), r#"{"type":"ack","seq":43}"#);
//! # Ok::<(), serde_json::Error>(())
//! ```

pub mod address;
pub mod backoff;
pub mod close;
pub mod frame;
pub mod http;
pub mod message;
pub mod refusal;
pub mod rest;
pub mod topic;
pub mod trace;
pub mod watching;
