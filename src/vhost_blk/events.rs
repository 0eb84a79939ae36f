//! What a server's owner may want to know of its clients: bounded, and never waited for. A hostile
//! client can cause as many events as it likes, so few are reported each second.

use std::fmt;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use crate::sync::Mutex;
use crate::sys::clock;

/// Events of one disk that are reported in one [`WINDOW`]; others are counted.
const PER_WINDOW: u32 = 5;
const WINDOW: Duration = Duration::from_secs(1);

/// Something happened to a disk's clients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// The disk.
    pub disk: String,
    /// What happened.
    pub kind: EventKind,
    /// Why, for people.
    pub reason: String,
    /// Events of this disk that were left out since the last one reported.
    pub left_out: u64,
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventKind {
    /// A message of the client was refused; its session ended.
    SessionRefused,
    /// The client took its memory away; its session ended.
    MemoryLost,
    /// A client cannot be accepted for want of descriptors, threads or memory: it is tried again.
    ClientWaits,
    /// Writes wait for space, in the pool or on the host, and fail if there is none in time.
    SpaceAwaited,
    /// The guest broke the rules of its ring; nothing is taken from that queue any more.
    QueueBroken,
    /// A request failed: the guest got an I/O error.
    RequestFailed,
    /// A client came back and named another place to go on at than its ring: the ring was believed.
    BaseCorrected,
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.kind {
            EventKind::SessionRefused => "a client was disconnected",
            EventKind::MemoryLost => "a client was disconnected: its memory is gone",
            EventKind::ClientWaits => "a client cannot be accepted yet",
            EventKind::SpaceAwaited => "writes wait for space",
            EventKind::QueueBroken => "a queue was given up until the guest resets its disk",
            EventKind::RequestFailed => "a request failed",
            EventKind::BaseCorrected => "a queue goes on at the used index of its ring",
        };
        write!(f, "{}: {what}: {}", self.disk, self.reason)?;
        if self.left_out > 0 {
            write!(f, " (and {} more before)", self.left_out)?;
        }
        Ok(())
    }
}

#[derive(Debug)]
struct Recent {
    since: Instant,
    reported: u32,
    left_out: u64,
    to: Option<SyncSender<Event>>,
}

/// Where one disk reports to.
#[derive(Debug)]
pub(super) struct Reporter {
    /// Lock order: taken last.
    recent: Mutex<Recent>,
}

impl Reporter {
    pub(super) fn new(to: Option<SyncSender<Event>>) -> Self {
        let recent = Recent {
            since: clock::now(),
            reported: 0,
            left_out: 0,
            to,
        };
        Self {
            recent: Mutex::new(recent),
        }
    }

    /// Lets go of whom it reports to.
    pub(super) fn close(&self) {
        self.recent.lock().to = None;
    }

    /// Reports, unless there was much to report just now or nobody takes it.
    pub(super) fn report(&self, disk: &str, kind: EventKind, reason: &dyn fmt::Display) {
        let mut recent = self.recent.lock();
        let Some(to) = recent.to.clone() else { return };
        let now = clock::now();
        if now.saturating_duration_since(recent.since) >= WINDOW {
            (recent.since, recent.reported) = (now, 0);
        }
        if recent.reported == PER_WINDOW {
            recent.left_out += 1;
            return;
        }
        let event = Event {
            disk: disk.to_owned(),
            kind,
            reason: reason.to_string(),
            left_out: recent.left_out,
        };
        match to.try_send(event) {
            Ok(()) => {
                recent.reported += 1;
                recent.left_out = 0;
            }
            Err(_full_or_gone) => recent.left_out += 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::sync_channel;

    #[test]
    fn a_flood_of_events_is_counted_and_never_waited_for() {
        let (to, events) = sync_channel(2);
        let reporter = Reporter::new(Some(to));
        let report = || reporter.report("d", EventKind::QueueBroken, &"a loop");
        for _ in 0..10 {
            report();
        }
        let all: Vec<Event> = events.try_iter().collect();
        assert_eq!(all.len(), 2, "no more than are taken");
        assert_eq!(all.iter().map(|event| event.left_out).max(), Some(0));
        report();
        let next = events.try_recv().expect("there is room again");
        assert_eq!(next.left_out, 8);
        assert_eq!(
            next.to_string(),
            "d: a queue was given up until the guest resets its disk: a loop (and 8 more before)"
        );
        for _ in 0..PER_WINDOW {
            report();
            drop(events.try_recv());
        }
        report();
        let late = events.try_recv().is_err();
        let is_new_second = reporter.recent.lock().reported < PER_WINDOW;
        assert!(late || is_new_second, "few each second");
        drop(events);
        report();
    }
}
