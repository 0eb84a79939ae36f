//! `tidepool pool`: making, measuring and looking after pools.

mod inspect;

use super::args::parse_size;
use super::failure::Failure;
use super::human;
use super::open;
use super::output::{Output, Reply};
use super::progress::Progress;
use crate::cowdisk::{self, PoolUsage};
use crate::format::catalogue::RowKind;
use crate::format::units::ClusterSize;
use crate::pool::kept::KEPT_PREFIX;
use crate::pool::open::create as make_pool;
use crate::pool::{CreateOptions, Pool};
use crate::storage::FileStorage;
use crate::sys::file;
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// `tidepool pool ...`
#[derive(Debug, Subcommand)]
pub(super) enum PoolCommand {
    /// Make an empty pool: a sparse file that grows as it is used, or a whole block device.
    #[command(after_help = CREATE)]
    Create(Create),
    /// Show size, use and settings of a pool.
    #[command(after_help = INFO)]
    Info(Target),
    /// Read all metadata and name every fault.
    #[command(after_help = CHECK)]
    Check(Check),
    /// Print the metadata, a JSON object a line.
    #[command(after_help = DUMP)]
    Dump(Target),
    /// Make the metadata anew from a dump; data stays where it is.
    #[command(after_help = RESTORE)]
    Restore(Restore),
    /// Take a repair or restore back that nobody has written on since.
    #[command(after_help = UNDO)]
    Undo(Target),
    /// Change the most bytes a pool may grow to.
    #[command(after_help = RESIZE)]
    Resize(Resize),
    /// List pools: those named, or those in a directory.
    #[command(after_help = LS)]
    Ls(Ls),
    /// Give freed space back to the host.
    #[command(after_help = TRIM)]
    Trim(Target),
}

const CREATE: &str = "\
Examples:
  tidepool pool create vms.pool --size 100G
  tidepool pool create fast.pool --size 2T --cluster 128K
  tidepool pool create /dev/nvme1n1 --force";
const INFO: &str = "\
Examples:
  tidepool pool info vms.pool
  tidepool pool info vms.pool --output json";
const CHECK: &str = "\
Examples:
  tidepool pool check vms.pool
  tidepool pool check vms.pool --repair

Exit status 1 if there are faults, or some are left after --repair.";
const DUMP: &str = "\
Examples:
  tidepool pool dump vms.pool
  tidepool pool dump vms.pool | jq 'select(.kind == \"disk\") | .row'";
const RESTORE: &str = "\
Examples:
  tidepool pool dump vms.pool > vms.dump
  tidepool pool restore vms.pool --from vms.dump
  zstdcat vms.dump.zst | tidepool pool restore vms.pool --from -

What was changed since the dump was made is lost; where a disk overwrote its data since, it holds what
took its place. Where others may have written since, zeros take the place, and are listed; where that
is not known the dump is not restored unless --accept-unknown is said. `tidepool pool undo` takes it
back. If it is interrupted, run it again.";
const UNDO: &str = "\
Examples:
  tidepool pool check vms.pool --repair
  tidepool pool undo vms.pool

Of several repairs and restores, all are taken back that nobody opened the pool for writing after.";
const RESIZE: &str = "\
Examples:
  tidepool pool resize vms.pool --size 200G";
const LS: &str = "\
Examples:
  tidepool pool ls
  tidepool pool ls /var/lib/tidepool /dev/nvme1n1";
const TRIM: &str = "\
Examples:
  tidepool pool trim vms.pool";

/// A pool.
#[derive(Debug, Args)]
pub(super) struct Target {
    /// Path of the pool.
    pool: PathBuf,
}

/// `pool create`
#[derive(Debug, Args)]
pub(super) struct Create {
    /// Path of the pool: a file to be made, or a block device.
    pool: PathBuf,
    /// Most bytes it may grow to. A block device is used whole.
    #[arg(long, value_parser = parse_size, value_name = "SIZE")]
    size: Option<u64>,
    /// Cluster size, 16K to 1M, a power of two: the unit of allocation.
    #[arg(long, value_parser = parse_cluster, default_value = "64K", value_name = "SIZE")]
    cluster: ClusterSize,
    /// Use a block device, and lose everything on it.
    #[arg(long)]
    force: bool,
}

