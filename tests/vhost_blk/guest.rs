//! A guest with a virtio-blk driver of few words: one request at a time, or many in flight by
//! hand.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

use tempfile::TempDir;
use tidepool::vhost_blk::{DiskStats, Event, Server, ServerOptions};

use crate::client::{Desc, INDIRECT, NEXT, Ram, Vq, WRITE, Wire, feature, req};
use crate::disk::{self, Kind};

pub const IN: u32 = 0;
pub const OUT: u32 = 1;
pub const FLUSH: u32 = 4;
pub const GET_ID: u32 = 8;
pub const DISCARD: u32 = 11;
pub const WRITE_ZEROES: u32 = 13;

pub const OK: u8 = 0;
pub const IOERR: u8 = 1;
pub const UNSUPP: u8 = 2;

/// Long enough for anything that is going to happen.
pub const SOON: Duration = Duration::from_secs(20);

/// Guest memory: rings from the start, headers and status bytes next, data from 4 MiB.
pub const RAM: usize = 16 << 20;
pub const GPA: u64 = 0x10_0000;
pub const HEADERS: u64 = GPA + (2 << 20);
pub const DATA: u64 = GPA + (4 << 20);
/// Indirect tables, 16 KiB each.
const TABLES: u64 = HEADERS + (1 << 20);

/// A server with one disk.
pub struct Bench {
    pub dir: TempDir,
    pub server: Server,
    pub socket: PathBuf,
    pub events: Receiver<Event>,
}

pub fn options() -> ServerOptions {
    ServerOptions {
        workers: 2,
        no_space_timeout: Duration::from_secs(5),
        polling_us: 0,
        any_memory: false,
    }
}

impl Bench {
    pub fn new(kind: Kind, size: u64, trouble: bool) -> Self {
        Self::with(options(), |dir| {
            disk::make(dir, "disk", size, kind, trouble)
        })
    }

    pub fn with(
        options: ServerOptions,
        make: impl FnOnce(&Path) -> tidepool::cowdisk::Disk,
    ) -> Self {
        let dir = TempDir::new().expect("a directory");
        let (to, events) = sync_channel(64);
        let server = Server::start_reporting(options, to).expect("a server");
        let socket = dir.path().join("disk.sock");
        server
            .add(make(dir.path()), &socket, 4)
            .expect("the disk is served");
        Self {
            dir,
            server,
            socket,
            events,
        }
    }

    pub fn stats(&self) -> DiskStats {
        self.server.stats().swap_remove(0).1
    }
}

pub struct Guest {
    pub wire: Wire,
    pub ram: Ram,
    pub queues: Vec<Vq>,
}

/// How a guest negotiates.
#[derive(Clone, Copy)]
pub struct Style {
    pub features: u64,
    /// Protocol features, if any are negotiated at all.
    pub protocol: Option<u64>,
    pub queues: u32,
    pub size: u16,
    /// ADD_MEM_REG instead of SET_MEM_TABLE.
    pub slots: bool,
}

pub const MODERN: Style = Style {
    features: feature::FLUSH
        | feature::CONFIG_WCE
        | feature::MQ
        | feature::INDIRECT
        | feature::EVENT_IDX
        | feature::VERSION_1,
    protocol: Some(0x1 | 0x8 | 0x200 | 0x2000 | 0x8000),
    queues: 1,
    size: 128,
    slots: true,
};

pub const PLAIN: Style = Style {
    features: feature::VERSION_1,
    protocol: None,
    queues: 1,
    size: 64,
    slots: false,
};

impl Guest {
    pub fn boot(socket: &Path, style: Style) -> Self {
        Self::try_boot(socket, style).expect("the back end accepts an ordinary guest")
    }

    pub fn try_boot(socket: &Path, style: Style) -> Option<Self> {
        Self::try_boot_on(Ram::new(GPA, RAM), socket, style)
    }

    pub fn try_boot_on(ram: Ram, socket: &Path, style: Style) -> Option<Self> {
        let mut wire = Wire::connect(socket);
        wire.tell(req::SET_OWNER, &[], &[]);
        let offered = wire.ask_u64(req::GET_FEATURES);
        let mut features = style.features;
        assert_eq!(features & !offered, 0, "offered {offered:#x}");
        if let Some(protocol) = style.protocol {
            features |= feature::PROTOCOL;
            let offered = wire.ask_u64(req::GET_PROTOCOL_FEATURES);
            assert_eq!(protocol & !offered, 0, "offered {offered:#x}");
            wire.tell(req::SET_PROTOCOL_FEATURES, &protocol.to_le_bytes(), &[]);
        }
        wire.tell(req::SET_FEATURES, &features.to_le_bytes(), &[]);
        wire.acks = style.protocol.is_some_and(|bits| bits & 8 != 0);
        let is_mapped = if style.slots {
            wire.mem_region(req::ADD_MEM_REG, &ram)
        } else {
            wire.set_mem_table(&[&ram])
        };
        if !is_mapped {
            return None;
        }
        let event_idx = style.features & feature::EVENT_IDX != 0;
        let queues: Vec<Vq> = (0..style.queues)
            .map(|i| Vq::new(i, style.size, GPA + u64::from(i) * 0x1_0000, event_idx))
            .collect();
        let is_started = queues
            .iter()
            .all(|vq| vq.start(&mut wire, &ram, style.protocol.is_some()));
        is_started.then_some(Self { wire, ram, queues })
    }

