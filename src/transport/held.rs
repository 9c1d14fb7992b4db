//! A budget for the memory of all requests that are not answered yet, over all connections of the
//! process. Each request and the number of connections have limits of their own; only their product
//! could fill a machine.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes that requests may hold together. Cloned, it is the same budget.
#[derive(Debug, Clone)]
pub struct Budget {
    left: Arc<AtomicUsize>,
}

/// The budget is exhausted; the caller must try again later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the requests under way hold as much as they may together; repeat after a moment")]
pub struct Spent;

impl Budget {
    /// A budget of this many bytes.
    #[must_use]
    pub fn of(bytes: usize) -> Self {
        Self { left: Arc::new(AtomicUsize::new(bytes)) }
    }

    /// The share of one request, empty at first.
    #[must_use]
    pub fn hold(&self) -> Held {
        Held { budget: self.clone(), bytes: 0 }
    }
}

/// The share of one request. It is returned when this is dropped.
#[derive(Debug)]
pub struct Held {
    budget: Budget,
    bytes: usize,
}

impl Held {
    /// Adds bytes to the share.
    ///
    /// # Errors
    ///
    /// [`Spent`]; the share is then as before.
    pub fn add(&mut self, bytes: usize) -> Result<(), Spent> {
        let take = |left: usize| left.checked_sub(bytes);
        self.budget.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).map_err(|_| Spent)?;
        self.bytes += bytes;
        Ok(())
    }

    /// Returns the share.
    pub fn release(&mut self) {
        self.budget.left.fetch_add(std::mem::take(&mut self.bytes), Ordering::Relaxed);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.release();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_comes_back_and_never_more_than_there_is() {
        let budget = Budget::of(100);
        let (mut one, mut two) = (budget.hold(), budget.hold());
        assert_eq!((one.add(60), two.add(41), two.add(40)), (Ok(()), Err(Spent), Ok(())));
        assert_eq!(one.add(1), Err(Spent));
        two.release();
        assert_eq!(one.add(40), Ok(()));
        drop(one);
        assert_eq!(two.add(100), Ok(()));
        drop(two);
        assert_eq!(budget.left.load(Ordering::Relaxed), 100);
    }
}
