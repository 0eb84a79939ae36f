//! Rude guests and clients: each breaks its own queue or session, and another guest on the same
//! workers never notices.

use std::io::Write;
use std::os::fd::AsFd;
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tidepool::sys::clock;
use tidepool::vhost_blk::{Event, EventKind, ServerOptions};

use crate::client::{Desc, INDIRECT, NEXT, Ram, Random, Vq, WRITE, Wire, feature, req, seed};
use crate::disk::{self, Kind};
use crate::guest::{
    Bench, DATA, DISCARD, FLUSH, GPA, Guest, HEADERS, IN, IOERR, MODERN, OK, OUT, PLAIN, RAM, SOON,
    Style,
};

const SIZE: u64 = 4 << 20;

/// What is done to a session.
type Attack = fn(&mut Wire);

/// Runs `attack` on a fresh guest and checks that its queue was given up, that draining it still
/// answers, and that another guest is served as before.
fn breaks(what: &str, attack: impl FnOnce(&mut Guest)) {
    let bench = Bench::new(Kind::Memory, SIZE, false);
    let other = bench.dir.path().join("other.sock");
    let disk = disk::make(bench.dir.path(), "other", SIZE, Kind::Direct, false);
    bench.server.add(disk, &other, 4).expect("served");
    let mut bystander = Guest::boot(
        &other,
        Style {
            queues: 4,
            ..MODERN
        },
    );
    let mut guest = Guest::boot(&bench.socket, MODERN);
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
    let error = guest.watch_errors(0);
    attack(&mut guest);
    let mut fds = [nix::poll::PollFd::new(
        error.as_fd(),
        nix::poll::PollFlags::POLLIN,
    )];
    assert_eq!(
        nix::poll::poll(&mut fds, 20_000_u16),
        Ok(1),
        "{what}: no report of a broken ring"
    );
    // Given up for good: a proper request is not taken either.
    guest.put(0, 60, IN, 0, &[(DATA, 512, WRITE)]);
    for q in 0..4 {
        assert_eq!(bystander.write(q, 8, &[9; 4096]), OK, "{what}");
        assert_eq!(bystander.read(q, 8, 4096), [9; 4096], "{what}");
    }
    assert!(guest.wire.stop(0).is_some(), "{what}: draining answers");
    let stats = bench.server.stats();
    let broken = |name| {
        stats
            .iter()
            .find(|(n, _)| n == name)
            .map(|(_, s)| s.broken_queues)
    };
    assert_eq!(broken("disk"), Some(1), "{what}");
    assert_eq!(broken("other"), Some(0), "{what}");
    let events: Vec<Event> = bench.events.try_iter().collect();
    let [event] = events.as_slice() else {
        panic!("{what}: {events:?}");
    };
    assert_eq!(
        (event.disk.as_str(), event.kind),
        ("disk", EventKind::QueueBroken)
    );
    assert!(!event.reason.is_empty(), "{what}");
    // A client that starts afresh is served.
    drop(guest);
    let mut again = Guest::boot(&bench.socket, MODERN);
    assert_eq!(again.read(0, 0, 512), [1; 512], "{what}");
}

/// Makes `head` available as it is.
fn offer(guest: &mut Guest, head: u16) {
    let before = guest.queues[0].avail;
    guest.queues[0].push(&guest.ram, head);
    guest.queues[0].show(&guest.ram, before);
}

fn header(guest: &Guest) -> (u64, u32, u16) {
    guest.ram.write(HEADERS, &[0; 16]);
    (HEADERS, 16, 0)
}

#[test]
fn a_descriptor_loop() {
    breaks("loop of two", |guest| {
        guest.queues[0].set_desc(&guest.ram, 0, Desc(DATA, 16, NEXT, 1));
        guest.queues[0].set_desc(&guest.ram, 1, Desc(DATA, 16, NEXT, 0));
        offer(guest, 0);
    });
    breaks("loop on itself", |guest| {
        guest.queues[0].set_desc(&guest.ram, 5, Desc(DATA, 16, NEXT, 5));
        offer(guest, 5);
    });
}

#[test]
fn descriptors_outside_the_table() {
    breaks("head", |guest| offer(guest, 128));
    breaks("head 65535", |guest| offer(guest, u16::MAX));
    breaks("next", |guest| {
        guest.queues[0].set_desc(&guest.ram, 0, Desc(DATA, 16, NEXT, 128));
        offer(guest, 0);
    });
}

