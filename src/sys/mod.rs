//! The only room where `unsafe` may be opted into: one kernel facility per file, each behind a
//! safe type or function, so that every room above is plain safe Rust.
//!
//! - [`allowance`]: how many mappings a client may have.
//! - [`buffer`]: page-aligned buffers for direct I/O.
//! - [`call`]: telling clients that something is done, without ever waiting for them.
//! - [`clock`]: the monotonic clock and the time of day.
//! - [`mod@file`]: files and block devices beyond what `std` offers: direct I/O and its alignment,
//!   durable writes, holes.
//! - [`lock`]: open-file-description locks, on whole files and on QEMU's permission bytes.
//! - [`fd`]: eventfds, our own and those that come over a socket; the limit of descriptors.
//! - [`memory`]: large tables in huge pages.
//! - [`mmap`]: guest memory shared by a vhost-user front end.
//! - [`process`]: who is alive.
//! - [`signal`]: being told to end.
//! - [`sigbus`]: surviving guest memory that is taken away.
//! - [`uring`]: a thread's io_uring, which owns what the kernel works on.

pub mod allowance;
pub mod buffer;
pub mod call;
pub mod clock;
pub mod fd;
pub mod file;
pub mod lock;
mod mapping;
pub mod memory;
pub mod mmap;
pub mod process;
pub mod sigbus;
pub mod signal;
pub mod uring;
mod window;
