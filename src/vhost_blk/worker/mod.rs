//! A worker: one thread, one ring, any number of queues of any disks.
//!
//! ```text
//! loop: reap completions -> read mail -> look at awake queues -> a turn for each disk in line: take
//!       requests, start their I/O -> serve who waits, if there is what they wait for
//!       -> publish used entries, one call a batch -> submit and wait
//! ```
//! What a disk's guest asks for is its own affair ([`share`]): it gets its turn ([`turns`]) and has
//! its own queues to wait in ([`waiting`]), and no other disk's requests are looked at for it.
//!
//! A queue with nothing to take stays `Awake` (the guest is not asked to kick) until the worker is
//! about to sleep; then it is `Armed`, looked at a last time, and its eventfd's poll wakes the
//! ring. The eventfds are never read: each write to one wakes its poll whatever the counter says.

mod mail;
mod polling;
mod share;
mod slots;
mod take;
mod turns;
mod waiting;

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::rc::Rc;
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use crate::cowdisk::Segment;
use crate::sync::{Arc, JoinHandle, Vital, spawn_named};
use crate::sys::call::Caller;
use crate::sys::clock;
use crate::sys::mmap::GuestRun;
use crate::sys::sigbus;
use crate::sys::uring::{Completion, Ring};
use crate::virtio::queue::Chain;

use crate::vhost_blk::bounce::Bounce;
use crate::vhost_blk::files::Files;
use crate::vhost_blk::lane::{Lane, LaneState};
use crate::vhost_blk::mailbox::{Mailbox, Message};
use crate::vhost_blk::task::{Task, task_of};

use polling::Polling;
use share::Share;
use slots::Slots;
use waiting::Waiting;

/// Tokens above every task's: the mailbox, and kicks of lanes (the lane below).
const TOKEN_MAIL: u64 = 1 << 63;
const TOKEN_KICK: u64 = 1 << 62;

/// How workers behave.
#[derive(Debug, Clone, Copy)]
pub(super) struct WorkerOptions {
    pub(super) no_space_timeout: Duration,
    /// How long to look for more before sleeping.
    pub(super) polling: Duration,
}

/// What tasks need to know of their worker.
#[derive(Debug)]
pub(super) struct Context {
    pub(super) mailbox: Arc<Mailbox>,
    pub(super) shard: usize,
    /// Room for a plan, lent out and given back.
    pub(super) segments: RefCell<Vec<Segment>>,
}

/// A running worker, as others see it.
#[derive(Debug)]
pub(super) struct WorkerHandle {
    pub(super) mailbox: Arc<Mailbox>,
    thread: Option<JoinHandle<()>>,
}

impl WorkerHandle {
    /// # Errors
    /// No thread or no ring.
    pub(super) fn start(shard: usize, options: WorkerOptions) -> io::Result<Self> {
        let mailbox = Arc::new(Mailbox::new()?);
        let theirs = Arc::clone(&mailbox);
        let (started, result) = sync_channel(1);
        let thread = spawn_named(&format!("vblk-work{shard}"), move || {
            match Worker::new(shard, options, theirs) {
                Ok(mut worker) => {
                    drop(started.send(Ok(())));
                    worker.run();
                }
                Err(error) => drop(started.send(Err(error))),
            }
        })?;
        result.recv().map_err(io::Error::other)??;
        Ok(Self {
            mailbox,
            thread: Some(thread),
        })
    }
}

impl Drop for WorkerHandle {
    fn drop(&mut self) {
        self.mailbox.post(Message::Quit);
        if let Some(thread) = self.thread.take() {
            // A panic was reported by the thread itself; there is nobody left to tell.
            drop(thread.join());
        }
    }
}

