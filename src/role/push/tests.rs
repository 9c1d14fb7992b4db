//! Push nodes in one process, on a stopped clock, with sockets made of channels.

mod logs;
mod placement;
mod sending;

use std::pin::Pin;
use std::sync::atomic::AtomicUsize;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use serde_json::Value;
use tokio::sync::mpsc;
use tower::ServiceExt;
use tower::util::BoxCloneSyncService;

use parking_lot::Mutex;

use super::*;
use crate::clock::Clock;
use crate::fallback::Fallback;
use crate::fallback::local::LocalFallback;
use crate::inbox::memory::MemoryInbox;
use crate::inbox::{
    Append, Appended, Appender, Change, Inbox, InboxError, InboxPage, Logs, PageLimit, PositionQuery,
    Profile, Sought, Stores, UserPosition, WriteObserver,
};
use crate::live::Live;
use crate::membership::local::LocalMembership;
use crate::membership::{LeaseState, NodeInfo};
use crate::message::{LogId, Message, MessageId, Millis, Seq, UserId};
use crate::ring::Ring;
use crate::role::connect::PublicUrls;
use crate::role::reach::PeerProbe;
use crate::telemetry::{Health, Refusals};
use crate::ticket::TicketKey;
use crate::wire::address::UrlTemplate;
use crate::wire::close::CloseCode;
use crate::wire::peer::{Identity, VerifyRequest};

const NOW: Millis = Millis(1_795_380_000_000);

/// A socket of two channels, which takes all that is sent while it is not full.
struct Wire {
    incoming: mpsc::Receiver<Incoming>,
    outgoing: mpsc::Sender<Outgoing>,
    unwritten: Vec<Outgoing>,
    flushed: Arc<tokio::sync::Notify>,
    full: Arc<Full>,
}

/// Whether a socket takes nothing, and who waits for it to.
#[derive(Default)]
struct Full {
    full: std::sync::atomic::AtomicBool,
    waits: futures_util::task::AtomicWaker,
}

impl Full {
    fn set(&self, full: bool) {
        self.full.store(full, std::sync::atomic::Ordering::SeqCst);
        self.waits.wake();
    }
}

impl Stream for Wire {
    type Item = Result<Incoming, SocketError>;
    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.incoming.poll_recv(cx).map(|next| next.map(Ok))
    }
}

impl Sink<Outgoing> for Wire {
    type Error = SocketError;
    fn poll_ready(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), SocketError>> {
        Poll::Ready(Ok(()))
    }
    fn start_send(mut self: Pin<&mut Self>, outgoing: Outgoing) -> Result<(), SocketError> {
        self.unwritten.push(outgoing);
        Ok(())
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), SocketError>> {
        self.full.waits.register(cx.waker());
        if self.full.full.load(std::sync::atomic::Ordering::SeqCst) {
            return Poll::Pending;
        }
        for outgoing in std::mem::take(&mut self.unwritten) {
            if self.outgoing.try_send(outgoing).is_err() {
                return Poll::Ready(Err(SocketError::Gone));
            }
        }
        self.flushed.notify_one();
        Poll::Ready(Ok(()))
    }
    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), SocketError>> {
        Poll::Ready(Ok(()))
    }
}

/// What is wrong with an inbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trouble {
    None,
    /// It never responds about positions, like a database that hangs.
    Hangs,
    /// Reading a page of bob panics.
    Panics,
    /// It refuses to read pages.
    Refuses,
}

/// How often an inbox was asked for positions, and for pages.
#[derive(Default)]
struct Asked {
    positions: AtomicUsize,
    /// By the inbox or log.
    pages: Mutex<std::collections::HashMap<String, usize>>,
}

impl Asked {
    fn positions(&self) -> usize {
        self.positions.load(std::sync::atomic::Ordering::SeqCst)
    }

    fn pages(&self) -> usize {
        self.pages.lock().values().sum()
    }

    fn pages_of(&self, of: &str) -> usize {
        self.pages.lock().get(of).copied().unwrap_or_default()
    }
}

/// An inbox with a trouble, which counts what it is asked.
struct Faulty(Arc<MemoryInbox>, Trouble, Arc<Asked>);

