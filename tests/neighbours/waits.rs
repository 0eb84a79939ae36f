//! Waiting for space costs nobody anything: neither the daemon, nor the neighbours, nor memory.

use std::time::{Duration, Instant};

use tidepool::sys::clock;

use crate::client::{Ram, seed};
use crate::guest::{DATA, DISCARD, GPA, Guest, MODERN, OK, OUT, SOON, Style};
use crate::rogue::Reader;
use crate::served::{Plan, Served};

const CLUSTER: u64 = 64 << 10;
const FILLED: u64 = 8 << 20;
const WIDE: Style = Style {
    size: 256,
    ..MODERN
};

/// A guest whose writes to new clusters fill the pool.
fn greedy(served: &Served, disk: &str) -> Guest {
    let ram = Ram::new(
        GPA,
        usize::try_from(DATA - GPA + (1 << 20)).expect("a size"),
    );
    Guest::try_boot_on(ram, &served.socket(disk), WIDE).expect("accepted")
}

/// Writes clusters from `first` on, one after another, until one waits; it is left waiting.
fn fill(guest: &mut Guest, mut cluster: u64) -> u64 {
    loop {
        guest.put_indirect(0, 0, OUT, cluster * CLUSTER / 512, &[(DATA, 65536, 0)]);
        let limit = Duration::from_millis(700);
        if guest.queues[0].wait_used(&guest.ram, limit).is_none() {
            return cluster;
        }
        assert_eq!(guest.status(0, 0), OK);
        cluster += 1;
    }
}

fn count_reads(reader: &mut Reader) -> usize {
    reader.read_for(Duration::from_millis(500)).reads
}

#[test]
fn writes_that_wait_for_space_cost_nothing() {
    // Many disks, each of which could have clusters set aside.
    let more = (0..200).map(|i| (format!("d{i}"), 1_u64 << 30));
    let disks = [
        ("reader".to_owned(), FILLED),
        ("greedy".to_owned(), 1 << 30),
    ];
    let plan = Plan {
        pool_len: 64 << 20,
        cluster: CLUSTER,
        disks: disks.into_iter().chain(more).collect(),
        in_memory: true,
    };
    let args = ["--workers", "1", "--no-space-timeout", "600"];
    let served = Served::start(&plan, 0, &args);
    let mut reader = Reader::new(&served.socket("reader"), FILLED, seed());
    reader.fill();
    let alone = count_reads(&mut reader);
    let mut guest = greedy(&served, "greedy");
    let next = fill(&mut guest, 0);
    for slot in 1..64 {
        let sector = (next + u64::from(slot)) * CLUSTER / 512;
        guest.put_indirect(0, slot, OUT, sector, &[(DATA, 65536, 0)]);
    }
    // The commits that look for space come to an end.
    let quiet = quiet_second(&served);
    assert!(
        quiet < Duration::from_millis(60),
        "{quiet:?} of a second for 64 that wait"
    );
    let memory = served.resident();
    let beside = (0..4)
        .map(|_| count_reads(&mut reader))
        .max()
        .expect("some");
    assert!(
        beside * 2 > alone,
        "{beside} reads beside 64 that wait, {alone} without"
    );
    let grown = served.resident().saturating_sub(memory) >> 10;
    assert!(grown < 1024, "{grown} KiB more in two seconds of reads");
    // Space for some of them is given to as many, in the order they came.
    discard(&mut guest, 200, 0, 8);
    let served_first = answered(&mut guest, Duration::from_secs(3));
    assert!(served_first.contains(&200), "{served_first:?}");
    let writes: Vec<u16> = served_first
        .into_iter()
        .filter(|slot| *slot != 200)
        .collect();
    assert!(
        (1..=16).contains(&writes.len()),
        "{writes:?} for eight clusters"
    );
    assert!(
        writes
            .iter()
            .enumerate()
            .all(|(i, slot)| usize::from(*slot) == i),
        "{writes:?}"
    );
    discard(&mut guest, 200, 0, next as u32);
    let rest = answered(&mut guest, SOON);
    assert_eq!(rest.len() + writes.len(), 65, "all of them");
}

/// The least CPU time of one of a few seconds.
fn quiet_second(served: &Served) -> Duration {
    let second = |_| {
        let before = served.cpu();
        std::thread::park_timeout(Duration::from_secs(1));
        served.cpu() - before
    };
    (0..5).map(second).min().expect("five")
}

/// Discards clusters, with the request in `slot`.
fn discard(guest: &mut Guest, slot: u16, first: u64, count: u32) {
    let place = DATA + 0x2_0000;
    let mut range = (first * CLUSTER / 512).to_le_bytes().to_vec();
    range.extend((count * (CLUSTER / 512) as u32).to_le_bytes());
    range.extend([0; 4]);
    guest.ram.write(place, &range);
    guest.put(0, slot, DISCARD, 0, &[(place, 16, 0)]);
}

/// The slots that are answered until nothing was for a while, or all are.
fn answered(guest: &mut Guest, limit: Duration) -> Vec<u16> {
    let end: Instant = clock::now() + limit;
    let mut slots = Vec::new();
    while clock::now() < end && slots.len() < 65 {
        let pause = Duration::from_millis(700);
        let Some((slot, _)) = guest.queues[0].wait_used(&guest.ram, pause) else {
            break;
        };
        slots.push(slot as u16);
    }
    slots
}
