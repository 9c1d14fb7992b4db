//! Arguments, signals, exit codes: 0 done, 1 failed at work, 64 bad usage or configuration.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use ringpush::app::{App, Ended, PUSH_NODES_MAX};
use ringpush::cli::audit::{AuditPlan, ClientLibrary, audit};
use ringpush::cli::commands::{self, Addressed};
use ringpush::cli::publish;
use ringpush::cli::terminal::{OutputError, print, print_line, say, say_last};
use ringpush::config::{Config, Faults, Sources};
use ringpush::telemetry::{LogFormat, start_logging};
use ringpush::wire::frame::Since;
use rustix::fs::Mode;
use rustix::io::fcntl_dupfd_cloexec;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit, umask};

/// Messages pass from one thread to another and are freed by the thousand, which mimalloc is good
/// at.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// File descriptors that the kernel's table has room for from the start: half a megabyte.
const FILES_AT_FIRST: u64 = 65_536;

/// `EX_USAGE` of `sysexits.h`: bad usage or configuration.
const USAGE: u8 = 64;

#[derive(Parser)]
#[command(name = "ringpush", version, about, long_about = LONG_ABOUT, after_help = EXAMPLES)]
struct Cli {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Option<Command>,
}

const LONG_ABOUT: &str = "A WebSocket push cluster: post a message for a user, and the user's browser or app has it a \
moment later. Without a command it serves: all roles in one process, an embedded store under ./data, loopback only.";

const EXAMPLES: &str = "Examples:
  ringpush                                   serve, with nothing configured
  ringpush token alice                       print a token for alice
  ringpush listen alice                      print alice's messages as they come
  ringpush publish alice '{\"text\":\"hello\"}'  send one
  ringpush serve --push-nodes 3              three push nodes in one process";

#[derive(Args)]
struct Common {
    /// Configuration file (TOML); see config/local.toml for every key.
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where the embedded store and the development keys are [default: ./data, or RINGPUSH_DATA].
    #[arg(long, global = true, value_name = "DIR")]
    data: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Command {
    /// Run the roles.
    #[command(after_help = "Examples:
  ringpush serve --push-nodes 3
  ringpush serve --config config/cluster.toml --roles push,dispatch")]
    Serve(Serve),
    /// Print a token for a user, alone on its line.
    #[command(after_help = "Example:\n  TOKEN=$(ringpush token alice --ttl 1h)")]
    Token {
        /// The user id.
        user: String,
        /// How long it lives, such as 90s, 15m, 1h, 7d.
        #[arg(long, default_value = "1h")]
        ttl: String,
    },
    /// Publish one JSON payload, or many from standard input.
    #[command(after_help = "Examples:
  ringpush publish alice '{\"text\":\"hello\"}'
  seq 1000 | ringpush publish alice -          one payload per line (NDJSON)")]
    Publish {
        /// The user id.
        user: String,
        /// JSON text, or - to read one payload per line from standard input.
        #[arg(allow_hyphen_values = true)]
        payload: String,
        /// Collect's URL [default: the server of the data directory].
        #[arg(long, value_name = "URL")]
        target: Option<String>,
    },
    /// Connect as a user and print a JSON line per message; follows moves, resumes.
    #[command(after_help = "Examples:
  ringpush listen alice                 what this device has not acked yet, then what comes
  ringpush listen alice --since latest  only what comes from now on")]
    Listen {
        /// The user id.
        user: String,
        /// Start after this seq, or at `latest` [default: the device's own cursor].
        #[arg(long, value_name = "SEQ", value_parser = parse_since)]
        since: Option<Since>,
        /// The device, with a cursor of its own.
        #[arg(long, default_value = "cli")]
        device: String,
        /// A push node's URL, or the load balancer's [default: the server of the data directory].
        #[arg(long, value_name = "URL")]
        target: Option<String>,
    },
    /// Show members, shares and epoch; with a user, its owner.
    Ring {
        /// The user id.
        user: Option<String>,
        /// Collect's URL [default: the server of the data directory].
        #[arg(long, value_name = "URL")]
        target: Option<String>,
    },
    /// Publish to many users, hold their sockets, and account for every message: exits 1 if one is
    /// lost.
    #[command(after_help = "Example:
  ringpush audit --target https://push.example.com --publish http://collect:8081 --users 2000 --rate 500 --for 60s")]
    Audit(AuditOptions),
    /// Work with configurations.
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
}

#[derive(Args)]
struct AuditOptions {
    /// The load balancer's URL, or a push node's [default: the server of the data directory].
    #[arg(long, value_name = "URL")]
    target: Option<String>,
    /// Collect's URL, once or several times [default: the server of the data directory].
    #[arg(long, value_name = "URL", value_delimiter = ',')]
    publish: Vec<String>,
    /// Users, each with one socket.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=20_000))]
    users: u32,
    /// Messages per second, to users at random.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rate: u32,
    /// How long it publishes, such as 60s or 5m.
    #[arg(long = "for", default_value = "60s", value_name = "TIME")]
    time: String,
    /// How long accepted messages may take to arrive after the last publish; longer than a sweep.
    #[arg(long, default_value = "50s", value_name = "TIME")]
    settle: String,
    /// Fail when a message takes longer than this.
    #[arg(long, value_name = "TIME")]
    max_delay: Option<String>,
    /// Seed of the random choice of users [default: random].
    #[arg(long)]
    seed: Option<u64>,
    /// Print one line of JSON.
    #[arg(long)]
    json: bool,
    /// Which client library receives: rust, js (Node 22), python (3.10 or later, with websockets).
    #[arg(long, default_value = "rust", value_name = "LIBRARY", value_parser = ClientLibrary::parse)]
    clients: ClientLibrary,
    /// The Node or Python that runs it [default: node, python3].
    #[arg(long, value_name = "PROGRAM")]
    client_program: Option<String>,
}

#[derive(Args, Default)]
struct Serve {
    /// Which roles run here: auth, collect, dispatch, push.
    #[arg(long, value_name = "ROLES")]
    roles: Option<String>,
    /// Run this many push nodes in this process: push-0, push-1, …
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=PUSH_NODES_MAX as i64))]
    push_nodes: Option<u16>,
    /// How log lines look: text or json.
    #[arg(long, default_value = "text", value_parser = ["text", "json"])]
    log: String,
    /// What is logged, as in RUST_LOG: info, debug, ringpush=debug [default: RUST_LOG, or info].
    #[arg(long, value_name = "FILTER")]
    log_filter: Option<String>,
}

