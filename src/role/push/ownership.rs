//! Which users belong to this node, by the view in use.

use std::sync::Arc;

use tokio::sync::watch;

use super::availability::Availability;
use crate::membership::View;
use crate::message::{NodeId, UserId};

/// Compares users with the view in use.
pub(super) struct Ownership {
    own: NodeId,
    views: watch::Receiver<Arc<View>>,
    availability: Arc<Availability>,
}

impl Ownership {
    /// The ownership of the node `own`.
    pub(super) fn new(
        own: NodeId,
        views: watch::Receiver<Arc<View>>,
        availability: Arc<Availability>,
    ) -> Self {
        Self { own, views, availability }
    }

    /// Name of this node.
    pub(super) fn node(&self) -> &NodeId {
        &self.own
    }

    /// The view in use.
    pub(super) fn view(&self) -> Arc<View> {
        Arc::clone(&self.views.borrow())
    }

    /// Version of the view in use, without taking the view.
    pub(super) fn digest(&self) -> u64 {
        self.views.borrow().digest
    }

    /// Whether this node owns `user` in the view in use.
    pub(super) fn owns_now(&self, user: &UserId) -> bool {
        self.owns(&self.views.borrow(), user)
    }

    /// Generation and epoch of the view in use.
    pub(super) fn version(&self) -> (Arc<str>, u64) {
        let view = self.views.borrow();
        (Arc::clone(&view.generation), view.epoch)
    }

    /// The view in use, and every later one.
    pub(super) fn views(&self) -> watch::Receiver<Arc<View>> {
        self.views.clone()
    }

    /// Whether this node owns `user` in `view`. A draining node owns nobody, even if its own view
    /// does not show that yet.
    pub(super) fn owns(&self, view: &View, user: &UserId) -> bool {
        !self.availability.is_draining() && view.owner(user).is_none_or(|owner| owner.info.node == self.own)
    }
}
