//! The limit beside which everything is read: sockets that were upgraded and nothing else, one
//! thread, ready-made frames, one write each. No routing, no store, no publisher.

use std::io::{BufRead, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// What ringpush puts around a payload, in bytes.
const ENVELOPE: usize = 160;

/// Runs as a process of its own: says its address, and at each line of input, a number of seconds,
/// writes for so long; once for 0. Its frames are as long as ringpush's with a payload of so many
/// bytes.
pub fn run(bytes: usize) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    // The standard library's holds 128, fewer than come at once.
    rustix::net::listen(&listener, 4096).unwrap();
    println!("{}", listener.local_addr().unwrap());
    let sockets: Arc<Mutex<Vec<TcpStream>>> = Arc::default();
    let opened = Arc::clone(&sockets);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            opened.lock().unwrap().push(upgrade(stream.unwrap()));
        }
    });
    let payload =
        format!(r#"{{"type":"message","text":"{}","at":0,"k":0}}"#, "x".repeat(bytes + ENVELOPE - 40));
    let mut frame = vec![0x81, 126];
    frame.extend_from_slice(&u16::try_from(payload.len()).unwrap().to_be_bytes());
    frame.extend_from_slice(payload.as_bytes());
    for line in std::io::stdin().lock().lines() {
        let seconds: f64 = line.unwrap().parse().unwrap();
        let sockets = sockets.lock().unwrap();
        let until = Instant::now() + Duration::from_secs_f64(seconds);
        let mut sent = 0u64;
        while sent == 0 || Instant::now() < until {
            for mut socket in sockets.iter() {
                // A socket that is full is the client's limit, not this one's.
                sent += u64::from(socket.write(&frame).is_ok());
            }
        }
        println!("{sent}");
    }
}

fn upgrade(mut stream: TcpStream) -> TcpStream {
    stream.set_nodelay(true).unwrap();
    let mut head = Vec::new();
    let mut buffer = [0; 2048];
    while !head.ends_with(b"\r\n\r\n") {
        let count = stream.read(&mut buffer).unwrap();
        head.extend_from_slice(&buffer[..count]);
    }
    stream
        .write_all(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
        .unwrap();
    stream.set_nonblocking(true).unwrap();
    stream
}
