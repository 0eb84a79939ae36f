//! One served disk: what its sessions and queues share.

use std::fmt::Display;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::SyncSender;

use crate::cowdisk::Disk;
use crate::metrics::Counter;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Arc, Mutex};
use crate::virtio::blk;

use super::events::{Event, EventKind, Reporter};
use super::helpers::{DiskHelpers, Flusher, Ticket, Work};
use super::stats::{DiskStats, LaneStats};

/// See the module.
#[derive(Debug)]
pub(super) struct Device {
    pub(super) disk: Disk,
    pub(super) queues_max: u16,
    pub(super) flusher: Arc<Flusher>,
    helpers: DiskHelpers,
    /// Guest memory may be in files of any kind.
    pub(super) any_memory: bool,
    /// Sessions that lost their memory.
    lost_sessions: Counter,
    /// The `writeback` field of the configuration space. As it was written last, through resets
    /// and sessions: front ends keep a copy that they show to guests, and do not ask again. A guest
    /// that saw no write cache sends no flushes.
    writeback: AtomicBool,
    /// A front end was told of `writeback`, or told us, or its guest flushes. Until then there may be
    /// a guest that turned the cache off before this server was started, and that its front end
    /// does not tell us of.
    is_agreed: AtomicBool,
    stats: Mutex<Stats>,
    reporter: Reporter,
}

#[derive(Debug, Default)]
struct Stats {
    /// Of queues that stopped.
    past: DiskStats,
    running: Vec<Arc<LaneStats>>,
}

impl Device {
    pub(super) fn new(
        disk: Disk,
        queues_max: u16,
        flusher: Arc<Flusher>,
        helpers: DiskHelpers,
        events: Option<SyncSender<Event>>,
        any_memory: bool,
    ) -> Self {
        Self {
            disk,
            queues_max,
            flusher,
            helpers,
            any_memory,
            lost_sessions: Counter::default(),
            writeback: AtomicBool::new(true),
            is_agreed: AtomicBool::new(false),
            stats: Mutex::new(Stats::default()),
            reporter: Reporter::new(events),
        }
    }

    /// Tells the server's owner, if it wants to know.
    pub(super) fn report(&self, kind: EventKind, reason: &dyn Display) {
        self.reporter.report(&self.disk.name(), kind, reason);
    }

    /// Has `work` for this disk done on another thread.
    pub(super) fn submit(&self, work: Work, ticket: Ticket) {
        let me = std::ptr::from_ref(self).addr();
        self.helpers.submit(me, work, ticket);
    }

    /// Tells nobody anything any more.
    pub(super) fn silence(&self) {
        self.reporter.close();
    }

    pub(super) fn features(&self) -> u64 {
        blk::features(self.disk.is_read_only(), self.queues_max > 1)
    }

    /// The configuration space, for a front end to go by.
    pub(super) fn config(&self) -> blk::Config {
        self.agree();
        blk::Config::new(&blk::Geometry {
            size: self.disk.size(),
            block_size: self.disk.block_size(),
            cluster_size: self.disk.cluster_size(),
            queues: self.queues_max,
            writeback: self.writeback.load(Ordering::SeqCst),
        })
    }

    pub(super) fn set_writeback(&self, writeback: bool) {
        self.writeback.store(writeback, Ordering::SeqCst);
        self.agree();
    }

    /// Whoever is at the other end knows whether there is a write cache: a guest that flushes does.
    pub(super) fn agree(&self) {
        self.is_agreed.store(true, Ordering::SeqCst);
    }

    /// Whether a driver that accepted `features` relies on FLUSH.
    pub(super) fn is_writeback(&self, features: u64) -> bool {
        let is_on = self.is_agreed.load(Ordering::Relaxed);
        blk::is_writeback(features, is_on && self.writeback.load(Ordering::Relaxed))
    }

    /// Counters for a queue that starts.
    pub(super) fn open_stats(&self) -> Arc<LaneStats> {
        let stats = Arc::new(LaneStats::default());
        self.stats.lock().running.push(Arc::clone(&stats));
        stats
    }

    /// Keeps the counts of a queue that stopped.
    pub(super) fn close_stats(&self, lane: &Arc<LaneStats>) {
        let mut stats = self.stats.lock();
        stats.running.retain(|running| !Arc::ptr_eq(running, lane));
        lane.add_to(&mut stats.past);
    }

    pub(super) fn stats(&self) -> DiskStats {
        let stats = self.stats.lock();
        let mut all = stats.past.clone();
        all.lost_sessions = self.lost_sessions.get();
        for lane in &stats.running {
            lane.add_to(&mut all);
        }
        all
    }
}

/// How a session's queues end it.
#[derive(Debug)]
pub(super) struct Leash {
    device: Arc<Device>,
    stream: Arc<UnixStream>,
    is_cut: AtomicBool,
}

impl Leash {
    pub(super) fn new(device: Arc<Device>, stream: Arc<UnixStream>) -> Self {
        Self {
            device,
            stream,
            is_cut: AtomicBool::new(false),
        }
    }

    /// The client took its memory away: hangs up, once.
    pub(super) fn cut(&self) {
        if !self.is_cut.swap(true, Ordering::SeqCst) {
            self.device.lost_sessions.add(1);
            self.device
                .report(EventKind::MemoryLost, &"its file was truncated");
            // Fails if the client has gone by itself, which is as good.
            drop(self.stream.shutdown(Shutdown::Both));
        }
    }
}
