//! The loss audit: publishes numbered messages to many users, holds their sockets as real clients
//! do, and accounts for every id in the end. Exits with 1 if anything accepted was lost, repeated
//! to the application, or out of order.

mod book;
mod canary;
mod fleet;
mod topics;
mod verdict;

pub use canary::{Repetition, canary};
pub use fleet::ClientLibrary;
pub use topics::TopicPlan;

use std::collections::HashSet;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::commands::signer;
use super::terminal::say;
use crate::app::keys::Keys;
use crate::backoff::between;
use crate::client::http::HttpClient;
use crate::client::{Item, Notice, State, connect};
use crate::config::{Config, Faults};
use crate::message::UserId;
use crate::role::auth::Auth;
use crate::wire::address::escape;
use crate::wire::frame::Since;
use book::{Accepted, Book, Happened, UserBook};
use fleet::Fleet;
use verdict::show;

/// Publishes in flight at once.
const IN_FLIGHT: usize = 512;
/// How long a publish is retried before it counts as refused.
const PUBLISH_DEADLINE: Duration = Duration::from_secs(90);
/// Deadline of one request.
const REQUEST_DEADLINE: Duration = Duration::from_secs(15);
/// Life of the users' tokens, in seconds.
const TOKEN_S: u64 = 24 * 3600;
/// Clients started per second.
const CONNECTS_PER_S: u32 = 1_000;
/// How long all clients may take to connect.
const CONNECT_DEADLINE: Duration = Duration::from_secs(120);
/// The device of all users.
const DEVICE: &str = "audit";
/// Users whose unexpected moves are printed: a drain that comes back has all of them.
const MOVES_PRINTED: usize = 20;

/// What the audit does.
#[derive(Debug, Clone)]
pub struct AuditPlan {
    /// The load balancer, or any push node.
    pub target: String,
    /// One or several collects.
    pub publish: Vec<String>,
    /// Number of users, each with one socket.
    pub users: usize,
    /// Messages per second.
    pub rate: f64,
    /// Duration of the load.
    pub time: Duration,
    /// How long accepted messages may take to arrive after the last publish.
    pub settle: Duration,
    /// A message that takes longer fails the audit. `None`: only loss does.
    pub max_delay: Option<Duration>,
    /// Seed of the random choice of users.
    pub seed: u64,
    /// One line of JSON instead of a table.
    pub json: bool,
    /// Topics beside the messages to users.
    pub topics: Option<TopicPlan>,
    /// Which library receives.
    pub clients: ClientLibrary,
    /// What runs it. `None`: `node` or `python3`.
    pub client_program: Option<String>,
}

