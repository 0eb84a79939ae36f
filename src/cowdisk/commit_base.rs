//! Writing a disk into its raw base: afterwards the base reads as the disk did, and the disk holds
//! nothing of its own.
//!
//! What the disk holds hides what is written under it, so the disk reads the same at every moment,
//! and a commit that was interrupted can be begun again. The base is not what it was then, though,
//! and is refused until the commit is finished.

use super::base::{Base, identity, is_same, samples};
use super::disk::{Disk, Handle};
use super::error::DiskError;
use super::extents::ExtentKind;
use super::manage::{check_unused, put_row, writable};
use super::transfer::Progress;
use crate::format::catalogue::{BaseFormat, BaseRef, Row};
use crate::format::units::{Lcn, SECTOR, bytes_of, len_of};
use crate::pool::catalogue::Item;
use crate::pool::volume::Volume;
use crate::pool::{Pool, PoolError};
use crate::storage::{Access, AlignedBuf, FileStorage, Storage};
use crate::sync::Arc;
use crate::sync::atomic::Ordering;
use std::path::Path;

/// Most bytes moved at once.
const PART_LEN_MAX: u64 = 1 << 20;

/// Writes what the disk `name` holds over its raw base into the base, and empties the disk's map.
/// `may_differ` goes on although the base is not what it was: after an interrupted commit. Returns
/// the bytes of data written.
///
/// # Errors
/// No such disk, a snapshot, in use, no raw base, other disks of the pool have the same base (they
/// would change), the base is in use or changed, or the base or the pool failed.
pub fn commit_to_base(
    pool: &Arc<Pool>,
    name: &str,
    may_differ: bool,
    progress: Progress<'_>,
) -> Result<u64, DiskError> {
    let item = writable(pool, name)?;
    let _committing = Committing::begin(pool, &item)?;
    let reference = check_base(pool, &item)?;
    check_unused(&item)?;
    let fault = |what: String| DiskError::Base {
        path: reference.path.clone(),
        what,
    };
    let path = Path::new(&reference.path);
    // Locked against everybody: nobody can open the disk either until this is over.
    let file = FileStorage::open_image(path, Access::ReadWrite);
    let file = file.map_err(|e| fault(e.to_string()))?;
    check_identity(path, reference, may_differ)?;
    // Open to the end, so that nobody else replaces what it holds.
    let disk = without_base(pool, &item);
    let written = write_out(&disk, &item.row, &file, progress)?;
    // What the base is known by from now on must be durable too: its time of last write.
    let synced = file.sync_all();
    synced.map_err(DiskError::io("flushing the base image"))?;
    let mut now = Base::examine(path, BaseFormat::Raw)?;
    let taken = samples::take(now.file_len, |buf, at| file.read_at(buf, at));
    now.samples = Some(taken.map_err(DiskError::io("reading the base image"))?);
    empty(pool, &item, reference, &now)?;
    Ok(written)
}

/// While this exists the disk is not forked.
struct Committing(Arc<Volume>);

impl Committing {
    /// Runs alone: a fork that is under way is in the catalogue before, or begins later and sees this.
    fn begin(pool: &Pool, item: &Item) -> Result<Self, PoolError> {
        pool.transact(&[], |_| {
            let was_committing = item.volume.is_committing.swap(true, Ordering::SeqCst);
            if was_committing {
                let name = item.row.name.clone();
                return Err(PoolError::InUse { name });
            }
            Ok(Self(Arc::clone(&item.volume)))
        })
    }
}

impl Drop for Committing {
    fn drop(&mut self) {
        self.0.is_committing.store(false, Ordering::SeqCst);
    }
}

