//! Story tests: each file is named by a behaviour, and each test starts the real program on free
//! loopback ports.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr, missing_docs, unreachable_pub)]

/// Where the generated calls look for their messages.
mod wire {
    pub use ringpush::wire::proto;
}

mod alerts;
mod broken_stores;
mod canary;
mod clients;
mod cluster;
mod command_line;
mod crash;
mod handshakes;
mod indicators;
mod interest;
mod keys;
mod libraries;
mod limits;
mod logs;
mod manifests;
mod openapi;
mod outputs;
mod peers;
mod placement;
mod publishing;
mod redis_forms;
mod registry;
mod replica_set;
mod requests;
mod restores;
mod rooms;
mod secure;
mod session_options;
mod sizes;
mod sockets;
mod status;
mod strangers;
mod tokens;
mod topic_store;
mod topics;
mod traces;
mod versions;
mod watching;
mod writers;
