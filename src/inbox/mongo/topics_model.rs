//! The rules of joining, leaving, removing and reading a topic, explored exhaustively on a model of
//! one topic with two users: one who joins, with a crash and a repeat; one who leaves; a topic that
//! is removed and made anew; a publisher that keeps the list it has read, and publishes twice; and
//! one change of the primary.
//!
//! After the change, the publisher may go on to ask the primary of before, which shows what was
//! then, until it learns of the new one; it never goes back. The new one may show for a while what
//! was before the last write. A message is stored by the new one alone. Each rule of [`Without`]
//! that is taken out is found to break a promise.

use crate::explorer::{Model, breaks_without, holds};

/// The rule that is taken out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Without {
    Nothing,
    /// The version is raised after the rows have changed.
    RowsFirst,
    /// It is raised also where the row was as asked already.
    RaiseOnRepeat,
    /// It is raised only in the life in which the row was written, or the caller is told.
    ConditionalRaise,
    /// A reader reads the version first and then the rows.
    VersionFirst,
    /// A row of another life counts nowhere.
    LifeOfRows,
    /// No life is given twice.
    NewLife,
    /// After a change of the primary the version is confirmed by the whole replica set.
    Confirm,
    /// Where the primary has changed since the list was read, the members are read again.
    ReadAgain,
}

const RULES: [Without; 8] = [
    Without::RowsFirst,
    Without::RaiseOnRepeat,
    Without::ConditionalRaise,
    Without::VersionFirst,
    Without::LifeOfRows,
    Without::NewLife,
    Without::Confirm,
    Without::ReadAgain,
];

/// The user who joins, and the one who leaves.
const JOINER: usize = 0;
const LEAVER: usize = 1;
const USERS: usize = 2;
const PUBLISHES: u8 = 2;

/// The topic and its rows. A life of 0 is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
struct Store {
    life: u8,
    last: u8,
    version: u8,
    rows: [u8; USERS],
}

impl Store {
    fn members(&self, life: u8, without: Without) -> [bool; USERS] {
        let counts = |row: u8| row != 0 && (row == life || without == Without::LifeOfRows);
        self.rows.map(counts)
    }
}

/// Whether a publish must reach a user.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
enum Expected {
    Yes,
    No,
    #[default]
    Either,
}

/// Where a change is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
enum Change {
    /// Not begun.
    #[default]
    Idle,
    /// It has read this life.
    HasLife(u8),
    /// The first of its two writes is done; `changed`: the row was not as asked.
    Half {
        life: u8,
        changed: bool,
    },
    Done,
}

/// Where a publish is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
enum Publish {
    #[default]
    Idle,
    /// It has read life and version. `since`: how many primaries it had known then.
    HasVersion { life: u8, version: u8, since: bool },
    /// It has read rows before the version, against the rule.
    HasRows { list: [bool; USERS], since: bool },
    /// It knows whom to reach.
    HasList { list: [bool; USERS], since: bool },
    /// It has stored the message for those it knew.
    Stored { since: bool },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
struct State {
    store: Store,
    /// What the primary of before shows, once it was replaced.
    old: Option<Store>,
    /// What the new primary shows until it knows better.
    lagging: Option<Store>,
    before_last_write: Store,
    /// The publisher has learned of the new primary.
    knows_new: bool,
    join: Change,
    /// The life that the topic had when the join was answered.
    joined: u8,
    /// The join may crash once between its writes, and is repeated.
    crashes: u8,
    leave: Change,
    /// 0: there; 1: removed; 2: made anew.
    removals: u8,
    publish: Publish,
    publishes: u8,
    /// The list that the publisher keeps, and its life and version.
    kept: Option<(u8, u8, [bool; USERS])>,
    reached: [bool; USERS],
    expected: [Expected; USERS],
    /// A promise that was broken.
    broken: Option<&'static str>,
}

impl Model for State {
    type Rule = Without;
    const STATES_MAX: usize = 20_000_000;

    fn new() -> Self {
        let store = Store { life: 1, last: 1, version: 0, rows: [0, 1] };
        Self { store, before_last_write: store, ..Self::default() }
    }

