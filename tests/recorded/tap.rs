//! The disk as the guest sees it: an NBD server for QEMU's own NBD client, which hands every request
//! on to the server under test over vhost-user-blk and records what was asked and what was
//! answered. A second export, `notes`, is where the guest says what it knows to be durable.
//!
//! Flags and messages: the NBD protocol, fixed newstyle negotiation and simple replies.

use super::log::{Recorder, Tag, hash};
use crate::guest::{Device, Done, Kind};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use tidepool::sync::spawn_named;

const DEPTH: u16 = 64;
/// Bytes of a request to the server; longer ones are cut.
pub(crate) const BLOCK: u32 = 64 << 10;
const CLEAR_MAX: u64 = 4 << 20;
const SECTOR: usize = 512;
const NOTES_LEN: u64 = 1 << 20;

const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Has flags, flush, trim, write zeroes.
const EXPORT_FLAGS: u16 = 1 | 1 << 2 | 1 << 5 | 1 << 6;
const EIO: u32 = 5;

struct Request {
    command: u16,
    handle: [u8; 8],
    offset: u64,
    len: u32,
    data: Vec<u8>,
}

fn read_array<const N: usize>(stream: &mut UnixStream) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Agrees on an export; its name.
fn negotiate(stream: &mut UnixStream, disk_len: u64) -> io::Result<String> {
    stream.write_all(b"NBDMAGICIHAVEOPT\0\x03")?;
    let _flags: [u8; 4] = read_array(stream)?;
    loop {
        let magic: [u8; 8] = read_array(stream)?;
        assert_eq!(&magic, b"IHAVEOPT");
        let option = u32::from_be_bytes(read_array(stream)?);
        let len = u32::from_be_bytes(read_array(stream)?);
        let mut data = vec![0; usize::try_from(len).expect("fits")];
        stream.read_exact(&mut data)?;
        let mut answer = |kind: u32, data: &[u8]| {
            let mut bytes = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
            bytes.extend(option.to_be_bytes());
            bytes.extend(kind.to_be_bytes());
            bytes.extend(u32::try_from(data.len()).expect("short").to_be_bytes());
            bytes.extend(data);
            stream.write_all(&bytes)
        };
        if option != 7 {
            answer(1 << 31 | 1, &[])?; // unsupported: QEMU goes on without
            continue;
        }
        let name_len = u32::from_be_bytes(data[..4].try_into().expect("4 bytes"));
        let name = &data[4..4 + usize::try_from(name_len).expect("fits")];
        let name = String::from_utf8_lossy(name).into_owned();
        let size = if name == "notes" { NOTES_LEN } else { disk_len };
        let mut info = vec![0, 0];
        info.extend(size.to_be_bytes());
        info.extend(EXPORT_FLAGS.to_be_bytes());
        answer(3, &info)?;
        answer(1, &[])?;
        return Ok(name);
    }
}

/// The next request; `None` at the end.
fn read_request(stream: &mut UnixStream) -> io::Result<Option<Request>> {
    let Ok(head) = read_array::<28>(stream) else {
        return Ok(None);
    };
    let word = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().expect("4 bytes"));
    assert_eq!(word(0), REQUEST_MAGIC);
    let command = u16::from_be_bytes([head[6], head[7]]);
    let len = word(24);
    let data_len = if command == 1 { len } else { 0 };
    let mut data = vec![0; usize::try_from(data_len).expect("fits")];
    stream.read_exact(&mut data)?;
    if command == 2 {
        return Ok(None);
    }
    Ok(Some(Request {
        command,
        handle: head[8..16].try_into().expect("8 bytes"),
        offset: u64::from_be_bytes(head[16..24].try_into().expect("8 bytes")),
        len,
        data,
    }))
}

