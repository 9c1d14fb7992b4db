//! Membership in Redis: leases by heartbeat, judged by the server's clock alone.
//!
//! All keys of a cluster lie in one hash slot, `{prefix}`: a sorted set of nodes by the end of their lease, hashes of what
//! each says of itself, of incarnations and of counts, and `meta` with the epoch and the generation. Every script first
//! takes out whose lease is over, so that no one need watch. A change is published as a hint; polling is the truth.

use std::collections::HashMap;
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
    Counts, Departure, Member, Membership, MembershipError, NodeInfo, NodeState, Registration, Standing, View,
};
use crate::backoff::around;
use crate::clock::Clock;
use crate::message::NodeId;
use crate::transport::redis::{RedisFault, RedisLink, Reply, Script};

/// How far beats and polls are from their mean, so that a cluster does not beat as one.
const JITTER: f64 = 0.2;
/// Between two tries of the first beat.
const JOIN_RETRY: Duration = Duration::from_millis(500);
/// Tries to find out at start what no waiting would mend, and the rest between them.
const CHECKS: u32 = 3;
const CHECK_REST: Duration = Duration::from_millis(50);
/// A clock further from the server's than this is told of: expiry and tokens are judged by it.
pub const SKEW_MAX_MS: u64 = 2_000;

/// See the room's comment. Cloned, it is the same membership; its tasks end with the last clone.
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
    /// What each node reported last, by the last snapshot.
    seen: Mutex<HashMap<NodeId, Counts>>,
    own: Mutex<HashMap<NodeId, Arc<Own>>>,
    hint: Arc<Notify>,
    skew_ms: AtomicI64,
}

/// A node of this process.
struct Own {
    info: NodeInfo,
    incarnation: u64,
    state: Mutex<(NodeState, Counts)>,
    standing: watch::Sender<Standing>,
    /// Held over every call about this node: a beat that overtook a leave would register it again.
    turn: tokio::sync::Mutex<Turn>,
}

/// Whether a node still beats.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Turn {
    Beating,
    Left,
}

/// The names of the keys, and the scripts that take them.
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

/// What a node says of itself, as it is stored. Fields that are not known are ignored: versions may mix.
#[derive(Serialize, Deserialize)]
struct StoredInfo {
    weight: f64,
    accept_per_s: u32,
    peer: String,
    push: bool,
    dispatch: bool,
    draining: bool,
}

impl StoredInfo {
    fn text(info: &NodeInfo, state: NodeState) -> String {
        let stored = Self {
            weight: info.weight,
            accept_per_s: info.accept_per_s,
            peer: info.peer.to_string(),
            push: info.push,
            dispatch: info.dispatch,
            draining: state == NodeState::Draining,
        };
        // Plain fields always serialise.
        serde_json::to_string(&stored).unwrap_or_default()
    }
}

impl RedisMembership {
    /// Begins to look at the registry.
    #[must_use]
    pub fn start(link: RedisLink, prefix: &str, times: Times, clock: Clock) -> Self {
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
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(link.listen(inner.keys.channel.clone(), Arc::clone(&inner.hint)));
        tasks.spawn(poll(Arc::clone(&inner), keeper));
        Self { inner, tasks: Arc::new(Mutex::new(tasks)) }
    }

    /// How far this machine's clock is ahead of the server's, in ms, as the last beat showed.
    #[must_use]
    pub fn skew_ms(&self) -> i64 {
        self.inner.skew_ms.load(Ordering::Relaxed)
    }

    /// Asks the registry once, to find out at start what no waiting would mend.
    ///
    /// # Errors
    /// The server's refusal, such as a wrong password; a server that cannot be reached is no error here.
    pub async fn check(&self) -> Result<(), RedisFault> {
        // Another call on the same connection may have been refused first, and taken the connection with it.
        for _ in 0..CHECKS {
            match self.inner.snapshot().await {
                Err(refused @ RedisFault::Refused(_)) => return Err(refused),
                Err(RedisFault::Unreachable(_)) => tokio::time::sleep(CHECK_REST).await,
                Ok(_) => break,
            }
        }
        Ok(())
    }

    async fn first_beat(&self, info: &NodeInfo) -> Result<u64, MembershipError> {
        loop {
            let said = StoredInfo::text(info, NodeState::Active);
            match self.inner.beat(&info.node, 0, &said, Counts::default()).await {
                Ok(beaten) => return Ok(beaten.incarnation),
                Err(RedisFault::Refused(why)) => return Err(MembershipError::Unavailable(why)),
                Err(RedisFault::Unreachable(why)) => {
                    tracing::debug!(why, "the node cannot be registered yet");
                    tokio::time::sleep(JOIN_RETRY).await;
                }
            }
        }
    }
}

/// The answer to a beat.
struct Beaten {
    fenced: bool,
    incarnation: u64,
    was_member: bool,
}

impl Inner {
    async fn run(&self, script: &Script, own: &[&str]) -> Result<Reply, RedisFault> {
        let lease = self.times.lease.as_millis().to_string();
        let generation = ulid::Ulid::generate().to_string();
        let mut args = vec![self.keys.channel.as_bytes(), lease.as_bytes(), generation.as_bytes()];
        args.extend(own.iter().map(|arg| arg.as_bytes()));
        let keys: Vec<&str> = self.keys.names.iter().map(String::as_str).collect();
        self.link.run(script, &keys, &args).await
    }

