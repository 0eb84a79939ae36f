//! Goal: a power cut or an error at any moment of a flattening costs the disk nothing, and it can be
//! begun again.
//!
//! Method: the pool is on a simulated device, the base a file, which is only read. The disk is written
//! to between the parts that are copied. At every operation of the device it loses power, with any of
//! its unflushed blocks kept; and in other runs each operation fails. What is left must check clean,
//! read as the disk did, still do so without its base once it was flattened, and need the base until
//! then.

mod common;

use common::{CLUSTER, bytes, fresh, opened, read};
use std::sync::Arc;
use tidepool::cowdisk::{self, Disk, NewDisk};
use tidepool::format::catalogue::BaseFormat;
use tidepool::pool::{Pool, check};
use tidepool::storage::SimStorage;
use tidepool::storage::sim::{Harm, Moment};
use tidepool::sync::Mutex;

/// Two parts are copied.
const BASE_LEN: u64 = (1 << 20) + 2 * CLUSTER;
const DISK_LEN: u64 = BASE_LEN + CLUSTER;
const EIO: i32 = 5;
const ENOSPC: i32 = 28;

struct Scene {
    storage: Arc<SimStorage>,
    pool: Arc<Pool>,
    /// What the disk may read as: what it is, and what a write that goes on makes of it.
    expected: Arc<Mutex<Vec<Vec<u8>>>>,
    _dir: tempfile::TempDir,
}

fn at(offset: u64) -> usize {
    usize::try_from(offset).expect("small")
}

/// A disk that shows its base in whole clusters, in parts of some, and not in others.
fn scene() -> Scene {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("base.raw");
    let mut flat = vec![0; at(BASE_LEN)];
    for (n, part) in (1..).zip(flat.chunks_mut(3 * at(CLUSTER) / 2).step_by(5)) {
        part.fill(n);
    }
    std::fs::write(&path, &flat).expect("an image");
    flat.resize(at(DISK_LEN), 0);
    let (storage, pool) = fresh();
    let new = NewDisk {
        base: Some((path, BaseFormat::Raw)),
        ..NewDisk::empty("d", DISK_LEN)
    };
    cowdisk::create(&pool, &new).expect("creates");
    let disk = Disk::open(&pool, "d").expect("opens");
    disk.write_at(&bytes(0xd0, 4096), CLUSTER).expect("writes");
    flat[at(CLUSTER)..at(CLUSTER + 4096)].fill(0xd0);
    disk.discard(8 * CLUSTER, CLUSTER).expect("discards");
    flat[at(8 * CLUSTER)..at(9 * CLUSTER)].fill(0);
    disk.flush().expect("flushes");
    Scene {
        storage,
        pool,
        expected: Arc::new(Mutex::new(vec![flat])),
        _dir: dir,
    }
}

impl Scene {
    /// Flattens the disk, and writes to it after the first part.
    fn flatten(&self) -> Result<(), cowdisk::DiskError> {
        let disk = Disk::open(&self.pool, "d")?;
        cowdisk::flatten(&self.pool, "d", &mut |done, total| {
            if done >= total {
                return Ok(());
            }
            let from = done - CLUSTER - 2048;
            let mut flat = self.expected.lock()[0].clone();
            flat[at(from)..at(from + 4096)].fill(0xe0);
            self.expected.lock().push(flat);
            let written = disk.write_at(&bytes(0xe0, 4096), from);
            let flushed = written.and_then(|()| disk.flush());
            flushed.map_err(|_error| cowdisk::Interrupted)?;
            self.expected.lock().remove(0);
            Ok(())
        })?;
        Ok(())
    }
}

/// What a crash has left is one of `expected`, with the base and without it.
fn survives(image: SimStorage, expected: &[Vec<u8>]) {
    let image = Arc::new(image);
    let report = check::check(&*image).expect("can be read");
    assert!(report.faults.is_empty(), "{:?}", report.faults);
    let pool = opened(&image);
    let contents = || {
        let disk = Disk::open(&pool, "d").expect("opens");
        read(&disk, 0, DISK_LEN)
    };
    let now = contents();
    for sector in (0..now.len()).step_by(512) {
        let part = sector..sector + 512;
        let is_known = expected
            .iter()
            .any(|flat| flat[part.clone()] == now[part.clone()]);
        assert!(is_known, "{part:?} is another disk's");
    }
    let has_base = || pool.find("d").expect("there").row.base.is_some();
    if has_base() {
        cowdisk::flatten(&pool, "d", &mut |_, _| Ok(())).expect("is begun again");
    }
    assert!(!has_base());
    assert!(contents() == now, "flattened, it is another");
}

#[test]
fn a_flattening_survives_a_power_cut_at_any_operation() {
    let scene = scene();
    let images = Arc::new(Mutex::new(Vec::new()));
    let (taken, expected) = (Arc::clone(&images), Arc::clone(&scene.expected));
    scene
        .storage
        .watch(Some(Box::new(move |moment: &Moment<'_>| {
            let others = (0..3).map(|seed| moment.crash(seed));
            let crashes = [moment.all_lost(), moment.all_kept()]
                .into_iter()
                .chain(others);
            let expected = expected.lock().clone();
            let left = crashes.map(|crash| (moment.image(&crash), expected.clone()));
            taken.lock().extend(left);
        })));
    scene.flatten().expect("flattens");
    scene.storage.watch(None);
    let mut images = std::mem::take(&mut *images.lock());
    assert!(images.len() > 50, "{} crashes", images.len());
    images.push((
        scene.storage.crash_all_lost(),
        scene.expected.lock().clone(),
    ));
    for (image, expected) in images {
        survives(image, &expected);
    }
}

#[test]
fn a_flattening_that_fails_anywhere_costs_nothing() {
    let mut failed = 0;
    for harm in [Harm::Fails(EIO), Harm::Short(EIO), Harm::Fails(ENOSPC)] {
        for skip in 0.. {
            let scene = scene();
            let before = scene.storage.counters().all();
            scene.storage.harm_any(skip, harm);
            let is_done = scene.flatten().is_ok();
            failed += u64::from(!is_done);
            let was_hurt = scene.storage.counters().all() - before > skip;
            scene.storage.clear_faults();
            let expected = scene.expected.lock().clone();
            for image in [scene.storage.crash_all_lost(), scene.storage.crash(skip)] {
                survives(image, &expected);
            }
            if !was_hurt {
                break;
            }
        }
    }
    assert!(failed > 50, "{failed} flattenings failed");
}
