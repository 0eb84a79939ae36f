//! Reading what a pool's store says: superblock, image, journal.

use super::catalogue::Catalogue;
use super::counts::Counts;
use super::error::PoolError;
use super::image::{self, Loader};
use super::image_read;
use super::journal::{GivenUp, Journal};
use super::map::Zeros;
use super::volume::Volume;
use crate::format::FormatError;
use crate::format::image::decode_token;
use crate::format::journal::Record;
use crate::format::superblock::{SUPERBLOCK_AT, SUPERBLOCK_LEN, Superblock};
use crate::format::units::{ClusterSize, DiskId, bytes_of};
use crate::storage::{AlignedBuf, Storage};
use crate::sync::Arc;
use std::ops::Range;

/// Records whose entries are fetched together: few enough to stay near until they are replaced.
const RECORDS_FETCHED: usize = 512;

/// What replay carries along.
#[derive(Debug)]
pub struct Replay {
    /// The pool's generation so far.
    pub generation: u32,
    /// The next disk id so far.
    pub next_disk: u32,
    /// Takes no counts of copied nodes: the real ones are derived afterwards, and what replay finds
    /// may be of clusters that are not there.
    pub counts: Counts,
    /// Shared by all that is zeros.
    pub zeros: Zeros,
}

/// Both copies of the superblock, as far as they are intact and can be read.
///
/// # Errors
/// The store failed, and no copy is left.
pub fn superblock_copies(
    storage: &dyn Storage,
) -> Result<[Result<Superblock, FormatError>; 2], PoolError> {
    let reading = || PoolError::storage("reading the superblock");
    let len = storage.len().map_err(reading())?;
    let mut failed = None;
    let copies = SUPERBLOCK_AT.map(|at| {
        let mut bytes = AlignedBuf::new(SUPERBLOCK_LEN);
        if at + bytes_of(SUPERBLOCK_LEN) > len {
            return Superblock::decode(&[]);
        }
        match storage.read_at(&mut bytes, at) {
            Ok(()) => Superblock::decode(&bytes),
            Err(e) => {
                failed = Some(e);
                Superblock::decode(&[])
            }
        }
    });
    match failed {
        Some(e) if copies.iter().all(Result::is_err) => Err(reading()(e)),
        Some(_) | None => Ok(copies),
    }
}

/// The newest intact superblock, and whether the other copy needs rewriting.
///
/// # Errors
/// Neither copy is intact; the first one's fault is told.
pub fn read_superblock(storage: &dyn Storage) -> Result<(Superblock, bool), PoolError> {
    match superblock_copies(storage)? {
        [Ok(a), Ok(b)] => {
            let differ = a.generation != b.generation;
            Ok((if a.generation >= b.generation { a } else { b }, differ))
        }
        [Ok(one), Err(_)] | [Err(_), Ok(one)] => Ok((one, true)),
        [Err(e), Err(_)] => Err(e.into()),
    }
}

type ImageClusters = Vec<Range<u32>>;

/// `Err` if the store is shorter than the pool.
pub(super) fn check_len(storage: &dyn Storage, superblock: &Superblock) -> Result<(), PoolError> {
    let len = storage
        .len()
        .map_err(PoolError::storage("opening the pool"))?;
    if len < superblock.pool_len() {
        return Err(PoolError::damaged(format!(
            "the pool file has {len} bytes, but the pool {}: it was cut short",
            superblock.pool_len()
        )));
    }
    Ok(())
}

/// What a store says, before anything is derived from it.
#[derive(Debug)]
pub(super) struct Loaded {
    pub superblock: Superblock,
    pub catalogue: Catalogue,
    pub journal: Journal,
    pub replay: Replay,
    pub image_clusters: ImageClusters,
    /// What of the image is damaged, and made up for.
    pub image_faults: Vec<String>,
    /// Where the journal cannot be read as it should.
    pub journal_faults: Vec<JournalFault>,
}

/// A place where the journal breaks off, although it seems to go on.
#[derive(Debug)]
pub(super) struct JournalFault {
    pub error: PoolError,
    /// What whole batches from there on say, which were not replayed. `None` if the image covers
    /// what cannot be read, and nothing is known to be missing.
    pub lost: Option<GivenUp>,
}

/// Loads the image and replays the journal, as far as it can be.
///
/// # Errors
/// The store failed, or the image is damaged.
pub(super) fn load(storage: &dyn Storage, superblock: Superblock) -> Result<Loaded, PoolError> {
    match load_before(storage, superblock.clone(), u64::MAX)? {
        Ok(loaded) => Ok(loaded),
        // Some of the records of that batch have been replayed: once more, without them.
        Err(Unfit { seq, error }) => {
            let again = load_before(storage, superblock, seq)?;
            let mut loaded = again.map_err(|again| again.error)?;
            let lost = Some(loaded.journal.intact_from(storage, seq)?);
            loaded.journal_faults.push(JournalFault { error, lost });
            Ok(loaded)
        }
    }
}

