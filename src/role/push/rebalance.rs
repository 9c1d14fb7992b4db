//! Where this node's users belong: the fallback entries of users that another node owns, the moves
//! that send them there, and the drain that sends all of them away.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use rand::seq::SliceRandom;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::Node;
use super::mailbox::MoveOrder;
use super::registry::SessionHandle;
use crate::backoff::{Backoff, around, between};
use crate::fallback::Which;
use crate::membership::{Member, NodeState, View};
use crate::message::{NodeId, UserId};
use crate::telemetry::WAY;
use crate::wire::close::CloseCode;
use crate::wire::frame::{MoveReason, ServerFrame};

/// Time between two batches of moves: a tenth of the second within which a displaced client must be
/// told.
const MOVE_TICK: Duration = Duration::from_millis(100);
/// The accept rate of a target without a limit, for pacing (docs/design.md, section 6).
const UNLIMITED_ACCEPT_PER_S: u32 = 4_000;
/// Longest jitter of a moved client.
pub const MOVE_JITTER: Duration = Duration::from_secs(1);
/// How long a client that was told to leave may take after its jitter.
pub const DRAIN_GRACE: Duration = Duration::from_secs(10);
/// Time over which sessions are closed that have nowhere to go.
pub const CLOSE_SPREAD: Duration = Duration::from_secs(5);
/// Most sessions closed per second if they have nowhere to go: a small node need not take the whole
/// spread.
const CLOSES_PER_S: u32 = 2_000;

/// Concurrent checks of inboxes of users that were entered. If the inbox is slower than that, each
/// session reads its own.
const LOOKS_AT_ONCE: usize = 4;
/// Delay between two tries to write the fallback entries, at first and at most.
const FALLBACK_RETRY_FIRST: Duration = Duration::from_millis(100);
const FALLBACK_RETRY_MAX: Duration = Duration::from_secs(3);
/// Time between two renewals of the fallback set, ± 20 %.
const FALLBACK_RENEW: Duration = Duration::from_secs(2);
/// Time between two removals of users whose last session has ended. Each removal changes the bitmap
/// that every router reads, while an entry too many costs only a copy.
const LEAVE_EVERY: Duration = Duration::from_millis(500);
/// How long a session that attaches waits for its fallback entry. If the registry hangs, the
/// session goes on and the entry is written later.
const ENTER_DEADLINE: Duration = Duration::from_millis(500);
/// Longest window in which clients are told to reconnect, in ms.
const RECONNECT_MAX_MS: u64 = 60_000;

/// The users of this node that are in the fallback set, and those that must be checked.
#[derive(Default)]
pub(super) struct Displaced {
    state: Mutex<DisplacedState>,
    changed: Notify,
}

#[derive(Default)]
struct DisplacedState {
    entered: HashSet<UserId>,
    doubtful: HashSet<UserId>,
    /// Users in the set whose last session has ended; checked together later.
    leaving: HashSet<UserId>,
    /// Users that were entered, with the time. Their inboxes are checked again when every router
    /// has seen the entry.
    look_again: VecDeque<(Instant, Vec<UserId>)>,
}

impl Displaced {
    /// Something changed for these users: compare the set with what it should be.
    pub(super) fn doubt(&self, users: Vec<UserId>) {
        self.state.lock().doubtful.extend(users);
        self.changed.notify_one();
    }

    /// The last session of this user has ended. This matters only if the user is in the set or
    /// about to be; in the common case it costs one look-up.
    pub(super) fn leave(&self, user: &UserId) {
        let mut state = self.state.lock();
        if state.entered.contains(user) {
            state.leaving.insert(user.clone());
        }
    }

    /// Schedules the users of `leaving` for a check. Returns whether there are any.
    fn doubt_leaving(&self) -> bool {
        let mut state = self.state.lock();
        let leaving = std::mem::take(&mut state.leaving);
        let any = !leaving.is_empty();
        state.doubtful.extend(leaving);
        any
    }

    /// No user is here any more.
    pub(super) fn forget(&self) {
        *self.state.lock() = DisplacedState::default();
    }

    /// Number of users in the set.
    pub(super) fn len(&self) -> usize {
        self.state.lock().entered.len()
    }

