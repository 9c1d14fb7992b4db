//! Membership in Redis: leases with heartbeats, judged only by the server's clock.
//!
//! All keys of a cluster are in one hash slot, `{prefix}`: a sorted set of nodes by the end of
//! their lease, hashes of node info, incarnations and counts, and `meta` with epoch and generation.
//! Every script first removes the nodes whose lease has ended, so nobody has to watch for that. A
//! change is published as a hint; polling is the truth.

mod entries;
mod heartbeat;

mod keys;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use futures_util::future::{BoxFuture, FutureExt};
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::keeper::{Keeper, Snapshot, Times};
use super::{
    Counts, Departure, LeaseState, Membership, MembershipError, NodeInfo, NodeState, Reached, Registration,
    View,
};
use crate::backoff::around;
use crate::clock::Clock;
use crate::message::NodeId;
use crate::peer_proof::EntryKey;
use crate::transport::redis::{RedisError, RedisLink, Reply, Script, raise_panics};

use entries::{NODES_MAX, StoredInfo, TEXT_MAX, read_snapshot};
use heartbeat::{Own, Turn, keep_beating};
use keys::Keys;

/// Jitter of heartbeats and polls, so that the nodes of a cluster do not act at the same time.
const JITTER: f64 = 0.2;
/// Delay between two tries of the first heartbeat.
const JOIN_RETRY: Duration = Duration::from_millis(500);
/// How long is looked at start for faults that waiting does not mend.
const CHECK_TIME: Duration = Duration::from_secs(1);
const CHECK_REST: Duration = Duration::from_millis(50);
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
    /// Each change: heartbeats do not wait for their time. One that is under way is followed by
    /// another.
    beat_soon: watch::Sender<()>,
    skew_ms: AtomicI64,
    entries: EntryKey,
    /// The prefix, for log lines.
    prefix: String,
    /// When Redis last said that it takes no writes for now.
    refused: Mutex<Option<Instant>>,
    /// What was logged already.
    complaints: Mutex<HashSet<String>>,
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
            beat_soon: watch::Sender::new(()),
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
        let began = Instant::now();
        loop {
            match self.inner.snapshot().await {
                Ok(_) => return Ok(()),
                Err(refused @ RedisError::Refused(_)) => return Err(refused),
                // Another call on the same connection may have been refused first and have closed
                // it under this one, several times running.
                Err(_) if began.elapsed() < CHECK_TIME => tokio::time::sleep(CHECK_REST).await,
                Err(_) => return Ok(()),
            }
        }
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
        let Counts { sessions, displaced, delivered, moves, delays } = counts;
        // Raised by one: an earlier version says nothing, which reads as 0.
        let [p50, p99] = delays.map_or([0, 0], |delays| [delays.p50_ms + 1, delays.p99_ms + 1]);
        let held = format!("{sessions} {displaced} {delivered} {moves} {p50} {p99}");
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
                "the clocks of this machine and of Redis (redis.url) differ: expiry, tokens and peer calls depend on them; synchronise both by NTP"
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

impl RedisMembership {
    /// Watches its tasks for as long as it is polled. A panic of one is raised here: without its
    /// tasks this would show the same for ever.
    pub async fn watch_tasks(&self) {
        raise_panics(&self.tasks).await;
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

    fn sign_anew(&self) {
        self.inner.beat_soon.send_replace(());
    }
}
