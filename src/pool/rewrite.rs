//! All metadata of a pool written anew, as an image with an empty journal. It goes into clusters that
//! are free, and only then do the superblocks name it: whoever is interrupted before that has
//! changed nothing, and afterwards it is done.

use super::Pool;
use super::error::PoolError;
use super::journal::Journal;
use super::load::Loaded;
use super::open::{OpenOptions, zero_journal};
use super::space::Space;
use crate::format::superblock::{COUNTER_MAX, JournalStart};
use crate::storage::Storage;
use crate::sync::Arc;

/// Batches of before are told from those that follow by at least so much.
const SEQ_GAP: u64 = 1 << 32;

/// The first batch of a pool written anew.
///
/// # Errors
/// The numbers are used up: no pool that was written to by us gets that far.
pub(super) fn batch_after(last_batch: u64) -> Result<u64, PoolError> {
    let seq = last_batch.checked_add(SEQ_GAP);
    seq.filter(|seq| *seq <= COUNTER_MAX)
        .ok_or_else(|| PoolError::damaged(format!("no batch may come after number {last_batch}")))
}

/// Writes what was loaded, which has no fault, to `storage`; `space` was derived from it.
/// `last_batch` is the last one that was written to the store, as far as is known.
///
/// # Errors
/// No space, or the store failed.
pub(super) fn rewrite(
    storage: &Arc<dyn Storage>,
    mut loaded: Loaded,
    space: Space,
    last_batch: u64,
    owner: &str,
) -> Result<(), PoolError> {
    loaded.superblock.start = JournalStart {
        half: 0,
        seq: batch_after(last_batch)?,
        prev_crc: 0,
    };
    loaded.superblock.image = None;
    loaded.journal = Journal::new(&loaded.superblock);
    let options = OpenOptions::default();
    let pool = Pool::assemble(Arc::clone(storage), loaded, space, &options);
    pool.write_image_alone()?;
    // What is left of older batches is of no more use, and could be taken for a later journal.
    let zeroed = zero_journal(&**storage, &pool.superblock());
    zeroed.map_err(PoolError::storage("clearing the journal"))?;
    pool.begin_epoch(owner)?;
    pool.close()
}
