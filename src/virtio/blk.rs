//! virtio-blk requests and configuration space (virtio 1.2, clause 5.2), device side.
//!
//! A request's descriptors may be cut anywhere: the header over several buffers, data in pieces
//! of any length, the status as the last writable byte of whatever buffer it falls in.

use thiserror::Error;
use virtio_bindings::bindings::{virtio_blk as abi, virtio_config, virtio_ring};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::sys::mmap::{GuestMemory, GuestRun, cut_runs};

use super::queue::{Chain, QueueFeatures};

/// Bytes of a sector, whatever the block size (clause 5.2.4).
pub const SECTOR: u64 = 512;
/// Bytes of the answer to `GET_ID`.
pub const ID_BYTES: usize = 20;
/// Most buffers in one request (`seg_max`): a ring of 256 holds them with header and status.
pub const SEG_MAX: u32 = 254;
/// Most bytes in one buffer (`size_max`).
pub const SIZE_MAX: u32 = 256 << 10;
/// Most data bytes in one request; what `SEG_MAX` and `SIZE_MAX` allow is less.
pub const DATA_MAX: u32 = 64 << 20;
/// Most ranges in one DISCARD or WRITE_ZEROES.
pub const RANGES_MAX: u32 = 64;
/// Most sectors in one such range: 1 GiB.
pub const RANGE_SECTORS_MAX: u32 = 1 << 21;

const HEADER_BYTES: u32 = 16;
const RANGE_BYTES: u32 = 16;
/// Byte of `writeback` in the configuration space, the only one a driver may write.
const WRITEBACK_AT: u32 = 32;

/// Feature bits that a disk offers.
#[must_use]
pub fn features(is_read_only: bool, is_multiqueue: bool) -> u64 {
    let bits = [
        virtio_config::VIRTIO_F_VERSION_1,
        virtio_ring::VIRTIO_RING_F_INDIRECT_DESC,
        virtio_ring::VIRTIO_RING_F_EVENT_IDX,
        abi::VIRTIO_BLK_F_SIZE_MAX,
        abi::VIRTIO_BLK_F_SEG_MAX,
        abi::VIRTIO_BLK_F_BLK_SIZE,
        abi::VIRTIO_BLK_F_TOPOLOGY,
        abi::VIRTIO_BLK_F_FLUSH,
        abi::VIRTIO_BLK_F_CONFIG_WCE,
    ];
    let mut features = bits.into_iter().fold(0, |all, bit| all | 1_u64 << bit);
    if is_multiqueue {
        features |= 1 << abi::VIRTIO_BLK_F_MQ;
    }
    if is_read_only {
        features |= 1 << abi::VIRTIO_BLK_F_RO;
    } else {
        features |= 1 << abi::VIRTIO_BLK_F_DISCARD | 1 << abi::VIRTIO_BLK_F_WRITE_ZEROES;
    }
    features
}

/// What `features`, as accepted by the driver, mean for its queues.
#[must_use]
pub fn queue_features(features: u64) -> QueueFeatures {
    QueueFeatures {
        event_idx: features & 1 << virtio_ring::VIRTIO_RING_F_EVENT_IDX != 0,
        indirect: features & 1 << virtio_ring::VIRTIO_RING_F_INDIRECT_DESC != 0,
    }
}

/// Whether the device caches writes until a FLUSH (clause 5.2.6.2): as the driver chose in the
/// configuration space if it may, else only if it knows how to flush.
#[must_use]
pub fn is_writeback(features: u64, writeback: bool) -> bool {
    if features & 1 << abi::VIRTIO_BLK_F_CONFIG_WCE != 0 {
        writeback
    } else {
        features & 1 << abi::VIRTIO_BLK_F_FLUSH != 0
    }
}

