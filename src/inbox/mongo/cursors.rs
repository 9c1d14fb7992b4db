//! Cursors, revocations, and what was shown.

use std::collections::HashMap;
use std::sync::atomic::Ordering;

use futures_util::TryStreamExt;
use mongodb::bson::{Document, doc};
use mongodb::options::ReadConcern;

use super::super::{Change, DEVICES_PER_USER, InboxError, PositionQuery, StartAt};
use super::log_positions::raised;
use super::stored::{CURSORS, id, int, integer};
use super::{Inner, distinct, unavailable};
use crate::message::{DeviceId, Seq, UserId};

impl Inner {
    /// The cursors of the queries that ask for one. A cursor that does not exist counts as the
    /// beginning. A majority is not waited for, because losing a cursor costs only repeats.
    pub(super) async fn cursors_of(
        &self,
        batch: &[PositionQuery],
    ) -> Result<HashMap<(UserId, DeviceId), Seq>, InboxError> {
        let wanted: Vec<Document> = batch
            .iter()
            .filter_map(|ask| match &ask.from {
                StartAt::Cursor(device) => Some(doc! { "u": ask.user.as_str(), "d": device.as_str() }),
                _ => None,
            })
            .collect();
        if wanted.is_empty() {
            return Ok(HashMap::new());
        }
        self.read_cursors(doc! { "_id": { "$in": wanted } }).await
    }

    pub(super) async fn read_cursors(
        &self,
        filter: Document,
    ) -> Result<HashMap<(UserId, DeviceId), Seq>, InboxError> {
        let found = async {
            let cursor =
                self.cursors.find(filter).read_concern(ReadConcern::local()).batch_size(10_000).await?;
            cursor.try_collect::<Vec<Document>>().await
        };
        let found = self.in_time(found).await.map_err(unavailable)?;
        let read = |document: &Document| {
            let id = document.get_document("_id").ok()?;
            let user = UserId::parse(id.get_str("u").ok()?).ok()?;
            let device = DeviceId::parse(id.get_str("d").ok()?).ok()?;
            // A device that has only positions in logs begins at the beginning of the inbox.
            let acked = u64::try_from(integer(document, "acked").unwrap_or(0)).ok()?;
            Some(((user, device), Seq::at(acked)))
        };
        Ok(found.iter().filter_map(read).collect())
    }

    pub(super) async fn update(&self, changes: Vec<Change>) -> Result<(), InboxError> {
        let now = self.clock.now().0;
        let minute = now - now % MINUTE_MS;
        let mut updates = Vec::new();
        let mut users = Vec::new();
        // A cursor may be lost, but not where a device began, in the inbox or in a log.
        let is_lasting = |change: &Change| matches!(change, Change::Begin { .. } | Change::Positions { .. });
        let begins = changes.iter().any(is_lasting);
        for change in changes {
            match change {
                Change::Cursor { user, device, acked } | Change::Begin { user, device, at: acked } => {
                    updates.push(doc! {
                        "q": { "_id": { "u": user.as_str(), "d": device.as_str() } },
                        "u": { "$max": { "acked": int(acked.get()) }, "$set": { "at": int(minute), "t": int(now) } },
                        "upsert": true,
                    });
                    users.push(user);
                }
                Change::Positions { user, device, logs } => {
                    updates.push(doc! {
                        "q": { "_id": { "u": user.as_str(), "d": device.as_str() } },
                        "u": { "$max": raised(&logs), "$set": { "at": int(minute), "t": int(now) } },
                        "upsert": true,
                    });
                    users.push(user);
                }
                Change::NotBefore { user, seconds } => self.revoke(&user, seconds).await?,
                Change::Shown { user, upto } => self.shown(&user, upto).await?,
                Change::End { user, seq, at } => {
                    let update = doc! { "$min": { "x": int(at.0) } };
                    let ended = self.documents.update_one(doc! { "_id": id(&user, seq.get()) }, update);
                    self.in_time(ended.into_future()).await.map_err(unavailable)?;
                }
            }
        }
        if updates.is_empty() {
            return Ok(());
        }
        let concern = if begins {
            doc! { "w": "majority", "j": true }
        } else {
            doc! { "w": 1 }
        };
        let command = doc! {
            "update": CURSORS, "updates": updates, "ordered": false, "writeConcern": concern,
        };
        let answer = self.in_time(self.database.run_command(command).into_future()).await;
        let answer = answer.map_err(unavailable)?;
        let upserted = answer.get_array("upserted").into_iter().flatten();
        let new_here: Vec<&UserId> = upserted
            .filter_map(|made| made.as_document()?.get_i32("index").ok())
            .filter_map(|index| users.get(usize::try_from(index).ok()?))
            .collect();
        if !new_here.is_empty()
            && let Err(error) = self.trim_devices(&distinct(new_here)).await
        {
            tracing::debug!(%error, "the longest unused cursor of a user could not be removed");
        }
        if let Ok(errors) = answer.get_array("writeErrors") {
            return Err(InboxError::Unavailable(format!("{} cursors were not written", errors.len())));
        }
        Ok(())
    }

