//! Copy-on-write disks: the data path, and what can be done to a disk.
//!
//! The data path is sans-I/O: a plan turns a request into segments of the pool's file and the
//! base, the caller's ring moves the bytes, and completion publishes them. One plan serves the
//! vhost workers, the blocking face below, and the simulator alike.

mod base;
mod copy;
mod diff;
mod discard;
mod disk;
mod error;
mod extents;
mod flatten;
mod fork;
mod manage;
mod pass;
mod plan;
mod transfer;
mod usage;
mod write;

pub use crate::storage::Tier;
pub use base::Base;
pub use copy::CopyJob;
pub use diff::{Comparison, diff};
pub use disk::Disk;
pub use error::{DiskError, DiskErrorKind};
pub use extents::{Extent, ExtentKind};
pub use flatten::flatten;
pub use fork::{commit, fork, rollback, snapshot};
pub use manage::{NewDisk, Settings, create, remove, rename, resize, set};
pub use pass::Pass;
pub use plan::{Segment, Source};
pub use transfer::{Progress, Qcow2Sink, RawSink, Sink, StreamSink, export, import};
pub use usage::{DiskUsage, PoolUsage, usage};
pub use write::{Step, WritePlan, WriteSegment};
