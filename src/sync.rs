//! Locks, atomics and threads for every room, in one place so that a model checker can replace
//! them. Locks do not poison: a panic while one is held is a bug that ends the process's use of
//! the pool, not a state to recover from.

pub use parking_lot::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};
pub use std::sync::atomic;
pub use std::sync::{Arc, OnceLock, Weak};

/// Starts a thread whose name shows in `ps -L`, `perf` and panic messages. Linux keeps the first
/// 15 bytes of `name`.
///
/// # Errors
/// The operating system could not make a thread.
pub fn spawn_named<F, T>(name: &str, body: F) -> std::io::Result<std::thread::JoinHandle<T>>
where
    F: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(body)
}
