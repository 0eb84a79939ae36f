//! Checking a pool that nobody has open: every fault by name, what [`super::repair`] would do about
//! it, and what is lost by that.

use super::derive::Mend;
use super::error::PoolError;
use super::image_read;
use super::kept::KEPT_PREFIX;
use super::load::{JournalFault, Loaded, check_len, load, read_superblock, superblock_copies};
use super::lost::{Lost, changed_rows, said_by};
use super::repair::{last_batch, mend};
use super::rewrite::first_batch;
use crate::format::catalogue::RowKind;
use crate::format::superblock::{SUPERBLOCK_AT, Superblock};
use crate::storage::Storage;

/// Parts of disks that are listed of what is left of a damaged batch.
const DAMAGED_SHOWN_MAX: usize = 20;

/// Something wrong with a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// What, and where.
    pub what: String,
    /// What a repair does about it; `None` if it can do nothing.
    pub remedy: Option<String>,
    /// What is lost by that, as far as the pool says, under the names that disks have today.
    pub lost: Vec<Lost>,
    /// More may be lost than that: part of what would say it cannot be read.
    pub may_miss: bool,
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
            may_miss: false,
        });
    }
}

/// Reads all metadata of the pool in `storage`, and names every fault. Changes nothing.
///
/// # Errors
/// The store failed. Faults are not errors.
pub fn check(storage: &dyn Storage) -> Result<Report, PoolError> {
    let mut report = Report::default();
    if let Some(superblock) = check_superblocks(storage, &mut report)? {
        let writable = superblock.check_writable();
        check_contents(storage, superblock, &mut report)?;
        if let Err(e) = writable {
            report.remarks.push(format!("{e}; to repair, too"));
            for fault in &mut report.faults {
                fault.remedy = None;
            }
        }
    }
    Ok(report)
}

fn check_contents(
    storage: &dyn Storage,
    superblock: Superblock,
    report: &mut Report,
) -> Result<(), PoolError> {
    report.is_clean = superblock.is_clean;
    report.cluster_bytes = superblock.cluster_size.bytes();
    let mut loaded = match check_len(storage, &superblock).and_then(|()| load(storage, superblock))
    {
        Ok(loaded) => loaded,
        Err(e @ PoolError::Storage { .. }) => return Err(e),
        Err(e) => {
            report.fault(plain(&e), None);
            return Ok(());
        }
    };
    check_image(storage, &loaded, report)?;
    for fault in &loaded.journal_faults {
        check_journal(&loaded, fault, report);
    }
    let mended = mend(&mut loaded, &mut |what, mend, lost| {
        let remedy = match mend {
            Mend::Nothing => None,
            Mend::Zeros => Some("zeros take its place"),
            Mend::Cut => Some("it is taken away"),
            Mend::Share => Some("it is copied before it is written again; nothing is lost"),
        };
        report.fault(what, remedy);
        if let Some(last) = report.faults.last_mut() {
            last.lost = lost;
        }
    });
    let Ok(space) = mended else {
        return Ok(());
    };
    if !report.faults.is_empty() {
        let first = first_batch(storage, &loaded.superblock, last_batch(&loaded));
        if let Err(e) = first {
            report.fault(plain(&e), None);
        }
    }
    check_catalogue(&loaded, report);
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
    Ok(())
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
        for (at, copy) in SUPERBLOCK_AT.into_iter().zip(superblock_copies(storage)?) {
            match copy {
                Err(e) => {
                    let remedy = "written anew from the other copy";
                    report.fault(format!("copy at byte {at}: {e}"), Some(remedy));
                }
                Ok(copy) if copy.generation < superblock.generation => {
                    let what = "out of date, as a crash between the two leaves it";
                    let remark = format!("superblock copy at byte {at} is {what}");
                    report.remarks.push(remark);
                }
                Ok(_) => {}
            }
        }
    }
    Ok(Some(superblock))
}

/// What of the image is damaged although it could be loaded: the next fault might not be made up for.
fn check_image(
    storage: &dyn Storage,
    loaded: &Loaded,
    report: &mut Report,
) -> Result<(), PoolError> {
    for what in image_faults(storage, loaded)? {
        let remedy = "the image is written anew; nothing is lost";
        report.fault(format!("checkpoint image: {what}"), Some(remedy));
    }
    Ok(())
}

/// What of the image was damaged when it was loaded, and what would make up for the next damage.
pub(super) fn image_faults(
    storage: &dyn Storage,
    loaded: &Loaded,
) -> Result<Vec<String>, PoolError> {
    let mut faults = loaded.image_faults.clone();
    if faults.is_empty()
        && let Some(mut extents) = image_read::extents(storage, &loaded.superblock)?
    {
        extents.check_parity(storage)?;
        faults = extents.faults;
    }
    Ok(faults)
}

/// Where the journal breaks off, and what is lost from there on.
fn check_journal(loaded: &Loaded, fault: &JournalFault, report: &mut Report) {
    let Some(given_up) = &fault.lost else {
        let remedy = "the checkpoint image has what it said; nothing is lost";
        report.fault(plain(&fault.error), Some(remedy));
        return;
    };
    let remedy = "keeps everything before that batch; what it and later ones said is given up, and \
                  its clusters are kept as a snapshot `lost+found@N`";
    report.fault(plain(&fault.error), Some(remedy));
    if let Some(last) = report.faults.last_mut() {
        last.lost = said_by(loaded, &given_up.records);
        last.may_miss = !given_up.is_whole;
    }
    report
        .remarks
        .extend(changed_rows(loaded, &given_up.records));
    for lost in said_by(loaded, &given_up.damaged)
        .iter()
        .take(DAMAGED_SHOWN_MAX)
    {
        let last = lost.offset.saturating_add(lost.len.saturating_sub(1));
        report.remarks.push(format!(
            "by what is left of batch {}, it was about `{}`, bytes {} to {last}",
            given_up.first, lost.disk, lost.offset
        ));
    }
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
            let what = match item.row.name.starts_with(KEPT_PREFIX) {
                true => "is what a repair gave up; remove it when nothing of it is wanted",
                false => what,
            };
            report
                .remarks
                .push(format!("snapshot `{}` {what}", item.row.name));
        }
    }
}
