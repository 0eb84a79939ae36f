//! Copy-on-write disks: the data path, and what can be done to a disk.
//!
//! The data path is sans-I/O: a plan turns a request into segments of the pool's file and the
//! base, the caller's ring moves the bytes, and completion publishes them. One plan serves the
//! vhost workers, the blocking face below, and the simulator alike.
//!
//! A front end of one's own, which moves the bytes itself:
//!
//! ```
//! # use std::sync::Arc;
//! # use tidepool::pool::{CreateOptions, OpenOptions, Pool, open};
//! # use tidepool::storage::{SimStorage, Storage};
//! use std::task::Waker;
//! use tidepool::cowdisk::{self, Disk, NewDisk, Source, Step, WritePlan};
//! # let store = Arc::new(SimStorage::new(64 << 20));
//! # open::create(&*store, &CreateOptions::new(64 << 20))?;
//! # let pool = Pool::open(Arc::clone(&store) as Arc<dyn Storage>, &OpenOptions::default())?;
//! cowdisk::create(&pool, &NewDisk::empty("disk", 1 << 30))?;
//! let disk = Disk::open(&pool, "disk")?;
//!
//! // A request holds a pass from its plan until its I/O is done.
//! let pass = disk.enter(0, Waker::noop()).ok_or("draining: try again when woken")?;
//! let mut plan = WritePlan::default();
//! let Step::Ready = disk.plan_write(&pass, 8192, 4096, &mut plan, Waker::noop())? else {
//!     return Err("busy, full, or something must be copied first".into());
//! };
//! for segment in plan.segments() {
//!     let len = usize::try_from(segment.len)?;
//!     store.write_at(&vec![7; len], segment.to)?; // or a ring of one's own
//! }
//! disk.complete_write(&mut plan, true);
//!
//! let mut segments = Vec::new();
//! disk.plan_read(&pass, 4096, 8192, &mut segments)?;
//! assert_eq!(segments[0].source, Source::Zero);
//! assert!(matches!(segments[1].source, Source::Pool(_)));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod base;
mod commit_base;
mod copy;
mod diff;
mod discard;
mod disk;
mod error;
mod extents;
mod flatten;
mod fork;
mod manage;
#[cfg(all(test, feature = "shuttle"))]
pub(crate) mod modelled;
mod pass;
mod plan;
mod rebase;
mod resize;
mod transfer;
mod usage;
mod write;

pub use crate::storage::Tier;
pub use base::{Base, check_stream, probe};
pub use commit_base::commit_to_base;
pub use copy::CopyJob;
pub use diff::{Comparison, diff};
pub use discard::ZeroStep;
pub use disk::Disk;
pub use error::{DiskError, DiskErrorKind, Interrupted};
pub use extents::{Extent, ExtentKind};
pub use flatten::flatten;
pub use fork::{commit, fork, rollback, snapshot};
pub use manage::{NewDisk, Settings, create, remove, rename, set};
pub use pass::Pass;
pub use plan::{Segment, Source};
pub use rebase::{Compared, Rebase, Rebased, rebase};
pub use resize::resize;
pub use transfer::{Progress, Qcow2Sink, RawSink, Sink, StreamSink, export, import, import_stream};
pub use usage::{DiskUsage, PoolUsage, usage};
pub use write::{Padding, Step, WritePlan, WriteSegment};
