//! Who waits for something, and whose wait is over. To wake one is a system call, or work of whoever
//! made the waker, who may take any lock: not while one is held.

use std::task::Waker;

/// Who waits for one thing: each waker once, however often it is registered. So there are no more
/// than there are threads and served disks, whatever number of requests they wait with.
#[derive(Debug, Default)]
pub struct Waiters(Vec<Waker>);

impl Waiters {
    /// `waker` is woken with the others, unless it is among them already.
    pub fn push(&mut self, waker: Waker) {
        if !self.0.iter().any(|known| known.will_wake(&waker)) {
            self.0.push(waker);
        }
    }

    /// `waker` waits no longer.
    pub fn remove(&mut self, waker: &Waker) {
        self.0.retain(|known| !known.will_wake(waker));
    }

    /// All of them; nobody waits any more.
    pub fn take(&mut self) -> Woken {
        Woken(std::mem::take(&mut self.0))
    }

    /// Nobody waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Those that are to try again.
#[derive(Debug, Default)]
#[must_use = "they wait until they are woken"]
pub struct Woken(Vec<Waker>);

impl Woken {
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    #[derive(Debug, Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn a_waker_waits_once_however_often_it_registers() {
        let counts = [Arc::new(Count::default()), Arc::new(Count::default())];
        let wakers = counts.clone().map(Waker::from);
        let mut waiters = Waiters::default();
        for _ in 0..1000 {
            wakers.iter().for_each(|waker| waiters.push(waker.clone()));
        }
        waiters.take().wake();
        assert!(waiters.is_empty());
        waiters.push(wakers[0].clone());
        waiters.push(wakers[1].clone());
        waiters.remove(&wakers[0]);
        waiters.take().wake();
        let woken = counts.map(|count| count.0.load(Ordering::SeqCst));
        assert_eq!(woken, [1, 2]);
    }
}
