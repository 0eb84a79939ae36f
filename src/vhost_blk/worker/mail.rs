//! Doing what other threads ask for: queues come and go, memory changes, work elsewhere ends.

use std::rc::Rc;
use std::sync::mpsc::SyncSender;

use crate::sys::mmap::GuestPin;
use crate::vhost_blk::lane::{Lane, LaneState, RingBase};
use crate::vhost_blk::mailbox::{Done, LaneId, Message, Start};

use super::{TOKEN_KICK, Worker, lane_mut};

impl Worker {
    pub(super) fn read_mail(&mut self) {
        let mut messages = std::mem::take(&mut self.messages);
        self.is_retry |= self.context.mailbox.collect(&mut messages);
        for message in messages.drain(..) {
            self.obey(message);
        }
        self.messages = messages;
    }

    pub(super) fn obey(&mut self, message: Message) {
        match message {
            Message::Start(start) => self.open(*start),
            Message::Stop { lane, reply } => self.stop(lane, reply),
            Message::Call {
                lane: LaneId(index),
                call,
            } => {
                if let Some(lane) = lane_mut(&mut self.lanes, index) {
                    lane.call = call;
                    // What was published between the two may have gone to the old one.
                    lane.signal_call();
                }
            }
            Message::Error {
                lane: LaneId(index),
                error,
            } => {
                if let Some(lane) = lane_mut(&mut self.lanes, index) {
                    lane.error = error;
                    if matches!(lane.state, LaneState::Broken) {
                        // It broke before it could be reported there.
                        lane.signal_error();
                    }
                }
            }
            Message::Memory {
                lane: LaneId(index),
                memory,
                rings,
                reply,
            } => {
                if let Some(lane) = lane_mut(&mut self.lanes, index) {
                    match lane.queue.rebind(&memory, rings) {
                        Ok(()) => lane.memory = GuestPin::new(memory),
                        Err(fault) => lane.break_down(&fault),
                    }
                    // It may have been lost before this lane had it.
                    lane.check_memory();
                    self.rouse(index);
                }
                let _client_left = reply.send(());
            }
            Message::Done(Done { task, result }) => {
                self.step(task, |task, mover| task.worked(mover, result));
            }
            Message::Quit => self.is_quitting = true,
        }
    }

    pub(super) fn open(&mut self, start: Start) {
        let Start {
            device,
            leash,
            queue,
            memory,
            kick,
            call,
            error,
            features,
            reply,
        } = start;
        let files = match self.files.open(&mut self.ring, &device) {
            Ok(files) => files,
            Err(failure) => {
                drop(reply.send(Err(failure)));
                return;
            }
        };
        let free = self.lanes.iter().position(Option::is_none);
        let slot = free.unwrap_or_else(|| {
            self.lanes.push(None);
            self.lanes.len() - 1
        });
        let index = u32::try_from(slot).expect("lanes are bounded by descriptors");
        let poll = self.ring.poll(kick, TOKEN_KICK | u64::from(index));
        self.lanes[slot] = Some(Lane {
            stats: device.open_stats(),
            tier: device.disk.tier(),
            device,
            leash,
            queue,
            memory: GuestPin::new(memory),
            features,
            base: files.base.map(|(file, len)| RingBase { file, len }),
            files,
            poll: Some(poll),
            caller: Rc::clone(&self.caller),
            call,
            error,
            in_flight: 0,
            state: LaneState::Armed,
            is_ready: false,
            is_touched: false,
        });
        if let Some(lane) = lane_mut(&mut self.lanes, index) {
            // It may have been lost before this lane had it.
            lane.check_memory();
        }
        self.rouse(index);
        drop(reply.send(Ok(LaneId(index))));
    }

    pub(super) fn stop(&mut self, LaneId(index): LaneId, reply: SyncSender<u16>) {
        let Some(lane) = lane_mut(&mut self.lanes, index) else {
            return;
        };
        lane.state = LaneState::Stopping { reply };
        if let Some(poll) = lane.poll.take() {
            self.ring.cancel(poll);
        }
        self.close_if_drained(index);
    }

    pub(super) fn close_if_drained(&mut self, index: u32) {
        let Ok(slot) = usize::try_from(index) else {
            return;
        };
        let Some(lane) = self.lanes.get_mut(slot).and_then(Option::take_if_drained) else {
            return;
        };
        self.files.close(&mut self.ring, &lane.files);
        lane.device.close_stats(&lane.stats);
        if let LaneState::Stopping { reply } = lane.state {
            let _client_left = reply.send(lane.queue.next_avail());
        }
    }
}

/// Taking a lane out when its last request is answered.
trait TakeIfDrained {
    fn take_if_drained(&mut self) -> Option<Lane>;
}

impl TakeIfDrained for Option<Lane> {
    fn take_if_drained(&mut self) -> Option<Lane> {
        let lane = self.as_mut()?;
        if lane.in_flight > 0 {
            return None;
        }
        if lane.is_touched {
            lane.publish();
        }
        self.take()
    }
}
