//! Copying images in and disks out. Large requests; what is not there, or is all zeros, is neither
//! read nor written, so that sparse goes in and comes out sparse.

use super::base::Base;
use super::disk::Disk;
use super::error::{DiskError, Interrupted};
use super::extents::{ExtentKind, data_runs};
use crate::format::units::{SECTOR, bytes_of, len_of};
use crate::storage::{AlignedBuf, Caching, FileStorage, OpenError, Storage};
use imago::file::File as ImagoFile;
use imago::qcow2::Qcow2;
use imago::{
    FormatAccess, FormatCreateBuilder, FormatDriverBuilder, PermissiveImplicitOpenGate,
    StorageOpenOptions,
};
use std::io::{self, Read, Write};
use std::path::Path;

/// Most bytes moved at once.
const PART_LEN_MAX: u64 = 1 << 20;
/// Blocks of an exported disk that are looked at for zeros, bytes: what file systems allocate.
const EXPORT_BLOCK: u32 = 4096;

/// Told how far long work has come: bytes done, and bytes in all. May stop it, which then fails with
/// [`DiskError::Interrupted`].
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64) -> Result<(), Interrupted>;

/// Copies the image `from` into `disk`, which is empty and at least as large, and flushes it.
/// Returns the bytes of data written. Progress counts what the image has data of.
///
/// # Errors
/// The image or the pool failed, or the pool is full.
pub fn import(from: &Base, disk: &Disk, progress: Progress<'_>) -> Result<u64, DiskError> {
    let mut total = 0;
    each_data(from, disk, &mut |start, end| {
        total += end - start;
        Ok(())
    })?;
    let block = disk.block_size();
    let mut buf = AlignedBuf::new(len_of(PART_LEN_MAX));
    let (mut done, mut written) = (0, 0);
    each_data(from, disk, &mut |mut at, end| {
        while at < end {
            let len = (end - at).min(PART_LEN_MAX);
            let part = &mut buf[..len_of(len)];
            let read = from.read_at(part, at);
            read.map_err(DiskError::io("reading the image"))?;
            written += write_data(disk, part, at, block)?;
            at += len;
            done += len;
            progress(done.min(total), total)?;
        }
        Ok(())
    })?;
    disk.pool().flush()?;
    progress(total, total)?;
    Ok(written)
}

/// Writes what of `part` is not zeros, to byte `at`; returns how much that was.
fn write_data(disk: &Disk, part: &[u8], at: u64, block: u32) -> Result<u64, DiskError> {
    let mut written = 0;
    for run in data_runs(part, block) {
        disk.write_at(&part[run.clone()], at + bytes_of(run.start))?;
        written += bytes_of(run.len());
    }
    Ok(written)
}

/// Calls `visit` with the ranges in which `from` has data, widened to blocks of `disk`.
fn each_data(
    from: &Base,
    disk: &Disk,
    visit: &mut dyn FnMut(u64, u64) -> Result<(), DiskError>,
) -> Result<(), DiskError> {
    let (total, block) = (from.disk_len(), u64::from(disk.block_size()));
    let mut at = 0;
    while let Some((start, end)) = next_data(from, at)? {
        let end = end.next_multiple_of(block).min(total);
        let start = at.max(start / block * block);
        if start < end {
            visit(start, end)?;
        }
        at = at.max(end).max(start + 1);
    }
    Ok(())
}