    fn broken(&self) -> Option<&'static str> {
        self.broken
    }

    fn successors(&self, without: Without, next: &mut Vec<Self>) {
        self.join_steps(without, next);
        self.leave_steps(next);
        self.removal_steps(without, next);
        self.primary_steps(next);
        self.publish_steps(without, next);
    }
}

impl State {
    fn with(&self, change: impl FnOnce(&mut Self)) -> Self {
        let mut next = *self;
        change(&mut next);
        next
    }

    fn write(&mut self, change: impl FnOnce(&mut Store)) {
        self.before_last_write = self.store;
        change(&mut self.store);
    }

    /// What the publisher's primary shows.
    fn shown(&self) -> Store {
        match (self.old, self.knows_new) {
            (Some(old), false) => old,
            _ => self.lagging.unwrap_or(self.store),
        }
    }

    /// Whether a user must get a message that is published now, as far as the answers tell.
    fn expects(&self, user: usize) -> Expected {
        if self.removals == 1 {
            return Expected::No;
        }
        let begun = |change: Change| !matches!(change, Change::Idle | Change::Done);
        match user {
            JOINER if begun(self.join) || self.crashes == 1 && self.join == Change::Idle => Expected::Either,
            LEAVER if begun(self.leave) => Expected::Either,
            // Who joined or left in an earlier life is no member of this one.
            JOINER if self.join == Change::Done && self.joined == self.store.life => Expected::Yes,
            LEAVER if self.leave == Change::Idle && self.removals == 0 => Expected::Yes,
            _ => Expected::No,
        }
    }

    /// A change of this user's membership begins: a publish that is under way may miss it or not.
    fn unsettle(&mut self, users: &[usize]) {
        users.iter().for_each(|user| self.expected[*user] = Expected::Either);
    }

    fn join_steps(&self, without: Without, next: &mut Vec<Self>) {
        let raise = |s: &mut Self, life: u8, changed: bool| {
            let is_same = s.store.life == life || without == Without::ConditionalRaise && s.store.life != 0;
            if is_same && (changed || without != Without::RaiseOnRepeat) {
                s.write(|store| store.version += 1);
            }
            is_same
        };
        let put = |s: &mut Self, life: u8| {
            let changed = s.store.rows[JOINER] < life;
            if changed {
                s.write(|store| store.rows[JOINER] = life);
            }
            changed
        };
        match self.join {
            Change::Idle if self.store.life != 0 => next.push(self.with(|s| {
                s.unsettle(&[JOINER]);
                s.join = Change::HasLife(s.store.life);
            })),
            Change::HasLife(life) => next.push(self.with(|s| {
                let changed = if without == Without::RowsFirst { raise(s, life, true) } else { put(s, life) };
                s.join = Change::Half { life, changed };
            })),
            Change::Half { life, changed } => {
                next.push(self.with(|s| {
                    let done = if without == Without::RowsFirst {
                        put(s, life);
                        s.store.life == life
                    } else {
                        raise(s, life, changed)
                    };
                    // One that is told that the topic has ended begins anew, as another join.
                    s.join = if done { Change::Done } else { Change::Idle };
                    s.crashes = if done { s.crashes } else { 1 };
                    s.joined = s.store.life;
                }));
                if self.crashes == 0 {
                    next.push(self.with(|s| (s.join, s.crashes) = (Change::Idle, 1)));
                }
            }
            _ => {}
        }
    }

    fn leave_steps(&self, next: &mut Vec<Self>) {
        match self.leave {
            Change::Idle if self.store.life != 0 => next.push(self.with(|s| {
                s.unsettle(&[LEAVER]);
                s.leave = Change::HasLife(s.store.life);
            })),
            Change::HasLife(life) => next.push(self.with(|s| {
                if s.store.rows[LEAVER] == life {
                    s.write(|store| store.rows[LEAVER] = 0);
                }
                s.leave = Change::Half { life, changed: true };
            })),
            Change::Half { life, .. } => next.push(self.with(|s| {
                if s.store.life == life {
                    s.write(|store| store.version += 1);
                }
                s.leave = Change::Done;
            })),
            _ => {}
        }
    }