    /// The set was lost: enter all of its users again.
    pub(super) fn write_again(&self) {
        let mut state = self.state.lock();
        let lost: Vec<UserId> = state.entered.drain().collect();
        state.doubtful.extend(lost);
        drop(state);
        self.changed.notify_one();
    }

    fn note_entered(&self, users: Vec<UserId>) {
        let mut state = self.state.lock();
        state.entered.extend(users.iter().cloned());
        state.look_again.push_back((Instant::now(), users));
    }

    /// Users that were entered at least `since` ago and have not been checked since.
    fn due(&self, since: Duration) -> Vec<UserId> {
        let mut due = Vec::new();
        let queue = &mut self.state.lock().look_again;
        while queue.front().is_some_and(|(at, _)| at.elapsed() >= since) {
            due.extend(queue.pop_front().into_iter().flat_map(|(_, users)| users));
        }
        due
    }

    fn is_entered(&self, user: &UserId) -> bool {
        self.state.lock().entered.contains(user)
    }

    fn take_doubtful(&self) -> Vec<UserId> {
        self.state.lock().doubtful.drain().collect()
    }
}

/// Enters a user before its session reads the inbox, so that dispatch sends later messages here
/// too.
pub(super) async fn enter(node: &Node, user: &UserId) {
    // Noted first: if this session ends from now on, the entry is removed.
    node.displaced.state.lock().entered.insert(user.clone());
    let adding = node.fallback.add(&node.holder, vec![user.clone()]);
    let late = || crate::fallback::FallbackError("not in time".to_owned());
    match tokio::time::timeout(ENTER_DEADLINE, adding).await.unwrap_or_else(|_| Err(late())) {
        Ok(()) => {
            tracing::debug!(target: WAY, step = 4, %user, node = %node.name(), "displaced: entered into the fallback set");
            node.displaced.note_entered(vec![user.clone()]);
        }
        Err(error) => {
            tracing::debug!(%error, "a fallback entry could not be written");
            node.displaced.state.lock().entered.remove(user);
        }
    }
    // Checked in any case: a removal may have crossed with this.
    node.displaced.doubt(vec![user.clone()]);
}

/// Keeps the fallback set in line with the registry and the view.
pub(super) async fn keep_fallback(node: Arc<Node>) {
    let mut backoff = Backoff::new(FALLBACK_RETRY_FIRST, FALLBACK_RETRY_MAX);
    let mut looking = JoinSet::new();
    let mut leaves = tokio::time::interval(LEAVE_EVERY);
    leaves.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = node.displaced.changed.notified() => {}
            _ = leaves.tick() => if !node.displaced.doubt_leaving() {
                continue;
            }
        }
        while looking.try_join_next().is_some() {}
        loop {
            let doubtful = node.displaced.take_doubtful();
            if let Some(entered) = reconcile(&node, &doubtful).await {
                // Messages that were sent before the entry existed passed by: check those inboxes
                // at once. The next entries do not wait for that.
                let handles = seats_of(&node, &entered);
                if looking.len() >= LOOKS_AT_ONCE {
                    handles.iter().for_each(|handle| handle.mailbox.lost());
                } else if !handles.is_empty() {
                    let node = Arc::clone(&node);
                    looking.spawn(async move { super::sweep::catch_up(&node, &handles).await });
                }
                backoff.reset();
                break;
            }
            // Routers do not know that these users are here, so this node checks the inboxes
            // itself.
            sweep_users(&node, &doubtful).await;
            node.displaced.doubt(doubtful);
            let rest = backoff.next(&mut rand::rng());
            tokio::time::sleep(rest).await;
        }
    }
}

async fn sweep_users(node: &Node, users: &[UserId]) {
    super::sweep::sweep_seats(node, &seats_of(node, users)).await;
}

fn seats_of(node: &Node, users: &[UserId]) -> Vec<Arc<SessionHandle>> {
    let mut handles = Vec::with_capacity(users.len());
    users.iter().for_each(|user| node.registry.for_user(user, |handle| handles.push(Arc::clone(handle))));
    handles
}

