//! Goal: a fork of a fork of ... a thousand deep is a disk like any other: it reads what it should
//! with no more segments than the first, the parent's later writes never reach it, and deleting any
//! of the chain, in any order, gives back exactly what is unique to it.
//!
//! Method: one real pool file; each layer writes one block of its own and overwrites one that all
//! share, then is forked. Contents are compared block by block with what was written, plans with
//! the plan of an unforked disk, and free clusters before and after each deletion.

mod common;

use common::Random;
use std::sync::Arc;
use tidepool::cowdisk::{self, Disk, NewDisk, Source};
use tidepool::pool::{CreateOptions, OpenOptions, Pool, Return, open};
use tidepool::storage::{FileStorage, SimStorage, Storage};

const DEPTH: u64 = 1000;
const BLOCK: u64 = 4096;
const DISK_LEN: u64 = 128 << 20;

fn new_pool(storage: Arc<dyn Storage>, len: u64) -> Arc<Pool> {
    open::create(&*storage, &CreateOptions::new(len)).expect("an empty pool");
    let options = OpenOptions {
        returning: Return::Never,
        ..OpenOptions::default()
    };
    Pool::open(storage, &options).expect("opens")
}

fn block(layer: u64, at: u64) -> Vec<u8> {
    let mut bytes = layer.to_le_bytes().to_vec();
    bytes.extend_from_slice(&at.to_le_bytes());
    bytes.resize(4096, u8::try_from(layer % 251).expect("small"));
    bytes
}

fn read(disk: &Disk, at: u64) -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    disk.read_at(&mut bytes, at * BLOCK).expect("reads");
    bytes
}

/// Layer `n` writes block `16 * n` (a cluster of its own) and block 7, which all write.
fn grow(pool: &Arc<Pool>) {
    cowdisk::create(pool, &NewDisk::empty("l0", DISK_LEN)).expect("creates");
    for layer in 0..DEPTH {
        let name = format!("l{layer}");
        let disk = Disk::open(pool, &name).expect("opens");
        disk.write_at(&block(layer, 16 * layer), 16 * layer * BLOCK)
            .expect("writes");
        disk.write_at(&block(layer, 7), 7 * BLOCK).expect("writes");
        cowdisk::fork(pool, &name, &[format!("l{}", layer + 1)]).expect("forks");
        // Later writes of a parent, before, in and after what the child has.
        disk.write_at(&block(9999, 8), 8 * BLOCK).expect("writes");
        disk.write_at(&block(9999, 16 * layer), 16 * layer * BLOCK)
            .expect("writes");
    }
}

#[test]
fn a_thousand_forks_deep_is_as_near_as_the_first() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = FileStorage::create_new(dir.path().join("chain.pool"), 512 << 20).expect("creates");
    let pool = new_pool(Arc::new(file), 512 << 20);
    grow(&pool);
    let last = Disk::open(&pool, &format!("l{DEPTH}")).expect("opens");
    for layer in 1..DEPTH {
        assert_eq!(
            read(&last, 16 * layer),
            block(layer, 16 * layer),
            "from layer {layer}"
        );
    }
    assert_eq!(
        read(&last, 7),
        block(DEPTH - 1, 7),
        "the last writer of the shared block"
    );
    assert_eq!(
        read(&last, 8),
        vec![0; 4096],
        "no parent's later write reaches a child"
    );
    let first = Disk::open(&pool, "l0").expect("opens");
    assert_eq!(read(&first, 8), block(9999, 8), "the parent stays writable");
    assert_eq!(
        read(&first, 16),
        vec![0; 4096],
        "no child's write reaches its parent"
    );
    // One cluster is one segment from the pool at any depth.
    for layer in 1..DEPTH {
        let plan = last.segments(16 * layer * BLOCK, 4096).expect("plans");
        assert!(matches!(plan.as_slice(), [one] if matches!(one.source, Source::Pool(_))));
    }
    pool.close().expect("closes");
}

#[test]
fn links_of_a_chain_go_in_any_order_and_give_back_what_was_theirs() {
    let seed = tidepool::storage::unix_seconds();
    println!("seed {seed}");
    let storage: Arc<dyn Storage> = Arc::new(SimStorage::new(512 << 20));
    let pool = new_pool(storage, 512 << 20);
    grow(&pool);
    let mut names: Vec<String> = (0..=DEPTH).map(|layer| format!("l{layer}")).collect();
    let mut random = Random(seed);
    for n in (1..names.len()).rev() {
        let other = random.below(u64::try_from(n + 1).expect("small"));
        names.swap(n, usize::try_from(other).expect("small"));
    }
    let kept = names.split_off(names.len() - 3);
    for (n, name) in names.iter().enumerate() {
        // Measuring walks every map: a sample is enough.
        let before = (n % 50 == 0).then(|| cowdisk::usage(&pool).expect("measures"));
        cowdisk::remove(&pool, name, false).expect("removes");
        if let Some(before) = before {
            let (_, gone) = before
                .disks
                .iter()
                .find(|(item, _)| item.row.name == *name)
                .expect("listed");
            let after = cowdisk::usage(&pool).expect("measures");
            assert_eq!(after.free, before.free + gone.unique, "{name}");
        }
    }
    for name in &kept {
        let layer: u64 = name[1..].parse().expect("a number");
        let disk = Disk::open(&pool, name).expect("still there");
        for other in 1..layer {
            assert_eq!(
                read(&disk, 16 * other),
                block(other, 16 * other),
                "{name} from {other}"
            );
        }
    }
}

#[test]
fn what_open_disks_set_aside_is_there_for_a_full_pool() {
    let storage: Arc<dyn Storage> = Arc::new(SimStorage::new(32 << 20));
    let pool = new_pool(storage, 32 << 20);
    // Each writes one cluster, and sets more aside; all stay open.
    let disks: Vec<Disk> = (0..20)
        .map(|n| {
            let name = format!("d{n}");
            cowdisk::create(&pool, &NewDisk::empty(&name, 32 << 20)).expect("creates");
            let disk = Disk::open(&pool, &name).expect("opens");
            disk.write_at(&block(n, 0), 0).expect("writes");
            disk
        })
        .collect();
    let free = cowdisk::usage(&pool).expect("measures");
    let usable = free.free - free.reserved;
    for at in 0..usable / pool.cluster_size().bytes() {
        disks[0]
            .write_at(&block(0, at), (at + 1) << 16)
            .expect("the pool is not full yet");
    }
    let e = disks[0]
        .write_at(&block(0, 0), 31 << 20)
        .expect_err("now it is");
    assert_eq!(e.kind(), cowdisk::DiskErrorKind::NoSpace);
}
