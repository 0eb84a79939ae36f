//! Runs the built program in a directory of its own.

#![allow(
    dead_code,
    clippy::allow_attributes,
    reason = "each test uses its own part of it"
)]

use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

/// What a command said, and how it ended.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Outcome {
    /// The error, of a command that was asked for JSON.
    pub(crate) fn error(&self) -> Value {
        let value: Value = serde_json::from_str(&self.stderr)
            .unwrap_or_else(|e| panic!("errors are JSON too ({e}): {self:?}"));
        value["error"].clone()
    }
}

/// A directory to run commands in.
pub(crate) struct Shell(TempDir);

impl Shell {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().expect("a directory"))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A command to be run here; nothing to read.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tidepool"));
        command
            .current_dir(self.0.path())
            .args(args)
            .stdin(Stdio::null());
        command
    }

    /// A pool `p` of 64 MiB.
    pub(crate) fn pool(&self) {
        self.ok(&["pool", "create", "p", "--size", "64M"]);
    }

    pub(crate) fn run(&self, args: &[&str]) -> Outcome {
        let output = self.command(args).output().expect("starts");
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
        Outcome {
            code: output.status.code().expect("not killed"),
            stdout: text(output.stdout),
            stderr: text(output.stderr),
        }
    }

    /// A command that succeeds.
    pub(crate) fn ok(&self, args: &[&str]) -> Outcome {
        let outcome = self.run(args);
        assert_eq!(outcome.code, 0, "{args:?}: {outcome:?}");
        outcome
    }

    /// The bytes a command that succeeds prints.
    pub(crate) fn ok_bytes(&self, args: &[&str]) -> Vec<u8> {
        let output = self.command(args).output().expect("starts");
        assert!(output.status.success(), "{args:?}");
        output.stdout
    }

    /// The JSON a command that succeeds prints: one line.
    pub(crate) fn json(&self, args: &[&str]) -> Value {
        let outcome = self.ok(&[args, &["--output", "json"]].concat());
        assert_eq!(outcome.stderr, "", "{args:?}: nothing but JSON");
        assert_eq!(outcome.stdout.lines().count(), 1, "{args:?}");
        serde_json::from_str(&outcome.stdout).expect("JSON")
    }

    /// Starts a command; what it prints to standard error is kept.
    pub(crate) fn start(&self, args: &[&str]) -> Child {
        let mut command = self.command(args);
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        command.spawn().expect("starts")
    }

    /// Exit status of a command whose reader closes the pipe at once.
    pub(crate) fn run_closed(&self, args: &[&str]) -> Option<i32> {
        let mut child = self
            .command(args)
            .stdout(Stdio::piped())
            .spawn()
            .expect("starts");
        drop(child.stdout.take());
        child.wait().expect("ends").code()
    }

    /// An image of `len` bytes: half holes, half a pattern of `seed`; all data if that is 0.
    pub(crate) fn image(&self, name: &str, len: usize, seed: u64) -> String {
        let mut bytes = vec![0; len];
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        for (number, part) in bytes.chunks_mut(256 << 10).enumerate() {
            if seed != 0 && number % 2 == 1 {
                continue;
            }
            for word in part.chunks_mut(8) {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                word.copy_from_slice(&state.to_le_bytes()[..word.len()]);
            }
        }
        let path = self.path(name);
        fs::write(&path, bytes).expect("writes");
        path.to_str().expect("UTF-8").to_owned()
    }

    pub(crate) fn qemu_img(&self, args: &[&str]) {
        let output = Command::new("qemu-img")
            .current_dir(self.0.path())
            .args(args)
            .output();
        let output = output.expect("starts");
        assert!(output.status.success(), "qemu-img {args:?}: {output:?}");
    }

    /// Starts `tidepool serve`, and waits until it is ready.
    pub(crate) fn serve(&self, args: &[&str]) -> Server {
        let args = [&["serve", "-o", "json"], args].concat();
        wait_until_ready(self.command(&args))
    }

    /// As [`Shell::serve`], after `first` in a shell.
    pub(crate) fn serve_after(&self, first: &str, args: &[&str]) -> Server {
        wait_until_ready(self.after(first, args))
    }

    /// `tidepool serve` after `first` in a shell.
    pub(crate) fn after(&self, first: &str, args: &[&str]) -> Command {
        let mut command = Command::new("sh");
        command
            .current_dir(self.0.path())
            .arg("-c")
            .arg(format!("{first} && exec \"$0\" serve -o json \"$@\""))
            .arg(env!("CARGO_BIN_EXE_tidepool"))
            .args(args)
            .stdin(Stdio::null());
        command
    }
}

