//! Appending: numbers, order among writers, and responses that were lost. The rules are in
//! docs/design.md, section 5; `model` explores them:
//!
//! 1. Number n is inserted only when n-1 is durable, or behind n-1 in one ordered insert. One
//!    insert of a user is in flight per process.
//! 2. After a duplicate key, look at (u, n). If this append wrote it, it is stored, once a majority
//!    read shows it. If another one did, look up the sender's id if there is one, and go on above n
//!    by the head that was read before; the second time read the head again.
//! 3. After an ambiguous error, or where nothing stands, try the same n again until the deadline.
//! 4. A head in memory is trusted for a while after its read was sent. An append that was answered
//!    long after that is acknowledged only if a linearizable read of the head record is below its
//!    number. Otherwise the number is *void*: meanwhile the janitor may have raised the head record
//!    over n, and readers were told that nothing is there. The append is then stored again under a
//!    new number.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use mongodb::bson::{Document, doc};
use mongodb::error::ErrorKind;
use tokio::time::Instant;

use super::stored::{HeadRecord, StoredMessage, id, int, integer, place_of};
use super::{DUPLICATE_KEY, Inner, unavailable, watch, words};
use crate::backoff::between;
use crate::inbox::{Append, Appended, InboxError};
use crate::message::{Seq, UserId};

/// How long an append is tried. It is shorter than the deadline of a publish (10 s), so that the
/// sender hears the outcome.
const APPEND_DEADLINE: Duration = Duration::from_secs(8);
/// Delay between two tries of an append whose outcome is unknown.
const RETRY_MIN: Duration = Duration::from_millis(10);
const RETRY_MAX: Duration = Duration::from_millis(100);
/// Heads kept in memory, 150 bytes each: 30 MB. Above that, heads that are no longer trusted are
/// dropped first, then all.
const HEADS: usize = 200_000;
/// From the second round on, whatever ended the first, users get their items inserted one by one,
/// up to this many; what is left of a user follows in one ordered insert.
const WAVES: usize = 8;

/// How long another writer is expected after it was seen.
const OTHERS_FOR: Duration = Duration::from_secs(60);
/// Positions above a head in memory that are looked at while another writer is expected. The head
/// of a user with as many as that is read again.
const AHEAD: u64 = 3;

/// What this process knows about the heads of users.
#[derive(Default)]
pub(super) struct Heads {
    known: HashMap<UserId, Known>,
    /// When this process last sent an insert for a user whose head it does not remember; the insert
    /// may have been executed without a response.
    written: HashMap<UserId, Duration>,
    /// Until this time another process is expected to write to the same users. What came above a
    /// head in memory is then looked up before the next number is tried, which is cheaper than a
    /// duplicate key.
    others_until: Duration,
}

#[derive(Debug, Clone, Copy)]
struct Known {
    /// The highest number known to be durable.
    n: u64,
    /// When this process sent its last insert above the head that it had read; `None` if it sent
    /// none.
    wrote: Option<Duration>,
    /// When the read of `n`, or the acknowledged insert, was sent: since then `n` is trusted.
    sent: Duration,
}

impl Heads {
    /// Another process has written up to `n`. The trust in the earlier read still holds: nothing
    /// above it was old enough to be removed then.
    fn raise(&mut self, user: &UserId, n: u64, now: Duration) {
        self.others_until = now + OTHERS_FOR;
        if let Some(known) = self.known.get_mut(user) {
            known.n = known.n.max(n);
        }
    }

    /// The head of this user must be read again. `tried` is when an insert was sent whose outcome
    /// is unknown.
    fn forget(&mut self, user: &UserId, tried: Option<Duration>) {
        let known = self.known.remove(user);
        let wrote = tried.max(known.and_then(|known| known.wrote));
        if let Some(wrote) = wrote {
            let last = self.written.entry(user.clone()).or_default();
            *last = wrote.max(*last);
        }
    }

    /// The head of this user was read.
    fn take(&mut self, user: UserId, n: u64, now: Duration) {
        let wrote = self.written.remove(&user).max(self.known.get(&user).and_then(|known| known.wrote));
        self.known.insert(user, Known { n, wrote, sent: now });
    }

