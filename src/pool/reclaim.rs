//! Giving freed clusters back to the host, and the background thread that does what can wait.

use super::Pool;
use super::error::PoolError;
use super::open::Return;
use super::space::Purpose;
use super::volume::Volume;
use crate::format::units::Cluster;
use crate::sync::atomic::Ordering;
use crate::sync::{Arc, JoinHandle, Vital, spawn_named};
use std::ops::Range;
use std::task::Waker;
use std::time::Duration;

/// Most bytes given back in one call: a punch blocks other requests to the file on some hosts.
const PUNCH_LEN_MAX: u64 = 1 << 20;
/// Map nodes and clusters released between two looks at other work.
const REAP_STEPS: usize = 65536;
/// Clusters given back between two reports of progress.
const CLUSTERS_PER_LOOK: u32 = 256;
/// How long nothing must have happened before freed space goes back ([`Return::Idle`]).
const IDLE: Duration = Duration::from_millis(500);
/// For how many such whiles nobody must have committed before what was discarded is.
const IDLE_TURNS: u32 = 4;

impl Pool {
    /// Takes back the clusters that disks have set aside for their next writes: a full pool has
    /// none to spare for that.
    pub fn take_back_slabs(&self) {
        self.slabs_seen
            .store(self.space.slabs_taken(), Ordering::SeqCst);
        let volumes: Vec<Arc<Volume>> =
            self.with_catalogue(|all| all.iter().map(|item| Arc::clone(&item.volume)).collect());
        for volume in volumes {
            let woken = volume.map.write().drop_slab(&self.space);
            woken.wake();
        }
    }

    /// `waker` is woken when there may be clusters again that `purpose` may take; what can be done to
    /// that end is done. Costs little while the pool stays full: no disk is looked at then.
    pub fn wait_for_space(&self, purpose: Purpose, waker: &Waker) {
        if self.slabs_seen.load(Ordering::SeqCst) != self.space.slabs_taken() {
            self.take_back_slabs();
        }
        self.space.wait_for_space(purpose, waker);
        self.hurry();
    }

    /// Gives back up to `most` clusters that were written and freed. Each is out of the free list
    /// while it is punched (R4).
    ///
    /// # Errors
    /// The store failed; the clusters stay free.
    pub fn punch_written(&self, most: u32) -> Result<u32, PoolError> {
        self.check_writable()?;
        let mut left = most;
        let per_call = self.clusters_per_punch();
        while let Some(run) = self.space.take_written(per_call.min(left)) {
            left -= run.end - run.start;
            let punched = self.punch(&run);
            self.space.give_back(run, punched.is_err()).wake();
            punched?;
            if left == 0 {
                break;
            }
        }
        Ok(most - left)
    }

    fn punch(&self, run: &Range<u32>) -> Result<(), PoolError> {
        let at = self.cluster_size.offset(Cluster(run.start));
        let len = u64::from(run.end - run.start) * self.cluster_size.bytes();
        let punched = self.storage.punch(at, len);
        self.mark_written();
        punched.map_err(PoolError::storage("giving space back to the host"))
    }

    /// Gives back everything that is free, also what an earlier life of the pool left behind.
    /// Returns the bytes the host got.
    ///
    /// # Errors
    /// As [`Pool::punch_written`].
    pub fn trim(&self) -> Result<u64, PoolError> {
        self.trim_with(&mut |_, _| {})
    }

