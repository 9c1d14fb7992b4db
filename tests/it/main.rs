//! Story tests: each file is named by a behaviour, and each test starts the real program on free loopback ports.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs, unreachable_pub)]

mod support;

mod clients;
mod command_line;
mod crash;
mod limits;
mod placement;
mod publishing;
mod registry;
mod replica_set;
mod rooms;
mod scenarios;
mod sockets;
mod tokens;
