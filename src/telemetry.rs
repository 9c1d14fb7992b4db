//! Logs, metrics and health of the process. None of them contains a token or a payload.

mod audit;
pub mod process;
mod recent;
mod timings;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io::{self, IsTerminal};
use std::sync::atomic::AtomicI64;
use std::sync::{Arc, LazyLock, OnceLock, mpsc};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
pub use prometheus_client::metrics::counter::Counter;
pub use prometheus_client::metrics::family::Family;
pub use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tracing_subscriber::EnvFilter;

pub use audit::{AUDIT, audit};
pub use recent::Recent;
pub use timings::{Outcome, Path, Timing, TimingBy};

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// These crates write whole frames and headers into their most verbose lines, and with them
/// payloads and tokens.
const NEVER_VERBOSE: &str =
    "tungstenite=info,tokio_tungstenite=info,hyper=info,hyper_util=info,fjall=warn,lsm_tree=warn";

/// Log lines that wait to be written, about 250 bytes each: 8 MB. When the reader of standard error
/// stops reading, this much memory is used, and further lines are dropped.
const LOG_LINES_MAX: usize = 32_768;
/// How long writing the last lines may take when the process ends.
const LAST_LINES: Duration = Duration::from_secs(1);

/// Takes the lines of the audit log, once logging was started.
static AUDIT_LINES: OnceLock<LogQueue> = OnceLock::new();

/// Log lines that were dropped. A process has one standard error, and so one counter.
static LINES_DROPPED: LazyLock<Counter> = LazyLock::new(Counter::default);

/// Writes the log on a thread of its own. Standard error may be a pipe whose reader has gone or
/// stopped reading, or a file on a full disk. A line that cannot be written is dropped and counted;
/// nothing else is affected.
#[derive(Clone)]
struct LogQueue(mpsc::SyncSender<Vec<u8>>);

