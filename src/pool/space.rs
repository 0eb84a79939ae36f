//! Free clusters: who may take how many, and in which order they are used again. Clusters that
//! were written and freed come first (their blocks on the host are allocated and initialised),
//! then the others, lowest first. Both in runs, so that what is written together lies together.

use super::bitmap::Bitmap;
use super::counts::Counts;
use super::error::PoolError;
use super::woken::{Waiters, Woken};
use crate::sync::Mutex;
use std::ops::Range;
use std::task::Waker;

/// Who wants clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// A disk's data. Leaves the reserves alone.
    Data,
    /// A disk's data, from the space reserved for that disk.
    ReservedData,
    /// A checkpoint image. May take what is kept for it.
    Image,
}

/// Free clusters by kind.
#[derive(Debug, Default)]
struct Free {
    /// Freed, and not given back to the host since.
    written: Bitmap,
    /// Holes, as far as is known.
    clean: Bitmap,
    /// Where the last run taken from `clean` ended.
    cursor: u32,
    /// Kept back for checkpoint images.
    image_reserve: u32,
    /// Kept back for disks with a reserve.
    disk_reserve: u64,
    /// Times that more than one cluster was taken: only so a disk comes to have some set aside.
    slabs_taken: u64,
}

impl Free {
    /// Clusters that `purpose` may take.
    fn usable(&self, purpose: Purpose) -> u32 {
        let kept = match purpose {
            Purpose::Data => u64::from(self.image_reserve) + self.disk_reserve,
            Purpose::ReservedData => u64::from(self.image_reserve),
            Purpose::Image => 0_u64,
        };
        let kept = u32::try_from(kept).unwrap_or(u32::MAX);
        (self.written.len() + self.clean.len()).saturating_sub(kept)
    }

    fn change_disk_reserve(&mut self, more: i64) {
        let now = self.disk_reserve.checked_add_signed(more);
        self.disk_reserve = now.expect("what is given up was kept");
    }
}

/// Clusters taken from the free ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Taken {
    /// Consecutive.
    pub clusters: Range<u32>,
    /// They were written before, and the host has blocks for them still.
    pub is_written: bool,
}

/// The clusters of a pool.
#[derive(Debug)]
pub struct Space {
    /// References to each cluster.
    pub counts: Counts,
    /// Lock order: after every map, before nothing.
    free: Mutex<Free>,
    waiting: Mutex<Waiters>,
}

/// How many clusters are in which state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpaceUse {
    /// Free, and the host may have given their space to others.
    pub clean: u32,
    /// Free, but still occupying the host.
    pub written: u32,
    /// Of the free ones, kept back for images and reserves.
    pub reserved: u32,
}