impl Inbox for Faulty {
    fn forget(&self, user: UserId) -> BoxFuture<'_, Result<(), InboxError>> {
        self.0.forget(user)
    }

    fn append(&self, batch: Vec<Append>) -> BoxFuture<'_, Vec<Result<Appended, InboxError>>> {
        self.0.append(batch)
    }
    fn positions(&self, batch: Vec<PositionQuery>) -> BoxFuture<'_, Result<Vec<UserPosition>, InboxError>> {
        self.2.positions.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        match self.1 {
            Trouble::Hangs => Box::pin(std::future::pending()),
            _ => self.0.positions(batch),
        }
    }
    fn page(
        &self,
        user: UserId,
        after: Seq,
        limit: PageLimit,
    ) -> BoxFuture<'_, Result<InboxPage, InboxError>> {
        assert!(self.1 != Trouble::Panics || user.as_str() != "bob", "the page of bob");
        *self.2.pages.lock().entry(user.as_str().to_owned()).or_default() += 1;
        let trouble = self.1;
        let page = self.0.page(user, after, limit);
        Box::pin(async move {
            // As with a real store, others ask meanwhile.
            tokio::time::sleep(Duration::from_millis(1)).await;
            match trouble {
                Trouble::Refuses => Err(InboxError::Unavailable("it refuses".to_owned())),
                _ => page.await,
            }
        })
    }
    fn stored(&self, user: UserId, which: Sought) -> BoxFuture<'_, Result<Option<Message>, InboxError>> {
        self.0.stored(user, which)
    }
    fn profile(&self, user: UserId) -> BoxFuture<'_, Result<Profile, InboxError>> {
        self.0.profile(user)
    }
    fn update(&self, changes: Vec<Change>) -> BoxFuture<'_, Result<(), InboxError>> {
        self.0.update(changes)
    }
    fn log_positions(
        &self,
        devices: Vec<crate::inbox::Device>,
    ) -> BoxFuture<'_, Result<Vec<crate::inbox::Positions>, InboxError>> {
        self.0.log_positions(devices)
    }
    fn appender(self: Arc<Self>, observer: Arc<dyn WriteObserver>, tasks: &mut JoinSet<()>) -> Appender {
        Arc::clone(&self.0).appender(observer, tasks)
    }
    fn gathers_lookups(&self) -> bool {
        true
    }
}

struct Client {
    user: String,
    says: mpsc::Sender<Incoming>,
    hears: mpsc::Receiver<Outgoing>,
    full: Arc<Full>,
}

impl Client {
    /// The next frame that is no ping, on a clock that runs as fast as nothing else happens.
    async fn next(&mut self) -> Outgoing {
        loop {
            let next = tokio::time::timeout(Duration::from_secs(120), self.hears.recv()).await;
            match next.expect("a frame in time").expect("an open socket") {
                Outgoing::Ping => self.says.send(Incoming::Alive).await.unwrap(),
                other => return other,
            }
        }
    }

    async fn frame(&mut self) -> Value {
        match self.next().await {
            Outgoing::Text(text) => serde_json::from_slice(&text).unwrap(),
            other => panic!("{other:?}"),
        }
    }

    async fn expect(&mut self, kind: &str) -> Value {
        let frame = self.frame().await;
        assert_eq!(frame["type"], kind, "{frame}");
        frame
    }

    /// What came until now, but for pings.
    fn heard(&mut self) -> Vec<Outgoing> {
        std::iter::from_fn(|| self.hears.try_recv().ok()).filter(|frame| *frame != Outgoing::Ping).collect()
    }
}

/// Every node of the test, each answering as itself.
#[derive(Default)]
struct Known(Mutex<std::collections::HashMap<NodeId, crate::role::PushService>>);

impl crate::role::PeerDirectory for Known {
    fn find(&self, node: &NodeId) -> Option<crate::role::PushService> {
        self.0.lock().get(node).cloned()
    }
}

struct Cluster {
    known: Arc<Known>,
    membership: LocalMembership,
    fallback: LocalFallback,
    inbox: Arc<MemoryInbox>,
    logs: Arc<MemoryInbox>,
    /// What nodes have asked of the logs.
    logs_asked: Arc<Asked>,
    trouble: Trouble,
    limits: PushLimits,
    clock: Clock,
    nodes: Vec<Push>,
    /// Of each node.
    healths: Vec<Health>,
    tasks: JoinSet<()>,
}