/// The raw base that only this disk has.
fn check_base<'a>(pool: &Pool, item: &'a Item) -> Result<&'a BaseRef, DiskError> {
    let name = &item.row.name;
    let invalid = |what: String| Err(PoolError::invalid(what).into());
    let Some(base) = &item.row.base else {
        return invalid(format!(
            "`{name}` was not forked from a disk of this pool, and has no base"
        ));
    };
    if base.format != BaseFormat::Raw {
        return invalid(format!(
            "the base of `{name}` is not raw, and cannot be written; export the disk instead"
        ));
    }
    let is_below = |other: &BaseRef| other.paths().any(|path| path == base.path);
    let is_ours = |other: &BaseRef| is_one_file(other, base) || is_below(other);
    let others = pool.items().into_iter().map(|other| other.row);
    let others: Vec<String> = others
        .filter(|row| row.id != item.row.id && row.base.as_ref().is_some_and(is_ours))
        .map(|row| row.name)
        .collect();
    if !others.is_empty() {
        return invalid(format!(
            "{} is the base of {} too, which would change; flatten or remove them first",
            base.path,
            others.join(", ")
        ));
    }
    Ok(base)
}

/// Whether both rows mean one file, under whatever names. Device numbers count as they are now.
fn is_one_file(a: &BaseRef, b: &BaseRef) -> bool {
    let place = |of: &BaseRef| {
        let now = Base::examine(Path::new(&of.path), of.format).ok()?;
        Some((now.dev, now.ino))
    };
    let is_one_place = || place(a).is_some_and(|at| place(b) == Some(at));
    a.path == b.path || identity(a) == identity(b) || is_one_place()
}

fn check_identity(path: &Path, was: &BaseRef, may_differ: bool) -> Result<(), DiskError> {
    let now = Base::examine(path, BaseFormat::Raw)?;
    let is_file = now.ino == was.ino;
    if is_same(&now, was) || (is_file && may_differ) {
        return Ok(());
    }
    let what = match is_file {
        true => {
            "it has changed since it became a base; if that was an interrupted commit of this \
             disk, say --force to finish it"
        }
        false => "it is another file than the one that became a base; put the original back",
    };
    Err(DiskError::Base {
        path: was.path.clone(),
        what: what.to_owned(),
    })
}

/// A handle to what the disk holds of its own; the rest reads as holes.
fn without_base(pool: &Arc<Pool>, item: &Item) -> Disk {
    item.volume.opens.fetch_add(1, Ordering::SeqCst);
    Disk(Arc::new(Handle {
        pool: Arc::clone(pool),
        volume: Arc::clone(&item.volume),
        base: None,
        is_read_only: true,
        is_ephemeral: false,
    }))
}

/// Writes into `file`, the base, what the disk holds over it; durable on return.
fn write_out(
    disk: &Disk,
    row: &Row,
    file: &dyn Storage,
    progress: Progress<'_>,
) -> Result<u64, DiskError> {
    let writing = || DiskError::io("writing the base image");
    let have = file.len().map_err(writing())?;
    let want = row.size.max(have.next_multiple_of(SECTOR));
    if want > have {
        file.set_len(want).map_err(writing())?;
    }
    let mut buf = AlignedBuf::new(len_of(PART_LEN_MAX));
    let mut extents = Vec::new();
    let mut written = 0;
    let mut at = 0;
    while at < row.size {
        extents.clear();
        let end = disk.extents_from(at, &mut extents)?;
        for extent in &extents {
            // Holes below `base_len` are the base itself.
            let from = match extent.kind {
                ExtentKind::Data(_) | ExtentKind::Zero => extent.offset,
                ExtentKind::Hole | ExtentKind::Base => extent.offset.max(row.base_len),
            };
            let is_data = matches!(extent.kind, ExtentKind::Data(_));
            let mut from = from;
            while from < extent.end() {
                let part = &mut buf[..len_of((extent.end() - from).min(PART_LEN_MAX))];
                let len = bytes_of(part.len());
                if is_data {
                    disk.read_at(part, from)?;
                    file.write_at(part, from).map_err(writing())?;
                    written += len;
                } else if has_data(file, from, len)? {
                    part.fill(0);
                    file.write_at(part, from).map_err(writing())?;
                }
                from += len;
                progress(from, row.size)?;
            }
        }
        at = end;
        progress(at, row.size)?;
    }
    let flushed = file.flush();
    flushed.map_err(DiskError::io("flushing the base image"))?;
    Ok(written)
}