#[test]
fn buffers_outside_memory() {
    let end = GPA + RAM as u64;
    for (addr, len) in [
        (0, 512),
        (end, 512),
        (end - 511, 512),
        (u64::MAX, 512),
        (u64::MAX - 511, 512),
        (DATA, u32::MAX),
        (GPA - 1, 512),
    ] {
        breaks("buffer", |guest| {
            let header = header(guest);
            let chain = [header, (addr, len, WRITE), (HEADERS + 16, 1, WRITE)];
            guest.queues[0].submit(&guest.ram, 0, &chain);
        });
    }
}

#[test]
fn chains_that_are_no_request() {
    breaks("zero-length buffer", |guest| {
        let chain = [header(guest), (DATA, 0, WRITE), (HEADERS + 16, 1, WRITE)];
        guest.queues[0].submit(&guest.ram, 0, &chain);
    });
    breaks("nothing but zero length", |guest| {
        guest.queues[0].submit(&guest.ram, 0, &[(DATA, 0, 0)]);
    });
    breaks("no status", |guest| {
        let chain = [header(guest), (DATA, 512, 0)];
        guest.queues[0].submit(&guest.ram, 0, &chain);
    });
    breaks("short header", |guest| {
        guest.queues[0].submit(&guest.ram, 0, &[(DATA, 15, 0), (HEADERS + 16, 1, WRITE)]);
    });
    breaks("no header", |guest| {
        guest.queues[0].submit(&guest.ram, 0, &[(DATA, 512, WRITE)]);
    });
    breaks("readable after writable", |guest| {
        let chain = [
            header(guest),
            (DATA, 512, WRITE),
            (DATA, 512, 0),
            (HEADERS, 1, WRITE),
        ];
        guest.queues[0].submit(&guest.ram, 0, &chain);
    });
}

#[test]
fn indirect_tables_of_every_bad_shape() {
    let table = |len: u32, flags: u16, addr: u64| {
        move |guest: &mut Guest| {
            guest.queues[0].set_desc(&guest.ram, 0, Desc(addr, len, INDIRECT | flags, 1));
            offer(guest, 0);
        }
    };
    breaks("empty", table(0, 0, DATA));
    breaks("not a multiple of 16", table(24, 0, DATA));
    breaks("huge", table(1025 * 16, 0, DATA));
    breaks("4 GiB", table(u32::MAX - 15, 0, DATA));
    breaks("chained", table(32, NEXT, DATA));
    breaks("outside memory", table(32, 0, GPA - 16));
    breaks("nested", |guest| {
        guest.ram.write(DATA, &Desc(DATA, 16, INDIRECT, 0).bytes());
        table(16, 0, DATA)(guest);
    });
    breaks("loop inside", |guest| {
        guest.ram.write(DATA, &Desc(DATA, 16, NEXT, 1).bytes());
        guest.ram.write(DATA + 16, &Desc(DATA, 16, NEXT, 0).bytes());
        table(32, 0, DATA)(guest);
    });
    breaks("next outside", |guest| {
        guest.ram.write(DATA, &Desc(DATA, 16, NEXT, 2).bytes());
        table(32, 0, DATA)(guest);
    });
}

#[test]
fn avail_indices_that_jump() {
    for ahead in [129_u16, 1000, 0x8000, u16::MAX] {
        breaks("jump", |guest| {
            let before = guest.queues[0].avail;
            guest.queues[0].avail = before.wrapping_add(ahead);
            guest
                .ram
                .store_u16(guest.queues[0].avail_at() + 2, guest.queues[0].avail);
            guest.queues[0].kick.write(1).expect("kick");
        });
    }
}

#[test]
fn an_indirect_table_that_was_not_negotiated() {
    let bench = Bench::new(Kind::Memory, SIZE, false);
    let mut guest = Guest::boot(&bench.socket, PLAIN);
    let error = guest.watch_errors(0);
    // Nothing is acknowledged here: an answer shows that what was sent before has arrived.
    guest.wire.ask_u64(req::GET_FEATURES);
    guest.queues[0].set_desc(&guest.ram, 0, Desc(DATA, 32, INDIRECT, 0));
    offer(&mut guest, 0);
    let mut fds = [nix::poll::PollFd::new(
        error.as_fd(),
        nix::poll::PollFlags::POLLIN,
    )];
    assert_eq!(nix::poll::poll(&mut fds, 20_000_u16), Ok(1));
}

