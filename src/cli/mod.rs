//! The commands that speak to a server: token, publish, listen, ring, audit. They use the client
//! library and the HTTP interface, as any other program would.

pub mod audit;
pub mod commands;
pub mod options;
pub mod publish;
pub mod terminal;
pub mod topic;
