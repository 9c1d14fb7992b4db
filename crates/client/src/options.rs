//! Whom to receive for, and how.

use std::sync::Arc;

use ringpush_protocol::frame::{Begin, Since, WINDOW_MAX};
use ringpush_protocol::message::DeviceId;

use crate::http::HttpClient;
use crate::inbox::Inbox;
use crate::tokens::TokenSource;

/// Default of [`Options::window`].
const WINDOW: u32 = 256;

/// When a message is acked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AckWhen {
    /// When it is handled: the application asks for the next one, or says [`Inbox::handled`].
    #[default]
    Handled,
    /// When it is received.
    Received,
}

/// What [`Options::start`] refuses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OptionsError {
    /// The URL has another scheme.
    #[error("url: {0:?} must begin with http:// or https://")]
    Url(String),
    /// The name of the device breaks this rule.
    #[error("device: {0}")]
    Device(String),
    /// The window is outside its range.
    #[error("window: {0} must be from 1 to 10000")]
    Window(u32),
    /// `start` was called outside of a tokio runtime.
    #[error("a tokio runtime must run the client: call start() in one")]
    NoRuntime,
}

/// Whom to receive for, and how. [`connect`] makes one.
#[derive(Clone)]
#[must_use = "nothing connects before start()"]
pub struct Options {
    pub(crate) url: String,
    pub(crate) token: Arc<dyn TokenSource>,
    pub(crate) device: Option<String>,
    pub(crate) user: Option<String>,
    pub(crate) since: Option<Since>,
    pub(crate) begin: Option<Begin>,
    pub(crate) window: u32,
    pub(crate) ack: AckWhen,
    pub(crate) ask_first: bool,
    pub(crate) http: Option<HttpClient>,
}

/// Options with their defaults. `url` is that of the load balancer or of any push node, such as
/// `https://push.example.com`; `token` is the user's token, or a closure that fetches one.
pub fn connect(url: impl Into<String>, token: impl TokenSource) -> Options {
    Options {
        url: url.into(),
        token: Arc::new(token),
        device: None,
        user: None,
        since: None,
        begin: None,
        window: WINDOW,
        ack: AckWhen::default(),
        ask_first: true,
        http: None,
    }
}

impl Options {
    /// The device, whose cursor the server keeps. Without one each start is a new device, which is
    /// told as the notice `device_not_kept`.
    pub fn device(self, name: impl Into<String>) -> Self {
        Self { device: Some(name.into()), ..self }
    }

    /// The user who is meant to be logged in: a token of another user stops the client before
    /// anything is handed on or acked.
    pub fn user(self, name: impl Into<String>) -> Self {
        Self { user: Some(name.into()), ..self }
    }

    /// Where the first line starts. Default: at the device's cursor.
    pub fn since(self, since: Since) -> Self {
        Self { since: Some(since), ..self }
    }

    /// Where a device starts that has no cursor. Default: with the oldest message.
    pub fn begin(self, begin: Begin) -> Self {
        Self { begin: Some(begin), ..self }
    }

    /// Most messages that the server sends ahead of the acks, 1 to 10,000. Default: 256.
    pub fn window(self, messages: u32) -> Self {
        Self { window: messages, ..self }
    }

    /// When a message is acked.
    pub fn ack(self, when: AckWhen) -> Self {
        Self { ack: when, ..self }
    }

    /// Whether `POST /v1/connect` is asked for the user's node before each line. Default: true.
    /// Otherwise any node is taken, and moves are followed.
    pub fn ask_first(self, asks: bool) -> Self {
        Self { ask_first: asks, ..self }
    }

    /// The HTTP client that asks `connect`. Clones of one share their connections and their trusted
    /// roots, which take 100 KiB.
    pub fn http(self, client: HttpClient) -> Self {
        Self { http: Some(client), ..self }
    }

    /// Begins to connect.
    ///
    /// # Errors
    ///
    /// [`OptionsError`]. Faults of the network are none: the client tries until it succeeds.
    pub fn start(self) -> Result<Inbox, OptionsError> {
        if !self.url.starts_with("http://") && !self.url.starts_with("https://") {
            return Err(OptionsError::Url(self.url));
        }
        if !(1..=WINDOW_MAX).contains(&self.window) {
            return Err(OptionsError::Window(self.window));
        }
        let (device, is_kept) = match &self.device {
            Some(name) => {
                (DeviceId::parse(name).map_err(|rule| OptionsError::Device(rule.to_string()))?, true)
            }
            None => {
                let made = format!("rust-{:016x}", rand::random::<u64>());
                (DeviceId::parse(&made).map_err(|rule| OptionsError::Device(rule.to_string()))?, false)
            }
        };
        let runtime = tokio::runtime::Handle::try_current().map_err(|_| OptionsError::NoRuntime)?;
        Ok(Inbox::start(self, device, is_kept, &runtime))
    }
}