/// Zeros are written only where something is.
fn has_data(file: &dyn Storage, at: u64, len: u64) -> Result<bool, DiskError> {
    let next = file.next_data(at);
    let next = next.map_err(DiskError::io("looking for data in the base image"))?;
    Ok(next.is_some_and(|(start, _)| start < at + len))
}

/// The disk holds nothing of its own any more, over the base that `was` and is `now`. One batch.
fn empty(pool: &Arc<Pool>, item: &Item, was: &BaseRef, now: &BaseRef) -> Result<(), DiskError> {
    let name = &item.row.name;
    pool.transact(&[Arc::clone(&item.volume)], |transaction| {
        let item = pool.find(name)?;
        // Ours is the only handle.
        if item.row.base.as_ref() != Some(was) || item.volume.opens.load(Ordering::SeqCst) != 1 {
            let name = name.clone();
            return Err(PoolError::InUse { name });
        }
        let base_len = now.file_len.next_multiple_of(SECTOR).min(item.row.size);
        let row = Row {
            base: Some(now.clone()),
            base_len,
            ..item.row.clone()
        };
        transaction.check_row(&row)?;
        let size = pool.cluster_size();
        let mut map = item.volume.map.write();
        // Unmapped clusters below `base_len` would become zeros: these are to show the base.
        map.base_len = 0;
        let count = size.count(map.size).unwrap_or(u32::MAX);
        let (space, zero_leaf) = (&pool.space, pool.zero_leaf());
        map.unmap(space, Lcn(0), count, size, zero_leaf, pool.generation());
        map.base_len = base_len;
        transaction.collect(&mut map)?;
        drop(map);
        put_row(transaction, &item, row)
    })?;
    Ok(())
}

/// Goal: a power cut or an error at any moment of a commit costs the disk nothing, and the commit
/// can be begun again.
///
/// Method: pool and base are simulated devices that lose power together, at every operation of
/// either, with any of their unflushed blocks. The disk is then read as its map says, its own parts
/// from the pool and the others from the base, and must be what it was; the commit, begun again on
/// what is left, must make the base what the disk was.
#[cfg(test)]
mod tests {
    use super::*;
    use crate::cowdisk::{self, NewDisk};
    use crate::format::units::ClusterSize;
    use crate::pool::{CreateOptions, OpenOptions, open};
    use crate::storage::SimStorage;
    use crate::storage::sim::{Harm, Moment};
    use crate::sync::Mutex;

    const CLUSTER: u64 = 16 << 10;
    const BASE_LEN: u64 = 6 * CLUSTER;
    const DISK_LEN: u64 = 8 * CLUSTER;
    const POOL_LEN: u64 = 16 << 20;
    const EIO: i32 = 5;
    const ENOSPC: i32 = 28;

    /// A pool with a disk over a base, and what the disk reads as.
    struct Scene {
        pool: Arc<SimStorage>,
        base: Arc<SimStorage>,
        expected: Vec<u8>,
    }

    fn open_pool(storage: &Arc<SimStorage>) -> Arc<Pool> {
        let storage: Arc<dyn Storage> = Arc::clone(storage) as Arc<dyn Storage>;
        Pool::open(storage, &OpenOptions::default()).expect("the pool opens")
    }

