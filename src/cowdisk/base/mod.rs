//! Base images: read-only raw or qcow2 files outside the pool, locked against writers, and refused
//! when they are not what they were.

use super::error::DiskError;
use crate::format::catalogue::{BaseFormat, BaseRef};
use crate::format::units::{SECTOR, bytes_of, len_of};
use crate::storage::{Access, FileStorage, Storage};
use crate::sync::global::Mutex;
use crate::sync::{Arc, Weak};
use imago::file::File as ImagoFile;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatDriverBuilder, Mapping, PermissiveImplicitOpenGate};
use std::fs::Metadata;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// An open base image. Shared by all disks over it.
#[derive(Debug)]
pub struct Base {
    reference: BaseRef,
    len: u64,
    /// Read for raw bases; for qcow2 it holds the lock.
    file: FileStorage,
    qcow2: Option<Qcow2Reader>,
}

/// The qcow2 reader of `imago`. One reader at a time: it keeps caches.
struct Qcow2Reader(Mutex<FormatAccess<ImagoFile>>);

impl std::fmt::Debug for Qcow2Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Qcow2Reader")
    }
}

/// Bases that are open, so that a thousand forks share one descriptor and one cache.
static OPEN: Mutex<Vec<Weak<Base>>> = Mutex::new(Vec::new());

impl Base {
    /// What `path` looks like now, as a base of `format`.
    ///
    /// # Errors
    /// It cannot be looked at, or is not a file.
    pub fn examine(path: &Path, format: BaseFormat) -> Result<BaseRef, DiskError> {
        let shown = path.display().to_string();
        let fault = |e: io::Error| DiskError::Base {
            path: shown.clone(),
            what: e.to_string(),
        };
        let path = path.canonicalize().map_err(fault)?;
        let metadata = std::fs::metadata(&path).map_err(fault)?;
        let text = path.to_str().ok_or_else(|| DiskError::Base {
            path: shown.clone(),
            what: "its path is not UTF-8; rename it".to_owned(),
        })?;
        Ok(reference_to(text, format, &metadata))
    }

    /// Opens `path` to become a base. What it holds, and what it is known by, is durable from here
    /// on: written a moment ago, a power cut could take both back, and the disk with them.
    ///
    /// # Errors
    /// As [`Base::open`], or it is a device: nothing tells whether that was written to meanwhile.
    pub fn adopt(path: &Path, format: BaseFormat) -> Result<Arc<Base>, DiskError> {
        let base = Self::open(&Self::examine(path, format)?)?;
        let fault = |what: String| DiskError::Base {
            path: base.reference.path.clone(),
            what,
        };
        if base.file.is_block_device() {
            let what = "a device cannot be a base, for nothing shows that it was changed; \
                        import it instead";
            return Err(fault(what.to_owned()));
        }
        let synced = base.file.sync_all();
        synced.map_err(|e| fault(format!("it cannot be made durable: {e}")))?;
        Ok(base)
    }

    /// Opens the base `reference` names, or finds it open.
    ///
    /// # Errors
    /// It is missing, in use by a writer, or not what it was when it became a base.
    pub fn open(reference: &BaseRef) -> Result<Arc<Base>, DiskError> {
        let fault = |what: String| DiskError::Base {
            path: reference.path.clone(),
            what,
        };
        let path = Path::new(&reference.path);
        check_same(reference, &Self::examine(path, reference.format)?)?;
        let mut open = OPEN.lock();
        open.retain(|base| base.strong_count() > 0);
        let shared = open
            .iter()
            .filter_map(Weak::upgrade)
            .find(|base| is_same(&base.reference, reference));
        if let Some(base) = shared {
            return Ok(base);
        }
        let file =
            FileStorage::open_image(path, Access::ReadOnly).map_err(|e| fault(e.to_string()))?;
        // What counts is what was opened, now that it is locked; it was looked at before because
        // that costs less, and to say what is wrong with the path.
        let metadata = file.metadata().map_err(|e| fault(e.to_string()))?;
        let opened = reference_to(&reference.path, reference.format, &metadata);
        check_same(reference, &opened)?;
        let (qcow2, len) = match reference.format {
            BaseFormat::Raw => {
                let len = file.len().map_err(|e| fault(e.to_string()))?;
                (None, len)
            }
            BaseFormat::Qcow2 => {
                let reader =
                    open_qcow2(path).map_err(|e| fault(format!("not readable as qcow2: {e}")))?;
                // It was opened by its path once more.
                check_same(reference, &Self::examine(path, reference.format)?)?;
                let len = reader.size();
                (Some(Qcow2Reader(Mutex::new(reader))), len)
            }
        };
        let base = Arc::new(Base {
            reference: reference.clone(),
            len,
            file,
            qcow2,
        });
        open.push(Arc::downgrade(&base));
        Ok(base)
    }

