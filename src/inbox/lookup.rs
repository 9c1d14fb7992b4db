//! Questions of single sessions that attach: where they begin, and which logs they read.
//!
//! A store whose look-ups are cheap is asked directly. For the others, questions wait in a queue of
//! each kind: the next batch forms while the last one is in flight.

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::topics::Memberships;
use super::{Device, InboxError, PositionQuery, Positions, Stores, UserPosition};
use crate::message::UserId;

/// Questions in one batch (docs/design.md, section 5: 16 ms for 1000 positions on MongoDB).
const BATCH: usize = 1_000;
/// Questions for memberships in one batch: each user may have a hundred.
const MEMBERSHIPS_BATCH: usize = 250;
/// Batches in flight at the same time. One that takes long, as when a position must be confirmed by
/// the whole replica set, does not delay the others.
const BATCHES_IN_FLIGHT: usize = 4;
/// How long a batch may take before the next one begins beside it.
const BATCH_PATIENCE: Duration = Duration::from_millis(50);
/// Shortest time between the beginnings of two batches. A batch costs a command or a sync, for one
/// position as for many.
const BATCH_EVERY: Duration = Duration::from_millis(2);
/// Questions that wait for their batch: those of attaching sessions in two seconds of the default
/// accept rate. Further ones are refused.
const WAITING_MAX: usize = 8_000;

/// Asks the store about many at once.
type Ask<Q, A> = Arc<dyn Fn(Vec<Q>) -> BoxFuture<'static, Result<Vec<A>, InboxError>> + Send + Sync>;

/// Takes one question at a time, and asks the store alone or with others. Cheap to clone.
pub struct Lookup<Q, A> {
    way: Way<Q, A>,
}

enum Way<Q, A> {
    Direct(Ask<Q, A>),
    Queued(mpsc::Sender<Question<Q, A>>),
}

impl<Q, A> Clone for Lookup<Q, A> {
    fn clone(&self) -> Self {
        let way = match &self.way {
            Way::Direct(ask) => Way::Direct(Arc::clone(ask)),
            Way::Queued(queue) => Way::Queued(queue.clone()),
        };
        Self { way }
    }
}

/// The question of one attaching session.
struct Question<Q, A> {
    query: Q,
    answer: oneshot::Sender<Result<A, InboxError>>,
}

impl<Q: Send + 'static, A: Send + 'static> Lookup<Q, A> {
    /// Asks each question alone, or so many at once at the most, in a task of `tasks`.
    fn new(gathered: Option<usize>, ask: Ask<Q, A>, tasks: &mut JoinSet<()>) -> Self {
        let Some(most) = gathered else { return Self { way: Way::Direct(ask) } };
        let (queue, questions) = mpsc::channel(WAITING_MAX);
        tasks.spawn(run(ask, most, questions));
        Self { way: Way::Queued(queue) }
    }

