//! Taking a repair or a restore back. Both leave everything that the old superblocks lead to as it is:
//! the journal, the image, and the clusters of disks; so those two blocks are all that is saved.

use super::error::PoolError;
use super::load::read_superblock;
use crate::format::superblock::{SUPERBLOCK_AT, SUPERBLOCK_LEN, Superblock};
use crate::format::undo::{UNDO_AT, UNDO_LEN, Undo};
use crate::storage::{AlignedBuf, Storage};

/// The undo that is in the store, if it is whole.
///
/// # Errors
/// The store failed.
pub(super) fn saved(storage: &dyn Storage) -> Result<Option<Undo>, PoolError> {
    let mut bytes = AlignedBuf::new(UNDO_LEN);
    let read = storage.read_at(&mut bytes, UNDO_AT);
    read.map_err(PoolError::storage("reading the undo"))?;
    Ok(Undo::decode(&bytes).ok())
}

/// The undo that puts back what was before `superblock`, the one in force, if there is one.
///
/// # Errors
/// The store failed.
pub(super) fn undo_of(
    storage: &dyn Storage,
    superblock: &Superblock,
) -> Result<Option<Undo>, PoolError> {
    let saved = saved(storage)?;
    Ok(saved.filter(|undo| undo.is_of(superblock)))
}

/// Saves the superblocks as they are, before others take their place whose journal begins with batch
/// `start_seq`. If nobody has written since an earlier repair or restore, those from before that
/// stay saved.
///
/// # Errors
/// The store failed.
pub(super) fn save(
    storage: &dyn Storage,
    uuid: [u8; 16],
    start_seq: u64,
    open_epoch: u32,
) -> Result<(), PoolError> {
    let known = match read_superblock(storage) {
        Ok((superblock, _)) => undo_of(storage, &superblock)?,
        Err(_) => None,
    };
    let undo = Undo {
        uuid,
        start_seq,
        open_epoch,
        copies: match known {
            Some(known) => known.copies,
            None => SUPERBLOCK_AT.map(|at| raw_copy(storage, at)),
        },
    };
    let mut bytes = AlignedBuf::new(UNDO_LEN);
    bytes.copy_from_slice(&undo.encode());
    let written = storage.write_durable_at(&bytes, UNDO_AT);
    written.map_err(PoolError::storage("saving the superblocks"))
}

/// A copy as it is. Of one that cannot be read nothing is saved.
fn raw_copy(storage: &dyn Storage, at: u64) -> Box<[u8; SUPERBLOCK_LEN]> {
    let mut bytes = AlignedBuf::new(SUPERBLOCK_LEN);
    let mut copy = Box::new([0; SUPERBLOCK_LEN]);
    if storage.read_at(&mut bytes, at).is_ok() {
        copy.copy_from_slice(&bytes);
    }
    copy
}

/// Puts the metadata back as it was before the last repair or restore; of several between which nobody
/// opened the pool for writing, before the first. An interrupted one is done by the next.
///
/// # Errors
/// There was none, or the pool has been opened for writing since: nothing was changed then. The store
/// failed: run it again.
pub fn undo(storage: &dyn Storage) -> Result<(), PoolError> {
    let (superblock, _) = read_superblock(storage)?;
    let undo = undo_of(storage, &superblock)?;
    let Some(undo) = undo.filter(|undo| undo.superblock().is_some()) else {
        return Err(PoolError::invalid(match saved(storage)? {
            Some(undo) if undo.superblock().is_none() => {
                "before it was restored it had no superblock that was intact: there is nothing to put \
                 back"
            }
            Some(_) => {
                "the pool has been opened for writing since it was repaired or restored, so what \
                 was before may be written over: it cannot be put back"
            }
            None => "the pool has not been repaired or restored: there is nothing to put back",
        }));
    };
    let writing = || PoolError::storage("writing the superblock");
    // Until the second one is written, the newer of the two is the repaired one.
    for (at, copy) in SUPERBLOCK_AT.into_iter().zip(&undo.copies) {
        let mut bytes = AlignedBuf::new(SUPERBLOCK_LEN);
        bytes.copy_from_slice(&copy[..]);
        storage.write_durable_at(&bytes, at).map_err(writing())?;
    }
    forget(storage)
}

/// Takes away the undo that is in the store.
///
/// # Errors
/// The store failed.
pub(super) fn forget(storage: &dyn Storage) -> Result<(), PoolError> {
    let zeros = AlignedBuf::new(SUPERBLOCK_LEN);
    let written = storage.write_durable_at(&zeros, UNDO_AT);
    written.map_err(PoolError::storage("taking the undo away"))
}

/// Whether [`undo`] would put anything back.
///
/// # Errors
/// The store failed.
pub fn is_possible(storage: &dyn Storage) -> Result<bool, PoolError> {
    let (superblock, _) = read_superblock(storage)?;
    let undo = undo_of(storage, &superblock)?;
    Ok(undo.is_some_and(|undo| undo.superblock().is_some()))
}
