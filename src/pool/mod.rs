//! The elastic pool: clusters, maps, and the one durable truth about them. It knows which cluster
//! of the pool holds which cluster of which disk, and moves no guest data: that is `cowdisk`'s.
//!
//! ```text
//!  catalogue: name -> disk        journal --replay--> maps
//!      |                             ^                  |
//!      v                       commit, one batch        | frozen in O(1)
//!  volume: gate + map  --changes-----'                  v
//!      |                                        checkpoint image (free clusters)
//!      '--drops--> quarantine (durable, drained) --> counts --> free --> punched
//! ```
//!
//! # Invariants
//! - **I1** A cluster is referred to at exactly one (family, lcn). Checked at open.
//! - **I2** An `alloc` bit is set only after the data write of that sub-cluster completed, so a
//!   cluster that is used again never shows what it held before.
//! - **I3** `under` is nothing or a cluster with valid data for every sub-cluster in neither mask.
//!   Depth never exceeds two.
//! - **I4** A cluster is written in place only by the one live disk whose `birth` is after its last
//!   fork, or whose reference is the only one, drops on their way included. Checked at open.
//! - **I5** The free list holds only clusters with count 0, no I/O in flight, a durable drop and,
//!   if it was to be punched, punched.
//! - **I6** The image and any prefix of the journal's batches give a legal state.
//!
//! # Ordering rules
//! | # | Rule | Where |
//! |---|---|---|
//! | R1 | `alloc` is set at data completion; records are built when the batch closes | `Map::collect` |
//! | R2 | batch closed, data flushed, journal written, acknowledged | `commit` |
//! | R3 | a freed cluster is used again or punched only after the record that frees it is durable | `retire` after the write |
//! | R4 | a punch completes before its cluster is free | `reclaim` |
//! | R5 | a dropped reference counts until the drop is durable | `Counts` change in `reap` only |
//! | R6 | a freed cluster waits for every I/O begun before the drop | `Epochs` |
//! | R7 | fork, rollback, commit and delete drain the disk first | `transact` |
//! | R8 | no data checksum replaces a flush | there are none |
//! | R9 | one batch outstanding; batches carry the opening and the checksum before | `Journal` |
//! | R10 | after a failed flush or journal write: never retried, the pool freezes | `poison` |
//! | R11 | what an opening has read is durable before anything relies on it | `settle_last`, `begin_epoch` |
//!
//! Lock order: leadership (the journal), catalogue, one map, space. No lock is held over I/O.

pub mod account;
pub mod backlog;
pub mod bitmap;
pub mod busy;
pub mod by_cluster;
pub mod catalogue;
pub mod check;
mod checkpoint;
pub mod commit;
pub mod counts;
pub mod derive;
pub mod dump;
pub mod entry;
pub mod error;
mod evidence;
pub mod gate;
mod history;
pub mod image;
mod image_read;
pub mod journal;
pub mod kept;
mod kinship;
mod lead;
pub mod load;
pub mod lost;
pub mod map;
pub mod open;
pub mod reclaim;
pub mod repair;
pub mod resize;
pub mod restore;
mod rewrite;
mod search;
pub mod slab;
pub mod space;
pub mod transaction;
pub mod undo;
pub mod volume;
pub mod walk;
pub mod woken;

pub use error::{PoolError, PoolErrorKind};
pub use open::{CreateOptions, OpenOptions, Return};

use crate::format::superblock::{SUPERBLOCK_AT, Superblock};
use crate::format::units::{ClusterSize, Generation};
use crate::storage::{AlignedBuf, Storage};
use crate::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use crate::sync::{Arc, Condvar, Mutex, OnceLock, RwLock, Shared};
use backlog::Shelf;
use catalogue::{Catalogue, Item};
use gate::Epochs;
use image::{Frozen, Written};
use journal::Journal;
use lead::Commits;
use map::{Dropped, Leaf};
use space::Space;
use std::collections::VecDeque;
use std::ops::Range;
use volume::Volume;
use woken::Woken;