/// Renews the lease of the fallback set, and writes the set again if its size was wrong twice
/// running. Also checks once more the inboxes of users that were entered a moment ago, because a
/// router may have seen the entry only now.
pub(super) async fn renew_fallback(node: Arc<Node>) {
    let mut wrong = 0;
    loop {
        let rest = around(FALLBACK_RENEW, 0.2, &mut rand::rng());
        tokio::time::sleep(rest).await;
        let due = node.displaced.due(node.fallback.hints().seen_after);
        if !due.is_empty() {
            sweep_users(&node, &due).await;
        }
        let expected = node.displaced.len();
        if expected == 0 {
            wrong = 0;
            continue;
        }
        match node.fallback.keep(&node.holder).await {
            Ok(size) if size == expected => wrong = 0,
            Ok(size) => {
                wrong += 1;
                if wrong >= 2 {
                    tracing::info!(size, expected, "the fallback set was lost; it is written again");
                    node.displaced.write_again();
                    wrong = 0;
                }
            }
            Err(error) => {
                tracing::debug!(%error, "the fallback set could not be renewed");
                let entered: Vec<UserId> = node.displaced.state.lock().entered.iter().cloned().collect();
                sweep_users(&node, &entered).await;
            }
        }
    }
}

/// Enters and removes what differs. Returns the users that were entered; `None` if the set could
/// not be written, in which case all users must be checked again.
async fn reconcile(node: &Node, users: &[UserId]) -> Option<Vec<UserId>> {
    let view = Arc::clone(&node.views.borrow());
    let own = &node.holder;
    let wanted = |user: &UserId| node.registry.has(user) && !node.owns(&view, user);
    let (mut add, mut remove) = (Vec::new(), HashSet::new());
    for user in users {
        match (wanted(user), node.displaced.is_entered(user)) {
            (true, false) => add.push(user.clone()),
            (true, true) => {}
            // Also if it is not known to be entered: a wrong entry must go, and a removal too many
            // is harmless.
            (false, _) => drop(remove.insert(user.clone())),
        }
    }
    let mut written = Ok(());
    if !add.is_empty() {
        written = node.fallback.add(own, add.clone()).await;
    }
    if !remove.is_empty() && written.is_ok() {
        written = node.fallback.remove(own, Which::Users(remove.iter().cloned().collect())).await;
    }
    if let Err(error) = written {
        tracing::debug!(%error, "the fallback entries could not be written");
        return None;
    }
    if !remove.is_empty() {
        node.displaced.state.lock().entered.retain(|user| !remove.contains(user));
    }
    if !add.is_empty() {
        node.displaced.note_entered(add.clone());
        // A session that ended, or a user that became owned, while the entry was being written
        // found no entry to remove.
        let view = Arc::clone(&node.views.borrow());
        let stays = |user: &UserId| node.registry.has(user) && !node.owns(&view, user);
        node.displaced.doubt(add.iter().filter(|user| !stays(user)).cloned().collect());
    }
    Some(add)
}

/// Sessions that may have to move.
#[derive(Default)]
pub(super) struct Moves {
    fresh: Mutex<Vec<Weak<SessionHandle>>>,
}

impl Moves {
    /// A session attached to a node that does not own its user.
    pub(super) fn consider(&self, handle: &Arc<SessionHandle>) {
        self.fresh.lock().push(Arc::downgrade(handle));
    }
}

/// What to do about one displaced session now.
#[derive(Debug, PartialEq)]
enum Verdict<'a> {
    /// Tell it to move to this node.
    Move(&'a Member),
    /// Not yet.
    Wait,
    /// Nothing, until the view changes.
    Stay,
}

/// The rule of docs/design.md, section 6: one move per owner incarnation; none while the view is
/// held, none by a view that is older than the client's, and none for a client that was sent here
/// on purpose until the view has changed.
fn verdict<'a>(view: &'a View, own: &NodeId, handle: &SessionHandle) -> Verdict<'a> {
    match view.owner(&handle.user) {
        None => Verdict::Stay,
        Some(owner) if owner.info.node == *own => Verdict::Stay,
        Some(_) if handle.arrival.keep_at == Some(view.digest) => Verdict::Stay,
        Some(_) if view.held || view.epoch < handle.arrival.client_epoch => Verdict::Wait,
        Some(owner) => Verdict::Move(owner),
    }
}

