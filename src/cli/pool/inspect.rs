//! Commands that work on the metadata itself: check, dump and restore. They open the pool's file, not the
//! pool, which may be damaged.

use super::{Check, Restore, Target};
use crate::cli::failure::Failure;
use crate::cli::output::{self, Reply};
use crate::cli::{human, open};
use crate::pool::check::{self, Fault, Report};
use crate::pool::dump::dump as dump_pool;
use crate::pool::load::read_superblock;
use crate::pool::lost::Lost;
use crate::pool::restore::{Dump, Unknown};
use crate::pool::{repair, undo};
use crate::storage::{Access, FileStorage, Storage};
use crate::sync::Arc;
use crate::sys::file;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

/// Longest line of a dump, bytes: rows are the longest.
const LINE_LEN_MAX: u64 = 1 << 20;

/// Parts of disks that are listed for a fault.
const LOST_SHOWN_MAX: usize = 20;

fn storage(path: &Path, access: Access) -> Result<Arc<dyn Storage>, Failure> {
    let storage = FileStorage::open(path, access).map_err(|e| open::refusal(path, &e))?;
    Ok(Arc::new(storage))
}

pub(super) fn check(args: &Check) -> Result<Reply, Failure> {
    let path = &args.pool;
    let access = if args.repair {
        Access::ReadWrite
    } else {
        Access::ReadOnly
    };
    let storage = storage(path, access)?;
    let failed = |e| Failure::pool(path.display(), &e);
    let before = check::check(&*storage).map_err(failed)?;
    if !args.repair || before.faults.is_empty() {
        return Ok(report(path, &before, &before, false));
    }
    repair::repair(&storage).map_err(failed)?;
    let after = check::check(&*storage).map_err(failed)?;
    Ok(report(path, &before, &after, true))
}

/// What was found, and what is left of it.
fn report(path: &Path, before: &Report, after: &Report, is_repaired: bool) -> Reply {
    let used = u64::from(after.used_clusters) * after.cluster_bytes;
    let free = u64::from(after.free_clusters) * after.cluster_bytes;
    let mut text = String::new();
    for fault in &before.faults {
        let remedy = match (&fault.remedy, is_repaired) {
            (None, _) => "this cannot be repaired".to_owned(),
            (Some(remedy), true) => format!("repaired: {remedy}"),
            (Some(remedy), false) => format!("--repair: {remedy}"),
        };
        text.push_str(&format!("fault: {}\n  {remedy}\n", fault.what));
        text.push_str(&lost(fault));
    }
    let new = after
        .remarks
        .iter()
        .filter(|remark| !before.remarks.contains(remark));
    let remarks: Vec<&String> = before.remarks.iter().chain(new).collect();
    for remark in &remarks {
        text.push_str(&format!("note: {remark}\n"));
    }
    if is_repaired {
        let shown = path.display();
        text.push_str(&format!(
            "`tidepool pool undo {shown}` takes the repair back, until the pool is opened for writing\n"
        ));
    }
    let shown = path.display();
    text.push_str(&match after.faults.len() {
        0 => format!(
            "{shown}: no faults; {} disks and snapshots, {} used, {} free\n",
            after.disks,
            human::bytes(used),
            human::bytes(free)
        ),
        1 => format!("{shown}: 1 fault\n"),
        count => format!("{shown}: {count} faults\n"),
    });
    let faults = before.faults.iter();
    let faults: Vec<Value> = faults
        .map(|fault| {
            json!({
                "what": fault.what, "remedy": fault.remedy, "lost": lost_json(&fault.lost),
                "lost_may_miss": fault.may_miss,
            })
        })
        .collect();
    let json = json!({
        "pool": path,
        "faults": faults,
        "remarks": remarks,
        "faults_left": after.faults.len(),
        "is_repaired": is_repaired,
        "is_clean": before.is_clean,
        "disks": after.disks,
        "used_bytes": used,
        "free_bytes": free,
    });
    Reply {
        is_failure: !after.faults.is_empty(),
        ..Reply::new(json, text)
    }
}

fn lost_json(lost: &[Lost]) -> Vec<Value> {
    let part = |lost: &Lost| json!({ "disk": lost.disk, "offset": lost.offset, "bytes": lost.len });
    lost.iter().map(part).collect()
}

/// What a repair gives up.
fn lost(fault: &Fault) -> String {
    let mut text = lost_parts(&fault.lost);
    if fault.may_miss {
        text.push_str("  lost: perhaps more, which only what cannot be read would name\n");
    }
    text
}

/// A line for each part.
fn lost_parts(lost: &[Lost]) -> String {
    let mut text = String::new();
    for Lost { disk, offset, len } in lost.iter().take(LOST_SHOWN_MAX) {
        let last = offset.saturating_add(len.saturating_sub(1));
        text.push_str(&format!("  lost: `{disk}`, bytes {offset} to {last}\n"));
    }
    if lost.len() > LOST_SHOWN_MAX {
        let more = lost.len() - LOST_SHOWN_MAX;
        text.push_str(&format!(
            "  lost: {more} more parts (--output json has them)\n"
        ));
    }
    text
}

