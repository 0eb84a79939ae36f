//! The store under the pool: a file of a FUSE file system of one file, which records every write,
//! punch and flush that any code of the daemon makes, by whatever system call, in the order in
//! which they take effect.
//!
//! It behaves like a disk with a queue: a write is done some time after it came, in any order, and
//! answered when it is done; a flush goes first and waits for nothing, so that what it makes
//! durable is exactly what had been answered before it came. A write that is not answered yet may
//! be found after a crash in part.

use super::log::{Recorder, Tag};
use crate::random::Random;
use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, InitFlags, KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData,
    ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyWrite, Request, WriteFlags,
};
use nix::libc;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};
use tidepool::sync::{Condvar, Mutex, spawn_named};
use tidepool::sys::file as sys;

const POOL: INodeNo = INodeNo(2);
/// The only file.
pub(crate) const POOL_NAME: &str = "pool";
const TTL: Duration = Duration::from_secs(3600);
/// How long a write is kept, so that others join it and the order is not that of arrival.
const DWELL: Duration = Duration::from_micros(300);

/// Something to be done to the file.
enum Job {
    Write {
        number: u64,
        offset: u64,
        data: Vec<u8>,
        reply: ReplyWrite,
    },
    Punch {
        number: u64,
        offset: u64,
        len: u64,
        reply: ReplyEmpty,
    },
}

#[derive(Default)]
struct Jobs {
    next: u64,
    waiting: Vec<Job>,
    flushes: Vec<ReplyEmpty>,
    is_over: bool,
}

struct Shared {
    file: File,
    recorder: Arc<Recorder>,
    jobs: Mutex<Jobs>,
    work: Condvar,
}

impl Shared {
    /// Does what comes until the end.
    fn work(&self, seed: u64) {
        let mut random = Random(seed);
        let mut jobs = self.jobs.lock();
        loop {
            if !jobs.flushes.is_empty() {
                // Nothing is answered between a flush and its own answer: this lock is held.
                for reply in jobs.flushes.drain(..) {
                    self.recorder.add(Tag::StoreFlush, 0, 0, 0, &[]);
                    reply.ok();
                }
            } else if jobs.waiting.is_empty() {
                if jobs.is_over {
                    return;
                }
                self.work.wait(&mut jobs);
            } else {
                let _early = self.work.wait_for(&mut jobs, DWELL);
                if jobs.flushes.is_empty() {
                    let at = random.below(jobs.waiting.len() as u64);
                    let at = usize::try_from(at).expect("short");
                    let job = jobs.waiting.swap_remove(at);
                    self.execute(job);
                }
            }
        }
    }

    fn execute(&self, job: Job) {
        match job {
            Job::Write {
                number,
                offset,
                data,
                reply,
            } => {
                let done = self.file.write_all_at(&data, offset);
                self.recorder.add(Tag::StoreEnd, number, 0, 0, &[]);
                match done {
                    Ok(()) => reply.written(u32::try_from(data.len()).expect("1 MiB at most")),
                    Err(e) => panic!("the file under the recorder: {e}"),
                }
            }
            Job::Punch {
                number,
                offset,
                len,
                reply,
            } => {
                let done = sys::punch_hole(&self.file, offset, len);
                self.recorder.add(Tag::StoreEnd, number, 0, 0, &[]);
                match done {
                    Ok(()) => reply.ok(),
                    Err(e) => panic!("the file under the recorder: {e}"),
                }
            }
        }
    }

    fn attributes(&self, ino: INodeNo) -> FileAttr {
        let is_pool = ino == POOL;
        let metadata = self.file.metadata().expect("an open file has attributes");
        FileAttr {
            ino,
            size: if is_pool { metadata.len() } else { 0 },
            blocks: if is_pool { metadata.len() / 512 } else { 0 },
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: if is_pool {
                FileType::RegularFile
            } else {
                FileType::Directory
            },
            perm: if is_pool { 0o600 } else { 0o755 },
            nlink: 1,
            uid: nix::unistd::getuid().as_raw(),
            gid: nix::unistd::getgid().as_raw(),
            rdev: 0,
            flags: 0,
            blksize: 4096,
        }
    }
}

