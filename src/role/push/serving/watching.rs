//! The part of the serving stage that concerns topics which a client watches without being a
//! member: what it asks for, one after another, and what its token allows.

use std::collections::VecDeque;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::time::Instant;

use super::super::log_attach::{LogAttacher, Watched};
use super::super::log_readers::topic_frame;
use super::super::registry::SessionHandle;
use super::{End, Serving, Socket};
use crate::backoff::Backoff;
use crate::message::TopicName;
use crate::watching::{WATCH_RULE, WatchRights};
use crate::wire::close::CloseCode;
use crate::wire::frame::{ServerFrame, TopicState, WatchSince};

/// Most topics that one socket watches (docs/topics.md).
const WATCHES: usize = 100;
/// Most topics that one socket asks to watch in one second.
const WATCHES_PER_S: u32 = 10;
/// Code of a topic that the token does not let the client watch.
const FORBIDDEN_TOPIC: &str = "forbidden_topic";
/// Code of a topic that does not exist, or has no log.
const UNKNOWN_TOPIC: &str = "unknown_topic";
/// Delay between two tries while the store does not respond, at first and at most.
const RETRY_FIRST: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(5);

/// What a client asked to watch and was not answered yet. Nearly all clients watch nothing.
pub(super) struct Watching {
    rights: Option<Arc<WatchRights>>,
    under_way: Option<Box<UnderWay>>,
}

struct UnderWay {
    /// What is found out now.
    now: Option<(TopicName, BoxFuture<'static, Watched>)>,
    waiting: VecDeque<(TopicName, WatchSince)>,
    second_began: Instant,
    this_second: u32,
}

impl Watching {
    pub(super) fn of(rights: Option<Arc<WatchRights>>) -> Self {
        Self { rights, under_way: None }
    }

    /// Whether the client may watch nothing and has asked for nothing.
    pub(super) fn is_nothing(&self) -> bool {
        self.rights.is_none() && self.under_way.is_none()
    }

    /// Why a topic may not be watched; `None` if it may.
    fn refusal(&self, topic: &TopicName) -> Option<String> {
        match &self.rights {
            Some(rights) if rights.allows(topic) => None,
            Some(rights) if rights.is_unreadable() => Some(format!("the token's claim {WATCH_RULE}")),
            Some(_) => Some("no pattern of the token's claim watch allows this topic".to_owned()),
            None => Some("the token has no claim watch: a list of topics, such as [\"match-*\"]".to_owned()),
        }
    }

    /// Topics that were asked for and are not read yet.
    fn asked(&self) -> usize {
        self.under_way.as_ref().map_or(0, |asked| asked.waiting.len() + usize::from(asked.now.is_some()))
    }

    /// Takes a request of a socket that watches `watched` topics.
    ///
    /// # Errors
    ///
    /// What there is too much of.
    fn ask(&mut self, topic: TopicName, since: WatchSince, watched: usize) -> Result<(), &'static str> {
        if watched + self.asked() >= WATCHES {
            return Err("more than 100 topics are watched by one socket");
        }
        let asked = self.under_way.get_or_insert_with(|| {
            Box::new(UnderWay {
                now: None,
                waiting: VecDeque::new(),
                second_began: Instant::now(),
                this_second: 0,
            })
        });
        if asked.second_began.elapsed() >= Duration::from_secs(1) {
            (asked.second_began, asked.this_second) = (Instant::now(), 0);
        }
        asked.this_second += 1;
        if asked.this_second > WATCHES_PER_S {
            return Err("more than 10 topics to watch in one second");
        }
        asked.waiting.push_back((topic, since));
        Ok(())
    }

    /// Takes a request back.
    fn forget(&mut self, topic: &TopicName) {
        if let Some(asked) = &mut self.under_way {
            asked.waiting.retain(|(waits, _)| waits != topic);
            asked.now.take_if(|(now, _)| now == topic);
        }
    }

    /// The next request, if none is being answered.
    fn next(&mut self) -> Option<(TopicName, WatchSince)> {
        let asked = self.under_way.as_mut().filter(|asked| asked.now.is_none())?;
        asked.waiting.pop_front()
    }

    fn find_out(&mut self, topic: TopicName, answer: BoxFuture<'static, Watched>) {
        if let Some(asked) = &mut self.under_way {
            asked.now = Some((topic, answer));
        }
    }

    /// Ready with an answer.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<(TopicName, Watched)> {
        let Some(asked) = &mut self.under_way else { return Poll::Pending };
        let Some((_, answer)) = &mut asked.now else { return Poll::Pending };
        let watched = ready!(answer.poll_unpin(cx));
        match asked.now.take() {
            Some((topic, _)) => Poll::Ready((topic, watched)),
            None => Poll::Pending,
        }
    }
}

