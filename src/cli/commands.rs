//! The commands that speak to a server: token, publish, listen, ring.

use std::io::IsTerminal;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use bytes::Bytes;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};

use super::terminal::{print, print_line, say};
use crate::app::keys::Keys;
use crate::client::http::HttpClient;
use crate::client::{Client, ClientConfig, Event, TokenSource};
use crate::clock::Clock;
use crate::config::{Config, Faults};
use crate::message::{DeviceId, UserId};
use crate::ring::Ring;
use crate::role::auth::{Auth, TOKEN_TTL_S};
use crate::wire::frame::Since;
use crate::wire::http::Problem;
use crate::wire::rest::ClusterResponse;

/// Deadline of one request: longer than the server's own deadline for a publish.
const REQUEST_DEADLINE: Duration = Duration::from_secs(15);
/// How often a request is tried that fails or is answered 503.
const TRIES: u32 = 5;
/// Most payloads sent together.
const BATCH: usize = 1_000;
/// Most bytes of payload sent together.
const BATCH_BYTES: usize = 4 * 1024 * 1024;
/// How long a payload waits for others to be sent with it.
const LINE_REST: Duration = Duration::from_millis(50);
/// Life of the tokens that `listen` makes for itself, in seconds. Each connection gets a new one.
const LISTEN_TOKEN_S: u64 = 24 * 3600;

/// The server to speak to.
pub struct Addressed {
    /// Its URL. `None` is the server whose `listen.json` is in the data directory.
    pub target: Option<String>,
}

impl Addressed {
    /// The URL of a role's listener.
    ///
    /// # Errors
    ///
    /// It is not a URL, or no server runs on the data directory.
    pub fn url(&self, config: &Config, role: &str) -> Result<String> {
        if let Some(target) = &self.target {
            if !target.starts_with("http://") && !target.starts_with("https://") {
                let rule = format!("--target: {target:?} must begin with http:// or https://");
                return Err(Faults(vec![rule]).into());
            }
            return Ok(target.trim_end_matches('/').to_owned());
        }
        let path = config.data_dir.join("listen.json");
        let text = std::fs::read_to_string(&path).map_err(|_| {
            anyhow!(
                "no server runs on {}; start one with `ringpush`, or name one with --target URL",
                config.data_dir.display()
            )
        })?;
        let listening: Value = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
        let at = listening[role].as_str().or_else(|| listening[role][0].as_str());
        let at =
            at.ok_or_else(|| anyhow!("the server on {} does not run {role}", config.data_dir.display()))?;
        Ok(format!("http://{at}"))
    }
}

fn user_id(text: &str) -> Result<UserId> {
    UserId::parse(text).map_err(|rule| Faults(vec![format!("USER: {rule}")]).into())
}

/// This program as one would type it here, for lines that are printed to be tried.
#[must_use]
pub fn own_command(data: Option<&Path>) -> String {
    let program = std::env::current_exe().unwrap_or_else(|_| "ringpush".into());
    let here = std::env::current_dir().unwrap_or_default();
    let shown = match program.strip_prefix(&here) {
        Ok(below) => format!("./{}", below.display()),
        Err(_) => program.display().to_string(),
    };
    match data {
        Some(data) => format!("{shown} --data {}", data.display()),
        None => shown,
    }
}

