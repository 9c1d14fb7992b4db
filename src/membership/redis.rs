//! Membership in Redis: leases with heartbeats, judged only by the server's clock.
//!
//! All keys of a cluster are in one hash slot, `{prefix}`: a sorted set of nodes by the end of
//! their lease, hashes of node info, incarnations and counts, and `meta` with epoch and generation.
//! Every script first removes the nodes whose lease has ended, so nobody has to watch for that. A
//! change is published as a hint; polling is the truth.

use std::collections::{HashMap, HashSet};
use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use futures_util::future::{BoxFuture, FutureExt};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::keeper::{Keeper, Snapshot, Times};
use super::{
    Counts, Departure, LeaseState, Member, Membership, MembershipError, NodeInfo, NodeState, Outsiders,
    Reached, Registration, View,
};
use crate::backoff::around;
use crate::clock::Clock;
use crate::message::NodeId;
use crate::peer_proof::{Entry, EntryKey};
use crate::transport::redis::{RedisError, RedisLink, Reply, Script};

/// Jitter of heartbeats and polls, so that the nodes of a cluster do not act at the same time.
const JITTER: f64 = 0.2;
/// Delay between two tries of the first heartbeat.
const JOIN_RETRY: Duration = Duration::from_millis(500);
/// Number of checks at start for faults that waiting does not mend.
const CHECKS: u32 = 3;
const CHECK_REST: Duration = Duration::from_millis(50);
/// Nodes that are looked at. The ring was measured up to that number.
const NODES_MAX: usize = 1_000;
/// Longest text of one node that is looked at, in bytes. An entry has about 300.
const TEXT_MAX: usize = 2_048;
/// Longest address of a peer port: a host name of 253 characters, a colon and a port.
const PEER_MAX: usize = 260;
/// Longest identity of a store or generation, in bytes. Each is a ULID of 26 characters.
const ID_MAX: usize = 64;
/// Bounds for what is registered about a node; the same as those of configuration.
const WEIGHTS: std::ops::RangeInclusive<f64> = 0.01..=100.0;
const ACCEPTS_MAX: u32 = 1_000_000;
/// Larger numbers cannot be represented exactly in a browser's JSON.
const COUNT_MAX: u64 = 1 << 53;
/// Complaints about entries that are remembered, so that each is logged once.
const COMPLAINTS_MAX: usize = 1_000;

/// A clock that differs from the server's by more than this is reported: expiry and tokens depend
/// on it.
pub const SKEW_MAX_MS: u64 = 2_000;

/// Membership in Redis. Cloned, it is the same membership. Its tasks end with the last clone.
#[derive(Clone)]
pub struct RedisMembership {
    inner: Arc<Inner>,
    tasks: Arc<Mutex<JoinSet<()>>>,
}

struct Inner {
    link: RedisLink,
    keys: Keys,
    times: Times,
    clock: Clock,
    published: watch::Sender<Arc<View>>,
    /// What each node reported last, from the last snapshot.
    seen: Mutex<HashMap<NodeId, Counts>>,
    own: Mutex<HashMap<NodeId, Arc<Own>>>,
    hint: Arc<Notify>,
    skew_ms: AtomicI64,
    entries: EntryKey,
    /// The prefix, for log lines.
    prefix: String,
    /// When Redis last said that it takes no writes for now.
    refused: Mutex<Option<Instant>>,
    /// What was logged already.
    complaints: Mutex<HashSet<String>>,
}

/// A node of this process.
struct Own {
    info: NodeInfo,
    incarnation: u64,
    state: Mutex<(NodeState, Counts)>,
    standing: watch::Sender<LeaseState>,
    proof: Reached,
    /// Held during every call about this node: a heartbeat that overtook a `leave` would register
    /// the node again.
    turn: tokio::sync::Mutex<Turn>,
}

/// Whether a node still sends heartbeats.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Turn {
    Beating,
    Left,
}

/// The names of the keys, and the scripts that use them.
struct Keys {
    names: [String; 5],
    channel: String,
    beat: Script,
    snapshot: Script,
    leave: Script,
}

