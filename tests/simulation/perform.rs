//! What a history does, done to the real pool.

use crate::act::Act;
use crate::common;
use crate::oracle::{BLOCK, CLUSTER, Model, SECTOR, Value, fill};
use std::ops::Range;
use std::sync::Arc;
use tidepool::cowdisk::{self, Disk, DiskError, NewDisk};
use tidepool::format::catalogue::BaseFormat;
use tidepool::pool::{Pool, PoolErrorKind};

/// Whole leaves that one bulk step unmaps: a batch of 256 KiB.
const BULK: u64 = 8000;

/// Sectors of the base image: it ends within a block.
const BASE_SECTORS: u64 = 3 * CLUSTER + BLOCK + 1;
/// A part of it that is zeros, which a file system may keep as a hole.
const BASE_HOLE: Range<u64> = CLUSTER + 1..2 * CLUSTER + 5;
/// Values of the base image begin here: each is of its own sector.
const BASE_FIRST: Value = 1 << 40;

/// What the base image holds.
pub(crate) fn base_values() -> Vec<Value> {
    let value = |sector| match BASE_HOLE.contains(&sector) {
        true => 0,
        false => BASE_FIRST + sector,
    };
    (0..BASE_SECTORS).map(value).collect()
}

/// The sector that the base image has `value` in.
pub(crate) fn home_in_base(value: Value) -> Option<u64> {
    value.checked_sub(BASE_FIRST)
}

thread_local! {
    /// The base image. It is not in the simulated world: nobody writes to it, and it is durable.
    static BASE: tempfile::NamedTempFile = {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let bytes: Vec<u8> = base_values().into_iter().flat_map(fill).collect();
        std::fs::write(file.path(), bytes).expect("an image");
        file
    };
}

/// Does `act` to the pool, if it is one that a pool does in one call.
pub(crate) fn perform(pool: &Arc<Pool>, act: &Act, model: &Model) -> Result<(), DiskError> {
    let open = |name: &str| Disk::open(pool, name);
    match act {
        Act::Create(name) => cowdisk::create(pool, &NewDisk::empty(name, model.disk_len())),
        Act::Over(name) => {
            let path = BASE.with(|file| file.path().to_owned());
            let new = NewDisk {
                base: Some((path, BaseFormat::Raw)),
                ..NewDisk::empty(name, model.disk_len())
            };
            cowdisk::create(pool, &new)
        }
        Act::Write(name, from, len) => {
            let bytes: Vec<u8> = model.values(*len).into_iter().flat_map(fill).collect();
            open(name)?.write_at(&bytes, from * SECTOR)
        }
        Act::Discard(name, from, len) => open(name)?.discard(from * SECTOR, len * SECTOR),
        Act::Zero(name, from, len) => open(name)?.write_zeroes(from * SECTOR, len * SECTOR, true),
        Act::Flush => Ok(pool.flush()?),
        Act::Fork(from, to) => cowdisk::fork(pool, from, std::slice::from_ref(to)),
        Act::Snapshot(from, name) => cowdisk::snapshot(pool, from, name),
        Act::Rollback(snapshot) => cowdisk::rollback(pool, snapshot),
        Act::Commit(child) => cowdisk::commit(pool, child),
        Act::Flatten(name) => cowdisk::flatten(pool, name, &mut |_, _| Ok(())).map(|_| ()),
        Act::Remove(name) => cowdisk::remove(pool, name, true),
        Act::Resize(name, len) => cowdisk::resize(pool, name, len * SECTOR, true),
        Act::Rename(name, new) => cowdisk::rename(pool, name, new),
        Act::Trim => Ok(pool.trim().map(|_| ())?),
        Act::Pool(len) => match pool.resize(len << 20) {
            // Something is in the way.
            Err(e) if e.kind() == PoolErrorKind::Request => Ok(()),
            resized => Ok(resized?),
        },
        Act::Bulk => {
            let bulk = match open("bulk") {
                Ok(bulk) => bulk,
                Err(_) => {
                    let len = 2 * BULK * 64 * common::CLUSTER;
                    cowdisk::create(pool, &NewDisk::empty("bulk", len))?;
                    open("bulk")?
                }
            };
            for n in 0..BULK {
                bulk.discard(2 * n * 64 * common::CLUSTER, 64 * common::CLUSTER)?;
            }
            bulk.flush()
        }
        Act::Close => Ok(pool.close()?),
        Act::Begin(..) | Act::End(_) | Act::Crash(_) | Act::Kill => {
            unreachable!("{act} is not one call")
        }
    }
}
