//! The buckets of logs, and what a router knows of the nodes' bitmaps.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use super::Reader;
use crate::message::LogId;

/// Number of buckets of logs: 8 KiB per node. With 1,000 topics read by a node, 1.5 % of the
/// messages of others are sent to it in vain.
pub const BUCKETS: usize = 65_536;
/// A router that has not seen the bitmaps for this long sends everything to all.
pub const STALE_AFTER: Duration = Duration::from_secs(2);

/// A bitmap of the logs that a node reads.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Buckets(Vec<u8>);

impl Buckets {
    /// The bitmap of these logs. Everyone has no bit: a message to everyone goes to all nodes.
    pub fn of<'a>(logs: impl IntoIterator<Item = &'a LogId>) -> Self {
        let mut map = Vec::new();
        for bucket in logs.into_iter().filter_map(bucket) {
            map.resize(BUCKETS / 8, 0);
            map[bucket / 8] |= 1 << (bucket % 8);
        }
        Self(map)
    }

    /// A bitmap as it was published; `None` if it is none.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        (bytes.is_empty() || bytes.len() == BUCKETS / 8).then(|| Self(bytes.to_vec()))
    }

    /// [`BUCKETS`] / 8 bytes; none if no bit is set.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Whether the bit of a log is set.
    #[must_use]
    pub fn has(&self, log: &LogId) -> bool {
        let is_set =
            |bucket: usize| self.0.get(bucket / 8).is_some_and(|byte| *byte & (1 << (bucket % 8)) != 0);
        bucket(log).is_none_or(is_set)
    }
}

/// The bucket of a log; everyone has none.
fn bucket(log: &LogId) -> Option<usize> {
    match log {
        LogId::Topic(name) => {
            Some((xxhash_rust::xxh3::xxh3_64(name.as_str().as_bytes()) % BUCKETS as u64) as usize)
        }
        _ => None,
    }
}

/// The bitmap of a process, with its version.
#[derive(Debug, Clone)]
pub(super) struct Seen {
    pub(super) version: String,
    pub(super) buckets: Arc<Buckets>,
    /// When the store had it last.
    at: Duration,
}

/// What a router knows. Times are those of a clock that never goes back.
#[derive(Debug, Default)]
pub(super) struct Known {
    seen: HashMap<Reader, Seen>,
    looked_at: Option<Duration>,
}

impl Known {
    /// The versions that are known.
    pub(super) fn versions(&self) -> impl Iterator<Item = (&Reader, &str)> {
        self.seen.iter().map(|(reader, seen)| (reader, seen.version.as_str()))
    }

    /// Takes what the store has. `None` for a bitmap whose version is the known one. What the store
    /// has no more is kept for `keep`: the store may have lost it, and its node may still read.
    pub(super) fn take(
        &mut self,
        found: Vec<(Reader, String, Option<Buckets>)>,
        now: Duration,
        keep: Duration,
    ) {
        for (reader, version, buckets) in found {
            match (buckets, self.seen.get_mut(&reader)) {
                (Some(buckets), _) => {
                    let seen = Seen { version, buckets: Arc::new(buckets), at: now };
                    self.seen.insert(reader, seen);
                }
                (None, Some(known)) if known.version == version => known.at = now,
                // Not to be read: as if nothing were known.
                (None, _) => drop(self.seen.remove(&reader)),
            }
        }
        self.seen.retain(|_, seen| now.saturating_sub(seen.at) <= keep);
        self.looked_at = Some(now);
    }

    /// Whether a process may read a log.
    pub(super) fn may_read(&self, reader: &Reader, log: &LogId, now: Duration) -> bool {
        let is_stale = self.looked_at.is_none_or(|at| now.saturating_sub(at) > STALE_AFTER);
        is_stale || self.seen.get(reader).is_none_or(|seen| seen.buckets.has(log))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::message::{NodeId, TopicName};

    fn log(n: usize) -> LogId {
        LogId::Topic(TopicName::parse(&format!("topic-{n}")).unwrap())
    }

    fn reader(incarnation: u64) -> Reader {
        Reader { node: NodeId::parse("push-0").unwrap(), incarnation }
    }

    const KEEP: Duration = Duration::from_secs(60);

    #[test]
    fn what_is_not_known_is_sent() {
        let mut known = Known::default();
        let at = Duration::from_secs;
        assert!(known.may_read(&reader(1), &log(1), at(0)), "nothing was seen yet");
        let bits = || Some(Buckets::of([&log(1)]));
        known.take(vec![(reader(1), "1".to_owned(), bits())], at(10), KEEP);
        assert!(known.may_read(&reader(1), &log(1), at(12)));
        assert!(!known.may_read(&reader(1), &log(2), at(12)));
        assert!(known.may_read(&reader(1), &LogId::Everyone, at(12)));
        assert!(known.may_read(&reader(2), &log(2), at(12)), "another process of the node");
        assert!(known.may_read(&reader(1), &log(2), at(13)), "not seen for more than 2 s");
        known.take(vec![(reader(1), "1".to_owned(), None)], at(14), KEEP);
        assert!(!known.may_read(&reader(1), &log(2), at(14)), "the same version");
        known.take(Vec::new(), at(60), KEEP);
        assert!(!known.may_read(&reader(1), &log(2), at(60)), "lost in the store, and kept");
        known.take(Vec::new(), at(75), KEEP);
        assert!(known.may_read(&reader(1), &log(2), at(75)));
        known.take(vec![(reader(1), "2".to_owned(), Some(Buckets::default()))], at(80), KEEP);
        assert!(!known.may_read(&reader(1), &log(1), at(80)), "to read nothing is known too");
        known.take(vec![(reader(1), "rubbish".to_owned(), None)], at(81), KEEP);
        assert!(known.may_read(&reader(1), &log(1), at(81)), "what cannot be read is not known");
    }

    proptest! {
        /// A bitmap has every log that it was made of, also after its way through the store.
        #[test]
        fn a_bitmap_has_what_is_read(read in proptest::collection::hash_set(0usize..5_000, 0..200), other in 5_000usize..9_000) {
            let logs: Vec<LogId> = read.iter().map(|n| log(*n)).collect();
            let made = Buckets::of(&logs);
            let came = Buckets::from_bytes(made.as_bytes()).unwrap();
            prop_assert!(logs.iter().all(|log| came.has(log)));
            let buckets: std::collections::HashSet<_> = logs.iter().map(bucket).collect();
            prop_assert_eq!(came.has(&log(other)), buckets.contains(&bucket(&log(other))));
            prop_assert_eq!(made.as_bytes().is_empty(), read.is_empty());
        }
    }

    #[test]
    fn what_is_no_bitmap_is_refused() {
        for bytes in [1, 100, BUCKETS / 8 - 1, BUCKETS / 8 + 1, BUCKETS] {
            assert_eq!(Buckets::from_bytes(&vec![0; bytes]), None);
        }
    }
}