impl Cluster {
    async fn of(names: &[&str]) -> Self {
        let clock = Clock::standing(NOW);
        let mut cluster = Self {
            known: Arc::default(),
            membership: LocalMembership::new(clock.clone()),
            fallback: LocalFallback::default(),
            inbox: Arc::new(MemoryInbox::new(clock.clone())),
            logs: Arc::new(MemoryInbox::new(clock.clone())),
            logs_asked: Arc::default(),
            trouble: Trouble::None,
            limits: PushLimits::default(),
            clock,
            nodes: Vec::new(),
            healths: Vec::new(),
            tasks: JoinSet::new(),
        };
        for name in names {
            cluster.join(name).await;
        }
        cluster
    }

    async fn join(&mut self, name: &str) {
        let config = PushConfig {
            info: NodeInfo {
                node: NodeId::parse(name).unwrap(),
                weight: 1.0,
                accept_per_s: 4000,
                peer: "".into(),
                push: true,
                dispatch: false,
                store: "".into(),
                ticket_in_auth: false,
            },
            drain_window: Duration::from_secs(60),
            origins: Live::new(Origins::Any),
            token_in_url: false,
            limits: self.limits,
            live: Arc::new(LiveLimits::of(&self.limits)),
        };
        // Here a token is the user's name: what verifies it is another room's affair.
        let verify = BoxCloneSyncService::new(tower::service_fn(async |request: VerifyRequest| {
            Ok(Identity {
                user: UserId::parse(&request.token).unwrap(),
                issued_at_s: NOW.seconds(),
                expires_at_s: NOW.seconds() + 1_000_000,
                claims: Bytes::new(),
            })
        }));
        let health = Health::default();
        self.healths.push(health.clone());
        let parts = PushParts {
            interest: Arc::new(crate::interest::local::Everywhere),
            stores: Stores {
                inbox: Arc::new(Faulty(Arc::clone(&self.inbox), self.trouble, Arc::default())),
                topics: Arc::clone(&self.inbox) as _,
                logs: Logs::new(Arc::new(Faulty(
                    Arc::clone(&self.logs),
                    if self.trouble == Trouble::Refuses { Trouble::Refuses } else { Trouble::None },
                    Arc::clone(&self.logs_asked),
                ))),
            },
            verify,
            membership: Arc::new(self.membership.clone()),
            fallback: Arc::new(self.fallback.clone()),
            reach: PeerProbe::new(Arc::clone(&self.known) as _),
            health,
            urls: PublicUrls::Template(UrlTemplate::parse("wss://push.example/n/{node}/v1/ws").unwrap()),
            ticket_key: TicketKey::derive(&["secret"]),
            clock: self.clock.clone(),
            metrics: PushMetrics::default(),
            refusals: Refusals::default(),
        };
        let node = Push::start(config, parts, &mut self.tasks).await.unwrap();
        let service = BoxCloneSyncService::new(node.clone());
        self.known.0.lock().insert(node.name().clone(), service);
        self.nodes.push(node);
    }

    /// Opens a socket; answers when something was flushed to it.
    async fn open(&self, node: usize, user: &str) -> Client {
        self.open_with(node, user, "").await
    }

    async fn open_with(&self, node: usize, user: &str, query: &str) -> Client {
        let request = SocketRequest { bearer: Some(user), query, ..SocketRequest::default() };
        let admission = self.nodes[node].admit(request).await.unwrap();
        let ((says, incoming), (outgoing, hears)) = (mpsc::channel(64), mpsc::channel(1024));
        let flushed = Arc::new(tokio::sync::Notify::new());
        let full = Arc::<Full>::default();
        let (unwritten, of_wire) = (Vec::new(), Arc::clone(&full));
        let wire = Wire { incoming, outgoing, unwritten, flushed: Arc::clone(&flushed), full: of_wire };
        tokio::spawn(self.nodes[node].serve(admission, std::future::ready(Some(wire))));
        tokio::time::timeout(Duration::from_secs(1), flushed.notified()).await.expect("a flush in time");
        Client { user: user.to_owned(), says, hears, full }
    }

