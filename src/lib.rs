//! ringpush
#[allow(missing_docs)]
pub mod message;
pub mod ring;
pub mod backoff;
pub mod ticket;
pub mod session;
pub mod wire;
