//! The frames that a client sends, and what it may ask of its session.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::message::{ClientName, DeviceId, EVERYONE, Seq, TopicName};

/// A frame from a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClientFrame {
    /// The first frame, if no token came with the request.
    Auth(Box<AuthFrame>),
    /// The client has handled everything up to this number, on this device.
    Ack(u64),
    /// The client has handled everything up to these numbers, in logs.
    AckLogs(Box<LogAcks>),
    /// The client wants to read the log of a topic, without being a member.
    Watch(TopicName, WatchSince),
    /// The client wants to read it no more.
    Unwatch(TopicName),
    /// A new token for the same user.
    Refresh(String),
    /// A ping of a client that cannot send WebSocket pings.
    Ping,
}

/// An ack that names logs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogAcks {
    /// Of the inbox, if it is acked too.
    pub seq: Option<u64>,
    /// Of topics.
    pub topics: Vec<(TopicName, u64)>,
    /// Of the log of all users.
    pub everyone: Option<u64>,
}

/// Where watching a topic begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WatchSince {
    /// After this position.
    After(Seq),
    /// With what comes from now on.
    Latest,
    /// With the newest message.
    Last,
}

/// What a client that understands logs says of them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogOptions {
    /// Its positions in the logs of topics; at most [`TOPICS_IN_AUTH`].
    pub topics: Vec<(TopicName, Seq)>,
    /// Its position in the log of all users.
    pub everyone: Option<Seq>,
}

/// Most topics that an `auth` frame names.
pub const TOPICS_IN_AUTH: usize = 128;

/// The `auth` frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuthFrame {
    /// What shows who the client is, unverified; `None` if that came with the request.
    pub credential: Option<AuthCredential>,
    /// What the client asks of its session.
    pub options: SessionOptions,
}

/// What a client shows in its `auth` frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AuthCredential {
    /// A token.
    Token(String),
    /// A ticket from `connect`.
    Ticket(String),
}

/// What a client asks of its session, in the query of its request or in its `auth` frame.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SessionOptions {
    /// The device, if the client names one.
    pub device: Option<DeviceId>,
    /// Where to start, if the client says so.
    pub since: Option<Since>,
    /// Where a device without a cursor starts, if the client says so.
    pub begin: Option<Begin>,
    /// A `heartbeat` frame comes beside each ping.
    pub heartbeat: Option<bool>,
    /// Most messages that may be sent ahead of the client's acks, 1 to [`WINDOW_MAX`].
    pub window: Option<u32>,
    /// Name and version of the client's library or program.
    pub client: Option<ClientName>,
    /// The client understands logs of topics. Only an `auth` frame says so.
    pub logs: Option<Box<LogOptions>>,
}

impl SessionOptions {
    /// These options, and for what they leave open, those of `other`.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self {
            device: self.device.or(other.device),
            since: self.since.or(other.since),
            begin: self.begin.or(other.begin),
            heartbeat: self.heartbeat.or(other.heartbeat),
            window: self.window.or(other.window),
            client: self.client.or(other.client),
            logs: self.logs.or(other.logs),
        }
    }
}

/// Where a device starts that has no cursor, if no `since` is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begin {
    /// With the oldest message that is stored.
    Oldest,
    /// With what comes from now on.
    Latest,
}

impl Begin {
    /// Parses `oldest` or `latest`.
    ///
    /// # Errors
    ///
    /// The rule that `text` breaks.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        match text {
            "oldest" => Ok(Self::Oldest),
            "latest" => Ok(Self::Latest),
            _ => Err("begin is \"oldest\" or \"latest\""),
        }
    }
}

/// Largest `window`.
pub const WINDOW_MAX: u32 = 10_000;

const WINDOW_RULE: &str = "window is an integer from 1 to 10000";

/// Parses a `window`.
///
/// # Errors
///
/// The rule that `text` breaks.
pub fn parse_window(text: &str) -> Result<u32, &'static str> {
    text.parse().ok().filter(|window| (1..=WINDOW_MAX).contains(window)).ok_or(WINDOW_RULE)
}

/// Largest `auth` frame, in bytes: a token of 8 KiB, and the positions of 128 topics.
pub const AUTH_MAX_BYTES: usize = 24 * 1024;

/// Largest `refresh` frame, in bytes: a token of 8 KiB.
pub const REFRESH_MAX_BYTES: usize = 12 * 1024;

