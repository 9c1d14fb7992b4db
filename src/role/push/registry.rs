//! The sessions of this node, by user.
//!
//! # Locks
//!
//! One lock per shard. Each operation looks and acts under one lock, so that nobody sees a user
//! half registered: an eviction removes the session that it names, and an unregister tells whether
//! it was the user's last session. No lock is held across another lock or an await. Mailboxes are
//! filled after the shard is unlocked, except in `for_user`.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use hashbrown::HashTable;
use parking_lot::Mutex;
use smallvec::SmallVec;

use super::config::LiveLimits;
use super::mailbox::{InboxFrame, Mailbox};
use crate::message::{ClientName, DeviceId, Millis, NodeId, Seq, UserId};
use crate::session::Item;

/// Shards of the registry: enough that two cores seldom meet, few enough to walk.
const SHARDS: usize = 64;

/// How a session came here. It decides whether the session may be told to move.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Arrival {
    /// How often the client was sent on.
    pub(super) hops: u32,
    /// Epoch of the view that sent the client on; ours must not be older.
    pub(super) client_epoch: u64,
    /// The session is not moved while the view has this digest: it was sent here on purpose, or the
    /// target would not take it.
    pub(super) keep_at: Option<u64>,
}

/// A session that can write a live message itself, without its task.
pub(super) trait InlineSend: Send + Sync {
    /// Sends the message, or returns it if it must go through the mailbox.
    fn send(&self, item: Item<InboxFrame>) -> Option<Item<InboxFrame>>;

    /// Looks at the logs, which have moved. Returns false if the task must look.
    fn look_at_logs(&self) -> bool;
}

/// One session as the rest of the node sees it.
pub(super) struct SessionHandle {
    serving: OnceLock<Weak<dyn InlineSend>>,
    /// The last number that was sent.
    position: AtomicU64,
    pub(super) mailbox: Mailbox,
    acked: AtomicU64,
    /// Whole seconds; a refresh changes it.
    token_iat_s: AtomicU64,
    pub(super) connected_at: Millis,
    pub(super) id: ulid::Ulid,
    pub(super) user: UserId,
    pub(super) device: DeviceId,
    /// What the client says that it is.
    pub(super) client: Option<Box<ClientName>>,
    /// How often the memberships of the user in topics with a log have changed, as far as known.
    memberships: AtomicU64,
    /// A ping of the server is unanswered.
    silent: AtomicBool,
    /// The owner incarnation that the client was told of.
    told: Mutex<Option<Box<(NodeId, u64)>>>,
    pub(super) arrival: Arrival,
}

impl SessionHandle {
    pub(super) fn new(
        user: UserId,
        device: DeviceId,
        client: Option<ClientName>,
        token_iat_s: u64,
        arrival: Arrival,
        now: Millis,
    ) -> Arc<Self> {
        Arc::new(Self {
            user,
            device,
            client: client.map(Box::new),
            memberships: AtomicU64::new(0),
            silent: AtomicBool::new(false),
            id: ulid::Ulid::generate(),
            connected_at: now,
            arrival,
            mailbox: Mailbox::default(),
            token_iat_s: AtomicU64::new(token_iat_s),
            // Above every number until the session has begun, so that a sweep finds nothing to say.
            position: AtomicU64::new(Seq::MAX.get()),
            acked: AtomicU64::new(0),
            told: Mutex::new(None),
            serving: OnceLock::new(),
        })
    }

    /// From now on this serves the session.
    pub(super) fn served_by(&self, serving: Weak<dyn InlineSend>) {
        let _ = self.serving.set(serving);
    }

    /// Sends a live message inline, or puts it into the mailbox.
    pub(super) fn send_inline(&self, item: Item<InboxFrame>) {
        let rest = match self.serving.get().and_then(Weak::upgrade) {
            Some(serving) => serving.send(item),
            None => Some(item),
        };
        if let Some(item) = rest {
            self.mailbox.try_live(item);
        }
    }

    /// Looks at the logs inline, or has the task look.
    pub(super) fn look_at_logs(&self) {
        let serving = self.serving.get().and_then(Weak::upgrade);
        if !serving.is_some_and(|serving| serving.look_at_logs()) {
            self.mailbox.logs_moved();
        }
    }

    /// How often the memberships of the user in topics with a log have changed, as far as known.
    pub(super) fn memberships(&self) -> u64 {
        self.memberships.load(Ordering::Relaxed)
    }

    /// They are counted anew, because the store was restored.
    pub(super) fn count_memberships_anew(&self, changes: u64) {
        self.memberships.store(changes, Ordering::Relaxed);
    }

    /// They have changed as often as this, or more often.
    pub(super) fn set_memberships(&self, changes: u64) {
        self.memberships.fetch_max(changes, Ordering::Relaxed);
    }

