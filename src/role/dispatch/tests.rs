//! Dispatch against nodes that write down what they are told.

use super::super::backlog::Queued;
use super::peer_queue::FAILURE_REST;
use super::*;
use crate::clock::Clock;
use crate::fallback::local::LocalFallback;
use crate::fallback::{Holder, Which};
use crate::interest::{Buckets, Interest, InterestError, Reader};
use crate::membership::local::LocalMembership;
use crate::membership::{Departure, NodeInfo};
use crate::message::{Message, MessageId, Millis, Seq};
use bytes::Bytes;
use tokio::sync::mpsc;
use tower::util::BoxCloneSyncService;

/// Calls that nobody has looked at yet; with more, a node does not answer.
const CALLS: usize = 64;

/// Every node of the test, each call with the node's name.
struct Nodes {
    calls: mpsc::Sender<(NodeId, Vec<u64>, bool)>,
    gone: mpsc::Sender<NodeId>,
    silent: Mutex<bool>,
    /// Whether they are in this process.
    here: Mutex<bool>,
}

impl PeerDirectory for Nodes {
    fn here(&self, node: &NodeId) -> Option<PushService> {
        if *self.here.lock() { self.find(node) } else { None }
    }

    fn find(&self, node: &NodeId) -> Option<PushService> {
        if *self.silent.lock() {
            return None;
        }
        let (calls, gone, node) = (self.calls.clone(), self.gone.clone(), node.clone());
        Some(BoxCloneSyncService::new(tower::service_fn(move |request| {
            let (calls, gone, node) = (calls.clone(), gone.clone(), node.clone());
            async move {
                match request {
                    PushRequest::Deliver { batch, sweep, .. } => {
                        let seqs = batch.iter().map(|live| live.message.seq.get()).collect();
                        let _ = calls.send((node, seqs, sweep)).await;
                    }
                    PushRequest::Hint { hints, .. } => {
                        let seqs = hints.iter().filter_map(|hint| match hint {
                            LogHint::Message { message, .. } => Some(message.seq.get()),
                            _ => None,
                        });
                        let _ = calls.send((node, seqs.collect(), false)).await;
                    }
                    PushRequest::Gone(_) => drop(gone.send(node).await),
                    _ => {}
                }
                Ok(PushResponse::Done(ViewVersion::default()))
            }
        })))
    }
}

/// Bitmaps that are known at once.
#[derive(Clone, Default)]
struct Published(Arc<Mutex<HashMap<Reader, Arc<Buckets>>>>);

impl Interest for Published {
    fn publish(&self, reader: &Reader, buckets: Arc<Buckets>) -> BoxFuture<'_, Result<bool, InterestError>> {
        self.0.lock().insert(reader.clone(), buckets);
        std::future::ready(Ok(true)).boxed()
    }

    fn may_read(&self, reader: &Reader, log: &LogId) -> bool {
        self.0.lock().get(reader).is_none_or(|buckets| buckets.has(log))
    }
}

struct Bench {
    membership: LocalMembership,
    fallback: LocalFallback,
    interest: Published,
    nodes: Arc<Nodes>,
    dispatch: Dispatch,
    calls: mpsc::Receiver<(NodeId, Vec<u64>, bool)>,
    gone: mpsc::Receiver<NodeId>,
    _tasks: JoinSet<()>,
}

async fn bench(names: &[&str]) -> Bench {
    let membership = LocalMembership::new(Clock::standing(Millis(1000)));
    for name in names {
        membership.join(info(name)).await.unwrap();
    }
    let (fallback, interest) = (LocalFallback::default(), Published::default());
    let (sender, calls) = mpsc::channel(CALLS);
    let (told, gone) = mpsc::channel(8);
    let nodes =
        Arc::new(Nodes { calls: sender, gone: told, silent: Mutex::default(), here: Mutex::default() });
    let mut tasks = JoinSet::new();
    let dispatch = Dispatch::start(
        Arc::new(membership.clone()),
        Arc::new(fallback.clone()),
        Arc::new(interest.clone()),
        Arc::clone(&nodes) as _,
        &Metrics::default(),
        &mut tasks,
    );
    Bench { membership, fallback, interest, nodes, dispatch, calls, gone, _tasks: tasks }
}

fn info(name: &str) -> NodeInfo {
    NodeInfo {
        node: NodeId::parse(name).unwrap(),
        weight: 1.0,
        accept_per_s: 4000,
        peer: "".into(),
        push: true,
        dispatch: false,
        store: "".into(),
        ticket_in_auth: false,
    }
}

