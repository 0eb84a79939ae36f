//! A repair that a power cut or an error ends has changed nothing, or has done all of it but what the
//! next one does; and the next one ends where the first would have.

use super::planted::{append, batches, copy, impossible_records, sample};
use super::repair::{Maps, goes_on, maps};
use std::sync::Arc;
use tidepool::format::superblock::SUPERBLOCK_AT;
use tidepool::pool::PoolError;
use tidepool::pool::check::check;
use tidepool::pool::repair::repair;
use tidepool::storage::sim::Op;
use tidepool::storage::{SimStorage, Storage};

const EIO: i32 = 5;

fn run(storage: &Arc<SimStorage>) -> Result<(), PoolError> {
    repair(&(Arc::clone(storage) as Arc<dyn Storage>)).map(|_report| ())
}

fn faults(storage: &SimStorage) -> Vec<String> {
    let report = check(storage).expect("the store works");
    report.faults.into_iter().map(|fault| fault.what).collect()
}

/// Pools that can be repaired: a superblock copy, batches early and late, and entries that cannot be.
fn damaged() -> Vec<(String, Arc<SimStorage>)> {
    let storage = sample();
    let mut damaged = Vec::new();
    let batches = batches(&storage);
    let starts = [1, batches.len() / 2, batches.len() - 2].map(|n| batches[n].0);
    for at in SUPERBLOCK_AT.into_iter().chain(starts) {
        let bad = copy(&storage);
        bad.write_durable_at(&[0; 4096], at).expect("writes");
        damaged.push((format!("block at {at}"), bad));
    }
    for (what, records) in impossible_records(&storage) {
        let bad = copy(&storage);
        append(&bad, &records);
        damaged.push((what.to_owned(), bad));
    }
    damaged
}

/// What an interrupted repair may leave, and must come to.
struct Expected {
    before: (Maps, Vec<String>),
    mended: Maps,
}

fn expected(bad: &Arc<SimStorage>) -> Expected {
    let mended = copy(bad);
    run(&mended).expect("is repaired");
    assert!(faults(&mended).is_empty());
    Expected {
        before: (maps(bad), faults(bad)),
        mended: maps(&mended),
    }
}

fn is_left_well(what: &str, left: SimStorage, expected: &Expected) {
    let left = Arc::new(left);
    let (now, faults_now) = (maps(&left), faults(&left));
    let (before, faults_before) = &expected.before;
    let is_known = now == *before || now == expected.mended;
    assert!(
        is_known,
        "{what}: the maps are neither what they were nor mended"
    );
    let new = faults_now.iter().find(|what| !faults_before.contains(what));
    assert_eq!(new, None, "{what}: a new fault");
    run(&left).unwrap_or_else(|e| panic!("{what}: the next repair: {e}"));
    assert!(faults(&left).is_empty(), "{what}: repaired again");
    assert!(maps(&left) == expected.mended, "{what}: repaired again");
    goes_on(&left, what);
}

#[test]
fn a_repair_that_is_cut_off_makes_nothing_worse() {
    for (what, bad) in damaged() {
        let expected = expected(&bad);
        for skip in 0.. {
            let store = copy(&bad);
            store.cut_power_at(skip);
            drop(run(&store));
            let what = format!("{what}, cut off at {skip}");
            for left in [store.crash_all_lost(), store.crash(skip)] {
                is_left_well(&what, left, &expected);
            }
            if !store.is_off() {
                break;
            }
        }
    }
}

/// Errors while reading come before anything is changed, and are those of a check.
#[test]
fn a_repair_that_cannot_write_makes_nothing_worse() {
    let mut failed = 0;
    for (what, bad) in damaged() {
        let expected = expected(&bad);
        for op in [Op::Write, Op::WriteDurable, Op::Flush] {
            for skip in 0.. {
                let store = copy(&bad);
                let before = store.counters().of(op);
                store.fail(op, skip, EIO);
                failed += u64::from(run(&store).is_err());
                let was_hurt = store.counters().of(op) - before > skip;
                store.clear_faults();
                if !was_hurt {
                    break;
                }
                let what = format!("{what}, {op:?} {skip} failed");
                is_left_well(&what, store.crash_all_lost(), &expected);
                is_left_well(&what, store.kill(), &expected);
            }
        }
    }
    assert!(failed > 50, "{failed} repairs failed");
}