    /// Bytes of the virtual disk in it, as they are; it reads as zeros after that.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// [`Base::len`] in whole sectors.
    #[must_use]
    pub fn disk_len(&self) -> u64 {
        self.len.next_multiple_of(SECTOR)
    }

    /// What identifies it.
    #[must_use]
    pub fn reference(&self) -> &BaseRef {
        &self.reference
    }

    /// Fills `buf` from byte `offset`, with zeros beyond the end. Blocks.
    ///
    /// # Errors
    /// What the file system or the qcow2 reader said.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let inside = self.len.saturating_sub(offset).min(bytes_of(buf.len()));
        let (data, zeros) = buf.split_at_mut(len_of(inside));
        zeros.fill(0);
        if data.is_empty() {
            return Ok(());
        }
        match &self.qcow2 {
            None => self.file.read_at(data, offset),
            Some(reader) => reader.0.lock().read(data, offset),
        }
    }

    /// The descriptor a ring may read itself, within [`Base::len`], if the base is raw.
    #[must_use]
    pub fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.qcow2 {
            None => self.file.as_fd(),
            Some(_) => None,
        }
    }

    /// Where data may be, at or after `offset`: `(start, end)` in bytes.
    ///
    /// # Errors
    /// What the file system or the qcow2 reader said.
    pub fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        let Some(reader) = &self.qcow2 else {
            return self.file.next_data(offset);
        };
        let reader = reader.0.lock();
        let mut at = offset;
        while at < self.len {
            let (mapping, len) = reader.get_mapping(at, self.len - at)?;
            if !matches!(mapping, Mapping::Zero { .. }) {
                return Ok(Some((at, at + len)));
            }
            // An empty mapping would be a fault of the reader's, and no reason to go in a ring.
            at += len.max(SECTOR);
        }
        Ok(None)
    }
}

fn reference_to(path: &str, format: BaseFormat, metadata: &Metadata) -> BaseRef {
    let nanoseconds =
        |seconds: i64, rest: i64| seconds.saturating_mul(1_000_000_000).saturating_add(rest);
    BaseRef {
        path: path.to_owned(),
        format,
        dev: metadata.dev(),
        ino: metadata.ino(),
        file_len: metadata.len(),
        mtime_ns: nanoseconds(metadata.mtime(), metadata.mtime_nsec()),
        ctime_ns: nanoseconds(metadata.ctime(), metadata.ctime_nsec()),
    }
}

/// Whether both are one image with the same contents. Left out are what changes without them: the
/// inode's own time, with every link to it, and the number of the device, which many file systems get
/// anew each time they are mounted.
pub(super) fn is_same(a: &BaseRef, b: &BaseRef) -> bool {
    (&a.path, a.format) == (&b.path, b.format) && identity(a) == identity(b)
}

/// What tells an image from others on its file system, and from itself with other contents.
pub(super) fn identity(of: &BaseRef) -> (u64, u64, i64) {
    (of.ino, of.file_len, of.mtime_ns)
}

/// `Err` if a base is `now` something else than it was.
fn check_same(was: &BaseRef, now: &BaseRef) -> Result<(), DiskError> {
    if is_same(was, now) {
        return Ok(());
    }
    Err(DiskError::Base {
        path: was.path.clone(),
        what: format!(
            "it has changed since it became a base ({} bytes, was {}); put the original back, or \
             make the disks anew",
            now.file_len, was.file_len
        ),
    })
}

fn open_qcow2(path: &Path) -> io::Result<FormatAccess<ImagoFile>> {
    // Backing files are opened as the image names them: whoever names a base trusts it.
    let qcow2 = Qcow2::<ImagoFile>::builder_path(path)
        .write(false)
        .open(PermissiveImplicitOpenGate::default())?;
    Ok(FormatAccess::new(qcow2))
}
