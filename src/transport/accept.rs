//! Accepting connections, in one of two ways.
//!
//! [`in_task`] is for listeners with a few hundred long-lived connections: requests of services.
//!
//! [`on_thread`] is for sockets, which come by the ten thousand when a load balancer or a node has
//! died. A thread of its own accepts all pending connections and then polls each once. The request
//! has mostly arrived by then, so it is read, judged and answered in one turn. Only then are the
//! connections handed to the runtime, many at once. In the runtime each new connection would wake
//! the thread that waits for events, and each of its steps another one; live messages would wait
//! behind the crowd (docs/decisions/002-accepting-thread.md).

use std::future::Future;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

/// Delay after a failed accept, such as when no more files can be opened.
const REST: Duration = Duration::from_millis(50);
/// Connections that are accepted before the first of them is polled, so that its request has time
/// to arrive.
const AT_ONCE: usize = 64;
/// Most connections that are handed to the runtime together.
const TOGETHER: usize = 256;
/// Shortest time between two hand-overs, unless [`TOGETHER`] connections are waiting. Each
/// hand-over wakes a worker, which takes a core from the thread that accepts or from the clients.
const PATIENCE: Duration = Duration::from_millis(4);

/// Accepts connections and spawns `begin` for each, until `stop`.
pub(super) async fn in_task<F>(
    listener: TcpListener,
    stop: &CancellationToken,
    begin: impl Fn(TcpStream) -> F,
) where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = match tokio::net::TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => return tracing::error!(%error, "a listener cannot be watched"),
    };
    let mut stopped = pin!(stop.cancelled());
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted.and_then(|(stream, _)| stream.into_std()),
            () = stopped.as_mut() => return,
        };
        match accepted {
            Ok(stream) => drop(tokio::spawn(begin(stream))),
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(REST).await;
            }
        }
    }
}

/// The rest of a connection's life.
type Life = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Accepts connections on a thread of its own and polls each once, until `stop`. Connections that
/// are not finished by then go on in the runtime. Returns when the listener is closed.
///
/// # Errors
///
/// The system has no thread or event to give.
pub(super) async fn on_thread(
    listener: TcpListener,
    stop: &CancellationToken,
    begin: impl Fn(TcpStream) -> Life + Send + 'static,
) -> io::Result<()> {
    let shutdown_event = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
    // Also if the caller is dropped.
    let closing = Closing { shutdown_event: Arc::clone(&shutdown_event), stop: stop.child_token() };
    let (ended, mut end) = oneshot::channel::<()>();
    let door = Acceptor { listener, shutdown_event, stop: closing.stop.clone(), runtime: Handle::current() };
    std::thread::Builder::new().name("accept".to_owned()).spawn(move || {
        door.keep(begin);
        drop(ended);
    })?;
    tokio::select! {
        () = stop.cancelled() => {}
        _ = &mut end => return Err(io::Error::other("the thread that accepts has ended")),
    }
    drop(closing);
    let _: Result<(), _> = end.await;
    Ok(())
}

/// Tells the thread to end.
struct Closing {
    shutdown_event: Arc<OwnedFd>,
    stop: CancellationToken,
}

impl Drop for Closing {
    fn drop(&mut self) {
        self.stop.cancel();
        // Writing fails only if the event is set already.
        let _ = rustix::io::write(&*self.shutdown_event, &1u64.to_ne_bytes());
    }
}

struct Acceptor {
    listener: TcpListener,
    /// Set when `stop` is cancelled.
    shutdown_event: Arc<OwnedFd>,
    stop: CancellationToken,
    runtime: Handle,
}

