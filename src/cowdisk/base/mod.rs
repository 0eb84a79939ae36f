//! Base images: read-only raw or qcow2 images outside the pool. Every file one is read from is
//! locked against writers, and the base is refused when one of them is not what it was.
//!
//! ```text
//! Base: one image, or a chain of them, from the top down
//!   Layer: raw, or qcow2 over the next     --- where is this byte of the disk?
//!     ImageFile: locked; its length when it was opened
//! ```
//!
//! Readers do not wait for one another, but for a compressed cluster that another one is decoding.
//! What is read is what was recorded: a file that was cut meanwhile fails the read.

mod cache;
mod chain;
mod file;
mod identity;
mod probe;
mod qcow2;
pub(super) mod samples;

pub(super) use identity::{identity, is_same};
pub use probe::{check_stream, probe};

use super::error::DiskError;
use crate::format::catalogue::{BaseFormat, BaseRef};
use crate::format::qcow2::Place;
use crate::format::units::{SECTOR, bytes_of, len_of};
use crate::storage::Storage;
use crate::sync::global::Mutex;
use crate::sync::{Arc, Weak};
use cache::Cache;
use chain::Layer;
use file::ImageFile;
use identity::{check_files_below, check_same, reference_to};
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;

/// Bytes of decoded clusters kept of one base.
const DECODED_LEN_MAX: u64 = 64 << 20;

/// A compressed cluster: held by who decodes it, then what it holds.
type Decoded = Arc<Mutex<Option<Arc<[u8]>>>>;

/// An open base image. Shared by all disks over it.
#[derive(Debug)]
pub struct Base {
    reference: BaseRef,
    len: u64,
    /// From the top down; at least one.
    layers: Vec<Layer>,
    /// As that of the file, if it is one. Asked once: the file may hang by the time it is needed.
    waits_without_thread: bool,
    /// By layer and cluster. The lock of an entry is held while its cluster is read and decoded: that
    /// is what others who want the same one wait for, and they would do no less.
    decoded: Mutex<Cache<(usize, u64), Decoded>>,
}

/// Where a piece of a base is.
enum Source<'a> {
    Zero,
    Data(&'a Layer, u64),
    Compressed { layer: usize, offset: u64, len: u64 },
}

