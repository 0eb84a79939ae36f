//! `tidepool disk`: making, forking, changing, copying and removing disks.

mod change;
mod copy;
mod look;
mod rebase;
mod select;
mod show;
mod target;

use super::args::{ItemRef, OptionalSize, OtherRef};
use super::args::{parse_disk, parse_size, parse_size_or_none, parse_snapshot};
use super::failure::Failure;
use super::output::{Output, Reply};
use crate::format::catalogue::BaseFormat;
use clap::{ArgGroup, Args, Subcommand, ValueEnum};
use select::Wanted;
use std::path::PathBuf;

/// `tidepool disk ...`
#[derive(Debug, Subcommand)]
pub(super) enum DiskCommand {
    /// Make a disk: empty, or over a raw or qcow2 image that stays as it is.
    #[command(after_help = CREATE)]
    Create(Create),
    /// List the disks and snapshots of a pool.
    #[command(after_help = LS)]
    Ls(PoolPath),
    /// Show size, use and settings of a disk or snapshot.
    #[command(after_help = INFO)]
    Info(Item),
    /// Show which disk was forked from which.
    #[command(after_help = TREE)]
    Tree(PoolPath),
    /// Remove a disk or snapshot. Forks of it live on.
    #[command(after_help = RM)]
    Rm(Rm),
    /// Rename a disk, and its snapshots with it.
    #[command(after_help = RENAME)]
    Rename(Rename),
    /// Change the size of a disk.
    #[command(after_help = RESIZE)]
    Resize(Resize),
    /// Change the settings of a disk.
    #[command(after_help = SET)]
    Set(Set),
    /// Make disks that start as what another is now, in constant time.
    #[command(after_help = FORK)]
    Fork(Fork),
    /// Keep what a disk is now as a read-only snapshot.
    #[command(after_help = SNAPSHOT)]
    Snapshot(Snapshot),
    /// Make a disk what it was at a snapshot.
    #[command(after_help = ROLLBACK)]
    Rollback(Snapshot),
    /// Make the parent of a disk what the disk is, in constant time; or write it into its raw base.
    #[command(after_help = COMMIT)]
    Commit(Commit),
    /// Copy into the pool what a disk still reads from its base, and drop the base.
    #[command(after_help = FLATTEN)]
    Flatten(Flatten),
    /// Take a base that was moved, or put back from a copy, once its contents are compared.
    #[command(after_help = REBASE)]
    Rebase(Rebase),
    /// Copy a raw or qcow2 image into a new disk. Zeros take no space.
    #[command(after_help = IMPORT)]
    Import(Import),
    /// Copy a disk or snapshot out to a sparse image file.
    #[command(after_help = EXPORT)]
    Export(Export),
    /// Show in which ranges two disks of a pool differ.
    #[command(after_help = DIFF)]
    Diff(Diff),
    /// Show where the parts of a disk are.
    #[command(after_help = MAP)]
    Map(Item),
}

const CREATE: &str = "\
Examples:
  tidepool disk create vms.pool:scratch --size 10G
  tidepool disk create vms.pool:base --base debian.qcow2
  tidepool disk create vms.pool:ci --size 20G --base ci.raw --limit 5G --ephemeral";
const LS: &str = "\
Examples:
  tidepool disk ls vms.pool
  tidepool disk ls vms.pool -o json | jq -r '.disks[].name'";
const INFO: &str = "\
Examples:
  tidepool disk info vms.pool:vm1
  tidepool disk info vms.pool:vm1@monday -o json";
const TREE: &str = "\
Examples:
  tidepool disk tree vms.pool";
const RM: &str = "\
Examples:
  tidepool disk rm vms.pool:vm1
  tidepool disk rm vms.pool:vm1 --cascade
  tidepool disk rm 'vms.pool:ci-*' vms.pool:vm1@monday";
const RENAME: &str = "\
Examples:
  tidepool disk rename vms.pool:vm1 web1
  tidepool disk rename vms.pool:vm1@s vm1@monday";
