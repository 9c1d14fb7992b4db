//! Which collect writes to a topic. A publish to a topic is handed to one collect, the same one
//! from everywhere, so that writers do not take each other's numbers. Where two disagree about who
//! it is, the fence of the id decides, as ever.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;
use tokio::sync::{Semaphore, SemaphorePermit, watch};
use tokio::time::Instant;
use tower::ServiceExt;
use xxhash_rust::xxh3::Xxh3;

use crate::colleagues::{Colleague, Colleagues};
use crate::inbox::logs::key;
use crate::message::{LogId, NodeId};
use crate::role::WriterDirectory;
use crate::telemetry::Metrics;
use crate::wire::peer::{Received, TopicWrite};

/// How long the receipt of a publish may take.
const RECEIPT: Duration = Duration::from_millis(100);
/// Publishes under way to other collects, fewer than an HTTP/2 connection has streams. Beyond, they
/// are written here.
const AT_ONCE: usize = 500;
/// How long this process leaves its topics to others after its store has refused a write.
const REST: Duration = Duration::from_secs(30);
/// Names of collects that are remembered, so that each is logged once.
const TOLD_MAX: usize = 1_000;
/// How long a collect is passed over that has not received one in time.
const PASSED_OVER: Duration = Duration::from_secs(1);

/// The collects that write to topics, as one of them sees them.
pub struct Writers {
    own: NodeId,
    colleagues: Arc<dyn Colleagues>,
    all: watch::Receiver<Arc<[Colleague]>>,
    directory: Arc<dyn WriterDirectory>,
    /// Publishes that are handed over at the same time.
    room: Semaphore,
    not_received: Counter,
    /// Whose refusals were logged already.
    told: Mutex<HashSet<NodeId>>,
    /// Until when a process is passed over.
    passed_over: Mutex<HashMap<NodeId, Instant>>,
}

/// What became of a publish that belongs to another collect.
pub(super) enum Handed<'a> {
    /// It was received there. Its place among those under way is kept until its outcome is known.
    Received(Received, SemaphorePermit<'a>),
    /// It was not received in time, and is to be written here.
    NotReceived,
}

impl Writers {
    /// As the collect of this name sees them.
    #[must_use]
    pub fn new(
        own: NodeId,
        colleagues: Arc<dyn Colleagues>,
        directory: Arc<dyn WriterDirectory>,
        metrics: &Metrics,
    ) -> Self {
        let not_received = Counter::default();
        let help =
            "Publishes to topics that another collect did not take in time, and that were written here";
        metrics.register(|r| r.register("not_handed_over", help, not_received.clone()));
        Self {
            own,
            all: colleagues.all(),
            colleagues,
            directory,
            room: Semaphore::new(AT_ONCE),
            not_received,
            told: Mutex::default(),
            passed_over: Mutex::default(),
        }
    }

    /// The store of this process does not take what is written to topics: others are to do it for
    /// a while.
    pub(super) fn rest(&self) {
        self.colleagues.rest(REST);
    }

    /// The collect that writes to a log, or to the members of a topic; `None` if it is this one.
    pub(super) fn of(&self, log: &LogId) -> Option<Colleague> {
        let all = Arc::clone(&self.all.borrow());
        // Nobody is asked for who is alone.
        if all.iter().all(|one| one.node == self.own) {
            return None;
        }
        let now = Instant::now();
        let passed_over = self.passed_over.lock();
        let is_passed_over = |one: &Colleague| passed_over.get(&one.node).is_some_and(|until| now < *until);
        let others = all.iter().filter(|one| one.node != self.own && !is_passed_over(one));
        let own = self.colleagues.is_there().then_some(&self.own);
        let names = others.clone().map(|one| &one.node).chain(own);
        let chosen = chosen(log, names)?;
        others.clone().find(|one| one.node == *chosen).cloned()
    }

