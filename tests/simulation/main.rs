//! Goal: whatever the moment of a power cut, or of the end of the process, and whatever of the
//! unflushed writes survived it, the pool opens, `check` finds it well, it holds everything that
//! was flushed, shows nobody anything foreign, and works on.
//!
//! Method: the real pool and its disks over a simulated device, single-threaded, without a clock
//! or a random number that is not in the seed. In the middle of every operation that changes the
//! device, the device is asked what a crash could leave: all of it where that is little, else the
//! extremes and some at random (unflushed blocks of 512 bytes kept or lost one by one, page by
//! page, operation by operation, up to a moment). Each image is checked, opened and compared with
//! flat arrays that know every value a sector may have ([`oracle`]); every sector ever written
//! holds a number of its own, so that foreign, stale and torn data show. Some steps are followed
//! further: the opening is cut short as well, the process is killed instead so that the next one
//! finds the device's cache, the pool works on and crashes again.
//!
//! Histories ([`histories`]): every sequence of up to three acts on two disks of two clusters, from
//! two beginnings, four acts sampled (clusters are the smallest there are: of 32 sectors, in blocks of
//! two); some written by hand; longer ones at random, with writes in
//! flight. [`faults`]: errors, full devices and lies at every operation. The rules that this relies
//! on are modelled in `tests/order_model`.
//!
//! What one thread cannot show, because it cannot wait for itself: that a fork drains its source (R7),
//! and races inside a call. `pool_rules`, `engine_races` and the model have those. Time has no part in
//! it: the pool's own work in the background is done by commits here, and nothing else looks at a clock.
//!
//! Broken on purpose, each was found: no data flush before the journal (`every_sequence`, by hand), a
//! cluster claimed without asking its count (`every_sequence`), the last batch not written again at
//! opening (`faults`), a discard that takes the cluster of a write in flight (`random_histories`), a
//! pool that grows before its file has, or shrinks after (by hand), a rollback that keeps the disk's own
//! bound of its base (`random_histories`).
//!
//! A failure prints its seed and the shortest history found that fails, as a line to repeat it:
//! `TIDEPOOL_TRACE='create a; write a 0 5; ...'`. `TIDEPOOL_IMAGES` checks that many images,
//! `TIDEPOOL_SEED` chooses the first random history. `scripts/crash-sweep` does both at length.

#![expect(
    clippy::print_stdout,
    reason = "seeds and counts are printed by helpers of the tests"
)]

#[path = "../common/mod.rs"]
mod common;

mod act;
mod faults;
mod histories;
mod oracle;
mod perform;
mod run;
mod scene;
mod shrink;

use act::{Act, from_trace, to_trace};
use histories::{CLUSTERS, SHORT_CLUSTERS};
use run::Start;
use scene::{Counts, Effort, Scene};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tidepool::sync::{Mutex, spawn_named};
use tidepool::sys::clock;

/// Images that the random histories and the sampled ones check together, if nothing else is said.
const IMAGES: u64 = 60_000;
/// A long run says how far it is after so many more.
const NEWS: u64 = 1_000_000;

fn number(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(value.parse().expect("a number"))
}

/// Prints how to repeat a failure, as short as it gets, and fails.
fn report(what: &str, start: &Start, acts: &[Act], effort: Effort, fault: String) -> ! {
    std::panic::set_hook(Box::new(|_| {}));
    let fails = |acts: &[Act]| run::run_alone(start, acts, effort).err();
    let (acts, fault) = match fails(acts) {
        Some(fault) => shrink::shrink(acts, fault, fails),
        None => (acts.to_vec(), fault),
    };
    drop(std::panic::take_hook());
    panic!("{what}: {fault}\nTIDEPOOL_TRACE='{}'", to_trace(&acts));
}

/// What threads share while they sweep.
struct Sweep {
    wanted: u64,
    images: AtomicU64,
    next: AtomicU64,
    total: Mutex<Counts>,
}

/// Runs `body` on every processor; each call is given the next number, until it says that it was
/// the last or enough images were checked.
fn on_all_cores(wanted: u64, body: fn(u64, &Arc<Mutex<Scene>>) -> bool, effort: Effort) -> Counts {
    let sweep = Arc::new(Sweep {
        wanted,
        images: AtomicU64::new(0),
        next: AtomicU64::new(0),
        total: Mutex::default(),
    });
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let workers: Vec<_> = (0..cores)
        .map(|_| {
            let sweep = Arc::clone(&sweep);
            let work = move || {
                let scene = Arc::new(Mutex::new(Scene::new(effort)));
                let mut before = 0;
                while sweep.images.load(Ordering::Relaxed) < sweep.wanted {
                    let n = sweep.next.fetch_add(1, Ordering::Relaxed);
                    if !body(n, &scene) {
                        break;
                    }
                    let images = scene.lock().counts.images;
                    let more = images - before;
                    let all = sweep.images.fetch_add(more, Ordering::Relaxed);
                    if all / NEWS != (all + more) / NEWS {
                        println!("{} images so far", all + more);
                    }
                    before = images;
                }
                sweep.total.lock().add(&scene.lock().counts);
            };
            spawn_named("sweep", work).expect("a thread")
        })
        .collect();
    for worker in workers {
        if worker.join().is_err() {
            panic!("a worker failed; what it printed says how to repeat it");
        }
    }
    *sweep.total.lock()
}

/// Images that this process has checked so far.
static CHECKED: AtomicU64 = AtomicU64::new(0);

