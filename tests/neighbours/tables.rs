//! What clients hold of the process: mappings and descriptors.
//!
//! A request that waits keeps the memory table it came from. Who replaces his table after each such
//! request is ended before he has much, and his neighbours have all that they had.

use std::time::Duration;

use tidepool::sys::clock;

use crate::client::{Ram, WRITE, req};
use crate::guest::{DATA, FLUSH, GPA, Guest, IN, MODERN, OK, OUT, Style};
use crate::served::{Plan, Served};

const CLUSTER: u64 = 64 << 10;
/// Regions of the tables, the guest's own memory among them.
const REGIONS: u64 = 8;
/// More tables than anybody has use for while requests wait.
const TABLES: u16 = 200;

#[test]
fn memory_tables_that_requests_wait_on_are_few() {
    let plan = Plan {
        pool_len: 16 << 20,
        cluster: CLUSTER,
        disks: vec![("rogue".into(), 1 << 30), ("other".into(), 1 << 30)],
        in_memory: true,
    };
    let served = Served::start(&plan, 0, &["--workers", "1", "--no-space-timeout", "600"]);
    let style = Style {
        size: 1024,
        protocol: None,
        slots: false,
        ..MODERN
    };
    let mut guest = Guest::boot(&served.socket("rogue"), style);
    let cluster = (0..)
        .find(|cluster| !is_written(&mut guest, 0, *cluster))
        .expect("a limit");
    let before = served.holds();
    let more: Vec<Ram> = (1..REGIONS)
        .map(|n| Ram::new(GPA * 1000 * n, 4096))
        .collect();
    let mut most = before;
    let tables = (1..TABLES).find(|slot| {
        assert!(!is_written(
            &mut guest,
            slot * 3,
            cluster + u64::from(*slot)
        ));
        let all: Vec<&Ram> = std::iter::once(&guest.ram).chain(&more).collect();
        guest.wire.set_mem_table(&all);
        let held = served.holds();
        most = (most.0.max(held.0), most.1.max(held.1));
        // It tells that it has hung up instead.
        guest.wire.ask(req::GET_FEATURES, &[]).is_none()
    });
    assert!(tables.is_some_and(|count| count > 16), "{tables:?} tables");
    assert!(
        most.1 <= before.1 + 16,
        "{before:?} mappings and descriptors, then {most:?}"
    );
    assert!(
        most.0 <= before.0 + 1024,
        "{before:?} mappings and descriptors, then {most:?}"
    );
    let mut other = Guest::boot(&served.socket("other"), MODERN);
    assert_eq!(other.request(0, IN, 0, &[(DATA, 4096, WRITE)]), OK);
    // And so has he, when he comes again.
    drop(guest);
    let mut again = Guest::boot(&served.socket("rogue"), MODERN);
    assert_eq!(again.request(0, IN, 0, &[(DATA, 4096, WRITE)]), OK);
    let after = served.holds();
    assert!(
        after.0 <= before.0 + 32,
        "{before:?} mappings and descriptors, then {after:?}"
    );
}

/// Writes a cluster; whether that was answered, or it waits.
fn is_written(guest: &mut Guest, slot: u16, cluster: u64) -> bool {
    guest.put(0, slot, OUT, cluster * CLUSTER / 512, &[(DATA, 65536, 0)]);
    // The first that waits must be told from one that takes long; the others need only be taken.
    let limit = Duration::from_millis(if slot == 0 { 500 } else { 10 });
    let answer = guest.queues[0].wait_used(&guest.ram, limit);
    answer.is_some() && guest.status(0, slot) == OK
}

/// Without descriptors nobody else is accepted, which is said once; the others are served, and so is
/// who waits when there are some again.
#[test]
fn who_cannot_be_accepted_is_told_of_and_accepted_later() {
    let plan = Plan {
        pool_len: 16 << 20,
        cluster: CLUSTER,
        disks: vec![("one".into(), 1 << 20), ("late".into(), 1 << 20)],
        in_memory: true,
    };
    let served = Served::start(&plan, 0, &["--workers", "1"]);
    let mut one = Guest::boot(&served.socket("one"), MODERN);
    let (_, now) = served.holds();
    if let Err(error) = served.limit_descriptors(now) {
        eprintln!("skipped: prlimit: {error}");
        return;
    }
    let socket = served.socket("late");
    let boot = std::thread::Builder::new().spawn(move || Guest::boot(&socket, MODERN));
    let late = boot.expect("a thread");
    assert!(served.hear("late: a client cannot be accepted yet"));
    let before = served.cpu();
    let begin = clock::now();
    while clock::now().duration_since(begin) < Duration::from_millis(500) {
        assert_eq!(one.request(0, FLUSH, 0, &[]), OK);
        std::thread::park_timeout(Duration::from_millis(20));
    }
    let spent = served.cpu() - before;
    assert!(
        spent < Duration::from_millis(250),
        "{spent:?} of half a second"
    );
    served
        .limit_descriptors(now + 256)
        .expect("it was there before");
    let mut late = late.join().expect("it is served in the end");
    assert_eq!(late.request(0, IN, 0, &[(DATA, 4096, WRITE)]), OK);
}