impl io::Write for LogQueue {
    /// Takes one whole line from the formatter. Never fails.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.0.try_send(line.to_vec()).is_err() {
            LINES_DROPPED.inc();
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Keeps logging alive. Dropping it waits up to a second for the last lines.
#[must_use]
pub struct Logging {
    queue: LogQueue,
    written: mpsc::Receiver<()>,
}

impl Drop for Logging {
    fn drop(&mut self) {
        // An empty line tells the writer to end. If the queue is full, the reader of the log has
        // stopped reading.
        if self.queue.0.try_send(Vec::new()).is_ok() {
            let _ = self.written.recv_timeout(LAST_LINES);
        }
    }
}

/// Starts the thread that writes log lines to `out`.
fn write_lines(mut out: impl io::Write + Send + 'static) -> io::Result<Logging> {
    let (queue, lines) = mpsc::sync_channel::<Vec<u8>>(LOG_LINES_MAX);
    let (done, written) = mpsc::sync_channel(1);
    std::thread::Builder::new().name("log".to_owned()).spawn(move || {
        while let Ok(line) = lines.recv() {
            if line.is_empty() {
                break;
            }
            if out.write_all(&line).is_err() {
                LINES_DROPPED.inc();
            }
        }
        let _ = done.send(());
    })?;
    Ok(Logging { queue: LogQueue(queue), written })
}

/// Starts logging to standard error. `filter` has the syntax of `RUST_LOG`, such as `info` or
/// `ringpush=debug`.
///
/// # Errors
///
/// The filter is wrong, the thread cannot be started, or logging was started before.
pub fn start_logging(format: LogFormat, filter: &str) -> anyhow::Result<(Logging, SetLogFilter)> {
    let filter = filter_of(filter)?;
    let logging = write_lines(io::stderr())?;
    let queue = logging.queue.clone();
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(move || queue.clone())
        .with_target(false)
        // tracing would report its own errors to standard error by a macro that panics when that
        // fails.
        .log_internal_errors(false);
    let (started, set): (_, SetFilter) = match format {
        LogFormat::Text => {
            let builder = builder.with_ansi(io::stderr().is_terminal()).with_filter_reloading();
            let handle = builder.reload_handle();
            let set = move |filter| handle.reload(filter).map_err(|error| error.to_string());
            (builder.try_init(), Box::new(set))
        }
        LogFormat::Json => {
            let builder = builder.json().flatten_event(true).with_filter_reloading();
            let handle = builder.reload_handle();
            let set = move |filter| handle.reload(filter).map_err(|error| error.to_string());
            (builder.try_init(), Box::new(set))
        }
    };
    started.map_err(|error| anyhow::anyhow!("logging was started before: {error}"))?;
    let _ = AUDIT_LINES.set(logging.queue.clone());
    let set = move |filter: &str| set(filter_of(filter).map_err(|error| error.to_string())?);
    Ok((logging, Box::new(set)))
}

type SetFilter = Box<dyn Fn(EnvFilter) -> Result<(), String> + Send>;
/// Replaces the filter of the log. An error says what is wrong with the text.
pub type SetLogFilter = Box<dyn Fn(&str) -> Result<(), String> + Send>;

/// The directives of a filter, as one text without spaces and empty ones.
fn directives(text: &str) -> String {
    let all = text.split(',').map(str::trim).filter(|directive| !directive.is_empty());
    all.collect::<Vec<_>>().join(",")
}

/// What is wrong with the filter of a log, if anything: a level, or directives as in `RUST_LOG`. A
/// word that is no level would be taken for a target, and the log would be silent.
#[must_use]
pub fn log_filter_fault(text: &str) -> Option<String> {
    const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
    let directives = directives(text);
    let is_level = |word: &str| LEVELS.iter().any(|level| word.eq_ignore_ascii_case(level));
    let is_word = |text: &str| text.bytes().all(|b| b.is_ascii_alphabetic() || b"_-".contains(&b));
    let is_no_level = |text: &&str| is_word(text) && !is_level(text) && !text.starts_with("ringpush");
    let why = match directives.split(',').find(is_no_level) {
        Some(word) => format!("{word:?} is no level"),
        None => EnvFilter::try_new(&directives).err()?.to_string(),
    };
    Some(format!(
        "{why}: give a level ({}), or directives TARGET=LEVEL with commas between, such as info,ringpush::way=debug",
        LEVELS.join(", ")
    ))
}

fn filter_of(text: &str) -> anyhow::Result<EnvFilter> {
    if let Some(fault) = log_filter_fault(text) {
        anyhow::bail!(fault);
    }
    Ok(EnvFilter::try_new(format!("{AUDIT}=info,{},{NEVER_VERBOSE}", directives(text)))?)
}

/// The target of the log lines that follow one user's messages through all processes:
/// `RUST_LOG=ringpush::way=debug`.
pub const WAY: &str = "ringpush::way";

/// Sets gauges.
type Read = Box<dyn Fn() + Send>;

/// All metrics of the process. Their names begin with `ringpush_`.
#[derive(Clone)]
pub struct Metrics {
    registry: Arc<Mutex<Registry>>,
    /// What is to be read when the metrics are asked for.
    reads: Arc<Mutex<Vec<Read>>>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("ringpush");
        let dropped = LINES_DROPPED.clone();
        registry.register("log_lines_dropped", "Log lines that could not be written", dropped);
        Self { registry: Arc::new(Mutex::new(registry)), reads: Arc::default() }
    }
}

impl Metrics {
    /// Calls `register` with the registry, so that a module can add its metrics.
    pub fn register<T>(&self, register: impl FnOnce(&mut Registry) -> T) -> T {
        register(&mut self.registry.lock())
    }

    /// Calls `read` each time before the metrics are shown, so that it can set gauges.
    pub fn before_each_look(&self, read: impl Fn() + Send + 'static) {
        self.reads.lock().push(Box::new(read));
    }

    /// The content type and the text of the exposition, in the format of OpenMetrics 1.0.
    #[must_use]
    pub fn expose(&self) -> (&'static str, String) {
        self.reads.lock().iter().for_each(|read| read());
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = prometheus_client::encoding::text::encode(&mut text, &self.registry.lock());
        ("application/openmetrics-text; version=1.0.0; charset=utf-8", text)
    }

    /// The same in the text format of Prometheus 0.0.4, for whoever does not ask for OpenMetrics.
    #[must_use]
    pub fn expose_plain(&self) -> (&'static str, String) {
        ("text/plain; version=0.0.4; charset=utf-8", plain(&self.expose().1))
    }
}

/// What OpenMetrics says, in the older format: there the name of a counter ends in `_total` also
/// where it is described, and no line says that this is the end.
fn plain(open: &str) -> String {
    let counters: BTreeSet<&str> =
        open.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" counter")).collect();
    let mut text = String::with_capacity(open.len() + counters.len() * 16);
    for line in open.lines() {
        let described = line.strip_prefix("# ").and_then(|line| line.split_once(' '));
        let Some((kind, rest)) = described.filter(|(kind, _)| ["HELP", "TYPE"].contains(kind)) else {
            if !line.starts_with('#') {
                text.push_str(line);
                text.push('\n');
            }
            continue;
        };
        let (name, said) = rest.split_once(' ').unwrap_or((rest, ""));
        let suffix = if counters.contains(name) { "_total" } else { "" };
        // Writing to a string cannot fail.
        let _ = writeln!(text, "# {kind} {name}{suffix} {said}");
    }
    text
}

