//! Goal: whatever the moment of a power cut, and whatever of the unflushed writes survived it, the
//! pool opens, holds everything that was flushed, shows nobody anything foreign, and works on.
//!
//! Method: histories, scripted and random, run against a simulated disk once for every changing
//! operation they cause, with the power cut in the middle of it. Each cut gives several images
//! (everything unflushed lost, everything kept, random mixtures). Each image is checked, opened and
//! compared with a model that knows every version a sector may have; opening it is itself cut
//! short at every operation, and the images of that are checked again. Every sector ever written
//! holds a number of its own, so that foreign, stale and torn data show. `TIDEPOOL_SEED` chooses
//! the random histories, `TIDEPOOL_SECONDS` runs more of them.

mod common;

use common::{CLUSTER, POOL_LEN, Random, SUB};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tidepool::cowdisk::{self, Disk, DiskError, NewDisk};
use tidepool::pool::{Pool, check};
use tidepool::storage::SimStorage;
use tidepool::sys::clock;

const SECTOR: u64 = 512;
/// Clusters in the disks here.
const CLUSTERS: u64 = 6;
/// Whole leaves that one bulk step unmaps: a batch of 256 KiB.
const BULK: u64 = 8000;

/// What a history does.
#[derive(Debug, Clone)]
enum Act {
    Create(String),
    /// Sectors.
    Write(String, u64, u64),
    Discard(String, u64, u64),
    Zero(String, u64, u64),
    Flush,
    Fork(String, String),
    Snapshot(String, String),
    Rollback(String),
    Commit(String),
    Remove(String),
    Resize(String, u64),
    Rename(String, String),
    Trim,
    /// Fills a quarter of a journal half, so that images are written and halves change.
    Bulk,
    Close,
}

/// A sector's value; 0 is zeros.
type Value = u64;

#[derive(Debug, Clone)]
struct Flat {
    now: Vec<Value>,
    past: BTreeMap<usize, Vec<Value>>,
    parent: Option<String>,
}

#[derive(Debug, Clone, Default)]
struct Model {
    disks: BTreeMap<String, Flat>,
    next: Value,
}

fn at(sector: u64) -> usize {
    usize::try_from(sector).expect("disks are small")
}

impl Model {
    fn set(&mut self, name: &str, from: u64, values: &[Value]) {
        let flat = self.disks.get_mut(name).expect("it is there");
        for (n, value) in values.iter().enumerate() {
            let sector = at(from) + n;
            let old = std::mem::replace(&mut flat.now[sector], *value);
            flat.past.entry(sector).or_default().push(old);
        }
    }

    fn all_durable(&mut self) {
        for flat in self.disks.values_mut() {
            flat.past.clear();
        }
    }

    fn copy(&mut self, from: &str, to: &str, parent: Option<&str>) {
        let flat = Flat {
            parent: parent.map(str::to_owned),
            ..self.disks[from].clone()
        };
        self.disks.insert(to.to_owned(), flat);
    }

    /// Values for the sectors of a write.
    fn values(&self, len: u64) -> Vec<Value> {
        (1..=len).map(|n| self.next + n).collect()
    }

