//! What a disk has of its pool, what it may have, and what is kept for it: one account a disk, which
//! changes with its map, under the map's lock, and nowhere else. All that counts can be told from the
//! map and the catalogue row, so an account is made anew when a pool opens, and can be checked.
//!
//! - A **limit** is of sub-clusters that the disk allocated since its birth (creation, or the fork that
//!   made it) and still maps. What it inherited never counts: it is never made the disk's own in place
//!   ([`Map::claim`]), even where nobody else has it any more. Requests in flight charge what they are
//!   going to allocate before they begin, each sub-cluster once, so a limit is never passed.
//! - A **reserve** is a promise of clusters for what the disk may still write without sharing it: those
//!   it has to itself are taken off. They come back to the pool when they are dropped, so the promise
//!   grows again with a discard, and others get at the space at no moment in between. A fork or
//!   snapshot of the disk shares all it has: the whole reserve is promised anew, or the fork refused.

use super::Pool;
use super::error::PoolError;
use super::map::{Leaf, Tree};
use super::space::{Purpose, Space};
use super::volume::{Map, Volume};
use super::walk::Seen;
use super::woken::Woken;
use crate::format::catalogue::Row;
use crate::format::journal::Entry;
use crate::format::units::{ClusterSize, Generation, Lcn};

/// What the entries of a map count for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Held {
    /// Sub-clusters allocated since the disk's birth: for the limit.
    pub subs: u64,
    /// Clusters that the disk alone refers to: for the reserve.
    pub clusters: u64,
}

/// What entries count for, which is told from when they and the disk were born.
#[derive(Debug, Clone, Copy)]
struct Since {
    birth: Generation,
    last_fork: Generation,
}

impl Since {
    /// The sub-clusters of `entry` that count for the limit.
    fn counted(self, entry: &Entry) -> u16 {
        if entry.birth > self.birth.0 {
            entry.alloc
        } else {
            0
        }
    }

    fn held(self, entry: &Entry) -> Held {
        let is_own = entry.own != 0 && entry.birth > self.last_fork.0;
        Held {
            subs: u64::from(self.counted(entry).count_ones()),
            clusters: u64::from(is_own),
        }
    }

    fn held_by(self, tree: &Tree) -> Held {
        let mut all = Held::default();
        // Nothing that has clusters is in a map twice.
        Seen::default().walk(tree, &mut |_, _, leaf| {
            for entry in &leaf.entries {
                all.add(self.held(entry));
            }
        });
        all
    }
}

impl Held {
    fn add(&mut self, more: Held) {
        self.subs += more.subs;
        self.clusters += more.clusters;
    }

    fn take(&mut self, less: Held) {
        const COUNTED: &str = "what an account gives up was counted before";
        self.subs = self.subs.checked_sub(less.subs).expect(COUNTED);
        self.clusters = self.clusters.checked_sub(less.clusters).expect(COUNTED);
    }
}

/// The limit and reserve of a disk, and what counts for them.
#[derive(Debug, Clone, Copy)]
pub struct Quota {
    limit_subs: Option<u64>,
    reserve: u32,
    held: Held,
}

impl Quota {
    /// That of `row`, for a disk with the map `tree` that was last forked in `last_fork`.
    #[must_use]
    pub fn of(row: &Row, tree: &Tree, last_fork: Generation, size: ClusterSize) -> Self {
        let (limit_subs, reserve) = terms(row, size);
        let since = Since {
            birth: row.birth_generation,
            last_fork,
        };
        // Without a limit or a reserve nothing is counted: a rollback takes no longer on a large
        // disk than on a small one.
        let held = match is_counted(limit_subs, reserve) {
            true => since.held_by(tree),
            false => Held::default(),
        };
        Self {
            limit_subs,
            reserve,
            held,
        }
    }
}

/// The limit in sub-clusters, and the reserve in clusters, of `row`.
fn terms(row: &Row, size: ClusterSize) -> (Option<u64>, u32) {
    let limit = row.limit.map(|bytes| bytes.div_ceil(size.sub_bytes()));
    let reserve = row.reserve.map_or(Some(0), |bytes| size.count(bytes));
    (limit, reserve.unwrap_or(u32::MAX))
}

fn is_counted(limit_subs: Option<u64>, reserve: u32) -> bool {
    limit_subs.is_some() || reserve > 0
}

/// A disk's limit would be passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OverLimit {
    /// The limit, sub-clusters.
    pub limit_subs: u64,
}

/// See the module. Nothing here saturates: what is taken off was put on.
#[derive(Debug)]
pub struct Account {
    birth: Generation,
    limit_subs: Option<u64>,
    /// Clusters.
    reserve: u32,
    /// Kept only while there is a limit or a reserve.
    held: Held,
    /// Sub-clusters that requests in flight are going to allocate.
    charged: u64,
    /// Clusters taken for copies in flight: no entry has them yet.
    moving: u32,
    /// Clusters that [`Space`] keeps for the disk.
    kept: u32,
}

