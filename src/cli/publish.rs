//! The command `publish`: one message, or a stream of lines.

use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};

use super::commands::{Addressed, REQUEST_DEADLINE, topic_name, user_id};
use super::terminal::{print_line, say};
use crate::app::keys::Keys;
use crate::client::http::HttpClient;
use crate::config::{Config, Faults};
use crate::wire::http::Problem;

/// How often a request is tried that fails or is answered 503.
const TRIES: u32 = 5;

/// Most payloads sent together.
const BATCH: usize = 1_000;

/// Most bytes of payload sent together.
const BATCH_BYTES: usize = 4 * 1024 * 1024;

/// How long a payload waits for others to be sent with it.
const LINE_REST: Duration = Duration::from_millis(50);

/// A client of a server's collect.
pub(super) struct Collector {
    http: HttpClient,
    base: String,
    key: String,
}

impl Collector {
    pub(super) fn new(config: &mut Config, at: &Addressed) -> Result<Self> {
        let base = at.url(config, "collect")?;
        let key = Keys::with(config, |keys| !keys.api_key.is_empty())?.api_key;
        if key.is_empty() {
            return Err(
                Faults(vec!["collect.api_keys: a key is needed to speak to collect".to_owned()]).into()
            );
        }
        Ok(Self { http: HttpClient::default(), base, key })
    }

    /// Sends until the answer is not 503. Every request here is safe to repeat.
    pub(super) async fn send(&self, method: &str, path: &str, body: Bytes) -> Result<(u16, Bytes)> {
        let url = format!("{}{path}", self.base);
        let mut tried = 0;
        loop {
            tried += 1;
            match self.http.send(method, &url, Some(&self.key), body.clone(), REQUEST_DEADLINE).await {
                Ok((503, answer)) if tried >= TRIES => bail!("{}: {}", self.base, problem_of(503, &answer)),
                Ok((503, _)) => {}
                Ok((status, answer)) => return Ok((status, answer)),
                Err(why) if tried >= TRIES => bail!("{} cannot be reached: {why}", self.base),
                Err(_) => {}
            }
            tokio::time::sleep(Duration::from_millis(200 << tried)).await;
        }
    }
}

pub(super) fn problem_of(status: u16, body: &[u8]) -> String {
    match serde_json::from_slice::<Problem>(body) {
        Ok(problem) if problem.errors.is_empty() => format!("{status} {}: {}", problem.title, problem.detail),
        Ok(problem) => {
            let fields: Vec<String> = problem
                .errors
                .iter()
                .map(|e| format!("{}: {}", e.pointer.trim_start_matches('/'), e.detail))
                .collect();
            format!("{status} {}: {}", problem.title, fields.join("; "))
        }
        Err(_) => format!("answered {status}"),
    }
}

/// Whom a command publishes to.
pub enum Recipient {
    /// A user.
    User(String),
    /// The members of topics.
    Topics(Vec<String>),
    /// All users.
    Everyone,
}

impl Recipient {
    /// `to` of a publish, as JSON.
    fn to_json(&self) -> Result<String> {
        match self {
            Self::Everyone => Ok(serde_json::json!({ "everyone": true }).to_string()),
            Self::User(user) => Ok(serde_json::json!({ "user": user_id(user)?.as_str() }).to_string()),
            Self::Topics(topics) => {
                let names = topics.iter().map(|topic| Ok(topic_name("--topic", topic)?.to_string()));
                match names.collect::<Result<Vec<String>>>()?.as_slice() {
                    [one] => Ok(serde_json::json!({ "topic": one }).to_string()),
                    several => Ok(serde_json::json!({ "topics": several }).to_string()),
                }
            }
        }
    }
}

