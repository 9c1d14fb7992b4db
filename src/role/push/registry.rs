//! The sessions of this node, by user.
//!
//! # Locks
//!
//! One lock per shard. Each operation looks and acts under one lock, so that no one sees a user half registered: an
//! eviction takes out whom it names, an unregister answers whether that was the user's last. No lock is held across another
//! or across a wait; a mailbox is put into after the shard is left, save in `for_user`, whose work is to put.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use bytes::Bytes;
use hashbrown::HashTable;
use parking_lot::Mutex;
use smallvec::SmallVec;

use super::mailbox::Mailbox;
use crate::message::{DeviceId, Millis, NodeId, Seq, UserId};
use crate::session::Item;

/// Shards of the registry: enough that two cores seldom meet, few enough to walk.
const SHARDS: usize = 64;

/// How a session came here; decides whether it may be told to move.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Arrival {
    /// How often the client had been sent on.
    pub(super) hops: u32,
    /// The epoch of the view that sent it: ours must not be older.
    pub(super) client_epoch: u64,
    /// Not to be moved while the view has this digest: it was sent here on purpose, or cannot be sent rightly.
    pub(super) keep_at: Option<u64>,
}

/// A session that can send a live message at once, in the name of its task.
pub(super) trait InlineSend: Send + Sync {
    /// Sends it, or gives it back: for the mailbox.
    fn send(&self, item: Item<Bytes>) -> Option<Item<Bytes>>;
}

/// One session as the rest of the node sees it. In this order: who brings a message finds all that it needs in the first 64 bytes,
/// the counts of the `Arc` included, and no more of a session that is in no cache.
#[repr(C)]
pub(super) struct SessionHandle {
    serving: OnceLock<Weak<dyn InlineSend>>,
    /// Everything up to here was sent, as the session last said.
    position: AtomicU64,
    pub(super) mailbox: Mailbox,
    acked: AtomicU64,
    /// Whole seconds; a refresh changes it.
    token_iat_s: AtomicU64,
    pub(super) connected_at: Millis,
    pub(super) id: ulid::Ulid,
    pub(super) user: UserId,
    pub(super) device: DeviceId,
    /// The owner that the client was told of already: once per owner incarnation.
    told: Mutex<Option<Box<(NodeId, u64)>>>,
    pub(super) arrival: Arrival,
}

impl SessionHandle {
    pub(super) fn new(
        user: UserId,
        device: DeviceId,
        token_iat_s: u64,
        arrival: Arrival,
        now: Millis,
    ) -> Arc<Self> {
        Arc::new(Self {
            user,
            device,
            id: ulid::Ulid::generate(),
            connected_at: now,
            arrival,
            mailbox: Mailbox::default(),
            token_iat_s: AtomicU64::new(token_iat_s),
            // Above every number until the session has begun: a sweep then finds nothing to say.
            position: AtomicU64::new(Seq::MAX.get()),
            acked: AtomicU64::new(0),
            told: Mutex::new(None),
            serving: OnceLock::new(),
        })
    }

    /// The session serves from now on.
    pub(super) fn served_by(&self, serving: Weak<dyn InlineSend>) {
        let _ = self.serving.set(serving);
    }

    /// Sends a live message at once, or puts it into the mailbox.
    pub(super) fn send_inline(&self, item: Item<Bytes>) {
        let rest = match self.serving.get().and_then(Weak::upgrade) {
            Some(serving) => serving.send(item),
            None => Some(item),
        };
        if let Some(item) = rest {
            self.mailbox.try_live(item);
        }
    }

    /// When the token in use was issued, in whole seconds.
    pub(super) fn token_iat_s(&self) -> u64 {
        self.token_iat_s.load(Ordering::Relaxed)
    }

    /// A refresh brought another token.
    pub(super) fn set_token_iat_s(&self, seconds: u64) {
        self.token_iat_s.store(seconds, Ordering::Relaxed);
    }

    pub(super) fn position(&self) -> Seq {
        Seq::at(self.position.load(Ordering::Relaxed))
    }

    pub(super) fn set_position(&self, position: Seq) {
        self.position.store(position.get(), Ordering::Relaxed);
    }

    /// Whether the session has begun: before that its position means nothing.
    pub(super) fn has_begun(&self) -> bool {
        self.position() != Seq::MAX
    }

    pub(super) fn acked(&self) -> Seq {
        Seq::at(self.acked.load(Ordering::Relaxed))
    }

    pub(super) fn set_acked(&self, acked: Seq) {
        self.acked.fetch_max(acked.get(), Ordering::Relaxed);
    }

    /// Notes that the client is told of this owner; false if it was before.
    pub(super) fn tell_once(&self, owner: &NodeId, incarnation: u64) -> bool {
        let mut told = self.told.lock();
        let fresh = told.as_ref().is_none_or(|known| known.0 != *owner || known.1 != incarnation);
        if fresh {
            *told = Some(Box::new((owner.clone(), incarnation)));
        }
        fresh
    }
}

/// See the room's comment.
pub(super) struct Registry {
    shards: Box<[Shard]>,
    hasher: RandomState,
    sessions: AtomicUsize,
    per_user: usize,
}

type Shard = Mutex<HashTable<Place>>;

/// A user who has sessions here. Its hash is made once: a table that grows would have to look at every name again, in memory that
/// is in no cache. Aligned, so that it lies in one line of the cache.
#[repr(align(64))]
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

