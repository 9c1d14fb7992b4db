//! Publishes to topics while the server that answers is replaced.

use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use futures_util::future::{BoxFuture, FutureExt};
use parking_lot::Mutex;
use tower::util::BoxCloneSyncService;

use super::*;
use crate::inbox::memory::MemoryInbox;
use crate::inbox::topics::{
    MembersChange, MembersVersion, Memberships, PutTopic, Topic, TopicRecipients, TopicSettings,
};
use crate::membership::Membership;
use crate::membership::local::LocalMembership;
use crate::message::{Millis, Recipients};
use crate::wire::http::Publish;
use crate::wire::http::TopicOutcome;

/// Topics of two servers: the second has taken over, and the first still answers with what it had.
struct Replaced {
    now: Arc<MemoryInbox>,
    /// What the first one answers, by topic.
    before: Mutex<Vec<(TopicName, TopicRecipients)>>,
    /// Reads until it is known that the second one has taken over.
    reads_left: AtomicU64,
}

impl Topics for Replaced {
    fn primary(&self) -> u64 {
        u64::from(self.reads_left.load(Ordering::Relaxed) == 0)
    }

    fn recipients(
        &self,
        topic: TopicName,
        known: Option<MembersVersion>,
    ) -> BoxFuture<'_, Result<TopicRecipients, InboxError>> {
        if self.primary() == 1 {
            return self.now.recipients(topic, known);
        }
        self.reads_left.fetch_sub(1, Ordering::Relaxed);
        let before = self.before.lock();
        let answer = before.iter().find(|(name, _)| *name == topic).map(|(_, answer)| answer.clone());
        std::future::ready(Ok(answer.unwrap_or(TopicRecipients::NoTopic))).boxed()
    }

    fn put(&self, topic: TopicName, settings: TopicSettings) -> BoxFuture<'_, Result<PutTopic, InboxError>> {
        self.now.put(topic, settings)
    }
    fn topic(&self, topic: TopicName) -> BoxFuture<'_, Result<Option<Topic>, InboxError>> {
        self.now.topic(topic)
    }
    fn topics_named(&self, names: Vec<TopicName>) -> BoxFuture<'_, Result<Vec<Option<Topic>>, InboxError>> {
        self.now.topics_named(names)
    }
    fn log_memberships(&self, users: Vec<UserId>) -> BoxFuture<'_, Result<Vec<Memberships>, InboxError>> {
        self.now.log_memberships(users)
    }
    fn remove(&self, topic: TopicName) -> BoxFuture<'_, Result<bool, InboxError>> {
        self.now.remove(topic)
    }
    fn list(
        &self,
        prefix: String,
        after: Option<TopicName>,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<Topic>, InboxError>> {
        self.now.list(prefix, after, limit)
    }
    fn change_members(
        &self,
        topic: TopicName,
        change: MembersChange,
    ) -> BoxFuture<'_, Result<MembersChanged, InboxError>> {
        self.now.change_members(topic, change)
    }
    fn members(
        &self,
        topic: TopicName,
        after: Option<UserId>,
        limit: usize,
    ) -> BoxFuture<'_, Result<Option<Vec<UserId>>, InboxError>> {
        self.now.members(topic, after, limit)
    }
    fn count_members(&self, topic: TopicName) -> BoxFuture<'_, Result<u64, InboxError>> {
        self.now.count_members(topic)
    }
    fn topics_of(&self, user: UserId) -> BoxFuture<'_, Result<Vec<Topic>, InboxError>> {
        self.now.topics_of(user)
    }
}

fn name(text: &str) -> TopicName {
    TopicName::parse(text).unwrap()
}

/// A collect that has no colleagues.
fn alone() -> Writers {
    struct Nobody;
    impl crate::role::WriterDirectory for Nobody {
        fn find(&self, _: &crate::colleagues::Colleague) -> Option<crate::role::WriterService> {
            None
        }
    }
    let nobody = Arc::new(crate::colleagues::Alone::default());
    Writers::new(NodeId::parse("collect-0").unwrap(), nobody, Arc::new(Nobody), &Metrics::default())
}

