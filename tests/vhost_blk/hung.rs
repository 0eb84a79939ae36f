//! Storage that hangs: a base on it holds up those who read it, and nobody else.
//!
//! The base is the one file of a FUSE file system that can be told to answer no read.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry,
    ReplyOpen, Request,
};
use tidepool::cowdisk::{self, Disk, NewDisk};
use tidepool::format::catalogue::BaseFormat;
use tidepool::sync::Mutex;
use tidepool::sys::clock;
use tidepool::vhost_blk::ServerOptions;

use crate::client::WRITE;
use crate::disk::{self, Kind};
use crate::guest::{Bench, DATA, DISCARD, FLUSH, Guest, IN, MODERN, OK, OUT, SOON, Style, options};
use crate::pools::{EACH, flood};

const SIZE: u64 = 16 << 20;
const FILE: INodeNo = INodeNo(2);
const NAME: &str = "base.raw";
const TTL: Duration = Duration::from_secs(3600);

/// What byte `at` of the base is.
fn byte(at: u64) -> u8 {
    u8::try_from(at / 512 % 251).expect("a byte")
}

#[derive(Default)]
struct State {
    is_hung: bool,
    waiting: Vec<(u64, u32, ReplyData)>,
}

#[derive(Clone, Default)]
struct Hanging(Arc<Mutex<State>>);

impl Hanging {
    fn answer(offset: u64, size: u32, reply: ReplyData) {
        let end = (offset + u64::from(size)).min(SIZE);
        let bytes: Vec<u8> = (offset..end).map(byte).collect();
        reply.data(&bytes);
    }

    fn attributes(ino: INodeNo) -> FileAttr {
        let is_file = ino == FILE;
        FileAttr {
            ino,
            size: if is_file { SIZE } else { 0 },
            blocks: if is_file { SIZE / 512 } else { 0 },
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: if is_file {
                FileType::RegularFile
            } else {
                FileType::Directory
            },
            perm: if is_file { 0o600 } else { 0o755 },
            nlink: 1,
            uid: nix::unistd::getuid().as_raw(),
            gid: nix::unistd::getgid().as_raw(),
            rdev: 0,
            flags: 0,
            blksize: 4096,
        }
    }
}

impl Filesystem for Hanging {
    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if parent == INodeNo::ROOT && name == NAME {
            reply.entry(&TTL, &Self::attributes(FILE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &Self::attributes(ino));
    }

    fn open(&self, _request: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn read(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut state = self.0.lock();
        if state.is_hung {
            state.waiting.push((offset, size, reply));
        } else {
            Self::answer(offset, size, reply);
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }
}

/// A mounted base.
struct Base {
    hanging: Hanging,
    dir: tempfile::TempDir,
    session: Option<BackgroundSession>,
}

impl Base {
    /// `None`, and a line that says so, where `test` has no FUSE.
    fn mount(test: &str) -> Option<Self> {
        let (hanging, dir) = (
            Hanging::default(),
            tempfile::tempdir().expect("a directory"),
        );
        match fuser::spawn_mount(hanging.clone(), dir.path(), &Config::default()) {
            Ok(session) => Some(Self {
                hanging,
                dir,
                session: Some(session),
            }),
            Err(error) => {
                skipped(test, &error);
                None
            }
        }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join(NAME)
    }

    fn hang(&self) -> Hung<'_> {
        self.hanging.0.lock().is_hung = true;
        Hung(&self.hanging)
    }
}

#[expect(clippy::print_stdout, reason = "a test that did not run says so")]
fn skipped(test: &str, error: &io::Error) {
    println!("SKIPPED: {test}: no FUSE here: {error}");
}

impl Drop for Base {
    fn drop(&mut self) {
        if let Some(session) = self.session.take() {
            drop(session.umount_and_join());
        }
    }
}

/// No read of the base is answered until this is dropped.
struct Hung<'a>(&'a Hanging);

impl Hung<'_> {
    /// Waits until reads hang.
    fn wait_for(&self, reads: usize) {
        let end = clock::now() + SOON;
        while self.0.0.lock().waiting.len() < reads {
            assert!(clock::now() < end, "no read of the base came");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Hung<'_> {
    fn drop(&mut self) {
        let waiting = {
            let mut state = self.0.0.lock();
            state.is_hung = false;
            std::mem::take(&mut state.waiting)
        };
        for (offset, size, reply) in waiting {
            Hanging::answer(offset, size, reply);
        }
    }
}

/// A disk over the base, in the pool of `beside`.
fn over(base: &Path, beside: &Disk) -> Disk {
    let new = NewDisk {
        base: Some((base.to_owned(), BaseFormat::Raw)),
        ..NewDisk::empty("slow", SIZE)
    };
    cowdisk::create(beside.pool(), &new).expect("a disk over a base");
    Disk::open(beside.pool(), "slow").expect("opens")
}

/// Half of the requests read the base, half need a part of it copied. They occupied all threads for
/// copies, the ring's own threads, all buffers, and kept what others had freed from being used.
#[test]
fn a_base_that_hangs_holds_up_its_own_disk_only() {
    let Some(base) = Base::mount("a_base_that_hangs_holds_up_its_own_disk_only") else {
        return;
    };
    let one = ServerOptions {
        workers: 1,
        ..options()
    };
    let mut served = None;
    let bench = Bench::with(one, |dir| {
        let disk = disk::make(dir, "disk", SIZE, Kind::Direct, false);
        served.insert(disk).clone()
    });
    let good = served.expect("served");
    let socket = bench.dir.path().join("slow.sock");
    let slow = over(&base.path(), &good);
    bench.server.add(slow, &socket, 4).expect("served");
    good.write_at(&vec![7; 16 << 20], 0).expect("writes");
    cowdisk::snapshot(good.pool(), "disk", "then").expect("snapshots");
    let many = Style {
        size: 1024,
        ..MODERN
    };
    let mut waits = Guest::boot(&socket, many);
    let mut goes_on = Guest::boot(&bench.socket, many);

    let hung = base.hang();
    for n in 0..EACH {
        let sector = u64::from(n) * 128;
        let to = DATA + u64::from(n) * 8192;
        waits.put(0, n * 3, IN, sector, &[(to, 8192, WRITE)]);
        let write = &[(DATA + (1 << 20), 512, 0)];
        waits.put(0, (EACH + n) * 3, OUT, sector + 64, write);
    }
    hung.wait_for(2);
    flood(&mut goes_on);
    assert_eq!(goes_on.request(0, FLUSH, 0, &[]), OK);
    assert_eq!(goes_on.ranges(0, DISCARD, &[(0, 8192, 0)]), OK);
    good.pool().reclaim().expect("reclaims");
    assert!(good.pool().is_reaped(), "what was discarded is free");
    assert_eq!(goes_on.write(0, 0, &[5; 4096]), OK);
    drop(hung);

    for _ in 0..2 * EACH {
        assert!(waits.wait(0).is_some(), "the base answers again");
    }
    for n in 0..EACH {
        assert_eq!(
            (waits.status(0, n * 3), waits.status(0, (EACH + n) * 3)),
            (OK, OK)
        );
        let got = waits.ram.read(DATA + u64::from(n) * 8192, 8192);
        let begin = u64::from(n) << 16;
        let expected: Vec<u8> = (begin..begin + 8192).map(byte).collect();
        assert!(got == expected, "cluster {n}");
    }
    let got = waits.read(0, 63, 3 * 512);
    let expected = [byte(63 * 512), 0, byte(65 * 512)];
    for (sector, bytes) in got.chunks(512).enumerate() {
        assert_eq!(bytes, [expected[sector]; 512]);
    }
}
