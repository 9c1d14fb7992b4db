//! What a line brings: its beginning, its frames, its end.

use std::ops::ControlFlow;
use std::time::Duration;

use ringpush_protocol::frame::{GapReason, ReceivedFrame, ServerFrame, TopicState};
use ringpush_protocol::message::{LogId, Millis, TopicName};
use tokio::time::Instant;

use super::{Actor, Ending, Moving};
use crate::items::{Gap, Item, Message, State, Stopped, name_of};
use crate::line::Heard;

impl Actor {
    /// A line has begun: the current one, or the one that takes over.
    pub(super) async fn welcomed(&mut self, is_next: bool) -> ControlFlow<Ending> {
        let line = if is_next { &self.next } else { &self.line };
        let Some(welcome) = line.as_ref().map(|line| line.welcome.clone()) else {
            return ControlFlow::Continue(());
        };
        if let Some(meant) = self.dialer.user.as_ref().filter(|meant| **meant != welcome.user) {
            let detail = format!("the token is of {}, not of {meant}", welcome.user);
            // Nothing is said on it any more, an ack least of all.
            let line = if is_next { &mut self.next } else { &mut self.line };
            *line = None;
            return ControlFlow::Break(Ending::Stop(Stopped::new("wrong_user", None, detail)));
        }
        self.dialer.tokens.accepted().await;
        self.refresh_is_shown = false;
        self.failures = 0;
        self.hint = welcome.hint;
        self.shared.with(|books| {
            books.inbox.begin(welcome.since);
            books.begin_logs(welcome.logs.as_deref().unwrap_or_default());
        });
        self.ask_at = welcome.ask_every.map(|every| Instant::now() + every);
        if let Some((server_time, expires_at)) = welcome.times {
            self.server_time = Some((Instant::now(), server_time));
            self.refresh_before(expires_at);
        }
        if !is_next {
            self.shared.set(State::CatchingUp { node: welcome.node, since: welcome.since });
        }
        self.say_acks(true).await;
        // What was to be said is among what the new line is told. The old line of a move, which may
        // be needed still, has not heard it.
        let words = self.shared.take_words();
        if let Some(old) = self.line.as_mut().filter(|_| is_next) {
            words.into_iter().for_each(|frame| old.say_later(frame));
        }
        let watches = self.shared.with(|books| books.watches());
        let line = if is_next { &mut self.next } else { &mut self.line };
        if let Some(line) = line {
            watches.into_iter().for_each(|watch| line.say_later(watch));
        }
        ControlFlow::Continue(())
    }

    pub(super) async fn heard(&mut self, is_next: bool, heard: Heard) -> ControlFlow<Ending> {
        match heard {
            Heard::Frame(frame) => self.frame(is_next, *frame).await,
            Heard::Ended(..) if is_next => {
                self.next = None;
                self.move_again();
                ControlFlow::Continue(())
            }
            Heard::Ended(..) if self.next.is_some() => {
                self.take_next();
                ControlFlow::Continue(())
            }
            Heard::Ended(code, reason) => {
                (self.line, self.opening, self.moving, self.probe) = (None, None, None, None);
                (self.ack_at, self.ask_at, self.refresh_at, self.refreshing) = (None, None, None, None);
                self.is_caught_up = false;
                self.shared.rewind();
                ControlFlow::Break(self.ended(code, &reason, None).await)
            }
        }
    }

