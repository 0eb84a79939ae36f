//! Checking a pool that nobody has open: every fault by name, what [`super::repair`] would do about
//! it, and what is lost by that.

use super::derive::Mend;
use super::error::PoolError;
use super::load::{JournalFault, Loaded, check_len, load, read_superblock};
use super::repair::{last_batch, mend};
use super::rewrite::batch_after;
use crate::format::catalogue::RowKind;
use crate::format::journal::Record;
use crate::format::superblock::{SUPERBLOCK_AT, SUPERBLOCK_LEN, Superblock};
use crate::format::units::{ClusterSize, DiskId, Lcn};
use crate::storage::{AlignedBuf, Storage};

/// Something wrong with a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// What, and where.
    pub what: String,
    /// What a repair does about it; `None` if it can do nothing.
    pub remedy: Option<String>,
    /// What is lost by that, as far as the pool says.
    pub lost: Vec<Lost>,
}

/// A part of a disk whose contents, or last changes, a repair gives up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lost {
    /// The disk or snapshot.
    pub disk: String,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

impl Lost {
    /// `count` clusters of `disk` from `first`.
    pub(super) fn clusters(disk: &str, first: Lcn, count: u32, size: ClusterSize) -> Self {
        Self {
            disk: disk.to_owned(),
            offset: size.disk_offset(first),
            len: u64::from(count) * size.bytes(),
        }
    }
}

/// What a check found.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// Empty for a pool that is well.
    pub faults: Vec<Fault>,
    /// What is odd and harmless.
    pub remarks: Vec<String>,
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
            lost: Vec::new(),
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
            report.fault(plain(&e), None);
            return Ok(report);
        }
    };
    for fault in &loaded.journal_faults {
        check_journal(storage, &loaded, fault, &mut report)?;
    }
    let mended = mend(&loaded, &mut |fault, lost| {
        let remedy = match fault.mend {
            Mend::Nothing => None,
            Mend::Zeros => Some("zeros take its place"),
            Mend::Share => Some("it is copied before it is written again; nothing is lost"),
        };
        report.fault(fault.to_string(), remedy);
        if let Some(last) = report.faults.last_mut() {
            last.lost = lost;
        }
    });
    let Ok(space) = mended else {
        return Ok(report);
    };
    if let (false, Err(e)) = (report.faults.is_empty(), batch_after(last_batch(&loaded))) {
        report.fault(plain(&e), None);
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

/// What is wrong, without the advice to check the pool.
fn plain(error: &PoolError) -> String {
    if let PoolError::Damaged { what } = error {
        what.clone()
    } else {
        error.to_string()
    }
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
            report.fault(plain(&e), None);
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

/// Where the journal breaks off, and what is lost from there on.
fn check_journal(
    storage: &dyn Storage,
    loaded: &Loaded,
    fault: &JournalFault,
    report: &mut Report,
) -> Result<(), PoolError> {
    let Some(seq) = fault.stopped_before else {
        let remedy = "the checkpoint image has what it said; nothing is lost";
        report.fault(plain(&fault.error), Some(remedy));
        return Ok(());
    };
    let remedy = "keeps everything before that batch; what it and later ones said is lost";
    report.fault(plain(&fault.error), Some(remedy));
    let records = loaded.journal.intact_from(storage, seq)?;
    if let Some(last) = report.faults.last_mut() {
        last.lost = said_by(loaded, &records);
    }
    Ok(())
}

/// The parts of disks that records are about, neighbours together.
fn said_by(loaded: &Loaded, records: &[Record]) -> Vec<Lost> {
    let size = loaded.superblock.cluster_size;
    let name = |id: DiskId| {
        let new = records.iter().rev().find_map(|record| match record {
            Record::Row(row) if row.id == id => Some(row.name.clone()),
            Record::Row(_)
            | Record::Map { .. }
            | Record::Unmap { .. }
            | Record::Fork { .. }
            | Record::Delete { .. } => None,
        });
        let known = loaded.catalogue.get(id).map(|item| item.row.name.clone());
        known.or(new).unwrap_or_else(|| format!("disk {id}"))
    };
    let mut lost: Vec<Lost> = Vec::new();
    for record in records {
        let (disk, first, count) = match record {
            Record::Map { disk, lcn, .. } => (*disk, *lcn, 1),
            Record::Unmap {
                disk, first, count, ..
            } => (*disk, *first, *count),
            // All of a disk that is new, or became the copy of another.
            Record::Row(row) if loaded.catalogue.get(row.id).is_none() => {
                (row.id, Lcn(0), size.count(row.size).unwrap_or(u32::MAX))
            }
            Record::Fork { to, .. } => {
                let item = loaded.catalogue.get(*to);
                let len = item.map_or(0, |item| item.row.size);
                (*to, Lcn(0), size.count(len).unwrap_or(u32::MAX))
            }
            Record::Row(_) | Record::Delete { .. } => continue,
        };
        lost.push(Lost::clusters(&name(disk), first, count, size));
    }
    lost.sort_by(|one, other| (&one.disk, one.offset).cmp(&(&other.disk, other.offset)));
    lost.dedup_by(|next, one| {
        let end = one.offset.saturating_add(one.len);
        let is_joined = one.disk == next.disk && next.offset <= end;
        if is_joined {
            one.len = one
                .len
                .max((next.offset - one.offset).saturating_add(next.len));
        }
        is_joined
    });
    lost
}

fn check_catalogue(loaded: &Loaded, report: &mut Report) {
    for item in loaded
        .catalogue
        .iter()
        .filter(|item| item.row.kind == RowKind::Snapshot)
    {
        let disk = item.row.name.split('@').next().unwrap_or_default();
        if loaded.catalogue.find(disk).is_err() {
            let what = "has no disk; fork it to get one";
            report
                .remarks
                .push(format!("snapshot `{}` {what}", item.row.name));
        }
    }
}
