//! Fair turns: large requests are cut, and whoever sends many gets no more than others.

use std::time::Duration;

use crate::client::seed;
use crate::rogue::{DEEDS, Deed, Latency, Reader, Rogue};
use crate::served::{Plan, Served};

const FILLED: u64 = 64 << 20;
const SIZE: u64 = 1 << 30;
/// How often a bound that did not hold is looked at again.
const TRIES: usize = 4;

/// What the clock, the scheduler of a busy machine, and a build that was not optimised add: no ratio.
const SLACK: Duration = Duration::from_micros(if cfg!(debug_assertions) { 30_000 } else { 500 });
/// What a read may take at the worst.
const WORST: Duration = Duration::from_millis(if cfg!(debug_assertions) { 150 } else { 20 });

/// What the bound allows beside ordinary reads that took `base`.
fn is_fair(base: &Latency, beside: &Latency) -> bool {
    beside.p99 <= base.p99 * 4 + SLACK && beside.worst <= WORST.max(base.worst * 2)
}

fn hold(plan: &Plan, workers: &str, time: Duration, deeds: &[Deed]) {
    let served = Served::start(plan, FILLED, &["--workers", workers]);
    let seed = seed();
    let mut reader = Reader::new(&served.socket("reader"), FILLED, seed);
    let rogue = |deed| Rogue::start(&served.socket("rogue"), deed, SIZE, seed);
    let mut base = {
        let _ordinary = rogue(Deed::Reads);
        reader.read_for(time)
    };
    for deed in deeds {
        let mut seen = Vec::new();
        let is_held = (0..TRIES).any(|_| {
            let rogue = rogue(*deed);
            let beside = reader.read_for(time);
            let answered = rogue.answered();
            drop(rogue);
            seen.push((beside, answered));
            is_fair(&base, &beside) || {
                let _ordinary = Rogue::start(&served.socket("rogue"), Deed::Reads, SIZE, seed);
                base = reader.read_for(time);
                is_fair(&base, &beside)
            }
        });
        assert!(
            is_held,
            "{deed:?}: {seen:?}, beside ordinary reads {base:?}"
        );
    }
}

fn plan(cluster: u64, in_memory: bool) -> Plan {
    Plan {
        pool_len: 3 << 30,
        cluster,
        disks: vec![("reader".into(), FILLED), ("rogue".into(), SIZE)],
        in_memory,
    }
}

#[test]
fn whatever_one_guest_asks_for_another_has_its_turn() {
    let time = Duration::from_millis(400);
    hold(&plan(16 << 10, false), "1", time, &DEEDS);
}
