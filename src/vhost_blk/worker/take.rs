//! Taking requests off their rings, letting them go on, parking them, giving them back.

use std::collections::VecDeque;

use crate::virtio::blk::{Op, Status};
use crate::virtio::queue::Chain;

use super::{FULL_RETRY, Parked, TURN, Worker, lane, lane_mut};
use crate::vhost_blk::events::EventKind;
use crate::vhost_blk::lane::LaneState;
use crate::vhost_blk::task::{Mover, Next, Task};

impl Worker {
    /// One turn of every lane that is in line.
    pub(super) fn serve(&mut self) {
        for _ in 0..self.ready.len() {
            let Some(index) = self.ready.pop_front() else {
                return;
            };
            self.turn(index);
        }
    }

    /// The next slice of every request that has more than one.
    pub(super) fn go_on(&mut self) {
        for _ in 0..self.again.len() {
            let Some(id) = self.again.pop_front() else {
                return;
            };
            self.step(id, |task, mover| task.begin(mover));
        }
    }

    pub(super) fn turn(&mut self, index: u32) {
        for _ in 0..TURN {
            match self.take(index) {
                Some(true) => {}
                Some(false) => {
                    if let Some(lane) = lane_mut(&mut self.lanes, index) {
                        lane.is_ready = false;
                        self.dry.push(index);
                    }
                    return;
                }
                None => {
                    if let Some(lane) = lane_mut(&mut self.lanes, index) {
                        lane.is_ready = false;
                    }
                    return;
                }
            }
        }
        self.ready.push_back(index);
    }

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
        let slot = usize::try_from(id).ok()?;
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
        let slot = usize::try_from(id).expect("usize has at least 32 bits");
        let mut task = self.tasks[slot]
            .take()
            .expect("a task in use is in its slot");
        let lane = lane(&self.lanes, task.lane).expect("a lane outlives its tasks");
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
        let next = self.ration(&mut task, next);
        let parked = match next {
            Next::Wait => None,
            Next::Again => {
                self.again.push_back(id);
                None
            }
            Next::Busy => Some(Parked::Busy),
            Next::Full => Some(Parked::Full),
            Next::Starved => Some(Parked::Starved),
            Next::Finish(status) => {
                self.finish(&mut task, status);
                self.free.push(id);
                None
            }
        };
        self.tasks[slot] = Some(task);
        if let Some(why) = parked {
            self.park(id, why);
        }
    }

    /// Turns a wait for space that has lasted too long into an error.
    pub(super) fn ration(&self, task: &mut Task, next: Next) -> Next {
        if next != Next::Full {
            return next;
        }
        let since = *task.full_since.get_or_insert(self.now);
        let limit = self.options.no_space_timeout;
        if self.now.saturating_duration_since(since) >= limit {
            if let Some(lane) = lane(&self.lanes, task.lane) {
                let reason = format_args!("there was no space for {} s", limit.as_secs());
                lane.device.report(EventKind::RequestFailed, &reason);
            }
            return Next::Finish(Status::IoErr);
        }
        next
    }

    pub(super) fn park(&mut self, id: u32, why: Parked) {
        let slot = usize::try_from(id).expect("usize has at least 32 bits");
        let index = self.tasks[slot].as_ref().map(|task| task.lane);
        if let Some(lane) = index.and_then(|index| lane(&self.lanes, index)) {
            lane.stats.record_parked();
        }
        self.parked.push_back((id, why));
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

    /// Tries parked tasks again, in the order they were parked.
    pub(super) fn retry(&mut self) {
        let is_told = std::mem::take(&mut self.is_retry);
        for _ in 0..self.parked.len() {
            let Some((id, why)) = self.parked.pop_front() else {
                return;
            };
            let is_due = match why {
                Parked::Busy => is_told,
                Parked::Full => is_told || self.is_full_due(id),
                Parked::Starved => self.bounce.has_room(),
            };
            if is_due {
                self.step(id, |task, mover| task.begin(mover));
            } else {
                self.parked.push_back((id, why));
            }
        }
        self.give_up_waiting();
    }

    /// Queues that are to stop do not wait for space: what waits for it on them is put back or
    /// failed once nothing else is in flight there.
    fn give_up_waiting(&mut self) {
        if self.parked.is_empty() {
            return;
        }
        for slot in 0..self.lanes.len() {
            let stopping = self.lanes[slot].as_ref().filter(|lane| lane.is_stopping());
            if let Some(in_flight) = stopping.map(|lane| usize::from(lane.in_flight)) {
                let index = u32::try_from(slot).expect("lanes are bounded by descriptors");
                self.put_back(index, in_flight);
            }
        }
    }

    /// What was taken last goes back to the ring: the base that the client resumes from leaves it
    /// out, as if it had never been taken. A request that an answered one follows in the ring
    /// cannot be left out of a base, which is one index, so it fails: once GET_VRING_BASE is
    /// answered nothing may be in flight (vhost-user, "Ring states").
    fn put_back(&mut self, index: u32, in_flight: usize) {
        let tasks = &self.tasks;
        let task = |id: u32| tasks[usize::try_from(id).ok()?].as_ref();
        let waits = |(id, why): &(u32, Parked)| {
            *why == Parked::Full && task(*id).is_some_and(|task| task.lane == index)
        };
        let waiting = self.parked.iter().filter(|parked| waits(parked)).count();
        if waiting < in_flight || waiting == 0 {
            return;
        }
        let (given_up, kept): (VecDeque<_>, _) = self.parked.drain(..).partition(waits);
        self.parked = kept;
        let mut given_up = Vec::from(given_up);
        let next = lane(&self.lanes, index).map_or(0, |lane| lane.queue.next_avail());
        // The last taken first.
        given_up.sort_by_key(|(id, _)| task(*id).map(|task| next.wrapping_sub(task.avail)));
        for (id, _) in given_up {
            let slot = usize::try_from(id).expect("usize has at least 32 bits");
            let avail = self.tasks[slot].as_ref().map(|task| task.avail);
            let lane = lane_mut(&mut self.lanes, index);
            let is_back = lane
                .zip(avail)
                .is_some_and(|(l, avail)| l.queue.untake(avail));
            if is_back {
                self.forget(id);
            } else {
                self.step(id, |_, _| Next::Finish(Status::IoErr));
            }
        }
    }

    /// Ends a task without an answer.
    fn forget(&mut self, id: u32) {
        let slot = usize::try_from(id).expect("usize has at least 32 bits");
        if let Some(task) = self.tasks[slot].as_mut() {
            let index = task.lane;
            task.reset();
            self.free.push(id);
            self.leave(index);
        }
    }

    pub(super) fn is_full_due(&self, id: u32) -> bool {
        let slot = usize::try_from(id).expect("usize has at least 32 bits");
        let since = self.tasks[slot].as_ref().and_then(|task| task.full_since);
        // Once a loop at most, and the loop turns at least every FULL_RETRY.
        since.is_some_and(|since| self.now.saturating_duration_since(since) >= FULL_RETRY)
    }
}