const RESIZE: &str = "\
Examples:
  tidepool disk resize vms.pool:vm1 --size 20G
  tidepool disk resize vms.pool:vm1 --size 5G --shrink";
const SET: &str = "\
Examples:
  tidepool disk set vms.pool:vm1 --limit 5G --reserve 1G
  tidepool disk set vms.pool:vm1 --limit none --ephemeral true";
const FORK: &str = "\
Examples:
  tidepool disk fork vms.pool:base vm1
  tidepool disk fork vms.pool:vm1@monday vms.pool:vm2
  tidepool disk fork vms.pool:base vm -n 8        makes vm-1 to vm-8";
const SNAPSHOT: &str = "\
Examples:
  tidepool disk snapshot vms.pool:vm1@monday";
const ROLLBACK: &str = "\
Examples:
  tidepool disk rollback vms.pool:vm1@monday";

const COMMIT: &str = "\
Examples:
  tidepool disk commit vms.pool:vm1";
const FLATTEN: &str = "\
Examples:
  tidepool disk flatten vms.pool:vm1
  tidepool disk flatten vms.pool:vm1 --throttle 50M";
const REBASE: &str = "\
Examples:
  tidepool disk rebase vms.pool:web --base /images/debian.qcow2
  tidepool disk rebase vms.pool:web --accept        the file at the old path";
const IMPORT: &str = "\
Examples:
  tidepool disk import debian.qcow2 vms.pool:base
  tidepool disk import disk.img vms.pool:old --format raw
  zstdcat disk.img.zst | tidepool disk import - vms.pool:old";
const EXPORT: &str = "\
Examples:
  tidepool disk export vms.pool:vm1 vm1.raw
  tidepool disk export vms.pool:vm1@monday vm1.qcow2 --format qcow2
  tidepool disk export vms.pool:vm1 - | zstd > vm1.raw.zst";
const DIFF: &str = "\
Examples:
  tidepool disk diff vms.pool:base vm1
  tidepool disk diff vms.pool:vm1@monday vm1 --content -o json";
const MAP: &str = "\
Examples:
  tidepool disk map vms.pool:vm1
  tidepool disk map vms.pool:vm1 -o json | jq '.extents[] | select(.kind == \"data\")'";

/// A pool.
#[derive(Debug, Args)]
pub(super) struct PoolPath {
    /// Path of the pool.
    pool: PathBuf,
}

/// A disk or snapshot.
#[derive(Debug, Args)]
pub(super) struct Item {
    /// The disk or snapshot, POOL:NAME or POOL:NAME@SNAPSHOT.
    #[arg(value_name = "POOL:NAME")]
    item: ItemRef,
}

/// `disk create`
#[derive(Debug, Args)]
pub(super) struct Create {
    /// The disk to make, POOL:NAME.
    #[arg(value_name = "POOL:NAME", value_parser = parse_disk)]
    disk: ItemRef,
    /// Size of the disk; that of the base if left out.
    #[arg(long, value_parser = parse_size, required_unless_present = "base")]
    size: Option<u64>,
    /// What the disk reads as until it is written: an image that must not change from now on.
    #[arg(long, value_name = "FILE")]
    base: Option<PathBuf>,
    /// Format of the base; told from its contents if left out.
    #[arg(long, value_enum, requires = "base", value_name = "FORMAT")]
    base_format: Option<ImageFormat>,
    /// Most bytes of data it may hold of its own.
    #[arg(long, value_parser = parse_size, value_name = "SIZE")]
    limit: Option<u64>,
    /// Bytes of pool space kept for it.
    #[arg(long, value_parser = parse_size, value_name = "SIZE")]
    reserve: Option<u64>,
    /// For temporary data: flushes return at once, and a crash of the host may lose what was
    /// written (never mix it up).
    #[arg(long)]
    ephemeral: bool,
}