    /// The same guest after a restart.
    pub fn boot_after(old: Self, socket: &Path) -> Self {
        drop(old);
        Self::boot(socket, MODERN)
    }

    /// Puts a request of the given buffers on queue `q`, in descriptors from `first`, its header
    /// and status in slot `first`.
    pub fn put(&mut self, q: usize, first: u16, kind: u32, sector: u64, bufs: &[(u64, u32, u16)]) {
        let slot = self.slot(q, first);
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        self.ram.write(slot, &header);
        self.ram.write(slot + 16, &[0xFF]);
        let mut chain = vec![(slot, 16, 0)];
        chain.extend_from_slice(bufs);
        chain.push((slot + 16, 1, WRITE));
        self.queues[q].submit(&self.ram, first, &chain);
    }

    /// As [`Guest::put`], in an indirect table of up to 1024 descriptors; `slot` is below 64.
    pub fn put_indirect(
        &mut self,
        q: usize,
        slot: u16,
        kind: u32,
        sector: u64,
        bufs: &[(u64, u32, u16)],
    ) {
        let at = self.slot(q, slot);
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        self.ram.write(at, &header);
        self.ram.write(at + 16, &[0xFF]);
        let mut chain = vec![(at, 16, 0)];
        chain.extend_from_slice(bufs);
        chain.push((at + 16, 1, WRITE));
        let last = chain.len() - 1;
        let table = chain
            .iter()
            .enumerate()
            .flat_map(|(index, (addr, len, flags))| {
                let next = if index < last { NEXT } else { 0 };
                Desc(*addr, *len, flags | next, index as u16 + 1).bytes()
            });
        let table: Vec<u8> = table.collect();
        let place = TABLES + u64::from(slot) * 0x4000;
        self.ram.write(place, &table);
        self.queues[q].submit(&self.ram, slot, &[(place, table.len() as u32, INDIRECT)]);
    }

    /// Puts 40 writes of `len` bytes side by side on queue `q`.
    pub fn put_writes(&mut self, q: usize, len: u32) {
        for i in 0..40 {
            let at = u64::from(i) * u64::from(len);
            self.put(q, i * 3, OUT, at / 512, &[(DATA + at, len, 0)]);
        }
    }

    fn slot(&self, q: usize, first: u16) -> u64 {
        HEADERS + u64::try_from(q).expect("index") * 0x4_0000 + u64::from(first) * 32
    }

    pub fn status(&self, q: usize, first: u16) -> u8 {
        self.ram.read(self.slot(q, first) + 16, 1)[0]
    }

    pub fn wait(&mut self, q: usize) -> Option<(u32, u32)> {
        self.queues[q].wait_used(&self.ram, SOON)
    }

    /// One request, start to end; its status.
    pub fn request(&mut self, q: usize, kind: u32, sector: u64, bufs: &[(u64, u32, u16)]) -> u8 {
        self.put(q, 0, kind, sector, bufs);
        let (head, _len) = self.wait(q).expect("an answer");
        assert_eq!(head, 0, "the head that was submitted");
        self.status(q, 0)
    }

    pub fn write(&mut self, q: usize, sector: u64, bytes: &[u8]) -> u8 {
        self.ram.write(DATA, bytes);
        let len = u32::try_from(bytes.len()).expect("length");
        self.request(q, OUT, sector, &[(DATA, len, 0)])
    }

    pub fn read(&mut self, q: usize, sector: u64, len: usize) -> Vec<u8> {
        self.ram.write(DATA, &vec![0xEE; len]);
        let bytes = u32::try_from(len).expect("length");
        assert_eq!(self.request(q, IN, sector, &[(DATA, bytes, WRITE)]), OK);
        self.ram.read(DATA, len)
    }

    pub fn ranges(&mut self, q: usize, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        let mut bytes = Vec::new();
        for (sector, sectors, flags) in ranges {
            bytes.extend(sector.to_le_bytes());
            bytes.extend(sectors.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
        }
        self.ram.write(DATA, &bytes);
        let len = u32::try_from(bytes.len()).expect("length");
        self.request(q, kind, 0, &[(DATA, len, 0)])
    }

    /// Asks for a report of broken rings.
    pub fn watch_errors(&mut self, q: u32) -> std::os::fd::OwnedFd {
        let event = crate::client::eventfd();
        assert!(self.wire.vring_fd(req::SET_VRING_ERR, q, event.as_fd()));
        event
    }
}
