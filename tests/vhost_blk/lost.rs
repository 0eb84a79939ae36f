//! Clients that take away memory they had shared: each loses its own session, and a guest of
//! another disk on the same worker never notices.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use tidepool::vhost_blk::{DiskStats, ServerOptions};

use crate::client::{Ram, Random, WRITE, seed};
use crate::disk::{self, Kind};
use crate::guest::{Bench, DATA, GPA, Guest, IN, MODERN, OK, OUT, RAM, Style};

const SIZE: u64 = 16 << 20;

fn stats(bench: &Bench, name: &str) -> DiskStats {
    let all = bench.server.stats();
    let found = all.into_iter().find(|(n, _)| n == name);
    found.expect("the disk is served").1
}

/// Writes and verifies at random until told to stop; says how often.
fn verify(socket: &Path, seed: u64, is_over: Arc<AtomicBool>) -> JoinHandle<u64> {
    let mut guest = Guest::boot(socket, MODERN);
    let mut random = Random(seed);
    let verify = move || {
        let mut rounds = 0;
        while !is_over.load(Ordering::SeqCst) {
            let mut bytes = vec![0; 8192];
            random.fill(&mut bytes);
            let sector = random.below(SIZE / 512 - 16);
            assert_eq!(guest.write(0, sector, &bytes), OK);
            assert!(guest.read(0, sector, bytes.len()) == bytes);
            rounds += 1;
        }
        rounds
    };
    std::thread::Builder::new().spawn(verify).expect("a thread")
}

/// Shrinks the memory of busy guests of a disk on `kind` to `left` bytes, over and over.
fn take_away(kind: Kind, left: u64) {
    let mut random = Random(seed());
    let options = ServerOptions {
        workers: 1,
        ..crate::guest::options()
    };
    let bench = Bench::with(options, |dir| disk::make(dir, "disk", SIZE, kind, false));
    let other = bench.dir.path().join("other.sock");
    let disk = disk::make(bench.dir.path(), "other", SIZE, kind, false);
    bench.server.add(disk, &other, 4).expect("served");
    let is_over = Arc::new(AtomicBool::new(false));
    let bystander = verify(&other, random.next(), Arc::clone(&is_over));
    let rounds = 20;
    for _ in 0..rounds {
        let style = Style {
            queues: 2,
            ..MODERN
        };
        let ram = Ram::new_unsealable(GPA, RAM);
        let mut guest = Guest::try_boot_on(ram, &bench.socket, style).expect("accepted");
        // Into the first half of the disk, so that the second stays without clusters.
        for i in 0..40 {
            let addr = DATA + u64::from(i) * 32768;
            for q in 0..2 {
                let (op, flags) = if i % 2 == 0 { (OUT, 0) } else { (IN, WRITE) };
                guest.put(q, i * 3, op, u64::from(i) * 64, &[(addr, 32768, flags)]);
            }
        }
        for _ in 0..random.below(200) {
            std::thread::yield_now();
        }
        guest.ram.file.set_len(left).expect("truncate");
        if left > 0 {
            // The rings are there, the data is not: zeros that we write, not the kernel.
            let sector = SIZE / 512 - 64;
            guest.put(0, 123, IN, sector, &[(DATA, 32768, WRITE)]);
        }
        // From here on the guest itself must not touch what is gone.
        guest.queues[0].kick.write(1).expect("kick");
        guest.wire.wait_hangup();
    }
    is_over.store(true, Ordering::SeqCst);
    let verified = bystander.join().expect("the bystander saw nothing");
    assert!(verified > 0);
    assert_eq!(stats(&bench, "disk").lost_sessions, rounds);
    assert_eq!(stats(&bench, "other").lost_sessions, 0);
    assert_eq!(stats(&bench, "other").broken_queues, 0);
    let mut again = Guest::boot(&bench.socket, MODERN);
    assert_eq!(again.write(0, 0, &[5; 4096]), OK);
    assert_eq!(again.read(0, 0, 4096), [5; 4096]);
}

#[test]
fn memory_that_goes_under_load_ends_its_session_only() {
    for kind in [Kind::Direct, Kind::Buffered, Kind::Memory] {
        take_away(kind, 0);
    }
}

#[test]
fn data_that_goes_while_the_rings_stay_ends_its_session_only() {
    for kind in [Kind::Direct, Kind::Memory] {
        take_away(kind, DATA - GPA);
    }
}

#[test]
fn memory_that_is_gone_before_a_ring_starts_ends_the_session() {
    let bench = Bench::new(Kind::Memory, SIZE, false);
    let ram = Ram::new_unsealable(GPA, RAM);
    let style = Style {
        queues: 0,
        ..MODERN
    };
    let mut guest = Guest::try_boot_on(ram, &bench.socket, style).expect("accepted");
    guest.ram.file.set_len(0).expect("truncate");
    let vq = crate::client::Vq::new(0, 128, GPA, true);
    vq.start(&mut guest.wire, &guest.ram, true);
    guest.wire.wait_hangup();
    assert_eq!(bench.stats().lost_sessions, 1);
    let mut again = Guest::boot(&bench.socket, MODERN);
    assert_eq!(again.read(0, 0, 512), [0; 512]);
}