    /// The users to whom this process has sent an insert since then. After a restore, it may stand
    /// above a head that is gone.
    fn written_since(&self, since: Duration) -> Vec<UserId> {
        let known = self.known.iter().filter_map(|(user, known)| Some((user, known.wrote?)));
        let all = known.chain(self.written.iter().map(|(user, wrote)| (user, *wrote)));
        all.filter(|(_, wrote)| *wrote >= since).map(|(user, _)| user.clone()).collect()
    }

    /// `well` is when the store was last known to be whole: inserts before that need not be
    /// remembered.
    fn make_room(&mut self, now: Duration, trust: Duration, well: Duration) {
        if self.known.len() + self.written.len() <= HEADS {
            return;
        }
        self.written.retain(|_, wrote| *wrote >= well);
        let untrusted = |known: &Known| now.saturating_sub(known.sent) > trust;
        let old: Vec<UserId> =
            self.known.iter().filter(|(_, known)| untrusted(known)).map(|(user, _)| user.clone()).collect();
        old.iter().for_each(|user| self.forget(user, None));
        if self.known.len() + self.written.len() > HEADS {
            let all: Vec<UserId> = self.known.keys().cloned().collect();
            all.iter().for_each(|user| self.forget(user, None));
            self.written.retain(|_, wrote| *wrote >= well);
        }
        if self.written.len() > HEADS {
            // The store has not responded for long. What is not mended now is mended before the
            // user's next message.
            self.written.clear();
        }
    }
}

/// An append in progress.
struct Item {
    /// Index among the outcomes.
    at: usize,
    append: Append,
    /// Random id of this append. It tells what this process wrote from what another one did.
    append_id: String,
}

/// The outcome of one item in one insert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tried {
    Inserted,
    Taken,
    /// The outcome is unknown, or the item was not tried.
    Unknown,
}

type Outcomes = Vec<Option<Result<Appended, InboxError>>>;

/// Appends a batch; see the rules above.
pub(super) async fn append(inner: &Inner, batch: Vec<Append>) -> Vec<Result<Appended, InboxError>> {
    // Held to the end: one insert of a user in flight (rule 1).
    let mut heads = inner.appends.lock().await;
    if let Err(error) = give_up_heads(inner, &mut heads).await {
        return vec![Err(error); batch.len()];
    }
    heads.make_room(inner.clock.uptime(), inner.times.head_trust, inner.marker.lock().well);
    let mut outcomes: Outcomes = batch.iter().map(|_| None).collect();
    let fresh = |(at, append): (usize, Append)| {
        let given = append.append_id.as_deref().map(str::to_owned);
        Item { at, append_id: given.unwrap_or_else(|| ulid::Ulid::generate().to_string()), append }
    };
    let mut pending: Vec<Item> = batch.into_iter().enumerate().map(fresh).collect();
    refuse_ids(inner, &mut pending, &mut outcomes);
    let deadline = Instant::now() + APPEND_DEADLINE;
    let mut why =
        InboxError::Unavailable("MongoDB (mongo.uri) timed out: no answer until the deadline".to_owned());
    let mut again = false;
    while !pending.is_empty() && Instant::now() < deadline {
        let before = pending.len();
        match round(inner, &mut heads, &mut pending, &mut outcomes, std::mem::replace(&mut again, true)).await
        {
            Ok(()) if pending.len() < before => continue,
            Ok(()) => {}
            Err(error) => why = error,
        }
        let rest = between(RETRY_MIN, RETRY_MAX, &mut rand::rng());
        tokio::time::sleep(rest).await;
    }
    for item in pending {
        // Perhaps it is stored: the next append of this user reads the head.
        heads.forget(&item.append.user, Some(inner.clock.uptime()));
        outcomes[item.at] = Some(Err(why.clone()));
    }
    outcomes.into_iter().map(|outcome| outcome.unwrap_or_else(|| Err(why.clone()))).collect()
}

/// After a restore, heads in memory belong to another state of the store.
pub(super) async fn give_up_heads(inner: &Inner, heads: &mut Heads) -> Result<(), InboxError> {
    if !inner.restored.load(Ordering::Acquire) {
        return Ok(());
    }
    let since = inner.marker.lock().mend_since;
    let written = since.map(|since| heads.written_since(since)).unwrap_or_default();
    watch::mend(inner, written).await?;
    inner.marker.lock().mend_since = None;
    heads.known.clear();
    heads.written.clear();
    inner.restored.store(false, Ordering::Release);
    Ok(())
}

