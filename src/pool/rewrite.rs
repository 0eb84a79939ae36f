//! All metadata of a pool written anew, as an image with an empty journal. It goes into clusters that
//! nothing names, nor ever named as far as the store tells, and only then do the superblocks name
//! it; they are saved before. So one that is interrupted has changed nothing, or is done, and one that
//! is done can be taken back.

use super::bitmap::Bitmap;
use super::error::PoolError;
use super::evidence::Evidence;
use super::image::{self, Frozen, FrozenDisk, Written};
use super::journal::{Journal, uuid_low};
use super::load::{Loaded, read_superblock, superblock_copies};
use super::open::zero_journal;
use super::space::Space;
use super::undo;
use crate::format::superblock::{
    COUNTER_MAX, JournalStart, KnownBatch, SUPERBLOCK_AT, SUPERBLOCK_LEN, Superblock,
};
use crate::format::units::{DiskId, Generation};
use crate::storage::{AlignedBuf, Storage};

/// Batches of before are told from those that follow by at least so much.
const SEQ_GAP: u64 = 1 << 32;
/// Clusters that a pool without room for its metadata grows by, at first.
const GROWTH_MIN: u32 = 64;

/// What becomes of the journal that is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OldJournal {
    /// It stays until later batches take its place: what it says may be wanted again.
    Kept,
    /// It is no journal of this pool.
    Zeroed,
}

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
        let known_seq = copy.known.map_or(0, |known| known.seq);
        last = last.max(copy.start.seq).max(image_seq).max(known_seq);
    }
    let last = last.max(Journal::new(superblock).highest_intact(storage)?);
    let seq = last.checked_add(SEQ_GAP).filter(|seq| *seq <= COUNTER_MAX);
    seq.ok_or_else(|| PoolError::damaged(format!("no batch may come after number {last}")))
}

/// Writes what was loaded, which has no fault, to `storage`; `space` was derived from it.
/// `last_batch` is the last one of its history. What `evidence` names is not written; without any, what
/// was there cannot be put back.
///
/// # Errors
/// No space, or the store failed.
pub(super) fn rewrite(
    storage: &dyn Storage,
    loaded: Loaded,
    space: &Space,
    last_batch: u64,
    old: (Option<&Evidence>, OldJournal),
) -> Result<(), PoolError> {
    let (evidence, old_journal) = old;
    let start = JournalStart {
        half: 0,
        seq: first_batch(storage, &loaded.superblock, last_batch)?,
        prev_crc: 0,
    };
    let frozen = freeze(&loaded, start.seq - 1);
    let mut superblock = loaded.superblock;
    if let Some(evidence) = evidence {
        withhold(space, &evidence.named);
    }
    let written = write_image(storage, &frozen, space, &mut superblock)?;
    if old_journal == OldJournal::Zeroed {
        let zeroed = zero_journal(storage, &superblock);
        zeroed.map_err(PoolError::storage("clearing the journal"))?;
    }
    let flushed = storage.flush();
    flushed.map_err(PoolError::storage("flushing a checkpoint image"))?;
    match evidence {
        Some(_) => undo::save(storage, superblock.uuid, start.seq, superblock.open_epoch)?,
        // What was there may be written over.
        None => undo::forget(storage)?,
    }
    superblock.generation += 1;
    superblock.is_clean = true;
    superblock.start = start;
    superblock.image = Some(written.image);
    superblock.known = Some(KnownBatch {
        seq: start.seq - 1,
        crc: 0,
    });
    // While one copy is not intact, the other is the only one.
    if let Ok((in_force, _)) = read_superblock(storage) {
        mend_copies(storage, &in_force)?;
    }
    SUPERBLOCK_AT
        .into_iter()
        .try_for_each(|at| write_copy(storage, &superblock, at))
}

/// Puts `superblock` in the place of copies that are not intact.
pub(super) fn mend_copies(storage: &dyn Storage, superblock: &Superblock) -> Result<(), PoolError> {
    for (at, copy) in SUPERBLOCK_AT.into_iter().zip(superblock_copies(storage)?) {
        if copy.is_err() {
            write_copy(storage, superblock, at)?;
        }
    }
    Ok(())
}

fn write_copy(storage: &dyn Storage, superblock: &Superblock, at: u64) -> Result<(), PoolError> {
    let mut bytes = AlignedBuf::new(SUPERBLOCK_LEN);
    bytes.copy_from_slice(&superblock.encode());
    let written = storage.write_durable_at(&bytes, at);
    written.map_err(PoolError::storage("writing the superblock"))
}

fn freeze(loaded: &Loaded, seq: u64) -> Frozen {
    let disks = loaded.catalogue.iter().map(|item| {
        let map = item.volume.map.read();
        FrozenDisk {
            row: item.row.clone(),
            tree: map.tree.clone(),
            last_fork: map.last_fork,
            changed: map.changed,
        }
    });
    Frozen {
        seq,
        generation: Generation(loaded.replay.generation),
        next_disk: DiskId(loaded.replay.next_disk),
        disks: disks.collect(),
    }
}

/// Takes what is `named` out of what is free.
fn withhold(space: &Space, named: &Bitmap) {
    let mut from = 0;
    while let Some(start) = named.next(from) {
        let run = named.run_from(start, u32::MAX - start);
        from = run.end;
        drop(space.take_clean_in(run));
    }
}

/// Writes the image where there is room; where there is none, the pool grows.
fn write_image(
    storage: &dyn Storage,
    frozen: &Frozen,
    space: &Space,
    superblock: &mut Superblock,
) -> Result<Written, PoolError> {
    let uuid_low = uuid_low(&superblock.uuid);
    let mut more = GROWTH_MIN;
    loop {
        match image::write(frozen, uuid_low, superblock.cluster_size, space, storage) {
            Err(PoolError::NoSpace) => grow(storage, space, superblock, more)?,
            other => return other,
        }
        more = more.saturating_mul(2);
    }
}

fn grow(
    storage: &dyn Storage,
    space: &Space,
    superblock: &mut Superblock,
    more: u32,
) -> Result<(), PoolError> {
    let growing = || PoolError::storage("growing the pool for its metadata");
    let from = superblock.cluster_count;
    let to = from.checked_add(more).filter(|to| *to < u32::MAX);
    let to = to.ok_or(PoolError::NoSpace)?;
    let len = u64::from(to) * superblock.cluster_size.bytes();
    if storage.len().map_err(growing())? < len {
        match storage.set_len(len) {
            // A block device has the length it has.
            Err(e) if e.kind() == std::io::ErrorKind::Unsupported => {
                return Err(PoolError::invalid(
                    "no cluster is left for new metadata that no record, lost or not, names: copy \
                     the pool to a larger device, or to a file",
                ));
            }
            result => result.map_err(growing())?,
        }
    }
    superblock.cluster_count = to;
    space.add_clean(from..to);
    Ok(())
}
