//! Every byte agreed with others, and nothing else: client frames, close codes, HTTP bodies, addresses, and what the
//! roles say to one another. Pure: text in, values out, and back.

pub mod address;
pub mod close;
pub mod frame;
pub mod http;
pub mod peer;
pub mod proto;
pub mod socket;
