//! What the tests of the engine share: small pools on simulated disks, and random numbers.

#![allow(
    dead_code,
    unused_imports,
    clippy::allow_attributes,
    reason = "each test uses its own part of it"
)]

mod random;

pub(crate) use random::Random;
use std::sync::Arc;
use std::task::Waker;
use tidepool::cowdisk::{self, Disk, NewDisk, Pass, Step, WritePlan};
use tidepool::pool::{CreateOptions, OpenOptions, Pool, PoolError, Return, open};
use tidepool::storage::{SimStorage, Storage};

/// Bytes in a cluster of the pools made here.
pub(crate) const CLUSTER: u64 = 16 << 10;
/// Bytes in a sub-cluster of them.
pub(crate) const SUB: u64 = CLUSTER / 16;
/// Bytes of the smallest pool.
pub(crate) const POOL_LEN: u64 = 16 << 20;

/// An empty pool with small clusters on a simulated disk.
pub(crate) fn empty(len: u64) -> Arc<SimStorage> {
    let storage = Arc::new(SimStorage::new(len));
    let cluster_size = tidepool::format::units::ClusterSize::from_bytes(CLUSTER).expect("in range");
    let options = CreateOptions {
        cluster_size,
        uuid: [9; 16],
        ..CreateOptions::new(len)
    };
    open::create(&*storage, &options).expect("an empty pool");
    storage
}

/// Opens what is in `storage`; freed space is returned only when asked.
pub(crate) fn try_open(storage: &Arc<SimStorage>) -> Result<Arc<Pool>, PoolError> {
    let storage: Arc<dyn Storage> = Arc::clone(storage) as Arc<dyn Storage>;
    let options = OpenOptions {
        returning: Return::Never,
        ..OpenOptions::default()
    };
    Pool::open(storage, &options)
}

/// As [`try_open`], for pools that must open.
pub(crate) fn opened(storage: &Arc<SimStorage>) -> Arc<Pool> {
    try_open(storage).expect("the pool opens")
}

/// An empty pool and its storage.
pub(crate) fn fresh() -> (Arc<SimStorage>, Arc<Pool>) {
    let storage = empty(POOL_LEN);
    let pool = opened(&storage);
    (storage, pool)
}

/// A new disk over zeros.
pub(crate) fn disk(pool: &Arc<Pool>, name: &str, len: u64) -> Disk {
    cowdisk::create(pool, &NewDisk::empty(name, len)).expect("creates");
    Disk::open(pool, name).expect("it is there")
}

/// Leave for a request, which must be given.
pub(crate) fn enter(disk: &Disk) -> Pass {
    disk.enter(0, Waker::noop())
        .expect("nobody drains the disk")
}

/// A write that was planned and sent to the device, but has not completed: its pass and plan.
pub(crate) fn begin_write(disk: &Disk, offset: u64, bytes: &[u8]) -> (Pass, WritePlan) {
    let pass = enter(disk);
    let mut plan = WritePlan::default();
    let len = u32::try_from(bytes.len()).expect("short");
    loop {
        let step = disk.plan_write(&pass, offset, len, &mut plan, Waker::noop());
        match step.expect("a legal write") {
            Step::Ready => break,
            Step::Copy(job) => disk.run_copy(job).expect("copies"),
            step @ (Step::Done | Step::Busy | Step::Full) => {
                panic!("the write cannot begin: {step:?}")
            }
        }
    }
    (pass, plan)
}

/// Moves the bytes of a planned write.
pub(crate) fn move_bytes(disk: &Disk, plan: &WritePlan, bytes: &[u8]) {
    for segment in plan.segments() {
        let from = segment.at as usize;
        let to = from + segment.len as usize;
        let storage = disk.pool().storage();
        storage
            .write_at(&bytes[from..to], segment.to)
            .expect("writes");
    }
}

/// `len` bytes of `disk` from `offset`.
pub(crate) fn read(disk: &Disk, offset: u64, len: u64) -> Vec<u8> {
    let mut bytes = vec![0xee; usize::try_from(len).expect("short")];
    disk.read_at(&mut bytes, offset).expect("reads");
    bytes
}

/// `len` bytes of `value`.
pub(crate) fn bytes(value: u8, len: u64) -> Vec<u8> {
    vec![value; usize::try_from(len).expect("short")]
}
