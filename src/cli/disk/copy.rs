//! Commands that move data: import, export, flatten, commit.

use super::change::{guess_format, with_pool};
use super::target::Target;
use super::{Commit, Export, Flatten, ImageFormat, Import};
use crate::cli::args::ItemRef;
use crate::cli::failure::Failure;
use crate::cli::interrupt::Interrupt;
use crate::cli::output::{Output, Reply};
use crate::cli::progress::Progress;
use crate::cli::{human, open};
use crate::cowdisk::{
    self, Base, Disk, DiskError, Interrupted, NewDisk, Qcow2Sink, RawSink, Sink, StreamSink,
    check_stream,
};
use crate::format::catalogue::{BaseFormat, RowKind, check_name};
use crate::pool::Pool;
use crate::pool::catalogue::Catalogue;
use crate::storage::{Access, FileStorage, OpenError};
use crate::sync::Arc;
use serde_json::json;
use std::io::{self, Read};
use std::path::Path;

/// Long work as its user sees it: how far it has come, and that it can be stopped.
pub(super) struct Work {
    progress: Progress,
    interrupt: Option<Interrupt>,
}

impl Work {
    /// Begins `what`; `is_caught` if a signal is to stop it in good order.
    pub(super) fn begin(output: Output, what: &str, is_caught: bool) -> Self {
        // First: what shows the progress may start a thread.
        let interrupt = is_caught.then(Interrupt::catch);
        let progress = Progress::new(output, what);
        Self {
            progress,
            interrupt,
        }
    }

    /// `done` of `total` bytes; whether to go on.
    pub(super) fn step(&mut self, done: u64, total: u64) -> Result<(), Interrupted> {
        self.progress.update(done, total);
        self.interrupt.as_ref().map_or(Ok(()), Interrupt::check)
    }

    /// It is over; `after` says what an interruption means.
    pub(super) fn end<T>(self, result: Result<T, Failure>, after: &str) -> Result<T, Failure> {
        self.progress.finish();
        result.map_err(|failure| match self.interrupt {
            Some(interrupt) if failure.kind == "interrupted" => {
                interrupt.explain(failure).hint(after)
            }
            Some(_) | None => failure,
        })
    }
}

/// What a copy says when it is done.
fn copied(
    item: &ItemRef,
    file: &Path,
    format: BaseFormat,
    (size, moved): (u64, u64),
    done: &str,
) -> Reply {
    let json = json!({
        "pool": item.pool,
        "name": item.name,
        "file": file,
        "format": format,
        "size_bytes": size,
        "data_bytes": moved,
    });
    let (size, moved) = (human::bytes(size), human::bytes(moved));
    Reply::new(json, format!("{item}: {size} {done}, {moved} of it data\n"))
}

pub(super) fn import(args: &Import, output: Output) -> Result<Reply, Failure> {
    let (file, disk) = (&args.file, &args.disk);
    let is_stream = file.as_os_str() == "-";
    let format = match args.format {
        Some(ImageFormat::Qcow2) if is_stream => {
            let what = "a qcow2 image cannot be read from standard input";
            return Err(Failure::usage(what).hint("save it to a file, and import that"));
        }
        Some(format) => format.into(),
        None if is_stream => BaseFormat::Raw,
        None => guess_format(file)?,
    };
    // Visible under its name only when it is whole.
    let partial = format!("{}.partial", disk.name);
    check_name(&partial, RowKind::Disk).map_err(Failure::usage)?;
    let mut work = Work::begin(output, "importing", true);
    let result = with_pool(disk, "import", |pool| {
        // Whatever has this name later is ours, and goes if it is not finished.
        pool.with_catalogue(|all| {
            all.check_free(&disk.name)
                .and_then(|()| all.check_free(&partial))
        })?;
        let copied = match is_stream {
            true => import_stdin(pool, &partial, args.format.is_some(), &mut work),
            false => import_image(pool, &partial, (file, format), &mut work),
        };
        let copied = copied.and_then(|copied| {
            cowdisk::rename(pool, &partial, &disk.name)?;
            Ok(copied)
        });
        if copied.is_err() {
            // The first error says more than a second would.
            drop(cowdisk::remove(pool, &partial, true));
        }
        copied
    });
    let sizes = work.end(result, "nothing of it is left in the pool");
    let sizes = sizes.map_err(|failure| match failure.kind {
        "exists" if failure.what.contains(&partial) => failure.hint(format!(
            "an import was killed: `tidepool disk rm {disk}.partial` removes what it left"
        )),
        _ => failure,
    })?;
    Ok(copied(disk, file, format, sizes, "imported"))
}

