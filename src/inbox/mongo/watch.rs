//! What this process watches while it writes: whether the store is still the same.
//!
//! # Restores
//!
//! A *marker* stands among the messages, at the position of a user without a name. Its `pulse` is a
//! time that every writer raises. Its `lineage` changes when a writer finds the pulse below one
//! that it has seen. Its `floor` is the time when that happened. A backup that is put back, or a
//! collection that is dropped, takes the pulse back with it. Its `of` is the UUID of its
//! collection. `mongorestore --drop` makes a new collection and puts a marker into it that names
//! the old one: so a process that starts, and knows no pulse, recognises it too. In both cases
//!
//! - heads in memory are dropped, because they belong to another state of the store;
//! - numbers go on above the floor. All numbers assigned before are below it, because a number is a
//!   time in ms plus the count of a user's messages. So no number is assigned twice;
//! - where that leaves numbers out, a *bridge* (an expired message) stands after the last one
//!   before, so that readers still find the next number.
//!
//! A writer that reads a head also reads the marker, so that it cannot miss such a state.

use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::TryStreamExt;
use futures_util::future::try_join_all;
use mongodb::bson::{Bson, Document, doc};
use mongodb::options::ReturnDocument;

use super::stored::{HeadRecord, StoredMessage, id, int, integer, place_of};
use super::{Inner, OpenError, is_taken, unavailable};
use crate::inbox::InboxError;
use crate::message::UserId;

/// Looks at the store per look at the indexes: one a minute.
const LOOKS_PER_INDEX_LOOK: u32 = 30;
/// Messages of one user that are searched for numbers that were left out.
const RUN: i64 = 5_000;
/// Users mended at the same time.
const AT_ONCE: usize = 16;

/// What is known about the marker.
#[derive(Debug, Clone, Default)]
pub(super) struct Marker {
    /// The highest pulse seen.
    pulse: i64,
    lineage: String,
    /// Numbers up to this one may have been assigned and are gone.
    pub(super) floor: u64,
    /// When the last look was sent that found the store unchanged.
    pub(super) well: Duration,
    /// What was written since this time must be mended.
    pub(super) mend_since: Option<Duration>,
}

/// The `_id` of the marker. No user has an empty name.
fn place() -> Document {
    doc! { "u": "", "n": 0i64 }
}

/// Watches the store as long as the process runs; `every` is the time between two looks.
pub(super) async fn watch(inner: &Inner, every: Duration) {
    let mut looks = 0u32;
    loop {
        if let Err(error) = look(inner).await {
            tracing::debug!(%error, "the store could not be looked at");
        }
        if !inner.is_of_logs
            && inner.restored.load(Ordering::Acquire)
            && let Some(identity) = inner.identity.get()
            && let Err(error) = inner.identity(identity).await
        {
            // It may have been dropped with the messages. A process that starts must find the
            // identity that the others have.
            tracing::debug!(%error, "the store's identity could not be put back");
        }
        // Also if nobody publishes: readers wait for what is to be mended.
        if inner.restored.load(Ordering::Acquire)
            && let Err(error) = super::append::give_up_heads(inner, &mut *inner.appends.lock().await).await
        {
            tracing::warn!(%error, "messages that were written during a restore cannot be repaired yet");
        }
        looks = (looks + 1) % LOOKS_PER_INDEX_LOOK;
        if looks == 0
            && let Err(fault) = inner.make_indexes().await
        {
            match fault {
                OpenError::Refused(..) => tracing::warn!("{fault}"),
                OpenError::Unreachable(_) => tracing::debug!(%fault, "the indexes could not be looked at"),
            }
        }
        tokio::time::sleep(every).await;
    }
}

