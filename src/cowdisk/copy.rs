//! Copying a little data before a write: blocks that are written only in part are brought into the
//! disk's own cluster whole, and a cluster that is shared and only partly filled is merged with
//! what is under it, so that no read ever looks further than two clusters down (I3). Merging
//! copies the smaller half: at most eight blocks.

use super::disk::Disk;
use super::error::DiskError;
use super::plan::Source;
use crate::format::journal::Entry;
use crate::format::units::{Cluster, Lcn, SUBS, index, len_of};
use crate::pool::account::OverLimit;
use crate::pool::entry::Place;
use crate::pool::volume::Map;
use crate::pool::woken::Woken;
use crate::storage::AlignedBuf;

/// A copy that a write waits for. While it exists its cluster of the disk is marked as being
/// copied into, and nothing else changes its entry. Run it with [`Disk::run_copy`].
#[derive(Debug)]
#[must_use = "the cluster stays blocked until the copy is run"]
pub struct CopyJob {
    lcn: Lcn,
    /// The entry it was made for.
    before: Entry,
    /// The entry when the copy is done.
    after: Entry,
    /// Blocks to bring into `after.own`, and where each is.
    copies: Vec<(u32, Source)>,
    /// Bytes from the disk's start that may come from the base.
    base_len: u64,
}

impl CopyJob {
    /// Whether some of it comes from the base: it takes as long as that likes.
    #[must_use]
    pub fn reads_base(&self) -> bool {
        let is_of_base = |(_, source): &(u32, Source)| matches!(source, Source::Base(_));
        self.copies.iter().any(is_of_base)
    }

    /// The copies in runs that one read and one write can do.
    fn runs(&self, sub_len: u64) -> impl Iterator<Item = &[(u32, Source)]> {
        self.copies
            .chunk_by(move |(sub, source), (next_sub, next)| {
                let goes_on = match (*source, *next) {
                    (Source::Pool(at), Source::Pool(next))
                    | (Source::Base(at), Source::Base(next)) => at + sub_len == next,
                    (Source::Zero, Source::Zero) => true,
                    (Source::Pool(_) | Source::Base(_) | Source::Zero, _) => false,
                };
                goes_on && sub + 1 == *next_sub
            })
    }
}

/// Ends a copy when dropped.
struct Ending<'a> {
    disk: &'a Disk,
    job: &'a CopyJob,
    is_copied: bool,
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.disk.end_copy(self.job, self.is_copied);
    }
}

/// The blocks to copy so that an entry that is shared gets no deeper, the fewer there can be, and the
/// cluster that stays under them.
pub(super) fn merged(entry: &Entry) -> (u16, u32) {
    let rest = entry.rest();
    if entry.alloc.count_ones() <= rest.count_ones() {
        (entry.alloc, entry.under)
    } else {
        (rest, entry.own)
    }
}

impl Disk {
    /// Brings the blocks `mask` of `lcn` into its own cluster.
    ///
    /// # Errors
    /// The disk's limit.
    pub(super) fn copy_up(
        &self,
        map: &mut Map,
        lcn: Lcn,
        entry: Entry,
        mask: u16,
    ) -> Result<CopyJob, OverLimit> {
        let after = Entry {
            alloc: entry.alloc | mask,
            zero: entry.zero & !mask,
            ..entry
        };
        map.charge(lcn, &entry, mask)?;
        Ok(self.job(map, lcn, entry, after, mask, |sub| entry.place(sub)))
    }

    /// Moves `lcn` to `target`, its shared cluster or what is under it copied, the other left under.
    /// The limit allows it.
    pub(super) fn merge(&self, map: &mut Map, lcn: Lcn, entry: Entry, target: u32) -> CopyJob {
        let birth = self.pool().generation().0;
        let (copied, under) = merged(&entry);
        let after = Entry {
            own: target,
            under,
            alloc: copied,
            zero: entry.zero,
            birth,
        };
        // Which blocks are charged is all the same: nothing else happens to the cluster meanwhile.
        let more = map.more_in_new(&entry, copied);
        let charged = (0..SUBS).filter(|sub| copied >> sub & 1 == 1);
        let charged = charged
            .take(index(more))
            .fold(0, |mask, sub| mask | 1 << sub);
        map.charge(lcn, &Entry::default(), charged)
            .expect("it was asked before the cluster was taken");
        map.begin_move();
        self.job(map, lcn, entry, after, copied, |sub| entry.place(sub))
    }