impl Keys {
    fn of(prefix: &str) -> Self {
        let shared = include_str!("lua/shared.lua");
        let script = |own: &str| Script::new(&format!("{shared}\n{own}"));
        Self {
            names: ["nodes", "info", "meta", "incarnations", "counts"]
                .map(|name| format!("{{{prefix}}}:{name}")),
            channel: format!("{{{prefix}}}:changed"),
            beat: script(include_str!("lua/beat.lua")),
            snapshot: script(include_str!("lua/snapshot.lua")),
            leave: script(include_str!("lua/leave.lua")),
        }
    }
}

/// Node info as it is stored. Unknown fields are ignored, so that versions may mix.
#[derive(Serialize, Deserialize)]
struct StoredInfo {
    weight: f64,
    accept_per_s: u32,
    peer: String,
    push: bool,
    dispatch: bool,
    draining: bool,
    /// Another node has reached it at `peer`.
    #[serde(default)]
    reached: bool,
    /// Identity of its store.
    #[serde(default)]
    store: String,
    /// Made with `peer.secret` over what others rely on before they have spoken to the node.
    #[serde(default)]
    proof: String,
}

impl StoredInfo {
    fn entry<'a>(&'a self, node: &'a NodeId) -> Entry<'a> {
        let Self { peer, push, dispatch, store, .. } = self;
        Entry { node: node.as_str(), peer, push: *push, dispatch: *dispatch, store }
    }

    fn text(info: &NodeInfo, state: NodeState, reached: bool, key: &EntryKey) -> String {
        let mut stored = Self {
            weight: info.weight,
            accept_per_s: info.accept_per_s,
            peer: info.peer.to_string(),
            push: info.push,
            dispatch: info.dispatch,
            draining: state == NodeState::Draining,
            reached,
            store: info.store.to_string(),
            proof: String::new(),
        };
        stored.proof = key.sign(stored.entry(&info.node));
        // Plain fields: serialisation cannot fail.
        serde_json::to_string(&stored).unwrap_or_default()
    }
}

