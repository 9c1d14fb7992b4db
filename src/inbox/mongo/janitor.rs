//! Removal of expired messages. It is not a TTL index, because a removed number no longer orders
//! two writers. Only an unbroken run of expired messages from the head record upwards is removed,
//! only an hour after this janitor first saw it expired, and only after the head record was raised
//! over it. Idempotent; any number of janitors may run.
//!
//! Each pass puts a *mark* on top of the run: up to which number, and when it was first seen. So
//! what expires in each ten minutes is removed an hour later, however much it is. The head record
//! of a log also gets `gone`, at first sight: readers begin above it.

use std::collections::HashMap;
use std::time::Duration;

use futures_util::TryStreamExt;
use mongodb::bson::{Document, doc};
use smallvec::SmallVec;

use super::stored::{HeadRecord, StoredMessage, id, ids_above, int, integer};
use super::{CURSOR_LIFE_MS, Inner, unavailable};
use crate::inbox::InboxError;
use crate::message::UserId;

/// Users fetched at once.
const BATCH: usize = 1_000;
/// Messages looked at, and removed, by one command.
const MOST: u64 = 10_000;
/// Commands that look at one user, or one log, in one pass: a million messages. The next pass goes
/// on.
const LOOKS: usize = 100;
/// Users and logs whose runs are remembered: 100 bytes each, and 200 more with several marks.
const SEEN: usize = 200_000;
/// Marks of one run: one in ten minutes for more than an hour.
const MARKS: usize = 8;
/// Users whose removal may fail in one pass before the pass is given up.
const FAILURES: usize = 10;

/// Up to which number a run was seen expired, and when first. Both rise from mark to mark.
type Marks = SmallVec<[(u64, Duration); 1]>;

/// The expired runs, by user or log, and the pass in which each was looked at last.
#[derive(Default)]
pub(super) struct Seen {
    runs: HashMap<UserId, (u64, Marks)>,
    pass: u64,
    /// What was seen before the store was restored says nothing of what stands there now.
    floor: u64,
}

/// Visits all users that have something expired. Returns how many messages were removed. A user of
/// whom it fails is logged, and tried again in the next pass.
pub(super) async fn run_once(inner: &Inner) -> Result<u64, InboxError> {
    let mut seen = inner.removals.lock().await;
    let floor = inner.marker.lock().floor;
    if std::mem::replace(&mut seen.floor, floor) != floor {
        seen.runs.clear();
    }
    seen.pass += 1;
    let (pass, now) = (seen.pass, int(inner.clock.now().0));
    let pipeline = [doc! { "$match": { "x": { "$lte": now } } }, doc! { "$group": { "_id": "$_id.u" } }];
    let mut users =
        inner.documents.aggregate(pipeline).batch_size(BATCH as u32).await.map_err(unavailable)?;
    let (mut removed, mut failures) = (0, 0);
    while let Some(row) = inner.in_time(users.try_next()).await.map_err(unavailable)? {
        let Some(user) = row.get_str("_id").ok().and_then(|user| UserId::parse(user).ok()) else { continue };
        let mut marks = seen.runs.get(&user).map(|(_, marks)| marks.clone()).unwrap_or_default();
        match clean_user(inner, &user, &mut marks).await {
            Ok(count) => removed += count,
            Err(error) if failures < FAILURES => {
                failures += 1;
                tracing::warn!(%error, %user, "expired messages could not be removed yet");
            }
            Err(error) => return Err(error),
        }
        if marks.is_empty() {
            seen.runs.remove(&user);
        } else if seen.runs.len() < SEEN || seen.runs.contains_key(&user) {
            seen.runs.insert(user, (pass, marks));
        }
    }
    // Those that have nothing expired any more.
    seen.runs.retain(|_, (looked_at, _)| *looked_at == pass);
    if inner.is_of_logs {
        return Ok(removed);
    }
    let unused = int(inner.clock.now().0.saturating_sub(CURSOR_LIFE_MS));
    // `at` is the minute, which is indexed; `t` is the exact time. Cursors of earlier versions have
    // the exact time in `at`.
    let exact = doc! { "$not": { "$gt": unused } };
    let unused = inner.cursors.delete_many(doc! { "at": { "$lte": unused }, "t": exact }).into_future();
    inner.in_time(unused).await.map_err(unavailable)?;
    inner.clean_topics().await?;
    Ok(removed)
}

/// Removes what was first seen long enough ago, and marks what is new. Returns how many messages
/// were removed.
async fn clean_user(inner: &Inner, user: &UserId, marks: &mut Marks) -> Result<u64, InboxError> {
    let record = inner.by_ids(vec![id(user, 0)], doc! {}).await?;
    let record = record.first().map(HeadRecord::read).unwrap_or_default();
    let floor = record.shown.max(inner.marker.lock().floor);
    // One at the head record: its removal was begun and not finished.
    marks.retain(|(upto, _)| *upto >= record.head);
    let mut count = 0;
    let due = due(marks, inner.clock.uptime(), inner.times.removal_delay());
    if due > 0 {
        count = remove(inner, user, marks[due - 1].0).await?;
        marks.drain(..due);
    }
    let marked = marks.last().map_or(0, |(upto, _)| *upto).max(record.head);
    let upto = expired_run(inner, user, marked, floor).await?;
    if upto > marked {
        if inner.is_of_logs {
            let gone = doc! { "$max": { "gone": int(upto) } };
            let raised = inner.documents.update_one(doc! { "_id": id(user, 0) }, gone).into_future();
            inner.in_time(raised).await.map_err(unavailable)?;
        }
        put_mark(marks, (upto, inner.clock.uptime()));
    }
    Ok(count)
}

