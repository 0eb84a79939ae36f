//! Requests that wait. They stand in queues, one a share and cause, and cost nothing there: when the
//! cause is gone the shares are served in turn, the head of each, until one has to wait on.

use std::collections::{BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use crate::sync::Arc;
use crate::vhost_blk::events::EventKind;
use crate::vhost_blk::task::Next;
use crate::virtio::blk::Status;

use super::{Worker, lane, lane_mut};

/// How often one request that found the host full is tried again: nobody says when it is not.
const HOST_RETRY: Duration = Duration::from_millis(100);
/// Requests that are given space, or buffers, before others have their turn.
const GRANTS: usize = 16;

/// Why a request waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Parked {
    /// For another request of its disk, or a fork.
    Busy,
    /// For space in the pool.
    Full,
    /// For space on the host.
    HostFull,
    /// For buffers.
    Starved,
}

/// Shares that wait for space in one pool.
#[derive(Debug)]
struct SpaceLine {
    /// The pool's address.
    pool: usize,
    shares: VecDeque<u32>,
}

/// Who waits for what, and until when.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    space: Vec<SpaceLine>,
    /// There may be space: those in line are served.
    is_space: bool,
    host_retry: Option<Instant>,
    /// When who waits for space gives up, and which task it is.
    deadlines: BTreeSet<(Instant, u32)>,
    /// The head of a queue that is just being tried: it goes back there.
    head: Option<u32>,
    /// Shares that wait for buffers.
    starved: VecDeque<u32>,
}

impl Waiting {
    /// There may be space.
    pub(super) fn hear_of_space(&mut self) {
        self.is_space |= !self.deadlines.is_empty();
    }

    /// Somebody is to be tried at once.
    pub(super) fn is_due(&self) -> bool {
        self.is_space
    }

    /// When somebody is to be tried, or gives up.
    pub(super) fn next(&self) -> Option<Instant> {
        let first = self.deadlines.first().map(|(at, _)| *at);
        [first, self.host_retry].into_iter().flatten().min()
    }
}

impl Worker {
    pub(super) fn park(&mut self, id: u32, why: Parked) {
        let index = self.task(id).lane;
        let Some(lane) = lane(&self.lanes, index) else {
            return;
        };
        lane.stats.record_parked();
        let at = lane.share;
        let share = self.shares.get_mut(at).expect("a share outlives its lanes");
        match why {
            Parked::Busy => share.park_busy(id),
            Parked::Starved => {
                share.starved.push_back(id);
                if !std::mem::replace(&mut share.is_in_starved_line, true) {
                    self.waiting.starved.push_back(at);
                }
                self.bounce.is_waited_for = true;
            }
            Parked::Full => {
                self.tell_of_wait(id, at, "the pool is full");
                self.park_full(id, at);
            }
            Parked::HostFull => {
                let retry = self.now + HOST_RETRY;
                self.waiting.host_retry.get_or_insert(retry);
                self.tell_of_wait(id, at, "the host is full, below the pool");
                self.park_full(id, at);
            }
        }
    }

    /// The first request of a share that waits for space is told of: by when it fails there may be some.
    fn tell_of_wait(&self, id: u32, at: u32, why: &str) {
        let is_new = self.task(id).full_since.is_none();
        let share = self.shares.get(at).filter(|share| share.full.is_empty());
        if let Some(share) = share.filter(|_| is_new) {
            let limit = self.options.no_space_timeout.as_secs();
            let reason = format_args!("{why}; they fail after {limit} s");
            share.device.report(EventKind::SpaceAwaited, &reason);
        }
    }