/// Raises the pulse and reacts to a store that was restored. Returns the floor.
pub(super) async fn look(inner: &Inner) -> Result<u64, InboxError> {
    let sent = inner.clock.uptime();
    let last = inner.marker.lock().pulse;
    // A clock that was ahead when numbers were assigned may have been corrected since.
    let now = int(inner.clock.now().0).max(last);
    let fresh = ulid::Ulid::generate().to_string();
    let of = collection(inner).await.map_err(unavailable)?;
    let is_of_another = doc! { "$and": [{ "$gt": ["$of", Bson::Null] }, { "$ne": ["$of", of.clone()] }] };
    let fallen = doc! { "$or": [{ "$lt": [{ "$ifNull": ["$pulse", 0i64] }, last] }, is_of_another] };
    let update = vec![
        doc! { "$set": { "fallen": fallen } },
        doc! { "$set": {
            "lineage": { "$cond": ["$fallen", &fresh, { "$ifNull": ["$lineage", &fresh] }] },
            "floor": { "$cond": ["$fallen", now, { "$ifNull": ["$floor", 0i64] }] },
            // It rises with each look, also after a clock was ahead: a pulse that stands still
            // would not show a restore.
            "pulse": { "$max": [{ "$add": [{ "$ifNull": ["$pulse", 0i64] }, 1i64] }, now] },
            "of": of,
        } },
        doc! { "$unset": "fallen" },
    ];
    let looking = inner
        .documents
        .find_one_and_update(doc! { "_id": place() }, update)
        .upsert(true)
        .return_document(ReturnDocument::After);
    let found = inner.in_time(looking.into_future()).await.map_err(unavailable)?.unwrap_or_default();
    Ok(take(inner, &found, Some(sent)))
}

/// The UUID of the collection, by which it is told from one of the same name that was dropped.
pub(super) async fn collection(inner: &Inner) -> mongodb::error::Result<Bson> {
    let name = inner.documents.name();
    let listing = async {
        let mut found = inner.database.list_collections().filter(doc! { "name": name }).await?;
        found.try_next().await
    };
    let found = inner.in_time(listing).await?;
    Ok(found.and_then(|found| found.info.uuid).map_or(Bson::Null, Bson::Binary))
}

/// Reads the marker, for a writer that reads heads. Returns the floor.
pub(super) async fn read(inner: &Inner) -> Result<u64, InboxError> {
    let found = inner.by_ids(vec![place()], doc! {}).await?;
    let found = found.first().cloned().unwrap_or_default();
    if integer(&found, "pulse").unwrap_or(0) < inner.marker.lock().pulse {
        return look(inner).await;
    }
    Ok(take(inner, &found, None))
}

/// Takes over what the marker says. `sent` is when it was requested by [`look`].
fn take(inner: &Inner, found: &Document, sent: Option<Duration>) -> u64 {
    let lineage = found.get_str("lineage").unwrap_or_default();
    let floor = integer(found, "floor").unwrap_or(0).max(0).unsigned_abs();
    let restored = {
        let mut marker = inner.marker.lock();
        marker.pulse = marker.pulse.max(integer(found, "pulse").unwrap_or(0));
        marker.floor = marker.floor.max(floor);
        let known = std::mem::replace(&mut marker.lineage, lineage.to_owned());
        let restored = !known.is_empty() && known != lineage;
        if restored {
            let well = marker.well;
            marker.mend_since.get_or_insert(well);
        } else if let Some(sent) = sent {
            marker.well = sent;
        }
        restored
    };
    if restored {
        tracing::warn!(
            "the store (mongo.uri, mongo.database) was restored to an earlier state, or its messages were dropped: numbers go on \
             above all that were given before, and clients are told what is gone"
        );
        inner.restored.store(true, Ordering::Release);
    }
    inner.marker.lock().floor
}

/// Mends what this process has written above heads that are gone: adds the bridge, or the head
/// record, that is missing below its messages.
pub(super) async fn mend(inner: &Inner, written: Vec<UserId>) -> Result<(), InboxError> {
    let mut written = written;
    while !written.is_empty() {
        let part: Vec<UserId> = written.split_off(written.len().saturating_sub(AT_ONCE));
        try_join_all(part.into_iter().map(|user| mend_user(inner, user))).await?;
    }
    Ok(())
}

