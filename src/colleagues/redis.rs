//! The colleagues in Redis: a set with leases, beside the members of the view.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{BoxFuture, FutureExt};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::{Colleague, Colleagues};
use crate::backoff::around;
use crate::message::NodeId;
use crate::peer_proof::{Entry, EntryKey};
use crate::transport::redis::{RedisError, RedisLink, Reply, Script, raise_panics};

/// Colleagues that are looked at: as many as a registry has nodes.
const COLLEAGUES_MAX: usize = 1_000;
/// Longest name, and longest text, of one colleague, in bytes. An entry has about 150.
const TEXT_MAX: usize = 1_024;
/// Longest address of a peer port: a host name of 253 characters, a colon and a port.
const PEER_MAX: usize = 260;
/// Jitter of beats.
const JITTER: f64 = 0.2;

/// The colleagues in Redis. Cloned, they are the same; the task ends with the last clone.
#[derive(Clone)]
pub struct RedisColleagues {
    inner: Arc<Inner>,
    tasks: Arc<Mutex<JoinSet<()>>>,
}

struct Inner {
    link: RedisLink,
    keys: [String; 2],
    script: Script,
    lease: Duration,
    beat: Duration,
    entries: EntryKey,
    own: Mutex<Option<Colleague>>,
    rests_until: Mutex<Option<Instant>>,
    hurry: Notify,
    /// Held while Redis is told something, so that no beat follows a leave.
    turn: tokio::sync::Mutex<()>,
    all: watch::Sender<Arc<[Colleague]>>,
}

/// A colleague as it is stored. Unknown fields are ignored, so that versions may mix.
#[derive(Serialize, Deserialize)]
struct Stored {
    incarnation: u64,
    peer: String,
    /// Made with `peer.secret`, over the name and the address.
    proof: String,
}

/// What is proved of a colleague: no node of the registry says that it has neither role.
fn entry<'a>(node: &'a NodeId, peer: &'a str) -> Entry<'a> {
    Entry { node: node.as_str(), peer, push: false, dispatch: false, store: "" }
}

