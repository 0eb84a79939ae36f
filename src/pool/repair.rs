//! Repairing a pool that nobody has open: what can be rebuilt is, in memory, and then all metadata is
//! written anew. Nothing that was there is written over but the superblocks, which are saved; what is
//! given up is kept from others ([`super::kept`]).

use super::check::{Report, check, image_faults};
use super::derive::{EntryFault, Mend, derive};
use super::dump::ZEROS;
use super::error::PoolError;
use super::evidence::Evidence;
use super::kept::keep;
use super::load::{Loaded, load, read_superblock};
use super::lost::{Lost, given_away, join};
use super::rewrite::{OldJournal, mend_copies, rewrite};
use super::space::Space;
use super::undo;
use crate::format::journal::Entry;
use crate::format::units::{DiskId, Generation, Lcn};
use crate::storage::Storage;
use crate::sync::Arc;
use std::collections::BTreeSet;

/// One fault may hide another; more often than this it is not worth going on.
const ROUNDS_MAX: usize = 4;

/// Told what is wrong, what is done about it, and what is lost by that.
type Said<'a> = &'a mut dyn FnMut(String, Mend, Vec<Lost>);

/// Repairs the pool in `storage`, which nobody else has open: superblock copies, a journal that
/// breaks off, entries that cannot be. What is lost by that is said by the faults in the report,
/// which is of the state before, and [`super::undo`] puts it back.
///
/// # Errors
/// The pool has a fault that cannot be repaired, or no space for its metadata to be written anew:
/// nothing was changed then but a copy of the superblock. The store failed: run it again.
pub fn repair(storage: &Arc<dyn Storage>) -> Result<Report, PoolError> {
    let report = check(&**storage)?;
    if let Some(fault) = report.faults.iter().find(|fault| fault.remedy.is_none()) {
        return Err(PoolError::damaged(format!(
            "{}; this cannot be repaired",
            fault.what
        )));
    }
    if report.faults.is_empty() {
        return Ok(report);
    }
    let storage = &**storage;
    let (superblock, _) = read_superblock(storage)?;
    let mut loaded = load(storage, superblock.clone())?;
    let mut is_changed =
        !loaded.journal_faults.is_empty() || !image_faults(storage, &loaded)?.is_empty();
    let given_up = loaded.journal_faults.iter();
    let given_up = given_up
        .filter_map(|fault| Some(fault.lost.as_ref()?.first))
        .min();
    let mut evidence = Evidence::of(storage, &superblock, given_up)?;
    evidence.add_maps(&loaded);
    mend(&mut loaded, &mut |_, _, _| is_changed = true)?;
    if !is_changed {
        undo::save(
            storage,
            superblock.uuid,
            superblock.start.seq,
            superblock.open_epoch,
        )?;
        mend_copies(storage, &superblock)?;
        return Ok(report);
    }
    loaded.replay.next_disk = evidence.next_disk;
    let left = evidence.left_by(&loaded);
    keep(&mut loaded, &left);
    let mut space = Space::new();
    if let Some(fault) = derive(&loaded, &mut space)?.first() {
        return Err(PoolError::damaged(fault.to_string()));
    }
    let last_batch = last_batch(&loaded);
    let old = (Some(&evidence), OldJournal::Kept);
    rewrite(storage, loaded, &space, last_batch, old)?;
    Ok(report)
}

/// The last batch that the pool is known to have had.
pub(super) fn last_batch(loaded: &Loaded) -> u64 {
    loaded.journal.last_seq().max(loaded.journal.image_seq())
}

