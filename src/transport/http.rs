//! The HTTP server: an accept loop over hyper.
//!
//! The accept loop is our own because hyper has no timer unless it is given one: without it, a
//! handshake that is never finished would be held for ever. A connection must send its first
//! complete request head within [`HttpLimits::first_request`].
//!
//! A connection whose first request asks for a WebSocket never reaches hyper: it says nothing more
//! in HTTP, and hyper's machinery was a quarter of what a new socket cost. Any other connection is
//! passed to hyper with the bytes that were read.

mod body;

use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::future::{BoxFuture, Either, FutureExt, ready};
use hyper::body::{Body, Incoming};
use hyper::header::{CONTENT_LENGTH, TRANSFER_ENCODING};
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use parking_lot::Mutex;
use tokio::io::AsyncReadExt;
use tokio::net::TcpSocket;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;
use tower::{Service, ServiceExt};

pub use body::{BodyError, RequestBody, read_body};

use super::accept;
use super::lazy_stream::LazyTcpStream;
use super::tls::ServerTls;
use super::websocket::request_head;

/// Connections that the kernel queues: a tenth of a second of 40,000/s.
const BACKLOG: u32 = 4_096;
/// Read buffer of a connection, in bytes: a request head must fit. It is larger than the 64 KiB
/// that hyper allows for a target, so that a target that is too long is told so (414) instead of
/// its head (431).
const READ_BUFFER: usize = 80 * 1024;
/// A request head for a WebSocket is looked for in this many bytes. A token has at most 8 KiB.
const SOCKET_HEAD: usize = 16 * 1024;
/// Bytes of it that are read at once.
const SOCKET_HEAD_READ: usize = 1024;
/// How long an HTTP/2 peer may take to answer a ping.
const H2_PING_TIMEOUT: Duration = Duration::from_secs(20);
/// Concurrent streams of one HTTP/2 connection.
const H2_STREAMS: u32 = 1_000;

/// Times and sizes of a listener.
#[derive(Debug, Clone, Copy)]
pub struct HttpLimits {
    /// From accept to the first complete request head.
    pub first_request: Duration,
    /// Between two requests of one connection.
    pub idle: Duration,
    /// For requests in flight when the server stops.
    pub shutdown: Duration,
    /// The kernel's send buffer per connection, in bytes; `None` leaves it to the kernel.
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

/// A bound TCP listener whose connections have `TCP_NODELAY`.
#[derive(Debug)]
pub struct Listener(TcpListener);

impl Listener {
    /// The address, with the real port if port 0 was requested.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }
}

/// Binds a listener.
///
/// # Errors
///
/// The system's, such as an address in use.
pub fn bind(address: SocketAddr, limits: &HttpLimits) -> io::Result<Listener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    // Connections inherit it from the listener.
    socket.set_nodelay(true)?;
    if let Some(bytes) = limits.send_buffer {
        socket.set_send_buffer_size(bytes)?;
    }
    socket.bind(address)?;
    socket.listen(BACKLOG)?.into_std().map(Listener)
}

/// A service that answers requests.
pub trait Answers<B>:
    Service<Request<Incoming>, Response = Response<B>, Error = Infallible, Future: Send + 'static>
    + Clone
    + Send
    + Sync
    + 'static
{
}
impl<S, B> Answers<B> for S where
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible, Future: Send + 'static>
        + Clone
        + Send
        + Sync
        + 'static
{
}

/// The body of a response.
pub trait AnswerBody:
    Body<Data: Send, Error: Into<Box<dyn std::error::Error + Send + Sync>>> + Send + 'static
{
}
impl<B> AnswerBody for B where
    B: Body<Data: Send, Error: Into<Box<dyn std::error::Error + Send + Sync>>> + Send + 'static
{
}

/// The address of the other end of a connection: an extension of each request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerAddress(pub IpAddr);

/// The whole life of a socket.
pub type ConnectionFuture = BoxFuture<'static, ()>;

/// Takes over connections whose first request asks for a WebSocket.
pub trait UpgradeHandler<B>: Send + Sync {
    /// Whether a request for this path, which has no body, is one to take over.
    fn is_for(&self, path: &str) -> bool;

