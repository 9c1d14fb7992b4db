//! What is told about the process: logs, metrics and health. A token or a payload is in none of them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicI64;

use parking_lot::Mutex;
pub use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tracing_subscriber::EnvFilter;

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// These write whole frames and headers into their most verbose lines, and with them payloads and tokens.
const NEVER_VERBOSE: &str =
    "tungstenite=info,tokio_tungstenite=info,hyper=info,hyper_util=info,fjall=warn,lsm_tree=warn";

/// Starts logging to standard error; `filter` is as in `RUST_LOG`, such as `info` or `ringpush=debug`.
///
/// # Errors
/// The filter's fault, or that logging was started before.
pub fn start_logging(format: LogFormat, filter: &str) -> anyhow::Result<()> {
    let builder = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::try_new(format!("{filter},{NEVER_VERBOSE}"))?)
        .with_writer(std::io::stderr)
        .with_target(false);
    let started = match format {
        LogFormat::Text => builder.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    started.map_err(|error| anyhow::anyhow!("logging was started before: {error}"))
}

/// The target of the log lines that follow one user's messages through all processes: `RUST_LOG=ringpush::way=debug`.
pub const WAY: &str = "ringpush::way";

/// All metrics of the process, their names beginning `ringpush_`.
#[derive(Clone)]
pub struct Metrics {
    registry: Arc<Mutex<Registry>>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self { registry: Arc::new(Mutex::new(Registry::with_prefix("ringpush"))) }
    }
}

impl Metrics {
    /// Lets a room register its own.
    pub fn register<T>(&self, register: impl FnOnce(&mut Registry) -> T) -> T {
        register(&mut self.registry.lock())
    }

    /// The exposition text, and its content type.
    #[must_use]
    pub fn expose(&self) -> (&'static str, String) {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = prometheus_client::encoding::text::encode(&mut text, &self.registry.lock());
        ("application/openmetrics-text; version=1.0.0; charset=utf-8", text)
    }
}

/// Counts one while it lives: a gauge that goes up always comes down.
pub struct Counted(Gauge<i64, AtomicI64>);

impl Counted {
    /// One more.
    #[must_use]
    pub fn in_gauge(gauge: &Gauge<i64, AtomicI64>) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// What `/readyz` answers from: named conditions, each with whether it holds and a word for a person.
#[derive(Clone, Default)]
pub struct Health {
    conditions: Arc<Mutex<BTreeMap<&'static str, Condition>>>,
}

/// One of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Condition {
    /// Whether it holds.
    pub holds: bool,
    /// Whether the process is not ready while it does not.
    pub decides: bool,
    /// For a person.
    pub word: String,
}

impl Health {
    /// States a condition without which the process is not ready.
    pub fn set(&self, name: &'static str, holds: bool, word: impl Into<String>) {
        let condition = Condition { holds, decides: true, word: word.into() };
        self.conditions.lock().insert(name, condition);
    }

    /// States a condition that is worth knowing, and decides nothing.
    pub fn note(&self, name: &'static str, holds: bool, word: impl Into<String>) {
        let condition = Condition { holds, decides: false, word: word.into() };
        self.conditions.lock().insert(name, condition);
    }

    /// Whether every condition that decides holds, and all of them.
    #[must_use]
    pub fn report(&self) -> (bool, BTreeMap<&'static str, Condition>) {
        let conditions = self.conditions.lock().clone();
        (conditions.values().all(|condition| condition.holds || !condition.decides), conditions)
    }
}