/// Publishes one payload, or one per line of standard input.
///
/// # Errors
///
/// What was refused or could not be delivered.
pub async fn publish(
    mut config: Config,
    at: Addressed,
    recipient: &Recipient,
    payload: &str,
) -> Result<ExitCode> {
    let to = recipient.to_json()?;
    let collector = Collector::new(&mut config, &at)?;
    if payload == "-" {
        return publish_lines(&collector, &to).await;
    }
    if serde_json::from_str::<&serde_json::value::RawValue>(payload).is_err() {
        let hint = "PAYLOAD: must be JSON, such as '{\"text\":\"hello\"}' or '\"hello\"'";
        return Err(Faults(vec![hint.to_owned()]).into());
    }
    // An id makes a repeat after a lost response harmless.
    let body = publish_json(&to, payload, &new_id());
    match collector.send("POST", "/v1/messages", body.into()).await? {
        (202, answer) => {
            print_line(String::from_utf8_lossy(&answer))?;
            Ok(ExitCode::SUCCESS)
        }
        (status, answer) => bail!("{}", problem_of(status, &answer)),
    }
}

fn new_id() -> String {
    ulid::Ulid::generate().to_string()
}

fn publish_json(to: &str, payload: &str, id: &str) -> String {
    format!(r#"{{"to":{to},"payload":{payload},"id":"{id}"}}"#)
}

async fn publish_lines(collector: &Collector, to: &str) -> Result<ExitCode> {
    let progress = progress("published");
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    let (mut batch, mut bytes, mut number, mut refused) = (Vec::new(), 0, 0u64, 0u64);
    loop {
        // A line that waits is sent if no other one follows at once: `tail -f` is a sender too.
        let next = match tokio::time::timeout(LINE_REST, lines.next_line()).await {
            Err(_) if batch.is_empty() => lines.next_line().await,
            Err(_) => {
                refused += send_batch(collector, &batch, &progress).await?;
                batch.clear();
                bytes = 0;
                continue;
            }
            Ok(next) => next,
        };
        let line = next.context("standard input")?;
        let last = line.is_none();
        if let Some(line) = line {
            number += 1;
            if line.trim().is_empty() {
                continue;
            }
            if serde_json::from_str::<&serde_json::value::RawValue>(&line).is_err() {
                say(format_args!("ringpush: line {number} is not JSON and was not sent"));
                refused += 1;
                continue;
            }
            bytes += line.len();
            batch.push((number, publish_json(to, &line, &new_id())));
        }
        if !batch.is_empty() && (last || batch.len() == BATCH || bytes >= BATCH_BYTES) {
            refused += send_batch(collector, &batch, &progress).await?;
            batch.clear();
            bytes = 0;
        }
        if last {
            break;
        }
    }
    progress.finish_and_clear();
    say(format_args!("ringpush: {} published, {refused} refused", progress.position()));
    Ok(if refused == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Sends one batch, and again what the server could not take. Returns how many were refused for
/// good.
async fn send_batch(collector: &Collector, batch: &[(u64, String)], progress: &ProgressBar) -> Result<u64> {
    let mut waiting: Vec<&(u64, String)> = batch.iter().collect();
    let mut refused = 0;
    for tried in 0.. {
        let items: Vec<&str> = waiting.iter().map(|(_, json)| json.as_str()).collect();
        let body = format!(r#"{{"messages":[{}]}}"#, items.join(","));
        let (status, answer) = collector.send("POST", "/v1/messages/batch", body.into()).await?;
        if status != 202 {
            bail!("{}", problem_of(status, &answer));
        }
        let answer: Value = serde_json::from_slice(&answer).context("the answer to a batch")?;
        let results = answer["results"].as_array().cloned().unwrap_or_default();
        let mut again = Vec::new();
        for (item, result) in waiting.iter().zip(results) {
            match result["error"]["status"].as_u64() {
                None => progress.inc(1),
                Some(503) if tried < TRIES => again.push(*item),
                Some(status) => {
                    refused += 1;
                    say(format_args!(
                        "ringpush: line {} was refused: {status} {}",
                        item.0, result["error"]["detail"]
                    ));
                }
            }
        }
        if again.is_empty() {
            break;
        }
        waiting = again;
        tokio::time::sleep(Duration::from_millis(200 << tried)).await;
    }
    Ok(refused)
}

/// A counter on the terminal; hidden if there is no terminal.
fn progress(what: &'static str) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {pos} {msg}, {per_sec}") {
        bar.set_style(style);
    }
    bar.set_message(what);
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}