/// Largest other frame of a client, in bytes.
pub const OTHER_MAX_BYTES: usize = 4 * 1024;

/// Where a session starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Since {
    /// After this position.
    After(Seq),
    /// Only what comes from now on.
    Latest,
}

impl Since {
    /// Parses `latest` or a number.
    ///
    /// # Errors
    ///
    /// The rule that `text` breaks.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        if text == "latest" {
            return Ok(Self::Latest);
        }
        text.parse().ok().and_then(Seq::new).map(Self::After).ok_or(SINCE_RULE)
    }
}

const SINCE_RULE: &str = "since is a seq (an integer from 0 to 2^53 - 1) or \"latest\"";

#[derive(Deserialize)]
struct Tagged<'a> {
    #[serde(rename = "type", borrow)]
    kind: std::borrow::Cow<'a, str>,
    #[serde(borrow)]
    token: Option<&'a RawValue>,
    #[serde(borrow)]
    device: Option<&'a RawValue>,
    #[serde(borrow)]
    ticket: Option<&'a RawValue>,
    #[serde(borrow)]
    client: Option<&'a RawValue>,
    #[serde(borrow)]
    since: Option<&'a RawValue>,
    #[serde(borrow)]
    seq: Option<&'a RawValue>,
    #[serde(borrow)]
    begin: Option<&'a RawValue>,
    #[serde(borrow)]
    heartbeat: Option<&'a RawValue>,
    #[serde(borrow)]
    window: Option<&'a RawValue>,
    #[serde(borrow)]
    topics: Option<&'a RawValue>,
    #[serde(borrow)]
    everyone: Option<&'a RawValue>,
    #[serde(borrow)]
    topic: Option<&'a RawValue>,
}

const POSITION_RULE: &str = "an integer from 0 to 2^53 - 1";

/// A position in a log.
fn position(raw: &RawValue) -> Option<u64> {
    raw.get().parse().ok().filter(|n| *n <= Seq::MAX.get())
}

/// Positions by topic, at most `most` where that is limited.
fn positions(raw: &RawValue, most: Option<usize>) -> Result<Vec<(TopicName, u64)>, String> {
    let rule = || {
        let at_most = most.map(|most| format!("at most {most} ")).unwrap_or_default();
        format!("topics maps {at_most}names of topics to {POSITION_RULE}")
    };
    let read: BTreeMap<String, u64> = serde_json::from_str(raw.get()).map_err(|_| rule())?;
    if most.is_some_and(|most| read.len() > most) || read.values().any(|n| *n > Seq::MAX.get()) {
        return Err(rule());
    }
    let named = |(name, n): (String, u64)| {
        Ok((TopicName::parse(&name).map_err(|rule| format!("topics: {rule}"))?, n))
    };
    read.into_iter().map(named).collect()
}