    /// When the token in use was issued, in whole seconds.
    pub(super) fn token_iat_s(&self) -> u64 {
        self.token_iat_s.load(Ordering::Relaxed)
    }

    /// A refresh has brought another token.
    pub(super) fn set_token_iat_s(&self, seconds: u64) {
        self.token_iat_s.store(seconds, Ordering::Relaxed);
    }

    pub(super) fn position(&self) -> Seq {
        Seq::at(self.position.load(Ordering::Relaxed))
    }

    pub(super) fn set_position(&self, position: Seq) {
        self.position.store(position.get(), Ordering::Relaxed);
    }

    /// Whether the session has begun; before that its position means nothing.
    pub(super) fn has_begun(&self) -> bool {
        self.position() != Seq::MAX
    }

    pub(super) fn acked(&self) -> Seq {
        Seq::at(self.acked.load(Ordering::Relaxed))
    }

    pub(super) fn set_acked(&self, acked: Seq) {
        self.acked.store(acked.get(), Ordering::Relaxed);
    }

    /// Whether a ping of the server is unanswered.
    pub(super) fn is_silent(&self) -> bool {
        self.silent.load(Ordering::Relaxed)
    }

    /// A ping was sent, or a sign of life came.
    pub(super) fn set_silent(&self, silent: bool) {
        self.silent.store(silent, Ordering::Relaxed);
    }

    /// Notes that the client is told of this owner. Returns false if it was told before.
    pub(super) fn tell_once(&self, owner: &NodeId, incarnation: u64) -> bool {
        let mut told = self.told.lock();
        let fresh = told.as_ref().is_none_or(|known| known.0 != *owner || known.1 != incarnation);
        if fresh {
            *told = Some(Box::new((owner.clone(), incarnation)));
        }
        fresh
    }
}

/// The sessions of a node.
pub(super) struct Registry {
    shards: Box<[Shard]>,
    hasher: RandomState,
    sessions: AtomicUsize,
    limits: Arc<LiveLimits>,
}

/// Whether there is room for one more session.
pub(super) enum Room {
    /// There is.
    Enough,
    /// There is in place of this one, which was unregistered.
    InPlaceOf(Arc<SessionHandle>),
    /// There is none.
    None,
}

type Shard = Mutex<HashTable<Place>>;

/// A user with sessions here. The hash is stored, because a table that grows would otherwise read
/// every name again, in memory that is in no cache.
struct Place {
    hash: u64,
    user: UserId,
    handles: SessionHandles,
}

impl Place {
    fn is_of<'a>(hash: u64, user: &'a UserId) -> impl Fn(&Self) -> bool + use<'a> {
        move |place| place.hash == hash && place.user == *user
    }
}

/// The sessions of a user, mostly one.
type SessionHandles = SmallVec<[Arc<SessionHandle>; 1]>;

/// Called when a user's last session here ends.
type OnLast = Box<dyn FnOnce(&UserId) + Send + Sync>;

/// Keeps a session registered until it is dropped.
pub(super) struct RegistrationGuard {
    registry: Arc<Registry>,
    handle: Arc<SessionHandle>,
    /// With this session the user, or one device, may have too many.
    pub(super) crowded: bool,
    on_last: Option<OnLast>,
}

impl std::ops::Deref for RegistrationGuard {
    type Target = Arc<SessionHandle>;
    fn deref(&self) -> &Arc<SessionHandle> {
        &self.handle
    }
}

impl RegistrationGuard {
    /// Sets what is called if the user's last session ends with this one.
    pub(super) fn when_last(&mut self, act: impl FnOnce(&UserId) + Send + Sync + 'static) {
        self.on_last = Some(Box::new(act));
    }
}

impl Drop for RegistrationGuard {
    fn drop(&mut self) {
        if self.registry.unregister(&self.handle)
            && let Some(act) = self.on_last.take()
        {
            act(&self.handle.user);
        }
    }
}