/// Moves to one target per second: half of what it accepts, divided among the nodes that may send
/// to it.
fn moves_per_s(view: &View, target: &Member) -> f64 {
    let accepts = accepts(target.info.accept_per_s);
    let senders = view.members.len().saturating_sub(1).max(1);
    f64::from(accepts) / 2.0 / senders as f64
}

/// Tells displaced sessions to move, at the pace of their targets. Walks all sessions on a new
/// view.
pub(super) async fn pace_moves(node: Arc<Node>) {
    let mut views = node.views.clone();
    let mut waiting: Vec<Weak<SessionHandle>> = Vec::new();
    let mut allowance: HashMap<NodeId, f64> = HashMap::new();
    let mut dialling = JoinSet::new();
    let mut ticks = tokio::time::interval(MOVE_TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    loop {
        tokio::select! {
            biased;
            // From then on only the drain tells sessions where to go.
            () = node.draining.cancelled() => return std::future::pending().await,
            changed = views.changed() => {
                if changed.is_err() {
                    return;
                }
                let view = Arc::clone(&views.borrow_and_update());
                waiting = walk(&node, &view);
            }
            Some(_) = dialling.join_next() => {}
            _ = ticks.tick() => {
                waiting.append(&mut node.moves.fresh.lock());
                if !waiting.is_empty() {
                    let view = Arc::clone(&views.borrow());
                    for target in hand_out(&node, &view, &mut waiting, &mut allowance) {
                        let reach = node.reach.clone();
                        dialling.spawn(async move { reach.answers(&target).await });
                    }
                } else if !allowance.is_empty() {
                    allowance.clear();
                }
            }
        }
    }
}

/// All sessions whose user another node owns in this view. Their fallback entries are checked
/// first.
fn walk(node: &Node, view: &View) -> Vec<Weak<SessionHandle>> {
    let handles = node.registry.all();
    let users = handles.iter().map(|handle| handle.user.clone());
    // Collected first, because looking takes the lock that `doubt` needs.
    let doubtful: Vec<UserId> =
        users.filter(|user| !node.owns(view, user) || node.displaced.is_entered(user)).collect();
    node.displaced.doubt(doubtful);
    handles.iter().filter(|handle| !node.owns(view, &handle.user)).map(Arc::downgrade).collect()
}

/// Tells as many sessions as may move now. Returns the owners that must be probed first.
fn hand_out(
    node: &Node,
    view: &View,
    waiting: &mut Vec<Weak<SessionHandle>>,
    allowance: &mut HashMap<NodeId, f64>,
) -> HashSet<NodeId> {
    let mut dial = HashSet::new();
    for member in &view.members {
        let per_tick = moves_per_s(view, member) * MOVE_TICK.as_secs_f64();
        let left = allowance.entry(member.info.node.clone()).or_insert(0.0);
        // Unused allowance is not saved up, because a pause must not end in a burst. One move is
        // always possible.
        *left = left.min(0.0) + per_tick.max(1.0);
    }
    waiting.retain(|weak| {
        let Some(handle) = weak.upgrade() else { return false };
        match verdict(view, node.name(), &handle) {
            Verdict::Stay => false,
            Verdict::Wait => true,
            Verdict::Move(owner) => {
                match node.reach.known(&owner.info.node) {
                    Some(true) => {}
                    Some(false) => return true,
                    None => {
                        dial.insert(owner.info.node.clone());
                        return true;
                    }
                }
                let left = allowance.entry(owner.info.node.clone()).or_insert(0.0);
                if *left < 1.0 {
                    return true;
                }
                if handle.tell_once(&owner.info.node, owner.incarnation) {
                    *left -= 1.0;
                    send_move(node, view, &handle, owner, MoveReason::Owner);
                }
                false
            }
        }
    });
    dial
}

/// Puts the `move` frame into the session's mailbox. Returns whether a URL of the target is known.
fn send_move(node: &Node, view: &View, handle: &SessionHandle, target: &Member, reason: MoveReason) -> bool {
    let Some(base) = node.urls.of(&target.info.node) else { return false };
    let after = between(Duration::ZERO, MOVE_JITTER, &mut rand::rng());
    // Two hops mean "keep the client": from a draining node, or the second time it was sent on.
    let hops = if reason == MoveReason::Drain { 2 } else { handle.arrival.hops.saturating_add(1).min(2) };
    let frame = ServerFrame::Move {
        url: format!("{base}?hops={hops}&epoch={}", view.epoch),
        node: target.info.node.to_string(),
        epoch: view.epoch,
        after_ms: u64::try_from(after.as_millis()).unwrap_or(0),
        reason,
    };
    let close_after = (reason == MoveReason::Drain).then_some(after + DRAIN_GRACE);
    handle.mailbox.move_to(MoveOrder { frame: frame.encode(), close_after });
    node.metrics.moves.inc();
    true
}

/// How a node empties itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drain {
    /// Move the sessions to other nodes within this time.
    Move(Duration),
    /// There are no other nodes: close the sessions over [`CLOSE_SPREAD`].
    Close,
}