/// `pool check`
#[derive(Debug, Args)]
pub(super) struct Check {
    /// Path of the pool.
    pool: PathBuf,
    /// Repair what can be.
    #[arg(long)]
    repair: bool,
}

/// `pool restore`
#[derive(Debug, Args)]
pub(super) struct Restore {
    /// Path of the pool.
    pool: PathBuf,
    /// The dump; `-` for standard input.
    #[arg(long, value_name = "FILE")]
    from: PathBuf,
    /// Restore over a pool that has no faults, or that is not the one that was dumped.
    #[arg(long)]
    force: bool,
    /// Restore although it is not known what became of the disks' clusters since the dump: they may
    /// hold what others wrote.
    #[arg(long)]
    accept_unknown: bool,
    /// Make a new pool of the metadata alone, in which all data reads as zeros.
    #[arg(long)]
    metadata_only: bool,
}

/// `pool resize`
#[derive(Debug, Args)]
pub(super) struct Resize {
    /// Path of the pool.
    pool: PathBuf,
    /// The new size. It can shrink as far as nothing is in the way.
    #[arg(long, value_parser = parse_size)]
    size: u64,
}

/// `pool ls`
#[derive(Debug, Args)]
pub(super) struct Ls {
    /// Pools, and directories to look for pools in; the current directory if none is given.
    paths: Vec<PathBuf>,
}

fn parse_cluster(text: &str) -> Result<ClusterSize, String> {
    let bytes = parse_size(text)?;
    ClusterSize::from_bytes(bytes)
        .ok_or_else(|| "a cluster has 16K to 1M bytes, a power of two".to_owned())
}

/// A file is made anew, always.
const OTHER_NAME: &str = "choose a name that nothing has yet";

/// Runs a command.
///
/// # Errors
/// What it failed at.
pub(super) fn execute(command: PoolCommand, output: Output) -> Result<Reply, Failure> {
    match command {
        PoolCommand::Create(create) => run_create(&create),
        PoolCommand::Info(target) => open::reading(&target.pool, |pool| info(&target.pool, pool)),
        PoolCommand::Check(args) => inspect::check(&args),
        PoolCommand::Dump(args) => inspect::dump(&args),
        PoolCommand::Restore(args) => inspect::restore(&args),
        PoolCommand::Undo(target) => inspect::undo(&target),
        PoolCommand::Resize(args) => resize(&args),
        PoolCommand::Ls(ls) => list(ls),
        PoolCommand::Trim(target) => trim(&target.pool, output),
    }
}

fn run_create(create: &Create) -> Result<Reply, Failure> {
    let path = &create.pool;
    let kind = file::kind_of(path).ok();
    let size = match (kind, create.size) {
        (None, Some(size)) => size,
        (None, None) => return Err(Failure::usage("a pool that is a file needs --size")),
        (Some(file::Kind::BlockDevice), size) => device_size(create, size)?,
        (Some(file::Kind::Regular), _) => {
            return Err(
                Failure::new("exists", path.display(), "it exists already").hint(OTHER_NAME)
            );
        }
        (Some(file::Kind::Other), _) => {
            let what = "it exists already, and is neither a file nor a block device";
            return Err(Failure::new("exists", path.display(), what).hint(OTHER_NAME));
        }
    };
    if kind.is_none() {
        open::check_directory(path)?;
    }
    let options = CreateOptions {
        cluster_size: create.cluster,
        ..CreateOptions::new(size)
    };
    let len = options.size / options.cluster_size.bytes() * options.cluster_size.bytes();
    let storage = FileStorage::create_new(path, len).map_err(|e| open::refusal(path, &e))?;
    if let Err(error) = make_pool(&storage, &options) {
        if kind.is_none() {
            // It was made above, and is of no use to anyone.
            drop(std::fs::remove_file(path));
        }
        return Err(Failure::pool(path.display(), &error));
    }
    let uuid = uuid::Uuid::from_bytes(options.uuid);
    let text = format!(
        "{}: a pool of {} in clusters of {}\n",
        path.display(),
        human::bytes(len),
        human::bytes(create.cluster.bytes())
    );
    let json = json!({
        "pool": path,
        "uuid": uuid.to_string(),
        "capacity_bytes": len,
        "cluster_bytes": create.cluster.bytes(),
    });
    Ok(Reply::new(json, text))
}

