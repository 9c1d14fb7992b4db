//! The loss audit: publishes numbered messages to many users, holds their sockets as real clients
//! do, and accounts for every id in the end. Exits with 1 if anything accepted was lost, repeated
//! to the application, or out of order.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use bytes::Bytes;
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::commands::signer;
use super::terminal::{OutputError, print, print_line, say};
use crate::app::keys::Keys;
use crate::backoff::between;
use crate::client::http::HttpClient;
use crate::client::{Client, ClientConfig, Event};
use crate::config::{Config, Faults};
use crate::message::{DeviceId, UserId};
use crate::ring::Ring;
use crate::wire::address::escape;
use crate::wire::frame::{MoveReason, Since};
use crate::wire::rest::ClusterResponse;

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
/// A move that took longer than this does not count in the percentiles.
const MOVE_LIFE: Duration = Duration::from_secs(15);
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
}

/// What all tasks record.
#[derive(Default)]
struct Book {
    /// By message id: recipient, position, and when it was due.
    accepted: Mutex<HashMap<String, Accepted>>,
    refused: Mutex<BTreeMap<String, u64>>,
    users: Mutex<Vec<UserBook>>,
}

struct Accepted {
    user: usize,
    seq: u64,
    due: Instant,
}

#[derive(Default, Clone)]
struct UserBook {
    received: Vec<Received>,
    gaps: Vec<(u64, u64)>,
    ready: bool,
    /// The node of the user's first socket, and of the last one.
    began_on: Option<String>,
    is_on: String,
    moves: Vec<Moved>,
    reconnects: u64,
    refused: Option<u16>,
    moving_since: Option<Instant>,
    /// Since its socket was lost, until it has caught up on another one.
    away_since: Option<Instant>,
    away: Vec<Duration>,
}

/// Users that were told to move, by an owner's change or by a drain.
#[derive(Clone)]
struct Moved {
    at: Instant,
    from: String,
    to: String,
    reason: MoveReason,
}

impl UserBook {
    fn moved_by(&self, reason: MoveReason) -> bool {
        self.moves.iter().any(|one| one.reason == reason)
    }
}

#[derive(Clone)]
struct Received {
    id: String,
    seq: u64,
    at: Instant,
    in_move: bool,
}

/// The result of an audit.
#[derive(Debug, Default)]
struct Verdict {
    once: u64,
    again: u64,
    queued: u64,
    expired: u64,
    lost: u64,
    late: u64,
    out_of_order: u64,
    delays: Vec<Duration>,
    delays_in_move: Vec<Duration>,
    /// By the second in which the message was due.
    delays_by_second: BTreeMap<u64, Vec<Duration>>,
}

/// Users by what the ring says before and after, and by what they were told.
#[derive(Debug, Default)]
struct Placement {
    /// Users with another owner in the end.
    changed: usize,
    /// Users whose first socket was not on the owner, which explains a move.
    began_elsewhere: usize,
    /// Users told to move although the owner is the same in the end.
    moved_though_stayed: usize,
    /// Users never told to move although the owner is another one.
    stayed_though_changed: usize,
}

