//! Free clusters: nobody waits for what is there, and nothing is promised that is not.

use super::{explore, spawn, waker};
use tidepool::pool::space::{Purpose, Space};
use tidepool::sync::{Arc, park};

/// A request finds the pool full, asks to be woken, and sleeps, while the last cluster of somebody
/// else comes back.
///
/// Fails if `Space::wait_for_space` does not look again once its waker is there.
#[test]
fn who_waits_for_space_is_woken() {
    explore("space/woken", 8, || {
        let space = Arc::new(Space::new());
        let full = Arc::clone(&space);
        let giver = spawn(move || full.give_back(7..8, true).wake());
        let waker = waker();
        let taken = loop {
            match space.take(1, Purpose::Data) {
                Ok(taken) => break taken,
                Err(_full) => {
                    space.wait_for_space(Purpose::Data, &waker);
                    park();
                }
            }
        };
        assert_eq!(taken.clusters, 7..8);
        giver.join().expect("no panic");
    });
}

/// A reserve is made while a write takes clusters.
///
/// Fails if `Space::try_reserve` lets go of the lock between its look and its change.
#[test]
fn what_is_reserved_is_free() {
    explore("space/reserve", 8, || {
        let space = Arc::new(Space::new());
        space.add_clean(10..14);
        let other = Arc::clone(&space);
        let writer = spawn(move || {
            let first = other.take(1, Purpose::Data).is_ok();
            let second = other.take(1, Purpose::Data).is_ok();
            u32::from(first) + u32::from(second)
        });
        let is_reserved = space.try_reserve(3).is_ok();
        let taken = writer.join().expect("no panic");
        let usage = space.usage();
        assert_eq!(usage.clean, 4 - taken);
        assert_eq!(usage.reserved, if is_reserved { 3 } else { 0 });
        assert!(usage.clean >= usage.reserved, "{usage:?}");
    });
}