#[derive(Subcommand)]
enum ConfigCommand {
    /// Validate, and print what is in force, without secrets.
    Check {
        /// The file [default: --config, or none].
        file: Option<PathBuf>,
    },
}

fn parse_since(text: &str) -> Result<Since, String> {
    Since::parse(text).map_err(str::to_owned)
}

fn main() -> ExitCode {
    // A huge page is cleared when it is first touched, in 0.2 ms and more, and thousands of small
    // buffers touch many: a third of the sockets accepted per second (docs/benchmarks/log.md). A
    // kernel without huge pages is as good.
    let _ = rustix::thread::disable_transparent_huge_pages(true);
    make_room_for_files();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if error.use_stderr() => {
            say(error.render().ansi());
            return ExitCode::from(USAGE);
        }
        // Help, or the version.
        Err(text) => {
            return print(text.render()).map_or_else(|error| ended(&error.into()), |()| ExitCode::SUCCESS);
        }
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return ended(&anyhow::anyhow!("the runtime cannot start: {error}")),
    };
    let outcome = runtime.block_on(run(cli));
    // Blocking work that is still running has nobody to answer to.
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    outcome.unwrap_or_else(|error| ended(&error))
}

/// Says why a command ended, unless its reader has gone. Returns the exit code.
fn ended(error: &anyhow::Error) -> ExitCode {
    if let Some(faults) = error.downcast_ref::<Faults>() {
        let lines: Vec<String> = faults.0.iter().map(|fault| format!("ringpush: {fault}")).collect();
        say_last(lines.join("\n"));
        return ExitCode::from(USAGE);
    }
    if let Some(OutputError::Closed) = error.downcast_ref() {
        return ExitCode::SUCCESS;
    }
    say_last(format_args!("ringpush: {error:#}"));
    ExitCode::FAILURE
}

/// Raises the limit of open files, and makes room for them in the kernel's table while this process
/// has one thread. Later, each doubling of the table makes every thread that opens a socket wait 10
/// to 50 ms, and a crowd of clients causes ten doublings (docs/benchmarks/log.md). If it fails, the
/// table grows later.
fn make_room_for_files() {
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    let granted = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let last = i32::try_from(granted.min(FILES_AT_FIRST)).unwrap_or(i32::MAX) - 1;
    drop(fcntl_dupfd_cloexec(std::io::stderr(), last));
}

async fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let Cli { common, command } = cli;
    let at = |target: Option<String>| Addressed { target };
    match command {
        None => serve(&common, Serve { log: "text".to_owned(), ..Serve::default() }).await,
        Some(Command::Serve(options)) => serve(&common, options).await,
        Some(Command::Token { user, ttl }) => commands::token(command_config(&common)?, &user, &ttl),
        Some(Command::Publish { user, payload, target }) => {
            publish::publish(command_config(&common)?, at(target), &user, &payload).await
        }
        Some(Command::Listen { user, since, device, target }) => {
            commands::listen(command_config(&common)?, at(target), &user, since, &device).await
        }
        Some(Command::Ring { user, target }) => {
            commands::ring(command_config(&common)?, at(target), user.as_deref()).await
        }
        Some(Command::Audit(options)) => run_audit(command_config(&common)?, options).await,
        Some(Command::Config { command: ConfigCommand::Check { file } }) => {
            let common = Common { config: file.or(common.config), data: common.data };
            let config = Config::load(&sources(&common)?)?;
            print(config.to_toml())?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

async fn run_audit(config: Config, options: AuditOptions) -> anyhow::Result<ExitCode> {
    let time = |name: &str, text: &str| {
        let rule = || Faults(vec![format!("{name}: {text:?} must be a time such as 90s, 15m or 1h")]);
        commands::seconds(text).filter(|s| *s > 0).map(std::time::Duration::from_secs).ok_or_else(rule)
    };
    let plan = AuditPlan {
        target: Addressed { target: options.target }.url(&config, "push")?,
        publish: if options.publish.is_empty() {
            vec![Addressed { target: None }.url(&config, "collect")?]
        } else {
            let checked = options
                .publish
                .into_iter()
                .map(|url| Addressed { target: Some(url) }.url(&config, "collect"));
            checked.collect::<anyhow::Result<_>>()?
        },
        users: options.users as usize,
        rate: f64::from(options.rate),
        time: time("--for", &options.time)?,
        settle: time("--settle", &options.settle)?,
        max_delay: options.max_delay.as_deref().map(|text| time("--max-delay", text)).transpose()?,
        seed: options.seed.unwrap_or_else(rand::random),
        json: options.json,
        clients: options.clients,
        client_program: options.client_program,
    };
    audit(config, plan).await
}

/// The configuration of a command that is not the server. Each command says itself which key it
/// lacks.
fn command_config(common: &Common) -> Result<Config, Faults> {
    Config::load(&Sources { for_command: true, ..sources(common)? })
}

/// All sources of the configuration.
fn sources(common: &Common) -> Result<Sources, Faults> {
    let mut sources = Sources::of_process(common.config.as_deref())?;
    if let Some((_, data)) = sources.environment.iter().find(|(name, _)| name == "RINGPUSH_DATA") {
        sources.flags.push(("data.dir", data.clone()));
    }
    if let Some(data) = &common.data {
        sources.flags.push(("data.dir", data.display().to_string()));
    }
    Ok(sources)
}

async fn serve(common: &Common, options: Serve) -> anyhow::Result<ExitCode> {
    ignore_other_signals()?;
    // Messages and keys are only for their owner.
    umask(Mode::RWXG | Mode::RWXO);
    let mut sources = sources(common)?;
    sources.flags.extend(options.roles.map(|roles| ("node.roles", roles)));
    let config = Config::load(&sources)?;
    let format = if options.log == "json" { LogFormat::Json } else { LogFormat::Text };
    let filter =
        options.log_filter.or_else(|| std::env::var("RUST_LOG").ok()).unwrap_or_else(|| "info".to_owned());
    let _logging =
        start_logging(format, &filter).map_err(|error| Faults(vec![format!("--log-filter: {error}")]))?;
    // Before anything is bound, so that an early signal is not lost.
    let stop = stop_signal()?;
    let development = config.development;
    let mut stop = std::pin::pin!(stop);
    let app = tokio::select! {
        started = App::start(config, options.push_nodes.map(usize::from)) => started?,
        // Nothing was accepted yet.
        () = &mut stop => return Ok(ExitCode::SUCCESS),
    };
    if development {
        // The server runs, even if nobody reads the greeting.
        let _ = print_line(app.greeting(&commands::own_command(common.data.as_deref())));
    }
    match app.run(stop).await? {
        Ended::Stopped => Ok(ExitCode::SUCCESS),
        Ended::Poisoned => {
            anyhow::bail!(
                "the store failed and this process must end; see the log, and whether the disk is full"
            )
        }
    }
}

/// Ignores signals that have no meaning yet and would end the process without a drain. SIGXFSZ
/// comes when a log file has reached its size limit; the write fails then, which is handled.
fn ignore_other_signals() -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let file_size = SignalKind::from_raw(rustix::process::Signal::XFSZ.as_raw());
    for kind in [SignalKind::hangup(), SignalKind::user_defined1(), SignalKind::user_defined2(), file_size] {
        // The handler stays installed after the stream is dropped.
        drop(signal(kind)?);
    }
    Ok(())
}

/// Resolves at the first SIGTERM or SIGINT; the second ends the process at once.
fn stop_signal() -> anyhow::Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! { _ = terminate.recv() => {} _ = interrupt.recv() => {} }
        tracing::info!("leaving; a second signal ends this at once");
        tokio::spawn(async move {
            tokio::select! { _ = terminate.recv() => {} _ = interrupt.recv() => {} }
            std::process::exit(1);
        });
    })
}