    /// Whether such requests need the address of the other end: it costs a call of the system.
    fn wants_address(&self) -> bool {
        false
    }

    /// Decides about a request. Returns what runs to the end of the socket, or the connection with
    /// the response to send.
    fn take(
        &self,
        request: Request<()>,
        line: LazyTcpStream,
    ) -> BoxFuture<'_, Result<ConnectionFuture, (LazyTcpStream, Response<B>)>>;
}

/// What serves the connections of a listener.
struct Server<S, B> {
    http: auto::Builder<TokioExecutor>,
    service: S,
    sockets: Option<Arc<dyn UpgradeHandler<B>>>,
    tls: Option<ServerTls>,
    limits: HttpLimits,
    stop: CancellationToken,
}

/// Serves `service` on `listener` until `stop`, and before it `sockets`, if given; over TLS, if
/// given. Then requests in flight are finished within the limit.
pub async fn serve<S, B>(
    Listener(listener): Listener,
    service: S,
    sockets: Option<Arc<dyn UpgradeHandler<B>>>,
    tls: Option<ServerTls>,
    limits: HttpLimits,
    stop: CancellationToken,
) where
    S: Answers<B>,
    B: AnswerBody,
{
    let server = Arc::new(Server { http: http(&limits), service, sockets, tls, limits, stop: stop.clone() });
    let connections = TaskTracker::new();
    let tracked = connections.clone();
    let begin = {
        let server = Arc::clone(&server);
        move |stream| serve_one(Arc::clone(&server), stream, tracked.token())
    };
    if server.sockets.is_none() {
        accept::in_task(listener, &stop, begin).await;
    } else if let Err(error) = accept::on_thread(listener, &stop, move |stream| begin(stream).boxed()).await {
        tracing::error!(%error, "the thread that accepts connections could not be started");
    }
    connections.close();
    let _ = tokio::time::timeout(limits.shutdown, connections.wait()).await;
}

/// hyper is told not to gather responses (`pipeline_flush`): a response would wait for the rest of
/// a following request that has begun to arrive. It is also told to finish a request whose sender
/// has closed its half of the connection. A response is written as one piece of memory: nearly all
/// are small, and a write of two pieces costs a single publish 5 to 7 % (docs/benchmarks/log.md).
fn http(limits: &HttpLimits) -> auto::Builder<TokioExecutor> {
    let mut server = auto::Builder::new(TokioExecutor::new());
    server
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.idle)
        .max_buf_size(READ_BUFFER)
        .half_close(true)
        .writev(false);
    server
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(H2_STREAMS)
        .keep_alive_interval(limits.idle)
        .keep_alive_timeout(H2_PING_TIMEOUT);
    server
}

/// Serves one connection. What a stage needs is boxed and freed with that stage, because a socket
/// may be idle for weeks.
fn serve_one<S, B>(
    server: Arc<Server<S, B>>,
    stream: TcpStream,
    tracked: TaskTrackerToken,
) -> impl Future<Output = ()> + Send + 'static
where
    S: Answers<B>,
    B: AnswerBody,
{
    let began = Box::pin(begin(server, stream, tracked));
    async move {
        if let Some(rest) = began.await {
            rest.await;
        }
    }
}

