//! The port of topics: which there are, and who is a member.
//!
//! # The contract
//!
//! A topic has a *life* from [`Topics::put`] to [`Topics::remove`]; the lives of a name are
//! numbered upwards and no number is given twice. A member belongs to one life: where a name is
//! made anew, it has no members.
//!
//! Each change of the members raises the topic's *version* after the rows have changed, also where
//! they were as asked already: a repeat mends what a crash left between the two. A reader reads the
//! version first and then the rows. So a list that is kept under a version contains every change of
//! that version, and whoever publishes after [`Topics::change_members`] has returned reaches whom
//! it added.

use futures_util::future::BoxFuture;

use super::InboxError;
use crate::message::{Millis, TopicName, UserId};
use crate::topic::Delivery;

/// Rows that are changed or read in one step.
pub const MEMBERS_LOT: usize = 1_000;

/// The port of topics. Its contract is in the module's documentation.
pub trait Topics: Send + Sync + 'static {
    /// Creates a topic, or changes the life of its messages where it exists.
    fn put(&self, topic: TopicName, settings: TopicSettings) -> BoxFuture<'_, Result<PutTopic, InboxError>>;

    /// The topic, if there is one of that name.
    fn topic(&self, topic: TopicName) -> BoxFuture<'_, Result<Option<Topic>, InboxError>>;

    /// Ends a topic and its memberships. Returns whether there was one.
    fn remove(&self, topic: TopicName) -> BoxFuture<'_, Result<bool, InboxError>>;

    /// The topics whose names begin with `prefix` and stand after a name, in order, at most
    /// `limit`.
    fn list(
        &self,
        prefix: String,
        after: Option<TopicName>,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<Topic>, InboxError>>;

    /// Adds and removes members. No user is in both lists.
    fn change_members(
        &self,
        topic: TopicName,
        change: MembersChange,
    ) -> BoxFuture<'_, Result<MembersChanged, InboxError>>;

    /// The members after a user, in order, at most `limit`; `None` if there is no such topic.
    fn members(
        &self,
        topic: TopicName,
        after: Option<UserId>,
        limit: usize,
    ) -> BoxFuture<'_, Result<Option<Vec<UserId>>, InboxError>>;

    /// The number of members; 0 if there is no such topic.
    fn count_members(&self, topic: TopicName) -> BoxFuture<'_, Result<u64, InboxError>>;

    /// The topics that a user is a member of, in the order of their names.
    fn topics_of(&self, user: UserId) -> BoxFuture<'_, Result<Vec<Topic>, InboxError>>;

    /// Which server answers: a number that changes when another one takes over. What was read from
    /// the one of before may have been outdated.
    fn primary(&self) -> u64 {
        0
    }

    /// All members for a publish, unless they are `known` of the version in force.
    fn recipients(
        &self,
        topic: TopicName,
        known: Option<MembersVersion>,
    ) -> BoxFuture<'_, Result<TopicRecipients, InboxError>>;
}

/// What a topic is made with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TopicSettings {
    /// How messages reach the members.
    pub delivery: Delivery,
    /// Life of messages whose sender names none, in seconds; `None` leaves it as it is.
    pub ttl_s: Option<u64>,
    /// The same for a topic that is new and has none named.
    pub default_ttl_s: u64,
}

/// A topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topic {
    /// Its name.
    pub name: TopicName,
    /// How messages reach the members.
    pub delivery: Delivery,
    /// Life of messages whose sender names none, in seconds.
    pub ttl_s: u64,
    /// When this life of the name began.
    pub created_at: Millis,
    /// Life and version.
    pub version: MembersVersion,
}

/// Which members a topic has. A list that was read under a version contains every change that it
/// counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MembersVersion {
    /// The life of the topic's name.
    pub life: u64,
    /// The number of changes.
    pub changes: u64,
    /// Drawn with each change where a store can be restored to an earlier state while lists are
    /// kept: the same number of changes may then be another state. 0 elsewhere.
    pub draw: i64,
}

/// The outcome of [`Topics::put`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PutTopic {
    /// There was none of that name.
    Created(Topic),
    /// There is one; the life of its messages is as asked.
    Known(Topic),
}

/// Users who join and who leave.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MembersChange {
    /// Users who join.
    pub add: Vec<UserId>,
    /// Users who leave.
    pub remove: Vec<UserId>,
}

/// The outcome of [`Topics::change_members`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MembersChanged {
    /// There is no such topic.
    NoTopic,
    /// The topic was removed meanwhile, and perhaps made anew: nothing is known to be done.
    Ended,
    /// Done, but for those who were refused.
    Done {
        /// Users who were no members before.
        added: u64,
        /// Users who were members.
        removed: u64,
        /// Users who did not join.
        refused: Vec<(UserId, MemberRefusal)>,
    },
}

/// Why a user did not join a topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MemberRefusal {
    /// The topic has as many members as it can have.
    #[error("the topic has {} members, and more are not delivered to inboxes", crate::topic::INBOX_MEMBERS)]
    TopicIsFull,
    /// The user is a member of as many topics as a user can be.
    #[error("the user is a member of {} topics: let it leave one first", crate::topic::INBOX_TOPICS)]
    TooManyTopics,
}

/// The outcome of [`Topics::recipients`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TopicRecipients {
    /// There is no such topic.
    NoTopic,
    /// The members that are known are those of the version in force.
    Known(Topic),
    /// All members, in no order.
    Read(Topic, Vec<UserId>),
}