/// The configuration space (clause 5.2.4), little-endian.
///
/// | byte | field | unit |
/// |---|---|---|
/// | 0 | capacity | sectors |
/// | 8 | size_max | bytes |
/// | 12 | seg_max | buffers |
/// | 16 | geometry | not offered |
/// | 20 | blk_size | bytes |
/// | 24 | physical_block_exp | log2 of blocks |
/// | 25 | alignment_offset | blocks |
/// | 26 | min_io_size | blocks |
/// | 28 | opt_io_size | blocks |
/// | 32 | writeback | 0 or 1, writable |
/// | 34 | num_queues | |
/// | 36 | max_discard_sectors, max_discard_seg, discard_sector_alignment | sectors, ranges, sectors |
/// | 48 | max_write_zeroes_sectors, max_write_zeroes_seg | sectors, ranges |
/// | 56 | write_zeroes_may_unmap | 0 or 1 |
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Config {
    capacity: U64,
    size_max: U32,
    seg_max: U32,
    geometry: [u8; 4],
    blk_size: U32,
    physical_block_exp: u8,
    alignment_offset: u8,
    min_io_size: U16,
    opt_io_size: U32,
    writeback: u8,
    unused0: u8,
    num_queues: U16,
    max_discard_sectors: U32,
    max_discard_seg: U32,
    discard_sector_alignment: U32,
    max_write_zeroes_sectors: U32,
    max_write_zeroes_seg: U32,
    write_zeroes_may_unmap: u8,
    unused1: [u8; 3],
}

const _: () = assert!(size_of::<Config>() == 60);
const _: () = assert!(std::mem::offset_of!(Config, writeback) == 32);

/// What the configuration space is made from.
#[derive(Debug, Clone, Copy)]
pub struct Geometry {
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes of a physical block: smaller writes cost more.
    pub block_size: u32,
    /// Bytes of a cluster: the granularity of discards and of good I/O.
    pub cluster_size: u32,
    /// Queues.
    pub queues: u16,
    /// Whether writes are cached until a flush.
    pub writeback: bool,
}

impl Config {
    /// The configuration space of a disk.
    #[must_use]
    pub fn new(of: &Geometry) -> Self {
        let blocks = |bytes: u32| bytes / 512;
        let exponent = blocks(of.block_size).max(1).ilog2();
        Self {
            capacity: (of.size / SECTOR).into(),
            size_max: SIZE_MAX.into(),
            seg_max: SEG_MAX.into(),
            geometry: [0; 4],
            blk_size: 512.into(),
            physical_block_exp: u8::try_from(exponent).unwrap_or(0),
            alignment_offset: 0,
            min_io_size: u16::try_from(blocks(of.block_size)).unwrap_or(1).into(),
            opt_io_size: blocks(of.cluster_size).into(),
            writeback: of.writeback.into(),
            unused0: 0,
            num_queues: of.queues.into(),
            max_discard_sectors: RANGE_SECTORS_MAX.into(),
            max_discard_seg: RANGES_MAX.into(),
            discard_sector_alignment: blocks(of.cluster_size).into(),
            max_write_zeroes_sectors: RANGE_SECTORS_MAX.into(),
            max_write_zeroes_seg: RANGES_MAX.into(),
            write_zeroes_may_unmap: 1,
            unused1: [0; 3],
        }
    }

    /// `len` bytes from byte `offset`, zeros beyond the end: front ends ask for the structure as
    /// they know it, shorter or longer than ours.
    #[must_use]
    pub fn read(&self, offset: u32, len: u32) -> Vec<u8> {
        let bytes = self.as_bytes().iter().copied().chain(std::iter::repeat(0));
        let (offset, len) = (usize::try_from(offset), usize::try_from(len));
        bytes
            .skip(offset.unwrap_or(usize::MAX))
            .take(len.unwrap_or(0))
            .collect()
    }
}

/// The new value of `writeback`, if that is what a driver's write to the configuration space is.
#[must_use]
pub fn written_writeback(offset: u32, bytes: &[u8]) -> Option<bool> {
    match (offset, bytes) {
        (WRITEBACK_AT, [0]) => Some(false),
        (WRITEBACK_AT, [1]) => Some(true),
        _ => None,
    }
}

/// What is asked for (clause 5.2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Op {
    /// Read sectors.
    In,
    /// Write sectors.
    Out,
    /// Make completed writes durable.
    Flush,
    /// The disk's serial.
    GetId,
    /// Forget ranges.
    Discard,
    /// Zero ranges.
    WriteZeroes,
    /// Anything else.
    #[default]
    Unknown,
}

/// The last byte of every request (clause 5.2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Done.
    Ok,
    /// Not done, or not wholly.
    IoErr,
    /// Not a request of ours.
    Unsupported,
}

impl Status {
    fn byte(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::IoErr => 1,
            Self::Unsupported => 2,
        }
    }
}

