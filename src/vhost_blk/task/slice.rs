//! Cutting large requests into slices, each of which takes a bounded time, so that whoever asks for
//! much does not make others wait for all of it. A slice begins where the last one ended and is
//! planned by itself; one is under way at a time.

use crate::cowdisk::Tier;
use crate::sys::mmap::{GuestRun, IOV_MAX};
use crate::vhost_blk::bounce::SLICE_LEN_MAX as BOUNCED_LEN_MAX;
use crate::virtio::blk::{Op, Range};

use super::{Mover, Task};

/// Most bytes that a device is asked to move at once for one request.
const DEVICE_LEN_MAX: u32 = 512 << 10;
/// Most bytes that the worker itself copies at once.
const INLINE_LEN_MAX: u32 = 256 << 10;
/// Most buffers in a slice: with padding before and after they fit into one call.
const RUNS_MAX: usize = IOV_MAX - 2;
/// A request of fewer bytes needs no look: each buffer of it has a byte.
const WHOLE_LEN_MAX: u32 = 128 << 10;
const SECTOR: u32 = 512;
/// What slices are cut at where they can be: the strictest alignment that direct I/O asks for.
const PAGE: u32 = 4096;
/// What a turn costs at most, in bytes: work on maps is counted as the bytes that could be copied in
/// the same time.
pub(super) const COST_MAX: u32 = 512 << 10;
/// Of a copy that helpers do.
pub(super) const COPY_COST: u32 = 128 << 10;
/// Of a cluster whose entry is changed.
const ZEROED_COST: u32 = 1 << 10;
/// Of a cluster that is unmapped: most are by the leaf of 64.
const UNMAPPED_COST: u32 = 128;

impl Task {
    /// The disk bytes of the next slice of an IN or OUT: offset and length.
    pub(super) fn next_slice(&self, mover: &Mover<'_>) -> (u64, u32) {
        let offset = self.request.offset + u64::from(self.done);
        let left = self.request.len - self.done;
        let data = &self.request.data;
        if left <= WHOLE_LEN_MAX && data.len() <= RUNS_MAX {
            return (offset, left);
        }
        let most = match mover.lane.tier {
            Tier::Memory => INLINE_LEN_MAX,
            Tier::Direct { .. } | Tier::Buffered if self.may_bounce(mover) => BOUNCED_LEN_MAX,
            Tier::Direct { .. } | Tier::Buffered => DEVICE_LEN_MAX,
        };
        (offset, fit(data, self.done, left.min(most)))
    }

    /// The slice in flight is done; whether that was the last.
    pub(super) fn end_slice(&mut self) -> bool {
        self.done += std::mem::take(&mut self.slice);
        self.done == self.request.len
    }

    /// The part is done.
    pub(super) fn end_part(&mut self) {
        self.range_done += std::mem::take(&mut self.part);
        let range = self.request.ranges.get(self.ranges_done);
        if range.is_some_and(|range| range.len == self.range_done) {
            self.ranges_done += 1;
            self.range_done = 0;
        }
    }

    /// What it costs to zero or unmap `len` bytes of `range`, without moving any.
    pub(super) fn cost(&self, range: Range, len: u64, cluster: u32) -> u32 {
        let one = if self.request.op == Op::Discard || range.may_unmap {
            UNMAPPED_COST
        } else {
            ZEROED_COST
        };
        let clusters = len.div_ceil(u64::from(cluster)).max(1);
        u32::try_from(clusters * u64::from(one)).unwrap_or(COST_MAX)
    }
}

/// The most bytes up to `most`, in whole sectors, that are in [`RUNS_MAX`] buffers from byte `from`
/// of `runs`. At least a sector, which is at most 512 buffers.
fn fit(runs: &[GuestRun], from: u32, most: u32) -> u32 {
    let (mut at, mut taken, mut bytes) = (0, 0, 0);
    for run in runs {
        let end = at + run.len();
        if end > from {
            bytes += end - at.max(from);
            taken += 1;
        }
        at = end;
        if bytes >= most {
            return most;
        }
        if taken == RUNS_MAX {
            break;
        }
    }
    let unit = if bytes < PAGE { SECTOR } else { PAGE };
    bytes / unit * unit
}
