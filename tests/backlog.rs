//! Goal: what one disk changes without ever asking for a commit costs the others nothing: what is
//! pending is bounded, its own disk waits for it, nobody's flush waits for what came later, and what
//! was discarded comes back.
//!
//! Method: a store that shows each step of a commit to the test, which changes more meanwhile, or
//! keeps the commit from going on.

mod common;

use common::{CLUSTER, POOL_LEN, SUB, bytes, disk, empty, enter, opened, read};
use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::task::{Wake, Waker};
use std::thread::{self, Thread};
use std::time::Duration;
use tidepool::cowdisk::{self, Disk, NewDisk, Step, WritePlan};
use tidepool::pool::backlog::BACKLOG_MAX;
use tidepool::pool::{OpenOptions, Pool, Return};
use tidepool::storage::sim::{EIO, Op};
use tidepool::storage::{SimStorage, Storage, Tier};
use tidepool::sync::{Condvar, Mutex};
use tidepool::sys::clock;

/// Bytes of a pool, most of it never touched, with more clusters than a backlog has changes.
const ROOM_LEN: u64 = 2 << 30;
/// Longest wait for another thread: only a broken one takes so long.
const PATIENCE: Duration = Duration::from_secs(60);

type Hook = Box<dyn Fn() + Send + Sync>;

/// A store that calls a hook before each durable write.
struct Shown {
    inner: Arc<SimStorage>,
    hook: Mutex<Option<Arc<Hook>>>,
    batches: AtomicU32,
}

impl fmt::Debug for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shown").finish_non_exhaustive()
    }
}

impl Storage for Shown {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.inner.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.inner.write_at(buf, offset)
    }
    fn write_durable_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let hook = self.hook.lock().clone();
        if let Some(hook) = hook {
            hook();
        }
        self.batches.fetch_add(1, Ordering::SeqCst);
        self.inner.write_durable_at(buf, offset)
    }
    fn flush(&self) -> io::Result<()> {
        self.inner.flush()
    }
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.inner.punch(offset, len)
    }
    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        self.inner.allocate(offset, len)
    }
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.inner.set_len(len)
    }
    fn allocated(&self) -> io::Result<u64> {
        self.inner.allocated()
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        self.inner.next_data(offset)
    }
    fn tier(&self) -> Tier {
        self.inner.tier()
    }
    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

impl Shown {
    fn new(len: u64) -> Arc<Self> {
        Arc::new(Self {
            inner: empty(len),
            hook: Mutex::default(),
            batches: AtomicU32::new(0),
        })
    }

    fn open(self: &Arc<Self>) -> Arc<Pool> {
        let store = Arc::clone(self) as Arc<dyn Storage>;
        let options = OpenOptions {
            returning: Return::Never,
            ..OpenOptions::default()
        };
        Pool::open(store, &options).expect("opens")
    }

    fn set_hook(&self, hook: impl Fn() + Send + Sync + 'static) {
        *self.hook.lock() = Some(Arc::new(Box::new(hook)));
    }
}

/// Wakes the thread that made it, and remembers that it did.
struct Called {
    is_called: AtomicBool,
    thread: Thread,
}

impl Wake for Called {
    fn wake(self: Arc<Self>) {
        self.is_called.store(true, Ordering::SeqCst);
        self.thread.unpark();
    }
}

impl Called {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            is_called: AtomicBool::new(false),
            thread: thread::current(),
        })
    }
}

/// Waits until `is_so`.
fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let begin = clock::now();
    while !is_so() {
        assert!(begin.elapsed() < PATIENCE, "{what}: not after a minute");
        thread::park_timeout(Duration::from_millis(10));
    }
}

/// Plans and ends the first write to cluster `n` of `disk`, whose data nobody is going to look at.
fn change(disk: &Disk, n: u64, waker: &Waker) -> Step {
    let pass = enter(disk);
    let mut plan = WritePlan::default();
    let len = u32::try_from(SUB).expect("small");
    let step = disk.plan_write(&pass, n * CLUSTER, len, &mut plan, waker);
    let step = step.expect("a legal write");
    if matches!(step, Step::Ready) {
        disk.complete_write(&mut plan, true);
    }
    step
}

