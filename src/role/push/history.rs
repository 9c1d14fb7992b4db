//! A user's own history: the stored messages, forwards from a position or backwards from one.

use std::sync::Arc;

use crate::inbox::{Inbox, InboxError, PageLimit, PositionQuery, StartAt};
use crate::message::{Message, Seq, UserId};

/// Most messages in one page.
pub const OWN_HISTORY_PAGE: usize = 100;
/// Most bytes of payload in one page; one message always fits.
const PAGE_BYTES: usize = 1024 * 1024;
/// Pages of the inbox that are read for one page backwards, when nearly all has expired.
const WINDOWS: usize = 16;

/// Which part of the history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HistoryRange {
    /// What comes after this position, in rising order.
    After(Seq),
    /// What stands before this position, newest first.
    Before(Seq),
}

/// Reads a page of at most `limit` unexpired messages, and where the following page begins: the
/// next `after` or `before`.
///
/// # Errors
///
/// The inbox's.
pub(super) async fn read(
    inbox: &Arc<dyn Inbox>,
    user: &UserId,
    range: HistoryRange,
    limit: usize,
) -> Result<(Vec<Message>, Option<Seq>), InboxError> {
    let limit = limit.clamp(1, OWN_HISTORY_PAGE);
    match range {
        HistoryRange::After(after) => {
            let page =
                inbox.page(user.clone(), after, PageLimit { messages: limit, bytes: PAGE_BYTES }).await?;
            Ok((page.messages, page.more.then_some(page.upto)))
        }
        HistoryRange::Before(before) => backwards(inbox, user, before, limit).await,
    }
}

/// Numbers are dense, so the messages before a position are those of the window below it.
async fn backwards(
    inbox: &Arc<dyn Inbox>,
    user: &UserId,
    before: Seq,
    limit: usize,
) -> Result<(Vec<Message>, Option<Seq>), InboxError> {
    let page_limit = |messages| PageLimit { messages, bytes: PAGE_BYTES };
    let oldest = inbox.page(user.clone(), Seq::BEGINNING, page_limit(1)).await?;
    let Some(oldest) = oldest.messages.first().map(|message| message.seq) else {
        return Ok((Vec::new(), None));
    };
    let query = PositionQuery { user: user.clone(), from: StartAt::Latest };
    let head = inbox.positions(vec![query]).await?.first().map_or(Seq::BEGINNING, |position| position.head);
    let mut top = head.get().min(before.get().saturating_sub(1));
    for _ in 0..WINDOWS {
        let mut low = top.saturating_sub(limit as u64);
        let mut messages = loop {
            let page = inbox.page(user.clone(), Seq::at(low), page_limit(limit)).await?;
            // A page that was cut has the older part: the window is made smaller.
            if page.more && page.upto.get() < top && low + 1 < top {
                low += (top - low).div_ceil(2);
                continue;
            }
            break page.messages;
        };
        messages.retain(|message| message.seq.get() <= top);
        messages.reverse();
        let more = oldest.get() <= low;
        if !messages.is_empty() || !more {
            return Ok((messages, more.then_some(Seq::at(low + 1))));
        }
        top = low;
    }
    Ok((Vec::new(), Some(Seq::at(top + 1))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Clock;
    use crate::inbox::Append;
    use crate::inbox::memory::MemoryInbox;
    use crate::message::{MessageId, Millis};
    use bytes::Bytes;

    const NOW: Millis = Millis(1_795_380_000_000);

    async fn inbox(messages: &[(usize, u64)]) -> (Arc<dyn Inbox>, UserId, Seq) {
        let inbox: Arc<dyn Inbox> = Arc::new(MemoryInbox::new(Clock::standing(NOW)));
        let user = UserId::parse("alice").unwrap();
        let append = |(n, (bytes, ttl_s)): (usize, &(usize, u64))| Append {
            user: user.clone(),
            id: MessageId::parse(&n.to_string()).unwrap(),
            deduplicated: false,
            accepted_at: NOW,
            expires_at: NOW.plus_seconds(*ttl_s),
            event: None,
            payload: Bytes::from(format!("\"{}\"", "x".repeat(*bytes))),
        };
        inbox.append(messages.iter().enumerate().map(append).collect()).await;
        (inbox, user, Seq::at(NOW.0))
    }

    /// All pages from the newest backwards: their numbers, above the first one of the inbox.
    async fn all_backwards(inbox: &Arc<dyn Inbox>, user: &UserId, first: Seq, limit: usize) -> Vec<u64> {
        let (mut before, mut found) = (Seq::MAX, Vec::new());
        for _ in 0..1_000 {
            let (page, next) = read(inbox, user, HistoryRange::Before(before), limit).await.unwrap();
            assert!(page.len() <= limit);
            found.extend(page.iter().map(|message| message.seq.get() - first.get()));
            match next {
                Some(next) if next < before => before = next,
                Some(next) => panic!("{next} is not before {before}"),
                None => return found,
            }
        }
        panic!("the pages never end")
    }

    #[tokio::test]
    async fn backwards_every_unexpired_message_comes_once_whatever_its_size_and_the_page() {
        let sizes = |n: usize| if n.is_multiple_of(7) { 900_000 } else { 10 };
        let all: Vec<(usize, u64)> = (1..=60).map(|n| (sizes(n), if n % 5 == 0 { 0 } else { 60 })).collect();
        let (inbox, user, first) = inbox(&all).await;
        let expected: Vec<u64> = (1..=60).rev().filter(|n| n % 5 != 0).collect();
        for limit in [1, 3, 7, 100, 5_000] {
            assert_eq!(
                all_backwards(&inbox, &user, first, limit.min(OWN_HISTORY_PAGE)).await,
                expected,
                "{limit}"
            );
        }
    }

    #[tokio::test]
    async fn an_inbox_without_messages_has_one_empty_page_and_a_long_gap_is_passed() {
        let (nothing, user, _) = inbox(&[]).await;
        assert_eq!(read(&nothing, &user, HistoryRange::Before(Seq::MAX), 9).await, Ok((Vec::new(), None)));
        assert_eq!(
            read(&nothing, &user, HistoryRange::After(Seq::BEGINNING), 9).await,
            Ok((Vec::new(), None))
        );
        let mut all = vec![(1, 60)];
        all.extend(std::iter::repeat_n((1, 0), 2_500));
        all.push((1, 60));
        let (gap, user, first) = inbox(&all).await;
        assert_eq!(all_backwards(&gap, &user, first, 10).await, [2_502, 1]);
    }
}