    /// The state after `act`.
    fn apply(&mut self, act: &Act) {
        let block = SUB / SECTOR;
        match act {
            Act::Create(name) => {
                let now = vec![0; at(CLUSTERS * CLUSTER / SECTOR)];
                let flat = Flat {
                    now,
                    past: BTreeMap::new(),
                    parent: None,
                };
                self.disks.insert(name.clone(), flat);
            }
            Act::Write(name, from, len) => {
                let values = self.values(*len);
                self.next += len;
                self.set(name, *from, &values);
                return;
            }
            Act::Discard(name, from, len) => {
                let first = from.next_multiple_of(block);
                let end = (from + len) / block * block;
                self.set(name, first, &vec![0; at(end.saturating_sub(first))]);
                return;
            }
            Act::Zero(name, from, len) => {
                self.set(name, *from, &vec![0; at(*len)]);
                return;
            }
            Act::Fork(from, to) => self.copy(from, to, Some(from)),
            Act::Snapshot(from, name) => self.copy(from, &format!("{from}@{name}"), None),
            Act::Rollback(snapshot) => {
                let disk = snapshot.split('@').next().expect("a disk").to_owned();
                let parent = self.disks[&disk].parent.clone();
                self.copy(snapshot, &disk, parent.as_deref());
            }
            Act::Commit(child) => {
                let parent = self.disks[child].parent.clone().expect("it has one");
                let grandparent = self.disks[&parent].parent.clone();
                self.copy(child, &parent, grandparent.as_deref());
            }
            Act::Remove(name) => {
                let prefix = format!("{name}@");
                self.disks
                    .retain(|other, _| other != name && !other.starts_with(&prefix));
            }
            Act::Resize(name, len) => {
                self.disks
                    .get_mut(name)
                    .expect("there")
                    .now
                    .resize(at(*len), 0);
            }
            Act::Rename(name, new) => {
                let old = std::mem::take(&mut self.disks);
                let renamed = |key: String| match key.strip_prefix(name.as_str()) {
                    Some(rest) if rest.is_empty() || rest.starts_with('@') => {
                        format!("{new}{rest}")
                    }
                    Some(_) | None => key,
                };
                self.disks = old
                    .into_iter()
                    .map(|(key, flat)| (renamed(key), flat))
                    .collect();
                for flat in self.disks.values_mut() {
                    flat.parent = flat.parent.take().map(renamed);
                }
            }
            Act::Flush | Act::Trim | Act::Bulk | Act::Close => {}
        }
        self.all_durable();
    }
}

fn fill(value: Value) -> [u8; 512] {
    let mut sector = [0; 512];
    for part in sector.chunks_exact_mut(8) {
        part.copy_from_slice(&value.to_le_bytes());
    }
    sector
}

/// Does `act` to the pool.
fn perform(pool: &Arc<Pool>, act: &Act, model: &Model) -> Result<(), DiskError> {
    let open = |name: &str| Disk::open(pool, name);
    match act {
        Act::Create(name) => cowdisk::create(pool, &NewDisk::empty(name, CLUSTERS * CLUSTER)),
        Act::Write(name, from, len) => {
            let bytes: Vec<u8> = model.values(*len).into_iter().flat_map(fill).collect();
            open(name)?.write_at(&bytes, from * SECTOR)
        }
        Act::Discard(name, from, len) => open(name)?.discard(from * SECTOR, len * SECTOR),
        Act::Zero(name, from, len) => open(name)?.write_zeroes(from * SECTOR, len * SECTOR, true),
        Act::Flush => Ok(pool.flush()?),
        Act::Fork(from, to) => cowdisk::fork(pool, from, std::slice::from_ref(to)),
        Act::Snapshot(from, name) => cowdisk::snapshot(pool, from, name),
        Act::Rollback(snapshot) => cowdisk::rollback(pool, snapshot),
        Act::Commit(child) => cowdisk::commit(pool, child),
        Act::Remove(name) => cowdisk::remove(pool, name, true),
        Act::Resize(name, len) => cowdisk::resize(pool, name, len * SECTOR, true),
        Act::Rename(name, new) => cowdisk::rename(pool, name, new),
        Act::Trim => Ok(pool.trim().map(|_| ())?),
        Act::Bulk => {
            let bulk = open("bulk")?;
            for n in 0..BULK {
                bulk.discard(2 * n * 64 * CLUSTER, 64 * CLUSTER)?;
            }
            bulk.flush()
        }
        Act::Close => Ok(pool.close()?),
    }
}

/// A store with a pool that histories begin from.
fn beginning() -> Arc<SimStorage> {
    let storage = common::empty(POOL_LEN);
    let pool = common::opened(&storage);
    common::disk(&pool, "bulk", 2 * BULK * 64 * CLUSTER);
    pool.close().expect("closes");
    Arc::new(storage.crash_all_kept())
}

/// Where a run ended: what was there before the act that was cut, and after it.
struct Cut {
    storage: Arc<SimStorage>,
    candidates: Vec<Model>,
}