/// More changes while each batch is written than a batch takes: a flush that waited for them would
/// never end.
#[test]
fn a_flush_waits_for_nothing_that_comes_after_it() {
    let storage = Shown::new(ROOM_LEN);
    let pool = storage.open();
    let busy = disk(&pool, "busy", ROOM_LEN);
    let d = disk(&pool, "d", CLUSTER);
    let next = Arc::new(AtomicUsize::new(0));
    let change_more = {
        let (busy, next) = (busy.clone(), Arc::clone(&next));
        move || {
            for _ in 0..9000 {
                let n = next.fetch_add(1, Ordering::SeqCst) as u64;
                let step = change(&busy, n, Waker::noop());
                assert!(matches!(step, Step::Ready), "{step:?}");
            }
        }
    };
    change_more();
    d.write_at(&bytes(1, SUB), 0).expect("writes");
    storage.set_hook(change_more);
    let before = storage.batches.load(Ordering::SeqCst);
    d.flush().expect("flushes");
    let batches = storage.batches.load(Ordering::SeqCst) - before;
    assert!(batches <= 3, "{batches} batches for what one or two take");
    let later = opened(&Arc::new(storage.inner.crash_all_lost()));
    let d = Disk::open(&later, "d").expect("there");
    assert_eq!(read(&d, 0, SUB), bytes(1, SUB));
}

/// Between two batches of a round a leaf that is to go into the second is discarded as a whole and
/// written again.
#[test]
fn what_changes_during_a_round_undoes_nothing_of_it_and_is_not_undone() {
    const LEAF: u64 = 64;
    let storage = Shown::new(256 << 20);
    let pool = storage.open();
    let d = disk(&pool, "d", 1 << 30);
    let write = |cluster: u64, value: u8| {
        let at = cluster * CLUSTER;
        d.write_at(&bytes(value, SUB), at).expect("writes");
    };
    (0..3).for_each(|cluster| write(cluster, 1));
    d.flush().expect("flushes");
    // Discarded before the round begins; the leaf is the first of many, which are taken from the end.
    d.discard(0, CLUSTER).expect("discards");
    (LEAF..LEAF + 10_000).for_each(|cluster| write(cluster, 2));
    let is_first = AtomicBool::new(true);
    let before = storage.batches.load(Ordering::SeqCst);
    storage.set_hook({
        let d = d.clone();
        move || {
            if is_first.swap(false, Ordering::SeqCst) {
                d.discard(0, LEAF * CLUSTER).expect("discards");
                let written = d.write_at(&bytes(3, SUB), 5 * CLUSTER);
                written.expect("writes");
            }
        }
    });
    d.flush().expect("flushes");
    let batches = storage.batches.load(Ordering::SeqCst) - before;
    assert_eq!(batches, 2, "the leaf was in the second");
    let seen = |later: &Arc<Pool>, cluster: u64| {
        let d = Disk::open(later, "d").expect("there");
        read(&d, cluster * CLUSTER, 512)[0]
    };
    let later = opened(&Arc::new(storage.inner.crash_all_lost()));
    assert_eq!(seen(&later, 0), 0, "it was discarded before the round");
    assert_eq!(seen(&later, LEAF), 2, "it was written before the round");
    pool.flush().expect("flushes");
    let last = opened(&Arc::new(storage.inner.crash_all_lost()));
    for pool in [&pool, &last] {
        let all: Vec<u8> = (0..6).map(|cluster| seen(pool, cluster)).collect();
        assert_eq!(all, [0, 0, 0, 0, 0, 3]);
    }
}

/// Holds up whoever comes until it is opened.
#[derive(Default)]
struct Barrier {
    is_open: Mutex<bool>,
    changed: Condvar,
}

impl Barrier {
    fn pass(&self) {
        let mut is_open = self.is_open.lock();
        while !*is_open {
            self.changed.wait(&mut is_open);
        }
    }