    /// The disk has all there is over its base: clusters of its own, in part and whole, zeros, and
    /// data beyond the base's end.
    fn scene() -> Scene {
        let pool = Arc::new(SimStorage::new(POOL_LEN));
        let options = CreateOptions {
            cluster_size: ClusterSize::from_bytes(CLUSTER).expect("in range"),
            ..CreateOptions::new(POOL_LEN)
        };
        open::create(&*pool, &options).expect("an empty pool");
        let below: Vec<u8> = (1..=250).cycle().take(len_of(BASE_LEN)).collect();
        let base = Arc::new(SimStorage::new(BASE_LEN));
        base.write_at(&below, 0).expect("writes");
        base.flush().expect("flushes");
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), &below).expect("writes");
        let opened = open_pool(&pool);
        let new = NewDisk {
            base: Some((file.path().to_owned(), BaseFormat::Raw)),
            ..NewDisk::empty("d", DISK_LEN)
        };
        cowdisk::create(&opened, &new).expect("creates");
        let disk = Disk::open(&opened, "d").expect("opens");
        let mut expected = below;
        expected.resize(len_of(DISK_LEN), 0);
        for (from, len) in [
            (0, 3072),
            (CLUSTER, CLUSTER),
            (4 * CLUSTER, 9216),
            (7 * CLUSTER, 512),
        ] {
            let written = &mut expected[len_of(from)..len_of(from + len)];
            written.fill(0xd0);
            disk.write_at(written, from).expect("writes");
        }
        for (from, len) in [(2 * CLUSTER, CLUSTER), (5 * CLUSTER, 2048)] {
            expected[len_of(from)..len_of(from + len)].fill(0);
            disk.write_zeroes(from, len, true).expect("zeroes");
        }
        opened.close().expect("closes");
        Scene {
            pool,
            base,
            expected,
        }
    }

    /// What the pool in `pool` says of the disk, over what is in `base`.
    fn reads_as(pool: &Arc<SimStorage>, base: &SimStorage) -> Vec<u8> {
        let pool = open_pool(pool);
        let item = pool.find("d").expect("there");
        let disk = without_base(&pool, &item);
        let mut bytes = vec![0; len_of(disk.size())];
        // Without its base the disk has holes where it reads that.
        let below = &mut bytes[..len_of(item.row.base_len)];
        base.read_at(below, 0).expect("reads");
        for extent in disk.extents().expect("has a map") {
            let part = &mut bytes[len_of(extent.offset)..len_of(extent.end())];
            match extent.kind {
                ExtentKind::Data(_) => disk.read_at(part, extent.offset).expect("reads"),
                ExtentKind::Zero => part.fill(0),
                ExtentKind::Hole | ExtentKind::Base => (),
            }
        }
        bytes
    }

    /// As [`commit_to_base`], into `base`. The new identity is made up: there is no inode.
    fn commit(pool: &Arc<Pool>, base: &SimStorage) -> Result<u64, DiskError> {
        let item = writable(pool, "d")?;
        let was = check_base(pool, &item)?;
        let disk = without_base(pool, &item);
        let written = write_out(&disk, &item.row, base, &mut |_, _| Ok(()))?;
        let now = BaseRef {
            file_len: base.len().expect("a simulated disk knows"),
            mtime_ns: was.mtime_ns + 1,
            ..was.clone()
        };
        empty(pool, &item, was, &now)?;
        Ok(written)
    }

    /// Whatever was committed of it, the disk is what it was, and the rest can be committed.
    fn check(pool: SimStorage, base: &SimStorage, expected: &[u8]) {
        let pool = Arc::new(pool);
        assert!(reads_as(&pool, base) == expected, "the disk is another");
        let opened = open_pool(&pool);
        commit(&opened, base).expect("is begun again");
        let mut committed = vec![0; expected.len()];
        let base = base.crash_all_lost();
        base.read_at(&mut committed, 0).expect("reads");
        assert!(committed == expected, "the base is not what the disk was");
        let pool = Arc::new(pool.crash_all_lost());
        assert!(reads_as(&pool, &base) == expected, "afterwards");
    }

    /// What a crash at `moment` can leave of a device: the extremes, and others.
    fn images(moment: &Moment<'_>) -> Vec<SimStorage> {
        let others = (0..3).map(|seed| moment.crash(seed));
        let crashes = [moment.all_lost(), moment.all_kept()].into_iter();
        let crashes = crashes.chain(others);
        crashes.map(|crash| moment.image(&crash)).collect()
    }

    #[test]
    fn a_file_is_one_under_another_name_or_with_other_contents() {
        let dir = tempfile::tempdir().expect("a directory");
        let [file, link, other] = ["file", "link", "other"].map(|name| dir.path().join(name));
        std::fs::write(&file, [1; 512]).expect("writes");
        std::fs::write(&other, [1; 512]).expect("writes");
        std::fs::hard_link(&file, &link).expect("links");
        let examine = |path| Base::examine(path, BaseFormat::Raw).expect("a file");
        let earlier = |of: &BaseRef| BaseRef {
            dev: of.dev + 1,
            mtime_ns: of.mtime_ns - 1,
            ..of.clone()
        };
        let [file, link, other] = [&file, &link, &other].map(|path| examine(path));
        let gone = BaseRef {
            path: "/gone".to_owned(),
            ..file.clone()
        };
        for same in [&file, &link, &gone, &earlier(&file), &earlier(&link)] {
            assert!(is_one_file(&file, same), "{same:?}");
        }
        for another in [&other, &earlier(&other), &earlier(&gone)] {
            assert!(!is_one_file(&file, another), "{another:?}");
        }
    }

    #[test]
    fn a_disk_that_is_being_committed_is_not_forked() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), [1; 4096]).expect("writes");
        let pool = open_pool(&scene().pool);
        let new = NewDisk {
            base: Some((file.path().to_owned(), BaseFormat::Raw)),
            ..NewDisk::empty("e", 4096)
        };
        cowdisk::create(&pool, &new).expect("creates");
        let fork = || cowdisk::fork(&pool, "e", &["fork".to_owned()]);
        let snapshot = || cowdisk::snapshot(&pool, "e", "s");
        let mut refused = 0;
        let mut progress = |_, _| {
            for result in [fork(), snapshot()] {
                let is_refused = matches!(result, Err(DiskError::Pool(PoolError::InUse { .. })));
                refused += u32::from(is_refused);
            }
            Ok(())
        };
        commit_to_base(&pool, "e", false, &mut progress).expect("commits");
        assert!(refused >= 2);
        let forked = fork();
        forked.expect("it is over");
        let committed = commit_to_base(&pool, "e", false, &mut |_, _| Ok(()));
        let e = committed
            .expect_err("the fork has the base too")
            .to_string();
        assert!(e.contains("the base of fork too"), "{e}");
    }

    #[test]
    fn a_commit_survives_a_power_cut_at_any_operation() {
        let Scene {
            pool,
            base,
            expected,
        } = scene();
        let opened = open_pool(&pool);
        let pairs = Arc::new(Mutex::new(Vec::new()));
        for (watched, other) in [(&pool, &base), (&base, &pool)] {
            let (pairs, is_pool) = (Arc::clone(&pairs), Arc::ptr_eq(watched, &pool));
            let other = Arc::clone(other);
            watched.watch(Some(Box::new(move |moment| {
                for (seed, image) in (0..).zip(images(moment)) {
                    for other in [other.crash_all_lost(), other.crash(seed)] {
                        pairs.lock().push(match is_pool {
                            true => (image.kill(), other),
                            false => (other, image.kill()),
                        });
                    }
                }
            })));
        }
        commit(&opened, &base).expect("commits");
        pool.watch(None);
        base.watch(None);
        let mut pairs = std::mem::take(&mut *pairs.lock());
        assert!(pairs.len() > 50, "{} crashes", pairs.len());
        pairs.push((pool.crash_all_lost(), base.crash_all_lost()));
        for (pool, base) in pairs {
            check(pool, &base, &expected);
        }
    }

    #[test]
    fn a_commit_that_fails_anywhere_costs_nothing() {
        let mut failed = 0;
        for is_pool in [true, false] {
            for harm in [Harm::Fails(EIO), Harm::Short(EIO), Harm::Fails(ENOSPC)] {
                for skip in 0.. {
                    let scene = scene();
                    let opened = open_pool(&scene.pool);
                    let harmed = if is_pool { &scene.pool } else { &scene.base };
                    let before = harmed.counters().all();
                    harmed.harm_any(skip, harm);
                    let is_done = commit(&opened, &scene.base).is_ok();
                    let was_hurt = harmed.counters().all() - before > skip;
                    harmed.clear_faults();
                    failed += u64::from(!is_done);
                    let pool = [scene.pool.crash_all_lost(), scene.pool.crash(skip)];
                    let base = [scene.base.crash_all_lost(), scene.base.crash(skip)];
                    for (pool, base) in pool.into_iter().zip(base) {
                        check(pool, &base, &scene.expected);
                    }
                    if !was_hurt {
                        break;
                    }
                }
            }
        }
        assert!(failed > 30, "{failed} commits failed");
    }
}
