//! The device side of a split virtqueue (virtio 1.2, clause 2.7): a bounded walk of descriptor
//! chains, indirect tables, and event suppression both ways.
//!
//! The guest owns the rings and may write anything to them at any time. Whatever is read is
//! copied once and then checked; a ring that breaks the rules yields a [`QueueFault`] and is not
//! used any further.

use std::num::Wrapping;

use thiserror::Error;

use crate::sync::atomic::{Ordering, fence};
use crate::sys::mmap::{GuestMemory, GuestRun, Window};

/// Most entries a queue may have (a split queue may have up to 32768; nobody does).
pub const QUEUE_SIZE_MAX: u16 = 4096;
/// Most descriptors in one chain, indirect ones counted.
pub const CHAIN_DESCS_MAX: usize = 1024;

const DESC_BYTES: usize = 16;
const DESC_F_NEXT: u16 = 1;
const DESC_F_WRITE: u16 = 2;
const DESC_F_INDIRECT: u16 = 4;
const AVAIL_F_NO_INTERRUPT: u16 = 1;
const USED_F_NO_NOTIFY: u16 = 1;
/// Bytes of `flags` and `idx` before the entries of either ring.
const RING_HEAD: usize = 4;

/// How the guest broke its queue. The device stops using it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum QueueFault {
    /// Not a power of two, zero or above [`QUEUE_SIZE_MAX`].
    #[error("queue size {0} is not a power of two up to {QUEUE_SIZE_MAX}")]
    Size(u16),
    /// A ring is not in guest memory, or not aligned.
    #[error("the ring at guest address {0:#x} is not in guest memory or not aligned")]
    Ring(u64),
    /// The avail index is further ahead than the queue is long.
    #[error("avail index {avail} is more than the queue size ahead of {next}")]
    AvailIndex {
        /// What the guest wrote.
        avail: u16,
        /// Where we are.
        next: u16,
    },
    /// A descriptor index beyond its table.
    #[error("descriptor {0} is outside its table")]
    DescIndex(u16),
    /// A chain longer than its table or than [`CHAIN_DESCS_MAX`], which every loop is.
    #[error("descriptor chain is a loop or too long")]
    ChainLength,
    /// A buffer that is not in guest memory.
    #[error("buffer of {len} bytes at guest address {addr:#x} is not in guest memory")]
    Buffer {
        /// Guest-physical address.
        addr: u64,
        /// Bytes.
        len: u32,
    },
    /// A buffer of no bytes.
    #[error("descriptor of zero length")]
    EmptyBuffer,
    /// An indirect table of an impossible length, nested, chained or never negotiated.
    #[error("indirect table of {0} bytes is malformed or not allowed here")]
    Indirect(u32),
    /// A device-readable buffer after a device-writable one (clause 2.7.4.2).
    #[error("readable buffer after a writable one")]
    Order,
}

/// Where the parts of a queue are, as guest-physical addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RingAddresses {
    /// Descriptor table.
    pub desc: u64,
    /// Available ring.
    pub avail: u64,
    /// Used ring.
    pub used: u64,
}

/// One request's buffers. Reused from request to request.
#[derive(Debug, Default)]
pub struct Chain {
    /// The descriptor to give back in the used ring.
    pub head: u16,
    /// What the device may read, in order.
    pub readable: Vec<GuestRun>,
    /// What the device may write, in order.
    pub writable: Vec<GuestRun>,
}

struct Desc {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Desc {
    fn parse(raw: [u8; DESC_BYTES]) -> Self {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = raw;
        Self {
            addr: u64::from_le_bytes([a, b, c, d, e, f, g, h]),
            len: u32::from_le_bytes([i, j, k, l]),
            flags: u16::from_le_bytes([m, n]),
            next: u16::from_le_bytes([o, p]),
        }
    }
}

#[derive(Debug)]
struct Rings {
    desc: Window,
    avail: Window,
    used: Window,
}

impl Rings {
    fn new(memory: &GuestMemory, size: u16, at: RingAddresses) -> Result<Self, QueueFault> {
        let entries = usize::from(size);
        let window = |addr, len, align| {
            memory
                .window(addr, len, align)
                .ok_or(QueueFault::Ring(addr))
        };
        // Both rings end with an event index, which is there whether negotiated or not.
        Ok(Self {
            desc: window(at.desc, entries * DESC_BYTES, 1)?,
            avail: window(at.avail, RING_HEAD + 2 * entries + 2, 2)?,
            used: window(at.used, RING_HEAD + 8 * entries + 2, 4)?,
        })
    }
}

/// What the driver accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct QueueFeatures {
    /// `VIRTIO_F_EVENT_IDX`.
    pub event_idx: bool,
    /// `VIRTIO_F_INDIRECT_DESC`.
    pub indirect: bool,
}

