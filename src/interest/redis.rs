//! The interest in Redis: one bitmap per process of a push node, with a lease, beside those of the
//! fallback. Routers poll them, and look at once after a hint.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{BoxFuture, FutureExt};
use parking_lot::{Mutex, RwLock};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::rule::Known;
use super::{BUCKETS, Buckets, Interest, InterestError, Reader};
use crate::backoff::around;
use crate::message::{LogId, NodeId};
use crate::transport::redis::{RedisError, RedisLink, Script, raise_panics};

/// Processes that are looked at: twice as many as a registry has nodes.
const READERS_MAX: usize = 2_000;
/// Longest name of a process, in bytes: a node's name and a number of 20 digits.
const NAME_MAX: usize = 300;
/// Longest version of a bitmap, in bytes: 32 digits.
const VERSION_MAX: usize = 64;
/// Jitter of polls.
const JITTER: f64 = 0.2;
/// After a hint, changes within this time are seen by the same look: the bitmaps of many nodes
/// change several times a second.
const AFTER_HINT: Duration = Duration::from_millis(250);
/// How long a bitmap is kept that the store has no more: longer than a view is a recent one, and
/// than Redis is mostly away.
const KEEP: Duration = Duration::from_secs(3_600);

/// The bitmaps in Redis. Cloned, they are the same; the task ends with the last clone.
#[derive(Clone)]
pub struct RedisInterest {
    inner: Arc<Inner>,
    tasks: Arc<Mutex<JoinSet<()>>>,
}

struct Inner {
    link: RedisLink,
    prefix: String,
    lease: Duration,
    poll: Duration,
    publish: Script,
    maps: Script,
    known: RwLock<Known>,
    began: Instant,
}

impl RedisInterest {
    /// For a process that publishes; with `looks`, also for one that routes: it polls the bitmaps
    /// every `poll`. A bitmap lives for `lease` without being published again.
    #[must_use]
    pub fn start(link: RedisLink, prefix: &str, lease: Duration, poll: Duration, looks: bool) -> Self {
        let inner = Arc::new(Inner {
            link: link.clone(),
            prefix: format!("{{{prefix}}}:interest"),
            lease,
            poll,
            publish: Script::new(include_str!("lua/publish.lua")),
            maps: Script::new(include_str!("../fallback/lua/maps.lua")),
            known: RwLock::default(),
            began: Instant::now(),
        });
        let mut tasks = JoinSet::new();
        if looks {
            let hint = Arc::new(Notify::new());
            tasks.spawn(link.listen(inner.channel(), Arc::clone(&hint)));
            tasks.spawn(look(Arc::clone(&inner), hint));
        }
        Self { inner, tasks: Arc::new(Mutex::new(tasks)) }
    }

    /// Watches its tasks for as long as it is polled. A panic of one is raised here.
    pub async fn watch_tasks(&self) {
        raise_panics(&self.tasks).await;
    }
}

/// `push-0/1795380000000`.
fn name(reader: &Reader) -> String {
    format!("{}/{}", reader.node, reader.incarnation)
}

fn reader_of(name: &str) -> Option<Reader> {
    let (node, incarnation) = name.split_once('/')?;
    Some(Reader { node: NodeId::parse(node).ok()?, incarnation: incarnation.parse().ok()? })
}

impl Inner {
    fn keys(&self) -> [String; 3] {
        ["readers", "maps", "versions"].map(|name| format!("{}:{name}", self.prefix))
    }

    fn channel(&self) -> String {
        format!("{}:changed", self.prefix)
    }

    async fn look(&self) -> Result<(), RedisError> {
        // What is seen is at least as new as this moment.
        let now = self.began.elapsed();
        let known: HashMap<String, String> = {
            let known = self.known.read();
            known.versions().map(|(reader, version)| (name(reader), version.to_owned())).collect()
        };
        let lease = self.lease.as_millis().to_string();
        let bounds = [READERS_MAX, NAME_MAX, VERSION_MAX, BUCKETS / 8].map(|bound| bound.to_string());
        let mut args = vec![lease.as_bytes()];
        args.extend(bounds.iter().map(String::as_bytes));
        for (reader, version) in &known {
            args.extend([reader.as_bytes(), version.as_bytes()]);
        }
        let keys = self.keys();
        let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
        let reply = self.link.run(&self.maps, &keys, &args).await?;
        let mut found = Vec::new();
        for entry in reply.items() {
            let [reader, version, map] = entry.items() else { continue };
            let Some(own) = reader_of(reader.text()) else { continue };
            let is_known = known.get(reader.text()).is_some_and(|at| at == version.text());
            // A version is empty where the script left out what cannot be a bitmap.
            let is_map = !is_known && !version.text().is_empty();
            let buckets = if is_map { Buckets::from_bytes(map.bytes()) } else { None };
            found.push((own, version.text().to_owned(), buckets));
        }
        self.known.write().take(found, now, KEEP);
        Ok(())
    }
}

/// Longest time until a router that polls so often sees what was published: two polls, of which one
/// may have begun just before the bitmap was written.
#[must_use]
pub fn seen_after(poll: Duration) -> Duration {
    poll.mul_f64(1.0 + JITTER) * 2
}

/// Polls the bitmaps, and at once after a hint.
async fn look(inner: Arc<Inner>, hint: Arc<Notify>) {
    loop {
        if let Err(fault) = inner.look().await {
            tracing::debug!(%fault, "the interest bitmaps cannot be read: messages to topics go to all nodes");
        }
        tokio::time::sleep(AFTER_HINT).await;
        let next = around(inner.poll, JITTER, &mut rand::rng());
        let _ = tokio::time::timeout(next, hint.notified()).await;
    }
}

impl Interest for RedisInterest {
    fn publish(&self, reader: &Reader, buckets: Arc<Buckets>) -> BoxFuture<'_, Result<bool, InterestError>> {
        let name = name(reader);
        async move {
            let inner = &self.inner;
            let (channel, lease) = (inner.channel(), inner.lease.as_millis().to_string());
            let map = buckets.as_bytes();
            // The version says what is in it: a process that publishes the same again changes
            // nothing.
            let version = format!("{:032x}", xxhash_rust::xxh3::xxh3_128(map));
            let keys = inner.keys();
            let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
            let args = [channel.as_bytes(), lease.as_bytes(), name.as_bytes(), version.as_bytes(), map];
            let done = inner.link.run(&inner.publish, &keys, &args).await;
            done.map(|reply| reply.int() == 1).map_err(|fault| InterestError(fault.to_string()))
        }
        .boxed()
    }

    fn may_read(&self, reader: &Reader, log: &LogId) -> bool {
        self.inner.known.read().may_read(reader, log, self.inner.began.elapsed())
    }
}