async fn mend_user(inner: &Inner, user: UserId) -> Result<(), InboxError> {
    let user = &user;
    let record = inner.by_ids(vec![id(user, 0)], doc! {}).await?;
    let reading = async {
        let all = doc! { "_id": super::stored::ids_above(user, 0) };
        let found =
            inner.documents.find(all).sort(doc! { "_id": -1 }).limit(RUN).projection(doc! { "_id": 1 });
        found.await?.try_collect::<Vec<Document>>().await
    };
    let found = inner.in_time(reading).await.map_err(unavailable)?;
    let numbers: Vec<u64> = found.iter().filter_map(place_of).map(|place| place.1).collect();
    let Some(lowest) = numbers.last().copied() else { return Ok(()) };
    let head = match record.first() {
        Some(record) => HeadRecord::read(record).head,
        None => {
            let head = int(lowest - 1);
            let record = doc! { "_id": id(user, 0), "head": head, "first": head, "nb": 0i64 };
            let made = inner.in_time(inner.documents.insert_one(record).into_future()).await;
            if_not_taken(made.map(drop))?;
            lowest - 1
        }
    };
    let bridges: Vec<(&UserId, u64)> = holes(&numbers, head).map(|below| (user, below)).collect();
    bridge(inner, &bridges).await
}

/// The last number below each hole in `numbers`, which are in falling order. `head` and everything
/// below it exists or was removed.
fn holes(numbers: &[u64], head: u64) -> impl Iterator<Item = u64> {
    let below = numbers.iter().copied().skip(1).chain([head]);
    let pairs = numbers.iter().copied().zip(below);
    pairs
        .map(move |(n, below)| (n, below.max(head)))
        .filter(|(n, below)| below + 1 < *n)
        .map(|(_, below)| below)
}

/// Puts a bridge after the last number of each of these users, so that readers find what comes
/// further above.
pub(super) async fn bridge(inner: &Inner, last: &[(&UserId, u64)]) -> Result<(), InboxError> {
    if last.is_empty() {
        return Ok(());
    }
    let bridges: Vec<StoredMessage> =
        last.iter().map(|(user, n)| StoredMessage::bridge(user, n + 1)).collect();
    let made = inner.in_time(inner.messages.insert_many(&bridges).ordered(false).into_future()).await;
    if if_not_taken(made.map(drop))? {
        let ids = last.iter().map(|(user, n)| id(user, n + 1)).collect();
        let there = inner.by_ids(ids, doc! { "_id": 1, "x": 1 }).await?;
        if !there.iter().all(StoredMessage::is_bridge) {
            // Another process has written there meanwhile: the last number must be read again.
            return Err(InboxError::Unavailable(
                "another message was stored where numbers were to go on above".to_owned(),
            ));
        }
    }
    Ok(())
}

/// Treats duplicate keys as success; returns whether there was one.
fn if_not_taken(written: mongodb::error::Result<()>) -> Result<bool, InboxError> {
    match written {
        Ok(()) => Ok(false),
        Err(error) if is_taken(&error) => Ok(true),
        Err(error) => Err(unavailable(error)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::holes;

    #[test]
    fn every_hole_is_found_and_what_was_removed_is_none() {
        // 900, then what a stale head gave, then what a new one gave.
        assert_eq!(holes(&[5_001, 1_002, 1_001, 900], 899).collect::<Vec<_>>(), [1_002, 900]);
        assert_eq!(holes(&[5_001], 900).collect::<Vec<_>>(), [900]);
        assert_eq!(holes(&[903, 902, 901], 900).count(), 0);
        assert_eq!(holes(&[903, 902, 895, 890], 900).collect::<Vec<_>>(), [900], "below the head record");
    }

    proptest! {
        #[test]
        fn with_a_bridge_after_each_every_number_follows_or_has_one_below(
            given in proptest::collection::btree_set(1u64..200, 1..50), head in 0u64..100,
        ) {
            let falling: Vec<u64> = given.iter().rev().copied().collect();
            let found: Vec<u64> = holes(&falling, head).collect();
            for n in given.iter().copied().filter(|n| *n > head) {
                let below = given.range(..n).next_back().copied().unwrap_or(0).max(head);
                prop_assert_eq!(found.contains(&below), below + 1 < n);
            }
        }
    }
}