impl Tagged<'_> {
    fn ack(self) -> Result<ClientFrame, String> {
        let numbered = |name: &str, raw: Option<&RawValue>| {
            let read = |raw| position(raw).ok_or_else(|| format!("{name} of an ack is {POSITION_RULE}"));
            raw.map(read).transpose()
        };
        match (self.topics, self.everyone) {
            (None, None) => {
                let rule = || format!("ack needs \"seq\", {POSITION_RULE}");
                Ok(ClientFrame::Ack(self.seq.and_then(position).ok_or_else(rule)?))
            }
            (topics, everyone) => Ok(ClientFrame::AckLogs(Box::new(LogAcks {
                seq: numbered("seq", self.seq)?,
                topics: topics.map(|raw| positions(raw, None)).transpose()?.unwrap_or_default(),
                everyone: numbered(EVERYONE, everyone)?,
            }))),
        }
    }

    fn topic_name(&self) -> Result<TopicName, String> {
        let text = self.topic.and_then(|raw| serde_json::from_str::<String>(raw.get()).ok());
        let text = text.ok_or_else(|| format!("{} needs \"topic\", a string", self.kind))?;
        TopicName::parse(&text).map_err(|fault| fault.to_string())
    }

    fn watch(&self) -> Result<ClientFrame, String> {
        let since = match self.since.map(RawValue::get) {
            None | Some("\"latest\"") => WatchSince::Latest,
            Some("\"last\"") => WatchSince::Last,
            Some(_) => {
                let rule = || format!("since is {POSITION_RULE}, \"latest\" or \"last\"");
                let after = self.since.and_then(position).and_then(Seq::new).ok_or_else(rule)?;
                WatchSince::After(after)
            }
        };
        Ok(ClientFrame::Watch(self.topic_name()?, since))
    }

    fn logs(&self) -> Result<Option<Box<LogOptions>>, String> {
        let topics = match self.topics.map(RawValue::get) {
            None | Some("false") if self.everyone.is_some() => {
                return Err("everyone stands beside topics".to_owned());
            }
            None | Some("false") => return Ok(None),
            Some("true") => Vec::new(),
            Some(_) => self.topics.map_or(Ok(Vec::new()), |raw| positions(raw, Some(TOPICS_IN_AUTH)))?,
        };
        let topics = topics.into_iter().map(|(name, n)| (name, Seq::at(n))).collect();
        let rule = || format!("everyone is {POSITION_RULE}");
        let everyone = self.everyone.map(|raw| position(raw).ok_or_else(rule)).transpose()?;
        Ok(Some(Box::new(LogOptions { topics, everyone: everyone.map(Seq::at) })))
    }

    fn auth(self) -> Result<AuthFrame, String> {
        let text = |name: &str, raw: Option<&RawValue>| {
            let read = |raw: &RawValue| serde_json::from_str::<String>(raw.get());
            raw.map(read).transpose().map_err(|_| format!("{name} is a string"))
        };
        let (token, ticket) = (text("token", self.token)?, text("ticket", self.ticket)?);
        let credential = match (token, ticket) {
            (Some(_), Some(_)) => return Err("auth has \"token\" or \"ticket\", not both".to_owned()),
            (Some(token), None) => Some(AuthCredential::Token(token)),
            (None, Some(ticket)) => Some(AuthCredential::Ticket(ticket)),
            (None, None) => None,
        };
        let logs = self.logs()?;
        let heartbeat = match self.heartbeat.map(RawValue::get) {
            None => None,
            Some("true") => Some(true),
            Some("false") => Some(false),
            Some(_) => return Err("heartbeat is true or false".to_owned()),
        };
        Ok(AuthFrame {
            credential,
            options: SessionOptions {
                device: text("device", self.device)?
                    .map(|name| DeviceId::parse(&name))
                    .transpose()
                    .map_err(|fault| fault.to_string())?,
                since: self.since.map(|raw| Since::parse(raw.get().trim_matches('"'))).transpose()?,
                begin: text("begin", self.begin)?.map(|name| Begin::parse(&name)).transpose()?,
                heartbeat,
                window: self.window.map(|raw| parse_window(raw.get())).transpose()?,
                client: text("client", self.client)?
                    .map(|name| ClientName::parse(&name))
                    .transpose()
                    .map_err(|fault| fault.to_string())?,
                logs,
            },
        })
    }
}

impl ClientFrame {
    /// Parses one text message of a client.
    ///
    /// # Errors
    ///
    /// What is wrong, for the `error` frame. It never contains a part of a token.
    pub fn parse(text: &[u8]) -> Result<Self, String> {
        // serde would accept an array for a struct.
        if text.trim_ascii_start().first() != Some(&b'{') {
            return Err("a frame is one JSON object".to_owned());
        }
        let frame: Tagged<'_> = serde_json::from_slice(text).map_err(|fault| describe(&fault))?;
        match &*frame.kind {
            "ack" => frame.ack(),
            "watch" => frame.watch(),
            "unwatch" => frame.topic_name().map(Self::Unwatch),
            "ping" => Ok(Self::Ping),
            "refresh" => {
                let token = frame.token.and_then(|raw| serde_json::from_str(raw.get()).ok());
                Ok(Self::Refresh(token.ok_or("refresh needs \"token\", a string")?))
            }
            "auth" => frame.auth().map(|auth| Self::Auth(Box::new(auth))),
            _ => Err("unknown type: a client sends auth, ack, refresh, ping, watch or unwatch".to_owned()),
        }
    }

