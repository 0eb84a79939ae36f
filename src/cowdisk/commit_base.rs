//! Writing a disk into its raw base: afterwards the base reads as the disk did, and the disk holds
//! nothing of its own.
//!
//! What the disk holds hides what is written under it, so the disk reads the same at every moment,
//! and a commit that was interrupted can be begun again. The base is not what it was then, though,
//! and is refused until the commit is finished.

use super::base::Base;
use super::disk::{Disk, Handle};
use super::error::DiskError;
use super::extents::ExtentKind;
use super::manage::{check_unused, put_row, writable};
use super::transfer::Progress;
use crate::format::catalogue::{BaseFormat, BaseRef, Row};
use crate::format::units::{Lcn, SECTOR, bytes_of, len_of};
use crate::pool::catalogue::Item;
use crate::pool::{Pool, PoolError};
use crate::storage::{Access, AlignedBuf, FileStorage, Storage};
use crate::sync::Arc;
use crate::sync::atomic::Ordering;
use std::path::Path;

/// Most bytes moved at once.
const PART_LEN_MAX: u64 = 1 << 20;

/// Writes what the disk `name` holds over its raw base into the base, and empties the disk's map.
/// `may_differ` goes on although the base is not what it was: after an interrupted commit. Returns
/// the bytes of data written.
///
/// # Errors
/// No such disk, a snapshot, in use, no raw base, other disks of the pool have the same base (they
/// would change), the base is in use or changed, or the base or the pool failed.
pub fn commit_to_base(
    pool: &Arc<Pool>,
    name: &str,
    may_differ: bool,
    progress: Progress<'_>,
) -> Result<u64, DiskError> {
    let item = writable(pool, name)?;
    let reference = check_base(pool, &item)?;
    check_unused(&item)?;
    let fault = |what: String| DiskError::Base {
        path: reference.path.clone(),
        what,
    };
    let path = Path::new(&reference.path);
    // Locked against everybody: nobody can open the disk either until this is over.
    let file = FileStorage::open_image(path, Access::ReadWrite);
    let file = file.map_err(|e| fault(e.to_string()))?;
    check_identity(path, reference, may_differ)?;
    let disk = without_base(pool, &item);
    let written = write_out(&disk, &item.row, &file, progress)?;
    let flushed = file.flush();
    flushed.map_err(DiskError::io("flushing the base image"))?;
    let now = Base::examine(path, BaseFormat::Raw)?;
    pool.flush()?;
    empty(pool, &item, &now)?;
    Ok(written)
}

/// The raw base that only this disk has.
fn check_base<'a>(pool: &Pool, item: &'a Item) -> Result<&'a BaseRef, DiskError> {
    let name = &item.row.name;
    let invalid = |what: String| Err(PoolError::invalid(what).into());
    let Some(base) = &item.row.base else {
        return invalid(format!(
            "`{name}` was not forked from a disk of this pool, and has no base"
        ));
    };
    if base.format != BaseFormat::Raw {
        return invalid(format!(
            "the base of `{name}` is not raw, and cannot be written; export the disk instead"
        ));
    }
    let is_same = |other: &BaseRef| (other.dev, other.ino) == (base.dev, base.ino);
    let others = pool.items().into_iter().map(|other| other.row);
    let others: Vec<String> = others
        .filter(|row| row.id != item.row.id && row.base.as_ref().is_some_and(is_same))
        .map(|row| row.name)
        .collect();
    if !others.is_empty() {
        return invalid(format!(
            "{} is the base of {} too, which would change; flatten or remove them first",
            base.path,
            others.join(", ")
        ));
    }
    Ok(base)
}

fn check_identity(path: &Path, was: &BaseRef, may_differ: bool) -> Result<(), DiskError> {
    let now = Base::examine(path, BaseFormat::Raw)?;
    let is_file = (now.dev, now.ino) == (was.dev, was.ino);
    let is_same = is_file && (now.file_len, now.mtime_ns) == (was.file_len, was.mtime_ns);
    if is_same || (is_file && may_differ) {
        return Ok(());
    }
    let what = match is_file {
        true => {
            "it has changed since it became a base; if that was an interrupted commit of this \
             disk, say --force to finish it"
        }
        false => "it is another file than the one that became a base; put the original back",
    };
    Err(DiskError::Base {
        path: was.path.clone(),
        what: what.to_owned(),
    })
}