/// While ids could be stored twice, publishes with an id are refused.
fn refuse_ids(inner: &Inner, pending: &mut Vec<Item>, outcomes: &mut Outcomes) {
    let why = inner.ids_refused.lock().clone();
    if let Some(why) = why {
        let refused = |item: &Item| item.append.deduplicated;
        for item in pending.iter().filter(|item| refused(item)) {
            outcomes[item.at] = Some(Err(InboxError::Unavailable(why.clone())));
        }
        pending.retain(|item| !refused(item));
    }
}

/// Tries all pending items once. Items that are settled leave `pending`.
async fn round(
    inner: &Inner,
    heads: &mut Heads,
    pending: &mut Vec<Item>,
    outcomes: &mut Outcomes,
    again: bool,
) -> Result<(), InboxError> {
    read_heads(inner, heads, pending, again).await?;
    let numbers = number(heads, pending);
    let sent = inner.clock.uptime();
    let (tried, fault) = if again {
        insert_in_waves(inner, pending, &numbers).await
    } else {
        insert(inner, pending, &numbers).await
    };
    let mut done = HashSet::new();
    let settled = settle(inner, heads, pending, &numbers, sent, tried, again, &mut done, outcomes).await;
    // Also after an error: a settled item must not be appended again under another number.
    pending.retain(|item| !done.contains(&item.at));
    void_ids(pending, outcomes);
    settled.and(fault.map_or(Ok(()), Err))
}

/// Determines the outcome of each item. Items that need no further try go into `done`.
#[allow(clippy::too_many_arguments)]
async fn settle(
    inner: &Inner,
    heads: &mut Heads,
    pending: &[Item],
    numbers: &[u64],
    sent: Duration,
    tried: Vec<Tried>,
    again: bool,
    done: &mut HashSet<usize>,
    outcomes: &mut Outcomes,
) -> Result<(), InboxError> {
    let mut taken = Vec::new();
    for (i, tried) in tried.into_iter().enumerate() {
        let item = &pending[i];
        match tried {
            Tried::Inserted => {
                if acknowledge(inner, heads, item, numbers[i], Some(sent), outcomes).await? {
                    done.insert(item.at);
                }
            }
            Tried::Taken => taken.push(i),
            Tried::Unknown => {}
        }
    }
    // In order: what precedes an item of the same user must be settled first.
    let found = look_at(inner, pending, numbers, &taken).await?;
    let (mut repeats, mut raised, mut bridged) = (Vec::new(), Vec::new(), Vec::new());
    for i in taken {
        let item = &pending[i];
        let stored = found.get(&(item.append.user.as_str(), numbers[i]));
        if stored.is_some_and(|append_id| *append_id == item.append_id) {
            if acknowledge(inner, heads, item, numbers[i], None, outcomes).await? {
                done.insert(item.at);
            }
            continue;
        }
        match stored {
            // A bridge: numbers go on further above.
            Some(append_id) if append_id.is_empty() => bridged.push(&item.append.user),
            Some(_) => raised.push((&item.append.user, numbers[i])),
            None => {}
        }
        if item.append.deduplicated {
            repeats.push(item);
        }
    }
    let now = inner.clock.uptime();
    for (user, n) in raised {
        heads.raise(user, n, now);
        if again {
            // More than one number was taken meanwhile: read the head instead of trying one number
            // after another.
            heads.forget(user, None);
        }
    }
    for user in bridged {
        heads.forget(user, None);
    }
    answer_repeats(inner, &repeats, outcomes, done).await
}

/// An append whose number is void starts over as another append.
fn void_ids(pending: &mut [Item], outcomes: &mut Outcomes) {
    for item in pending {
        if outcomes[item.at].take().is_some() {
            item.append_id = ulid::Ulid::generate().to_string();
        }
    }
}

