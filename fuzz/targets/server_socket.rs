//! The server's WebSocket over random bytes that arrive in random pieces: it never panics, and ends
//! when the peer does. The first byte of the input decides how the rest is cut.
#![no_main]

use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use libfuzzer_sys::fuzz_target;
use ringpush::transport::lazy_stream::LazyTcpStream;
use ringpush::transport::websocket::{ServerSocket, handshake, request_head};
use ringpush::wire::socket::{Incoming, Outgoing};
use tokio::io::AsyncWriteExt;

const REQUEST: &[u8] = b"GET /v1/ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
    Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";

fuzz_target!(|data: &[u8]| {
    let Some((cut, rest)) = data.split_first() else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = tokio::net::TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let server = listener.accept().await.unwrap().0.into_std().unwrap();
        let unread = usize::from(*cut) % (rest.len() + 1);
        let Ok(Some((_, request))) = request_head(REQUEST) else { unreachable!() };
        let Ok(answer) = handshake(&request) else { unreachable!() };
        let line = LazyTcpStream::new(server, rest[..unread].to_vec());
        let mut socket = ServerSocket::answered(line, &answer);
        let writing = async {
            for piece in rest[unread..].chunks(usize::from(*cut % 31) + 1) {
                if client.write_all(piece).await.is_err() {
                    break;
                }
                tokio::task::yield_now().await;
            }
            let _ = client.shutdown().await;
            client
        };
        let reading = async {
            while let Some(Ok(incoming)) = socket.next().await {
                if incoming == Incoming::Closed {
                    break;
                }
                if socket.send(Outgoing::Text("x".into())).await.is_err() {
                    break;
                }
            }
        };
        let both = async { tokio::join!(writing, reading) };
        assert!(tokio::time::timeout(Duration::from_secs(5), both).await.is_ok(), "it hangs");
    });
});
