//! The bodies of publishes and batches: what is accepted is within the limits, and its payload is
//! JSON that parses.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use ringpush_protocol::http::{PublishLimits, is_shallow, parse_batch, parse_connect, parse_publish};

const LIMITS: PublishLimits = PublishLimits { message_bytes: 4_096, recipients: 8, batch: 8 };

fuzz_target!(|data: &[u8]| {
    let body = Bytes::copy_from_slice(data);
    if let Ok(publish) = parse_publish(&body, &LIMITS) {
        assert!(publish.payload.len() <= LIMITS.message_bytes && is_shallow(&publish.payload));
        assert!((1..=LIMITS.recipients).contains(&publish.to.users().len()));
    }
    if let Ok(items) = parse_batch(&body, &LIMITS) {
        assert!((1..=LIMITS.batch).contains(&items.len()));
    }
    let _ = parse_connect(data);
});
