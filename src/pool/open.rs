//! Creating, opening and closing a pool: superblock, image, replay, and what is derived from them.

use super::account::Quota;
use super::derive::derive;
use super::error::PoolError;
use super::gate::{ClosedGates, Epochs};
use super::lead::Commits;
use super::load::{Loaded, check_len, load, read_superblock};
use super::space::Space;
use super::{Ended, Pool};
use crate::format::superblock::{
    JOURNAL_AT, JOURNAL_HALF_MAX, JOURNAL_HALF_MIN, JournalStart, OPEN_EPOCH_MAX, OWNER_NOTE_AT,
    SUPERBLOCK_AT, SUPERBLOCK_LEN, Superblock,
};
use crate::format::units::{BLOCK, ClusterSize, bytes_of, len_of};
use crate::storage::{AlignedBuf, Storage};
use crate::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};
use crate::sync::{Arc, Condvar, Mutex, OnceLock, RwLock};
use std::collections::VecDeque;

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
        known: None,
    };
    let storing = || PoolError::storage("creating the pool");
    fit(storage, len)?;
    let zeros = AlignedBuf::new(len_of(JOURNAL_AT));
    storage.write_at(&zeros, 0).map_err(storing())?;
    zero_journal(storage, &superblock).map_err(storing())?;
    let mut bytes = AlignedBuf::new(SUPERBLOCK_LEN);
    bytes.copy_from_slice(&superblock.encode());
    for at in SUPERBLOCK_AT {
        storage.write_durable_at(&bytes, at).map_err(storing())?;
    }
    Ok(())
}

/// Fills the journal with zeros, durably: its blocks exist from then on, so that writing them never
/// allocates on the host.
pub(super) fn zero_journal(storage: &dyn Storage, superblock: &Superblock) -> std::io::Result<()> {
    let zeros = AlignedBuf::new(1 << 20);
    for half in superblock.journal_half {
        let end = half + superblock.journal_half_len;
        let mut at = half;
        while at < end {
            let part = len_of((end - at).min(bytes_of(zeros.len())));
            storage.write_at(&zeros[..part], at)?;
            at += bytes_of(part);
        }
    }
    storage.flush()
}

/// Gives the store `len` bytes. A block device has the size it has; what is beyond the last whole
/// cluster stays unused.
fn fit(storage: &dyn Storage, len: u64) -> Result<(), PoolError> {
    let storing = || PoolError::storage("creating the pool");
    match storage.set_len(len) {
        Err(e) if e.kind() == std::io::ErrorKind::Unsupported => {
            let have = storage.len().map_err(storing())?;
            if have < len {
                return Err(PoolError::invalid(format!(
                    "a pool of {len} bytes does not fit a device of {have}"
                )));
            }
            Ok(())
        }
        other => other.map_err(storing()),
    }
}

/// The note in the block at [`OWNER_NOTE_AT`], for those who may not open the pool as a store
/// because it is locked: it is them the note is for.
#[must_use]
pub fn parse_owner_note(block: &[u8]) -> String {
    let text = block.split(|byte| *byte == 0).next().unwrap_or_default();
    let text = String::from_utf8_lossy(&text[..text.len().min(OWNER_NOTE_LEN_MAX)]);
    text.chars().filter(|c| !c.is_control()).collect()
}

/// The number of the opening that follows.
fn next_epoch(superblock: &Superblock) -> Result<u32, PoolError> {
    let next = superblock.open_epoch.checked_add(1);
    next.filter(|next| *next <= OPEN_EPOCH_MAX).ok_or_else(|| {
        PoolError::invalid("this pool has been opened 2^31 times; copy its disks to a new one")
    })
}

impl Pool {
    /// Opens a pool: image, replay, counts. Exclusive use of `storage` is the caller's to ensure
    /// ([`crate::storage::FileStorage`] locks its file).
    ///
    /// # Errors
    /// Not a pool, a pool of a newer release, a damaged pool, or the store failed. Nothing was
    /// changed then.
    pub fn open(storage: Arc<dyn Storage>, options: &OpenOptions) -> Result<Arc<Pool>, PoolError> {
        let (superblock, _) = read_superblock(&*storage)?;
        if !options.is_read_only {
            superblock.check_writable()?;
            next_epoch(&superblock)?;
        }
        check_len(&*storage, &superblock)?;
        let mut loaded = load(&*storage, superblock)?;
        if let Some(fault) = loaded.journal_faults.pop() {
            return Err(fault.error);
        }
        let mut space = Space::new();
        if let Some(fault) = derive(&loaded, &mut space)?.first() {
            return Err(PoolError::damaged(fault.to_string()));
        }
        if !options.is_read_only {
            loaded.journal.settle_last(&*storage)?;
        }
        let pool = Self::assemble(storage, loaded, space, options);
        if !options.is_read_only {
            pool.begin_epoch(&options.owner)?;
        }
        Ok(Arc::new(pool))
    }

