//! Runs a model of a room's private parts; public ones have theirs in `tests/loom`.

use super::global::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

/// Runs `body` in every interleaving of its threads with at most `preemptions` places where a thread
/// that could go on is not let, and prints how many there were.
pub(crate) fn explore(name: &str, preemptions: usize, body: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    let most = *builder.preemption_bound.get_or_insert(preemptions);
    let count = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&count);
    builder.check(move || {
        counted.fetch_add(1, Ordering::Relaxed);
        body();
    });
    let count = count.load(Ordering::Relaxed);
    assert!(count > 1, "there was nothing to interleave");
    println!("LOOM {name}: {count} interleavings, at most {most} preemptions");
}