fn reply(stream: &mut UnixStream, handle: [u8; 8], is_ok: bool, data: &[u8]) -> io::Result<()> {
    let mut head = REPLY_MAGIC.to_be_bytes().to_vec();
    head.extend(if is_ok { 0 } else { EIO }.to_be_bytes());
    head.extend(handle);
    stream.write_all(&head)?;
    if is_ok {
        stream.write_all(data)
    } else {
        Ok(())
    }
}

/// Says yes to everything, and records what was written.
fn serve_notes(stream: &mut UnixStream, recorder: &Recorder) -> io::Result<()> {
    while let Some(request) = read_request(stream)? {
        let mut data = Vec::new();
        match request.command {
            0 => data = vec![0; usize::try_from(request.len).expect("fits")],
            1 => {
                for text in request.data.split(|byte| *byte == 0 || *byte == b'\n') {
                    if !text.is_empty() {
                        recorder.add(Tag::Note, 0, 0, 0, text);
                    }
                }
            }
            _ => {}
        }
        reply(stream, request.handle, true, &data)?;
    }
    Ok(())
}

/// Part of a request, as the server gets it.
#[derive(Debug, Clone, Copy)]
struct Piece {
    number: u64,
    /// Bytes into the request.
    at: u64,
    len: u64,
}

struct Open {
    request: Request,
    left: usize,
    is_ok: bool,
}

struct Tap {
    stream: UnixStream,
    device: Device,
    recorder: Arc<Recorder>,
    next: u64,
    open: BTreeMap<u64, Open>,
    backlog: VecDeque<Piece>,
    slots: Vec<Option<Piece>>,
}

impl Tap {
    fn run(&mut self) -> io::Result<()> {
        let mut done: Vec<Done> = Vec::new();
        let mut is_over = false;
        while !is_over || !self.open.is_empty() {
            self.device.want_call(true);
            if !self.device.has_done() {
                let mut fds = [
                    PollFd::new(self.device.call_fd(), PollFlags::POLLIN),
                    PollFd::new(self.stream.as_fd(), PollFlags::POLLIN),
                ];
                let watched = if is_over { 1 } else { 2 };
                poll(&mut fds[..watched], PollTimeout::NONE)?;
            }
            self.device
                .sleep_at_most(0)
                .map_err(|e| io::Error::other(e.to_string()))?;
            done.clear();
            self.device.collect_done(&mut done);
            for one in &done {
                self.finish(*one)?;
            }
            let is_readable = {
                let mut fds = [PollFd::new(self.stream.as_fd(), PollFlags::POLLIN)];
                !is_over && poll(&mut fds, PollTimeout::ZERO)? > 0
            };
            if is_readable {
                match read_request(&mut self.stream)? {
                    Some(request) => self.begin(request),
                    None => is_over = true,
                }
            }
            self.submit()?;
        }
        Ok(())
    }

    /// Records a request and cuts it up.
    fn begin(&mut self, request: Request) {
        self.next += 1;
        let number = self.next;
        let (offset, len) = (request.offset, u64::from(request.len));
        let tag = match request.command {
            0 => None,
            1 => Some(Tag::DiskWrite),
            3 => Some(Tag::DiskFlush),
            4 => Some(Tag::DiskDiscard),
            6 => Some(Tag::DiskZero),
            other => panic!("QEMU was not offered NBD command {other}"),
        };
        if let Some(tag) = tag {
            let sectors = request.data.chunks(SECTOR);
            let hashes: Vec<u8> = sectors.flat_map(|s| hash(s).to_le_bytes()).collect();
            self.recorder.add(tag, number, offset, len, &hashes);
        }
        let step = match request.command {
            0 | 1 => u64::from(BLOCK),
            _ => CLEAR_MAX,
        };
        let mut at = 0;
        let mut left = 0;
        while at < len || left == 0 {
            let len = step.min(len - at);
            self.backlog.push_back(Piece { number, at, len });
            left += 1;
            at += len;
        }
        let mut request = request;
        if request.command == 0 {
            request.data = vec![0; usize::try_from(request.len).expect("fits")];
        }
        self.open.insert(
            number,
            Open {
                request,
                left,
                is_ok: true,
            },
        );
    }

