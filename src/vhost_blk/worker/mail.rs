//! Doing what other threads ask for: queues come and go, memory changes, work elsewhere ends.

use std::rc::Rc;
use std::sync::mpsc::SyncSender;

use crate::sync::Arc;
use crate::sys::mmap::GuestPin;
use crate::vhost_blk::device::Device;
use crate::vhost_blk::lane::{Lane, LaneState, RingBase};
use crate::vhost_blk::mailbox::{Done, LaneId, Message, Start};

use super::share::Share;
use super::{TOKEN_KICK, Worker, lane_mut};

impl Worker {
    pub(super) fn read_mail(&mut self) {
        let mut messages = std::mem::take(&mut self.messages);
        self.context.mailbox.collect(&mut messages);
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
            Message::Woken { share } => self.hear(share),
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
        let share = self.share_of(&device);
        let waker = self.shares.get(share).expect("it is there").waker();
        let (ring, caller) = (&mut self.ring, &self.caller);
        let index = self.lanes.insert(|index| {
            let poll = ring.poll(kick, TOKEN_KICK | u64::from(index));
            Lane {
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
                caller: Rc::clone(caller),
                call,
                error,
                waker,
                share,
                in_flight: 0,
                state: LaneState::Armed,
                is_ready: false,
                is_touched: false,
            }
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
        self.stopping.push(index);
        if let Some(poll) = lane.poll.take() {
            self.ring.cancel(poll);
        }
        self.close_if_drained(index);
    }

    pub(super) fn close_if_drained(&mut self, index: u32) {
        let Some(lane) = self.lanes.get_mut(index).filter(|lane| lane.in_flight == 0) else {
            return;
        };
        if lane.is_touched {
            lane.publish();
        }
        let lane = self.lanes.remove(index).expect("it was just there");
        self.stopping.retain(|stopping| *stopping != index);
        self.leave_share(lane.share, index);
        self.files.close(&mut self.ring, &lane.files);
        lane.device.close_stats(&lane.stats);
        if let LaneState::Stopping { reply } = lane.state {
            let _client_left = reply.send(lane.queue.next_avail());
        }
    }

    /// The share of the disk that `device` serves; a new one for its first queue.
    fn share_of(&mut self, device: &Arc<Device>) -> u32 {
        let key = Arc::as_ptr(device).addr();
        let mailbox = &self.context.mailbox;
        let shares = &mut self.shares;
        let make = |index| Share::new(Arc::clone(device), Arc::clone(mailbox), index);
        let index = *self
            .share_of
            .entry(key)
            .or_insert_with(|| shares.insert(make));
        if let Some(share) = self.shares.get_mut(index) {
            share.lanes += 1;
        }
        index
    }

    /// Lane `index` is no longer there.
    fn leave_share(&mut self, at: u32, index: u32) {
        let Some(share) = self.shares.get_mut(at) else {
            return;
        };
        share.ready.retain(|ready| *ready != index);
        share.lanes -= 1;
        if share.lanes == 0 {
            self.share_of.remove(&Arc::as_ptr(&share.device).addr());
            self.close_share(at);
        }
    }

    /// A disk called: what it refused is worth another try.
    fn hear(&mut self, at: u32) {
        if let Some(share) = self.shares.get_mut(at) {
            share.hear();
            self.waiting.hear_of_space();
            self.line_up(at);
        }
    }
}
