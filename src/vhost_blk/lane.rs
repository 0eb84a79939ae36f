//! One virtqueue on its worker.

use std::fmt::Display;
use std::rc::Rc;
use std::sync::mpsc::SyncSender;
use std::task::Waker;

use crate::cowdisk::Tier;
use crate::sync::Arc;
use crate::sys::call::Caller;
use crate::sys::fd::EventFd;
use crate::sys::mmap::GuestPin;
use crate::sys::uring::{FileIndex, PollHandle};
use crate::virtio::queue::SplitQueue;

use super::device::{Device, Leash};
use super::events::EventKind;
use super::files::LaneFiles;
use super::stats::LaneStats;

/// A base that the ring may read by itself.
#[derive(Debug, Clone, Copy)]
pub(super) struct RingBase {
    pub(super) file: FileIndex,
    /// Bytes; beyond them it reads as zeros.
    pub(super) len: u64,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Lane {
    pub(super) device: Arc<Device>,
    pub(super) leash: Arc<Leash>,
    pub(super) queue: SplitQueue,
    pub(super) memory: GuestPin,
    pub(super) features: u64,
    pub(super) tier: Tier,
    pub(super) files: LaneFiles,
    pub(super) base: Option<RingBase>,
    pub(super) poll: Option<PollHandle>,
    /// The worker's.
    pub(super) caller: Rc<Caller>,
    pub(super) call: Option<Arc<EventFd>>,
    pub(super) error: Option<Arc<EventFd>>,
    pub(super) stats: Arc<LaneStats>,
    /// What its disk calls when what it refused is worth another try.
    pub(super) waker: Waker,
    /// Its disk's share of the worker.
    pub(super) share: u32,
    /// Requests taken and not given back.
    pub(super) in_flight: u16,
    pub(super) state: LaneState,
    /// In the worker's list of lanes that have, or may have, something to take.
    pub(super) is_ready: bool,
    /// In the worker's list of lanes that have something to publish.
    pub(super) is_touched: bool,
}

/// What a lane does with its avail ring.
#[derive(Debug)]
pub(super) enum LaneState {
    /// Kicks are asked for; nothing is to be taken until one comes.
    Armed,
    /// The worker looks by itself.
    Awake,
    /// The guest broke the rules: nothing is taken any more.
    Broken,
    /// Nothing is taken any more; the last completion answers with the index to resume from.
    Stopping { reply: SyncSender<u16> },
}

impl Lane {
    /// Whether requests may be taken.
    pub(super) fn is_taking(&self) -> bool {
        match self.state {
            LaneState::Armed | LaneState::Awake => true,
            LaneState::Broken | LaneState::Stopping { .. } => false,
        }
    }

    /// Gives the queue up.
    pub(super) fn break_down(&mut self, reason: &dyn Display) {
        if self.is_taking() {
            self.state = LaneState::Broken;
            self.stats.record_broken();
            self.device.report(EventKind::QueueBroken, reason);
            self.signal_error();
        }
    }

    /// Gives the queue and its session up if its memory was taken away.
    pub(super) fn check_memory(&mut self) {
        if self.memory.is_lost() {
            self.break_down(&"guest memory is gone");
            self.leash.cut();
        }
    }

    /// Shows the guest what was completed and tells it so if it wants to be told.
    pub(super) fn publish(&mut self) {
        if self.queue.publish() {
            self.signal_call();
        }
    }

    /// Tells the guest to look at its used ring.
    pub(super) fn signal_call(&self) {
        self.signal(self.call.as_deref());
    }

    /// Tells the front end that the queue was given up.
    pub(super) fn signal_error(&self) {
        self.signal(self.error.as_deref());
    }

    /// Fails only where the kernel has no memory for a request of some bytes, and ends processes.
    fn signal(&self, event: Option<&EventFd>) {
        if let Some(event) = event {
            drop(self.caller.signal(event));
        }
    }
}
