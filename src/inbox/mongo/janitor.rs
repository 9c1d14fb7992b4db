//! Removal of expired messages. It is not a TTL index, because a removed number no longer orders
//! two writers. Only an unbroken run of expired messages from the head record upwards is removed,
//! only an hour after this janitor first saw it expired, and only after the head record was raised
//! over it. Idempotent; any number of janitors may run.

use std::collections::HashMap;
use std::time::Duration;

use futures_util::TryStreamExt;
use mongodb::bson::{Document, doc};

use super::stored::{HeadRecord, StoredMessage, id, ids_above, int, integer};
use super::{CURSOR_LIFE_MS, Inner, unavailable};
use crate::inbox::InboxError;
use crate::message::UserId;

/// Users fetched at once.
const BATCH: usize = 1_000;
/// Messages of one user looked at in one pass.
const RUN: i64 = 10_000;
/// Runs remembered, 150 bytes each: 30 MB.
const SEEN: usize = 200_000;

/// The expired runs by user: up to which number, and when it was first seen.
#[derive(Default)]
pub(super) struct Seen {
    runs: HashMap<UserId, (u64, Duration)>,
}

/// Visits all users that have something expired. Returns how many messages were removed.
pub(super) async fn run_once(inner: &Inner) -> Result<u64, InboxError> {
    let mut seen = inner.removals.lock().await;
    let now = int(inner.clock.now().0);
    let pipeline = [doc! { "$match": { "x": { "$lte": now } } }, doc! { "$group": { "_id": "$_id.u" } }];
    let mut users =
        inner.documents.aggregate(pipeline).batch_size(BATCH as u32).await.map_err(unavailable)?;
    let mut removed = 0;
    let mut still = HashMap::new();
    while let Some(row) = inner.in_time(users.try_next()).await.map_err(unavailable)? {
        let Some(user) = row.get_str("_id").ok().and_then(|user| UserId::parse(user).ok()) else { continue };
        let earlier = seen.runs.get(&user).copied();
        let (kept, count) = clean_user(inner, &user, earlier).await?;
        removed += count;
        if let Some(kept) = kept
            && still.len() < SEEN
        {
            still.insert(user, kept);
        }
    }
    seen.runs = still;
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

/// Removes the run that was first seen long enough ago. Returns the run to remember, and how many
/// messages were removed.
async fn clean_user(
    inner: &Inner,
    user: &UserId,
    earlier: Option<(u64, Duration)>,
) -> Result<(Option<(u64, Duration)>, u64), InboxError> {
    let uptime = inner.clock.uptime();
    let record = inner.by_ids(vec![id(user, 0)], doc! {}).await?;
    let record = record.first().map(HeadRecord::read).unwrap_or_default();
    let (head, floor) = (record.head, record.shown.max(inner.marker.lock().floor));
    let mut count = 0;
    let mut from = head;
    if let Some((upto, since)) = earlier
        && uptime.saturating_sub(since) >= inner.times.removal_delay()
        && upto >= head
    {
        count = remove(inner, user, upto).await?;
        from = upto;
    }
    let run = expired_run(inner, user, from, floor).await?;
    let kept = match (run, earlier) {
        (0, _) => None,
        // Seen before, but not long enough ago: the first sight counts.
        (_, Some(earlier)) if count == 0 && earlier.0 > from => Some(earlier),
        (upto, _) => Some((upto, uptime)),
    };
    Ok((kept, count))
}

/// The highest number of the unbroken run of expired messages above `from`; 0 if there is none.
/// Numbers up to `floor` that were left out at a restore do not break the run. When an unreadable
/// message expires is unknown: it goes with the next readable one above it.
async fn expired_run(inner: &Inner, user: &UserId, from: u64, floor: u64) -> Result<u64, InboxError> {
    let now = int(inner.clock.now().0);
    let reading = async {
        let mut found = inner
            .documents
            .find(doc! { "_id": ids_above(user, from) })
            .sort(doc! { "_id": 1 })
            .limit(RUN)
            .projection(doc! { "_id": 1, "x": 1 })
            .await?;
        // The last number that is expired, and the last number looked at.
        let (mut upto, mut last, mut after_bridge) = (0, from, false);
        while let Some(message) = found.try_next().await? {
            let Some((_, n)) = super::place_of(&message) else { break };
            let expires_at = integer(&message, "x");
            let follows = n == last + 1 || after_bridge && last < floor;
            if !follows || expires_at.is_some_and(|x| x > now) {
                break;
            }
            last = n;
            after_bridge = StoredMessage::is_bridge(&message);
            if expires_at.is_some() {
                upto = n;
            }
        }
        Ok(upto)
    };
    inner.in_time(reading).await.map_err(unavailable)
}

/// Raises the head record over the run (majority), and then removes the run.
async fn remove(inner: &Inner, user: &UserId, upto: u64) -> Result<u64, InboxError> {
    let raise = doc! { "$max": { "head": int(upto) } };
    let raised = inner.documents.update_one(doc! { "_id": id(user, 0) }, raise).into_future();
    inner.in_time(raised).await.map_err(unavailable)?;
    let range: Document = doc! { "_id": { "$gt": id(user, 0), "$lte": id(user, upto) } };
    let removed = inner.in_time(inner.documents.delete_many(range).into_future()).await;
    Ok(removed.map_err(unavailable)?.deleted_count)
}
