//! Topics and their members. docs/topics.md has the documents.
//!
//! A topic's document is never removed, so that no life is given twice. Whether a topic lives, and
//! which version its members have, stands in that one document, and each change of it is one
//! majority write that is conditional on what was read.

use std::collections::HashMap;
use std::time::Duration;

use futures_util::TryStreamExt;
use futures_util::future::{BoxFuture, FutureExt};
use mongodb::bson::{Document, doc};
use mongodb::options::{ReadConcern, ReturnDocument};

use super::stored::{int, integer, number};
use super::{Inner, MongoInbox, is_taken, unavailable};
use crate::inbox::InboxError;
use crate::inbox::topics::{
    MembersChange, MembersChanged, MembersVersion, Memberships, PutTopic, Topic, TopicRecipients,
    TopicSettings, Topics,
};
use crate::message::{Millis, TopicName, UserId};
use crate::topic::Delivery;

/// For how long after a change of the primary a version is confirmed by the whole replica set: a
/// primary that was replaced answers with what it had, for at most the election timeout of 10 s.
const CONFIRM_FOR: Duration = Duration::from_secs(10);
/// How often a conditional write is tried whose condition another process has changed.
const TRIES: usize = 5;

/// The topic of a document; `None` while its name is free.
pub(super) fn read_topic(document: &Document) -> Result<Option<Topic>, InboxError> {
    let corrupt = || InboxError::Corrupt(format!("topic {:?}", document.get("_id")));
    let Some(life) = integer(document, "life").and_then(|life| u64::try_from(life).ok()) else {
        return Ok(None);
    };
    let name = document.get_str("_id").ok().and_then(|name| TopicName::parse(name).ok());
    let delivery = document.get_str("delivery").ok().and_then(Delivery::parse);
    Ok(Some(Topic {
        name: name.ok_or_else(corrupt)?,
        delivery: delivery.ok_or_else(corrupt)?,
        ttl_s: number(document, "ttl_s"),
        created_at: Millis(number(document, "at")),
        version: MembersVersion {
            life,
            changes: number(document, "cv"),
            draw: integer(document, "draw").unwrap_or(0),
        },
    }))
}

impl Inner {
    /// The document of a name, as a majority has it.
    async fn topic_document(&self, name: &TopicName) -> Result<Option<Document>, InboxError> {
        let found = self.topics.find_one(doc! { "_id": name.as_str() }).into_future();
        self.in_time(found).await.map_err(unavailable)
    }

    pub(super) async fn topic(&self, name: &TopicName) -> Result<Option<Topic>, InboxError> {
        let found = self.topic_document(name).await?;
        found.as_ref().map_or(Ok(None), read_topic)
    }

    pub(super) async fn topics_named(&self, names: &[TopicName]) -> Result<Vec<Option<Topic>>, InboxError> {
        let ids: Vec<&str> = names.iter().map(TopicName::as_str).collect();
        let reading = async {
            let found = self.topics.find(doc! { "_id": { "$in": ids } }).await?;
            found.try_collect::<Vec<Document>>().await
        };
        let found = self.in_time(reading).await.map_err(unavailable)?;
        // One that cannot be read counts as none, and hides no other.
        let topics = found.iter().filter_map(|document| read_topic(document).ok().flatten());
        let by_name: HashMap<TopicName, Topic> = topics.map(|topic| (topic.name.clone(), topic)).collect();
        Ok(names.iter().map(|name| by_name.get(name).cloned()).collect())
    }