/// Copies the flat image that `from` reads to its end into `disk`, which is empty, and flushes it. The
/// disk grows as it comes, and is left larger than the image. Returns the image's length, and the
/// bytes of data written.
///
/// # Errors
/// The stream or the pool failed, or the pool is full; or the stream is empty.
pub fn import_stream(
    from: &mut dyn Read,
    disk: &Disk,
    progress: Progress<'_>,
) -> Result<(u64, u64), DiskError> {
    let block = disk.block_size();
    let mut buf = AlignedBuf::new(len_of(PART_LEN_MAX));
    let (mut at, mut written) = (0, 0);
    loop {
        let len = read_full(from, &mut buf).map_err(DiskError::io("reading the image"))?;
        if len == 0 {
            break;
        }
        let end = (at + bytes_of(len)).next_multiple_of(SECTOR);
        let part = &mut buf[..len_of(end - at)];
        part[len..].fill(0);
        if end > disk.size() {
            let larger = disk.size().saturating_mul(2).min(disk.size() + GROWTH_MAX);
            super::resize(disk.pool(), &disk.name(), larger.max(end), false)?;
        }
        written += write_data(disk, part, at, block)?;
        at = end;
        progress(at, at)?;
    }
    if at == 0 {
        let what = "there is nothing in the image";
        return Err(crate::pool::PoolError::invalid(what).into());
    }
    disk.pool().flush()?;
    Ok((at, written))
}

/// Most bytes by which a disk grows ahead of the stream it is made from.
const GROWTH_MAX: u64 = 1 << 30;

/// Fills `buf` as far as there is something.
fn read_full(from: &mut dyn Read, buf: &mut [u8]) -> io::Result<usize> {
    let mut len = 0;
    while len < buf.len() {
        match from.read(&mut buf[len..]) {
            Ok(0) => break,
            Ok(more) => len += more,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(len)
}

fn next_data(base: &Base, at: u64) -> Result<Option<(u64, u64)>, DiskError> {
    if at >= base.len() {
        return Ok(None);
    }
    base.next_data(at)
        .map_err(DiskError::io("looking for data in the image"))
}

/// What a disk is copied to: zeros everywhere, until written.
pub trait Sink {
    /// Writes `buf` at byte `offset`. Offsets only ever grow.
    ///
    /// # Errors
    /// What the device said.
    fn write_at(&mut self, buf: &[u8], offset: u64) -> io::Result<()>;

    /// Everything was written, of `len` bytes in all; makes it durable.
    ///
    /// # Errors
    /// What the device said.
    fn finish(&mut self, len: u64) -> io::Result<()>;
}

/// Copies what `disk` holds to `sink`. Returns the bytes of data written. Progress counts what the disk
/// has data of. A disk that is being written meanwhile gives a mixture; export a snapshot of it.
///
/// # Errors
/// The disk failed, or the sink (as [`DiskError::Io`]).
pub fn export(disk: &Disk, sink: &mut dyn Sink, progress: Progress<'_>) -> Result<u64, DiskError> {
    let size = disk.size();
    let mut total = 0;
    each_held(disk, size, &mut |start, end| {
        total += end - start;
        Ok(())
    })?;
    let mut buf = AlignedBuf::new(len_of(PART_LEN_MAX));
    let (mut done, mut written) = (0, 0);
    each_held(disk, size, &mut |start, end| {
        written += export_range(disk, (start, end), &mut buf, sink, &mut |more| {
            done += more;
            progress(done.min(total), total)
        })?;
        Ok(())
    })?;
    sink.finish(size)
        .map_err(DiskError::io("finishing the copy"))?;
    progress(total, total)?;
    Ok(written)
}

/// Calls `visit` with the ranges of the first `size` bytes in which `disk` or its base has data.
fn each_held(
    disk: &Disk,
    size: u64,
    visit: &mut dyn FnMut(u64, u64) -> Result<(), DiskError>,
) -> Result<(), DiskError> {
    let mut extents = Vec::new();
    let mut at = 0;
    while at < size {
        extents.clear();
        at = disk.extents_from(at, &mut extents)?;
        for extent in &extents {
            match extent.kind {
                ExtentKind::Hole | ExtentKind::Zero => {}
                ExtentKind::Data(_) => visit(extent.offset, extent.end())?,
                ExtentKind::Base => {
                    let mut from = extent.offset;
                    let base = disk.base();
                    while let Some((start, end)) = match base {
                        Some(base) if from < extent.end() => next_data(base, from)?,
                        Some(_) | None => None,
                    } {
                        let start = (start / 512 * 512).clamp(from, extent.end());
                        let end = end.next_multiple_of(512).clamp(start, extent.end());
                        visit(start, end)?;
                        from = end.max(start + 512);
                    }
                }
            }
        }
    }
    Ok(())
}

fn export_range(
    disk: &Disk,
    (mut at, end): (u64, u64),
    buf: &mut AlignedBuf,
    sink: &mut dyn Sink,
    moved: &mut dyn FnMut(u64) -> Result<(), Interrupted>,
) -> Result<u64, DiskError> {
    let mut written = 0;
    while at < end {
        // Up to a round offset, so that requests after the first are aligned.
        let next = (at / PART_LEN_MAX + 1) * PART_LEN_MAX;
        let part = &mut buf[..len_of(end.min(next) - at)];
        disk.read_at(part, at)?;
        for run in data_runs(part, EXPORT_BLOCK) {
            let result = sink.write_at(&part[run.clone()], at + bytes_of(run.start));
            result.map_err(DiskError::io("writing the copy"))?;
            written += bytes_of(run.len());
        }
        moved(end.min(next) - at)?;
        at = end.min(next);
    }
    Ok(written)
}

/// A flat image file.
#[derive(Debug)]
pub struct RawSink(FileStorage);

impl RawSink {
    /// Makes the file, which must not exist, with `len` bytes: a multiple of 512.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn create(path: &Path, len: u64) -> Result<Self, OpenError> {
        FileStorage::create_new_with(path, len, Caching::Buffered).map(Self)
    }
}

impl Sink for RawSink {
    fn write_at(&mut self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_at(buf, offset)
    }

    fn finish(&mut self, _len: u64) -> io::Result<()> {
        self.0.flush()
    }
}

/// A qcow2 image file.
pub struct Qcow2Sink {
    image: FormatAccess<ImagoFile>,
    /// Made and locked by us; its contents are `image`'s to write.
    file: FileStorage,
}

impl std::fmt::Debug for Qcow2Sink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Qcow2Sink").field(&self.file).finish()
    }
}