#[test]
fn an_indirect_request_is_served_whole_even_with_more_buffers_than_the_ring_has() {
    let bench = Bench::new(Kind::Direct, SIZE, false);
    let mut guest = Guest::boot(&bench.socket, Style { size: 16, ..MODERN });
    let count = 254_u16;
    let table = DATA + (1 << 20);
    let mut descs = vec![Desc(HEADERS, 16, NEXT, 1)];
    for i in 0..count {
        descs.push(Desc(DATA + u64::from(i) * 512, 512, NEXT | WRITE, i + 2));
    }
    descs.push(Desc(HEADERS + 16, 1, WRITE, 0));
    let bytes: Vec<u8> = descs.iter().flat_map(|desc| desc.bytes()).collect();
    guest.ram.write(HEADERS, &[0; 16]);
    guest.ram.write(table, &bytes);
    guest.queues[0].set_desc(&guest.ram, 3, Desc(table, bytes.len() as u32, INDIRECT, 0));
    offer(&mut guest, 3);
    assert_eq!(guest.wait(0), Some((3, u32::from(count) * 512 + 1)));
    assert_eq!(guest.ram.read(HEADERS + 16, 1), [OK]);
}

#[test]
fn garbage_rings_never_take_the_server_down() {
    let mut random = Random(seed());
    let bench = Bench::new(Kind::Memory, SIZE, false);
    let deadline = Duration::from_secs(3);
    for _ in 0..60 {
        let mut guest = Guest::boot(
            &bench.socket,
            Style {
                queues: 2,
                ..MODERN
            },
        );
        // Descriptors that are mostly plausible, at random.
        for index in 0..128 {
            let addr = if random.below(8) == 0 {
                random.next()
            } else {
                DATA + random.below(8192)
            };
            let len = if random.below(8) == 0 {
                random.next() as u32
            } else {
                random.below(600) as u32
            };
            let flags = random.below(8) as u16;
            let limit = if random.below(8) == 0 { 65536 } else { 128 };
            let next = random.below(limit) as u16;
            guest.queues[0].set_desc(&guest.ram, index, Desc(addr, len, flags, next));
        }
        let mut noise = vec![0; 16384];
        random.fill(&mut noise);
        noise.iter_mut().step_by(4).for_each(|byte| *byte %= 14);
        guest.ram.write(DATA, &noise);
        let before = guest.queues[0].avail;
        for _ in 0..random.below(128) {
            let head = random.below(130) as u16;
            guest.queues[0].push(&guest.ram, head);
        }
        guest.queues[0].show(&guest.ram, before);
        guest.queues[0].kick.write(1).expect("kick");
        // The queue beside it goes on.
        guest.put(1, 0, IN, 0, &[(DATA + (1 << 20), 512, WRITE)]);
        assert!(guest.queues[1].wait_used(&guest.ram, deadline).is_some());
        assert_eq!(guest.status(1, 0), OK);
        assert!(guest.wire.stop(0).is_some());
    }
}

#[test]
fn requests_beyond_every_limit_are_errors_not_work() {
    let bench = Bench::new(Kind::Direct, SIZE, false);
    let mut guest = Guest::boot(&bench.socket, MODERN);
    // 100 buffers of 2 MiB over the same memory: 200 MiB of data.
    let bufs = vec![(DATA, 2 << 20, WRITE); 100];
    assert_eq!(guest.request(0, IN, 0, &bufs), IOERR);
    let ranges = vec![(0, 8, 0); 65];
    assert_eq!(guest.ranges(0, 11, &ranges), IOERR);
    assert_eq!(guest.ranges(0, 13, &[(0, u32::MAX, 0)]), IOERR);
}

/// Makes writes to it block for ever. The flag belongs to the open file, whoever has taken it in.
fn jam(event: impl AsFd) {
    fcntl(&event, FcntlArg::F_SETFL(OFlag::empty())).expect("flags cleared");
    let full = (u64::MAX - 1).to_le_bytes();
    assert_eq!(nix::unistd::write(&event, &full), Ok(8));
}

