//! What a panic does in a thread that others rely on: a worker, a helper, a thread that flushes or
//! cleans up. It has broken an invariant, and whoever waits for the thread would wait for ever. So the
//! process aborts, after the panic has said what and where: a pool opens after that as after any
//! crash, and guests reconnect.

#[cfg(not(any(feature = "loom", feature = "shuttle")))]
use super::global::atomic::{AtomicBool, Ordering};

/// What a panic in a thread that others rely on does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnPanic {
    /// Ends the process at once, by SIGABRT. The default.
    Abort,
    /// Ends the thread alone. What waits for it waits for ever: for those whose own panic hook ends
    /// the process their way.
    Unwind,
}

#[cfg(not(any(feature = "loom", feature = "shuttle")))]
static IS_ABORTING: AtomicBool = AtomicBool::new(true);

/// Chooses for the whole process. The panic hook runs first in either case.
pub fn set_on_panic(choice: OnPanic) {
    // A checker has to see panics, and ends its process by itself.
    #[cfg(not(any(feature = "loom", feature = "shuttle")))]
    IS_ABORTING.store(choice == OnPanic::Abort, Ordering::Relaxed);
    #[cfg(any(feature = "loom", feature = "shuttle"))]
    let _ = choice;
}

/// Held by a thread that others rely on, inside of all that it owns: what a panic leaves half done is
/// not cleaned up before the process ends.
#[derive(Debug)]
#[must_use = "a thread is vital as long as this is held"]
pub struct Vital(());

impl Vital {
    /// From here on.
    pub fn new() -> Self {
        Self(())
    }
}

impl Drop for Vital {
    fn drop(&mut self) {
        #[cfg(not(any(feature = "loom", feature = "shuttle")))]
        if std::thread::panicking() && IS_ABORTING.load(Ordering::Relaxed) {
            std::process::abort();
        }
    }
}
