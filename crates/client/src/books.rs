//! The ledgers of one client: that of the inbox, and one for each log of a topic. Pure, as they
//! are.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use ringpush_protocol::frame::{ClientFrame, LogAcks, LogOptions, TOPICS_IN_AUTH, WatchSince};
use ringpush_protocol::message::{LogId, Seq, TopicName};

use crate::ledger::{Ledger, Mark};

/// Which numbers: those of a log, or of the inbox.
pub(crate) type Of = Option<LogId>;

/// Where the next line starts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Positions {
    /// In the inbox; `None` is *not known yet*.
    pub(crate) inbox: Option<u64>,
    /// In logs.
    pub(crate) logs: LogOptions,
}

/// What was said on a line of what may be acked.
#[derive(Debug, Default)]
pub(crate) struct Said {
    pub(crate) inbox: Option<u64>,
    logs: HashMap<LogId, u64>,
}

/// The positions of one device.
#[derive(Debug, Default)]
pub(crate) struct Books {
    pub(crate) inbox: Ledger,
    logs: BTreeMap<LogId, Ledger>,
    /// Topics that the application watches without being a member, and where it wants to begin.
    watches: BTreeMap<TopicName, WatchSince>,
    /// Those of them whose log is read for that reason alone.
    watched: BTreeSet<LogId>,
    /// Whose item the application has.
    at_hand: Option<Of>,
}

impl Books {
    /// The ledger of a log, or of the inbox. `None`: the log is not read.
    pub(crate) fn of(&mut self, of: &Of) -> Option<&mut Ledger> {
        match of {
            None => Some(&mut self.inbox),
            Some(log) => self.logs.get_mut(log),
        }
    }

    /// A line has begun that reads these logs, each after a position. What is not among them is
    /// read no more.
    pub(crate) fn begin_logs(&mut self, after: &[(LogId, u64)]) {
        let Self { logs, watched, .. } = self;
        // What is watched is asked for once the line has begun.
        logs.retain(|log, _| watched.contains(log) || after.iter().any(|(known, _)| known == log));
        watched.retain(|log| after.iter().all(|(known, _)| known != log));
        for (log, after) in after {
            self.begin_log(log, *after);
        }
    }

    /// A log is read after a position.
    pub(crate) fn begin_log(&mut self, log: &LogId, after: u64) {
        self.logs.entry(log.clone()).or_default().begin(after);
    }

    /// The user has joined a topic, which is read after a position.
    pub(crate) fn begin_joined(&mut self, log: &LogId, after: u64) {
        self.begin_log(log, after);
        self.watched.remove(log);
    }

    /// A log is read no more.
    pub(crate) fn end_log(&mut self, log: &LogId) {
        self.logs.remove(log);
        self.watched.remove(log);
        if let LogId::Topic(name) = log {
            self.watches.remove(name);
        }
    }

    /// The application wants to watch a topic. Returns what is to be said to the server: nothing if
    /// it is watched already.
    pub(crate) fn watch(&mut self, topic: TopicName, since: WatchSince) -> Option<ClientFrame> {
        if self.watches.contains_key(&topic) {
            return None;
        }
        self.watches.insert(topic.clone(), since);
        Some(ClientFrame::Watch(topic, since))
    }

    /// The application watches a topic no more. Returns what is to be said to the server: nothing
    /// if it is not watched, or a membership.
    pub(crate) fn unwatch(&mut self, topic: TopicName) -> Option<ClientFrame> {
        self.watches.remove(&topic)?;
        let log = LogId::Topic(topic.clone());
        if self.watched.remove(&log) {
            self.logs.remove(&log);
        } else if self.logs.contains_key(&log) {
            return None;
        }
        Some(ClientFrame::Unwatch(topic))
    }

    /// The server says that a topic is watched, from a position on.
    pub(crate) fn begin_watched(&mut self, log: LogId, after: u64) {
        let is_new = !self.logs.contains_key(&log);
        self.begin_log(&log, after);
        if is_new {
            self.watched.insert(log);
        }
    }

    /// What is to be said on a new line of what is watched: each goes on where it was.
    pub(crate) fn watches(&self) -> Vec<ClientFrame> {
        let frame = |(topic, since): (&TopicName, &WatchSince)| {
            let ledger = self.logs.get(&LogId::Topic(topic.clone()));
            let position = ledger.and_then(Ledger::position).map(|seq| WatchSince::After(Seq::at(seq)));
            ClientFrame::Watch(topic.clone(), position.unwrap_or(*since))
        };
        self.watches.iter().map(frame).collect()
    }

    /// The application has this item now.
    pub(crate) fn hand(&mut self, of: Of, mark: Mark) {
        if let Some(ledger) = self.of(&of) {
            ledger.hand(mark);
            self.at_hand = Some(of);
        }
    }

    /// The application gives back what it has.
    pub(crate) fn give_back(&mut self) -> Option<(Of, Mark)> {
        let of = self.at_hand.take()?;
        let mark = self.of(&of)?.give_back()?;
        Some((of, mark))
    }

    /// The application has handled what it has. Returns whose it was, and the new handled number.
    pub(crate) fn handle(&mut self) -> Option<(Of, u64)> {
        let of = self.at_hand.take()?;
        let handled = self.of(&of)?.handle()?;
        Some((of, handled))
    }

    /// One line is left of two.
    pub(crate) fn end_of_move(&mut self) {
        self.all().for_each(Ledger::end_of_move);
    }

    /// All lines are gone: what was not handed on comes again.
    pub(crate) fn rewind(&mut self) {
        self.all().for_each(Ledger::rewind);
    }

