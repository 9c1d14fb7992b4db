//! Frames of both sides: whatever is parsed is encoded and parsed again to the same value.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ringpush_protocol::frame::{ClientFrame, ReceivedFrame};

fuzz_target!(|data: &[u8]| {
    if let Ok(frame) = ClientFrame::parse(data) {
        assert_eq!(ClientFrame::parse(frame.encode().as_bytes()).as_ref(), Ok(&frame));
    }
    let _ = ReceivedFrame::parse(data);
});