#[derive(Debug)]
struct Worker {
    options: WorkerOptions,
    context: Context,
    caller: Rc<Caller>,
    lanes: Slots<Lane>,
    shares: Slots<Share>,
    /// Shares by the address of their device.
    share_of: HashMap<usize, u32>,
    /// Shares that have something to do, in turn.
    line: VecDeque<u32>,
    /// What the requests of a turn have cost so far, bytes.
    spent: u32,
    /// Lanes that are awake with nothing to take.
    dry: Vec<u32>,
    touched: Vec<u32>,
    tasks: Vec<Option<Box<Task>>>,
    free: Vec<u32>,
    waiting: Waiting,
    /// Lanes that are to stop.
    stopping: Vec<u32>,
    bounce: Bounce,
    runs: Vec<GuestRun>,
    chain: Chain,
    completions: Vec<Completion>,
    messages: Vec<Message>,
    files: Files,
    now: Instant,
    /// Lost mappings of the process that were seen to.
    losses: u64,
    polling: Polling,
    is_quitting: bool,
    // Last: its end waits for the kernel.
    ring: Ring,
}

impl Worker {
    fn new(shard: usize, options: WorkerOptions, mailbox: Arc<Mailbox>) -> io::Result<Self> {
        let mut ring = Ring::new()?;
        // Never cancelled: polled for as long as the ring lives.
        let _poll = ring.poll(Arc::clone(mailbox.event()), TOKEN_MAIL);
        let segments = RefCell::new(Vec::new());
        Ok(Self {
            options,
            context: Context {
                mailbox,
                shard,
                segments,
            },
            caller: Rc::new(Caller::new()?),
            lanes: Slots::default(),
            shares: Slots::default(),
            share_of: HashMap::new(),
            line: VecDeque::new(),
            spent: 0,
            dry: Vec::new(),
            touched: Vec::new(),
            tasks: Vec::new(),
            free: Vec::new(),
            waiting: Waiting::default(),
            stopping: Vec::new(),
            bounce: Bounce::default(),
            runs: Vec::new(),
            chain: Chain::default(),
            completions: Vec::new(),
            messages: Vec::new(),
            files: Files::default(),
            now: clock::now(),
            losses: sigbus::losses(),
            polling: Polling::new(options.polling),
            is_quitting: false,
            ring,
        })
    }

    fn run(&mut self) {
        let _vital = Vital::new();
        loop {
            self.now = clock::now();
            self.reap();
            if self.context.mailbox.is_signalled() {
                self.read_mail();
            }
            self.look();
            self.publish();
            self.serve();
            self.retry();
            self.publish();
            self.notice_losses();
            if self.is_quitting && self.lanes.is_empty() {
                return;
            }
            self.sleep();
        }
    }

    /// Submits; waits as well if there is nothing to do.
    fn sleep(&mut self) {
        let is_idle = self.line.is_empty()
            && !self.has_grants()
            && !self.linger()
            && !self.arm()
            && sigbus::losses() == self.losses;
        let result = if is_idle {
            let is_timed = self.polling.is_on() && !self.ring.is_moving();
            let before = is_timed.then(clock::now);
            let result = self.ring.wait(self.timeout());
            if let Some(before) = before {
                self.polling.slept(clock::now().duration_since(before));
            }
            result
        } else {
            self.ring.submit()
        };
        result.expect("io_uring_enter fails only if the ring is misused");
    }

    /// Adaptive polling: looks about for a moment before sleeping; whether something came. Only
    /// while nothing but a guest can bring work: a device takes longer than is worth a look, and
    /// what it has done is cheaper to hear of by the batch.
    fn linger(&mut self) -> bool {
        let window = self.polling.window();
        if window.is_zero() || self.dry.is_empty() || self.ring.submit().is_err() {
            return false;
        }
        if self.ring.is_moving() {
            // What was in the page cache is there already.
            return self.ring.is_ready();
        }
        let end = clock::now() + window;
        while clock::now() < end {
            let lanes = &self.lanes;
            let is_waiting =
                |index: &u32| lane(lanes, *index).is_some_and(|lane| lane.queue.is_waiting());
            if self.ring.is_ready()
                || self.context.mailbox.is_signalled()
                || self.dry.iter().any(is_waiting)
            {
                return true;
            }
            std::hint::spin_loop();
        }
        self.polling.missed();
        false
    }

