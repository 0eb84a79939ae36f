//! Making a disk independent of its base: what it still reads from there is copied into the pool,
//! then the reference is dropped. It can be stopped at any moment and begun again: what was copied
//! stays copied. The disk can be used meanwhile.

use super::base::Base;
use super::disk::{Disk, thread_waker};
use super::error::DiskError;
use super::extents::data_runs;
use super::manage::{put_row, writable};
use super::pass::Pass;
use super::transfer::Progress;
use super::write::{Step, Stop};
use crate::format::catalogue::Row;
use crate::format::units::{Lcn, bytes_of, len_of, mask};
use crate::pool::{Pool, PoolError};
use crate::storage::AlignedBuf;
use crate::sync::Arc;
use std::task::Waker;

/// Bytes of the base looked at at once, at least a cluster.
const PART_LEN: u64 = 1 << 20;

/// Copies what the disk `name` reads from its base into the pool, and drops the base. Zeros of the
/// base take no space. `progress` is told bytes of the base; it may wait, to go easy on the device.
/// Returns the bytes of data looked at.
///
/// # Errors
/// No such disk, a snapshot, no base, the base or the pool failed, or the pool is full; run it
/// again after seeing to that.
pub fn flatten(pool: &Arc<Pool>, name: &str, progress: Progress<'_>) -> Result<u64, DiskError> {
    let item = writable(pool, name)?;
    // Open until the end: a disk in use is not rolled back or committed into, so what was copied
    // stays in the map.
    let disk = Disk::open(pool, name)?;
    let Some(base) = disk.base() else {
        let what = format!("`{name}` has no base; there is nothing to flatten");
        return Err(PoolError::invalid(what).into());
    };
    let mut buf = AlignedBuf::new(len_of(PART_LEN));
    let mut copied = 0;
    let mut at = 0;
    let total = disk.volume().map.read().base_len;
    while at < total {
        let found = base.next_data(at);
        let Some((start, end)) = found.map_err(DiskError::io("looking for data in the base"))?
        else {
            break;
        };
        at = at.max(start / PART_LEN * PART_LEN);
        let end = end.min(total);
        while at < end {
            let len = (total - at).min(PART_LEN);
            copied += disk.pull_part(base, at, &mut buf[..len_of(len)])?;
            at += len;
            progress(at, total)?;
        }
    }
    // Everything copied is durable before the base goes.
    pool.flush()?;
    pool.transact(&[Arc::clone(&item.volume)], |transaction| {
        let now = pool.find(name)?;
        if now.row.id != item.row.id || now.row.base != item.row.base {
            return Err(PoolError::InUse {
                name: name.to_owned(),
            });
        }
        transaction.collect(&mut now.volume.map.write())?;
        let row = Row {
            base: None,
            base_len: 0,
            ..now.row.clone()
        };
        now.volume.map.write().base_len = 0;
        put_row(transaction, &now, row)
    })?;
    // Done is done: it is too late to stop.
    let _told = progress(total, total);
    Ok(copied)
}

impl Disk {
    /// Copies what of `[at, at + part.len())` comes from the base and is not zeros.
    fn pull_part(&self, base: &Base, at: u64, part: &mut [u8]) -> Result<u64, DiskError> {
        let size = self.pool().cluster_size();
        let waker = thread_waker();
        // The base does not change: it can be read before the disk is looked at.
        let read = base.read_at(part, at);
        read.map_err(DiskError::io("reading the base image"))?;
        let mut copied = 0;
        let mut offset = at;
        for cluster in part.chunks(size.len()) {
            let mut wanted = 0;
            for run in data_runs(cluster, self.block_size()) {
                let sub = |byte: usize| {
                    let sub = bytes_of(byte).div_ceil(size.sub_bytes());
                    u32::try_from(sub).expect("at most 16 in a cluster")
                };
                wanted |= mask(sub(run.start), sub(run.end));
                copied += bytes_of(run.len());
            }
            if wanted != 0 {
                self.pull_cluster(size.split(offset).0, wanted, &waker)?;
            }
            offset += bytes_of(cluster.len());
        }
        self.relieve()?;
        Ok(copied)
    }

    fn pull_cluster(&self, lcn: Lcn, wanted: u16, waker: &Waker) -> Result<(), DiskError> {
        let (_pass, step) = self.settle(waker, |pass, waker| {
            self.plan_pull(pass, lcn, wanted, waker)
        })?;
        assert!(matches!(step, Step::Done), "a pull is a copy");
        Ok(())
    }

    /// Plans to bring those of the blocks `wanted` of `lcn` that still come from the base into the
    /// disk's own cluster.
    fn plan_pull(
        &self,
        _pass: &Pass,
        lcn: Lcn,
        wanted: u16,
        waker: &Waker,
    ) -> Result<Step, DiskError> {
        self.pool().check_poison()?;
        let pool = self.pool();
        let mut map = self.volume().map.write();
        // The disk may have shrunk, or gone.
        let offset = pool.cluster_size().disk_offset(lcn);
        self.check_range(&map, offset.min(map.size), 0)?;
        let entry = map.get(lcn);
        let missing = wanted & entry.rest();
        if missing == 0 || entry.under != 0 || offset >= map.base_len {
            return Ok(Step::Done);
        }
        let busy = map.busy.get(&lcn.0).copied().unwrap_or_default();
        if busy.is_exclusive || busy.fills > 0 {
            map.waiting.push(waker.clone());
            return Ok(Step::Busy);
        }
        let now = pool.generation();
        let is_own = map.is_own(&entry) || (entry.own != 0 && map.claim(&pool.space, lcn, now));
        let in_limit = map.check_limit(map.more_in_new(&entry, missing));
        let planned = in_limit.map_err(Stop::from).and_then(|()| {
            let entry = match is_own {
                true => map.get(lcn),
                false => self.hang_new(&mut map, lcn, entry)?.0,
            };
            Ok(self.copy_up(&mut map, lcn, entry, missing)?)
        });
        pool.list_changes(self.volume(), &mut map);
        match planned {
            Ok(job) => Ok(Step::Copy(job)),
            Err(Stop::Step(step)) => Ok(step),
            Err(Stop::Limit(subs)) => {
                drop(map);
                let limit = subs.saturating_mul(pool.cluster_size().sub_bytes());
                let name = self.name();
                Err(DiskError::LimitReached { name, limit })
            }
            Err(Stop::Error(e)) => Err(e),
        }
    }
}
