//! The library as the transcripts drive it: see clients/conformance/README.md.

#![allow(clippy::print_stdout)]

use std::time::Duration;

use bytes::Bytes;
use ringpush_client::http::HttpClient;
use ringpush_client::{
    AckWhen, Begin, Inbox, InboxHandle, Item, Notice, Notices, Seq, TokenError, TokenReason, WatchSince,
    connect,
};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::sync::watch;

/// After a failure the handler is called again so much later.
const AGAIN: Duration = Duration::from_millis(200);

fn say(event: &Value) {
    println!("{event}");
}

async fn token(url: String, why: TokenReason, http: HttpClient) -> Result<String, TokenError> {
    let url = format!("{url}/token?reason={}", why.name());
    match http.send("GET", &url, None, Bytes::new(), Duration::from_secs(10)).await {
        Ok((200, body)) => Ok(String::from_utf8_lossy(&body).into_owned()),
        Ok((403, _)) => Err(TokenError::Refused("refused".to_owned())),
        Ok((status, _)) => Err(TokenError::Failed(status.to_string())),
        Err(why) => Err(TokenError::Failed(why)),
    }
}

async fn show(mut notices: Notices) {
    while let Some(notice) = notices.next().await {
        match notice {
            Notice::State(state) => say(&json!({"state": state.name(), "cause": state.cause()})),
            Notice::Fault { code, .. } => say(&json!({"error": code})),
        }
    }
}

async fn read(mut inbox: Inbox, mut mode: watch::Receiver<String>) {
    while let Ok(Some(item)) = inbox.next().await {
        let message = match &item {
            Item::Gap(gap) => {
                let gap = json!({"after": gap.after, "before": gap.before, "reason": gap.reason, "topic": gap.topic});
                say(&json!({"gap": gap}));
                continue;
            }
            Item::Message(message) => message,
        };
        let payload: Value = message.json().unwrap_or_default();
        let mut shown = json!({"seq": message.seq, "payload": payload, "live": message.live});
        if let Some(event) = &message.event {
            shown["event"] = event.as_str().into();
        }
        if let Some(topic) = &message.topic {
            shown["topic"] = topic.as_str().into();
        }
        say(&json!({"message": shown}));
        if mode.borrow().as_str() == "fail" {
            say(&json!({"error": "handler"}));
            inbox.put_back(item);
            tokio::time::sleep(AGAIN).await;
            continue;
        }
        let _ = mode.wait_for(|mode| mode != "hold").await;
    }
}

fn begin(options: &Value, http: &HttpClient, mode: &watch::Receiver<String>) -> Vec<InboxHandle> {
    let text = |name: &str| options[name].as_str().unwrap_or_default().to_owned();
    let clients = options["clients"].as_u64().unwrap_or(1);
    let mut handles = Vec::new();
    for n in 0..clients {
        let (url, http) = (text("url"), http.clone());
        let asked = url.clone();
        let source = http.clone();
        let mut client = connect(url, move |why| token(asked.clone(), why, source.clone()))
            .device(if clients == 1 { text("device") } else { format!("d-{n}") })
            .http(http);
        if let Some(user) = options["user"].as_str() {
            client = client.user(user);
        }
        if let Some(window) = options["window"].as_u64() {
            client = client.window(u32::try_from(window).unwrap_or(0));
        }
        if options["begin"] == "latest" {
            client = client.begin(Begin::Latest);
        }
        if options["ack"] == "received" {
            client = client.ack(AckWhen::Received);
        }
        match client.start() {
            Ok(mut inbox) => {
                handles.push(inbox.handle());
                tokio::spawn(show(inbox.notices()));
                tokio::spawn(read(inbox, mode.clone()));
            }
            Err(error) => say(&json!({"error": error.to_string()})),
        }
    }
    handles
}

#[tokio::main]
async fn main() {
    let (set, mode) = watch::channel("ok".to_owned());
    let http = HttpClient::default();
    let mut handles = Vec::new();
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        let command: Value = serde_json::from_str(&line).unwrap_or_default();
        if command["connect"].is_object() {
            handles = begin(&command["connect"], &http, &mode);
        }
        if let Some(handler) = command["handler"].as_str() {
            set.send_replace(handler.to_owned());
        }
        for handle in &handles {
            if command["wake"] == true {
                handle.wake();
            }
            if command["refresh"] == true {
                handle.refresh();
            }
            if let Some(topic) = command["watch"]["topic"].as_str() {
                let since = match &command["watch"]["since"] {
                    Value::Number(seq) => WatchSince::After(Seq::at(seq.as_u64().unwrap_or(0))),
                    Value::String(word) if word == "last" => WatchSince::Last,
                    _ => WatchSince::Latest,
                };
                if let Err(error) = handle.watch(topic, since) {
                    say(&json!({"error": error.to_string()}));
                }
            }
            if let Some(topic) = command["unwatch"].as_str() {
                let _ = handle.unwatch(topic);
            }
            if command["close"] == true {
                handle.close().await;
                say(&json!({"closed": true}));
            }
        }
    }
}