    /// Hands a publish to the collect that it belongs to.
    pub(super) async fn hand(&self, to: &Colleague, write: TopicWrite) -> Handed<'_> {
        let Ok(room) = self.room.try_acquire() else {
            // Too many are under way: no fault of the other.
            self.not_received.inc();
            return Handed::NotReceived;
        };
        let Some(service) = self.directory.find(to) else { return self.not_received(to, "no address") };
        match tokio::time::timeout(RECEIPT, service.oneshot(write)).await {
            Ok(Ok(received)) => Handed::Received(received, room),
            Ok(Err(fault)) => self.not_received(to, &fault.to_string()),
            Err(_) => self.not_received(to, "no receipt in time"),
        }
    }

    fn not_received(&self, by: &Colleague, why: &str) -> Handed<'_> {
        self.pass_over(by, why);
        Handed::NotReceived
    }

    /// For a moment nothing is handed to this collect.
    pub(super) fn pass_over(&self, one: &Colleague, why: &str) {
        self.not_received.inc();
        let mut told = self.told.lock();
        if told.len() < TOLD_MAX && told.insert(one.node.clone()) {
            tracing::warn!(
                node = %one.node,
                peer = &*one.peer,
                why,
                "a collect does not take publishes to topics, which are written here: check its peer.advertise and \
                 peer.listen, that peer.secret is the same everywhere, and its store"
            );
        }
        drop(told);
        tracing::debug!(node = %one.node, why, "a collect does not take a publish to a topic; it is written here");
        let now = Instant::now();
        let mut passed_over = self.passed_over.lock();
        passed_over.retain(|_, until| now < *until);
        passed_over.insert(one.node.clone(), now + PASSED_OVER);
    }
}

/// The name with the highest hash together with that of the log (rendezvous hashing, Thaler and
/// Ravishankar 1998): whoever knows the same names chooses the same one, and a name that goes moves
/// nothing but what it had.
fn chosen<'a>(log: &LogId, names: impl Iterator<Item = &'a NodeId>) -> Option<&'a NodeId> {
    let log = key(log);
    let weight = |name: &NodeId| {
        let mut hash = Xxh3::new();
        hash.update(log.as_str().as_bytes());
        // No name has this byte.
        hash.update(&[0]);
        hash.update(name.as_str().as_bytes());
        hash.digest()
    };
    names.max_by_key(|name| (weight(name), name.as_str()))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::message::TopicName;

    fn nodes(numbers: &BTreeSet<u16>) -> Vec<NodeId> {
        numbers.iter().map(|n| NodeId::parse(&format!("collect-{n}")).unwrap()).collect()
    }

    fn topic(n: usize) -> LogId {
        LogId::Topic(TopicName::parse(&format!("topic-{n}")).unwrap())
    }

    proptest! {
        /// The order in which the names are known changes nothing; who goes moves its own topics
        /// alone.
        #[test]
        fn all_choose_the_same_one_and_one_that_goes_moves_nothing_else(
            numbers in prop::collection::btree_set(0u16..40, 1..12), gone in any::<prop::sample::Index>(),
        ) {
            let all = nodes(&numbers);
            let gone = gone.get(&all);
            for log in (0..50).map(topic).chain([LogId::Everyone]) {
                let before = chosen(&log, all.iter()).unwrap();
                prop_assert_eq!(chosen(&log, all.iter().rev()).unwrap(), before);
                let after = chosen(&log, all.iter().filter(|one| *one != gone));
                if before != gone {
                    prop_assert_eq!(after, Some(before));
                }
            }
        }
    }

    #[test]
    fn topics_are_spread_over_all() {
        let all = nodes(&(0..4).collect());
        let mut count = [0; 4];
        for n in 0..4_000 {
            let log = topic(n);
            let one = chosen(&log, all.iter()).unwrap();
            count[all.iter().position(|name| name == one).unwrap()] += 1;
        }
        // A thousand each, within five standard deviations.
        assert!(count.iter().all(|count| (860..1_140).contains(count)), "{count:?}");
    }
}
