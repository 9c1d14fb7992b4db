//! The inbox as a model, for tests: the contract in as few lines as possible.

mod topics;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{BoxFuture, FutureExt, ready};
use parking_lot::Mutex;
use tokio::task::JoinSet;

use super::{
    Append, Appended, Appender, CURSOR_LIFE_MS, Change, DEVICES_PER_USER, Device, GroupCommit, Inbox,
    InboxError, InboxPage, Janitor, PASSED_OVER, PageLimit, PositionQuery, Positions, Profile,
    REVOCATION_AHEAD_MAX_S, Sought, StartAt, UserPosition, WriteObserver, fence_of,
};
use crate::clock::Clock;
use crate::message::{DeviceId, LogId, Message, Millis, Seq, UserId};

/// An inbox in memory.
pub struct MemoryInbox {
    clock: Clock,
    users: Mutex<HashMap<UserId, Log>>,
    directory: topics::Directory,
}

#[derive(Default)]
struct Log {
    /// The initial value of the head record; no message has a number up to it.
    first: u64,
    highest: u64,
    messages: BTreeMap<u64, Message>,
    fences: HashMap<String, (u64, Millis, [u8; 16])>,
    cursors: BTreeMap<DeviceId, (Seq, Millis)>,
    positions: HashMap<(DeviceId, LogId), Seq>,
    not_before_s: u64,
}

impl MemoryInbox {
    /// An inbox without users.
    #[must_use]
    pub fn new(clock: Clock) -> Self {
        Self { clock, users: Mutex::default(), directory: topics::Directory::default() }
    }

    fn with<T>(&self, user: &UserId, act: impl FnOnce(&mut Log, Millis) -> T) -> T {
        let now = self.clock.now();
        let mut users = self.users.lock();
        let log = users.entry(user.clone()).or_insert_with(|| Log {
            first: now.0,
            highest: now.0,
            ..Log::default()
        });
        act(log, now)
    }

    fn append_one(&self, item: Append) -> Appended {
        self.with(&item.user.clone(), |log, now| {
            let (digest, fence) = (item.digest(), item.fence());
            if let Some((seq, expires_at, original)) = log.fences.get(&fence).filter(|_| item.deduplicated)
                && *expires_at > now
            {
                return if *original == digest {
                    Appended::Duplicate(Seq::at(*seq))
                } else {
                    Appended::Conflict
                };
            }
            log.highest += 1;
            let message = Message {
                seq: Seq::at(log.highest),
                id: item.id.clone(),
                accepted_at: item.accepted_at,
                expires_at: item.expires_at,
                event: item.event,
                via: item.via,
                trace: item.trace,
                payload: item.payload,
            };
            if item.deduplicated {
                log.fences.insert(fence, (log.highest, item.expires_at, digest));
            }
            log.messages.insert(log.highest, message.clone());
            Appended::Stored(Arc::new(message))
        })
    }

    fn answer(&self, ask: &PositionQuery) -> UserPosition {
        self.with(&ask.user, |log, now| {
            let head = Seq::at(log.highest);
            let start = match &ask.from {
                StartAt::After(seq) => *seq,
                StartAt::Cursor(device) => log.cursors.get(device).map_or(Seq::BEGINNING, |cursor| cursor.0),
                StartAt::Latest if log.highest == log.first => Seq::BEGINNING,
                StartAt::Latest => head,
            };
            if log.not_before_s > now.seconds() + REVOCATION_AHEAD_MAX_S {
                log.not_before_s = now.seconds();
            }
            UserPosition {
                start,
                head,
                more: log.highest > start.get().max(log.first),
                not_before_s: log.not_before_s,
                memberships: self.directory.version_of(&ask.user),
            }
        })
    }

    fn read(&self, user: &UserId, after: Seq, limit: PageLimit) -> InboxPage {
        self.with(user, |log, now| {
            let mut page = InboxPage {
                messages: Vec::new(),
                unreadable: Vec::new(),
                upto: after.max(Seq::at(log.highest)),
                more: false,
            };
            let mut bytes = 0;
            let most = limit.messages + PASSED_OVER;
            for (looked_at, message) in log.messages.range(after.get() + 1..).map(|entry| entry.1).enumerate()
            {
                if looked_at == most {
                    page.upto = Seq::at(message.seq.get() - 1);
                    page.more = true;
                    break;
                }
                let full =
                    page.messages.len() >= limit.messages || bytes + message.payload.len() > limit.bytes;
                if full && !page.messages.is_empty() {
                    page.upto = Seq::at(message.seq.get() - 1);
                    page.more = true;
                    break;
                }
                if !message.is_expired(now) {
                    bytes += message.payload.len();
                    page.messages.push(message.clone());
                }
            }
            page
        })
    }