/// See the module.
#[derive(Debug)]
pub struct SplitQueue {
    size: u16,
    features: QueueFeatures,
    rings: Rings,
    /// The next avail entry to take.
    next_avail: Wrapping<u16>,
    /// The avail index as last read.
    avail_seen: Wrapping<u16>,
    /// The next used entry to fill.
    next_used: Wrapping<u16>,
    /// The used index as last published.
    published: Wrapping<u16>,
    /// The driver's `used_event` is not to be trusted yet: signal the next batch anyway.
    must_signal: bool,
}

impl SplitQueue {
    /// A queue that goes on where its used ring says: whoever served it before answered all that it
    /// had taken, so the next request is the one at the used index. A fresh ring says 0.
    ///
    /// # Errors
    /// The size or an address is impossible.
    pub fn new(
        memory: &GuestMemory,
        size: u16,
        at: RingAddresses,
        features: QueueFeatures,
    ) -> Result<Self, QueueFault> {
        if !size.is_power_of_two() || size > QUEUE_SIZE_MAX {
            return Err(QueueFault::Size(size));
        }
        let rings = Rings::new(memory, size, at)?;
        let used = Wrapping(rings.used.load_u16(2, Ordering::Acquire));
        Ok(Self {
            size,
            features,
            rings,
            next_avail: used,
            avail_seen: used,
            next_used: used,
            published: used,
            must_signal: true,
        })
    }

    /// Goes on in another generation of memory.
    ///
    /// # Errors
    /// An address is not in it; the queue stays as it was.
    pub fn rebind(&mut self, memory: &GuestMemory, at: RingAddresses) -> Result<(), QueueFault> {
        self.rings = Rings::new(memory, self.size, at)?;
        self.must_signal = true;
        Ok(())
    }

    /// Entries.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The avail entry that would be taken next: the base to resume from.
    #[must_use]
    pub fn next_avail(&self) -> u16 {
        self.next_avail.0
    }

    /// Takes the next request into `chain`, in the same `memory` that the rings are in. `false`
    /// if there is none.
    ///
    /// # Errors
    /// The guest broke the rules; do not call this again.
    pub fn pop(&mut self, memory: &GuestMemory, chain: &mut Chain) -> Result<bool, QueueFault> {
        if self.next_avail == self.avail_seen && !self.look()? {
            return Ok(false);
        }
        let slot = usize::from(self.next_avail.0 % self.size);
        // Acquire in `look` ordered this after the driver's store of the entry.
        let head = self
            .rings
            .avail
            .load_u16(RING_HEAD + 2 * slot, Ordering::Relaxed);
        chain.head = head;
        chain.readable.clear();
        chain.writable.clear();
        self.walk(memory, head, chain)?;
        self.next_avail += 1;
        Ok(true)
    }

    /// Puts the request at avail position `at` back, if it is the last that was taken; whether it
    /// was. Its descriptors are still as they were: the driver has not been given them back.
    pub fn untake(&mut self, at: u16) -> bool {
        let is_last = (self.next_avail - Wrapping(1)).0 == at;
        if is_last {
            self.next_avail = Wrapping(at);
        }
        is_last
    }

    /// Reads the avail index; whether it is ahead of us.
    fn look(&mut self) -> Result<bool, QueueFault> {
        let avail = Wrapping(self.rings.avail.load_u16(2, Ordering::Acquire));
        if (avail - self.next_avail).0 > self.size {
            return Err(QueueFault::AvailIndex {
                avail: avail.0,
                next: self.next_avail.0,
            });
        }
        self.avail_seen = avail;
        Ok(avail != self.next_avail)
    }

    fn walk(&self, memory: &GuestMemory, head: u16, chain: &mut Chain) -> Result<(), QueueFault> {
        let mut index = head;
        let mut left = usize::from(self.size).min(CHAIN_DESCS_MAX);
        loop {
            if index >= self.size {
                return Err(QueueFault::DescIndex(index));
            }
            left = left.checked_sub(1).ok_or(QueueFault::ChainLength)?;
            let desc = Desc::parse(self.rings.desc.read(usize::from(index) * DESC_BYTES));
            if desc.flags & DESC_F_INDIRECT != 0 {
                return self.walk_indirect(memory, &desc, chain);
            }
            take_buffer(memory, &desc, chain)?;
            if desc.flags & DESC_F_NEXT == 0 {
                return Ok(());
            }
            index = desc.next;
        }
    }

