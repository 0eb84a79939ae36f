//! The guest's side of one vhost-user-blk session: shared memory, one ring, its two eventfds. The
//! only file of the load generator with `unsafe` in it.
#![expect(
    unsafe_code,
    reason = "the driver crate takes the buffers of a request as raw pointers"
)]

use std::error::Error;
use std::fs::File;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::path::Path;
use std::sync::Arc;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use virtio_driver::{
    EventFd, QueueNotifier, VhostUser, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkTransport,
    VirtioFeatureFlags,
};
use vm_memory::mmap::MmapRegion;
use vm_memory::{Bytes as _, FileOffset, VolatileMemory as _};

/// Ring descriptors one request takes: header, data, status.
const DESCRIPTORS_PER_REQUEST: u16 = 3;
/// Smallest ring worth having: what a Linux guest asks of most backends.
const RING_SIZE_MIN: u16 = 128;

/// Longest silence of a backend that has requests, in milliseconds.
const SILENCE_MS_MAX: u16 = 30_000;

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Disk to buffer.
    Read,
    /// Buffer to disk.
    Write,
    /// Make completed writes durable.
    Flush,
}

/// One request that the backend has answered.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Done {
    /// The slot given to [`Device::submit`].
    pub(crate) slot: u16,
    /// False when the backend answered anything but OK.
    pub(crate) is_ok: bool,
}

/// A connected device with one data buffer a slot.
///
/// # Invariants
/// `buffers` holds `depth * block` bytes and lives as long as the session that may write to it.
pub(crate) struct Device {
    // Dropped before `transport`, whose mapping holds the ring.
    queue: VirtioBlkQueue<'static, u16>,
    kick: Box<dyn QueueNotifier>,
    call: Arc<EventFd>,
    transport: Box<VirtioBlkTransport>,
    buffers: MmapRegion,
    block: u32,
    capacity: u64,
}

impl Device {
    /// Connects to `socket` and starts queue 0 with room for `depth` requests of `block` bytes.
    ///
    /// # Errors
    /// The backend is not there, or lacks CONFIG, REPLY_ACK or CONFIGURE_MEM_SLOTS, which the
    /// driver crate insists on.
    pub(crate) fn connect(socket: &Path, depth: u16, block: u32) -> Result<Self, Box<dyn Error>> {
        Self::connect_with(socket, depth, block, VirtioBlkFeatureFlags::empty())
    }

    /// As [`Device::connect`], with `more` features to ask for.
    ///
    /// # Errors
    /// As [`Device::connect`].
    pub(crate) fn connect_with(
        socket: &Path,
        depth: u16,
        block: u32,
        more: VirtioBlkFeatureFlags,
    ) -> Result<Self, Box<dyn Error>> {
        let features = more.bits()
            | VirtioFeatureFlags::VERSION_1.bits()
            | VirtioFeatureFlags::RING_EVENT_IDX.bits()
            | VirtioBlkFeatureFlags::SIZE_MAX.bits()
            | VirtioBlkFeatureFlags::SEG_MAX.bits()
            | VirtioBlkFeatureFlags::BLK_SIZE.bits()
            | VirtioBlkFeatureFlags::FLUSH.bits();
        let path = socket.to_str().ok_or("the socket's path is not UTF-8")?;
        let mut transport: Box<VirtioBlkTransport> = Box::new(VhostUser::new(path, features)?);
        let capacity = u64::from(transport.get_config()?.capacity) * 512;

        let ring_size = (depth * DESCRIPTORS_PER_REQUEST)
            .next_power_of_two()
            .max(RING_SIZE_MIN);
        let queue = VirtioBlkQueue::setup_queues(&mut *transport, 1, ring_size)?
            .pop()
            .ok_or("the driver made no queue")?;

        let bytes = usize::from(depth) * usize::try_from(block)?;
        let memory = File::from(memfd_create("loadgen-buffers", MFdFlags::MFD_CLOEXEC)?);
        let bytes_mapped = bytes.next_multiple_of(4096);
        memory.set_len(u64::try_from(bytes_mapped)?)?;
        let raw = memory.as_raw_fd();
        let at = FileOffset::new(memory, 0);
        let buffers = MmapRegion::from_file(at.clone(), bytes_mapped)?;
        transport.map_mem_region(buffers.as_ptr().addr(), bytes_mapped, raw, 0)?;

        Ok(Self {
            kick: transport.get_submission_notifier(0),
            call: transport.get_completion_fd(0),
            queue,
            transport,
            buffers,
            block,
            capacity,
        })
    }

    /// Bytes of the disk.
    pub(crate) fn capacity(&self) -> u64 {
        self.capacity
    }

    fn buffer_at(&self, slot: u16) -> usize {
        usize::from(slot) * usize::try_from(self.block).expect("a block is at most 1 MiB")
    }

