//! Push nodes in one process, on a stopped clock, with sockets made of channels.

use std::pin::Pin;

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
    Append, Appended, Appender, Change, Inbox, InboxError, InboxPage, PageLimit, PositionLookup,
    PositionQuery, Profile, UserPosition, WriteObserver,
};
use crate::membership::local::LocalMembership;
use crate::membership::{LeaseState, NodeInfo};
use crate::message::{Message, MessageId, Millis, Seq, UserId};
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
}

/// An inbox with a trouble.
struct Faulty(Arc<MemoryInbox>, Trouble);

impl Inbox for Faulty {
    fn append(&self, batch: Vec<Append>) -> BoxFuture<'_, Vec<Result<Appended, InboxError>>> {
        self.0.append(batch)
    }
    fn positions(&self, batch: Vec<PositionQuery>) -> BoxFuture<'_, Result<Vec<UserPosition>, InboxError>> {
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
        self.0.page(user, after, limit)
    }
    fn profile(&self, user: UserId) -> BoxFuture<'_, Result<Profile, InboxError>> {
        self.0.profile(user)
    }
    fn update(&self, changes: Vec<Change>) -> BoxFuture<'_, Result<(), InboxError>> {
        self.0.update(changes)
    }
    fn appender(self: Arc<Self>, observer: Arc<dyn WriteObserver>, tasks: &mut JoinSet<()>) -> Appender {
        Arc::clone(&self.0).appender(observer, tasks)
    }
    fn lookup(self: Arc<Self>, tasks: &mut JoinSet<()>) -> PositionLookup {
        PositionLookup::queued(self, tasks)
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
    trouble: Trouble,
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
            trouble: Trouble::None,
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
            },
            drain_window: Duration::from_secs(60),
            origins: Origins::Any,
            token_in_url: false,
            limits: PushLimits::default(),
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
            inbox: Arc::new(Faulty(Arc::clone(&self.inbox), self.trouble)),
            verify,
            membership: Arc::new(self.membership.clone()),
            fallback: Arc::new(self.fallback.clone()),
            reach: PeerProbe::new(Arc::clone(&self.known) as _),
            health,
            urls: PublicUrls::Template(UrlTemplate::parse("wss://push.example/n/{node}/v1/ws").unwrap()),
            ticket_key: TicketKey::derive("secret"),
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
        let request = SocketRequest { bearer: Some(user), ..SocketRequest::default() };
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
            user: UserId::parse(user).unwrap(),
            id: MessageId::parse("m").unwrap(),
            deduplicated: false,
            accepted_at: NOW,
            expires_at: NOW.plus_seconds(3600),
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
async fn when_a_node_joins_exactly_those_whose_owner_changed_are_told_to_move() {
    let mut cluster = Cluster::of(&["push-0"]).await;
    let mut clients = Vec::new();
    for n in 0..60 {
        clients.push(cluster.connect(0, &format!("user-{n}")).await);
    }
    cluster.join("push-1").await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    let mut moved = 0;
    for client in &mut clients {
        let frames = client.heard();
        if owner(&["push-0", "push-1"], &client.user) == "push-0" {
            assert_eq!(frames, [], "{} stays", client.user);
            continue;
        }
        moved += 1;
        let [Outgoing::Text(frame)] = frames.as_slice() else { panic!("{}: {frames:?}", client.user) };
        let frame: Value = serde_json::from_slice(frame).unwrap();
        assert_eq!(
            (&frame["type"], &frame["node"], &frame["reason"]),
            (&"move".into(), &"push-1".into(), &"owner".into())
        );
        assert!(
            frame["url"].as_str().unwrap().starts_with("wss://push.example/n/push-1/v1/ws?hops=1&epoch=")
        );
    }
    assert!((10..50).contains(&moved), "{moved} of 60 moved");
    assert_eq!(cluster.nodes[0].counts().displaced, moved, "until they have moved, they are displaced");
    // A client that ignores it is served where it is, and not told again.
    let kept = clients.iter().position(|c| owner(&["push-0", "push-1"], &c.user) == "push-1").unwrap();
    let user = clients[kept].user.clone();
    let message = cluster.store(&user, "1").await;
    cluster.deliver(0, &user, message, false).await;
    clients[kept].expect("message").await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(clients[kept].heard(), []);
    // When all have gone, nothing of them is left.
    drop(clients);
    tokio::time::sleep(Duration::from_secs(5)).await;
    let left = cluster.nodes[0].counts();
    assert_eq!((left.sessions, left.displaced), (0, 0));
    assert!(cluster.fallback.hints().empty);
}

