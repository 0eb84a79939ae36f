//! Creating, opening and closing a pool: superblock, image, replay, and what is derived from them.

use super::catalogue::Catalogue;
use super::commit::Commits;
use super::counts::Counts;
use super::error::PoolError;
use super::gate::Epochs;
use super::image::Loader;
use super::journal::{Journal, uuid_low};
use super::map::Leaf;
use super::space::Space;
use super::volume::Volume;
use super::walk::{Seen, walk_all};
use super::{Pool, image};
use crate::format::image::decode_token;
use crate::format::image_block::{ImageStamp, unseal_block, unseal_head};
use crate::format::journal::Entry;
use crate::format::superblock::{
    JOURNAL_AT, JOURNAL_HALF_MAX, JOURNAL_HALF_MIN, JournalStart, OWNER_NOTE_AT, SUPERBLOCK_AT,
    SUPERBLOCK_LEN, Superblock,
};
use crate::format::units::{BLOCK, Cluster, ClusterSize, DiskId, bytes_of, index, len_of};
use crate::storage::{AlignedBuf, Storage};
use crate::sync::atomic::{AtomicBool, AtomicU32};
use crate::sync::{Arc, Condvar, Mutex, OnceLock, RwLock};
use std::collections::VecDeque;
use std::ops::Range;

/// Smallest pool, bytes.
pub const POOL_LEN_MIN: u64 = 16 << 20;
/// Longest owner note, bytes.
pub const OWNER_NOTE_LEN_MAX: usize = 512;

/// How a pool is made.
#[derive(Debug, Clone, Copy)]
pub struct CreateOptions {
    /// Bytes it may grow to; at least [`POOL_LEN_MIN`].
    pub size: u64,
    /// Cluster size.
    pub cluster_size: ClusterSize,
    /// Its identity: random.
    pub uuid: [u8; 16],
}

impl CreateOptions {
    /// A pool of `size` bytes with the usual cluster size and a random identity.
    #[must_use]
    pub fn new(size: u64) -> Self {
        let uuid = *uuid::Uuid::new_v4().as_bytes();
        Self {
            size,
            cluster_size: ClusterSize::DEFAULT,
            uuid,
        }
    }
}

/// When freed space goes back to the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Return {
    /// When the pool is idle or closed, and above a high-water mark.
    #[default]
    Idle,
    /// At once.
    Eager,
    /// Only when asked.
    Never,
}

/// How a pool is opened.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// Nothing is written, not even the superblock.
    pub is_read_only: bool,
    /// When freed space goes back to the host.
    pub returning: Return,
    /// Who opens it, for others to be told: a line of text.
    pub owner: String,
}

/// What replay carries along.
#[derive(Debug)]
pub struct Replay {
    /// The pool's generation so far.
    pub generation: u32,
    /// The next disk id so far.
    pub next_disk: u32,
    /// Takes the counts of copied nodes; the real ones are derived afterwards.
    pub counts: Counts,
    /// Shared by all whole leaves of zeros.
    pub zero_leaf: Arc<Leaf>,
}

/// Makes an empty pool in `storage`, which is set to the pool's size (a sparse file grows as it is
/// used). Everything in it is lost.
///
/// # Errors
/// A size out of range, or the store failed.
pub fn create(storage: &dyn Storage, options: &CreateOptions) -> Result<(), PoolError> {
    let size = options.cluster_size;
    let len = options.size / size.bytes() * size.bytes();
    if len < POOL_LEN_MIN {
        return Err(PoolError::invalid(format!(
            "a pool has at least {} MiB, not {} bytes",
            POOL_LEN_MIN >> 20,
            options.size
        )));
    }
    let cluster_count = size
        .count(len)
        .filter(|count| *count < u32::MAX)
        .ok_or_else(|| {
            PoolError::invalid(format!(
                "a pool of {len} bytes needs larger clusters: see --cluster"
            ))
        })?;
    let half = (len / 512).clamp(JOURNAL_HALF_MIN, JOURNAL_HALF_MAX) / BLOCK * BLOCK;
    let superblock = Superblock {
        uuid: options.uuid,
        compat: 0,
        ro_compat: 0,
        generation: 1,
        open_epoch: 0,
        is_clean: true,
        cluster_size: size,
        cluster_count,
        journal_half: [JOURNAL_AT, JOURNAL_AT + half],
        journal_half_len: half,
        start: JournalStart {
            half: 0,
            seq: 1,
            prev_crc: 0,
        },
        image: None,
    };
    let storing = || PoolError::storage("creating the pool");
    storage.set_len(len).map_err(storing())?;
    // The journal's blocks exist from the start: writing them never allocates on the host.
    let zeros = AlignedBuf::new(1 << 20);
    let mut at = 0;
    while at < superblock.metadata_end() {
        let part = len_of((superblock.metadata_end() - at).min(bytes_of(zeros.len())));
        storage.write_at(&zeros[..part], at).map_err(storing())?;
        at += bytes_of(part);
    }
    storage.flush().map_err(storing())?;
    let mut bytes = AlignedBuf::new(SUPERBLOCK_LEN);
    bytes.copy_from_slice(&superblock.encode());
    for at in SUPERBLOCK_AT {
        storage.write_durable_at(&bytes, at).map_err(storing())?;
    }
    Ok(())
}