impl Space {
    /// Nothing free yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            counts: Counts::new(),
            free: Mutex::default(),
            waiting: Mutex::default(),
        }
    }

    /// Declares `range` free and untouched (at open, and when the pool grows).
    pub fn add_clean(&self, range: Range<u32>) {
        self.free.lock().clean.insert(range);
        self.take_waiting().wake();
    }

    /// Takes 1 to `most` consecutive clusters of one kind. Their count stays 0 until an entry refers to them.
    ///
    /// # Errors
    /// [`PoolError::NoSpace`].
    pub fn take(&self, most: u32, purpose: Purpose) -> Result<Taken, PoolError> {
        let mut free = self.free.lock();
        let usable = free.usable(purpose);
        // A pool that is nearly full has nothing to set aside.
        let most = most.min((usable / 64).max(1));
        if usable == 0 {
            return Err(PoolError::NoSpace);
        }
        let first_written = free.written.next(0);
        let range = if let Some(start) = first_written {
            let range = free.written.run_from(start, most);
            free.written.remove(range.clone());
            range
        } else {
            let from = free.cursor;
            let start = free.clean.next(from).or_else(|| free.clean.next(0));
            let start = start.expect("`usable` counted a free cluster");
            let range = free.clean.run_from(start, most);
            free.clean.remove(range.clone());
            free.cursor = range.end;
            range
        };
        if range.end - range.start > 1 {
            free.slabs_taken += 1;
        }
        if purpose == Purpose::ReservedData {
            free.change_disk_reserve(-i64::from(range.end - range.start));
        }
        Ok(Taken {
            clusters: range,
            is_written: first_written.is_some(),
        })
    }

    /// Gives back clusters nobody refers to. `is_written`: something may have been written there.
    /// Returns who waits for space.
    pub fn give_back(&self, range: Range<u32>, is_written: bool) -> Woken {
        if range.is_empty() {
            return Woken::default();
        }
        let mut free = self.free.lock();
        if is_written {
            free.written.insert(range);
        } else {
            free.clean.insert(range);
        }
        drop(free);
        self.take_waiting()
    }

    /// Takes a run of freed clusters to give back to the host: while it is punched nobody may have
    /// it (R4). Return it with [`Space::give_back`], clean.
    pub fn take_written(&self, most: u32) -> Option<Range<u32>> {
        let mut free = self.free.lock();
        let start = free.written.next(0)?;
        let range = free.written.run_from(start, most);
        free.written.remove(range.clone());
        Some(range)
    }

    /// Takes the free, untouched clusters of `range`, in runs, for punching or for shrinking.
    pub fn take_clean_in(&self, range: Range<u32>) -> Vec<Range<u32>> {
        let mut free = self.free.lock();
        let mut taken = Vec::new();
        let mut from = range.start;
        while let Some(start) = free.clean.next(from).filter(|start| *start < range.end) {
            let run = free.clean.run_from(start, range.end - start);
            free.clean.remove(run.clone());
            from = run.end;
            taken.push(run);
        }
        taken
    }

    /// Drops one reference to `cluster`, durably gone and used by no request; frees it if it was
    /// the last (I5). Returns who waits for space.
    pub fn release(&self, cluster: u32) -> Woken {
        match self.counts.release(cluster) {
            0 => self.give_back(cluster..cluster + 1, true),
            _ => Woken::default(),
        }
    }

    /// Clusters kept for images from now on.
    pub fn set_image_reserve(&self, clusters: u32) {
        self.free.lock().image_reserve = clusters;
    }

    /// Clusters kept for disks with a reserve: `more` are added or, if negative, given up.
    pub fn change_disk_reserve(&self, more: i64) {
        let mut free = self.free.lock();
        free.change_disk_reserve(more);
    }

    /// Keeps `more` clusters for disks with a reserve, or gives some up if it is negative: at once
    /// with the look whether that many are free and not kept.
    ///
    /// # Errors
    /// There are fewer, namely so many.
    pub fn try_reserve(&self, more: i64) -> Result<(), u32> {
        let mut free = self.free.lock();
        let can = free.usable(Purpose::Data);
        if more > i64::from(can) {
            return Err(can);
        }
        free.change_disk_reserve(more);
        Ok(())
    }

    /// Clusters kept for disks with a reserve.
    #[must_use]
    pub fn disk_reserve(&self) -> u64 {
        self.free.lock().disk_reserve
    }

    /// Clusters that could be reserved still.
    #[must_use]
    pub fn reservable(&self) -> u32 {
        self.free.lock().usable(Purpose::Data)
    }

    /// Clusters in each state.
    #[must_use]
    pub fn usage(&self) -> SpaceUse {
        let free = self.free.lock();
        SpaceUse {
            clean: free.clean.len(),
            written: free.written.len(),
            reserved: u32::try_from(u64::from(free.image_reserve) + free.disk_reserve)
                .unwrap_or(u32::MAX),
        }
    }

    /// `waker` is woken when clusters become free that `purpose` may take, at once if some are.
    pub fn wait_for_space(&self, purpose: Purpose, waker: &Waker) {
        self.waiting.lock().push(waker.clone());
        // Some may have become free between the refusal and now: nobody would wake it for those.
        if self.free.lock().usable(purpose) > 0 {
            self.take_waiting().wake();
        }
    }

    /// `waker` waits no longer for clusters.
    pub fn stop_waiting(&self, waker: &Waker) {
        self.waiting.lock().remove(waker);
    }

    /// Changes whenever a disk may have come to have clusters set aside.
    #[must_use]
    pub fn slabs_taken(&self) -> u64 {
        self.free.lock().slabs_taken
    }

    /// Somebody waits for clusters to become free.
    #[must_use]
    pub fn is_waited_for(&self) -> bool {
        !self.waiting.lock().is_empty()
    }

    fn take_waiting(&self) -> Woken {
        self.waiting.lock().take()
    }
}
