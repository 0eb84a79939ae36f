//! Requests whose wait is over, on their way to be woken. To wake one is a system call, or work of
//! whoever made the waker, who may take any lock: not while one is held.

use std::task::Waker;

/// Requests to be planned again.
#[derive(Debug, Default)]
#[must_use = "they wait until they are woken"]
pub struct Woken(Vec<Waker>);

impl Woken {
    pub(super) fn new(wakers: Vec<Waker>) -> Self {
        Self(wakers)
    }

    /// Adds those of `other`.
    pub fn join(&mut self, mut other: Woken) {
        self.0.append(&mut other.0);
    }

    /// Wakes them; nothing is locked any more.
    pub fn wake(self) {
        for waker in self.0 {
            waker.wake();
        }
    }
}
