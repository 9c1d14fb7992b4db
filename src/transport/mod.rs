//! The doors to the network: hyper, tungstenite, Redis. This room knows frames and requests, not users.

pub mod http;
pub mod redis;
pub mod websocket;
