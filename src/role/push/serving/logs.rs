//! The part of the serving stage that concerns logs of topics.

use futures_util::FutureExt;

use super::watching::Watching;
use super::{Act, LogMail, LogReaders, LogStart, Logs, Next, OfLogs, Outgoing, Serving, Socket};
use crate::backoff::Backoff;
use crate::message::{LogId, Millis};
use crate::session::Input;
use crate::watching::WatchRights;
use crate::wire::frame::LogAcks;
use std::sync::Arc;
use std::time::Duration;

/// Delay between two tries to join what the store did not tell, at first and at most.
const RETRY_FIRST: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(5);

impl<S: Socket> Serving<S> {
    /// Begins to read logs, after `welcome`.
    pub(super) fn begin_logs(
        &mut self,
        mut readers: LogReaders,
        starts: Vec<LogStart>,
        rights: Option<Arc<WatchRights>>,
    ) {
        let mut acts = Vec::new();
        starts.into_iter().for_each(|start| readers.begin(start, &mut acts));
        let watching = Watching::of(rights);
        self.logs =
            OfLogs::Awake(Box::new(Logs { readers, inbox_was_level: false, joining: None, watching, acts }));
        self.of_logs(|_, _, _| ());
    }

    /// Wakes readers that are at rest.
    pub(super) fn wake_logs(&mut self) {
        let is_resting = matches!(self.logs, OfLogs::Resting(_));
        if is_resting && let OfLogs::Resting(resting) = std::mem::replace(&mut self.logs, OfLogs::Nothing) {
            let readers = resting.wake(&self.handle);
            let (watching, acts) = (Watching::of(None), Vec::new());
            self.logs = OfLogs::Awake(Box::new(Logs {
                readers,
                inbox_was_level: true,
                joining: None,
                watching,
                acts,
            }));
        }
    }

    /// Puts the readers to rest, if there is nothing else to remember of them. What is told to this
    /// socket from now on is news.
    pub(super) fn rest_of_logs(&mut self) {
        let Some(logs) = self.logs.awake() else { return };
        let is_idle = logs.inbox_was_level && logs.joining.is_none() && logs.watching.is_nothing();
        if is_idle
            && logs.readers.can_rest(&self.handle)
            && let OfLogs::Awake(logs) = std::mem::replace(&mut self.logs, OfLogs::Nothing)
        {
            self.logs = OfLogs::Resting(logs.readers.rest());
        }
    }

    /// Lets the readers do something, and does what they want.
    pub(super) fn of_logs(&mut self, act: impl FnOnce(&mut LogReaders, &mut Vec<Act>, Millis)) {
        let now = self.context.clock.now();
        self.wake_logs();
        let Some(logs) = self.logs.awake() else { return };
        act(&mut logs.readers, &mut logs.acts, now);
        for act in std::mem::take(&mut logs.acts) {
            let frame = match act {
                Act::Message(frame, way) => {
                    self.context.metrics.delivered.inc();
                    if let Some((accepted_at, path)) = way {
                        self.clocks.sent_of_log(accepted_at, path, now, &self.context);
                    }
                    frame
                }
                Act::Frame(frame) => frame.encode(),
                Act::Acked(log, seq) => {
                    self.context.log_positions.note(&self.handle, &log, seq);
                    continue;
                }
            };
            self.push(Outgoing::Text(frame));
        }
    }

    /// Tells the readers once that the inbox is level.
    pub(super) fn look_whether_level(&mut self) {
        if self.session.was_caught_up()
            && let Some(logs) = self.logs.awake()
            && !std::mem::replace(&mut logs.inbox_was_level, true)
        {
            self.of_logs(|readers, acts, _| readers.inbox_is_level(acts));
        }
    }

    /// The tails may have moved.
    pub(super) fn look_at_logs(&mut self) {
        if matches!(&self.logs, OfLogs::Resting(resting) if !resting.has_news()) {
            return;
        }
        self.of_logs(|readers, acts, now| readers.look(now, acts));
        // A log that was left, or reset, has given its credit back.
        self.count_unacked();
        self.take_of_logs();
    }

