//! The fallback set of this node: the users with a session here that another node owns.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};

use super::ownership::Ownership;
use super::registry::{Registry, SessionHandle};
use super::sweep::Sweeper;
use crate::backoff::{Backoff, around};
use crate::fallback::{Fallback, FallbackError, Holder, Which};
use crate::message::UserId;
use crate::tasks::raised;
use crate::telemetry::WAY;

/// Concurrent checks of inboxes of users that were entered. If the inbox is slower than that, each
/// session reads its own.
const CHECKS_IN_FLIGHT: usize = 4;
/// Delay between two tries to write the set, at first and at most.
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(3);
/// Time between two renewals of the set's lease, ± 20 %.
const RENEW_EVERY: Duration = Duration::from_secs(2);
/// Time between two removals of users whose last session has ended. Each removal changes the bitmap
/// that every router reads, while an entry too many costs only a copy.
const LEAVE_EVERY: Duration = Duration::from_millis(500);
/// How long a session that attaches waits for its entry. If the registry hangs, the session goes on
/// and the entry is written later.
const ENTER_DEADLINE: Duration = Duration::from_millis(500);

/// Keeps the fallback set in line with the sessions and the view.
pub(super) struct DisplacedSet {
    fallback: Arc<dyn Fallback>,
    holder: Holder,
    registry: Arc<Registry>,
    ownership: Arc<Ownership>,
    sweeper: Arc<Sweeper>,
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Default)]
struct State {
    entered: HashSet<UserId>,
    /// Users that must be compared with what the set should be.
    dirty: HashSet<UserId>,
    /// Users in the set whose last session has ended; they become dirty together.
    departed: HashSet<UserId>,
    /// Users that were entered, with the time. Their inboxes are checked again when every router
    /// has seen the entry.
    recheck: VecDeque<(Instant, Vec<UserId>)>,
}

impl DisplacedSet {
    /// An empty set of `holder`.
    pub(super) fn new(
        fallback: Arc<dyn Fallback>,
        holder: Holder,
        registry: Arc<Registry>,
        ownership: Arc<Ownership>,
        sweeper: Arc<Sweeper>,
    ) -> Self {
        let (state, changed) = (Mutex::default(), Notify::new());
        Self { fallback, holder, registry, ownership, sweeper, state, changed }
    }

    /// Something changed for these users: compare them with what the set should be.
    pub(super) fn mark_dirty(&self, users: Vec<UserId>) {
        self.state.lock().dirty.extend(users);
        self.changed.notify_one();
    }

    /// The last session of this user has ended. This matters only if the user is in the set or
    /// about to be; in the common case it costs one look-up.
    pub(super) fn leave(&self, user: &UserId) {
        let mut state = self.state.lock();
        if state.entered.contains(user) {
            state.departed.insert(user.clone());
        }
    }

    /// Number of users in the set.
    pub(super) fn len(&self) -> usize {
        self.state.lock().entered.len()
    }

    /// Whether the user is in the set.
    pub(super) fn contains(&self, user: &UserId) -> bool {
        self.state.lock().entered.contains(user)
    }

    /// The set was lost: enter all of its users again.
    pub(super) fn write_again(&self) {
        let mut state = self.state.lock();
        let lost: Vec<UserId> = state.entered.drain().collect();
        state.dirty.extend(lost);
        drop(state);
        self.changed.notify_one();
    }

    /// Removes the set: the node leaves.
    ///
    /// # Errors
    ///
    /// The set could not be removed; it ends with its lease.
    pub(super) async fn clear(&self) -> Result<(), FallbackError> {
        *self.state.lock() = State::default();
        self.fallback.remove(&self.holder, Which::All).await
    }

    /// Enters a user before its session reads the inbox, so that dispatch sends later messages here
    /// too.
    pub(super) async fn enter(&self, user: &UserId) {
        // Noted first: if this session ends from now on, the entry is removed.
        self.state.lock().entered.insert(user.clone());
        let adding = self.fallback.add(&self.holder, vec![user.clone()]);
        let late = || FallbackError("not in time".to_owned());
        match tokio::time::timeout(ENTER_DEADLINE, adding).await.unwrap_or_else(|_| Err(late())) {
            Ok(()) => {
                let node = &self.holder.node;
                tracing::debug!(target: WAY, step = 4, %user, %node, "displaced: entered into the fallback set");
                self.note_entered(vec![user.clone()]);
            }
            Err(error) => {
                tracing::debug!(%error, "a fallback entry could not be written");
                self.state.lock().entered.remove(user);
            }
        }
        // Checked in any case: a removal may have crossed with this.
        self.mark_dirty(vec![user.clone()]);
    }

