//! Pools and disks to measure. Maps are made through the sans-I/O face, where the caller moves the
//! data: here nobody does. So a terabyte is mapped in seconds and takes no space, and the engine
//! does all it would do otherwise.

use std::path::Path;
use std::sync::Arc;
use std::task::Waker;

use crate::Result;
use crate::args::Args;
use crate::random::Random;
use crate::sample::{print_one, timed};
use tidepool::cowdisk::{self, Disk, NewDisk, Step, WritePlan};
use tidepool::pool::{CreateOptions, OpenOptions, Pool, open};
use tidepool::storage::{Access, FileStorage};

/// Clusters mapped between two flushes: the bits are set, and the batches are of full length.
const CLUSTERS_PER_FLUSH: u64 = 64 << 10;
/// Clusters of a request when a map is made from end to end: what a disk sets aside at once.
const CLUSTERS_PER_REQUEST: u64 = 16;

/// In which order the clusters of a disk are written for the first time.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// From end to end: consecutive clusters of the disk lie in consecutive ones of the pool.
    Sequential,
    /// At random: nothing about the place of a cluster follows from its neighbours'.
    Random,
}

/// Makes a pool of `len` bytes at `path`, which is replaced, and opens it.
///
/// # Errors
/// What the store or the pool says.
pub(crate) fn create_pool(path: &Path, len: u64) -> Result<Arc<Pool>> {
    if path.exists() {
        std::fs::remove_file(path)?;
    }
    let file = Arc::new(FileStorage::create_new(path, len)?);
    open::create(&*file, &CreateOptions::new(len))?;
    Ok(Pool::open(file, &OpenOptions::default())?)
}

/// Opens the pool at `path`.
///
/// # Errors
/// What the store or the pool says.
pub(crate) fn open_pool(path: &Path) -> Result<Arc<Pool>> {
    let file = Arc::new(FileStorage::open(path, Access::ReadWrite)?);
    Ok(Pool::open(file, &OpenOptions::default())?)
}

/// Maps a new disk little by little.
pub(crate) struct Mapper {
    disk: Disk,
    requests: Vec<u32>,
    len: u32,
    per_flush: usize,
    done: usize,
    plan: WritePlan,
}

impl Mapper {
    /// Makes the disk `name` of `bytes` bytes in `pool`.
    ///
    /// # Errors
    /// What the engine says.
    pub(crate) fn new(pool: &Arc<Pool>, name: &str, bytes: u64, order: Order) -> Result<Self> {
        cowdisk::create(pool, &NewDisk::empty(name, bytes))?;
        let disk = Disk::open(pool, name)?;
        let per_request = match order {
            Order::Sequential => CLUSTERS_PER_REQUEST,
            Order::Random => 1,
        };
        let len = u64::from(disk.cluster_size()) * per_request;
        let mut requests: Vec<u32> = (0..u32::try_from(bytes / len)?).collect();
        if order == Order::Random {
            let mut random = Random(1);
            for last in (1..requests.len()).rev() {
                let other = usize::try_from(random.below(last as u64 + 1))?;
                requests.swap(last, other);
            }
        }
        Ok(Self {
            disk,
            requests,
            len: u32::try_from(len)?,
            per_flush: usize::try_from(CLUSTERS_PER_FLUSH / per_request)?,
            done: 0,
            plan: WritePlan::default(),
        })
    }

    /// Maps some more clusters and flushes; `false` if all were mapped before.
    ///
    /// # Errors
    /// What the engine says.
    pub(crate) fn step(&mut self) -> Result<bool> {
        let rest = &self.requests[self.done..];
        let part = &rest[..rest.len().min(self.per_flush)];
        for request in part {
            let offset = u64::from(*request) * u64::from(self.len);
            claim(&self.disk, offset, self.len, &mut self.plan)?;
        }
        self.done += part.len();
        self.disk.flush()?;
        Ok(!part.is_empty())
    }

    /// Bytes mapped so far.
    pub(crate) fn mapped(&self) -> u64 {
        self.done as u64 * u64::from(self.len)
    }
}

/// Makes the disk `name` of `bytes` bytes in `pool`, with all of it mapped.
///
/// # Errors
/// What the engine says.
pub(crate) fn mapped_disk(pool: &Arc<Pool>, name: &str, bytes: u64, order: Order) -> Result<()> {
    let mut mapper = Mapper::new(pool, name, bytes, order)?;
    while mapper.step()? {}
    Ok(())
}

/// A write without its data.
///
/// # Errors
/// The engine wants something else first: the disk is not fresh.
fn claim(disk: &Disk, offset: u64, len: u32, plan: &mut WritePlan) -> Result<()> {
    let pass = disk.enter(0, Waker::noop()).ok_or("the disk is drained")?;
    let step = disk.plan_write(&pass, offset, len, plan, Waker::noop())?;
    if !matches!(step, Step::Ready) {
        return Err(format!("a first write of {len} bytes at {offset}: {step:?}").into());
    }
    disk.complete_write(plan, true);
    Ok(())
}

/// Forks `from` into `d1`, that into `d2` and so on, `depth` times; each writes `clusters` clusters
/// of its own, scattered over the disk, and is the parent of the next.
///
/// # Errors
/// What the engine says.
pub(crate) fn grow_chain(
    pool: &Arc<Pool>,
    from: &str,
    depth: u64,
    clusters: u64,
    len: u64,
) -> Result<()> {
    let mut parent = from.to_owned();
    for layer in 1..=depth {
        let name = format!("d{layer}");
        cowdisk::fork(pool, &parent, std::slice::from_ref(&name))?;
        let disk = Disk::open(pool, &name)?;
        let cluster = u64::from(disk.cluster_size());
        let data = vec![u8::try_from(1 + layer % 255)?; usize::try_from(len)?];
        for n in 0..clusters {
            // The same places as in the chains of other backends.
            let at = ((layer - 1) * 7919 + n * 104_729) % (disk.size() / cluster);
            disk.write_at(&data, at * cluster)?;
        }
        parent = name;
    }
    Ok(pool.flush()?)
}

/// `engine chain`: layers of forks in an existing pool.
///
/// # Errors
/// Bad arguments, or what the engine says.
pub(crate) fn chain(args: &Args) -> Result<()> {
    let pool = open_pool(Path::new(args.text("pool")?))?;
    let (from, depth) = (args.text("from")?, args.number("depth")?);
    let clusters = args.number("clusters")?;
    let cluster = pool.cluster_size().bytes();
    let ((), time) = timed(|| grow_chain(&pool, from, depth, clusters, cluster))?;
    pool.close()?;
    print_one("chain made in", time.as_secs_f64(), "s")
}