/// Copies an image into the new disk `name`; its size, and how much of it is data.
fn import_image(
    pool: &Arc<Pool>,
    name: &str,
    (file, format): (&Path, BaseFormat),
    work: &mut Work,
) -> Result<(u64, u64), DiskError> {
    let image = Base::open(&Base::examine(file, format)?)?;
    let size = image.disk_len();
    cowdisk::create(pool, &NewDisk::empty(name, size))?;
    let disk = Disk::open(pool, name)?;
    let moved = cowdisk::import(&image, &disk, &mut |done, total| work.step(done, total))?;
    Ok((size, moved))
}

/// As [`import_image`], from standard input. `is_said`: that it is a flat image.
fn import_stdin(
    pool: &Arc<Pool>,
    name: &str,
    is_said: bool,
    work: &mut Work,
) -> Result<(u64, u64), DiskError> {
    let mut input = io::stdin().lock();
    let mut head = Vec::new();
    let read = (&mut input).take(HEAD_LEN).read_to_end(&mut head);
    read.map_err(|source| DiskError::Io {
        action: "reading the image",
        source,
    })?;
    if !is_said {
        check_stream(&head)?;
    }
    cowdisk::create(pool, &NewDisk::empty(name, STREAM_SIZE))?;
    let disk = Disk::open(pool, name)?;
    let mut all = io::Cursor::new(head).chain(input);
    let (size, moved) =
        cowdisk::import_stream(&mut all, &disk, &mut |done, total| work.step(done, total))?;
    drop(disk);
    cowdisk::resize(pool, name, size, true)?;
    Ok((size, moved))
}

/// Bytes of a stream that tell what it is.
const HEAD_LEN: u64 = 512;
/// Size of a disk that is made from a stream, until more has come.
const STREAM_SIZE: u64 = 1 << 20;

pub(super) fn export(args: &Export, output: Output) -> Result<Reply, Failure> {
    let (item, file) = (&args.item, &args.file);
    let is_stdout = file.as_os_str() == "-";
    if is_stdout && args.format == ImageFormat::Qcow2 {
        return Err(Failure::usage(
            "only --format raw can be written to standard output",
        ));
    }
    let target = match is_stdout {
        true => None,
        false => Some(Target::claim(file, args.force)?),
    };
    // A stream leaves nothing behind that would have to be cleaned up.
    let mut work = Work::begin(output, "exporting", !is_stdout);
    let result = open::reading(&item.pool, |pool| {
        target
            .as_ref()
            .map_or(Ok(()), |target| target.check_no_base(pool))?;
        let disk = Disk::open(pool, &item.name).map_err(|e| Failure::disk(item, &e))?;
        let moved = match target {
            None => export_to_stdout(&disk, args, &mut work),
            Some(target) => export_to_file(&disk, args, target, &mut work),
        };
        Ok((disk.size(), moved?))
    });
    let sizes = work.end(result, "nothing of it is left beside the file")?;
    if is_stdout {
        return Ok(Reply::silent());
    }
    let done = format!("exported to {}", file.display());
    Ok(copied(item, file, args.format.into(), sizes, &done))
}

fn export_to_stdout(disk: &Disk, args: &Export, work: &mut Work) -> Result<u64, Failure> {
    let stdout = io::BufWriter::with_capacity(1 << 20, io::stdout().lock());
    let mut show = |done, total| work.step(done, total);
    cowdisk::export(disk, &mut StreamSink::new(stdout), &mut show)
        .map_err(|e| failed(&args.item, &args.file, &e))
}

/// Visible under its name only when it is whole.
fn export_to_file(
    disk: &Disk,
    args: &Export,
    target: Target<'_>,
    work: &mut Work,
) -> Result<u64, Failure> {
    let (item, file) = (&args.item, &args.file);
    let partial = target.partial();
    let mut sink = sink_for(&partial, args.format, disk.size())?;
    let mut show = |done, total| work.step(done, total);
    let moved = cowdisk::export(disk, &mut *sink, &mut show);
    let moved = moved.map_err(|e| failed(item, file, &e));
    let moved = moved.and_then(|moved| target.put().map(|()| moved));
    if moved.is_err() {
        // Made above, and of no use to anyone.
        drop(std::fs::remove_file(&partial));
    }
    moved
}

