//! Repairing a pool that nobody has open: what can be rebuilt is, in memory, and then all metadata is
//! written anew. What was there stays as it was until that is done.

use super::check::{Lost, Report, check};
use super::derive::{EntryFault, Mend, derive};
use super::error::PoolError;
use super::load::{Loaded, load, read_superblock};
use super::rewrite::rewrite;
use super::space::Space;
use super::volume::Map;
use crate::format::journal::Entry;
use crate::format::units::Lcn;
use crate::storage::Storage;
use crate::sync::Arc;

/// One fault may hide another; more often than this it is not worth going on.
const ROUNDS_MAX: usize = 4;

/// Repairs the pool in `storage`, which nobody else has open: superblock copies, a journal that
/// breaks off, entries that cannot be. What is lost by that is said by the faults in the report,
/// which is of the state before.
///
/// # Errors
/// The pool has a fault that cannot be repaired, or no space for its metadata to be written anew:
/// nothing was changed then. The store failed: run it again.
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
    let (superblock, _) = read_superblock(&**storage)?;
    superblock.check_writable()?;
    let loaded = load(&**storage, superblock)?;
    let space = mend(&loaded, &mut |_, _| ())?;
    let last_batch = last_batch(&loaded);
    let owner = "tidepool pool check --repair";
    rewrite(storage, loaded, space, last_batch, owner)?;
    Ok(report)
}

/// The last batch that the pool is known to have had.
pub(super) fn last_batch(loaded: &Loaded) -> u64 {
    loaded.journal.last_seq().max(loaded.journal.image_seq())
}

/// Mends what can be mended of what was loaded. Returns what is free; calls `said` with each fault
/// and what is lost by mending it.
///
/// # Errors
/// A fault that cannot be mended; `said` was told.
pub(super) fn mend(
    loaded: &Loaded,
    said: &mut dyn FnMut(&EntryFault, Vec<Lost>),
) -> Result<Space, PoolError> {
    for round in 0..=ROUNDS_MAX {
        let mut space = Space::new();
        let mut faults = derive(loaded, &mut space);
        if faults.is_empty() {
            return Ok(space);
        }
        if round == ROUNDS_MAX {
            for fault in &mut faults {
                fault.mend = Mend::Nothing;
            }
        }
        if let Some(hopeless) = faults.iter().find(|fault| fault.mend == Mend::Nothing) {
            let hopeless = PoolError::damaged(hopeless.to_string());
            for fault in &faults {
                said(fault, Vec::new());
            }
            return Err(hopeless);
        }
        for fault in &faults {
            let lost = mend_one(loaded, fault);
            said(fault, lost);
        }
    }
    Err(PoolError::damaged("its faults hide one another"))
}

/// Mends a fault in every disk that shares it. What is lost by that.
fn mend_one(loaded: &Loaded, fault: &EntryFault) -> Vec<Lost> {
    let Ok(named) = loaded.catalogue.find(&fault.disk) else {
        return Vec::new();
    };
    let zeros = Entry {
        zero: u16::MAX,
        ..Entry::default()
    };
    let bad = named.volume.map.read().get(Lcn(fault.lcn));
    if bad == zeros {
        // A relative with the same entry came first.
        return Vec::new();
    }
    let size = loaded.superblock.cluster_size;
    let mut lost = Vec::new();
    let relatives = loaded.catalogue.iter();
    for item in relatives.filter(|item| item.row.family == named.row.family) {
        let mut map = item.volume.map.write();
        match fault.mend {
            Mend::Nothing => {}
            Mend::Zeros if map.get(Lcn(fault.lcn)) == bad => {
                map.replay_entry(&loaded.replay, Lcn(fault.lcn), zeros);
                lost.push(Lost::clusters(&item.row.name, Lcn(fault.lcn), 1, size));
            }
            Mend::Zeros => {}
            Mend::Share => share(&mut map, loaded, fault),
        }
    }
    lost
}

/// The map takes nothing for its disk's alone where the fault is.
fn share(map: &mut Map, loaded: &Loaded, fault: &EntryFault) {
    let end = fault.lcn.saturating_add(fault.count);
    let birth_max = map.last_fork.0.min(loaded.replay.generation);
    let mut next = map.tree.next_leaf(fault.lcn / 64);
    while let Some(number) = next.filter(|number| *number <= (end - 1) / 64) {
        let lcns = (number * 64).max(fault.lcn)..(number * 64).saturating_add(64).min(end);
        for lcn in lcns.map(Lcn) {
            let entry = map.get(lcn);
            if entry.own != 0 && entry.birth > birth_max {
                let birth = birth_max;
                map.replay_entry(&loaded.replay, lcn, Entry { birth, ..entry });
            }
        }
        next = number
            .checked_add(1)
            .and_then(|from| map.tree.next_leaf(from));
    }
}