fn live(user: &str, seq: u64) -> LiveMessage {
    let message = Message {
        trace: None,
        seq: Seq::at(seq),
        id: MessageId::parse("m").unwrap(),
        accepted_at: Millis(0),
        expires_at: Millis(u64::MAX),
        event: None,
        via: None,
        payload: Bytes::from_static(b"1"),
    };
    LiveMessage { user: UserId::parse(user).unwrap(), message: Arc::new(message) }
}

impl Bench {
    async fn deliver(&mut self, batch: Vec<LiveMessage>) {
        let stamp = self.membership.views().borrow().stamp();
        self.dispatch.call(DispatchRequest::Deliver { batch, missed: false, stamp }).await.unwrap();
    }

    async fn next(&mut self) -> (String, Vec<u64>, bool) {
        let call = tokio::time::timeout(Duration::from_secs(5), self.calls.recv()).await.unwrap().unwrap();
        (call.0.to_string(), call.1, call.2)
    }

    async fn targets(&mut self, count: usize) -> Vec<String> {
        let mut names = Vec::new();
        for _ in 0..count {
            names.push(self.next().await.0);
        }
        names.sort();
        names
    }
}

#[tokio::test(start_paused = true)]
async fn a_message_goes_to_its_owner_alone() {
    let mut bench = bench(&["push-0", "push-1", "push-2", "push-3", "push-4"]).await;
    bench.deliver(vec![live("alice", 7)]).await;
    assert_eq!(bench.next().await, ("push-3".to_owned(), vec![7], false));
    bench.deliver(vec![live("alice", 8), live("bob", 1), live("carol", 2)]).await;
    let mut calls = [bench.next().await, bench.next().await];
    calls.sort();
    assert_eq!(calls[0], ("push-2".to_owned(), vec![1], false));
    assert_eq!(calls[1], ("push-3".to_owned(), vec![8, 2], false), "one call carries a node's whole share");
}

#[tokio::test(start_paused = true)]
async fn the_owner_of_a_moment_ago_is_sent_to_for_thirty_seconds() {
    let mut bench = bench(&["push-0", "push-1", "push-2", "push-4"]).await;
    bench.deliver(vec![live("alice", 7)]).await;
    let before = bench.next().await.0;
    bench.membership.join(info("push-3")).await.unwrap();
    bench.deliver(vec![live("alice", 8)]).await;
    let mut both = vec![before, "push-3".to_owned()];
    both.sort();
    assert_eq!(bench.targets(2).await, both);
    tokio::time::advance(RECENT_VIEW_LIFE + Duration::from_secs(1)).await;
    bench.deliver(vec![live("alice", 9)]).await;
    assert_eq!(bench.next().await, ("push-3".to_owned(), vec![9], false));
    assert!(bench.calls.try_recv().is_err());
}

#[tokio::test(start_paused = true)]
async fn a_displaced_user_is_sent_to_where_it_is_too() {
    let mut bench = bench(&["push-0", "push-1", "push-2", "push-3", "push-4"]).await;
    let elsewhere = Holder { node: NodeId::parse("push-0").unwrap(), incarnation: 1 };
    bench.fallback.add(&elsewhere, vec![UserId::parse("alice").unwrap()]).await.unwrap();
    bench.deliver(vec![live("alice", 7)]).await;
    assert_eq!(bench.targets(2).await, ["push-0", "push-3"]);
    assert_eq!(bench.dispatch.inner.metrics.fallback_lookups.get(), 1);
    bench.fallback.remove(&elsewhere, Which::All).await.unwrap();
    bench.deliver(vec![live("alice", 8)]).await;
    assert_eq!(bench.targets(1).await, ["push-3"]);
    assert_eq!(bench.dispatch.inner.metrics.fallback_lookups.get(), 1, "nobody displaced, nobody asked");
}

#[tokio::test(start_paused = true)]
async fn a_node_that_missed_something_is_told_to_look_for_itself() {
    let mut bench = bench(&["push-3"]).await;
    *bench.nodes.silent.lock() = true;
    bench.deliver(vec![live("alice", 7)]).await;
    tokio::time::sleep(FAILURE_REST * 3).await;
    *bench.nodes.silent.lock() = false;
    assert_eq!(bench.next().await, ("push-3".to_owned(), vec![], true));
    bench.deliver(vec![live("alice", 8)]).await;
    assert_eq!(bench.next().await, ("push-3".to_owned(), vec![8], false));
}