/// Reads the heads that are not known or no longer trusted. Trust is decided once per batch: an
/// item whose insert may have been executed must be tried under the same number again, not above
/// itself.
async fn read_heads(
    inner: &Inner,
    heads: &mut Heads,
    pending: &[Item],
    again: bool,
) -> Result<(), InboxError> {
    let now = inner.clock.uptime();
    let trusted = |user: &UserId| {
        let young = |known: &Known| now.saturating_sub(known.sent) <= inner.times.head_trust;
        heads.known.get(user).is_some_and(|known| again || young(known))
    };
    let mut users: Vec<&UserId> = pending.iter().map(|item| &item.append.user).collect();
    users.sort_unstable();
    users.dedup();
    let (known, mut unknown): (Vec<&UserId>, Vec<&UserId>) =
        users.into_iter().partition(|user| trusted(user));
    // Not on a repeat: it would find what this batch itself has written, perhaps without a
    // response.
    if !again && now < heads.others_until {
        unknown.extend(look_above(inner, heads, known, now).await?);
    }
    if !unknown.is_empty() {
        let tops = inner.tops_made(&unknown).await?;
        let floor = watch::read(inner).await?;
        // Numbers that were assigned before a restore are not assigned again.
        let lowest = |record: &HeadRecord| floor.max(record.shown);
        let last = |(record, top): &(HeadRecord, u64)| record.head.max(*top);
        let below = tops.iter().filter(|(_, top)| last(top) < lowest(&top.0));
        let below: Vec<(&UserId, u64)> = below.map(|(user, top)| (user, last(top))).collect();
        watch::bridge(inner, &below).await?;
        for (user, top) in &tops {
            heads.take(user.clone(), last(top).max(lowest(&top.0)), now);
        }
    }
    Ok(())
}

/// Learns what other processes have written above the trusted heads of these users. Returns the
/// users that have as many as [`AHEAD`] messages there, or a bridge: there may be more, so their
/// head is read again. Numbers are dense: above the first that is missing, none was assigned yet.
async fn look_above<'a>(
    inner: &Inner,
    heads: &mut Heads,
    users: Vec<&'a UserId>,
    now: Duration,
) -> Result<Vec<&'a UserId>, InboxError> {
    let base = |heads: &Heads, user: &UserId| heads.known.get(user).map_or(0, |known| known.n);
    let ids = users.iter().flat_map(|user| (1..=AHEAD).map(|k| id(user, base(heads, user) + k))).collect();
    let found = inner.by_ids(ids, doc! { "_id": 1, "x": 1 }).await?;
    let mut count: HashMap<&str, u64> = HashMap::new();
    for (document, (user, _)) in found.iter().filter_map(|one| Some((one, place_of(one)?))) {
        let more = if StoredMessage::is_bridge(document) { AHEAD } else { 1 };
        *count.entry(user).or_default() += more;
    }
    let mut far = Vec::new();
    for user in users {
        match count.get(user.as_str()).copied() {
            None => {}
            Some(more) if more >= AHEAD => far.push(user),
            Some(more) => heads.raise(user, base(heads, user) + more, now),
        }
    }
    Ok(far)
}

/// The next numbers of each user, in the order of the items.
fn number(heads: &Heads, pending: &[Item]) -> Vec<u64> {
    let mut next: HashMap<&UserId, u64> = HashMap::new();
    pending
        .iter()
        .map(|item| {
            let user = &item.append.user;
            let n = next.entry(user).or_insert_with(|| heads.known.get(user).map_or(0, |known| known.n));
            *n += 1;
            *n
        })
        .collect()
}

/// One unordered insert for users with one item, so that one's error does not affect another; one
/// ordered insert for all others, so that no number goes in before the one below it.
async fn insert(inner: &Inner, pending: &[Item], numbers: &[u64]) -> (Vec<Tried>, Option<InboxError>) {
    let mut count: HashMap<&UserId, usize> = HashMap::new();
    pending.iter().for_each(|item| *count.entry(&item.append.user).or_default() += 1);
    let (single, several): (Vec<usize>, Vec<usize>) =
        (0..pending.len()).partition(|i| count.get(&pending[*i].append.user) == Some(&1));
    let (one, other) = tokio::join!(
        insert_these(inner, pending, numbers, &single, false),
        insert_these(inner, pending, numbers, &several, true)
    );
    let mut tried = vec![Tried::Unknown; pending.len()];
    for (batch, result) in [(&single, &one.0), (&several, &other.0)] {
        batch.iter().zip(result).for_each(|(i, result)| tried[*i] = *result);
    }
    (tried, one.1.or(other.1))
}

