//! Bytes laid over a small valid pool, with every checksum made right again: it opens or is
//! refused, and what opens can be read and written.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::sync::{Arc, OnceLock};
use tidepool::cowdisk::{self, Disk, NewDisk};
use tidepool::format::{FormatError, crc32c};
use tidepool::format::journal::{BatchWriter, HEADER_LEN, Record, Stamp, decode_batch, decode_header};
use tidepool::format::superblock::{JOURNAL_AT, SUPERBLOCK_AT, SUPERBLOCK_LEN};
use tidepool::pool::repair::repair;
use tidepool::pool::{CreateOptions, OpenOptions, Pool, PoolError, check, open};
use tidepool::storage::{SimStorage, Storage};

const LEN: u64 = 16 << 20;

fn valid() -> &'static SimStorage {
    static VALID: OnceLock<SimStorage> = OnceLock::new();
    VALID.get_or_init(|| {
        let storage = Arc::new(SimStorage::new(LEN));
        let options = CreateOptions { uuid: [9; 16], ..CreateOptions::new(LEN) };
        open::create(&*storage, &options).expect("an empty pool");
        let store = Arc::clone(&storage) as Arc<dyn Storage>;
        let pool = Pool::open(store, &OpenOptions::default()).expect("opens");
        cowdisk::create(&pool, &NewDisk::empty("a", 1 << 20)).expect("creates");
        let a = Disk::open(&pool, "a").expect("there");
        a.write_at(&[1; 300_000], 0).expect_err("whole sectors only");
        a.write_at(&[1; 299_520], 0).expect("writes");
        cowdisk::fork(&pool, "a", &["b".to_owned()]).expect("forks");
        cowdisk::snapshot(&pool, "a", "s").expect("snapshots");
        a.write_at(&[2; 4096], 8192).expect("writes");
        a.flush().expect("flushes");
        storage.crash_all_kept()
    })
}

/// Where the checksum of a batch is in its header.
const BATCH_CRC_AT: usize = 4;

/// Makes checksums right and the chain of batches whole again.
fn reseal(storage: &SimStorage) {
    for at in SUPERBLOCK_AT {
        let mut raw = vec![0; SUPERBLOCK_LEN];
        storage.read_at(&mut raw, at).expect("reads");
        raw[12..16].fill(0);
        let crc = crc32c(*b"TPSB", &[&raw]);
        raw[12..16].copy_from_slice(&crc.to_le_bytes());
        storage.write_at(&raw, at).expect("writes");
    }
    let mut at = JOURNAL_AT;
    let mut prev = 0;
    for seq in 1.. {
        let mut block = vec![0; 4096];
        storage.read_at(&mut block, at).expect("reads");
        let Ok(header) = decode_header(&block) else { return };
        if header.len > 1 << 18 {
            return;
        }
        let mut batch = vec![0; usize::try_from(header.len).expect("small")];
        storage.read_at(&mut batch, at).expect("reads");
        let mut writer = BatchWriter::default();
        for _ in 0..header.slots {
            let disk = tidepool::format::units::DiskId(1);
            writer.push(&Record::Delete { disk }).expect("short");
        }
        let stamp = Stamp { seq, prev_crc: prev, ..header.stamp };
        let (mut sealed, _) = writer.seal(stamp);
        sealed[HEADER_LEN..].copy_from_slice(&batch[HEADER_LEN..]);
        sealed[BATCH_CRC_AT..BATCH_CRC_AT + 4].fill(0);
        let (head, body) = sealed.split_at(HEADER_LEN);
        let crc = crc32c(*b"TPJB", &[head, body]);
        sealed[BATCH_CRC_AT..BATCH_CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
        let again = decode_header(&sealed).expect("it was sealed");
        assert_eq!(again.crc, crc, "the checksum is where it should be");
        let _ = decode_batch(&again, &sealed);
        storage.write_at(&sealed, at).expect("writes");
        prev = crc;
        at += header.len;
    }
}

/// A repair does all that the check says it can, or nothing.
fn mend(storage: &SimStorage, report: &check::Report) {
    if report.faults.is_empty() {
        return;
    }
    let storage = Arc::new(storage.crash_all_kept());
    let store = Arc::clone(&storage) as Arc<dyn Storage>;
    let is_mendable = report.faults.iter().all(|fault| fault.remedy.is_some());
    let changes = storage.counters().changes();
    match repair(&store) {
        Ok(_) => {
            let left = check::check(&*store).expect("the store works").faults;
            assert!(is_mendable && left.is_empty(), "{left:?} are left of {:?}", report.faults);
        }
        Err(PoolError::Format(FormatError::Features { .. }) | PoolError::NoSpace) => {}
        Err(error) => {
            assert!(!is_mendable, "{error}, but the check said {:?}", report.faults);
            assert_eq!(storage.counters().changes(), changes, "it changed something");
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let storage = Arc::new(valid().crash_all_kept());
    // Pieces: where (3 bytes, in units of 4), how many, the bytes.
    let mut rest = data;
    while let [a, b, c, len, tail @ ..] = rest {
        let at = u64::from(u32::from_le_bytes([*a, *b, *c, 0])) * 4 % (5 << 20);
        let len = usize::from(*len % 64).min(tail.len());
        storage.write_at(&tail[..len], at).expect("inside");
        rest = &tail[len..];
    }
    reseal(&storage);
    let report = check::check(&*storage);
    if let Ok(report) = &report {
        mend(&storage, report);
    }
    let options = OpenOptions::default();
    match Pool::open(Arc::clone(&storage) as Arc<dyn Storage>, &options) {
        // A newer release's pool may be read: that is no fault.
        Err(PoolError::Format(FormatError::Features { .. })) => {}
        Err(error) => assert!(!report.is_ok_and(|report| report.faults.is_empty()), "{error}"),
        Ok(pool) => {
            for item in pool.items() {
                let Ok(disk) = Disk::open(&pool, &item.row.name) else { continue };
                let mut buf = vec![0; 4096];
                let len = disk.size().min(4096);
                disk.read_at(&mut buf[..usize::try_from(len).expect("small")], 0).expect("reads");
                let _ = disk.write_at(&[3; 512], 0);
                drop(disk);
                let _ = cowdisk::remove(&pool, &item.row.name, true);
            }
            let _ = pool.close();
        }
    }
});