    /// Asks the guests of dry lanes to kick; whether something came meanwhile.
    fn arm(&mut self) -> bool {
        while let Some(index) = self.dry.pop() {
            let Some(lane) = lane_mut(&mut self.lanes, index) else {
                continue;
            };
            if !matches!(lane.state, LaneState::Awake) || lane.is_ready {
                continue;
            }
            match lane.queue.arm() {
                Ok(false) => lane.state = LaneState::Armed,
                Ok(true) => self.rouse(index),
                Err(fault) => lane.break_down(&fault),
            }
        }
        !self.line.is_empty()
    }

    /// Ends the sessions whose memory was taken away.
    fn notice_losses(&mut self) {
        let losses = sigbus::losses();
        if losses != self.losses {
            self.losses = losses;
            self.lanes.iter_mut().for_each(Lane::check_memory);
        }
    }

    /// How long to sleep at most.
    fn timeout(&self) -> Option<Duration> {
        let next = self.waiting.next()?;
        Some(next.saturating_duration_since(clock::now()))
    }

    fn reap(&mut self) {
        let mut completions = std::mem::take(&mut self.completions);
        self.ring.reap(&mut completions);
        for completion in completions.drain(..) {
            let token = completion.token;
            if token == TOKEN_MAIL {
                continue;
            }
            if token & TOKEN_KICK != 0 {
                let index = task_of(token);
                match completion.result {
                    Ok(()) => self.rouse(index),
                    Err(error) => {
                        if let Some(lane) = lane_mut(&mut self.lanes, index) {
                            lane.break_down(&format_args!("its kick eventfd failed: {error}"));
                        }
                    }
                }
                continue;
            }
            self.step(task_of(token), |task, mover| task.moved(mover, completion));
        }
        self.completions = completions;
    }

    /// Puts a lane in line.
    fn rouse(&mut self, index: u32) {
        let Some(lane) = lane_mut(&mut self.lanes, index) else {
            return;
        };
        if !lane.is_taking() || lane.is_ready {
            return;
        }
        if matches!(lane.state, LaneState::Armed) {
            lane.state = LaneState::Awake;
            lane.queue.disarm();
        }
        lane.is_ready = true;
        let at = lane.share;
        if let Some(share) = self.shares.get_mut(at) {
            share.ready.push_back(index);
        }
        self.line_up(at);
    }

    fn task(&self, id: u32) -> &Task {
        let task = self.tasks[place(id)].as_ref();
        task.expect("a task in use is in its slot")
    }

    fn task_mut(&mut self, id: u32) -> &mut Task {
        let task = self.tasks[place(id)].as_mut();
        task.expect("a task in use is in its slot")
    }

    /// Puts in line what has, or is likely to have, something to take.
    fn look(&mut self) {
        for at in 0..self.touched.len() {
            // A guest that gets something back often has something new: look before it kicks.
            self.rouse(self.touched[at]);
        }
        let mut at = 0;
        while let Some(index) = self.dry.get(at).copied() {
            let Some(lane) = lane(&self.lanes, index) else {
                self.dry.swap_remove(at);
                continue;
            };
            if lane.is_ready || !lane.is_taking() || lane.queue.is_waiting() {
                self.dry.swap_remove(at);
                self.rouse(index);
            } else {
                at += 1;
            }
        }
    }
}

fn place(id: u32) -> usize {
    usize::try_from(id).expect("usize has at least 32 bits")
}

fn lane(lanes: &Slots<Lane>, index: u32) -> Option<&Lane> {
    lanes.get(index)
}

fn lane_mut(lanes: &mut Slots<Lane>, index: u32) -> Option<&mut Lane> {
    lanes.get_mut(index)
}
