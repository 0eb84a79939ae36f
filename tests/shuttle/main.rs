//! Goal: queues, forks and free space go on together in any order that threads can be run in.
//!
//! Method: shuttle runs the real pool with its background thread, over a simulated disk, by one thread
//! at a time, and chooses at random who goes on at each use of a lock, an atomic or a thread: `src/sync`
//! is shuttle's in this build. What the threads saw is checked as in `tests/linearizability.rs`; a
//! schedule in which nobody can go on fails. Seeds that are even take any thread at each step; the odd
//! ones let one thread run ahead and interrupt it in few places, in several runs each.
//!
//! ```text
//! cargo test --features shuttle --profile sweep --test shuttle
//! TIDEPOOL_SECONDS=600        for longer
//! TIDEPOOL_SEED=123           what that seed does, again and step by step
//! ```

#![cfg(feature = "shuttle")]

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/history.rs"]
mod history;
#[path = "../common/overlap.rs"]
mod overlap;

use common::{CLUSTER, Random, disk, fresh, opened};
use overlap::World;
use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::{Config, MaxSteps, Runner};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::Duration;
use tidepool::cowdisk::{self, Disk, NewDisk, Settings};
use tidepool::pool::space::Purpose;
use tidepool::sync::global::atomic::{AtomicUsize, Ordering};
use tidepool::sync::{Arc, JoinHandle, spawn_named};
use tidepool::sys::clock;

/// Places where a thread that ran ahead is interrupted.
const DEPTH: usize = 4;
/// Runs of a seed that does that. The first only counts the steps.
const PCT_RUNS: usize = 6;

/// Runs `body` under the schedules of a seed; how many those are.
fn run(seed: u64, body: impl Fn(u64) + Send + Sync + 'static) -> usize {
    let mut config = Config::new();
    config.stack_size = 1 << 18;
    config.max_steps = MaxSteps::FailAfter(10_000_000);
    config.silence_warnings = true;
    let body = move || body(seed);
    if seed.is_multiple_of(2) {
        Runner::new(RandomScheduler::new_from_seed(seed, 1), config).run(body)
    } else {
        Runner::new(PctScheduler::new_from_seed(seed, DEPTH, PCT_RUNS), config).run(body)
    }
}

/// Runs `body` under one schedule after the other until its `share` in percent of the time is over,
/// and says which failed.
#[expect(clippy::print_stdout, reason = "a run says how much it looked at")]
fn explore(name: &str, share: u64, body: impl Fn(u64) + Send + Sync + Clone + 'static) {
    let number = |name: &str| {
        let text = std::env::var(name).ok()?;
        Some(text.parse::<u64>().expect("a number"))
    };
    let seconds = number("TIDEPOOL_SECONDS").unwrap_or(20);
    let given = number("TIDEPOOL_SEED");
    let first = given.unwrap_or_else(|| clock::unix_seconds() * 10_000);
    let end = clock::now() + Duration::from_millis(seconds * 10 * share);
    let (mut seed, mut schedules) = (first, 0);
    while schedules == 0 || (given.is_none() && clock::now() < end) {
        let body = body.clone();
        match catch_unwind(AssertUnwindSafe(|| run(seed, body))) {
            Ok(count) => schedules += count,
            Err(failure) => {
                println!("FAILED {name}: TIDEPOOL_SEED={seed} does this again");
                resume_unwind(failure);
            }
        }
        seed += 1;
    }
    println!("SHUTTLE {name}: {schedules} schedules from seed {first}");
}

fn actor(body: impl FnOnce() + Send + 'static) -> JoinHandle<()> {
    spawn_named("actor", body).expect("a thread")
}

