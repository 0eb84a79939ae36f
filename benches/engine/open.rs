//! Opening a pool with a large map, and the checkpoint image it is opened from.

use std::path::Path;
use std::sync::Arc;

use crate::Result;
use crate::args::Args;
use crate::build::{Mapper, Order, create_pool, open_pool};
use crate::sample::{memory_mib, print_one, timed};
use tidepool::pool::image::{self, Frozen, FrozenDisk};
use tidepool::pool::{Pool, journal};

/// Room for journal, images and clusters set aside, bytes.
const ROOM: u64 = 8 << 30;
const TIB: f64 = 1_099_511_627_776.0;

/// How much of the journal the image does not cover.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Journal {
    /// An image has just come into force.
    Short,
    /// The next image is about to be wanted.
    Long,
}

/// `engine map`: a pool whose one disk is mapped as far as asked, or up to one image's worth less
/// so that the journal is as long as asked. It is left for [`open`].
///
/// # Errors
/// Bad arguments, or what the engine says.
pub(crate) fn map(args: &Args) -> Result<()> {
    let bytes = args.number("mapped")?;
    let order = match args.text("order")? {
        "sequential" => Order::Sequential,
        "random" => Order::Random,
        other => return Err(format!("--order {other}: sequential or random").into()),
    };
    let journal = match args.text("journal")? {
        "short" => Journal::Short,
        "long" => Journal::Long,
        other => return Err(format!("--journal {other}: short or long").into()),
    };
    let pool = create_pool(Path::new(args.text("pool")?), bytes + ROOM)?;
    let (mapped, time) = timed(|| map_until(&pool, bytes, order, journal))?;
    let clusters = mapped / pool.cluster_size().bytes();
    print_one("mapped", mapped as f64 / TIB, "TiB")?;
    print_one(
        "mapping a cluster",
        time.as_secs_f64() * 1e9 / clusters as f64,
        "ns",
    )?;
    write_image(&pool)?;
    Ok(pool.close()?)
}

/// Maps `bytes` of a new disk, or less if the journal is then as wanted. Images come into force at
/// regular distances, so the last of them and the last moment before it can be told in advance.
fn map_until(pool: &Arc<Pool>, bytes: u64, order: Order, journal: Journal) -> Result<u64> {
    let mut mapper = Mapper::new(pool, "disk", bytes, order)?;
    let image_seq = || pool.superblock().image.map_or(0, |image| image.seq);
    let (mut seq, mut image_at, mut distance) = (image_seq(), 0, u64::MAX);
    loop {
        let before = mapper.mapped();
        if !mapper.step()? {
            return Ok(before);
        }
        let (now, step) = (mapper.mapped(), mapper.mapped() - before);
        let is_new = image_seq() != seq;
        if is_new {
            (seq, distance, image_at) = (image_seq(), now - image_at, now);
        }
        let is_last = now.saturating_add(distance) > bytes;
        let is_as_wanted = match journal {
            Journal::Short => is_new,
            Journal::Long => now - image_at + 2 * step >= distance,
        };
        if is_last && is_as_wanted && image_at > 0 {
            return Ok(now);
        }
    }
}

/// Writes an image as the pool does in the background, and gives its space back.
///
/// # Errors
/// What the engine says.
fn write_image(pool: &Pool) -> Result<()> {
    let disks = pool.items().into_iter().map(|item| {
        let map = item.volume.map.read();
        FrozenDisk {
            row: item.row.clone(),
            tree: map.tree.clone(),
            last_fork: map.last_fork,
            changed: map.changed,
        }
    });
    let frozen = Frozen {
        seq: u64::MAX,
        generation: pool.generation(),
        next_disk: tidepool::format::units::DiskId(u32::MAX),
        disks: disks.collect(),
    };
    let uuid_low = journal::uuid_low(&pool.uuid());
    let storage = &**pool.storage();
    let (written, time) = timed(|| {
        let written = image::write(&frozen, uuid_low, pool.cluster_size(), &pool.space, storage)?;
        storage.flush()?;
        Ok::<_, Box<dyn std::error::Error>>(written)
    })?;
    for range in written.clusters {
        pool.space.give_back(range, true).wake();
    }
    print_one("writing an image", time.as_secs_f64(), "s")?;
    print_one(
        "size of an image",
        written.image.len as f64 / f64::from(1 << 20),
        "MiB",
    )
}

/// `engine open`: opens a pool once, in a process that did nothing else.
///
/// # Errors
/// Bad arguments, or what the engine says.
pub(crate) fn open(args: &Args) -> Result<()> {
    let before = memory_mib("VmRSS")?;
    let path = Path::new(args.text("pool")?);
    let (pool, time) = timed(|| open_pool(path))?;
    print_one("open", time.as_secs_f64(), "s")?;
    print_one(
        "memory of an open pool",
        memory_mib("VmRSS")? - before,
        "MiB",
    )?;
    print_one(
        "most memory while opening",
        memory_mib("VmHWM")? - before,
        "MiB",
    )?;
    Ok(pool.close()?)
}