/// Sends every session away. Returns when all have gone or the time is over.
pub(super) async fn drain(node: &Node, how: Drain) {
    let mut handles = node.registry.all();
    handles.shuffle(&mut rand::rng());
    match how {
        Drain::Move(window) => move_all(node, &handles, window).await,
        Drain::Close => {
            close_all(&handles).await;
            // Sessions that registered meanwhile.
            close_all(&node.registry.all()).await;
        }
    }
}

/// This node has lost its place: sends every session to the node that owns its user otherwise.
pub(super) async fn evacuate(node: Arc<Node>) {
    let mut handles = node.registry.all();
    handles.shuffle(&mut rand::rng());
    move_all(&node, &handles, node.config.drain_window).await;
}

/// Closes every session over the drain window: another process has this node's name.
pub(super) async fn close_over_window(node: Arc<Node>) {
    close_spread(&node.registry.all(), node.config.drain_window).await;
    close_spread(&node.registry.all(), Duration::ZERO).await;
}

/// The view as other nodes will see it: without this node.
fn without(view: Arc<View>, own: &NodeId) -> Arc<View> {
    match view.member(own) {
        Some(member) if member.state == NodeState::Active => {
            Arc::new(view.without(std::slice::from_ref(own)))
        }
        _ => view,
    }
}

/// Tells every session where to go, at the pace that the window needs. A session that was sent to a
/// node that then drains too is told again.
async fn move_all(node: &Node, handles: &[Arc<SessionHandle>], window: Duration) {
    let began = Instant::now();
    node.displaced.doubt(handles.iter().map(|handle| handle.user.clone()).collect());
    // The last session told still has its jitter and grace, and must be closed by the end of the
    // window.
    let telling = window.saturating_sub(MOVE_JITTER + DRAIN_GRACE + Duration::from_secs(1)).max(window / 4);
    let mut waiting: VecDeque<Arc<SessionHandle>> = handles.iter().cloned().collect();
    let mut told = HashMap::new();
    let mut source = Arc::clone(&node.views.borrow());
    let mut view = without(Arc::clone(&source), node.name());
    while began.elapsed() < window && (!waiting.is_empty() || node.registry.len() > 0) {
        let newest = Arc::clone(&node.views.borrow());
        if !Arc::ptr_eq(&newest, &source) {
            source = newest;
            view = without(Arc::clone(&source), node.name());
            waiting = node.registry.all().into();
        }
        let paced: f64 = view.members.iter().map(|member| moves_per_s(&view, member)).sum();
        let left = telling.saturating_sub(began.elapsed()).as_secs_f64().max(0.1);
        let batch =
            (paced.max(waiting.len() as f64 / left) * MOVE_TICK.as_secs_f64()).ceil().max(1.0) as usize;
        for handle in waiting.drain(..batch.min(waiting.len())) {
            tell_to_leave(node, &view, &handle, &mut told);
        }
        tokio::time::sleep(MOVE_TICK).await;
    }
    for handle in node.registry.all() {
        handle.mailbox.close(CloseCode::Draining, "the node is leaving");
    }
}

/// Tells each session once per owner, whatever it was told before the drain.
fn tell_to_leave(
    node: &Node,
    view: &View,
    handle: &SessionHandle,
    told: &mut HashMap<ulid::Ulid, (NodeId, u64)>,
) {
    let Some(owner) = view.owner(&handle.user).filter(|owner| owner.info.node != *node.name()) else {
        return handle.mailbox.close(CloseCode::Draining, "the node is leaving");
    };
    let target = (owner.info.node.clone(), owner.incarnation);
    if told.insert(handle.id, target.clone()) == Some(target) {
        return;
    }
    if !send_move(node, view, handle, owner, MoveReason::Drain) {
        handle.mailbox.close(CloseCode::Draining, "the node is leaving");
    }
}

