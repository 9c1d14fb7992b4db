//! A session's mailbox: how the rest of the node reaches the task that owns the socket.
//!
//! There are many mailboxes and nearly all are empty. An empty one owns no memory beside itself,
//! where a channel would keep a block of slots. It is bounded by dropping: a live message that has
//! no room only leaves a mark, and the session reads the inbox instead.

use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::task::AtomicWaker;
use parking_lot::Mutex;
use smallvec::SmallVec;
use tokio::time::Duration;

use super::tail::{Block, Tail};
use crate::inbox::topics::Memberships;
use crate::message::{Message, Millis, Seq};
use crate::session::{Item, Page};
use crate::wire::close::CloseCode;
use crate::wire::frame::message_frame;

/// Most live messages that wait for one session's task.
pub(super) const MAILBOX_MESSAGES: usize = 256;
/// Most bytes of their frames: the outbound limit of a session.
pub(super) const MAILBOX_BYTES: usize = 256 * 1024;

/// A message of an inbox as a session sends it.
#[derive(Debug, Clone)]
pub(super) struct InboxFrame {
    /// The encoded frame.
    pub(super) bytes: Bytes,
    pub(super) seq: Seq,
    pub(super) accepted_at: Millis,
}

/// A message in the form of the session, with its frame encoded once.
pub(super) fn encoded(message: &Message) -> Item<InboxFrame> {
    let Message { seq, accepted_at, expires_at, .. } = *message;
    Item { seq, expires_at, frame: InboxFrame { bytes: message_frame(message), seq, accepted_at } }
}

/// Everything that came since the task last looked.
#[derive(Debug, Default)]
pub(super) struct Mail {
    /// Live messages in the order of their arrival; mostly one.
    pub(super) live: SmallVec<[Item<InboxFrame>; 1]>,
    bytes: usize,
    /// Live messages were dropped.
    pub(super) lost: bool,
    /// The page that was requested.
    pub(super) page: Option<Page<InboxFrame>>,
    /// The sweep found something after this position.
    pub(super) more_after: Option<Seq>,
    /// The first position is above everything in the store; the session goes on after the second
    /// one.
    pub(super) reset: Option<(Seq, Seq)>,
    /// What concerns logs.
    pub(super) logs: Option<Box<LogMail>>,
    /// Orders of the node, which are rare.
    pub(super) orders: Option<Box<Orders>>,
}

/// What concerns the logs of a session.
#[derive(Default)]
pub(super) struct LogMail {
    /// A block that was requested; none, if what was asked for is not there any more.
    pub(super) block: Option<(Arc<Tail>, Option<Block>)>,
    /// The memberships of the user, read anew.
    pub(super) memberships: Option<Arc<Memberships>>,
    /// Changes are counted anew, because the store was restored.
    pub(super) counted_anew: bool,
}

impl std::fmt::Debug for LogMail {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("LogMail")
    }
}

/// What the node wants from a session.
#[derive(Debug, Default)]
pub(super) struct Orders {
    /// End the session.
    pub(super) close: Option<(CloseCode, &'static str)>,
    /// Tell the client to move.
    pub(super) move_to: Option<MoveOrder>,
}

/// A `move` frame, and how long the session lives after it.
#[derive(Debug)]
pub(super) struct MoveOrder {
    /// The encoded frame.
    pub(super) frame: Bytes,
    /// Close with 4302 after this time. `None`: go on if the client ignores the move.
    pub(super) close_after: Option<Duration>,
}

/// The mailbox. Any thread may put; one task takes.
#[derive(Default)]
pub(super) struct Mailbox {
    /// `None` if nothing is there.
    mail: Mutex<Option<Box<Mail>>>,
    waker: AtomicWaker,
}

impl Mailbox {
    /// Adds a live message, or leaves a mark if there is no room.
    pub(super) fn try_live(&self, item: Item<InboxFrame>) {
        self.put(|mail| {
            let bytes = mail.bytes + item.frame.bytes.len();
            if mail.live.len() < MAILBOX_MESSAGES && bytes <= MAILBOX_BYTES {
                mail.bytes = bytes;
                mail.live.push(item);
            } else {
                mail.lost = true;
            }
        });
    }

    /// Live messages were lost on the way here.
    pub(super) fn lost(&self) {
        self.put(|mail| mail.lost = true);
    }

    /// The logs have moved.
    pub(super) fn logs_moved(&self) {
        self.put(|mail| {
            mail.logs.get_or_insert_default();
        });
    }

