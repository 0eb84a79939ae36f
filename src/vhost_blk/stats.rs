//! Counters of a served disk.

use std::time::Duration;

use crate::metrics::{Counter, Histogram, HistogramSnapshot};
use crate::virtio::blk::Op;

/// One kind of operation.
#[derive(Debug, Default)]
struct OpStats {
    ops: Counter,
    bytes: Counter,
    errors: Counter,
    latency: Histogram,
}

impl OpStats {
    fn add_to(&self, sum: &mut OpCounts) {
        sum.ops += self.ops.get();
        sum.bytes += self.bytes.get();
        sum.errors += self.errors.get();
        sum.latency.merge(&self.latency.snapshot());
    }
}

/// Counters of one queue; written by its worker alone.
#[derive(Debug, Default)]
pub(super) struct LaneStats {
    read: OpStats,
    write: OpStats,
    flush: OpStats,
    /// DISCARD and WRITE_ZEROES.
    discard: OpStats,
    other: OpStats,
    broken: Counter,
    parked: Counter,
}

impl LaneStats {
    pub(super) fn record(&self, op: Op, bytes: u64, is_ok: bool, time: Duration) {
        let stats = match op {
            Op::In => &self.read,
            Op::Out => &self.write,
            Op::Flush => &self.flush,
            Op::Discard | Op::WriteZeroes => &self.discard,
            Op::GetId | Op::Unknown => &self.other,
        };
        stats.ops.add(1);
        stats.latency.record(time);
        if is_ok {
            stats.bytes.add(bytes);
        } else {
            stats.errors.add(1);
        }
    }

    pub(super) fn record_broken(&self) {
        self.broken.add(1);
    }

    pub(super) fn record_parked(&self) {
        self.parked.add(1);
    }

    pub(super) fn add_to(&self, sum: &mut DiskStats) {
        self.read.add_to(&mut sum.read);
        self.write.add_to(&mut sum.write);
        self.flush.add_to(&mut sum.flush);
        self.discard.add_to(&mut sum.discard);
        self.other.add_to(&mut sum.other);
        sum.broken_queues += self.broken.get();
        sum.parked += self.parked.get();
    }
}

/// Counts of one kind of operation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OpCounts {
    /// Requests completed.
    pub ops: u64,
    /// Bytes moved, discarded or zeroed by those that succeeded.
    pub bytes: u64,
    /// Of `ops`, those that failed.
    pub errors: u64,
    /// From taking a request off its ring to giving it back.
    pub latency: HistogramSnapshot,
}

/// A disk's counters since it was added.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DiskStats {
    /// IN.
    pub read: OpCounts,
    /// OUT.
    pub write: OpCounts,
    /// FLUSH. The flush after each write of a guest without a write cache counts with the write.
    pub flush: OpCounts,
    /// DISCARD and WRITE_ZEROES.
    pub discard: OpCounts,
    /// GET_ID and what is not supported.
    pub other: OpCounts,
    /// Queues given up because the guest broke the rules.
    pub broken_queues: u64,
    /// Sessions ended because the client had taken memory away that it had shared.
    pub lost_sessions: u64,
    /// Times a request had to wait for the pool: for space, for a fork, for a copy to end.
    pub parked: u64,
}