#[test]
fn eventfds_that_block_hold_up_nobody() {
    let options = ServerOptions {
        workers: 1,
        ..crate::guest::options()
    };
    let bench = Bench::with(options, |dir| {
        disk::make(dir, "disk", SIZE, Kind::Memory, false)
    });
    let other = bench.dir.path().join("other.sock");
    let disk = disk::make(bench.dir.path(), "other", SIZE, Kind::Direct, false);
    bench.server.add(disk, &other, 4).expect("served");
    let mut bystander = Guest::boot(&other, MODERN);
    let mut guest = Guest::boot(&bench.socket, MODERN);
    let error = guest.watch_errors(0);
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
    let _count = guest.queues[0].call.read();
    jam(&guest.queues[0].call);
    jam(&error);
    // Its own requests are answered, and what is beyond a full counter is no loss: it calls.
    for _ in 0..100 {
        let used = guest.ram.load_u16(guest.queues[0].used_at() + 2);
        guest.put(0, 0, IN, 0, &[(DATA, 512, WRITE)]);
        let deadline = clock::now() + SOON;
        while guest.ram.load_u16(guest.queues[0].used_at() + 2) == used {
            assert!(clock::now() < deadline, "no answer");
            std::thread::yield_now();
        }
        assert_eq!(bystander.write(0, 8, &[9; 4096]), OK);
    }
    offer(&mut guest, 128);
    while bench.stats().broken_queues == 0 {
        std::thread::yield_now();
    }
    assert_eq!(bystander.read(0, 8, 4096), [9; 4096]);
    bench.server.shutdown().expect("shut down");
}

#[test]
fn memory_that_is_no_memory_is_refused_unless_asked_for() {
    for any_memory in [false, true] {
        let options = ServerOptions {
            any_memory,
            ..crate::guest::options()
        };
        let bench = Bench::with(options, |dir| {
            disk::make(dir, "disk", SIZE, Kind::Memory, false)
        });
        for slots in [false, true] {
            let file = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).expect("a file");
            if fcntl(&file, FcntlArg::F_GET_SEALS).is_ok() {
                continue; // built on tmpfs
            }
            let style = Style { slots, ..MODERN };
            let booted = Guest::try_boot_on(Ram::on(file, GPA, RAM), &bench.socket, style);
            assert_eq!(booted.is_some(), any_memory);
            if let Some(mut guest) = booted {
                assert_eq!(guest.write(0, 0, &[4; 512]), OK);
                continue;
            }
            let event = bench.events.recv_timeout(SOON).expect("it is said");
            assert_eq!(event.kind, EventKind::SessionRefused);
            let reason = event.reason;
            for words in [env!("CARGO_TARGET_TMPDIR"), "memory-backend-memfd"] {
                assert!(reason.contains(words), "{reason}");
            }
        }
        let mut guest = Guest::boot(&bench.socket, MODERN);
        assert_eq!(guest.write(0, 0, &[5; 512]), OK);
    }
}

#[test]
fn sessions_of_nonsense_end_and_the_next_client_is_served() {
    let bench = Bench::new(Kind::Memory, SIZE, false);
    let attacks: [(&str, Attack); 9] = [
        ("unknown request", |wire| {
            wire.tell(99, &[], &[]);
        }),
        ("bytes that are no message", |wire| {
            drop(wire.stream.write_all(&[0xA5; 64]));
        }),
        ("queue out of range", |wire| {
            wire.vring_state(req::SET_VRING_NUM, 4, 128);
        }),
        ("queue size not a power of two", |wire| {
            wire.vring_state(req::SET_VRING_NUM, 0, 100);
        }),
        ("features never offered", |wire| {
            wire.tell(req::SET_FEATURES, &(1_u64 << 63).to_le_bytes(), &[]);
        }),
        ("a kick that is no eventfd", |wire| {
            let (read, _write) = nix::unistd::pipe().expect("pipe");
            wire.vring_fd(req::SET_VRING_KICK, 0, read.as_fd());
        }),
        ("a region longer than its file", |wire| {
            let ram = Ram::new(GPA, RAM);
            ram.file.set_len(4096).expect("truncate");
            wire.set_mem_table(&[&ram]);
        }),
        ("overlapping regions", |wire| {
            let (a, b) = (Ram::new(GPA, RAM), Ram::new(GPA + 4096, RAM));
            wire.set_mem_table(&[&a, &b]);
        }),
        ("rings outside memory", |wire| {
            let ram = Ram::new(GPA, RAM);
            wire.tell(req::SET_FEATURES, &feature::VERSION_1.to_le_bytes(), &[]);
            wire.set_mem_table(&[&ram]);
            Vq::new(0, 128, GPA + RAM as u64, false).start(wire, &ram, false);
        }),
    ];
    for (what, attack) in attacks {
        let mut wire = Wire::connect(&bench.socket);
        attack(&mut wire);
        wire.wait_hangup();
        let mut guest = Guest::boot(&bench.socket, MODERN);
        assert_eq!(guest.read(0, 0, 512), [0; 512], "after {what}");
    }
}

