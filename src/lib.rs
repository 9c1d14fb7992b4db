//! ringpush
pub mod message;
pub mod ring;
pub mod backoff;
pub mod ticket;
pub mod session;
pub mod wire;
pub mod clock;
pub mod inbox;
pub mod membership;
pub mod fallback;
pub mod telemetry;
pub mod role;
pub mod transport;
pub mod client;
pub mod config;
pub mod app;
