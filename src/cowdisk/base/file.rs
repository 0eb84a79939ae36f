//! One file that a base is read from: locked, and known by what it looked like when it was opened.

use crate::format::catalogue::FileRef;
use crate::format::units::{bytes_of, len_of};
use crate::storage::{Access, FileStorage, OpenError, Storage};
use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// See the module.
#[derive(Debug)]
pub(super) struct ImageFile {
    pub(super) file: FileStorage,
    pub(super) path: String,
    /// Bytes it had when it was opened. One that is shorter by now was cut: reading it fails.
    pub(super) len: u64,
    pub(super) metadata: Metadata,
}

impl ImageFile {
    /// Opens and locks the file at `path`.
    pub(super) fn open(path: &Path) -> Result<Self, String> {
        let opened = FileStorage::open_image(path, Access::ReadOnly);
        let file = opened.map_err(|e| match e {
            OpenError::NotAStore { .. } => "neither a regular file nor a block device".to_owned(),
            OpenError::Locked { .. } | OpenError::Length { .. } | OpenError::Io { .. } => {
                e.to_string()
            }
        })?;
        let fault = |e: io::Error| e.to_string();
        let (len, metadata) = (file.len().map_err(fault)?, file.metadata().map_err(fault)?);
        let path = path.display().to_string();
        Ok(Self {
            file,
            path,
            len,
            metadata,
        })
    }

    /// Which file of which device it is: a device is itself, under whatever names.
    pub(super) fn place(&self) -> (u64, u64) {
        match self.file.is_block_device() {
            true => (u64::MAX, self.metadata.rdev()),
            false => (self.metadata.dev(), self.metadata.ino()),
        }
    }

    /// What it is known by.
    pub(super) fn reference(&self) -> FileRef {
        file_ref(&self.path, &self.metadata)
    }

    /// Fills `buf` from byte `at`. Images end within their last cluster: what is missing of it reads
    /// as zeros.
    ///
    /// # Errors
    /// It begins beyond the end, the file was cut since it was opened, or the device failed.
    pub(super) fn read_cluster(&self, buf: &mut [u8], at: u64) -> io::Result<()> {
        let held = self.len.saturating_sub(at).min(bytes_of(buf.len()));
        if held == 0 {
            let what = format!("{}: it ends before byte {at}, where data is", self.path);
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, what));
        }
        let (data, rest) = buf.split_at_mut(len_of(held));
        self.read(data, at)?;
        rest.fill(0);
        Ok(())
    }

    /// Fills `buf` from byte `at`.
    ///
    /// # Errors
    /// It ends before that, or the device failed.
    pub(super) fn read(&self, buf: &mut [u8], at: u64) -> io::Result<()> {
        let read = self.file.read_at(buf, at);
        read.map_err(|e| {
            if e.kind() != io::ErrorKind::UnexpectedEof {
                return e;
            }
            let what = format!("{}: it is cut short at or after byte {at}", self.path);
            io::Error::new(e.kind(), what)
        })
    }
}

/// What a file at `path` is known by.
pub(super) fn file_ref(path: &str, metadata: &Metadata) -> FileRef {
    FileRef {
        path: path.to_owned(),
        ino: metadata.ino(),
        file_len: metadata.len(),
        mtime_ns: nanoseconds(metadata.mtime(), metadata.mtime_nsec()),
    }
}

pub(super) fn nanoseconds(seconds: i64, rest: i64) -> i64 {
    seconds.saturating_mul(1_000_000_000).saturating_add(rest)
}
