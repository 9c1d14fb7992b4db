//! Prints the messages of a user: `cargo run -p ringpush-client --example listen -- URL TOKEN`.

#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::sync::Arc;

use ringpush_client::{Client, ClientConfig, Event, http::HttpClient};

#[tokio::main]
async fn main() {
    let mut arguments = std::env::args().skip(1);
    let (Some(target), Some(token)) = (arguments.next(), arguments.next()) else {
        return eprintln!("usage: listen http://127.0.0.1:8080 TOKEN");
    };
    let mut client = Client::start(ClientConfig {
        target,
        token: Arc::new(move || token.clone()),
        device: Default::default(),
        since: None,
        ask_first: true,
        http: HttpClient::default(),
    });
    while let Some(event) = client.next().await {
        if let Event::Message(message) = event {
            println!("{} {}", message.seq, message.payload);
            client.ack(message.seq);
        }
    }
}
