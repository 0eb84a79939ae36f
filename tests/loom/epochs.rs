//! Epochs: nothing is released while a request that began before its drop is in flight (R6).

use super::{Place, explore, spawn};
use tidepool::pool::gate::Epochs;
use tidepool::sync::{Arc, RwLock};

/// A request looks up which of two clusters a map names, and reads it; meanwhile the map is changed
/// to name the other, and the first is given to a writer as soon as the epochs say so.
///
/// Fails if `Epochs::try_advance` goes on although a shard has somebody, or if `Epochs::leave` does not
/// release: what is done with the cluster next is then not ordered after the read.
///
/// That `Epochs::enter` looks at the epoch again is not needed for this: between a drop and its second
/// epoch both counters are looked at, and the request is in one of them.
#[test]
fn a_cluster_is_not_released_under_a_request() {
    explore("epochs/request", 4, || {
        let epochs = Arc::new(Epochs::default());
        let clusters = Arc::new([Place::new(), Place::new()]);
        let map = Arc::new(RwLock::new(0_usize));
        let request = {
            let (epochs, clusters, map) =
                (Arc::clone(&epochs), Arc::clone(&clusters), Arc::clone(&map));
            spawn(move || {
                for shard in 0..2 {
                    let epoch = epochs.enter(shard);
                    let named = *map.read();
                    clusters[named].read();
                    epochs.leave(shard, epoch);
                }
            })
        };
        *map.write() = 1;
        let dropped_at = epochs.current();
        // As often as there are requests to wait for: more does not end sooner.
        for _ in 0..3 {
            if epochs.try_advance() >= dropped_at + 2 {
                clusters[0].write();
                break;
            }
        }
        request.join().expect("no panic");
        epochs.try_advance();
        epochs.try_advance();
        assert!(epochs.current() >= dropped_at + 2, "nobody is in flight");
        clusters[0].write();
    });
}
