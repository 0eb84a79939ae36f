//! Tidepool: an elastic pool file with forkable copy-on-write disks, served to any VMM as
//! vhost-user-blk over io_uring. The rooms, lowest first; who may import whom is the table in
//! `tests/tidy.rs`.
//!
//! A pool in one's own program, without a daemon (here in memory; a file is a
//! [`storage::FileStorage`]):
//!
//! ```
//! use std::sync::Arc;
//! use tidepool::cowdisk::{self, Disk, NewDisk};
//! use tidepool::pool::{CreateOptions, OpenOptions, Pool, open};
//! use tidepool::storage::SimStorage;
//!
//! let store = Arc::new(SimStorage::new(64 << 20));
//! open::create(&*store, &CreateOptions::new(64 << 20))?;
//! let pool = Pool::open(store, &OpenOptions::default())?;
//!
//! cowdisk::create(&pool, &NewDisk::empty("golden", 1 << 30))?;
//! let golden = Disk::open(&pool, "golden")?;
//! golden.write_at(&[1; 4096], 0)?;
//!
//! // Forks share everything until one of them writes.
//! cowdisk::fork(&pool, "golden", &["vm1".to_owned(), "vm2".to_owned()])?;
//! let vm1 = Disk::open(&pool, "vm1")?;
//! vm1.write_at(&[2; 512], 512)?;
//! vm1.flush()?;
//!
//! let mut block = [0; 4096];
//! vm1.read_at(&mut block, 0)?;
//! assert_eq!((block[0], block[512], block[1024]), (1, 2, 1));
//! golden.read_at(&mut block, 0)?;
//! assert_eq!(block, [1; 4096]);
//! pool.close()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

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
