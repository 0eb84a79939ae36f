//! What the vhost-user tests share: a guest's memory and a vhost-user front end written from the
//! protocol document alone, which can be as rude as a test wants it.

use std::fs::File;
use std::io::{ErrorKind, IoSlice, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

pub(crate) use crate::random::Random;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

/// The environment's `TIDEPOOL_SEED`, or a fresh seed; printed either way.
pub fn seed() -> u64 {
    let given = std::env::var("TIDEPOOL_SEED")
        .ok()
        .and_then(|text| text.parse().ok());
    let seed = given.unwrap_or_else(|| u64::from(std::process::id()) << 20 | 0x5EED);
    #[expect(clippy::print_stdout, reason = "a failure is repeated with its seed")]
    {
        println!("TIDEPOOL_SEED={seed}");
    }
    seed
}

/// One piece of guest memory in a memfd.
pub struct Ram {
    pub file: File,
    pub map: MmapRegion,
    pub gpa: u64,
    pub hva: u64,
}

impl Ram {
    pub fn new(gpa: u64, len: usize) -> Self {
        let fd = memfd_create("guest", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING);
        Self::on(File::from(fd.expect("memfd")), gpa, len)
    }

    /// In a file on tmpfs, which cannot be sealed.
    pub fn new_unsealable(gpa: u64, len: usize) -> Self {
        let file = tempfile::tempfile_in("/dev/shm");
        Self::on(file.expect("a file on tmpfs"), gpa, len)
    }

    pub fn on(file: File, gpa: u64, len: usize) -> Self {
        file.set_len(u64::try_from(len).expect("length"))
            .expect("set_len");
        let shared = file.try_clone().expect("dup");
        let map = MmapRegion::from_file(FileOffset::new(shared, 0), len).expect("mmap");
        // Any number will do as the front end's own address; make it differ from the gpa.
        Self {
            file,
            map,
            gpa,
            hva: 0x7000_0000_0000 + gpa,
        }
    }

    pub fn len(&self) -> u64 {
        u64::try_from(self.map.size()).expect("length")
    }

    fn at(&self, gpa: u64) -> usize {
        usize::try_from(gpa - self.gpa).expect("address")
    }

    pub fn write(&self, gpa: u64, bytes: &[u8]) {
        let slice = self
            .map
            .get_slice(self.at(gpa), bytes.len())
            .expect("in memory");
        slice.copy_from(bytes);
    }

    pub fn read(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.map
            .get_slice(self.at(gpa), len)
            .expect("in memory")
            .copy_to(&mut bytes[..]);
        bytes
    }

    pub fn load_u16(&self, gpa: u64) -> u16 {
        let slice = self.map.get_slice(self.at(gpa), 2).expect("in memory");
        slice
            .load(0, std::sync::atomic::Ordering::SeqCst)
            .expect("aligned")
    }

    pub fn store_u16(&self, gpa: u64, value: u16) {
        let slice = self.map.get_slice(self.at(gpa), 2).expect("in memory");
        slice
            .store(value, 0, std::sync::atomic::Ordering::SeqCst)
            .expect("aligned");
    }

    /// As ADD_MEM_REG and SET_MEM_TABLE describe a region.
    pub fn describe(&self) -> Vec<u8> {
        [self.gpa, self.len(), self.hva, 0]
            .into_iter()
            .flat_map(u64::to_le_bytes)
            .collect()
    }
}

pub mod req {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
}

pub mod feature {
    pub const RO: u64 = 1 << 5;
    pub const FLUSH: u64 = 1 << 9;
    pub const CONFIG_WCE: u64 = 1 << 11;
    pub const MQ: u64 = 1 << 12;
    pub const INDIRECT: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const PROTOCOL: u64 = 1 << 30;
    pub const VERSION_1: u64 = 1 << 32;
}

const NEED_REPLY: u32 = 8;

/// A vhost-user connection, front-end side.
pub struct Wire {
    pub stream: UnixStream,
    /// REPLY_ACK was negotiated: every request is acknowledged.
    pub acks: bool,
}

impl Wire {
    pub fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).expect("the back end listens");
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .expect("timeout");
        Self {
            stream,
            acks: false,
        }
    }

    /// Sends a request and leaves its reply where it is; whether it could be sent.
    pub fn post(&mut self, request: u32) -> bool {
        self.send(request, 0, &[], &[])
    }

    fn send(&self, request: u32, flags: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        let len = u32::try_from(payload.len()).expect("length");
        let mut bytes: Vec<u8> = [request, 1 | flags, len]
            .into_iter()
            .flat_map(u32::to_le_bytes)
            .collect();
        bytes.extend_from_slice(payload);
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let control = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() {
            &control[..0]
        } else {
            &control[..]
        };
        let iov = [IoSlice::new(&bytes)];
        // A back end that has hung up shows in the reply that does not come.
        let sent = sendmsg::<()>(
            self.stream.as_raw_fd(),
            &iov,
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        );
        sent.is_ok()
    }

    /// The payload of a reply, or `None` if the back end hung up.
    pub fn reply(&mut self, request: u32) -> Option<Vec<u8>> {
        let mut header = [0; 12];
        match self.stream.read_exact(&mut header) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                panic!("no reply to request {request} in time")
            }
            Err(_hung_up) => return None,
        }
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("4 bytes"));
        assert_eq!(word(0), request, "reply to another request");
        assert_eq!(word(4) & 7, 5, "version and reply flag");
        let mut payload = vec![0; usize::try_from(word(8)).expect("length")];
        self.stream.read_exact(&mut payload).ok()?;
        Some(payload)
    }

    /// Sends a request that has no reply of its own; whether it was accepted.
    pub fn tell(&mut self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        if !self.acks {
            self.send(request, 0, payload, fds);
            return true;
        }
        self.send(request, NEED_REPLY, payload, fds);
        self.reply(request).is_some_and(|reply| reply == [0; 8])
    }

    /// Sends a request without a descriptor; what the acknowledgement says, or `None` if the back
    /// end hung up.
    pub fn acknowledgement(&mut self, request: u32, payload: &[u8]) -> Option<u64> {
        self.send(request, NEED_REPLY, payload, &[]);
        let reply = self.reply(request)?;
        Some(u64::from_le_bytes(reply.try_into().expect("8 bytes")))
    }

    pub fn ask(&mut self, request: u32, payload: &[u8]) -> Option<Vec<u8>> {
        self.send(request, 0, payload, &[]);
        self.reply(request)
    }

    pub fn ask_u64(&mut self, request: u32) -> u64 {
        let reply = self.ask(request, &[]).expect("a reply");
        u64::from_le_bytes(reply.try_into().expect("8 bytes"))
    }

    /// Waits until the back end hangs up.
    pub fn wait_hangup(&mut self) {
        let mut rest = Vec::new();
        let ended = self
            .stream
            .read_to_end(&mut rest)
            .map_err(|error| error.kind());
        let is_hangup = matches!(ended, Ok(_) | Err(ErrorKind::ConnectionReset));
        assert!(is_hangup, "the back end did not hang up in time: {ended:?}");
    }

    pub fn config(&mut self, offset: u32, len: u32) -> Option<Vec<u8>> {
        let mut payload: Vec<u8> = [offset, len, 0]
            .into_iter()
            .flat_map(u32::to_le_bytes)
            .collect();
        payload.resize(12 + usize::try_from(len).expect("length"), 0);
        let reply = self.ask(req::GET_CONFIG, &payload)?;
        Some(reply[12..].to_vec())
    }

    pub fn set_config(&mut self, offset: u32, bytes: &[u8]) -> bool {
        let len = u32::try_from(bytes.len()).expect("length");
        let mut payload: Vec<u8> = [offset, len, 0]
            .into_iter()
            .flat_map(u32::to_le_bytes)
            .collect();
        payload.extend_from_slice(bytes);
        self.tell(req::SET_CONFIG, &payload, &[])
    }

    pub fn vring_state(&mut self, request: u32, index: u32, num: u32) -> bool {
        let payload: Vec<u8> = [index, num]
            .into_iter()
            .flat_map(u32::to_le_bytes)
            .collect();
        self.tell(request, &payload, &[])
    }

    pub fn vring_fd(&mut self, request: u32, index: u32, fd: BorrowedFd<'_>) -> bool {
        self.tell(request, &u64::from(index).to_le_bytes(), &[fd])
    }

    pub fn stop(&mut self, index: u32) -> Option<u16> {
        let payload: Vec<u8> = [index, 0].into_iter().flat_map(u32::to_le_bytes).collect();
        let reply = self.ask(req::GET_VRING_BASE, &payload)?;
        Some(u16::from_le_bytes([reply[4], reply[5]]))
    }

    pub fn set_mem_table(&mut self, rams: &[&Ram]) -> bool {
        let count = u64::try_from(rams.len()).expect("count");
        let mut payload = count.to_le_bytes().to_vec();
        payload.extend(rams.iter().flat_map(|ram| ram.describe()));
        let fds: Vec<BorrowedFd<'_>> = rams.iter().map(|ram| ram.file.as_fd()).collect();
        self.tell(req::SET_MEM_TABLE, &payload, &fds)
    }

    pub fn mem_region(&mut self, request: u32, ram: &Ram) -> bool {
        let mut payload = vec![0; 8];
        payload.extend(ram.describe());
        if request == req::ADD_MEM_REG {
            return self.tell(request, &payload, &[ram.file.as_fd()]);
        }
        self.tell(request, &payload, &[])
    }
}

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// A descriptor: guest address, bytes, flags, next.
#[derive(Clone, Copy)]
pub struct Desc(pub u64, pub u32, pub u16, pub u16);

