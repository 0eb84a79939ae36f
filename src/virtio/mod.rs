//! What the block back ends and the VMM share of virtio: the walk of a virtqueue in guest memory
//! and the requests of a block device. Split rings of virtio 1.2 (clause 2.7), little-endian.
//!
//! - [`queue`]: one split virtqueue, device side; every value from the guest is hostile.
//! - [`blk`]: virtio-blk requests and configuration space (clause 5.2).
//!
//! Invariants: nothing here performs I/O on files; nothing a guest writes makes anything here
//! panic or work longer than its queue is large; each guest value is copied once and then
//! checked.

pub mod blk;
pub mod queue;
