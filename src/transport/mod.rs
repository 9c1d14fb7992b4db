//! Adapters to the network: hyper, tungstenite, tonic, Redis. This module knows frames and
//! requests, not users.

mod accept;
pub mod held;
pub mod http;
pub mod lazy_stream;
pub mod peer;
pub mod redis;
pub mod request;
pub mod tls;
pub mod websocket;