#[tokio::test(start_paused = true)]
async fn a_full_lane_drops_the_hint_and_says_so() {
    let backlog = Backlog::default();
    let many: Vec<LiveMessage> = (0..LiveMessage::ITEMS as u64 + 5).map(|n| live("alice", n)).collect();
    assert_eq!(backlog.put(many), 5);
    let (first, sweep) = backlog.take().await;
    assert_eq!((first.len(), sweep), (LiveMessage::BATCH, true));
    assert!(!backlog.take().await.1, "it is said once");
}

#[tokio::test(start_paused = true)]
async fn nothing_goes_past_what_is_before_it() {
    let backlog = Arc::new(Backlog::default());
    let ahead = backlog.go_ahead().unwrap();
    assert!(backlog.go_ahead().is_none() && !backlog.is_idle(), "one is on its way");
    backlog.put(vec![live("alice", 2)]);
    let taking = tokio::spawn({
        let backlog = Arc::clone(&backlog);
        async move { backlog.take().await }
    });
    tokio::task::yield_now().await;
    assert!(!taking.is_finished(), "it waits for what went ahead");
    drop(ahead);
    let taken = tokio::time::timeout(Duration::from_secs(1), taking).await.expect("nobody told it").unwrap();
    assert_eq!(taken.0.len(), 1);
    assert!(backlog.go_ahead().is_none() && !backlog.is_idle(), "what was taken is on its way");
    backlog.put(vec![live("alice", 3)]);
    assert_eq!(backlog.take().await.0.len(), 1);
    assert!(backlog.take().now_or_never().is_none());
    let ahead = backlog.go_ahead().unwrap();
    backlog.mark_missed();
    assert!(backlog.take().now_or_never().is_none());
    drop(ahead);
    assert!(backlog.go_ahead().is_none(), "somebody has to be told of a miss before");
    assert!(backlog.take().await.1);
}

#[tokio::test(start_paused = true)]
async fn a_node_of_this_process_has_a_batch_at_once_and_in_order() {
    let mut bench = bench(&["push-0"]).await;
    *bench.nodes.here.lock() = true;
    bench.deliver(vec![live("alice", 7), live("bob", 1)]).await;
    assert_eq!(bench.calls.try_recv().unwrap().1, [7, 1], "no other task had a turn yet");
    let lane = bench.dispatch.queue(&NodeId::parse("push-0").unwrap());
    let ahead = lane.go_ahead().unwrap();
    bench.deliver(vec![live("alice", 8)]).await;
    bench.deliver(vec![live("alice", 9)]).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    bench.calls.try_recv().unwrap_err();
    drop(ahead);
    assert_eq!(bench.next().await.1, [8, 9]);
    tokio::task::yield_now().await;
    bench.deliver(vec![live("alice", 10)]).await;
    assert_eq!(bench.calls.try_recv().unwrap().1, [10]);
}

#[tokio::test(start_paused = true)]
async fn a_node_of_this_process_that_does_not_answer_at_once_is_told_to_look_for_itself() {
    let mut bench = bench(&["push-0"]).await;
    *bench.nodes.here.lock() = true;
    for seq in 0..=CALLS as u64 {
        bench.deliver(vec![live("alice", seq)]).await;
    }
    assert_eq!(bench.dispatch.inner.metrics.dropped.get(), 1);
    for seq in 0..CALLS as u64 {
        assert_eq!(bench.next().await, ("push-0".to_owned(), vec![seq], false));
    }
    assert_eq!(bench.next().await, ("push-0".to_owned(), vec![], true));
}

#[tokio::test(start_paused = true)]
async fn a_sender_that_missed_something_makes_every_node_look() {
    let mut bench = bench(&["push-0", "push-1"]).await;
    let stamp = ViewVersion::default();
    bench.dispatch.call(DispatchRequest::Deliver { batch: Vec::new(), missed: true, stamp }).await.unwrap();
    let mut calls = [bench.next().await, bench.next().await];
    calls.sort();
    assert_eq!(calls, [("push-0".to_owned(), vec![], true), ("push-1".to_owned(), vec![], true)]);
}