fn say(what: &str, counts: &Counts, began: std::time::Instant) {
    CHECKED.fetch_add(counts.images, Ordering::Relaxed);
    let seconds = began.elapsed().as_secs_f64();
    let Counts {
        histories,
        steps,
        images,
        repeated,
    } = counts;
    println!(
        "{what}: {images} images checked ({repeated} more were repetitions), at {steps} steps of \
         {histories} histories, in {seconds:.1} s"
    );
}

/// Every moment of every act of short histories but the last is the end of another one.
const SHORT: Effort = Effort {
    all: 12,
    seeds: 4,
    deep_in: 40,
};
const LONG: Effort = Effort {
    all: 8,
    seeds: 8,
    deep_in: 12,
};

thread_local! {
    static STARTS: [Start; 2] = short_starts();
    static EMPTY: [Start; 2] =
        [Start::empty(CLUSTERS), Start::empty(CLUSTERS).with_slow_holes()];
    static LETTERS: Vec<Act> = histories::alphabet();
}

/// The beginnings of short histories, one of them on a host with slow holes.
fn short_starts() -> [Start; 2] {
    let [empty, family] = histories::beginnings();
    let start = || Start::empty(SHORT_CLUSTERS);
    [
        start().with_slow_holes().after(&empty),
        start().after(&family),
    ]
}

/// Runs the short history `acts` from beginning `n`, and crashes in its last act.
fn run_short(n: u64, acts: &[Act], scene: &Arc<Mutex<Scene>>) {
    STARTS.with(|starts| {
        let start = &starts[usize::try_from(n % 2).expect("two")];
        if !run::is_sensible(start, acts) {
            return;
        }
        if let Err(fault) = run::run(start, acts, acts.len() - 1, scene) {
            report("a short history", start, acts, SHORT, fault);
        }
    });
}

/// Number `n` of all histories of `len` acts, from both beginnings.
fn every_short(len: usize, n: u64, scene: &Arc<Mutex<Scene>>) -> bool {
    let acts = LETTERS.with(|letters| histories::short(letters, len, n / 2));
    let Some(acts) = acts else { return false };
    run_short(n, &acts, scene);
    true
}

#[test]
fn every_sequence_of_up_to_three_acts() {
    let began = clock::now();
    let mut counts = Counts::default();
    counts.add(&on_all_cores(
        u64::MAX,
        |n, scene| every_short(1, n, scene),
        SHORT,
    ));
    counts.add(&on_all_cores(
        u64::MAX,
        |n, scene| every_short(2, n, scene),
        SHORT,
    ));
    counts.add(&on_all_cores(
        u64::MAX,
        |n, scene| every_short(3, n, scene),
        SHORT,
    ));
    say("every sequence of up to three acts", &counts, began);
    assert!(counts.images > 50_000, "{} images", counts.images);
}

#[test]
fn histories_written_by_hand() {
    if let Ok(trace) = std::env::var("TIDEPOOL_TRACE") {
        // Short ones name disks that are there before: every beginning is tried.
        let acts = from_trace(&trace);
        let empty = Start::empty(CLUSTERS);
        let slow = Start::empty(CLUSTERS).with_slow_holes();
        for start in short_starts().iter().chain([&empty, &slow]) {
            if let Err(fault) = run::run_alone(start, &acts, LONG) {
                panic!("{fault}\nTIDEPOOL_TRACE='{}'", to_trace(&acts));
            }
        }
        return;
    }
    let began = clock::now();
    let mut counts = Counts::default();
    let start = Start::empty(CLUSTERS);
    for (name, acts) in histories::scripted() {
        match run::run_alone(&start, &acts, LONG) {
            Ok(more) => counts.add(&more),
            Err(fault) => report(name, &start, &acts, LONG, fault),
        }
    }
    say("histories written by hand", &counts, began);
    assert!(counts.images > 800, "{} images", counts.images);
}

/// Random history number `n`, or a sample of those with four acts.
fn any(n: u64, scene: &Arc<Mutex<Scene>>) -> bool {
    static FIRST: AtomicU64 = AtomicU64::new(0);
    if FIRST.load(Ordering::Relaxed) == 0 {
        let now = || {
            std::time::UNIX_EPOCH
                .elapsed()
                .map_or(1, |since| since.as_secs() << 20)
        };
        let first = number("TIDEPOOL_SEED").unwrap_or_else(now);
        FIRST.store(first, Ordering::Relaxed);
        println!("TIDEPOOL_SEED={first}");
    }
    let seed = FIRST.load(Ordering::Relaxed) + n;
    if !n.is_multiple_of(4) {
        let mut random = common::Random(seed);
        let acts: Vec<Act> = LETTERS.with(|letters| {
            let count = letters.len() as u64;
            (0..4)
                .map(|_| letters[oracle::at(random.below(count))].clone())
                .collect()
        });
        run_short(n / 4, &acts, scene);
        return true;
    }
    EMPTY.with(|starts| {
        let acts = histories::random(seed);
        let start = &starts[usize::from(seed % 8 >= 4)];
        if let Err(fault) = run::run(start, &acts, 0, scene) {
            report(&format!("TIDEPOOL_SEED={seed}"), start, &acts, LONG, fault);
        }
    });
    true
}

#[test]
fn random_histories() {
    let wanted = number("TIDEPOOL_IMAGES").unwrap_or(IMAGES);
    // Run as one process, one test after the other, this is the last, and does the rest.
    let wanted = wanted
        .saturating_sub(CHECKED.load(Ordering::Relaxed))
        .max(1);
    let began = clock::now();
    let counts = on_all_cores(wanted, any, LONG);
    say("random histories", &counts, began);
    println!(
        "{} images in all, no violation",
        CHECKED.load(Ordering::Relaxed)
    );
    assert!(counts.images >= wanted, "{} images", counts.images);
}