/// Runs `acts`, with the power cut at change `cut`. `None` if they end before.
fn run(start: &SimStorage, acts: &[Act], cut: Option<u64>) -> (Option<Cut>, u64) {
    let storage = Arc::new(start.crash_all_kept());
    let pool = common::opened(&storage);
    let before = storage.counters().changes();
    if let Some(cut) = cut {
        storage.cut_power_at(cut);
    }
    let mut model = Model::default();
    for act in acts {
        let done = perform(&pool, act, &model);
        let mut after = model.clone();
        after.apply(act);
        if !storage.is_off() {
            done.unwrap_or_else(|e| panic!("{act:?}: {e}"));
            model = after;
            continue;
        }
        let candidates = match (done, act) {
            // What failed later (an image) takes nothing back.
            (Ok(()), _) => vec![after],
            // A write cut short: every version is in `after`.
            (Err(_), Act::Write(..) | Act::Discard(..) | Act::Zero(..)) => vec![after],
            (Err(_), _) => vec![model, after],
        };
        return (
            Some(Cut {
                storage,
                candidates,
            }),
            0,
        );
    }
    (None, storage.counters().changes() - before)
}

/// The candidate that `pool` agrees with, or what is wrong with all of them.
fn agrees(pool: &Arc<Pool>, candidates: &[Model]) -> Result<Model, String> {
    let names: Vec<String> = pool.items().into_iter().map(|i| i.row.name).collect();
    let mut faults = Vec::new();
    for candidate in candidates {
        let expected: Vec<&String> = candidate.disks.keys().collect();
        let found: Vec<&String> = names.iter().filter(|n| *n != "bulk").collect();
        if expected != found {
            faults.push(format!("disks {found:?}, not {expected:?}"));
            continue;
        }
        match settled(pool, candidate) {
            Ok(settled) => return Ok(settled),
            Err(fault) => faults.push(fault),
        }
    }
    Err(faults.join("; "))
}

/// `model` with the values that the pool holds now, if each may be.
fn settled(pool: &Arc<Pool>, model: &Model) -> Result<Model, String> {
    let mut settled = model.clone();
    for (name, flat) in &mut settled.disks {
        let disk = Disk::open(pool, name).map_err(|e| e.to_string())?;
        let len = flat.now.len() as u64 * SECTOR;
        if disk.size() != len {
            return Err(format!("{name} has {} bytes, not {len}", disk.size()));
        }
        let all = common::read(&disk, 0, len);
        for (n, sector) in all.chunks_exact(512).enumerate() {
            let value = u64::from_le_bytes(*sector.first_chunk().expect("8 bytes"));
            let may_be =
                flat.now[n] == value || flat.past.get(&n).is_some_and(|past| past.contains(&value));
            if sector != fill(value) || !may_be {
                return Err(format!(
                    "{name} sector {n} holds {value}, not {}",
                    flat.now[n]
                ));
            }
            flat.now[n] = value;
        }
        flat.past.clear();
    }
    Ok(settled)
}

/// Checks one image; `works_on` makes further changes to it and crashes again.
fn check_image(
    image: &Arc<SimStorage>,
    candidates: &[Model],
    works_on: bool,
) -> Result<(), String> {
    if !works_on {
        return check_opened(image, candidates, works_on);
    }
    let report = check::check(&**image).map_err(|e| e.to_string())?;
    let bad = report
        .faults
        .iter()
        .find(|fault| !fault.what.contains("superblock"));
    if let Some(fault) = bad.filter(|fault| !fault.what.contains("copy at byte")) {
        return Err(format!("check: {}", fault.what));
    }
    check_opened(image, candidates, works_on)
}

fn check_opened(
    image: &Arc<SimStorage>,
    candidates: &[Model],
    works_on: bool,
) -> Result<(), String> {
    let pool = common::try_open(image).map_err(|e| format!("it does not open: {e}"))?;
    let mut model = agrees(&pool, candidates)?;
    if !works_on {
        return Ok(());
    }
    model.next += 1_000_000;
    let mut acts = vec![
        Act::Create("new".to_owned()),
        Act::Write("new".to_owned(), 3, 100),
    ];
    if let Some(name) = model.disks.keys().find(|name| !name.contains('@')).cloned() {
        let len = model.disks[&name].now.len() as u64;
        acts.push(Act::Write(name.clone(), 1, len / 2));
        acts.push(Act::Fork(name.clone(), "newer".to_owned()));
        acts.push(Act::Remove(name));
        acts.push(Act::Write("newer".to_owned(), 0, len / 3));
    }
    acts.push(Act::Flush);
    for act in &acts {
        perform(&pool, act, &model).map_err(|e| format!("afterwards, {act:?}: {e}"))?;
        model.apply(act);
    }
    drop(pool);
    let again = Arc::new(image.crash_all_lost());
    let pool = common::try_open(&again).map_err(|e| format!("the second time: {e}"))?;
    agrees(&pool, &[model]).map_err(|e| format!("after going on: {e}"))?;
    Ok(())
}

