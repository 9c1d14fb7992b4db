//! What the application holds: the stream of messages, and what happens beside it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ringpush_protocol::frame::{ClientFrame, WatchSince};
use ringpush_protocol::message::{DeviceId, NameError, TopicName};
use tokio::sync::{Notify, broadcast, watch};

use crate::actor::Actor;
use crate::books::{Books, Of};
use crate::dial::Dialer;
use crate::items::{Item, Notice, State, Stopped};
use crate::ledger::{Ledger, Mark};
use crate::options::{AckWhen, Options};

/// Notices that wait for whoever reads them; older ones are dropped.
const NOTICES: usize = 32;

/// The notices of one client, from [`Inbox::notices`].
pub struct Notices {
    notices: broadcast::Receiver<Notice>,
    /// [`State::Stopped`] was given: nothing follows.
    is_over: bool,
}

impl Notices {
    /// The next notice; `None` after the last. A reader that is 32 behind misses the oldest.
    pub async fn next(&mut self) -> Option<Notice> {
        while !self.is_over {
            match self.notices.recv().await {
                Ok(notice) => {
                    self.is_over = matches!(notice, Notice::State(State::Stopped(_)));
                    return Some(notice);
                }
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => self.is_over = true,
            }
        }
        None
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Life {
    Open,
    Closing,
    Ended,
}

/// What the application and the actor share.
pub(crate) struct Shared {
    inner: Mutex<Inner>,
    /// An item is there, or the end.
    filled: Notify,
    /// There is room for items again.
    pub(crate) room: Notify,
    /// More may be acked.
    pub(crate) acks: Notify,
    pub(crate) wake: Notify,
    pub(crate) renew: Notify,
    /// There is something to say to the server.
    pub(crate) words: Notify,
    pub(crate) life: watch::Sender<Life>,
    notices: broadcast::Sender<Notice>,
    room_max: usize,
}

struct Inner {
    books: Books,
    queue: VecDeque<(Of, Mark, Item)>,
    state: State,
    ack: AckWhen,
    words: Vec<ClientFrame>,
}

impl Shared {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the positions.
    pub(crate) fn with<T>(&self, change: impl FnOnce(&mut Books) -> T) -> T {
        change(&mut self.inner().books)
    }

    /// Queues an item of a log, or of the inbox, if `take` says that it is new. Returns whether it
    /// is. What is of a log that is not read is none.
    pub(crate) fn put(&self, of: Of, item: Item, take: impl FnOnce(&mut Ledger) -> Option<Mark>) -> bool {
        let mut inner = self.inner();
        let received = inner.ack == AckWhen::Received;
        let Some(ledger) = inner.books.of(&of) else { return false };
        let Some(mark) = take(ledger) else { return false };
        if received && mark.is_message && ledger.ack(mark.seq) {
            self.acks.notify_one();
        }
        inner.queue.push_back((of, mark, item));
        self.filled.notify_one();
        true
    }

    /// Whether another item may be queued. With a window the server keeps this itself.
    pub(crate) fn has_room(&self) -> bool {
        self.inner().queue.len() < self.room_max
    }

    /// All lines are gone: what was not handed on comes again.
    pub(crate) fn rewind(&self) {
        let mut inner = self.inner();
        let Inner { books, queue, .. } = &mut *inner;
        queue.retain(|(of, mark, _)| books.of(of).is_some_and(|ledger| ledger.outlives_lines(mark)));
        books.rewind();
    }

    pub(crate) fn set(&self, state: State) {
        {
            let mut inner = self.inner();
            let is_same = inner.state == state && !matches!(state, State::Waiting { .. });
            if is_same || matches!(inner.state, State::Stopped(_)) {
                return;
            }
            if matches!(state, State::Stopped(_)) {
                inner.queue.clear();
            }
            inner.state = state.clone();
        }
        self.filled.notify_one();
        let _ = self.notices.send(Notice::State(state));
    }

    pub(crate) fn tell(&self, code: &'static str, detail: String) {
        let _ = self.notices.send(Notice::Fault { code, detail });
    }

    /// Has this said to the server.
    fn say(&self, change: impl FnOnce(&mut Books) -> Option<ClientFrame>) {
        let mut inner = self.inner();
        let frame = change(&mut inner.books);
        inner.words.extend(frame);
        drop(inner);
        self.words.notify_one();
    }

    /// What is to be said to the server.
    pub(crate) fn take_words(&self) -> Vec<ClientFrame> {
        std::mem::take(&mut self.inner().words)
    }

    fn handled(&self) {
        let mut inner = self.inner();
        let Some((of, handled)) = inner.books.handle() else { return };
        if inner.ack == AckWhen::Handled && inner.books.of(&of).is_some_and(|ledger| ledger.ack(handled)) {
            self.acks.notify_one();
        }
    }

    /// Hands an item on, or says why there is none.
    fn pop(&self) -> Result<Option<Item>, Stopped> {
        let mut inner = self.inner();
        if let Some((of, mark, item)) = inner.queue.pop_front() {
            inner.books.hand(of, mark);
            drop(inner);
            self.room.notify_one();
            return Ok(Some(item));
        }
        match &inner.state {
            State::Stopped(stopped) => Err(stopped.clone()),
            _ => Ok(None),
        }
    }
}

/// Receives the messages of a user, each once and in order. Dropping it closes the connection in
/// the background.
pub struct Inbox {
    shared: Arc<Shared>,
    /// The notices from the beginning, for the first one who asks.
    first: Option<broadcast::Receiver<Notice>>,
}

/// Speaks to a client from elsewhere than the loop that receives.
#[derive(Clone)]
pub struct InboxHandle {
    shared: Arc<Shared>,
}

impl Inbox {
    pub(crate) fn start(
        options: Options,
        device: DeviceId,
        is_kept: bool,
        runtime: &tokio::runtime::Handle,
    ) -> Self {
        let inner = Inner {
            books: Books::default(),
            queue: VecDeque::new(),
            state: State::Connecting,
            ack: options.ack,
            words: Vec::new(),
        };
        let (notices, first) = broadcast::channel(NOTICES);
        let shared = Arc::new(Shared {
            inner: Mutex::new(inner),
            filled: Notify::new(),
            room: Notify::new(),
            acks: Notify::new(),
            wake: Notify::new(),
            renew: Notify::new(),
            words: Notify::new(),
            life: watch::channel(Life::Open).0,
            notices,
            room_max: 2 * options.window as usize + 16,
        });
        let dialer = Arc::new(Dialer::new(options, device));
        let actor = Actor::new(dialer, Arc::clone(&shared), is_kept);
        runtime.spawn(actor.run());
        Self { shared, first: Some(first) }
    }

    /// Waits for the next item. The one before counts as handled, and is acked. `Ok(None)`: closed
    /// by [`InboxHandle::close`]. It may be dropped while it waits: nothing is lost by that.
    ///
    /// # Errors
    ///
    /// The client has stopped for good.
    pub async fn next(&mut self) -> Result<Option<Item>, Stopped> {
        self.handled();
        loop {
            match self.shared.pop() {
                Ok(Some(item)) => return Ok(Some(item)),
                Ok(None) => self.shared.filled.notified().await,
                Err(stopped) if stopped.is_closed() => return Ok(None),
                Err(stopped) => return Err(stopped),
            }
        }
    }

    /// The last item is handled: it is acked without waiting for the next one.
    pub fn handled(&mut self) {
        self.shared.handled();
    }

    /// Gives the last item back: [`next`](Self::next) returns it again. Nothing is acked over it.
    pub fn put_back(&mut self, item: Item) {
        let mut inner = self.shared.inner();
        if let Some((of, mark)) = inner.books.give_back()
            && !matches!(inner.state, State::Stopped(_))
        {
            inner.queue.push_front((of, mark, item));
        }
    }

    /// The state now.
    #[must_use]
    pub fn state(&self) -> State {
        self.shared.inner().state.clone()
    }

    /// What happens beside the stream: from the start at the first call, later from now on.
    #[must_use]
    pub fn notices(&mut self) -> Notices {
        let is_over = self.first.is_none() && matches!(self.state(), State::Stopped(_));
        let notices = self.first.take().unwrap_or_else(|| self.shared.notices.subscribe());
        Notices { notices, is_over }
    }

    /// A handle for use beside the loop that receives.
    #[must_use]
    pub fn handle(&self) -> InboxHandle {
        InboxHandle { shared: Arc::clone(&self.shared) }
    }

    /// Says the acks that are due and closes, within a few seconds. The item at hand is acked only
    /// if [`handled`](Self::handled) was called.
    pub async fn close(self) {
        self.handle().close().await;
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        self.handle().begin_to_close();
    }
}

impl InboxHandle {
    /// Looks at once whether the line lives, and tries again at once where the client waits. Call
    /// it when the network has come back.
    pub fn wake(&self) {
        self.shared.wake.notify_one();
    }

    /// Asks the token source for another token, and shows it to the server.
    pub fn refresh(&self) {
        self.shared.renew.notify_one();
    }

    /// Reads the log of a topic of which the user is no member, from `since` on. The token's claim
    /// `watch` must allow it. Its messages come by [`Inbox::next`], with their topic, also after
    /// reconnects and moves, until [`unwatch`](Self::unwatch) or the topic's end. A refusal is a
    /// [`Notice::Fault`] with the code `forbidden_topic` or `unknown_topic`.
    ///
    /// # Errors
    ///
    /// `topic` is no name of a topic.
    pub fn watch(&self, topic: &str, since: WatchSince) -> Result<(), NameError> {
        let topic = TopicName::parse(topic)?;
        self.shared.say(|books| books.watch(topic, since));
        Ok(())
    }

    /// Ends [`watch`](Self::watch). A membership is not ended by it.
    ///
    /// # Errors
    ///
    /// `topic` is no name of a topic.
    pub fn unwatch(&self, topic: &str) -> Result<(), NameError> {
        let topic = TopicName::parse(topic)?;
        self.shared.say(|books| books.unwatch(topic));
        Ok(())
    }

    /// Says the acks that are due and closes: [`Inbox::next`] returns `Ok(None)` then.
    pub async fn close(&self) {
        self.begin_to_close();
        let mut life = self.shared.life.subscribe();
        let _ = life.wait_for(|life| *life == Life::Ended).await;
    }

    fn begin_to_close(&self) {
        self.shared.life.send_if_modified(|life| {
            let was_open = *life == Life::Open;
            if was_open {
                *life = Life::Closing;
            }
            was_open
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::connect;
    use crate::tokens::{TokenError, TokenReason};

    #[tokio::test]
    async fn a_token_source_that_panics_ends_the_client_and_says_so() {
        #[allow(clippy::panic)]
        async fn broken(_: TokenReason) -> Result<String, TokenError> {
            panic!("the application's own fault")
        }
        let mut inbox = connect("http://127.0.0.1:1", broken).device("d").start().unwrap();
        let (mut notices, handle) = (inbox.notices(), inbox.handle());
        assert_eq!(inbox.next().await.unwrap_err().cause, "internal");
        handle.close().await;
        while let Some(notice) = notices.next().await {
            assert!(matches!(notice, Notice::State(_)), "{notice:?}");
        }
    }
}
