//! First writes on a store whose holes are slow to fill: the rest of the cluster is written along,
//! with zeros that nobody may ever see, and nobody else writes there meanwhile.

mod common;

use common::{CLUSTER, SUB, begin_write, bytes, disk, enter, fresh, move_bytes, opened, read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Wake, Waker};
use tidepool::cowdisk::{self, Disk, Padding, Step, WritePlan};
use tidepool::pool::Pool;
use tidepool::storage::{SimStorage, Storage};

struct Bell(AtomicU32);

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

fn slow() -> (Arc<SimStorage>, Arc<Pool>) {
    let (storage, pool) = fresh();
    storage.set_hole_writes_max(0);
    (storage, pool)
}

fn fork(pool: &Arc<Pool>, from: &str, to: &str) -> Disk {
    cowdisk::fork(pool, from, &[to.to_owned()]).expect("forks");
    Disk::open(pool, to).expect("it is there")
}

fn step(disk: &Disk, offset: u64, len: u32, waker: &Waker) -> Step {
    let pass = enter(disk);
    disk.plan_write(&pass, offset, len, &mut WritePlan::default(), waker)
        .expect("a legal write")
}

#[test]
fn a_small_first_write_fills_its_cluster_and_the_second_does_not() {
    let (storage, pool) = slow();
    let d = disk(&pool, "d", 4 * CLUSTER);
    let before = (
        storage.counters().writes,
        storage.allocated().expect("told"),
    );
    d.write_at(&bytes(1, SUB), 3 * SUB).expect("writes");
    let after = (
        storage.counters().writes,
        storage.allocated().expect("told"),
    );
    assert_eq!(after.0 - before.0, 1, "one write");
    assert_eq!(after.1 - before.1, CLUSTER, "of a whole cluster");
    let (_pass, mut plan) = begin_write(&d, 4 * SUB, &bytes(2, SUB));
    assert_eq!(plan.segments()[0].padding, Padding::default());
    d.complete_write(&mut plan, false);
    let (_pass, mut plan) = begin_write(&d, CLUSTER, &bytes(2, CLUSTER / 2));
    assert_eq!(plan.segments()[0].padding, Padding::default(), "not small");
    d.complete_write(&mut plan, false);
}

#[test]
fn the_zeros_around_a_first_write_hide_nothing() {
    let (storage, pool) = slow();
    let parent = disk(&pool, "parent", 2 * CLUSTER);
    parent.write_at(&bytes(7, 2 * CLUSTER), 0).expect("writes");
    let child = fork(&pool, "parent", "child");
    // The end of one cluster and the beginning of the next: one segment with zeros at both ends
    // where the two lie side by side.
    child
        .write_at(&bytes(1, 2 * SUB), CLUSTER - SUB)
        .expect("writes");
    let mut expected = bytes(7, 2 * CLUSTER);
    let at = usize::try_from(CLUSTER - SUB).expect("small");
    expected[at..at + 2 * usize::try_from(SUB).expect("small")].fill(1);
    assert_eq!(read(&child, 0, 2 * CLUSTER), expected);
    assert_eq!(read(&parent, 0, 2 * CLUSTER), bytes(7, 2 * CLUSTER));
    child.flush().expect("flushes");
    drop((parent, child, pool));
    let after = Arc::new(storage.crash_all_lost());
    let child = Disk::open(&opened(&after), "child").expect("it is there");
    assert_eq!(read(&child, 0, 2 * CLUSTER), expected);
}

#[test]
fn a_cluster_that_is_being_filled_belongs_to_one_write() {
    let (_storage, pool) = slow();
    let d = disk(&pool, "d", 4 * CLUSTER);
    let data = bytes(1, SUB);
    let (pass, mut plan) = begin_write(&d, 0, &data);
    let bells = [0, 0].map(|count| Arc::new(Bell(AtomicU32::new(count))));
    let wakers = bells.clone().map(Waker::from);
    let rung = || bells.each_ref().map(|bell| bell.0.load(Ordering::SeqCst));
    let sub = u32::try_from(SUB).expect("small");
    assert!(matches!(step(&d, 5 * SUB, sub, &wakers[0]), Step::Busy));
    let discarded = d.plan_discard(&enter(&d), 0, CLUSTER, &wakers[1]);
    assert!(matches!(
        discarded.map(|planned| planned.step),
        Ok(Step::Busy)
    ));
    assert_eq!(rung(), [0, 0]);
    move_bytes(&d, &plan, &data);
    d.complete_write(&mut plan, true);
    drop(pass);
    assert_eq!(rung(), [1, 1], "both are told");
    d.write_at(&bytes(2, SUB), 5 * SUB).expect("writes");
    assert_eq!(read(&d, 0, SUB), data);
    assert_eq!(read(&d, SUB, 4 * SUB), bytes(0, 4 * SUB));
    assert_eq!(read(&d, 5 * SUB, SUB), bytes(2, SUB));
}

