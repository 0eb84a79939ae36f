//! Any bytes as a superblock, as they are and under a correct checksum: an error, or a superblock
//! that encodes to what it was decoded from.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tidepool::format::crc32c;
use tidepool::format::superblock::{SUPERBLOCK_LEN, Superblock};

fuzz_target!(|data: &[u8]| {
    let _ = Superblock::decode(data);
    let mut raw = vec![0; SUPERBLOCK_LEN];
    let len = data.len().min(SUPERBLOCK_LEN);
    raw[..len].copy_from_slice(&data[..len]);
    raw[..8].copy_from_slice(b"TIDEPOOL");
    raw[12..16].fill(0);
    let crc = crc32c(*b"TPSB", &[&raw]);
    raw[12..16].copy_from_slice(&crc.to_le_bytes());
    if let Ok(superblock) = Superblock::decode(&raw) {
        let again = Superblock::decode(&superblock.encode());
        assert_eq!(again.as_ref(), Ok(&superblock));
    }
});
