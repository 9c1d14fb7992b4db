//! HTTP: an accept loop of our own over hyper, and a small client.
//!
//! Of our own, since hyper has no timer unless it is given one: without it a handshake that is never finished would be
//! held for ever. A connection must show its first whole request head within [`HttpLimits::first_request`].

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Body, Incoming};
use hyper::header::UPGRADE;
use hyper::{Request, Response, Version};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::{Service, ServiceExt};

use super::line::{Hold, Line};

/// Connections that the kernel may hold for us while we are busy: a tenth of a second of 40,000/s.
const BACKLOG: u32 = 4_096;
/// Rest after an accept that failed, as when no more files can be opened.
const ACCEPT_REST: Duration = Duration::from_millis(50);
/// A connection's read buffer, in bytes, at the most: a request head must fit.
const READ_BUFFER: usize = 64 * 1024;
/// How long an HTTP/2 peer may take to answer a ping.
const H2_PING_TIMEOUT: Duration = Duration::from_secs(20);
/// How long the client may take to connect.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the client keeps a connection that it does not use.
const CLIENT_IDLE: Duration = Duration::from_secs(50);
/// Streams of one HTTP/2 connection.
const H2_STREAMS: u32 = 1_000;

/// The times and sizes of one listener.
#[derive(Debug, Clone, Copy)]
pub struct HttpLimits {
    /// From accept to the first whole request head.
    pub first_request: Duration,
    /// Between two requests of one connection.
    pub idle: Duration,
    /// For requests under way when the server stops.
    pub shutdown: Duration,
    /// The kernel's send buffer per connection, in bytes; None leaves it to the kernel.
    pub send_buffer: Option<u32>,
}

impl Default for HttpLimits {
    fn default() -> Self {
        Self {
            first_request: Duration::from_secs(5),
            idle: Duration::from_secs(75),
            shutdown: Duration::from_secs(5),
            send_buffer: None,
        }
    }
}

/// Binds a listener.
///
/// # Errors
/// The system's, such as that the address is in use.
pub fn bind(address: SocketAddr, limits: &HttpLimits) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    if let Some(bytes) = limits.send_buffer {
        // Set on the listener: the connections inherit it.
        socket.set_send_buffer_size(bytes)?;
    }
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Serves `service` on `listener` until `stop`; then requests under way are finished, within the limit.
pub async fn serve<S, B>(listener: TcpListener, service: S, limits: HttpLimits, stop: CancellationToken)
where
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible> + Clone + Send + Sync + 'static,
    S::Future: Send + 'static,
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let server = Arc::new(server(&limits));
    let connections = TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => break,
        };
        match accepted {
            Ok((stream, _)) => {
                let connection =
                    serve_one(Arc::clone(&server), stream, service.clone(), limits, stop.clone());
                // Boxed: on its way into its task a future this large would be copied several times.
                connections.spawn(Box::pin(connection));
            }
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_REST).await;
            }
        }
    }
    drop(listener);
    connections.close();
    let _ = tokio::time::timeout(limits.shutdown, connections.wait()).await;
}

fn server(limits: &HttpLimits) -> auto::Builder<TokioExecutor> {
    let mut server = auto::Builder::new(TokioExecutor::new());
    server
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.idle)
        .max_buf_size(READ_BUFFER)
        .pipeline_flush(true);
    server
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(H2_STREAMS)
        .keep_alive_interval(limits.idle)
        .keep_alive_timeout(H2_PING_TIMEOUT);
    server
}

