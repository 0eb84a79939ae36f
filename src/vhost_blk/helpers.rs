//! Threads for what would hold a worker up: copies, reads of bases that are no
//! plain file, and flushes.

use std::collections::VecDeque;
use std::io;

use crate::cowdisk::{Base, CopyJob, Disk, DiskError, DiskErrorKind};
use crate::sync::{Arc, Condvar, JoinHandle, Mutex, spawn_named};
use crate::sys::buffer::AlignedBuf;

use super::mailbox::{Done, Mailbox, Message};

/// Threads that copy.
const HELPERS: usize = 4;

/// Who waits for a piece of work.
#[derive(Debug, Clone)]
pub(super) struct Ticket {
    pub(super) worker: Arc<Mailbox>,
    pub(super) task: u32,
    pub(super) part: u32,
}

/// Something that blocks.
#[derive(Debug)]
pub(super) enum Work {
    /// Copy before a write.
    Copy(Disk, CopyJob),
    /// Read `len` bytes at `offset` into the buffer.
    Base {
        base: Arc<Base>,
        offset: u64,
        len: usize,
        buffer: AlignedBuf,
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

impl Work {
    fn run(self) -> (Result<(), WorkFailed>, Option<AlignedBuf>) {
        match self {
            Self::Copy(disk, job) => (disk.run_copy(job).map_err(WorkFailed::from), None),
            Self::Base {
                base,
                offset,
                len,
                mut buffer,
            } => {
                let result = base.read_at(&mut buffer.bytes_mut()[..len], offset);
                let failed = |error| WorkFailed {
                    kind: DiskErrorKind::Io,
                    reason: format!("reading the base image: {error}").into(),
                };
                (result.map_err(failed), Some(buffer))
            }
        }
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

/// The threads for [`Work`].
#[derive(Debug)]
pub(super) struct Helpers {
    channel: Arc<Channel<(Work, Ticket)>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Helpers {
    pub(super) fn start() -> io::Result<Self> {
        let channel = Arc::new(Channel::<(Work, Ticket)>::new());
        let mut threads = Vec::new();
        for index in 0..HELPERS {
            let channel = Arc::clone(&channel);
            threads.push(spawn_named(&format!("vblk-help{index}"), move || {
                while let Some((work, ticket)) = channel.pop() {
                    let (result, buffer) = work.run();
                    let (task, part) = (ticket.task, ticket.part);
                    ticket.worker.post(Message::Done(Done {
                        task,
                        part,
                        result,
                        buffer,
                    }));
                }
            })?);
        }
        Ok(Self {
            channel,
            threads: Mutex::new(threads),
        })
    }

    pub(super) fn submit(&self, work: Work, ticket: Ticket) {
        self.channel.push((work, ticket));
    }
}

impl Drop for Helpers {
    fn drop(&mut self) {
        self.channel.close();
        join(&self.threads);
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
                    part: ticket.part,
                    result: result.clone(),
                    buffer: None,
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