impl Desc {
    pub fn bytes(self) -> Vec<u8> {
        let mut bytes = self.0.to_le_bytes().to_vec();
        bytes.extend(self.1.to_le_bytes());
        bytes.extend(self.2.to_le_bytes());
        bytes.extend(self.3.to_le_bytes());
        bytes
    }
}

/// The driver's side of one queue. Its rings take 64 KiB at `at`.
pub struct Vq {
    pub index: u32,
    pub size: u16,
    pub at: u64,
    pub avail: u16,
    pub used: u16,
    pub kick: EventFd,
    pub call: EventFd,
    pub event_idx: bool,
}

impl Vq {
    pub fn new(index: u32, size: u16, at: u64, event_idx: bool) -> Self {
        let event = || {
            EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).expect("eventfd")
        };
        Self {
            index,
            size,
            at,
            avail: 0,
            used: 0,
            kick: event(),
            call: event(),
            event_idx,
        }
    }

    pub fn desc_at(&self) -> u64 {
        self.at
    }
    pub fn avail_at(&self) -> u64 {
        self.at + 0x8000
    }
    pub fn used_at(&self) -> u64 {
        self.at + 0xC000
    }

    /// Sets the ring up and starts it.
    pub fn start(&self, wire: &mut Wire, ram: &Ram, is_enabled_by_hand: bool) -> bool {
        let hva = |gpa: u64| gpa - ram.gpa + ram.hva;
        let mut addr = self.index.to_le_bytes().to_vec();
        addr.extend(0_u32.to_le_bytes());
        let parts = [
            hva(self.desc_at()),
            hva(self.used_at()),
            hva(self.avail_at()),
            0,
        ];
        addr.extend(parts.into_iter().flat_map(u64::to_le_bytes));
        wire.vring_state(req::SET_VRING_NUM, self.index, self.size.into())
            && wire.vring_state(req::SET_VRING_BASE, self.index, self.avail.into())
            && wire.tell(req::SET_VRING_ADDR, &addr, &[])
            && wire.vring_fd(req::SET_VRING_KICK, self.index, self.kick.as_fd())
            && wire.vring_fd(req::SET_VRING_CALL, self.index, self.call.as_fd())
            && (!is_enabled_by_hand || wire.vring_state(req::SET_VRING_ENABLE, self.index, 1))
    }

    pub fn set_desc(&self, ram: &Ram, index: u16, desc: Desc) {
        ram.write(self.desc_at() + 16 * u64::from(index), &desc.bytes());
    }

    /// Makes `head` available without showing it.
    pub fn push(&mut self, ram: &Ram, head: u16) {
        let slot = u64::from(self.avail % self.size);
        ram.write(self.avail_at() + 4 + 2 * slot, &head.to_le_bytes());
        self.avail = self.avail.wrapping_add(1);
    }

    /// Shows what was pushed, and kicks if the device wants it.
    pub fn show(&mut self, ram: &Ram, before: u16) {
        ram.store_u16(self.avail_at() + 2, self.avail);
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        let must_kick = if self.event_idx {
            let event = ram.load_u16(self.used_at() + 4 + 8 * u64::from(self.size));
            let (new, old) = (self.avail, before);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            ram.load_u16(self.used_at()) & 1 == 0
        };
        if must_kick {
            self.kick.write(1).expect("kick");
        }
    }

    /// Writes a chain of descriptors from index `first` and makes it available.
    pub fn submit(&mut self, ram: &Ram, first: u16, chain: &[(u64, u32, u16)]) {
        let last = chain.len() - 1;
        for (offset, (addr, len, flags)) in chain.iter().enumerate() {
            let index = first + u16::try_from(offset).expect("short chain");
            let next = if offset < last { NEXT } else { 0 };
            self.set_desc(ram, index, Desc(*addr, *len, flags | next, index + 1));
        }
        let before = self.avail;
        self.push(ram, first);
        self.show(ram, before);
    }

    /// The next used entry, waiting for the device's call; `None` after `limit`.
    pub fn wait_used(&mut self, ram: &Ram, limit: Duration) -> Option<(u32, u32)> {
        loop {
            if self.event_idx {
                // Call me at the next one.
                ram.store_u16(self.avail_at() + 4 + 2 * u64::from(self.size), self.used);
                std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
            }
            if ram.load_u16(self.used_at() + 2) != self.used {
                let slot = u64::from(self.used % self.size);
                let raw = ram.read(self.used_at() + 4 + 8 * slot, 8);
                self.used = self.used.wrapping_add(1);
                let word = |at: usize| u32::from_le_bytes(raw[at..at + 4].try_into().expect("4"));
                return Some((word(0), word(4)));
            }
            let mut fds = [PollFd::new(self.call.as_fd(), PollFlags::POLLIN)];
            let timeout = PollTimeout::try_from(limit).expect("timeout");
            if poll(&mut fds, timeout).expect("poll") == 0 {
                return None;
            }
            let _count = self.call.read();
        }
    }
}

/// An eventfd for tests that need one more.
pub fn eventfd() -> OwnedFd {
    EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
        .expect("eventfd")
        .into()
}
