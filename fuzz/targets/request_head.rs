//! The head of a request for a socket: a head that is whole is the same however much follows it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ringpush::transport::request::check_head;
use ringpush::transport::websocket::{handshake, request_head};
use ringpush_protocol::address::SocketQuery;

fuzz_target!(|data: &[u8]| {
    if let Ok(Some((length, request))) = request_head(data) {
        assert!(length <= data.len());
        let again = request_head(&data[..length]);
        assert!(matches!(again, Ok(Some((same, _))) if same == length));
        let _ = check_head(&request);
        let _ = handshake(&request);
        let _ = SocketQuery::parse(request.uri().query().unwrap_or_default());
    }
});