    /// Asks a question.
    ///
    /// # Errors
    ///
    /// The store does not respond, or too many questions wait.
    pub async fn ask(&self, query: Q) -> Result<A, InboxError> {
        match &self.way {
            Way::Direct(ask) => {
                let answers = ask(vec![query]).await?;
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

/// What sessions ask the store when they attach. Cheap to clone.
#[derive(Clone)]
pub struct Lookups {
    /// Where a session begins in the inbox.
    pub positions: Lookup<PositionQuery, UserPosition>,
    /// The memberships of a user in topics with a log.
    pub memberships: Lookup<UserId, Memberships>,
    /// The positions of a device in logs of topics.
    pub log_positions: Lookup<Device, Positions>,
}

impl Lookups {
    /// Looks up in these stores. Its tasks, if it needs any, end with `tasks`.
    pub fn new(stores: &Stores, tasks: &mut JoinSet<()>) -> Self {
        let gathered = |most| stores.inbox.gathers_lookups().then_some(most);
        let inbox = Arc::clone(&stores.inbox);
        let positions = move |asked| {
            let inbox = Arc::clone(&inbox);
            async move { inbox.positions(asked).await }.boxed()
        };
        let topics = Arc::clone(&stores.topics);
        let memberships = move |users| {
            let topics = Arc::clone(&topics);
            async move { topics.log_memberships(users).await }.boxed()
        };
        let inbox = Arc::clone(&stores.inbox);
        let log_positions = move |devices| {
            let inbox = Arc::clone(&inbox);
            async move { inbox.log_positions(devices).await }.boxed()
        };
        Self {
            positions: Lookup::new(gathered(BATCH), Arc::new(positions), tasks),
            memberships: Lookup::new(gathered(MEMBERSHIPS_BATCH), Arc::new(memberships), tasks),
            log_positions: Lookup::new(gathered(BATCH), Arc::new(log_positions), tasks),
        }
    }
}

/// Asks the store, batch by batch, until the last handle is dropped.
async fn run<Q: Send + 'static, A: Send + 'static>(
    ask: Ask<Q, A>,
    most: usize,
    mut questions: mpsc::Receiver<Question<Q, A>>,
) {
    let mut in_flight = JoinSet::new();
    let mut next_begins = Instant::now();
    loop {
        let mut batch = Vec::new();
        if questions.recv_many(&mut batch, most).await == 0 {
            return;
        }
        tokio::time::sleep_until(next_begins).await;
        while batch.len() < most
            && let Ok(question) = questions.try_recv()
        {
            batch.push(question);
        }
        next_begins = Instant::now() + BATCH_EVERY;
        in_flight.spawn(ask_batch(Arc::clone(&ask), batch));
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

async fn ask_batch<Q, A>(ask: Ask<Q, A>, batch: Vec<Question<Q, A>>) {
    let (queries, waiting): (Vec<_>, Vec<_>) = batch.into_iter().map(|one| (one.query, one.answer)).unzip();
    match ask(queries).await {
        Ok(answers) => waiting.into_iter().zip(answers).for_each(|(to, answer)| {
            // A client that has left meanwhile needs no answer.
            let _ = to.send(Ok(answer));
        }),
        Err(error) => waiting.into_iter().for_each(|to| {
            let _ = to.send(Err(error.clone()));
        }),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures_util::future::join_all;

    use super::*;

    /// The answer to each number is its double; a batch with the number 13 is refused.
    fn doubling(gathered: bool, tasks: &mut JoinSet<()>) -> (Lookup<u64, u64>, Arc<AtomicUsize>) {
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        let ask = move |numbers: Vec<u64>| {
            count.fetch_add(1, Ordering::SeqCst);
            async move {
                match numbers.contains(&13) {
                    true => Err(InboxError::Unavailable("it refuses".to_owned())),
                    false => Ok(numbers.iter().map(|n| n * 2).collect()),
                }
            }
            .boxed()
        };
        (Lookup::new(gathered.then_some(BATCH), Arc::new(ask), tasks), asked)
    }

    #[tokio::test]
    async fn questions_that_come_together_are_one_batch_and_each_has_its_own_answer() {
        for gathered in [true, false] {
            let mut tasks = JoinSet::new();
            let (lookup, asked) = doubling(gathered, &mut tasks);
            let answers = join_all((100..600).map(|n| lookup.ask(n))).await;
            let expected: Vec<Result<u64, InboxError>> = (100..600).map(|n| Ok(n * 2)).collect();
            assert_eq!(answers, expected);
            assert_eq!(asked.load(Ordering::SeqCst), if gathered { 1 } else { 500 });
            let answers = join_all((0..20).map(|n| lookup.ask(n))).await;
            let failed = answers.iter().filter(|answer| answer.is_err()).count();
            assert_eq!(failed, if gathered { 20 } else { 1 }, "who was asked for together fails together");
            assert_eq!(lookup.ask(4).await, Ok(8), "and nobody later");
        }
    }

    #[tokio::test]
    async fn too_many_questions_are_refused() {
        let mut tasks = JoinSet::new();
        let (lookup, _) = doubling(true, &mut tasks);
        let answers = join_all((100..100 + WAITING_MAX as u64 + 5).map(|n| lookup.ask(n))).await;
        assert_eq!(answers.iter().filter(|answer| answer.is_err()).count(), 5);
        assert!(answers[..WAITING_MAX].iter().all(Result::is_ok));
    }
}