fn wait_until_ready(mut command: Command) -> Server {
    let mut child = command.stdout(Stdio::piped()).spawn().expect("starts");
    let mut lines = BufReader::new(child.stdout.take().expect("piped"));
    let (mut events, mut refused) = (Vec::new(), Vec::new());
    loop {
        let mut line = String::new();
        let len = lines.read_line(&mut line).expect("reads");
        assert_ne!(len, 0, "the server ended before it was ready: {events:?}");
        let event: Value = serde_json::from_str(&line).expect("a JSON object a line");
        if event["event"] == "ready" {
            break;
        }
        if event["event"] == "refused" {
            refused.push(event);
            continue;
        }
        assert_eq!(event["event"], "serving");
        assert!(Path::new(event["socket"].as_str().expect("a path")).is_relative());
        events.push(event);
    }
    Server {
        child,
        lines,
        events,
        refused,
    }
}

/// A running server; killed if the test fails.
pub(crate) struct Server {
    child: Child,
    lines: BufReader<ChildStdout>,
    events: Vec<Value>,
    refused: Vec<Value>,
}

impl Server {
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it serves.
    pub(crate) fn names(&self) -> Vec<&str> {
        let names = self
            .events
            .iter()
            .filter_map(|event| event["name"].as_str());
        names.collect()
    }

    /// What it said that it does not serve.
    pub(crate) fn refused(&self) -> &[Value] {
        &self.refused
    }

    /// Where it serves.
    pub(crate) fn sockets(&self) -> Vec<&str> {
        let sockets = self.events.iter();
        let sockets = sockets.filter_map(|event| event["socket"].as_str());
        sockets.collect()
    }

    /// CPU time it has used so far, in ticks of 10 ms.
    pub(crate) fn cpu_ticks(&self) -> u64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid())).expect("it runs");
        let after_name = stat.rsplit_once(") ").expect("a name in parentheses").1;
        let fields: Vec<&str> = after_name.split(' ').collect();
        let ticks = |at: usize| fields[at].parse::<u64>().expect("a number");
        ticks(11) + ticks(12)
    }

    /// What it tells of next.
    pub(crate) fn next_event(&mut self) -> Value {
        let mut line = String::new();
        self.lines.read_line(&mut line).expect("reads");
        serde_json::from_str(&line).expect("a JSON object a line")
    }

    /// How it ended, once it has.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        self.child.wait().expect("ends")
    }

    /// Ends it as a user would; its exit status.
    pub(crate) fn stop(&mut self) -> Option<i32> {
        let (status, told) = self.stop_and_listen();
        assert_eq!(told, [""; 0]);
        status
    }

    /// As [`Server::stop`], with the kinds of the events that it had not told of yet.
    pub(crate) fn stop_and_listen(&mut self) -> (Option<i32>, Vec<String>) {
        send(self.pid(), Signal::SIGTERM);
        let mut rest = String::new();
        self.lines.read_to_string(&mut rest).expect("reads");
        let events = rest.lines().map(|line| {
            let event: Value = serde_json::from_str(line).expect("a JSON object a line");
            event["event"].as_str().expect("a kind").to_owned()
        });
        let mut told: Vec<String> = events.collect();
        assert_eq!(told.pop().as_deref(), Some("stopped"));
        (self.child.wait().expect("ends").code(), told)
    }
}

/// Sends a signal to a process that runs.
pub(crate) fn send(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(pid).expect("a pid"));
    kill(pid, signal).expect("it runs");
}

impl Drop for Server {
    fn drop(&mut self) {
        // Fails if it has ended, which is as good.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

pub(crate) fn has_qemu_img() -> bool {
    let version = Command::new("qemu-img").arg("--version").output();
    version.is_ok_and(|output| output.status.success())
}

pub(crate) fn skip(name: &str, reason: &str) {
    #[expect(clippy::print_stdout, reason = "a test that did not run says so")]
    {
        println!("SKIPPED: {name}: {reason}");
    }
}
