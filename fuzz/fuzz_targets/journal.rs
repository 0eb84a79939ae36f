//! Any bytes as the records of a batch, under a correct header and checksum: an error, or records
//! that survive being written again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tidepool::format::crc32c;
use tidepool::format::journal::{
    BatchWriter, HEADER_LEN, Record, SLOT_LEN, Stamp, decode_batch, decode_header,
};

/// Where the checksum of a batch is in its header.
const CRC_AT: usize = 4;

fn decode(bytes: &[u8]) -> Option<Vec<Record>> {
    let header = decode_header(bytes).ok()?;
    decode_batch(&header, bytes).ok()
}

fuzz_target!(|data: &[u8]| {
    let _ = decode(data);
    let stamp = Stamp { uuid_low: 1, seq: 2, open_epoch: 3, prev_crc: 4 };
    // A batch of deletions of the right length gives the header; the data takes their place.
    let slots = (data.len() / SLOT_LEN).clamp(1, 512);
    let mut writer = BatchWriter::default();
    for _ in 0..slots {
        let disk = tidepool::format::units::DiskId(1);
        writer.push(&Record::Delete { disk }).expect("short");
    }
    let (mut bytes, _) = writer.seal(stamp);
    let len = data.len().min(slots * SLOT_LEN);
    bytes[HEADER_LEN..HEADER_LEN + len].copy_from_slice(&data[..len]);
    let at = CRC_AT;
    bytes[at..at + 4].fill(0);
    let (head, body) = bytes.split_at(HEADER_LEN);
    let crc = crc32c(*b"TPJB", &[head, body]);
    bytes[at..at + 4].copy_from_slice(&crc.to_le_bytes());
    if let Some(records) = decode(&bytes) {
        let mut writer = BatchWriter::default();
        for record in &records {
            writer.push(record).expect("it was decoded");
        }
        if !records.is_empty() {
            assert_eq!(decode(&writer.seal(stamp).0), Some(records));
        }
    }
});
