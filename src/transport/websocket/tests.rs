use super::*;
use crate::wire::close::CloseCode;
use crate::wire::frame::SUBPROTOCOL;
use futures_util::{SinkExt, StreamExt};
use http::header::SEC_WEBSOCKET_ACCEPT;
use http::{Method, Request, Response, Version};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::machine::TryParse;

/// A socket, and a client's end of it that has asked for nothing yet.
async fn pair() -> (ServerSocket, WebSocketStream<TcpStream>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let line = LazyTcpStream::new(listener.accept().await.unwrap().0.into_std().unwrap(), Vec::new());
    (ServerSocket::on(line), WebSocketStream::from_raw_socket(client, Role::Client, None).await)
}

fn text(n: usize) -> String {
    format!("{n}{}", "-".repeat(n % 5_000))
}

#[tokio::test]
async fn texts_come_whole_and_in_order_past_pings_while_the_socket_is_full() {
    const TEXTS: usize = 4_000;
    let (server, client) = pair().await;
    let (mut says, mut hears) = server.split();
    let (mut asks, mut listens) = client.split();
    let mut near = tokio::spawn(async move {
        let saying = async {
            for n in 0..TEXTS {
                says.feed(Outgoing::Text(text(n).into())).await.unwrap();
                if n % 7 == 0 {
                    says.feed(Outgoing::Ping).await.unwrap();
                }
            }
            says.send(Outgoing::Close(CloseCode::Draining, "draining")).await.unwrap();
        };
        let hearing = async {
            let mut pings = 0;
            while let Some(Ok(incoming)) = hears.next().await {
                pings += usize::from(incoming == Incoming::Alive);
            }
            pings
        };
        tokio::join!(saying, hearing).1
    });
    // Nobody reads the ten megabytes until the near end is full, or the client's pings are.
    for _ in 0..2_000 {
        asks.feed(Message::Ping(Bytes::from_static(b"are you there"))).await.unwrap();
    }
    asks.flush().await.unwrap();
    assert!(tokio::time::timeout(Duration::from_millis(50), &mut near).await.is_err());
    let (mut texts, mut pings, mut pongs, mut code) = (0, 0, 0, None);
    while let Some(Ok(message)) = listens.next().await {
        match message {
            Message::Text(heard) => {
                assert_eq!(heard.as_str(), text(texts));
                texts += 1;
            }
            Message::Ping(_) => pings += 1,
            Message::Pong(said) => {
                assert_eq!(&said[..], b"are you there");
                pongs += 1;
            }
            Message::Close(frame) => code = frame.map(|frame| u16::from(frame.code)),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((texts, pings, code), (TEXTS, TEXTS.div_ceil(7), Some(CloseCode::Draining.number())));
    assert!(pongs >= 1, "the last ping is answered");
    assert!(near.await.unwrap() >= 2_000, "each ping was a sign of life");
}

#[tokio::test]
async fn nothing_is_said_after_a_close_and_nothing_that_is_not_text() {
    let (mut server, mut client) = pair().await;
    let bad = server.send(Outgoing::Text(Bytes::from_static(b"\xff"))).await;
    assert_eq!(bad, Err(SocketError::InvalidUtf8));
    server.send(Outgoing::Close(CloseCode::Normal, "normal")).await.unwrap();
    let late = server.send(Outgoing::Text(Bytes::from_static(b"late"))).await;
    assert_eq!(late, Err(SocketError::Gone));
    assert!(matches!(client.next().await, Some(Ok(Message::Close(_)))));
}

#[tokio::test]
async fn a_close_is_answered_with_the_flush_after_it() {
    let (mut server, mut client) = pair().await;
    client.close(None).await.unwrap();
    assert_eq!(server.next().await, Some(Ok(Incoming::Closed)));
    let late = server.feed(Outgoing::Text(Bytes::from_static(b"late"))).await;
    assert_eq!(late, Err(SocketError::Gone), "a text would stand behind the answer");
    server.flush().await.unwrap();
    let answer = tokio::time::timeout(Duration::from_secs(10), client.next()).await;
    assert!(matches!(answer, Ok(Some(Ok(Message::Close(_))))), "{answer:?}");
    assert_eq!(server.next().await, None);
}

#[tokio::test]
async fn an_idle_socket_owns_no_room_to_write() {
    let (mut server, mut client) = pair().await;
    server.send(Outgoing::Text("hello".into())).await.unwrap();
    assert_eq!(client.next().await.unwrap().unwrap().into_text().unwrap().as_str(), "hello");
    assert_eq!(server.inner.line.more_held(0).capacity(), 0);
}

/// The example of RFC 6455, section 1.3, with headers left out or added.
fn asked(version: Version, method: Method, without: &str, with: &[(&'static str, &str)]) -> Request<()> {
    let mut request = Request::builder().version(version).method(method).uri("/v1/ws");
    for (name, value) in [
        ("host", "push.example.com"),
        ("connection", "keep-alive, Upgrade"),
        ("upgrade", "websocket"),
        ("sec-websocket-version", "13"),
        ("sec-websocket-protocol", SUBPROTOCOL),
        ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ] {
        if name != without {
            request = request.header(name, value);
        }
    }
    for (name, value) in with {
        request = request.header(*name, *value);
    }
    request.body(()).unwrap()
}

#[test]
fn the_answer_is_the_same_with_and_without_hyper() {
    let answer = handshake(&asked(Version::HTTP_11, Method::GET, "", &[])).unwrap();
    let mut head = Vec::new();
    answer.write(&mut head);
    let (length, read) = Response::try_parse(&head).unwrap().unwrap();
    assert_eq!((length, read.status()), (head.len(), answer.response().status()));
    assert_eq!(read.headers(), answer.response().headers());
    assert_eq!(read.headers()[SEC_WEBSOCKET_ACCEPT], "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
}

#[test]
fn what_is_no_handshake_is_refused_with_400_and_another_version_with_426() {
    let key = |value: &'static str| {
        handshake(&asked(Version::HTTP_11, Method::GET, "sec-websocket-key", &[("sec-websocket-key", value)]))
    };
    for bad in
        ["", "c2hvcnQ=", "not base64 at all!!!!!!", "dGhlIHNhbXBsZSBub25jZQ", "dGhlIHNhbXBsZSBub25jZSE="]
    {
        assert!(matches!(key(bad), Err(HandshakeError::Bad(_))), "{bad}");
    }
    let with = |without, with: &[(&'static str, &str)]| {
        handshake(&asked(Version::HTTP_11, Method::GET, without, with)).map(drop)
    };
    for twice in ["host", "sec-websocket-key", "origin"] {
        let headers = [(twice, "dGhlIHNhbXBsZSBub25jZQ=="), ("origin", "https://a.example")];
        assert!(matches!(with("", &headers), Err(HandshakeError::Bad(_))), "{twice}");
    }
    for missing in ["host", "sec-websocket-key"] {
        assert!(matches!(with(missing, &[]), Err(HandshakeError::Bad(_))), "{missing}");
    }
    for version in ["13, 8", "8", "", "013"] {
        let other = with("sec-websocket-version", &[("sec-websocket-version", version)]);
        assert!(matches!(other, Err(HandshakeError::Upgrade(_))), "{version}");
    }
    for other in ["RINGPUSH.v1.json", "ringpush.v1"] {
        let offered = with("sec-websocket-protocol", &[("sec-websocket-protocol", other)]);
        assert!(matches!(offered, Err(HandshakeError::Bad(_))), "{other}");
    }
    assert!(matches!(with("", &[("content-length", "5")]), Err(HandshakeError::Bad(_))));
    for (version, method) in [(Version::HTTP_10, Method::GET), (Version::HTTP_11, Method::HEAD)] {
        let refused = handshake(&asked(version, method, "", &[]));
        assert!(matches!(refused, Err(HandshakeError::Bad(_))));
    }
}