/// All images of all cuts of one history.
fn sweep(name: &str, start: &SimStorage, acts: &[Act], seeds: u64) -> u64 {
    let (none, changes) = run(start, acts, None);
    assert!(
        none.is_none() && changes > 0,
        "{name} runs to its end without a cut"
    );
    let mut images = 0;
    for cut in 0..changes {
        let (Some(run), _) = run(start, acts, Some(cut)) else {
            panic!("{name}: the cut at {cut} of {changes} did not happen");
        };
        let mut check = |image: Arc<SimStorage>, what: &str, works_on: bool| {
            images += 1;
            if let Err(fault) = check_image(&image, &run.candidates, works_on) {
                panic!("{name}, cut at {cut} of {changes}, {what}: {fault}\n{acts:?}");
            }
        };
        check(Arc::new(run.storage.crash_all_lost()), "all lost", true);
        check(Arc::new(run.storage.crash_all_kept()), "all kept", true);
        for seed in 0..seeds {
            check(
                Arc::new(run.storage.crash(seed)),
                &format!("seed {seed}"),
                false,
            );
        }
        // The opening, cut short as well: the note, and the two copies of the superblock.
        for second in 0..3 {
            let image = Arc::new(run.storage.crash(cut));
            image.cut_power_at(second);
            assert!(
                common::try_open(&image).is_err(),
                "the opening was cut short"
            );
            for seed in 0..2 {
                let what = format!("opening cut at {second}, seed {seed}");
                check(Arc::new(image.crash(seed)), &what, false);
            }
        }
    }
    images
}

fn s(name: &str) -> String {
    name.to_owned()
}

/// First writes, overwrites, pieces of blocks, discards.
fn writes() -> Vec<Act> {
    vec![
        Act::Create(s("a")),
        Act::Write(s("a"), 0, 40),
        Act::Write(s("a"), 33, 3),
        Act::Flush,
        Act::Write(s("a"), 5, 60),
        Act::Discard(s("a"), 0, 64),
        Act::Write(s("a"), 10, 4),
        Act::Flush,
        Act::Zero(s("a"), 3, 70),
        Act::Write(s("a"), 64, 64),
        Act::Flush,
        Act::Resize(s("a"), 66),
        Act::Resize(s("a"), 130),
        Act::Close,
    ]
}

/// Deltas over deltas, and clusters that go from one disk to another.
fn forks() -> Vec<Act> {
    vec![
        Act::Create(s("a")),
        Act::Write(s("a"), 0, 96),
        Act::Fork(s("a"), s("b")),
        Act::Write(s("b"), 4, 8),
        Act::Write(s("a"), 6, 2),
        Act::Fork(s("b"), s("c")),
        Act::Write(s("c"), 8, 9),
        Act::Flush,
        Act::Remove(s("a")),
        Act::Create(s("d")),
        Act::Write(s("d"), 1, 120),
        Act::Write(s("b"), 0, 32),
        Act::Remove(s("c")),
        Act::Write(s("d"), 120, 60),
        Act::Flush,
        Act::Discard(s("b"), 0, 192),
        Act::Flush,
        Act::Write(s("d"), 0, 190),
        Act::Trim,
        Act::Write(s("b"), 0, 30),
        Act::Close,
    ]
}

fn snapshots() -> Vec<Act> {
    vec![
        Act::Create(s("a")),
        Act::Write(s("a"), 0, 64),
        Act::Snapshot(s("a"), s("one")),
        Act::Write(s("a"), 2, 66),
        Act::Snapshot(s("a"), s("two")),
        Act::Discard(s("a"), 0, 32),
        Act::Rollback(s("a@one")),
        Act::Write(s("a"), 0, 5),
        Act::Fork(s("a"), s("b")),
        Act::Write(s("b"), 3, 50),
        Act::Commit(s("b")),
        Act::Write(s("a"), 1, 7),
        Act::Remove(s("a@one")),
        Act::Rename(s("a"), s("z")),
        Act::Write(s("z"), 0, 20),
        Act::Rollback(s("z@two")),
        Act::Remove(s("z")),
        Act::Write(s("b"), 0, 99),
        Act::Flush,
    ]
}

