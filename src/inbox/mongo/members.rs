//! The members of topics.

use std::collections::{HashMap, HashSet};

use futures_util::TryStreamExt;
use mongodb::bson::{Bson, Document, doc};

use super::open::MAJORITY_TIMEOUT;
use super::stored::{MEMBERS, id, int, integer, number, place_of};
use super::topics::read_topic;
use super::{DUPLICATE_KEY, Inner, unavailable};
use crate::inbox::InboxError;
use crate::inbox::topics::{
    LogMembership, MEMBERS_LOT, MemberRefusal, MembersChange, MembersChanged, Memberships, Topic,
};
use crate::message::{Seq, TopicName, UserId};
use crate::topic::{Delivery, INBOX_MEMBERS, INBOX_TOPICS, LOG_TOPICS};

/// Users whose memberships are counted in one query.
const COUNTED_AT_ONCE: usize = 100;

/// The `_id` of a membership.
fn member_id(user: &UserId, topic: &TopicName) -> Document {
    doc! { "u": user.as_str(), "t": topic.as_str() }
}

/// A filter for every membership of a user.
fn memberships_of(user: &UserId) -> Document {
    doc! { "_id": {
        "$gte": { "u": user.as_str(), "t": Bson::MinKey },
        "$lt": { "u": user.as_str(), "t": Bson::MaxKey },
    } }
}

/// The user and the membership of a row of a topic with a log.
fn read_membership(row: &Document) -> Option<(String, LogMembership)> {
    let place = row.get_document("_id").ok()?;
    let topic = TopicName::parse(place.get_str("t").ok()?).ok()?;
    let from = Seq::at(number(row, "from"));
    Some((place.get_str("u").ok()?.to_owned(), LogMembership { topic, life: number(row, "life"), from }))
}

impl Inner {
    pub(super) async fn change(
        &self,
        name: &TopicName,
        change: MembersChange,
    ) -> Result<MembersChanged, InboxError> {
        let Some(topic) = self.topic(name).await? else { return Ok(MembersChanged::NoTopic) };
        let life = topic.version.life;
        if (topic.delivery == Delivery::Log) != change.from.is_some() {
            return Ok(MembersChanged::Ended);
        }
        let rows = self.change_rows((name, life), &change).await;
        // After the rows, and only in the life in which they were written; also if some of them
        // could not be changed, or a list of before would stand for those that were.
        let filter = doc! { "_id": name.as_str(), "life": int(life) };
        let update = doc! { "$inc": { "cv": 1i64 }, "$set": { "draw": rand::random::<i64>() } };
        let raised = self.in_time(self.topics.update_one(filter, update).into_future()).await;
        let ended = raised.map_err(unavailable)?.matched_count == 0;
        if ended && let Err(error) = self.take_back((name, life), &change.add).await {
            tracing::debug!(%error, "rows of a topic that has ended could not be removed");
        }
        if change.from.is_some() {
            // After the rows too. Also for those who are members as asked already: a repeat mends
            // what a crash has left between the two.
            self.raise_memberships(&change.add).await?;
            self.raise_memberships(&change.remove).await?;
        }
        let (added, removed, refused) = rows?;
        Ok(if ended { MembersChanged::Ended } else { MembersChanged::Done { added, removed, refused } })
    }

    async fn change_rows(
        &self,
        topic: (&TopicName, u64),
        change: &MembersChange,
    ) -> Result<(u64, u64, Vec<(UserId, MemberRefusal)>), InboxError> {
        let (mut added, mut removed, mut refused) = (0, 0, Vec::new());
        for lot in change.remove.chunks(MEMBERS_LOT) {
            removed += self.take_back(topic, lot).await?;
        }
        for lot in change.add.chunks(MEMBERS_LOT) {
            added += self.join(topic, change.from, lot, &mut refused).await?;
        }
        Ok((added, removed, refused))
    }

