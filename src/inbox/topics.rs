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
//!
//! A member of a topic with a log also has a position from which on the log is for it: the head of
//! the log, read before the row was written. Each change of such memberships raises a number of the
//! user ([`UserPosition::memberships`](super::UserPosition::memberships)), also after the rows: a
//! node that knows a number has only to compare it.

use futures_util::future::BoxFuture;

use super::InboxError;
use crate::message::{Millis, Seq, TopicName, UserId};
use crate::topic::Delivery;

/// Rows that are changed or read in one step.
pub const MEMBERS_LOT: usize = 1_000;

/// The port of topics. Its contract is in the module's documentation.
pub trait Topics: Send + Sync + 'static {
    /// Creates a topic, or changes the life of its messages where it exists with that delivery.
    fn put(&self, topic: TopicName, settings: TopicSettings) -> BoxFuture<'_, Result<PutTopic, InboxError>>;

    /// The topic, if there is one of that name.
    fn topic(&self, topic: TopicName) -> BoxFuture<'_, Result<Option<Topic>, InboxError>>;

    /// The topics of these names, in the same order.
    fn topics_named(&self, names: Vec<TopicName>) -> BoxFuture<'_, Result<Vec<Option<Topic>>, InboxError>>;

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

    /// The memberships of these users in topics with a log, in the same order.
    fn log_memberships(&self, users: Vec<UserId>) -> BoxFuture<'_, Result<Vec<Memberships>, InboxError>>;

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
    /// How messages reach the members; `None`: as it is, and [`Delivery::Inbox`] for a new topic.
    pub delivery: Option<Delivery>,
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
    /// There is one with another delivery, and it was left as it is.
    Other(Topic),
}

impl TopicSettings {
    /// Whether a topic cannot become what is asked.
    #[must_use]
    pub fn is_other_than(&self, topic: &Topic) -> bool {
        self.delivery.is_some_and(|delivery| delivery != topic.delivery)
    }
}

/// The memberships of a user in topics with a log.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Memberships {
    /// How often they had changed before they were read.
    pub version: u64,
    /// The memberships, in no order.
    pub logs: Vec<LogMembership>,
}

/// A membership in a topic with a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogMembership {
    /// The topic.
    pub topic: TopicName,
    /// The life of its name that the user is a member of.
    pub life: u64,
    /// What stands up to here in the log is not for this member.
    pub from: Seq,
}

/// Users who join and who leave.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MembersChange {
    /// Users who join.
    pub add: Vec<UserId>,
    /// Users who leave.
    pub remove: Vec<UserId>,
    /// The head of the topic's log, read before; `None` for a topic without a log.
    pub from: Option<Seq>,
}

/// The outcome of [`Topics::change_members`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MembersChanged {
    /// There is no such topic.
    NoTopic,
    /// The topic was removed meanwhile, and perhaps made anew, or with another delivery: nothing is
    /// known to be done.
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
    /// The user is a member of as many topics with a log as a user can be.
    #[error("the user is a member of {} topics with a log: let it leave one first", crate::topic::LOG_TOPICS)]
    TooManyLogs,
}

/// The outcome of [`Topics::recipients`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TopicRecipients {
    /// There is no such topic.
    NoTopic,
    /// The topic has a log: its messages are stored there.
    Log(Topic),
    /// The members that are known are those of the version in force.
    Known(Topic),
    /// All members, in no order.
    Read(Topic, Vec<UserId>),
}
