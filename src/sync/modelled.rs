//! Those of a model checker, with the faces of the real ones.

#[cfg(feature = "loom")]
use loom as checker;
#[cfg(all(feature = "shuttle", not(feature = "loom")))]
use shuttle as checker;

use checker::sync as inner;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::PoisonError;
use std::time::Duration;

pub use checker::thread::{JoinHandle, Thread, current, park};

/// As `parking_lot::Mutex`.
pub struct Mutex<T>(inner::Mutex<T>);

/// As `parking_lot::MutexGuard`.
pub struct MutexGuard<'a, T>(Option<inner::MutexGuard<'a, T>>);

impl<T> Mutex<T> {
    /// Unlocked.
    pub fn new(value: T) -> Self {
        Self(inner::Mutex::new(value))
    }

    /// Waits until nobody has it.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        MutexGuard(Some(self.0.lock().unwrap_or_else(PoisonError::into_inner)))
    }

    /// `None` if somebody has it.
    pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        self.0.try_lock().ok().map(|guard| MutexGuard(Some(guard)))
    }
}

impl<T: Default> Default for Mutex<T> {
    fn default() -> Self {
        Self::new(T::default())
    }
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        self.0.as_ref().expect("only a wait takes it out")
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.0.as_mut().expect("only a wait takes it out")
    }
}

/// As `parking_lot::Condvar`.
#[derive(Debug)]
pub struct Condvar(inner::Condvar);

/// As `parking_lot::WaitTimeoutResult`.
#[derive(Debug, Clone, Copy)]
pub struct WaitTimeoutResult;

impl WaitTimeoutResult {
    /// Never: no time passes in a model, so a wakeup that only a timeout makes up for is missed.
    pub fn timed_out(self) -> bool {
        false
    }
}

impl Condvar {
    /// Nobody waits.
    pub fn new() -> Self {
        Self(inner::Condvar::new())
    }

    /// Waits to be notified, with the lock let go of.
    pub fn wait<T>(&self, guard: &mut MutexGuard<'_, T>) {
        let held = guard.0.take().expect("only a wait takes it out");
        let held = self.0.wait(held).unwrap_or_else(PoisonError::into_inner);
        guard.0 = Some(held);
    }

    /// As [`Condvar::wait`].
    pub fn wait_for<T>(&self, guard: &mut MutexGuard<'_, T>, _most: Duration) -> WaitTimeoutResult {
        self.wait(guard);
        WaitTimeoutResult
    }

    /// Wakes one.
    pub fn notify_one(&self) {
        self.0.notify_one();
    }

    /// Wakes all.
    pub fn notify_all(&self) {
        self.0.notify_all();
    }
}

impl Default for Condvar {
    fn default() -> Self {
        Self::new()
    }
}

/// As `parking_lot::RwLock`.
pub struct RwLock<T>(inner::RwLock<T>);

/// As `parking_lot::RwLockReadGuard`.
pub type RwLockReadGuard<'a, T> = inner::RwLockReadGuard<'a, T>;
/// As `parking_lot::RwLockWriteGuard`.
pub type RwLockWriteGuard<'a, T> = inner::RwLockWriteGuard<'a, T>;

impl<T> RwLock<T> {
    /// Unlocked.
    pub fn new(value: T) -> Self {
        Self(inner::RwLock::new(value))
    }

    /// Waits until nobody writes.
    pub fn read(&self) -> RwLockReadGuard<'_, T> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nobody has it.
    pub fn write(&self) -> RwLockWriteGuard<'_, T> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// `None` if somebody has it.
    pub fn try_write(&self) -> Option<RwLockWriteGuard<'_, T>> {
        self.0.try_write().ok()
    }
}

macro_rules! debug_by_name {
    ($($name:ident),*) => {$(
        impl<T> fmt::Debug for $name<T> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_struct(stringify!($name)).finish_non_exhaustive()
            }
        }
    )*};
}
debug_by_name!(Mutex, RwLock);

impl<T> fmt::Debug for MutexGuard<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MutexGuard").finish_non_exhaustive()
    }
}