/// How many marks, from the lowest on, were first seen at least `delay` ago.
fn due(marks: &Marks, now: Duration, delay: Duration) -> usize {
    marks.iter().take_while(|(_, since)| now.saturating_sub(*since) >= delay).count()
}

/// Adds a mark. Where there are too many, the youngest grows, and waits from now on.
fn put_mark(marks: &mut Marks, mark: (u64, Duration)) {
    if marks.len() >= MARKS {
        marks.pop();
    }
    marks.push(mark);
}

/// The highest number of the unbroken run of expired messages above `from`; 0 if there is none.
/// Numbers up to `floor` that were left out at a restore do not break the run: it goes on behind
/// the bridge before them, which goes with what follows. When an unreadable message expires is
/// unknown: it goes with the next readable one above it.
async fn expired_run(inner: &Inner, user: &UserId, from: u64, floor: u64) -> Result<u64, InboxError> {
    let now = int(inner.clock.now().0);
    // The last number that is expired, and the last number looked at.
    let (mut upto, mut last, mut after_bridge) = (0, from, false);
    for _ in 0..LOOKS {
        let above = doc! { "_id": ids_above(user, last) };
        let reading = async {
            let found = inner.documents.find(above).sort(doc! { "_id": 1 }).limit(MOST as i64);
            let mut found = found.projection(doc! { "_id": 1, "x": 1 }).await?;
            let mut looked_at = 0;
            while let Some(message) = found.try_next().await? {
                let Some((_, n)) = super::place_of(&message) else { return Ok(0) };
                let expires_at = integer(&message, "x");
                let follows = n == last + 1 || after_bridge && last < floor;
                if !follows || expires_at.is_some_and(|x| x > now) {
                    return Ok(0);
                }
                (last, looked_at) = (n, looked_at + 1);
                after_bridge = StoredMessage::is_bridge(&message);
                if expires_at.is_some() && !after_bridge {
                    upto = n;
                }
            }
            Ok(looked_at)
        };
        if inner.in_time(reading).await.map_err(unavailable)? < MOST {
            break;
        }
    }
    Ok(upto)
}

/// Raises the head record over the run (majority), and then removes what stands up to there, some
/// thousands at a time. Numbers may lie far apart after a restore, so documents are counted, not
/// numbers.
async fn remove(inner: &Inner, user: &UserId, upto: u64) -> Result<u64, InboxError> {
    let raise = doc! { "$max": { "head": int(upto) } };
    let raised = inner.documents.update_one(doc! { "_id": id(user, 0) }, raise).into_future();
    inner.in_time(raised).await.map_err(unavailable)?;
    let mut count = 0;
    loop {
        let range: Document = doc! { "_id": { "$gt": id(user, 0), "$lte": id(user, upto) } };
        let last = inner.documents.find_one(range).sort(doc! { "_id": 1 }).skip(MOST - 1);
        let last = inner.in_time(last.projection(doc! { "_id": 1 }).into_future()).await;
        let last = last.map_err(unavailable)?.as_ref().and_then(super::place_of).map(|(_, n)| n);
        let range = doc! { "_id": { "$gt": id(user, 0), "$lte": id(user, last.unwrap_or(upto)) } };
        let removed = inner.in_time(inner.documents.delete_many(range).into_future()).await;
        count += removed.map_err(unavailable)?.deleted_count;
        if last.is_none() {
            return Ok(count);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DELAY: Duration = Duration::from_secs(60);

    proptest! {
        /// Nothing is removed before it was known for the delay, and all is soon after it was.
        #[test]
        fn each_mark_waits_for_itself(steps in proptest::collection::vec((0u64..1_000, 1u64..30), 1..60)) {
            let (mut marks, mut seen, mut upto, mut now) = (Marks::new(), Vec::new(), 0, Duration::ZERO);
            let mut removed = 0;
            for (more, pause) in steps {
                now += Duration::from_secs(pause);
                if let Some((upto, _)) = marks.drain(..due(&marks.clone(), now, DELAY)).next_back() {
                    prop_assert!(upto > removed);
                    removed = upto;
                }
                if more > 0 {
                    upto += more;
                    put_mark(&mut marks, (upto, now));
                    seen.push((upto, now));
                }
                prop_assert!(marks.len() <= MARKS);
                prop_assert!(marks.is_sorted());
                for (upto, since) in &seen {
                    prop_assert!(*upto > removed || now - *since >= DELAY, "removed too early");
                }
            }
            // With no more than a mark in eight passes of the delay, each goes when it is due.
            for _ in 0..2 {
                now += DELAY;
                removed = marks.drain(..due(&marks.clone(), now, DELAY)).next_back().map_or(removed, |(upto, _)| upto);
            }
            prop_assert_eq!((removed, marks.len()), (upto, 0));
        }
    }
}
