//! Locks, atomics and threads for every room, in one place so that a model checker can replace
//! them. Locks do not poison: a panic while one is held is a bug that ends the process's use of
//! the pool, not a state to recover from.
//!
//! Built with the feature `loom` or `shuttle`, what is here is loom's or shuttle's behind the same
//! names, and works only inside of their runs: every use of it is a place where
//! the checker may let another thread go on. `Arc` and `OnceLock` stay those of the standard library,
//! as they do in shuttle: their own insides are trusted, and what they guard is seen by the uses
//! around them. Where it matters who lets go last, `Shared` is an `Arc` whose ends
//! are seen. [`global`] is never modelled.

#[cfg(all(test, feature = "loom"))]
pub(crate) mod explore;
#[cfg(any(feature = "loom", feature = "shuttle"))]
mod modelled;
#[cfg(not(any(feature = "loom", feature = "shuttle")))]
mod real;

#[cfg(any(feature = "loom", feature = "shuttle"))]
mod shared;
mod vital;

#[cfg(any(feature = "loom", feature = "shuttle"))]
pub use modelled::*;
#[cfg(not(any(feature = "loom", feature = "shuttle")))]
pub use real::*;
#[cfg(any(feature = "loom", feature = "shuttle"))]
pub use shared::Shared;
pub use std::sync::{Arc, OnceLock, Weak};
pub use vital::{OnPanic, Vital, set_on_panic};

/// For what outlives a model checker's run, or is used outside of it: statics, signal handlers, and
/// counters that nothing depends on.
pub mod global {
    pub use parking_lot::Mutex;
    pub use std::sync::atomic;
}

/// Whether a model checker runs this: tables are made small then, for each run makes them anew.
pub const IS_MODELLED: bool = cfg!(any(feature = "loom", feature = "shuttle"));