    /// Copies `data`, at most one block, into the slot's buffer.
    pub(crate) fn fill(&self, slot: u16, data: &[u8]) {
        self.buffers
            .as_volatile_slice()
            .write_slice(data, self.buffer_at(slot))
            .expect("a slot's buffer lies inside the mapping");
    }

    /// Copies the slot's buffer into `data`.
    pub(crate) fn take(&self, slot: u16, data: &mut [u8]) {
        self.buffers
            .as_volatile_slice()
            .read_slice(data, self.buffer_at(slot))
            .expect("a slot's buffer lies inside the mapping");
    }

    /// Puts one request into the ring; [`Device::kick`] tells the backend. `offset` is in bytes, a
    /// multiple of 512. The slot must not be in flight.
    ///
    /// # Errors
    /// The ring is full or the offset is not aligned.
    pub(crate) fn submit(&mut self, kind: Kind, slot: u16, offset: u64) -> std::io::Result<()> {
        self.submit_part(kind, slot, offset, self.block)
    }

    /// As [`Device::submit`], of the first `len` bytes of a block.
    ///
    /// # Errors
    /// As [`Device::submit`].
    pub(crate) fn submit_part(
        &mut self,
        kind: Kind,
        slot: u16,
        offset: u64,
        len: u32,
    ) -> std::io::Result<()> {
        assert!(len <= self.block, "a buffer holds one block");
        let len = usize::try_from(len).expect("a block is at most 1 MiB");
        let buffer = self.buffers.as_ptr().wrapping_add(self.buffer_at(slot));
        match kind {
            Kind::Read => {
                // SAFETY: `buffer` and `len` lie inside `buffers` (type invariant: `slot` is below
                // `depth`), which outlives the session; no reference into it exists, only volatile
                // copies.
                unsafe { self.queue.read_raw(offset, buffer, len, slot) }
            }
            Kind::Write => {
                // SAFETY: as for a read; the backend only reads these bytes.
                unsafe { self.queue.write_raw(offset, buffer, len, slot) }
            }
            Kind::Flush => self.queue.flush(slot),
        }
    }

    /// Puts a discard, or else a write of zeros that may unmap, into the ring. `offset` and `len`
    /// are in bytes, multiples of 512.
    ///
    /// # Errors
    /// As [`Device::submit`].
    pub(crate) fn clear(
        &mut self,
        is_discard: bool,
        slot: u16,
        offset: u64,
        len: u64,
    ) -> std::io::Result<()> {
        if is_discard {
            self.queue.discard(offset, len, slot)
        } else {
            self.queue.write_zeroes(offset, len, true, slot)
        }
    }

    /// The descriptor that is readable when the backend has notified, until
    /// [`Device::sleep_at_most`] has read it.
    pub(crate) fn call_fd(&self) -> BorrowedFd<'_> {
        self.call.as_fd()
    }

    /// Notifies the backend of new requests, unless it asked not to be.
    ///
    /// # Errors
    /// The kick eventfd could not be written.
    pub(crate) fn kick(&mut self) -> std::io::Result<()> {
        if self.queue.avail_notif_needed() {
            self.kick.notify()?;
        }
        Ok(())
    }

    /// Asks for (or declines) a notification of the next completion.
    pub(crate) fn want_call(&mut self, wanted: bool) {
        self.queue.set_used_notif_enabled(wanted);
    }

    /// True when a completion can be taken.
    pub(crate) fn has_done(&mut self) -> bool {
        self.queue.completions().has_next()
    }

    /// Sleeps until the backend notifies.
    ///
    /// # Errors
    /// The backend has gone, or has said nothing for [`SILENCE_MS_MAX`].
    pub(crate) fn sleep(&self) -> Result<(), Box<dyn Error>> {
        if self.sleep_at_most(SILENCE_MS_MAX)? {
            Ok(())
        } else {
            Err("the backend has completed nothing for 30 s".into())
        }
    }

    /// Sleeps until the backend notifies, `ms` milliseconds at most; `false` if it did not. A
    /// backend may have made the eventfd non-blocking for both sides (libvhost-user does), so
    /// poll(2) does the waiting.
    ///
    /// # Errors
    /// The call eventfd could not be read.
    pub(crate) fn sleep_at_most(&self, ms: u16) -> Result<bool, Box<dyn Error>> {
        let mut fds = [PollFd::new(self.call.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::from(ms))? == 0 {
            return Ok(false);
        }
        match self.call.read() {
            Ok(_count) => Ok(true),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(true),
            Err(error) => Err(error.into()),
        }
    }

    /// Moves every completion that is there into `done`.
    pub(crate) fn collect_done(&mut self, done: &mut Vec<Done>) {
        done.extend(self.queue.completions().map(|completion| Done {
            slot: completion.context,
            is_ok: completion.ret == 0,
        }));
    }

    /// Virtio features in use.
    pub(crate) fn features(&self) -> u64 {
        self.transport.get_features()
    }
}
