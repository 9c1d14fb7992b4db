//! Collect takes messages from publishers, has the inbox append them, answers, and hands them to
//! dispatch. A stored message is handed on whether or not its sender still waits.

mod api_keys;
mod hand_on;
mod members;
mod publish;
mod rates;
mod writers;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tower::ServiceExt;

pub use self::api_keys::{ApiKey, KeyRate, KeySettings, SCOPE_RULE, Scope};
use self::hand_on::{HandingOn, StoredInLogs, hand_on};
use self::members::MemberLists;
pub use self::publish::{Addressed, Lists, PUBLISH_DEADLINE, REQUEST_RECIPIENTS};
pub use self::rates::LogLimits;
use self::rates::Rates;
pub use self::writers::Writers;
use super::DispatchService;
use crate::backoff::around;
use crate::clock::Clock;
use crate::inbox::history::HistoryRange;
use crate::inbox::logs::{EVERYONES_LIFE, key};
use crate::inbox::topics::{MEMBERS_LOT, MembersChange, MembersChanged, PutTopic, TopicSettings};
use crate::inbox::{
    Appender, Change, Inbox, InboxError, Janitor, Logs, PageLimit, Profile, Sought, StartAt, Stores, Topics,
};
use crate::live::Live;
use crate::membership::View;
use crate::message::{LogId, Message, MessageId, Millis, NodeId, Seq, TopicName, UserId};
use crate::tasks::raised_or_else;
use crate::telemetry::Metrics;
use crate::topic::{Delivery, TopicPatterns};
use crate::wire::http::PublishError;
use crate::wire::peer::{DispatchRequest, DispatchResponse, LiveMessage, LogHint, Presence, Revocation};

/// How long nodes may take to write the last acks of sockets that were closed.
const CURSORS_SETTLE: Duration = Duration::from_secs(1);
/// Largest page of history.
pub const HISTORY_PAGE: PageLimit = PageLimit { messages: 1_000, bytes: 8 * 1024 * 1024 };

/// The limits of collect.
#[derive(Debug, Clone)]
pub struct CollectLimits {
    /// Default life of a message, in seconds.
    pub ttl_s: u64,
    /// Memory of the lists of members that are kept, in bytes.
    pub member_lists_bytes: u64,
    /// Publishes to logs.
    pub logs: LogLimits,
    /// Names of topics that are made by their first publish or join, with a log.
    pub open: TopicPatterns,
}

/// The processes that collect talks to.
pub struct Peers {
    /// Dispatch, in this process or others.
    pub dispatch: DispatchService,
    /// The collects that write to topics.
    pub writers: Writers,
}

/// The role collect. Cheap to clone.
#[derive(Clone)]
pub struct Collect {
    inner: Arc<Inner>,
}

struct Inner {
    inbox: Arc<dyn Inbox>,
    topics: Arc<dyn Topics>,
    logs: Logs,
    members: Arc<MemberLists>,
    rates: Rates,
    /// Turns of publishes to topics.
    lots: Semaphore,
    limits: Live<CollectLimits>,
    appender: Appender,
    /// The writer of the logs.
    log_appender: Appender,
    dispatch: DispatchService,
    writers: Writers,
    handing_on: Arc<HandingOn>,
    clock: Clock,
}

/// What is known about a user, from the inbox and from the nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserReport {
    /// The owner in the view in use.
    pub owner: Option<NodeId>,
    /// Cursors, revocation and head.
    pub profile: Profile,
    /// Sessions on all nodes that were asked.
    pub sessions: Vec<Presence>,
}