/// An open pool. Shared by all who use it; every method takes `&self`.
#[derive(Debug)]
pub struct Pool {
    storage: Arc<dyn Storage>,
    cluster_size: ClusterSize,
    is_read_only: bool,
    superblock: Mutex<Superblock>,
    /// Free clusters and reference counts.
    pub space: Space,
    /// Requests in flight, of all disks.
    pub epochs: Epochs,
    catalogue: RwLock<Catalogue>,
    generation: AtomicU32,
    next_disk: AtomicU32,
    commits: Commits,
    /// Volumes with changes that no round of commits has begun to write. Lock order: after maps.
    listed: Mutex<Vec<Arc<Volume>>>,
    /// So much has changed that it should be committed without being asked for.
    wants_commit: AtomicBool,
    /// Something was written since the last flush began.
    unflushed: AtomicBool,
    ended: OnceLock<Ended>,
    /// Shared by every whole leaf that was discarded over a base.
    zero_leaf: Shared<Leaf>,
    quarantine: Mutex<VecDeque<(u64, Vec<Dropped>)>>,
    /// As [`Space::slabs_taken`] when slabs were last taken back.
    slabs_seen: AtomicU64,
    /// References being released; whoever holds this reaps.
    reaping: Mutex<Vec<Dropped>>,
    image_clusters: Mutex<Vec<Range<u32>>>,
    returning: Return,
    has_background: AtomicBool,
    is_closing: Mutex<bool>,
    work: Condvar,
}

/// Why nothing is written any more.
#[derive(Debug)]
enum Ended {
    /// The first failure (R10).
    Failed(String),
    /// In good order.
    Closed,
}

impl Pool {
    /// The store below.
    #[must_use]
    pub fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    /// Cluster size.
    #[must_use]
    pub fn cluster_size(&self) -> ClusterSize {
        self.cluster_size
    }

    /// Identity of the pool.
    #[must_use]
    pub fn uuid(&self) -> [u8; 16] {
        self.superblock.lock().uuid
    }

    /// A copy of the superblock in force.
    #[must_use]
    pub fn superblock(&self) -> Superblock {
        self.superblock.lock().clone()
    }

