//! Whose turn it is. Each share that has something to do gets the same to spend in a round, in bytes
//! or what is as good as that; what it overdraws it does without in the next.

use super::share::Turn;
use super::{Worker, lane_mut};
use crate::vhost_blk::task::Next;

/// What a share may spend in a turn, in bytes.
const CREDIT: i64 = 512 << 10;
/// Requests taken in a turn at most, before what was completed is published. Small enough that the
/// guest works on one batch while we work on the next (with 32 a guest at depth 32 and its worker only
/// ever took turns), large enough to share the system calls.
const REQUESTS: i64 = 16;

impl Worker {
    /// One turn of every share that is in line.
    pub(super) fn serve(&mut self) {
        for _ in 0..self.line.len() {
            let Some(index) = self.line.pop_front() else {
                return;
            };
            self.turn(index);
        }
    }

    fn turn(&mut self, index: u32) {
        let Some(share) = self.shares.get_mut(index) else {
            return;
        };
        share.credit = (share.credit + CREDIT).min(CREDIT);
        let mut credit = share.credit;
        while credit > 0 {
            self.spent = 0;
            if !self.do_next(index) {
                break;
            }
            credit -= i64::from(self.spent).max(CREDIT / REQUESTS);
        }
        if let Some(share) = self.shares.get_mut(index) {
            share.credit = credit;
            share.ready.rotate_left(usize::from(share.ready.len() > 1));
            // Not before: it was in line all the time.
            share.is_in_line = false;
        }
        self.line_up(index);
    }

    /// Puts a share in line that wants a turn.
    pub(super) fn line_up(&mut self, index: u32) {
        if let Some(share) = self.shares.get_mut(index)
            && !share.is_in_line
            && share.wants_turn()
        {
            share.is_in_line = true;
            self.line.push_back(index);
        }
    }

    /// Takes one request of a share a step further, or takes one; whether there was one.
    fn do_next(&mut self, index: u32) -> bool {
        let Some(share) = self.shares.get_mut(index).filter(|share| share.has_room()) else {
            return false;
        };
        if let Some(id) = share.pop_busy() {
            self.step(id, |task, mover| task.begin(mover));
            return true;
        }
        let is_done = match share.alternate() {
            Turn::New => self.take_next(index),
            Turn::Again => self.go_on(index),
        };
        is_done || self.take_next(index) || self.go_on(index)
    }

    /// The next slice of a request.
    fn go_on(&mut self, index: u32) -> bool {
        let share = self.shares.get_mut(index);
        let Some(id) = share.and_then(|share| share.again.pop_front()) else {
            return false;
        };
        self.step(id, |task, mover| task.begin(mover));
        true
    }

    /// Takes a request off one of the share's rings.
    fn take_next(&mut self, index: u32) -> bool {
        loop {
            let share = self.shares.get(index).filter(|share| share.is_taking());
            let Some(ring) = share.and_then(|share| share.ready.front().copied()) else {
                return false;
            };
            let taken = self.take(ring);
            if taken == Some(true) {
                return true;
            }
            if let Some(share) = self.shares.get_mut(index) {
                share.ready.pop_front();
            }
            if let Some(lane) = lane_mut(&mut self.lanes, ring) {
                lane.is_ready = false;
                if taken.is_some() {
                    self.dry.push(ring);
                }
            }
        }
    }

    /// Tells whether a step has made room or work for another turn of its share.
    pub(super) fn account(&mut self, index: u32, before: u32, after: u32, next: Next) {
        let Some(share) = self.shares.get_mut(index) else {
            return;
        };
        share.moving = share.moving + u64::from(after) - u64::from(before);
        if after < before || next == Next::Again {
            self.line_up(index);
        }
    }
}