    /// Writes changes of the set as they come, for ever.
    pub(super) async fn run(self: Arc<Self>) {
        let mut backoff = Backoff::new(RETRY_FIRST, RETRY_MAX);
        let mut checks = JoinSet::new();
        let mut leaves = tokio::time::interval(LEAVE_EVERY);
        leaves.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = self.changed.notified() => {}
                _ = leaves.tick() => if !self.mark_departed_dirty() {
                    continue;
                }
            }
            while let Some(ended) = checks.try_join_next() {
                raised(ended);
            }
            loop {
                let dirty = self.take_dirty();
                if let Some(entered) = self.reconcile(&dirty).await {
                    self.check_entered(&entered, &mut checks);
                    backoff.reset();
                    break;
                }
                // Routers do not know that these users are here, so this node checks the inboxes
                // itself.
                self.sweep_users(&dirty).await;
                self.mark_dirty(dirty);
                let delay = backoff.next(&mut rand::rng());
                tokio::time::sleep(delay).await;
            }
        }
    }

    /// Messages that were sent before an entry existed passed by: checks those inboxes at once. The
    /// next entries do not wait for that.
    fn check_entered(&self, entered: &[UserId], checks: &mut JoinSet<()>) {
        let handles = self.sessions_of(entered);
        if checks.len() >= CHECKS_IN_FLIGHT {
            handles.iter().for_each(|handle| handle.mailbox.lost());
        } else if !handles.is_empty() {
            let sweeper = Arc::clone(&self.sweeper);
            checks.spawn(async move { sweeper.catch_up(&handles).await });
        }
    }

    /// Renews the lease of the set, and writes the set again if its size was wrong twice running.
    /// Also checks once more the inboxes of users that were entered a moment ago, because a router
    /// may have seen the entry only now.
    pub(super) async fn renew(self: Arc<Self>) {
        let mut wrong = 0;
        loop {
            let pause = around(RENEW_EVERY, 0.2, &mut rand::rng());
            tokio::time::sleep(pause).await;
            let due = self.take_due(self.fallback.hints().seen_after);
            if !due.is_empty() {
                self.sweep_users(&due).await;
            }
            let expected = self.len();
            if expected == 0 {
                wrong = 0;
                continue;
            }
            match self.fallback.keep(&self.holder).await {
                Ok(size) if size == expected => wrong = 0,
                Ok(size) => {
                    wrong += 1;
                    if wrong >= 2 {
                        tracing::info!(size, expected, "the fallback set was lost; it is written again");
                        self.write_again();
                        wrong = 0;
                    }
                }
                Err(error) => {
                    tracing::debug!(%error, "the fallback set could not be renewed");
                    let entered: Vec<UserId> = self.state.lock().entered.iter().cloned().collect();
                    self.sweep_users(&entered).await;
                }
            }
        }
    }

    /// Enters and removes what differs. Returns the users that were entered; `None` if the set
    /// could not be written, in which case all users must be checked again.
    async fn reconcile(&self, users: &[UserId]) -> Option<Vec<UserId>> {
        let (mut add, mut remove) = (Vec::new(), HashSet::new());
        for user in users {
            match (self.belongs(user), self.contains(user)) {
                (true, false) => add.push(user.clone()),
                (true, true) => {}
                // Also if it is not known to be entered: a wrong entry must go, and a removal too
                // many is harmless.
                (false, _) => drop(remove.insert(user.clone())),
            }
        }
        let mut written = Ok(());
        if !add.is_empty() {
            written = self.fallback.add(&self.holder, add.clone()).await;
        }
        if !remove.is_empty() && written.is_ok() {
            let users = Which::Users(remove.iter().cloned().collect());
            written = self.fallback.remove(&self.holder, users).await;
        }
        if let Err(error) = written {
            tracing::debug!(%error, "the fallback entries could not be written");
            return None;
        }
        if !remove.is_empty() {
            self.state.lock().entered.retain(|user| !remove.contains(user));
        }
        if !add.is_empty() {
            self.note_entered(add.clone());
            // A session that ended, or a user that became owned, while the entry was being written
            // found no entry to remove.
            self.mark_dirty(add.iter().filter(|user| !self.belongs(user)).cloned().collect());
        }
        Some(add)
    }

    /// Whether the user has a session here and another owner.
    fn belongs(&self, user: &UserId) -> bool {
        self.registry.has(user) && !self.ownership.owns_now(user)
    }

    async fn sweep_users(&self, users: &[UserId]) {
        self.sweeper.sweep(&self.sessions_of(users)).await;
    }

    fn sessions_of(&self, users: &[UserId]) -> Vec<Arc<SessionHandle>> {
        let mut handles = Vec::with_capacity(users.len());
        for user in users {
            self.registry.for_user(user, |handle| handles.push(Arc::clone(handle)));
        }
        handles
    }

    /// Marks the users of `departed` as dirty. Returns whether there are any.
    fn mark_departed_dirty(&self) -> bool {
        let mut state = self.state.lock();
        let departed = std::mem::take(&mut state.departed);
        let any = !departed.is_empty();
        state.dirty.extend(departed);
        any
    }

    fn note_entered(&self, users: Vec<UserId>) {
        let mut state = self.state.lock();
        state.entered.extend(users.iter().cloned());
        state.recheck.push_back((Instant::now(), users));
    }

    /// Users that were entered at least `since` ago and have not been checked since.
    fn take_due(&self, since: Duration) -> Vec<UserId> {
        let mut due = Vec::new();
        let queue = &mut self.state.lock().recheck;
        while queue.front().is_some_and(|(at, _)| at.elapsed() >= since) {
            due.extend(queue.pop_front().into_iter().flat_map(|(_, users)| users));
        }
        due
    }

    fn take_dirty(&self) -> Vec<UserId> {
        self.state.lock().dirty.drain().collect()
    }
}
