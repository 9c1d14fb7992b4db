//! How long messages, acks and moves of one session take, for the metrics.

use tokio::time::Instant;

use super::super::mailbox::InboxFrame;
use super::super::registry::SessionHandle;
use super::ServingContext;
use crate::message::{Millis, Seq};
use crate::session::{Input, Output};
use crate::telemetry::Path;

/// Counts a delivery that took this many ms.
fn observe(context: &ServingContext, path: Path, took: u64) {
    context.metrics.delivery.at(path as usize).observe_ms(took);
    if matches!(path, Path::Live | Path::Displaced) {
        context.metrics.recent.observe_ms(took);
    }
}

/// What one session measures. An idle one measures nothing.
#[derive(Default)]
pub(super) struct Clocks {
    /// On which way what is sent now has come; `None`: it waited for its user.
    path: Option<Path>,
    /// On which way the page comes that was asked for last.
    of_page: Option<Path>,
    running: Option<Box<Running>>,
}

/// What has begun and not ended.
#[derive(Default)]
struct Running {
    /// A message that was sent and not acked, and when it was sent; one at a time.
    sample: Option<(Seq, Instant)>,
    /// When the client was told to move.
    moved: Option<Instant>,
}

impl Clocks {
    /// The session is about to take this.
    pub(super) fn begin(
        &mut self,
        input: &Input<InboxFrame>,
        context: &ServingContext,
        handle: &SessionHandle,
    ) {
        self.path = match input {
            Input::Live(_) if context.displaced.contains(&handle.user) => Some(Path::Displaced),
            Input::Live(_) => Some(Path::Live),
            Input::Page(_) => self.of_page,
            Input::MoreAfter(_) | Input::Lost => Some(Path::Swept),
            Input::Writable | Input::Ack(_) | Input::Blocked => Some(Path::Behind),
            Input::Reset(..) => None,
        };
    }

    /// The session wants this done.
    pub(super) fn note(&mut self, output: &Output<InboxFrame>, now: Millis, context: &ServingContext) {
        match output {
            Output::Send(frame) => {
                if let Some(path) = self.path {
                    // Collect's clock and this one may differ.
                    let took = now.0.saturating_sub(frame.accepted_at.0);
                    observe(context, path, took);
                    self.sample(frame.seq);
                }
            }
            // A page that goes on with another one goes on for the same reason.
            Output::Read { .. } => self.of_page = self.path,
            _ => {}
        }
    }

    /// The session asks for what it had no credit for.
    pub(super) fn waited_for_credit(&mut self, outputs: &[Output<InboxFrame>]) {
        if outputs.iter().any(|output| matches!(output, Output::Read { .. })) {
            self.of_page = Some(Path::Behind);
        }
    }

    /// A message of a log was sent that was accepted at this time.
    pub(super) fn sent_of_log(&self, accepted_at: Millis, path: Path, now: Millis, context: &ServingContext) {
        observe(context, path, now.0.saturating_sub(accepted_at.0));
    }

    fn sample(&mut self, seq: Seq) {
        let running = self.running.get_or_insert_default();
        if running.sample.is_none() {
            running.sample = Some((seq, Instant::now()));
        }
    }

    /// The client has handled everything up to this number of its inbox.
    pub(super) fn acked(&mut self, seq: u64, context: &ServingContext) {
        let Some(running) = &mut self.running else { return };
        if let Some((_, sent)) = running.sample.take_if(|(sampled, _)| sampled.get() <= seq) {
            context.metrics.ack.observe(sent.elapsed());
        }
        if running.moved.is_none() {
            self.running = None;
        }
    }

    /// The client was told to move.
    pub(super) fn moved(&mut self) {
        self.running.get_or_insert_default().moved.get_or_insert_with(Instant::now);
    }

    /// The session is over.
    pub(super) fn end(self, context: &ServingContext) {
        if let Some(moved) = self.running.and_then(|running| running.moved) {
            context.metrics.move_away.observe(moved.elapsed());
        }
    }
}
