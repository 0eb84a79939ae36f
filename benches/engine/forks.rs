//! Durable forks and snapshots: how long one takes whatever the size and depth of the disk, and
//! what many of one disk cost in time and memory.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::Result;
use crate::args::Args;
use crate::build::{Order, create_pool, grow_chain, mapped_disk};
use crate::random::Random;
use crate::sample::{Sample, memory_mib, print_one, timed};
use tidepool::cowdisk::{self, Disk};
use tidepool::pool::Pool;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// Room for journal, images and what is written besides the maps.
const ROOM: u64 = 8 * GIB;
/// Bytes of a small write.
const WRITE: u64 = 4096;
/// Size of the disk that chains and many forks begin with.
const GOLDEN: u64 = GIB;

/// A disk to fork, and what that took.
struct Subject {
    label: String,
    disk: String,
    forks: Sample,
    snapshots: Sample,
    forks_after_write: Sample,
}

impl Subject {
    fn new(label: String, disk: String) -> Self {
        Self {
            label,
            disk,
            forks: Sample::default(),
            snapshots: Sample::default(),
            forks_after_write: Sample::default(),
        }
    }
}

fn fork(pool: &Arc<Pool>, from: &str, to: String) -> Result<Duration> {
    let ((), time) = timed(|| cowdisk::fork(pool, from, &[to]))?;
    Ok(time)
}

/// Disks of 1 MiB and every thousandfold up to `mapped` bytes, all mapped, and the powers of ten
/// up to `depth` of a chain.
fn subjects(pool: &Arc<Pool>, mapped: u64, depth: u64) -> Result<Vec<Subject>> {
    let mut all = Vec::new();
    for (size, label) in [(MIB, "1 MiB"), (GIB, "1 GiB"), (1024 * GIB, "1 TiB")] {
        if size <= mapped {
            let disk = label.replace(' ', "");
            mapped_disk(pool, &disk, size, Order::Sequential)?;
            all.push(Subject::new(format!("{label} mapped"), disk));
        }
    }
    mapped_disk(pool, "golden", GOLDEN, Order::Sequential)?;
    grow_chain(pool, "golden", depth, 4, WRITE)?;
    for deep in [1, 10, 100, 1000].into_iter().filter(|d| *d <= depth) {
        all.push(Subject::new(format!("depth {deep}"), format!("d{deep}")));
    }
    Ok(all)
}

/// `engine latency`: one fork and one snapshot of every subject in turn, so that what else the
/// machine does hits all of them; then forks of disks that were written to just before.
///
/// # Errors
/// Bad arguments, or what the engine says.
pub(crate) fn latency(args: &Args) -> Result<()> {
    let (mapped, rounds) = (args.number("mapped")?, args.number("rounds")?);
    let pool = create_pool(Path::new(args.text("pool")?), mapped + ROOM)?;
    let mut subjects = subjects(&pool, mapped, args.number("depth")?)?;
    // As a daemon does: images and releases are not the business of whoever forks.
    let background = pool.start_background()?;
    for round in 0..rounds {
        for subject in &mut subjects {
            let disk = &subject.disk;
            subject
                .forks
                .add_us(fork(&pool, disk, format!("{disk}-f{round}"))?);
            let name = format!("s{round}");
            let ((), time) = timed(|| cowdisk::snapshot(&pool, disk, &name))?;
            subject.snapshots.add_us(time);
        }
    }
    let mut random = Random(2);
    let data = vec![1; usize::try_from(WRITE)?];
    for round in 0..rounds {
        for subject in &mut subjects {
            let name = &subject.disk;
            let disk = Disk::open(&pool, name)?;
            disk.write_at(&data, random.below(disk.size() / WRITE) * WRITE)?;
            subject
                .forks_after_write
                .add_us(fork(&pool, name, format!("{name}-w{round}"))?);
        }
    }
    drop(background);
    for subject in &subjects {
        subject
            .forks
            .print(&format!("fork, {}", subject.label), "us")?;
        subject
            .snapshots
            .print(&format!("snapshot, {}", subject.label), "us")?;
        let name = format!("fork after a 4 KiB write, {}", subject.label);
        subject.forks_after_write.print(&name, "us")?;
    }
    Ok(pool.close()?)
}

/// `engine many`: many forks of one disk.
///
/// # Errors
/// Bad arguments, or what the engine says.
pub(crate) fn many(args: &Args) -> Result<()> {
    let count = args.number("forks")?;
    let pool = create_pool(Path::new(args.text("pool")?), GOLDEN + ROOM)?;
    mapped_disk(&pool, "golden", GOLDEN, Order::Sequential)?;
    let each = |mib: f64| mib * 1024.0 / count as f64;

    let before = memory_mib("VmRSS")?;
    let names: Vec<String> = (0..count).map(|n| format!("a{n}")).collect();
    let ((), time) = timed(|| cowdisk::fork(&pool, "golden", &names))?;
    let after = memory_mib("VmRSS")?;
    print_one(&format!("{count} forks at once"), time.as_secs_f64(), "s")?;
    print_one("memory of a fork made at once", each(after - before), "KiB")?;

    let before = after;
    let names: Vec<String> = (0..count).map(|n| format!("b{n}")).collect();
    let ((), time) = timed(|| {
        let mut one = names.iter();
        one.try_for_each(|name| cowdisk::fork(&pool, "golden", std::slice::from_ref(name)))
    })?;
    let after = memory_mib("VmRSS")?;
    print_one(
        &format!("{count} forks one by one"),
        time.as_secs_f64(),
        "s",
    )?;
    print_one(
        "memory of a fork made one by one",
        each(after - before),
        "KiB",
    )?;

    let before = after;
    let data = vec![1; usize::try_from(WRITE)?];
    let mut random = Random(3);
    for name in &names {
        let disk = Disk::open(&pool, name)?;
        disk.write_at(&data, random.below(disk.size() / WRITE) * WRITE)?;
    }
    pool.flush()?;
    let after = memory_mib("VmRSS")?;
    print_one(
        "memory a fork takes more after its first write",
        each(after - before),
        "KiB",
    )?;
    Ok(pool.close()?)
}