/// The newest intact superblock, and whether the other copy needs rewriting.
///
/// # Errors
/// Neither copy is intact; the first one's fault is told.
pub fn read_superblock(storage: &dyn Storage) -> Result<(Superblock, bool), PoolError> {
    let len = storage
        .len()
        .map_err(PoolError::storage("reading the superblock"))?;
    let mut copies = Vec::new();
    for at in SUPERBLOCK_AT {
        let mut bytes = AlignedBuf::new(SUPERBLOCK_LEN);
        if at + bytes_of(SUPERBLOCK_LEN) > len {
            copies.push(Superblock::decode(&[]));
            continue;
        }
        storage
            .read_at(&mut bytes, at)
            .map_err(PoolError::storage("reading the superblock"))?;
        copies.push(Superblock::decode(&bytes));
    }
    let second = copies.pop().expect("two copies were read");
    let first = copies.pop().expect("two copies were read");
    match (first, second) {
        (Ok(a), Ok(b)) => {
            let differ = a.generation != b.generation;
            Ok((if a.generation >= b.generation { a } else { b }, differ))
        }
        (Ok(one), Err(_)) | (Err(_), Ok(one)) => Ok((one, true)),
        (Err(e), Err(_)) => Err(e.into()),
    }
}

/// The note of who has the pool open, for people; empty if there is none.
#[must_use]
pub fn read_owner_note(storage: &dyn Storage) -> String {
    let mut bytes = AlignedBuf::new(4096);
    if storage.read_at(&mut bytes, OWNER_NOTE_AT).is_err() {
        return String::new();
    }
    let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    let text = String::from_utf8_lossy(&text[..text.len().min(OWNER_NOTE_LEN_MAX)]);
    text.chars().filter(|c| !c.is_control()).collect()
}

impl Pool {
    /// Opens a pool: image, replay, counts. Exclusive use of `storage` is the caller's to ensure
    /// ([`crate::storage::file::FileStorage`] locks its file).
    ///
    /// # Errors
    /// Not a pool, a pool of a newer release, a damaged pool, or the store failed. Nothing was
    /// changed then.
    pub fn open(storage: Arc<dyn Storage>, options: &OpenOptions) -> Result<Arc<Pool>, PoolError> {
        let (superblock, _) = read_superblock(&*storage)?;
        if !options.is_read_only {
            superblock.check_writable()?;
        }
        let len = storage
            .len()
            .map_err(PoolError::storage("opening the pool"))?;
        if len < superblock.pool_len() {
            return Err(PoolError::damaged(format!(
                "the pool file has {len} bytes, but the pool {}: it was cut short",
                superblock.pool_len()
            )));
        }
        let size = superblock.cluster_size;
        let (frozen, image_clusters) = load_image(&*storage, &superblock)?;
        let mut replay = Replay {
            generation: frozen.generation.0,
            next_disk: frozen.next_disk.0,
            counts: Counts::new(),
            zero_leaf: Arc::new(zero_leaf()),
        };
        let mut catalogue = Catalogue::default();
        for disk in frozen.disks {
            let (row, tree) = (disk.row, disk.tree);
            let volume = Volume::new(&row, tree, disk.last_fork, disk.changed, size);
            catalogue.put(row, &Arc::new(volume));
        }
        let mut journal = Journal::new(&superblock);
        while let Some(records) = journal.replay_next(&*storage)? {
            for record in records {
                catalogue.replay(record, &mut replay, size)?;
            }
        }
        let space = Space::new();
        derive(&catalogue, &superblock, &space, &image_clusters)?;
        journal.set_open_epoch(superblock.open_epoch + 1);
        let pool = Pool {
            storage,
            cluster_size: size,
            is_read_only: options.is_read_only,
            superblock: Mutex::new(superblock),
            space,
            epochs: Epochs::default(),
            catalogue: RwLock::new(catalogue),
            generation: AtomicU32::new(replay.generation),
            next_disk: AtomicU32::new(replay.next_disk),
            commits: Commits::new(journal),
            listed: Mutex::default(),
            unflushed: AtomicBool::new(false),
            poison: OnceLock::new(),
            zero_leaf: replay.zero_leaf,
            quarantine: Mutex::new(VecDeque::new()),
            reaping: Mutex::default(),
            image_clusters: Mutex::new(image_clusters),
            returning: options.returning,
            background: OnceLock::new(),
            is_closing: Mutex::new(false),
            work: Condvar::new(),
        };
        pool.restore_quotas();
        pool.keep_image_reserve();
        if !options.is_read_only {
            pool.begin_epoch(&options.owner)?;
        }
        Ok(Arc::new(pool))
    }