    fn job(
        &self,
        map: &mut Map,
        lcn: Lcn,
        before: Entry,
        after: Entry,
        mask: u16,
        place: impl Fn(u32) -> Place,
    ) -> CopyJob {
        let subs = (0..SUBS).filter(|sub| mask >> sub & 1 == 1);
        let copies = subs
            .map(|sub| (sub, self.sub_source(map, lcn, place(sub), sub)))
            .collect();
        map.busy.entry(lcn.0).or_default().is_exclusive = true;
        CopyJob {
            lcn,
            before,
            after,
            copies,
            base_len: map.base_len,
        }
    }

    /// Copies, then changes the entry. Blocks; needs no pass of its own, because the request that
    /// waits for it holds one.
    ///
    /// # Errors
    /// The store or base failed; the disk is as it was.
    #[expect(clippy::needless_pass_by_value, reason = "a job is run once")]
    pub fn run_copy(&self, job: CopyJob) -> Result<(), DiskError> {
        // A store or base that panics has copied nothing: the cluster is let go of all the same.
        let mut ending = Ending {
            disk: self,
            job: &job,
            is_copied: false,
        };
        let moved = self.move_blocks(&job);
        ending.is_copied = moved.is_ok();
        moved
    }

    /// Ends a copy that is not run: the disk is as it was.
    #[expect(clippy::needless_pass_by_value, reason = "a job ends once")]
    pub fn abandon_copy(&self, job: CopyJob) {
        self.end_copy(&job, false);
    }

    fn end_copy(&self, job: &CopyJob, is_copied: bool) {
        let pool = self.pool();
        pool.mark_written();
        let mut freed = Woken::default();
        let mut map = self.volume().map.write();
        let is_new_cluster = job.after.own != job.before.own;
        if is_copied {
            assert_eq!(
                map.get(job.lcn),
                job.before,
                "a cluster being copied into is left alone"
            );
            map.settle(job.lcn, job.after.alloc);
            map.set(&pool.space, job.lcn, job.after, pool.generation());
        }
        if is_new_cluster {
            map.end_move(&pool.space);
        }
        if is_new_cluster && !is_copied {
            let cluster = job.after.own;
            freed = pool.space.give_back(cluster..cluster + 1, true);
        }
        map.end_exclusive(job.lcn);
        pool.list_changes(self.volume(), &mut map);
        let woken = map.take_waiting();
        drop(map);
        woken.wake();
        freed.wake();
    }

    fn move_blocks(&self, job: &CopyJob) -> Result<(), DiskError> {
        let size = self.pool().cluster_size();
        let sub_len = size.sub_bytes();
        let mut buf = AlignedBuf::new(size.len());
        for run in job.runs(sub_len) {
            let (sub, source) = run[0];
            let part = &mut buf[..run.len() * len_of(sub_len)];
            self.read_blocks(source, job.base_len, part)?;
            let to = size.offset(Cluster(job.after.own)) + u64::from(sub) * sub_len;
            let written = self.pool().storage().write_at(part, to);
            written.map_err(DiskError::io("copying a block"))?;
        }
        Ok(())
    }

    /// Blocks, zeros where they lie beyond what the base may give.
    fn read_blocks(&self, source: Source, base_len: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        let Source::Base(at) = source else {
            return self.read_source(source, buf);
        };
        let inside = len_of(base_len.saturating_sub(at)).min(buf.len());
        let (data, zeros) = buf.split_at_mut(inside);
        zeros.fill(0);
        self.read_source(source, data)
    }
}
