//! A store for models: made in no time from one that was prepared, and each operation is a place
//! where another thread may go on.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::os::fd::BorrowedFd;
use tidepool::storage::{Storage, Tier};
use tidepool::sync::Arc;
use tidepool::sync::atomic::{AtomicU32, Ordering};
use tidepool::sync::global::Mutex;

const PAGE: usize = 512;
type Pages = BTreeMap<u64, Arc<[u8; PAGE]>>;

/// The contents of a store.
#[derive(Debug, Clone, Default)]
pub(crate) struct Image {
    len: u64,
    pages: Pages,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Store {
    image: Mutex<Image>,
    /// Only there to be touched.
    door: AtomicU32,
}

impl Store {
    /// With these contents.
    pub(crate) fn new(image: Image) -> Self {
        Self {
            image: Mutex::new(image),
            door: AtomicU32::new(0),
        }
    }

    /// What it holds.
    pub(crate) fn image(&self) -> Image {
        self.image.lock().clone()
    }

    /// Runs `part` for each part of `[offset, offset + len)` within a page: page, its bytes, bytes
    /// of the request.
    fn each(
        &self,
        offset: u64,
        len: usize,
        mut part: impl FnMut(&mut Pages, u64, std::ops::Range<usize>, std::ops::Range<usize>),
    ) -> io::Result<()> {
        self.door.fetch_add(1, Ordering::Relaxed);
        let mut image = self.image.lock();
        if offset + len as u64 > image.len {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        let mut done = 0;
        while done < len {
            let at = offset + done as u64;
            let within = usize::try_from(at % PAGE as u64).expect("short");
            let now = (PAGE - within).min(len - done);
            let page = at / PAGE as u64;
            part(
                &mut image.pages,
                page,
                within..within + now,
                done..done + now,
            );
            done += now;
        }
        Ok(())
    }
}

impl Storage for Store {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.each(offset, buf.len(), |pages, page, within, of| {
            match pages.get(&page) {
                Some(bytes) => buf[of].copy_from_slice(&bytes[within]),
                None => buf[of].fill(0),
            }
        })
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.each(offset, buf.len(), |pages, page, within, of| {
            let new = &buf[of];
            if pages.contains_key(&page) || new.iter().any(|byte| *byte != 0) {
                let bytes = pages.entry(page).or_insert_with(|| Arc::new([0; PAGE]));
                Arc::make_mut(bytes)[within].copy_from_slice(new);
            }
        })
    }

    fn write_durable_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.write_at(buf, offset)
    }

    fn flush(&self) -> io::Result<()> {
        self.door.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let len = usize::try_from(len).expect("short");
        self.each(offset, len, |pages, page, _, _| drop(pages.remove(&page)))
    }

    fn allocate(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.image.lock().len)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.image.lock().len = len;
        Ok(())
    }

    fn allocated(&self) -> io::Result<u64> {
        self.len()
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        let len = self.len()?;
        Ok((offset < len).then_some((offset, len)))
    }

    fn tier(&self) -> Tier {
        Tier::Memory
    }

    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}
