//! How other threads talk to a worker: messages, and the waker that disks call.

use std::io;
use std::sync::mpsc::SyncSender;
use std::task::Wake;

use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Arc, Mutex};
use crate::sys::fd::{Event, EventFd};
use crate::sys::mmap::GuestMemory;
use crate::virtio::queue::{RingAddresses, SplitQueue};

use super::device::{Device, Leash};
use super::helpers::WorkFailed;

/// A queue that is being served, as its worker knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LaneId(pub(super) u32);

/// A queue to serve.
#[derive(Debug)]
pub(super) struct Start {
    pub(super) device: Arc<Device>,
    pub(super) leash: Arc<Leash>,
    pub(super) queue: SplitQueue,
    pub(super) memory: Arc<GuestMemory>,
    pub(super) kick: Arc<EventFd>,
    pub(super) call: Option<Arc<EventFd>>,
    pub(super) error: Option<Arc<EventFd>>,
    /// Virtio features that the driver accepted.
    pub(super) features: u64,
    pub(super) reply: SyncSender<io::Result<LaneId>>,
}

/// The end of work that was done on another thread.
#[derive(Debug)]
pub(super) struct Done {
    pub(super) task: u32,
    pub(super) result: Result<(), WorkFailed>,
}

/// What a worker is told.
#[derive(Debug)]
pub(super) enum Message {
    /// Serve a queue.
    Start(Box<Start>),
    /// Take nothing more from a queue, finish what was taken, then answer with the avail index
    /// to resume from.
    Stop {
        lane: LaneId,
        reply: SyncSender<u16>,
    },
    /// Tell the guest of completions here from now on.
    Call {
        lane: LaneId,
        call: Option<Arc<EventFd>>,
    },
    /// Report a broken ring here from now on.
    Error {
        lane: LaneId,
        error: Option<Arc<EventFd>>,
    },
    /// The guest's memory table changed.
    Memory {
        lane: LaneId,
        memory: Arc<GuestMemory>,
        rings: RingAddresses,
        reply: SyncSender<()>,
    },
    /// Work elsewhere has ended.
    Done(Done),
    /// The disk of this share calls: what it refused is worth another try.
    Woken { share: u32 },
    /// Finish all queues and end.
    Quit,
}

/// One worker's inbox.
#[derive(Debug)]
pub(super) struct Mailbox {
    event: Event,
    /// The event was written to and the worker has not looked yet.
    is_signalled: AtomicBool,
    messages: Mutex<Vec<Message>>,
}

impl Mailbox {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            event: Event::new()?,
            is_signalled: AtomicBool::new(false),
            messages: Mutex::new(Vec::new()),
        })
    }

    /// What the worker polls.
    pub(super) fn event(&self) -> &Arc<EventFd> {
        self.event.eventfd()
    }

    pub(super) fn post(&self, message: Message) {
        self.messages.lock().push(message);
        self.signal();
    }

    /// Posts many for one signal.
    pub(super) fn post_all(&self, messages: impl Iterator<Item = Message>) {
        self.messages.lock().extend(messages);
        self.signal();
    }

    fn signal(&self) {
        if !self.is_signalled.swap(true, Ordering::SeqCst) {
            self.event
                .signal()
                .expect("writing to our own eventfd cannot fail");
        }
    }

    pub(super) fn is_signalled(&self) -> bool {
        self.is_signalled.load(Ordering::Acquire)
    }

    /// Moves the messages to `out`, in order.
    pub(super) fn collect(&self, out: &mut Vec<Message>) {
        // Cleared before looking: whoever posts after this look signals again.
        self.is_signalled.store(false, Ordering::SeqCst);
        std::mem::swap(out, &mut *self.messages.lock());
    }
}

/// The waker of one disk's share of a worker. However many call it, one message waits to be read.
#[derive(Debug)]
pub(super) struct Alarm {
    mailbox: Arc<Mailbox>,
    share: u32,
    is_ringing: AtomicBool,
}

impl Alarm {
    pub(super) fn new(mailbox: Arc<Mailbox>, share: u32) -> Self {
        Self {
            mailbox,
            share,
            is_ringing: AtomicBool::new(false),
        }
    }

    /// The message is read. Before anything is tried: who calls after that try calls again.
    pub(super) fn heard(&self) {
        self.is_ringing.store(false, Ordering::SeqCst);
    }
}

impl Wake for Alarm {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.is_ringing.swap(true, Ordering::SeqCst) {
            self.mailbox.post(Message::Woken { share: self.share });
        }
    }
}

#[cfg(all(test, feature = "loom"))]
mod loom_tests {
    use super::*;
    use crate::sync::atomic::AtomicU32;
    use crate::sync::explore::explore;
    use crate::sync::spawn_named;

    /// Whether the event was written to since the last look: what a poll tells. loom does not see
    /// that, but sees the look at the mark, which changes with it.
    fn is_polled(mailbox: &Mailbox) -> bool {
        let _is_marked = mailbox.is_signalled();
        mailbox.event.clear().expect("our own eventfd")
    }

    /// One thread posts and one calls twice, while the worker looks whenever its event says so. What it
    /// has not found when they are done, the event tells it of: the last call is heard after it came.
    ///
    /// Fails if `Mailbox::collect` clears the mark after it has looked, `Mailbox::post` signals before
    /// it has put the message there, or the worker tries before it says that it has heard.
    #[test]
    fn loom_no_message_is_slept_over() {
        explore("mailbox", 4, || {
            let mailbox = Arc::new(Mailbox::new().expect("a descriptor"));
            let alarm = Arc::new(Alarm::new(Arc::clone(&mailbox), 0));
            let calls = Arc::new(AtomicU32::new(0));
            let poster = {
                let mailbox = Arc::clone(&mailbox);
                spawn_named("poster", move || mailbox.post(Message::Quit)).expect("a thread")
            };
            let caller = {
                let (alarm, calls) = (Arc::clone(&alarm), Arc::clone(&calls));
                let call = move || {
                    for _ in 0..2 {
                        calls.fetch_add(1, Ordering::SeqCst);
                        alarm.wake_by_ref();
                    }
                };
                spawn_named("caller", call).expect("a thread")
            };
            let posters = [poster, caller];
            let mut messages = Vec::new();
            let (mut found, mut heard) = (0, 0);
            let mut look = || {
                if is_polled(&mailbox) {
                    messages.clear();
                    mailbox.collect(&mut messages);
                    for message in &messages {
                        if matches!(message, Message::Woken { .. }) {
                            alarm.heard();
                            heard = calls.load(Ordering::SeqCst);
                        } else {
                            found += 1;
                        }
                    }
                }
                (found, heard)
            };
            for _ in 0..2 {
                look();
            }
            for poster in posters {
                poster.join().expect("no panic");
            }
            assert_eq!(look(), (1, 2));
        });
    }
}