    /// Adds the block that the session requested; it requests one at a time.
    pub(super) fn log_block(&self, tail: Arc<Tail>, block: Option<Block>) {
        self.put(|mail| mail.logs.get_or_insert_default().block = Some((tail, block)));
    }

    /// The memberships of the user were read anew; `anew` if the store was restored, and counts
    /// their changes anew.
    pub(super) fn memberships(&self, memberships: Arc<Memberships>, anew: bool) {
        self.put(|mail| {
            let logs = mail.logs.get_or_insert_default();
            if anew {
                (logs.memberships, logs.counted_anew) = (None, true);
            }
            let newer = |known: &Arc<Memberships>| known.version < memberships.version;
            if logs.memberships.as_ref().is_none_or(newer) {
                logs.memberships = Some(memberships);
            }
        });
    }

    /// Adds the page that the session requested; it requests one at a time.
    pub(super) fn page(&self, page: Page<InboxFrame>) {
        self.put(|mail| mail.page = Some(page));
    }

    /// The sweep found something after this position.
    pub(super) fn more_after(&self, position: Seq) {
        self.put(|mail| mail.more_after = mail.more_after.max(Some(position)));
    }

    /// The first position is above everything in the store; go on after the second one.
    pub(super) fn reset(&self, position: Seq, to: Seq) {
        self.put(|mail| mail.reset = Some((position, to)));
    }

    /// Ends the session. The first reason stands.
    pub(super) fn close(&self, code: CloseCode, why: &'static str) {
        self.put(|mail| {
            mail.orders.get_or_insert_default().close.get_or_insert((code, why));
        });
    }

    /// Tells the client to move. The last order stands.
    pub(super) fn move_to(&self, order: MoveOrder) {
        self.put(|mail| mail.orders.get_or_insert_default().move_to = Some(order));
    }

    fn put(&self, act: impl FnOnce(&mut Mail)) {
        act(self.mail.lock().get_or_insert_default());
        self.waker.wake();
    }

    /// Whether nothing waits.
    pub(super) fn is_empty(&self) -> bool {
        self.mail.lock().is_none()
    }

    /// Takes everything, or waits for something.
    pub(super) fn poll_take(&self, cx: &mut Context<'_>) -> Poll<Box<Mail>> {
        if let Some(mail) = self.take() {
            return Poll::Ready(mail);
        }
        self.waker.register(cx.waker());
        // Checks again, because a put between the check and the registration wakes nobody.
        self.take().map_or(Poll::Pending, Poll::Ready)
    }

    pub(super) fn take(&self) -> Option<Box<Mail>> {
        self.mail.lock().take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;
    use std::future::poll_fn;

    fn item(seq: u64, bytes: usize) -> Item<InboxFrame> {
        let (seq, bytes) = (Seq::at(seq), Bytes::from(vec![b'x'; bytes]));
        let frame = InboxFrame { bytes, seq, accepted_at: Millis(0) };
        Item { seq, expires_at: Millis(u64::MAX), frame }
    }

    fn take(mailbox: &Mailbox) -> Option<Box<Mail>> {
        poll_fn(|cx| mailbox.poll_take(cx)).now_or_never()
    }

    #[test]
    fn what_has_no_room_leaves_a_mark() {
        let mailbox = Mailbox::default();
        assert!(take(&mailbox).is_none());
        for n in 0..=MAILBOX_MESSAGES as u64 {
            mailbox.try_live(item(n, 10));
        }
        let mail = take(&mailbox).unwrap();
        assert_eq!((mail.live.len(), mail.lost), (MAILBOX_MESSAGES, true));
        for n in 0..6 {
            mailbox.try_live(item(n, 60_000));
        }
        let mail = take(&mailbox).unwrap();
        assert_eq!((mail.live.len(), mail.lost), (4, true));
        assert!(take(&mailbox).is_none());
    }

    #[tokio::test]
    async fn a_put_wakes_the_one_who_waits() {
        let mailbox = std::sync::Arc::new(Mailbox::default());
        let waiting = tokio::spawn({
            let mailbox = std::sync::Arc::clone(&mailbox);
            async move { poll_fn(|cx| mailbox.poll_take(cx)).await }
        });
        tokio::task::yield_now().await;
        mailbox.close(CloseCode::Replaced, "first");
        mailbox.close(CloseCode::Draining, "second");
        let orders = waiting.await.unwrap().orders.unwrap();
        assert_eq!(orders.close, Some((CloseCode::Replaced, "first")));
    }
}