    /// Encodes the frame as a client sends it.
    #[must_use]
    pub fn encode(&self) -> String {
        match self {
            Self::Ack(seq) => format!(r#"{{"type":"ack","seq":{seq}}}"#),
            Self::AckLogs(acks) => acks.encode().to_string(),
            Self::Watch(topic, since) => {
                let since: serde_json::Value = match since {
                    WatchSince::After(seq) => seq.get().into(),
                    WatchSince::Latest => "latest".into(),
                    WatchSince::Last => "last".into(),
                };
                serde_json::json!({"type": "watch", "topic": topic.as_str(), "since": since}).to_string()
            }
            Self::Unwatch(topic) => {
                serde_json::json!({"type": "unwatch", "topic": topic.as_str()}).to_string()
            }
            Self::Ping => r#"{"type":"ping"}"#.to_owned(),
            Self::Refresh(token) => serde_json::json!({"type": "refresh", "token": token}).to_string(),
            Self::Auth(auth) => auth.encode().to_string(),
        }
    }

    /// The most bytes that a frame may have whose text says that it is of this type; what says
    /// nothing may have as many as most types.
    #[must_use]
    pub fn max_bytes_of(text: &[u8]) -> usize {
        #[derive(Deserialize)]
        struct Kind<'a> {
            #[serde(rename = "type", borrow)]
            kind: std::borrow::Cow<'a, str>,
        }
        match serde_json::from_slice::<Kind<'_>>(text).as_ref().map(|kind| &*kind.kind) {
            Ok("auth") => AUTH_MAX_BYTES,
            Ok("refresh") => REFRESH_MAX_BYTES,
            _ => OTHER_MAX_BYTES,
        }
    }

    /// The most bytes that a frame of this kind may have.
    #[must_use]
    pub fn max_bytes(&self) -> usize {
        match self {
            Self::Auth(_) => AUTH_MAX_BYTES,
            Self::Refresh(_) => REFRESH_MAX_BYTES,
            Self::Ack(_) | Self::AckLogs(_) | Self::Watch(..) | Self::Unwatch(_) | Self::Ping => {
                OTHER_MAX_BYTES
            }
        }
    }
}

/// Positions by topic, as a client sends them.
fn by_topic(all: impl Iterator<Item = (String, u64)>) -> serde_json::Value {
    all.map(|(name, n)| (name, n.into())).collect::<serde_json::Map<_, _>>().into()
}

impl LogAcks {
    fn encode(&self) -> serde_json::Value {
        let mut frame = serde_json::json!({"type": "ack"});
        if let Some(seq) = self.seq {
            frame["seq"] = seq.into();
        }
        if !self.topics.is_empty() {
            frame["topics"] = by_topic(self.topics.iter().map(|(name, n)| (name.to_string(), *n)));
        }
        if let Some(seq) = self.everyone {
            frame[EVERYONE] = seq.into();
        }
        frame
    }
}

impl AuthFrame {
    fn encode(&self) -> serde_json::Value {
        let mut frame = serde_json::json!({"type": "auth"});
        match &self.credential {
            Some(AuthCredential::Token(token)) => frame["token"] = token.as_str().into(),
            Some(AuthCredential::Ticket(ticket)) => frame["ticket"] = ticket.as_str().into(),
            None => {}
        }
        let SessionOptions { device, since, begin, heartbeat, window, client, logs } = &self.options;
        if let Some(device) = device {
            frame["device"] = device.as_str().into();
        }
        match since {
            Some(Since::After(seq)) => frame["since"] = seq.get().into(),
            Some(Since::Latest) => frame["since"] = "latest".into(),
            None => {}
        }
        match begin {
            Some(Begin::Oldest) => frame["begin"] = "oldest".into(),
            Some(Begin::Latest) => frame["begin"] = "latest".into(),
            None => {}
        }
        if let Some(heartbeat) = heartbeat {
            frame["heartbeat"] = (*heartbeat).into();
        }
        if let Some(window) = window {
            frame["window"] = (*window).into();
        }
        if let Some(client) = client {
            frame["client"] = client.as_str().into();
        }
        if let Some(logs) = logs {
            frame["topics"] = match &logs.topics[..] {
                [] => true.into(),
                topics => by_topic(topics.iter().map(|(name, seq)| (name.to_string(), seq.get()))),
            };
            if let Some(seq) = logs.everyone {
                frame[EVERYONE] = seq.get().into();
            }
        }
        frame
    }
}

fn describe(fault: &serde_json::Error) -> String {
    match fault.classify() {
        serde_json::error::Category::Data => {
            "a frame is a JSON object with \"type\" and fields of the right type".to_owned()
        }
        _ => "a frame is one JSON object".to_owned(),
    }
}
