//! What would hold a worker up and is done elsewhere: copies, reads of bases that a ring cannot or must
//! not read, and flushes.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::Weak;

use crate::cowdisk::{Base, CopyJob, Disk, DiskError, DiskErrorKind};
use crate::sync::{Arc, Condvar, JoinHandle, Mutex, Vital, spawn_named};
use crate::sys::mmap::{GuestMemory, GuestRun};

use super::crew::{Crew, Job, Scratch};
use super::mailbox::{Done, Mailbox, Message};

/// Most threads that copy within one pool.
pub(super) const COPY_THREADS_MAX: usize = 4;
/// Most threads that read one base, for all disks over it.
pub(super) const BASE_THREADS_MAX: usize = 4;

/// Who waits for a piece of work.
#[derive(Debug, Clone)]
pub(super) struct Ticket {
    pub(super) worker: Arc<Mailbox>,
    pub(super) task: u32,
}

impl Ticket {
    fn report(self, result: Result<(), WorkFailed>) {
        let task = self.task;
        self.worker.post(Message::Done(Done { task, result }));
    }
}

/// Something that blocks.
#[derive(Debug)]
pub(super) enum Work {
    /// Copy before a write.
    Copy(Disk, CopyJob),
    /// Read `len` bytes, at most [`super::crew::SCRATCH_LEN`], from `offset` into guest memory.
    Base {
        base: Arc<Base>,
        offset: u64,
        len: usize,
        memory: Arc<GuestMemory>,
        runs: Vec<GuestRun>,
    },
}

/// Why work on another thread failed.
#[derive(Debug, Clone)]
pub(super) struct WorkFailed {
    pub(super) kind: DiskErrorKind,
    pub(super) reason: Arc<str>,
}

impl From<DiskError> for WorkFailed {
    fn from(error: DiskError) -> Self {
        Self {
            kind: error.kind(),
            reason: error.to_string().into(),
        }
    }
}

impl WorkFailed {
    fn io(what: &str, error: &io::Error) -> Self {
        Self {
            kind: DiskErrorKind::Io,
            reason: format!("{what}: {error}").into(),
        }
    }
}

/// Work and who waits for it.
#[derive(Debug)]
pub(super) struct Errand {
    pub(super) work: Work,
    pub(super) ticket: Ticket,
}

impl Job for Errand {
    fn run(self, scratch: &mut Scratch) {
        let result = match self.work {
            Work::Copy(disk, job) => disk.run_copy(job).map_err(WorkFailed::from),
            Work::Base {
                base,
                offset,
                len,
                memory,
                runs,
            } => {
                let bytes = scratch.bytes(len);
                let read = base.read_at(bytes, offset);
                if read.is_ok() {
                    memory.scatter(&runs, bytes);
                }
                read.map_err(|e| WorkFailed::io("reading the base image", &e))
            }
        };
        // Last: whoever hears of it may close what this held until now.
        self.ticket.report(result);
    }

    fn refuse(self, error: &io::Error) {
        if let Work::Copy(disk, job) = self.work {
            disk.abandon_copy(job);
        }
        let failed = WorkFailed::io("starting a thread", error);
        self.ticket.report(Err(failed));
    }
}

/// The crews that are in use, by the address of what they are for.
#[derive(Debug, Default)]
struct Crews {
    known: HashMap<usize, Weak<Crew<Errand>>>,
    /// So many are there before those that are over are looked for again.
    prune_at: usize,
}

impl Crews {
    fn get(&mut self, key: usize, name: &'static str, most: usize) -> Arc<Crew<Errand>> {
        // A crew lives no longer than the devices that use it, and these keep what it is for.
        if let Some(crew) = self.known.get(&key).and_then(Weak::upgrade) {
            return crew;
        }
        if self.known.len() >= self.prune_at {
            self.known.retain(|_, crew| crew.strong_count() > 0);
            self.prune_at = 2 * self.known.len() + 16;
        }
        let crew = Arc::new(Crew::new(name, most));
        self.known.insert(key, Arc::downgrade(&crew));
        crew
    }
}

/// Finds the helpers of disks.
#[derive(Debug, Default)]
pub(super) struct Helpers(Mutex<Crews>);

impl Helpers {
    /// Those of `disk`: its pool's, and its base's.
    pub(super) fn of(&self, disk: &Disk) -> DiskHelpers {
        let mut crews = self.0.lock();
        let pool = Arc::as_ptr(disk.pool()).addr();
        let base = disk.base().map(|base| Arc::as_ptr(base).addr());
        DiskHelpers {
            copiers: crews.get(pool, "vblk-copy", COPY_THREADS_MAX),
            readers: base.map(|base| crews.get(base, "vblk-base", BASE_THREADS_MAX)),
        }
    }
}

/// Who works for one disk.
#[derive(Debug)]
pub(super) struct DiskHelpers {
    copiers: Arc<Crew<Errand>>,
    readers: Option<Arc<Crew<Errand>>>,
}

impl DiskHelpers {
    /// Has `work` done for a disk of which `from` is one number.
    pub(super) fn submit(&self, from: usize, work: Work, ticket: Ticket) {
        let is_of_base = match &work {
            Work::Copy(_, job) => job.reads_base(),
            Work::Base { .. } => true,
        };
        let readers = self.readers.as_ref().filter(|_| is_of_base);
        let crew = readers.unwrap_or(&self.copiers);
        crew.submit(from, Errand { work, ticket });
    }
}