fn user(text: &str) -> UserId {
    UserId::parse(text).unwrap()
}

struct Bench {
    clock: Clock,
    inbox: Arc<MemoryInbox>,
    collect: Collect,
    _tasks: JoinSet<()>,
}

/// A collect whose server is replaced after so many reads of lists. In each of these topics the old
/// one knows only `old`; `new` has joined since.
async fn replaced_after(reads: u64, topics: &[&str]) -> Bench {
    let clock = Clock::standing(Millis(1_000));
    let inbox = Arc::new(MemoryInbox::new(clock.clone()));
    let mut before = Vec::new();
    for topic in topics {
        let settings = TopicSettings { delivery: None, ttl_s: None, default_ttl_s: 60 };
        inbox.put(name(topic), settings).await.unwrap();
        for who in ["old", "new"] {
            let change = MembersChange { add: vec![user(who)], remove: Vec::new(), from: None };
            inbox.change_members(name(topic), change).await.unwrap();
            if who == "old" {
                before.push((name(topic), inbox.recipients(name(topic), None).await.unwrap()));
            }
        }
    }
    let replaced =
        Replaced { now: Arc::clone(&inbox), before: Mutex::new(before), reads_left: AtomicU64::new(reads) };
    let dispatch =
        BoxCloneSyncService::new(tower::service_fn(|_| std::future::ready(Ok(DispatchResponse::Done))));
    let logs = LogLimits { topic_bytes: 1_000, everyone_bytes: 1_000, topic_per_s: 10, everyone_per_s: 10 };
    let mut tasks = JoinSet::new();
    let collect = Collect::start(
        Stores {
            inbox: Arc::clone(&inbox) as _,
            topics: Arc::new(replaced),
            logs: Logs::new(Arc::new(MemoryInbox::new(clock.clone()))),
        },
        Live::new(CollectLimits { ttl_s: 60, member_lists_bytes: 1 << 20, logs, open: Default::default() }),
        Peers { dispatch, writers: alone() },
        LocalMembership::new(clock.clone()).views(),
        clock.clone(),
        &Metrics::default(),
        &mut tasks,
    );
    Bench { clock, inbox, collect, _tasks: tasks }
}

impl Bench {
    async fn publish(&self, topics: &[&str]) -> crate::wire::http::Published {
        let mut lists = Lists::default();
        let publish = Publish {
            trace: None,
            to: Recipients::Topics {
                topics: topics.iter().map(|topic| LogId::Topic(name(topic))).collect(),
                except: vec![],
            },
            event: None,
            payload: Bytes::from_static(b"1"),
            ttl_s: None,
            id: None,
        };
        let addressed = self.collect.address(publish, &mut lists).await;
        self.collect.publish_to(addressed, lists.deadline()).await
    }

    async fn stored_for(&self, who: &str) -> usize {
        self.inbox.page(user(who), Seq::BEGINNING, HISTORY_PAGE).await.unwrap().messages.len()
    }
}

#[tokio::test]
async fn whoever_joined_at_the_server_that_took_over_is_reached() {
    let bench = replaced_after(1, &["team"]).await;
    let published = bench.publish(&["team"]).await;
    assert_eq!(published.problem(), None);
    let outcome = published.topics[0].1.as_ref().unwrap();
    assert!(matches!(outcome, TopicOutcome::Members { members: 2, .. }), "{outcome:?}");
    assert_eq!((bench.stored_for("old").await, bench.stored_for("new").await), (1, 1));
}

/// The list of the first topic was read from the server of before, also where it is used again
/// after the second one was read.
#[tokio::test]
async fn a_list_that_is_used_twice_in_a_request_keeps_the_server_that_it_is_of() {
    let bench = replaced_after(1, &["a", "b"]).await;
    let mut lists = Lists::default();
    let publish = |topic: &str, id: &str| Publish {
        trace: None,
        to: Recipients::Topics { topics: vec![LogId::Topic(name(topic))], except: vec![] },
        event: None,
        payload: Bytes::from_static(b"1"),
        ttl_s: None,
        id: Some(crate::message::MessageId::parse(id).unwrap()),
    };
    let mut addressed = Vec::new();
    for (topic, id) in [("a", "1"), ("b", "2"), ("a", "3")] {
        addressed.push(bench.collect.address(publish(topic, id), &mut lists).await);
    }
    // As a batch of which only the last is stored now.
    let last = addressed.pop().unwrap();
    let published = bench.collect.publish_to(last, lists.deadline()).await;
    assert_eq!(published.problem(), None);
    assert_eq!(bench.stored_for("new").await, 1);
}

