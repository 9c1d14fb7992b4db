//! A WebSocket as a stranger's client has it: tungstenite for what is well formed, bytes for what
//! is not.

use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

use super::{DEADLINE, http};

pub struct Socket {
    inner: WebSocketStream<MaybeTlsStream<TcpStream>>,
    /// The last message's number.
    pub last: u64,
}

/// How a socket ended.
#[derive(Debug, PartialEq, Eq)]
pub struct Closed {
    pub code: u16,
    pub reason: String,
    /// The `error` frame before it, if one came.
    pub error: Option<String>,
    pub reconnect: bool,
    /// What that frame says for people, and its hint for the next reconnect.
    pub message: Option<String>,
    pub hint: Value,
}

impl Socket {
    pub async fn open(url: &str, token: Option<&str>) -> Self {
        match Self::try_open(url, token, &[]).await {
            Ok(socket) => socket,
            Err(status) => panic!("{url} was answered {status}"),
        }
    }

    /// The status, where the upgrade was refused.
    pub async fn try_open(
        url: &str,
        token: Option<&str>,
        headers: &[(&'static str, &str)],
    ) -> Result<Self, u16> {
        let mut request = url.into_client_request().unwrap();
        if let Some(token) = token {
            request.headers_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
        }
        for (name, value) in headers {
            request.headers_mut().insert(*name, value.parse().unwrap());
        }
        match tokio::time::timeout(DEADLINE, connect_async(request)).await.expect("an answer in time") {
            Ok((inner, _)) => Ok(Self { inner, last: 0 }),
            Err(Error::Http(response)) => Err(response.status().as_u16()),
            Err(error) => panic!("{url}: {error}"),
        }
    }

    /// Status and problem of a request for a socket that is refused.
    pub async fn refusal(url: &str, token: Option<&str>) -> (u16, Value) {
        let mut request = url.into_client_request().unwrap();
        if let Some(token) = token {
            request.headers_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
        }
        match tokio::time::timeout(DEADLINE, connect_async(request)).await.expect("an answer in time") {
            Err(Error::Http(response)) => {
                let body = response.body().as_deref().unwrap_or_default();
                (response.status().as_u16(), serde_json::from_slice(body).unwrap_or_default())
            }
            other => panic!("{url} was not refused: {other:?}"),
        }
    }

    pub async fn say(&mut self, frame: &Value) {
        self.say_text(&frame.to_string()).await;
    }

    pub async fn say_text(&mut self, text: &str) {
        self.inner.send(Message::text(text)).await.unwrap();
    }

    pub async fn say_binary(&mut self, bytes: &[u8]) {
        self.inner.send(Message::binary(bytes.to_vec())).await.unwrap();
    }

    pub async fn ack(&mut self, seq: u64) {
        self.say(&json!({"type": "ack", "seq": seq})).await;
    }

    /// The next frame; a close is a failure.
    pub async fn frame(&mut self) -> Value {
        match self.next().await {
            Ok(frame) => frame,
            Err(closed) => panic!("closed: {closed:?}"),
        }
    }

    async fn next(&mut self) -> Result<Value, Closed> {
        loop {
            let next = tokio::time::timeout(DEADLINE, self.inner.next()).await.expect("a frame in time");
            match next {
                Some(Ok(Message::Text(text))) => {
                    let frame: Value = serde_json::from_str(&text).unwrap();
                    if frame["type"] == "message" {
                        self.last = frame["seq"].as_u64().unwrap();
                    }
                    return Ok(frame);
                }
                Some(Ok(Message::Close(frame))) => {
                    let (code, reason) =
                        frame.map_or((1005, String::new()), |f| (f.code.into(), f.reason.to_string()));
                    return Err(Closed {
                        code,
                        reason,
                        error: None,
                        reconnect: false,
                        message: None,
                        hint: Value::Null,
                    });
                }
                Some(Ok(_)) => {}
                Some(Err(_)) | None => {
                    return Err(Closed {
                        code: 1006,
                        reason: String::new(),
                        error: None,
                        reconnect: false,
                        message: None,
                        hint: Value::Null,
                    });
                }
            }
        }
    }

    /// The next frame of a type; no frame of another type may come before it, save those named.
    pub async fn expect(&mut self, kind: &str) -> Value {
        let frame = self.frame().await;
        assert_eq!(frame["type"], kind, "{frame}");
        frame
    }

    /// Reads until a frame of this type; answers the messages on the way and that frame.
    pub async fn until(&mut self, kind: &str) -> (Vec<Value>, Value) {
        let mut before = Vec::new();
        loop {
            let frame = self.frame().await;
            if frame["type"] == kind {
                return (before, frame);
            }
            before.push(frame);
        }
    }

    /// `welcome`, the backlog and `caught_up`; the payloads of the backlog.
    pub async fn caught_up(&mut self) -> Vec<Value> {
        self.expect("welcome").await;
        let (frames, _) = self.until("caught_up").await;
        frames.into_iter().filter(|f| f["type"] == "message").map(|f| f["payload"].clone()).collect()
    }

    /// The next `count` messages, which must follow on one another.
    pub async fn messages(&mut self, count: usize) -> Vec<Value> {
        let mut payloads = Vec::new();
        while payloads.len() < count {
            let before = self.last;
            let frame = self.frame().await;
            if frame["type"] == "message" {
                assert!(before == 0 || self.last == before + 1, "{} after {before}", self.last);
                payloads.push(frame["payload"].clone());
            }
        }
        payloads
    }

    /// The next message, or nothing more.
    pub async fn message_or_end(&mut self) -> Option<Value> {
        loop {
            match self.next().await {
                Ok(frame) if frame["type"] == "message" => return Some(frame),
                Ok(_) => {}
                Err(_) => return None,
            }
        }
    }

    /// Reads to the end.
    pub async fn closed(&mut self) -> Closed {
        let (mut error, mut reconnect, mut message, mut hint) = (None, false, None, Value::Null);
        loop {
            match self.next().await {
                Ok(frame) if frame["type"] == "error" => {
                    error = frame["code"].as_str().map(str::to_owned);
                    reconnect = frame["reconnect"].is_object();
                    message = frame["message"].as_str().map(str::to_owned);
                    hint = frame["reconnect"].clone();
                }
                Ok(_) => {}
                Err(closed) => return Closed { error, reconnect, message, hint, ..closed },
            }
        }
    }

    /// Nothing but pings comes for a while.
    pub async fn is_quiet(&mut self, during: Duration) {
        let until = tokio::time::Instant::now() + during;
        while let Ok(next) = tokio::time::timeout_at(until, self.inner.next()).await {
            assert!(matches!(next, Some(Ok(Message::Ping(_)))), "{next:?} came, and nothing should");
        }
    }

    pub async fn close(mut self) {
        let _ = self.inner.close(None).await;
    }
}

/// A WebSocket of which every byte is written by hand.
pub struct Raw {
    stream: TcpStream,
}

impl Raw {
    /// Asks for the upgrade, and reads the 101.
    pub async fn open(at: &str, token: &str) -> Self {
        let mut raw = Self::connect(at).await;
        raw.write(Self::request(token, "").as_bytes()).await;
        raw.upgraded().await;
        raw
    }

    pub async fn connect(at: &str) -> Self {
        Self { stream: TcpStream::connect(at).await.unwrap() }
    }

    /// A request for the upgrade, with more header lines if there are any.
    pub fn request(token: &str, more: &str) -> String {
        format!(
            "GET /v1/ws HTTP/1.1\r\nhost: x\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\
             sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
             authorization: Bearer {token}\r\n{more}\r\n"
        )
    }

    pub async fn upgraded(&mut self) {
        let answer = self.answer().await;
        assert_eq!(answer.status, 101);
        assert_eq!(
            answer.header("sec-websocket-accept"),
            "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=",
            "RFC 6455, section 1.3"
        );
    }

    /// An answer of HTTP, with as much of a body as it says.
    pub async fn answer(&mut self) -> http::Answer {
        let reading = async {
            let mut read = Vec::new();
            while !read.ends_with(b"\r\n\r\n") {
                read.push(self.stream.read_u8().await.unwrap());
            }
            let length = http::parse(&read).header("content-length").parse().unwrap_or(0);
            let head = read.len();
            read.resize(head + length, 0);
            self.stream.read_exact(&mut read[head..]).await.unwrap();
            http::parse(&read)
        };
        tokio::time::timeout(DEADLINE, reading).await.expect("an answer in time")
    }

    pub async fn write(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    /// A masked frame: first byte, and payload under an all-zero mask.
    pub fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![first];
        match payload.len() {
            short @ 0..=125 => frame.push(0x80 | short as u8),
            long => {
                frame.push(0x80 | 126);
                frame.extend_from_slice(&(long as u16).to_be_bytes());
            }
        }
        frame.extend_from_slice(&[0; 4]);
        frame.extend_from_slice(payload);
        frame
    }

    /// The next frame: its first byte, and its payload.
    async fn read(&mut self) -> (u8, Vec<u8>) {
        let first = self.stream.read_u8().await.expect("a frame before the end");
        let length = match self.stream.read_u8().await.unwrap() & 0x7f {
            126 => self.stream.read_u16().await.unwrap() as usize,
            short => short as usize,
        };
        let mut payload = vec![0; length];
        self.stream.read_exact(&mut payload).await.unwrap();
        (first, payload)
    }

    /// The next frame but for the server's pings, which come whenever they are due: it must be
    /// text.
    pub async fn text(&mut self) -> Value {
        self.text_after(&[0x89]).await
    }

    /// The next frame after the answers to our pings, which must be text.
    pub async fn text_after_pongs(&mut self) -> Value {
        self.text_after(&[0x89, 0x8a]).await
    }

    async fn text_after(&mut self, passed_over: &[u8]) -> Value {
        let reading = async {
            loop {
                let (first, payload) = self.read().await;
                if !passed_over.contains(&first) {
                    break (first, payload);
                }
            }
        };
        let (first, payload) = tokio::time::timeout(DEADLINE, reading).await.expect("a frame in time");
        assert_eq!(first, 0x81);
        serde_json::from_slice(&payload).unwrap()
    }

    /// Reads until a close frame; its code.
    pub async fn close_code(&mut self) -> u16 {
        let reading = async {
            loop {
                let (first, payload) = self.read().await;
                if first & 0x0f == 8 {
                    return u16::from_be_bytes([payload[0], payload[1]]);
                }
            }
        };
        tokio::time::timeout(DEADLINE, reading).await.expect("a close frame in time")
    }
}
