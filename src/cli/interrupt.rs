//! Stopping long work when the user says so: the first Ctrl-C stops it where it can be stopped, what
//! it would leave behind is cleaned up, and the process ends by the signal all the same. A second
//! one ends it at once.

use super::failure::Failure;
use crate::cowdisk::Interrupted;
use crate::sync::global::atomic::{AtomicI32, Ordering};
use crate::sync::spawn_named;
use crate::sys::signal::Endings;
use nix::sys::signal::Signal;

/// The signal that came, or 0: one process is one command.
static CAUGHT: AtomicI32 = AtomicI32::new(0);

/// Whether a signal came that [`Interrupt::catch`] was to catch.
pub(super) fn is_caught() -> bool {
    CAUGHT.load(Ordering::Relaxed) != 0
}

/// See the module.
pub(super) struct Interrupt(());

impl Interrupt {
    /// From now on the first signal only shows in [`Interrupt::check`]. To be called before any
    /// thread is made. Where that is not possible signals keep their usual effect.
    pub(super) fn catch() -> Self {
        if let Ok(endings) = Endings::hold() {
            let watch = spawn_named("signals", move || {
                if let Ok(signal) = endings.wait() {
                    CAUGHT.store(signal as i32, Ordering::SeqCst);
                }
            });
            if watch.is_err() {
                let _kept = endings.release();
            }
        }
        Self(())
    }

    /// # Errors
    /// A signal came.
    pub(super) fn check(&self) -> Result<(), Interrupted> {
        if is_caught() {
            Err(Interrupted)
        } else {
            Ok(())
        }
    }

    /// `failure`, if it is an interruption with the signal that was to end us.
    pub(super) fn explain(&self, mut failure: Failure) -> Failure {
        if failure.kind == "interrupted" {
            failure.signal = Signal::try_from(CAUGHT.load(Ordering::Relaxed)).ok();
        }
        failure
    }
}
