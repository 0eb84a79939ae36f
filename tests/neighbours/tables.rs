//! A request that waits keeps the memory table it came from. Who replaces his table after each such
//! request is ended before he has much, and his neighbours have all that they had.

use std::time::Duration;

use crate::client::{Ram, WRITE, req};
use crate::guest::{DATA, GPA, Guest, IN, MODERN, OK, OUT, Style};
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