    /// Clause 2.7.5.3: the table ends the chain, and holds no further table.
    fn walk_indirect(
        &self,
        memory: &GuestMemory,
        table: &Desc,
        chain: &mut Chain,
    ) -> Result<(), QueueFault> {
        let fault = QueueFault::Indirect(table.len);
        let bytes = usize::try_from(table.len).unwrap_or(usize::MAX);
        let count = bytes / DESC_BYTES;
        let is_shaped = bytes.is_multiple_of(DESC_BYTES) && (1..=CHAIN_DESCS_MAX).contains(&count);
        if !self.features.indirect || !is_shaped || table.flags & DESC_F_NEXT != 0 {
            return Err(fault);
        }
        let outside = QueueFault::Buffer {
            addr: table.addr,
            len: table.len,
        };
        let run = memory.contiguous(table.addr, table.len).ok_or(outside)?;
        let mut index = 0_u16;
        let mut left = count;
        loop {
            if usize::from(index) >= count {
                return Err(QueueFault::DescIndex(index));
            }
            left = left.checked_sub(1).ok_or(QueueFault::ChainLength)?;
            let mut raw = [0; DESC_BYTES];
            memory.read(&run.cut(u32::from(index) * 16, 16), &mut raw);
            let desc = Desc::parse(raw);
            if desc.flags & DESC_F_INDIRECT != 0 {
                return Err(fault);
            }
            take_buffer(memory, &desc, chain)?;
            if desc.flags & DESC_F_NEXT == 0 {
                return Ok(());
            }
            index = desc.next;
        }
    }

    /// Gives `head` back to the driver with `len` bytes written. The driver sees it at the next
    /// [`SplitQueue::publish`].
    pub fn push_used(&mut self, head: u16, len: u32) {
        let slot = usize::from(self.next_used.0 % self.size);
        let [a, b, c, d] = u32::from(head).to_le_bytes();
        let [e, f, g, h] = len.to_le_bytes();
        self.rings
            .used
            .write(RING_HEAD + 8 * slot, &[a, b, c, d, e, f, g, h]);
        self.next_used += 1;
    }

    /// Shows the driver all that was pushed; whether it wants to be told (clauses 2.7.7, 2.7.10).
    #[must_use]
    pub fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.next_used);
        if old == new {
            return false;
        }
        self.published = new;
        // Release: the entries are seen before the index that covers them.
        self.rings.used.store_u16(2, new.0, Ordering::Release);
        // The index must be seen before we read what the driver wants: it does the opposite.
        fence(Ordering::SeqCst);
        if std::mem::take(&mut self.must_signal) {
            return true;
        }
        if self.features.event_idx {
            let at = RING_HEAD + 2 * usize::from(self.size);
            let event = Wrapping(self.rings.avail.load_u16(at, Ordering::Relaxed));
            new - event - Wrapping(1) < new - old
        } else {
            self.rings.avail.load_u16(0, Ordering::Relaxed) & AVAIL_F_NO_INTERRUPT == 0
        }
    }

    /// Asks the driver not to kick, as far as it was negotiated: the queue is being watched.
    pub fn disarm(&mut self) {
        if !self.features.event_idx {
            self.rings
                .used
                .store_u16(0, USED_F_NO_NOTIFY, Ordering::Relaxed);
        }
    }

    /// Asks the driver to kick from now on; `true` if something came meanwhile, so that there may
    /// be no kick for it.
    ///
    /// # Errors
    /// The guest broke the rules; do not use the queue again.
    pub fn arm(&mut self) -> Result<bool, QueueFault> {
        if self.features.event_idx {
            let at = RING_HEAD + 8 * usize::from(self.size);
            self.rings
                .used
                .store_u16(at, self.next_avail.0, Ordering::Relaxed);
        } else {
            self.rings.used.store_u16(0, 0, Ordering::Relaxed);
        }
        // The wish must be seen before we look a last time: the driver does the opposite.
        fence(Ordering::SeqCst);
        self.look()
    }

    /// Whether something is waiting, without a change of anything the driver sees.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        self.rings.avail.load_u16(2, Ordering::Acquire) != self.next_avail.0
    }
}

fn take_buffer(memory: &GuestMemory, desc: &Desc, chain: &mut Chain) -> Result<(), QueueFault> {
    if desc.len == 0 {
        return Err(QueueFault::EmptyBuffer);
    }
    let out = if desc.flags & DESC_F_WRITE != 0 {
        &mut chain.writable
    } else if chain.writable.is_empty() {
        &mut chain.readable
    } else {
        return Err(QueueFault::Order);
    };
    if memory.translate(desc.addr, desc.len, out) {
        Ok(())
    } else {
        Err(QueueFault::Buffer {
            addr: desc.addr,
            len: desc.len,
        })
    }
}