/// A handle to what the disk holds of its own; the rest reads as holes.
fn without_base(pool: &Arc<Pool>, item: &Item) -> Disk {
    item.volume.opens.fetch_add(1, Ordering::SeqCst);
    Disk(Arc::new(Handle {
        pool: Arc::clone(pool),
        volume: Arc::clone(&item.volume),
        base: None,
        is_read_only: true,
        is_ephemeral: false,
    }))
}

fn write_out(
    disk: &Disk,
    row: &Row,
    file: &FileStorage,
    progress: Progress<'_>,
) -> Result<u64, DiskError> {
    let writing = || DiskError::io("writing the base image");
    let have = file.len().map_err(writing())?;
    let want = row.size.max(have.next_multiple_of(SECTOR));
    if want > have {
        file.set_len(want).map_err(writing())?;
    }
    let mut buf = AlignedBuf::new(len_of(PART_LEN_MAX));
    let mut extents = Vec::new();
    let mut written = 0;
    let mut at = 0;
    while at < row.size {
        extents.clear();
        let end = disk.extents_from(at, &mut extents)?;
        for extent in &extents {
            // Holes below `base_len` are the base itself.
            let from = match extent.kind {
                ExtentKind::Data(_) | ExtentKind::Zero => extent.offset,
                ExtentKind::Hole | ExtentKind::Base => extent.offset.max(row.base_len),
            };
            let is_data = matches!(extent.kind, ExtentKind::Data(_));
            let mut from = from;
            while from < extent.end() {
                let part = &mut buf[..len_of((extent.end() - from).min(PART_LEN_MAX))];
                let len = bytes_of(part.len());
                if is_data {
                    disk.read_at(part, from)?;
                    file.write_at(part, from).map_err(writing())?;
                    written += len;
                } else if has_data(file, from, len)? {
                    part.fill(0);
                    file.write_at(part, from).map_err(writing())?;
                }
                from += len;
                progress(from, row.size)?;
            }
        }
        at = end;
        progress(at, row.size)?;
    }
    Ok(written)
}

/// Zeros are written only where something is.
fn has_data(file: &FileStorage, at: u64, len: u64) -> Result<bool, DiskError> {
    let next = file.next_data(at);
    let next = next.map_err(DiskError::io("looking for data in the base image"))?;
    Ok(next.is_some_and(|(start, _)| start < at + len))
}

/// The disk holds nothing of its own any more, over the base as it is now. One batch.
fn empty(pool: &Arc<Pool>, item: &Item, now: &BaseRef) -> Result<(), DiskError> {
    let name = &item.row.name;
    pool.transact(&[Arc::clone(&item.volume)], |transaction| {
        let item = pool.find(name)?;
        let base = item.row.base.as_ref();
        let is_same = base.is_some_and(|base| (base.dev, base.ino) == (now.dev, now.ino));
        // Ours is the only handle.
        if !is_same || item.volume.opens.load(Ordering::SeqCst) != 1 {
            let name = name.clone();
            return Err(PoolError::InUse { name });
        }
        let base_len = now.file_len.next_multiple_of(SECTOR).min(item.row.size);
        let row = Row {
            base: Some(now.clone()),
            base_len,
            ..item.row.clone()
        };
        transaction.check_row(&row)?;
        let size = pool.cluster_size();
        let mut map = item.volume.map.write();
        // Unmapped clusters below `base_len` would become zeros: these are to show the base.
        map.base_len = 0;
        let count = size.count(map.size).unwrap_or(u32::MAX);
        let (space, zero_leaf) = (&pool.space, pool.zero_leaf());
        map.unmap(space, Lcn(0), count, size, zero_leaf, pool.generation());
        map.base_len = base_len;
        transaction.collect(&mut map)?;
        drop(map);
        put_row(transaction, &item, row)
    })?;
    Ok(())
}
