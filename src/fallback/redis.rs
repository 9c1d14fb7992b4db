//! The fallback entries in Redis: one set per push node and process, with a lease, and beside it a
//! bitmap of [`BUCKETS`] user buckets. A router asks Redis only about users whose bucket is set in
//! some bitmap; in the steady state about none.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{BoxFuture, FutureExt};
use parking_lot::{Mutex, RwLock};
use tokio::sync::Notify;
use tokio::task::JoinSet;

use super::{Fallback, FallbackError, Hints, Holder, Which};
use crate::backoff::around;
use crate::message::{NodeId, UserId};
use crate::transport::redis::{RedisError, RedisLink, Script, raise_panics};

/// Number of user buckets: 1 KiB per holder. With 100 displaced users 1.2 % of the others are
/// looked up in vain (docs/design.md, section 6).
pub const BUCKETS: usize = 8_192;
/// Holders that are looked at: twice as many as a registry has nodes, because a node's former
/// process may still be among them.
const HOLDERS_MAX: usize = 2_000;
/// Longest name of a holder, in bytes: a node's name and a number of 20 digits.
const NAME_MAX: usize = 300;
/// Longest version of a bitmap, in bytes: a number, and what tells one process from another.
const VERSION_MAX: usize = 64;
/// Users in one call. The arguments of a script are limited, and a long call delays others.
const USERS_PER_CALL: usize = 1_000;
/// Jitter of polls.
const JITTER: f64 = 0.2;
/// After a hint, changes within this time are seen by the same look.
const AFTER_HINT: Duration = Duration::from_millis(20);

/// The fallback entries in Redis. Cloned, it is the same set of entries; its task ends with the
/// last clone.
#[derive(Clone)]
pub struct RedisFallback {
    inner: Arc<Inner>,
    tasks: Arc<Mutex<JoinSet<()>>>,
}

struct Inner {
    link: RedisLink,
    prefix: String,
    lease: Duration,
    poll: Duration,
    enter: Script,
    maps: Script,
    own: Mutex<HashMap<Holder, Arc<Own>>>,
    seen: RwLock<Seen>,
}

/// The bitmaps of all holders, as they were last seen.
#[derive(Default)]
struct Seen {
    maps: HashMap<Holder, (String, Arc<[u8]>)>,
    /// The last look failed. A look-up would take as long as it takes to notice a failure.
    unreachable: bool,
}

/// A set of this process.
#[derive(Default)]
struct Own {
    /// Held during each call, so that an older bitmap never overtakes a newer one.
    turn: tokio::sync::Mutex<()>,
    users: Mutex<Entered>,
}

#[derive(Default)]
struct Entered {
    users: HashSet<UserId>,
    /// Number of users per bucket. The bit is cleared when the last one has left.
    buckets: HashMap<u16, u32>,
    version: u64,
}

fn bucket(user: &UserId) -> u16 {
    (xxhash_rust::xxh3::xxh3_64(user.as_str().as_bytes()) % BUCKETS as u64) as u16
}

impl Entered {
    fn add(&mut self, user: &UserId) {
        if self.users.insert(user.clone()) {
            let count = self.buckets.entry(bucket(user)).or_default();
            *count += 1;
            self.version += u64::from(*count == 1);
        }
    }

    fn remove(&mut self, user: &UserId) {
        if self.users.remove(user)
            && let Some(count) = self.buckets.get_mut(&bucket(user))
        {
            *count -= 1;
            if *count == 0 {
                self.buckets.remove(&bucket(user));
                self.version += 1;
            }
        }
    }

    /// The bitmap; empty if no user is entered.
    fn map(&self) -> Vec<u8> {
        if self.buckets.is_empty() {
            return Vec::new();
        }
        let mut map = vec![0; BUCKETS / 8];
        self.buckets.keys().for_each(|bucket| map[usize::from(*bucket) / 8] |= 1 << (bucket % 8));
        map
    }
}

fn has_bucket(map: &[u8], bucket: u16) -> bool {
    map.get(usize::from(bucket) / 8).is_some_and(|byte| byte & (1 << (bucket % 8)) != 0)
}

impl RedisFallback {
    /// Starts to poll the bitmaps, every `poll`. Entries live for `lease` without being renewed.
    #[must_use]
    pub fn start(link: RedisLink, prefix: &str, lease: Duration, poll: Duration) -> Self {
        let inner = Arc::new(Inner {
            link: link.clone(),
            prefix: format!("{{{prefix}}}:fallback"),
            lease,
            poll,
            enter: Script::new(include_str!("lua/enter.lua")),
            maps: Script::new(include_str!("lua/maps.lua")),
            own: Mutex::default(),
            seen: RwLock::default(),
        });
        let hint = Arc::new(Notify::new());
        let mut tasks = JoinSet::new();
        tasks.spawn(link.listen(inner.channel(), Arc::clone(&hint)));
        tasks.spawn(look(Arc::clone(&inner), hint));
        Self { inner, tasks: Arc::new(Mutex::new(tasks)) }
    }