    /// Removes the rows of these users in this life. Returns how many there were.
    async fn take_back(&self, (name, life): (&TopicName, u64), users: &[UserId]) -> Result<u64, InboxError> {
        let mut removed = 0;
        for lot in users.chunks(MEMBERS_LOT) {
            let ids: Vec<Document> = lot.iter().map(|user| member_id(user, name)).collect();
            let filter = doc! { "_id": { "$in": ids }, "life": int(life) };
            let done = self.in_time(self.members.delete_many(filter).into_future()).await;
            removed += done.map_err(unavailable)?.deleted_count;
        }
        Ok(removed)
    }

    /// Adds one lot. Returns how many were no members before.
    async fn join(
        &self,
        (name, life): (&TopicName, u64),
        from: Option<Seq>,
        lot: &[UserId],
        refused: &mut Vec<(UserId, MemberRefusal)>,
    ) -> Result<u64, InboxError> {
        let ids: Vec<Document> = lot.iter().map(|user| member_id(user, name)).collect();
        let filter = doc! { "_id": { "$in": ids }, "life": int(life) };
        let standing: HashSet<UserId> = self.users_of(filter, 0).await?.into_iter().collect();
        let mut room = match from {
            Some(_) => u64::MAX,
            None => (INBOX_MEMBERS as u64).saturating_sub(self.count((name, life)).await?),
        };
        let (delivery, most, why) = match from {
            Some(_) => (Delivery::Log, LOG_TOPICS, MemberRefusal::TooManyLogs),
            None => (Delivery::Inbox, INBOX_TOPICS, MemberRefusal::TooManyTopics),
        };
        let is_same = |topic: &&Topic| topic.delivery == delivery;
        let counts = self.count_topics_of(lot).await?;
        let mut updates = Vec::new();
        for user in lot.iter().filter(|user| !standing.contains(*user)) {
            if room == 0 {
                refused.push((user.clone(), MemberRefusal::TopicIsFull));
                continue;
            }
            // Rows of topics that have ended count until they are removed, and those of topics with
            // another delivery: then it is looked closely.
            let has_many = counts.get(user).copied().unwrap_or(0) >= most as u64;
            if has_many && self.topics_of(user).await?.iter().filter(is_same).count() >= most {
                refused.push((user.clone(), why));
                continue;
            }
            let mut row = doc! { "life": int(life) };
            if let Some(from) = from {
                row.insert("from", int(from.get()));
            }
            room -= 1;
            updates.push(doc! {
                // A row of this life, or of a later one, stands as it is: the upsert then fails
                // with a duplicate key.
                "q": { "_id": member_id(user, name), "life": { "$lt": int(life) } },
                "u": { "$set": row },
                "upsert": true,
            });
        }
        if updates.is_empty() {
            return Ok(0);
        }
        let command = doc! {
            "update": MEMBERS, "updates": updates, "ordered": false,
            "writeConcern": {
                "w": "majority", "j": true, "wtimeout": MAJORITY_TIMEOUT.as_millis() as i64,
            },
        };
        let answer = self.in_time(self.database.run_command(command).into_future()).await;
        let answer = answer.map_err(unavailable)?;
        let faults = answer.get_array("writeErrors").map(Vec::as_slice).unwrap_or_default();
        let is_fault = |fault: &&Bson| {
            fault.as_document().is_none_or(|one| integer(one, "code") != Some(DUPLICATE_KEY.into()))
        };
        if let Some(fault) = faults.iter().find(is_fault) {
            return Err(InboxError::Unavailable(format!(
                "MongoDB (mongo.uri): a member was not stored: {fault}"
            )));
        }
        if let Ok(fault) = answer.get_document("writeConcernError") {
            return Err(InboxError::Unavailable(format!(
                "MongoDB (mongo.uri): no majority has the members: {fault}"
            )));
        }
        // `n` counts what was inserted and what was replaced. Where others have joined at the same
        // moment there may be more members than allowed: they were answered, and are published to.
        Ok(number(&answer, "n"))
    }