/// The first item of every user, then the next of those whose item went in, and so on. A head that
/// is outdated stops only its own user.
async fn insert_in_waves(
    inner: &Inner,
    pending: &[Item],
    numbers: &[u64],
) -> (Vec<Tried>, Option<InboxError>) {
    let mut tried = vec![Tried::Unknown; pending.len()];
    let mut left: HashMap<&UserId, VecDeque<usize>> = HashMap::new();
    for (i, item) in pending.iter().enumerate() {
        left.entry(&item.append.user).or_default().push_back(i);
    }
    let mut fault = None;
    for wave in 0..=WAVES {
        let last = wave == WAVES;
        let take = |queue: &mut VecDeque<usize>| -> Vec<usize> {
            let count = if last { queue.len() } else { queue.len().min(1) };
            queue.drain(..count).collect()
        };
        let batch: Vec<usize> = left.values_mut().flat_map(take).collect();
        if batch.is_empty() {
            break;
        }
        let (results, failed) = insert_these(inner, pending, numbers, &batch, last).await;
        fault = fault.or(failed);
        for (i, result) in batch.into_iter().zip(results) {
            tried[i] = result;
            if result != Tried::Inserted {
                left.remove(&pending[i].append.user);
            }
        }
    }
    (tried, fault)
}

async fn insert_these(
    inner: &Inner,
    pending: &[Item],
    numbers: &[u64],
    batch: &[usize],
    ordered: bool,
) -> (Vec<Tried>, Option<InboxError>) {
    if batch.is_empty() {
        return (Vec::new(), None);
    }
    let documents: Vec<StoredMessage> = batch
        .iter()
        .map(|i| StoredMessage::new(&pending[*i].append, &pending[*i].append_id, numbers[*i]))
        .collect();
    let inserting = inner.messages.insert_many(&documents).ordered(ordered).into_future();
    let error = match inner.in_time(inserting).await {
        Ok(_) => return (vec![Tried::Inserted; batch.len()], None),
        Err(error) => error,
    };
    let ErrorKind::InsertMany(many) = &*error.kind else {
        return (vec![Tried::Unknown; batch.len()], Some(unavailable(error)));
    };
    let acknowledged = many.write_concern_error.is_none();
    let mut tried = vec![if acknowledged { Tried::Inserted } else { Tried::Unknown }; batch.len()];
    for fault in many.write_errors.iter().flatten() {
        if let Some(result) = tried.get_mut(fault.index) {
            // If the preceding items are unknown, a duplicate key may be one of our own.
            *result = if fault.code == DUPLICATE_KEY && acknowledged { Tried::Taken } else { Tried::Unknown };
        }
        if ordered {
            tried.iter_mut().skip(fault.index + 1).for_each(|result| *result = Tried::Unknown);
        }
    }
    // Duplicate keys are a response, not an error.
    let fault =
        (!acknowledged).then(|| InboxError::Unavailable(format!("MongoDB (mongo.uri): {}", words(&error))));
    (tried, fault)
}

/// Takes an item as stored under its number, unless that number turns out to be void. Returns
/// whether it is stored.
async fn acknowledge(
    inner: &Inner,
    heads: &mut Heads,
    item: &Item,
    n: u64,
    sent: Option<Duration>,
    outcomes: &mut Outcomes,
) -> Result<bool, InboxError> {
    let user = &item.append.user;
    let read = heads.known.get(user).map_or(Duration::ZERO, |known| known.sent);
    if inner.clock.uptime().saturating_sub(read) > inner.times.verify_after() {
        let record = inner.linearizable(user, 0).await?;
        let head = record.map_or(u64::MAX, |record| super::HeadRecord::read(&record).head);
        if head >= n {
            tracing::warn!("an append took so long that its number is void; it is appended anew");
            heads.forget(user, Some(read));
            give_up_id(inner, &id(user, n), &item.append).await?;
            // A mark, so that it goes on as another append.
            outcomes[item.at] = Some(Err(InboxError::Unavailable("void".to_owned())));
            return Ok(false);
        }
    }
    let sent = sent.unwrap_or(read);
    let known = heads.known.entry(user.clone()).or_insert(Known { n, wrote: None, sent });
    *known = Known { n: known.n.max(n), wrote: Some(sent).max(known.wrote), sent };
    outcomes[item.at] = Some(Ok(Appended::Stored(Arc::new(item.append.stored_at(Seq::at(n))))));
    Ok(true)
}

