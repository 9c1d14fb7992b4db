//! Every byte that is agreed with other programs: client frames, close codes, HTTP bodies,
//! addresses, and the messages between roles. Pure: text in, values out, and back.

pub mod address;
pub mod close;
pub mod frame;
pub mod http;
pub mod peer;
pub mod proto;
pub mod socket;
