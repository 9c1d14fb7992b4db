//! A TCP stream that
//!
//! 1. replays bytes that were read ahead,
//! 2. holds written bytes back, so that they leave in one packet with the next write, and
//! 3. registers with tokio's reactor late: for reading on the first read that would block, for
//!    writing on the first write that would.
//!
//! The response to a handshake is held back and leaves together with the first frame. A packet
//! costs both sides some ten microseconds, a fifth of what a new socket costs. Registering for
//! reading and writing at once costs one wake-up per new socket.

use std::cell::RefCell;
use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};

use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio_rustls::server::TlsStream;

/// Bytes that are read at once where the reader's memory would have to be cleared first.
const READ_AT_ONCE: usize = 16 * 1024;

thread_local! {
    /// A buffer that was cleared once. A reader offers some kilobytes for a request of 300 bytes;
    /// clearing them would cost more than copying the request.
    static CLEARED: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ_AT_ONCE].into_boxed_slice());
}

/// Reads into `buffer` once. Returns how much, and whether that was less than there was room for.
fn read_into(buffer: &mut ReadBuf<'_>, mut stream: &TcpStream) -> io::Result<(usize, bool)> {
    if buffer.initialized().len() == buffer.capacity() {
        let room = buffer.initialize_unfilled();
        let (count, most) = (stream.read(room)?, room.len());
        buffer.advance(count);
        return Ok((count, count < most));
    }
    CLEARED.with_borrow_mut(|cleared| {
        let most = buffer.remaining().min(cleared.len());
        let count = stream.read(&mut cleared[..most])?;
        buffer.put_slice(&cleared[..count]);
        Ok((count, count < most))
    })
}

/// A TCP stream that replays bytes, holds writes back, and registers with the reactor late.
#[derive(Debug)]
pub struct LazyTcpStream {
    /// To be written before the next write or flush.
    held: Vec<u8>,
    stream: Stream,
    /// To be read before anything that still arrives.
    unread: Vec<u8>,
}

/// Registers a standard socket with the reactor for `interest`.
///
/// # Errors
///
/// The system's.
#[expect(
    deprecated,
    reason = "the newer form is unsafe, for types whose file may change; a socket's does not"
)]
fn watched<S: AsFd + AsRawFd>(socket: S, interest: Interest) -> io::Result<AsyncFd<S>> {
    AsyncFd::with_interest(socket, interest)
}

/// How far the connection is registered with the reactor.
#[derive(Debug)]
enum Stream {
    /// Not registered.
    Fresh(TcpStream),
    /// For reading.
    Read(AsyncFd<TcpStream>),
    /// For reading and writing.
    Both(AsyncFd<TcpStream>),
    /// Over TLS; the connection itself is the one within.
    Tls(Box<TlsStream<LazyTcpStream>>),
    /// Registration failed.
    Broken,
}