/// A whole batch with a record that does not fit what was there.
struct Unfit {
    seq: u64,
    error: PoolError,
}

/// As [`load`], without the batches from `end` on.
fn load_before(
    storage: &dyn Storage,
    superblock: Superblock,
    end: u64,
) -> Result<Result<Loaded, Unfit>, PoolError> {
    let (mut catalogue, mut replay, image_clusters, image_faults) =
        load_frozen(storage, &superblock)?;
    let mut journal = Journal::new(&superblock);
    let mut journal_faults = Vec::new();
    while journal.last_seq() + 1 < end {
        let error = match journal.replay_next(storage) {
            Ok(Some(records)) => {
                let size = superblock.cluster_size;
                if let Err(error) = replay_all(records, &mut catalogue, &mut replay, size) {
                    let seq = journal.last_seq();
                    return Ok(Err(Unfit { seq, error }));
                }
                continue;
            }
            Ok(None) if journal.last_seq() < journal.image_seq() => PoolError::damaged(format!(
                "the journal ends with batch {}, but the checkpoint image has batch {}",
                journal.last_seq(),
                journal.image_seq()
            )),
            Ok(None) => break,
            Err(e @ PoolError::Storage { .. }) => return Err(e),
            Err(error) => error,
        };
        let is_covered = journal.last_seq() < journal.image_seq();
        let goes_on = is_covered && journal.skip_to_image(storage)?;
        let mut lost = None;
        if !goes_on {
            let next = (journal.last_seq() + 1).max(journal.image_seq().saturating_add(1));
            let given_up = journal.intact_from(storage, next)?;
            let is_all = is_covered && journal.known_seq() < next && given_up.records.is_empty();
            lost = (!is_all).then_some(given_up);
        }
        journal_faults.push(JournalFault { error, lost });
        if !goes_on {
            break;
        }
    }
    Ok(Ok(Loaded {
        superblock,
        catalogue,
        journal,
        replay,
        image_clusters,
        image_faults,
        journal_faults,
    }))
}

/// What the image says.
fn load_frozen(
    storage: &dyn Storage,
    superblock: &Superblock,
) -> Result<(Catalogue, Replay, ImageClusters, Vec<String>), PoolError> {
    let size = superblock.cluster_size;
    let image = load_image(storage, superblock)?;
    let frozen = image.frozen;
    let mut replay = Replay {
        generation: frozen.generation.0,
        next_disk: frozen.next_disk.0,
        counts: Counts::none(),
        zeros: Zeros::new(),
    };
    let mut catalogue = Catalogue::default();
    for disk in frozen.disks {
        let (row, tree) = (disk.row, disk.tree);
        let volume = Volume::new(&row, tree, disk.last_fork, disk.changed);
        catalogue.check_row(&row, size)?;
        if catalogue.get(row.id).is_some() {
            let what = format!("checkpoint image: disk {} twice", row.id);
            return Err(PoolError::damaged(what));
        }
        replay.next_disk = replay.next_disk.max(row.id.0.saturating_add(1));
        catalogue.put(row, &Arc::new(volume));
    }
    Ok((catalogue, replay, image.clusters, image.faults))
}

fn replay_all(
    records: Vec<Record>,
    catalogue: &mut Catalogue,
    replay: &mut Replay,
    size: ClusterSize,
) -> Result<(), PoolError> {
    let mut left = records.into_iter();
    while !left.as_slice().is_empty() {
        let next = &left.as_slice()[..left.len().min(RECORDS_FETCHED)];
        catalogue.fetch(next);
        for record in left.by_ref().take(RECORDS_FETCHED) {
            catalogue.replay(record, replay, size)?;
        }
    }
    Ok(())
}

/// An image, and where it is.
struct LoadedImage {
    frozen: image::Frozen,
    clusters: ImageClusters,
    /// What of it is damaged, and made up for.
    faults: Vec<String>,
}

/// Loads the image in force, and lists its clusters.
fn load_image(storage: &dyn Storage, superblock: &Superblock) -> Result<LoadedImage, PoolError> {
    let Some(mut extents) = image_read::extents(storage, superblock)? else {
        let generation = crate::format::units::Generation(1);
        let (next_disk, disks) = (DiskId(1), Vec::new());
        let frozen = image::Frozen {
            seq: 0,
            generation,
            next_disk,
            disks,
        };
        return Ok(LoadedImage {
            frozen,
            clusters: Vec::new(),
            faults: Vec::new(),
        });
    };
    let mut loader = Loader::default();
    extents.each_block(storage, &mut |block| {
        let mut tokens = block.map_err(|(damage, _)| damage)?;
        while let Some(token) = decode_token(&mut tokens)? {
            loader.feed(token)?;
        }
        Ok(())
    })?;
    Ok(LoadedImage {
        frozen: loader.finish(extents.seq())?,
        clusters: extents.clusters,
        faults: extents.faults,
    })
}
