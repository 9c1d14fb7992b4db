//! The token is renewed before it ends.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use ringpush_protocol::backoff::between;
use ringpush_protocol::frame::ClientFrame;
use ringpush_protocol::message::Millis;
use tokio::time::{Instant, sleep};

use super::{Actor, Ending, REFRESH_AT, RETRY_MAX};
use crate::items::Stopped;
use crate::tokens::TokenFault;

impl Actor {
    pub(super) fn refresh_before(&mut self, expires_at: Millis) {
        let Some((at, then)) = self.server_time else { return };
        let life = Duration::from_millis(expires_at.0.saturating_sub(then.0)).saturating_sub(at.elapsed());
        self.refresh_at = Some(Instant::now() + life.mul_f64(REFRESH_AT));
    }

    pub(super) fn renew(&mut self) -> ControlFlow<Ending> {
        if self.refresh_is_shown {
            return ControlFlow::Continue(());
        }
        let dialer = Arc::clone(&self.dialer);
        let rest = match self.refresh_failures {
            0 => Duration::ZERO,
            n => between(
                Duration::ZERO,
                Duration::from_millis(500 << n.min(10)).min(RETRY_MAX),
                &mut rand::rng(),
            ),
        };
        let future = async move {
            sleep(rest).await;
            dialer.tokens.renew().await;
            dialer.tokens.get().await
        };
        self.refreshing = Some(future.boxed());
        ControlFlow::Continue(())
    }

    pub(super) async fn renewed(&mut self, token: Result<String, TokenFault>) -> ControlFlow<Ending> {
        self.refreshing = None;
        match token {
            Ok(token) => {
                self.refresh_failures = 0;
                if let Some(line) = self.next.as_mut().or(self.line.as_mut()) {
                    line.say(ClientFrame::Refresh(token).encode()).await;
                    self.refresh_is_shown = true;
                }
            }
            Err(TokenFault::Refused(why)) => {
                return ControlFlow::Break(Ending::Stop(Stopped::new("refused", None, why)));
            }
            Err(TokenFault::Later(code, detail)) => {
                self.shared.tell(code, detail);
                self.refresh_failures += 1;
                return self.renew();
            }
        }
        ControlFlow::Continue(())
    }
}
