//! Checking a pool that nobody has open, and repairing what can be rebuilt.

use super::Pool;
use super::derive::{EntryFault, derive};
use super::error::PoolError;
use super::load::{Loaded, check_len, load, read_superblock};
use super::open::OpenOptions;
use super::space::Space;
use crate::format::catalogue::RowKind;
use crate::format::journal::Entry;
use crate::format::superblock::{SUPERBLOCK_AT, SUPERBLOCK_LEN, Superblock};
use crate::format::units::{Generation, Lcn};
use crate::storage::{AlignedBuf, Storage};
use crate::sync::Arc;

/// Something wrong with a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// What, and where.
    pub what: String,
    /// What [`repair`] does about it; `None` if it can do nothing.
    pub remedy: Option<String>,
}

/// What a check found.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// Empty for a pool that is well.
    pub faults: Vec<Fault>,
    /// Disks and snapshots found.
    pub disks: usize,
    /// Clusters that hold data of disks.
    pub used_clusters: u32,
    /// Clusters that are free.
    pub free_clusters: u32,
    /// Bytes in a cluster.
    pub cluster_bytes: u64,
    /// Closed in good order by whoever had it last.
    pub is_clean: bool,
}

impl Report {
    fn fault(&mut self, what: impl Into<String>, remedy: Option<&str>) {
        self.faults.push(Fault {
            what: what.into(),
            remedy: remedy.map(str::to_owned),
        });
    }
}

/// Reads all metadata of the pool in `storage`, and names every fault. Changes nothing.
///
/// # Errors
/// The store failed. Faults are not errors.
pub fn check(storage: &dyn Storage) -> Result<Report, PoolError> {
    let mut report = Report::default();
    let Some(superblock) = check_superblocks(storage, &mut report)? else {
        return Ok(report);
    };
    report.is_clean = superblock.is_clean;
    report.cluster_bytes = superblock.cluster_size.bytes();
    let loaded = match check_len(storage, &superblock).and_then(|()| load(storage, superblock)) {
        Ok(loaded) => loaded,
        Err(e @ PoolError::Storage { .. }) => return Err(e),
        Err(e) => {
            report.fault(e.to_string(), None);
            return Ok(report);
        }
    };
    if let Some(fault) = &loaded.journal_fault {
        let remedy = "keeps everything before that batch, and drops what came after";
        report.fault(fault.to_string(), Some(remedy));
    }
    let mut space = Space::new();
    for fault in derive(&loaded, &mut space) {
        let remedy = "zeros take the place of that cluster of the disk";
        report.fault(fault.to_string(), fault.is_mendable.then_some(remedy));
    }
    check_catalogue(&loaded, &mut report);
    let usage = space.usage();
    report.disks = loaded.catalogue.iter().count();
    report.free_clusters = usage.clean + usage.written;
    let image: u32 = loaded
        .image_clusters
        .iter()
        .map(|run| run.end - run.start)
        .sum();
    let size = loaded.superblock.cluster_size;
    let metadata = size
        .count(loaded.superblock.metadata_end())
        .unwrap_or(u32::MAX);
    report.used_clusters = loaded
        .superblock
        .cluster_count
        .saturating_sub(metadata)
        .saturating_sub(image)
        .saturating_sub(report.free_clusters);
    Ok(report)
}

/// Both copies of the superblock; the one in force, if any.
fn check_superblocks(
    storage: &dyn Storage,
    report: &mut Report,
) -> Result<Option<Superblock>, PoolError> {
    let (superblock, differ) = match read_superblock(storage) {
        Ok(found) => found,
        Err(e @ PoolError::Storage { .. }) => return Err(e),
        Err(e) => {
            report.fault(e.to_string(), None);
            return Ok(None);
        }
    };
    if differ {
        for at in SUPERBLOCK_AT {
            let mut bytes = AlignedBuf::new(SUPERBLOCK_LEN);
            storage
                .read_at(&mut bytes, at)
                .map_err(PoolError::storage("reading the superblock"))?;
            let remedy = Some("written anew from the other copy");
            match Superblock::decode(&bytes) {
                Err(e) => report.fault(format!("copy at byte {at}: {e}"), remedy),
                Ok(copy) if copy.generation < superblock.generation => {
                    report.fault(
                        format!("superblock copy at byte {at} is out of date"),
                        remedy,
                    );
                }
                Ok(_) => {}
            }
        }
    }
    Ok(Some(superblock))
}

fn check_catalogue(loaded: &Loaded, report: &mut Report) {
    for item in loaded
        .catalogue
        .iter()
        .filter(|item| item.row.kind == RowKind::Snapshot)
    {
        let disk = item.row.name.split('@').next().unwrap_or_default();
        if loaded.catalogue.find(disk).is_err() {
            let what = format!("snapshot `{}` has no disk `{disk}`", item.row.name);
            report.fault(what, Some("it stays; fork it to get a disk"));
        }
    }
}

/// Repairs what can be rebuilt in the pool in `storage`, which nobody else has open: superblock
/// copies, a journal that breaks off, entries that cannot be. What is lost by that is said by the
/// faults in the report, which is of the state before.
///
/// # Errors
/// The store failed, or the pool has a fault that cannot be repaired; nothing was changed then.
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
    let loaded = load(&**storage, superblock)?;
    let lost = derive(&loaded, &mut Space::new());
    replace_entries(&loaded, &lost);
    let mut space = Space::new();
    if let Some(fault) = derive(&loaded, &mut space).first() {
        return Err(PoolError::damaged(format!(
            "{fault}; this cannot be repaired"
        )));
    }
    loaded.journal.settle_last(&**storage)?;
    loaded.journal.erase_rest(&**storage)?;
    let options = OpenOptions {
        owner: "tidepool pool check --repair".to_owned(),
        ..OpenOptions::default()
    };
    let pool = Pool::assemble(Arc::clone(storage), loaded, space, &options);
    pool.begin_epoch(&options.owner)?;
    for item in pool.items() {
        let mut map = item.volume.map.write();
        pool.list_changes(&item.volume, &mut map);
    }
    pool.close()?;
    Ok(report)
}

/// Zeros take the place of entries that cannot be, in every disk that has them (leaves are shared);
/// they are marked as changed, for the journal.
fn replace_entries(loaded: &Loaded, lost: &[EntryFault]) {
    let zeros = Entry {
        zero: u16::MAX,
        ..Entry::default()
    };
    for fault in lost {
        let lcn = Lcn(fault.lcn);
        let Ok(named) = loaded.catalogue.find(&fault.disk) else {
            continue;
        };
        let bad = named.volume.map.read().get(lcn);
        for item in loaded.catalogue.iter() {
            let mut map = item.volume.map.write();
            if bad != zeros && map.get(lcn) == bad {
                map.replay_dirty_entry(&loaded.replay, lcn, zeros);
            }
        }
    }
}

impl super::volume::Map {
    /// As replay, but the entry is put into the next batch.
    fn replay_dirty_entry(&mut self, replay: &super::load::Replay, lcn: Lcn, entry: Entry) {
        self.replay_entry(replay, lcn, entry);
        self.changed = Generation(replay.generation);
        self.mark_dirty(&replay.counts, lcn);
    }
}