impl Collect {
    /// Starts the role. Its writer and its tasks end with `tasks`.
    pub fn start(
        Stores { inbox, topics, logs }: Stores,
        limits: Live<CollectLimits>,
        Peers { dispatch, writers }: Peers,
        views: watch::Receiver<Arc<View>>,
        clock: Clock,
        metrics: &Metrics,
        tasks: &mut JoinSet<()>,
    ) -> Self {
        let handing_on = Arc::new(HandingOn::new(metrics));
        let appender = Arc::clone(&inbox).appender(Arc::clone(&handing_on) as _, tasks);
        let stored_in_logs = Arc::new(StoredInLogs(Arc::clone(&handing_on)));
        let log_appender = Arc::clone(logs.store()).appender(stored_in_logs, tasks);
        tasks.spawn(hand_on::<LiveMessage>(Arc::clone(&handing_on), dispatch.clone(), views.clone()));
        tasks.spawn(hand_on::<LogHint>(Arc::clone(&handing_on), dispatch.clone(), views));
        let members = Arc::new(MemberLists::new(Arc::clone(&topics), logs.clone(), limits.clone()));
        let lots = Semaphore::new(publish::LOTS_AT_ONCE);
        let inner = Inner {
            inbox,
            topics,
            logs,
            members,
            rates: Rates::new(limits.clone()),
            lots,
            limits,
            appender,
            log_appender,
            dispatch,
            writers,
            handing_on,
            clock,
        };
        Self { inner: Arc::new(inner) }
    }

    /// The topics of this cluster.
    #[must_use]
    pub fn topics(&self) -> &dyn Topics {
        &*self.inner.topics
    }

    /// The limits of collect at present.
    #[must_use]
    pub fn limits(&self) -> Arc<CollectLimits> {
        self.inner.limits.get()
    }

    /// Creates a topic, or changes the life of its messages.
    ///
    /// # Errors
    ///
    /// The store's.
    pub async fn put_topic(&self, name: TopicName, settings: TopicSettings) -> Result<PutTopic, InboxError> {
        self.inner.members.put(name, settings).await
    }

    /// Ends a topic and its memberships. Returns whether there was one.
    ///
    /// # Errors
    ///
    /// The store's.
    pub async fn remove_topic(&self, name: TopicName) -> Result<bool, InboxError> {
        let removed = self.inner.topics.remove(name.clone()).await?;
        self.inner.handing_on.hint(vec![LogHint::Look(LogId::Topic(name))]);
        Ok(removed)
    }

    /// Adds and removes members of a topic. It is carried out whether or not its sender still
    /// waits: half of a change would leave lists that hold who has left.
    ///
    /// # Errors
    ///
    /// The store's. A repeat goes on where it stopped.
    pub async fn change_members(
        &self,
        topic: TopicName,
        add: Vec<UserId>,
        remove: Vec<UserId>,
    ) -> Result<MembersChanged, InboxError> {
        let this = self.clone();
        let changing = tokio::spawn(async move { this.change_now(topic, add, remove).await });
        let stopping = || Err(InboxError::Unavailable("this process is stopping".to_owned()));
        raised_or_else(changing.await, stopping)
    }

    async fn change_now(
        &self,
        name: TopicName,
        add: Vec<UserId>,
        remove: Vec<UserId>,
    ) -> Result<MembersChanged, InboxError> {
        let Inner { topics, logs, members, handing_on, .. } = &*self.inner;
        let found = match add.is_empty() {
            true => topics.topic(name.clone()).await?,
            false => members.found_or_open(&name).await?,
        };
        let Some(topic) = found else { return Ok(MembersChanged::NoTopic) };
        if topic.delivery != Delivery::Log {
            return topics.change_members(name, MembersChange { add, remove, from: None }).await;
        }
        // Before the rows: whatever is published after the answer stands above it.
        let from = Some(logs.head(&LogId::Topic(name.clone())).await?);
        let users: Vec<UserId> = add.iter().chain(&remove).cloned().collect();
        let hints = users.chunks(MEMBERS_LOT).map(|lot| LogHint::Memberships(lot.to_vec())).collect();
        let changed = topics.change_members(name, MembersChange { add, remove, from }).await;
        // Also after a failure, which may have changed some.
        handing_on.hint(hints);
        changed
    }

    /// The unexpired messages in the log of a topic, and where the next page begins; `None` if
    /// there is no such topic, or it has no log.
    ///
    /// # Errors
    ///
    /// The store's.
    pub async fn log_history(
        &self,
        log: &LogId,
        range: HistoryRange,
        limit: usize,
    ) -> Result<Option<(Vec<Message>, Option<Seq>)>, InboxError> {
        let Some(life) = self.life(log).await? else { return Ok(None) };
        let limit = limit.min(HISTORY_PAGE.messages);
        self.inner.logs.history(log, life, range, limit).await.map(Some)
    }