fn device_size(create: &Create, size: Option<u64>) -> Result<u64, Failure> {
    let path = &create.pool;
    if !create.force {
        let what = "it is a block device, and making a pool on it loses everything it holds";
        return Err(Failure::new("exists", path.display(), what).hint("say --force to do that"));
    }
    let device = file::open(path, file::Mode::Read)
        .and_then(|device| file::device_len(&device))
        .map_err(|e| Failure::io(path, "measure the device", &e))?;
    match size {
        Some(size) if size > device => {
            let what = format!("the device has {} only", human::exact(device));
            Err(Failure::new("invalid", path.display(), what)
                .hint("leave --size out to use it whole"))
        }
        Some(size) => Ok(size),
        None => Ok(device),
    }
}

fn info(path: &Path, pool: &Pool) -> Result<Reply, Failure> {
    let usage = cowdisk::usage(pool).map_err(|e| Failure::disk(path.display(), &e))?;
    let json = describe(path, pool, &usage);
    let text = human::fields(&[
        ("pool", path.display().to_string()),
        ("uuid", uuid::Uuid::from_bytes(pool.uuid()).to_string()),
        ("capacity", human::exact(usage.capacity)),
        ("used", human::exact(usage.used)),
        ("free", human::exact(usage.free)),
        ("reserved", human::exact(usage.reserved)),
        ("metadata", human::exact(usage.metadata)),
        ("reclaimable", human::exact(usage.reclaimable)),
        ("given up", human::exact(given_up(&usage))),
        ("host-allocated", human::exact(usage.host_allocated)),
        (
            "host-free",
            host_free(path).map_or("as the device".to_owned(), human::exact),
        ),
        ("cluster size", human::exact(pool.cluster_size().bytes())),
        ("disks", count(&usage, RowKind::Disk).to_string()),
        ("snapshots", count(&usage, RowKind::Snapshot).to_string()),
        (
            "closed cleanly",
            if pool.superblock().is_clean {
                "yes"
            } else {
                "no"
            }
            .to_owned(),
        ),
    ]);
    Ok(Reply::new(json, text))
}

/// Bytes the pool's file system has left; `None` if it is a device, or does not say.
fn host_free(path: &Path) -> Option<u64> {
    file::host_free(path).ok().flatten()
}

/// What repairs have given up, and kept.
fn given_up(usage: &PoolUsage) -> u64 {
    let kept = usage.disks.iter();
    let kept = kept.filter(|(item, _)| item.row.name.starts_with(KEPT_PREFIX));
    kept.map(|(_, usage)| usage.used).sum()
}

fn count(usage: &PoolUsage, kind: RowKind) -> usize {
    let rows = usage.disks.iter().map(|(item, _)| &item.row);
    rows.filter(|row| row.kind == kind).count()
}

fn describe(path: &Path, pool: &Pool, usage: &PoolUsage) -> Value {
    json!({
        "pool": path,
        "uuid": uuid::Uuid::from_bytes(pool.uuid()).to_string(),
        "capacity_bytes": usage.capacity,
        "used_bytes": usage.used,
        "free_bytes": usage.free,
        "reserved_bytes": usage.reserved,
        "metadata_bytes": usage.metadata,
        "reclaimable_bytes": usage.reclaimable,
        "host_allocated_bytes": usage.host_allocated,
        "host_free_bytes": host_free(path),
        "cluster_bytes": pool.cluster_size().bytes(),
        "disks": count(usage, RowKind::Disk),
        "snapshots": count(usage, RowKind::Snapshot),
        "is_clean": pool.superblock().is_clean,
        "given_up_bytes": given_up(usage),
    })
}

