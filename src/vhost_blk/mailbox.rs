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
    /// Finish all queues and end.
    Quit,
}

/// One worker's inbox.
#[derive(Debug)]
pub(super) struct Mailbox {
    event: Event,
    /// The event was written to and the worker has not looked yet.
    is_signalled: AtomicBool,
    /// A disk asked for another try of what it had refused.
    is_retry: AtomicBool,
    messages: Mutex<Vec<Message>>,
}

impl Mailbox {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            event: Event::new()?,
            is_signalled: AtomicBool::new(false),
            is_retry: AtomicBool::new(false),
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

    /// Moves the messages to `out`, in order; whether a disk asked for another try.
    pub(super) fn collect(&self, out: &mut Vec<Message>) -> bool {
        // Cleared before looking: whoever posts after this look signals again.
        self.is_signalled.store(false, Ordering::SeqCst);
        std::mem::swap(out, &mut *self.messages.lock());
        self.is_retry.swap(false, Ordering::SeqCst)
    }
}

impl Wake for Mailbox {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.is_retry.store(true, Ordering::SeqCst);
        self.signal();
    }
}

#[cfg(all(test, feature = "loom"))]
mod loom_tests {
    use super::*;
    use crate::sync::explore::explore;
    use crate::sync::spawn_named;

    /// Whether the event was written to since the last look: what a poll tells. loom does not see
    /// that, but sees the look at the mark, which changes with it.
    fn is_polled(mailbox: &Mailbox) -> bool {
        let _is_marked = mailbox.is_signalled();
        mailbox.event.clear().expect("our own eventfd")
    }

    /// Two threads post and one wakes, while the worker looks whenever its event says so. What it has
    /// not found when they are done, the event tells it of.
    ///
    /// Fails if `Mailbox::collect` clears the mark after it has looked, or `Mailbox::post` signals
    /// before it has put the message there.
    #[test]
    fn loom_no_message_is_slept_over() {
        explore("mailbox", 4, || {
            let mailbox = Arc::new(Mailbox::new().expect("a descriptor"));
            let poster = |is_wake: bool| {
                let mailbox = Arc::clone(&mailbox);
                let post = move || match is_wake {
                    true => mailbox.wake_by_ref(),
                    false => mailbox.post(Message::Quit),
                };
                spawn_named("poster", post).expect("a thread")
            };
            let posters = [poster(false), poster(true)];
            let (mut messages, mut is_retry) = (Vec::new(), false);
            let mut found = 0;
            let mut look = || {
                if is_polled(&mailbox) {
                    messages.clear();
                    is_retry |= mailbox.collect(&mut messages);
                    found += messages.len();
                }
                (found, is_retry)
            };
            for _ in 0..2 {
                look();
            }
            for poster in posters {
                poster.join().expect("no panic");
            }
            assert_eq!(look(), (1, true));
        });
    }
}
