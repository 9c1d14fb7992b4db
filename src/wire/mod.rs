//! Every byte that is agreed with other programs: client frames, close codes, HTTP bodies,
//! addresses, and the messages between roles. Pure: text in, values out, and back.

pub mod peer;
pub mod proto;
pub mod socket;

pub use ringpush_protocol::{address, close, frame, http, refusal, rest};