#[tokio::test(start_paused = true)]
async fn a_batch_is_routed_again_when_somebody_has_a_newer_view() {
    let mut bench = bench(&["push-0", "push-1", "push-2", "push-4"]).await;
    let older = bench.membership.views().borrow().stamp();
    let newer = ViewVersion { epoch: older.epoch + 1, digest: older.digest + 1, ..older };
    let tell = |bench: &mut Bench, seq: u64| {
        let batch = vec![live("alice", seq)];
        bench.dispatch.call(DispatchRequest::Deliver { batch, missed: false, stamp: newer.clone() })
    };
    tell(&mut bench, 7).await.unwrap();
    let before = bench.next().await.0;
    // The first one waits for the view already; the second must not wait for yet another.
    tokio::time::sleep(Duration::from_millis(1)).await;
    tell(&mut bench, 8).await.unwrap();
    assert_eq!(bench.next().await.0, before);
    bench.membership.join(info("push-3")).await.unwrap();
    let mut again = Vec::new();
    while again.len() < 2 {
        let (node, seqs, _) = bench.next().await;
        assert_eq!(node, "push-3");
        again.extend(seqs);
    }
    assert_eq!(again, [7, 8]);
    assert_ne!(before, "push-3");
}

#[tokio::test(start_paused = true)]
async fn a_node_that_left_the_view_is_told_so() {
    let mut bench = bench(&["push-0", "push-1"]).await;
    let one = bench.membership.views().borrow().members[1].clone();
    bench.membership.depart(&one.info.node, one.incarnation, Departure::Left).await.unwrap();
    let gone = tokio::time::timeout(Duration::from_secs(5), bench.gone.recv()).await.unwrap().unwrap();
    assert_eq!(gone.as_str(), "push-1");
}

#[tokio::test(start_paused = true)]
async fn without_a_node_nothing_is_sent_and_nothing_fails() {
    let mut bench = bench(&[]).await;
    bench.deliver(vec![live("alice", 7)]).await;
    assert_eq!(bench.dispatch.inner.metrics.unowned.get(), 1);
    let DispatchResponse::Found { owner, sessions } =
        bench.dispatch.call(DispatchRequest::Lookup(UserId::parse("alice").unwrap())).await.unwrap()
    else {
        panic!("not an answer to a lookup");
    };
    assert_eq!((owner, sessions.len()), (None, 0));
}

/// A message to a topic goes to the nodes that may read it; a change of memberships to all.
#[tokio::test]
async fn messages_of_a_log_go_to_its_readers_alone() {
    let mut bench = bench(&["push-0", "push-1", "push-2"]).await;
    let log = |name: &str| LogId::Topic(crate::message::TopicName::parse(name).unwrap());
    let view = Arc::clone(&bench.membership.views().borrow());
    for (name, reads) in [("push-0", Some("news")), ("push-1", None)] {
        let node = NodeId::parse(name).unwrap();
        let reader = Reader { incarnation: view.member(&node).unwrap().incarnation, node };
        let logs: Vec<LogId> = reads.map(log).into_iter().collect();
        bench.interest.publish(&reader, Arc::new(Buckets::of(&logs))).await.unwrap();
    }
    let message = |seq| live("alice", seq).message;
    let hint = |log: LogId, seq| LogHint::Message { log, message: message(seq) };
    let dispatch = bench.dispatch.clone();
    let tell = async |hints: Vec<LogHint>| {
        let request = DispatchRequest::Hint { hints, missed: false, stamp: ViewVersion::default() };
        dispatch.clone().oneshot(request).await.unwrap();
    };
    let mut heard = async |count: usize| {
        let mut heard = Vec::new();
        for _ in 0..count {
            let (node, seqs, _) = bench.calls.recv().await.unwrap();
            heard.push((node.to_string(), seqs));
        }
        heard.sort();
        heard
    };
    let at = |node: &str, seqs: &[u64]| (node.to_owned(), seqs.to_vec());
    // Nothing is known of push-2: it has it too.
    tell(vec![hint(log("news"), 1), hint(log("other"), 2)]).await;
    assert_eq!(heard(2).await, [at("push-0", &[1]), at("push-2", &[1, 2])]);
    // One that has ended before its time may stand in a block of any node.
    let ended = Message { expires_at: Millis(0), ..Message::clone(&message(4)) };
    tell(vec![LogHint::Message { log: log("other"), message: Arc::new(ended) }]).await;
    assert_eq!(heard(3).await, [at("push-0", &[4]), at("push-1", &[4]), at("push-2", &[4])]);
    tell(vec![hint(LogId::Everyone, 3)]).await;
    assert_eq!(heard(3).await, [at("push-0", &[3]), at("push-1", &[3]), at("push-2", &[3])]);
    tell(vec![LogHint::Memberships(vec![UserId::parse("alice").unwrap()])]).await;
    assert_eq!(heard(3).await, [at("push-0", &[]), at("push-1", &[]), at("push-2", &[])]);
}
