//! The lives of topics, in memory. A socket that opens asks for those of all topics that its user
//! is a member of; a look at the store for each was a sixth of what the runtime did for it.

use std::sync::atomic::{AtomicU64, Ordering};

use quick_cache::sync::Cache;

use crate::inbox::InboxError;
use crate::message::TopicName;

/// Topics whose life is known, the ones that were asked for last: about a megabyte.
const KNOWN: usize = 10_000;

/// The life of each topic; 0 if it has none.
pub(super) struct Lives {
    known: Cache<TopicName, u64>,
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
        if let Some(life) = self.known.get(topic) {
            return Ok(life);
        }
        let changes = self.changes.load(Ordering::SeqCst);
        let life = read()?;
        self.known.insert(topic.clone(), life);
        if self.changes.load(Ordering::SeqCst) != changes {
            // It may have been read before the change, and kept after it.
            self.known.remove(topic);
        }
        Ok(life)
    }

    /// The life of a topic has changed in the store.
    pub(super) fn changed(&self, topic: &TopicName) {
        // First the count, then what is known: what is kept after this is taken out again.
        self.changes.fetch_add(1, Ordering::SeqCst);
        self.known.remove(topic);
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
        lives.changed(&topic);
        assert_eq!(lives.of(&topic, || Ok(0)), Ok(0));
        assert_eq!(lives.of(&topic, || unreachable!("it is known that it has none")), Ok(0));
        lives.changed(&topic);
        let failed = Err(InboxError::Unavailable("it refuses".to_owned()));
        assert_eq!(lives.of(&topic, || failed.clone()), failed);
        assert_eq!(lives.of(&topic, || Ok(2)), Ok(2));
    }

    #[test]
    fn what_was_read_before_a_change_is_not_kept_after_it() {
        let (lives, topic) = (Lives::default(), TopicName::parse("news").unwrap());
        let read = lives.of(&topic, || {
            lives.changed(&topic);
            Ok(1)
        });
        assert_eq!(read, Ok(1), "who asked before the change may be told so");
        assert_eq!(lives.of(&topic, || Ok(2)), Ok(2));
    }
}
