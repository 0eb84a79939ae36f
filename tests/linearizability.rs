//! Goal: a disk in use by many at once behaves as one disk would, sector by sector: overlapping
//! requests take effect in some order that agrees with time, whatever else is done to the disk.
//!
//! Method: threads write unique values and read, blocking and several in flight at once, discard,
//! zero, fork, snapshot, enlarge and reclaim one small disk, so that nearly everything overlaps; each
//! writes down when its requests began and ended. A checker then looks for an order (`common/history.rs`);
//! it is itself tried on histories that are right and wrong. In the end the pool loses power, and
//! what was flushed must be there.
//!
//! `TIDEPOOL_SECONDS` says for how long, `TIDEPOOL_SEED` with which first seed: the threads do the same
//! again, though not at the same times. `tests/shuttle` repeats those too.

mod common;
#[path = "common/history.rs"]
mod history;
#[path = "common/overlap.rs"]
mod overlap;

use common::{CLUSTER, Random, disk, fresh, opened};
use history::{Event, What, check};
use overlap::World;
use std::time::Duration;
use tidepool::cowdisk::Disk;
use tidepool::sync::{Arc, JoinHandle, spawn_named};
use tidepool::sys::clock;

/// Bytes of the disk: what is written in one place is often what is read next.
const LEN: u64 = 6 * CLUSTER;
const STEPS: u32 = 150;

fn actor(
    world: &Arc<World>,
    disk: &Disk,
    body: impl FnOnce(&World, &Disk) + Send + 'static,
) -> JoinHandle<()> {
    let (world, disk) = (Arc::clone(world), disk.clone());
    spawn_named("actor", move || body(&world, &disk)).expect("a thread")
}

/// One pool, used by eight threads; how many reads were checked.
fn round(seed: u64) -> usize {
    let (storage, pool) = fresh();
    let background = pool.start_background().expect("a thread");
    let d = disk(&pool, "d", LEN);
    let world = World::new(&pool, LEN);
    let random = |n: u64| Random(seed.wrapping_mul(1000).wrapping_add(n));
    let mut actors: Vec<JoinHandle<()>> = (0..4)
        .map(|n| {
            let random = random(n);
            actor(&world, &d, move |world, disk| {
                overlap::write_and_read(world, disk, random, STEPS);
            })
        })
        .collect();
    let (discards, forks, reclaims, growths) = (random(4), random(5), random(6), random(7));
    actors.push(actor(&world, &d, move |world, disk| {
        overlap::discard(world, disk, discards, STEPS);
    }));
    actors.push(actor(&world, &d, move |world, _| {
        overlap::fork(world, forks, STEPS / 10);
    }));
    actors.push(actor(&world, &d, move |world, _| {
        overlap::reclaim(world, reclaims, STEPS / 10);
    }));
    actors.push(actor(&world, &d, move |world, _| {
        overlap::grow(world, growths, STEPS / 5);
    }));
    for actor in actors {
        actor
            .join()
            .unwrap_or_else(|_| panic!("seed {seed}: an actor failed"));
    }
    let last = overlap::read_all(&world, &d);
    let reads = check(&world.log()).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
    d.flush().expect("flushes");
    drop((d, background));
    let again = opened(&Arc::new(storage.crash_all_lost()));
    let d = Disk::open(&again, "d").expect("there");
    assert_eq!(overlap::all(&d), last, "seed {seed}: it was flushed");
    reads
}

#[test]
fn overlapping_requests_are_linearizable() {
    let seconds = std::env::var("TIDEPOOL_SECONDS").map_or(10, |s| s.parse().expect("a number"));
    let given = std::env::var("TIDEPOOL_SEED").map(|seed| seed.parse().expect("a number"));
    let first: u64 = given.unwrap_or_else(|_| clock::unix_seconds());
    let end = clock::now() + Duration::from_secs(seconds);
    let (mut rounds, mut reads) = (0, 0);
    while rounds == 0 || clock::now() < end {
        reads += round(first + rounds);
        rounds += 1;
    }
    println!(
        "LINEARIZABILITY: {rounds} rounds from seed {first}, {reads} reads of sectors checked"
    );
    assert!(reads > 0);
}