    fn own(&self, holder: &Holder) -> Arc<Own> {
        Arc::clone(self.inner.own.lock().entry(holder.clone()).or_default())
    }

    async fn change(&self, holder: Holder, act: &str, users: Vec<UserId>) -> Result<usize, FallbackError> {
        let own = self.own(&holder);
        let _turn = own.turn.lock().await;
        let (map, version) = {
            let mut entered = own.users.lock();
            let change = if act == "SADD" { Entered::add } else { Entered::remove };
            users.iter().for_each(|user| change(&mut entered, user));
            (entered.map(), entered.version.to_string())
        };
        let inner = &self.inner;
        let (name, lease) = (name(&holder), inner.lease.as_millis().to_string());
        let (keys, set) = (inner.keys(), inner.set(&name));
        let keys = [keys[0].as_str(), keys[1].as_str(), keys[2].as_str(), set.as_str()];
        let mut size = 0;
        let mut batches: Vec<&[UserId]> = users.chunks(USERS_PER_CALL).collect();
        if batches.is_empty() {
            // One call without users renews the lease.
            batches.push(&[]);
        }
        for batch in batches {
            let channel = inner.channel();
            let mut args =
                vec![channel.as_bytes(), lease.as_bytes(), name.as_bytes(), version.as_bytes(), &map];
            args.push(act.as_bytes());
            args.extend(batch.iter().map(|user| user.as_str().as_bytes()));
            size = inner.link.run(&inner.enter, &keys, &args).await.map_err(unreachable)?.int();
        }
        Ok(usize::try_from(size).unwrap_or(usize::MAX))
    }
}

/// `push-0/1795380000000`.
fn name(holder: &Holder) -> String {
    format!("{}/{}", holder.node, holder.incarnation)
}

fn holder_of(name: &str) -> Option<Holder> {
    let (node, incarnation) = name.split_once('/')?;
    Some(Holder { node: NodeId::parse(node).ok()?, incarnation: incarnation.parse().ok()? })
}

fn unreachable(fault: RedisError) -> FallbackError {
    FallbackError(fault.to_string())
}

impl Inner {
    fn keys(&self) -> [String; 3] {
        ["holders", "maps", "versions"].map(|name| format!("{}:{name}", self.prefix))
    }

    fn set(&self, name: &str) -> String {
        format!("{}:users:{name}", self.prefix)
    }

    fn channel(&self) -> String {
        format!("{}:changed", self.prefix)
    }

    async fn look(&self) -> Result<(), RedisError> {
        let known: Vec<(String, String)> =
            self.seen.read().maps.iter().map(|(holder, map)| (name(holder), map.0.clone())).collect();
        let lease = self.lease.as_millis().to_string();
        let bounds = [HOLDERS_MAX, NAME_MAX, VERSION_MAX, BUCKETS / 8].map(|bound| bound.to_string());
        let mut args = vec![lease.as_bytes()];
        args.extend(bounds.iter().map(String::as_bytes));
        for (holder, version) in &known {
            args.extend([holder.as_bytes(), version.as_bytes()]);
        }
        let keys = self.keys();
        let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
        let reply = self.link.run(&self.maps, &keys, &args).await?;
        let mut seen = self.seen.write();
        let mut before = std::mem::take(&mut seen.maps);
        for entry in reply.items() {
            let [name, version, map] = entry.items() else { continue };
            let Some(holder) = holder_of(name.text()) else { continue };
            let map = match before.remove(&holder) {
                Some((known, map)) if known == version.text() => map,
                _ if map.bytes().len() > BUCKETS / 8 => continue,
                _ => Arc::from(map.bytes()),
            };
            seen.maps.insert(holder, (version.text().to_owned(), map));
        }
        Ok(())
    }
}

/// Polls the bitmaps, and at once after a hint.
async fn look(inner: Arc<Inner>, hint: Arc<Notify>) {
    loop {
        let looked = inner.look().await;
        inner.seen.write().unreachable = looked.is_err();
        if let Err(fault) = looked {
            tracing::debug!(%fault, "the fallback bitmaps cannot be read");
        }
        tokio::time::sleep(AFTER_HINT).await;
        let next = around(inner.poll, JITTER, &mut rand::rng());
        let _ = tokio::time::timeout(next, hint.notified()).await;
    }
}

