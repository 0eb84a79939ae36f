//! Goal: long random sequences of every disk operation, with reopening and power cuts in between,
//! agree with flat arrays of bytes.
//!
//! Method: a pool on `SimStorage` and, beside it, a model: for each disk the bytes it holds now,
//! and for each sector the versions it may have after a crash (every value written since the last
//! flush, and the one before). A power cut picks any image the storage contract allows; the pool
//! must open, and each sector must hold one of its versions. Seeds are printed; set `TIDEPOOL_SEED`
//! to replay one and `TIDEPOOL_SECONDS` to run longer.

#![expect(clippy::print_stdout, reason = "every seed is printed")]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tidepool::cowdisk::{self, Disk, DiskError, DiskErrorKind, NewDisk, Settings};
use tidepool::format::units::ClusterSize;
use tidepool::pool::{CreateOptions, OpenOptions, Pool, open};
use tidepool::storage::{SimStorage, Storage};
use tidepool::sys::clock;

const SECTOR: usize = 512;
const POOL_LEN: u64 = 24 << 20;
const DISK_LEN_MAX: usize = 1 << 20;
const DISKS_MAX: usize = 12;

/// A small generator of its own: sequences stay the same whatever happens to dependencies.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() % n as u64).expect("below a usize")
    }
}

/// A sector's value: 0 is zeros, others fill the sector with their bytes.
type Value = u64;

fn fill(value: Value) -> [u8; SECTOR] {
    let mut sector = [0; SECTOR];
    for part in sector.chunks_exact_mut(8) {
        part.copy_from_slice(&value.to_le_bytes());
    }
    sector
}

/// A disk or snapshot as it should be.
#[derive(Debug, Clone)]
struct Flat {
    now: Vec<Value>,
    /// Values each sector had since the last flush, oldest first; the current one is in `now`.
    past: BTreeMap<usize, Vec<Value>>,
    is_snapshot: bool,
    /// The disk it was forked from, while neither that nor this was replaced by a rollback.
    parent: Option<String>,
    parent_is_unchanged: bool,
}

impl Flat {
    fn set(&mut self, sector: usize, value: Value) {
        let old = self.now[sector];
        self.past.entry(sector).or_default().push(old);
        self.now[sector] = value;
    }

    fn may_be(&self, sector: usize, value: Value) -> bool {
        self.now[sector] == value
            || self
                .past
                .get(&sector)
                .is_some_and(|past| past.contains(&value))
    }
}

struct World {
    random: Random,
    storage: Arc<SimStorage>,
    pool: Arc<Pool>,
    disks: BTreeMap<String, Flat>,
    next_value: Value,
    next_name: u32,
    log: Vec<String>,
}