/// A chain that is no block request: there is no place for a header or for a status, so nothing
/// can be said to the driver about it and its queue is given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("a request of {readable} readable and {writable} writable bytes has no header or status")]
pub struct BadRequest {
    /// Bytes the device may read.
    pub readable: u64,
    /// Bytes the device may write.
    pub writable: u64,
}

/// A piece of a disk, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Range {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// WRITE_ZEROES may give the space back.
    pub may_unmap: bool,
}

/// One request, parsed. Reused from request to request.
#[derive(Debug, Default)]
pub struct Request {
    /// What is asked for.
    pub op: Op,
    /// First byte on the disk; IN and OUT.
    pub offset: u64,
    /// Data bytes; IN, OUT and GET_ID.
    pub len: u32,
    /// Where the data goes to or comes from.
    pub data: Vec<GuestRun>,
    /// What to discard or zero.
    pub ranges: Vec<Range>,
    /// Bytes the device may write, the status counted.
    pub used_len: u32,
    status: GuestRun,
}

fn total(runs: &[GuestRun]) -> u64 {
    runs.iter().map(|run| u64::from(run.len())).sum()
}

impl Request {
    /// Parses `chain`. The inner result is what to answer at once instead of carrying it out.
    ///
    /// `size` is the disk's, in bytes. Everything is checked here: what comes out is a legal
    /// request on a disk of that size.
    ///
    /// # Errors
    /// No header or no status.
    pub fn parse(
        &mut self,
        memory: &GuestMemory,
        chain: &mut Chain,
        size: u64,
    ) -> Result<Result<(), Status>, BadRequest> {
        let (readable, writable) = (total(&chain.readable), total(&chain.writable));
        let mut header = [0; 16];
        if memory.gather(&chain.readable, &mut header) < header.len() || writable == 0 {
            return Err(BadRequest { readable, writable });
        }
        let [a, b, c, d, _, _, _, _, s @ ..] = header;
        let (kind, sector) = (u32::from_le_bytes([a, b, c, d]), u64::from_le_bytes(s));
        let last = chain.writable.last_mut().expect("writable is not empty");
        self.status = last.cut(last.len() - 1, 1);
        *last = last.cut(0, last.len() - 1);
        if last.len() == 0 {
            // A buffer of its own, as drivers have it: no part of the data, aligned or not.
            chain.writable.pop();
        }
        self.used_len = u32::try_from(writable).unwrap_or(u32::MAX);
        self.op = op_of(kind);
        self.data.clear();
        self.ranges.clear();
        self.len = 0;
        Ok(self.check(
            memory,
            chain,
            sector,
            (readable - u64::from(HEADER_BYTES), writable - 1),
            size,
        ))
    }

    fn check(
        &mut self,
        memory: &GuestMemory,
        chain: &mut Chain,
        sector: u64,
        (out_len, in_len): (u64, u64),
        size: u64,
    ) -> Result<(), Status> {
        match self.op {
            Op::Unknown => Err(Status::Unsupported),
            Op::Flush => Ok(()),
            Op::GetId => {
                std::mem::swap(&mut self.data, &mut chain.writable);
                self.len = u32::try_from(in_len).unwrap_or(u32::MAX);
                Ok(())
            }
            Op::In => {
                self.check_data(sector, in_len, size)?;
                std::mem::swap(&mut self.data, &mut chain.writable);
                Ok(())
            }
            Op::Out => {
                self.check_data(sector, out_len, size)?;
                if in_len > 0 {
                    return Err(Status::IoErr);
                }
                cut_runs(&chain.readable, HEADER_BYTES, self.len, &mut self.data);
                Ok(())
            }
            Op::Discard | Op::WriteZeroes => self.check_ranges(memory, chain, out_len, size),
        }
    }

    fn check_data(&mut self, sector: u64, len: u64, size: u64) -> Result<(), Status> {
        let offset = sector.checked_mul(SECTOR).ok_or(Status::IoErr)?;
        let end = offset.checked_add(len).ok_or(Status::IoErr)?;
        if end > size || !len.is_multiple_of(SECTOR) || len > u64::from(DATA_MAX) {
            return Err(Status::IoErr);
        }
        self.offset = offset;
        self.len = u32::try_from(len).unwrap_or(DATA_MAX);
        Ok(())
    }

