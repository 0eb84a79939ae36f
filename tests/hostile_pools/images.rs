//! A checkpoint image of which any one part is damaged, or a few neighbours, is read as it was; the
//! check says that it is damaged, and a repair writes it anew.

use super::common::{Random, disk};
use super::planted::{copy, open_read_only, superblock};
use super::repair::goes_on;
use std::sync::Arc;
use tidepool::cowdisk;
use tidepool::format::image_block::{WINDOW, parity_of};
use tidepool::format::units::ClusterSize;
use tidepool::pool::check::check;
use tidepool::pool::dump::dump;
use tidepool::pool::repair::repair;
use tidepool::pool::{CreateOptions, OpenOptions, Pool, open};
use tidepool::storage::{SimStorage, Storage};

const LEN: u64 = 64 << 20;
const CLUSTER: u64 = 16 << 10;

/// A pool whose image has a window of blocks, and a few more than have a parity block.
fn sample() -> Arc<SimStorage> {
    let storage = Arc::new(SimStorage::new(LEN));
    let options = CreateOptions {
        cluster_size: ClusterSize::from_bytes(CLUSTER).expect("16K"),
        ..CreateOptions::new(LEN)
    };
    open::create(&*storage, &options).expect("an empty pool");
    let store: Arc<dyn Storage> = Arc::clone(&storage) as Arc<dyn Storage>;
    let pool = Pool::open(store, &OpenOptions::default()).expect("opens");
    drop(disk(&pool, "a", CLUSTER));
    let mut count = 0;
    let blocks = || {
        pool.superblock()
            .image
            .map_or(0, |image| image.len / CLUSTER)
    };
    while blocks() < u64::from(WINDOW) + 20 {
        let names: Vec<String> = (0..100).map(|n| format!("{:0>100}", count + n)).collect();
        cowdisk::fork(&pool, "a", &names).expect("forks");
        count += 100;
    }
    pool.close().expect("closes");
    storage
}

/// By name, what each disk is.
fn dumped(storage: &SimStorage) -> Vec<String> {
    let mut lines = Vec::new();
    let mut add = |line: &serde_json::Value| {
        if ["disk", "map", "same"]
            .iter()
            .any(|kind| line["kind"] == *kind)
        {
            lines.push(line.to_string());
        }
    };
    dump(storage, &mut add).expect("dumps");
    lines
}

/// Clusters of the image.
fn clusters(storage: &SimStorage) -> Vec<u64> {
    let mut clusters = Vec::new();
    let mut add = |line: &serde_json::Value| {
        if line["kind"] == "image" {
            let number = |key: &str| line[key].as_u64().expect("a number");
            clusters.extend(number("cluster")..number("cluster") + number("count"));
        }
    };
    dump(storage, &mut add).expect("dumps");
    clusters
}

fn flip(storage: &SimStorage, cluster: u64, byte: u64) {
    let at = cluster * CLUSTER + byte / 512 * 512;
    let mut sector = [0; 512];
    storage.read_at(&mut sector, at).expect("reads");
    sector[usize::try_from(byte % 512).expect("small")] ^= 1;
    storage.write_at(&sector, at).expect("writes");
    storage.flush().expect("flushes");
}

#[test]
fn any_part_of_an_image_may_be_damaged() {
    let storage = sample();
    let all = dumped(&storage);
    let clusters = clusters(&storage);
    let image = superblock(&storage).image.expect("an image");
    let blocks = u32::try_from(image.len / CLUSTER).expect("few");
    let expected = blocks + parity_of(blocks) + 2;
    assert_eq!(clusters.len(), usize::try_from(expected).expect("few"));
    let mut random = Random(11);
    for (n, cluster) in clusters.iter().enumerate() {
        // All heads and some of the rest.
        if n > 4 && random.below(24) != 0 {
            continue;
        }
        let bad = copy(&storage);
        flip(&bad, *cluster, random.below(128));
        let what = format!("cluster {cluster}");
        open_read_only(&bad).unwrap_or_else(|e| panic!("{what}: {e}"));
        assert!(dumped(&bad) == all, "{what}: it is not what it was");
        let report = check(&*bad).expect("reads");
        assert!(report.faults.len() == 1, "{what}: {:?}", report.faults);
        assert!(report.faults[0].remedy.is_some() && report.faults[0].lost.is_empty());
    }
}

#[test]
fn neighbours_may_be_damaged_and_are_written_anew() {
    let storage = sample();
    let all = dumped(&storage);
    let clusters = clusters(&storage);
    for first in [2, 40, clusters.len() - 30] {
        let bad = copy(&storage);
        for cluster in &clusters[first..first + 16] {
            bad.write_at(&vec![0; 4096], cluster * CLUSTER)
                .expect("writes");
        }
        bad.flush().expect("flushes");
        assert!(dumped(&bad) == all, "from {first}: it is not what it was");
        repair(&(Arc::clone(&bad) as Arc<dyn Storage>)).expect("mends");
        assert_eq!(check(&*bad).expect("reads").faults, []);
        assert!(dumped(&bad) == all, "from {first}: repaired");
        goes_on(&bad, "an image written anew");
    }
}
