//! Messages of other roles and of publishers over gRPC: whatever decodes is converted or refused.
#![no_main]

use libfuzzer_sys::fuzz_target;
use prost::Message;
use ringpush::wire::proto::{batch_of, peer};

fuzz_target!(|data: &[u8]| {
    if let Ok(message) = peer::Live::decode(data) {
        let _ = batch_of(vec![message]);
    }
});