    fn all(&mut self) -> impl Iterator<Item = &mut Ledger> {
        std::iter::once(&mut self.inbox).chain(self.logs.values_mut())
    }

    fn positions(&self, of: impl Fn(&Ledger) -> Option<u64>) -> Positions {
        let (mut topics, mut everyone) = (Vec::new(), None);
        for (log, ledger) in self.logs.iter().filter(|(log, _)| !self.watched.contains(log)) {
            match (log, of(ledger).map(Seq::at)) {
                (LogId::Topic(name), Some(seq)) if topics.len() < TOPICS_IN_AUTH => {
                    topics.push((name.clone(), seq));
                }
                (LogId::Everyone, seq) => everyone = seq,
                _ => {}
            }
        }
        Positions { inbox: of(&self.inbox), logs: LogOptions { topics, everyone } }
    }

    /// Where a reconnect starts: after what was handled, or is at hand.
    pub(crate) fn standing(&self) -> Positions {
        self.positions(Ledger::position)
    }

    /// What was received: where the new line of a move starts.
    pub(crate) fn received(&self) -> Positions {
        self.positions(Ledger::received)
    }

    /// Messages that may be acked and were not said on this line.
    pub(crate) fn due(&self, said: &Said) -> u64 {
        let of = |acked: Option<u64>, said: Option<&u64>| match said {
            Some(said) if *said > 0 => acked.unwrap_or(0).saturating_sub(*said),
            _ => 0,
        };
        let logs = self.logs.iter().map(|(log, ledger)| of(ledger.acked(), said.logs.get(log)));
        of(self.inbox.acked(), said.inbox.as_ref()) + logs.sum::<u64>()
    }

    /// What is to be said on a line of what may be acked; all of it if `again`. The newest ack of a
    /// log says it all.
    pub(crate) fn acks(&self, said: &mut Said, again: bool) -> LogAcks {
        let mut acks = LogAcks::default();
        let seq = self.inbox.acked().filter(|seq| again || said.inbox != Some(*seq));
        if let Some(seq) = seq {
            (said.inbox, acks.seq) = (Some(seq), Some(seq));
        }
        for (log, ledger) in &self.logs {
            let Some(seq) = ledger.acked() else { continue };
            if said.logs.insert(log.clone(), seq) == Some(seq) && !again {
                continue;
            }
            match log {
                LogId::Topic(name) => acks.topics.push((name.clone(), seq)),
                LogId::Everyone => acks.everyone = Some(seq),
            }
        }
        said.logs.retain(|log, _| self.logs.contains_key(log));
        acks
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringpush_protocol::message::TopicName;

    fn topic(name: &str) -> LogId {
        LogId::Topic(TopicName::parse(name).unwrap())
    }

    #[test]
    fn each_log_has_numbers_of_its_own_and_acks_say_what_is_new() {
        let (mut books, mut said) = (Books::default(), Said::default());
        books.inbox.begin(0);
        books.begin_logs(&[(topic("a"), 900), (LogId::Everyone, 5)]);
        let a = Some(topic("a"));
        let mark = books.of(&a).unwrap().take(901).unwrap();
        assert_eq!(books.inbox.take(901).map(|mark| mark.seq), Some(901), "the inbox has the same number");
        books.hand(a.clone(), mark);
        assert_eq!(books.standing().logs.topics, [(TopicName::parse("a").unwrap(), Seq::at(901))]);
        assert_eq!(books.handle(), Some((a.clone(), 901)));
        assert_eq!(books.handle(), None);
        books.of(&a).unwrap().ack(901);
        let acks = books.acks(&mut said, false);
        assert_eq!((acks.seq, acks.topics.len(), acks.everyone), (None, 1, None));
        assert_eq!(books.acks(&mut said, false), LogAcks::default(), "said once");
        assert_eq!(books.acks(&mut said, true).topics.len(), 1, "and again where it is asked for");
        books.end_log(&topic("a"));
        assert!(books.of(&a).is_none());
        books.begin_logs(&[(topic("b"), 1)]);
        assert_eq!(books.received().logs.everyone, None, "what a line does not read is read no more");
    }

    #[test]
    fn what_is_watched_goes_on_where_it_was_and_is_no_position_of_the_device() {
        let name = TopicName::parse("match-7").unwrap();
        let mut books = Books::default();
        books.watch(name.clone(), WatchSince::Last);
        let again = |since| vec![ClientFrame::Watch(name.clone(), since)];
        assert_eq!(books.watches(), again(WatchSince::Last));
        books.begin_watched(topic("match-7"), 40);
        let of = Some(topic("match-7"));
        let mark = books.of(&of).unwrap().take(41).unwrap();
        books.hand(of.clone(), mark);
        books.handle();
        assert_eq!(books.standing(), Positions::default());
        books.begin_logs(&[]);
        assert_eq!(books.watches(), again(WatchSince::After(Seq::at(41))));
        // The user has joined it.
        books.begin_logs(&[(topic("match-7"), 41)]);
        assert_eq!(books.standing().logs.topics.len(), 1);
        books.unwatch(name);
        assert!(books.of(&of).is_some() && books.watches().is_empty(), "a membership stays");
    }

    #[test]
    fn an_item_of_a_log_that_is_left_is_not_acked() {
        let mut books = Books::default();
        books.begin_logs(&[(topic("a"), 900)]);
        let a = Some(topic("a"));
        let mark = books.of(&a).unwrap().take(901).unwrap();
        books.hand(a, mark);
        books.end_log(&topic("a"));
        assert_eq!(books.handle(), None);
        assert_eq!(books.give_back(), None);
    }
}