    pub(super) async fn frame(&mut self, is_next: bool, frame: ReceivedFrame) -> ControlFlow<Ending> {
        match frame {
            ReceivedFrame::Message(frame) => {
                let (seq, of) = (frame.seq, frame.of.log());
                let item = Item::Message(Message::new(frame, self.is_caught_up));
                if !self.shared.put(of, item, |ledger| ledger.take(seq)) {
                    // The ack of a repeat gives its credit back.
                    self.say_acks(true).await;
                }
                self.take_next_if_level();
            }
            ReceivedFrame::Other(ServerFrame::Gap { of, before, reason: GapReason::Excepted, .. }) => {
                // Nobody is told that there is something that is not for this user.
                self.shared.with(|books| books.of(&of.log()).and_then(|ledger| ledger.take_gap(before)));
            }
            ReceivedFrame::Other(ServerFrame::Gap { of, after, before, reason }) => {
                let line = if is_next { &self.next } else { &self.line };
                let id = line.as_ref().map_or(0, |line| line.id);
                let gap = Gap { topic: name_of(&of), after, before, reason };
                self.shared.put(of.log(), Item::Gap(gap), |ledger| match reason {
                    GapReason::Reset => ledger.take_reset(id, before),
                    _ => ledger.take_gap(before),
                });
                self.take_next_if_level();
            }
            ReceivedFrame::Other(ServerFrame::Topic { topic, state, after }) => {
                let line = if is_next { &mut self.next } else { &mut self.line };
                if let Ok(name) = TopicName::parse(&topic)
                    // What this side has ended itself may be watched anew meanwhile.
                    && !(state == TopicState::Left && line.as_mut().is_some_and(|line| line.was_due(&name)))
                {
                    let log = LogId::Topic(name);
                    self.shared.with(|books| match state {
                        TopicState::Left => books.end_log(&log),
                        TopicState::Joined => books.begin_joined(&log, after.unwrap_or(0)),
                        TopicState::Watching => books.begin_watched(log, after.unwrap_or(0)),
                    });
                }
            }
            ReceivedFrame::Other(ServerFrame::CaughtUp { of, all, .. })
                if all || of.is_inbox() && !self.reads_logs(is_next) =>
            {
                self.caught_up(is_next);
            }
            ReceivedFrame::Other(ServerFrame::Move { url, node, after_ms, reason, .. }) if !is_next => {
                self.next = None;
                self.shared.set(State::Moving { node, reason });
                self.moving = Some(Moving { url, tries: 0 });
                self.open_moved(Duration::from_millis(after_ms));
            }
            ReceivedFrame::Other(ServerFrame::Refreshed { expires_at }) => {
                self.refresh_is_shown = false;
                self.dialer.tokens.accepted().await;
                if let Some(expires_at) = Millis::parse_rfc3339(&expires_at) {
                    self.refresh_before(expires_at);
                }
            }
            ReceivedFrame::Other(ServerFrame::Error { topic: Some(topic), code, message, .. }) => {
                if let Ok(topic) = TopicName::parse(&topic) {
                    let code = if code == "unknown_topic" { "unknown_topic" } else { "forbidden_topic" };
                    self.shared.with(|books| books.unwatch(topic.clone()));
                    self.shared.tell(code, format!("{topic}: {message}"));
                }
            }
            ReceivedFrame::Other(ServerFrame::Error { reconnect: Some(hint), .. }) => self.hint = hint,
            ReceivedFrame::Other(_) | ReceivedFrame::Unknown => {}
        }
        ControlFlow::Continue(())
    }

    /// Whether a line reads logs: then it is level when all of them are.
    fn reads_logs(&self, is_next: bool) -> bool {
        let line = if is_next { &self.next } else { &self.line };
        line.as_ref().is_some_and(|line| line.welcome.logs.is_some())
    }

    pub(super) fn caught_up(&mut self, is_next: bool) {
        let line = if is_next { &mut self.next } else { &mut self.line };
        if let Some(line) = line {
            line.is_caught_up = true;
        }
        if is_next {
            self.take_next();
        } else {
            self.is_caught_up = true;
            self.set_served();
        }
    }

    /// The state while a line is served and no move is under way.
    pub(super) fn set_served(&self) {
        let Some(line) = &self.line else { return };
        let node = line.welcome.node.clone();
        self.shared.set(match self.is_caught_up {
            true => State::Live { node },
            false => State::CatchingUp { node, since: line.welcome.since },
        });
    }

    /// A move also ends when the new line has brought all that the old one had. Where logs are read
    /// the server says when that is.
    pub(super) fn take_next_if_level(&mut self) {
        if self.reads_logs(true) {
            return;
        }
        let old = self.line.as_ref().map_or(0, |line| line.seq);
        if self.next.as_ref().is_some_and(|next| next.seq > 0 && next.seq >= old) {
            self.take_next();
        }
    }

    pub(super) fn take_next(&mut self) {
        let Some(next) = self.next.take() else { return };
        self.is_caught_up |= next.is_caught_up;
        let old = self.line.replace(next);
        self.shared.with(|books| books.end_of_move());
        (self.moving, self.probe) = (None, None);
        self.set_served();
        if let Some(mut old) = old {
            let acks = self.shared.with(|books| books.acks(&mut old.said, true));
            tokio::spawn(async move {
                old.say_acks(acks).await;
                old.close().await;
            });
        }
    }
}
