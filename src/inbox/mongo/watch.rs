//! What this process watches while it writes: whether the store is still the same, and whether its
//! indexes exist.
//!
//! # Restores
//!
//! A *marker* stands among the messages, at the position of a user without a name. Its `pulse` is a
//! time that every writer raises. Its `lineage` changes when a writer finds the pulse below one
//! that it has seen. Its `floor` is the time when that happened. A backup that is put back, or a
//! collection that is dropped, takes the pulse back with it. Then
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
use mongodb::error::ErrorKind;
use mongodb::options::{IndexOptions, ReturnDocument};
use mongodb::{Collection, IndexModel};

use super::append::DUPLICATE_KEY;
use super::stored::{CURSORS, HeadRecord, INBOX, MEMBERS, StoredMessage, TOPICS, id, int, integer, place_of};
use super::{Inner, OpenError, index_fault, unavailable, words};
use crate::inbox::InboxError;
use crate::message::UserId;

/// Looks at the store per look at the indexes: one a minute.
const LOOKS_PER_INDEX_LOOK: u32 = 30;
/// Messages of one user that are searched for numbers that were left out.
const RUN: i64 = 5_000;
/// MongoDB's code for a collection that does not exist.
const NO_COLLECTION: i32 = 26;
/// Users mended at the same time.
const AT_ONCE: usize = 16;
/// Duplicate ids that are named in the error text.
const NAMED: i64 = 5;

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
        if inner.restored.load(Ordering::Acquire)
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
    let fallen = doc! { "$lt": [{ "$ifNull": ["$pulse", 0i64] }, last] };
    let update = vec![
        doc! { "$set": { "fallen": fallen } },
        doc! { "$set": {
            "lineage": { "$cond": ["$fallen", &fresh, { "$ifNull": ["$lineage", &fresh] }] },
            "floor": { "$cond": ["$fallen", now, { "$ifNull": ["$floor", 0i64] }] },
            // It rises with each look, also after a clock was ahead: a pulse that stands still
            // would not show a restore.
            "pulse": { "$max": [{ "$add": [{ "$ifNull": ["$pulse", 0i64] }, 1i64] }, now] },
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
    let error = match written {
        Ok(()) => return Ok(false),
        Err(error) => error,
    };
    let taken = match &*error.kind {
        ErrorKind::InsertMany(many) => {
            many.write_concern_error.is_none()
                && many.write_errors.iter().flatten().all(|one| one.code == DUPLICATE_KEY)
        }
        ErrorKind::Write(mongodb::error::WriteFailure::WriteError(one)) => one.code == DUPLICATE_KEY,
        _ => false,
    };
    if taken { Ok(true) } else { Err(unavailable(error)) }
}

impl Inner {
    /// Whether the unique index on idempotency keys exists.
    async fn tells_ids_apart(&self) -> Result<bool, OpenError> {
        let all = async { self.documents.list_indexes().await?.try_collect::<Vec<IndexModel>>().await };
        let all = match self.in_time(all).await {
            Err(error) if matches!(&*error.kind, ErrorKind::Command(one) if one.code == NO_COLLECTION) => {
                Vec::new()
            }
            all => all.map_err(|error| index_fault(INBOX, &error))?,
        };
        let is_it = |options: &IndexOptions| {
            options.name.as_deref() == Some("sender_id") && options.unique == Some(true)
        };
        Ok(all.iter().filter_map(|index| index.options.as_ref()).any(is_it))
    }

    fn refuse_ids(&self, why: Option<String>) {
        let before = std::mem::replace(&mut *self.ids_refused.lock(), why.clone());
        // A store that is being opened has no indexes yet.
        let is_open = self.identity.get().is_some();
        match (before, why) {
            (before, Some(why)) if is_open && before.as_ref() != Some(&why) => {
                tracing::warn!("mongo.database: publishes with an id are refused: {why}");
            }
            (Some(_), None) if is_open => tracing::info!("publishes with an id are accepted again"),
            _ => {}
        }
    }

    /// Creates missing indexes. While duplicate ids prevent the unique one, publishes with an id
    /// are refused, because another one could be stored twice.
    pub(super) async fn make_indexes(&self) -> Result<(), OpenError> {
        let missing = !self.tells_ids_apart().await?;
        if missing && self.ids_refused.lock().is_none() {
            // Holds until the index exists, however long it takes to create it.
            let why = "the index sender_id of the collection inbox is not there, or is not unique";
            self.refuse_ids(Some(why.to_owned()));
        }
        let unique = IndexOptions::builder()
            .name("sender_id".to_owned())
            .unique(true)
            .partial_filter_expression(doc! { "f": { "$exists": true } })
            .build();
        let unique = IndexModel::builder().keys(doc! { "_id.u": 1, "f": 1 }).options(unique).build();
        let made = self.in_time(self.documents.create_index(unique).into_future()).await;
        let in_the_way = match &made {
            Err(error) if matches!(&*error.kind, ErrorKind::Command(one) if one.code == DUPLICATE_KEY) => {
                true
            }
            Err(error) => return Err(index_fault(INBOX, error)),
            Ok(_) => false,
        };
        let why = if in_the_way { Some(self.ids_that_stand_twice().await) } else { None };
        self.refuse_ids(why);
        let named = |name: &str| IndexOptions::builder().name(name.to_owned()).build();
        let index =
            |keys: Document, name: &str| IndexModel::builder().keys(keys).options(named(name)).build();
        let all: [(&Collection<Document>, &str, Document, &str); 4] = [
            (&self.documents, INBOX, doc! { "x": 1, "_id.u": 1 }, "expiry"),
            (&self.cursors, CURSORS, doc! { "at": 1 }, "unused"),
            (&self.cursors, CURSORS, doc! { "_id.u": 1, "at": 1 }, "user"),
            (&self.members, MEMBERS, doc! { "_id.t": 1, "_id.u": 1 }, "topic"),
        ];
        let partial = |keys: Document, name: &str, field: &str| {
            let options = IndexOptions::builder()
                .name(name.to_owned())
                .partial_filter_expression(doc! { field: { "$exists": true } })
                .build();
            IndexModel::builder().keys(keys).options(options).build()
        };
        // Free names stay, and may be many.
        for index in [
            partial(doc! { "_id": 1, "life": 1 }, "alive", "life"),
            partial(doc! { "dead": 1 }, "dead", "dead"),
        ] {
            let made = self.in_time(self.topics.create_index(index).into_future()).await;
            made.map_err(|error| index_fault(TOPICS, &error))?;
        }
        for (collection, shown, keys, name) in all {
            let made = self.in_time(collection.create_index(index(keys, name)).into_future()).await;
            made.map_err(|error| index_fault(shown, &error))?;
        }
        Ok(())
    }

    /// An error text that names some duplicate ids and the remedy.
    async fn ids_that_stand_twice(&self) -> String {
        let group =
            doc! { "_id": { "u": "$_id.u", "f": "$f" }, "at": { "$push": "$_id.n" }, "count": { "$sum": 1 } };
        let pipeline = [
            doc! { "$match": { "f": { "$exists": true } } },
            doc! { "$group": group },
            doc! { "$match": { "count": { "$gt": 1 } } },
            doc! { "$limit": NAMED },
        ];
        let reading = async {
            self.documents
                .aggregate(pipeline)
                .allow_disk_use(true)
                .await?
                .try_collect::<Vec<Document>>()
                .await
        };
        let found = match self.in_time(reading).await {
            Ok(found) => found,
            Err(error) => {
                return format!("ids stand twice in {INBOX}, and cannot be listed: {}", words(&error));
            }
        };
        let show = |one: &Document| {
            let key = one.get_document("_id").cloned().unwrap_or_default();
            let at = one.get_array("at").map(|all| all.iter().map(Bson::to_string).collect::<Vec<_>>());
            let part = |name: &str| key.get_str(name).unwrap_or_default().to_owned();
            format!("{:?} of user {:?} at {}", part("f"), part("u"), at.unwrap_or_default().join(", "))
        };
        let shown: Vec<String> = found.iter().map(show).collect();
        format!(
            "the index sender_id of {INBOX} is missing and cannot be made, for these ids stand twice: {}; unset f of all but the \
             first of each (db.{INBOX}.updateOne({{_id: {{u: USER, n: NUMBER}}}}, {{$unset: {{f: \"\"}}}}), and they are taken \
             again within a minute",
            shown.join("; ")
        )
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
