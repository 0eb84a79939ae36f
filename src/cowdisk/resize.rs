//! Changing the size of a disk. All of a change happens with its one batch: what was there stays as
//! it is, byte for byte, until then, and if the change is refused or fails.
//!
//! Invariant: what a disk's last block has beyond the disk's end is zeros, so that growth shows
//! zeros and need not write any. A smaller size that cuts a block in two must therefore change
//! data: it writes what stays to another cluster, which the batch puts in the place of the old one.

use super::error::DiskError;
use super::fork::same_item;
use super::manage::{check_size, check_unused, put_row, writable};
use crate::format::catalogue::Row;
use crate::format::journal::Entry;
use crate::format::units::{Cluster, Lcn, SECTOR, SUBS, len_of};
use crate::pool::entry::Place;
use crate::pool::volume::{Map, Volume};
use crate::pool::{Pool, PoolError, PoolErrorKind};
use crate::storage::AlignedBuf;
use crate::sync::Arc;

/// Changes the size of a disk. Growth reads as zeros; what a smaller size cuts off is discarded,
/// and needs `may_shrink`.
///
/// # Errors
/// No such disk, a snapshot, a size out of range, in use (to shrink), no space for the copy of a
/// block that is cut in two, or as [`Pool::flush`].
pub fn resize(pool: &Arc<Pool>, name: &str, size: u64, may_shrink: bool) -> Result<(), DiskError> {
    let size = size.next_multiple_of(SECTOR);
    check_size(pool, size)?;
    let item = writable(pool, name)?;
    pool.transact(&[Arc::clone(&item.volume)], |transaction| {
        let item = same_item(pool, name, &item)?;
        let old = item.row.size;
        if size < old {
            if !may_shrink {
                return Err(PoolError::invalid(format!(
                    "`{name}` has {old} bytes; making it {size} discards its end: use --shrink"
                )));
            }
            check_unused(&item)?;
        }
        let base_len = item.row.base_len.min(size);
        let row = Row {
            size,
            base_len,
            ..item.row.clone()
        };
        transaction.check_row(&row)?;
        // The last that can fail: nothing refers to what it writes yet.
        let last = match size < old {
            true => cut_last(pool, &item.volume, size)?,
            false => None,
        };
        let mut map = item.volume.map.write();
        if size < old {
            cut_off(pool, &mut map, size, last);
        }
        map.size = size;
        map.base_len = base_len;
        transaction.collect(&mut map)?;
        drop(map);
        put_row(transaction, &item, row)
    })?;
    Ok(())
}

/// What becomes of the cluster that a size of `len` bytes cuts in two, if it does. Where the cut is
/// inside a block that has data, the cluster's own blocks are written to a new one, which nobody
/// refers to yet. The disk is drained and unused.
fn cut_last(pool: &Pool, volume: &Volume, len: u64) -> Result<Option<Entry>, PoolError> {
    let size = pool.cluster_size();
    let (lcn, within) = size.split(len);
    if within == 0 {
        return Ok(None);
    }
    let cluster = u32::try_from(size.bytes()).expect("at most 1 MiB");
    let gone = size.covered(within, cluster);
    let old = volume.map.read().get(lcn);
    let kept = Entry {
        alloc: old.alloc & !gone,
        zero: old.zero | gone,
        ..old
    };
    // The base ends where the disk does: nothing beyond is read from there.
    let cut = size.touched(within, cluster) & !gone;
    let has_data = cut != 0 && matches!(kept.place(cut.trailing_zeros()), Place::Pool(_));
    if !has_data {
        return Ok(Some(kept));
    }
    let alloc = kept.alloc | cut;
    let new = {
        let mut map = volume.map.write();
        map.check_limit(map.more_in_new(&old, alloc))
            .map_err(|_over| over_limit(size.sub_bytes(), len))?;
        let new = map.take_cluster(&pool.space);
        let new = new.map_err(|e| match e.kind() {
            PoolErrorKind::NoSpace => no_space(size.sub_bytes(), len),
            PoolErrorKind::Request | PoolErrorKind::Storage | PoolErrorKind::Damaged => e,
        })?;
        map.begin_move();
        new
    };
    let is_all = alloc | kept.zero == u16::MAX;
    let renewed = Entry {
        own: new.number,
        alloc,
        under: if is_all { 0 } else { kept.under },
        birth: pool.generation().0,
        ..kept
    };
    let copied = copy_blocks(pool, &kept, &renewed, within);
    if copied.is_err() {
        volume.map.write().end_move(&pool.space);
        let unused = new.number..new.number + 1;
        pool.space.give_back(unused, true).wake();
    }
    copied.map_err(PoolError::storage("copying a block that is cut in two"))?;
    // Before the batch that refers to it is closed (R2).
    pool.mark_written();
    Ok(Some(renewed))
}

fn no_space(block: u64, len: u64) -> PoolError {
    let why = "the pool is full";
    cannot_cut(why, "make room", block, len)
}

fn over_limit(block: u64, len: u64) -> PoolError {
    let why = "the disk has reached its limit";
    cannot_cut(why, "raise it (`disk set --limit`)", block, len)
}

fn cannot_cut(why: &str, remedy: &str, block: u64, len: u64) -> PoolError {
    PoolError::invalid(format!(
        "{why}, and a size of {len} bytes cuts a block in two, which needs space for a copy: \
         choose a multiple of {block} bytes ({} or {}), or {remedy} first",
        len / block * block,
        len.next_multiple_of(block)
    ))
}

/// Writes the blocks that `to` has of its own as they are in `from`, with zeros from byte `within`
/// of the cluster on.
fn copy_blocks(pool: &Pool, from: &Entry, to: &Entry, within: u32) -> std::io::Result<()> {
    let size = pool.cluster_size();
    let mut block = AlignedBuf::new(len_of(size.sub_bytes()));
    for sub in (0..SUBS).filter(|sub| to.alloc >> sub & 1 == 1) {
        let Place::Pool(source) = from.place(sub) else {
            unreachable!("only blocks with data in the pool are copied");
        };
        let at = u64::from(sub) * size.sub_bytes();
        pool.storage()
            .read_at(&mut block, size.offset(source) + at)?;
        let stays = len_of(u64::from(within).saturating_sub(at)).min(block.len());
        block[stays..].fill(0);
        pool.storage()
            .write_at(&block, size.offset(Cluster(to.own)) + at)?;
    }
    Ok(())
}

/// Discards what is beyond `len` bytes; `last` is what becomes of the cluster that is cut in two.
fn cut_off(pool: &Pool, map: &mut Map, len: u64, last: Option<Entry>) {
    let size = pool.cluster_size();
    let now = pool.generation();
    let (lcn, _) = size.split(len);
    let first_gone = match last {
        Some(_) => Lcn(lcn.0 + 1),
        None => lcn,
    };
    let end = size.count(map.size).unwrap_or(u32::MAX);
    if first_gone.0 < end {
        let zero_leaf = pool.zero_leaf();
        map.unmap(
            &pool.space,
            first_gone,
            end - first_gone.0,
            size,
            zero_leaf,
            now,
        );
    }
    let Some(new) = last else { return };
    let old = map.get(lcn);
    if new != old {
        map.set(&pool.space, lcn, new, now);
    }
    if new.own != old.own {
        map.end_move(&pool.space);
    }
}