    /// Batches of this opening are told from those of earlier ones (R9).
    fn begin_epoch(&self, owner: &str) -> Result<(), PoolError> {
        self.write_owner_note(owner)?;
        let mut superblock = self.superblock();
        superblock.open_epoch += 1;
        superblock.is_clean = false;
        self.write_superblock(superblock)
    }

    fn write_owner_note(&self, owner: &str) -> Result<(), PoolError> {
        let mut note = AlignedBuf::new(4096);
        let len = owner.len().min(OWNER_NOTE_LEN_MAX);
        note[..len].copy_from_slice(&owner.as_bytes()[..len]);
        let written = self.storage.write_at(&note, OWNER_NOTE_AT);
        written.map_err(PoolError::storage("writing the owner note"))
    }

    /// Makes everything durable, releases what can be released, gives freed space back to the host
    /// unless told never to, and marks the pool clean. The pool is of no more use afterwards.
    ///
    /// # Errors
    /// As [`Pool::flush`].
    pub fn close(&self) -> Result<(), PoolError> {
        self.stop_background();
        if self.is_read_only {
            return Ok(());
        }
        self.flush()?;
        for item in self.items() {
            item.volume.map.write().drop_slab(&self.space);
        }
        while self.reap(usize::MAX) {}
        if self.returning != Return::Never {
            self.punch_written(u32::MAX)?;
        }
        self.write_owner_note("")?;
        self.storage
            .flush()
            .map_err(|e| self.poison("flushing at close", e))?;
        let mut superblock = self.superblock();
        superblock.is_clean = true;
        self.write_superblock(superblock)
    }

    /// Limits and reserves from the catalogue; what counts for them is counted.
    fn restore_quotas(&self) {
        let size = self.cluster_size;
        for item in self.items() {
            if item.row.limit.is_some() || item.row.reserve.is_some() {
                item.volume
                    .map
                    .write()
                    .apply_quota(&item.row, size, &self.space);
            }
        }
    }
}

/// All sub-clusters of all entries zero.
#[must_use]
pub fn zero_leaf() -> Leaf {
    let zero = Entry {
        zero: u16::MAX,
        ..Entry::default()
    };
    Leaf {
        entries: [zero; crate::format::image::LEAF_ENTRIES],
        dirty: 0,
    }
}

type ImageClusters = Vec<Range<u32>>;

/// Loads the image in force, and lists its clusters.
fn load_image(
    storage: &dyn Storage,
    superblock: &Superblock,
) -> Result<(image::Frozen, ImageClusters), PoolError> {
    let Some(image) = superblock.image else {
        let generation = crate::format::units::Generation(1);
        let (next_disk, disks) = (DiskId(1), Vec::new());
        return Ok((
            image::Frozen {
                seq: 0,
                generation,
                next_disk,
                disks,
            },
            Vec::new(),
        ));
    };
    let size = superblock.cluster_size;
    let stamp = ImageStamp {
        uuid_low: uuid_low(&superblock.uuid),
        seq: image.seq,
    };
    let mut block = AlignedBuf::new(size.len());
    let read = |cluster: u32, block: &mut AlignedBuf| {
        let read = storage.read_at(block, size.offset(Cluster(cluster)));
        read.map_err(PoolError::storage("reading the checkpoint image"))
    };
    let mut extents = Vec::new();
    let mut clusters = Vec::new();
    let mut head = image.head;
    while head != 0 {
        if clusters.len() > index(superblock.cluster_count) {
            return Err(PoolError::damaged(
                "checkpoint image: its extent lists go round in a ring",
            ));
        }
        clusters.push(head..head + 1);
        read(head, &mut block)?;
        let (found, next) = unseal_head(stamp, superblock.cluster_count, &block)?;
        extents.extend(found);
        head = next;
    }
    let blocks = image.len / size.bytes();
    let mut loader = Loader::default();
    let mut number = 0_u32;
    for extent in &extents {
        clusters.push(extent.start..extent.start + extent.count);
        for cluster in extent.start..extent.start + extent.count {
            if u64::from(number) == blocks {
                break;
            }
            read(cluster, &mut block)?;
            let mut tokens = unseal_block(stamp, number, &block)?;
            while let Some(token) = decode_token(&mut tokens)? {
                loader.feed(token)?;
            }
            number += 1;
        }
    }
    Ok((loader.finish(image.seq)?, clusters))
}