pub(super) fn dump(args: &Target) -> Result<Reply, Failure> {
    let storage = storage(&args.pool, Access::ReadOnly)?;
    let mut printed = Ok(());
    let dumped = dump_pool(&*storage, &mut |line| {
        if printed.is_ok() {
            printed = output::print(&format!("{line}\n"));
        }
    });
    printed.map_err(|e| Failure::new("io", "standard output", e))?;
    dumped.map_err(|e| Failure::pool(args.pool.display(), &e))?;
    Ok(Reply::silent())
}

pub(super) fn restore(args: &Restore) -> Result<Reply, Failure> {
    let path = &args.pool;
    let dump = read_dump(&args.from)?;
    let is_new = !path.exists();
    let unknown = match is_new || args.accept_unknown {
        true => Unknown::Accepted,
        false => Unknown::Refused,
    };
    let storage: Arc<dyn Storage> = if is_new {
        create_empty(args, &dump)?
    } else {
        let storage = storage(path, Access::ReadWrite)?;
        if args.metadata_only {
            let what = "it is there, and its data stays where it is";
            return Err(Failure::new("exists", path.display(), what)
                .hint("leave --metadata-only out, or name a pool that is not there"));
        }
        if !args.force {
            refuse_if_better(args, &*storage, &dump)?;
        }
        storage
    };
    let restored = dump
        .restore(&storage, unknown)
        .map_err(|e| Failure::pool(path.display(), &e))?;
    let shown = path.display();
    let mut text = String::new();
    if let (false, Some(why)) = (is_new, &restored.why_unknown) {
        text.push_str(&format!(
            "note: {why}: data that others wrote since may be in the place of what the dump says\n"
        ));
    }
    if !restored.lost.is_empty() {
        text.push_str("note: others may have written there since, so these parts are zeros now\n");
    }
    text.push_str(&lost_parts(&restored.lost));
    if is_new {
        text.push_str("note: all data reads as zeros: only the metadata is restored\n");
    }
    text.push_str(&format!(
        "{shown}: restored, with {} disks and snapshots\n",
        restored.disks
    ));
    if undo::is_possible(&*storage).unwrap_or(false) {
        text.push_str(&format!(
            "`tidepool pool undo {shown}` takes that back, until the pool is opened for writing\n"
        ));
    }
    let json = json!({
        "pool": path, "disks": restored.disks, "lost": lost_json(&restored.lost),
        "unknown": restored.why_unknown.filter(|_| !is_new), "is_metadata_only": is_new,
    });
    Ok(Reply::new(json, text))
}

/// A file for a pool that is not there. Its disks will hold zeros: not without being told to.
fn create_empty(args: &Restore, dump: &Dump) -> Result<Arc<dyn Storage>, Failure> {
    let path = &args.pool;
    if !args.metadata_only {
        let what = "there is no such pool, and a dump has no data";
        return Err(Failure::new("not_found", path.display(), what).hint(
            "name the pool that was dumped, or a copy of it; or say --metadata-only for a new pool \
             whose disks hold zeros",
        ));
    }
    let made = FileStorage::create_new(path, dump.pool_len());
    Ok(Arc::new(made.map_err(|e| open::refusal(path, &e))?))
}

pub(super) fn undo(target: &Target) -> Result<Reply, Failure> {
    let path = &target.pool;
    let storage = storage(path, Access::ReadWrite)?;
    undo::undo(&*storage).map_err(|e| Failure::pool(path.display(), &e))?;
    let shown = path.display();
    let text = format!("{shown}: its metadata is as it was before the repair or restore\n");
    Ok(Reply::new(json!({ "pool": path }), text))
}

/// A dump takes a pool back in time: not without being told to where that is no gain.
fn refuse_if_better(args: &Restore, storage: &dyn Storage, dump: &Dump) -> Result<(), Failure> {
    let path = &args.pool;
    let refuse = |what: &str| {
        Err(Failure::new("exists", path.display(), what)
            .hint("say --force to restore the dump all the same"))
    };
    // What cannot be read is nothing to lose.
    let Ok((superblock, _)) = read_superblock(storage) else {
        return Ok(());
    };
    if Some(superblock.uuid) != dump.uuid() {
        return refuse("it is another pool than the one that was dumped");
    }
    let report = check::check(storage).map_err(|e| Failure::pool(path.display(), &e))?;
    if report.faults.is_empty() {
        return refuse("it has no faults, and would lose what was changed since the dump");
    }
    Ok(())
}

fn read_dump(path: &Path) -> Result<Dump, Failure> {
    let reading = |e: &std::io::Error| Failure::io(path, "read the dump", e);
    let mut reader: Box<dyn BufRead> = if path == Path::new("-") {
        Box::new(std::io::stdin().lock())
    } else {
        let file = file::open(path, file::Mode::Read).map_err(|e| reading(&e))?;
        Box::new(BufReader::new(file))
    };
    let mut dump = Dump::default();
    let mut line = String::new();
    for number in 1_u64.. {
        line.clear();
        let read = (&mut reader).take(LINE_LEN_MAX).read_line(&mut line);
        if read.map_err(|e| reading(&e))? == 0 {
            break;
        }
        dump.line(&line).map_err(|e| {
            let place = format!("{}, line {number}", path.display());
            Failure::pool(place, &e)
        })?;
    }
    Ok(dump)
}