    fn park_full(&mut self, id: u32, at: u32) {
        let limit = self.options.no_space_timeout;
        let now = self.now;
        let since = *self.task_mut(id).full_since.get_or_insert(now);
        if now.saturating_duration_since(since) >= limit {
            self.give_up(id);
            return;
        }
        self.waiting.deadlines.insert((since + limit, id));
        let share = self.shares.get_mut(at).expect("a share outlives its lanes");
        if self.waiting.head == Some(id) {
            share.full.push_front(id);
        } else {
            share.full.push_back(id);
        }
        if !std::mem::replace(&mut share.is_in_full_line, true) {
            self.line_up_for_space(at);
        }
    }

    /// Who has clusters reserved is served before the others: it may find some where they do not.
    fn line_up_for_space(&mut self, at: u32) {
        let Some(share) = self.shares.get(at) else {
            return;
        };
        let disk = &share.device.disk;
        let pool = Arc::as_ptr(disk.pool()).addr();
        let lines = &mut self.waiting.space;
        let known = lines.iter().position(|line| line.pool == pool);
        let known = known.unwrap_or_else(|| {
            let shares = VecDeque::new();
            lines.push(SpaceLine { pool, shares });
            lines.len() - 1
        });
        if disk.has_reserve_left() {
            lines[known].shares.push_front(at);
        } else {
            lines[known].shares.push_back(at);
        }
    }

    /// Answers what has waited for space too long.
    fn give_up(&mut self, id: u32) {
        let limit = self.options.no_space_timeout.as_secs();
        if let Some(lane) = lane(&self.lanes, self.task(id).lane) {
            let reason = format_args!("there was no space for {limit} s");
            lane.device.report(EventKind::RequestFailed, &reason);
        }
        self.step(id, |_, _| Next::Finish(Status::IoErr));
    }

    /// Takes a task that waits for space out of its queue.
    fn unpark_full(&mut self, id: u32) {
        let task = self.task(id);
        let since = task.full_since.expect("it has waited since some time");
        let at = lane(&self.lanes, task.lane).map(|lane| lane.share);
        let deadline = since + self.options.no_space_timeout;
        self.waiting.deadlines.remove(&(deadline, id));
        if let Some(share) = at.and_then(|at| self.shares.get_mut(at)) {
            let place = share.full.iter().position(|waits| *waits == id);
            if let Some(place) = place {
                share.full.remove(place);
            }
        }
    }

    /// Serves those who wait, as far as what they wait for is there.
    pub(super) fn retry(&mut self) {
        while let Some((at, id)) = self.waiting.deadlines.first().copied() {
            if at > self.now {
                break;
            }
            self.unpark_full(id);
            self.give_up(id);
        }
        self.grant_space();
        self.grant_buffers();
        self.give_up_waiting();
    }

    fn grant_space(&mut self) {
        let is_host_due = self.waiting.host_retry.is_some_and(|at| at <= self.now);
        if is_host_due {
            // As long as anybody waits: a try may end anywhere.
            let waits = !self.waiting.deadlines.is_empty();
            self.waiting.host_retry = waits.then_some(self.now + HOST_RETRY);
        }
        let is_space = std::mem::take(&mut self.waiting.is_space);
        let most = if is_space {
            GRANTS
        } else {
            usize::from(is_host_due)
        };
        if most == 0 {
            return;
        }
        for line in 0..self.waiting.space.len() {
            let granted = (0..most).take_while(|_| self.grant_one(line)).count();
            // There may be more where that came from.
            self.waiting.is_space |= is_space && granted == most;
        }
        self.waiting.space.retain(|line| !line.shares.is_empty());
    }

    /// Tries the longest waiting request of the next share in a line; whether it need not wait on.
    fn grant_one(&mut self, line: usize) -> bool {
        while let Some(at) = self.waiting.space[line].shares.pop_front() {
            let Some(share) = self.shares.get_mut(at) else {
                continue;
            };
            let Some(id) = share.full.front().copied() else {
                share.is_in_full_line = false;
                continue;
            };
            self.unpark_full(id);
            self.waiting.head = Some(id);
            self.step(id, |task, mover| task.begin(mover));
            self.waiting.head = None;
            let Some(share) = self.shares.get_mut(at) else {
                continue;
            };
            if share.full.front() == Some(&id) {
                self.waiting.space[line].shares.push_front(at);
                return false;
            }
            if share.full.is_empty() {
                share.is_in_full_line = false;
            } else {
                self.line_up_for_space(at);
            }
            return true;
        }
        false
    }