/// Bases that are open, so that a thousand forks share one descriptor and one cache. Never held while
/// one is opened: that may take as long as its file system likes.
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

    /// Opens `path` to become a base, and what it is to be known by. What it holds, and that, is
    /// durable from here on: written a moment ago, a power cut could take both back, and the disk
    /// with them.
    ///
    /// # Errors
    /// As [`Base::open`], or it is a device: nothing tells whether that was written to meanwhile.
    pub fn adopt(path: &Path, format: BaseFormat) -> Result<(Arc<Base>, BaseRef), DiskError> {
        let base = Self::open(&Self::examine(path, format)?)?;
        for file in base.layers.iter().flat_map(Layer::files) {
            let fault = |what: String| DiskError::Base {
                path: file.path.clone(),
                what,
            };
            if file.file.is_block_device() {
                let what = "a device cannot be a base, for nothing shows that it was changed; \
                            import it instead";
                return Err(fault(what.to_owned()));
            }
            let synced = file.file.sync_all();
            synced.map_err(|e| fault(format!("it cannot be made durable: {e}")))?;
        }
        let samples = samples::of(&base).map_err(DiskError::io("reading the base image"))?;
        let reference = BaseRef {
            samples: Some(samples),
            ..base.reference.clone()
        };
        Ok((base, reference))
    }

    /// Opens the base `reference` names, or finds it open.
    ///
    /// # Errors
    /// It or a file below it is missing, in use by a writer, of a kind or format that is not read, or
    /// not what it was when it became a base.
    pub fn open(reference: &BaseRef) -> Result<Arc<Base>, DiskError> {
        let path = Path::new(&reference.path);
        let now = Self::examine(path, reference.format);
        let now = now.map_err(|e| {
            if let DiskError::Base { path, what } = e {
                return DiskError::BaseChanged { path, what };
            }
            e
        })?;
        check_same(reference, &now)?;
        check_files_below(reference)?;
        if let Some(base) = find_open(reference) {
            return Ok(base);
        }
        let layers = chain::open(&reference.path, reference.format)?;
        let files: Vec<&ImageFile> = layers.iter().flat_map(Layer::files).collect();
        let (top, below) = files.split_first().expect("at least the top one");
        // What counts is what was opened, now that it is locked; it was looked at before because
        // that costs less, and to say what is wrong with the path.
        let opened = BaseRef {
            below: Some(below.iter().map(|file| file.reference()).collect()),
            ..reference_to(&reference.path, reference.format, &top.metadata)
        };
        check_same(reference, &opened)?;
        let is_waiting_alone = |layer: &Layer| layer.file.file.waits_without_thread();
        let base = Arc::new(Base {
            reference: opened,
            len: layers.first().map_or(0, Layer::len),
            waits_without_thread: layers.iter().all(is_waiting_alone),
            layers,
            decoded: Mutex::new(Cache::new(DECODED_LEN_MAX)),
        });
        let mut open = OPEN.lock();
        // Somebody else may have been faster.
        if let Some(base) = find(&open, reference) {
            return Ok(base);
        }
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

    /// What identifies it, without samples.
    #[must_use]
    pub fn reference(&self) -> &BaseRef {
        &self.reference
    }

    /// Fills `buf` from byte `offset`, with zeros beyond the end. Blocks.
    ///
    /// # Errors
    /// A file is cut short or damaged, or what the file system said.
    pub fn read_at(&self, buf: &mut [u8], mut offset: u64) -> io::Result<()> {
        let inside = self.len.saturating_sub(offset).min(bytes_of(buf.len()));
        let (mut data, zeros) = buf.split_at_mut(len_of(inside));
        zeros.fill(0);
        while !data.is_empty() {
            let (source, len) = self.find(offset, bytes_of(data.len()))?;
            let (part, rest) = data.split_at_mut(len_of(len));
            match source {
                Source::Zero => part.fill(0),
                Source::Data(layer, at) => layer.data().read_cluster(part, at)?,
                Source::Compressed {
                    layer,
                    offset: at,
                    len,
                } => self.read_compressed(part, offset, layer, (at, len))?,
            }
            data = rest;
            offset += len;
        }
        Ok(())
    }

    /// Where byte `offset` is, and for how many bytes, at most `max`, that goes on.
    ///
    /// # Errors
    /// A table cannot be read, or says what cannot be.
    fn find(&self, offset: u64, max: u64) -> io::Result<(Source<'_>, u64)> {
        let mut len = max;
        for (index, layer) in self.layers.iter().enumerate() {
            let inside = layer.len().saturating_sub(offset);
            if inside == 0 {
                break;
            }
            let (place, here) = layer.find(offset, len.min(inside))?;
            let source = match place {
                Place::Below => {
                    len = here;
                    continue;
                }
                Place::Zero => Source::Zero,
                Place::Data(at) => Source::Data(layer, at),
                Place::Compressed { offset, len } => Source::Compressed {
                    layer: index,
                    offset,
                    len,
                },
            };
            return Ok((source, here));
        }
        // Below the last, and beyond the end of one that is shorter than what is over it.
        Ok((Source::Zero, len))
    }

    /// Fills `buf` from byte `offset` of the disk, which is in the compressed cluster `packed`.
    ///
    /// # Errors
    /// The cluster cannot be read, or is damaged.
    fn read_compressed(
        &self,
        buf: &mut [u8],
        offset: u64,
        layer: usize,
        packed: (u64, u64),
    ) -> io::Result<()> {
        let image = &self.layers[layer];
        let qcow2 = image.qcow2.as_ref().expect("only qcow2 is compressed");
        let cluster_len = qcow2.header.cluster_len();
        let key = (layer, offset / cluster_len);
        let entry = {
            let mut decoded = self.decoded.lock();
            decoded.get(&key).unwrap_or_else(|| {
                let entry = Decoded::default();
                decoded.put(key, Arc::clone(&entry), cluster_len);
                entry
            })
        };
        let mut cluster = entry.lock();
        let bytes = match &*cluster {
            Some(bytes) => Arc::clone(bytes),
            None => {
                let bytes: Arc<[u8]> = qcow2.decode(&image.file, packed.0, packed.1)?.into();
                *cluster = Some(Arc::clone(&bytes));
                bytes
            }
        };
        drop(cluster);
        let at = len_of(offset % cluster_len);
        buf.copy_from_slice(&bytes[at..at + buf.len()]);
        Ok(())
    }

    /// The one file it is, if it is raw.
    fn raw(&self) -> Option<&ImageFile> {
        match self.layers.as_slice() {
            [layer] if layer.qcow2.is_none() => Some(&layer.file),
            _ => None,
        }
    }

    /// The descriptor a ring may read itself, within [`Base::len`]: if the base is raw, and storage
    /// that hangs would not take the ring's threads with it.
    #[must_use]
    pub fn ring_fd(&self) -> Option<BorrowedFd<'_>> {
        let raw = self.raw().filter(|_| self.waits_without_thread);
        raw.and_then(|file| file.file.as_fd())
    }

    /// Where data may be, at or after `offset`: `(start, end)` in bytes.
    ///
    /// # Errors
    /// What the file system or the qcow2 reader said.
    pub fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        if let Some(file) = self.raw() {
            return file.file.next_data(offset);
        }
        let mut at = offset;
        while at < self.len {
            let (source, len) = self.find(at, self.len - at)?;
            let end = at + len;
            match source {
                Source::Zero => {}
                Source::Data(layer, place) if layer.qcow2.is_none() => {
                    let data = layer.file.file.next_data(place)?;
                    if let Some((from, to)) = data.filter(|(from, _)| from - place < len) {
                        let from = at + (from - place);
                        return Ok(Some((from, end.min(at + (to - place)))));
                    }
                }
                Source::Data(..) | Source::Compressed { .. } => return Ok(Some((at, end))),
            }
            at = end;
        }
        Ok(None)
    }
}

fn find_open(reference: &BaseRef) -> Option<Arc<Base>> {
    let mut open = OPEN.lock();
    open.retain(|base| base.strong_count() > 0);
    find(&open, reference)
}

fn find(open: &[Weak<Base>], reference: &BaseRef) -> Option<Arc<Base>> {
    let mut bases = open.iter().filter_map(Weak::upgrade);
    bases.find(|base| is_same(&base.reference, reference))
}