/// Changes a count that nobody else has.
pub fn with_mut(count: &mut atomic::AtomicU32, change: impl FnOnce(&mut u32)) {
    count.with_mut(change);
}

/// As the real one.
///
/// # Errors
/// None here.
pub fn spawn_named<F, T>(name: &str, body: F) -> std::io::Result<JoinHandle<T>>
where
    F: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    checker::thread::Builder::new()
        .name(name.to_owned())
        .spawn(body)
}

/// As `std::sync::atomic`.
///
/// loom takes accesses that are sequentially consistent for ones that acquire and release, but knows
/// sequentially consistent fences. So one is put in front of each such access: with a fence before
/// both, a store and then a load of another place keep their order, as the language has it. Fences
/// also synchronise with each other, and so would order what the language does not, were there not a
/// place just before each where another thread may go on: there its fence does not know of this one.
///
/// And where threads both store to a place and exchange there, loom lets an exchange read what was
/// overwritten before, which no machine does. So a store is an exchange too, that acquires nothing.
pub mod atomic {
    use super::checker::sync::atomic as inner;
    use std::fmt;

    pub use inner::fence;
    pub use std::sync::atomic::Ordering;

    /// Where another thread may go on before an access that is sequentially consistent.
    #[derive(Default)]
    struct Door(#[cfg(feature = "loom")] inner::AtomicU32);

    impl Door {
        /// What loom needs before an access.
        fn pass(&self, with: Ordering) -> Ordering {
            #[cfg(feature = "loom")]
            if with == Ordering::SeqCst {
                self.0.fetch_add(1, Ordering::Relaxed);
                fence(with);
            }
            with
        }
    }

    /// How a store exchanges.
    fn store_order(with: Ordering) -> Ordering {
        if with == Ordering::SeqCst {
            Ordering::Release
        } else {
            with
        }
    }

    macro_rules! atomic {
        ($($name:ident: $value:ty),*) => {$(
            /// As that of the standard library.
            pub struct $name(inner::$name, Door);

            impl $name {
                /// With a first value.
                pub fn new(value: $value) -> Self {
                    Self(inner::$name::new(value), Door::default())
                }

                /// As that of the standard library.
                pub fn load(&self, with: Ordering) -> $value {
                    self.0.load(self.1.pass(with))
                }

                /// As that of the standard library.
                pub fn store(&self, value: $value, with: Ordering) {
                    let with = self.1.pass(with);
                    if cfg!(feature = "loom") {
                        self.0.swap(value, store_order(with));
                    } else {
                        self.0.store(value, with);
                    }
                }

                /// As that of the standard library.
                pub fn swap(&self, value: $value, with: Ordering) -> $value {
                    self.0.swap(value, self.1.pass(with))
                }
            }

            impl Default for $name {
                fn default() -> Self {
                    Self::new(<$value>::default())
                }
            }

            impl fmt::Debug for $name {
                fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                    f.debug_struct(stringify!($name)).finish_non_exhaustive()
                }
            }
        )*};
    }

    macro_rules! number {
        ($($name:ident: $value:ty),*) => {$(
            impl $name {
                /// As that of the standard library.
                pub fn fetch_add(&self, value: $value, with: Ordering) -> $value {
                    self.0.fetch_add(value, self.1.pass(with))
                }

                /// As that of the standard library.
                pub fn fetch_sub(&self, value: $value, with: Ordering) -> $value {
                    self.0.fetch_sub(value, self.1.pass(with))
                }
            }
        )*};
    }

    atomic!(AtomicBool: bool, AtomicI32: i32, AtomicU32: u32, AtomicU64: u64);
    number!(AtomicI32: i32, AtomicU32: u32, AtomicU64: u64);

    impl AtomicU32 {
        pub(super) fn with_mut(&mut self, change: impl FnOnce(&mut u32)) {
            #[cfg(feature = "loom")]
            self.0.with_mut(change);
            #[cfg(not(feature = "loom"))]
            change(self.0.get_mut());
        }
    }
}
