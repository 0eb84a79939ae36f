//! Where an export may go: a file that is not there, or, with `--force`, one that nobody needs. A pool,
//! a file that somebody has open under a lock, and a base of the pool's disks are never replaced,
//! whatever the flags say.

use crate::cli::failure::Failure;
use crate::cli::open;
use crate::format::catalogue::BaseRef;
use crate::pool::Pool;
use crate::storage::{Access, FileStorage};
use crate::sys::file::{self, Kind};
use std::fs::Metadata;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// What to do instead.
const ELSEWHERE: &str = "choose another name for the export";

/// The file that an export becomes.
#[derive(Debug)]
pub(super) struct Target<'a> {
    file: &'a Path,
    /// What is there and is to be replaced: locked, so that nobody begins to need it meanwhile.
    replaced: Option<FileStorage>,
}

impl<'a> Target<'a> {
    /// Looks at what is there.
    ///
    /// # Errors
    /// It must not be written: it exists and `is_forced` is not said, or it is no regular file, a pool,
    /// or in use.
    pub(super) fn claim(file: &'a Path, is_forced: bool) -> Result<Self, Failure> {
        let shown = file.display();
        let replaced = match file::kind_of(file) {
            Err(_absent) => {
                open::check_directory(file)?;
                None
            }
            Ok(Kind::BlockDevice | Kind::Other) => {
                let what = "it is not a regular file";
                return Err(Failure::new("invalid", shown, what)
                    .hint("export to `-` and write standard output where you want it"));
            }
            Ok(Kind::Regular) if open::is_pool(file) => {
                let what = "it is a pool, which an export never replaces";
                return Err(Failure::new("exists", shown, what).hint(ELSEWHERE));
            }
            Ok(Kind::Regular) if is_forced => Some(lock(file)?),
            Ok(Kind::Regular) => {
                return Err(Failure::new("exists", shown, "it exists already")
                    .hint("choose another name, or say --force to replace it"));
            }
        };
        Ok(Self { file, replaced })
    }

    /// # Errors
    /// What is to be replaced is the base of a disk or snapshot in `pool`.
    pub(super) fn check_no_base(&self, pool: &Pool) -> Result<(), Failure> {
        let Some(replaced) = &self.replaced else {
            return Ok(());
        };
        let measured = replaced.metadata();
        let is = identity(&measured.map_err(|e| Failure::io(self.file, "look at", &e))?);
        let is_it = |base: &str| std::fs::metadata(base).is_ok_and(|stat| identity(&stat) == is);
        for item in pool.items() {
            let mut paths = item.row.base.iter().flat_map(BaseRef::paths);
            if paths.any(is_it) {
                let what = format!("it is the base of `{}`, or below it", item.row.name);
                return Err(Failure::new("in_use", self.file.display(), what).hint(ELSEWHERE));
            }
        }
        Ok(())
    }

    /// The file that is written until it is whole.
    pub(super) fn partial(&self) -> PathBuf {
        let mut name = self.file.as_os_str().to_owned();
        name.push(".partial");
        PathBuf::from(name)
    }

    /// Gives what was written its name, durably.
    ///
    /// # Errors
    /// Something else came to be there meanwhile, or the operating system refused.
    pub(super) fn put(self) -> Result<(), Failure> {
        let file = self.file;
        let putting = |e: &std::io::Error| Failure::io(file, "put the export in place", e);
        let is_as_it_was = match &self.replaced {
            None => true,
            Some(replaced) => {
                let now = std::fs::metadata(file).map_err(|e| putting(&e))?;
                identity(&replaced.metadata().map_err(|e| putting(&e))?) == identity(&now)
            }
        };
        if !is_as_it_was {
            return Err(Failure::new(
                "exists",
                file.display(),
                "it was replaced meanwhile",
            ));
        }
        let put = match self.replaced {
            None => file::rename_new(&self.partial(), file),
            Some(_) => std::fs::rename(self.partial(), file),
        };
        match put.and_then(|()| file::sync_parent(file)) {
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {
                let what = "somebody else made it meanwhile";
                Err(Failure::new("exists", file.display(), what).hint(ELSEWHERE))
            }
            put => put.map_err(|e| putting(&e)),
        }
    }
}

/// Which file it is, by whatever name.
fn identity(stat: &Metadata) -> (u64, u64) {
    (stat.dev(), stat.ino())
}

/// # Errors
/// Somebody has it open.
fn lock(file: &Path) -> Result<FileStorage, Failure> {
    FileStorage::open(file, Access::ReadWrite).map_err(|e| {
        let failure = Failure::file(&e);
        match failure.kind {
            "locked" => failure.hint(ELSEWHERE),
            _ => failure,
        }
    })
}