impl Stream {
    /// Registers for `interest`.
    fn watch(&mut self, interest: Interest) -> io::Result<&AsyncFd<TcpStream>> {
        let stream = match std::mem::replace(self, Self::Broken) {
            Self::Fresh(stream) => stream,
            Self::Read(watched) | Self::Both(watched) => watched.into_inner(),
            // Over TLS the stream within is watched.
            Self::Tls(_) | Self::Broken => return Err(io::ErrorKind::NotConnected.into()),
        };
        let watched = watched(stream, interest)?;
        *self = if interest.is_writable() { Self::Both(watched) } else { Self::Read(watched) };
        match self {
            Self::Read(watched) | Self::Both(watched) => Ok(watched),
            _ => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    fn poll_read(&mut self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let watched = match self {
            Self::Tls(tls) => return Pin::new(&mut **tls).poll_read(cx, buffer),
            Self::Read(watched) | Self::Both(watched) => &*watched,
            Self::Fresh(_) | Self::Broken => self.watch(Interest::READABLE)?,
        };
        loop {
            let mut ready = ready!(watched.poll_read_ready(cx))?;
            match ready.try_io(|watched| read_into(buffer, watched.get_ref())) {
                Ok(Ok((count, less))) => {
                    if count > 0 && less {
                        // Less than there was room for: the kernel's buffer is empty.
                        ready.clear_ready();
                    }
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_) => {}
            }
        }
    }

    /// Calls `write` as soon as it does not block.
    fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        mut write: impl FnMut(&TcpStream) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        loop {
            let written = match self {
                Self::Fresh(stream) => write(stream),
                Self::Read(watched) => write(watched.get_ref()),
                Self::Both(watched) => {
                    let mut ready = ready!(watched.poll_write_ready(cx))?;
                    match ready.try_io(|watched| write(watched.get_ref())) {
                        Ok(written) => written,
                        Err(_) => continue,
                    }
                }
                // Writes over TLS do not come here.
                Self::Tls(_) | Self::Broken => Err(io::ErrorKind::NotConnected.into()),
            };
            match written {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.watch(Interest::READABLE | Interest::WRITABLE)?;
                    // The earlier registration for reading is gone, so whoever waits for data must
                    // poll again.
                    cx.waker().wake_by_ref();
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                written => return Poll::Ready(written),
            }
        }
    }
}

impl LazyTcpStream {
    /// A non-blocking connection. `unread` was read before and is replayed.
    #[must_use]
    pub fn new(stream: TcpStream, unread: Vec<u8>) -> Self {
        Self { stream: Stream::Fresh(stream), unread, held: Vec::new() }
    }

    /// The connection over TLS.
    pub(super) fn tls(stream: TlsStream<LazyTcpStream>) -> Self {
        Self { stream: Stream::Tls(Box::new(stream)), unread: Vec::new(), held: Vec::new() }
    }