impl Account {
    /// That of a disk born in `birth`, without a limit or a reserve.
    pub(super) fn new(birth: Generation) -> Self {
        Self {
            birth,
            limit_subs: None,
            reserve: 0,
            held: Held::default(),
            charged: 0,
            moving: 0,
            kept: 0,
        }
    }

    /// What is older was inherited.
    #[must_use]
    pub fn birth(&self) -> Generation {
        self.birth
    }

    /// The disk is born again: what it has is from then on inherited. Its quota is set next.
    pub fn set_birth(&mut self, birth: Generation) {
        self.birth = birth;
    }

    /// There is a limit or a reserve.
    #[must_use]
    pub fn is_counted(&self) -> bool {
        is_counted(self.limit_subs, self.reserve)
    }

    /// What counts now; nothing if nothing is counted.
    #[must_use]
    pub fn held(&self) -> Held {
        self.held
    }

    /// The reserve, clusters; 0 if there is none.
    #[must_use]
    pub fn reserve(&self) -> u32 {
        self.reserve
    }

    /// Clusters that the pool keeps for the disk, besides those it has.
    #[must_use]
    pub fn kept(&self) -> u32 {
        self.kept
    }

    /// Where the disk's next clusters come from, and how many of them at most.
    #[must_use]
    pub fn purpose(&self) -> (Purpose, u32) {
        match self.kept {
            0 => (Purpose::Data, u32::MAX),
            kept => (Purpose::ReservedData, kept),
        }
    }

    /// `count` clusters were taken from what was kept.
    pub(super) fn take_kept(&mut self, count: u32) {
        let left = self.kept.checked_sub(count);
        self.kept = left.expect("no more is taken than is kept");
    }

    fn check(&self, more: u32) -> Result<(), OverLimit> {
        let all = self.held.subs + self.charged + u64::from(more);
        match self.limit_subs {
            // What counts already may be over a limit that was set later.
            Some(limit_subs) if more > 0 && all > limit_subs => Err(OverLimit { limit_subs }),
            Some(_) | None => Ok(()),
        }
    }

    fn uncharge(&mut self, subs: u32) {
        let left = self.charged.checked_sub(u64::from(subs));
        self.charged = left.expect("what is settled was charged");
    }

    /// What [`Space`] should keep: the reserve, but for what the disk has, or has set aside.
    fn wanted(&self, set_aside: u32) -> u32 {
        let has = self.held.clusters + u64::from(set_aside) + u64::from(self.moving);
        u32::try_from(u64::from(self.reserve).saturating_sub(has)).unwrap_or(u32::MAX)
    }
}

/// The account, in step with the map.
impl Map {
    fn since(&self) -> Since {
        Since {
            birth: self.account.birth,
            last_fork: self.last_fork,
        }
    }

    /// One entry takes the place of another.
    pub(super) fn count_change(&mut self, old: &Entry, new: &Entry) {
        if self.account.is_counted() {
            let since = self.since();
            self.account.held.add(since.held(new));
            self.account.held.take(since.held(old));
        }
    }

    /// A leaf is no longer in the map.
    pub(super) fn count_gone(&mut self, leaf: &Leaf) {
        if self.account.is_counted() {
            let since = self.since();
            for entry in &leaf.entries {
                self.account.held.take(since.held(entry));
            }
        }
    }

    /// All that the disk has was just shared, by a fork of it or with what it became equal to.
    pub(super) fn count_shared(&mut self) {
        self.account.held.clusters = 0;
    }

    /// Has [`Space`] keep what the account wants: called after every change, before the space of what
    /// was dropped can become free.
    pub(super) fn balance(&mut self, space: &Space) {
        let wanted = self.account.wanted(self.slab_len());
        let more = i64::from(wanted) - i64::from(self.account.kept);
        if more != 0 {
            space.change_disk_reserve(more);
            self.account.kept = wanted;
        }
    }

    /// Sub-clusters that count more when `mask` are allocated in a new cluster of the disk, which
    /// takes the place of the cluster of its own that `old` has.
    #[must_use]
    pub fn more_in_new(&self, old: &Entry, mask: u16) -> u32 {
        let counted = self.since().counted(old).count_ones();
        mask.count_ones().saturating_sub(counted)
    }

    /// `Err` if `more` sub-clusters would pass the limit, with what is in flight.
    ///
    /// # Errors
    /// [`OverLimit`].
    pub fn check_limit(&self, more: u32) -> Result<(), OverLimit> {
        self.account.check(more)
    }

    /// Charges the sub-clusters `mask` of `lcn` that a request is going to allocate: those that do not
    /// count yet, and that no other request has charged. They are settled when they count
    /// ([`Map::settle`]), the rest when no request is busy with the cluster any more.
    ///
    /// # Errors
    /// [`OverLimit`]; nothing was charged.
    pub fn charge(&mut self, lcn: Lcn, entry: &Entry, mask: u16) -> Result<(), OverLimit> {
        if self.account.limit_subs.is_none() {
            return Ok(());
        }
        let charged = self.busy.get(&lcn.0).map_or(0, |busy| busy.charged);
        let more = mask & !self.since().counted(entry) & !charged;
        self.account.check(more.count_ones())?;
        if more != 0 {
            self.account.charged += u64::from(more.count_ones());
            self.busy.entry(lcn.0).or_default().charged |= more;
        }
        Ok(())
    }