    /// Ends a message in the log of a topic: nobody is sent it from now on. Returns whether there
    /// was one.
    ///
    /// # Errors
    ///
    /// The store's.
    pub async fn end_message(&self, name: &TopicName, seq: Seq) -> Result<bool, InboxError> {
        let Inner { logs, handing_on, clock, .. } = &*self.inner;
        let log = LogId::Topic(name.clone());
        let Some(life) = self.life(&log).await? else { return Ok(false) };
        let before = Seq::at(seq.get().saturating_sub(1));
        let page = logs.page(&log, life, before, PageLimit { messages: 1, bytes: 1 }).await?;
        let Some(message) = page.messages.into_iter().next().filter(|message| message.seq == seq) else {
            return Ok(false);
        };
        let at = clock.now();
        logs.store().update(vec![Change::End { user: key(&log), seq, at }]).await?;
        // The nodes drop it, too. One that was told of it by nobody yet sees that it has expired,
        // whatever its clock says.
        let message =
            Arc::new(Message { expires_at: Millis(0), payload: Bytes::from_static(b"null"), ..message });
        handing_on.hint(vec![LogHint::Message { log, message }]);
        Ok(true)
    }

    /// The life of a log; `None` if there is no such topic, or it has no log.
    async fn life(&self, log: &LogId) -> Result<Option<u64>, InboxError> {
        let LogId::Topic(name) = log else { return Ok(Some(EVERYONES_LIFE)) };
        let topic = self.inner.topics.topic(name.clone()).await?;
        Ok(topic.filter(|topic| topic.delivery == Delivery::Log).map(|topic| topic.version.life))
    }

    /// The highest position of a message in a log, 0 if there never was one; and how many sockets
    /// read it.
    ///
    /// # Errors
    ///
    /// The store's, or dispatch cannot be asked.
    pub async fn log_report(&self, log: LogId) -> Result<(Seq, u64), InboxError> {
        let answers = self.inner.logs.positions(vec![(log.clone(), StartAt::Latest)]).await?;
        let head = answers.first().map_or(Seq::BEGINNING, |answer| answer.start);
        match self.inner.dispatch.clone().oneshot(DispatchRequest::Readers(log)).await {
            Ok(DispatchResponse::Readers(count)) => Ok((head, count)),
            _ => Err(InboxError::Unavailable("dispatch cannot be asked".to_owned())),
        }
    }

    /// Ends all memberships of a user. Returns how many there were.
    ///
    /// # Errors
    ///
    /// The store's. A repeat goes on where it stopped.
    pub async fn leave_all(&self, user: UserId) -> Result<u64, InboxError> {
        let mut count = 0;
        for topic in self.inner.topics.topics_of(user.clone()).await? {
            let changed = self.change_members(topic.name, Vec::new(), vec![user.clone()]).await?;
            if let MembersChanged::Done { removed, .. } = changed {
                count += removed;
            }
        }
        Ok(count)
    }

    /// What to tell whoever names a topic that is not there.
    pub async fn no_topic(&self, name: &TopicName) -> String {
        self.inner.members.no_topic(name).await
    }

    /// The unexpired messages of a user after a position, and where the next page begins.
    ///
    /// # Errors
    ///
    /// The inbox's.
    pub async fn history(
        &self,
        user: UserId,
        after: Seq,
        limit: usize,
    ) -> Result<(Vec<Message>, Option<Seq>), InboxError> {
        let limit = PageLimit { messages: limit.min(HISTORY_PAGE.messages), ..HISTORY_PAGE };
        let page = self.inner.inbox.page(user, after, limit).await?;
        Ok((page.messages, page.more.then_some(page.upto)))
    }

    /// What is known about a user. An unknown user has an empty report.
    ///
    /// # Errors
    ///
    /// The inbox's.
    pub async fn user(&self, user: UserId) -> Result<UserReport, InboxError> {
        let profile = self.inner.inbox.profile(user.clone()).await?;
        let found = self.inner.dispatch.clone().oneshot(DispatchRequest::Lookup(user)).await;
        let (owner, sessions) = match found {
            Ok(DispatchResponse::Found { owner, sessions }) => (owner, sessions),
            _ => return Err(InboxError::Unavailable("dispatch cannot be asked".to_owned())),
        };
        Ok(UserReport { owner, profile, sessions })
    }

