//! Goal: whatever moment the power goes while a real Linux works on a served disk, the pool opens
//! and checks clean, holds every sector that a flush acknowledged to the guest covered, and the
//! guest's own file system recovers every file that the guest knew to be durable.
//!
//! Method: the pool of the real `tidepool serve` lies on a FUSE file that records every write,
//! punch and flush as it takes effect (`recorded/store.rs`); the guest's disk is an NBD export that
//! hands requests on over vhost-user-blk and records what the guest was told (`recorded/tap.rs`);
//! both go to one recording, in one order. The guest makes ext4, xfs or btrfs on a fork and works
//! on it (`guest/job-recorded`), noting what is durable. Then crashes are made of the recording
//! (`recorded/replay.rs`): at the moments around flushes and at random ones, with what was not
//! flushed kept, lost, torn at 512 bytes or reordered, and what was in flight there in part. Each
//! is opened by the real code and compared; some are mounted by this host's kernel, one by the
//! guest's.
//!
//! What it would miss: nothing the daemon does to the pool's file goes around FUSE, but the guest's
//! requests come through one virtqueue of ours, not the guest's own two (`guest_linux.rs` has
//! those); order among writes is our queue's; a write answered while a flush that came after it was
//! on its way to us is counted as flushed; blocks are torn at 512 bytes and no finer.
//!
//! `TIDEPOOL_RECORDED_IMAGES` (200) a file system, `TIDEPOOL_RECORDED_RECOVERIES` (6) of them
//! mounted, `TIDEPOOL_RECORDED_ROUNDS` (25) of the guest's work, `TIDEPOOL_SEED`. A recording with
//! faults is kept, and its path printed: `TIDEPOOL_RECORDING=PATH` replays it.

#[expect(
    dead_code,
    reason = "the load generator uses more of it than this test"
)]
#[path = "../benches/loadgen/guest.rs"]
mod guest;
#[path = "common/random.rs"]
mod random;
mod recorded {
    pub(crate) mod log;
    pub(crate) mod machine;
    pub(crate) mod oracle;
    pub(crate) mod recover;
    pub(crate) mod replay;
    pub(crate) mod store;
    pub(crate) mod tap;
}

use recorded::log::Recording;
use recorded::replay::{Place, Plan, replay};
use recorded::{machine, recover};
use std::path::PathBuf;
use tidepool::sys::clock;

/// Images that are to show that a disk which does not flush is found out.
const LIES: u64 = 24;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

#[expect(clippy::print_stdout, reason = "counts, seeds, and what was skipped")]
fn say(text: &str) {
    println!("{text}");
}

/// How much is asked for.
fn plan() -> Plan {
    Plan {
        images: number("TIDEPOOL_RECORDED_IMAGES", 200),
        recoveries: number("TIDEPOOL_RECORDED_RECOVERIES", 6),
        seed: number("TIDEPOOL_SEED", clock::unix_seconds()),
        is_lying: false,
    }
}

fn crash_all_of(file_system: &str) {
    let guest = match machine::guest_image() {
        Ok(guest) => guest,
        Err(reason) => return say(&format!("SKIPPED: recorded_crashes: {reason}")),
    };
    let mut plan = plan();
    let rounds = number("TIDEPOOL_RECORDED_ROUNDS", 25);
    say(&format!("TIDEPOOL_RECORDED_ROUNDS={rounds} {plan:?}"));
    if let Some(reason) = recover::obstacle(file_system, recover::checker(file_system)) {
        let name = format!("recorded_crashes/{file_system}-on-this-host");
        say(&format!("SKIPPED: {name}: {reason}"));
        plan.recoveries = 1; // by the guest
    }
    let dir = tempfile::tempdir_in("/var/tmp").expect("a directory");
    let given = std::env::var_os("TIDEPOOL_RECORDING").map(PathBuf::from);
    let path = given
        .clone()
        .unwrap_or_else(|| dir.path().join("recording"));
    let start = clock::now();
    if given.is_none()
        && let Err(reason) = machine::record(&path, &guest, file_system, rounds, plan.seed)
    {
        return say(&format!("SKIPPED: recorded_crashes: {reason}"));
    }
    let recording = Recording::read(&path).expect("it was written");
    let (count, took) = (recording.records.len(), start.elapsed());
    say(&format!("{file_system}: {count} records in {took:.1?}"));
    let place = Place {
        file_system: file_system.to_owned(),
        scratch: dir.path().to_owned(),
        guest,
    };
    match replay(&recording, plan, &place) {
        Ok(counts) => {
            let took = start.elapsed();
            say(&format!("{file_system}: {counts}; 0 faults, {took:.1?}"));
            assert!(counts.images >= plan.images && counts.torn > 0 && counts.flushes > 0);
            assert!(counts.recovered > 0 || plan.recoveries == 0);
        }
        Err(faults) => {
            if given.is_none() {
                drop(dir.keep());
            }
            let some: Vec<_> = faults.iter().take(5).cloned().collect();
            let (path, seed) = (path.display(), plan.seed);
            let repeat = format!("TIDEPOOL_RECORDING={path} TIDEPOOL_SEED={seed}");
            panic!("{} faults; {repeat}\n{}", faults.len(), some.join("\n"));
        }
    }
    notice_lies(&recording, plan, &place);
}

/// What would be said of a store that says that it flushed and did not: this test can fail.
fn notice_lies(recording: &Recording, plan: Plan, place: &Place) {
    let lies = Plan {
        images: LIES,
        recoveries: 0,
        is_lying: true,
        ..plan
    };
    let found = replay(recording, lies, place).expect_err("it is noticed");
    let (name, count) = (&place.file_system, found.len());
    say(&format!(
        "{name}: {count} of {LIES} images of a disk that does not flush are bad"
    ));
}

#[test]
fn ext4_survives_any_crash() {
    crash_all_of("ext4");
}

#[test]
fn xfs_survives_any_crash() {
    crash_all_of("xfs");
}

#[test]
fn btrfs_survives_any_crash() {
    crash_all_of("btrfs");
}