/// Format of an image file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ImageFormat {
    /// A flat image.
    Raw,
    /// QEMU's copy-on-write format.
    Qcow2,
}

impl From<ImageFormat> for BaseFormat {
    fn from(format: ImageFormat) -> Self {
        match format {
            ImageFormat::Raw => BaseFormat::Raw,
            ImageFormat::Qcow2 => BaseFormat::Qcow2,
        }
    }
}

/// `disk rm`
#[derive(Debug, Args)]
pub(super) struct Rm {
    /// Disks and snapshots of one pool, POOL:NAME or POOL:NAME@SNAPSHOT. Names may be patterns with `*`,
    /// `?` and `[...]`; quote them.
    #[arg(required = true, value_name = "POOL:NAME")]
    items: Vec<Wanted>,
    /// Remove its snapshots too.
    #[arg(long)]
    cascade: bool,
}

/// `disk rename`
#[derive(Debug, Args)]
pub(super) struct Rename {
    /// The disk or snapshot, POOL:NAME or POOL:NAME@SNAPSHOT.
    #[arg(value_name = "POOL:NAME")]
    item: ItemRef,
    /// Its new name, NAME or POOL:NAME.
    #[arg(value_name = "NEW_NAME")]
    new: OtherRef,
}

/// `disk resize`
#[derive(Debug, Args)]
pub(super) struct Resize {
    /// The disk, POOL:NAME.
    #[arg(value_name = "POOL:NAME", value_parser = parse_disk)]
    disk: ItemRef,
    /// Its new size.
    #[arg(long, value_parser = parse_size)]
    size: u64,
    /// Allow a smaller size; what is beyond it is lost.
    #[arg(long)]
    shrink: bool,
}

/// `disk set`
#[derive(Debug, Args)]
pub(super) struct Set {
    /// The disk, POOL:NAME.
    #[arg(value_name = "POOL:NAME", value_parser = parse_disk)]
    disk: ItemRef,
    /// Most bytes of data it may hold of its own, or `none`.
    #[arg(long, value_parser = parse_size_or_none, value_name = "SIZE|none")]
    limit: Option<OptionalSize>,
    /// Bytes of pool space kept for it, or `none`.
    #[arg(long, value_parser = parse_size_or_none, value_name = "SIZE|none")]
    reserve: Option<OptionalSize>,
    /// Whether flushes return at once.
    #[arg(long, value_name = "true|false")]
    ephemeral: Option<bool>,
}

/// `disk fork`
#[derive(Debug, Args)]
pub(super) struct Fork {
    /// What to fork: POOL:NAME or POOL:NAME@SNAPSHOT.
    #[arg(value_name = "POOL:NAME")]
    source: ItemRef,
    /// The new disk, NAME or POOL:NAME.
    #[arg(value_name = "NEW_NAME")]
    target: OtherRef,
    /// Make this many disks, NEW_NAME-1 and so on.
    #[arg(short = 'n', long, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    count: Option<u32>,
}

/// `disk snapshot`, `disk rollback`
#[derive(Debug, Args)]
pub(super) struct Snapshot {
    /// The snapshot, POOL:NAME@SNAPSHOT.
    #[arg(value_name = "POOL:NAME@SNAPSHOT", value_parser = parse_snapshot)]
    snapshot: ItemRef,
}

/// `disk commit`
#[derive(Debug, Args)]
pub(super) struct Commit {
    /// The disk whose parent or base becomes what it is, POOL:NAME.
    #[arg(value_name = "POOL:NAME", value_parser = parse_disk)]
    disk: ItemRef,
    /// Write into a base that is not what it was: to finish a commit that was interrupted.
    #[arg(long)]
    force: bool,
}

/// `disk flatten`
#[derive(Debug, Args)]
pub(super) struct Flatten {
    /// The disk, POOL:NAME.
    #[arg(value_name = "POOL:NAME", value_parser = parse_disk)]
    disk: ItemRef,
    /// Most bytes to look at in a second.
    #[arg(long, value_parser = parse_size, value_name = "SIZE")]
    throttle: Option<u64>,
}

