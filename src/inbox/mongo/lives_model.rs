//! The rules of a log whose topic is removed and made anew, explored exhaustively on a model of one
//! topic with one user, who joins, perhaps with a crash and a repeat, and joins once more though it
//! is a member; two publishes under one id; and one device of the user, on a node that reads the
//! log for it by the list of its memberships, and that may lose the socket at any moment.
//!
//! No hint arrives: the node learns of all by looking. Each rule of [`Without`] that is taken out
//! is found to break a promise.

use crate::explorer::{Model, breaks_without, holds};

/// The rule that is taken out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Without {
    Nothing,
    /// No life is given twice.
    NewLife,
    /// The fence of an id has the life of the topic in it.
    FenceOfLife,
    /// A message of another life is shown to nobody.
    LifeOfMessages,
    /// A message of a later life is not passed over.
    StopAtLaterLife,
    /// A row of another life counts nowhere.
    LifeOfRows,
    /// The life is read again after the row was written.
    LifeReadAgain,
    /// The row is written before the number of changes of this user's memberships (`mv`) is raised.
    RowBeforeNumber,
    /// The number is raised also where the row was as asked already.
    RaiseOnRepeat,
    /// A row of this life is left as it is, with the position from which it counts.
    KeepRow,
    /// A list is read after the number under which it is kept.
    NumberBeforeList,
}

const RULES: [Without; 10] = [
    Without::NewLife,
    Without::FenceOfLife,
    Without::LifeOfMessages,
    Without::StopAtLaterLife,
    Without::LifeOfRows,
    Without::LifeReadAgain,
    Without::RowBeforeNumber,
    Without::RaiseOnRepeat,
    Without::KeepRow,
    Without::NumberBeforeList,
];

/// Numbers of the log are 1 to this.
const NUMBERS: usize = 2;
const PUBLISHES: usize = 2;

/// A membership: the life of the topic, 0 for none, and the position from which it counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
struct Row {
    life: u8,
    from: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
struct Store {
    /// 0: the name is free.
    life: u8,
    last: u8,
    /// The life in which each number was published; 0: it was not given yet.
    messages: [u8; NUMBERS],
    row: Row,
    /// How often the memberships of the user have changed.
    changes: u8,
}

impl Store {
    fn head(&self) -> u8 {
        self.messages.iter().filter(|life| **life != 0).count() as u8
    }
}

/// Where a join is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
enum Join {
    #[default]
    Idle,
    /// It has read the life and the head.
    Begun(Row),
    /// The first of its two writes is done; `changed`: the row was not as asked.
    Half { row: Row, changed: bool },
    /// Both are done.
    Written(Row),
}

/// Where a publish is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
enum Publish {
    #[default]
    Idle,
    /// It has read the life.
    HasLife(u8),
    Done,
}

/// What the node does for the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
enum Look {
    #[default]
    Idle,
    /// It has read the number of changes, and reads the list.
    HasNumber(u8),
    /// It has read the list before the number, against the rule.
    HasList(Row),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
struct State {
    store: Store,
    /// 0: there; 1: removed; 2: made anew.
    removals: u8,
    join: Join,
    /// The life in which a join was answered last; 0: none was.
    joined: u8,
    joins: u8,
    crashed: bool,
    publishes: [Publish; PUBLISHES],
    /// Whether the user must get what this publish stores, as far as answers tell.
    due_by: [bool; PUBLISHES],
    /// Numbers that the user must be shown.
    due: [bool; NUMBERS],
    look: Look,
    /// The list in use, and the number of changes under which it was read.
    list: Row,
    known_changes: u8,
    /// The life that the node reads, 0 for none, and how far the device was sent everything.
    reads: u8,
    sent: u8,
    /// The position of the device in the store. It has no life.
    cursor: u8,
    shown: [bool; NUMBERS],
    /// The socket was lost once.
    lost_socket: bool,
    broken: Option<&'static str>,
}

impl Model for State {
    type Rule = Without;
    const STATES_MAX: usize = 20_000_000;

    fn new() -> Self {
        Self { store: Store { life: 1, last: 1, ..Store::default() }, ..Self::default() }
    }

    fn broken(&self) -> Option<&'static str> {
        self.broken.or_else(|| {
            // All that the node can learn it has learned, and read.
            let knows = self.look == Look::Idle && self.known_changes == self.store.changes;
            let is_level = self.reads == 0 || self.reads == self.store.life && self.sent == self.store.head();
            let missing = (0..NUMBERS).any(|n| self.due[n] && !self.shown[n]);
            (knows && is_level && missing).then_some("a member was not shown a message")
        })
    }

    fn successors(&self, without: Without, next: &mut Vec<Self>) {
        self.join_steps(without, next);
        self.removal_steps(without, next);
        (0..PUBLISHES).for_each(|n| self.publish_steps(n, without, next));
        self.look_steps(without, next);
        self.read_steps(without, next);
    }
}

impl State {
    fn with(&self, change: impl FnOnce(&mut Self)) -> Self {
        let mut next = *self;
        change(&mut next);
        next
    }

