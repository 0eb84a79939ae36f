//! The files of one worker's ring: a pool's file is registered once for all its disks' queues, a
//! raw base once for each object that stands for it.

use std::io;
use std::os::fd::BorrowedFd;

use crate::cowdisk::Base;
use crate::sync::Arc;
use crate::sys::uring::{FileIndex, Ring};

use super::device::Device;

#[derive(Debug)]
struct Entry {
    /// Address of the pool or base, which `_base` or the lanes' disks keep in use.
    key: usize,
    _base: Option<Arc<Base>>,
    file: FileIndex,
    users: usize,
}

/// What the ring needs for one queue.
#[derive(Debug, Clone, Copy)]
pub(super) struct LaneFiles {
    pub(super) pool: FileIndex,
    /// The base and its length in bytes, if the ring may read it.
    pub(super) base: Option<(FileIndex, u64)>,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Files(Vec<Entry>);

impl Files {
    /// Registers what a queue of `device` needs.
    ///
    /// # Errors
    /// The disk has no file, or the ring takes no more files.
    pub(super) fn open(&mut self, ring: &mut Ring, device: &Device) -> io::Result<LaneFiles> {
        let disk = &device.disk;
        let fd = disk.data_fd().ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::Unsupported,
                "the pool has no file that a ring can use",
            )
        })?;
        let pool = self.find_or(ring, Arc::as_ptr(disk.pool()).addr(), None, fd)?;
        let Some((base, fd)) = disk.base().and_then(|base| Some((base, base.ring_fd()?))) else {
            return Ok(LaneFiles { pool, base: None });
        };
        match self.find_or(ring, Arc::as_ptr(base).addr(), Some(base), fd) {
            Ok(file) => Ok(LaneFiles {
                pool,
                base: Some((file, base.len())),
            }),
            Err(error) => {
                self.release(ring, pool);
                Err(error)
            }
        }
    }

    fn find_or(
        &mut self,
        ring: &mut Ring,
        key: usize,
        base: Option<&Arc<Base>>,
        fd: BorrowedFd<'_>,
    ) -> io::Result<FileIndex> {
        if let Some(entry) = self.0.iter_mut().find(|entry| entry.key == key) {
            entry.users += 1;
            return Ok(entry.file);
        }
        let file = ring.add_file(fd)?;
        self.0.push(Entry {
            key,
            _base: base.cloned(),
            file,
            users: 1,
        });
        Ok(file)
    }

    /// The counterpart of [`Files::open`].
    pub(super) fn close(&mut self, ring: &mut Ring, files: &LaneFiles) {
        self.release(ring, files.pool);
        if let Some((base, _)) = files.base {
            self.release(ring, base);
        }
    }

    fn release(&mut self, ring: &mut Ring, file: FileIndex) {
        let Some(at) = self.0.iter().position(|entry| entry.file == file) else {
            return;
        };
        self.0[at].users -= 1;
        if self.0[at].users == 0 {
            self.0.swap_remove(at);
            ring.remove_file(file);
        }
    }
}