/// The journal goes round several times, with images written beside everything else.
fn images() -> Vec<Act> {
    let mut acts = vec![Act::Create(s("a")), Act::Write(s("a"), 0, 70)];
    for round in 0..12 {
        acts.push(Act::Bulk);
        acts.push(Act::Write(s("a"), round * 3, 9));
        match round % 4 {
            0 => acts.push(Act::Fork(s("a"), format!("f{round}"))),
            1 => acts.push(Act::Write(format!("f{}", round - 1), 5, 60)),
            2 => acts.push(Act::Discard(s("a"), 0, 64)),
            _ => acts.push(Act::Remove(format!("f{}", round - 3))),
        }
        acts.push(Act::Flush);
    }
    acts
}

/// A history that makes sense, drawn at random.
fn random(seed: u64) -> Vec<Act> {
    let mut random = Random(seed);
    let mut model = Model::default();
    let mut acts = Vec::new();
    let mut push = |model: &mut Model, act: Act| {
        model.apply(&act);
        acts.push(act);
    };
    push(&mut model, Act::Create(s("d0")));
    for n in 1..28_u64 {
        let disks: Vec<String> = model
            .disks
            .keys()
            .filter(|k| !k.contains('@'))
            .cloned()
            .collect();
        let snapshots: Vec<String> = model
            .disks
            .keys()
            .filter(|k| k.contains('@'))
            .cloned()
            .collect();
        let Some(disk) = disks
            .get(at(random.below(disks.len().max(1) as u64)))
            .cloned()
        else {
            push(&mut model, Act::Create(format!("d{n}")));
            continue;
        };
        let sectors = model.disks[&disk].now.len() as u64;
        let from = random.below(sectors - 1);
        let most = [2, 9, 40, 200][at(random.below(4))];
        let len = 1 + random.below((sectors - from).min(most));
        let act = match random.below(20) {
            0..=7 => Act::Write(disk, from, len),
            8..=9 => Act::Discard(disk, from, len),
            10 => Act::Zero(disk, from, len),
            11..=12 => Act::Flush,
            13..=14 => Act::Fork(disk, format!("d{n}")),
            15 => Act::Snapshot(disk, format!("s{n}")),
            16 => match snapshots.first() {
                Some(snapshot) => Act::Rollback(snapshot.clone()),
                None => Act::Flush,
            },
            17 => Act::Remove(disk),
            18 => Act::Bulk,
            _ => Act::Create(format!("d{n}")),
        };
        push(&mut model, act);
    }
    acts
}

#[test]
fn every_cut_of_scripted_histories_leaves_a_pool_that_keeps_its_promises() {
    let start = beginning();
    let mut images_checked = 0;
    for (name, acts) in [
        ("writes", writes()),
        ("forks", forks()),
        ("snapshots", snapshots()),
        ("images", images()),
    ] {
        let began = clock::now();
        let checked = sweep(name, &start, &acts, 24);
        println!("{name}: {checked} images in {:?}", began.elapsed());
        images_checked += checked;
    }
    assert!(images_checked > 5000, "{images_checked} images");
}

#[test]
fn every_cut_of_random_histories_leaves_a_pool_that_keeps_its_promises() {
    let start = beginning();
    let seconds = std::env::var("TIDEPOOL_SECONDS").map_or(25, |s| s.parse().expect("a number"));
    let fixed = std::env::var("TIDEPOOL_SEED").map(|s| s.parse().expect("a number"));
    let first = fixed.clone().unwrap_or_else(|_| {
        std::time::UNIX_EPOCH
            .elapsed()
            .expect("after 1970")
            .as_secs()
            << 16
    });
    let end = clock::now() + Duration::from_secs(seconds);
    let (mut images_checked, mut histories) = (0, 0);
    while histories == 0 || (fixed.is_err() && clock::now() < end) {
        let seed = first + histories;
        println!("TIDEPOOL_SEED={seed}");
        images_checked += sweep(&format!("seed {seed}"), &start, &random(seed), 12);
        histories += 1;
    }
    println!("{images_checked} images of {histories} random histories");
    assert!(images_checked > 0, "at least one history ran");
}