impl<S: Socket> Serving<S> {
    /// The client asks to watch a topic.
    pub(super) fn watch(&mut self, topic: TopicName, since: WatchSince) -> Result<(), End> {
        self.wake_logs();
        let Some(logs) = self.logs.awake() else {
            self.refuse_watch(&topic, FORBIDDEN_TOPIC, "auth was without \"topics\"");
            return Ok(());
        };
        // One that is read already changes nothing.
        let watched = match logs.readers.position(&topic) {
            Some(_) => 0,
            None => logs.readers.watches().len(),
        };
        let taken = logs.watching.ask(topic, since, watched);
        taken.map_err(|why| End::close(CloseCode::RateLimited, why))?;
        self.watch_next();
        Ok(())
    }

    /// Takes requests up to one that needs the store.
    fn watch_next(&mut self) {
        while let Some(logs) = self.logs.awake()
            && let Some((topic, since)) = logs.watching.next()
        {
            // First, so that nobody finds out by it which topics there are.
            if let Some(why) = logs.watching.refusal(&topic) {
                self.refuse_watch(&topic, FORBIDDEN_TOPIC, &why);
            } else if let Some(position) = logs.readers.position(&topic) {
                self.reply(&topic_frame(&topic, TopicState::Watching, Some(position)));
            } else {
                let (attacher, handle) = (Arc::clone(&self.context.logs), Arc::clone(&self.handle));
                logs.watching.find_out(topic.clone(), until_answered(attacher, handle, topic, since).boxed());
            }
        }
    }

    /// It is known whether a topic can be watched.
    pub(super) fn watched(&mut self, topic: TopicName, watched: Watched) {
        let Some(logs) = self.logs.awake() else { return };
        // A refresh, or a membership, may have come meanwhile.
        let (refusal, position) = (logs.watching.refusal(&topic), logs.readers.position(&topic));
        match (refusal, position, watched) {
            (Some(why), ..) => self.refuse_watch(&topic, FORBIDDEN_TOPIC, &why),
            (None, Some(position), _) => {
                self.reply(&topic_frame(&topic, TopicState::Watching, Some(position)));
            }
            (None, None, Watched::Begins(start)) => {
                self.of_logs(|readers, acts, _| readers.watched(*start, acts));
            }
            (None, None, Watched::NoLog) => {
                let why = "there is no topic of this name that has a log";
                self.refuse_watch(&topic, UNKNOWN_TOPIC, why);
            }
        }
        self.watch_next();
        self.look_at_logs();
    }

    pub(super) fn unwatch(&mut self, topic: &TopicName) {
        self.wake_logs();
        if let Some(logs) = self.logs.awake() {
            logs.watching.forget(topic);
            if logs.readers.position(topic).is_none() {
                // Nothing is read yet, or any more.
                self.reply(&topic_frame(topic, TopicState::Left, None));
            }
        }
        self.of_logs(|readers, acts, _| readers.unwatch(topic, acts));
        self.watch_next();
        self.look_at_logs();
    }

    /// A new token has these rights. What it no longer allows ends.
    pub(super) fn may_watch(&mut self, rights: Option<Arc<WatchRights>>) {
        self.wake_logs();
        let Some(logs) = self.logs.awake() else { return };
        logs.watching.rights = rights;
        let watches = logs.readers.watches();
        let over: Vec<TopicName> =
            watches.into_iter().filter(|topic| logs.watching.refusal(topic).is_some()).collect();
        if !over.is_empty() {
            self.of_logs(|readers, acts, _| over.iter().for_each(|topic| readers.unwatch(topic, acts)));
            self.look_at_logs();
        }
    }

    fn refuse_watch(&mut self, topic: &TopicName, code: &str, why: &str) {
        self.reply(&ServerFrame::Error {
            code: code.to_owned(),
            reason: code.to_owned(),
            message: why.to_owned(),
            topic: Some(topic.to_string()),
            reconnect: None,
        });
    }
}

/// Asks until the store answers.
async fn until_answered(
    attacher: Arc<LogAttacher>,
    handle: Arc<SessionHandle>,
    topic: TopicName,
    since: WatchSince,
) -> Watched {
    let mut backoff = Backoff::new(RETRY_FIRST, RETRY_MAX);
    loop {
        match attacher.watch(&handle, &topic, since).await {
            Ok(watched) => return watched,
            Err(error) => tracing::debug!(%error, %topic, "a topic could not be watched yet"),
        }
        let delay = backoff.next(&mut rand::rng());
        tokio::time::sleep(delay).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn ten_in_a_second_and_a_hundred_at_once() {
        let mut watching = Watching::of(None);
        let mut ask = |n: usize, watched| {
            watching.ask(TopicName::parse(&format!("t{n}")).unwrap(), WatchSince::Latest, watched)
        };
        for n in 0..10 {
            assert_eq!(ask(n, 0), Ok(()));
        }
        assert!(ask(10, 0).unwrap_err().contains("in one second"));
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(ask(10, 89), Ok(()), "the hundredth");
        assert!(ask(11, 89).unwrap_err().contains("more than 100"));
        watching.forget(&TopicName::parse("t3").unwrap());
        assert_eq!(watching.asked(), 10);
    }
}