#[derive(Debug)]
struct Queue<T> {
    items: VecDeque<T>,
    is_closed: bool,
}

/// A queue that threads wait on. Bounded by what feeds it: no request is in it twice, and
/// requests are bounded by the sizes of their virtqueues.
#[derive(Debug)]
struct Channel<T> {
    queue: Mutex<Queue<T>>,
    changed: Condvar,
}

impl<T> Channel<T> {
    fn new() -> Self {
        let queue = Queue {
            items: VecDeque::new(),
            is_closed: false,
        };
        Self {
            queue: Mutex::new(queue),
            changed: Condvar::new(),
        }
    }

    fn push(&self, item: T) {
        self.queue.lock().items.push_back(item);
        self.changed.notify_one();
    }

    fn close(&self) {
        self.queue.lock().is_closed = true;
        self.changed.notify_all();
    }

    /// The next item, or `None` when the channel is closed and empty.
    fn pop(&self) -> Option<T> {
        let mut queue = self.queue.lock();
        loop {
            if let Some(item) = queue.items.pop_front() {
                return Some(item);
            }
            if queue.is_closed {
                return None;
            }
            self.changed.wait(&mut queue);
        }
    }

    /// All items at once, at least one; `None` when the channel is closed and empty.
    fn pop_all(&self) -> Option<VecDeque<T>> {
        let first = self.pop()?;
        let mut all = std::mem::take(&mut self.queue.lock().items);
        all.push_front(first);
        Some(all)
    }
}

fn join(threads: &Mutex<Vec<JoinHandle<()>>>) {
    for thread in threads.lock().drain(..) {
        // A panic was reported by the thread itself; there is nobody left to tell.
        drop(thread.join());
    }
}

/// The thread that flushes one pool: all requests that wait when a round begins share one flush.
///
/// A request is here only after everything its guest saw completed was completed on the disk, so
/// a flush that begins later covers it.
#[derive(Debug)]
pub(super) struct Flusher {
    channel: Arc<Channel<(Disk, Ticket)>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Flusher {
    pub(super) fn start() -> io::Result<Self> {
        let channel = Arc::new(Channel::new());
        let rounds = Arc::clone(&channel);
        let thread = spawn_named("vblk-flush", move || flush_rounds(&rounds))?;
        Ok(Self {
            channel,
            threads: Mutex::new(vec![thread]),
        })
    }

    /// Flushes the pool of `disk`, the same for all calls.
    pub(super) fn submit(&self, disk: Disk, ticket: Ticket) {
        self.channel.push((disk, ticket));
    }
}

fn flush_rounds(channel: &Channel<(Disk, Ticket)>) {
    let _vital = Vital::new();
    while let Some(mut round) = channel.pop_all() {
        let result = match round.front() {
            Some((disk, _)) => disk.flush().map_err(WorkFailed::from),
            None => Ok(()),
        };
        while let Some((_, first)) = round.front() {
            let worker = Arc::clone(&first.worker);
            let (mine, rest) = round
                .into_iter()
                .partition(|(_, ticket)| Arc::ptr_eq(&ticket.worker, &worker));
            round = rest;
            let mine: VecDeque<(Disk, Ticket)> = mine;
            worker.post_all(mine.into_iter().map(|(_, ticket)| {
                Message::Done(Done {
                    task: ticket.task,
                    result: result.clone(),
                })
            }));
        }
    }
}

impl Drop for Flusher {
    fn drop(&mut self) {
        self.channel.close();
        join(&self.threads);
    }
}

#[cfg(all(test, feature = "loom"))]
mod loom_tests {
    use super::*;
    use crate::sync::explore::explore;

    /// One thread puts an item in and waits for it to come back, twice, then closes; two take items out
    /// and send them back until it is closed. Each item is taken once, and nobody waits for ever.
    ///
    /// Fails if `Channel::push` does not notify, `Channel::close` notifies one only, or `Channel::pop`
    /// looks whether it is closed before it looks for items.
    #[test]
    fn loom_every_item_is_taken_once() {
        explore("channel", 4, || {
            let channel = Arc::new(Channel::<u32>::new());
            let back = Arc::new(Channel::<u32>::new());
            let taker = |takes_all: bool| {
                let (channel, back) = (Arc::clone(&channel), Arc::clone(&back));
                let take = move || {
                    loop {
                        let items = match takes_all {
                            true => channel.pop_all(),
                            false => channel.pop().map(|item| VecDeque::from([item])),
                        };
                        let Some(items) = items else { return };
                        items.into_iter().for_each(|item| back.push(item));
                    }
                };
                spawn_named("taker", take).expect("a thread")
            };
            let takers = [taker(false), taker(true)];
            channel.push(1);
            assert_eq!(back.pop(), Some(1));
            channel.push(2);
            channel.close();
            for taker in takers {
                taker.join().expect("no panic");
            }
            back.close();
            assert_eq!(back.pop(), Some(2));
            assert_eq!(back.pop(), None);
        });
    }
}
