//! One disk's share of a worker: its queues that have, or may have, something to take, and its
//! requests that wait. Turns go round between shares, not between queues or requests: a guest gets no
//! more than another for having many of them.

use std::collections::VecDeque;
use std::task::Waker;

use crate::sync::Arc;
use crate::vhost_blk::device::Device;
use crate::vhost_blk::mailbox::{Alarm, Mailbox};

/// Requests between two slices at which nothing more is taken: what was taken must be done before
/// a queue can stop.
const AGAIN_MAX: usize = 8;
/// Bytes in flight at which nothing more is started: what keeps a device busy, and soon done where
/// somebody else wants it.
const MOVING_MAX: u64 = 1 << 20;
/// Busy requests that are tried in vain after a wake before the others are left for the next.
const MISSES_MAX: usize = 16;

/// What of a share's has its turn: large requests and others alternate.
#[derive(Debug, Clone, Copy)]
pub(super) enum Turn {
    /// A request is taken.
    New,
    /// One is gone on with.
    Again,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Share {
    /// Identifies it.
    pub(super) device: Arc<Device>,
    alarm: Arc<Alarm>,
    /// Queues that are open.
    pub(super) lanes: usize,
    /// Lanes to take from, in turn.
    pub(super) ready: VecDeque<u32>,
    /// Requests between two slices.
    pub(super) again: VecDeque<u32>,
    /// Requests that wait for another of the disk's, or for a fork.
    busy: VecDeque<u32>,
    /// Of those, how many are worth a try, and how many were tried in vain since the last wake.
    tries: usize,
    misses: usize,
    /// Requests that wait for space, the longest first.
    pub(super) full: VecDeque<u32>,
    /// Requests that wait for buffers.
    pub(super) starved: VecDeque<u32>,
    /// Bytes on their way between a device and the guest.
    pub(super) moving: u64,
    /// What it may still spend, or owes.
    pub(super) credit: i64,
    turn: Turn,
    /// In line for a turn.
    pub(super) is_in_line: bool,
    /// In line for space.
    pub(super) is_in_full_line: bool,
    /// In line for buffers.
    pub(super) is_in_starved_line: bool,
}

impl Share {
    pub(super) fn new(device: Arc<Device>, mailbox: Arc<Mailbox>, index: u32) -> Self {
        Self {
            device,
            alarm: Arc::new(Alarm::new(mailbox, index)),
            lanes: 0,
            ready: VecDeque::new(),
            again: VecDeque::new(),
            busy: VecDeque::new(),
            tries: 0,
            misses: 0,
            full: VecDeque::new(),
            starved: VecDeque::new(),
            moving: 0,
            credit: 0,
            turn: Turn::Again,
            is_in_line: false,
            is_in_full_line: false,
            is_in_starved_line: false,
        }
    }

    /// What its disk calls when what it refused is worth another try.
    pub(super) fn waker(&self) -> Waker {
        Waker::from(Arc::clone(&self.alarm))
    }

    /// Its disk called.
    pub(super) fn hear(&mut self) {
        self.alarm.heard();
        self.tries = self.busy.len();
        self.misses = 0;
    }

    /// A request is to wait until the disk calls. Each that is refused again has told the disk where
    /// to call, so the rest can be left for then.
    pub(super) fn park_busy(&mut self, id: u32) {
        self.busy.push_back(id);
        self.misses += 1;
        if self.misses >= MISSES_MAX {
            self.tries = 0;
        }
    }

    /// The next busy request that is worth a try.
    pub(super) fn pop_busy(&mut self) -> Option<u32> {
        self.tries = self.tries.checked_sub(1)?;
        self.busy.pop_front()
    }

    /// What has its turn now.
    pub(super) fn alternate(&mut self) -> Turn {
        self.turn = match self.turn {
            Turn::New => Turn::Again,
            Turn::Again => Turn::New,
        };
        self.turn
    }

    /// Whether more may be taken off its rings.
    pub(super) fn is_taking(&self) -> bool {
        self.again.len() < AGAIN_MAX
    }

    /// Whether more may be started now.
    pub(super) fn has_room(&self) -> bool {
        self.moving < MOVING_MAX
    }

    /// Whether a turn would be of use.
    pub(super) fn wants_turn(&self) -> bool {
        let has_work = !self.again.is_empty() || !self.ready.is_empty() || self.tries > 0;
        has_work && self.has_room()
    }
}