impl RedisColleagues {
    /// Looks every `beat`, ± 20 %, and keeps this process registered once it has joined; a lease
    /// lasts for `lease` without a beat.
    #[must_use]
    pub fn start(link: RedisLink, prefix: &str, lease: Duration, beat: Duration, entries: EntryKey) -> Self {
        let inner = Arc::new(Inner {
            link,
            keys: ["colleagues", "colleagues:info"].map(|name| format!("{{{prefix}}}:{name}")),
            script: Script::new(include_str!("lua/beat.lua")),
            lease,
            beat,
            entries,
            own: Mutex::new(None),
            rests_until: Mutex::new(None),
            hurry: Notify::new(),
            turn: tokio::sync::Mutex::default(),
            all: watch::Sender::new(Arc::default()),
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(keep_beating(Arc::clone(&inner)));
        Self { inner, tasks: Arc::new(Mutex::new(tasks)) }
    }

    /// Watches its task for as long as it is polled. A panic of it is raised here.
    pub async fn watch_tasks(&self) {
        raise_panics(&self.tasks).await;
    }
}

impl Inner {
    /// Tells Redis of this process, and reads who is there.
    async fn tell(&self, act: &str, own: Option<&Colleague>) -> Result<Vec<Colleague>, RedisError> {
        let lease = self.lease.as_millis().to_string();
        let bounds = [COLLEAGUES_MAX, TEXT_MAX].map(|bound| bound.to_string());
        let node = own.map_or("", |own| own.node.as_str());
        let said = own.map(|own| self.said(own)).unwrap_or_default();
        let args = [&lease, act, node, &said, &bounds[0], &bounds[1]].map(str::as_bytes);
        let keys = [self.keys[0].as_str(), self.keys[1].as_str()];
        let reply = self.link.run(&self.script, &keys, &args).await?;
        Ok(read(&reply, &self.entries))
    }

    fn said(&self, own: &Colleague) -> String {
        let (peer, proof) = (own.peer.to_string(), self.entries.sign(entry(&own.node, &own.peer)));
        // Plain fields: serialisation cannot fail.
        serde_json::to_string(&Stored { incarnation: own.incarnation, peer, proof }).unwrap_or_default()
    }

    fn rests(&self) -> bool {
        self.rests_until.lock().is_some_and(|until| Instant::now() < until)
    }

    async fn beat(&self) {
        let _turn = self.turn.lock().await;
        let own = self.own.lock().clone();
        let act = match (&own, self.rests()) {
            (Some(_), false) => "stay",
            (Some(_), true) => "leave",
            (None, _) => "look",
        };
        match self.tell(act, own.as_ref()).await {
            Ok(all) => {
                self.all.send_if_modified(|known| {
                    let changed = known[..] != all[..];
                    if changed {
                        tracing::debug!(count = all.len(), "the collects that write to topics");
                        *known = all.into();
                    }
                    changed
                });
            }
            Err(fault) => tracing::debug!(%fault, "the other collects cannot be read; they are kept"),
        }
    }
}

/// Reads who is there. Nothing in it is trusted: another program, or another version of this one,
/// may have written it.
fn read(reply: &Reply, entries: &EntryKey) -> Vec<Colleague> {
    let one = |item: &Reply| {
        let [name, said] = item.items() else { return None };
        let node = NodeId::parse(name.text()).ok()?;
        let stored: Stored = serde_json::from_str(said.text()).ok()?;
        let is_good = stored.peer.len() <= PEER_MAX
            && !stored.peer.is_empty()
            && entries.verify(entry(&node, &stored.peer), &stored.proof);
        is_good.then(|| Colleague { node, incarnation: stored.incarnation, peer: stored.peer.into() })
    };
    let mut all: Vec<Colleague> = reply.items().iter().take(COLLEAGUES_MAX).filter_map(one).collect();
    all.sort_by(|a, b| a.node.cmp(&b.node));
    all.dedup_by(|a, b| a.node == b.node);
    all
}

async fn keep_beating(inner: Arc<Inner>) {
    loop {
        inner.beat().await;
        let next = around(inner.beat, JITTER, &mut rand::rng());
        let _ = tokio::time::timeout(next, inner.hurry.notified()).await;
    }
}

impl Colleagues for RedisColleagues {
    fn all(&self) -> watch::Receiver<Arc<[Colleague]>> {
        self.inner.all.subscribe()
    }

    fn join(&self, own: Colleague) {
        *self.inner.own.lock() = Some(own);
        self.inner.hurry.notify_one();
    }

    fn rest(&self, length: Duration) {
        let before = self.inner.rests_until.lock().replace(Instant::now() + length);
        if before.is_none_or(|until| until <= Instant::now()) {
            self.inner.hurry.notify_one();
        }
    }

    fn is_there(&self) -> bool {
        self.inner.own.lock().is_some() && !self.inner.rests()
    }

    fn leave(&self) -> BoxFuture<'_, ()> {
        async move {
            let _turn = self.inner.turn.lock().await;
            let own = self.inner.own.lock().take();
            if let Some(own) = own
                && let Err(fault) = self.inner.tell("leave", Some(&own)).await
            {
                tracing::debug!(%fault, "other collects see that this one has left when its lease ends");
            }
        }
        .boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key() -> EntryKey {
        EntryKey::derive(&["peer-secret-of-the-tests-0123456789abcdef"])
    }

    fn bytes(text: &str) -> Reply {
        Reply::Bytes(text.as_bytes().to_vec())
    }

    fn stored(name: &str, peer: &str, key: &EntryKey) -> Reply {
        let proof = key.sign(entry(&NodeId::parse(name).unwrap(), peer));
        let said = serde_json::to_string(&Stored { incarnation: 7, peer: peer.to_owned(), proof });
        Reply::List(vec![bytes(name), bytes(&said.unwrap())])
    }

    #[test]
    fn who_does_not_know_the_secret_or_has_no_address_is_no_colleague() {
        let other = EntryKey::derive(&["another-secret-of-the-tests-0123456789ab"]);
        let long = "a".repeat(PEER_MAX + 1);
        let all = Reply::List(vec![
            stored("collect-1", "10.0.0.2:7070", &key()),
            stored("collect-0", "10.0.0.1:7070", &key()),
            stored("collect-2", "10.0.0.3:7070", &other),
            stored("collect-3", "", &key()),
            stored("collect-4", &long, &key()),
            Reply::List(vec![bytes("collect-5"), bytes("{}")]),
            Reply::List(vec![bytes("Collect 6"), bytes("{}")]),
            Reply::Nil,
        ]);
        let names: Vec<String> = read(&all, &key()).iter().map(|one| one.node.to_string()).collect();
        assert_eq!(names, ["collect-0", "collect-1"]);
    }

    proptest! {
        /// Whatever is written there, nothing panics, and who has a proof is found.
        #[test]
        fn rubbish_is_no_colleague(
            names in prop::collection::vec("[ -~]{0,40}", 0..5), rubbish in prop::collection::vec(any::<u8>(), 0..80),
        ) {
            let odd = names.iter().map(|name| Reply::List(vec![bytes(name), Reply::Bytes(rubbish.clone())]));
            let good = stored("collect-0", "10.0.0.1:7070", &key());
            let found = read(&Reply::List(odd.chain([good]).collect()), &key());
            prop_assert_eq!(found.len(), 1);
        }
    }
}
