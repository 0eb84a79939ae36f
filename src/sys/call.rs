//! Calling clients: signals on eventfds that somebody else has too, which never wait.
//!
//! A write to an eventfd waits while its counter is full, unless the open file has O_NONBLOCK; and
//! that flag belongs to all who have the file. A client can clear it at any time, between any look
//! at it and the write, and fill the counter: nothing that goes by write(2), write through io_uring
//! or poll(2) before either can exclude a wait for ever. (RWF_NOWAIT is refused: EOPNOTSUPP.) Only
//! the kernel signals an eventfd without regard to flags and counter: here as the end of a request
//! of its older asynchronous I/O (io_submit(2), IOCB_FLAG_RESFD), a poll that is over at once. One
//! system call, about half a microsecond dearer than the write.
#![expect(unsafe_code, reason = "these system calls have no safe wrapper")]

use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;

use super::fd::{Event, EventFd};

/// Requests whose ends have not been fetched, at most: the context has room for as many.
const UNFETCHED_MAX: u32 = 64;
/// `IOCB_CMD_POLL`, `IOCB_FLAG_RESFD`: linux/aio_abi.h.
const CMD_POLL: u16 = 5;
const FLAG_RESFD: u32 = 1;

/// `struct iocb` of linux/aio_abi.h. The order of `key` and `rw_flags` depends on the byte order;
/// both are zero here.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
struct Request {
    data: u64,
    key: u32,
    rw_flags: u32,
    opcode: u16,
    priority: i16,
    fd: u32,
    /// Of a poll: the events.
    buffer: u64,
    len: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    /// The eventfd that is signalled at the end.
    signalled: u32,
}

const _: () = assert!(size_of::<Request>() == 64, "struct iocb");

/// `struct io_event` of linux/aio_abi.h.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
struct End {
    data: u64,
    request: u64,
    result: i64,
    result2: i64,
}

const _: () = assert!(size_of::<End>() == 32, "struct io_event");

/// One thread's means of calling clients. See the module.
///
/// # Invariants
/// `context` is an AIO context of this process and nobody else's; no request outlives its
/// io_submit(2), since `ready` is always ready.
#[derive(Debug)]
pub struct Caller {
    context: libc::c_ulong,
    /// An own counter at zero: writable at any time.
    ready: Event,
    unfetched: Cell<u32>,
}

impl Caller {
    /// A context of its own.
    ///
    /// # Errors
    /// As io_setup(2); what a person could do about it is in the message.
    pub fn new() -> io::Result<Self> {
        let ready = Event::new()?;
        let mut context: libc::c_ulong = 0;
        // SAFETY: `context` is zero, as io_setup(2) wants it, and a place for its answer.
        let made = unsafe { libc::syscall(libc::SYS_io_setup, UNFETCHED_MAX, &raw mut context) };
        match Errno::result(made) {
            Ok(_) => Ok(Self {
                // INVARIANT: just made.
                context,
                ready,
                unfetched: Cell::new(0),
            }),
            Err(errno) => Err(io::Error::other(format!(
                "guests are called by way of AIO, and io_setup failed: {errno}{}",
                advice(errno)
            ))),
        }
    }

    /// Adds one to the counter of `event`, and never waits. A counter that is full is as signalled
    /// as it can be, so that is no error.
    ///
    /// # Errors
    /// As io_submit(2): the kernel is out of memory.
    pub fn signal(&self, event: &EventFd) -> io::Result<()> {
        if self.unfetched.get() == UNFETCHED_MAX {
            self.fetch();
        }
        let number = |fd: i32| u32::try_from(fd).expect("an open descriptor is not negative");
        let mut request = Request {
            opcode: CMD_POLL,
            fd: number(self.ready.as_fd().as_raw_fd()),
            buffer: u64::from(libc::POLLOUT.unsigned_abs()),
            flags: FLAG_RESFD,
            signalled: number(event.as_fd().as_raw_fd()),
            ..Request::default()
        };
        let mut list: [*mut Request; 1] = [&raw mut request];
        let list = list.as_mut_ptr();
        // SAFETY: the context is ours (invariant); `list` has one request, which the kernel is done
        // with when the call returns (io_submit(2)), and a poll names no other memory.
        let taken = unsafe { libc::syscall(libc::SYS_io_submit, self.context, 1_u64, list) };
        Errno::result(taken)?;
        self.unfetched.set(self.unfetched.get() + 1);
        Ok(())
    }

    /// Makes room: takes the ends of all requests, which say nothing.
    fn fetch(&self) {
        const ROOM: usize = 64;
        const _: () = assert!(ROOM == UNFETCHED_MAX as usize, "all at once");
        let mut ends = [End::default(); ROOM];
        let no_time: *const libc::timespec = std::ptr::null();
        // SAFETY: the context is ours (invariant); `ends` has room for as many as are asked for.
        // With a minimum of none the call does not wait (io_getevents(2)).
        let fetched = unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                self.context,
                0_i64,
                i64::from(UNFETCHED_MAX),
                ends.as_mut_ptr(),
                no_time,
            )
        };
        let fetched = u32::try_from(fetched).expect("our own context and our own memory");
        self.unfetched.set(self.unfetched.get() - fetched);
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        // SAFETY: the context is ours (invariant), and nothing uses it any more.
        let _gone = unsafe { libc::syscall(libc::SYS_io_destroy, self.context) };
    }
}

fn advice(errno: Errno) -> &'static str {
    if errno == Errno::EAGAIN {
        ". Other programs use all that the sysctl fs.aio-max-nr allows (fs.aio-nr counts): raise it"
    } else {
        ". The kernel needs CONFIG_AIO, and io_setup must be allowed (seccomp)"
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    use nix::sys::eventfd::EventFd as Theirs;

    fn adopted(flags: nix::sys::eventfd::EfdFlags) -> (Theirs, EventFd) {
        let theirs = Theirs::from_flags(flags).expect("eventfd");
        let ours = theirs.as_fd().try_clone_to_owned().expect("dup");
        (theirs, EventFd::adopt(ours).expect("an eventfd"))
    }

    #[test]
    fn every_signal_is_counted() {
        let caller = Caller::new().expect("a context");
        let (theirs, ours) = adopted(nix::sys::eventfd::EfdFlags::empty());
        for count in [1, 5, 1000] {
            for _ in 0..count {
                caller.signal(&ours).expect("signalled");
            }
            assert_eq!(theirs.read().expect("counted"), count);
        }
    }

    #[test]
    fn a_full_counter_that_blocks_is_not_waited_for() {
        let caller = Caller::new().expect("a context");
        let (theirs, ours) = adopted(nix::sys::eventfd::EfdFlags::EFD_NONBLOCK);
        theirs.write(u64::MAX - 1).expect("filled");
        // Their flag, whatever it was when we took the descriptor in.
        fcntl(&theirs, FcntlArg::F_SETFL(OFlag::empty())).expect("cleared");
        for _ in 0..200 {
            caller.signal(&ours).expect("dropped");
        }
        assert!(theirs.read().expect("full") >= u64::MAX - 1);
        caller.signal(&ours).expect("signalled");
        assert_eq!(theirs.read().expect("counted"), 1);
    }
}