/// Finds out what a connection asks for, and returns how to go on.
async fn begin<S, B>(
    server: Arc<Server<S, B>>,
    stream: TcpStream,
    tracked: TaskTrackerToken,
) -> Option<BoxFuture<'static, ()>>
where
    S: Answers<B>,
    B: AnswerBody,
{
    let mut until = Instant::now() + server.limits.first_request;
    let peer = match &server.sockets {
        Some(sockets) if !sockets.wants_address() => None,
        _ => stream.peer_addr().ok().map(|at| PeerAddress(at.ip())),
    };
    let mut line = LazyTcpStream::new(stream, Vec::new());
    if let Some(tls) = &server.tls {
        let shaken = tokio::time::timeout_at(until, tls.accept(line));
        let Some(Ok(Ok(secure))) = server.stop.run_until_cancelled(shaken).await else {
            tracing::debug!("a connection made no TLS handshake in time, or a bad one");
            return None;
        };
        line = secure;
    }
    let (line, answer) = match &server.sockets {
        None => (line, None),
        Some(sockets) => {
            let first = tokio::time::timeout_at(until, first_head(&mut line, &**sockets));
            let Some(Ok(Ok(First { mut read, request }))) = server.stop.run_until_cancelled(first).await
            else {
                tracing::debug!("a connection sent no complete request in time, or ended before");
                return None;
            };
            match request {
                None => {
                    line.give_back(&read);
                    (line, None)
                }
                Some((mut request, length)) => {
                    if let Some(peer) = peer {
                        request.extensions_mut().insert(peer);
                    }
                    let rest = read.split_off(length);
                    line.give_back(&rest);
                    match sockets.take(request, line).await {
                        // Sockets are not tracked here: their role ends them.
                        Ok(socket) => return Some(socket),
                        Err((mut line, answer)) => {
                            line.give_back(&read);
                            // The request came in time; what took longer was our own decision.
                            until = Instant::now() + server.limits.first_request;
                            (line, Some(answer))
                        }
                    }
                }
            }
        }
    };
    Some(Box::pin(async move {
        serve_http(server, line, answer, (until, peer)).await;
        drop(tracked);
    }))
}

/// The beginning of a connection.
struct First {
    /// The bytes that were read.
    read: Vec<u8>,
    /// The request for a WebSocket and the length of its head, if it is one.
    request: Option<(Request<()>, usize)>,
}

/// Reads until it is clear whether the first request asks for a WebSocket.
async fn first_head<B>(line: &mut LazyTcpStream, sockets: &dyn UpgradeHandler<B>) -> io::Result<First> {
    let mut read = Vec::new();
    loop {
        let before = read.len();
        read.resize(before + SOCKET_HEAD_READ, 0);
        let count = match line.read_now(&mut read[before..]) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => line.read(&mut read[before..]).await,
            count => count,
        };
        read.truncate(before + count?);
        if read.len() == before {
            if read.is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            return Ok(First { read, request: None });
        }
        match request_head(&read) {
            // A head that comes in pieces.
            Ok(None) if read.len() < SOCKET_HEAD && read.starts_with(b"GET ") => {}
            Ok(Some((length, request))) => {
                let takes = has_no_body(&request) && sockets.is_for(request.uri().path());
                return Ok(First { read, request: takes.then_some((request, length)) });
            }
            _ => return Ok(First { read, request: None }),
        }
    }
}

fn has_no_body(request: &Request<()>) -> bool {
    let headers = request.headers();
    !headers.contains_key(CONTENT_LENGTH) && !headers.contains_key(TRANSFER_ENCODING)
}

/// Serves a connection with hyper. If there is an `answer`, the first request gets it. The first
/// request must be complete before `until`.
async fn serve_http<S, B>(
    server: Arc<Server<S, B>>,
    line: LazyTcpStream,
    answer: Option<Response<B>>,
    (until, peer): (Instant, Option<PeerAddress>),
) where
    S: Answers<B>,
    B: AnswerBody,
{
    let asked = Arc::new(AtomicBool::new(false));
    let service = hyper::service::service_fn({
        let (asked, answer, service) = (Arc::clone(&asked), Mutex::new(answer), server.service.clone());
        move |mut request: Request<Incoming>| {
            if let Some(peer) = peer {
                request.extensions_mut().insert(peer);
            }
            let answer = if asked.swap(true, Ordering::Relaxed) { None } else { answer.lock().take() };
            match answer {
                Some(answer) => Either::Left(ready(Ok(answer))),
                None => Either::Right(service.clone().oneshot(request)),
            }
        }
    });
    let mut connection = pin!(server.http.serve_connection_with_upgrades(TokioIo::new(line), service));
    tokio::select! {
        ended = connection.as_mut() => return note(ended),
        () = tokio::time::sleep_until(until) => {
            if !asked.load(Ordering::Relaxed) {
                tracing::debug!("a connection sent no complete request in time");
                return;
            }
        }
        () = server.stop.cancelled() => {}
    }
    tokio::select! {
        ended = connection.as_mut() => note(ended),
        () = server.stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            note(connection.await);
        }
    }
}

fn note(ended: Result<(), Box<dyn std::error::Error + Send + Sync>>) {
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection ended with an error");
    }
}

#[cfg(test)]
mod tests;
