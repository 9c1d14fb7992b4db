//! Which numbers were received, handled and acked. Pure: no clock, no socket.

/// A socket of this client, by the order in which they were opened.
pub(crate) type LineId = u64;

/// What an item at the application stands for, once it is handled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mark {
    /// Everything up to this number is handled with it.
    pub(crate) seq: u64,
    /// Whether numbers begin anew after it: a gap with the reason `reset`.
    pub(crate) is_reset: bool,
    /// Whether it is a message: a reconnect starts after it while the application has it.
    pub(crate) is_message: bool,
    /// Resets before it. What was handed on before a reset is not acked in the numbers after it.
    resets: u64,
}

/// The positions of one device, in the numbers of its inbox. `None` is *not known yet*.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    received: Option<u64>,
    handled: Option<u64>,
    acked: Option<u64>,
    at_hand: Option<Mark>,
    resets: u64,
    /// A reset that is not handled yet: where its numbers begin.
    base: Option<u64>,
    /// The last reset, and the line that told it, while a second line may tell the same.
    last_reset: Option<(LineId, u64)>,
}

impl Ledger {
    /// The first line began after `since`; later ones change nothing.
    pub(crate) fn begin(&mut self, since: u64) {
        if self.received.is_none() {
            self.received = Some(since);
            self.handled = Some(since);
        }
    }

    /// Takes a message. Returns `None` for a repeat.
    pub(crate) fn take(&mut self, seq: u64) -> Option<Mark> {
        if self.received.is_some_and(|received| seq <= received) {
            return None;
        }
        self.received = Some(seq);
        Some(Mark { seq, is_reset: false, is_message: true, resets: self.resets })
    }

    /// Takes a gap of numbers below `before`. Returns `None` where that is known.
    pub(crate) fn take_gap(&mut self, before: u64) -> Option<Mark> {
        if self.received.is_some_and(|received| before <= received + 1) {
            return None;
        }
        let seq = before.saturating_sub(1);
        self.received = Some(seq);
        Some(Mark { seq, is_reset: false, is_message: false, resets: self.resets })
    }

    /// Takes a reset: numbers go on below `before`. During a move both lines may say it.
    pub(crate) fn take_reset(&mut self, line: LineId, before: u64) -> Option<Mark> {
        let told = self.last_reset.replace((line, before));
        if told.is_some_and(|(other, same)| other != line && same == before) {
            return None;
        }
        let seq = before.saturating_sub(1);
        self.received = Some(seq);
        self.base = Some(seq);
        self.acked = None;
        self.resets += 1;
        Some(Mark { seq, is_reset: true, is_message: false, resets: self.resets })
    }

    /// The application has this item now.
    pub(crate) fn hand(&mut self, mark: Mark) {
        self.at_hand = Some(mark);
    }

    /// The application gives back what it has.
    pub(crate) fn give_back(&mut self) -> Option<Mark> {
        self.at_hand.take()
    }

    /// The application has handled what it has. Returns the new handled number.
    pub(crate) fn handle(&mut self) -> Option<u64> {
        let mark = self.at_hand.take().filter(|mark| mark.resets == self.resets)?;
        let handled = match self.handled {
            Some(handled) if !mark.is_reset => handled.max(mark.seq),
            _ => mark.seq,
        };
        self.handled = Some(handled);
        if mark.is_reset {
            self.base = None;
        }
        Some(handled)
    }

    /// One line is left of two: what it tells from now on is new.
    pub(crate) fn end_of_move(&mut self) {
        self.last_reset = None;
    }

    /// Whether an item that waits is to be kept when all lines are gone: a reset, which is told
    /// once.
    pub(crate) fn outlives_lines(&self, mark: &Mark) -> bool {
        mark.is_reset && mark.resets == self.resets
    }

    /// Everything up to `seq` may be acked. Returns whether that is news.
    pub(crate) fn ack(&mut self, seq: u64) -> bool {
        let is_news = self.acked.is_none_or(|acked| seq > acked);
        if is_news {
            self.acked = Some(seq);
        }
        is_news
    }

