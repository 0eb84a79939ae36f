//! Any bytes as an image: told from its ends, and as qcow2, whatever they seem to be. Refused, or
//! read to its end without a panic, each read an error or the same bytes twice.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::fs;
use tidepool::cowdisk::{self, Base};
use tidepool::format::catalogue::BaseFormat;
use tidepool::format::qcow2::{Entry, Header};

/// Bytes of a disk that are read.
const LEN_MAX: u64 = 4 << 20;

fuzz_target!(|data: &[u8]| {
    if let Ok(header) = Header::parse(data) {
        for bytes in data.chunks_exact(16).take(64) {
            let (descriptor, bitmap) = bytes.split_at(8);
            let word = |bytes: &[u8]| u64::from_be_bytes(bytes.try_into().expect("8 bytes"));
            let (descriptor, bitmap) = (word(descriptor), word(bitmap));
            for within in [0, header.cluster_len() / 2, header.cluster_len() - 1] {
                if let Ok((_, end)) = header.place(Entry { descriptor, bitmap }, within) {
                    assert!(within < end && end <= header.cluster_len());
                }
            }
        }
    }
    // A directory of its own: what the image names is looked for beside it, and there is nothing.
    let dir = std::env::temp_dir().join(format!("tidepool-fuzz-{}", std::process::id()));
    fs::create_dir_all(&dir).expect("a directory");
    let path = dir.join("image");
    fs::write(&path, data).expect("writes");
    let _ = cowdisk::probe(&path);
    let opening = Base::examine(&path, BaseFormat::Qcow2).and_then(|base| Base::open(&base));
    if let Ok(base) = opening {
        let mut parts = [vec![0; 1 << 16], vec![0; 1 << 16]];
        for at in (0..base.len().min(LEN_MAX)).step_by(1 << 16) {
            let read = parts.each_mut().map(|part| base.read_at(part, at).is_ok());
            assert_eq!(read[0], read[1]);
            assert!(!read[0] || parts[0] == parts[1]);
            if let Ok(Some((start, end))) = base.next_data(at) {
                assert!(at <= start && start < end && end <= base.len());
            }
        }
    }
});
