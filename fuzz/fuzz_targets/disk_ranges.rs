//! Any request on any disk: in range it succeeds, out of range it is refused, and both the disk and
//! a flat array agree on what it holds afterwards.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::sync::{Arc, OnceLock};
use tidepool::cowdisk::{self, Disk, NewDisk};
use tidepool::pool::{CreateOptions, OpenOptions, Pool, open};
use tidepool::storage::{SimStorage, Storage};

fn empty() -> &'static SimStorage {
    static EMPTY: OnceLock<SimStorage> = OnceLock::new();
    EMPTY.get_or_init(|| {
        let storage = SimStorage::new(16 << 20);
        open::create(&storage, &CreateOptions::new(16 << 20)).expect("an empty pool");
        storage
    })
}

fuzz_target!(|data: &[u8]| {
    let [size, rest @ ..] = data else { return };
    let storage: Arc<dyn Storage> = Arc::new(empty().crash_all_kept());
    let pool = Pool::open(storage, &OpenOptions::default()).expect("opens");
    let size = (u64::from(*size) + 1) * 512 * 3;
    cowdisk::create(&pool, &NewDisk::empty("d", size)).expect("creates");
    let disk = Disk::open(&pool, "d").expect("there");
    let mut flat = vec![0_u8; usize::try_from(size).expect("small")];
    for (n, request) in rest.chunks_exact(12).take(40).enumerate() {
        let raw = u64::from_le_bytes(*request.first_chunk().expect("8 bytes"));
        let len = u64::from(u16::from_le_bytes([request[8], request[9]])) * 64;
        let offset = if request[11] & 1 == 0 { raw % (size + 4096) / 512 * 512 } else { raw };
        let end = offset.checked_add(len).filter(|end| *end <= size);
        let is_legal = end.is_some() && offset % 512 == 0 && len % 512 == 0;
        let range = |end: u64| usize::try_from(offset).expect("small")..usize::try_from(end).expect("small");
        let value = u8::try_from(n).expect("few") + 1;
        let result = match request[10] % 4 {
            0 => disk.write_at(&vec![value; usize::try_from(len).expect("small")], offset),
            1 => disk.write_zeroes(offset, len, request[11] & 2 == 0),
            2 => disk.discard(offset, len),
            _ => {
                let mut found = vec![0xee; usize::try_from(len).expect("small")];
                let read = disk.read_at(&mut found, offset);
                if is_legal {
                    assert_eq!(found, flat[range(end.expect("legal"))]);
                }
                read
            }
        };
        assert_eq!(result.is_ok(), is_legal, "{offset}+{len} of {size}: {result:?}");
        if let Some(end) = end.filter(|_| is_legal) {
            match request[10] % 4 {
                0 => flat[range(end)].fill(value),
                1 => flat[range(end)].fill(0),
                2 => {
                    let block = u64::from(disk.block_size());
                    let first = offset.next_multiple_of(block);
                    let last = if end == size { end } else { end / block * block };
                    if first < last {
                        flat[usize::try_from(first).expect("small")..usize::try_from(last).expect("small")].fill(0);
                    }
                }
                _ => {}
            }
        }
    }
    let mut found = vec![0xee; flat.len()];
    disk.read_at(&mut found, 0).expect("reads");
    assert_eq!(found, flat);
});