    fn open(&self) {
        *self.is_open.lock() = true;
        self.changed.notify_all();
    }
}

/// While no commit gets anywhere, a disk that changes more and more waits, and no other.
#[test]
fn a_disk_waits_for_its_own_backlog_and_others_do_not() {
    let storage = Shown::new(ROOM_LEN);
    let pool = storage.open();
    let busy = disk(&pool, "busy", ROOM_LEN);
    let calm = disk(&pool, "calm", CLUSTER);
    let background = pool.start_background().expect("a thread");
    let barrier = Arc::new(Barrier::default());
    storage.set_hook({
        let barrier = Arc::clone(&barrier);
        move || barrier.pass()
    });
    let called = Called::new();
    let waker = Waker::from(Arc::clone(&called));
    let changes = (0..).find(|n| matches!(change(&busy, *n, &waker), Step::Busy));
    let changes = usize::try_from(changes.unwrap_or(u64::MAX)).expect("few");
    // What the batch that is being written took is pending no more.
    assert!(
        (BACKLOG_MAX..BACKLOG_MAX + 16_384).contains(&changes),
        "{changes}"
    );
    let discarded = busy.plan_discard(&enter(&busy), 0, CLUSTER, Waker::noop());
    let discarded = discarded.expect("a legal discard");
    assert!(matches!(discarded.step, Step::Busy), "{discarded:?}");
    // In place, nothing is added.
    let first = change(&busy, 0, Waker::noop());
    assert!(matches!(first, Step::Ready), "{first:?}");
    let step = change(&calm, 0, Waker::noop());
    assert!(matches!(step, Step::Ready), "{step:?}");
    assert!(!called.is_called.load(Ordering::SeqCst));
    barrier.open();
    wait_until("the disk may go on", || {
        called.is_called.load(Ordering::SeqCst)
    });
    let step = change(&busy, changes as u64, Waker::noop());
    assert!(matches!(step, Step::Ready), "{step:?}");
    drop(background);
}

/// Whoever waits for a commit that fails, or that nobody is going to make any more, is told.
#[test]
fn nobody_waits_for_a_commit_that_does_not_come() {
    let storage = Shown::new(ROOM_LEN);
    let pool = storage.open();
    let busy = disk(&pool, "busy", ROOM_LEN);
    let background = pool.start_background().expect("a thread");
    let barrier = Arc::new(Barrier::default());
    storage.set_hook({
        let barrier = Arc::clone(&barrier);
        move || barrier.pass()
    });
    let called = Called::new();
    let waker = Waker::from(Arc::clone(&called));
    (0..).find(|n| matches!(change(&busy, *n, &waker), Step::Busy));
    storage.inner.fail(Op::WriteDurable, 1, EIO);
    barrier.open();
    wait_until("the request fails", || {
        called.is_called.load(Ordering::SeqCst)
    });
    let mut plan = WritePlan::default();
    let refused = busy.plan_write(&enter(&busy), 0, 512, &mut plan, Waker::noop());
    assert!(refused.is_err(), "{refused:?}");
    drop(background);
}

/// Guests of an ephemeral disk never ask for a commit; what they discard is for others all the same.
#[test]
fn what_an_ephemeral_disk_discards_comes_back() {
    let storage = Shown::new(POOL_LEN);
    let pool = storage.open();
    let background = pool.start_background().expect("a thread");
    let new = NewDisk {
        is_ephemeral: true,
        ..NewDisk::empty("temporary", 256 * CLUSTER)
    };
    cowdisk::create(&pool, &new).expect("creates");
    let temporary = Disk::open(&pool, "temporary").expect("there");
    let free = || {
        let usage = pool.space.usage();
        usage.clean + usage.written
    };
    let before = free();
    temporary
        .write_at(&bytes(1, 256 * CLUSTER), 0)
        .expect("writes");
    temporary.discard(0, 256 * CLUSTER).expect("discards");
    assert!(free() < before - 200);
    wait_until("the space is back", || free() > before - 32);
    drop(background);
}
