//! Output of the commands. Standard output and standard error may be a pipe whose reader has gone,
//! or a file on a full disk; the macros of the standard library panic then.

use std::fmt::Display;
use std::io::{self, Write};
use std::time::Duration;

/// Standard output took no more.
#[derive(Debug, thiserror::Error)]
pub enum OutputError {
    /// Its reader has gone and wants no more: the command ends quietly.
    #[error("nobody reads standard output any more")]
    Closed,
    /// It cannot be written, as on a full disk.
    #[error("standard output cannot be written: {0}")]
    Failed(io::Error),
}

/// Writes text to standard output.
///
/// # Errors
///
/// [`OutputError`].
pub fn print(text: impl Display) -> Result<(), OutputError> {
    let mut out = io::stdout().lock();
    write!(out, "{text}").and_then(|()| out.flush()).map_err(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => OutputError::Closed,
        _ => OutputError::Failed(error),
    })
}

/// Writes a line to standard output.
///
/// # Errors
/// [`OutputError`].
pub fn print_line(text: impl Display) -> Result<(), OutputError> {
    print(format_args!("{text}\n"))
}

/// Writes a line for people to standard error. A failure is ignored, because there is nobody to
/// tell.
pub fn say(text: impl Display) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Like [`say`], for the last line of a process, which ends even if nobody reads it.
pub fn say_last(text: impl Display) {
    let text = text.to_string();
    let (done, written) = std::sync::mpsc::sync_channel(1);
    let writing = move || {
        say(text);
        let _ = done.send(());
    };
    if std::thread::Builder::new().name("say".to_owned()).spawn(writing).is_ok() {
        let _ = written.recv_timeout(PATIENCE);
    }
}

/// How long writing the last line may take.
const PATIENCE: Duration = Duration::from_secs(1);
