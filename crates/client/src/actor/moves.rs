//! Moves, and lines that do not answer: another line is opened first, and then takes over.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use rand::Rng;
use ringpush_protocol::frame::ClientFrame;
use tokio::time::{Instant, sleep};

use super::{Actor, Ending, MOVE_TRIES, Opening, Probe, WAKE};
use crate::dial::DialError;
use crate::line::{Heard, Line};

impl Actor {
    pub(super) fn open_moved(&mut self, after: Duration) {
        let Some(moving) = &mut self.moving else { return };
        moving.tries += 1;
        let (url, dialer, shared) = (moving.url.clone(), Arc::clone(&self.dialer), Arc::clone(&self.shared));
        let future = async move {
            sleep(after).await;
            // What comes until the new line begins is sent twice, and told apart by its number.
            let positions = shared.with(|books| books.received());
            dialer.open_moved(&url, positions).await
        };
        self.opening = Some(Opening { future: future.boxed(), replaces: false });
    }

    pub(super) fn move_again(&mut self) {
        let Some(moving) = &self.moving else { return };
        if moving.tries < MOVE_TRIES {
            let (min, max) = (self.hint.min_ms, self.hint.max_ms);
            let rest = if max <= min { min } else { rand::rng().random_range(min..=max) };
            return self.open_moved(Duration::from_millis(rest));
        }
        self.moving = None;
        self.set_served();
    }

    pub(super) async fn opened(&mut self, opened: Result<Line, DialError>) -> ControlFlow<Ending> {
        let replaces = self.opening.take().is_some_and(|opening| opening.replaces);
        match opened {
            Ok(line) => {
                self.next = Some(line);
                self.welcomed(true).await?;
                if replaces {
                    self.take_next();
                }
            }
            Err(_) if replaces => {
                return self.heard(false, Heard::Ended(crate::line::LOST, "silent".to_owned())).await;
            }
            Err(_) => self.move_again(),
        }
        ControlFlow::Continue(())
    }

    /// The application asks whether the line lives.
    pub(super) async fn look(&mut self) -> ControlFlow<Ending> {
        if self.next.is_none()
            && let Some(line) = &mut self.line
        {
            line.say(ClientFrame::Ping.encode()).await;
            self.probe = Some(Probe { line: line.id, heard: line.heard, until: Instant::now() + WAKE });
        }
        ControlFlow::Continue(())
    }

    pub(super) fn probed(&mut self) {
        let Some(probe) = self.probe.take() else { return };
        let is_silent =
            self.line.as_ref().is_some_and(|line| line.id == probe.line && line.heard == probe.heard);
        if !is_silent || self.next.is_some() {
            return;
        }
        if !self.shared.has_room() {
            // Nothing is read meanwhile: the line may have answered.
            self.probe = Some(Probe { until: Instant::now() + WAKE, ..probe });
            return;
        }
        self.moving = None;
        let (dialer, positions) = (Arc::clone(&self.dialer), self.shared.with(|books| books.received()));
        let future = async move { dialer.open(positions).await };
        self.opening = Some(Opening { future: future.boxed(), replaces: true });
    }
}