impl Acceptor {
    fn keep(self, begin: impl Fn(TcpStream) -> Life) {
        // Timers and connections that are created here belong to the runtime.
        let _runtime = self.runtime.enter();
        let (mut came, mut begun) = (Vec::with_capacity(AT_ONCE), Vec::with_capacity(TOGETHER));
        let mut handed_over = Instant::now();
        while !self.stop.is_cancelled() {
            let accepted = self.accept(&mut came);
            for stream in came.drain(..) {
                begun.extend(first_turn(begin(stream)));
            }
            // A connection that comes alone does not wait.
            let patience = PATIENCE.saturating_sub(handed_over.elapsed());
            if begun.len() > TOGETHER - AT_ONCE || patience.is_zero() && !begun.is_empty() {
                self.hand_over(&mut begun);
                handed_over = Instant::now();
            }
            match accepted {
                Ok(false) => {}
                Ok(true) => self.wait(Some(&self.listener), (!begun.is_empty()).then_some(patience)),
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    self.hand_over(&mut begun);
                    self.wait(None, Some(REST));
                }
            }
        }
        self.hand_over(&mut begun);
    }

    /// Spawns one task for all: the runtime wakes a worker for each task that is spawned from
    /// outside.
    fn hand_over(&self, begun: &mut Vec<Life>) {
        let begun = std::mem::replace(begun, Vec::with_capacity(TOGETHER));
        drop(self.runtime.spawn(async move { begun.into_iter().for_each(|life| drop(tokio::spawn(life))) }));
    }

    /// Accepts pending connections. Returns whether that was all.
    fn accept(&self, came: &mut Vec<TcpStream>) -> Result<bool, Errno> {
        while came.len() < AT_ONCE {
            match accept_with(&self.listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
                Ok(socket) => came.push(socket.into()),
                Err(Errno::WOULDBLOCK) => return Ok(true),
                // A connection that has gone already says nothing about the next one.
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }

    /// Waits for a connection, the event, or the end of `time`.
    fn wait(&self, listener: Option<&TcpListener>, time: Option<Duration>) {
        let time = time.map(|time| Timespec { tv_sec: 0, tv_nsec: time.subsec_nanos().into() });
        let shutdown_event = PollFd::from_borrowed_fd(self.shutdown_event.as_fd(), PollFlags::IN);
        let mut all = vec![shutdown_event];
        all.extend(listener.map(|listener| PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN)));
        // Whatever it returns, the next turn finds out.
        let _ = poll(&mut all, time.as_ref());
    }
}

/// Polls a connection once and returns what is left of it. A panic ends the connection and not the
/// thread.
fn first_turn(mut life: Life) -> Option<Life> {
    let mut nobody = Context::from_waker(Waker::noop());
    // The runtime polls again as soon as it has the task.
    match catch_unwind(AssertUnwindSafe(|| life.as_mut().poll(&mut nobody).is_pending())) {
        Ok(true) => Some(life),
        Ok(false) | Err(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;
    use std::io::{Read, Write};
    use std::net::SocketAddr;

    fn listener() -> (TcpListener, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let at = listener.local_addr().unwrap();
        (listener, at)
    }

    /// What the server says on a new connection, until it ends.
    async fn heard(at: SocketAddr) -> String {
        tokio::task::spawn_blocking(move || {
            let mut heard = String::new();
            TcpStream::connect(at).unwrap().read_to_string(&mut heard).unwrap();
            heard
        })
        .await
        .unwrap()
    }

    #[tokio::test]
    async fn what_is_not_over_in_its_first_turn_goes_on_in_the_runtime() {
        let ((listener, at), stop) = (listener(), CancellationToken::new());
        let begin = |mut stream: TcpStream| {
            async move {
                let name = || std::thread::current().name().unwrap_or_default().to_owned();
                let first = name();
                tokio::time::sleep(Duration::from_millis(1)).await;
                write!(stream, "{first}, then {}", if name() == first { "the same" } else { "another" })
                    .unwrap();
            }
            .boxed()
        };
        let door = tokio::spawn({
            let stop = stop.clone();
            async move { on_thread(listener, &stop, begin).await }
        });
        let all = futures_util::future::join_all((0..200).map(|_| heard(at))).await;
        assert!(all.iter().all(|heard| heard == "accept, then another"), "{all:?}");
        stop.cancel();
        door.await.unwrap().unwrap();
        assert!(TcpStream::connect(at).is_err(), "the listener is closed");
    }

    #[tokio::test]
    async fn the_listener_is_closed_also_when_nobody_waits_for_that() {
        let ((listener, at), stop) = (listener(), CancellationToken::new());
        let door = on_thread(listener, &stop, |stream| async move { drop(stream) }.boxed());
        assert!(tokio::time::timeout(Duration::from_millis(10), door).await.is_err());
        let closed = async {
            while TcpStream::connect(at).is_ok() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), closed).await.unwrap();
    }

    #[tokio::test]
    async fn a_panic_costs_its_connection_and_not_the_door() {
        let ((listener, at), stop) = (listener(), CancellationToken::new());
        let begin = |mut stream: TcpStream| {
            async move {
                // Of this test's own making: the first byte decides.
                let mut first = [0];
                stream.set_nonblocking(false).unwrap();
                stream.read_exact(&mut first).unwrap();
                assert_eq!(first, [b'+']);
                stream.write_all(b"good").unwrap();
            }
            .boxed()
        };
        let door = tokio::spawn({
            let stop = stop.clone();
            async move { on_thread(listener, &stop, begin).await }
        });
        let said = |byte: &'static [u8]| async move {
            let talk = move || {
                let (mut stream, mut heard) = (TcpStream::connect(at).unwrap(), String::new());
                stream.write_all(byte).unwrap();
                let _ = stream.read_to_string(&mut heard);
                heard
            };
            tokio::task::spawn_blocking(talk).await.unwrap()
        };
        assert_eq!(said(b"-").await, "");
        assert_eq!(said(b"+").await, "good");
        stop.cancel();
        door.await.unwrap().unwrap();
    }
}