fn sink_for(path: &Path, format: ImageFormat, size: u64) -> Result<Box<dyn Sink>, Failure> {
    let sink: Result<Box<dyn Sink>, OpenError> = match format {
        ImageFormat::Raw => RawSink::create(path, size).map(|sink| Box::new(sink) as Box<dyn Sink>),
        ImageFormat::Qcow2 => {
            Qcow2Sink::create(path, size).map(|sink| Box::new(sink) as Box<dyn Sink>)
        }
    };
    sink.map_err(|e| {
        if e.kind() == io::ErrorKind::AlreadyExists {
            left_over(path)
        } else {
            Failure::file(&e)
        }
    })
}

/// `partial` is there already: another export is running, or was killed.
fn left_over(partial: &Path) -> Failure {
    let shown = partial.display();
    match FileStorage::open(partial, Access::ReadOnly) {
        Err(OpenError::Locked { pid, .. }) => {
            let by = pid.map_or("another process".to_owned(), |pid| format!("process {pid}"));
            let what = format!("{by} is exporting to it");
            Failure::new("locked", shown, what).hint("wait for it, or choose another name")
        }
        Ok(_) | Err(_) => {
            let what = "an export was killed, and left this";
            Failure::new("exists", &shown, what)
                .hint(format!("`rm '{shown}'` removes it; or choose another name"))
        }
    }
}

/// Out of space is the file's file system here, not the pool.
fn failed(item: &ItemRef, file: &Path, error: &DiskError) -> Failure {
    match error {
        DiskError::HostFull => {
            Failure::new("no_space", file.display(), "no space left for the export")
        }
        DiskError::NoSpace
        | DiskError::OutOfRange { .. }
        | DiskError::ReadOnly { .. }
        | DiskError::Deleted { .. }
        | DiskError::LimitReached { .. }
        | DiskError::Base { .. }
        | DiskError::BaseChanged { .. }
        | DiskError::Io { .. }
        | DiskError::Interrupted
        | DiskError::Pool(_) => Failure::disk(item, error),
    }
}

pub(super) fn flatten(args: &Flatten, output: Output) -> Result<Reply, Failure> {
    let disk = &args.disk;
    let mut work = Work::begin(output, "flattening", true);
    let result = with_pool(disk, "flatten", |pool| {
        cowdisk::flatten(pool, &disk.name, &mut |done, total| {
            work.step(done, total)?;
            if let Some(rate) = args.throttle {
                work.progress.throttle(rate);
            }
            Ok(())
        })
    });
    let moved = work.end(result, "the same command goes on from there")?;
    let json = json!({ "pool": disk.pool, "name": disk.name, "data_bytes": moved });
    let text = format!(
        "{disk}: independent of its base, which had {} of data\n",
        human::bytes(moved)
    );
    Ok(Reply::new(json, text))
}

pub(super) fn commit(args: &Commit, output: Output) -> Result<Reply, Failure> {
    let item = &args.disk;
    let mut work = Work::begin(output, "committing", true);
    let result = with_pool(item, "commit", |pool| {
        let row = pool.find(&item.name)?.row;
        let Some(parent) = row.parent else {
            let mut show = |done, total| work.step(done, total);
            let moved = cowdisk::commit_to_base(pool, &item.name, args.force, &mut show)?;
            let base = row.base.map(|base| base.path).unwrap_or_default();
            return Ok((None, base, moved));
        };
        cowdisk::commit(pool, &item.name)?;
        let name = |all: &Catalogue| all.get(parent).map(|item| item.row.name.clone());
        let parent = pool.with_catalogue(name).unwrap_or_default();
        Ok((Some(parent.clone()), parent, 0))
    });
    let after = "the base is half written: the same command with --force finishes it";
    let (parent, target, moved) = work.end(result, after)?;
    let base = match parent {
        None => Some(&target),
        Some(_) => None,
    };
    let json = json!({
        "pool": item.pool,
        "name": item.name,
        "parent": parent,
        "base": base,
        "data_bytes": moved,
    });
    Ok(Reply::new(
        json,
        format!("{item}: committed into {target}\n"),
    ))
}
