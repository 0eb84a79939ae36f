//! The histories: every short one, some that were written by hand, and any number at random.

use crate::act::Act;
use crate::common::Random;
use crate::oracle::{BLOCK, CLUSTER, Model};

fn s(name: &str) -> String {
    name.to_owned()
}

/// Clusters of the disks in short histories.
pub(crate) const SHORT_CLUSTERS: u64 = 2;
/// MiB of a pool at first, the fewest that there can be.
const POOL_MIB: u64 = 16;
/// Clusters of the disks in all others.
pub(crate) const CLUSTERS: u64 = 6;

/// What short histories begin with: two empty disks; or a disk over a base with a snapshot and a fork,
/// all of which differ, in whole clusters and in parts of them.
pub(crate) fn beginnings() -> [Vec<Act>; 2] {
    let empty = vec![Act::Create(s("a")), Act::Create(s("b"))];
    let family = vec![
        Act::Over(s("a")),
        Act::Write(s("a"), 0, CLUSTER + 4 * BLOCK),
        Act::Snapshot(s("a"), s("s")),
        Act::Write(s("a"), 2 * BLOCK, BLOCK),
        Act::Fork(s("a"), s("b")),
        Act::Write(s("b"), CLUSTER, BLOCK),
        Act::Flush,
    ];
    [empty, family]
}

/// Every act on two disks of two clusters: writing a sector, a block, a cluster, discarding,
/// zeroing, flushing, forking, taking a snapshot, rolling back, committing, deleting, crashing.
pub(crate) fn alphabet() -> Vec<Act> {
    let mut acts = vec![
        Act::Flush,
        Act::Rollback(s("a@s")),
        Act::Rollback(s("b@t")),
        Act::Commit(s("b")),
        Act::Crash(0),
        Act::Crash(1),
        Act::Kill,
    ];
    for disk in ["a", "b"] {
        for cluster in 0..SHORT_CLUSTERS {
            let at = cluster * CLUSTER;
            acts.extend([
                Act::Write(s(disk), at + 2 * BLOCK + 1, 1),
                Act::Write(s(disk), at + 2 * BLOCK, BLOCK),
                Act::Write(s(disk), at, CLUSTER),
                Act::Discard(s(disk), at, CLUSTER),
                Act::Zero(s(disk), at + 2 * BLOCK, BLOCK),
            ]);
        }
        acts.extend([
            Act::Fork(s(disk), s("f")),
            Act::Snapshot(s(disk), s("t")),
            Act::Remove(s(disk)),
        ]);
    }
    acts
}

/// Short history number `n` of those with `len` acts of an alphabet of `letters`; `None` after the
/// last.
pub(crate) fn short(letters: &[Act], len: usize, n: u64) -> Option<Vec<Act>> {
    let base = letters.len() as u64;
    let mut digits = n;
    let mut acts = Vec::new();
    for _ in 0..len {
        let letter = usize::try_from(digits % base).expect("a letter");
        acts.push(letters[letter].clone());
        digits /= base;
    }
    (digits == 0).then_some(acts)
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
        // In the middle of a block.
        Act::Resize(s("a"), 65),
        Act::Resize(s("a"), 13),
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
        Act::Pool(POOL_MIB + 2),
        Act::Write(s("b"), 0, 30),
        Act::Pool(POOL_MIB),
        Act::Write(s("b"), 20, 30),
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

/// The histories written by hand.
pub(crate) fn scripted() -> [(&'static str, Vec<Act>); 4] {
    [
        ("writes", writes()),
        ("forks", forks()),
        ("snapshots", snapshots()),
        ("images", images()),
    ]
}

/// A history that makes sense, drawn at random.
pub(crate) fn random(seed: u64) -> Vec<Act> {
    let mut random = Random(seed);
    let mut model = Model::new(CLUSTERS);
    let mut acts = Vec::new();
    let len = 12 + random.below(30);
    let has_bulk = random.below(12) == 0;
    while (acts.len() as u64) < len {
        let act = draw(&mut random, &model, acts.len(), has_bulk);
        if model.allows(&act) {
            model.apply(&act);
            acts.push(act);
        }
    }
    acts
}

/// An act, possible or not.
fn draw(random: &mut Random, model: &Model, n: usize, has_bulk: bool) -> Act {
    let names: Vec<&String> = model.disks.keys().collect();
    let pick = |random: &mut Random, is_snapshot: bool| {
        let fits = |name: &&&String| name.contains('@') == is_snapshot;
        let names: Vec<&&String> = names.iter().filter(fits).collect();
        let count = names.len().max(1) as u64;
        let chosen = names.get(crate::oracle::at(random.below(count)));
        chosen.map(|name| (**name).clone())
    };
    let create = |random: &mut Random| match random.below(2) {
        0 => Act::Create(format!("d{n}")),
        _ => Act::Over(format!("d{n}")),
    };
    let Some(disk) = pick(random, false) else {
        return create(random);
    };
    let sectors = model.disks[&disk].now.len() as u64;
    let most = [2, 9, 40, 200][crate::oracle::at(random.below(4))];
    let mut from = random.below(sectors);
    let mut len = 1 + random.below((sectors - from).min(most));
    if random.below(2) == 0 {
        from = from / BLOCK * BLOCK;
        len = len.next_multiple_of(BLOCK).min(sectors - from);
    }
    let number = random.below(4);
    match random.below(36) {
        0..=7 => Act::Write(disk, from, len),
        8..=11 => Act::Begin(number, disk, from, len),
        12..=14 => Act::End(number),
        15..=17 => Act::Discard(disk, from, len),
        18..=19 => Act::Zero(disk, from, len),
        20..=21 => Act::Flush,
        22..=23 if names.len() < 6 => Act::Fork(disk, format!("d{n}")),
        24 if names.len() < 6 => Act::Snapshot(disk, format!("s{n}")),
        25 => Act::Rollback(pick(random, true).unwrap_or_default()),
        26 => Act::Commit(disk),
        27 => Act::Remove(disk),
        28 if has_bulk => Act::Bulk,
        29 => Act::Crash(random.below(1000)),
        30 => Act::Kill,
        31 => Act::Resize(disk, 1 + random.below(CLUSTERS * CLUSTER)),
        32 => Act::Trim,
        33 => Act::Pool(POOL_MIB + random.below(4)),
        34 => Act::Flatten(disk),
        35 if names.len() < 6 => create(random),
        _ => Act::Close,
    }
}
