//! All metadata of a pool written anew, as an image with an empty journal. It goes into clusters that
//! are free by what was loaded, and only then do the superblocks name it. So a repair that is
//! interrupted has changed nothing, or is done; a restore, which may load another state than the
//! store's, is run again.

use super::Pool;
use super::error::PoolError;
use super::journal::Journal;
use super::load::{Loaded, superblock_copies};
use super::open::{OpenOptions, zero_journal};
use super::space::Space;
use crate::format::superblock::{COUNTER_MAX, JournalStart, Superblock};
use crate::storage::Storage;
use crate::sync::Arc;

/// Batches of before are told from those that follow by at least so much.
const SEQ_GAP: u64 = 1 << 32;

/// The first batch of a pool written anew: after all that the store has, also what is not part of
/// its history, or that would be taken for what follows.
///
/// # Errors
/// The numbers are used up: no pool that was written to by us gets that far. The store failed.
pub(super) fn first_batch(
    storage: &dyn Storage,
    superblock: &Superblock,
    last_batch: u64,
) -> Result<u64, PoolError> {
    let mut last = last_batch.max(superblock.start.seq);
    for copy in superblock_copies(storage)?.iter().flatten() {
        let image_seq = copy.image.map_or(0, |image| image.seq);
        last = last.max(copy.start.seq).max(image_seq);
    }
    let last = last.max(Journal::new(superblock).highest_intact(storage)?);
    let seq = last.checked_add(SEQ_GAP).filter(|seq| *seq <= COUNTER_MAX);
    seq.ok_or_else(|| PoolError::damaged(format!("no batch may come after number {last}")))
}

/// Writes what was loaded, which has no fault, to `storage`; `space` was derived from it.
/// `last_batch` is the last one of its history.
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
        seq: first_batch(&**storage, &loaded.superblock, last_batch)?,
        prev_crc: 0,
    };
    loaded.superblock.image = None;
    loaded.superblock.known = None;
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
