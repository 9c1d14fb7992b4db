//! A TCP connection with something at either end that is not the kernel's yet: what was read and given back, and what waits
//! to be written. The answer to a handshake waits here and leaves together with the first frame, in one packet; a packet costs
//! both sides some ten microseconds, which is a fifth of what a new socket costs.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// See the room's comment.
#[derive(Debug)]
pub struct Line {
    stream: TcpStream,
    /// Read before all that still comes.
    unread: Vec<u8>,
    /// Written before the next write or flush.
    held: Vec<u8>,
}

impl Line {
    /// A connection of which `unread` was read already and is to be read again.
    #[must_use]
    pub fn new(stream: TcpStream, unread: Vec<u8>) -> Self {
        Self { stream, unread, held: Vec::new() }
    }

    /// Lets this be read again before all else.
    pub fn give_back(&mut self, read: &[u8]) {
        self.unread.splice(..0, read.iter().copied());
    }

    /// Lets this leave before what is written next, and with it.
    pub fn hold(&mut self, bytes: Vec<u8>) {
        self.held = bytes;
    }

    /// Writes what was held back and then `more`; answers how much of `more` was written, which is nothing only if it is empty.
    fn poll_write_after_held(&mut self, cx: &mut Context<'_>, more: &[u8]) -> Poll<io::Result<usize>> {
        while !self.held.is_empty() {
            let both = [IoSlice::new(&self.held), IoSlice::new(more)];
            let written = ready!(Pin::new(&mut self.stream).poll_write_vectored(cx, &both))?;
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
        if more.is_empty() { Poll::Ready(Ok(0)) } else { Pin::new(&mut self.stream).poll_write(cx, more) }
    }
}

impl AsyncRead for Line {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.unread.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, buffer);
        }
        let count = self.unread.len().min(buffer.remaining());
        buffer.put_slice(&self.unread[..count]);
        self.unread.drain(..count);
        if self.unread.is_empty() {
            // Its memory too: a connection may live for weeks.
            self.unread = Vec::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Line {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_after_held(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.held.is_empty() {
            return Pin::new(&mut self.stream).poll_write_vectored(cx, parts);
        }
        let first = parts.iter().find(|part| !part.is_empty());
        self.poll_write(cx, first.map_or(&[], |part| part))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_write_after_held(cx, &[]))?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_write_after_held(cx, &[]))?;
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    async fn pair(unread: &[u8], held: Vec<u8>) -> (Line, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let far = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let mut line = Line::new(listener.accept().await.unwrap().0, unread.to_vec());
        line.hold(held);
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
        line.hold(b"three ".to_vec());
        line.flush().await.unwrap();
        far.read_exact(&mut seen[..6]).await.unwrap();
        assert_eq!(&seen[..6], b"three ");
        line.hold(b"four ".to_vec());
        assert_eq!(line.write_vectored(&[IoSlice::new(b""), IoSlice::new(b"five ")]).await.unwrap(), 5);
        line.hold(b"six".to_vec());
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
}
