//! Taking requests off their rings, letting them go on, giving them back.

use crate::virtio::blk::{Op, Status};
use crate::virtio::queue::Chain;

use super::waiting::Parked;
use super::{Worker, lane, lane_mut, place};
use crate::vhost_blk::lane::LaneState;
use crate::vhost_blk::task::{Mover, Next, Task};

impl Worker {
    /// Takes one request. `None`: nothing is to be taken from this lane any more.
    pub(super) fn take(&mut self, index: u32) -> Option<bool> {
        let mut chain = std::mem::take(&mut self.chain);
        let taken = self.take_into(index, &mut chain);
        self.chain = chain;
        taken
    }

    pub(super) fn take_into(&mut self, index: u32, chain: &mut Chain) -> Option<bool> {
        let lane = lane_mut(&mut self.lanes, index)?;
        if !lane.is_taking() {
            return None;
        }
        let avail = lane.queue.next_avail();
        match lane.queue.pop(&lane.memory, chain) {
            Ok(true) => {}
            Ok(false) => return Some(false),
            Err(fault) => {
                lane.break_down(&fault);
                return None;
            }
        }
        if lane.in_flight >= lane.queue.size() {
            lane.break_down(&"more requests are in flight than the queue has entries");
            return None;
        }
        let id = self.free.pop().unwrap_or_else(|| {
            self.tasks.push(None);
            u32::try_from(self.tasks.len() - 1).expect("tasks are bounded by queue sizes")
        });
        let slot = place(id);
        let mut task = self.tasks[slot].take().unwrap_or_default();
        task.reset();
        task.lane = index;
        task.head = chain.head;
        task.avail = avail;
        let parsed = task
            .request
            .parse(&lane.memory, chain, lane.device.disk.size());
        let verdict = match parsed {
            Ok(verdict) => verdict,
            Err(fault) => {
                lane.break_down(&fault);
                self.tasks[slot] = Some(task);
                self.free.push(id);
                return None;
            }
        };
        lane.in_flight += 1;
        task.memory = Some(lane.memory.clone());
        task.began = Some(self.now);
        self.tasks[slot] = Some(task);
        match verdict {
            Ok(()) => self.step(id, |task, mover| task.begin(mover)),
            Err(status) => self.step(id, |_, _| Next::Finish(status)),
        }
        Some(true)
    }

    /// Lets a task go on and does what it asks for.
    pub(super) fn step(&mut self, id: u32, go: impl FnOnce(&mut Task, &mut Mover<'_>) -> Next) {
        let slot = place(id);
        let mut task = self.tasks[slot]
            .take()
            .expect("a task in use is in its slot");
        let lane = lane(&self.lanes, task.lane).expect("a lane outlives its tasks");
        let share = lane.share;
        let before = task.moving();
        let mut mover = Mover {
            ring: &mut self.ring,
            bounce: &mut self.bounce,
            runs: &mut self.runs,
            lane,
            task: id,
            spent: 0,
            context: &self.context,
        };
        let next = go(&mut task, &mut mover);
        self.spent = self.spent.saturating_add(mover.spent);
        let after = task.moving();
        if matches!(next, Next::Again | Next::Finish(Status::Ok))
            && task.full_since.take().is_some()
        {
            self.waiting.hear_of_space();
        }
        let parked = match next {
            Next::Wait => None,
            Next::Again => {
                if let Some(share) = self.shares.get_mut(share) {
                    share.again.push_back(id);
                }
                None
            }
            Next::Busy => Some(Parked::Busy),
            Next::Full => Some(Parked::Full),
            Next::HostFull => Some(Parked::HostFull),
            Next::Starved => Some(Parked::Starved),
            Next::Finish(status) => {
                self.finish(&mut task, status);
                self.free.push(id);
                None
            }
        };
        self.tasks[slot] = Some(task);
        self.account(share, before, after, next);
        if let Some(why) = parked {
            self.park(id, why);
        }
    }

    pub(super) fn finish(&mut self, task: &mut Task, status: Status) {
        let lane = lane_mut(&mut self.lanes, task.lane).expect("a lane outlives its tasks");
        if let Some(memory) = &task.memory {
            task.request.answer(memory, status);
        }
        lane.queue.push_used(task.head, task.request.used_len);
        let bytes = match task.request.op {
            Op::In | Op::Out => u64::from(task.request.len),
            Op::Discard | Op::WriteZeroes => task.request.ranges.iter().map(|r| r.len).sum(),
            Op::Flush | Op::GetId | Op::Unknown => 0,
        };
        let began = task.began.unwrap_or(self.now);
        let time = self.now.saturating_duration_since(began);
        lane.stats
            .record(task.request.op, bytes, status == Status::Ok, time);
        let index = task.lane;
        task.reset();
        self.leave(index);
    }

    /// A task of this lane is over.
    pub(super) fn leave(&mut self, index: u32) {
        let lane = lane_mut(&mut self.lanes, index).expect("a lane outlives its tasks");
        lane.in_flight -= 1;
        if !lane.is_touched {
            lane.is_touched = true;
            self.touched.push(index);
        }
    }

    pub(super) fn publish(&mut self) {
        while let Some(index) = self.touched.pop() {
            let Some(lane) = lane_mut(&mut self.lanes, index) else {
                continue;
            };
            lane.is_touched = false;
            lane.publish();
            if matches!(lane.state, LaneState::Stopping { .. }) {
                self.close_if_drained(index);
            }
        }
    }
}