impl RedisMembership {
    /// Starts to poll the registry.
    #[must_use]
    pub fn start(link: RedisLink, prefix: &str, times: Times, clock: Clock, entries: EntryKey) -> Self {
        let keeper = Keeper::new(times);
        let inner = Arc::new(Inner {
            link: link.clone(),
            keys: Keys::of(prefix),
            times,
            clock,
            published: watch::Sender::new(Arc::clone(keeper.view())),
            seen: Mutex::default(),
            own: Mutex::default(),
            hint: Arc::new(Notify::new()),
            skew_ms: AtomicI64::new(0),
            entries,
            prefix: prefix.to_owned(),
            refused: Mutex::new(None),
            complaints: Mutex::default(),
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(link.listen(inner.keys.channel.clone(), Arc::clone(&inner.hint)));
        tasks.spawn(poll(Arc::clone(&inner), keeper));
        Self { inner, tasks: Arc::new(Mutex::new(tasks)) }
    }

    /// How far this machine's clock is ahead of the server's, in ms, by the last heartbeat.
    #[must_use]
    pub fn skew_ms(&self) -> i64 {
        self.inner.skew_ms.load(Ordering::Relaxed)
    }

    /// Asks the registry once at start, to find faults that waiting does not mend.
    ///
    /// # Errors
    ///
    /// The server's refusal, such as a wrong password. A server that cannot be reached is no error
    /// here.
    pub async fn check(&self) -> Result<(), RedisError> {
        // Another call on the same connection may have been refused first and have closed the
        // connection.
        for _ in 0..CHECKS {
            match self.inner.snapshot().await {
                Err(refused @ RedisError::Refused(_)) => return Err(refused),
                Err(_) => tokio::time::sleep(CHECK_REST).await,
                Ok(_) => break,
            }
        }
        Ok(())
    }

    async fn first_beat(&self, info: &NodeInfo) -> Result<u64, MembershipError> {
        let mut told = false;
        loop {
            let said = StoredInfo::text(info, NodeState::Active, false, &self.inner.entries);
            match self.inner.beat(info, 0, &said, Counts::default()).await {
                Ok(Beaten::Renewed { incarnation, .. }) => return Ok(incarnation),
                Ok(Beaten::OtherStore { node, theirs }) => {
                    return Err(MembershipError::OtherStore { node, theirs, ours: info.store.to_string() });
                }
                Ok(Beaten::Fenced) => return Err(MembershipError::Fenced(info.node.clone())),
                Err(RedisError::Refused(why)) => return Err(MembershipError::Unavailable(why)),
                Err(fault) => {
                    if !std::mem::replace(&mut told, true) {
                        tracing::warn!(%fault, "the node cannot be registered yet (redis.url)");
                    }
                    tokio::time::sleep(JOIN_RETRY).await;
                }
            }
        }
    }
}

/// The response to a heartbeat.
enum Beaten {
    /// The lease is renewed, or has begun.
    Renewed { incarnation: u64, was_member: bool },
    /// A later process has the name.
    Fenced,
    /// A registered node has another store.
    OtherStore { node: String, theirs: String },
}

impl Inner {
    async fn run(&self, script: &Script, own: &[&str]) -> Result<Reply, RedisError> {
        let lease = self.times.lease.as_millis().to_string();
        let generation = ulid::Ulid::generate().to_string();
        let refused = if self.was_refused() { "1" } else { "0" };
        let channel = self.keys.channel.as_bytes();
        let mut args = vec![channel, lease.as_bytes(), generation.as_bytes(), refused.as_bytes()];
        args.extend(own.iter().map(|arg| arg.as_bytes()));
        let keys: Vec<&str> = self.keys.names.iter().map(String::as_str).collect();
        let answer = self.link.run(script, &keys, &args).await;
        if let Err(RedisError::ForNow(_)) = &answer {
            *self.refused.lock() = Some(Instant::now());
        }
        answer
    }

    /// Whether renewals were refused so recently that leases may have ended for that reason alone.
    fn was_refused(&self) -> bool {
        self.refused.lock().is_some_and(|at| at.elapsed() < self.times.lease)
    }

    async fn beat(
        &self,
        info: &NodeInfo,
        incarnation: u64,
        said: &str,
        counts: Counts,
    ) -> Result<Beaten, RedisError> {
        let Counts { sessions, displaced, delivered, moves } = counts;
        let held = format!("{sessions} {displaced} {delivered} {moves}");
        let sent = self.clock.now().0;
        let own = [info.node.as_str(), &incarnation.to_string(), said, &held, &info.store];
        let reply = self.run(&self.keys.beat, &own).await?;
        let [outcome, incarnation, now, was_member, node, theirs] = reply.items() else {
            return Err(RedisError::Refused(format!("a beat was answered {reply:?}")));
        };
        self.note_skew(sent, now.int(), self.clock.now().0);
        Ok(match outcome.int() {
            0 => Beaten::Renewed { incarnation: incarnation.int(), was_member: was_member.int() == 1 },
            1 => Beaten::Fenced,
            _ => Beaten::OtherStore { node: node.text().to_owned(), theirs: theirs.text().to_owned() },
        })
    }

    /// If the clocks agree, the server's time is between ours of sending and of receiving.
    fn note_skew(&self, sent: u64, server: u64, heard: u64) {
        let ahead = if sent > server {
            i64::try_from(sent - server).unwrap_or(i64::MAX)
        } else {
            -i64::try_from(server.saturating_sub(heard)).unwrap_or(i64::MAX)
        };
        let before = self.skew_ms.swap(ahead, Ordering::Relaxed);
        if ahead.unsigned_abs() > SKEW_MAX_MS && before.unsigned_abs() <= SKEW_MAX_MS {
            tracing::warn!(
                ahead_ms = ahead,
                "the clock of this machine is not that of Redis (redis.url): expiry, tokens and peer calls are judged \
                 by it; set both by NTP"
            );
        }
    }

    async fn snapshot(&self) -> Result<(Snapshot, HashMap<NodeId, Counts>), RedisError> {
        let (most, longest) = (NODES_MAX.to_string(), TEXT_MAX.to_string());
        let reply = self.run(&self.keys.snapshot, &[&most, &longest]).await?;
        let read = read_snapshot(&reply, &self.entries, &self.prefix)?;
        read.complaints.into_iter().for_each(|complaint| self.complain(complaint));
        if let Some(why) = read.refused {
            *self.refused.lock() = Some(Instant::now());
            // A full Redis would show the same nodes for ever.
            return Err(RedisError::ForNow(why));
        }
        Ok((read.snapshot, read.counts))
    }

    /// Logs a complaint about the registry, once.
    fn complain(&self, complaint: String) {
        let mut made = self.complaints.lock();
        if made.len() < COMPLAINTS_MAX && !made.contains(&complaint) {
            tracing::warn!("redis.prefix: {complaint}");
            made.insert(complaint);
        }
    }
}

/// What one look at the registry shows.
#[derive(Debug)]
struct Look {
    snapshot: Snapshot,
    counts: HashMap<NodeId, Counts>,
    /// Why Redis renews no lease for now.
    refused: Option<String>,
    /// Entries that are not as they should be, with their key.
    complaints: Vec<String>,
}

/// Reads the response to a snapshot. Nothing in it is trusted: another program, or another version
/// of this one, may have written it.
fn read_snapshot(reply: &Reply, key: &EntryKey, prefix: &str) -> Result<Look, RedisError> {
    let [generation, epoch, all, refused, count] = reply.items() else {
        return Err(RedisError::Refused(
            "a look at the registry was answered with something else".to_owned(),
        ));
    };
    let generation = generation.text();
    let is_plain = generation.bytes().all(|byte| byte.is_ascii_graphic());
    let refused = Some(refused.text()).filter(|why| !why.is_empty());
    if refused.is_none() && (generation.is_empty() || generation.len() > ID_MAX || !is_plain) {
        let why = format!("{{{prefix}}}:meta has no generation of ringpush: delete that key");
        return Err(RedisError::Refused(why));
    }
    let mut look = Look {
        snapshot: Snapshot {
            generation: generation.into(),
            epoch: epoch.int(),
            nodes: Vec::new(),
            outsiders: Outsiders::default(),
        },
        counts: HashMap::new(),
        refused: refused.map(str::to_owned),
        complaints: Vec::new(),
    };
    if count.int() > NODES_MAX as u64 {
        let count = count.int();
        look.complaints.push(format!("{{{prefix}}}:nodes has {count} entries; {NODES_MAX} are looked at"));
    }
    for entry in all.items().iter().take(NODES_MAX) {
        if let Err(complaint) = read_entry(entry, key, &mut look) {
            let name = entry.items().first().map_or("", Reply::text).escape_debug().to_string();
            look.complaints.push(format!("the entry {name:?} of {{{prefix}}}:info {complaint}"));
        }
    }
    look.snapshot.outsiders.candidates.sort_by(|a, b| a.info.node.cmp(&b.info.node));
    look.snapshot.outsiders.strangers.sort();
    Ok(look)
}

fn read_entry(entry: &Reply, key: &EntryKey, look: &mut Look) -> Result<(), String> {
    let [name, info, incarnation, held] = entry.items() else { return Err("is no entry".to_owned()) };
    let node = NodeId::parse(name.text()).map_err(|rule| format!("has a name that is none: {rule}"))?;
    let stored = serde_json::from_str::<StoredInfo>(info.text());
    // An entry of another version that this one cannot read is ignored.
    let mut stored = stored.map_err(|_| "cannot be read".to_owned())?;
    if stored.peer.len() > PEER_MAX || stored.store.len() > ID_MAX {
        return Err("has a text that is too long".to_owned());
    }
    if !key.verify(stored.entry(&node), &stored.proof) {
        look.snapshot.outsiders.strangers.push(node);
        return Err(
            "has no proof by our peer.secret: that node has another one, or another program wrote this; \
                    it is not called, and takes no users"
                .to_owned(),
        );
    }
    let mut numbers = held.text().split(' ').map(|number| number.parse().unwrap_or(0).min(COUNT_MAX));
    let mut next = || numbers.next().unwrap_or(0);
    let held = Counts { sessions: next(), displaced: next(), delivered: next(), moves: next() };
    let bad_weight = !WEIGHTS.contains(&stored.weight);
    if bad_weight || stored.accept_per_s > ACCEPTS_MAX {
        let (from, to) = (WEIGHTS.start(), WEIGHTS.end());
        let told =
            format!("has a weight or accept_per_s out of bounds ({from} to {to}, up to {ACCEPTS_MAX})");
        look.complaints.push(format!("the entry {node} {told}: it is held to them"));
        stored.weight = if stored.weight.is_nan() { 1.0 } else { stored.weight.clamp(*from, *to) };
        stored.accept_per_s = stored.accept_per_s.min(ACCEPTS_MAX);
    }
    look.counts.insert(node.clone(), held);
    let reached = stored.reached;
    let member = member(node, incarnation.int(), stored);
    if reached {
        look.snapshot.nodes.push(member);
    } else {
        look.snapshot.outsiders.candidates.push(member);
    }
    Ok(())
}

fn member(node: NodeId, incarnation: u64, stored: StoredInfo) -> Member {
    Member {
        info: NodeInfo {
            node,
            weight: stored.weight,
            accept_per_s: stored.accept_per_s,
            peer: stored.peer.into(),
            push: stored.push,
            dispatch: stored.dispatch,
            store: stored.store.into(),
        },
        incarnation,
        state: if stored.draining { NodeState::Draining } else { NodeState::Active },
    }
}

/// Polls the registry, and publishes the views that the rules make of it.
async fn poll(inner: Arc<Inner>, mut keeper: Keeper) {
    let began = Instant::now();
    let mut reachable = true;
    loop {
        let seen = inner.snapshot().await;
        let changed = match seen {
            Ok((snapshot, counts)) => {
                if !reachable {
                    tracing::info!("Redis (redis.url) answers again");
                }
                reachable = true;
                *inner.seen.lock() = counts;
                keeper.shown(began.elapsed(), snapshot)
            }
            Err(fault) => {
                if reachable {
                    tracing::warn!(%fault, "membership cannot be read or renewed; the view is kept (check redis.url)");
                }
                reachable = false;
                keeper.silent(began.elapsed())
            }
        };
        let before = inner.published.borrow().digest;
        if changed {
            let view = Arc::clone(keeper.view());
            let (members, routers) = (view.members.len(), view.routers.len());
            tracing::info!(
                generation = &*view.generation,
                epoch = view.epoch,
                held = view.held,
                members,
                routers,
                "view"
            );
            inner.published.send_replace(view);
        }
        // A hint that comes right after a ring was built waits for the next rebuild.
        let rebuilt = keeper.view().digest != before;
        let rest = if rebuilt { inner.times.rebuild } else { inner.times.rebuild / 10 };
        tokio::time::sleep(rest).await;
        let next = around(inner.times.poll, JITTER, &mut rand::rng());
        let _ = tokio::time::timeout(next, inner.hint.notified()).await;
    }
}

/// Renews a node's lease as long as it has one, in a task of its own.
async fn keep_beating(inner: Arc<Inner>, own: Arc<Own>) {
    let mut renewed = Instant::now();
    let mut times = 1;
    let mut said_reached = false;
    let mut answered = true;
    loop {
        let pause = around(inner.times.beat, JITTER, &mut rand::rng());
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            // Others wait to hear that the node was reached.
            () = own.proof.noted(), if answered && !said_reached => {}
        }
        let turn = own.turn.lock().await;
        if *turn == Turn::Left {
            return;
        }
        let (state, counts) = *own.state.lock();
        let sent = Instant::now();
        let reached = own.proof.is_noted();
        let said = StoredInfo::text(&own.info, state, reached, &inner.entries);
        let beaten = inner.beat(&own.info, own.incarnation, &said, counts).await;
        answered = beaten.is_ok();
        match beaten {
            Ok(Beaten::Fenced) => {
                tracing::warn!(
                    node = %own.info.node,
                    "another process has registered under this node's name (node.name): this one takes no more sockets"
                );
                own.standing.send_replace(LeaseState::Fenced);
                return;
            }
            Ok(Beaten::Renewed { was_member, .. }) => {
                said_reached = reached;
                // The heartbeat that registered it again may have been one whose response was lost.
                let was_lost = !was_member || renewed.elapsed() > inner.times.lease;
                renewed = sent;
                times += u64::from(was_lost);
                let now = LeaseState::Member(times);
                own.standing.send_if_modified(|known| std::mem::replace(known, now) != now);
                if was_lost {
                    tracing::info!(node = %own.info.node, "registered again");
                }
            }
            Ok(Beaten::OtherStore { node, theirs }) => {
                inner.complain(format!(
                    "{node} is registered with another store ({theirs}; here {}): this node is not registered again until it \
                     has gone (mongo.uri, mongo.database, redis.prefix)",
                    own.info.store
                ));
                own.lapse(renewed.elapsed() > inner.times.lease);
            }
            Err(fault) => {
                tracing::debug!(%fault, "a beat was not answered");
                own.lapse(renewed.elapsed() > inner.times.lease);
            }
        }
    }
}

impl Own {
    /// The lease could not be renewed; `over` says whether it has run out.
    fn lapse(&self, over: bool) {
        if over {
            self.standing
                .send_if_modified(|known| std::mem::replace(known, LeaseState::Lapsed) != LeaseState::Lapsed);
        }
    }
}

impl RedisMembership {
    /// Watches its tasks for as long as it is polled. A panic of one is raised here: without its
    /// tasks this would show the same for ever.
    pub async fn watch_tasks(&self) {
        loop {
            match poll_fn(|cx| self.tasks.lock().poll_join_next(cx)).await {
                Some(Err(error)) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
                // A node that has left, or was fenced, sends no more heartbeats.
                Some(_) => {}
                None => std::future::pending().await,
            }
        }
    }
}

impl Membership for RedisMembership {
    fn views(&self) -> watch::Receiver<Arc<View>> {
        self.inner.published.subscribe()
    }