fn open_pool(storage: &Arc<SimStorage>) -> Arc<Pool> {
    let storage: Arc<dyn Storage> = Arc::clone(storage) as Arc<dyn Storage>;
    Pool::open(storage, &OpenOptions::default()).expect("a pool that a crash left opens")
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = Random(seed);
        let storage = Arc::new(SimStorage::new(POOL_LEN));
        let log2 = [14, 16, 18][random.below(3)];
        let cluster_size = ClusterSize::from_log2(log2).expect("in range");
        let options = CreateOptions {
            cluster_size,
            uuid: [9; 16],
            ..CreateOptions::new(POOL_LEN)
        };
        open::create(&*storage, &options).expect("an empty pool");
        storage.set_hole_writes_max([0, 1, usize::MAX][random.below(3)]);
        let pool = open_pool(&storage);
        Self {
            random,
            storage,
            pool,
            disks: BTreeMap::new(),
            next_value: 1,
            next_name: 1,
            log: vec![format!("cluster 2^{log2}")],
        }
    }

    fn pick(&mut self, wants_snapshot: Option<bool>) -> Option<String> {
        let fits = |flat: &&Flat| wants_snapshot.is_none_or(|w| flat.is_snapshot == w);
        let names: Vec<&String> = self
            .disks
            .iter()
            .filter(|(_, flat)| fits(flat))
            .map(|(name, _)| name)
            .collect();
        match names.len() {
            0 => None,
            n => Some(names[self.random.below(n)].clone()),
        }
    }

    fn name(&mut self) -> String {
        self.next_name += 1;
        format!("d{}", self.next_name)
    }

    fn disk(&self, name: &str) -> Disk {
        Disk::open(&self.pool, name).expect("a disk of the model is there")
    }

    fn changed(&mut self, name: &str) {
        for flat in self.disks.values_mut() {
            if flat.parent.as_deref() == Some(name) {
                flat.parent_is_unchanged = false;
            }
        }
    }

    fn range(&mut self, sectors: usize) -> (usize, usize) {
        let most = [1, 8, 9, 128, 300, sectors][self.random.below(6)].min(sectors);
        let mut len = 1 + self.random.below(most);
        let mut at = self.random.below(sectors - len + 1);
        if self.random.below(2) == 0 {
            at &= !7;
            len = (len + 7) & !7;
        }
        (at, len.min(sectors - at))
    }

    fn step(&mut self) {
        match self.random.below(100) {
            0..=39 => self.write(),
            40..=47 => self.discard(),
            48..=52 => self.zero(),
            53..=62 => self.read(),
            63..=70 => self.flush(),
            71..=73 => self.create(),
            74..=79 => self.fork(),
            80..=83 => self.snapshot(),
            84..=85 => self.rollback(),
            86..=87 => self.commit(),
            88..=91 => self.remove(),
            92..=93 => self.resize(),
            94 => self.rename(),
            95 => self.trim(),
            96 => self.reopen(),
            97 => self.set(),
            _ => self.crash(),
        }
    }

    fn write(&mut self) {
        let Some(name) = self.pick(Some(false)) else {
            return;
        };
        let sectors = self.disks[&name].now.len();
        let (at, len) = self.range(sectors);
        let mut bytes = Vec::new();
        let mut values = Vec::new();
        for _ in 0..len {
            self.next_value += 1;
            values.push(self.next_value);
            bytes.extend_from_slice(&fill(self.next_value));
        }
        self.log.push(format!("write {name} {at}+{len}"));
        let before = self.counted(&name);
        let result = self.disk(&name).write_at(&bytes, (at * SECTOR) as u64);
        let limit = self.pool.find(&name).expect("picked").row.limit;
        let most = limit.map_or(u64::MAX, |limit| {
            limit
                .div_ceil(self.pool.cluster_size().sub_bytes())
                .max(before)
        });
        assert!(self.counted(&name) <= most, "{}", self.log.join("\n"));
        let flat = self.disks.get_mut(&name).expect("picked");
        match result {
            Ok(()) => {
                for (n, value) in values.into_iter().enumerate() {
                    flat.set(at + n, value);
                }
            }
            Err(e) => {
                assert!(is_no_space(&e), "{e}");
                self.reread(&name, at, &values);
            }
        }
        self.changed(&name);
    }

    /// A write that ran out of space may have been done in part.
    fn reread(&mut self, name: &str, at: usize, values: &[Value]) {
        let disk = self.disk(name);
        let flat = self.disks.get_mut(name).expect("picked");
        for (n, value) in values.iter().enumerate() {
            let mut sector = [0; SECTOR];
            disk.read_at(&mut sector, ((at + n) * SECTOR) as u64)
                .expect("reads");
            if sector == fill(*value) {
                flat.set(at + n, *value);
            }
        }
    }

    fn discard(&mut self) {
        let Some(name) = self.pick(Some(false)) else {
            return;
        };
        let sectors = self.disks[&name].now.len();
        let (at, len) = self.range(sectors);
        self.log.push(format!("discard {name} {at}+{len}"));
        let disk = self.disk(&name);
        disk.discard((at * SECTOR) as u64, (len * SECTOR) as u64)
            .expect("discards");
        let block = disk.block_size() as usize / SECTOR;
        let end = if at + len == sectors {
            at + len
        } else {
            (at + len) / block * block
        };
        let flat = self.disks.get_mut(&name).expect("picked");
        for sector in at.next_multiple_of(block)..end {
            flat.set(sector, 0);
        }
        self.changed(&name);
    }

    fn zero(&mut self) {
        let Some(name) = self.pick(Some(false)) else {
            return;
        };
        let sectors = self.disks[&name].now.len();
        let (at, len) = self.range(sectors);
        let may_unmap = self.random.below(2) == 0;
        self.log.push(format!("zero {name} {at}+{len} {may_unmap}"));
        let disk = self.disk(&name);
        let result = disk.write_zeroes((at * SECTOR) as u64, (len * SECTOR) as u64, may_unmap);
        match result {
            Ok(()) => {
                let flat = self.disks.get_mut(&name).expect("picked");
                for sector in at..at + len {
                    flat.set(sector, 0);
                }
            }
            Err(e) => {
                assert!(is_no_space(&e), "{e}");
                self.reread(&name, at, &vec![0; len]);
            }
        }
        self.changed(&name);
    }

    fn read(&mut self) {
        let Some(name) = self.pick(None) else { return };
        let sectors = self.disks[&name].now.len();
        let (at, len) = self.range(sectors);
        let mut bytes = vec![0xaa; len * SECTOR];
        self.disk(&name)
            .read_at(&mut bytes, (at * SECTOR) as u64)
            .expect("reads");
        for (n, sector) in bytes.chunks_exact(SECTOR).enumerate() {
            let expected = self.disks[&name].now[at + n];
            assert!(
                sector == fill(expected),
                "{name} sector {}: {}",
                at + n,
                self.explain(sector)
            );
        }
    }

    fn explain(&self, sector: &[u8]) -> String {
        let value = u64::from_le_bytes(sector[..8].try_into().expect("8 bytes"));
        format!("it holds {value}\nhistory:\n{}", self.log.join("\n"))
    }

    fn flush(&mut self) {
        let Some(name) = self.pick(None) else { return };
        self.log.push("flush".to_owned());
        self.disk(&name).flush().expect("flushes");
        self.all_durable();
    }

    /// One commit covers all disks of the pool.
    fn all_durable(&mut self) {
        for flat in self.disks.values_mut() {
            flat.past.clear();
        }
    }

    fn create(&mut self) {
        if self.disks.len() >= DISKS_MAX {
            return;
        }
        let name = self.name();
        let sectors = 1 + self.random.below(DISK_LEN_MAX / SECTOR);
        self.log.push(format!("create {name} {sectors}"));
        let new = NewDisk::empty(&name, (sectors * SECTOR) as u64);
        cowdisk::create(&self.pool, &new).expect("creates");
        let flat = Flat {
            now: vec![0; sectors],
            past: BTreeMap::new(),
            is_snapshot: false,
            parent: None,
            parent_is_unchanged: false,
        };
        self.disks.insert(name, flat);
        self.all_durable();
    }

    fn fork(&mut self) {
        if self.disks.len() + 3 > DISKS_MAX {
            return;
        }
        let Some(source) = self.pick(None) else {
            return;
        };
        let count = 1 + self.random.below(3);
        let names: Vec<String> = (0..count).map(|_| self.name()).collect();
        self.log.push(format!("fork {source} {names:?}"));
        if !self.is_done(&cowdisk::fork(&self.pool, &source, &names)) {
            return;
        }
        let is_disk = !self.disks[&source].is_snapshot;
        for name in names {
            let mut flat = self.disks[&source].clone();
            flat.is_snapshot = false;
            flat.parent = is_disk.then(|| source.clone());
            flat.parent_is_unchanged = true;
            self.disks.insert(name, flat);
        }
        self.all_durable();
    }

    fn snapshot(&mut self) {
        if self.disks.len() >= DISKS_MAX {
            return;
        }
        let Some(source) = self.pick(Some(false)) else {
            return;
        };
        self.next_name += 1;
        let snapshot = format!("s{}", self.next_name);
        self.log.push(format!("snapshot {source}@{snapshot}"));
        if !self.is_done(&cowdisk::snapshot(&self.pool, &source, &snapshot)) {
            return;
        }
        let mut flat = self.disks[&source].clone();
        flat.is_snapshot = true;
        flat.parent = None;
        self.disks.insert(format!("{source}@{snapshot}"), flat);
        self.all_durable();
    }

    fn rollback(&mut self) {
        let Some(snapshot) = self.pick(Some(true)) else {
            return;
        };
        self.log.push(format!("rollback {snapshot}"));
        if !self.is_done(&cowdisk::rollback(&self.pool, &snapshot)) {
            return;
        }
        let disk = snapshot.split('@').next().expect("a disk").to_owned();
        let now = self.disks[&snapshot].now.clone();
        self.disks.get_mut(&disk).expect("snapshots have disks").now = now;
        self.changed(&disk);
        self.all_durable();
    }

    fn commit(&mut self) {
        let Some(child) = self.pick(Some(false)) else {
            return;
        };
        let flat = self.disks[&child].clone();
        let Some(parent) = flat
            .parent
            .clone()
            .filter(|parent| self.disks.contains_key(parent))
        else {
            return;
        };
        if !flat.parent_is_unchanged {
            return;
        }
        self.log.push(format!("commit {child} -> {parent}"));
        if !self.is_done(&cowdisk::commit(&self.pool, &child)) {
            return;
        }
        self.changed(&parent);
        let target = self.disks.get_mut(&parent).expect("filtered");
        let len = target.now.len().max(flat.now.len());
        target.now = flat.now;
        target.now.resize(len, 0);
        self.disks
            .get_mut(&child)
            .expect("picked")
            .parent_is_unchanged = true;
        self.all_durable();
    }

    fn remove(&mut self) {
        let Some(name) = self.pick(None) else { return };
        self.log.push(format!("remove {name}"));
        let prefix = format!("{name}@");
        let has_snapshots = self.disks.keys().any(|other| other.starts_with(&prefix));
        if has_snapshots {
            cowdisk::remove(&self.pool, &name, false).expect_err("it has snapshots");
        }
        cowdisk::remove(&self.pool, &name, true).expect("removes");
        self.disks
            .retain(|other, _| *other != name && !other.starts_with(&prefix));
        self.all_durable();
    }

    fn resize(&mut self) {
        let Some(name) = self.pick(Some(false)) else {
            return;
        };
        let sectors = 1 + self.random.below(DISK_LEN_MAX / SECTOR);
        self.log.push(format!("resize {name} {sectors}"));
        let result = cowdisk::resize(&self.pool, &name, (sectors * SECTOR) as u64, true);
        if let Err(e) = result {
            assert!(e.to_string().contains("cuts a block in two"), "{e}");
            return;
        }
        self.disks
            .get_mut(&name)
            .expect("picked")
            .now
            .resize(sectors, 0);
        self.changed(&name);
        self.all_durable();
    }

    fn rename(&mut self) {
        let Some(name) = self.pick(Some(false)) else {
            return;
        };
        let new_name = self.name();
        self.log.push(format!("rename {name} {new_name}"));
        cowdisk::rename(&self.pool, &name, &new_name).expect("renames");
        let prefix = format!("{name}@");
        let old = std::mem::take(&mut self.disks);
        for (key, mut flat) in old {
            if flat.parent.as_deref() == Some(&name) {
                flat.parent = Some(new_name.clone());
            }
            let key = match key.strip_prefix(&prefix) {
                Some(snapshot) => format!("{new_name}@{snapshot}"),
                None if key == name => new_name.clone(),
                None => key,
            };
            self.disks.insert(key, flat);
        }
        self.all_durable();
    }

    /// Sets a limit, a reserve, both or neither.
    fn set(&mut self) {
        let Some(name) = self.pick(Some(false)) else {
            return;
        };
        let quota = |random: &mut Random| match random.below(3) {
            0 => None,
            _ => Some((random.below(DISK_LEN_MAX / SECTOR) * SECTOR) as u64),
        };
        let settings = Settings {
            limit: Some(quota(&mut self.random)),
            reserve: Some(quota(&mut self.random)),
            is_ephemeral: None,
        };
        self.log.push(format!("set {name} {settings:?}"));
        let result = cowdisk::set(&self.pool, &name, &settings);
        if self.is_done(&result) {
            self.all_durable();
        }
    }

    /// Sub-clusters that count for the limit of a disk.
    fn counted(&self, name: &str) -> u64 {
        let item = self.pool.find(name).expect("a disk of the model is there");
        item.volume.map.read().account.held().subs
    }

    /// What had to be reserved for it had no space, if it is not.
    fn is_done(&self, result: &Result<(), DiskError>) -> bool {
        if let Err(e) = result {
            let history = self.log.join("\n");
            assert!(
                e.to_string().contains("cannot be reserved"),
                "{e}\n{history}"
            );
        }
        result.is_ok()
    }

    fn trim(&mut self) {
        self.log.push("trim".to_owned());
        self.pool.trim().expect("trims");
        self.all_durable();
    }

    fn reopen(&mut self) {
        self.log.push("reopen".to_owned());
        self.pool.close().expect("closes");
        self.pool = open_pool(&self.storage);
        self.all_durable();
        self.verify_all();
    }

    fn crash(&mut self) {
        let seed = self.random.next();
        self.log.push(format!("crash {seed}"));
        let image = match self.random.below(4) {
            0 => self.storage.crash_all_lost(),
            1 => self.storage.crash_all_kept(),
            _ => self.storage.crash(seed),
        };
        self.storage = Arc::new(image);
        self.pool = open_pool(&self.storage);
        let names: Vec<String> = self.disks.keys().cloned().collect();
        for name in names {
            self.settle(&name);
        }
    }

    /// After a crash a sector holds any of its versions; from here on it is that one.
    fn settle(&mut self, name: &str) {
        let disk = self.disk(name);
        let sectors = self.disks[name].now.len();
        assert_eq!(
            disk.size(),
            (sectors * SECTOR) as u64,
            "{}",
            self.log.join("\n")
        );
        let mut bytes = vec![0; sectors * SECTOR];
        disk.read_at(&mut bytes, 0).expect("reads");
        for (n, sector) in bytes.chunks_exact(SECTOR).enumerate() {
            let value = u64::from_le_bytes(sector[..8].try_into().expect("8 bytes"));
            let is_whole = sector == fill(value);
            let may_be = is_whole && self.disks[name].may_be(n, value);
            assert!(
                may_be,
                "{name} sector {n} after a crash: {}",
                self.explain(sector)
            );
            let flat = self.disks.get_mut(name).expect("named");
            flat.now[n] = value;
        }
        self.disks.get_mut(name).expect("named").past.clear();
    }

    fn verify_all(&mut self) {
        let names: Vec<String> = self.disks.keys().cloned().collect();
        for name in names {
            let mut bytes = vec![0; self.disks[&name].now.len() * SECTOR];
            self.disk(&name).read_at(&mut bytes, 0).expect("reads");
            for (n, sector) in bytes.chunks_exact(SECTOR).enumerate() {
                let is_right = sector == fill(self.disks[&name].now[n]);
                assert!(is_right, "{name} sector {n}: {}", self.explain(sector));
            }
        }
    }

    /// With every disk gone, all space is back.
    fn finish(mut self) {
        self.verify_all();
        let names: Vec<String> = self
            .disks
            .keys()
            .filter(|name| !name.contains('@'))
            .cloned()
            .collect();
        for name in names {
            cowdisk::remove(&self.pool, &name, true).expect("removes");
        }
        self.pool.close().expect("closes");
        let after = open_pool(&self.storage);
        let usage = after.space.usage();
        let fresh = {
            let storage = Arc::new(SimStorage::new(POOL_LEN));
            let options = CreateOptions {
                cluster_size: after.cluster_size(),
                ..CreateOptions::new(POOL_LEN)
            };
            open::create(&*storage, &options).expect("an empty pool");
            open_pool(&storage).space.usage()
        };
        let image = after
            .superblock()
            .image
            .map_or(0, |image| image.len >> after.cluster_size().log2());
        let lost = u64::from(fresh.clean) - u64::from(usage.clean + usage.written);
        assert!(
            lost <= image + 2,
            "{lost} clusters are lost, the image has {image}"
        );
    }
}