    fn check_ranges(
        &mut self,
        memory: &GuestMemory,
        chain: &Chain,
        len: u64,
        size: u64,
    ) -> Result<(), Status> {
        let count = len / u64::from(RANGE_BYTES);
        if !len.is_multiple_of(u64::from(RANGE_BYTES))
            || count == 0
            || count > u64::from(RANGES_MAX)
        {
            return Err(Status::IoErr);
        }
        let count = u32::try_from(count).unwrap_or(RANGES_MAX);
        for index in 0..count {
            let at = HEADER_BYTES + index * RANGE_BYTES;
            cut_runs(&chain.readable, at, RANGE_BYTES, &mut self.data);
            let mut raw = [0; 16];
            memory.gather(&self.data, &mut raw);
            self.data.clear();
            self.ranges.push(parse_range(raw, self.op, size)?);
        }
        Ok(())
    }

    /// Writes the status.
    pub fn answer(&self, memory: &GuestMemory, status: Status) {
        memory.write(&self.status, &[status.byte()]);
    }

    /// Answers GET_ID: up to 20 bytes, padded with zeros.
    pub fn answer_id(&self, memory: &GuestMemory, id: &str) {
        let mut padded = [0; ID_BYTES];
        for (to, from) in padded.iter_mut().zip(id.bytes()) {
            *to = from;
        }
        memory.scatter(&self.data, &padded);
    }
}

fn op_of(kind: u32) -> Op {
    match kind {
        abi::VIRTIO_BLK_T_IN => Op::In,
        abi::VIRTIO_BLK_T_OUT => Op::Out,
        abi::VIRTIO_BLK_T_FLUSH => Op::Flush,
        abi::VIRTIO_BLK_T_GET_ID => Op::GetId,
        abi::VIRTIO_BLK_T_DISCARD => Op::Discard,
        abi::VIRTIO_BLK_T_WRITE_ZEROES => Op::WriteZeroes,
        _ => Op::Unknown,
    }
}

/// Clause 5.2.6.2: unknown flags, and UNMAP in a DISCARD, are unsupported; a range beyond the
/// disk or longer than was announced is an error.
fn parse_range(raw: [u8; 16], op: Op, size: u64) -> Result<Range, Status> {
    let [a, b, c, d, e, f, g, h, i, j, k, l, flags @ ..] = raw;
    let sector = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
    let sectors = u32::from_le_bytes([i, j, k, l]);
    let flags = u32::from_le_bytes(flags);
    let allowed = match op {
        Op::WriteZeroes => abi::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
        Op::In | Op::Out | Op::Flush | Op::GetId | Op::Discard | Op::Unknown => 0,
    };
    if flags & !allowed != 0 {
        return Err(Status::Unsupported);
    }
    let offset = sector.checked_mul(SECTOR).ok_or(Status::IoErr)?;
    let len = u64::from(sectors) * SECTOR;
    let end = offset.checked_add(len).ok_or(Status::IoErr)?;
    if end > size || sectors > RANGE_SECTORS_MAX {
        return Err(Status::IoErr);
    }
    Ok(Range {
        offset,
        len,
        may_unmap: flags & abi::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0,
    })
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;
    use crate::sys::mmap::Region;

    #[test]
    fn a_status_of_its_own_leaves_nothing_in_the_data() {
        let file = File::from(memfd_create("guest", MFdFlags::empty()).expect("memfd"));
        file.set_len(1 << 16).expect("set_len");
        let region = Region::map(file, 0, 1 << 16, 0, 0).expect("mapped");
        let memory = GuestMemory::new(vec![region]).expect("memory");
        let run = |at, len| memory.contiguous(at, len).expect("in memory");
        let mut request = Request::default();
        let mut chain = Chain {
            head: 0,
            readable: vec![run(0, 16)],
            writable: vec![run(4096, 4096), run(17, 1)],
        };
        let parsed = request.parse(&memory, &mut chain, 1 << 20);
        assert_eq!(parsed, Ok(Ok(())));
        assert_eq!((request.op, request.len), (Op::In, 4096));
        assert!(
            memory.is_aligned(&request.data, 4096),
            "no bounce buffer is needed"
        );
        // And one that is the end of the data's last buffer.
        let mut chain = Chain {
            head: 0,
            readable: vec![run(0, 16)],
            writable: vec![run(4096, 513)],
        };
        assert_eq!(request.parse(&memory, &mut chain, 1 << 20), Ok(Ok(())));
        assert_eq!((request.len, request.data.len()), (512, 1));
    }
}