#[test]
fn a_client_that_stops_in_the_middle_of_a_message_is_cut_off() {
    let bench = Bench::new(Kind::Memory, SIZE, false);
    let mut wire = Wire::connect(&bench.socket);
    wire.stream
        .write_all(&[1, 0, 0, 0, 1])
        .expect("five bytes of twelve");
    wire.wait_hangup();
    let mut guest = Guest::boot(&bench.socket, MODERN);
    assert_eq!(guest.read(0, 0, 512), [0; 512]);
}

/// Writes to a disk larger than its pool until the pool is full; the sector that did not fit.
fn fill(guest: &mut Guest) -> u64 {
    for sector in (0..).step_by(2048) {
        if guest.write(0, sector, &vec![0x77; 1 << 20]) == IOERR {
            return sector;
        }
    }
    0
}

#[test]
fn a_full_pool_is_an_error_after_the_timeout_and_space_ends_it() {
    let limit = Duration::from_millis(400);
    let options = ServerOptions {
        no_space_timeout: limit,
        ..crate::guest::options()
    };
    let bench = Bench::with(options, |dir| disk::make_tight(dir, 64 << 20));
    let mut guest = Guest::boot(&bench.socket, MODERN);
    let sector = fill(&mut guest);
    assert!(sector > 0 && sector < 64 << 11);
    let began = clock::now();
    guest.put(0, 30, OUT, sector, &[(DATA, 1 << 20, 0)]);
    // Reads and overwrites go on meanwhile.
    guest.put(0, 0, IN, 0, &[(DATA + (2 << 20), 512, WRITE)]);
    assert_eq!(guest.wait(0), Some((0, 513)));
    guest.put(0, 0, OUT, 0, &[(DATA, 4096, 0)]);
    assert_eq!(guest.wait(0), Some((0, 1)));
    assert_eq!(guest.status(0, 0), OK);
    assert_eq!(guest.wait(0), Some((30, 1)));
    assert_eq!(guest.status(0, 30), IOERR);
    assert!(began.elapsed() >= limit);
    assert!(bench.stats().parked > 0);
    assert_eq!(guest.ranges(0, 11, &[(0, 16384, 0)]), OK);
    assert_eq!(guest.request(0, 4, 0, &[]), OK);
    assert_eq!(guest.write(0, sector, &vec![0x78; 1 << 20]), OK);
}

/// A full pool on which requests wait for an hour, its guest, and the sector that did not fit.
fn full_for_an_hour() -> (Bench, Guest, u64) {
    let mut disk = None;
    let options = ServerOptions {
        no_space_timeout: Duration::from_millis(100),
        ..crate::guest::options()
    };
    let hasty = Bench::with(options, |dir| {
        disk.insert(disk::make_tight(dir, 64 << 20)).clone()
    });
    let sector = fill(&mut Guest::boot(&hasty.socket, MODERN));
    assert!(sector > 0 && sector < 64 << 11);
    hasty.server.shutdown().expect("shut down");
    let options = ServerOptions {
        no_space_timeout: Duration::from_secs(3600),
        ..crate::guest::options()
    };
    let bench = Bench::with(options, |_| disk.take().expect("a disk"));
    let guest = Guest::boot(&bench.socket, MODERN);
    (bench, guest, sector)
}

/// Starts queue 0 again at `base`, with what is in its ring since.
fn resume(guest: &mut Guest, base: u16) {
    let Guest { wire, ram, queues } = guest;
    let avail = std::mem::replace(&mut queues[0].avail, base);
    assert!(queues[0].start(wire, ram, true));
    queues[0].avail = avail;
}

