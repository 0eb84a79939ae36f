//! DISCARD and WRITE_ZEROES: range by range, each in the parts that the disk cuts it into, with others'
//! turns between. What is less than a block is written: zeros, from nobody's memory.

use crate::cowdisk::{DiskErrorKind, Step, ZeroStep};
use crate::virtio::blk::Op;

use super::slice::COST_MAX;
use super::{Mover, Next, Stage, Task, failed};

impl Task {
    pub(super) fn unmap(&mut self, mover: &mut Mover<'_>) -> Next {
        while let Some(range) = self.request.ranges.get(self.ranges_done).copied() {
            if range.len == 0 {
                self.ranges_done += 1;
                continue;
            }
            if mover.spent >= COST_MAX {
                return self.retreat(Next::Again);
            }
            if !self.enter(mover) {
                return Next::Busy;
            }
            let Some(pass) = &self.pass else {
                return Next::Busy;
            };
            let disk = &mover.lane.device.disk;
            let waker = &mover.lane.waker;
            let (at, left) = (range.offset + self.range_done, range.len - self.range_done);
            let planned = if self.request.op == Op::Discard {
                disk.plan_discard(pass, at, left, waker)
            } else {
                disk.plan_zeroes(pass, at, left, range.may_unmap, &mut self.plan, waker)
            };
            match planned {
                Err(error) => return self.refused(mover, &error),
                Ok(ZeroStep { step, len }) => {
                    self.part = len;
                    match step {
                        Step::Done => {
                            self.full_since = None;
                            mover.spent += self.cost(range, len, disk.cluster_size());
                            self.end_part();
                        }
                        Step::Ready => return self.write_zeros(mover),
                        Step::Copy(job) => return self.copy(mover, job),
                        Step::Busy => return self.retreat(Next::Busy),
                        Step::Full => return self.retreat(Next::Full),
                    }
                }
            }
        }
        self.pass = None;
        self.written(mover)
    }

    /// Writes zeros where the plan says.
    fn write_zeros(&mut self, mover: &mut Mover<'_>) -> Next {
        self.stage = Stage::Zeroing;
        let plan = std::mem::take(&mut self.plan);
        for segment in plan.segments() {
            mover.spent += segment.len;
            self.write_zeros_at(mover, segment.to, segment.len);
        }
        self.plan = plan;
        self.settle_if_done(mover)
    }

    /// A write of zeros has ended.
    pub(super) fn zeroed(&mut self, mover: &mut Mover<'_>, failure: Option<DiskErrorKind>) -> Next {
        let disk = &mover.lane.device.disk;
        disk.complete_write(&mut self.plan, failure.is_none());
        if let Some(kind) = failure {
            self.pass = None;
            return failed(kind);
        }
        self.full_since = None;
        self.end_part();
        self.begin(mover)
    }
}
