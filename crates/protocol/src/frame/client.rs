//! The frames that a client sends, and what it may ask of its session.

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::message::{ClientName, DeviceId, Seq};

/// A frame from a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClientFrame {
    /// The first frame, if no token came with the request.
    Auth(Box<AuthFrame>),
    /// The client has handled everything up to this number, on this device.
    Ack(u64),
    /// A new token for the same user.
    Refresh(String),
    /// A ping of a client that cannot send WebSocket pings.
    Ping,
}

/// The `auth` frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuthFrame {
    /// What shows who the client is, unverified.
    pub credential: AuthCredential,
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
}

impl Tagged<'_> {
    fn auth(self) -> Result<AuthFrame, String> {
        let text = |name: &str, raw: Option<&RawValue>| {
            let read = |raw: &RawValue| serde_json::from_str::<String>(raw.get());
            raw.map(read).transpose().map_err(|_| format!("{name} is a string"))
        };
        let (token, ticket) = (text("token", self.token)?, text("ticket", self.ticket)?);
        let credential = match (token, ticket) {
            (Some(_), Some(_)) => return Err("auth has \"token\" or \"ticket\", not both".to_owned()),
            (Some(token), None) => AuthCredential::Token(token),
            (None, Some(ticket)) => AuthCredential::Ticket(ticket),
            (None, None) => return Err("auth needs \"token\" or \"ticket\", a string".to_owned()),
        };
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
            "ack" => Ok(Self::Ack(
                frame
                    .seq
                    .and_then(|raw| raw.get().parse().ok())
                    .filter(|n| *n <= Seq::MAX.get())
                    .ok_or("ack needs \"seq\", an integer from 0 to 2^53 - 1")?,
            )),
            "ping" => Ok(Self::Ping),
            "refresh" => {
                let token = frame.token.and_then(|raw| serde_json::from_str(raw.get()).ok());
                Ok(Self::Refresh(token.ok_or("refresh needs \"token\", a string")?))
            }
            "auth" => frame.auth().map(|auth| Self::Auth(Box::new(auth))),
            _ => Err("unknown type: a client sends auth, ack, refresh or ping".to_owned()),
        }
    }

    /// Encodes the frame as a client sends it.
    #[must_use]
    pub fn encode(&self) -> String {
        match self {
            Self::Ack(seq) => format!(r#"{{"type":"ack","seq":{seq}}}"#),
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
            Self::Ack(_) | Self::Ping => OTHER_MAX_BYTES,
        }
    }
}

impl AuthFrame {
    fn encode(&self) -> serde_json::Value {
        let mut frame = serde_json::json!({"type": "auth"});
        match &self.credential {
            AuthCredential::Token(token) => frame["token"] = token.as_str().into(),
            AuthCredential::Ticket(ticket) => frame["ticket"] = ticket.as_str().into(),
        }
        let SessionOptions { device, since, begin, heartbeat, window, client } = &self.options;
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
