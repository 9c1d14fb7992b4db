//! The examples of the README, as they are printed, run as programs.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;

use super::{DEADLINE, root, tool};

/// The language of an example.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Language {
    JavaScript,
    Python,
    Rust,
}

/// A program that prints a line per message; killed when it is dropped.
pub struct Program {
    child: Child,
    lines: mpsc::Receiver<String>,
    /// Kept as long as the program runs.
    #[allow(dead_code)]
    directory: Option<tempfile::TempDir>,
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An example of the Rust library, which `cargo test` builds beside the tests.
pub fn built(example: &str) -> PathBuf {
    let tests = std::env::current_exe().unwrap();
    let path = tests.parent().and_then(|deps| deps.parent()).unwrap().join("examples").join(example);
    assert!(path.exists(), "{} is not there: cargo build --workspace --examples", path.display());
    path
}

impl Program {
    /// Starts a program.
    pub fn start(command: &mut Command) -> Self {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let (tell, lines) = mpsc::channel();
        std::thread::spawn(move || output.lines().map_while(Result::ok).try_for_each(|line| tell.send(line)));
        Self { child, lines, directory: None }
    }

    /// Starts the example of the README, which is written for alice.
    pub fn example(language: Language, url: &str, token: &str, user: &str) -> Self {
        let (fence, name) = match language {
            Language::JavaScript => ("```js\n", "example.mjs"),
            Language::Python => ("```python\n", "example.py"),
            Language::Rust => ("```rust\n", "example.rs"),
        };
        let text = std::fs::read_to_string(root().join("README.md")).unwrap();
        let (_, rest) = text.split_once(fence).expect("an example");
        let (example, _) = rest.split_once("```").unwrap();
        let lines = example.lines().filter(|line| !line.trim().is_empty()).count();
        assert!(lines < 12, "{language:?}: {lines} lines");
        let directory = tempfile::tempdir().unwrap();
        let script = directory.path().join(name);
        std::fs::write(&script, example.replace("'alice'", &format!("'{user}'"))).unwrap();
        let mut command = match language {
            Language::JavaScript => {
                // Where `npm install @ringpush/client ws` has put them.
                let modules = directory.path().join("node_modules");
                std::fs::create_dir_all(modules.join("@ringpush")).unwrap();
                let link = |from: PathBuf, to: PathBuf| {
                    std::os::unix::fs::symlink(from.canonicalize().unwrap(), to).unwrap();
                };
                link(root().join("clients/javascript"), modules.join("@ringpush/client"));
                link(tool("node_modules/ws"), modules.join("ws"));
                Command::new("node")
            }
            Language::Python => {
                let mut command = Command::new(tool("venv/bin/python"));
                command.env("PYTHONPATH", root().join("clients/python/src"));
                command
            }
            Language::Rust => Command::new(built("readme")),
        };
        if language != Language::Rust {
            command.arg(&script);
        }
        command.current_dir(directory.path()).env("RINGPUSH_URL", url).env("RINGPUSH_TOKEN", token);
        let mut program = Self::start(&mut command);
        program.directory = Some(directory);
        program
    }

    /// The next payload. The Rust example prints it as it is, which is in quotes if it is a text.
    pub fn line(&mut self) -> String {
        self.lines.recv_timeout(DEADLINE).expect("the client goes on").trim_matches('"').to_owned()
    }
}