    /// The pool from its parts.
    pub(super) fn assemble(
        storage: Arc<dyn Storage>,
        loaded: Loaded,
        space: Space,
        options: &OpenOptions,
    ) -> Pool {
        let Loaded {
            superblock,
            catalogue,
            mut journal,
            replay,
            image_clusters,
            ..
        } = loaded;
        // Of no use where nothing is written; else `begin_epoch` refuses what has no next one.
        journal.set_open_epoch(superblock.open_epoch.saturating_add(1));
        let pool = Pool {
            storage,
            cluster_size: superblock.cluster_size,
            is_read_only: options.is_read_only,
            superblock: Mutex::new(superblock),
            space,
            epochs: Epochs::default(),
            catalogue: RwLock::new(catalogue),
            generation: AtomicU32::new(replay.generation),
            next_disk: AtomicU32::new(replay.next_disk),
            commits: Commits::new(journal),
            listed: Mutex::default(),
            wants_commit: AtomicBool::new(false),
            unflushed: AtomicBool::new(false),
            ended: OnceLock::new(),
            zero_leaf: replay.zeros.leaf,
            quarantine: Mutex::new(VecDeque::new()),
            slabs_seen: AtomicU64::new(0),
            reaping: Mutex::default(),
            image_clusters: Mutex::new(image_clusters),
            returning: options.returning,
            has_background: AtomicBool::new(false),
            is_closing: Mutex::new(false),
            work: Condvar::new(),
        };
        pool.restore_quotas();
        pool.keep_image_reserve();
        pool
    }

    /// Batches of this opening are told from those of earlier ones (R9).
    ///
    /// R11: what was just read may be in a cache only, if whoever wrote it was killed. From
    /// here on it counts as durable: batches follow the last one replayed, clusters it freed are
    /// used again, and a flush acknowledges what was written before.
    ///
    /// # Errors
    /// It has been opened 2^32 times, or the store failed. The former changes nothing.
    pub(super) fn begin_epoch(&self, owner: &str) -> Result<(), PoolError> {
        let open_epoch = next_epoch(&self.superblock.lock())?;
        let flushed = self.storage.flush();
        flushed.map_err(|e| self.poison("flushing what was written before", e))?;
        self.write_owner_note(owner)?;
        let mut superblock = self.superblock();
        superblock.open_epoch = open_epoch;
        superblock.is_clean = false;
        superblock.known = self.lead_for(|journal| Ok(journal.last_batch()))?;
        self.write_superblock(superblock)
    }

    /// Says who has the pool open.
    pub(super) fn write_owner_note(&self, owner: &str) -> Result<(), PoolError> {
        let mut note = AlignedBuf::new(4096);
        let len = owner.len().min(OWNER_NOTE_LEN_MAX);
        note[..len].copy_from_slice(&owner.as_bytes()[..len]);
        let written = self.storage.write_at(&note, OWNER_NOTE_AT);
        written.map_err(PoolError::storage("writing the owner note"))
    }

    /// Makes everything durable, releases what can be released, gives freed space back to the host
    /// unless told never to, and marks the pool clean. Requests in flight complete first. Nothing
    /// is written afterwards through any handle that is left over, of the pool or of a disk: the
    /// store may have another owner. Once closed, it stays so.
    ///
    /// # Errors
    /// As [`Pool::flush`]; the pool is not closed then.
    pub fn close(&self) -> Result<(), PoolError> {
        self.stop_background();
        if self.is_read_only || matches!(self.ended.get(), Some(Ended::Closed)) {
            return Ok(());
        }
        self.flush()?;
        self.take_back_slabs();
        while self.reap(usize::MAX) {}
        if self.returning != Return::Never {
            self.punch_written(u32::MAX)?;
        }
        self.write_owner_note("")?;
        self.mark_written();
        self.flush()?;
        self.lead_for(|journal| {
            let volumes: Vec<_> = self.items().into_iter().map(|item| item.volume).collect();
            let _gates = ClosedGates::close(&volumes);
            let mut superblock = self.superblock();
            superblock.is_clean = true;
            superblock.known = journal.last_batch();
            self.write_superblock(superblock)?;
            self.ended.get_or_init(|| Ended::Closed);
            Ok(())
        })
    }

    /// Limits and reserves from the catalogue; what counts for them is counted.
    fn restore_quotas(&self) {
        let size = self.cluster_size;
        for item in self.items() {
            if item.row.limit.is_some() || item.row.reserve.is_some() {
                let mut map = item.volume.map.write();
                let quota = Quota::of(&item.row, &map.tree, map.last_fork, size);
                map.restore_quota(&quota, &self.space);
            }
        }
    }
}
