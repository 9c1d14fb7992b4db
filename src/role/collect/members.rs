//! Topics and their members, as a publish needs them: members are read once for each version, and
//! kept. The topic itself is read for each publish, and by one read for all that wait: whoever
//! publishes after a topic was made anew and joined must reach its members.

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use quick_cache::Weighter;
use quick_cache::sync::Cache;
use tokio::time::Instant;

use super::{CollectLimits, refusal};
use crate::inbox::topics::{MembersVersion, PutTopic, Topic, TopicRecipients, TopicSettings, Topics};
use crate::inbox::{InboxError, Logs};
use crate::live::Live;
use crate::message::{LogId, TopicName, UserId};
use crate::role::reads::Reads;
use crate::telemetry::audit;
use crate::topic::{Delivery, TopicPatterns};
use crate::wire::http::PublishError;

/// Expected number of lists.
const LISTS: usize = 10_000;
/// Bytes of a list besides its users, and of a user besides a long name.
const LIST_BYTES: usize = 160;
const USER_BYTES: usize = std::mem::size_of::<UserId>();
/// Names of up to this length are stored in the value itself.
const INLINE: usize = 23;
/// Names that are searched for one that a mistyped one may have meant.
const SEARCHED: usize = 1_000;
/// For how long it is believed that a topic has a log.
const BELIEVED: Duration = Duration::from_secs(10);
/// What a sender is told when the store cannot be read.
const UNREAD: &str = "the members of the topic cannot be read now; a repeat is safe under an id of your own";
/// Near names that are told.
const TOLD: usize = 3;
/// How near a name must be: from 0.0, nothing in common, to 1.0, the same (Jaro-Winkler).
const NEAR: f64 = 0.8;

/// A topic, and its members unless it has a log.
#[derive(Clone)]
pub(super) struct Found {
    pub(super) topic: Topic,
    /// `None`: the topic has a log.
    pub(super) members: Option<Arc<[UserId]>>,
}

/// A list and the version whose members it has.
#[derive(Clone)]
struct List {
    version: MembersVersion,
    users: Arc<[UserId]>,
}

/// The weight of a list, in bytes.
#[derive(Clone)]
struct Weight;

impl Weighter<TopicName, List> for Weight {
    fn weight(&self, name: &TopicName, list: &List) -> u64 {
        let long = |user: &UserId| Some(user.as_str().len()).filter(|bytes| *bytes > INLINE).unwrap_or(0);
        let users: usize = list.users.iter().map(|user| USER_BYTES + long(user)).sum();
        (LIST_BYTES + name.as_str().len() + users) as u64
    }
}

/// The lists of members that were read, as many as fit. The least used are read again.
pub(super) struct MemberLists {
    topics: Arc<dyn Topics>,
    logs: Logs,
    open: TopicPatterns,
    limits: Live<CollectLimits>,
    lists: Cache<TopicName, List, Weight>,
    reads: Reads<TopicName, Result<Option<Found>, PublishError>>,
    /// Topics that had a log when they were last read, with the time of that.
    have_logs: Cache<TopicName, Instant>,
}

impl MemberLists {
    /// Keeps lists of as many bytes as the limits say.
    pub(super) fn new(topics: Arc<dyn Topics>, logs: Logs, limits: Live<CollectLimits>) -> Self {
        let at_start = limits.get();
        let lists = Cache::with_weighter(LISTS, at_start.member_lists_bytes, Weight);
        Self {
            topics,
            logs,
            open: at_start.open.clone(),
            limits,
            lists,
            reads: Reads::new(|| Err(refusal(503, "this process is stopping"))),
            have_logs: Cache::new(LISTS),
        }
    }

    /// Creates a topic, or changes the life of its messages.
    ///
    /// # Errors
    ///
    /// The store's.
    pub(super) async fn put(&self, name: TopicName, settings: TopicSettings) -> Result<PutTopic, InboxError> {
        let put = self.topics.put(name, settings).await?;
        if let PutTopic::Created(topic) = &put
            && topic.delivery == Delivery::Log
        {
            // Its head record is made with it.
            self.logs.head(&LogId::Topic(topic.name.clone())).await?;
        }
        Ok(put)
    }

    /// A topic, made as one with a log if it is not there and names like its are open.
    ///
    /// # Errors
    ///
    /// The store's.
    pub(super) async fn found_or_open(&self, name: &TopicName) -> Result<Option<Topic>, InboxError> {
        match self.topics.topic(name.clone()).await? {
            Some(topic) => Ok(Some(topic)),
            None => self.opened(name).await,
        }
    }