    /// Whether logs wait for the inbox: until it was level once, and, where the client limits what
    /// it is sent, whenever it is behind. It would else never have as much credit as it reads with.
    fn inbox_is_first(&self) -> bool {
        !self.session.was_caught_up() || (self.session.free().is_some() && !self.session.is_live())
    }

    /// Takes frames of logs, as long as nearly nothing is queued, the client has credit and the
    /// inbox does not come first. Returns how many steps were taken.
    pub(super) fn take_of_logs(&mut self) -> usize {
        // Who rests wants nothing.
        if self.logs.awake().is_none() {
            return 0;
        }
        let (mut taken, before, feed) = (0, self.queued_bytes, self.feed_bytes());
        while !self.told_full && self.queued_bytes < feed && !self.inbox_is_first() {
            if self.session.free() == Some(0) {
                break;
            }
            if !self.context.logs.tails.outbound.has_room() {
                break;
            }
            let mut next = None;
            self.of_logs(|readers, acts, now| next = readers.next(now, acts));
            match next {
                None => break,
                Some(Next::Read(wanted)) => self.context.logs.tails.request(&self.handle, wanted),
                Some(Next::Given) => {
                    taken += 1;
                    self.count_unacked();
                }
            }
        }
        self.context.logs.tails.given(self.queued_bytes - before);
        taken
    }

    /// Tells the session of the inbox what is unacked elsewhere: the window is of the socket.
    fn count_unacked(&mut self) {
        if self.session.free().is_none() {
            return;
        }
        let Some(logs) = self.logs.awake() else { return };
        let (unacked, mut outputs) = (logs.readers.unacked(), Vec::new());
        self.session.count_elsewhere(unacked, |output| outputs.push(output));
        self.clocks.waited_for_credit(&outputs);
        outputs.into_iter().for_each(|output| self.perform(output));
    }

    pub(super) fn handle_log_mail(&mut self, mail: LogMail) {
        if let Some((tail, block)) = mail.block {
            self.of_logs(|readers, _, _| readers.take_block(tail, block));
        }
        if let Some(memberships) = mail.memberships {
            let mut joined = Vec::new();
            let changes = memberships.version;
            let counted = (changes, mail.counted_anew);
            self.of_logs(|readers, acts, _| joined = readers.compare(counted, &memberships.logs, acts));
            if let Some(logs) = self.logs.awake().filter(|_| !joined.is_empty()) {
                let (attacher, handle) = (Arc::clone(&self.context.logs), Arc::clone(&self.handle));
                let joining = async move {
                    let mut backoff = Backoff::new(RETRY_FIRST, RETRY_MAX);
                    loop {
                        match attacher.join(&handle, joined.clone()).await {
                            Ok(starts) => return (changes, starts),
                            Err(error) => tracing::debug!(%error, "a session could not join a topic yet"),
                        }
                        let delay = backoff.next(&mut rand::rng());
                        tokio::time::sleep(delay).await;
                    }
                };
                logs.joining = Some(joining.boxed());
            }
        }
        self.look_at_logs();
    }

    /// The user has joined topics.
    pub(super) fn joined(&mut self, changes: u64, starts: Vec<LogStart>) {
        self.of_logs(|readers, acts, _| {
            starts.into_iter().for_each(|start| readers.joined(changes, start, acts));
        });
        self.look_at_logs();
    }

    /// The client has handled messages of logs, and perhaps of the inbox.
    pub(super) fn acked(&mut self, acks: LogAcks) {
        self.of_logs(|readers, acts, now| {
            for (topic, seq) in acks.topics {
                readers.ack(&LogId::Topic(topic), seq, now, acts);
            }
            if let Some(seq) = acks.everyone {
                readers.ack(&LogId::Everyone, seq, now, acts);
            }
        });
        self.count_unacked();
        if let Some(seq) = acks.seq {
            self.clocks.acked(seq, &self.context);
            self.step(Input::Ack(seq));
        }
        self.take_of_logs();
    }
}
