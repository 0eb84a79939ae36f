//! Being told to end: Ctrl-C (SIGINT), kill (SIGTERM), the terminal gone (SIGHUP). The first such
//! signal is waited for by a thread, so that what was begun can be finished or cleaned up; a second
//! one has its usual effect, which is to end the process at once.
#![expect(
    unsafe_code,
    reason = "asking for a signal's action has no safe wrapper"
)]

use std::io;

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal, raise};

/// The signals that end this process. SIGHUP is not among them if it was started to ignore that
/// (nohup). That a shell starts background jobs to ignore SIGINT is no reason to: whoever sends one
/// to us means us.
#[derive(Debug, Clone, Copy)]
pub struct Endings(SigSet);

impl Endings {
    /// Keeps the signals back, for this thread and those that it starts from now on.
    ///
    /// # Errors
    /// As sigaction(2) and pthread_sigmask(3).
    pub fn hold() -> io::Result<Self> {
        let mut set = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM]);
        if !is_ignored(Signal::SIGHUP)? {
            set.add(Signal::SIGHUP);
        }
        set.thread_block()?;
        Ok(Self(set))
    }

    /// Waits for one of them; the next ends the process at once.
    ///
    /// # Errors
    /// As sigwait(3) and pthread_sigmask(3).
    pub fn wait(&self) -> io::Result<Signal> {
        let signal = self.0.wait();
        self.release()?;
        Ok(signal?)
    }

    /// Lets them have their usual effect again, on this thread.
    ///
    /// # Errors
    /// As pthread_sigmask(3).
    pub fn release(&self) -> io::Result<()> {
        Ok(self.0.thread_unblock()?)
    }
}

/// Ends the process by `signal`, as if it had never been kept back: a shell that started us for a
/// loop stops the loop. Returns only if that is not possible.
pub fn end_by(signal: Signal) {
    if SigSet::from(signal).thread_unblock().is_ok() {
        let _not_possible = raise(signal);
    }
}

/// Makes a write beyond RLIMIT_FSIZE fail with `EFBIG`, for this thread and those that it starts
/// from now on; else SIGXFSZ ends the process (setrlimit(2)), and with it every disk it serves.
///
/// # Errors
/// As pthread_sigmask(3).
pub fn survive_size_limit() -> io::Result<()> {
    Ok(SigSet::from(Signal::SIGXFSZ).thread_block()?)
}

fn is_ignored(signal: Signal) -> io::Result<bool> {
    // SAFETY: `libc::sigaction` is integers, an optional pointer and padding, for all of which zeros
    // are a valid value.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: with no new action nothing is changed; `action` is a writable struct that outlives
    // the call (sigaction(2)).
    let result = unsafe { libc::sigaction(signal as i32, std::ptr::null(), &raw mut action) };
    Errno::result(result)?;
    Ok(action.sa_sigaction == libc::SIG_IGN)
}