    /// Raises the number of changes of these users' memberships in topics with a log (majority).
    async fn raise_memberships(&self, users: &[UserId]) -> Result<(), InboxError> {
        for lot in users.chunks(MEMBERS_LOT) {
            self.tops_made(&lot.iter().collect::<Vec<_>>()).await?;
            let records: Vec<Document> = lot.iter().map(|user| id(user, 0)).collect();
            let filter = doc! { "_id": { "$in": records } };
            let raising = self.documents.update_many(filter, doc! { "$inc": { "mv": 1i64 } }).into_future();
            self.in_time(raising).await.map_err(unavailable)?;
        }
        Ok(())
    }

    /// The numbers of changes first, and then the rows.
    pub(super) async fn log_memberships(&self, users: &[UserId]) -> Result<Vec<Memberships>, InboxError> {
        let records = users.iter().map(|user| id(user, 0)).collect();
        let records = self.by_ids(records, doc! { "_id": 1, "mv": 1 }).await?;
        let versions: HashMap<&str, u64> =
            records.iter().filter_map(|one| Some((place_of(one)?.0, number(one, "mv")))).collect();
        let version = |user: &UserId| versions.get(user.as_str()).copied().unwrap_or(0);
        let changed: Vec<&str> =
            users.iter().filter(|user| version(user) > 0).map(|user| user.as_str()).collect();
        let mut rows: HashMap<String, Vec<LogMembership>> = HashMap::new();
        if !changed.is_empty() {
            let reading = async {
                let of_users = doc! { "_id.u": { "$in": changed }, "from": { "$exists": true } };
                let found = self.members.find(of_users).batch_size(10_000).await?;
                found.try_collect::<Vec<Document>>().await
            };
            for row in self.in_time(reading).await.map_err(unavailable)? {
                if let Some((user, membership)) = read_membership(&row) {
                    rows.entry(user).or_default().push(membership);
                }
            }
        }
        let names: HashSet<TopicName> =
            rows.values().flatten().map(|membership| membership.topic.clone()).collect();
        let topics = self.topics_named(&names.into_iter().collect::<Vec<_>>()).await?;
        let lives: HashMap<TopicName, u64> = topics
            .into_iter()
            .flatten()
            .filter(|topic| topic.delivery == Delivery::Log)
            .map(|topic| (topic.name, topic.version.life))
            .collect();
        let of = |user: &UserId| {
            let mut logs = rows.get(user.as_str()).cloned().unwrap_or_default();
            logs.retain(|membership| lives.get(&membership.topic) == Some(&membership.life));
            Memberships { version: version(user), logs }
        };
        Ok(users.iter().map(of).collect())
    }

    pub(super) async fn count(&self, (name, life): (&TopicName, u64)) -> Result<u64, InboxError> {
        let filter = doc! { "_id.t": name.as_str(), "life": int(life) };
        let counted = self.members.count_documents(filter).into_future();
        self.in_time(counted).await.map_err(unavailable)
    }

    /// How many memberships these users have.
    async fn count_topics_of(&self, users: &[UserId]) -> Result<HashMap<UserId, u64>, InboxError> {
        let mut counts = HashMap::new();
        for lot in users.chunks(COUNTED_AT_ONCE) {
            let any: Vec<Document> = lot.iter().map(memberships_of).collect();
            let pipeline = [
                doc! { "$match": { "$or": any } },
                doc! { "$group": { "_id": "$_id.u", "n": { "$sum": 1i64 } } },
            ];
            let counting =
                async { self.members.aggregate(pipeline).await?.try_collect::<Vec<Document>>().await };
            for row in self.in_time(counting).await.map_err(unavailable)? {
                if let Some(user) = row.get_str("_id").ok().and_then(|user| UserId::parse(user).ok()) {
                    counts.insert(user, number(&row, "n"));
                }
            }
        }
        Ok(counts)
    }

