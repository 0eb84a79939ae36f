//! A host that runs out of what a server needs: space, descriptors.

use std::time::Duration;

use tidepool::vhost_blk::{Event, EventKind, ServerOptions};

use crate::disk;
use crate::guest::{Bench, DATA, Guest, IOERR, MODERN, OK, OUT};
use crate::small::Small;

#[test]
fn a_host_without_space_is_waited_for_and_not_for_ever() {
    let Some(small) = Small::mount("a_host_without_space_is_waited_for_and_not_for_ever") else {
        return;
    };
    let options = ServerOptions {
        no_space_timeout: Duration::from_secs(2),
        ..crate::guest::options()
    };
    let disk = disk::make_on(small.path(), 48 << 20);
    let bench = Bench::with(options, |_| disk.clone());
    let mut guest = Guest::boot(&bench.socket, MODERN);
    // The pool has space, the file system under it has none.
    let mut sector = 0;
    while guest.request(0, OUT, sector, &[(DATA, 1 << 20, 0)]) == OK {
        sector += 2048;
        assert!(sector < 48 << 11, "the host has 24 MiB");
    }
    assert_eq!(guest.status(0, 0), IOERR);
    // It was said while something could be done about it.
    let told: Vec<Event> = bench.events.try_iter().collect();
    let kinds: Vec<EventKind> = told.iter().map(|event| event.kind).collect();
    assert_eq!(
        kinds,
        [EventKind::SpaceAwaited, EventKind::RequestFailed],
        "{told:?}"
    );
    assert!(told[0].reason.contains("host"), "{told:?}");
    // And what waits goes on when there is space.
    guest.put(0, 0, OUT, sector, &[(DATA, 1 << 20, 0)]);
    assert_eq!(
        guest.queues[0].wait_used(&guest.ram, Duration::from_millis(200)),
        None
    );
    disk.discard(0, 8 << 20).expect("discarded");
    disk.pool().trim().expect("given back to the host");
    assert_eq!(guest.wait(0).map(|(head, _)| head), Some(0));
    assert_eq!(guest.status(0, 0), OK);
}
