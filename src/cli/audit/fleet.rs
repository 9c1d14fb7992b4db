//! The clients of an audit in a process of their own: the JavaScript or the Python library, as this
//! program carries them, proven by the same accounting as the Rust one.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use super::super::terminal::say;
use super::book::Happened;
use super::{Bench, DEVICE};
use crate::library;
use crate::wire::frame::MoveReason;

/// Which library receives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ClientLibrary {
    /// `ringpush-client`, in this process.
    #[default]
    Rust,
    /// `@ringpush/client`, in Node.
    JavaScript,
    /// `ringpush`, in Python.
    Python,
}

impl ClientLibrary {
    /// Parses `rust`, `js` or `python`.
    ///
    /// # Errors
    ///
    /// The rule that `text` breaks.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        match text {
            "rust" => Ok(Self::Rust),
            "js" => Ok(Self::JavaScript),
            "python" => Ok(Self::Python),
            _ => Err("it is rust, js or python"),
        }
    }

    /// What runs it: the name of the program, and that of the script in the directory that
    /// [`unpack`] fills.
    fn program(self) -> (&'static str, &'static str) {
        match self {
            Self::Python => ("python3", "fleet.py"),
            Self::Rust | Self::JavaScript => ("node", "fleet.mjs"),
        }
    }
}

/// The clients' process. Dropping it ends the process and removes its directory.
pub(super) struct Fleet {
    /// Its standard input: the clients close when it does.
    _input: ChildStdin,
    process: Child,
    _directory: Unpacked,
}

/// A directory that goes away.
struct Unpacked(PathBuf);

impl Drop for Unpacked {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Writes the library and its program to a new directory.
fn unpack(clients: ClientLibrary, run: &str) -> Result<Unpacked> {
    let directory = Unpacked(std::env::temp_dir().join(format!("ringpush-audit-{run}")));
    let (below, modules, fleet): (&str, &[(&str, &str)], &str) = match clients {
        ClientLibrary::Python => ("src/ringpush", &library::PYTHON, library::PYTHON_FLEET),
        ClientLibrary::Rust | ClientLibrary::JavaScript => {
            ("src", &library::JAVASCRIPT, library::JAVASCRIPT_FLEET)
        }
    };
    let write =
        |path: &Path, text: &str| std::fs::write(path, text).with_context(|| path.display().to_string());
    let sources = directory.0.join(below);
    std::fs::create_dir_all(&sources).with_context(|| sources.display().to_string())?;
    for (name, text) in modules {
        write(&sources.join(name), text)?;
    }
    // Node takes a `.js` file without this for CommonJS.
    write(&directory.0.join("package.json"), "{\"type\":\"module\"}")?;
    write(&directory.0.join(clients.program().1), fleet)?;
    Ok(directory)
}

impl Fleet {
    /// Starts the process, with one client for each of the users, whose tokens are `tokens`. What
    /// happens to them is written down until the process ends.
    ///
    /// # Errors
    ///
    /// It cannot be started.
    pub(super) async fn start(bench: &Arc<Bench>, tokens: &[String]) -> Result<Self> {
        let clients = bench.plan.clients;
        let directory = unpack(clients, &bench.run)?;
        let (default, script) = clients.program();
        let program = bench.plan.client_program.as_deref().unwrap_or(default);
        let mut process = Command::new(program)
            .arg(directory.0.join(script))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("{program} cannot be started; --client-program names another"))?;
        let no_pipe = || anyhow!("{program} has no standard input or output");
        let mut input = process.stdin.take().ok_or_else(no_pipe)?;
        let output = process.stdout.take().ok_or_else(no_pipe)?;
        let users: Vec<Value> = bench
            .users
            .iter()
            .zip(tokens)
            .map(|(user, token)| json!({"user": user.as_str(), "token": token}))
            .collect();
        let plan = json!({"url": bench.plan.target, "device": DEVICE, "users": users});
        tokio::spawn(listen(Arc::clone(bench), output));
        let said = input.write_all(format!("{plan}\n").as_bytes()).await;
        said.with_context(|| format!("{program} ended at once"))?;
        Ok(Self { _input: input, process, _directory: directory })
    }