#[tokio::test(start_paused = true)]
async fn whoever_goes_is_taken_out_of_the_fallback_set_with_all_who_go_about_then() {
    let mut cluster = Cluster::of(&["push-0"]).await;
    let mut displaced = Vec::new();
    for n in 0..60 {
        let client = cluster.connect(0, &format!("user-{n}")).await;
        if owner(&["push-0", "push-1"], &client.user) == "push-1" {
            displaced.push(client);
        }
    }
    cluster.join("push-1").await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(cluster.nodes[0].counts().displaced, displaced.len() as u64);
    let mut seen = std::collections::HashSet::new();
    for _ in 0..10 {
        drop(displaced.pop());
        tokio::time::sleep(Duration::from_millis(10)).await;
        seen.insert(cluster.nodes[0].counts().displaced);
    }
    assert!(seen.len() <= 2, "ten in a tenth of a second are one removal or two: {seen:?}");
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(cluster.nodes[0].counts().displaced, displaced.len() as u64);
}

#[tokio::test(start_paused = true)]
async fn a_node_that_drains_sends_everybody_away_and_leaves_nothing() {
    let cluster = Cluster::of(&["push-0", "push-1"]).await;
    let mut clients = Vec::new();
    let own =
        (0..).map(|n| format!("user-{n}")).filter(|user| owner(&["push-0", "push-1"], user) == "push-0");
    for user in own.take(40) {
        clients.push(cluster.connect(0, &user).await);
    }
    let node = cluster.nodes[0].clone();
    let draining = tokio::spawn(async move { node.drain(Drain::Move(Duration::from_secs(60))).await });
    let began = tokio::time::Instant::now();
    for client in &mut clients {
        let frame = client.expect("move").await;
        assert_eq!((&frame["node"], &frame["reason"]), (&"push-1".into(), &"drain".into()));
        assert!(frame["url"].as_str().unwrap().contains("hops=2"), "the target keeps them");
    }
    let refused =
        cluster.nodes[0].admit(SocketRequest { bearer: Some("late"), ..SocketRequest::default() }).await;
    assert!(matches!(refused, Err(AdmissionError::Unavailable(_))));
    // They stay, and are served, until their grace is over.
    let user = clients[0].user.clone();
    let message = cluster.store(&user, "1").await;
    cluster.deliver(0, &user, message, false).await;
    clients[0].expect("message").await;
    for client in &mut clients {
        assert_eq!(client.expect("error").await["code"], "draining");
        assert_eq!(client.next().await, Outgoing::Close(crate::wire::close::CloseCode::Draining));
        client.says.send(Incoming::Closed).await.unwrap();
    }
    draining.await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(60), "{:?}", began.elapsed());
    assert!(cluster.membership.views().borrow().member(&NodeId::parse("push-0").unwrap()).is_none());
    assert!(cluster.fallback.hints().empty);
    let left = cluster.nodes[0].counts();
    assert_eq!((left.sessions, left.displaced), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn who_was_told_of_a_node_that_leaves_too_is_told_again() {
    let cluster = Cluster::of(&["push-0", "push-1", "push-2"]).await;
    let user = (0..)
        .map(|n| format!("user-{n}"))
        .find(|user| {
            owner(&["push-0", "push-1", "push-2"], user) == "push-0"
                && owner(&["push-1", "push-2"], user) == "push-1"
        })
        .unwrap();
    let mut client = cluster.connect(0, &user).await;
    let node = cluster.nodes[0].clone();
    let draining = tokio::spawn(async move { node.drain(Drain::Move(Duration::from_secs(60))).await });
    assert_eq!(client.expect("move").await["node"], "push-1");
    let one = cluster.nodes[1].node.holder.clone();
    cluster.membership.depart(&one.node, one.incarnation, Departure::Draining).await.unwrap();
    assert_eq!(client.expect("move").await["node"], "push-2");
    drop(client);
    draining.await.unwrap();
}

/// As a router, cut off from the registry or not, would say.
async fn told_gone(node: &Push) {
    node.clone().oneshot(PushRequest::Gone(ViewVersion::default())).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_node_is_barred_only_when_it_is_gone_and_cannot_register() {
    let cluster = Cluster::of(&["push-0", "push-1"]).await;
    let user = (0..)
        .map(|n| format!("user-{n}"))
        .find(|user| owner(&["push-0", "push-1"], user) == "push-0")
        .unwrap();
    let mut client = cluster.connect(0, &user).await;
    let node = cluster.nodes[0].clone();
    told_gone(&node).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(node.takes_sockets(), "it is a member: whoever says so has an old view");
    cluster.membership.set_standing(node.name(), LeaseState::Lapsed);
    told_gone(&node).await;
    let moved = client.expect("move").await;
    assert_eq!((&moved["node"], &moved["reason"]), (&"push-1".into(), &"drain".into()));
    assert!(!node.takes_sockets() && !cluster.healths[0].report().0);
    let request = SocketRequest { bearer: Some("late"), ..SocketRequest::default() };
    assert!(matches!(node.admit(request).await, Err(AdmissionError::Unavailable(_))));
    cluster.membership.set_standing(node.name(), LeaseState::Member(2));
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(node.takes_sockets() && cluster.healths[0].report().0);
}

#[tokio::test(start_paused = true)]
async fn a_fenced_node_closes_its_sessions_and_stays_not_ready() {
    let mut cluster = Cluster::of(&["push-0"]).await;
    let mut client = cluster.connect(0, "alice").await;
    cluster.join("push-0").await;
    assert_eq!(client.expect("error").await["code"], "draining");
    let (earlier, later) = (&cluster.nodes[0], &cluster.nodes[1]);
    assert!(!earlier.takes_sockets() && later.takes_sockets());
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

/// The answer to the handshake is held back for the welcome, but not for longer than a moment.
#[tokio::test(start_paused = true)]
async fn a_socket_opens_though_the_inbox_hangs() {
    let mut cluster = Cluster::of(&[]).await;
    cluster.trouble = Trouble::Hangs;
    cluster.join("push-0").await;
    let mut client = cluster.open(0, "alice").await;
    assert!(client.heard().is_empty(), "where it stands is not known yet");
}

fn numbers(heard: Vec<Outgoing>) -> Vec<u64> {
    let number = |frame| match frame {
        Outgoing::Text(text) => serde_json::from_slice::<Value>(&text).unwrap()["seq"].as_u64().unwrap(),
        other => panic!("{other:?}"),
    };
    heard.into_iter().map(number).collect()
}

/// Nothing here gives the session's task a turn, but where it is said.
#[tokio::test(start_paused = true)]
async fn a_live_message_to_a_session_that_rests_is_sent_at_once() {
    let cluster = Cluster::of(&["push-0"]).await;
    let mut client = cluster.connect(0, "alice").await;
    let first = cluster.store("alice", "1").await;
    cluster.deliver(0, "alice", Arc::clone(&first), false).await;
    assert_eq!(numbers(client.heard()), [first.seq.get()]);
    // A socket that is full: the rest is written by the task, when there is room.
    client.full.set(true);
    let second = cluster.store("alice", "2").await;
    cluster.deliver(0, "alice", Arc::clone(&second), false).await;
    assert!(client.heard().is_empty());
    client.full.set(false);
    // While this takes turns the clock stands: no timer helps the task up.
    for _ in 0..8 {
        tokio::task::yield_now().await;
    }
    assert_eq!(numbers(client.heard()), [second.seq.get()]);
    // What waits in the mailbox comes first, and is not read again for having been overtaken.
    let third = cluster.store("alice", "3").await;
    let fourth = cluster.store("alice", "4").await;
    let handles = cluster.nodes[0].node.base.registry.all();
    handles[0].mailbox.try_live(mailbox::encoded(&third));
    cluster.deliver(0, "alice", Arc::clone(&fourth), false).await;
    assert!(client.heard().is_empty(), "the task has had no turn");
    assert_eq!(client.expect("message").await["seq"], third.seq.get());
    assert_eq!(client.expect("message").await["seq"], fourth.seq.get());
    assert_eq!(cluster.nodes[0].node.base.metrics.pages.get(), 0);
    // So does an order to close: who was sent away is sent nothing more.
    handles[0].mailbox.close(CloseCode::Unauthorized, "the token was revoked");
    let fifth = cluster.store("alice", "5").await;
    cluster.deliver(0, "alice", fifth, false).await;
    assert!(client.heard().is_empty());
    assert_eq!(client.expect("error").await["code"], CloseCode::Unauthorized.name());
    assert_eq!(client.next().await, Outgoing::Close(CloseCode::Unauthorized));
}

/// Nothing else would bring such a session on: it waits for its page.
#[tokio::test(start_paused = true)]
async fn a_page_that_panics_ends_its_session_and_no_other() {
    let mut cluster = Cluster::of(&[]).await;
    cluster.trouble = Trouble::Panics;
    cluster.join("push-0").await;
    let (mut bob, mut alice) = (cluster.connect(0, "bob").await, cluster.connect(0, "alice").await);
    for (user, client) in [("bob", &mut bob), ("alice", &mut alice)] {
        cluster.store(user, "1").await;
        let second = cluster.store(user, "2").await;
        // The first is missing, so the session reads a page.
        cluster.deliver(0, user, second, false).await;
        if user == "bob" {
            assert_eq!(client.expect("error").await["code"], CloseCode::Overloaded.name());
            assert_eq!(client.next().await, Outgoing::Close(CloseCode::Overloaded));
        } else {
            client.expect("message").await;
            client.expect("message").await;
        }
    }
}

/// The timer tells the task still, whoever sent what meanwhile.
#[tokio::test(start_paused = true)]
async fn a_session_is_pinged_though_its_messages_are_sent_by_others() {
    let cluster = Cluster::of(&["push-0"]).await;
    let mut client = cluster.connect(0, "alice").await;
    for _ in 0..3 {
        let message = cluster.store("alice", "1").await;
        cluster.deliver(0, "alice", message, false).await;
        client.expect("message").await;
        let ping = tokio::time::timeout(Duration::from_secs(26), client.hears.recv()).await;
        assert_eq!(ping.unwrap(), Some(Outgoing::Ping));
        client.says.send(Incoming::Alive).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_sends_each_number_comes_once_and_in_order() {
    const MESSAGES: usize = 1_000;
    let cluster = Cluster::of(&["push-0"]).await;
    let mut client = cluster.connect(0, "alice").await;
    let (says, full) = (client.says.clone(), Arc::clone(&client.full));
    let disturbing = tokio::spawn(async move {
        for n in 0.. {
            full.set(n % 3 == 0);
            if says.send(Incoming::Alive).await.is_err() {
                break;
            }
            tokio::task::yield_now().await;
            full.set(false);
        }
    });
    let mut stored = Vec::new();
    for _ in 0..MESSAGES {
        let message = cluster.store("alice", "1").await;
        stored.push(message.seq.get());
        cluster.deliver(0, "alice", message, false).await;
    }
    let mut heard = Vec::new();
    while heard.len() < MESSAGES {
        heard.push(client.expect("message").await["seq"].as_u64().unwrap());
    }
    disturbing.abort();
    assert_eq!(heard, stored);
    assert!(client.heard().is_empty());
}