#[tokio::test]
async fn a_topic_that_ended_while_it_was_published_to_was_published_to() {
    let bench = replaced_after(1, &["team"]).await;
    bench.inbox.remove(name("team")).await.unwrap();
    let published = bench.publish(&["team"]).await;
    assert_eq!(published.problem(), None);
    assert_eq!(bench.stored_for("old").await, 1);
}

/// A hand-over that stood still on its way: a publish that its sender was answered long ago, or of
/// which nobody waits for the outcome, is refused, and nothing of it is stored.
#[tokio::test]
async fn a_publish_that_is_handed_over_too_late_is_refused() {
    let bench = replaced_after(0, &["team"]).await;
    let handed = |id: &str, accepted_at: Millis, left: Duration| crate::wire::peer::TopicWrite {
        log: LogId::Topic(name("team")),
        id: crate::message::MessageId::parse(id).unwrap(),
        append_id: id.into(),
        accepted_at,
        event: None,
        trace: None,
        payload: Bytes::from_static(b"1"),
        ttl_s: None,
        except: Vec::new(),
        left,
    };
    bench.clock.advance(publish::LATEST_TAKEN_S * 1_000);
    let now = bench.clock.now();
    let waits = Duration::from_secs(1);
    let second = bench.collect.take_over(handed("on time", Millis(1_000), waits)).0.await.unwrap();
    assert!(matches!(second, Ok(TopicOutcome::Members { members: 2, .. })), "{second:?}");
    for (id, accepted_at, left) in [("late", Millis(999), waits), ("nobody waits", now, Duration::ZERO)] {
        let written = bench.collect.take_over(handed(id, accepted_at, left)).0.await.unwrap();
        let refusal = written.expect_err(id);
        assert_eq!(refusal.status, 503, "{id}");
        assert!(refusal.detail.contains("too late"), "{}", refusal.detail);
    }
    assert_eq!((bench.stored_for("old").await, bench.stored_for("new").await), (1, 1));
}

/// A receipt that was lost: the collect that was handed a publish writes it, and so does the one
/// that took it. The message is stored once, and both tell its number.
#[tokio::test]
async fn a_publish_that_two_collects_write_is_stored_once() {
    let bench = replaced_after(0, &["news"]).await;
    let settings =
        TopicSettings { delivery: Some(crate::topic::Delivery::Log), ttl_s: None, default_ttl_s: 60 };
    bench.inbox.remove(name("news")).await.unwrap();
    bench.inbox.put(name("news"), settings).await.unwrap();
    let handed = |append_id: &str, payload: &'static [u8]| crate::wire::peer::TopicWrite {
        log: LogId::Topic(name("news")),
        id: crate::message::MessageId::parse("m-1").unwrap(),
        append_id: append_id.into(),
        accepted_at: Millis(1_000),
        event: None,
        trace: None,
        payload: Bytes::from_static(payload),
        ttl_s: None,
        except: Vec::new(),
        left: Duration::from_secs(1),
    };
    let mut seqs = Vec::new();
    for append_id in ["took", "took", "a repeat of the sender"] {
        match bench.collect.take_over(handed(append_id, b"1")).0.await.unwrap() {
            Ok(TopicOutcome::Log(outcome)) => seqs.push((outcome.seq, outcome.duplicate)),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((seqs[0].1, seqs[2].1), (false, true), "{seqs:?}");
    assert!(seqs.iter().all(|(seq, _)| *seq == seqs[0].0), "{seqs:?}");
    let other = bench.collect.take_over(handed("another message", b"2")).0.await.unwrap();
    assert_eq!(other.expect_err("a conflict").status, 409);
}