impl RedisFallback {
    /// Watches its tasks for as long as it is polled. A panic of one is raised here: without its
    /// tasks this would show the same for ever.
    pub async fn watch_tasks(&self) {
        raise_panics(&self.tasks).await;
    }
}

impl Fallback for RedisFallback {
    fn add(&self, holder: &Holder, users: Vec<UserId>) -> BoxFuture<'_, Result<(), FallbackError>> {
        let holder = holder.clone();
        async move { self.change(holder, "SADD", users).await.map(drop) }.boxed()
    }

    fn remove(&self, holder: &Holder, which: Which) -> BoxFuture<'_, Result<(), FallbackError>> {
        let holder = holder.clone();
        async move {
            let users = match which {
                Which::Users(users) => users,
                Which::All => self.own(&holder).users.lock().users.iter().cloned().collect(),
            };
            self.change(holder, "SREM", users).await.map(drop)
        }
        .boxed()
    }

    fn keep(&self, holder: &Holder) -> BoxFuture<'_, Result<usize, FallbackError>> {
        let holder = holder.clone();
        async move { self.change(holder, "SADD", Vec::new()).await }.boxed()
    }

    fn nodes_of(&self, users: Vec<UserId>) -> BoxFuture<'_, Result<Vec<Vec<NodeId>>, FallbackError>> {
        async move {
            let mut found = vec![Vec::new(); users.len()];
            let (batches, unreachable_now) = {
                let seen = self.inner.seen.read();
                let buckets: Vec<u16> = users.iter().map(bucket).collect();
                let batch = |(holder, (_, map)): (&Holder, &(String, Arc<[u8]>))| {
                    let asked: Vec<usize> =
                        (0..users.len()).filter(|n| has_bucket(map, buckets[*n])).collect();
                    (!asked.is_empty()).then(|| (holder.clone(), asked))
                };
                (seen.maps.iter().filter_map(batch).collect::<Vec<_>>(), seen.unreachable)
            };
            if batches.is_empty() {
                return Ok(found);
            }
            if unreachable_now {
                return Err(FallbackError("Redis did not answer when it was last asked".to_owned()));
            }
            let command = |(holder, asked): &(Holder, Vec<usize>)| {
                let mut words = vec![b"SMISMEMBER".to_vec(), self.inner.set(&name(holder)).into_bytes()];
                words.extend(asked.iter().map(|n| users[*n].as_str().as_bytes().to_vec()));
                words
            };
            let answers =
                self.inner.link.send(batches.iter().map(command).collect()).await.map_err(unreachable)?;
            for ((holder, asked), answer) in batches.iter().zip(&answers) {
                for (n, is) in asked.iter().zip(answer.items()) {
                    if is.int() == 1 {
                        found[*n].push(holder.node.clone());
                    }
                }
            }
            Ok(found)
        }
        .boxed()
    }

    fn hints(&self) -> Hints {
        Hints {
            empty: self.inner.seen.read().maps.is_empty(),
            // Two polls: one may have begun just before the entry was written.
            seen_after: self.inner.poll.mul_f64(1.0 + JITTER) * 2,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// The bitmap has a user's bucket exactly while a user of that bucket is entered, and its
        /// version changes with it.
        #[test]
        fn a_bitmap_has_whoever_is_entered(steps in proptest::collection::vec((0u16..300, any::<bool>()), 1..400)) {
            let mut entered = Entered::default();
            let mut model: HashSet<UserId> = HashSet::new();
            for (n, enters) in steps {
                let user = UserId::parse(&format!("user-{n}")).unwrap();
                let (before, version) = (entered.map(), entered.version);
                if enters {
                    model.insert(user.clone());
                    entered.add(&user);
                } else {
                    model.remove(&user);
                    entered.remove(&user);
                }
                let map = entered.map();
                prop_assert!(model.iter().all(|user| has_bucket(&map, bucket(user))));
                let bits: u32 = map.iter().map(|byte| byte.count_ones()).sum();
                let buckets: HashSet<u16> = model.iter().map(bucket).collect();
                prop_assert_eq!(bits as usize, buckets.len());
                prop_assert_eq!(before != map, version != entered.version);
            }
        }
    }

    #[test]
    fn a_holder_is_read_as_it_was_named() {
        let holder = Holder { node: NodeId::parse("push-0").unwrap(), incarnation: 1_795_380_000_000 };
        assert_eq!(holder_of(&name(&holder)), Some(holder));
        assert_eq!(holder_of("push-0"), None);
    }
}
