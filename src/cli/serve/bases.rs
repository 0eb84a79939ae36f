//! Opening disks over bases: on threads, because storage that hangs holds up whoever looks at it. The
//! other disks need not wait for it.

use crate::cowdisk::{Disk, DiskError};
use crate::pool::Pool;
use crate::sync::{Arc, Mutex, spawn_named};
use crate::sys::clock;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

/// Threads at first, and at most: one is added whenever none of them comes to an end.
const THREADS: usize = 4;
const THREADS_MAX: usize = 64;
/// How long nothing happens before a thread is added.
const STUCK: Duration = Duration::from_millis(250);

/// A disk to be opened.
pub(super) struct Wish {
    /// What the caller knows it by.
    pub(super) place: usize,
    pub(super) pool: Arc<Pool>,
    pub(super) name: String,
}

/// What became of one.
pub(super) type Opened = (usize, Result<Disk, DiskError>);

type Queue = Arc<Mutex<VecDeque<Vec<Wish>>>>;

/// See the module.
pub(super) struct Openers {
    /// Disks by base: what hangs with one hangs with all.
    queue: Queue,
    to: Sender<Opened>,
    opened: Receiver<Opened>,
    left: BTreeSet<usize>,
    threads: usize,
    progress: Instant,
}

impl Openers {
    /// Begins to open disks over each base.
    pub(super) fn start(wishes: BTreeMap<PathBuf, Vec<Wish>>) -> Self {
        let all = wishes.values().flatten();
        let left = all.map(|wish| wish.place).collect();
        let queue = Arc::new(Mutex::new(wishes.into_values().collect()));
        let (to, opened) = channel();
        let mut openers = Self {
            queue,
            to,
            opened,
            left,
            threads: 0,
            progress: clock::now(),
        };
        for _ in 0..THREADS {
            openers.add_thread();
        }
        openers
    }

    /// If it cannot be made, those there are do it all.
    fn add_thread(&mut self) {
        if self.threads == THREADS_MAX || self.queue.lock().is_empty() {
            return;
        }
        let (queue, to) = (Arc::clone(&self.queue), self.to.clone());
        let started = spawn_named("tidepool-base", move || open_all(&queue, &to));
        self.threads += usize::from(started.is_ok());
    }

    /// The next disk; `None` when there are no more, nothing has happened for `quiet`, or `is_over`
    /// says so.
    pub(super) fn next(&mut self, quiet: Duration, is_over: impl Fn() -> bool) -> Option<Opened> {
        let mut looked = self.progress;
        while !self.left.is_empty() && !is_over() {
            match self.opened.recv_timeout(STUCK.min(quiet)) {
                Ok((place, disk)) => {
                    self.progress = clock::now();
                    self.left.remove(&place);
                    return Some((place, disk));
                }
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) => {}
            }
            let now = clock::now();
            if now.saturating_duration_since(self.progress) >= quiet {
                return None;
            }
            if now.saturating_duration_since(looked) >= STUCK {
                looked = now;
                self.add_thread();
            }
        }
        None
    }

    /// Those that have not been opened.
    pub(super) fn into_left(self) -> BTreeSet<usize> {
        self.left
    }
}

fn open_all(queue: &Queue, to: &Sender<Opened>) {
    loop {
        let Some(wishes) = queue.lock().pop_front() else {
            return;
        };
        for wish in wishes {
            let disk = Disk::open(&wish.pool, &wish.name);
            if to.send((wish.place, disk)).is_err() {
                return; // nobody waits any more
            }
        }
    }
}
