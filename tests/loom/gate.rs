//! The gate of a disk: whoever drains it has it alone (R7), and nobody waits for ever.

use super::{Place, explore, spawn, waker};
use std::task::Waker;
use tidepool::pool::gate::Gate;
use tidepool::sync::{Arc, park};

/// Two requests and a drainer. What is done inside is never at once with what the drainer does.
///
/// Fails if `Gate::enter` looks at `is_closed` with less than sequential consistency: the request is
/// in, and the drainer found nobody. Fails if `Gate::leave` notifies without having had the lock: the
/// drainer looks, is overtaken, and sleeps for ever.
#[test]
fn a_drained_gate_is_empty() {
    explore("gate/drained", 3, || {
        let shared = Arc::new((Gate::default(), Place::new()));
        let request = |shard: usize| {
            let shared = Arc::clone(&shared);
            spawn(move || {
                let (gate, place) = &*shared;
                if gate.enter(shard, Waker::noop()) {
                    place.read();
                    gate.leave(shard);
                }
            })
        };
        let requests = [request(0), request(1)];
        let (gate, place) = &*shared;
        gate.close();
        place.write();
        gate.open();
        for request in requests {
            request.join().expect("no panic");
        }
        assert!(gate.enter(0, Waker::noop()), "it is open again");
    });
}

/// A request comes again and again until it is let in, asleep in between.
///
/// Fails if `Gate::enter` pushes its waker without looking again with the lock held: the gate was
/// opened in between, and nobody wakes it any more.
#[test]
fn who_is_turned_away_is_woken() {
    explore("gate/woken", 5, || {
        let gate = Arc::new(Gate::default());
        let request = {
            let gate = Arc::clone(&gate);
            spawn(move || {
                let waker = waker();
                while !gate.enter(0, &waker) {
                    park();
                }
                gate.leave(0);
            })
        };
        gate.close();
        gate.open();
        gate.close();
        gate.open();
        request.join().expect("no panic");
    });
}