    async fn beat(
        &self,
        node: &NodeId,
        incarnation: u64,
        said: &str,
        counts: Counts,
    ) -> Result<Beaten, RedisFault> {
        let Counts { sessions, displaced, delivered, moves } = counts;
        let held = format!("{sessions} {displaced} {delivered} {moves}");
        let sent = self.clock.now().0;
        let own = [node.as_str(), &incarnation.to_string(), said, &held];
        let reply = self.run(&self.keys.beat, &own).await?;
        let [fenced, incarnation, now, was_member] = reply.items() else {
            return Err(RedisFault::Refused(format!("a beat was answered {reply:?}")));
        };
        self.note_skew(sent, now.int(), self.clock.now().0);
        Ok(Beaten {
            fenced: fenced.int() == 1,
            incarnation: incarnation.int(),
            was_member: was_member.int() == 1,
        })
    }

    /// The server's moment lies between ours of asking and of hearing, if the clocks agree.
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

    async fn snapshot(&self) -> Result<(Snapshot, HashMap<NodeId, Counts>), RedisFault> {
        let reply = self.run(&self.keys.snapshot, &[]).await?;
        let [generation, epoch, all] = reply.items() else {
            return Err(RedisFault::Refused(format!("a snapshot was answered {reply:?}")));
        };
        let mut nodes = Vec::new();
        let mut counts = HashMap::new();
        for entry in all.items() {
            let [name, info, incarnation, held] = entry.items() else { continue };
            // What another version wrote and this one cannot read is no node of this one's.
            let Ok(node) = NodeId::parse(name.text()) else { continue };
            let Ok(stored) = serde_json::from_str::<StoredInfo>(info.text()) else {
                tracing::debug!(%node, "what this node says of itself cannot be read");
                continue;
            };
            let mut numbers = held.text().split(' ').map(|number| number.parse().unwrap_or(0));
            let mut next = || numbers.next().unwrap_or(0);
            let held = Counts { sessions: next(), displaced: next(), delivered: next(), moves: next() };
            counts.insert(node.clone(), held);
            nodes.push(member(node, incarnation.int(), stored));
        }
        Ok((Snapshot { generation: generation.text().into(), epoch: epoch.int(), nodes }, counts))
    }
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
        },
        incarnation,
        state: if stored.draining { NodeState::Draining } else { NodeState::Active },
    }
}

/// Looks at the registry again and again, and publishes what the rules make of it.
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
                    tracing::warn!(%fault, "membership cannot be read; the view is kept (check redis.url)");
                }
                reachable = false;
                keeper.silent(began.elapsed())
            }
        };
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
        // A hint that comes at once after a rebuild waits for the next.
        let rest = if changed { inner.times.rebuild } else { inner.times.rebuild / 10 };
        tokio::time::sleep(rest).await;
        let next = around(inner.times.poll, JITTER, &mut rand::rng());
        let _ = tokio::time::timeout(next, inner.hint.notified()).await;
    }
}

/// Renews a node's lease for as long as it has one, on a task of its own.
async fn keep_beating(inner: Arc<Inner>, own: Arc<Own>) {
    let mut renewed = Instant::now();
    let mut times = 1;
    loop {
        let rest = around(inner.times.beat, JITTER, &mut rand::rng());
        tokio::time::sleep(rest).await;
        let turn = own.turn.lock().await;
        if *turn == Turn::Left {
            return;
        }
        let (state, counts) = *own.state.lock();
        let sent = Instant::now();
        let said = StoredInfo::text(&own.info, state);
        match inner.beat(&own.info.node, own.incarnation, &said, counts).await {
            Ok(beaten) if beaten.fenced => {
                tracing::warn!(
                    node = %own.info.node,
                    "another process has registered under this node's name (node.name): this one takes no more sockets"
                );
                own.standing.send_replace(Standing::Fenced);
                return;
            }
            Ok(beaten) => {
                // The beat that registered it again may have been one whose answer was lost.
                let was_lost = !beaten.was_member || renewed.elapsed() > inner.times.lease;
                renewed = sent;
                times += u64::from(was_lost);
                let now = Standing::Member(times);
                own.standing.send_if_modified(|known| std::mem::replace(known, now) != now);
                if was_lost {
                    tracing::info!(node = %own.info.node, "registered again");
                }
            }
            Err(fault) => {
                tracing::debug!(%fault, "a beat was not answered");
                if renewed.elapsed() > inner.times.lease {
                    own.standing.send_if_modified(|known| {
                        std::mem::replace(known, Standing::Lapsed) != Standing::Lapsed
                    });
                }
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
            let (told, standing) = watch::channel(Standing::Member(1));
            let own = Arc::new(Own {
                incarnation,
                state: Mutex::new((NodeState::Active, Counts::default())),
                standing: told,
                turn: tokio::sync::Mutex::new(Turn::Beating),
                info: info.clone(),
            });
            self.inner.own.lock().insert(info.node, Arc::clone(&own));
            self.tasks.lock().spawn(keep_beating(Arc::clone(&self.inner), own));
            self.inner.hint.notify_one();
            Ok(Registration { incarnation, standing })
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
            if *own.standing.borrow() == Standing::Fenced {
                return Err(MembershipError::Fenced(node));
            }
            own.state.lock().0 = NodeState::Draining;
            let mut turn = own.turn.lock().await;
            let answer = match how {
                Departure::Draining => {
                    let counts = own.state.lock().1;
                    let said = StoredInfo::text(&own.info, NodeState::Draining);
                    self.inner.beat(&node, incarnation, &said, counts).await.map(drop)
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
        // What this process holds is known better here than in the registry.
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