    fn change(&self, change: Change) {
        match change {
            Change::Cursor { user, device, acked } | Change::Begin { user, device, at: acked } => {
                self.with(&user, |log, now| {
                    let cursor = log.cursors.entry(device).or_default();
                    *cursor = (cursor.0.max(acked), now);
                    if log.cursors.len() > DEVICES_PER_USER {
                        let oldest =
                            log.cursors.iter().min_by_key(|entry| entry.1.1).map(|entry| entry.0.clone());
                        oldest.and_then(|device| log.cursors.remove(&device));
                    }
                })
            }
            Change::Positions { user, device, logs } => self.with(&user, |log, now| {
                let cursor = log.cursors.entry(device.clone()).or_default();
                cursor.1 = now;
                for (id, seq) in logs {
                    let known = log.positions.entry((device.clone(), id)).or_default();
                    *known = seq.max(*known);
                }
            }),
            Change::End { user, seq, at } => self.with(&user, |log, _| {
                if let Some(message) = log.messages.get_mut(&seq.get()) {
                    message.expires_at = message.expires_at.min(at);
                }
            }),
            // This model is never restored.
            Change::Shown { .. } => {}
            Change::NotBefore { user, seconds } => {
                self.with(&user, |log, _| log.not_before_s = log.not_before_s.max(seconds));
            }
        }
    }
}

impl Inbox for MemoryInbox {
    fn append(&self, batch: Vec<Append>) -> BoxFuture<'_, Vec<Result<Appended, InboxError>>> {
        ready(batch.into_iter().map(|item| Ok(self.append_one(item))).collect()).boxed()
    }

    fn positions(&self, batch: Vec<PositionQuery>) -> BoxFuture<'_, Result<Vec<UserPosition>, InboxError>> {
        ready(Ok(batch.iter().map(|ask| self.answer(ask)).collect())).boxed()
    }

    fn page(
        &self,
        user: UserId,
        after: Seq,
        limit: PageLimit,
    ) -> BoxFuture<'_, Result<InboxPage, InboxError>> {
        ready(Ok(self.read(&user, after, limit))).boxed()
    }

    fn profile(&self, user: UserId) -> BoxFuture<'_, Result<Profile, InboxError>> {
        let users = self.users.lock();
        let profile = users.get(&user).map_or_else(Profile::default, |log| Profile {
            head: (log.highest > log.first).then(|| Seq::at(log.highest)),
            first: Seq::at(log.first),
            not_before_s: log.not_before_s,
            cursors: log.cursors.iter().map(|(device, cursor)| (device.clone(), cursor.0)).collect(),
        });
        ready(Ok(profile)).boxed()
    }

    fn stored(&self, user: UserId, which: Sought) -> BoxFuture<'_, Result<Option<Message>, InboxError>> {
        let found = self.with(&user, |log, _| {
            let at = |seq: u64| log.messages.get(&seq).cloned();
            match &which {
                Sought::At(seq) => at(seq.get()),
                which => {
                    let all = which.fences();
                    let found = all.iter().filter_map(|fence| at(log.fences.get(fence)?.0));
                    found.max_by_key(|message| message.seq)
                }
            }
        });
        ready(Ok(found)).boxed()
    }

    fn update(&self, changes: Vec<Change>) -> BoxFuture<'_, Result<(), InboxError>> {
        changes.into_iter().for_each(|change| self.change(change));
        ready(Ok(())).boxed()
    }

    fn forget(&self, user: UserId) -> BoxFuture<'_, Result<(), InboxError>> {
        if let Some(log) = self.users.lock().get_mut(&user) {
            log.messages.clear();
            log.fences.clear();
            log.cursors.clear();
            log.positions.clear();
        }
        ready(Ok(())).boxed()
    }

    fn log_positions(&self, devices: Vec<Device>) -> BoxFuture<'_, Result<Vec<Positions>, InboxError>> {
        let of = |(user, device): &Device| {
            self.with(user, |log, _| {
                let of_device = log.positions.iter().filter(|((of, _), _)| of == device);
                of_device.map(|((_, id), seq)| (id.clone(), *seq)).collect()
            })
        };
        ready(Ok(devices.iter().map(of).collect())).boxed()
    }

    fn appender(self: Arc<Self>, observer: Arc<dyn WriteObserver>, tasks: &mut JoinSet<()>) -> Appender {
        let at_once = GroupCommit { every: Duration::ZERO, enough: 1 };
        Appender::on_runtime(self, at_once, observer, tasks)
    }

    fn gathers_lookups(&self) -> bool {
        true
    }
}

impl Janitor for MemoryInbox {
    fn run_once(&self) -> BoxFuture<'_, Result<u64, InboxError>> {
        let now = self.clock.now();
        let mut removed = 0;
        for log in self.users.lock().values_mut() {
            while let Some(oldest) = log.messages.first_entry().filter(|entry| entry.get().is_expired(now)) {
                let message = oldest.remove();
                let fence = fence_of(message.via.as_deref(), &message.id);
                if log.fences.get(&fence).is_some_and(|fence| fence.0 == message.seq.get()) {
                    log.fences.remove(&fence);
                }
                removed += 1;
            }
            log.cursors.retain(|_, cursor| cursor.1.0 + CURSOR_LIFE_MS > now.0);
            let Log { cursors, positions, .. } = log;
            positions.retain(|(device, _), _| cursors.contains_key(device));
        }
        ready(Ok(removed)).boxed()
    }
}