/// Prints a token and nothing else.
///
/// # Errors
///
/// A bad user or life; a key that cannot sign.
pub fn token(mut config: Config, user: &str, ttl: &str) -> Result<ExitCode> {
    let user = user_id(user)?;
    let rule =
        || Faults(vec![format!("--ttl: {ttl:?} must be a time from 1s to 90d, such as 90s, 15m, 1h or 7d")]);
    let ttl_s = seconds(ttl).filter(|s| TOKEN_TTL_S.contains(s)).ok_or_else(rule)?;
    print_line(signer(&mut config)?.issue(&user, ttl_s)?.0)?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn signer(config: &mut Config) -> Result<Auth> {
    Keys::of(config)?;
    Auth::new(config.auth.clone(), Clock::system())
        .map_err(|fault| Faults(vec![format!("auth.token_key: {fault}")]).into())
}

/// Parses a duration such as `90s`, `15m`, `1h 30m` or `7d`, in whole seconds.
#[must_use]
pub fn seconds(text: &str) -> Option<u64> {
    humantime::parse_duration(text).ok().map(|duration| duration.as_secs())
}

/// A client of a server's collect.
struct Collector {
    http: HttpClient,
    base: String,
    key: String,
}

impl Collector {
    fn new(config: &mut Config, at: &Addressed) -> Result<Self> {
        let base = at.url(config, "collect")?;
        let key = Keys::of(config)?.api_key;
        if key.is_empty() {
            return Err(
                Faults(vec!["collect.api_keys: a key is needed to speak to collect".to_owned()]).into()
            );
        }
        Ok(Self { http: HttpClient::default(), base, key })
    }

    /// Sends until the answer is not 503. Every request here is safe to repeat.
    async fn send(&self, method: &str, path: &str, body: Bytes) -> Result<(u16, Bytes)> {
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

fn problem_of(status: u16, body: &[u8]) -> String {
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

/// Publishes one payload, or one per line of standard input.
///
/// # Errors
///
/// What was refused or could not be delivered.
pub async fn publish(mut config: Config, at: Addressed, user: &str, payload: &str) -> Result<ExitCode> {
    let user = user_id(user)?;
    let collector = Collector::new(&mut config, &at)?;
    if payload == "-" {
        return publish_lines(&collector, &user).await;
    }
    if serde_json::from_str::<&serde_json::value::RawValue>(payload).is_err() {
        let hint = "PAYLOAD: must be JSON, such as '{\"text\":\"hello\"}' or '\"hello\"'";
        return Err(Faults(vec![hint.to_owned()]).into());
    }
    // An id makes a repeat after a lost response harmless.
    let body = publish_json(&user, payload, &new_id());
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

fn publish_json(user: &UserId, payload: &str, id: &str) -> String {
    let user = Value::from(user.as_str());
    format!(r#"{{"to":{{"user":{user}}},"payload":{payload},"id":"{id}"}}"#)
}

async fn publish_lines(collector: &Collector, user: &UserId) -> Result<ExitCode> {
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
            batch.push((number, publish_json(user, &line, &new_id())));
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

/// Connects as a user and prints one JSON line per message. Each message is acked once it is
/// printed.
///
/// # Errors
///
/// The reason why the server refuses for good.
pub async fn listen(
    mut config: Config,
    at: Addressed,
    user: &str,
    since: Option<Since>,
    device: &str,
) -> Result<ExitCode> {
    let user = user_id(user)?;
    let device = DeviceId::parse(device).map_err(|rule| Faults(vec![format!("--device: {rule}")]))?;
    let target = at.url(&config, "push")?;
    let auth = signer(&mut config)?;
    auth.issue(&user, LISTEN_TOKEN_S)?;
    let token: TokenSource = Arc::new({
        let user = user.clone();
        move || auth.issue(&user, LISTEN_TOKEN_S).map_or_else(|_| String::new(), |issued| issued.0)
    });
    let mut client = Client::start(ClientConfig {
        target,
        token,
        device,
        since,
        ask_first: true,
        http: HttpClient::default(),
    });
    let interrupted = tokio::signal::ctrl_c();
    tokio::pin!(interrupted);
    loop {
        let event = tokio::select! {
            event = client.next() => event,
            _ = &mut interrupted => return Ok(ExitCode::SUCCESS),
        };
        match event {
            None => return Ok(ExitCode::SUCCESS),
            Some(event) => show(&client, event)?,
        }
    }
}

/// Prints one event: messages to standard output, everything else to standard error.
fn show(client: &Client, event: Event) -> Result<()> {
    match event {
        Event::Message(message) => {
            let line = format!(
                r#"{{"seq":{},"id":{},"accepted_at":"{}","expires_at":"{}","payload":{}}}"#,
                message.seq,
                Value::from(message.id.as_str()),
                message.accepted_at,
                message.expires_at,
                message.payload.get().replace(['\n', '\r'], " "),
            );
            print_line(line)?;
            client.ack(message.seq);
        }
        Event::Welcome { node, since } => say(format_args!("ringpush: connected to {node}, after {since}")),
        Event::CaughtUp(seq) => say(format_args!("ringpush: caught up at {seq}; what follows is live")),
        Event::Gap { after, before, reason } => {
            say(format_args!("ringpush: what was between {after} and {before} is gone ({reason:?})"));
        }
        Event::Moving { node, reason } => say(format_args!("ringpush: moving to {node} ({reason:?})")),
        Event::Waiting { why, rest } => {
            say(format_args!("ringpush: {why}; next try in {} ms", rest.as_millis()))
        }
        Event::Refused { code } => bail!("the server refused with {code}; see the table of close codes"),
    }
    Ok(())
}

/// Prints members, shares and epoch; with a user, its owner by the same arithmetic.
///
/// # Errors
///
/// The server cannot be asked.
pub async fn ring(mut config: Config, at: Addressed, user: Option<&str>) -> Result<ExitCode> {
    let user = user.map(user_id).transpose()?;
    let collector = Collector::new(&mut config, &at)?;
    let (status, body) = collector.send("GET", "/v1/cluster", Bytes::new()).await?;
    if status != 200 {
        bail!("{}", problem_of(status, &body));
    }
    let cluster: ClusterResponse = serde_json::from_slice(&body).context("the answer of collect")?;
    if let Some(user) = user {
        let ring = Ring::build(cluster.on_ring());
        print_line(ring.owner_of(user.as_str()).ok_or_else(|| anyhow!("there is no push node"))?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = format!(
        "generation {}  epoch {}  held {}\n{:<20} {:<9} {:>6} {:>7} {:>9} {:>9}\n",
        cluster.generation,
        cluster.epoch,
        cluster.held,
        "node",
        "state",
        "weight",
        "share",
        "sessions",
        "displaced"
    );
    for node in &cluster.nodes {
        table.push_str(&format!(
            "{:<20} {:<9} {:>6} {:>6.1}% {:>9} {:>9}\n",
            node.node,
            node.state,
            node.weight,
            node.share * 100.0,
            node.sessions,
            node.displaced,
        ));
    }
    print(table)?;
    Ok(ExitCode::SUCCESS)
}
