//! Goal: what a guest can make the server hold has a bound, whatever shape its requests have.
//! Method: guests that ask for as much as their rings can carry, while somebody watches what the
//! process takes.

use std::time::Duration;

use crate::client::{Ram, Random, WRITE, seed};
use crate::disk::{self, Kind};
use crate::guest::{Bench, DATA, GPA, Guest, IN, MODERN, OK, OUT, options};

/// Bytes of memory that this process has now.
pub fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("procfs");
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1));
    kib.and_then(|kib| kib.parse::<u64>().ok()).expect("a size") << 10
}

/// Bytes of the largest request here, in more buffers than one system call takes.
const HUGE: u32 = 1021 * 32256 + 512;

/// 1021 buffers of 32256 bytes at every 32 KiB from `at`, and one of 512.
fn shreds(at: u64, flags: u16) -> Vec<(u64, u32, u16)> {
    let mut bufs: Vec<_> = (0..1021).map(|i| (at + i * 0x8000, 32256, flags)).collect();
    bufs.push((at + 1021 * 0x8000, 512, flags));
    bufs
}

#[test]
fn requests_of_many_buffers_take_no_memory_of_ours() {
    for skew in [0, 8] {
        let options = tidepool::vhost_blk::ServerOptions {
            workers: 1,
            ..options()
        };
        let bench = Bench::with(options, |dir| {
            disk::make(dir, "disk", 40 << 20, Kind::Direct, false)
        });
        let ram = Ram::new(GPA, 64 << 20);
        let mut guest = Guest::try_boot_on(ram, &bench.socket, MODERN).expect("accepted");
        let mut random = Random(seed());
        let mut bytes = vec![0; HUGE as usize];
        random.fill(&mut bytes);
        let from = shreds(DATA, 0);
        let mut done = 0;
        for (addr, len, _) in &from {
            guest.ram.write(*addr, &bytes[done..done + *len as usize]);
            done += *len as usize;
        }
        guest.put_indirect(0, 0, OUT, 8, &from);
        assert_eq!(guest.wait(0), Some((0, 1)));
        assert_eq!(guest.status(0, 0), OK);
        // All of them into the same buffers, which only the device has to know.
        let before = resident();
        let into = shreds(DATA + skew, WRITE);
        for slot in 0..32 {
            guest.put_indirect(0, slot, IN, 8, &into);
        }
        let mut peak = before;
        for _ in 0..32 {
            while guest.queues[0]
                .wait_used(&guest.ram, Duration::from_millis(5))
                .is_none()
            {
                peak = peak.max(resident());
            }
        }
        let got: Vec<u8> = into
            .iter()
            .flat_map(|(addr, len, _)| guest.ram.read(*addr, *len as usize))
            .collect();
        assert!(got == bytes, "skew {skew}");
        assert!((0..32).all(|slot| guest.status(0, slot) == OK));
        let grown = peak.saturating_sub(before) >> 20;
        assert!(
            grown < 500,
            "{grown} MiB for 1 GiB of requests, skew {skew}"
        );
    }
}