fn is_no_space(e: &DiskError) -> bool {
    matches!(
        e.kind(),
        DiskErrorKind::NoSpace | DiskErrorKind::LimitReached
    )
}

fn run(seed: u64, steps: u32) {
    println!("TIDEPOOL_SEED={seed}");
    let mut world = World::new(seed);
    world.create();
    for _ in 0..steps {
        world.step();
        let accounts = world.pool.check_accounts();
        accounts.unwrap_or_else(|e| panic!("{e}\n{}", world.log.join("\n")));
    }
    world.finish();
}

#[test]
fn random_histories_agree_with_flat_arrays() {
    if let Ok(seed) = std::env::var("TIDEPOOL_SEED") {
        run(seed.parse().expect("a number"), 400);
        return;
    }
    let seconds = std::env::var("TIDEPOOL_SECONDS").map_or(20, |s| s.parse().expect("a number"));
    let end = clock::now() + Duration::from_secs(seconds);
    let first = std::time::UNIX_EPOCH
        .elapsed()
        .expect("after 1970")
        .as_secs()
        << 20;
    let mut histories = 0;
    while clock::now() < end {
        run(first + histories, 400);
        histories += 1;
    }
    assert!(histories > 0, "at least one history ran");
    println!("{histories} histories of 400 steps");
}
