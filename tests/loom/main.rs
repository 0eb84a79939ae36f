//! Goal: the parts that threads meet in are right in every interleaving, and with no more order
//! between memory accesses than they ask for.
//!
//! Method: loom runs a few steps of two or three threads in all interleavings with a bounded number of
//! preemptions, on the real types: `src/sync` is loom's in this build. Each test says which change
//! makes it fail; `scripts/concurrency-mutants` makes those changes and expects the failures.
//!
//! ```text
//! cargo test --features loom --profile sweep --test loom -- --test-threads 1
//! LOOM_MAX_PREEMPTIONS=4      more than a test's own number
//! ```

#![cfg(feature = "loom")]

mod counts;
mod entries;
mod epochs;
mod gate;
mod space;
mod store;

use std::task::{Wake, Waker};
use std::time::Duration;
use tidepool::sync::global::atomic::{AtomicU64, Ordering};
use tidepool::sync::{Arc, Thread, current};

/// Longest that one test explores; what is cut short fails.
const TIME_MAX: Duration = Duration::from_secs(600);

/// Runs `body` in every interleaving of its threads with at most `preemptions` places where a thread
/// that could go on is not let, and prints how many there were.
#[expect(clippy::print_stdout, reason = "a run says how much it looked at")]
fn explore(name: &str, preemptions: usize, body: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    let most = *builder.preemption_bound.get_or_insert(preemptions);
    builder.max_branches = 100_000;
    builder.max_duration = Some(TIME_MAX);
    let count = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&count);
    let began = tidepool::sys::clock::now();
    builder.check(move || {
        counted.fetch_add(1, Ordering::Relaxed);
        body();
    });
    let took = tidepool::sys::clock::now() - began;
    let count = count.load(Ordering::Relaxed);
    assert!(count > 1, "there was nothing to interleave");
    assert!(took < TIME_MAX, "cut short after {count} interleavings");
    println!(
        "LOOM {name}: {count} interleavings, at most {most} preemptions, {} ms",
        took.as_millis()
    );
}

/// Wakes a thread that parks.
struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// A waker of this thread.
fn waker() -> Waker {
    Waker::from(Arc::new(Unpark(current())))
}

/// Starts a thread of the model.
fn spawn<T: Send + 'static>(
    body: impl FnOnce() -> T + Send + 'static,
) -> tidepool::sync::JoinHandle<T> {
    tidepool::sync::spawn_named("modelled", body).expect("loom has room for it")
}

/// Something that is either read by many or written by one at a time; loom fails a test in which two
/// accesses are not ordered by what the threads did between them. Only the accesses matter.
#[derive(Debug)]
struct Place(loom::cell::UnsafeCell<()>);

// SAFETY: loom's cell holds nothing, and looks itself whether threads may use it as they do.
#[expect(unsafe_code, reason = "loom's cell leaves this to whoever knows")]
unsafe impl Sync for Place {}

impl Place {
    fn new() -> Self {
        Self(loom::cell::UnsafeCell::new(()))
    }

    fn read(&self) {
        self.0.with(|_nothing| ());
    }

    fn write(&self) {
        self.0.with_mut(|_nothing| ());
    }
}