    async fn put_topic(&self, name: TopicName, settings: TopicSettings) -> Result<PutTopic, InboxError> {
        for _ in 0..TRIES {
            let found = self.topic_document(&name).await?;
            let topic = found.as_ref().map_or(Ok(None), read_topic)?;
            if let Some(topic) = topic.as_ref().filter(|topic| settings.is_other_than(topic)) {
                return Ok(PutTopic::Other(topic.clone()));
            }
            let (filter, update) = match (&topic, settings.ttl_s) {
                (Some(topic), None) => return Ok(PutTopic::Known(topic.clone())),
                (Some(topic), Some(ttl_s)) => (
                    doc! { "_id": name.as_str(), "life": int(topic.version.life) },
                    doc! { "$set": { "ttl_s": int(ttl_s) } },
                ),
                (None, ttl_s) => {
                    // Where the record was lost, rows of earlier lives may be left.
                    let now = self.clock.now().0;
                    let last = found.as_ref().map_or(now, |document| number(document, "last"));
                    let set = doc! {
                        "life": int(last + 1),
                        "last": int(last + 1),
                        "delivery": settings.delivery.unwrap_or(Delivery::Inbox).name(),
                        "ttl_s": int(ttl_s.unwrap_or(settings.default_ttl_s)),
                        "at": int(now),
                        "draw": rand::random::<i64>(),
                    };
                    let free = match &found {
                        Some(_) => {
                            doc! { "_id": name.as_str(), "life": { "$exists": false }, "last": int(last) }
                        }
                        None => doc! { "_id": name.as_str(), "last": { "$exists": false } },
                    };
                    (free, doc! { "$set": set, "$inc": { "cv": 1i64 } })
                }
            };
            let changing = self
                .topics
                .find_one_and_update(filter, update)
                .upsert(found.is_none())
                .return_document(ReturnDocument::After);
            let changed = match self.in_time(changing.into_future()).await {
                Ok(changed) => changed,
                // Another process made it at the same moment.
                Err(error) if is_taken(&error) => continue,
                Err(error) => return Err(unavailable(error)),
            };
            if let Some(changed) = changed.as_ref().map_or(Ok(None), read_topic)? {
                return Ok(match topic {
                    Some(_) => PutTopic::Known(changed),
                    None => PutTopic::Created(changed),
                });
            }
        }
        Err(contended(&name))
    }

    async fn remove_topic(&self, name: &TopicName) -> Result<bool, InboxError> {
        for _ in 0..TRIES {
            let Some(topic) = self.topic(name).await? else { return Ok(false) };
            let filter = doc! { "_id": name.as_str(), "life": int(topic.version.life) };
            // Upkeep removes the memberships of the lives up to `dead`.
            let update = doc! {
                "$unset": { "life": "" },
                "$set": { "dead": int(topic.version.life), "draw": rand::random::<i64>() },
                "$inc": { "cv": 1i64 },
            };
            let updated = self.in_time(self.topics.update_one(filter, update).into_future()).await;
            if updated.map_err(unavailable)?.matched_count == 1 {
                return Ok(true);
            }
        }
        Err(contended(name))
    }

    async fn list_topics(
        &self,
        prefix: &str,
        after: Option<&TopicName>,
        limit: usize,
    ) -> Result<Vec<Topic>, InboxError> {
        // Names are ASCII, and 0x7f stands above all their characters.
        let mut range = doc! { "$gte": prefix, "$lt": format!("{prefix}\u{7f}") };
        if let Some(after) = after {
            range.insert("$gt", after.as_str());
        }
        // A topic of a newer version is not shown.
        let known = [Delivery::Inbox.name(), Delivery::Log.name()];
        let reading = async {
            let found = self
                .topics
                .find(doc! { "_id": range, "life": { "$exists": true }, "delivery": { "$in": &known } })
                .sort(doc! { "_id": 1 })
                .limit(i64::try_from(limit).unwrap_or(i64::MAX))
                .await?;
            found.try_collect::<Vec<Document>>().await
        };
        let found = self.in_time(reading).await.map_err(unavailable)?;
        Ok(found.iter().filter_map(|document| read_topic(document).ok().flatten()).collect())
    }

