//! A TCP connection that can hold back what is written to it: the answer to a handshake then leaves together with the first
//! frame, in one packet. A packet costs both sides some ten microseconds, which is a tenth of what a new socket costs.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// Tells a connection to hold back what is written; travels with a request.
#[derive(Debug, Clone, Default)]
pub struct Hold(Arc<AtomicBool>);

impl Hold {
    /// From now on, until the connection is [released](Line::release), flushing does nothing.
    pub fn begin(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// See the room's comment.
pub struct Line {
    stream: TcpStream,
    hold: Hold,
    held: Vec<u8>,
}

impl Line {
    /// A connection that holds nothing back until `hold` says so.
    #[must_use]
    pub fn new(stream: TcpStream, hold: Hold) -> Self {
        Self { stream, hold, held: Vec::new() }
    }

    /// From now on what was held back leaves with the next write or flush.
    pub fn release(&mut self) {
        self.hold = Hold::default();
    }

    fn holds(&self) -> bool {
        self.hold.0.load(Ordering::Relaxed)
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
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Line {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.holds() {
            self.held.extend_from_slice(bytes);
            return Poll::Ready(Ok(bytes.len()));
        }
        self.poll_write_after_held(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.held.is_empty() && !self.holds() {
            return Pin::new(&mut self.stream).poll_write_vectored(cx, parts);
        }
        let first = parts.iter().find(|part| !part.is_empty());
        self.poll_write(cx, first.map_or(&[], |part| part))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.holds() {
            return Poll::Ready(Ok(()));
        }
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

    async fn pair(hold: Hold) -> (Line, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let far = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (Line::new(listener.accept().await.unwrap().0, hold), far)
    }

    #[tokio::test]
    async fn what_is_held_back_leaves_before_the_next_write() {
        let hold = Hold::default();
        let (mut line, mut far) = pair(hold.clone()).await;
        line.write_all(b"one ").await.unwrap();
        hold.begin();
        line.write_all(b"two ").await.unwrap();
        line.flush().await.unwrap();
        let mut seen = [0; 4];
        far.read_exact(&mut seen).await.unwrap();
        assert_eq!(
            (&seen, far.try_read(&mut [0; 4]).map_err(|e| e.kind())),
            (b"one ", Err(io::ErrorKind::WouldBlock))
        );
        line.release();
        line.write_all(b"three").await.unwrap();
        line.write_all(b" four").await.unwrap();
        drop(line);
        let mut rest = String::new();
        far.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "two three four");
    }

    #[tokio::test]
    async fn a_flush_or_an_end_sends_what_is_held_back() {
        let hold = Hold::default();
        hold.begin();
        let (mut line, mut far) = pair(hold.clone()).await;
        line.write_all(b"answer").await.unwrap();
        line.release();
        line.flush().await.unwrap();
        let mut seen = [0; 6];
        far.read_exact(&mut seen).await.unwrap();
        assert_eq!(&seen, b"answer");
        let (mut line, mut far) = pair(hold).await;
        line.write_all(b"last words").await.unwrap();
        line.shutdown().await.unwrap();
        let mut rest = String::new();
        far.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "last words");
    }

    #[tokio::test]
    async fn more_than_the_kernel_takes_is_written_in_order() {
        let hold = Hold::default();
        hold.begin();
        let (mut line, mut far) = pair(hold).await;
        let held: Vec<u8> = (0..4_000_000u32).map(|n| n as u8).collect();
        line.write_all(&held).await.unwrap();
        line.release();
        let more = vec![7u8; 1_000_000];
        let (sent, all) = (more.clone(), [held, more].concat());
        let writing = tokio::spawn(async move {
            line.write_all(&sent).await.unwrap();
            line.shutdown().await.unwrap();
        });
        let mut seen = Vec::new();
        far.read_to_end(&mut seen).await.unwrap();
        writing.await.unwrap();
        assert!(seen == all);
    }
}
