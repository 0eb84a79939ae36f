//! The only place of the command line that prints. Results go to standard output, everything else
//! to standard error. A reader that goes away (`| head`) is not an error.

use super::failure::Failure;
use crate::sync::global::atomic::{AtomicBool, Ordering};
use serde_json::{Value, json};
use std::io::{self, Write};

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub(super) enum Format {
    /// For people: aligned, sizes rounded.
    #[default]
    Text,
    /// For programs: one JSON object a line, sizes in bytes.
    Json,
}

/// What a command has to say when it is done, for both kinds of reader.
#[derive(Debug)]
pub(super) struct Reply {
    /// For programs.
    pub json: Value,
    /// For people; lines.
    pub text: String,
    /// The command did what it was asked, and what it found is a failure.
    pub is_failure: bool,
}

impl Reply {
    /// A success.
    #[must_use]
    pub(super) fn new(json: Value, text: impl Into<String>) -> Self {
        Self {
            json,
            text: text.into(),
            is_failure: false,
        }
    }

    /// A success whose result went to standard output already.
    #[must_use]
    pub(super) fn silent() -> Self {
        Self::new(Value::Null, "")
    }
}

/// Prints in one format.
#[derive(Debug, Clone, Copy)]
pub(super) struct Output {
    /// The format.
    pub format: Format,
}

impl Output {
    /// Prints a result.
    ///
    /// # Errors
    /// Standard output failed, other than by its reader going away.
    pub(super) fn reply(self, reply: &Reply) -> io::Result<()> {
        match self.format {
            Format::Json if reply.json.is_null() => Ok(()),
            Format::Json => print(&format!("{}\n", reply.json)),
            // Not even looked at, for somebody may still be waiting for its reader.
            Format::Text if reply.text.is_empty() => Ok(()),
            Format::Text => print(&reply.text),
        }
    }

    /// Prints a failure to standard error.
    pub(super) fn failure(self, failure: &Failure) {
        let text = match self.format {
            Format::Json => {
                let error = json!({
                    "kind": failure.kind,
                    "object": failure.object,
                    "message": failure.to_string(),
                    "hint": failure.hint,
                });
                format!("{}\n", json!({ "error": error }))
            }
            Format::Text => {
                let hint = failure.hint.as_ref();
                let hint = hint.map(|hint| format!("  {hint}\n")).unwrap_or_default();
                format!("tidepool: {failure}\n{hint}")
            }
        };
        note(&text);
    }
}

/// Prints to standard output.
///
/// # Errors
/// It failed, other than by its reader going away.
pub(super) fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

/// Programs read what is printed: nothing but results and errors.
static IS_FOR_PROGRAMS: AtomicBool = AtomicBool::new(false);

/// Says for whom the command prints, for [`remark`].
pub(super) fn set_format(format: Format) {
    IS_FOR_PROGRAMS.store(format == Format::Json, Ordering::Relaxed);
}

/// Says to people what the command is at, a line on standard error.
pub(super) fn remark(text: &str) {
    if !IS_FOR_PROGRAMS.load(Ordering::Relaxed) {
        note(&format!("tidepool: {text}\n"));
    }
}

/// Prints to standard error; nobody is left to be told if that fails.
pub(super) fn note(text: &str) {
    drop(io::stderr().lock().write_all(text.as_bytes()));
}
