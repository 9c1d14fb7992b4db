//! Heads and positions: how far an inbox goes, and whether there is more.

use std::collections::HashMap;

use futures_util::{StreamExt, TryStreamExt};
use mongodb::bson::{Bson, Document, doc};
use mongodb::options::ReadConcern;

use super::super::{InboxError, PositionQuery, REVOCATION_AHEAD_MAX_S, StartAt, UserPosition};
use super::stored::{HeadRecord, StoredMessage, id, int, place_of};
use super::{Inner, distinct, is_taken, unavailable};
use crate::message::{Seq, UserId};

impl Inner {
    /// The head record and the highest number of each of these users that has a head record, at one
    /// snapshot.
    pub(super) async fn tops(
        &self,
        users: &[&UserId],
    ) -> Result<HashMap<UserId, (HeadRecord, u64)>, InboxError> {
        let records: Vec<Document> = users.iter().map(|user| id(user, 0)).collect();
        let above = doc! { "$gt": ["$_id", { "u": "$$u", "n": 0i64 }] };
        let below = doc! { "$lt": ["$_id", { "u": "$$u", "n": Bson::MaxKey }] };
        let top = vec![
            doc! { "$match": { "$expr": { "$and": [above, below] } } },
            doc! { "$sort": { "_id": -1 } },
            doc! { "$limit": 1 },
            doc! { "$project": { "_id": 1 } },
        ];
        let collection = self.documents.name();
        let look_up = doc! { "from": collection, "let": { "u": "$_id.u" }, "pipeline": top, "as": "top" };
        let command = doc! {
            "aggregate": collection,
            "pipeline": [{ "$match": { "_id": { "$in": records } } }, { "$lookup": look_up }],
            "cursor": { "batchSize": 10_000 },
            "readConcern": { "level": "snapshot" },
        };
        let answered = async {
            let cursor = self.database.run_cursor_command(command).await?;
            cursor.try_collect::<Vec<Document>>().await
        };
        let rows = self.in_time(answered).await.map_err(unavailable)?;
        let read = |row: &Document| {
            let user = place_of(row).and_then(|(user, _)| UserId::parse(user).ok());
            let user = user.ok_or_else(|| InboxError::Corrupt("a look-up of heads".to_owned()))?;
            let top = row.get_array("top").ok().and_then(|found| place_of(found.first()?.as_document()?));
            Ok((user, (HeadRecord::read(row), top.map_or(0, |(_, n)| n))))
        };
        rows.iter().map(read).collect()
    }

    /// Like [`Self::tops`]; users without a head record get one first.
    pub(super) async fn tops_made(
        &self,
        users: &[&UserId],
    ) -> Result<HashMap<UserId, (HeadRecord, u64)>, InboxError> {
        let mut tops = self.tops(users).await?;
        let without: Vec<&UserId> = users.iter().filter(|user| !tops.contains_key(**user)).copied().collect();
        if !without.is_empty() {
            self.make_heads(&without).await?;
            tops.extend(self.tops(&without).await?);
        }
        Ok(tops)
    }

    /// Inserts head records (majority). Existing ones stay as they are.
    pub(super) async fn make_heads(&self, users: &[&UserId]) -> Result<(), InboxError> {
        let now = int(self.clock.now().0);
        let record = |user: &&UserId| doc! { "_id": id(user, 0), "head": now, "first": now, "nb": 0i64 };
        let records: Vec<Document> = users.iter().map(record).collect();
        match self.in_time(self.documents.insert_many(records).ordered(false).into_future()).await {
            Err(error) if !is_taken(&error) => Err(unavailable(error)),
            _ => Ok(()),
        }
    }

    pub(super) async fn positions(&self, batch: Vec<PositionQuery>) -> Result<Vec<UserPosition>, InboxError> {
        let cursors = self.cursors_of(&batch).await?;
        let starts: Vec<Option<Seq>> = batch
            .iter()
            .map(|ask| match &ask.from {
                StartAt::After(seq) => Some(*seq),
                StartAt::Cursor(device) => {
                    let key = (ask.user.clone(), device.clone());
                    Some(cursors.get(&key).copied().unwrap_or(Seq::BEGINNING))
                }
                StartAt::Latest => None,
            })
            .collect();
        let near = self.near(&batch, &starts).await?;
        // Queries from the beginning, from the end, and those whose position was not found need the
        // head.
        let far: Vec<&UserId> = batch
            .iter()
            .zip(&starts)
            .zip(&near)
            .filter(|((_, start), near)| {
                start.is_none_or(Seq::is_beginning) || near.as_ref().is_none_or(|near| !near.is_settled)
            })
            .map(|((ask, _), _)| &ask.user)
            .collect();
        let tops = if far.is_empty() { HashMap::new() } else { self.tops_made(&distinct(far)).await? };
        let mut answers = Vec::with_capacity(batch.len());
        for ((ask, start), near) in batch.iter().zip(starts).zip(near) {
            answers.push(self.answer(ask, start, near, tops.get(&ask.user).copied()));
        }
        // Nearly all are ready; those that must be confirmed overlap.
        let mut answers: Vec<UserPosition> =
            futures_util::stream::iter(answers).buffered(CONFIRMATIONS).try_collect().await?;
        self.correct(&batch, &mut answers).await?;
        Ok(answers)
    }

