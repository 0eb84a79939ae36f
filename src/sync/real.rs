//! The real ones.

pub use parking_lot::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};
pub use std::sync::Arc as Shared;
pub use std::sync::atomic;
pub use std::thread::{JoinHandle, Thread, current, park};

/// Changes a count that nobody else has.
pub fn with_mut(count: &mut atomic::AtomicU32, change: impl FnOnce(&mut u32)) {
    change(count.get_mut());
}

/// Starts a thread whose name shows in `ps -L`, `perf` and panic messages. Linux keeps the first
/// 15 bytes of `name`.
///
/// # Errors
/// The operating system could not make a thread.
pub fn spawn_named<F, T>(name: &str, body: F) -> std::io::Result<JoinHandle<T>>
where
    F: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(body)
}