    /// Opened for reading only.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.is_read_only
    }

    /// The generation new entries are born in.
    #[must_use]
    pub fn generation(&self) -> Generation {
        Generation(self.generation.load(Ordering::Relaxed))
    }

    /// What maps need of the pool to say what they changed.
    #[must_use]
    pub fn shelf(&self) -> Shelf<'_> {
        Shelf {
            space: &self.space,
            zero_leaf: &self.zero_leaf,
        }
    }

    /// The leaf of zeros that discarded parts of a base share.
    #[must_use]
    pub fn zero_leaf(&self) -> &Shared<Leaf> {
        &self.zero_leaf
    }

    /// The item named `name`.
    ///
    /// # Errors
    /// [`PoolError::NotFound`].
    pub fn find(&self, name: &str) -> Result<Item, PoolError> {
        self.catalogue.read().find(name).cloned()
    }

    /// All disks and snapshots in the order of their names.
    #[must_use]
    pub fn items(&self) -> Vec<Item> {
        self.catalogue.read().iter().cloned().collect()
    }

    /// Looks at the catalogue; hold it briefly.
    pub fn with_catalogue<T>(&self, look: impl FnOnce(&Catalogue) -> T) -> T {
        look(&self.catalogue.read())
    }

    /// Changes the catalogue; only inside [`Pool::transact`].
    pub fn change_catalogue<T>(&self, change: impl FnOnce(&mut Catalogue) -> T) -> T {
        change(&mut self.catalogue.write())
    }

    /// Says that data was written: the next flush must reach the device. Called when a data write
    /// completes, before its `alloc` bits are set and before it is acknowledged.
    pub fn mark_written(&self) {
        // Looking first keeps the cache line shared while many workers write.
        if !self.unflushed.load(Ordering::SeqCst) {
            self.unflushed.store(true, Ordering::SeqCst);
        }
    }

    /// `Err` once the pool is poisoned or closed.
    ///
    /// # Errors
    /// [`PoolError::Poisoned`], [`PoolError::Closed`].
    pub fn check_poison(&self) -> Result<(), PoolError> {
        match self.ended.get() {
            None => Ok(()),
            Some(Ended::Failed(reason)) => Err(PoolError::Poisoned {
                reason: reason.clone(),
            }),
            Some(Ended::Closed) => Err(PoolError::Closed),
        }
    }

    /// `Err` unless the pool can be changed.
    ///
    /// # Errors
    /// [`PoolError::ReadOnly`], or as [`Pool::check_poison`].
    pub fn check_writable(&self) -> Result<(), PoolError> {
        if self.is_read_only {
            return Err(PoolError::ReadOnly);
        }
        self.check_poison()
    }

    /// R10: nothing is written from here on.
    fn poison(&self, action: &'static str, source: std::io::Error) -> PoolError {
        let reason = format!("{action} failed ({source})");
        // Only the first failure is kept: the others follow from it.
        self.ended.get_or_init(|| Ended::Failed(reason));
        // No commit is going to take what they wait for.
        self.wake_stalled();
        PoolError::Storage { action, source }
    }

    /// R10, for a store that panics in the middle of what must be done wholly.
    fn poison_if_panicking(&self) {
        if std::thread::panicking() {
            let reason = "the store below panicked".to_owned();
            self.ended.get_or_init(|| Ended::Failed(reason));
            self.wake_stalled();
        }
    }

    /// Drops whose records are durable begin their wait for the requests in flight (R6).
    fn retire(&self, drops: Vec<Dropped>) {
        if !drops.is_empty() {
            self.quarantine
                .lock()
                .push_back((self.epochs.current(), drops));
        }
    }

    /// Releases references that nobody can use any more, `most` steps at most (a step is a cluster
    /// or a map node). `true` if some are left that could be released now.
    pub fn reap(&self, most: usize) -> bool {
        let mut woken = Woken::default();
        let is_left = self.reap_locked(most, &mut woken);
        woken.wake();
        is_left
    }

    fn reap_locked(&self, most: usize, woken: &mut Woken) -> bool {
        let mut stack = self.reaping.lock();
        let current = {
            self.epochs.try_advance();
            self.epochs.try_advance()
        };
        {
            let mut quarantine = self.quarantine.lock();
            while quarantine
                .front()
                .is_some_and(|(epoch, _)| epoch + 2 <= current)
            {
                stack.extend(
                    quarantine
                        .pop_front()
                        .map(|(_, drops)| drops)
                        .unwrap_or_default(),
                );
            }
        }
        for _ in 0..most {
            let Some(dropped) = stack.pop() else {
                return false;
            };
            if let Some(cluster) = dropped.unravel(&mut stack) {
                woken.join(self.space.release(cluster));
            }
        }
        !stack.is_empty()
    }

    /// Nothing dropped is waiting to be released.
    #[must_use]
    pub fn is_reaped(&self) -> bool {
        self.reaping.lock().is_empty() && self.quarantine.lock().is_empty()
    }

    fn write_image(&self, frozen: &Frozen) -> Result<Written, PoolError> {
        self.check_writable()?;
        let uuid_low = journal::uuid_low(&self.uuid());
        image::write(
            frozen,
            uuid_low,
            self.cluster_size,
            &self.space,
            &*self.storage,
        )
    }

    /// Puts a written image in force. THE commit point of an image is its superblock. The caller
    /// leads: two flushes at once could each get the other's error, and one of them acknowledge
    /// what was lost.
    fn adopt(&self, written: Written, journal: &mut Journal) -> Result<(), PoolError> {
        // An older image than the one in force would need batches that are overwritten already.
        assert!(
            written.image.seq >= journal.image_seq(),
            "images are written one at a time"
        );
        self.check_writable()?;
        // The image names data written since the last flush, and itself must be there before the
        // superblock names it.
        self.storage
            .flush()
            .map_err(|e| self.poison("flushing a checkpoint image", e))?;
        let mut superblock = self.superblock();
        superblock.image = Some(written.image);
        superblock.start = journal.start_after(written.image.seq);
        self.write_superblock(superblock)?;
        journal.set_image_seq(written.image.seq);
        let old = std::mem::replace(&mut *self.image_clusters.lock(), written.clusters);
        for range in old {
            self.space.give_back(range, true).wake();
        }
        self.keep_image_reserve();
        Ok(())
    }

    /// Goes on in the other half of the journal, if the image covers what is there.
    fn switch_half(&self, journal: &mut Journal) -> Result<bool, PoolError> {
        if !journal.can_switch() {
            return Ok(false);
        }
        let mut superblock = self.superblock();
        if let Some(start) = journal.start_before_switch(superblock.start) {
            superblock.start = start;
            self.write_superblock(superblock)?;
        }
        journal.switch();
        Ok(true)
    }

    /// Keeps enough clusters for the next image, which may be larger than this one.
    fn keep_image_reserve(&self) {
        let now: u32 = self
            .image_clusters
            .lock()
            .iter()
            .map(|run| run.end - run.start)
            .sum();
        let least = (self.superblock.lock().cluster_count / 1024).clamp(8, 64);
        self.space
            .set_image_reserve(now.saturating_add(now / 2).saturating_add(least));
    }

    /// Both copies, one after the other, each durable: one is whole at every moment.
    fn write_superblock(&self, mut superblock: Superblock) -> Result<(), PoolError> {
        self.check_writable()?;
        superblock.generation += 1;
        let mut bytes = AlignedBuf::new(crate::format::superblock::SUPERBLOCK_LEN);
        bytes.copy_from_slice(&superblock.encode());
        for at in SUPERBLOCK_AT {
            let written = self.storage.write_durable_at(&bytes, at);
            written.map_err(|e| self.poison("writing the superblock", e))?;
        }
        *self.superblock.lock() = superblock;
        Ok(())
    }
}