    /// A message in the inbox of a user: at a position, else under the id of its sender. Also one
    /// that has expired and was not removed yet.
    ///
    /// # Errors
    ///
    /// The store's.
    pub async fn stored(
        &self,
        user: &UserId,
        seq: Option<Seq>,
        id: MessageId,
    ) -> Result<Option<Message>, InboxError> {
        if let Some(seq) = seq
            && let Some(found) = self.inner.inbox.stored(user.clone(), Sought::At(seq)).await?
        {
            return Ok(Some(found));
        }
        if let Some(found) = self.inner.inbox.stored(user.clone(), Sought::Under(id.clone())).await? {
            return Ok(Some(found));
        }
        let all = self.inner.topics.topics_of(user.clone()).await?;
        let inboxes = all.into_iter().filter(|topic| topic.delivery == Delivery::Inbox);
        let topics: Vec<TopicName> = inboxes.map(|topic| topic.name).collect();
        match topics.is_empty() {
            true => Ok(None),
            false => self.inner.inbox.stored(user.clone(), Sought::Through(topics, id)).await,
        }
    }

    /// The time by which messages expire.
    #[must_use]
    pub fn now(&self) -> Millis {
        self.inner.clock.now()
    }

    /// Resolves when everything that was stored so far was handed to dispatch, or given up.
    pub async fn handed_on(&self) {
        let handing_on = &self.inner.handing_on;
        while !handing_on.backlog.is_idle() || !handing_on.hints.is_idle() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Forgets a user: its memberships, messages and cursors go, its sockets are closed, and tokens
    /// that were issued until now are refused. Its numbers go on.
    ///
    /// # Errors
    ///
    /// The store's. A repeat goes on where it stopped.
    pub async fn forget(&self, user: UserId) -> Result<(), InboxError> {
        // First the sockets: their acks would make cursors anew. The write also shows that the
        // store that answers is the one in force, and not one that was replaced.
        self.disconnect(user.clone()).await?;
        self.leave_all(user.clone()).await?;
        tokio::time::sleep(CURSORS_SETTLE).await;
        self.inner.inbox.forget(user).await
    }

    /// Closes all sockets of a user and refuses every token issued until now.
    ///
    /// Tokens count whole seconds. So the revocation is dated at the beginning of the next second
    /// and this returns only then: a token that is issued after the return is good.
    ///
    /// # Errors
    ///
    /// The inbox's; nothing is revoked then. Nodes that cannot be reached find out by their sweep.
    pub async fn disconnect(&self, user: UserId) -> Result<(), InboxError> {
        let now = self.inner.clock.now();
        let not_before_s = now.seconds() + 1;
        self.inner
            .inbox
            .update(vec![Change::NotBefore { user: user.clone(), seconds: not_before_s }])
            .await?;
        let revocation = Revocation { user, not_before_s };
        if let Err(fault) = self.inner.dispatch.clone().oneshot(DispatchRequest::Disconnect(revocation)).await
        {
            tracing::warn!(%fault, "a node was not told of a disconnect; its sweep will find it");
        }
        tokio::time::sleep(Duration::from_millis(1000 - now.0 % 1000)).await;
        Ok(())
    }
}

fn refusal(status: u16, detail: impl Into<String>) -> PublishError {
    PublishError::new(status, detail)
}

/// Runs the janitor periodically, and watches the store meanwhile.
pub async fn run_upkeep(upkeep: Arc<dyn Janitor>, every: Duration) {
    tokio::join!(upkeep.watch(), clean(&*upkeep, every));
}

async fn clean(upkeep: &dyn Janitor, every: Duration) {
    loop {
        let rest = around(every, 0.2, &mut rand::rng());
        tokio::time::sleep(rest).await;
        match upkeep.run_once().await {
            Ok(removed) if removed > 0 => tracing::debug!(removed, "expired messages were removed"),
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "expired messages could not be removed"),
        }
    }
}

#[cfg(test)]
mod tests;