const fn event(what: What, value: u64, began: u64, ended: u64) -> Event {
    Event {
        what,
        sector: 7,
        value,
        began,
        ended,
    }
}

const fn write(value: u64, began: u64, ended: u64) -> Event {
    event(What::Write, value, began, ended)
}

const fn read(value: u64, began: u64, ended: u64) -> Event {
    event(What::Read, value, began, ended)
}

#[test]
fn the_checker_passes_what_a_disk_may_do() {
    let good: &[(&str, &[Event])] = &[
        ("what was never written reads as zeros", &[read(0, 1, 2)]),
        (
            "one after the other",
            &[write(5, 1, 2), read(5, 3, 4), write(6, 5, 6), read(6, 7, 8)],
        ),
        (
            "a read during a write sees it",
            &[write(5, 1, 9), read(5, 2, 3)],
        ),
        ("or not", &[write(5, 1, 9), read(0, 2, 3)]),
        (
            "or first not, and then",
            &[write(5, 1, 9), read(0, 2, 3), read(5, 4, 5)],
        ),
        (
            "of two writes at once either is last",
            &[write(5, 1, 9), write(6, 2, 8), read(5, 10, 11)],
        ),
        (
            "also the other",
            &[write(5, 1, 9), write(6, 2, 8), read(6, 10, 11)],
        ),
        (
            "a write that ends late can come first",
            &[
                write(5, 1, 20),
                write(6, 2, 3),
                read(6, 4, 5),
                read(6, 21, 22),
            ],
        ),
        (
            "zeros from a discard",
            &[write(5, 1, 2), write(0, 3, 4), read(0, 5, 6)],
        ),
        (
            "a discard at the same time",
            &[write(5, 1, 4), write(0, 2, 3), read(5, 5, 6), read(5, 7, 8)],
        ),
        (
            "two readers at once may differ",
            &[write(5, 1, 9), read(5, 2, 8), read(0, 3, 7)],
        ),
    ];
    for (name, events) in good {
        let reads = events.iter().filter(|event| event.what == What::Read);
        assert_eq!(check(events), Ok(reads.count()), "{name}");
    }
}

#[test]
fn the_checker_finds_what_a_disk_must_not_do() {
    let bad: &[(&str, &[Event])] = &[
        ("never written", &[read(5, 1, 2)]),
        ("not yet written", &[read(5, 1, 2), write(5, 3, 4)]),
        ("a lost write", &[write(5, 1, 2), read(0, 3, 4)]),
        (
            "overwritten before",
            &[write(5, 1, 2), write(6, 3, 4), read(5, 5, 6)],
        ),
        (
            "discarded before",
            &[write(5, 1, 2), write(0, 3, 4), read(5, 5, 6)],
        ),
        (
            "the zeros of a discard are gone, and come back",
            &[write(0, 1, 2), write(5, 3, 4), read(0, 5, 6)],
        ),
        (
            "there, and gone again",
            &[
                write(5, 1, 9),
                read(5, 2, 3),
                write(6, 4, 5),
                read(6, 6, 7),
                read(5, 10, 11),
            ],
        ),
        (
            "two writes at once seen in two orders",
            &[
                write(5, 1, 9),
                write(6, 1, 9),
                read(5, 10, 11),
                read(6, 12, 13),
                read(5, 14, 15),
            ],
        ),
        (
            "back to what was before, with both in flight",
            &[
                write(5, 1, 2),
                write(6, 3, 20),
                read(6, 4, 5),
                read(5, 6, 7),
            ],
        ),
    ];
    for (name, events) in bad {
        assert!(check(events).is_err(), "{name}");
    }
    // Of another sector it says nothing.
    let elsewhere = Event {
        sector: 8,
        ..read(5, 3, 4)
    };
    check(&[write(5, 1, 2), elsewhere]).expect_err("of another sector");
}
