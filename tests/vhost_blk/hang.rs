//! A file system that does not answer: what a client that serves one itself can do with a file of it.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, Generation, INodeNo, LockOwner,
    ReplyAttr, ReplyEmpty, ReplyEntry, Request,
};
use tempfile::TempDir;
use tidepool::sync::{Condvar, Mutex};
use tidepool::sys::clock;
use tidepool::sys::file as sys;
use tidepool::vhost_blk::{EventKind, ServerOptions};

use crate::client::{Wire, req};
use crate::disk::{self, Kind};
use crate::guest::{Bench, GPA, Guest, MODERN, OK, RAM, SOON};

const SIZE: u64 = 4 << 20;
const FILE: INodeNo = INodeNo(2);
const TTL: Duration = Duration::from_secs(3600);

/// Ends of descriptors that nobody is told of.
#[derive(Default)]
struct Flushes {
    held: Mutex<Option<Vec<ReplyEmpty>>>,
    came: Condvar,
}

impl Flushes {
    fn wait_for_one(&self) {
        let mut held = self.held.lock();
        while held.as_ref().is_some_and(Vec::is_empty) {
            assert!(!self.came.wait_for(&mut held, SOON).timed_out());
        }
    }
}

/// Answers all when it goes.
struct Hung(Arc<Flushes>);

impl Drop for Hung {
    fn drop(&mut self) {
        let held = self.0.held.lock().take();
        held.into_iter().flatten().for_each(ReplyEmpty::ok);
    }
}

/// One file, `file`, whose close(2) waits for ever.
struct Deaf(Arc<Flushes>);

fn attributes(ino: INodeNo) -> FileAttr {
    let is_file = ino == FILE;
    FileAttr {
        ino,
        size: if is_file { RAM as u64 } else { 0 },
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: if is_file {
            FileType::RegularFile
        } else {
            FileType::Directory
        },
        perm: 0o700,
        nlink: 1,
        uid: nix::unistd::getuid().as_raw(),
        gid: nix::unistd::getgid().as_raw(),
        rdev: 0,
        flags: 0,
        blksize: 4096,
    }
}

impl Filesystem for Deaf {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if parent == INodeNo::ROOT && name == "file" {
            reply.entry(&TTL, &attributes(FILE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &attributes(ino));
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        match &mut *self.0.held.lock() {
            Some(held) => held.push(reply),
            None => reply.ok(),
        }
        self.0.came.notify_all();
    }
}

#[test]
fn a_client_whose_files_cannot_be_closed_holds_up_itself() {
    let flushes = Arc::new(Flushes::default());
    let dir = TempDir::new().expect("a directory");
    let deaf = Deaf(Arc::clone(&flushes));
    let mounted = match fuser::spawn_mount(deaf, dir.path(), &Config::default()) {
        Ok(mounted) => mounted,
        Err(error) => {
            println!("skipped: no FUSE here: {error}");
            return;
        }
    };
    let file: File = sys::open(&dir.path().join("file"), sys::Mode::ReadWrite).expect("opens");
    *flushes.held.lock() = Some(Vec::new());
    let hung = Hung(Arc::clone(&flushes));
    let options = ServerOptions {
        workers: 1,
        ..crate::guest::options()
    };
    let bench = Bench::with(options, |dir| {
        disk::make(dir, "disk", SIZE, Kind::Memory, false)
    });
    let other = bench.dir.path().join("other.sock");
    let disk = disk::make(bench.dir.path(), "other", SIZE, Kind::Direct, false);
    bench.server.add(disk, &other, 4).expect("served");
    let mut bystander = Guest::boot(&other, MODERN);
    // With a queue that runs, as memory and, where no file belongs at all, as a call.
    let mut guest = Guest::boot(&bench.socket, MODERN);
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
    let Wire { stream, .. } = &mut guest.wire;
    let mut rude = Wire {
        stream: stream.try_clone().expect("dup"),
        acks: false,
    };
    let mut region = vec![0; 8];
    for number in [GPA << 8, RAM as u64, GPA << 8, 0] {
        region.extend(number.to_le_bytes());
    }
    assert!(rude.tell(req::ADD_MEM_REG, &region, &[file.as_fd()]));
    flushes.wait_for_one();
    assert_eq!(bystander.write(0, 8, &[9; 4096]), OK);
    assert_eq!(bystander.read(0, 8, 4096), [9; 4096]);
    let began = clock::now();
    bench.server.shutdown().expect("shut down");
    let took = began.elapsed();
    assert!(took < Duration::from_secs(17), "{took:?}");
    let refusals = bench.events.try_iter();
    assert!(
        refusals
            .map(|event| event.kind)
            .all(|kind| kind == EventKind::SessionRefused)
    );
    drop(hung);
    guest.wire.wait_hangup();
    drop(file);
    drop(mounted.umount_and_join());
}