    /// Whether the process has ended. It says why on standard error.
    pub(super) fn has_ended(&mut self) -> bool {
        !matches!(self.process.try_wait(), Ok(None))
    }
}

/// Writes down what the clients say, until they end.
async fn listen(bench: Arc<Bench>, output: ChildStdout) {
    let mut lines = BufReader::new(output).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        match parse(&line) {
            Ok((user, Some(happened))) => bench.book.note(user, happened),
            Ok((_, None)) => {}
            Err(fault) => say(format_args!("the clients said {line:?}: {fault}")),
        }
    }
}

#[derive(Deserialize)]
struct Told {
    name: String,
    node: Option<String>,
    /// When moving: where to. The Python library says that as `node`.
    to: Option<String>,
    reason: Option<MoveReason>,
    cause: Option<String>,
}

/// Parses a line of the clients: the user's index, and what happened if it counts.
fn parse(line: &str) -> Result<(usize, Option<Happened>)> {
    let mut parts: Vec<Value> = serde_json::from_str(line)?;
    // The log of a topic, behind what is said of every message.
    let log: Option<String> = match parts.len() {
        5 => parts.pop().map(serde_json::from_value).transpose()?,
        _ => None,
    };
    let (user, kind, first, second): (usize, String, Value, Option<Value>) = match parts.len() {
        3 => {
            let (user, kind, first) = serde_json::from_value(Value::Array(parts))?;
            (user, kind, first, None)
        }
        _ => {
            let (user, kind, first, second) = serde_json::from_value(Value::Array(parts))?;
            (user, kind, first, Some(second))
        }
    };
    let happened = match (kind.as_str(), second) {
        ("message", Some(id)) => {
            Some(Happened::Message(serde_json::from_value(id)?, serde_json::from_value(first)?, log))
        }
        ("gap", Some(before)) => {
            Some(Happened::Gap(serde_json::from_value(first)?, serde_json::from_value(before)?))
        }
        ("state", None) => serde_json::from_value::<Told>(first)?.happened(),
        _ => bail!("neither a message, a gap nor a state"),
    };
    Ok((user, happened))
}

impl Told {
    fn happened(self) -> Option<Happened> {
        let node = self.node.unwrap_or_default();
        match self.name.as_str() {
            "catching-up" => Some(Happened::Welcome(node)),
            "live" => Some(Happened::Live(node)),
            "moving" => {
                let reason = self.reason.or_else(|| serde_json::from_value(self.cause?.into()).ok());
                Some(Happened::Moving(self.to.unwrap_or(node), reason.unwrap_or(MoveReason::Owner)))
            }
            "waiting" | "offline" => Some(Happened::Waiting),
            "stopped" if self.cause.as_deref() != Some("closed") => Some(Happened::Refused(0)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_clients_say_is_read_and_rubbish_is_told() {
        assert!(matches!(
            parse(r#"[3,"message",17,"m-1"]"#).unwrap(),
            (3, Some(Happened::Message(id, 17, None))) if id == "m-1"
        ));
        assert!(matches!(
            parse(r#"[3,"message",17,"m-1","news"]"#).unwrap(),
            (3, Some(Happened::Message(id, 17, Some(log)))) if id == "m-1" && log == "news"
        ));
        assert!(matches!(parse(r#"[0,"gap",1,5]"#).unwrap(), (0, Some(Happened::Gap(1, 5)))));
        let js = parse(r#"[0,"state",{"name":"moving","node":"a","to":"b","reason":"drain"}]"#).unwrap();
        assert!(matches!(js.1, Some(Happened::Moving(to, MoveReason::Drain)) if to == "b"));
        let python = parse(r#"[0,"state",{"name":"moving","node":"b","cause":"owner"}]"#).unwrap();
        assert!(matches!(python.1, Some(Happened::Moving(to, MoveReason::Owner)) if to == "b"));
        assert!(parse(r#"[0,"state",{"name":"connecting"}]"#).unwrap().1.is_none());
        for rubbish in [
            "",
            "{}",
            "[1]",
            r#"[0,"message","x","y"]"#,
            r#"[0,"message",1,"m",7]"#,
            r#"["a","gap",1,2]"#,
            "[0,7,1,2]",
        ] {
            assert!(parse(rubbish).is_err(), "{rubbish}");
        }
    }
}