/// Runs the audit. `interrupted` resolves when the load is to end before its time: what was
/// accepted until then is accounted for as ever.
///
/// # Errors
///
/// It could not begin.
pub async fn audit(
    config: Config,
    plan: AuditPlan,
    interrupted: impl Future<Output = ()>,
) -> Result<ExitCode> {
    let auditor = Auditor::new(config, plan)?;
    let load_ends = watch::Sender::new(false);
    let end = async {
        interrupted.await;
        say(format_args!("audit: the load ends; a second signal ends the audit at once"));
        load_ends.send_replace(true);
        std::future::pending::<()>().await;
    };
    let report = tokio::select! { report = auditor.run(&load_ends) => report?, () = end => return Ok(ExitCode::FAILURE) };
    show(&report.json, auditor.plan.json)?;
    Ok(if report.is_bad { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// The name of an audit.
fn new_run() -> String {
    ulid::Ulid::generate().to_string().to_lowercase()
}

/// The result of an audit.
pub(super) struct Report {
    /// As it is printed.
    json: Value,
    /// Whether a promise was broken.
    is_bad: bool,
}

/// What audits of one plan share. Each publishes to the same users, so that audits that are
/// repeated for years leave no more than one.
struct Auditor {
    tokens: Auth,
    key: String,
    plan: AuditPlan,
    users: Vec<UserId>,
}

impl Auditor {
    fn new(mut config: Config, plan: AuditPlan) -> Result<Self> {
        let tokens = signer(&mut config)?;
        let key = Keys::with(&mut config, |keys| !keys.api_key.is_empty())?.api_key;
        if key.is_empty() {
            return Err(Faults(vec!["collect.api_keys: a key is needed to publish".to_owned()]).into());
        }
        let own = new_run();
        let users = (0..plan.users).filter_map(|n| UserId::parse(&format!("audit-{own}-{n}")).ok()).collect();
        Ok(Self { tokens, key, plan, users })
    }

    /// Takes the keys anew: they may have been turned.
    fn take_keys(&mut self, config: Config) -> Result<()> {
        let anew = Self::new(config, self.plan.clone())?;
        (self.tokens, self.key) = (anew.tokens, anew.key);
        Ok(())
    }

    /// Has the users forgotten.
    async fn forget_users(&self) {
        self.bench(&watch::Sender::new(false)).forget_users().await;
    }

    fn bench(&self, load_ends: &watch::Sender<bool>) -> Bench {
        let book = Book::default();
        book.users.lock().resize(self.users.len(), UserBook::default());
        Bench {
            plan: self.plan.clone(),
            run: new_run(),
            key: self.key.clone(),
            users: self.users.clone(),
            http: HttpClient::default(),
            book,
            load_ends: load_ends.subscribe(),
        }
    }

    /// Runs one audit.
    async fn run(&self, load_ends: &watch::Sender<bool>) -> Result<Report> {
        let tokens = self.users.iter().map(|user| self.tokens.issue(user, TOKEN_S).map(|issued| issued.0));
        let tokens = tokens.collect::<Result<Vec<_>, _>>()?;
        let bench = Arc::new(self.bench(load_ends));
        let before = bench.cluster().await.context("collect cannot be asked for the cluster")?;
        let (mut clients, mut fleet) = bench.start_clients(tokens).await?;
        bench.until_connected(fleet.as_mut()).await?;
        if let Some(plan) = bench.plan.topics {
            bench.make_topics(plan).await?;
        }
        say(format_args!(
            "audit {}: {} users connected, seed {}",
            bench.run,
            bench.users.len(),
            bench.plan.seed
        ));
        let began = Instant::now();
        match bench.plan.topics {
            None => publish_all(&bench).await,
            Some(plan) => {
                tokio::join!(publish_all(&bench), Arc::clone(&bench).load_topics(plan));
            }
        }
        let settled = bench.settle().await;
        let after = bench.cluster().await.unwrap_or_default();
        drop(fleet);
        let verdict = bench.verdict().await?;
        if let Some(plan) = bench.plan.topics {
            bench.remove_topics(plan).await;
        }
        clients.shutdown().await;
        let json = bench.report(&verdict, settled, &bench.placement(began, &before, &after));
        Ok(Report { json, is_bad: verdict.is_bad() })
    }
}

struct Bench {
    plan: AuditPlan,
    run: String,
    key: String,
    users: Vec<UserId>,
    http: HttpClient,
    book: Book,
    /// Whether the load ends before its time.
    load_ends: watch::Receiver<bool>,
}

/// One user's client, for as long as the audit runs.
async fn listen(bench: Arc<Bench>, n: usize, token: String) {
    let options = connect(bench.plan.target.clone(), token).device(DEVICE).since(Since::Latest);
    let Ok(mut inbox) = options.http(bench.http.clone()).start() else { return };
    let mut notices = inbox.notices();
    loop {
        let happened = tokio::select! {
            // A message is not counted before the move that it came through.
            biased;
            Some(notice) = notices.next() => match notice {
                Notice::State(state) => happened(state),
                Notice::Fault { .. } => None,
            },
            item = inbox.next() => match item {
                Ok(Some(Item::Message(message))) => {
                    let log = message.topic.filter(|_| message.in_log);
                    Some(Happened::Message(message.id, message.seq, log))
                }
                Ok(Some(Item::Gap(gap))) => {
                    gap.topic.is_none().then_some(Happened::Gap(gap.after, gap.before))
                }
                Ok(None) => return,
                Err(stopped) => {
                    bench.book.note(n, Happened::Refused(stopped.code.unwrap_or_default()));
                    return;
                }
            },
        };
        if let Some(happened) = happened {
            bench.book.note(n, happened);
        }
    }
}

fn happened(state: State) -> Option<Happened> {
    match state {
        State::CatchingUp { node, .. } => Some(Happened::Welcome(node)),
        State::Live { node } => Some(Happened::Live(node)),
        State::Moving { node, reason } => Some(Happened::Moving(node, reason)),
        State::Waiting { .. } => Some(Happened::Waiting),
        State::Connecting | State::Stopped(_) => None,
    }
}

/// Publishes at the rate. Each message is sent when it is due, whether earlier ones were answered
/// or not.
async fn publish_all(bench: &Arc<Bench>) {
    let mut random = StdRng::seed_from_u64(bench.plan.seed);
    let began = Instant::now();
    let total = (bench.plan.rate * bench.plan.time.as_secs_f64()).ceil() as u64;
    let permits = Arc::new(Semaphore::new(IN_FLIGHT));
    let mut sending = JoinSet::new();
    for k in 0..total {
        let due = began + Duration::from_secs_f64(k as f64 / bench.plan.rate);
        if !bench.is_due(due).await {
            break;
        }
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { break };
        let (bench, user) = (Arc::clone(bench), random.random_range(0..bench.users.len()));
        sending.spawn(async move {
            bench.publish(k, user, due).await;
            drop(permit);
        });
        while sending.try_join_next().is_some() {}
    }
    while sending.join_next().await.is_some() {}
}

impl Bench {
    /// Starts the clients of all users; those of another language in a process.
    async fn start_clients(self: &Arc<Self>, tokens: Vec<String>) -> Result<(JoinSet<()>, Option<Fleet>)> {
        let mut clients = JoinSet::new();
        if self.plan.clients != ClientLibrary::Rust {
            return Ok((clients, Some(Fleet::start(self, &tokens).await?)));
        }
        for (n, token) in tokens.into_iter().enumerate() {
            clients.spawn(listen(Arc::clone(self), n, token));
            if n % 20 == 19 {
                tokio::time::sleep(Duration::from_secs(20) / CONNECTS_PER_S).await;
            }
        }
        Ok((clients, None))
    }

    /// Has the users forgotten.
    async fn forget_users(&self) {
        for user in &self.users {
            self.sent("DELETE", &format!("/v1/users/{}", escape(user.as_str())), Bytes::new()).await;
        }
    }

    async fn until_connected(&self, mut fleet: Option<&mut Fleet>) -> Result<()> {
        let began = Instant::now();
        loop {
            let ready = self.book.users.lock().iter().filter(|user| user.ready).count();
            if ready == self.users.len() {
                return Ok(());
            }
            if fleet.as_mut().is_some_and(|fleet| fleet.has_ended()) {
                return Err(anyhow!("the clients' process has ended before all were connected"));
            }
            if began.elapsed() > CONNECT_DEADLINE {
                return Err(anyhow!(
                    "only {ready} of {} users could connect to {}",
                    self.users.len(),
                    self.plan.target
                ));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Publishes one message under one id until it is accepted. After a failure another collect is
    /// asked.
    async fn publish(&self, k: u64, user: usize, due: Instant) {
        let id = format!("audit-{}-{k}", self.run);
        let body =
            json!({"to": {"user": self.users[user].as_str()}, "payload": {"k": k}, "id": id, "ttl_s": 3600});
        let body = Bytes::from(body.to_string());
        let began = Instant::now();
        let mut tried = k as usize;
        loop {
            let url = format!("{}/v1/messages", self.plan.publish[tried % self.plan.publish.len()]);
            tried += 1;
            let answer = self.http.send("POST", &url, Some(&self.key), body.clone(), REQUEST_DEADLINE).await;
            let why = match answer {
                Ok((202, body)) => {
                    let answer: Value = serde_json::from_slice(&body).unwrap_or_default();
                    let seq = answer["accepted"][0]["seq"].as_u64().unwrap_or(0);
                    self.book.accepted.lock().insert(id, Accepted { user, seq, due });
                    return;
                }
                Ok((status, _)) => status.to_string(),
                Err(_) => "unreachable".to_owned(),
            };
            if began.elapsed() > PUBLISH_DEADLINE || why.starts_with('4') {
                *self.book.refused.lock().entry(why).or_default() += 1;
                return;
            }
            let rest = between(Duration::from_millis(50), Duration::from_millis(500), &mut rand::rng());
            tokio::time::sleep(rest).await;
        }
    }

    /// Waits until a moment of the load. Returns whether it has come: the load may end before.
    async fn is_due(&self, due: Instant) -> bool {
        let mut ends = self.load_ends.clone();
        tokio::select! {
            // A load that has ended publishes nothing more, also where it is late.
            biased;
            Ok(_) = ends.wait_for(|ends| *ends) => false,
            () = tokio::time::sleep_until(due) => true,
        }
    }

    /// Waits until everything accepted has arrived, or the time is over.
    async fn settle(&self) -> Duration {
        let began = Instant::now();
        while began.elapsed() < self.plan.settle {
            let received: HashSet<String> = {
                let users = self.book.users.lock();
                users.iter().flat_map(|user| user.received.iter().map(|one| one.id.clone())).collect()
            };
            if self.book.accepted.lock().keys().all(|id| received.contains(id)) && self.topics_are_settled() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        began.elapsed()
    }
}