    /// What may be acked.
    pub(crate) fn acked(&self) -> Option<u64> {
        self.acked
    }

    /// What was received: where the new line of a move starts.
    pub(crate) fn received(&self) -> Option<u64> {
        self.received
    }

    /// Where a reconnect starts: after what was handled, or is at hand. If a reset is not handled
    /// yet: where its numbers begin.
    pub(crate) fn position(&self) -> Option<u64> {
        match self.at_hand {
            _ if self.base.is_some() => self.base,
            Some(mark) if mark.is_message && mark.resets == self.resets => Some(mark.seq),
            _ => self.handled,
        }
    }

    /// All lines are gone: what was not handed on comes again.
    pub(crate) fn rewind(&mut self) {
        self.last_reset = None;
        if self.received.is_some() {
            self.received = self.position();
            // What was acked as received comes again, and is acked again: it has taken credit.
            self.acked = self.acked.min(self.received);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_at_hand_when_a_reset_comes_is_not_acked() {
        let mut ledger = Ledger::default();
        ledger.begin(0);
        let mark = ledger.take(990).unwrap();
        ledger.hand(mark);
        let reset = ledger.take_reset(1, 501).unwrap();
        assert_eq!(ledger.handle(), None);
        ledger.hand(reset);
        assert_eq!(ledger.handle(), Some(500));
        assert!(ledger.take(501).is_some());
    }

    #[test]
    fn both_lines_of_a_move_may_say_one_reset() {
        let mut ledger = Ledger::default();
        ledger.begin(900);
        assert!(ledger.take_reset(1, 11).is_some());
        assert!(ledger.take(11).is_some());
        assert_eq!(ledger.take_reset(2, 11), None);
        assert_eq!(ledger.received(), Some(11));
        ledger.end_of_move();
        assert!(ledger.take_reset(2, 11).is_some(), "the store was emptied again");
    }

    #[test]
    fn a_reset_that_is_not_handled_yet_outlives_its_line() {
        let mut ledger = Ledger::default();
        ledger.begin(900);
        let message = ledger.take(990).unwrap();
        ledger.hand(message);
        let reset = ledger.take_reset(1, 501).unwrap();
        let stale = ledger.take(501).unwrap();
        ledger.rewind();
        assert_eq!((ledger.position(), ledger.received()), (Some(500), Some(500)));
        assert!(ledger.outlives_lines(&reset) && !ledger.outlives_lines(&stale));
        assert!(ledger.take(501).is_some(), "it comes again");
        assert_eq!(ledger.handle(), None);
        ledger.hand(reset);
        assert_eq!(ledger.handle(), Some(500));
    }

    proptest! {
        /// A server that sends what comes after the position at which a line begins, lines that
        /// break and repeat, an application that takes its time: each number is handled once and
        /// in order.
        #[test]
        fn each_number_is_handled_once_and_in_order(steps in prop::collection::vec(0u8..4, 1..300)) {
            let mut ledger = Ledger::default();
            ledger.begin(0);
            let (mut queue, mut sent, mut handed) = (std::collections::VecDeque::new(), 0, Vec::new());
            for step in steps {
                match step {
                    0 => {
                        sent += 1;
                        queue.extend(ledger.take(sent));
                    }
                    1 if sent > 0 => prop_assert_eq!(ledger.take(sent), None),
                    2 => {
                        if let Some(handled) = ledger.handle() {
                            prop_assert_eq!(Some(&handled), handed.last());
                            prop_assert!(ledger.ack(handled));
                        }
                        if let Some(mark) = queue.pop_front() {
                            ledger.hand(mark);
                            handed.push(mark.seq);
                        }
                    }
                    _ => {
                        queue.clear();
                        ledger.rewind();
                        sent = ledger.position().unwrap();
                    }
                }
            }
            prop_assert_eq!(&handed, &(1..=handed.len() as u64).collect::<Vec<_>>());
            prop_assert!(ledger.acked().unwrap_or(0) <= handed.len() as u64);
        }
    }
}
