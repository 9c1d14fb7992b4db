//! The sweep: asks periodically for every session whether its inbox has more. It finds what every
//! hint has missed, and so makes P4 true (docs/design.md, section 1).

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::PushMetrics;
use super::availability::Availability;
use super::log_attach::MembershipReads;
use super::registry::{Registry, SessionHandle};
use crate::backoff::around;
use crate::inbox::{Change, Inbox, InboxError, PositionQuery, StartAt};
use crate::message::Seq;
use crate::wire::close::CloseCode;

/// Sessions in one question (docs/design.md, section 5: 16 ms for 1000 on MongoDB).
const BATCH: usize = 1_000;
/// Every session is swept once in this time, ± [`SWEEP_JITTER`].
pub(super) const SWEEP_EVERY: Duration = Duration::from_secs(30);
/// The same on a node that was cut off.
pub(super) const SWEEP_EVERY_CUT_OFF: Duration = Duration::from_secs(3);
/// Part of the period by which a sweep may be early or late.
pub(super) const SWEEP_JITTER: f64 = 0.2;
/// Shortest time between two forced sweeps.
const FORCED_SWEEP_PAUSE: Duration = Duration::from_secs(10);

/// Sweeps the sessions of a node.
pub(super) struct Sweeper {
    inbox: Arc<dyn Inbox>,
    registry: Arc<Registry>,
    availability: Arc<Availability>,
    metrics: PushMetrics,
    every: Duration,
    memberships: Arc<MembershipReads>,
    forced: Notify,
}

impl Sweeper {
    /// Sweeps each session once per `every`.
    pub(super) fn new(
        inbox: Arc<dyn Inbox>,
        registry: Arc<Registry>,
        availability: Arc<Availability>,
        metrics: PushMetrics,
        every: Duration,
        memberships: Arc<MembershipReads>,
    ) -> Self {
        Self { inbox, registry, availability, metrics, every, memberships, forced: Notify::new() }
    }

    /// Sweeps all sessions soon, because hints were dropped.
    pub(super) fn force(&self) {
        self.forced.notify_one();
    }

    /// Sweeps one shard of the registry after the other, and all of them when forced, for ever.
    pub(super) async fn run(self: Arc<Self>) {
        let shards = self.registry.shard_count();
        let mut shard = 0;
        let mut last_forced: Option<Instant> = None;
        loop {
            let every = match self.availability.bar() {
                None => self.every,
                // Other nodes own these users now, and messages may pass this node by.
                Some(_) => SWEEP_EVERY_CUT_OFF.min(self.every),
            };
            let pause = around(every, SWEEP_JITTER, &mut rand::rng()) / shards as u32;
            let not_before = last_forced.map_or_else(Instant::now, |at| at + FORCED_SWEEP_PAUSE);
            tokio::select! {
                () = tokio::time::sleep(pause) => {
                    self.sweep(&self.registry.of_shard(shard)).await;
                    shard = (shard + 1) % shards;
                }
                () = self.forced_after(not_before) => {
                    last_forced = Some(Instant::now());
                    self.metrics.forced_sweeps.inc();
                    for n in 0..shards {
                        self.sweep(&self.registry.of_shard(n)).await;
                    }
                }
            }
        }
    }

    async fn forced_after(&self, not_before: Instant) {
        tokio::time::sleep_until(not_before).await;
        self.forced.notified().await;
    }

    /// Asks for each of these sessions whether there is more, in batches, and tells those for which
    /// there is.
    pub(super) async fn sweep(&self, handles: &[Arc<SessionHandle>]) {
        let begun: Vec<&Arc<SessionHandle>> = handles.iter().filter(|handle| handle.has_begun()).collect();
        for batch in begun.chunks(BATCH) {
            let tell = |handle: &SessionHandle, position| handle.mailbox.more_after(position);
            if let Err(error) = self.ask(batch, tell).await {
                tracing::debug!(%error, "the sweep could not ask; it will come round again");
            }
        }
    }

    /// Like [`Self::sweep`], for sessions that have surely missed something: if the inbox does not
    /// respond now, each reads as soon as it does.
    pub(super) async fn catch_up(&self, handles: &[Arc<SessionHandle>]) {
        let (begun, attaching): (Vec<&Arc<SessionHandle>>, Vec<_>) =
            handles.iter().partition(|handle| handle.has_begun());
        // The position of these is not known yet.
        attaching.iter().for_each(|handle| handle.mailbox.lost());
        for batch in begun.chunks(BATCH) {
            // Messages that passed by were stored before this query. A page in flight may show what
            // is there, and not them.
            if let Err(error) = self.ask(batch, |handle, _| handle.mailbox.lost()).await {
                tracing::debug!(%error, "what was missed could not be asked for in one batch");
                batch.iter().for_each(|handle| handle.mailbox.lost());
            }
        }
    }

    async fn ask(
        &self,
        batch: &[&Arc<SessionHandle>],
        tell_of_more: impl Fn(&SessionHandle, Seq),
    ) -> Result<(), InboxError> {
        let positions: Vec<Seq> = batch.iter().map(|handle| handle.position()).collect();
        let query = |(handle, position): (&&Arc<SessionHandle>, &Seq)| PositionQuery {
            user: handle.user.clone(),
            from: StartAt::After(*position),
        };
        let queries = batch.iter().zip(&positions).map(query).collect();
        let answers = self.inbox.positions(queries).await?;
        for ((handle, position), answer) in batch.iter().zip(positions).zip(answers) {
            self.metrics.swept.inc();
            if answer.more {
                tell_of_more(handle, position);
            } else if answer.head < position {
                self.reset(handle, position, answer.head).await?;
            }
            self.memberships.compare(handle, answer.memberships);
            close_if_revoked(handle, answer.not_before_s);
        }
        Ok(())
    }

    /// The store was restored to a state below what a session was sent. The session goes on from
    /// there; what is accepted from now on is above everything that was sent.
    async fn reset(&self, handle: &SessionHandle, position: Seq, head: Seq) -> Result<(), InboxError> {
        self.inbox.update(vec![Change::Shown { user: handle.user.clone(), upto: position }]).await?;
        tracing::warn!(user = %handle.user, %position, %head, "a client was sent more than the store has (a restore); it gets a gap");
        handle.mailbox.reset(position, head);
        Ok(())
    }
}

/// Ends a session whose token was issued before `not_before_s`.
pub(super) fn close_if_revoked(handle: &SessionHandle, not_before_s: u64) {
    if handle.token_iat_s() < not_before_s {
        handle.mailbox.close(CloseCode::Unauthorized, "the token was revoked");
    }
}