    /// Makes disconnects that are too far in the future, made by a wrong clock, count from now.
    pub(super) async fn correct(
        &self,
        batch: &[PositionQuery],
        answers: &mut [UserPosition],
    ) -> Result<(), InboxError> {
        let now = self.clock.now().seconds();
        for (ask, answer) in batch.iter().zip(answers) {
            if answer.not_before_s > now + REVOCATION_AHEAD_MAX_S {
                let filter = doc! { "_id": id(&ask.user, 0), "nb": int(answer.not_before_s) };
                let update = doc! { "$set": { "nb": int(now) } };
                let updated = self.documents.update_one(filter, update).into_future();
                self.in_time(updated).await.map_err(unavailable)?;
                answer.not_before_s = now;
            }
        }
        Ok(())
    }

    pub(super) async fn answer(
        &self,
        ask: &PositionQuery,
        start: Option<Seq>,
        near: Option<Near>,
        top: Option<(HeadRecord, u64)>,
    ) -> Result<UserPosition, InboxError> {
        match (top, near) {
            (Some((record, top)), _) => self.by_top(ask, start, record, top).await,
            (None, Some(near)) => Ok(near.answer),
            (None, None) => Err(InboxError::Corrupt(format!("no head record of {}", ask.user))),
        }
    }

    /// Whether there is more after p, for all queries at once: (u, p+1) exists, or the head record
    /// is above p.
    pub(super) async fn near(
        &self,
        batch: &[PositionQuery],
        starts: &[Option<Seq>],
    ) -> Result<Vec<Option<Near>>, InboxError> {
        let mut ids = Vec::with_capacity(batch.len() * 3);
        for (ask, start) in batch.iter().zip(starts) {
            if let Some(start) = start.filter(|start| !start.is_beginning()) {
                ids.extend([id(&ask.user, 0), id(&ask.user, start.get()), id(&ask.user, start.get() + 1)]);
            }
        }
        let fields = doc! { "_id": 1, "head": 1, "first": 1, "nb": 1, "mv": 1, "x": 1 };
        let found = self.by_ids(ids, fields).await?;
        let found: HashMap<(&str, u64), &Document> =
            found.iter().filter_map(|document| Some((place_of(document)?, document))).collect();
        let near = |(ask, start): (&PositionQuery, &Option<Seq>)| {
            let start = start.filter(|start| !start.is_beginning())?;
            let (user, p) = (ask.user.as_str(), start.get());
            let record = HeadRecord::read(found.get(&(user, 0))?);
            let next = found.contains_key(&(user, p + 1)) && p + 1 > record.head;
            let more = next || record.head > p;
            // Above a bridge numbers go on anywhere. A client that stands on one was sent the
            // message which had its number before a restore.
            let is_message = |found: &&&Document| !StoredMessage::is_bridge(found);
            let is_there = record.head >= p || found.get(&(user, p)).filter(is_message).is_some();
            let head = if record.head > p { record.head } else { p + u64::from(next) };
            let answer = UserPosition {
                start,
                head: Seq::at(head),
                more,
                not_before_s: record.not_before_s,
                memberships: record.memberships,
            };
            Some(Near { answer, is_settled: more || is_there })
        };
        Ok(batch.iter().zip(starts).map(near).collect())
    }

    pub(super) async fn by_top(
        &self,
        ask: &PositionQuery,
        start: Option<Seq>,
        record: HeadRecord,
        top: u64,
    ) -> Result<UserPosition, InboxError> {
        let head = record.head.max(top);
        let never = head == record.first;
        let start = match start {
            Some(start) => start,
            None if never => Seq::BEGINNING,
            None => Seq::at(head),
        };
        let mut answer = UserPosition {
            start,
            head: Seq::at(head),
            more: head > start.get() && !(never && start.is_beginning()),
            not_before_s: record.not_before_s,
            memberships: record.memberships,
        };
        if start.get() > head && self.is_there_after_all(&ask.user, start).await? {
            answer.head = start;
        }
        Ok(answer)
    }

    /// A position above the head is confirmed by linearizable reads, because a primary that was
    /// just elected may not know yet what an earlier one acknowledged. The message is read before
    /// the head record, because the janitor raises the head record before it removes the message.
    pub(super) async fn is_there_after_all(&self, user: &UserId, position: Seq) -> Result<bool, InboxError> {
        if self.linearizable(user, position.get()).await?.is_some() {
            return Ok(true);
        }
        let record = self.linearizable(user, 0).await?;
        Ok(record.is_some_and(|record| HeadRecord::read(&record).head >= position.get()))
    }

    pub(super) async fn linearizable(&self, user: &UserId, n: u64) -> Result<Option<Document>, InboxError> {
        let find = self
            .documents
            .find_one(doc! { "_id": id(user, n) })
            .read_concern(ReadConcern::linearizable())
            .max_time(super::open::MAJORITY_TIMEOUT);
        self.in_time(find.into_future()).await.map_err(unavailable)
    }
}

/// What the documents around a position say about it.
pub(super) struct Near {
    pub(super) answer: UserPosition,
    /// The position is not above the head.
    pub(super) is_settled: bool,
}

/// Positions above the head that are confirmed at the same time. Each takes two linearizable reads,
/// some 200 ms.
pub(super) const CONFIRMATIONS: usize = 16;