/// A write over two clusters that has to wait for the second one takes back what it marked in the
/// first. When that woke those who waited, two such writes woke each other for ever, and one itself.
#[test]
fn who_has_to_wait_wakes_nobody() {
    let (_storage, pool) = slow();
    let d = disk(&pool, "d", 4 * CLUSTER);
    let data = bytes(1, SUB);
    let (pass, mut plan) = begin_write(&d, CLUSTER, &data);
    let bell = Arc::new(Bell(AtomicU32::new(0)));
    let waker = Waker::from(Arc::clone(&bell));
    let two_subs = u32::try_from(2 * SUB).expect("small");
    for _ in 0..3 {
        let waits = step(&d, CLUSTER - SUB, two_subs, &waker);
        assert!(matches!(waits, Step::Busy), "{waits:?}");
    }
    assert_eq!(bell.0.load(Ordering::SeqCst), 0, "nothing has changed");
    move_bytes(&d, &plan, &data);
    d.complete_write(&mut plan, true);
    drop(pass);
    assert_eq!(
        bell.0.load(Ordering::SeqCst),
        1,
        "once, however often it waited"
    );
    d.write_at(&bytes(2, 2 * SUB), CLUSTER - SUB)
        .expect("writes");
}

#[test]
fn a_first_write_that_fails_leaves_the_cluster_to_others() {
    let (storage, pool) = slow();
    let d = disk(&pool, "d", 4 * CLUSTER);
    storage.fail(tidepool::storage::sim::Op::Write, 0, libc::EIO);
    d.write_at(&bytes(1, SUB), 0).expect_err("the store failed");
    assert_eq!(read(&d, 0, CLUSTER), bytes(0, CLUSTER));
    d.write_at(&bytes(2, SUB), 5 * SUB).expect("writes");
    assert_eq!(read(&d, 0, 5 * SUB), bytes(0, 5 * SUB));
    assert_eq!(read(&d, 5 * SUB, SUB), bytes(2, SUB));
}

/// A write in flight to a cluster that was discarded meanwhile, and a first write to the one that
/// took its place: the first write does not get the cluster for itself, or its end would take the
/// other's mark away with its own.
#[test]
fn a_first_write_beside_an_older_one_is_not_padded() {
    let (_storage, pool) = slow();
    let d = disk(&pool, "d", 4 * CLUSTER);
    d.write_at(&bytes(9, SUB), 0).expect("writes");
    let old = bytes(1, SUB);
    let (old_pass, mut old_plan) = begin_write(&d, SUB, &old);
    let done = d.plan_discard(&enter(&d), 0, CLUSTER, Waker::noop());
    assert!(matches!(done.map(|planned| planned.step), Ok(Step::Done)));
    let new = bytes(2, SUB);
    let (new_pass, mut new_plan) = begin_write(&d, 2 * SUB, &new);
    assert_eq!(new_plan.segments()[0].padding, Padding::default());
    move_bytes(&d, &new_plan, &new);
    d.complete_write(&mut new_plan, true);
    let half = u32::try_from(SUB / 2).expect("small");
    assert!(matches!(step(&d, 0, half, Waker::noop()), Step::Busy));
    move_bytes(&d, &old_plan, &old);
    d.complete_write(&mut old_plan, true);
    drop((old_pass, new_pass));
    assert_eq!(read(&d, 0, 2 * SUB), bytes(0, 2 * SUB), "discarded");
    assert_eq!(read(&d, 2 * SUB, SUB), new);
}

#[test]
fn clusters_that_were_written_before_are_not_filled_again() {
    let (_storage, pool) = slow();
    let d = disk(&pool, "d", 40 * CLUSTER);
    d.write_at(&bytes(1, 40 * CLUSTER), 0).expect("writes");
    d.discard(0, 40 * CLUSTER).expect("discards");
    pool.reclaim().expect("flushes");
    let e = disk(&pool, "e", CLUSTER);
    let (_pass, mut plan) = begin_write(&e, 0, &bytes(1, SUB));
    assert_eq!(plan.segments()[0].padding, Padding::default());
    e.complete_write(&mut plan, false);
}

/// Alone, a write into a hole is hardly slower, and zeros would only take space.
#[test]
fn few_first_writes_at_once_are_not_padded() {
    let (storage, pool) = fresh();
    storage.set_hole_writes_max(3);
    let d = disk(&pool, "d", 8 * CLUSTER);
    let data = bytes(1, SUB);
    let mut writes: Vec<_> = (0..5)
        .map(|n| begin_write(&d, n * CLUSTER, &data))
        .collect();
    let is_padded: Vec<bool> = writes
        .iter()
        .map(|(_, plan)| plan.segments()[0].padding != Padding::default())
        .collect();
    assert_eq!(is_padded, [false, false, false, true, true]);
    for (_, plan) in &mut writes {
        d.complete_write(plan, false);
    }
    let (_pass, mut plan) = begin_write(&d, 6 * CLUSTER, &data);
    assert_eq!(plan.segments()[0].padding, Padding::default());
    d.complete_write(&mut plan, false);
}