    fn join_steps(&self, without: Without, next: &mut Vec<Self>) {
        let put = |s: &mut Self, row: Row| {
            let stands = s.store.row.life >= row.life;
            if !stands || s.store.row.life == row.life && without == Without::KeepRow {
                s.store.row = row;
            }
            !stands
        };
        let raise = |s: &mut Self, changed: bool| {
            if changed || without != Without::RaiseOnRepeat {
                s.store.changes += 1;
            }
        };
        match self.join {
            Join::Idle if self.store.life != 0 && self.joins < 3 => next.push(self.with(|s| {
                s.joins += 1;
                s.join = Join::Begun(Row { life: s.store.life, from: s.store.head() });
            })),
            Join::Begun(row) => next.push(self.with(|s| {
                let changed = if without == Without::RowBeforeNumber {
                    raise(s, true);
                    true
                } else {
                    put(s, row)
                };
                s.join = Join::Half { row, changed };
            })),
            Join::Half { row, changed } => {
                next.push(self.with(|s| {
                    if without == Without::RowBeforeNumber {
                        put(s, row);
                    } else {
                        raise(s, changed);
                    }
                    s.join = Join::Written(row);
                }));
                if !self.crashed {
                    next.push(self.with(|s| (s.join, s.crashed) = (Join::Idle, true)));
                }
            }
            // Only a join that finds the life unchanged is answered well.
            Join::Written(row) => next.push(self.with(|s| {
                s.join = Join::Idle;
                if without == Without::LifeReadAgain {
                    s.joined = s.store.life;
                } else if s.store.life == row.life {
                    s.joined = row.life;
                }
            })),
            Join::Idle => {}
        }
    }

    fn removal_steps(&self, without: Without, next: &mut Vec<Self>) {
        match self.removals {
            0 => next.push(self.with(|s| {
                s.store.life = 0;
                s.removals = 1;
                // A publish that crosses it may be shown or not.
                s.due_by = [false; PUBLISHES];
                s.due = [false; NUMBERS];
            })),
            1 => next.push(self.with(|s| {
                s.store.life = if without == Without::NewLife { s.store.last } else { s.store.last + 1 };
                s.store.last = s.store.life;
                s.removals = 2;
                s.joined = 0;
            })),
            _ => {}
        }
    }

    fn publish_steps(&self, n: usize, without: Without, next: &mut Vec<Self>) {
        match self.publishes[n] {
            Publish::Idle => next.push(self.with(|s| {
                let life = s.store.life;
                s.due_by[n] = life != 0 && s.joined == life;
                s.publishes[n] = if life == 0 { Publish::Done } else { Publish::HasLife(life) };
            })),
            Publish::HasLife(life) => next.push(self.with(|s| {
                s.publishes[n] = Publish::Done;
                let is_same = |of: &u8| *of == life || without == Without::FenceOfLife && *of != 0;
                // Both have the same id: the second is a repeat, if it finds the first.
                let number = match s.store.messages.iter().position(is_same) {
                    Some(first) if s.store.messages[first] != life => {
                        s.broken = Some("a message was taken for one of an earlier life");
                        return;
                    }
                    Some(first) => first,
                    None => s.store.head() as usize,
                };
                let stored = s.store.messages[number] == 0;
                s.store.messages[number] = life;
                s.due[number] |= stored && s.due_by[n] && s.store.life == life;
            })),
            Publish::Done => {}
        }
    }

    /// The node looks at the memberships of the user, and acts on what it finds.
    fn look_steps(&self, without: Without, next: &mut Vec<Self>) {
        match self.look {
            Look::Idle if self.known_changes != self.store.changes => next.push(self.with(|s| {
                s.look = if without == Without::NumberBeforeList {
                    Look::HasList(s.store.row)
                } else {
                    Look::HasNumber(s.store.changes)
                };
            })),
            Look::HasNumber(number) => next.push(self.with(|s| s.takes(s.store.row, number, without))),
            Look::HasList(list) => next.push(self.with(|s| s.takes(list, s.store.changes, without))),
            Look::Idle => {}
        }
        if !self.lost_socket {
            // The device comes back, from its position, and its list is read anew.
            next.push(self.with(|s| {
                s.lost_socket = true;
                (s.look, s.list, s.known_changes) = (Look::Idle, Row::default(), 0);
                (s.reads, s.sent) = (0, 0);
            }));
        }
    }

    fn takes(&mut self, list: Row, number: u8, without: Without) {
        (self.look, self.known_changes) = (Look::Idle, number);
        let counts = list.life != 0 && (list.life == self.store.life || without == Without::LifeOfRows);
        if !counts {
            (self.list, self.reads) = (list, 0);
        } else if self.list.life != list.life || self.list.from < list.from || self.reads == 0 {
            // It begins, or begins anew: at its position where it comes back, at what it was sent
            // in this life where it was here before, and never below where the membership does.
            let fresh = self.reads == 0 && self.list == Row::default();
            let before = match self.reads {
                0 if fresh => self.cursor,
                reads if reads == list.life => self.sent,
                _ => 0,
            };
            (self.list, self.sent) = (list, before.max(list.from));
            self.reads = if without == Without::LifeOfRows { self.store.life } else { list.life };
        }
    }

    /// The node reads the next message of the log for the device, or finds that its life is over.
    fn read_steps(&self, without: Without, next: &mut Vec<Self>) {
        if self.reads == 0 {
            return;
        }
        if self.store.life != self.reads {
            next.push(self.with(|s| s.reads = 0));
        }
        let number = usize::from(self.sent);
        let Some(life) = self.store.messages.get(number).copied().filter(|life| *life != 0) else { return };
        if life > self.reads && !matches!(without, Without::StopAtLaterLife | Without::LifeOfMessages) {
            return;
        }
        next.push(self.with(|s| {
            s.sent += 1;
            s.cursor = s.cursor.max(s.sent);
            if life == s.reads || without == Without::LifeOfMessages {
                s.shown[number] = true;
                if s.list.life != life {
                    s.broken = Some("a member was shown a message of another life");
                }
            }
        }));
    }
}

#[test]
fn the_rules_of_lives_hold_in_every_order_of_events() {
    holds::<State>(Without::Nothing, 10_000);
}

#[test]
fn every_rule_of_lives_that_is_taken_out_breaks_a_promise() {
    breaks_without::<State>(&RULES);
}