impl Registry {
    /// An empty registry with room for so many sessions of each user and device.
    pub(super) fn new(limits: Arc<LiveLimits>) -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Shard::default()).collect(),
            hasher: RandomState::new(),
            sessions: AtomicUsize::new(0),
            limits,
        }
    }

    /// A user's hash and shard. The shard is selected by other bits than those that a hash table
    /// uses.
    fn shard(&self, user: &UserId) -> (u64, &Shard) {
        let hash = self.hasher.hash_one(user);
        (hash, &self.shards[(hash >> 40) as usize % SHARDS])
    }

    /// Registers a session.
    pub(super) fn register(self: &Arc<Self>, handle: Arc<SessionHandle>) -> RegistrationGuard {
        let (hash, shard) = self.shard(&handle.user);
        let mut shard = shard.lock();
        let place = shard.entry(hash, Place::is_of(hash, &handle.user), |place| place.hash);
        let handles = &mut place
            .or_insert_with(|| Place { hash, user: handle.user.clone(), handles: SessionHandles::new() })
            .into_mut()
            .handles;
        handles.push(Arc::clone(&handle));
        let crowded = handles.len() > self.limits.per_user().min(self.limits.per_device());
        drop(shard);
        self.sessions.fetch_add(1, Ordering::Relaxed);
        RegistrationGuard { registry: Arc::clone(self), handle, crowded, on_last: None }
    }

    /// Makes room for `newcomer` if its user or its device has too many sessions. Another session
    /// of its device yields: one with an unanswered ping, otherwise the oldest.
    pub(super) fn make_room(&self, newcomer: &Arc<SessionHandle>) -> Room {
        let (hash, shard) = self.shard(&newcomer.user);
        let mut shard = shard.lock();
        let Some(place) = shard.find_mut(hash, Place::is_of(hash, &newcomer.user)) else {
            return Room::Enough;
        };
        let handles = &mut place.handles;
        let of_device = handles.iter().filter(|handle| handle.device == newcomer.device).count();
        if handles.len() <= self.limits.per_user() && of_device <= self.limits.per_device() {
            return Room::Enough;
        }
        // It was made to yield itself, and will hear of it.
        if !handles.iter().any(|handle| Arc::ptr_eq(handle, newcomer)) {
            return Room::Enough;
        }
        let may_yield =
            |handle: &&Arc<SessionHandle>| handle.device == newcomer.device && !Arc::ptr_eq(handle, newcomer);
        let begun = || handles.iter().filter(may_yield).filter(|handle| handle.has_begun());
        let silent_or_oldest = begun().find(|handle| handle.is_silent()).or_else(|| begun().next());
        let Some(other) = silent_or_oldest.or_else(|| handles.iter().find(may_yield)).cloned() else {
            return Room::None;
        };
        handles.retain(|handle| !Arc::ptr_eq(handle, &other));
        self.sessions.fetch_sub(1, Ordering::Relaxed);
        Room::InPlaceOf(other)
    }

    /// Unregisters a session. Returns whether it was the user's last here. An evicted session is
    /// gone already.
    fn unregister(&self, handle: &Arc<SessionHandle>) -> bool {
        let (hash, shard) = self.shard(&handle.user);
        let mut shard = shard.lock();
        let Ok(mut place) = shard.find_entry(hash, Place::is_of(hash, &handle.user)) else { return false };
        let handles = &mut place.get_mut().handles;
        let Some(at) = handles.iter().position(|known| Arc::ptr_eq(known, handle)) else { return false };
        handles.remove(at);
        self.sessions.fetch_sub(1, Ordering::Relaxed);
        let last = handles.is_empty();
        if last {
            place.remove();
            if shard.capacity() > 64 && shard.len() < shard.capacity() / 4 {
                shard.shrink_to_fit(|place| place.hash);
            }
        }
        last
    }

    /// Calls `act` for each session of a user under the lock; it may only fill mailboxes or read.
    pub(super) fn for_user(&self, user: &UserId, act: impl FnMut(&Arc<SessionHandle>)) {
        let (hash, shard) = self.shard(user);
        if let Some(place) = shard.lock().find(hash, Place::is_of(hash, user)) {
            place.handles.iter().for_each(act);
        }
    }

    /// The sessions of a user.
    pub(super) fn of_user(&self, user: &UserId) -> SessionHandles {
        let (hash, shard) = self.shard(user);
        let shard = shard.lock();
        shard.find(hash, Place::is_of(hash, user)).map(|place| place.handles.clone()).unwrap_or_default()
    }

    /// Whether a user has a session here.
    pub(super) fn has(&self, user: &UserId) -> bool {
        let (hash, shard) = self.shard(user);
        shard.lock().find(hash, Place::is_of(hash, user)).is_some()
    }

    /// The sessions of one shard, to be walked without its lock. There are
    /// [`Registry::shard_count`] shards.
    pub(super) fn of_shard(&self, n: usize) -> Vec<Arc<SessionHandle>> {
        self.shards[n].lock().iter().flat_map(|place| &place.handles).cloned().collect()
    }

    pub(super) fn shard_count(&self) -> usize {
        self.shards.len()
    }

    /// All sessions.
    pub(super) fn all(&self) -> Vec<Arc<SessionHandle>> {
        (0..self.shard_count()).flat_map(|n| self.of_shard(n)).collect()
    }

    /// Number of sessions.
    pub(super) fn len(&self) -> usize {
        self.sessions.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests;