#[test]
fn stopping_a_ring_leaves_out_what_waits_for_space() {
    let (bench, mut guest, sector) = full_for_an_hour();
    for i in 0..3 {
        guest.put(0, i * 8, OUT, sector, &[(DATA, 1 << 20, 0)]);
    }
    while bench.stats().parked < 3 {
        std::thread::yield_now();
    }
    for _ in 0..3 {
        assert_eq!(guest.wire.stop(0), Some(0), "as if they had not been taken");
        assert_eq!(guest.ram.load_u16(guest.queues[0].used_at() + 2), 0);
        let parked = bench.stats().parked;
        resume(&mut guest, 0);
        while bench.stats().parked == parked {
            std::thread::yield_now();
        }
    }
    // They wait on, and space ends it.
    let mut ranges = 0_u64.to_le_bytes().to_vec();
    ranges.extend(16384_u32.to_le_bytes());
    ranges.extend(0_u32.to_le_bytes());
    guest.ram.write(DATA + (2 << 20), &ranges);
    guest.put(0, 32, DISCARD, 0, &[(DATA + (2 << 20), 16, 0)]);
    let mut heads = Vec::new();
    while !heads.contains(&32) {
        heads.push(guest.wait(0).expect("an answer").0);
    }
    guest.put(0, 40, FLUSH, 0, &[]);
    while heads.len() < 5 {
        heads.push(guest.wait(0).expect("an answer").0);
    }
    heads.sort_unstable();
    assert_eq!(heads, [0, 8, 16, 32, 40]);
    for first in [0, 8, 16, 32, 40] {
        assert_eq!(guest.status(0, first), OK);
    }
}

/// Three requests on queue 0: the second is answered, the others wait for space.
fn answered_in_the_middle() -> (Bench, Guest) {
    let (bench, mut guest, sector) = full_for_an_hour();
    guest.put(0, 0, OUT, sector, &[(DATA, 1 << 20, 0)]);
    guest.put(0, 8, IN, 0, &[(DATA + (2 << 20), 512, WRITE)]);
    assert_eq!(guest.wait(0), Some((8, 513)));
    guest.put(0, 16, OUT, sector, &[(DATA, 1 << 20, 0)]);
    while bench.stats().parked < 2 {
        std::thread::yield_now();
    }
    (bench, guest)
}

#[test]
fn stopping_a_ring_fails_what_waits_for_space_before_an_answered_request() {
    let (_bench, mut guest) = answered_in_the_middle();
    // The third is left out; the first cannot be, since the second was answered.
    assert_eq!(guest.wire.stop(0), Some(2));
    assert_eq!(guest.wait(0), Some((0, 1)));
    assert_eq!(guest.status(0, 0), IOERR);
    assert_eq!(guest.ram.load_u16(guest.queues[0].used_at() + 2), 2);
    // And so it is when a ring is disabled, changed or reset.
    resume(&mut guest, 2);
    assert!(guest.wire.vring_state(req::SET_VRING_ENABLE, 0, 0));
    assert!(guest.wire.tell(req::RESET_DEVICE, &[], &[]));
}

#[test]
fn the_end_of_a_session_leaves_rings_that_can_be_gone_on_with() {
    let (bench, mut guest) = answered_in_the_middle();
    bench.server.shutdown().expect("shut down");
    guest.wire.wait_hangup();
    // A front end that comes back goes on at the used index: what is before it must have been
    // answered, whatever order that was in.
    assert_eq!(guest.ram.load_u16(guest.queues[0].used_at() + 2), 2);
    assert_eq!(guest.wait(0), Some((0, 1)));
    assert_eq!(guest.status(0, 0), IOERR);
}

#[test]
fn requests_that_wait_for_space_do_not_hold_up_the_end() {
    let options = ServerOptions {
        no_space_timeout: Duration::from_secs(5),
        ..crate::guest::options()
    };
    let bench = Bench::with(options, |dir| disk::make_tight(dir, 64 << 20));
    let mut guest = Guest::boot(&bench.socket, MODERN);
    let sector = fill(&mut guest);
    guest.put(0, 0, OUT, sector, &[(DATA, 1 << 20, 0)]);
    let soon = Duration::from_millis(100);
    assert_eq!(guest.queues[0].wait_used(&guest.ram, soon), None);
    let began = clock::now();
    drop(guest);
    bench.server.shutdown().expect("shut down");
    assert!(
        began.elapsed() < Duration::from_secs(4),
        "the parked request was waited for"
    );
}