    /// As [`Pool::trim`]; `progress` is told bytes looked at, and bytes in all.
    ///
    /// # Errors
    /// As [`Pool::punch_written`].
    pub fn trim_with(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<u64, PoolError> {
        self.check_writable()?;
        let reading = || PoolError::storage("asking the host for its allocation");
        let before = self.storage.allocated().map_err(reading())?;
        self.flush()?;
        while self.reap(REAP_STEPS) {}
        let written = u64::from(self.space.usage().written) * self.cluster_size.bytes();
        let total = written + self.superblock().pool_len();
        let mut done = 0;
        loop {
            let punched = self.punch_written(CLUSTERS_PER_LOOK)?;
            done += u64::from(punched) * self.cluster_size.bytes();
            progress(done.min(written), total);
            if punched < CLUSTERS_PER_LOOK {
                break;
            }
        }
        let mut at = 0;
        while let Some((start, end)) = self.storage.next_data(at).map_err(reading())? {
            let first = self.cluster_size.split(start).0.0;
            let last = self.cluster_size.count(end).unwrap_or(u32::MAX);
            self.punch_clean(first..last)?;
            at = end;
            progress((written + at).min(total), total);
        }
        progress(total, total);
        let after = self.storage.allocated().map_err(reading())?;
        Ok(before.saturating_sub(after))
    }

    /// Punches what is free in `range`, a little at a time: whoever writes meanwhile finds the rest.
    fn punch_clean(&self, range: Range<u32>) -> Result<(), PoolError> {
        let mut start = range.start;
        while start < range.end {
            let end = range
                .end
                .min(start.saturating_add(self.clusters_per_punch()));
            for run in self.space.take_clean_in(start..end) {
                let punched = self.punch(&run);
                self.space.give_back(run, false).wake();
                punched?;
            }
            start = end;
        }
        Ok(())
    }

    fn clusters_per_punch(&self) -> u32 {
        let clusters = PUNCH_LEN_MAX / self.cluster_size.bytes();
        u32::try_from(clusters).unwrap_or(1).max(1)
    }

    /// Makes what was discarded free, as far as no request may still use it.
    ///
    /// # Errors
    /// As [`Pool::flush`].
    pub fn reclaim(&self) -> Result<(), PoolError> {
        self.flush()?;
        while self.reap(REAP_STEPS) {}
        Ok(())
    }

    /// Called when a request waits for space or for a commit: what was discarded becomes free only
    /// by a commit, which nobody else may ever ask for.
    pub fn hurry(&self) {
        // The lock keeps this from falling between the thread's look and its sleep.
        drop(self.is_closing.lock());
        self.work.notify_one();
    }

    /// Starts the thread that writes images, releases what was dropped and gives space back. Until
    /// then, or without it, commits do that work themselves, as after it has ended: at
    /// [`Pool::close`], or when what is returned is dropped.
    ///
    /// # Errors
    /// There is one already, or no thread could be made.
    pub fn start_background(self: &Arc<Self>) -> std::io::Result<Background> {
        if self.has_background.swap(true, Ordering::SeqCst) {
            return Err(std::io::ErrorKind::AlreadyExists.into());
        }
        *self.is_closing.lock() = false;
        let pool = Arc::clone(self);
        // Made here, so that it says so too if there is no thread.
        let ending = Ending(Arc::clone(self));
        let thread = spawn_named("tidepool-reclaim", move || {
            let _ending = ending;
            pool.run_background();
        })?;
        Ok(Background {
            pool: Arc::clone(self),
            thread: Some(thread),
        })
    }

    pub(super) fn has_background(&self) -> bool {
        self.has_background.load(Ordering::SeqCst)
    }

    /// Waits until the background thread, if there is one, does nothing more.
    pub(super) fn stop_background(&self) {
        let mut is_closing = self.is_closing.lock();
        *is_closing = true;
        self.work.notify_all();
        while self.has_background() {
            self.work.wait(&mut is_closing);
        }
    }

    fn run_background(&self) {
        let _vital = Vital::new();
        let mut idle_turns = 0;
        loop {
            let is_idle = {
                let mut is_closing = self.is_closing.lock();
                if *is_closing {
                    return;
                }
                !self.wants_commit.load(Ordering::SeqCst)
                    && self.work.wait_for(&mut is_closing, IDLE).timed_out()
            };
            idle_turns = if is_idle { idle_turns + 1 } else { 0 };
            let is_owed = idle_turns >= IDLE_TURNS && self.has_drops();
            if self.wants_commit.load(Ordering::SeqCst)
                || self.space.is_waited_for()
                || self.is_in_round()
                || is_owed
            {
                // Whoever waits finds out by planning again; a poisoned pool refuses that. A round
                // that met no space is gone on with when there is some, not at once.
                if self.flush().is_err() {
                    self.wants_commit.store(false, Ordering::SeqCst);
                }
            }
            // A failed image is tried again when the journal is full, where the error is told.
            drop(self.write_frozen_image());
            while self.reap(REAP_STEPS) {}
            let gives_back = match self.returning {
                Return::Eager => true,
                Return::Idle => is_idle || self.is_above_high_water(),
                Return::Never => false,
            };
            if gives_back {
                // A host that cannot punch keeps the space; `trim` tells why.
                drop(self.punch_written(u32::MAX));
            }
        }
    }

    /// A disk let go of something, and nobody has asked for a commit since: guests of ephemeral disks
    /// never do.
    fn has_drops(&self) -> bool {
        // Cloned: maps are locked before the list is.
        let listed = self.listed.lock().clone();
        listed.iter().any(|volume| volume.map.read().has_drops())
    }

    /// Freed space kept for quick reuse has a limit: a sixteenth of the pool.
    fn is_above_high_water(&self) -> bool {
        self.space.usage().written > self.superblock.lock().cluster_count / 16
    }
}

/// Says that there is no background thread any more, when dropped.
struct Ending(Arc<Pool>);

impl Drop for Ending {
    fn drop(&mut self) {
        // The lock keeps this from falling between a waiter's look and its sleep.
        let is_closing = self.0.is_closing.lock();
        self.0.has_background.store(false, Ordering::SeqCst);
        drop(is_closing);
        self.0.work.notify_all();
        // From now on nobody waits for a commit.
        self.0.wake_stalled();
    }
}

/// The background thread of a pool; dropping it ends the thread.
#[derive(Debug)]
pub struct Background {
    pool: Arc<Pool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Background {
    fn drop(&mut self) {
        self.pool.stop_background();
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed; there is nothing left to wait for.
            drop(thread.join());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::catalogue::{Row, RowKind};
    use crate::format::journal::Entry;
    use crate::format::units::{DiskId, Generation, Lcn};
    use crate::pool::map::Tree;
    use crate::pool::space::Purpose;
    use crate::pool::volume::Volume;
    use crate::pool::{CreateOptions, OpenOptions, open};
    use crate::storage::{SimStorage, Storage};
    use crate::sync::Mutex;
    use std::task::{Wake, Waker};

    fn pool_with_disk() -> (Arc<Pool>, Arc<Volume>) {
        let storage: Arc<dyn Storage> = Arc::new(SimStorage::new(16 << 20));
        open::create(&*storage, &CreateOptions::new(16 << 20)).expect("an empty pool");
        let pool = Pool::open(storage, &OpenOptions::default()).expect("opens");
        let row = Row {
            id: DiskId(1),
            name: "d".to_owned(),
            kind: RowKind::Disk,
            parent: None,
            family: DiskId(1),
            size: 1 << 20,
            created: 0,
            birth_generation: Generation(0),
            base: None,
            base_len: 0,
            limit: None,
            reserve: None,
            is_ephemeral: false,
        };
        let none = Generation(0);
        let volume = Volume::new(&row, Tree::default(), none, none);
        let volume = Arc::new(volume);
        pool.change_catalogue(|all| all.put(row, &volume));
        (pool, volume)
    }

    /// A waker that looks whether whoever wakes it holds the map of the disk, or reaps.
    struct Look {
        pool: Arc<Pool>,
        volume: Arc<Volume>,
        found: Mutex<Vec<(bool, bool)>>,
    }

    impl Wake for Look {
        fn wake(self: Arc<Self>) {
            let is_map_free = self.volume.map.try_write().is_some();
            let is_reaping_free = self.pool.reaping.try_lock().is_some();
            self.found.lock().push((is_map_free, is_reaping_free));
        }
    }

    #[test]
    fn who_waits_for_space_is_woken_with_nothing_locked() {
        let (pool, volume) = pool_with_disk();
        let look = Arc::new(Look {
            pool: Arc::clone(&pool),
            volume: Arc::clone(&volume),
            found: Mutex::default(),
        });
        let waker = Waker::from(Arc::clone(&look));
        let entry = {
            let mut map = volume.map.write();
            let cluster = map.take_cluster(&pool.space).expect("an empty pool");
            Entry {
                own: cluster.number,
                alloc: 1,
                birth: 1,
                ..Entry::default()
            }
        };
        while pool.space.take(u32::MAX, Purpose::Data).is_ok() {}
        pool.space.wait_for_space(Purpose::Data, &waker);
        assert!(look.found.lock().is_empty(), "there is none");
        // What the disk has set aside comes back.
        pool.take_back_slabs();
        assert_eq!(*look.found.lock(), [(true, true)]);
        while pool.space.take(u32::MAX, Purpose::Data).is_ok() {}
        pool.space.wait_for_space(Purpose::Data, &waker);
        // What the disk had comes back.
        let now = pool.generation();
        volume.map.write().set(&pool.space, Lcn(0), entry, now);
        let free = Entry::default();
        volume.map.write().set(&pool.space, Lcn(0), free, now);
        pool.list_changes(&volume, &mut volume.map.write());
        pool.flush().expect("flushes");
        while pool.reap(usize::MAX) {}
        assert_eq!(*look.found.lock(), [(true, true); 2]);
    }
}
