//! Any rings and descriptors: the walk ends, every chain is within its bounds, and every request
//! that is accepted lies on the disk.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;
use tidepool::sys::mmap::{GuestMemory, Region};
use tidepool::virtio::blk::{Op, Request, Status};
use tidepool::virtio::queue::{CHAIN_DESCS_MAX, Chain, QueueFeatures, RingAddresses, SplitQueue};

/// Guest memory, in two regions with a hole between them.
const LEN: u64 = 64 << 10;
const SECOND: u64 = 1 << 20;
/// Bytes of the disk.
const DISK: u64 = 1 << 20;

fn memory() -> &'static (File, GuestMemory) {
    static MEMORY: OnceLock<(File, GuestMemory)> = OnceLock::new();
    MEMORY.get_or_init(|| {
        let file = File::from(memfd_create(c"guest", MFdFlags::empty()).expect("a memfd"));
        file.set_len(2 * LEN).expect("grows");
        let region = |gpa, offset| {
            let file = file.try_clone().expect("a descriptor");
            Region::map(file, gpa, LEN, gpa, offset).expect("maps")
        };
        let regions = vec![region(0, 0), region(SECOND, LEN)];
        let memory = GuestMemory::new(regions).expect("apart");
        (file, memory)
    })
}

fuzz_target!(|data: &[u8]| {
    let [log2, bits, next_low, next_high, rest @ ..] = data else { return };
    let (file, memory) = memory();
    file.write_all_at(&[0; 2 * LEN as usize], 0).expect("writes");
    let features = QueueFeatures { event_idx: bits & 1 == 1, indirect: bits & 2 == 2 };
    let rings = RingAddresses { desc: 0, avail: 0x4000, used: 0x6000 };
    let size = 1 << (log2 % 9);
    // The used index: where the queue goes on.
    file.write_all_at(&[*next_low, *next_high], rings.used + 2).expect("inside");
    // Pieces: where, how many, the bytes.
    let mut rest = rest;
    while let [a, b, c, len, tail @ ..] = rest {
        let at = u64::from(u32::from_le_bytes([*a, *b, *c, 0])) % (2 * LEN - 64);
        let len = usize::from(*len % 64).min(tail.len());
        file.write_all_at(&tail[..len], at).expect("inside");
        rest = &tail[len..];
    }
    let Ok(mut queue) = SplitQueue::new(memory, size, rings, features) else { return };
    let (mut chain, mut request) = (Chain::default(), Request::default());
    for _ in 0..2 * size {
        match queue.pop(memory, &mut chain) {
            Ok(true) => {}
            Ok(false) => match queue.arm() {
                Ok(true) => continue,
                Ok(false) | Err(_) => break,
            },
            Err(_) => break,
        }
        assert!(chain.head < size, "a head beyond the queue");
        let buffers = chain.readable.len() + chain.writable.len();
        assert!(buffers <= 2 * usize::from(CHAIN_DESCS_MAX), "{buffers} buffers");
        match request.parse(memory, &mut chain, DISK) {
            Err(_) => break,
            Ok(Err(status)) => request.answer(memory, status),
            Ok(Ok(())) => {
                if matches!(request.op, Op::In | Op::Out) {
                    let end = request.offset.checked_add(u64::from(request.len));
                    assert!(end.is_some_and(|end| end <= DISK));
                    let bytes: u64 = request.data.iter().map(|run| u64::from(run.len())).sum();
                    assert_eq!(bytes, u64::from(request.len));
                }
                for range in &request.ranges {
                    let end = range.offset.checked_add(range.len);
                    assert!(end.is_some_and(|end| end <= DISK));
                }
                request.answer(memory, Status::Ok);
            }
        }
        queue.push_used(chain.head, request.used_len);
        let _ = queue.publish();
    }
});