    fn submit(&mut self) -> io::Result<()> {
        for slot in 0..DEPTH {
            if self.slots[usize::from(slot)].is_some() {
                continue;
            }
            let Some(piece) = self.backlog.pop_front() else {
                break;
            };
            let request = &self.open[&piece.number].request;
            let offset = request.offset + piece.at;
            let at = usize::try_from(piece.at).expect("fits");
            let len = u32::try_from(piece.len).expect("cut");
            match request.command {
                0 => self.device.submit_part(Kind::Read, slot, offset, len)?,
                1 => {
                    let end = at + usize::try_from(piece.len).expect("fits");
                    self.device.fill(slot, &request.data[at..end]);
                    self.device.submit_part(Kind::Write, slot, offset, len)?;
                }
                3 => self.device.submit(Kind::Flush, slot, 0)?,
                command => self.device.clear(command == 4, slot, offset, piece.len)?,
            }
            self.slots[usize::from(slot)] = Some(piece);
        }
        self.device.kick()
    }

    fn finish(&mut self, done: Done) -> io::Result<()> {
        let piece = self.slots[usize::from(done.slot)].take();
        let piece = piece.expect("the server answers what it was asked");
        let open = self.open.get_mut(&piece.number).expect("in flight");
        open.is_ok &= done.is_ok;
        open.left -= 1;
        if open.request.command == 0 {
            let at = usize::try_from(piece.at).expect("fits");
            let end = at + usize::try_from(piece.len).expect("fits");
            self.device.take(done.slot, &mut open.request.data[at..end]);
        }
        if open.left > 0 {
            return Ok(());
        }
        let open = self.open.remove(&piece.number).expect("in flight");
        assert!(
            open.is_ok,
            "the server refused NBD command {}",
            open.request.command
        );
        if open.request.command != 0 {
            self.recorder.add(Tag::DiskEnd, piece.number, 0, 0, &[]);
        }
        let data: &[u8] = if open.request.command == 0 {
            &open.request.data
        } else {
            &[]
        };
        reply(&mut self.stream, open.request.handle, open.is_ok, data)
    }
}

/// Serves one guest: the disk behind `device`, and its notes. Ends when the guest is gone from both.
pub(crate) fn serve(
    listener: &UnixListener,
    device: Device,
    recorder: &Arc<Recorder>,
) -> io::Result<()> {
    let disk_len = device.capacity();
    let mut device = Some(device);
    let mut threads = Vec::new();
    for _ in 0..2 {
        let (mut stream, _) = listener.accept()?;
        let name = negotiate(&mut stream, disk_len)?;
        let recorder = Arc::clone(recorder);
        let thread = if name == "notes" {
            spawn_named("notes", move || serve_notes(&mut stream, &recorder))?
        } else {
            let mut tap = Tap {
                stream,
                device: device.take().expect("one guest, one disk"),
                recorder,
                next: 0,
                open: BTreeMap::new(),
                backlog: VecDeque::new(),
                slots: vec![None; usize::from(DEPTH)],
            };
            spawn_named("tap", move || tap.run())?
        };
        threads.push(thread);
    }
    for thread in threads {
        thread.join().expect("a tap does not panic")?;
    }
    Ok(())
}

/// The session with the server under test.
///
/// # Panics
/// The server does not offer it.
pub(crate) fn connect(socket: &std::path::Path) -> Device {
    use virtio_driver::VirtioBlkFeatureFlags as Flags;
    let more = Flags::DISCARD | Flags::WRITE_ZEROES;
    let device = Device::connect_with(socket, DEPTH, BLOCK, more).expect("connects");
    assert!(Flags::from_bits_truncate(device.features()).contains(more));
    device
}
