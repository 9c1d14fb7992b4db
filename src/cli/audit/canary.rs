//! The audit as a canary: a small one again and again, whose results are metrics.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use anyhow::Result;
use serde_json::Value;
use tokio::sync::watch;

use super::super::terminal::say;
use super::{AuditPlan, Auditor, Report};
use crate::app::serve_metrics;
use crate::clock::Clock;
use crate::config::Config;
use crate::telemetry::{Counter, Family, Gauge, Metrics};

/// How an audit is repeated.
#[derive(Debug, Clone, Copy)]
pub struct Repetition {
    /// The pause between two audits.
    pub every: Duration,
    /// Where the metrics are served.
    pub metrics: SocketAddr,
}

/// The fields of the report that count messages, each a label `fate`.
const FATES: [&str; 7] =
    ["delivered_once", "delivered_again", "queued", "expired", "lost", "late", "out_of_order"];
/// The delays of the last audit, each a label `quantile`.
const DELAYS: [(&str, &str); 3] = [("p50", "0.5"), ("p99", "0.99"), ("max", "1.0")];
/// What became of an audit: a label `outcome`.
const OUTCOMES: [&str; 3] = ["passed", "broken", "failed"];

type Label = [(&'static str, &'static str); 1];

/// `ringpush_canary_…`.
struct Results {
    audits: Family<Label, Counter>,
    messages: Family<Label, Counter>,
    refused: Counter,
    delays: Family<Label, Gauge<f64, AtomicU64>>,
    passed_at: Gauge<f64, AtomicU64>,
    clock: Clock,
}

/// How long the users may take to be forgotten in the end.
const FORGET_DEADLINE: Duration = Duration::from_secs(15);

impl Results {
    fn register(metrics: &Metrics, clock: Clock) -> Self {
        let this = Self {
            clock,
            audits: Family::default(),
            messages: Family::default(),
            refused: Counter::default(),
            delays: Family::default(),
            passed_at: Gauge::default(),
        };
        metrics.register(|r| {
            let r = r.sub_registry_with_prefix("canary");
            r.register("audits", "Audits, by outcome", this.audits.clone());
            r.register("messages", "Messages of all audits, by what became of them", this.messages.clone());
            r.register("publishes_refused", "Publishes that were not accepted", this.refused.clone());
            r.register("delay_seconds", "Delay of messages in the last audit", this.delays.clone());
            let help = "When the last audit that passed ended, or the canary began; seconds since 1970";
            r.register("passed_timestamp_seconds", help, this.passed_at.clone());
        });
        this.note_time();
        // A series that begins with its first event hides it from `increase`.
        OUTCOMES.iter().for_each(|outcome| drop(this.audits.get_or_create(&[("outcome", outcome)])));
        FATES.iter().for_each(|fate| drop(this.messages.get_or_create(&[("fate", fate)])));
        this
    }

    fn note_time(&self) {
        self.passed_at.set(self.clock.now().0 as f64 / 1_000.0);
    }

    fn audit_ended(&self, outcome: &'static str) {
        self.audits.get_or_create(&[("outcome", outcome)]).inc();
    }

    /// Takes what a report says. Returns the outcome.
    fn take(&self, report: &Report) -> &'static str {
        let count = |value: &Value| value.as_u64().unwrap_or(0);
        for fate in FATES {
            self.messages.get_or_create(&[("fate", fate)]).inc_by(count(&report.json[fate]));
        }
        let refused = report.json["refused"].as_object().into_iter().flatten();
        let refused: u64 = refused.map(|(_, publishes)| count(publishes)).sum();
        self.refused.inc_by(refused);
        for (field, quantile) in DELAYS {
            let delay = report.json["delay_ms"][field].as_f64();
            if let Some(ms) = delay {
                self.delays.get_or_create(&[("quantile", quantile)]).set(ms / 1_000.0);
            }
        }
        let is_good = !report.is_bad && refused == 0;
        if is_good {
            self.note_time();
        }
        if is_good { "passed" } else { "broken" }
    }
}

/// Runs audit after audit until `interrupted` resolves, and serves what they saw at
/// `http://{metrics}/metrics`. An audit that fails ends nothing: it is counted and told. Each takes
/// the keys anew from `config`. All publish to the same users, which are forgotten in the end.
///
/// # Errors
///
/// A key is missing at the beginning, or the address cannot be listened on.
pub async fn canary(
    config: impl Fn() -> Result<Config>,
    plan: AuditPlan,
    repetition: Repetition,
    interrupted: impl Future<Output = ()>,
) -> Result<ExitCode> {
    let mut auditor = Auditor::new(config()?, plan)?;
    let (metrics, clock) = (Metrics::default(), Clock::system());
    let results = Results::register(&metrics, clock);
    let (at, serving) = serve_metrics("--metrics", repetition.metrics, metrics)?;
    say(format_args!("canary: its metrics are at http://{at}/metrics"));
    let load_ends = watch::Sender::new(false);
    let audits = async {
        while !*load_ends.borrow() {
            let report = match config().and_then(|config| auditor.take_keys(config)) {
                Ok(()) => auditor.run(&load_ends).await,
                Err(error) => Err(error),
            };
            match report {
                Ok(report) => results.audit_ended(results.take(&report)),
                Err(error) => {
                    say(format_args!("canary: the audit failed: {error:#}"));
                    results.audit_ended("failed");
                }
            }
            let mut ends = load_ends.subscribe();
            // Ends early when the canary does.
            let _ = tokio::time::timeout(repetition.every, ends.wait_for(|ends| *ends)).await;
        }
        let forgotten = tokio::time::timeout(FORGET_DEADLINE, auditor.forget_users()).await;
        if forgotten.is_err() {
            say(format_args!("canary: its users could not be forgotten"));
        }
    };
    let end = async {
        interrupted.await;
        load_ends.send_replace(true);
        std::future::pending::<()>().await;
    };
    tokio::select! { () = audits => {} () = end => {} () = serving => {} }
    Ok(ExitCode::SUCCESS)
}