/// Runs the audit.
///
/// # Errors
///
/// It could not begin.
pub async fn audit(mut config: Config, plan: AuditPlan) -> Result<ExitCode> {
    let tokens = signer(&mut config)?;
    let key = Keys::of(&mut config)?.api_key;
    if key.is_empty() {
        return Err(Faults(vec!["collect.api_keys: a key is needed to publish".to_owned()]).into());
    }
    let run = ulid::Ulid::generate().to_string().to_lowercase();
    let users: Vec<UserId> =
        (0..plan.users).filter_map(|n| UserId::parse(&format!("audit-{run}-{n}")).ok()).collect();
    let bench = Arc::new(Bench { plan, run, key, users, http: HttpClient::default(), book: Book::default() });
    bench.book.users.lock().resize(bench.users.len(), UserBook::default());
    let before = bench.cluster().await.context("collect cannot be asked for the cluster")?;
    let mut clients = JoinSet::new();
    for n in 0..bench.users.len() {
        let token = tokens.issue(&bench.users[n], TOKEN_S)?.0;
        clients.spawn(listen(Arc::clone(&bench), n, token));
        if n % 20 == 19 {
            tokio::time::sleep(Duration::from_secs(20) / CONNECTS_PER_S).await;
        }
    }
    bench.until_connected().await?;
    say(format_args!("audit {}: {} users connected, seed {}", bench.run, bench.users.len(), bench.plan.seed));
    let began = Instant::now();
    publish_all(&bench).await;
    let settled = bench.settle().await;
    let after = bench.cluster().await.unwrap_or_default();
    let verdict = bench.verdict().await?;
    let report = bench.report(&verdict, settled, &bench.placement(began, &before, &after));
    bench.show(&report)?;
    let failed = verdict.lost + verdict.again + verdict.out_of_order + verdict.late > 0;
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

struct Bench {
    plan: AuditPlan,
    run: String,
    key: String,
    users: Vec<UserId>,
    http: HttpClient,
    book: Book,
}

/// One user's client, for as long as the audit runs.
async fn listen(bench: Arc<Bench>, n: usize, token: String) {
    let Ok(device) = DeviceId::parse("audit") else { return };
    let mut client = Client::start(ClientConfig {
        target: bench.plan.target.clone(),
        token: Arc::new(move || token.clone()),
        device,
        since: Some(Since::Latest),
        ask_first: true,
        http: bench.http.clone(),
    });
    while let Some(event) = client.next().await {
        let mut users = bench.book.users.lock();
        let own = &mut users[n];
        match event {
            Event::Message(message) => {
                let in_move = own.moving_since.is_some_and(|since| since.elapsed() < MOVE_LIFE);
                let received =
                    Received { id: message.id.clone(), seq: message.seq, at: Instant::now(), in_move };
                own.received.push(received);
                drop(users);
                client.ack(message.seq);
            }
            Event::Gap { after, before, .. } => own.gaps.push((after, before)),
            Event::CaughtUp(_) => {
                own.ready = true;
                own.moving_since = None;
                own.away.extend(own.away_since.take().map(|since| since.elapsed()));
            }
            Event::Moving { node, reason } => {
                let at = Instant::now();
                own.moving_since = Some(at);
                own.moves.push(Moved { at, from: own.is_on.clone(), to: node, reason });
            }
            Event::Waiting { .. } => {
                own.reconnects += 1;
                own.away_since.get_or_insert_with(Instant::now);
            }
            Event::Refused { code } => own.refused = Some(code),
            Event::Welcome { node, .. } => {
                own.began_on.get_or_insert_with(|| node.clone());
                own.is_on = node;
            }
        }
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
        tokio::time::sleep_until(due).await;
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
    async fn until_connected(&self) -> Result<()> {
        let began = Instant::now();
        loop {
            let ready = self.book.users.lock().iter().filter(|user| user.ready).count();
            if ready == self.users.len() {
                return Ok(());
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

    /// Waits until everything accepted has arrived, or the time is over.
    async fn settle(&self) -> Duration {
        let began = Instant::now();
        while began.elapsed() < self.plan.settle {
            let received: HashSet<String> = {
                let users = self.book.users.lock();
                users.iter().flat_map(|user| user.received.iter().map(|one| one.id.clone())).collect()
            };
            if self.book.accepted.lock().keys().all(|id| received.contains(id)) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        began.elapsed()
    }

    /// Accounts for every id.
    async fn verdict(&self) -> Result<Verdict> {
        let users = self.book.users.lock().clone();
        let accepted = std::mem::take(&mut *self.book.accepted.lock());
        let mut verdict = Verdict::default();
        let mut arrivals: HashMap<&str, u64> = HashMap::new();
        let began = accepted.values().map(|one| one.due).min();
        for user in &users {
            verdict.out_of_order +=
                user.received.windows(2).filter(|pair| pair[1].seq <= pair[0].seq).count() as u64;
            for one in &user.received {
                *arrivals.entry(&one.id).or_default() += 1;
                let Some(accepted) = accepted.get(&one.id) else { continue };
                // Another position than was promised would be another message.
                verdict.out_of_order += u64::from(accepted.seq != one.seq);
                let delay = one.at.saturating_duration_since(accepted.due);
                verdict.late += u64::from(self.plan.max_delay.is_some_and(|max| delay > max));
                if one.in_move {
                    verdict.delays_in_move.push(delay);
                }
                verdict.delays.push(delay);
                let second = began.map_or(0, |began| (accepted.due - began).as_secs());
                verdict.delays_by_second.entry(second).or_default().push(delay);
            }
        }
        let mut missing: HashMap<usize, Vec<(&str, u64)>> = HashMap::new();
        for (id, one) in &accepted {
            match arrivals.get(id.as_str()) {
                Some(1) => verdict.once += 1,
                Some(_) => verdict.again += 1,
                None => missing.entry(one.user).or_default().push((id, one.seq)),
            }
        }
        for (user, ids) in missing {
            let stored = self.stored(user).await?;
            for (id, seq) in ids {
                let told = users[user].gaps.iter().any(|(after, before)| *after < seq && seq < *before);
                match (stored.contains(id), told) {
                    // Its client is away, and will get it when it is back.
                    (true, _) if !users[user].ready || users[user].refused.is_some() => verdict.queued += 1,
                    (false, true) => verdict.expired += 1,
                    _ => {
                        say(format_args!("lost: {id}, {seq} of {}", self.users[user]));
                        verdict.lost += 1;
                    }
                }
            }
        }
        verdict.delays.sort_unstable();
        verdict.delays_in_move.sort_unstable();
        verdict.delays_by_second.values_mut().for_each(|delays| delays.sort_unstable());
        Ok(verdict)
    }

    /// The ids that stand in a user's inbox.
    async fn stored(&self, user: usize) -> Result<HashSet<String>> {
        let mut ids = HashSet::new();
        let mut after = 0;
        loop {
            let path =
                format!("/v1/users/{}/messages?after={after}&limit=1000", escape(self.users[user].as_str()));
            let page: Value = self.get(&path).await?;
            for message in page["messages"].as_array().into_iter().flatten() {
                ids.extend(message["id"].as_str().map(str::to_owned));
            }
            match page["next"].as_u64() {
                Some(next) => after = next,
                None => return Ok(ids),
            }
        }
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        let mut why = String::new();
        for base in self.plan.publish.iter().cycle().take(6) {
            let url = format!("{base}{path}");
            match self.http.send("GET", &url, Some(&self.key), Bytes::new(), REQUEST_DEADLINE).await {
                Ok((200, body)) => return Ok(serde_json::from_slice(&body)?),
                Ok((status, _)) => why = format!("{base} answered {status}"),
                Err(error) => why = format!("{base}: {error}"),
            }
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        Err(anyhow!(why))
    }

    async fn cluster(&self) -> Result<ClusterResponse> {
        self.get("/v1/cluster").await
    }

    /// Who moved, and who should have. Some of the moves that no change of owner explains are
    /// printed.
    fn placement(&self, began: Instant, before: &ClusterResponse, after: &ClusterResponse) -> Placement {
        let (before, after) = (Ring::build(before.on_ring()), Ring::build(after.on_ring()));
        let users = self.book.users.lock();
        let mut placement = Placement::default();
        for (name, user) in self.users.iter().zip(users.iter()) {
            let owner = before.owner_of(name.as_str());
            let (changed, moved) = (owner != after.owner_of(name.as_str()), !user.moves.is_empty());
            placement.changed += usize::from(changed);
            placement.began_elsewhere += usize::from(user.began_on.as_deref() != owner);
            placement.moved_though_stayed += usize::from(moved && !changed);
            placement.stayed_though_changed += usize::from(changed && !moved);
            if moved && !changed && placement.moved_though_stayed <= MOVES_PRINTED {
                for one in &user.moves {
                    say(format_args!(
                        "{name}, of {owner:?}, moved from {} to {} by {:?}, {:?} after the first message",
                        one.from,
                        one.to,
                        one.reason,
                        one.at.saturating_duration_since(began),
                    ));
                }
            }
        }
        placement
    }

    fn report(&self, verdict: &Verdict, settled: Duration, placement: &Placement) -> Value {
        let users = self.book.users.lock();
        let moved = |is: fn(&UserBook) -> bool| users.iter().filter(|user| is(user)).count();
        let mut away: Vec<Duration> = users.iter().flat_map(|user| user.away.iter().copied()).collect();
        away.sort_unstable();
        // Second, p50, p99 in ms: enough to draw what a move did.
        let series: Vec<Value> = verdict
            .delays_by_second
            .iter()
            .map(|(second, delays)| json!([second, percentile(delays, 0.5), percentile(delays, 0.99)]))
            .collect();
        let sum = |of: fn(&UserBook) -> u64| users.iter().map(of).sum::<u64>();
        json!({
            "run": self.run, "seed": self.plan.seed, "users": self.users.len(),
            "accepted": verdict.once + verdict.again + verdict.queued + verdict.expired + verdict.lost,
            "delivered_once": verdict.once, "delivered_again": verdict.again, "queued": verdict.queued,
            "expired": verdict.expired, "refused": *self.book.refused.lock(), "lost": verdict.lost,
            "late": verdict.late, "out_of_order": verdict.out_of_order,
            "moved_users": moved(|user| !user.moves.is_empty()),
            "moved_by_owner": moved(|user| user.moved_by(MoveReason::Owner)),
            "moved_by_drain": moved(|user| user.moved_by(MoveReason::Drain)),
            "began_elsewhere": placement.began_elsewhere, "owner_changed_users": placement.changed,
            "moved_though_owner_stayed": placement.moved_though_stayed,
            "stayed_though_owner_changed": placement.stayed_though_changed,
            "moves": sum(|user| user.moves.len() as u64), "reconnects": sum(|user| user.reconnects),
            "settled_ms": settled.as_millis() as u64, "away_ms": percentiles(&away), "delay_series": series,
            "delay_ms": percentiles(&verdict.delays), "delay_in_move_ms": percentiles(&verdict.delays_in_move),
        })
    }

    fn show(&self, report: &Value) -> Result<(), OutputError> {
        if self.plan.json {
            return print_line(report);
        }
        // The series is for programs.
        let shown = report.as_object().into_iter().flatten().filter(|(name, _)| *name != "delay_series");
        let lines = shown.map(|(name, value)| format!("{name:<28} {value}\n"));
        print(lines.collect::<String>())
    }
}

/// In ms, to a tenth; `None` if there are no values.
fn percentile(sorted: &[Duration], part: f64) -> Option<f64> {
    let index = ((sorted.len() as f64 * part).ceil() as usize).clamp(1, sorted.len().max(1)) - 1;
    sorted.get(index).map(|delay| (delay.as_secs_f64() * 10_000.0).round() / 10.0)
}

fn percentiles(sorted: &[Duration]) -> Value {
    let at = |part: f64| percentile(sorted, part);
    json!({"count": sorted.len(), "p50": at(0.5), "p99": at(0.99), "p999": at(0.999), "max": at(1.0)})
}