    /// Reads what has arrived already, without waiting.
    ///
    /// # Errors
    ///
    /// The system's; `WouldBlock` if there is nothing.
    pub fn read_now(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &mut self.stream {
            Stream::Fresh(stream) => stream.read(buffer),
            Stream::Read(watched) | Stream::Both(watched) => watched.get_ref().read(buffer),
            Stream::Tls(tls) => {
                let (mut nobody, mut buffer) = (Context::from_waker(Waker::noop()), ReadBuf::new(buffer));
                match Pin::new(&mut **tls).poll_read(&mut nobody, &mut buffer) {
                    Poll::Ready(read) => read.map(|()| buffer.filled().len()),
                    Poll::Pending => Err(io::ErrorKind::WouldBlock.into()),
                }
            }
            Stream::Broken => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// Pending, with the waker registered, if nothing can be read. This costs less than a read.
    /// Ready does not mean that there is something.
    pub fn poll_maybe_readable(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match &self.stream {
            // No write has ever blocked, so only reading can be waited for.
            Stream::Read(watched) if self.unread.is_empty() => watched.poll_read_ready(cx).map(|_| ()),
            _ => Poll::Ready(()),
        }
    }

    /// Makes the next reads return this first.
    pub fn give_back(&mut self, read: &[u8]) {
        self.unread.splice(..0, read.iter().copied());
    }

    /// The buffer that is sent before the next write and together with it, with room for this many
    /// more bytes.
    pub fn more_held(&mut self, room: usize) -> &mut Vec<u8> {
        self.held.reserve(room);
        &mut self.held
    }

    /// Number of bytes held back.
    pub fn held(&self) -> usize {
        self.held.len()
    }

    /// Writes what was held back and then `more`. Returns how much of `more` was written, which is
    /// nothing only if `more` is empty.
    fn poll_write_after_held(&mut self, cx: &mut Context<'_>, more: &[u8]) -> Poll<io::Result<usize>> {
        if let Stream::Tls(tls) = &mut self.stream {
            return poll_write_tls(Pin::new(&mut **tls), cx, &mut self.held, more);
        }
        while !self.held.is_empty() {
            let both = [IoSlice::new(&self.held), IoSlice::new(more)];
            let written = ready!(self.stream.poll_write(cx, |mut stream| match more {
                [] => stream.write(&self.held),
                _ => stream.write_vectored(&both),
            }))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            if let Some(of_more) = written.checked_sub(self.held.len()) {
                self.held = Vec::new();
                if of_more > 0 {
                    return Poll::Ready(Ok(of_more));
                }
            } else {
                self.held.drain(..written);
            }
        }
        if more.is_empty() {
            Poll::Ready(Ok(0))
        } else {
            self.stream.poll_write(cx, |mut stream| stream.write(more))
        }
    }
}

/// Writes what was held back and then `more` over TLS, and flushes it if there is no more. Returns
/// how much of `more` was written.
fn poll_write_tls(
    mut tls: Pin<&mut TlsStream<LazyTcpStream>>,
    cx: &mut Context<'_>,
    held: &mut Vec<u8>,
    more: &[u8],
) -> Poll<io::Result<usize>> {
    let mut sent = 0;
    while sent < held.len() {
        match tls.as_mut().poll_write(cx, &held[sent..]) {
            Poll::Ready(Ok(count)) if count > 0 => sent += count,
            unfinished => {
                held.drain(..sent);
                return unfinished.map(|result| result.and(Err(io::ErrorKind::WriteZero.into())));
            }
        }
    }
    if sent > 0 {
        *held = Vec::new();
    }
    if more.is_empty() { tls.poll_flush(cx).map_ok(|()| 0) } else { tls.poll_write(cx, more) }
}

impl AsyncRead for LazyTcpStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.unread.is_empty() {
            return self.stream.poll_read(cx, buffer);
        }
        let count = self.unread.len().min(buffer.remaining());
        buffer.put_slice(&self.unread[..count]);
        self.unread.drain(..count);
        if self.unread.is_empty() {
            // Frees the memory as well: a connection may live for weeks.
            self.unread = Vec::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for LazyTcpStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_after_held(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.held.is_empty() {
            return match &mut self.stream {
                Stream::Tls(tls) => Pin::new(&mut **tls).poll_write_vectored(cx, parts),
                plain => plain.poll_write(cx, |mut stream| stream.write_vectored(parts)),
            };
        }
        let first = parts.iter().find(|part| !part.is_empty());
        self.poll_write(cx, first.map_or(&[], |part| part))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_write_after_held(cx, &[]).map_ok(|_| ())
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_write_after_held(cx, &[]))?;
        Poll::Ready(match &mut self.stream {
            Stream::Tls(tls) => return Pin::new(&mut **tls).poll_shutdown(cx),
            Stream::Fresh(stream) => stream.shutdown(Shutdown::Write),
            Stream::Read(watched) | Stream::Both(watched) => watched.get_ref().shutdown(Shutdown::Write),
            Stream::Broken => Err(io::ErrorKind::NotConnected.into()),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};

    async fn pair(unread: &[u8], held: Vec<u8>) -> (LazyTcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let far = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let mut line =
            LazyTcpStream::new(listener.accept().await.unwrap().0.into_std().unwrap(), unread.to_vec());
        line.more_held(held.len()).extend(held);
        (line, far)
    }

    async fn all_of(mut far: TcpStream) -> Vec<u8> {
        let mut seen = Vec::new();
        far.read_to_end(&mut seen).await.unwrap();
        seen
    }

    #[tokio::test]
    async fn what_is_held_back_leaves_with_the_next_write_a_flush_or_the_end() {
        let (mut line, mut far) = pair(b"", b"one ".to_vec()).await;
        let nothing = far.try_read(&mut [0; 4]).map_err(|error| error.kind());
        assert_eq!(nothing, Err(io::ErrorKind::WouldBlock));
        line.write_all(b"two ").await.unwrap();
        let mut seen = [0; 8];
        far.read_exact(&mut seen).await.unwrap();
        assert_eq!(&seen, b"one two ");
        line.more_held(8).extend(b"three ");
        line.flush().await.unwrap();
        far.read_exact(&mut seen[..6]).await.unwrap();
        assert_eq!(&seen[..6], b"three ");
        line.more_held(8).extend(b"four ");
        assert_eq!(line.write_vectored(&[IoSlice::new(b""), IoSlice::new(b"five ")]).await.unwrap(), 5);
        line.more_held(8).extend(b"six");
        line.shutdown().await.unwrap();
        assert_eq!(all_of(far).await, b"four five six");
    }

    #[tokio::test]
    async fn what_was_given_back_is_read_first() {
        let (mut line, mut far) = pair(b"one two ", Vec::new()).await;
        far.write_all(b"three").await.unwrap();
        far.shutdown().await.unwrap();
        let mut first = [0; 3];
        line.read_exact(&mut first).await.unwrap();
        let mut rest = String::new();
        line.read_to_string(&mut rest).await.unwrap();
        assert_eq!((&first, rest.as_str()), (b"one", " two three"));
    }

    #[tokio::test]
    async fn more_than_the_kernel_takes_is_written_in_order() {
        let held: Vec<u8> = (0..4_000_000u32).map(|n| n as u8).collect();
        let more = vec![7u8; 1_000_000];
        let (mut line, far) = pair(b"", held.clone()).await;
        let (sent, all) = (more.clone(), [held, more].concat());
        let writing = tokio::spawn(async move {
            line.write_all(&sent).await.unwrap();
            line.shutdown().await.unwrap();
        });
        assert!(all_of(far).await == all);
        writing.await.unwrap();
    }

    #[tokio::test]
    async fn who_reads_is_woken_though_a_write_blocks_meanwhile() {
        let (line, mut far) = pair(b"", Vec::new()).await;
        let (mut reads, mut writes) = tokio::io::split(line);
        let (tell, told) = tokio::sync::oneshot::channel();
        let more = vec![7u8; 32_000_000];
        let writing = more.clone();
        let near = tokio::spawn(async move {
            let reading = async {
                let mut heard = [0; 5];
                reads.read_exact(&mut heard).await.unwrap();
                tell.send(heard).unwrap();
            };
            let writing = async {
                writes.write_all(&writing).await.unwrap();
                writes.shutdown().await.unwrap();
            };
            tokio::join!(reading, writing);
        });
        // The near end runs until it can do nothing more, before the far end reads.
        tokio::task::yield_now().await;
        far.write_all(b"hello").await.unwrap();
        let heard = tokio::time::timeout(Duration::from_secs(10), told).await;
        assert_eq!(&heard.unwrap().unwrap(), b"hello");
        assert!(all_of(far).await == more);
        near.await.unwrap();
    }

    /// What the kernel did not take waits within rustls, and a flush alone sends it.
    #[tokio::test]
    async fn what_tls_has_taken_is_sent_by_a_flush() {
        use crate::transport::tls::{Identity, ServerTls};
        use ringpush_testing::certificates::{Authority, dial};
        let (place, authority) = (tempfile::tempdir().unwrap(), Authority::make());
        let (cert, key) = authority.sign(&["localhost"]).write(place.path());
        let identity = Identity::read(&cert, &key, 1_800_000_000, None).unwrap();
        let tls = ServerTls::new(&identity, None, |_| ()).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap().to_string();
        let client = authority.client(None, &[&rustls::version::TLS13]);
        let near = async {
            let stream = listener.accept().await.unwrap().0.into_std().unwrap();
            tls.accept(LazyTcpStream::new(stream, Vec::new())).await.unwrap()
        };
        let (mut line, far) = tokio::join!(near, dial(client, &at, "localhost"));
        let (mut far, chunk) = (far.unwrap(), [7u8; 16 * 1024]);
        let mut taken = 0;
        while let Some(written) = futures_util::FutureExt::now_or_never(line.write(&chunk)) {
            taken += written.unwrap();
        }
        let flushing = tokio::spawn(async move {
            line.flush().await.unwrap();
            line
        });
        let mut all = vec![0; taken];
        let read = tokio::time::timeout(Duration::from_secs(10), far.read_exact(&mut all)).await;
        read.expect("all of it comes").unwrap();
        flushing.await.unwrap();
    }
}
