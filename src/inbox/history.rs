//! The history of an inbox or a log: the stored messages, forwards from a position or backwards
//! from one.

use std::sync::Arc;

use super::{Inbox, InboxError, PageLimit, PositionQuery, StartAt};
use crate::message::{Message, Seq, UserId};

/// Most bytes of payload in one page; one message always fits.
const PAGE_BYTES: usize = 1024 * 1024;

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
pub async fn read(
    inbox: &Arc<dyn Inbox>,
    user: &UserId,
    range: HistoryRange,
    limit: usize,
) -> Result<(Vec<Message>, Option<Seq>), InboxError> {
    let limit = limit.max(1);
    match range {
        HistoryRange::After(after) => {
            let page =
                inbox.page(user.clone(), after, PageLimit { messages: limit, bytes: PAGE_BYTES }).await?;
            Ok((page.messages, page.more.then_some(page.upto)))
        }
        HistoryRange::Before(before) => backwards(inbox, user, before, limit).await,
    }
}

/// Reads the window of numbers below a position. Numbers are dense, except where the store was
/// restored: from an empty window it goes to the newest message below, which it searches for.
async fn backwards(
    inbox: &Arc<dyn Inbox>,
    user: &UserId,
    before: Seq,
    limit: usize,
) -> Result<(Vec<Message>, Option<Seq>), InboxError> {
    let Some(oldest) = first_after(inbox, user, 0).await? else { return Ok((Vec::new(), None)) };
    let query = PositionQuery { user: user.clone(), from: StartAt::Latest };
    let head = inbox.positions(vec![query]).await?.first().map_or(Seq::BEGINNING, |position| position.head);
    let mut top = head.get().min(before.get().saturating_sub(1));
    while top >= oldest {
        let mut low = top.saturating_sub(limit as u64);
        let mut messages = loop {
            let limit = PageLimit { messages: limit, bytes: PAGE_BYTES };
            let page = inbox.page(user.clone(), Seq::at(low), limit).await?;
            // A page that was cut has the older part: the window is made smaller.
            if page.more && page.upto.get() < top && low + 1 < top {
                low += (top - low).div_ceil(2);
                continue;
            }
            break page.messages;
        };
        messages.retain(|message| message.seq.get() <= top);
        messages.reverse();
        let more = oldest <= low;
        if !messages.is_empty() || !more {
            return Ok((messages, more.then_some(Seq::at(low + 1))));
        }
        top = newest_upto(inbox, user, oldest, low).await?;
    }
    Ok((Vec::new(), None))
}

/// The first unexpired message above `after`. A page passes over a limited number of expired ones.
async fn first_after(inbox: &Arc<dyn Inbox>, user: &UserId, after: u64) -> Result<Option<u64>, InboxError> {
    let mut after = Seq::at(after);
    loop {
        let page = inbox.page(user.clone(), after, PageLimit { messages: 1, bytes: PAGE_BYTES }).await?;
        match page.messages.first() {
            Some(message) => return Ok(Some(message.seq.get())),
            None if page.more && page.upto > after => after = page.upto,
            None => return Ok(None),
        }
    }
}

/// The newest unexpired message up to `top`, of which the oldest is `oldest`: bisected, in at most
/// 53 steps.
async fn newest_upto(
    inbox: &Arc<dyn Inbox>,
    user: &UserId,
    oldest: u64,
    top: u64,
) -> Result<u64, InboxError> {
    let (mut newest, mut none_above) = (oldest, top);
    while newest < none_above {
        let middle = newest + (none_above - newest) / 2;
        match first_after(inbox, user, middle).await?.filter(|seq| *seq <= none_above) {
            Some(found) => newest = found,
            None => none_above = middle,
        }
    }
    Ok(newest)
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
            trace: None,
            append_id: None,
            user: user.clone(),
            id: MessageId::parse(&n.to_string()).unwrap(),
            deduplicated: false,
            accepted_at: NOW,
            expires_at: NOW.plus_seconds(*ttl_s),
            event: None,
            via: None,
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
            assert_eq!(all_backwards(&inbox, &user, first, limit.min(100)).await, expected, "{limit}");
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
        // Also where more have expired than one page passes over.
        let mut all = vec![(1, 0); 12_000];
        all.extend([(1, 60), (1, 0), (1, 60)]);
        let (expired, user, first) = inbox(&all).await;
        assert_eq!(all_backwards(&expired, &user, first, 10).await, [12_003, 12_001]);
    }
}