    fn grant_buffers(&mut self) {
        if self.waiting.starved.is_empty() {
            return;
        }
        for _ in 0..self.waiting.starved.len().min(GRANTS) {
            self.bounce.is_waited_for = false;
            let Some(at) = self.waiting.starved.pop_front() else {
                break;
            };
            if !self.bounce.has_room() {
                self.waiting.starved.push_front(at);
                break;
            }
            let Some(share) = self.shares.get_mut(at) else {
                continue;
            };
            share.is_in_starved_line = false;
            // What it has in flight already comes back, and with it this.
            let id = share.has_room().then(|| share.starved.pop_front());
            if let Some(id) = id.flatten() {
                self.step(id, |task, mover| task.begin(mover));
            }
            if let Some(share) = self.shares.get_mut(at)
                && !share.starved.is_empty()
                && !std::mem::replace(&mut share.is_in_starved_line, true)
            {
                self.waiting.starved.push_back(at);
            }
        }
        self.bounce.is_waited_for = !self.waiting.starved.is_empty();
    }

    /// Whether somebody who waits for buffers can have them.
    pub(super) fn has_grants(&self) -> bool {
        let shares = &self.shares;
        let has_room = |at: &u32| shares.get(*at).is_some_and(|share| share.has_room());
        self.waiting.is_due()
            || (self.bounce.could_lend() && self.waiting.starved.iter().any(has_room))
    }

    /// Queues that are to stop do not wait for space: what waits for it on them is put back or
    /// failed once nothing else is in flight there.
    fn give_up_waiting(&mut self) {
        for at in 0..self.stopping.len() {
            self.put_back(self.stopping[at]);
        }
    }

    /// What was taken last goes back to the ring: the base that the client resumes from leaves it
    /// out, as if it had never been taken. A request that an answered one follows in the ring
    /// cannot be left out of a base, which is one index, so it fails: once GET_VRING_BASE is
    /// answered nothing may be in flight (vhost-user, "Ring states").
    fn put_back(&mut self, index: u32) {
        let Some(lane) = lane(&self.lanes, index) else {
            return;
        };
        let (in_flight, next) = (usize::from(lane.in_flight), lane.queue.next_avail());
        let waiting = &self
            .shares
            .get(lane.share)
            .expect("a share outlives its lanes")
            .full;
        if waiting.is_empty() {
            return;
        }
        let of_it = waiting.iter().filter(|id| self.task(**id).lane == index);
        let mut given_up: Vec<u32> = of_it.copied().collect();
        if given_up.is_empty() || given_up.len() < in_flight {
            return;
        }
        // The last taken first.
        given_up.sort_by_key(|id| next.wrapping_sub(self.task(*id).avail));
        for id in given_up {
            self.unpark_full(id);
            let avail = self.task(id).avail;
            let lane = lane_mut(&mut self.lanes, index);
            if lane.is_some_and(|lane| lane.queue.untake(avail)) {
                self.forget(id);
            } else {
                self.step(id, |_, _| Next::Finish(Status::IoErr));
            }
        }
    }

    /// Ends a task without an answer.
    fn forget(&mut self, id: u32) {
        let task = self.task_mut(id);
        let index = task.lane;
        task.reset();
        self.free.push(id);
        self.leave(index);
    }

    /// A share goes: nobody is in its queues any more.
    pub(super) fn close_share(&mut self, at: u32) {
        self.shares.remove(at);
        self.line.retain(|index| *index != at);
        self.waiting.starved.retain(|index| *index != at);
        for line in &mut self.waiting.space {
            line.shares.retain(|index| *index != at);
        }
    }
}
