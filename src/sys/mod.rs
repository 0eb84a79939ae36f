//! The only room where `unsafe` may be opted into: one kernel facility per file, each behind a
//! safe type or function, so that every room above is plain safe Rust.
//!
//! - [`clock`]: the monotonic clock and the time of day.
//! - [`mod@file`]: files and block devices beyond what `std` offers: direct I/O and its alignment,
//!   durable writes, holes, open-file-description locks.

pub mod clock;
pub mod file;