    /// The users of memberships, in order; `limit` 0 is all.
    pub(super) async fn users_of(&self, filter: Document, limit: usize) -> Result<Vec<UserId>, InboxError> {
        let reading = async {
            let found = self
                .members
                .find(filter)
                .projection(doc! { "_id": 1 })
                .sort(doc! { "_id.u": 1 })
                .limit(i64::try_from(limit).unwrap_or(0))
                .batch_size(10_000)
                .await?;
            found.try_collect::<Vec<Document>>().await
        };
        let found = self.in_time(reading).await.map_err(unavailable)?;
        let user =
            |document: &Document| UserId::parse(document.get_document("_id").ok()?.get_str("u").ok()?).ok();
        Ok(found.iter().filter_map(user).collect())
    }

    pub(super) async fn members_page(
        &self,
        name: &TopicName,
        after: Option<&UserId>,
        limit: usize,
    ) -> Result<Option<Vec<UserId>>, InboxError> {
        let Some(topic) = self.topic(name).await? else { return Ok(None) };
        let mut filter = doc! { "_id.t": name.as_str(), "life": int(topic.version.life) };
        if let Some(after) = after {
            filter.insert("_id.u", doc! { "$gt": after.as_str() });
        }
        self.users_of(filter, limit).await.map(Some)
    }

    pub(super) async fn topics_of(&self, user: &UserId) -> Result<Vec<Topic>, InboxError> {
        let reading = async {
            let rows: Vec<Document> = self.members.find(memberships_of(user)).await?.try_collect().await?;
            let lives: HashMap<String, u64> = rows
                .iter()
                .filter_map(|row| {
                    Some((row.get_document("_id").ok()?.get_str("t").ok()?.to_owned(), number(row, "life")))
                })
                .collect();
            let names: Vec<&String> = lives.keys().collect();
            let found = self.topics.find(doc! { "_id": { "$in": names } }).sort(doc! { "_id": 1 }).await?;
            Ok((lives, found.try_collect::<Vec<Document>>().await?))
        };
        let (lives, found) = self.in_time(reading).await.map_err(unavailable)?;
        let topics = found.iter().filter_map(|document| read_topic(document).ok().flatten());
        Ok(topics.filter(|topic| lives.get(topic.name.as_str()) == Some(&topic.version.life)).collect())
    }

    /// Removes the memberships of lives that are over.
    pub(super) async fn clean_topics(&self) -> Result<(), InboxError> {
        let reading = async {
            let found = self.topics.find(doc! { "dead": { "$exists": true } }).await?;
            found.try_collect::<Vec<Document>>().await
        };
        for document in self.in_time(reading).await.map_err(unavailable)? {
            let Ok(name) = document.get_str("_id") else { continue };
            let dead = int(number(&document, "dead"));
            loop {
                let over = doc! { "_id.t": name, "life": { "$lte": dead } };
                let reading = async {
                    let found = self.members.find(over).projection(doc! { "_id": 1 });
                    found.limit(MEMBERS_LOT as i64).await?.try_collect::<Vec<Document>>().await
                };
                let rows = self.in_time(reading).await.map_err(unavailable)?;
                let ids: Vec<&Bson> = rows.iter().filter_map(|row| row.get("_id")).collect();
                if ids.is_empty() {
                    break;
                }
                let lot = doc! { "_id": { "$in": ids }, "life": { "$lte": dead } };
                let removed = self.in_time(self.members.delete_many(lot).into_future()).await;
                removed.map_err(unavailable)?;
            }
            let done = doc! { "_id": name, "dead": dead };
            let update = doc! { "$unset": { "dead": "" } };
            let updated = self.in_time(self.topics.update_one(done, update).into_future()).await;
            updated.map_err(unavailable)?;
        }
        Ok(())
    }
}
