//! Tidepool: an elastic pool file with forkable copy-on-write disks, served to any VMM as
//! vhost-user-blk over io_uring. The rooms, lowest first; who may import whom is the table in
//! `tests/tidy.rs`.

pub mod cli;
pub mod cowdisk;
pub mod format;
pub mod metrics;
pub mod pool;
pub mod storage;
pub mod sync;
pub mod sys;
pub mod vhost_blk;
pub mod virtio;