/// Counts the references, checks every entry and I1, and declares the rest free.
fn derive(
    catalogue: &Catalogue,
    superblock: &Superblock,
    space: &Space,
    image_clusters: &ImageClusters,
) -> Result<(), PoolError> {
    let size = superblock.cluster_size;
    let count = superblock.cluster_count;
    let first = size.count(superblock.metadata_end()).unwrap_or(u32::MAX);
    let mut used = vec![0_u64; index(count)];
    for range in image_clusters {
        for cluster in range.clone() {
            let place = used.get_mut(index(cluster)).filter(|_| cluster >= first);
            match place {
                Some(place) if *place == 0 => *place = u64::MAX,
                Some(_) | None => {
                    let what = format!("checkpoint image: cluster {cluster} cannot belong to it");
                    return Err(PoolError::damaged(what));
                }
            }
        }
    }
    let mut seen = Seen::default();
    let mut fault = None;
    for item in catalogue.iter() {
        let family = u64::from(item.row.family.0);
        let map = item.volume.map.read();
        seen.walk(&map.tree, &mut |leaf, _, node| {
            for (lcn, entry) in (leaf * 64..).zip(&node.entries) {
                // Packed so that it is never 0: disk ids begin at 1.
                let owner = (family << 32) | u64::from(lcn);
                if let Some(what) = check_entry(entry, first, count, owner, &mut used, space) {
                    fault.get_or_insert_with(|| {
                        format!("disk `{}`, cluster {lcn}: {what}", item.row.name)
                    });
                }
            }
        });
    }
    if let Some(what) = fault {
        return Err(PoolError::damaged(what));
    }
    let mut free_from = first;
    for (cluster, used) in (0..count).zip(&used).skip(index(first)) {
        if *used != 0 {
            space.add_clean(free_from..cluster);
            free_from = cluster + 1;
        }
    }
    space.add_clean(free_from..count);
    Ok(())
}

/// Counts what one entry refers to. I1: one (family, lcn) for each cluster.
fn check_entry(
    entry: &Entry,
    first: u32,
    count: u32,
    owner: u64,
    used: &mut [u64],
    space: &Space,
) -> Option<String> {
    if let Some(fault) = entry.fault(first, count) {
        return Some(fault.to_owned());
    }
    for cluster in entry.clusters().into_iter().filter(|cluster| *cluster != 0) {
        let place = &mut used[index(cluster)];
        if *place != 0 && *place != owner {
            return Some(format!(
                "cluster {cluster} of the pool is used elsewhere too"
            ));
        }
        *place = owner;
        space.counts.retain(cluster);
    }
    None
}

impl super::volume::Map {
    /// Sets limit and reserve from the row, and counts what was allocated since the birth.
    pub fn apply_quota(
        &mut self,
        row: &crate::format::catalogue::Row,
        size: ClusterSize,
        space: &Space,
    ) {
        let (mut subs, mut clusters) = (0_u64, 0_u32);
        let birth = self.birth.0;
        walk_all(&self.tree, &mut |_, _, leaf| {
            for entry in leaf.entries.iter().filter(|entry| entry.birth > birth) {
                subs += u64::from(entry.alloc.count_ones());
                clusters += u32::from(entry.own != 0);
            }
        });
        self.set_limit(row.limit, size);
        self.used_subs = subs;
        let wanted = row.reserve.and_then(|bytes| size.count(bytes)).unwrap_or(0);
        let left = wanted.saturating_sub(clusters);
        space.change_disk_reserve(i64::from(left) - i64::from(self.reserve_left));
        self.reserve_left = left;
    }
}