    fn removal_steps(&self, without: Without, next: &mut Vec<Self>) {
        match self.removals {
            0 => next.push(self.with(|s| {
                s.unsettle(&[JOINER, LEAVER]);
                s.write(|store| store.life = 0);
                s.removals = 1;
            })),
            1 => next.push(self.with(|s| {
                s.unsettle(&[JOINER, LEAVER]);
                s.write(|store| {
                    store.life = if without == Without::NewLife { store.last } else { store.last + 1 };
                    store.last = store.life;
                });
                s.removals = 2;
            })),
            _ => {}
        }
    }

    fn primary_steps(&self, next: &mut Vec<Self>) {
        if self.old.is_none() {
            next.push(self.with(|s| {
                s.old = Some(s.store);
                s.lagging = Some(s.before_last_write);
            }));
        } else if !self.knows_new {
            next.push(self.with(|s| s.knows_new = true));
        }
        if self.lagging.is_some() {
            next.push(self.with(|s| s.lagging = None));
        }
    }

    fn publish_steps(&self, without: Without, next: &mut Vec<Self>) {
        match self.publish {
            Publish::Idle if self.publishes < PUBLISHES => {
                let mut begun = self.with(|s| {
                    s.publishes += 1;
                    s.reached = [false; USERS];
                    s.expected = [s.expects(JOINER), s.expects(LEAVER)];
                });
                begun.read(without);
                next.push(begun);
            }
            Publish::HasRows { list, since } => next.push(self.with(|s| {
                let shown = s.shown();
                s.kept = (shown.life != 0).then_some((shown.life, shown.version, list));
                s.publish = Publish::HasList { list, since };
            })),
            Publish::HasVersion { life, version, since } => next.push(self.with(|s| {
                let list = s.shown().members(life, without);
                s.kept = Some((life, version, list));
                s.publish = Publish::HasList { list, since };
            })),
            // The primary of before takes no writes.
            Publish::HasList { list, since } if self.old.is_none() || self.knows_new => {
                next.push(self.with(|s| {
                    for (reached, is_member) in s.reached.iter_mut().zip(list) {
                        *reached |= is_member;
                    }
                    s.publish = Publish::Stored { since };
                }));
            }
            Publish::Stored { since } => next.push(self.with(|s| {
                if since != s.knows_new && without != Without::ReadAgain {
                    // Who had left meanwhile may have it by the list of before. Nobody who is a
                    // member is left out.
                    for expected in &mut s.expected {
                        *expected = if *expected == Expected::No { Expected::Either } else { *expected };
                    }
                    s.read(without);
                    return;
                }
                s.publish = Publish::Idle;
                for user in 0..USERS {
                    s.broken = match (s.expected[user], s.reached[user]) {
                        (Expected::Yes, false) => Some("a member was not reached"),
                        (Expected::No, true) => Some("somebody who is no member was reached"),
                        _ => s.broken,
                    };
                }
            })),
            _ => {}
        }
    }

    /// The publisher begins to read the members.
    fn read(&mut self, without: Without) {
        let since = self.knows_new;
        if self.knows_new && without != Without::Confirm {
            // The version is confirmed, and with it the new primary knows what there is.
            self.lagging = None;
        }
        let shown = self.shown();
        self.publish = if without == Without::VersionFirst {
            let known = self.kept.filter(|kept| (kept.0, kept.1) == (shown.life, shown.version));
            let list = known.map_or(shown.members(shown.life, without), |kept| kept.2);
            if known.is_some() { Publish::HasList { list, since } } else { Publish::HasRows { list, since } }
        } else if shown.life == 0 {
            Publish::HasList { list: [false; USERS], since }
        } else {
            match self.kept {
                Some((life, version, list)) if (life, version) == (shown.life, shown.version) => {
                    Publish::HasList { list, since }
                }
                _ => Publish::HasVersion { life: shown.life, version: shown.version, since },
            }
        };
    }
}

#[test]
fn the_rules_of_membership_hold_in_every_order_of_events() {
    holds::<State>(Without::Nothing, 100_000);
}

#[test]
fn every_rule_of_membership_that_is_taken_out_breaks_a_promise() {
    breaks_without::<State>(&RULES);
}
