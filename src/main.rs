//! Signals and exit codes: 0 done, 1 failed at work, 64 bad usage or configuration.

use std::process::ExitCode;

use clap::Parser;
use ringpush::app::{App, Ended, Reloader};
use ringpush::cli::audit::{AuditPlan, Repetition, TopicPlan, audit, canary};
use ringpush::cli::commands::{self, Addressed};
use ringpush::cli::options::{AuditOptions, Cli, Command, Common, ConfigCommand, Serve};
use ringpush::cli::publish::{self, Recipient};
use ringpush::cli::terminal::{OutputError, print, print_line, say, say_last};
use ringpush::cli::topic;
use ringpush::config::{Config, Faults, Sources};
use ringpush::telemetry::{LogFormat, start_logging};
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
/// Time between two looks at the configuration and its files.
const RELOAD_EVERY: std::time::Duration = std::time::Duration::from_secs(10);

/// Whom a publish is for, and its payload.
fn recipient(
    mut words: Vec<String>,
    topics: Vec<String>,
    everyone: bool,
) -> Result<(Recipient, String), Faults> {
    match (words.pop(), words.pop(), topics.is_empty() && !everyone) {
        (Some(payload), None, false) if everyone => Ok((Recipient::Everyone, payload)),
        (Some(payload), Some(user), true) => Ok((Recipient::User(user), payload)),
        (Some(payload), None, false) => Ok((Recipient::Topics(topics), payload)),
        (_, _, true) => Err(Faults(vec!["PAYLOAD: is missing: ringpush publish USER PAYLOAD".to_owned()])),
        (_, _, false) => {
            let rule = "USER: is not for --topic and --everyone: ringpush publish --topic TOPIC PAYLOAD";
            Err(Faults(vec![rule.to_owned()]))
        }
    }
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
        None => Box::pin(serve(&common, Serve { log: "text".to_owned(), ..Serve::default() })).await,
        Some(Command::Serve(options)) => Box::pin(serve(&common, options)).await,
        Some(Command::Token { user, ttl, watch }) => {
            commands::token(command_config(&common)?, &user, &ttl, &watch)
        }
        Some(Command::Publish { words, topic, everyone, target }) => {
            let (recipient, payload) = recipient(words, topic, everyone)?;
            publish::publish(command_config(&common)?, at(target), &recipient, &payload).await
        }
        Some(Command::Topic { command, target }) => {
            topic::topic(command_config(&common)?, at(target), command.command()?).await
        }
        Some(Command::Listen { user, since, device, watch, target }) => {
            commands::listen(command_config(&common)?, at(target), &user, since, &device, &watch).await
        }
        Some(Command::Ring { user, target }) => {
            commands::ring(command_config(&common)?, at(target), user.as_deref()).await
        }
        Some(Command::Audit(options)) => run_audit(&common, options).await,
        Some(Command::Config { command: ConfigCommand::Check { file } }) => {
            let common = Common { config: file.or(common.config), data: common.data };
            let config = Config::load(&sources(&common)?)?;
            print(config.to_toml())?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

async fn run_audit(common: &Common, options: AuditOptions) -> anyhow::Result<ExitCode> {
    let config = command_config(common)?;
    let time = |name: &str, text: &str| {
        let rule = || Faults(vec![format!("{name}: {text:?} must be a time such as 90s, 15m or 1h")]);
        commands::seconds(text).filter(|s| *s > 0).map(std::time::Duration::from_secs).ok_or_else(rule)
    };
    if options.topics > 0 && options.members > options.users {
        let rule = format!("--members: {} must be at most --users, {}", options.members, options.users);
        return Err(Faults(vec![rule]).into());
    }
    let topics = (options.topics > 0).then_some(TopicPlan {
        topics: options.topics as usize,
        members: options.members as usize,
        rate: f64::from(options.topic_rate),
    });
    let plan = AuditPlan {
        topics,
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
    let stop = stop_signal()?;
    match (options.every, options.metrics) {
        (Some(every), Some(metrics)) => {
            // It runs as long as the cluster.
            let _hangup = outlive_signals()?;
            let repetition = Repetition { every: time("--every", &every)?, metrics };
            canary(|| Ok(command_config(common)?), plan, repetition, stop).await
        }
        _ => audit(config, plan, stop).await,
    }
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
    let hangup = outlive_signals()?;
    // Messages and keys are only for their owner.
    umask(Mode::RWXG | Mode::RWXO);
    let mut sources = sources(common)?;
    sources.flags.extend(options.roles.clone().map(|roles| ("node.roles", roles)));
    let config = Config::load(&sources)?;
    let format = if options.log == "json" { LogFormat::Json } else { LogFormat::Text };
    // They cannot change, and stand above the configuration.
    let by_flag = options.log_filter.map(|filter| ("--log-filter", filter));
    // An empty variable says nothing.
    let variable = std::env::var("RUST_LOG").ok().filter(|filter| !filter.trim().is_empty());
    let fixed = by_flag.or(variable.map(|filter| ("RUST_LOG", filter)));
    let (name, filter) = match &fixed {
        Some((name, filter)) => (*name, filter),
        None => ("log.level", &config.log_level),
    };
    let (_logging, set_log_level) =
        start_logging(format, filter).map_err(|error| Faults(vec![format!("{name}: {error}")]))?;
    // Before anything is bound, so that an early signal is not lost.
    let stop = stop_signal()?;
    let development = config.development;
    let mut stop = std::pin::pin!(stop);
    let mut app = tokio::select! {
        started = App::start(config, options.push_nodes.map(usize::from)) => started?,
        // Nothing was accepted yet.
        () = &mut stop => return Ok(ExitCode::SUCCESS),
    };
    if development {
        // The server runs, even if nobody reads the greeting.
        let _ = print_line(app.greeting(&commands::own_command(common.data.as_deref())));
    }
    let reloader = app.take_reloader();
    let reloading = async {
        match reloader {
            Some(mut reloader) => {
                if fixed.is_none() {
                    reloader.sets_log_level(set_log_level);
                }
                reload(reloader, hangup, common.clone(), options.roles).await
            }
            None => std::future::pending().await,
        }
    };
    let ended = tokio::select! {
        ended = app.run(stop) => ended?,
        // A panic of it is one of the process.
        never = reloading => match never {},
    };
    match ended {
        Ended::Stopped => Ok(ExitCode::SUCCESS),
        Ended::Poisoned => {
            anyhow::bail!(
                "the store failed and this process must end; see the log, and whether the disk is full"
            )
        }
    }
}

/// Reads the configuration and its files again at each SIGHUP, and every ten seconds.
async fn reload(
    mut reloader: Reloader,
    mut hangup: tokio::signal::unix::Signal,
    common: Common,
    roles: Option<String>,
) -> std::convert::Infallible {
    loop {
        tokio::select! {
            _ = hangup.recv() => {}
            () = tokio::time::sleep(RELOAD_EVERY) => {}
        }
        reloader.apply(sources(&common).and_then(|mut sources| {
            sources.flags.extend(roles.clone().map(|roles| ("node.roles", roles)));
            Config::load(&sources)
        }));
    }
}

/// Ignores signals that have no meaning yet and would end the process without a drain. SIGXFSZ
/// comes when a log file has reached its size limit; the write fails then, which is handled.
/// Returns the stream of SIGHUP, which ends nothing from now on either.
fn outlive_signals() -> anyhow::Result<tokio::signal::unix::Signal> {
    use tokio::signal::unix::{SignalKind, signal};
    let hangup = signal(SignalKind::hangup())?;
    let file_size = SignalKind::from_raw(rustix::process::Signal::XFSZ.as_raw());
    for kind in [SignalKind::user_defined1(), SignalKind::user_defined2(), file_size] {
        // The handler stays installed after the stream is dropped.
        drop(signal(kind)?);
    }
    Ok(hangup)
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