    fn join(&self, info: NodeInfo) -> BoxFuture<'_, Result<Registration, MembershipError>> {
        async move {
            let incarnation = self.first_beat(&info).await?;
            let (told, standing) = watch::channel(LeaseState::Member(1));
            let proof = Reached::new(false);
            let own = Arc::new(Own {
                incarnation,
                state: Mutex::new((NodeState::Active, Counts::default())),
                standing: told,
                proof: proof.clone(),
                turn: tokio::sync::Mutex::new(Turn::Beating),
                info: info.clone(),
            });
            self.inner.own.lock().insert(info.node, Arc::clone(&own));
            self.tasks.lock().spawn(keep_beating(Arc::clone(&self.inner), own));
            self.inner.hint.notify_one();
            Ok(Registration { incarnation, standing, proof })
        }
        .boxed()
    }

    fn depart(
        &self,
        node: &NodeId,
        incarnation: u64,
        how: Departure,
    ) -> BoxFuture<'_, Result<(), MembershipError>> {
        let node = node.clone();
        async move {
            let own = self.inner.own.lock().get(&node).filter(|own| own.incarnation == incarnation).cloned();
            let Some(own) = own else { return Ok(()) };
            if *own.standing.borrow() == LeaseState::Fenced {
                return Err(MembershipError::Fenced(node));
            }
            own.state.lock().0 = NodeState::Draining;
            let mut turn = own.turn.lock().await;
            let answer = match how {
                Departure::Draining => {
                    let counts = own.state.lock().1;
                    let reached = own.proof.is_noted();
                    let said = StoredInfo::text(&own.info, NodeState::Draining, reached, &self.inner.entries);
                    self.inner.beat(&own.info, incarnation, &said, counts).await.map(drop)
                }
                Departure::Left => {
                    let left = [node.as_str(), &incarnation.to_string()];
                    *turn = Turn::Left;
                    self.inner.own.lock().remove(&node);
                    self.inner.run(&self.inner.keys.leave, &left).await.map(drop)
                }
            };
            self.inner.hint.notify_one();
            answer.map_err(|fault| MembershipError::Unavailable(fault.to_string()))
        }
        .boxed()
    }

    fn counts(&self, own: Option<(NodeId, Counts)>) -> Vec<(NodeId, Counts)> {
        let mut all = self.inner.seen.lock().clone();
        let mine = self.inner.own.lock();
        if let Some((node, counts)) = own
            && let Some(own) = mine.get(&node)
        {
            own.state.lock().1 = counts;
        }
        // This process knows its own counts better than the registry does.
        all.extend(
            mine.iter()
                .filter(|(_, own)| own.info.push)
                .map(|(node, own)| (node.clone(), own.state.lock().1)),
        );
        all.into_iter().collect()
    }

    fn refresh(&self) {
        self.inner.hint.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key() -> EntryKey {
        EntryKey::derive("peer-secret-of-the-tests-0123456789abcdef")
    }

    fn bytes(text: &str) -> Reply {
        Reply::Bytes(text.as_bytes().to_vec())
    }

    fn look(entries: Vec<Reply>) -> Reply {
        let count = Reply::Int(entries.len() as i64);
        Reply::List(vec![bytes("01J"), bytes("7"), Reply::List(entries), bytes(""), count])
    }

    fn entry(name: &str, change: impl FnOnce(&mut StoredInfo), key: &EntryKey) -> Reply {
        let mut stored = StoredInfo {
            weight: 1.0,
            accept_per_s: 4000,
            peer: "10.0.0.1:7070".to_owned(),
            push: true,
            dispatch: false,
            draining: false,
            reached: true,
            store: "01J".to_owned(),
            proof: String::new(),
        };
        change(&mut stored);
        stored.proof = key.sign(stored.entry(&NodeId::parse(name).unwrap()));
        let info = serde_json::to_string(&stored).unwrap();
        Reply::List(vec![bytes(name), bytes(&info), bytes("9"), bytes("1 2 3 4")])
    }

    fn read(entries: Vec<Reply>) -> Look {
        read_snapshot(&look(entries), &key(), "test").unwrap()
    }

    #[test]
    fn what_the_registry_says_is_held_to_the_bounds_of_configuration_and_told_of() {
        for (weight, held) in [(1e308, 100.0), (1e5, 100.0), (0.0, 0.01), (-3.0, 0.01), (2.5, 2.5)] {
            let found = read(vec![entry("push-0", |info| info.weight = weight, &key())]);
            assert_eq!(found.snapshot.nodes[0].info.weight, held);
            let told = found.complaints.iter().any(|one| one.contains("push-0") && one.contains("weight"));
            assert_eq!(told, weight != held, "{weight}: {:?}", found.complaints);
        }
        let many = read(vec![entry("push-0", |info| info.accept_per_s = u32::MAX, &key())]);
        assert_eq!(many.snapshot.nodes[0].info.accept_per_s, ACCEPTS_MAX);
        for long in ["a".repeat(PEER_MAX + 1), "a".repeat(100_000)] {
            let found = read(vec![entry("push-0", |info| info.peer = long, &key())]);
            assert!(found.snapshot.nodes.is_empty() && found.complaints.len() == 1);
        }
    }

    #[test]
    fn who_was_not_reached_or_does_not_know_the_secret_is_no_member() {
        let other = EntryKey::derive("another-secret-of-the-tests-0123456789ab");
        let found = read(vec![
            entry("push-0", |_| {}, &key()),
            entry("push-1", |info| info.reached = false, &key()),
            entry("push-2", |_| {}, &other),
            Reply::List(vec![bytes("push-3"), bytes("{}"), bytes("1"), bytes("")]),
            Reply::List(vec![bytes("Push 4"), bytes("{}"), bytes("1"), bytes("")]),
            Reply::Nil,
        ]);
        let names = |members: &[Member]| members.iter().map(|m| m.info.node.to_string()).collect::<Vec<_>>();
        assert_eq!(names(&found.snapshot.nodes), ["push-0"]);
        assert_eq!(names(&found.snapshot.outsiders.candidates), ["push-1"]);
        assert_eq!(found.snapshot.outsiders.strangers.len(), 1);
        assert_eq!(found.complaints.len(), 4, "{:?}", found.complaints);
        assert!(found.complaints[0].contains("push-2") && found.complaints[0].contains("peer.secret"));
    }

    fn anything() -> impl Strategy<Value = Reply> {
        let text = prop_oneof![
            "[ -~]{0,40}",
            "[0-9.e+-]{1,25}",
            Just(r#"{"weight":1e308,"accept_per_s":-1,"peer":7}"#.to_owned()),
        ];
        let leaf = prop_oneof![
            Just(Reply::Nil),
            any::<i64>().prop_map(Reply::Int),
            text.prop_map(|text| Reply::Bytes(text.into_bytes())),
            prop::collection::vec(any::<u8>(), 0..60).prop_map(Reply::Bytes),
        ];
        leaf.prop_recursive(4, 64, 6, |inner| prop::collection::vec(inner, 0..7).prop_map(Reply::List))
    }

    proptest! {
        /// Whatever the registry shows, nothing panics, and every member is within the bounds.
        #[test]
        fn rubbish_in_the_registry_is_no_member(
            rubbish in prop::collection::vec(anything(), 0..6), weight in any::<f64>(), accepts in any::<u32>(),
        ) {
            let _ = read_snapshot(&Reply::List(rubbish.clone()), &key(), "test");
            let odd = entry("push-0", |info| (info.weight, info.accept_per_s) = (weight, accepts), &key());
            if let Ok(found) = read_snapshot(&look([rubbish, vec![odd]].concat()), &key(), "test") {
                for member in &found.snapshot.nodes {
                    prop_assert!(WEIGHTS.contains(&member.info.weight));
                    prop_assert!(member.info.accept_per_s <= ACCEPTS_MAX);
                }
            }
        }
    }
}
