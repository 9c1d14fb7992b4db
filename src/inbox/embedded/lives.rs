//! The lives of topics, in memory. A socket that opens asks for those of all topics that its user
//! is a member of; a look at the store for each cost members of ten logs 5 % of the sockets that
//! open in a second (`docs/benchmarks/log.md`).

use std::sync::atomic::{AtomicU64, Ordering};

use quick_cache::sync::Cache;

use crate::inbox::InboxError;
use crate::message::TopicName;

/// Topics whose life is known, the ones that were asked for last: about a megabyte.
const KNOWN: usize = 10_000;

/// The life of each topic; 0 if it has none. What is known counts until any life begins or ends.
pub(super) struct Lives {
    /// Each with the number of changes before it was read.
    known: Cache<TopicName, (u64, u64)>,
    /// How often a life has begun or ended.
    changes: AtomicU64,
}

impl Default for Lives {
    fn default() -> Self {
        Self { known: Cache::new(KNOWN), changes: AtomicU64::default() }
    }
}

impl Lives {
    /// The life of a topic, which `read` finds in the store as it is now.
    ///
    /// # Errors
    ///
    /// Those of `read`.
    pub(super) fn of(
        &self,
        topic: &TopicName,
        read: impl FnOnce() -> Result<u64, InboxError>,
    ) -> Result<u64, InboxError> {
        let changes = self.changes.load(Ordering::SeqCst);
        if let Some((life, at)) = self.known.get(topic)
            && at == changes
        {
            return Ok(life);
        }
        let life = read()?;
        self.known.insert(topic.clone(), (life, changes));
        Ok(life)
    }

    /// A life has begun or ended in the store.
    pub(super) fn changed(&self) {
        self.changes.fetch_add(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_life_is_read_once_until_it_changes() {
        let (lives, topic) = (Lives::default(), TopicName::parse("news").unwrap());
        assert_eq!(lives.of(&topic, || Ok(1)), Ok(1));
        assert_eq!(lives.of(&topic, || unreachable!("it is known")), Ok(1));
        lives.changed();
        assert_eq!(lives.of(&topic, || Ok(0)), Ok(0));
        assert_eq!(lives.of(&topic, || unreachable!("it is known that it has none")), Ok(0));
        lives.changed();
        let failed = Err(InboxError::Unavailable("it refuses".to_owned()));
        assert_eq!(lives.of(&topic, || failed.clone()), failed);
        assert_eq!(lives.of(&topic, || Ok(2)), Ok(2));
    }

    #[test]
    fn what_was_read_before_a_change_is_not_kept_after_it() {
        let (lives, topic) = (Lives::default(), TopicName::parse("news").unwrap());
        let read = lives.of(&topic, || {
            lives.changed();
            Ok(1)
        });
        assert_eq!(read, Ok(1), "who asked before the change may be told so");
        assert_eq!(lives.of(&topic, || Ok(2)), Ok(2));
    }
}