async fn serve_one<S, B>(
    server: Arc<auto::Builder<TokioExecutor>>,
    stream: TcpStream,
    service: S,
    limits: HttpLimits,
    stop: CancellationToken,
) where
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send + 'static,
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let _ = stream.set_nodelay(true);
    let (asked, hold) = (Arc::new(AtomicBool::new(false)), Hold::default());
    let line = TokioIo::new(Line::new(stream, hold.clone()));
    let service = hyper::service::service_fn({
        let asked = Arc::clone(&asked);
        move |mut request: Request<Incoming>| {
            asked.store(true, Ordering::Relaxed);
            // Only here may an answer be the last one that the connection carries as HTTP.
            if request.version() == Version::HTTP_11 && request.headers().contains_key(UPGRADE) {
                request.extensions_mut().insert(hold.clone());
            }
            service.clone().oneshot(request)
        }
    });
    let mut connection = pin!(server.serve_connection_with_upgrades(line, service));
    tokio::select! {
        ended = connection.as_mut() => return note(ended),
        () = tokio::time::sleep(limits.first_request) => {
            if !asked.load(Ordering::Relaxed) {
                tracing::debug!("a connection showed no request in time");
                return;
            }
        }
        () = stop.cancelled() => {}
    }
    tokio::select! {
        ended = connection.as_mut() => note(ended),
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            note(connection.await);
        }
    }
}

fn note(ended: Result<(), Box<dyn std::error::Error + Send + Sync>>) {
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection ended badly");
    }
}

/// Why a body was not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BodyFault {
    /// Over the limit.
    TooLarge,
    /// Slower than the deadline, or cut off.
    Incomplete,
}

/// Reads a whole body of at most `limit` bytes within `deadline`.
///
/// # Errors
/// [`BodyFault`].
pub async fn read_body<B>(body: B, limit: usize, deadline: Duration) -> Result<Bytes, BodyFault>
where
    B: Body<Data = Bytes>,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    match tokio::time::timeout(deadline, Limited::new(body, limit).collect()).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => Err(BodyFault::TooLarge),
        _ => Err(BodyFault::Incomplete),
    }
}

/// An HTTP client: pooled connections, TLS where the URL says so.
#[derive(Clone)]
pub struct HttpClient {
    client: Client<hyper_rustls::HttpsConnector<HttpConnector>, Full<Bytes>>,
}

/// Largest answer that the client reads.
const ANSWER_MAX: usize = 64 * 1024 * 1024;

impl Default for HttpClient {
    fn default() -> Self {
        let mut plain = HttpConnector::new();
        plain.enforce_http(false);
        plain.set_nodelay(true);
        plain.set_connect_timeout(Some(CONNECT_TIMEOUT));
        let builder = hyper_rustls::HttpsConnectorBuilder::new();
        let connector = match builder.with_native_roots() {
            Ok(builder) => builder.https_or_http().enable_http1().wrap_connector(plain),
            // A machine without any root certificate speaks plain HTTP and trusts no one.
            Err(_) => hyper_rustls::HttpsConnectorBuilder::new()
                .with_tls_config(
                    rustls::ClientConfig::builder()
                        .with_root_certificates(rustls::RootCertStore::empty())
                        .with_no_client_auth(),
                )
                .https_or_http()
                .enable_http1()
                .wrap_connector(plain),
        };
        // Shorter than servers keep theirs, this one's included: a request must not meet a connection that is just closed.
        let client = Client::builder(TokioExecutor::new()).pool_idle_timeout(CLIENT_IDLE).build(connector);
        Self { client }
    }
}

impl HttpClient {
    /// Sends one request and reads the answer; `body` is JSON.
    ///
    /// # Errors
    /// What went wrong on the way, in words.
    pub async fn send(
        &self,
        method: &str,
        url: &str,
        bearer: Option<&str>,
        body: Bytes,
        deadline: Duration,
    ) -> Result<(u16, Bytes), String> {
        let mut request =
            Request::builder().method(method).uri(url).header("content-type", "application/json");
        if let Some(bearer) = bearer {
            request = request.header("authorization", format!("Bearer {bearer}"));
        }
        let request = request.body(Full::new(body)).map_err(|error| error.to_string())?;
        let exchange = async {
            let response = self.client.request(request).await.map_err(|error| words(&error))?;
            let status = response.status().as_u16();
            let body = Limited::new(response.into_body(), ANSWER_MAX).collect().await;
            Ok((status, body.map_err(|error| error.to_string())?.to_bytes()))
        };
        tokio::time::timeout(deadline, exchange).await.unwrap_or_else(|_| Err("no answer in time".to_owned()))
    }
}

/// An error with its causes: the last one says what happened.
fn words(error: &dyn std::error::Error) -> String {
    let mut words = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        words = format!("{words}: {inner}");
        cause = inner.source();
    }
    words
}