/// A kind of credential, or what is checked like one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Credential {
    /// The key of a publisher, at collect.
    ApiKey,
    /// The key that may issue tokens, at auth.
    AdminKey,
    /// The token of a user.
    Token,
    /// A ticket of `connect`.
    Ticket,
    /// The proof of another role.
    PeerProof,
    /// The certificate of another role.
    PeerCertificate,
    /// The origin of a web page.
    Origin,
}

impl Credential {
    const ALL: [Self; 7] = [
        Self::ApiKey,
        Self::AdminKey,
        Self::Token,
        Self::Ticket,
        Self::PeerProof,
        Self::PeerCertificate,
        Self::Origin,
    ];

    /// The name in metrics and log lines.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ApiKey => "api_key",
            Self::AdminKey => "admin_key",
            Self::Token => "token",
            Self::Ticket => "ticket",
            Self::PeerProof => "peer_proof",
            Self::PeerCertificate => "peer_certificate",
            Self::Origin => "origin",
        }
    }
}

/// Shortest time between two warnings about one kind.
const WARN_EVERY: Duration = Duration::from_secs(1);

/// Counts refused credentials by kind, and warns about each kind at most once a second. Cheap to
/// clone.
#[derive(Clone, Default)]
pub struct Refusals {
    counts: Family<[(&'static str, &'static str); 1], Counter>,
    warned: Arc<Mutex<[Warned; Credential::ALL.len()]>>,
}

/// The time of the last warning about a kind, and how many were refused since.
#[derive(Clone, Copy, Default)]
struct Warned {
    at: Option<Instant>,
    since: u64,
}

impl Refusals {
    /// Registers the counters.
    #[must_use]
    pub fn register(metrics: &Metrics) -> Self {
        let this = Self::default();
        let counts = this.counts.clone();
        metrics.register(|r| r.register("credentials_refused", "Credentials refused, by kind", counts));
        for kind in Credential::ALL {
            // Shown from the start, so that a rate can be computed from the first refusal.
            drop(this.counts.get_or_create(&[("kind", kind.as_str())]));
        }
        this
    }

    /// Counts one refusal. `why` must not contain any part of the credential.
    pub fn note(&self, kind: Credential, why: &str) {
        self.counts.get_or_create(&[("kind", kind.as_str())]).inc();
        if let Some(refused) = self.to_warn_of(kind, Instant::now()) {
            tracing::warn!(kind = kind.as_str(), why, refused, "credentials are refused");
        }
    }

    /// How many were refused since the last warning, if another warning is due.
    fn to_warn_of(&self, kind: Credential, now: Instant) -> Option<u64> {
        let mut warned = self.warned.lock();
        let warned = &mut warned[kind as usize];
        warned.since += 1;
        if warned.at.is_some_and(|at| now.saturating_duration_since(at) < WARN_EVERY) {
            return None;
        }
        warned.at = Some(now);
        Some(std::mem::take(&mut warned.since))
    }
}

/// Counts one in a gauge as long as it lives.
pub struct Counted(Gauge<i64, AtomicI64>);

impl Counted {
    /// Raises the gauge by one until the value is dropped.
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

/// What `/readyz` reports: named conditions.
#[derive(Clone, Default)]
pub struct Health {
    conditions: Arc<Mutex<BTreeMap<&'static str, Condition>>>,
}

/// One condition of [`Health`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Condition {
    /// Whether the condition holds.
    pub ok: bool,
    /// Whether the process is not ready while the condition does not hold.
    pub required: bool,
    /// An explanation for people.
    pub detail: String,
}

impl Health {
    /// Shows each condition as a gauge.
    pub fn register(&self, metrics: &Metrics) {
        let shown: Family<[(&'static str, &'static str); 1], Gauge> = Family::default();
        let family = shown.clone();
        let help = "Whether a condition of /readyz holds";
        metrics.register(|r| r.register("ready", help, family));
        let health = self.clone();
        metrics.before_each_look(move || {
            for (name, condition) in health.report().1 {
                shown.get_or_create(&[("condition", name)]).set(i64::from(condition.ok));
            }
        });
    }