struct OneFile(Arc<Shared>);

impl Filesystem for OneFile {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let refused = |e| io::Error::other(format!("refused: {e:?}"));
        config
            .add_capabilities(InitFlags::FUSE_ASYNC_DIO)
            .map_err(refused)?;
        config
            .set_max_background(64)
            .map_err(|e| io::Error::other(e.to_string()))?;
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if parent == INodeNo::ROOT && name == POOL_NAME {
            reply.entry(&TTL, &self.0.attributes(POOL), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &self.0.attributes(ino));
    }

    fn open(&self, _request: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let flags = FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES;
        reply.opened(FileHandle(0), flags);
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
        let mut bytes = vec![0; usize::try_from(size).expect("1 MiB at most")];
        let mut done = 0;
        while done < bytes.len() {
            match self
                .0
                .file
                .read_at(&mut bytes[done..], offset + done as u64)
            {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(e) => panic!("the file under the recorder: {e}"),
            }
        }
        reply.data(&bytes[..done]);
    }

    fn write(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let is_durable = flags.0 & libc::O_DSYNC != 0;
        let tag = if is_durable {
            Tag::StoreDurable
        } else {
            Tag::StoreWrite
        };
        let mut jobs = self.0.jobs.lock();
        jobs.next += 1;
        let number = jobs.next;
        self.0
            .recorder
            .add(tag, number, offset, data.len() as u64, data);
        let data = data.to_vec();
        jobs.waiting.push(Job::Write {
            number,
            offset,
            data,
            reply,
        });
        self.0.work.notify_one();
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok(); // close(2), which promises nothing
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.0.jobs.lock().flushes.push(reply);
        self.0.work.notify_one();
    }

    fn fallocate(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        len: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        if mode & libc::FALLOC_FL_PUNCH_HOLE == 0 {
            reply.ok(); // sets space aside, changes no byte: the pool keeps within its length
            return;
        }
        let mut jobs = self.0.jobs.lock();
        jobs.next += 1;
        let number = jobs.next;
        self.0
            .recorder
            .add(Tag::StorePunch, number, offset, len, &[]);
        jobs.waiting.push(Job::Punch {
            number,
            offset,
            len,
            reply,
        });
        self.0.work.notify_one();
    }

    fn lseek(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let from = u64::try_from(offset).unwrap_or(0);
        let found = if whence == libc::SEEK_DATA {
            sys::seek_data(&self.0.file, from)
        } else {
            sys::seek_hole(&self.0.file, from)
        };
        match found {
            Ok(Some(at)) => reply.offset(i64::try_from(at).expect("files are shorter")),
            Ok(None) => reply.error(Errno::ENXIO),
            Err(_) => reply.error(Errno::EIO),
        }
    }
}

/// A mounted recorder.
pub(crate) struct Store {
    shared: Arc<Shared>,
    session: Option<BackgroundSession>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Store {
    /// Shows the pool in `file` as [`POOL_NAME`] in directory `at`.
    ///
    /// # Errors
    /// FUSE cannot be used here.
    pub(crate) fn mount(
        file: &Path,
        at: &Path,
        recorder: Arc<Recorder>,
        seed: u64,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            file: sys::open(file, sys::Mode::ReadWrite)?,
            recorder,
            jobs: Mutex::new(Jobs::default()),
            work: Condvar::new(),
        });
        let session = fuser::spawn_mount(OneFile(Arc::clone(&shared)), at, &Config::default())?;
        let theirs = Arc::clone(&shared);
        let thread = spawn_named("store", move || theirs.work(seed))?;
        Ok(Self {
            shared,
            session: Some(session),
            thread: Some(thread),
        })
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        if let Some(session) = self.session.take() {
            drop(session.umount_and_join());
        }
        self.shared.jobs.lock().is_over = true;
        self.shared.work.notify_one();
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
        self.shared.recorder.finish();
    }
}