    /// The version first, then the rows: they contain every change of that version. If the primary
    /// changes meanwhile, both are read again.
    async fn recipients(
        &self,
        name: &TopicName,
        known: Option<MembersVersion>,
    ) -> Result<TopicRecipients, InboxError> {
        for _ in 0..TRIES {
            let primary = self.primary.changes();
            let topic = if self.primary.is_newer_than(CONFIRM_FOR) {
                self.confirmed_topic(name).await?
            } else {
                self.topic(name).await?
            };
            let Some(topic) = topic else { return Ok(TopicRecipients::NoTopic) };
            if topic.delivery == Delivery::Log {
                return Ok(TopicRecipients::Log(topic));
            }
            if known == Some(topic.version) {
                return Ok(TopicRecipients::Known(topic));
            }
            let filter = doc! { "_id.t": name.as_str(), "life": int(topic.version.life) };
            let members = self.users_of(filter, 0).await?;
            if self.primary.changes() == primary {
                return Ok(TopicRecipients::Read(topic, members));
            }
        }
        Err(InboxError::Unavailable("the primary of MongoDB (mongo.uri) changes again and again".to_owned()))
    }

    /// The topic as the whole replica set has it, and not an earlier primary alone.
    async fn confirmed_topic(&self, name: &TopicName) -> Result<Option<Topic>, InboxError> {
        let found = self
            .topics
            .find_one(doc! { "_id": name.as_str() })
            .read_concern(ReadConcern::linearizable())
            .max_time(super::open::MAJORITY_TIMEOUT);
        let found = self.in_time(found.into_future()).await.map_err(unavailable)?;
        found.as_ref().map_or(Ok(None), read_topic)
    }
}

fn contended(name: &TopicName) -> InboxError {
    InboxError::Unavailable(format!("others change the topic {name:?} at this moment"))
}

impl Topics for MongoInbox {
    fn put(&self, topic: TopicName, settings: TopicSettings) -> BoxFuture<'_, Result<PutTopic, InboxError>> {
        self.inner.put_topic(topic, settings).boxed()
    }

    fn topic(&self, topic: TopicName) -> BoxFuture<'_, Result<Option<Topic>, InboxError>> {
        async move { self.inner.topic(&topic).await }.boxed()
    }

    fn topics_named(&self, names: Vec<TopicName>) -> BoxFuture<'_, Result<Vec<Option<Topic>>, InboxError>> {
        async move { self.inner.topics_named(&names).await }.boxed()
    }

    fn log_memberships(&self, users: Vec<UserId>) -> BoxFuture<'_, Result<Vec<Memberships>, InboxError>> {
        async move { self.inner.log_memberships(&users).await }.boxed()
    }

    fn remove(&self, topic: TopicName) -> BoxFuture<'_, Result<bool, InboxError>> {
        async move { self.inner.remove_topic(&topic).await }.boxed()
    }

    fn list(
        &self,
        prefix: String,
        after: Option<TopicName>,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<Topic>, InboxError>> {
        async move { self.inner.list_topics(&prefix, after.as_ref(), limit).await }.boxed()
    }

    fn change_members(
        &self,
        topic: TopicName,
        change: MembersChange,
    ) -> BoxFuture<'_, Result<MembersChanged, InboxError>> {
        async move { self.inner.change(&topic, change).await }.boxed()
    }

    fn members(
        &self,
        topic: TopicName,
        after: Option<UserId>,
        limit: usize,
    ) -> BoxFuture<'_, Result<Option<Vec<UserId>>, InboxError>> {
        async move { self.inner.members_page(&topic, after.as_ref(), limit).await }.boxed()
    }

    fn count_members(&self, topic: TopicName) -> BoxFuture<'_, Result<u64, InboxError>> {
        async move {
            match self.inner.topic(&topic).await? {
                Some(found) => self.inner.count((&topic, found.version.life)).await,
                None => Ok(0),
            }
        }
        .boxed()
    }

    fn topics_of(&self, user: UserId) -> BoxFuture<'_, Result<Vec<Topic>, InboxError>> {
        async move { self.inner.topics_of(&user).await }.boxed()
    }

    fn primary(&self) -> u64 {
        self.inner.primary.changes()
    }

    fn recipients(
        &self,
        topic: TopicName,
        known: Option<MembersVersion>,
    ) -> BoxFuture<'_, Result<TopicRecipients, InboxError>> {
        async move { self.inner.recipients(&topic, known).await }.boxed()
    }
}
