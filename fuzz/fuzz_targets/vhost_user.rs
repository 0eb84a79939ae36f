//! Any messages from a front end, with any descriptors: the session ends or goes on, and the next
//! client is served.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tidepool::cowdisk::{self, Disk, NewDisk};
use tidepool::pool::{CreateOptions, OpenOptions, Pool, open};
use tidepool::storage::FileStorage;
use tidepool::vhost_blk::{Server, ServerOptions};

/// Bytes of guest memory.
const MEMORY: u64 = 1 << 20;

struct Place {
    _server: Server,
    socket: PathBuf,
    memory: File,
}

fn place() -> &'static Place {
    static PLACE: OnceLock<Place> = OnceLock::new();
    PLACE.get_or_init(|| {
        let dir = std::env::temp_dir().join(format!("tidepool-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a directory");
        let file = FileStorage::create_new(dir.join("pool"), 64 << 20).expect("a file");
        open::create(&file, &CreateOptions::new(64 << 20)).expect("a pool");
        let pool = Pool::open(Arc::new(file), &OpenOptions::default()).expect("opens");
        cowdisk::create(&pool, &NewDisk::empty("d", 8 << 20)).expect("creates");
        let options = ServerOptions { workers: 1, ..ServerOptions::default() };
        let server = Server::start(options).expect("a server");
        let socket = dir.join("d.sock");
        let disk = Disk::open(&pool, "d").expect("there");
        server.add(disk, &socket, 4).expect("serves");
        let memory = File::from(memfd_create(c"guest", MFdFlags::empty()).expect("a memfd"));
        memory.set_len(MEMORY).expect("grows");
        Place { _server: server, socket, memory }
    })
}

/// Sends one message; `false` if it was hung up on.
fn send(client: &UnixStream, head: [u32; 3], payload: &[u8], fds: &[RawFd]) -> bool {
    let head: Vec<u8> = head.into_iter().flat_map(u32::to_le_bytes).collect();
    let parts = [IoSlice::new(&head), IoSlice::new(payload)];
    let rights = [ControlMessage::ScmRights(fds)];
    let control: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
    let flags = MsgFlags::MSG_NOSIGNAL;
    sendmsg::<()>(client.as_raw_fd(), &parts, control, flags, None).is_ok()
}

/// Whether GET_FEATURES is answered.
fn is_served(client: &mut UnixStream) -> bool {
    let mut reply = [0; 20];
    send(client, [1, 1, 0], &[], &[]) && client.read_exact(&mut reply).is_ok()
}

fuzz_target!(|data: &[u8]| {
    let place = place();
    let mut client = UnixStream::connect(&place.socket).expect("listens");
    client.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
    let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).expect("an eventfd");
    assert!(is_served(&mut client), "a client is served");
    // Messages: request, what comes with it, how long it is, the bytes.
    let mut rest = data;
    let mut count = 0;
    while let [request, with, len, tail @ ..] = rest {
        let len = usize::from(*len).min(tail.len());
        let fds: &[RawFd] = match with % 4 {
            0 => &[],
            1 => &[event.as_raw_fd()],
            2 => &[place.memory.as_raw_fd()],
            _ => &[place.memory.as_raw_fd(), event.as_raw_fd()],
        };
        // Sometimes the size in the head is a lie.
        let size = if with & 0x40 == 0 { len } else { len + usize::from(with >> 4) };
        let flags = 1 | u32::from(with & 0x20 != 0) << 3;
        let size = u32::try_from(size).expect("small");
        if !send(&client, [u32::from(*request), flags, size], &tail[..len], fds) {
            break;
        }
        rest = &tail[len..];
        count += 1;
        if count == 32 {
            break;
        }
    }
    client.flush().expect("a socket");
    client.shutdown(std::net::Shutdown::Write).ok();
    // Whatever is answered, until it hangs up.
    let mut answers = Vec::new();
    let ended = client.take(1 << 20).read_to_end(&mut answers);
    assert!(!ended.is_err_and(|e| e.kind() == std::io::ErrorKind::WouldBlock), "it hangs");
    let mut next = UnixStream::connect(&place.socket).expect("listens");
    next.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
    assert!(is_served(&mut next), "the next client is served");
});