impl Qcow2Sink {
    /// Makes the file, which must not exist, for a disk of `len` bytes.
    ///
    /// # Errors
    /// It exists, or cannot be written.
    pub fn create(path: &Path, len: u64) -> Result<Self, OpenError> {
        let file = FileStorage::create_new_with(path, 0, Caching::Buffered)?;
        let failed = |source| OpenError::Io {
            path: path.to_owned(),
            doing: "make a qcow2 image of",
            source,
        };
        let options = StorageOpenOptions::new().write(true).filename(path);
        let storage = <ImagoFile as imago::Storage>::open(options).map_err(failed)?;
        let made = Qcow2::<ImagoFile>::create_builder(storage)
            .size(len)
            .create_open(PermissiveImplicitOpenGate::default(), |storage| {
                Ok(Qcow2::builder(storage).write(true))
            });
        let image = FormatAccess::new(made.map_err(failed)?);
        Ok(Self { image, file })
    }
}

impl Sink for Qcow2Sink {
    fn write_at(&mut self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.image.write(buf, offset)
    }

    fn finish(&mut self, _len: u64) -> io::Result<()> {
        self.image.flush()?;
        self.image.sync()
    }
}

/// A stream: what is not written is filled up with zeros.
#[derive(Debug)]
pub struct StreamSink<W> {
    stream: W,
    at: u64,
}

impl<W: Write> StreamSink<W> {
    /// Writes to `stream` from where it is.
    pub fn new(stream: W) -> Self {
        Self { stream, at: 0 }
    }

    fn fill(&mut self, until: u64) -> io::Result<()> {
        let zeros = [0; 65536];
        while self.at < until {
            let len = (until - self.at).min(bytes_of(zeros.len()));
            self.stream.write_all(&zeros[..len_of(len)])?;
            self.at += len;
        }
        Ok(())
    }
}

impl<W: Write> Sink for StreamSink<W> {
    fn write_at(&mut self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.fill(offset)?;
        self.stream.write_all(buf)?;
        self.at += bytes_of(buf.len());
        Ok(())
    }

    fn finish(&mut self, len: u64) -> io::Result<()> {
        self.fill(len)?;
        self.stream.flush()
    }
}