/// What to do when a user's last session here ends.
type OnLast = Box<dyn FnOnce(&UserId) + Send + Sync>;

/// A seat that is taken until this is dropped.
pub(super) struct RegistrationGuard {
    registry: Arc<Registry>,
    handle: Arc<SessionHandle>,
    /// The user had too many sessions with this one.
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
    /// Run when the user's last session here ends with this one.
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
    /// An empty one with room for `per_user` sessions of each user.
    pub(super) fn new(per_user: usize) -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Shard::default()).collect(),
            hasher: RandomState::new(),
            sessions: AtomicUsize::new(0),
            per_user: per_user.max(1),
        }
    }

    /// A user's hash and shard. A table looks at the lowest and the highest bits of a hash, a shard is chosen by others.
    fn shard(&self, user: &UserId) -> (u64, &Shard) {
        let hash = self.hasher.hash_one(user);
        (hash, &self.shards[(hash >> 40) as usize % SHARDS])
    }

    /// Takes a seat.
    pub(super) fn register(self: &Arc<Self>, handle: Arc<SessionHandle>) -> RegistrationGuard {
        let (hash, shard) = self.shard(&handle.user);
        let mut shard = shard.lock();
        let place = shard.entry(hash, Place::is_of(hash, &handle.user), |place| place.hash);
        let handles = &mut place
            .or_insert_with(|| Place { hash, user: handle.user.clone(), handles: SessionHandles::new() })
            .into_mut()
            .handles;
        handles.push(Arc::clone(&handle));
        let crowded = handles.len() > self.per_user;
        drop(shard);
        self.sessions.fetch_add(1, Ordering::Relaxed);
        RegistrationGuard { registry: Arc::clone(self), handle, crowded, on_last: None }
    }

    /// Where the user of `newcomer` has too many sessions, takes out the oldest that has begun, and returns it.
    pub(super) fn evict_excess(&self, newcomer: &Arc<SessionHandle>) -> Option<Arc<SessionHandle>> {
        let (hash, shard) = self.shard(&newcomer.user);
        let mut shard = shard.lock();
        let place = shard.find_mut(hash, Place::is_of(hash, &newcomer.user))?;
        let handles = Some(&mut place.handles).filter(|handles| handles.len() > self.per_user)?;
        let oldest =
            handles.iter().position(|handle| handle.has_begun() && !Arc::ptr_eq(handle, newcomer))?;
        self.sessions.fetch_sub(1, Ordering::Relaxed);
        Some(handles.remove(oldest))
    }

    /// Gives a seat back; answers whether the user has none left here. An evicted one is gone already.
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

    /// Acts on each session of a user, under the lock: only to put into mailboxes or to read.
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

    /// The sessions of one shard, to be walked without its lock. There are [`Registry::shard_count`].
    pub(super) fn of_shard(&self, n: usize) -> Vec<Arc<SessionHandle>> {
        self.shards[n].lock().iter().flat_map(|place| &place.handles).cloned().collect()
    }

    pub(super) fn shard_count(&self) -> usize {
        self.shards.len()
    }

    /// Every session.
    pub(super) fn all(&self) -> Vec<Arc<SessionHandle>> {
        (0..self.shard_count()).flat_map(|n| self.of_shard(n)).collect()
    }

    /// How many sessions there are.
    pub(super) fn len(&self) -> usize {
        self.sessions.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handle(user: &str) -> Arc<SessionHandle> {
        let user = UserId::parse(user).unwrap();
        SessionHandle::new(user, DeviceId::default(), 0, Arrival::default(), Millis(0))
    }

    #[test]
    fn the_oldest_goes_when_there_are_too_many_and_counts_return() {
        let registry = Arc::new(Registry::new(2));
        let take = |user: &str| {
            let registered = registry.register(handle(user));
            registered.set_position(Seq::BEGINNING);
            registered
        };
        let first = take("alice");
        let second = take("alice");
        assert!(registry.evict_excess(&second).is_none());
        let attaching = registry.register(handle("alice"));
        assert!(Arc::ptr_eq(&registry.evict_excess(&attaching).unwrap(), &first));
        assert_eq!(registry.len(), 2);
        drop(first);
        assert_eq!(registry.len(), 2, "an evicted session is not counted out twice");
        let _bob = take("bob");
        drop(second);
        assert!(registry.has(&attaching.user));
        let user = attaching.user.clone();
        drop(attaching);
        assert!(!registry.has(&user));
        assert_eq!((registry.len(), registry.all().len()), (1, 1));
    }

    #[test]
    fn only_the_last_session_of_a_user_says_so() {
        let registry = Arc::new(Registry::new(16));
        let gone = Arc::new(AtomicU64::new(0));
        let take = || {
            let mut registered = registry.register(handle("alice"));
            let gone = Arc::clone(&gone);
            registered.when_last(move |_| {
                gone.fetch_add(1, Ordering::Relaxed);
            });
            registered
        };
        let (one, two) = (take(), take());
        drop(one);
        assert_eq!(gone.load(Ordering::Relaxed), 0);
        drop(two);
        assert_eq!(gone.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_client_is_told_once_per_incarnation_of_an_owner() {
        let handle = handle("alice");
        let (one, two) = (NodeId::parse("push-1").unwrap(), NodeId::parse("push-2").unwrap());
        assert!(handle.tell_once(&one, 7));
        assert!(!handle.tell_once(&one, 7));
        assert!(handle.tell_once(&one, 8));
        assert!(handle.tell_once(&two, 8));
    }
}