/// The append ids that a majority has at the positions that were taken.
async fn look_at<'a>(
    inner: &Inner,
    pending: &'a [Item],
    numbers: &[u64],
    taken: &[usize],
) -> Result<HashMap<(&'a str, u64), String>, InboxError> {
    let ids: Vec<Document> = taken.iter().map(|i| id(&pending[*i].append.user, numbers[*i])).collect();
    let found = inner.by_ids(ids, doc! { "_id": 1, "a": 1 }).await?;
    let mut found: HashMap<(&str, u64), &Document> =
        found.iter().filter_map(|document| Some((place_of(document)?, document))).collect();
    let shown = taken.iter().filter_map(|i| {
        let place = (pending[*i].append.user.as_str(), numbers[*i]);
        let document = found.remove(&place)?;
        Some((place, document.get_str("a").unwrap_or_default().to_owned()))
    });
    Ok(shown.collect())
}

/// Settles repeats by what a majority shows under the senders' ids. If nothing is stored there (any
/// more), the append is tried again.
async fn answer_repeats(
    inner: &Inner,
    items: &[&Item],
    outcomes: &mut Outcomes,
    done: &mut HashSet<usize>,
) -> Result<(), InboxError> {
    if items.is_empty() {
        return Ok(());
    }
    let place = |item: &&Item| doc! { "_id.u": item.append.user.as_str(), "f": item.append.fence() };
    let filter = doc! { "$or": items.iter().map(place).collect::<Vec<_>>() };
    let fields = doc! { "_id": 1, "a": 1, "f": 1, "d": 1, "x": 1 };
    let found = inner.find(filter, fields).await?;
    let records = found.iter().filter_map(place_of).map(|(user, _)| doc! { "u": user, "n": 0i64 }).collect();
    let records = inner.by_ids(records, doc! {}).await?;
    let heads: HashMap<&str, u64> =
        records.iter().filter_map(|one| Some((place_of(one)?.0, HeadRecord::read(one).head))).collect();
    let found: HashMap<(&str, String), (u64, &Document)> = found
        .iter()
        .filter_map(|one| {
            let (user, n) = place_of(one)?;
            Some(((user, one.get_str("f").ok()?.to_owned()), (n, one)))
        })
        .collect();
    let now = int(inner.clock.now().0);
    for item in items {
        let append = &item.append;
        let Some((n, stored)) = found.get(&(append.user.as_str(), append.fence())) else { continue };
        let head = heads.get(append.user.as_str()).copied().unwrap_or(0);
        if *n <= head || integer(stored, "x").is_some_and(|expires_at| expires_at <= now) {
            give_up_id(inner, &id(&append.user, *n), append).await?;
            continue;
        }
        let same = stored.get_binary_generic("d").is_ok_and(|digest| *digest == append.digest());
        // Another process has written this very append, and its answer was lost.
        let own = same && stored.get_str("a").is_ok_and(|append_id| append_id == item.append_id);
        outcomes[item.at] = Some(Ok(match (same, own) {
            (true, true) => Appended::Stored(Arc::new(append.stored_at(Seq::at(*n)))),
            (true, false) => Appended::Duplicate(Seq::at(*n)),
            (false, _) => Appended::Conflict,
        }));
        done.insert(item.at);
    }
    Ok(())
}

/// Frees the id of a message that has expired or whose number is void.
async fn give_up_id(inner: &Inner, place: &Document, append: &Append) -> Result<(), InboxError> {
    if !append.deduplicated {
        return Ok(());
    }
    let filter = doc! { "_id": place.clone(), "f": append.fence() };
    let update = doc! { "$unset": { "f": "" } };
    let updated = inner.documents.update_one(filter, update).into_future();
    inner.in_time(updated).await.map(drop).map_err(unavailable)
}

#[cfg(test)]
mod tests;
