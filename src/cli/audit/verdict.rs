//! What the audit concludes, and its report.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use anyhow::{Result, anyhow};
use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::super::terminal::{OutputError, print, print_line, say};
use super::book::UserBook;
use super::topics::TopicVerdict;
use super::{Bench, MOVES_PRINTED, REQUEST_DEADLINE};
use crate::ring::Ring;
use crate::wire::address::escape;
use crate::wire::frame::MoveReason;
use crate::wire::rest::ClusterResponse;

/// The result of an audit.
#[derive(Debug, Default)]
pub(super) struct Verdict {
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
    topics: TopicVerdict,
}

/// Users by what the ring says before and after, and by what they were told.
#[derive(Debug, Default)]
pub(super) struct Placement {
    /// Users with another owner in the end.
    changed: usize,
    /// Users whose first socket was not on the owner, which explains a move.
    began_elsewhere: usize,
    /// Users told to move although the owner is the same in the end.
    moved_though_stayed: usize,
    /// Users never told to move although the owner is another one.
    stayed_though_changed: usize,
}

/// In ms, to a tenth; `None` if there are no values.
fn percentile(sorted: &[Duration], part: f64) -> Option<f64> {
    let index = ((sorted.len() as f64 * part).ceil() as usize).clamp(1, sorted.len().max(1)) - 1;
    sorted.get(index).map(|delay| (delay.as_secs_f64() * 10_000.0).round() / 10.0)
}

pub(super) fn percentiles(sorted: &[Duration]) -> Value {
    let at = |part: f64| percentile(sorted, part);
    json!({"count": sorted.len(), "p50": at(0.5), "p99": at(0.99), "p999": at(0.999), "max": at(1.0)})
}

impl Verdict {
    /// Whether a promise was broken.
    pub(super) fn is_bad(&self) -> bool {
        self.lost + self.again + self.out_of_order + self.late > 0 || self.topics.is_bad()
    }
}

impl Bench {
    /// Accounts for every id.
    pub(super) async fn verdict(&self) -> Result<Verdict> {
        let users = self.book.users.lock().clone();
        let accepted = std::mem::take(&mut *self.book.accepted.lock());
        let mut verdict = Verdict::default();
        let mut arrivals: HashMap<&str, u64> = HashMap::new();
        let began = accepted.values().map(|one| one.due).min();
        for user in &users {
            // Each log has an order of its own.
            let mut last: HashMap<Option<&str>, u64> = HashMap::new();
            for one in &user.received {
                let before = last.insert(one.log.as_deref(), one.seq);
                verdict.out_of_order += u64::from(before.is_some_and(|before| one.seq <= before));
            }
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
        verdict.topics = self.topic_verdict(&users).await?;
        verdict.delays.sort_unstable();
        verdict.delays_in_move.sort_unstable();
        verdict.delays_by_second.values_mut().for_each(|delays| delays.sort_unstable());
        Ok(verdict)
    }

    /// The ids that stand in a user's inbox.
    pub(super) async fn stored(&self, user: usize) -> Result<HashSet<String>> {
        self.stored_in(&format!("/v1/users/{}/messages", escape(self.users[user].as_str()))).await
    }

    /// The ids that stand in an inbox or a log, by the path of its messages.
    pub(super) async fn stored_in(&self, path: &str) -> Result<HashSet<String>> {
        let mut ids = HashSet::new();
        let mut after = 0;
        loop {
            let page: Value = self.get(&format!("{path}?after={after}&limit=1000")).await?;
            for message in page["messages"].as_array().into_iter().flatten() {
                ids.extend(message["id"].as_str().map(str::to_owned));
            }
            match page["next"].as_u64() {
                Some(next) => after = next,
                None => return Ok(ids),
            }
        }
    }

    pub(super) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
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

    pub(super) async fn cluster(&self) -> Result<ClusterResponse> {
        self.get("/v1/cluster").await
    }

    /// Who moved, and who should have. Some of the moves that no change of owner explains are
    /// printed.
    pub(super) fn placement(
        &self,
        began: Instant,
        before: &ClusterResponse,
        after: &ClusterResponse,
    ) -> Placement {
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

    pub(super) fn report(&self, verdict: &Verdict, settled: Duration, placement: &Placement) -> Value {
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
            "topics": self.plan.topics.map(|_| verdict.topics.to_json()),
            "settled_ms": settled.as_millis() as u64, "away_ms": percentiles(&away), "delay_series": series,
            "delay_ms": percentiles(&verdict.delays), "delay_in_move_ms": percentiles(&verdict.delays_in_move),
        })
    }
}

/// Prints a report.
pub(super) fn show(report: &Value, as_json: bool) -> Result<(), OutputError> {
    if as_json {
        return print_line(report);
    }
    // The series is for programs.
    let shown = report.as_object().into_iter().flatten().filter(|(name, _)| *name != "delay_series");
    let lines = shown.map(|(name, value)| format!("{name:<28} {value}\n"));
    print(lines.collect::<String>())
}
