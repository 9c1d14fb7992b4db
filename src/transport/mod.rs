//! The doors to the network: hyper and tungstenite. This room knows frames and requests, not users.

pub mod http;
pub mod websocket;
