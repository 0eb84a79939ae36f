//! A client that is not ours: the crate virtio-driver, which wants REPLY_ACK, CONFIG and memory
//! slots, and three ring slots a request.

use std::os::fd::AsRawFd;
use std::time::Duration;

use virtio_driver::{
    VhostUser, VirtioBlkConfig, VirtioBlkQueue, VirtioBlkReqBuf, VirtioBlkTransport,
    VirtioFeatureFlags,
};

use crate::client::{Ram, Random, feature, seed};
use crate::disk::Kind;
use crate::guest::Bench;

const SIZE: u64 = 8 << 20;
const DEPTH: usize = 16;
const BYTES: usize = 16384;

/// Waits until `count` requests are done; all must have succeeded.
fn finish(queue: &mut VirtioBlkQueue<'_, usize>, mut count: usize) {
    let deadline = tidepool::sys::clock::now() + Duration::from_secs(20);
    while count > 0 {
        assert!(
            tidepool::sys::clock::now() < deadline,
            "{count} requests are missing"
        );
        for done in queue.completions() {
            assert_eq!(done.ret, 0, "request {}", done.context);
            count -= 1;
        }
        std::thread::yield_now();
    }
}

#[test]
fn a_foreign_driver_reads_what_it_wrote() {
    let mut random = Random(seed());
    for kind in [Kind::Direct, Kind::Buffered, Kind::Memory] {
        let bench = Bench::new(kind, SIZE, false);
        let wanted = VirtioFeatureFlags::VERSION_1.bits()
            | VirtioFeatureFlags::RING_EVENT_IDX.bits()
            | feature::FLUSH
            | feature::MQ;
        let path = bench.socket.to_str().expect("a plain path");
        let transport = VhostUser::<VirtioBlkConfig, VirtioBlkReqBuf>::new(path, wanted);
        let mut transport: Box<VirtioBlkTransport> = Box::new(transport.expect("connected"));
        let config = transport.get_config().expect("a configuration");
        assert_eq!(u64::from(config.capacity), SIZE / 512);
        let mut queues =
            VirtioBlkQueue::<usize>::setup_queues(&mut *transport, 2, 128).expect("queues");
        let ram = Ram::new(0, 2 * DEPTH * BYTES);
        let base = ram.map.as_ptr();
        let fd = ram.file.as_raw_fd();
        transport
            .map_mem_region(base.addr(), ram.map.size(), fd, 0)
            .expect("memory is mapped");
        let kick = transport.get_submission_notifier(1);
        let queue = &mut queues[1];
        let mut data = vec![0; DEPTH * BYTES];
        random.fill(&mut data);
        ram.write(0, &data);
        for (index, is_write) in (0..DEPTH)
            .map(|i| (i, true))
            .chain((0..DEPTH).map(|i| (i, false)))
        {
            let offset = u64::try_from(index * BYTES).expect("small");
            let at = base.wrapping_add(index * BYTES);
            #[expect(unsafe_code, reason = "the driver takes raw addresses")]
            let queued = if is_write {
                // SAFETY: the address lies in `ram`, which outlives the queue's use of it.
                unsafe { queue.write_raw(offset, at, BYTES, index) }
            } else {
                let at = at.wrapping_add(DEPTH * BYTES);
                // SAFETY: as above.
                unsafe { queue.read_raw(offset, at, BYTES, index) }
            };
            queued.expect("there is room");
            if index == DEPTH - 1 {
                kick.notify().expect("kick");
                finish(queue, DEPTH);
            }
        }
        queue.flush(0).expect("there is room");
        kick.notify().expect("kick");
        finish(queue, 1);
        let got = ram.read(u64::try_from(DEPTH * BYTES).expect("small"), DEPTH * BYTES);
        assert!(got == data, "{kind:?}");
    }
}