    async fn connect(&self, node: usize, user: &str) -> Client {
        let mut client = self.open(node, user).await;
        client.expect("welcome").await;
        client.expect("caught_up").await;
        client
    }

    /// Stored, and nobody is told.
    async fn store(&self, user: &str, payload: &'static str) -> Arc<Message> {
        let item = Append {
            trace: None,
            append_id: None,
            user: UserId::parse(user).unwrap(),
            id: MessageId::parse("m").unwrap(),
            deduplicated: false,
            accepted_at: NOW,
            expires_at: NOW.plus_seconds(3600),
            event: None,
            via: None,
            payload: Bytes::from_static(payload.as_bytes()),
        };
        match self.inbox.append(vec![item]).await.remove(0) {
            Ok(Appended::Stored(message)) => message,
            other => panic!("{other:?}"),
        }
    }

    async fn deliver(&self, node: usize, user: &str, message: Arc<Message>, sweep: bool) {
        let batch = vec![LiveMessage { user: UserId::parse(user).unwrap(), message }];
        let request = PushRequest::Deliver { batch: batch.into(), sweep, stamp: ViewVersion::default() };
        self.nodes[node].clone().oneshot(request).await.unwrap();
    }
}

fn owner(names: &[&str], user: &str) -> String {
    Ring::build(names.iter().map(|name| (*name, 1.0))).owner_of(user).unwrap().to_owned()
}

#[tokio::test(start_paused = true)]
async fn the_sweep_finds_what_no_hint_told_of() {
    let cluster = Cluster::of(&["push-0"]).await;
    let mut client = cluster.connect(0, "alice").await;
    let message = cluster.store("alice", "1").await;
    let began = tokio::time::Instant::now();
    assert_eq!(client.expect("message").await["seq"], message.seq.get());
    let period = sweep::SWEEP_EVERY.mul_f64(1.0 + sweep::SWEEP_JITTER);
    assert!(began.elapsed() <= period + Duration::from_secs(1), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_hint_that_leaves_a_gap_brings_all_that_is_missing() {
    let cluster = Cluster::of(&["push-0"]).await;
    let mut client = cluster.connect(0, "alice").await;
    let mut last = cluster.store("alice", "0").await;
    for _ in 0..9 {
        last = cluster.store("alice", "0").await;
    }
    cluster.deliver(0, "alice", Arc::clone(&last), false).await;
    for n in 0..10 {
        assert_eq!(client.expect("message").await["seq"], last.seq.get() - 9 + n);
    }
    cluster.deliver(0, "alice", last, false).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(client.heard(), [], "what comes again is not sent again");
}

#[tokio::test(start_paused = true)]
async fn a_lane_that_dropped_something_has_the_node_look_for_itself_at_once() {
    let cluster = Cluster::of(&["push-0"]).await;
    let (mut alice, mut bob) = (cluster.connect(0, "alice").await, cluster.connect(0, "bob").await);
    cluster.store("alice", "\"dropped\"").await;
    let told = cluster.store("bob", "\"told\"").await;
    let began = tokio::time::Instant::now();
    cluster.deliver(0, "bob", told, true).await;
    bob.expect("message").await;
    assert_eq!(alice.expect("message").await["payload"], "dropped");
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn what_went_by_before_the_fallback_entry_stood_is_read_at_once() {
    let mut cluster = Cluster::of(&["push-0"]).await;
    let mut clients = Vec::new();
    let moving =
        (0..).map(|n| format!("user-{n}")).filter(|user| owner(&["push-0", "push-1"], user) == "push-1");
    for user in moving.take(20) {
        clients.push(cluster.connect(0, &user).await);
    }
    for client in &clients {
        cluster.store(&client.user, "1").await;
    }
    cluster.join("push-1").await;
    // Long before a sweep would have come by all of them.
    tokio::time::sleep(Duration::from_secs(2)).await;
    for client in &mut clients {
        let texts: Vec<String> = client.heard().iter().map(|frame| format!("{frame:?}")).collect();
        assert!(texts.iter().any(|text| text.contains("message")), "{}: {texts:?}", client.user);
    }
}
