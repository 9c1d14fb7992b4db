//! Prints the messages of a user: `cargo run -p ringpush-client --example listen -- URL TOKEN`.

#![allow(clippy::print_stdout, clippy::print_stderr)]

use ringpush_client::{Item, connect};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(url), Some(token)) = (arguments.next(), arguments.next()) else {
        return Err("usage: listen http://127.0.0.1:8080 TOKEN".into());
    };
    let mut inbox = connect(url, token).device("listen-example").start()?;
    while let Some(item) = inbox.next().await? {
        match item {
            Item::Message(message) => println!("{} {}", message.seq, message.payload),
            Item::Gap(gap) => eprintln!("{} to {} will never come", gap.after + 1, gap.before - 1),
        }
    }
    Ok(())
}