/// Mends what can be mended of what was loaded. Returns what is free; `said` is told of each fault.
///
/// # Errors
/// A fault that cannot be mended.
pub(super) fn mend(loaded: &mut Loaded, said: Said<'_>) -> Result<Space, PoolError> {
    let lost: Vec<EntryFault> = loaded
        .journal_faults
        .iter()
        .filter_map(|fault| fault.lost.as_ref())
        .flat_map(|given_up| given_away(loaded, &given_up.records))
        .collect();
    if !lost.is_empty() {
        let parts = lost.iter().flat_map(|fault| put(loaded, fault, ZEROS));
        let parts = join(parts.collect());
        let what = "clusters of what is kept have become others' since";
        said(what.to_owned(), Mend::Zeros, parts);
    }
    for round in 0..=ROUNDS_MAX {
        let mut space = Space::new();
        let mut faults = derive(loaded, &mut space)?;
        if faults.is_empty() {
            return Ok(space);
        }
        if round == ROUNDS_MAX || loaded.replay.generation == u32::MAX {
            for fault in &mut faults {
                fault.mend = Mend::Nothing;
            }
        }
        if let Some(hopeless) = faults.iter().find(|fault| fault.mend == Mend::Nothing) {
            let hopeless = PoolError::damaged(hopeless.to_string());
            for fault in &faults {
                said(fault.to_string(), fault.mend, Vec::new());
            }
            return Err(hopeless);
        }
        mend_all(loaded, &faults, said);
    }
    Err(PoolError::damaged("its faults hide one another"))
}

fn mend_all(loaded: &mut Loaded, faults: &[EntryFault], said: Said<'_>) {
    let mut shared = BTreeSet::new();
    for fault in faults {
        let lost = match fault.mend {
            Mend::Nothing => Vec::new(),
            Mend::Zeros => put(loaded, fault, ZEROS),
            Mend::Cut => put(loaded, fault, Entry::default()),
            Mend::Share => {
                shared.extend(share(loaded, fault));
                Vec::new()
            }
        };
        said(fault.to_string(), fault.mend, lost);
    }
    // As after a fork of each of them: what they have now may be shared.
    let ended = Generation(loaded.replay.generation);
    for item in loaded.catalogue.iter() {
        if shared.contains(&item.row.family) {
            item.volume.map.write().last_fork = ended;
        }
    }
    if !shared.is_empty() {
        loaded.replay.generation += 1;
    }
}

/// Puts `new` in the place of the entry that is at fault, in every disk that shares it and in which
/// it is at fault. What is lost by that.
fn put(loaded: &Loaded, fault: &EntryFault, new: Entry) -> Vec<Lost> {
    let Ok(named) = loaded.catalogue.find(&fault.disk) else {
        return Vec::new();
    };
    let lcn = Lcn(fault.lcn);
    let bad = named.volume.map.read().get(lcn);
    if bad == new {
        // A relative with the same entry came first.
        return Vec::new();
    }
    let size = loaded.superblock.cluster_size;
    let mut lost = Vec::new();
    let relatives = loaded.catalogue.iter();
    for item in relatives.filter(|item| item.row.family == named.row.family) {
        let mut map = item.volume.map.write();
        let is_inside = size.disk_offset(lcn) < map.size;
        if map.get(lcn) == bad && !(fault.mend == Mend::Cut && is_inside) {
            map.replay_entry(&loaded.replay, lcn, new);
            lost.push(Lost::clusters(&item.row.name, lcn, 1, size));
        }
    }
    lost
}

/// The family whose disks may share what is at fault. Entries that say they were born later than now
/// would still be taken for nobody else's: they are born now.
fn share(loaded: &Loaded, fault: &EntryFault) -> Option<DiskId> {
    let named = loaded.catalogue.find(&fault.disk).ok()?;
    let family = named.row.family;
    let now = loaded.replay.generation;
    let relatives = loaded.catalogue.iter();
    for item in relatives.filter(|item| item.row.family == family) {
        let mut map = item.volume.map.write();
        let entry = map.get(Lcn(fault.lcn));
        if entry.birth > now {
            let entry = Entry {
                birth: now,
                ..entry
            };
            map.replay_entry(&loaded.replay, Lcn(fault.lcn), entry);
        }
    }
    Some(family)
}
