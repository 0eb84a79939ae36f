//! A disk for models of what is above.

use super::{Disk, NewDisk, create, snapshot};
use crate::pool::{CreateOptions, OpenOptions, Pool, open};
use crate::storage::{SimStorage, Storage};
use crate::sync::Arc;

/// A disk of one cluster, which holds sevens and is shared with a snapshot: every first write of a
/// part of a block needs a copy.
pub(crate) fn shared_disk() -> Disk {
    let storage: Arc<dyn Storage> = Arc::new(SimStorage::new(16 << 20));
    open::create(&*storage, &CreateOptions::new(16 << 20)).expect("an empty pool");
    let pool = Pool::open(storage, &OpenOptions::default()).expect("opens");
    create(&pool, &NewDisk::empty("d", 64 << 10)).expect("creates");
    let disk = Disk::open(&pool, "d").expect("there");
    disk.write_at(&[7; 64 << 10], 0).expect("writes");
    snapshot(&pool, "d", "then").expect("snapshots");
    disk
}
