//! Settings that may change while the process runs.

use std::sync::Arc;

use parking_lot::RwLock;

/// A setting that may be replaced. Cloned, it is the same setting.
#[derive(Debug, Default)]
pub struct Live<T>(Arc<RwLock<Arc<T>>>);

impl<T> Clone for Live<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> Live<T> {
    /// A setting with this value.
    #[must_use]
    pub fn new(value: T) -> Self {
        Self(Arc::new(RwLock::new(Arc::new(value))))
    }

    /// The value at present.
    #[must_use]
    pub fn get(&self) -> Arc<T> {
        Arc::clone(&self.0.read())
    }

    /// Replaces the value, in every clone.
    pub fn set(&self, value: T) {
        *self.0.write() = Arc::new(value);
    }
}
