//! What the server says, one line for each event: printed by a thread of its own, so that nothing
//! waits for whoever reads it, or does not.

use super::super::output::{self, Format, Output};
use crate::sync::{Arc, Condvar, Mutex, spawn_named};
use crate::vhost_blk::{Event, EventKind};
use serde_json::{Value, json};
use std::io;
use std::sync::mpsc::Receiver;
use std::time::Duration;

/// Bytes that may wait to be printed before events of clients do: those that do not fit are counted.
/// What is said of disks, a line for each, is never left out.
const WAITING_MAX: usize = 64 << 10;
/// How long a server that ends waits for its last lines to be taken.
const PATIENCE: Duration = Duration::from_millis(500);

/// See the module.
#[derive(Clone)]
pub(super) struct Teller {
    output: Output,
    lines: Arc<Lines>,
}

#[derive(Default)]
struct Lines {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    waiting: String,
    /// Some are being printed.
    is_printing: bool,
    /// Nothing waits to be said.
    is_ending: bool,
    is_closed: bool,
}

impl Teller {
    /// Starts the thread.
    ///
    /// # Errors
    /// No thread could be made.
    pub(super) fn start(output: Output) -> io::Result<Self> {
        let lines = Arc::new(Lines::default());
        let printed = Arc::clone(&lines);
        spawn_named("tidepool-print", move || printed.print())?;
        Ok(Self { output, lines })
    }

    /// Prints one line, in the format asked for.
    pub(super) fn say(&self, event: &Value, text: &str) {
        self.push(event, text, usize::MAX);
    }

    fn push(&self, event: &Value, text: &str, waiting_max: usize) {
        let line = match self.output.format {
            Format::Json => format!("{event}\n"),
            Format::Text => format!("{text}\n"),
        };
        let mut state = self.lines.state.lock();
        while state.waiting.len() > waiting_max && !state.is_ending {
            self.lines.changed.wait(&mut state);
        }
        state.waiting.push_str(&line);
        self.lines.changed.notify_all();
    }

    /// Prints what happens to clients, until nothing can any more.
    pub(super) fn tell(&self, events: &Receiver<Event>) {
        for event in events {
            let line = json!({
                "event": word(event.kind),
                "name": event.disk,
                "reason": event.reason,
                "left_out": event.left_out,
            });
            self.push(&line, &event.to_string(), WAITING_MAX);
        }
    }

    /// From now on nothing waits for room: little more can happen.
    pub(super) fn end(&self) {
        self.lines.state.lock().is_ending = true;
        self.lines.changed.notify_all();
    }

    /// Waits until all is printed, or nobody takes it.
    pub(super) fn finish(&self) {
        let mut state = self.lines.state.lock();
        state.is_closed = true;
        self.lines.changed.notify_all();
        while state.is_printing || !state.waiting.is_empty() {
            if self
                .lines
                .changed
                .wait_for(&mut state, PATIENCE)
                .timed_out()
            {
                return;
            }
        }
    }
}

fn word(kind: EventKind) -> &'static str {
    match kind {
        EventKind::SessionRefused => "session_refused",
        EventKind::MemoryLost => "memory_lost",
        EventKind::ClientWaits => "client_waits",
        EventKind::SpaceAwaited => "space_awaited",
        EventKind::QueueBroken => "queue_broken",
        EventKind::RequestFailed => "request_failed",
        EventKind::BaseCorrected => "base_corrected",
    }
}

impl Lines {
    fn print(&self) {
        let mut state = self.state.lock();
        loop {
            if state.waiting.is_empty() {
                if state.is_closed {
                    return;
                }
                self.changed.wait(&mut state);
                continue;
            }
            let lines = std::mem::take(&mut state.waiting);
            state.is_printing = true;
            drop(state);
            // A reader that has gone away is no reason to stop serving.
            drop(output::print(&lines));
            state = self.state.lock();
            state.is_printing = false;
            self.changed.notify_all();
        }
    }
}