fn queues_forks_and_free_space(seed: u64) -> usize {
    const LEN: u64 = 4 * CLUSTER;
    // Time would be another one when a schedule is repeated.
    clock::hold_still(Some(1_700_000_000));
    let (storage, pool) = fresh();
    let background = pool.start_background().expect("a thread");
    let d = disk(&pool, "d", LEN);
    let world = World::new(&pool, LEN);
    let random = |n: u64| Random(seed.wrapping_mul(1000).wrapping_add(n));
    let mut actors = Vec::new();
    for n in 0..3 {
        let (world, disk, random) = (Arc::clone(&world), d.clone(), random(n));
        actors.push(actor(move || {
            overlap::write_and_read(&world, &disk, random, 6);
        }));
    }
    let (shared, disk, choices) = (Arc::clone(&world), d.clone(), random(3));
    actors.push(actor(move || overlap::discard(&shared, &disk, choices, 4)));
    let (shared, choices) = (Arc::clone(&world), random(4));
    actors.push(actor(move || overlap::fork(&shared, choices, 2)));
    let (shared, choices) = (Arc::clone(&world), random(5));
    actors.push(actor(move || overlap::reclaim(&shared, choices, 3)));
    let (shared, choices) = (Arc::clone(&world), random(6));
    actors.push(actor(move || overlap::grow(&shared, choices, 2)));
    for actor in actors {
        actor.join().expect("no panic");
    }
    let last = overlap::read_all(&world, &d);
    let reads = history::check(&world.log()).unwrap_or_else(|e| panic!("{e}"));
    d.flush().expect("flushes");
    drop((d, background));
    pool.take_back_slabs();
    while pool.reap(usize::MAX) {}
    let free = |pool: &tidepool::pool::Pool| {
        let usage = pool.space.usage();
        usage.clean + usage.written
    };
    let again = opened(&Arc::new(storage.crash_all_lost()));
    assert_eq!(
        free(&pool),
        free(&again),
        "clusters got lost, or are free twice"
    );
    let d = Disk::open(&again, "d").expect("there");
    assert_eq!(overlap::all(&d), last, "it was flushed");
    reads
}

#[test]
fn queues_forks_and_free_space_go_together() {
    static READS: AtomicUsize = AtomicUsize::new(0);
    explore("pool", 90, |seed| {
        READS.fetch_add(queues_forks_and_free_space(seed), Ordering::Relaxed);
    });
    let reads = READS.load(Ordering::Relaxed);
    println!("SHUTTLE pool: {reads} reads of sectors checked");
    assert!(reads > 0);
}

/// A reserve is set while another disk takes clusters: with the look and the promise in two steps,
/// more was promised than there was.
#[test]
fn a_reserve_is_found_and_made_in_one_step() {
    explore("reserve", 5, |_seed| {
        clock::hold_still(Some(1_700_000_000));
        let (_storage, pool) = fresh();
        cowdisk::create(&pool, &NewDisk::empty("d", CLUSTER)).expect("creates");
        let taker = {
            let pool = Arc::clone(&pool);
            actor(move || {
                for _ in 0..3 {
                    drop(pool.space.take(16, Purpose::Data));
                }
            })
        };
        let reserve = u64::from(pool.space.reservable()) * CLUSTER;
        let settings = Settings {
            reserve: Some(Some(reserve)),
            ..Settings::default()
        };
        drop(cowdisk::set(&pool, "d", &settings));
        taker.join().expect("no panic");
        let usage = pool.space.usage();
        assert!(usage.clean + usage.written >= usage.reserved, "{usage:?}");
    });
}

/// The last wait for the background thread, interrupted by requests that hurry it: without the lock
/// its end falls between a look at it and the sleep after that, which nobody ends.
#[test]
fn the_background_ends_while_requests_hurry_it() {
    explore("ending", 5, |_seed| {
        clock::hold_still(Some(1_700_000_000));
        let (_storage, pool) = fresh();
        let background = pool.start_background().expect("a thread");
        let hurrying = {
            let pool = Arc::clone(&pool);
            actor(move || (0..3).for_each(|_| pool.hurry()))
        };
        drop(background);
        hurrying.join().expect("no panic");
        assert!(
            pool.start_background().is_ok(),
            "the last one has not ended"
        );
    });
}
