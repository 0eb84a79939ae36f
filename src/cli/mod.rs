//! The command line: words to calls on the library, results to text or JSON, failures to an exit
//! status. Exit status 0 is success, 1 a failure, 2 a command line that makes no sense.
//!
//! ```text
//!  args -> command (pool, disk, serve) -> Reply  -> output -> stdout
//!                        |             -> Failure ---'    -> stderr
//!                        v
//!                 open -> pool, cowdisk, vhost_blk
//! ```
//! Nothing here is known to the rooms below, and nothing but `output` prints.

mod args;
mod disk;
mod failure;
mod human;
mod interrupt;
mod natural;
mod open;
mod output;
mod panics;
mod pool;
mod progress;
mod serve;

use crate::sys::signal;
use clap::{CommandFactory, Parser, Subcommand};
use failure::Failure;
use output::{Format, Output, Reply};
use std::ffi::OsString;
use std::process::ExitCode;

/// Exit status of a command line that makes no sense.
const USAGE: u8 = 2;

/// An elastic pool of forkable copy-on-write disks for virtual machines.
#[derive(Debug, Parser)]
#[command(name = "tidepool", version, propagate_version = true, after_help = EXAMPLES)]
#[command(subcommand_required = true, arg_required_else_help = true)]
struct Cli {
    /// How to print results: for people, or one JSON object a line for programs.
    #[arg(
        long,
        short = 'o',
        global = true,
        value_enum,
        default_value_t,
        value_name = "FORMAT"
    )]
    output: Format,

    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  tidepool pool create vms.pool --size 100G
  tidepool disk create vms.pool:base --base debian.qcow2
  tidepool disk fork vms.pool:base vm -n 8
  tidepool disk tree vms.pool

A pool is a file or block device. A disk in it is POOL:NAME, a snapshot POOL:NAME@SNAPSHOT.
Sizes take K, M, G, T, P and E, powers of 1024. Exit status: 0 success, 1 failure, 2 usage.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Make, measure and look after pools.
    #[command(subcommand)]
    Pool(pool::PoolCommand),
    /// Make, fork, change, copy and remove disks.
    #[command(subcommand)]
    Disk(disk::DiskCommand),
    /// Serve the disks of pools to virtual machines, in the foreground.
    #[command(after_help = serve::EXAMPLES)]
    Serve(serve::Serve),
    /// Print a completion script for a shell.
    #[command(after_help = COMPLETIONS)]
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

const COMPLETIONS: &str = "\
Examples:
  tidepool completions bash > /etc/bash_completion.d/tidepool
  tidepool completions zsh > \"${fpath[1]}/_tidepool\"";

/// Runs the command line `args`, program name first.
#[must_use]
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().collect();
    let cli = match Cli::try_parse_from(&args) {
        Ok(cli) => cli,
        Err(error) => return refuse(&error, wants_json(&args)),
    };
    let output = Output { format: cli.output };
    output::set_format(cli.output);
    // Before any thread is made. If it fails, a limit that is met ends the process: as without it.
    drop(signal::survive_size_limit());
    match execute(cli.command, output) {
        Ok(reply) => match output.reply(&reply) {
            Ok(()) if reply.is_failure => ExitCode::FAILURE,
            Ok(()) => ExitCode::SUCCESS,
            Err(e) => {
                output.failure(&Failure::new("io", "standard output", e));
                ExitCode::FAILURE
            }
        },
        Err(failure) => {
            output.failure(&failure);
            if let Some(signal) = failure.signal {
                signal::end_by(signal);
            }
            match failure.kind {
                "usage" => ExitCode::from(USAGE),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

/// Whether the command line `args`, program name first, makes sense. Nothing is carried out.
pub fn is_understood(args: impl IntoIterator<Item = OsString>) -> bool {
    Cli::try_parse_from(args).is_ok()
}

fn execute(command: Command, output: Output) -> Result<Reply, Failure> {
    match command {
        Command::Pool(command) => pool::execute(command, output),
        Command::Disk(command) => disk::execute(command, output),
        Command::Serve(args) => serve::execute(&args, output),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "tidepool", &mut script);
            let script = String::from_utf8_lossy(&script).into_owned();
            let json = serde_json::json!({ "shell": shell.to_string(), "script": script });
            Ok(Reply::new(json, script))
        }
    }
}

/// Says what clap found: help and version to standard output, the rest is wrong usage.
fn refuse(error: &clap::Error, is_json: bool) -> ExitCode {
    if !error.use_stderr() {
        let text = error.render().to_string();
        return match output::print(&format!("{}\n", text.trim_end())) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_unprintable) => ExitCode::FAILURE,
        };
    }
    if is_json {
        let text = error.render().to_string();
        let text = text.strip_prefix("error: ").unwrap_or(&text);
        let message = text.split("\n\nUsage:").next().unwrap_or(text);
        let message = message.split("\n\nFor more").next().unwrap_or(message);
        let output = Output {
            format: Format::Json,
        };
        let hint = "see `tidepool help` and `tidepool COMMAND --help`";
        output.failure(&Failure::usage(message.trim()).hint(hint));
    } else {
        output::note(&error.render().to_string());
    }
    ExitCode::from(USAGE)
}

/// Whether JSON was asked for, on a command line that could not be parsed.
fn wants_json(args: &[OsString]) -> bool {
    let words: Vec<&str> = args.iter().filter_map(|arg| arg.to_str()).collect();
    let is_asked = |word: &str| matches!(word, "--output=json" | "-ojson" | "-o=json");
    words.iter().any(|word| is_asked(word))
        || words
            .windows(2)
            .any(|pair| matches!(pair[0], "--output" | "-o") && pair[1] == "json")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_shows_examples() {
        fn look(command: &clap::Command, path: &str) {
            let path = format!("{path} {}", command.get_name());
            let help = command.get_after_help().map(ToString::to_string);
            let is_leaf = !command.has_subcommands();
            let has_example = help.is_some_and(|help| help.contains("Examples:"));
            assert!(has_example || !is_leaf, "{path} --help has no examples");
            for sub in command.get_subcommands() {
                if sub.get_name() != "help" {
                    look(sub, &path);
                }
            }
        }
        look(&Cli::command(), "");
    }
}
