//! Reading one qcow2 image: from an offset of its disk to a place in a file. Many readers at once;
//! no lock is held while a table is read.

use super::cache::Cache;
use super::file::ImageFile;
use crate::format::qcow2::{self, Entry, HEAD_LEN, Header, Place, Refusal};
use crate::format::units::{bytes_of, len_of};
use crate::sync::Arc;
use crate::sync::global::Mutex;
use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
use miniz_oxide::inflate::core::{DecompressorOxide, decompress};
use std::io;

/// Bytes of a second table that are read and kept at once.
const SLICE_LEN: u64 = 4096;
/// Bytes of second tables kept of one image: those of 32 GiB of it, at clusters of 64 KiB.
const SLICES_LEN_MAX: u64 = 4 << 20;

/// See the module.
#[derive(Debug)]
pub(super) struct Qcow2 {
    pub(super) header: Header,
    l1: Vec<u64>,
    /// Parts of second tables, by their place in the file.
    slices: Mutex<Cache<u64, Arc<[Entry]>>>,
}

/// Why an image cannot be opened.
#[derive(Debug)]
pub(super) enum OpenFailed {
    Refused(Refusal),
    Io(io::Error),
}

impl From<Refusal> for OpenFailed {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<io::Error> for OpenFailed {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

fn damaged(refusal: &Refusal) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, refusal.to_string())
}

/// The header of the image in `file`.
///
/// # Errors
/// It cannot be read, or has no header that is read.
pub(super) fn read_header(file: &ImageFile) -> Result<Header, OpenFailed> {
    let part = |len: u64| {
        let mut bytes = vec![0; len_of(len.min(file.len))];
        file.read(&mut bytes, 0).map(|()| bytes)
    };
    let head = part(bytes_of(HEAD_LEN))?;
    Ok(Header::parse(&part(qcow2::cluster_len(&head)?)?)?)
}

impl Qcow2 {
    /// Reads what is needed of the image in `file`, which has this header.
    ///
    /// # Errors
    /// Its first table cannot be read.
    pub(super) fn open(file: &ImageFile, header: Header) -> io::Result<Self> {
        let (entries, at) = header.l1();
        let len = u64::from(entries) * 8;
        // A few bytes of header may ask for more than the file has.
        if at.saturating_add(len) > file.len {
            return Err(damaged(&Refusal::Short));
        }
        let mut bytes = vec![0; len_of(len)];
        file.read(&mut bytes, at)?;
        let (chunks, _) = bytes.as_chunks();
        Ok(Self {
            header,
            l1: chunks
                .iter()
                .map(|entry| u64::from_be_bytes(*entry))
                .collect(),
            slices: Mutex::new(Cache::new(SLICES_LEN_MAX)),
        })
    }

    /// Where byte `offset` of the disk is, and for how many bytes, at most `max`, that goes on.
    ///
    /// # Errors
    /// A table cannot be read, or says what cannot be.
    pub(super) fn find(&self, file: &ImageFile, offset: u64, max: u64) -> io::Result<(Place, u64)> {
        let (span, cluster) = (self.header.l2_span(), self.header.cluster_len());
        let table = self.l1.get(len_of(offset / span)).copied().unwrap_or(0);
        let table = self.header.l2_offset(table).map_err(|e| damaged(&e))?;
        let in_table = offset % span;
        let Some(table) = table else {
            return Ok((Place::Below, (span - in_table).min(max)));
        };
        let slice_len = SLICE_LEN.min(cluster);
        let per_slice = slice_len / self.header.entry_len();
        let first = in_table / cluster / per_slice * per_slice;
        let slice = self.slice(file, table + first * self.header.entry_len(), slice_len)?;
        let place_of = |at: u64| {
            let entry = slice.get(len_of(at / cluster - first))?;
            let place = self.header.place(*entry, at % cluster);
            Some(place.map(|(place, end)| (place, end - at % cluster)))
        };
        let none = || Err(Refusal::Short);
        let found = place_of(in_table).unwrap_or_else(none);
        let (place, mut len) = found.map_err(|e| damaged(&e))?;
        while len < max && in_table + len < span {
            let Some(Ok((next, more))) = place_of(in_table + len) else {
                break;
            };
            let goes_on = match (place, next) {
                (Place::Below, Place::Below) | (Place::Zero, Place::Zero) => true,
                (Place::Data(at), Place::Data(next)) => at.checked_add(len) == Some(next),
                _ => false,
            };
            if !goes_on {
                break;
            }
            len += more;
        }
        Ok((place, len.min(max)))
    }

    fn slice(&self, file: &ImageFile, at: u64, len: u64) -> io::Result<Arc<[Entry]>> {
        if let Some(slice) = self.slices.lock().get(&at) {
            return Ok(slice);
        }
        let mut bytes = vec![0; len_of(len)];
        file.read(&mut bytes, at)?;
        let (words, _) = bytes.as_chunks();
        let word = |bytes: &[u8; 8]| u64::from_be_bytes(*bytes);
        let slice: Arc<[Entry]> = match self.header.entry_len() {
            16 => {
                let pairs = words.as_chunks::<2>().0.iter();
                let entry = |[descriptor, bitmap]: &[[u8; 8]; 2]| Entry {
                    descriptor: word(descriptor),
                    bitmap: word(bitmap),
                };
                pairs.map(entry).collect()
            }
            _ => {
                let entry = |descriptor: &[u8; 8]| Entry {
                    descriptor: word(descriptor),
                    bitmap: 0,
                };
                words.iter().map(entry).collect()
            }
        };
        self.slices.lock().put(at, Arc::clone(&slice), len);
        Ok(slice)
    }

    /// What a compressed cluster holds.
    ///
    /// # Errors
    /// It cannot be read, or is no such thing.
    pub(super) fn decode(&self, file: &ImageFile, at: u64, len: u64) -> io::Result<Vec<u8>> {
        let mut packed = vec![0; len_of(len)];
        file.read_cluster(&mut packed, at)?;
        let mut cluster = vec![0; len_of(self.header.cluster_len())];
        let flags = TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
        let mut state = DecompressorOxide::new();
        let (status, _read, written) = decompress(&mut state, &packed, &mut cluster, 0, flags);
        // What follows in the last sector is another cluster's.
        let is_done = matches!(status, TINFLStatus::Done | TINFLStatus::HasMoreOutput);
        if is_done && written == cluster.len() {
            return Ok(cluster);
        }
        let what = format!(
            "{}: the compressed cluster at byte {at} is damaged",
            file.path
        );
        Err(io::Error::new(io::ErrorKind::InvalidData, what))
    }
}