    /// Sets a condition that readiness depends on.
    pub fn set(&self, name: &'static str, ok: bool, detail: impl Into<String>) {
        let condition = Condition { ok, required: true, detail: detail.into() };
        self.conditions.lock().insert(name, condition);
    }

    /// Sets a condition that is only shown.
    pub fn note(&self, name: &'static str, ok: bool, detail: impl Into<String>) {
        let condition = Condition { ok, required: false, detail: detail.into() };
        self.conditions.lock().insert(name, condition);
    }

    /// Whether every required condition holds, and all conditions.
    #[must_use]
    pub fn report(&self) -> (bool, BTreeMap<&'static str, Condition>) {
        let conditions = self.conditions.lock().clone();
        (conditions.values().all(|condition| condition.ok || !condition.required), conditions)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// Takes what is written, as long as it may.
    struct Paper {
        lines: mpsc::SyncSender<Vec<u8>>,
        torn: bool,
    }

    impl Write for Paper {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if std::mem::replace(&mut self.torn, false) {
                return Err(io::ErrorKind::StorageFull.into());
            }
            // Blocks while nobody reads.
            self.lines.send(bytes.to_vec()).map_err(|_| io::ErrorKind::BrokenPipe)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn counters_have_their_whole_name_in_the_older_format() {
        let open = "# HELP a_b Some.\n# TYPE a_b counter\na_b_total{x=\"# TYPE\"} 1\n# HELP c Other.\n\
                    # TYPE c gauge\n# UNIT c seconds\nc 2\n# EOF\n";
        let plain_text = "# HELP a_b_total Some.\n# TYPE a_b_total counter\na_b_total{x=\"# TYPE\"} 1\n\
                          # HELP c Other.\n# TYPE c gauge\nc 2\n";
        assert_eq!(plain(open), plain_text);
        let (kind, text) = Metrics::default().expose_plain();
        assert!(kind.starts_with("text/plain; version=0.0.4"));
        assert!(text.contains("# TYPE ringpush_log_lines_dropped_total counter"), "{text}");
    }

    #[test]
    fn a_line_that_cannot_be_written_is_dropped_and_counted_and_nobody_waits_for_it() {
        let (lines, read) = mpsc::sync_channel(0);
        let before = LINES_DROPPED.get();
        let logging = write_lines(Paper { lines, torn: true }).unwrap();
        let mut queue = logging.queue.clone();
        // The first meets a full disk; then one is being written, for ever, and the queue fills up
        // behind it.
        queue.write_all(b"0").unwrap();
        for n in 0..LOG_LINES_MAX + 100 {
            queue.write_all(format!("{n} ").as_bytes()).unwrap();
        }
        let dropped = LINES_DROPPED.get() - before;
        assert!((99..=101).contains(&dropped), "{dropped}");
        assert_eq!(read.recv().unwrap(), b"0 ", "the one after it is written when there is room");
        let began = std::time::Instant::now();
        drop(logging);
        assert!(began.elapsed() < LAST_LINES * 5, "the end does not wait for a reader that has stopped");
    }

    #[test]
    fn refusals_are_counted_by_kind_and_warned_of_once_a_second() {
        let metrics = Metrics::default();
        let refusals = Refusals::register(&metrics);
        let begin = Instant::now();
        let due = |kind, ms| refusals.to_warn_of(kind, begin + Duration::from_millis(ms));
        assert_eq!(due(Credential::Token, 0), Some(1));
        assert!((0..50).all(|n| due(Credential::Token, n * 10).is_none()));
        assert_eq!(due(Credential::Ticket, 500), Some(1), "another kind");
        assert_eq!(due(Credential::Token, 1_000), Some(51));
        for kind in Credential::ALL {
            refusals.note(kind, "a test");
        }
        let text = metrics.expose().1;
        for kind in Credential::ALL {
            let line = format!("ringpush_credentials_refused_total{{kind=\"{}\"}} 1", kind.as_str());
            assert!(text.contains(&line), "{text}");
        }
    }

    #[test]
    fn the_last_lines_are_written_before_the_end() {
        let (lines, read) = mpsc::sync_channel(1_000);
        let logging = write_lines(Paper { lines, torn: false }).unwrap();
        for n in 0..100 {
            logging.queue.clone().write_all(&[n]).unwrap();
        }
        drop(logging);
        assert_eq!(read.try_iter().count(), 100);
    }
}