    /// What was charged of the sub-clusters `mask` of `lcn` counts from now on by its entry.
    pub fn settle(&mut self, lcn: Lcn, mask: u16) {
        if let Some(busy) = self.busy.get_mut(&lcn.0) {
            let settled = busy.charged & mask;
            busy.charged &= !mask;
            self.account.uncharge(settled.count_ones());
        }
    }

    /// A cluster was taken for a copy, and no entry has it yet.
    pub fn begin_move(&mut self) {
        self.account.moving += 1;
    }

    /// The entry has it now, or it was given back.
    pub fn end_move(&mut self, space: &Space) {
        let left = self.account.moving.checked_sub(1);
        self.account.moving = left.expect("a move that ends has begun");
        self.balance(space);
    }

    /// The quota as it will be when all that the disk has is shared.
    #[must_use]
    pub fn quota_when_shared(&self) -> Quota {
        Quota {
            limit_subs: self.account.limit_subs,
            reserve: self.account.reserve,
            held: Held {
                clusters: 0,
                ..self.account.held
            },
        }
    }

    /// Sets a quota for which [`Pool::reserve`] has kept what it wants.
    pub fn set_quota(&mut self, quota: &Quota) {
        self.account.limit_subs = quota.limit_subs;
        self.account.reserve = quota.reserve;
        self.account.held = quota.held;
    }

    /// Sets all of a quota when a pool opens: what was promised stays so, whatever there is.
    pub(super) fn restore_quota(&mut self, quota: &Quota, space: &Space) {
        self.set_quota(quota);
        self.balance(space);
    }

    /// Ends the account of a disk that is removed.
    pub fn close_account(&mut self, space: &Space) {
        self.account.limit_subs = None;
        self.account.reserve = 0;
        self.balance(space);
    }

    /// What the entries count for, found by looking at all of them.
    #[must_use]
    pub fn recount(&self) -> Held {
        self.since().held_by(&self.tree)
    }
}

impl Pool {
    /// Keeps for each disk what its quota wants, instead of what is kept now; for all of them or
    /// none. The disks are drained, or nobody knows them yet: none of them takes clusters meanwhile.
    ///
    /// # Errors
    /// There is less free than that. Nothing was changed.
    pub fn reserve(&self, disks: &[(&Volume, Quota)]) -> Result<(), PoolError> {
        let mut woken = Woken::default();
        let (mut wanted, mut more) = (0_u64, 0_i64);
        let wants = |quota: &Quota| {
            let left = u64::from(quota.reserve).saturating_sub(quota.held.clusters);
            u32::try_from(left).unwrap_or(u32::MAX)
        };
        for (volume, quota) in disks {
            let mut map = volume.map.write();
            // What was set aside from the reserve is counted as reserved again.
            woken.join(map.drop_slab(&self.space));
            wanted += u64::from(wants(quota));
            more += i64::from(wants(quota)) - i64::from(map.account.kept);
        }
        woken.wake();
        self.space.try_reserve(more).map_err(|have| {
            let size = self.cluster_size.bytes();
            // What these disks have is theirs to use.
            let can = wanted
                .saturating_add_signed(-more)
                .saturating_add(u64::from(have));
            PoolError::invalid(format!(
                "{} bytes cannot be reserved: the pool has {} free and not reserved; give up or \
                 lower a reserve (`disk set --reserve`), or make room",
                wanted * size,
                can * size
            ))
        })?;
        for (volume, quota) in disks {
            volume.map.write().account.kept = wants(quota);
        }
        Ok(())
    }

    /// Compares every account with its map, and all of them with what is kept. The pool must be quiet.
    ///
    /// # Errors
    /// [`PoolError::Damaged`], with the account that is wrong.
    pub fn check_accounts(&self) -> Result<(), PoolError> {
        let mut kept = 0_u64;
        for item in self.items() {
            let map = item.volume.map.read();
            let account = &map.account;
            kept += u64::from(account.kept);
            let found = map.recount();
            let is_right = !account.is_counted() || account.held == found;
            let is_quiet = (account.charged, account.moving) == (0, 0);
            let is_kept = account.kept == account.wanted(map.slab_len());
            if !(is_right && is_quiet && is_kept) {
                return Err(PoolError::damaged(format!(
                    "the account of `{}` is {account:?}, its map has {found:?} and {} set aside",
                    item.row.name,
                    map.slab_len()
                )));
            }
        }
        let reserved = self.space.disk_reserve();
        if kept != reserved {
            return Err(PoolError::damaged(format!(
                "{reserved} clusters are kept for disks, and their accounts say {kept}"
            )));
        }
        Ok(())
    }
}
