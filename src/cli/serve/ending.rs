//! A signal that is to end the server, whenever it comes: it is waited for from the beginning, by a
//! thread of its own.

use crate::sync::{Arc, Condvar, Mutex, spawn_named};
use crate::sys::signal::{Endings, end_by};
use nix::sys::signal::Signal;
use std::io;
use std::time::Duration;

/// How long a server that serves nobody yet may take to end in good order, once it was told to. What
/// it is at, opening a pool or waiting for one, may take longer and loses nothing by being broken off.
const PATIENCE: Duration = Duration::from_millis(700);

/// See the module.
pub(super) struct Ending {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    told: Option<io::Result<Signal>>,
    /// Guests may have begun something that is to be finished.
    has_guests: bool,
    /// The server has ended.
    is_over: bool,
}

impl Ending {
    /// Waits for the first signal from now on; the second ends the process at once.
    ///
    /// # Errors
    /// No thread could be made.
    pub(super) fn watch(signals: Endings) -> io::Result<Arc<Self>> {
        let state = State {
            told: None,
            has_guests: false,
            is_over: false,
        };
        let ending = Arc::new(Self {
            state: Mutex::new(state),
            changed: Condvar::new(),
        });
        let watched = Arc::clone(&ending);
        spawn_named("tidepool-end", move || watched.run(signals))?;
        Ok(ending)
    }

    fn run(&self, signals: Endings) {
        let told = signals.wait();
        let signal = told.as_ref().ok().copied();
        let mut state = self.state.lock();
        state.told = Some(told);
        self.changed.notify_all();
        while !state.has_guests {
            if self.changed.wait_for(&mut state, PATIENCE).timed_out() {
                break;
            }
        }
        if let (false, Some(signal)) = (state.has_guests, signal) {
            end_by(signal);
        }
        // A second signal ends the process where it is not kept back: on this thread.
        while !state.is_over {
            self.changed.wait(&mut state);
        }
    }

    /// The server has ended: whatever signal comes is kept back.
    pub(super) fn finish(&self) {
        self.state.lock().is_over = true;
        self.changed.notify_all();
    }

    /// Whether the server is to end.
    pub(super) fn is_told(&self) -> bool {
        self.state.lock().told.is_some()
    }

    /// From now on there may be guests; the server ends in good order, however long that takes.
    pub(super) fn admit_guests(&self) {
        self.state.lock().has_guests = true;
        self.changed.notify_all();
    }

    /// Waits until the server is to end.
    ///
    /// # Errors
    /// As sigwait(3).
    pub(super) fn wait(&self) -> io::Result<()> {
        let mut state = self.state.lock();
        loop {
            match state.told.take() {
                Some(told) => return told.map(drop),
                None => self.changed.wait(&mut state),
            }
        }
    }
}
