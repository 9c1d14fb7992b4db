//! The example of README.md, as it stands there.
#![allow(clippy::print_stdout)]

use ringpush_client::{Item, connect};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (url, token) = (std::env::var("RINGPUSH_URL")?, std::env::var("RINGPUSH_TOKEN")?);
    let mut inbox = connect(url, token).device("worker-1").start()?;
    while let Some(item) = inbox.next().await? {
        let Item::Message(message) = item else { continue };
        println!("{}", message.payload);
    }
    Ok(())
}
