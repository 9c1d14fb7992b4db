//! The commands that speak to a server: token, publish, listen, ring.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use bytes::Bytes;
use serde_json::Value;

use super::publish::{Collector, problem_of};
use super::terminal::{print, print_line, say};
use crate::app::keys::Keys;
use crate::client::{Item, Message, Notice, State, TokenError, connect};
use crate::clock::Clock;
use crate::config::{Config, Faults};
use crate::message::{DeviceId, EVERYONE, TopicName, UserId};
use crate::ring::Ring;
use crate::role::auth::{Auth, TOKEN_TTL_S};
use crate::watching::WatchRights;
use crate::wire::frame::{Since, WatchSince};
use crate::wire::rest::ClusterResponse;

/// Deadline of one request: longer than the server's own deadline for a publish.
pub(super) const REQUEST_DEADLINE: Duration = Duration::from_secs(15);
/// The close code of a connection whose place a newer one has taken.
const REPLACED: u16 = 4509;
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
        let secure = listening["tls"].as_array();
        let is_secure = secure.is_some_and(|roles| roles.iter().any(|name| name == role));
        Ok(format!("{}://{at}", if is_secure { "https" } else { "http" }))
    }
}

pub(super) fn user_id(text: &str) -> Result<UserId> {
    UserId::parse(text).map_err(|rule| Faults(vec![format!("USER: {rule}")]).into())
}

pub(super) fn topic_name(argument: &str, text: &str) -> Result<TopicName> {
    TopicName::parse(text).map_err(|rule| Faults(vec![format!("{argument}: {text:?}: {rule}")]).into())
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
/// A bad user, life or pattern; a key that cannot sign.
pub fn token(mut config: Config, user: &str, ttl: &str, watch: &[String]) -> Result<ExitCode> {
    let user = user_id(user)?;
    let rule =
        || Faults(vec![format!("--ttl: {ttl:?} must be a time from 1s to 90d, such as 90s, 15m, 1h or 7d")]);
    let ttl_s = seconds(ttl).filter(|s| TOKEN_TTL_S.contains(s)).ok_or_else(rule)?;
    let watch = watch_rights(watch)?;
    print_line(signer(&mut config)?.issue_with(&user, ttl_s, watch.as_ref())?.0)?;
    Ok(ExitCode::SUCCESS)
}

/// The right to watch topics; none if there are no patterns.
fn watch_rights(patterns: &[String]) -> Result<Option<WatchRights>> {
    if patterns.is_empty() {
        return Ok(None);
    }
    let rights = WatchRights::parse(patterns.iter().map(String::as_str));
    Ok(Some(rights.map_err(|rule| Faults(vec![format!("--watch: {rule}")]))?))
}

pub(super) fn signer(config: &mut Config) -> Result<Auth> {
    Keys::with(config, |keys| !keys.token_key.is_empty())?;
    Auth::new(config.auth.clone(), Clock::system())
        .map_err(|(n, fault)| Faults(vec![format!("{}: {fault}", config.token_key_name(n))]).into())
}

/// Parses a duration such as `90s`, `15m`, `1h 30m` or `7d`, in whole seconds.
#[must_use]
pub fn seconds(text: &str) -> Option<u64> {
    humantime::parse_duration(text).ok().map(|duration| duration.as_secs())
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
    watch: &[String],
) -> Result<ExitCode> {
    let user = user_id(user)?;
    let rights = watch_rights(watch)?;
    DeviceId::parse(device).map_err(|rule| Faults(vec![format!("--device: {rule}")]))?;
    let target = at.url(&config, "push")?;
    let auth = signer(&mut config)?;
    auth.issue(&user, LISTEN_TOKEN_S)?;
    let token = move |_| {
        let issued = auth.issue_with(&user, LISTEN_TOKEN_S, rights.as_ref()).map(|issued| issued.0);
        std::future::ready(issued.map_err(|fault| TokenError::Refused(fault.to_string())))
    };
    let mut options = connect(target, token).device(device);
    if let Some(since) = since {
        options = options.since(since);
    }
    let mut inbox = options.start()?;
    for topic in watch {
        inbox
            .handle()
            .watch(topic, WatchSince::Latest)
            .map_err(|rule| Faults(vec![format!("--watch: {rule}")]))?;
    }
    let mut notices = inbox.notices();
    let interrupted = tokio::signal::ctrl_c();
    tokio::pin!(interrupted);
    loop {
        tokio::select! {
            // In this order a message is not shown before the connection that brought it.
            biased;
            _ = &mut interrupted => {
                inbox.handled();
                inbox.close().await;
                return Ok(ExitCode::SUCCESS);
            }
            Some(notice) = notices.next() => show_notice(&notice)?,
            item = inbox.next() => match item {
                Ok(Some(Item::Message(message))) => show(&message)?,
                Ok(Some(Item::Gap(gap))) => say(format_args!(
                    "ringpush: what was between {} and {}{} is gone ({:?})",
                    gap.after,
                    gap.before,
                    gap.topic.map_or_else(String::new, |topic| format!(" of {topic}")),
                    gap.reason
                )),
                Ok(None) => return Ok(ExitCode::SUCCESS),
                Err(stopped) => match stopped.code {
                    Some(code) => bail!(
                        "the server refused with {code} ({}); see the table of close codes",
                        stopped.cause
                    ),
                    None => return Err(stopped.into()),
                },
            },
        }
    }
}

/// Prints a message to standard output.
fn show(message: &Message) -> Result<()> {
    let event = message.event.as_ref().map_or_else(String::new, |event| format!(r#""event":"{event}","#));
    let topic = match (&message.topic, message.in_log) {
        (Some(topic), true) if topic == EVERYONE => r#""everyone":true,"#.to_owned(),
        (Some(topic), true) => format!(r#""topic":"{topic}","#),
        (Some(topic), false) => format!(r#""via":"{topic}","#),
        (None, _) => String::new(),
    };
    let line = format!(
        r#"{{"seq":{},"id":{},{event}{topic}"accepted_at":"{}","expires_at":"{}","payload":{}}}"#,
        message.seq,
        Value::from(message.id.as_str()),
        message.accepted_at,
        message.expires_at,
        message.payload.get().replace(['\n', '\r'], " "),
    );
    Ok(print_line(line)?)
}

/// Prints what happens beside the messages to standard error.
///
/// # Errors
///
/// There is no next try, because a newer connection of the device has taken the place of this one.
fn show_notice(notice: &Notice) -> Result<()> {
    match notice {
        Notice::State(State::CatchingUp { node, since }) => {
            say(format_args!("ringpush: connected to {node}, after {since}"));
        }
        Notice::State(State::Live { node }) => {
            say(format_args!("ringpush: caught up on {node}; what follows is live"));
        }
        Notice::State(State::Moving { node, reason }) => {
            say(format_args!("ringpush: moving to {node} ({reason:?})"));
        }
        Notice::State(State::Waiting { cause, rest: Some(rest) }) => {
            say(format_args!("ringpush: {cause}; next try in {} ms", rest.as_millis()));
        }
        Notice::State(State::Waiting { cause, rest: None }) => {
            bail!("the server refused with {REPLACED} ({cause}); see the table of close codes");
        }
        Notice::State(State::Connecting | State::Stopped(_)) => {}
        Notice::Fault { code, detail } => say(format_args!("ringpush: {code}: {detail}")),
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