    /// A topic that is not there, made as one with a log; `None` if its name is not open.
    async fn opened(&self, name: &TopicName) -> Result<Option<Topic>, InboxError> {
        if !self.open.match_name(name) {
            return Ok(None);
        }
        let settings = TopicSettings {
            delivery: Some(Delivery::Log),
            ttl_s: None,
            default_ttl_s: self.limits.get().ttl_s,
        };
        Ok(Some(match self.put(name.clone(), settings).await? {
            PutTopic::Created(topic) => {
                // By its first use, which is no call of its own.
                audit("make_topic", &[("key", "topics.open"), ("outcome", "done"), ("topic", name.as_str())]);
                topic
            }
            PutTopic::Known(topic) | PutTopic::Other(topic) => topic,
        }))
    }

    /// A topic and its members. `hints`: whether near names are looked for if it is not there.
    ///
    /// # Errors
    ///
    /// 404, 503.
    pub(super) async fn of(self: &Arc<Self>, name: &TopicName, hints: bool) -> Result<Found, PublishError> {
        let (this, of) = (Arc::clone(self), name.clone());
        let read = self.reads.get(name, move || async move { this.read(&of).await }.boxed()).await;
        match read? {
            Some(found) => Ok(found),
            None if hints => Err(refusal(404, self.no_topic(name).await)),
            None => Err(refusal(404, no_topic(name))),
        }
    }

    /// Whether a topic had a log a moment ago.
    pub(super) fn had_a_log(&self, name: &TopicName) -> bool {
        self.have_logs.get(name).is_some_and(|read| read.elapsed() <= BELIEVED)
    }

    /// A topic and its members; `None` if there is none, and its name is not open.
    async fn read(&self, name: &TopicName) -> Result<Option<Found>, PublishError> {
        let known = self.lists.get(name);
        let version = known.as_ref().map(|list| list.version);
        let mut found =
            self.topics.recipients(name.clone(), version).await.map_err(|error| unread(&error))?;
        if found == TopicRecipients::NoTopic
            && self.opened(name).await.map_err(|error| unread(&error))?.is_some()
        {
            // Asked again: somebody else may have made it, with members.
            found = self.topics.recipients(name.clone(), version).await.map_err(|error| unread(&error))?;
        }
        match found {
            TopicRecipients::NoTopic => {
                self.have_logs.remove(name);
                Ok(None)
            }
            TopicRecipients::Log(topic) => {
                self.have_logs.insert(name.clone(), Instant::now());
                Ok(Some(Found { topic, members: None }))
            }
            TopicRecipients::Read(topic, users) => {
                self.have_logs.remove(name);
                let list = List { version: topic.version, users: users.into() };
                self.lists.insert(name.clone(), list.clone());
                Ok(Some(Found { topic, members: Some(list.users) }))
            }
            TopicRecipients::Known(topic) => {
                let users = known.map(|list| list.users).unwrap_or_else(|| Arc::from([]));
                Ok(Some(Found { topic, members: Some(users) }))
            }
        }
    }

    /// What to tell whoever names a topic that is not there.
    pub(super) async fn no_topic(&self, name: &TopicName) -> String {
        let first = name.as_str().chars().take(1).collect();
        let others = self.topics.list(first, None, SEARCHED).await.unwrap_or_default();
        let mut near: Vec<(f64, &str)> = others
            .iter()
            .map(|topic| (strsim::jaro_winkler(topic.name.as_str(), name.as_str()), topic.name.as_str()))
            .filter(|(likeness, _)| *likeness >= NEAR)
            .collect();
        near.sort_by(|one, other| other.0.total_cmp(&one.0));
        let names: Vec<&str> = near.into_iter().take(TOLD).map(|(_, name)| name).collect();
        let meant = match names.as_slice() {
            [] => String::new(),
            names => format!("; did you mean {}?", names.join(" or ")),
        };
        format!("{}{meant}", no_topic(name))
    }
}

fn no_topic(name: &TopicName) -> String {
    format!("there is no topic {name:?}: PUT /v1/topics/{name} makes it")
}

fn unread(error: &InboxError) -> PublishError {
    tracing::warn!(%error, "the members of a topic could not be read");
    PublishError::of_store(UNREAD)
}
