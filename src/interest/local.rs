//! The interest of the nodes of one process: known at once, and never lost.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{BoxFuture, FutureExt, ready};
use parking_lot::RwLock;

use super::{Buckets, Interest, InterestError, Reader};
use crate::message::LogId;

/// Bitmaps in memory. Cloned, they are the same.
#[derive(Clone, Default)]
pub struct LocalInterest {
    maps: Arc<RwLock<HashMap<Reader, Arc<Buckets>>>>,
}

impl Interest for LocalInterest {
    fn publish(&self, reader: &Reader, buckets: Arc<Buckets>) -> BoxFuture<'_, Result<bool, InterestError>> {
        let before = self.maps.write().insert(reader.clone(), Arc::clone(&buckets));
        ready(Ok(before != Some(buckets))).boxed()
    }

    fn may_read(&self, reader: &Reader, log: &LogId) -> bool {
        self.maps.read().get(reader).is_none_or(|buckets| buckets.has(log))
    }

    fn seen_after(&self) -> Duration {
        Duration::ZERO
    }
}