fn list(ls: Ls) -> Result<Reply, Failure> {
    let mut paths = ls.paths;
    if paths.is_empty() {
        paths.push(PathBuf::from("."));
    }
    let mut pools = Vec::new();
    for path in paths {
        if path.is_dir() {
            let reading = |e: std::io::Error| Failure::io(&path, "read the directory", &e);
            for entry in std::fs::read_dir(&path).map_err(reading)? {
                let found = entry.map_err(reading)?.path();
                let found = found.strip_prefix("./").unwrap_or(&found).to_owned();
                if open::is_pool(&found) {
                    pools.push(found);
                }
            }
        } else {
            pools.push(path);
        }
    }
    pools.sort();
    let mut rows = Vec::new();
    let mut values = Vec::new();
    for path in &pools {
        let (row, value) = list_one(path)?;
        rows.push(row);
        values.push(value);
    }
    let heading = [
        "POOL",
        ">CAPACITY",
        ">USED",
        ">FREE",
        ">HOST",
        ">DISKS",
        ">SNAPSHOTS",
        "STATE",
    ];
    Ok(Reply::new(
        json!({ "pools": values }),
        human::table(&heading, &rows),
    ))
}

/// A line about one pool. One that is in use, or does not open, is listed with the reason.
fn list_one(path: &Path) -> Result<(Vec<String>, Value), Failure> {
    let described = open::reading(path, |pool| {
        let usage = cowdisk::usage(pool).map_err(|e| Failure::disk(path.display(), &e))?;
        let mut value = describe(path, pool, &usage);
        value["state"] = json!("idle");
        let row = vec![
            path.display().to_string(),
            human::bytes(usage.capacity),
            human::bytes(usage.used),
            human::bytes(usage.free),
            human::bytes(usage.host_allocated),
            count(&usage, RowKind::Disk).to_string(),
            count(&usage, RowKind::Snapshot).to_string(),
            "idle".to_owned(),
        ];
        Ok((row, value))
    });
    match described {
        Err(failure) if open::is_pool(path) => {
            let mut row = vec![path.display().to_string()];
            row.extend(std::iter::repeat_n("-".to_owned(), 6));
            let note = open::owner_text(path);
            let state = match failure.kind {
                "locked" if note.is_empty() => "in use".to_owned(),
                "locked" => format!("in use: {note}"),
                _ => failure.to_string(),
            };
            row.push(state);
            let value =
                json!({ "pool": path, "state": failure.kind, "message": failure.to_string() });
            Ok((row, value))
        }
        other => other,
    }
}

fn resize(args: &Resize) -> Result<Reply, Failure> {
    let path = &args.pool;
    open::writing(path, "started by tidepool pool resize", |pool| {
        let old = pool.superblock().pool_len();
        let resized = pool.resize(args.size);
        resized.map_err(|e| Failure::pool(path.display(), &e))?;
        let new = pool.superblock().pool_len();
        let text = format!(
            "{}: now {}, was {}\n",
            path.display(),
            human::bytes(new),
            human::bytes(old)
        );
        let json = json!({ "pool": path, "old_capacity_bytes": old, "capacity_bytes": new });
        Ok(Reply::new(json, text))
    })
}

fn trim(path: &Path, output: Output) -> Result<Reply, Failure> {
    let mut progress = Progress::new(output, "trimming");
    let result = open::writing(path, "started by tidepool pool trim", |pool| {
        let failed = |e: &crate::pool::PoolError| Failure::pool(path.display(), e);
        let returned = pool.trim_with(&mut |done, total| progress.update(done, total));
        let returned = returned.map_err(|e| failed(&e))?;
        let allocated = pool.storage().allocated();
        let allocated = allocated.map_err(|e| Failure::io(path, "measure", &e))?;
        let text = format!(
            "{}: gave {} back to the host, which holds {} for it now\n",
            path.display(),
            human::bytes(returned),
            human::bytes(allocated)
        );
        let json =
            json!({ "pool": path, "returned_bytes": returned, "host_allocated_bytes": allocated });
        Ok(Reply::new(json, text))
    });
    progress.finish();
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clusters_are_powers_of_two_in_range() {
        parse_cluster("64K").expect("the default");
        for text in ["8K", "2M", "65K", "x"] {
            parse_cluster(text).expect_err(text);
        }
    }
}
