//! The logs of topics: one for each topic with a log, and one for all users.
//!
//! A log is kept by the rules of an inbox, in a store of its own of the same kind: dense numbers, a
//! head record, idempotency keys, expiry when reading, removal from below. There, the name of a
//! topic stands where the name of a user stands in the inbox, and `*` for everyone. An inbox and a
//! log therefore never meet.
//!
//! Numbers go on over the lives of a topic's name. Each message carries the life in which it was
//! published. What is of an earlier life is passed over like what has expired, whatever publish
//! crosses the removal of its topic. What is of a later one ends a page: a reader that passed over
//! it would take its position there, and miss it in the life that it belongs to. (`lives_model` in
//! the adapter for MongoDB explores these rules.)

use std::sync::Arc;

use super::history::{self, HistoryRange};
use super::{Inbox, InboxError, InboxPage, PageLimit, PositionQuery, StartAt, UserPosition};
use crate::message::{LogEntry, LogId, Message, Seq, UserId};

/// The name of the log of everyone in the store of logs. No topic has it.
const EVERYONE: &str = "*";

/// The life of the log of everyone, which is never removed.
pub const EVERYONES_LIFE: u64 = 0;

/// The logs. Cheap to clone.
#[derive(Clone)]
pub struct Logs {
    store: Arc<dyn Inbox>,
}

impl Logs {
    /// The logs in a store that holds nothing else.
    #[must_use]
    pub fn new(store: Arc<dyn Inbox>) -> Self {
        Self { store }
    }

    /// The store, for the writer of a process.
    #[must_use]
    pub fn store(&self) -> &Arc<dyn Inbox> {
        &self.store
    }

    /// Where logs stand: for each, whether there is something after a position.
    ///
    /// # Errors
    ///
    /// The store's.
    pub async fn positions(&self, queries: Vec<(LogId, StartAt)>) -> Result<Vec<UserPosition>, InboxError> {
        let query = |(log, from): (LogId, StartAt)| PositionQuery { user: key(&log), from };
        self.store.positions(queries.into_iter().map(query).collect()).await
    }

    /// The head of a log: what is published from now on stands above it. A new log is made durable
    /// first, because the head is told and stored.
    ///
    /// # Errors
    ///
    /// The store's.
    pub async fn head(&self, log: &LogId) -> Result<Seq, InboxError> {
        let heads = self.heads(std::slice::from_ref(log)).await?;
        heads.first().copied().ok_or_else(|| InboxError::Corrupt("no answer".to_owned()))
    }

    /// The heads of several logs, in their order, by one question; as [`Self::head`].
    ///
    /// # Errors
    ///
    /// The store's.
    pub async fn heads(&self, logs: &[LogId]) -> Result<Vec<Seq>, InboxError> {
        // A position that a store did not assign makes it write a head record before it answers.
        let told = StartAt::After(Seq::BEGINNING.next());
        let queries =
            logs.iter().flat_map(|log| [(log.clone(), told.clone()), (log.clone(), StartAt::Latest)]);
        let answers = self.positions(queries.collect()).await?;
        Ok(answers.chunks_exact(2).map(|answers| answers[1].head).collect())
    }

    /// Reads a page of at most `limit` unexpired messages of one life, and where the following page
    /// begins.
    ///
    /// # Errors
    ///
    /// The store's.
    pub async fn history(
        &self,
        log: &LogId,
        life: u64,
        range: HistoryRange,
        limit: usize,
    ) -> Result<(Vec<Message>, Option<Seq>), InboxError> {
        let (mut messages, next) = history::read(&self.store, &key(log), range, limit).await?;
        messages.retain(|message| life_of(message) == Some(life));
        Ok((messages, next))
    }

    /// The unexpired messages of one life after a position, up to the first message of a later life
    /// (`more` is set then). A page that ends where it begins, and has more, says that the life is
    /// over.
    ///
    /// # Errors
    ///
    /// The store's.
    pub async fn page(
        &self,
        log: &LogId,
        life: u64,
        after: Seq,
        limit: PageLimit,
    ) -> Result<InboxPage, InboxError> {
        let mut page = self.store.page(key(log), after, limit).await?;
        let later = page.messages.iter().position(|message| life_of(message) > Some(life));
        if let Some(later) = later {
            let first = page.messages[later].seq;
            page.messages.truncate(later);
            page.unreadable.retain(|seq| *seq < first);
            (page.upto, page.more) = (Seq::at(first.get().saturating_sub(1)), true);
        }
        page.messages.retain(|message| life_of(message) == Some(life));
        Ok(page)
    }
}

/// The life in which a message was published.
fn life_of(message: &Message) -> Option<u64> {
    message.log_entry().map(|entry| entry.life)
}

/// The name under which a log stands in the store of logs.
#[must_use]
pub fn key(log: &LogId) -> UserId {
    let name = log.topic().map_or(EVERYONE, |name| name.as_str());
    UserId::parse(name).unwrap_or_else(|_| unreachable!("the name of a topic follows the rule of a user's"))
}

/// The log that stands under a name in the store of logs.
#[must_use]
pub fn log_of(key: &UserId) -> Option<LogId> {
    match key.as_str() {
        EVERYONE => Some(LogId::Everyone),
        name => crate::message::TopicName::parse(name).ok().map(LogId::Topic),
    }
}

/// Whether a message of a log is for this user.
#[must_use]
pub fn is_for(entry: Option<&LogEntry>, user: &UserId) -> bool {
    entry.is_none_or(|entry| !entry.except.contains(user))
}