/// `disk rebase`
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("new").required(true))]
pub(super) struct Rebase {
    /// A disk or snapshot with the base, POOL:NAME or POOL:NAME@SNAPSHOT. All others of the pool with
    /// the same base follow.
    #[arg(value_name = "POOL:NAME")]
    item: ItemRef,
    /// Where the base is now.
    #[arg(long, value_name = "FILE", group = "new")]
    base: Option<PathBuf>,
    /// Format of the base; that of the old one if left out.
    #[arg(long, value_enum, requires = "base", value_name = "FORMAT")]
    base_format: Option<ImageFormat>,
    /// Take what is at the old path now.
    #[arg(long, group = "new")]
    accept: bool,
    /// Take it without comparing what it holds.
    #[arg(long)]
    trust: bool,
    /// Change this disk or snapshot alone.
    #[arg(long)]
    only: bool,
}

/// `disk import`
#[derive(Debug, Args)]
pub(super) struct Import {
    /// The image; `-` for a flat one from standard input.
    file: PathBuf,
    /// The disk to make, POOL:NAME.
    #[arg(value_name = "POOL:NAME", value_parser = parse_disk)]
    disk: ItemRef,
    /// Format of the image; told from its contents if left out.
    #[arg(long, value_enum, value_name = "FORMAT")]
    format: Option<ImageFormat>,
}

/// `disk export`
#[derive(Debug, Args)]
pub(super) struct Export {
    /// The disk or snapshot, POOL:NAME or POOL:NAME@SNAPSHOT.
    #[arg(value_name = "POOL:NAME")]
    item: ItemRef,
    /// The image to make; `-` for standard output.
    file: PathBuf,
    /// Format of the image.
    #[arg(long, value_enum, default_value = "raw", value_name = "FORMAT")]
    format: ImageFormat,
    /// Replace a file that exists.
    #[arg(long)]
    force: bool,
}

/// `disk diff`
#[derive(Debug, Args)]
pub(super) struct Diff {
    /// A disk or snapshot, POOL:NAME or POOL:NAME@SNAPSHOT.
    #[arg(value_name = "A")]
    first: ItemRef,
    /// Another one of the same pool; the pool may be left out.
    #[arg(value_name = "B")]
    second: OtherRef,
    /// Read what may differ and compare its bytes: what was written twice alike is the same.
    #[arg(long)]
    content: bool,
}

/// Runs a command.
///
/// # Errors
/// What it failed at.
pub(super) fn execute(command: DiskCommand, output: Output) -> Result<Reply, Failure> {
    match command {
        DiskCommand::Create(args) => change::create(&args),
        DiskCommand::Ls(args) => show::list(&args.pool),
        DiskCommand::Info(args) => show::info(&args.item),
        DiskCommand::Tree(args) => show::tree(&args.pool),
        DiskCommand::Rm(args) => change::remove(&args),
        DiskCommand::Rename(args) => change::rename(&args),
        DiskCommand::Resize(args) => change::resize(&args),
        DiskCommand::Set(args) => change::set(&args),
        DiskCommand::Fork(args) => change::fork(&args),
        DiskCommand::Snapshot(args) => change::snapshot(&args.snapshot),
        DiskCommand::Rollback(args) => change::rollback(&args.snapshot),
        DiskCommand::Commit(args) => copy::commit(&args, output),
        DiskCommand::Flatten(args) => copy::flatten(&args, output),
        DiskCommand::Rebase(args) => rebase::rebase(&args, output),
        DiskCommand::Import(args) => copy::import(&args, output),
        DiskCommand::Export(args) => copy::export(&args, output),
        DiskCommand::Diff(args) => look::diff(&args),
        DiskCommand::Map(args) => look::map(&args),
    }
}