    pub(super) async fn revoke(&self, user: &UserId, seconds: u64) -> Result<(), InboxError> {
        self.tops_made(&[user]).await?;
        let update = doc! { "$max": { "nb": int(seconds) } };
        let updated = self.documents.update_one(doc! { "_id": id(user, 0) }, update).into_future();
        self.in_time(updated).await.map(drop).map_err(unavailable)
    }

    pub(super) async fn shown(&self, user: &UserId, upto: Seq) -> Result<(), InboxError> {
        let tops = self.tops_made(&[user]).await?;
        let update = doc! { "$max": { "shown": int(upto.get()) } };
        let updated = self.documents.update_one(doc! { "_id": id(user, 0) }, update).into_future();
        self.in_time(updated).await.map_err(unavailable)?;
        let last = tops.get(user).map_or(0, |(record, top)| record.head.max(*top));
        if last < upto.get() {
            super::watch::bridge(self, &[(user, last)]).await?;
        }
        // Writers must read heads again, and with them what was shown.
        self.restored.store(true, Ordering::Release);
        Ok(())
    }

    /// Lets everything that is stored expire now, so that the janitor removes it by its rules, and
    /// removes the cursors.
    pub(super) async fn forget(&self, user: &UserId) -> Result<(), InboxError> {
        let tops = self.tops(&[user]).await?;
        if let Some((_, top)) = tops.get(user) {
            let now = int(self.clock.now().0);
            let stored = doc! {
                "_id": { "$gt": id(user, 0), "$lte": id(user, *top) }, "x": { "$gt": now },
            };
            let expiring = self.documents.update_many(stored, doc! { "$set": { "x": now } }).into_future();
            self.in_time(expiring).await.map_err(unavailable)?;
        }
        let cursors = self.cursors.delete_many(doc! { "_id.u": user.as_str() }).into_future();
        self.in_time(cursors).await.map(drop).map_err(unavailable)
    }

    /// Users with more devices than [`DEVICES_PER_USER`] lose the longest unused cursors. One query
    /// for all: nearly no user has so many.
    pub(super) async fn trim_devices(&self, users: &[&UserId]) -> Result<(), InboxError> {
        let names: Vec<&str> = users.iter().map(|user| user.as_str()).collect();
        let trimming = async {
            let found = self
                .cursors
                .find(doc! { "_id.u": { "$in": names } })
                .projection(doc! { "at": 1, "t": 1 })
                .read_concern(ReadConcern::local())
                .batch_size(10_000)
                .await?;
            let excess = longest_unused(found.try_collect().await?);
            if !excess.is_empty() {
                self.cursors.delete_many(doc! { "_id": { "$in": excess } }).await?;
            }
            Ok(())
        };
        self.in_time(trimming).await.map_err(unavailable)
    }
}

/// The `_id`s of the cursors beyond those that each user keeps.
pub(super) fn longest_unused(mut cursors: Vec<Document>) -> Vec<Document> {
    // The later of the two: an earlier version knows only the first.
    let used =
        |cursor: &Document| ["at", "t"].map(|name| integer(cursor, name).unwrap_or(0)).into_iter().max();
    cursors.sort_by_key(|cursor| std::cmp::Reverse(used(cursor)));
    let mut kept: HashMap<String, usize> = HashMap::new();
    let mut excess = Vec::new();
    for id in cursors.iter().filter_map(|cursor| cursor.get_document("_id").ok()) {
        let count = kept.entry(id.get_str("u").unwrap_or_default().to_owned()).or_default();
        *count += 1;
        if *count > DEVICES_PER_USER {
            excess.push(id.clone());
        }
    }
    excess
}

/// Two indexes contain when a cursor was last used, to the minute, so that nearly no ack changes
/// them. The exact time stands beside it, without an index.
pub(super) const MINUTE_MS: u64 = 60_000;
