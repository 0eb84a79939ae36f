//! Lines as a dump: refused without a trace, or restored to a pool without a fault.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::sync::Arc;
use tidepool::pool::check::check;
use tidepool::pool::restore::{Dump, Unknown};
use tidepool::pool::{OpenOptions, Pool};
use tidepool::storage::{SimStorage, Storage};

/// Larger pools than this are not restored: their journals alone take time to clear.
const LEN_MAX: u64 = 32 << 20;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let mut dump = Dump::default();
    if text.lines().any(|line| dump.line(line).is_err()) {
        return;
    }
    let len = dump.pool_len();
    if len == 0 || len > LEN_MAX {
        return;
    }
    let storage: Arc<dyn Storage> = Arc::new(SimStorage::new(len));
    if dump.restore(&storage, Unknown::Accepted).is_ok() {
        let report = check(&*storage).expect("the store works");
        // A snapshot stays when its disk is not in the dump, and `check` says so.
        let is_lone = |what: &str| what.starts_with("snapshot `") && what.contains("has no disk");
        let is_sound = report.faults.iter().all(|fault| is_lone(&fault.what));
        assert!(is_sound, "{:?}", report.faults);
        let pool = Pool::open(Arc::clone(&storage), &OpenOptions::default()).expect("opens");
        pool.close().expect("closes");
    }
});