async fn close_all(handles: &[Arc<SessionHandle>]) {
    close_spread(handles, CLOSE_SPREAD.min(Duration::from_secs(1) * handles.len() as u32 / CLOSES_PER_S))
        .await;
}

async fn close_spread(handles: &[Arc<SessionHandle>], spread: Duration) {
    let began = Instant::now();
    for (n, handle) in handles.iter().enumerate() {
        let due = began + spread.mul_f64(n as f64 / handles.len() as f64);
        if due > Instant::now() {
            tokio::time::sleep_until(due).await;
        }
        handle.mailbox.close(CloseCode::Draining, "the node is leaving");
    }
}

/// The window in which clients should reconnect, in ms: long enough that this node's sessions fit
/// into what one node accepts.
pub(super) fn reconnect_window_ms(sessions: usize, accept_per_s: u32, jitter_ms: u64) -> u64 {
    jitter_ms.max((sessions as u64 * 1000 / u64::from(accepts(accept_per_s))).min(RECONNECT_MAX_MS))
}

/// Sockets per second that a node with this limit accepts.
fn accepts(limit: u32) -> u32 {
    if limit == 0 { UNLIMITED_ACCEPT_PER_S } else { limit }
}

#[cfg(test)]
mod tests {
    use super::super::registry::Arrival;
    use super::*;
    use crate::membership::NodeInfo;
    use crate::message::{DeviceId, Millis};

    fn view(names: &[&str], epoch: u64, held: bool) -> View {
        let members = names
            .iter()
            .map(|name| Member {
                info: NodeInfo {
                    node: NodeId::parse(name).unwrap(),
                    weight: 1.0,
                    accept_per_s: 4000,
                    peer: "".into(),
                    push: true,
                    dispatch: false,
                    store: "".into(),
                },
                incarnation: 1,
                state: NodeState::Active,
            })
            .collect();
        View::new("g".into(), epoch, members, held)
    }

    fn handle(arrival: Arrival) -> Arc<SessionHandle> {
        // alice belongs to push-3 of five (the golden values of the ring).
        SessionHandle::new(UserId::parse("alice").unwrap(), DeviceId::default(), 0, arrival, Millis(0))
    }

    const FIVE: [&str; 5] = ["push-0", "push-1", "push-2", "push-3", "push-4"];

    fn judged(view: &View, own: &str, arrival: Arrival) -> &'static str {
        match verdict(view, &NodeId::parse(own).unwrap(), &handle(arrival)) {
            Verdict::Move(owner) => {
                assert_eq!(owner.info.node.as_str(), "push-3");
                "move"
            }
            Verdict::Wait => "wait",
            Verdict::Stay => "stay",
        }
    }

    #[test]
    fn a_session_is_moved_only_when_it_may_be() {
        let now = view(&FIVE, 8, false);
        let plain = Arrival::default();
        assert_eq!(judged(&now, "push-0", plain), "move");
        assert_eq!(judged(&now, "push-3", plain), "stay");
        assert_eq!(judged(&view(&FIVE, 8, true), "push-0", plain), "wait");
        assert_eq!(judged(&now, "push-0", Arrival { client_epoch: 9, ..plain }), "wait");
        assert_eq!(judged(&now, "push-0", Arrival { keep_at: Some(now.digest), ..plain }), "stay");
        assert_eq!(judged(&now, "push-0", Arrival { keep_at: Some(7), ..plain }), "move");
        assert_eq!(judged(&view(&[], 8, false), "push-0", plain), "stay");
    }

    #[test]
    fn the_pace_is_half_of_what_the_target_accepts_shared_by_those_who_send() {
        let now = view(&FIVE, 8, false);
        assert!((moves_per_s(&now, &now.members[0]) - 500.0).abs() < 1e-9);
        let two = view(&FIVE[..2], 8, false);
        assert!((moves_per_s(&two, &two.members[0]) - 2000.0).abs() < 1e-9);
    }
}
