//! Looking up one position at a time, for sessions that attach.
//!
//! An adapter whose look-ups are cheap is asked directly. For the others, questions wait in a
//! queue: the next batch forms while the last one is in flight.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::{Inbox, InboxError, PositionQuery, UserPosition};

/// Positions in one batch (docs/design.md, section 5: 16 ms for 1000 on MongoDB).
const BATCH: usize = 1_000;
/// Batches in flight at the same time. One that takes long, as when a position must be confirmed by
/// the whole replica set, does not delay the others.
const BATCHES_IN_FLIGHT: usize = 4;
/// How long a batch may take before the next one begins beside it.
const BATCH_PATIENCE: Duration = Duration::from_millis(50);
/// Shortest time between the beginnings of two batches. A batch costs a command or a sync, for one
/// position as for many.
const BATCH_EVERY: Duration = Duration::from_millis(2);
/// Attaching sessions that wait for their batch: two seconds of the default accept rate. Further
/// sessions are refused.
const WAITING_MAX: usize = 8_000;

/// Looks up positions, one question at a time. Cheap to clone.
#[derive(Clone)]
pub struct PositionLookup {
    way: Way,
}

#[derive(Clone)]
enum Way {
    Direct(Arc<dyn Inbox>),
    Queued(mpsc::Sender<Question>),
}

/// The question of one attaching session.
struct Question {
    query: PositionQuery,
    answer: oneshot::Sender<Result<UserPosition, InboxError>>,
}

impl PositionLookup {
    /// For an inbox whose single look-ups are as cheap as batched ones.
    pub(super) fn direct(inbox: Arc<dyn Inbox>) -> Self {
        Self { way: Way::Direct(inbox) }
    }

    /// Asks in batches, in a task of `tasks`.
    pub(crate) fn queued(inbox: Arc<dyn Inbox>, tasks: &mut JoinSet<()>) -> Self {
        let (queue, questions) = mpsc::channel(WAITING_MAX);
        tasks.spawn(run(inbox, questions));
        Self { way: Way::Queued(queue) }
    }

    /// Looks up a position.
    ///
    /// # Errors
    ///
    /// The inbox does not respond, or too many questions wait.
    pub async fn ask(&self, query: PositionQuery) -> Result<UserPosition, InboxError> {
        match &self.way {
            Way::Direct(inbox) => {
                let answers = inbox.positions(vec![query]).await?;
                answers.into_iter().next().ok_or_else(|| InboxError::Corrupt("no answer".to_owned()))
            }
            Way::Queued(queue) => {
                let (answer, answered) = oneshot::channel();
                let busy = || InboxError::Unavailable("too many sessions attach at once".to_owned());
                queue.try_send(Question { query, answer }).map_err(|_| busy())?;
                answered.await.unwrap_or_else(|_| Err(busy()))
            }
        }
    }
}

/// Asks the inbox, batch by batch, until the last handle is dropped.
async fn run(inbox: Arc<dyn Inbox>, mut questions: mpsc::Receiver<Question>) {
    let mut in_flight = JoinSet::new();
    let mut next_begins = Instant::now();
    loop {
        let mut batch = Vec::new();
        if questions.recv_many(&mut batch, BATCH).await == 0 {
            return;
        }
        tokio::time::sleep_until(next_begins).await;
        while batch.len() < BATCH
            && let Ok(question) = questions.try_recv()
        {
            batch.push(question);
        }
        next_begins = Instant::now() + BATCH_EVERY;
        in_flight.spawn(ask_batch(Arc::clone(&inbox), batch));
        let _ = tokio::time::timeout(BATCH_PATIENCE, fewer_than(&mut in_flight, 1)).await;
        fewer_than(&mut in_flight, BATCHES_IN_FLIGHT).await;
    }
}

/// Waits until fewer than `count` batches are in flight.
async fn fewer_than(in_flight: &mut JoinSet<()>, count: usize) {
    while in_flight.len() >= count {
        in_flight.join_next().await.map(crate::tasks::raised);
    }
}

async fn ask_batch(inbox: Arc<dyn Inbox>, batch: Vec<Question>) {
    let (queries, answers): (Vec<_>, Vec<_>) = batch.into_iter().map(|one| (one.query, one.answer)).unzip();
    match inbox.positions(queries).await {
        Ok(positions) => answers.into_iter().zip(positions).for_each(|(to, position)| {
            // A client that has left meanwhile needs no answer.
            let _ = to.send(Ok(position));
        }),
        Err(error) => answers.into_iter().for_each(|to| {
            let _ = to.send(Err(error.clone()));
        }),
    }
}
