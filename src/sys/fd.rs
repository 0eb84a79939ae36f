//! Descriptors: event counters (eventfd(2)), by which queues are kicked, guests are called and threads
//! wake one another, and how many descriptors there may be.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::eventfd::{self, EfdFlags};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// What `/proc/self/fd` shows for an eventfd.
const EVENTFD_LINK: &str = "anon_inode:[eventfd]";

/// Lets this process have as many descriptors as it may ask for, and says how many those are. The
/// usual 1024 are for the sake of select(2), which nothing here uses.
///
/// # Errors
/// As setrlimit(2).
pub fn raise_limit() -> io::Result<u64> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok(hard)
}

/// How many descriptors this process has.
///
/// # Errors
/// As open(2) and getdents(2): /proc is not mounted, or there are too many already.
pub fn count_open() -> io::Result<u64> {
    let mut count = 0;
    for entry in fs::read_dir("/proc/self/fd")? {
        entry?;
        count += 1;
    }
    Ok(count)
}

/// An eventfd, our own or one that came over a socket: to be polled, and signalled by
/// [`super::call::Caller`] alone, for a write could wait for ever.
///
/// # Invariants
/// The descriptor is an eventfd.
#[derive(Debug)]
pub struct EventFd(OwnedFd);

impl EventFd {
    /// Takes in a descriptor that somebody else made, after checking that it is an eventfd: a poll
    /// of anything else may never rest (a plain file) or run somebody's code (a FUSE file).
    ///
    /// # Errors
    /// `InvalidInput` if it is not an eventfd; otherwise as readlink(2).
    pub fn adopt(fd: OwnedFd) -> io::Result<Self> {
        let link = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
        if link.as_os_str() != EVENTFD_LINK {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("descriptor is {}, not an eventfd", link.display()),
            ));
        }
        // INVARIANT: no path and no other anonymous file is called so.
        Ok(Self(fd))
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// An eventfd of our own.
///
/// # Invariants
/// Nobody else has it: it is non-blocking and stays so.
#[derive(Debug, Clone)]
pub struct Event(Arc<EventFd>);

impl Event {
    /// A fresh counter at zero.
    ///
    /// # Errors
    /// As eventfd(2): out of descriptors or memory.
    pub fn new() -> io::Result<Self> {
        let event = eventfd::EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        // INVARIANT: just made, as both types have it.
        Ok(Self(Arc::new(EventFd(event.into()))))
    }

    /// For a ring to poll.
    #[must_use]
    pub fn eventfd(&self) -> &Arc<EventFd> {
        &self.0
    }

    /// Adds one to the counter. A counter that is full is as signalled as it can be, so that is
    /// no error.
    ///
    /// # Errors
    /// As write(2).
    pub fn signal(&self) -> io::Result<()> {
        #[expect(clippy::host_endian_bytes, reason = "eventfd(2) counts in host order")]
        let one = 1_u64.to_ne_bytes();
        match nix::unistd::write(&self.0, &one) {
            Ok(_) | Err(Errno::EAGAIN) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Sets the counter back to zero and says whether it was anything else.
    ///
    /// # Errors
    /// As read(2).
    pub fn clear(&self) -> io::Result<bool> {
        match nix::unistd::read(&self.0, &mut [0; 8]) {
            Ok(_) => Ok(true),
            Err(Errno::EAGAIN) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_until_cleared() {
        let event = Event::new().expect("eventfd");
        assert!(!event.clear().expect("clear"));
        event.signal().expect("signal");
        event.signal().expect("signal");
        assert!(event.clear().expect("clear"));
        assert!(!event.clear().expect("clear"));
    }

    #[test]
    fn adopts_eventfds_only() {
        let (read, _write) = nix::unistd::pipe().expect("pipe");
        let error = EventFd::adopt(read).expect_err("a pipe is refused");
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        let theirs = eventfd::EventFd::from_flags(EfdFlags::EFD_CLOEXEC).expect("eventfd");
        EventFd::adopt(theirs.into()).expect("an eventfd is taken");
    }
}
