//! Sessions: negotiation, configuration, reconnects, memory tables, draining, sockets.

use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use tidepool::sys::clock;
use tidepool::vhost_blk::{ServeError, Server};

use crate::client::{Ram, Random, WRITE, feature, req, seed};
use crate::disk::{self, Kind};
use crate::guest::{Bench, DATA, GPA, Guest, IN, MODERN, OK, OUT, PLAIN, RAM, Style, options};

const SIZE: u64 = 8 << 20;

#[test]
fn the_configuration_space_can_be_read_in_any_size() {
    let bench = Bench::new(Kind::Memory, SIZE, false);
    let mut guest = Guest::boot(&bench.socket, MODERN);
    let whole = guest.wire.config(0, 60).expect("config");
    let word = |at: usize| u32::from_le_bytes(whole[at..at + 4].try_into().expect("4 bytes"));
    assert_eq!(u64::from(word(0)), SIZE / 512);
    assert!(word(12) >= 254, "seg_max");
    assert_eq!(word(20), 512, "blk_size");
    assert_eq!(whole[24], 3, "a physical block is 8 sectors");
    assert_eq!(word(28), 128, "opt_io_size is a cluster");
    assert_eq!(whole[32], 1, "writeback");
    assert_eq!(whole[34..36], [4, 0], "num_queues");
    assert_eq!(guest.wire.config(0, 8).expect("short"), whole[..8]);
    assert_eq!(guest.wire.config(20, 4).expect("inside"), whole[20..24]);
    let long = guest.wire.config(0, 256).expect("long");
    assert_eq!(long[..60], whole[..]);
    assert_eq!(long[60..], [0; 196]);
    assert_eq!(guest.wire.ask_u64(req::GET_QUEUE_NUM), 4);
    assert!(guest.wire.ask_u64(req::GET_MAX_MEM_SLOTS) >= 32);
}

#[test]
fn a_client_may_come_back_fifty_times() {
    let bench = Bench::new(Kind::Direct, SIZE, false);
    for round in 0..50_u8 {
        let style = if round % 2 == 0 { MODERN } else { PLAIN };
        let mut guest = Guest::boot(&bench.socket, style);
        if round > 0 {
            assert_eq!(guest.read(0, 16, 4096), [round - 1; 4096]);
        }
        assert_eq!(guest.write(0, 16, &[round; 4096]), OK);
    }
}

#[test]
fn clients_that_die_with_requests_in_flight_do_no_harm() {
    for (kind, trouble) in [
        (Kind::Direct, false),
        (Kind::Direct, true),
        (Kind::Memory, true),
    ] {
        let bench = Bench::new(kind, SIZE, trouble);
        for _ in 0..20 {
            let mut guest = Guest::boot(
                &bench.socket,
                Style {
                    queues: 4,
                    ..MODERN
                },
            );
            for q in 0..4 {
                for i in 0..40 {
                    let addr = DATA + u64::from(i) * 65536;
                    let (op, flags) = if i % 2 == 0 { (OUT, 0) } else { (IN, WRITE) };
                    guest.put(q, i * 3, op, u64::from(i) * 64, &[(addr, 32768, flags)]);
                }
            }
        }
        let mut guest = Guest::boot(&bench.socket, MODERN);
        assert_eq!(guest.write(0, 0, &[6; 512]), OK);
        assert_eq!(guest.read(0, 0, 512), [6; 512]);
    }
}

#[test]
fn stopping_a_ring_drains_it() {
    for (kind, trouble) in [
        (Kind::Direct, false),
        (Kind::Direct, true),
        (Kind::Buffered, false),
    ] {
        let bench = Bench::new(kind, SIZE, trouble);
        let mut guest = Guest::boot(&bench.socket, MODERN);
        for round in 1..=20_u16 {
            guest.put_writes(0, 16384);
            let base = guest.wire.stop(0).expect("an answer");
            // Whatever was taken is done: used has caught up with the base.
            let used = guest.ram.load_u16(guest.queues[0].used_at() + 2);
            assert_eq!(base, used, "{kind:?}");
            let vq = &guest.queues[0];
            let left = vq.avail.wrapping_sub(base);
            assert!(left <= 40);
            // It goes on where it stopped.
            let avail = guest.queues[0].avail;
            guest.queues[0].avail = base;
            let Guest {
                wire, ram, queues, ..
            } = &mut guest;
            assert!(queues[0].start(wire, ram, true));
            guest.queues[0].avail = avail;
            for _ in 0..40 {
                guest.wait(0).expect("an answer");
            }
            assert_eq!(guest.queues[0].used, round * 40);
        }
    }
}

#[test]
fn a_disabled_ring_rests_and_goes_on_when_enabled() {
    let bench = Bench::new(Kind::Memory, SIZE, false);
    let mut guest = Guest::boot(&bench.socket, MODERN);
    assert_eq!(guest.write(0, 0, &[4; 512]), OK);
    assert!(guest.wire.vring_state(req::SET_VRING_ENABLE, 0, 0));
    guest.put(0, 0, IN, 0, &[(DATA + 4096, 512, WRITE)]);
    assert_eq!(
        guest.queues[0].wait_used(&guest.ram, Duration::from_millis(50)),
        None
    );
    assert!(guest.wire.vring_state(req::SET_VRING_ENABLE, 0, 1));
    assert!(guest.wait(0).is_some());
    assert_eq!(guest.ram.read(DATA + 4096, 512), [4; 512]);
}

#[test]
fn memory_may_come_and_go_during_requests() {
    let mut random = Random(seed());
    for kind in [Kind::Direct, Kind::Memory] {
        let bench = Bench::new(kind, SIZE, false);
        let mut guest = Guest::boot(&bench.socket, MODERN);
        let pattern: Vec<u8> = (0..65536_u32).map(|at| (at / 512) as u8).collect();
        assert_eq!(guest.write(0, 0, &pattern), OK);
        for round in 0..60_u64 {
            let extra = Ram::new(0x1_0000_0000 + round * 0x100_0000, 1 << 20);
            assert!(guest.wire.mem_region(req::ADD_MEM_REG, &extra));
            for i in 0..16 {
                let addr = extra.gpa + u64::from(i) * 65536;
                guest.put(0, i * 3, IN, 0, &[(addr, 65536, WRITE)]);
            }
            if random.below(2) == 0 {
                // With some of them in flight: they finish in the memory they began with.
                assert!(guest.wire.mem_region(req::REM_MEM_REG, &extra));
                // What was not taken before now names memory that is gone.
                let mut done = 0;
                while guest.queues[0]
                    .wait_used(&guest.ram, Duration::from_millis(20))
                    .is_some()
                {
                    done += 1;
                }
                assert!(done <= 16);
                guest = Guest::boot_after(guest, &bench.socket);
                continue;
            }
            for _ in 0..16 {
                let (head, _) = guest.wait(0).expect("an answer");
                assert_eq!(guest.status(0, head as u16), OK);
                let addr = extra.gpa + u64::from(head / 3) * 65536;
                assert!(extra.read(addr, 65536) == pattern);
            }
            assert!(guest.wire.mem_region(req::REM_MEM_REG, &extra));
        }
    }
}

#[test]
fn a_memory_table_may_be_replaced_under_running_rings() {
    let bench = Bench::new(Kind::Direct, SIZE, false);
    let mut guest = Guest::boot(
        &bench.socket,
        Style {
            slots: false,
            queues: 2,
            ..MODERN
        },
    );
    assert_eq!(guest.write(1, 0, &[8; 4096]), OK);
    for round in 0..30_u64 {
        let extra = Ram::new(0x1_0000_0000, 1 << 20);
        for q in 0..2 {
            guest.put(q, 0, IN, 0, &[(DATA + round * 4096, 4096, WRITE)]);
        }
        let Guest { wire, ram, .. } = &mut guest;
        assert!(wire.set_mem_table(&[ram, &extra]));
        for q in 0..2 {
            assert!(guest.wait(q).is_some());
        }
        guest.put(0, 3, IN, 0, &[(extra.gpa, 4096, WRITE)]);
        assert_eq!(guest.wait(0).map(|(head, _)| head), Some(3));
        assert_eq!(extra.read(extra.gpa, 4096), [8; 4096]);
    }
}

#[test]
fn a_buffer_may_span_adjoining_regions() {
    let bench = Bench::new(Kind::Direct, SIZE, false);
    let mut guest = Guest::boot(&bench.socket, MODERN);
    let next = Ram::new(GPA + RAM as u64, 1 << 20);
    assert!(guest.wire.mem_region(req::ADD_MEM_REG, &next));
    assert_eq!(guest.write(0, 0, &[0x3C; 8192]), OK);
    let at = next.gpa - 1536;
    guest.put(0, 0, IN, 0, &[(at, 8192, WRITE)]);
    assert!(guest.wait(0).is_some());
    assert_eq!(guest.status(0, 0), OK);
    assert_eq!(guest.ram.read(at, 1536), [0x3C; 1536]);
    assert_eq!(next.read(next.gpa, 8192 - 1536), [0x3C; 8192 - 1536]);
}

#[test]
fn calls_obey_what_the_driver_asked_for() {
    let bench = Bench::new(Kind::Memory, SIZE, false);
    for features in [feature::VERSION_1, feature::VERSION_1 | feature::EVENT_IDX] {
        let mut guest = Guest::boot(&bench.socket, Style { features, ..MODERN });
        assert_eq!(guest.write(0, 0, &[1; 512]), OK);
        let _count = guest.queues[0].call.read();
        let vq = &guest.queues[0];
        if features & feature::EVENT_IDX != 0 {
            // Far ahead: do not call.
            guest
                .ram
                .store_u16(vq.avail_at() + 4 + 256, vq.used.wrapping_add(1000));
        } else {
            guest.ram.store_u16(vq.avail_at(), 1);
        }
        guest.put(0, 0, IN, 0, &[(DATA, 512, WRITE)]);
        let used_at = guest.queues[0].used_at() + 2;
        let wanted = guest.queues[0].used.wrapping_add(1);
        while guest.ram.load_u16(used_at) != wanted {
            std::thread::yield_now();
        }
        // The call would have been made right after the index was stored: stopping comes later.
        assert!(guest.wire.stop(0).is_some());
        assert!(
            guest.queues[0].call.read().is_err(),
            "no call was asked for"
        );
    }
}

#[test]
fn a_reset_device_starts_again_in_the_same_session() {
    let bench = Bench::new(Kind::Memory, SIZE, false);
    let mut guest = Guest::boot(&bench.socket, MODERN);
    assert_eq!(guest.write(0, 0, &[2; 512]), OK);
    assert!(guest.wire.set_config(32, &[0]));
    assert!(guest.wire.tell(req::RESET_DEVICE, &[], &[]));
    let Guest {
        wire, ram, queues, ..
    } = &mut guest;
    assert!(queues[0].start(wire, ram, true));
    assert_eq!(guest.read(0, 0, 512), [2; 512]);
}

#[test]
fn a_write_cache_that_was_turned_off_stays_off() {
    let bench = Bench::new(Kind::Memory, SIZE, false);
    let mut guest = Guest::boot(&bench.socket, MODERN);
    assert!(guest.wire.set_config(32, &[0]));
    // QEMU asks once in its life, and its guest goes by that whatever happens to us meanwhile.
    assert!(guest.wire.tell(req::RESET_DEVICE, &[], &[]));
    assert_eq!(guest.wire.config(32, 1), Some(vec![0]));
    let mut guest = Guest::boot_after(guest, &bench.socket);
    assert_eq!(guest.wire.config(32, 1), Some(vec![0]));
    assert!(guest.wire.set_config(32, &[1]));
    assert_eq!(guest.wire.config(32, 1), Some(vec![1]));
}

#[test]
fn a_new_call_descriptor_is_used_at_once() {
    let bench = Bench::new(Kind::Memory, SIZE, false);
    let mut guest = Guest::boot(&bench.socket, MODERN);
    assert_eq!(guest.write(0, 0, &[2; 512]), OK);
    let fresh = crate::client::Vq::new(0, 128, GPA, true);
    assert!(
        guest
            .wire
            .vring_fd(req::SET_VRING_CALL, 0, fresh.call.as_fd())
    );
    guest.queues[0].call = fresh.call;
    assert_eq!(guest.read(0, 0, 512), [2; 512]);
}

#[test]
fn a_second_client_waits_for_the_first() {
    let bench = Bench::new(Kind::Memory, SIZE, false);
    let mut first = Guest::boot(&bench.socket, MODERN);
    let socket = bench.socket.clone();
    let second = std::thread::Builder::new().spawn(move || {
        let mut second = Guest::boot(&socket, MODERN);
        second.read(0, 0, 512)
    });
    let second = second.expect("a thread");
    assert_eq!(first.write(0, 0, &[5; 512]), OK);
    assert!(!second.is_finished());
    drop(first);
    assert_eq!(second.join().expect("the second is served"), [5; 512]);
}

#[test]
fn sockets_are_bound_and_removed_with_care() {
    let bench = Bench::new(Kind::Memory, SIZE, false);
    let dir = bench.dir.path();
    let make = |name: &str| disk::make(dir, name, SIZE, Kind::Memory, false);

    let long = dir.join("x".repeat(120));
    let error = bench.server.add(make("a"), &long, 1).expect_err("too long");
    assert!(
        std::error::Error::source(&error)
            .expect("a cause")
            .to_string()
            .contains("107")
    );

    let error = bench
        .server
        .add(make("a"), &bench.socket, 1)
        .expect_err("in use");
    assert!(matches!(error, ServeError::Socket { .. }), "{error}");
    let twin = make("twin");
    let path = dir.join("twin");
    bench.server.add(twin.clone(), &path, 1).expect("served");
    let error = bench
        .server
        .add(twin, &dir.join("b"), 1)
        .expect_err("served already");
    assert!(matches!(error, ServeError::Duplicate(_)), "{error}");
    let error = bench
        .server
        .add(make("a"), &dir.join("b"), 0)
        .expect_err("no queues");
    assert!(matches!(error, ServeError::Queues(0)), "{error}");

    let plain = dir.join("plain");
    std::fs::write(&plain, b"mine").expect("a file");
    bench
        .server
        .add(make("a"), &plain, 1)
        .expect_err("not a socket");
    assert!(plain.exists(), "what is not ours stays");

    let stale = dir.join("stale");
    drop(UnixListener::bind(&stale).expect("bind"));
    assert!(stale.exists());
    bench
        .server
        .add(make("a"), &stale, 2)
        .expect("nobody listens there");
    let mut guest = Guest::boot(&stale, MODERN);
    assert_eq!(guest.read(0, 0, 512), [0; 512]);

    bench
        .server
        .remove(&stale)
        .expect("removed, with a client and all");
    assert!(!stale.exists());
    guest.wire.wait_hangup();
    assert!(matches!(
        bench.server.remove(&stale),
        Err(ServeError::Unknown(_))
    ));
    let socket = bench.socket.clone();
    bench.server.shutdown().expect("shut down");
    assert!(!socket.exists());
    UnixStream::connect(&socket).expect_err("nobody listens");
}

#[test]
fn disks_of_two_pools_may_have_one_name() {
    let bench = Bench::new(Kind::Memory, SIZE, false);
    let dir = bench.dir.path();
    let make = || disk::make(dir, "disk", SIZE, Kind::Memory, false);
    let (second, third) = (dir.join("second"), dir.join("third"));
    bench.server.add(make(), &second, 2).expect("another pool");
    bench.server.add(make(), &third, 2).expect("and another");
    let mut first = Guest::boot(&bench.socket, MODERN);
    let mut last = Guest::boot(&third, MODERN);
    bench.server.remove(&second).expect("removed");
    assert!(!second.exists());
    assert_eq!(first.write(0, 0, &[1; 512]), OK);
    assert_eq!(last.write(0, 0, &[2; 512]), OK);
    assert_eq!(first.read(0, 0, 512), [1; 512]);
    let left: Vec<_> = bench.server.disks().into_iter().map(|(_, s)| s).collect();
    assert_eq!(left, [bench.socket.clone(), third]);
    assert!(matches!(
        bench.server.remove(&second),
        Err(ServeError::Unknown(_))
    ));
}

#[test]
fn a_ring_without_a_kick_is_refused() {
    // Bit 8 with no descriptor: the ring is to be polled, which is not done here.
    const NO_FD: u64 = 1 << 8;
    let bench = Bench::new(Kind::Memory, SIZE, false);
    for style in [MODERN, PLAIN] {
        let mut guest = Guest::boot(&bench.socket, style);
        assert_eq!(guest.write(0, 0, &[3; 512]), OK);
        let answer = guest
            .wire
            .acknowledgement(req::SET_VRING_KICK, &NO_FD.to_le_bytes());
        // A client without REPLY_ACK learns of it by the hang-up alone.
        assert_eq!(answer, guest.wire.acks.then_some(1));
        guest.wire.wait_hangup();
    }
    // And a kick that was promised and did not come along.
    let mut guest = Guest::boot(&bench.socket, MODERN);
    assert!(!guest.wire.tell(req::SET_VRING_KICK, &[0; 8], &[]));
    guest.wire.wait_hangup();
    let mut guest = Guest::boot(&bench.socket, MODERN);
    assert_eq!(guest.read(0, 0, 512), [3; 512]);
}

#[test]
fn a_hang_up_comes_after_the_last_completion() {
    let mut late = 0;
    for _ in 0..20 {
        let bench = Bench::new(Kind::Direct, SIZE, false);
        let style = Style {
            queues: 4,
            ..MODERN
        };
        let mut guest = Guest::boot(&bench.socket, style);
        (0..4).for_each(|q| guest.put_writes(q, 65536));
        let used = |guest: &Guest| -> Vec<u16> {
            let queues = guest.queues.iter();
            queues
                .map(|vq| guest.ram.load_u16(vq.used_at() + 2))
                .collect()
        };
        while used(&guest)[0] == 0 {
            std::thread::yield_now();
        }
        let Bench { server, dir, .. } = bench;
        let shutdown = std::thread::Builder::new().spawn(move || server.shutdown());
        guest.wire.wait_hangup();
        // From here on a front end may start the queues again, at these indices.
        let at_hang_up = used(&guest);
        let shutdown = shutdown.expect("a thread").join().expect("no panic");
        shutdown.expect("shut down");
        late += u32::from(used(&guest) != at_hang_up);
        drop(dir);
    }
    assert_eq!(late, 0, "sessions with completions after the hang-up");
}

#[test]
fn clients_that_take_no_replies_are_left_behind_together() {
    let bench = Bench::new(Kind::Memory, SIZE, false);
    let dir = bench.dir.path();
    let mut sockets = vec![bench.socket.clone()];
    for name in ["b", "c", "d", "e"] {
        let disk = disk::make(dir, name, SIZE, Kind::Memory, false);
        let socket = dir.join(name);
        bench.server.add(disk, &socket, 4).expect("served");
        sockets.push(socket);
    }
    let boot = |socket: &PathBuf| Guest::boot(socket, MODERN);
    let mut guests: Vec<Guest> = sockets.iter().map(boot).collect();
    // Until nothing more fits, in either direction.
    for guest in &mut guests {
        let deaf = guest
            .wire
            .stream
            .set_write_timeout(Some(Duration::from_millis(50)));
        deaf.expect("timeout");
        while guest.wire.post(req::GET_FEATURES) {}
    }
    let began = clock::now();
    bench.server.shutdown().expect("shut down");
    let took = began.elapsed();
    guests.iter_mut().for_each(|guest| guest.wire.wait_hangup());
    // Each may take ten seconds.
    assert!(took < Duration::from_secs(19), "{took:?}");
}

#[test]
fn many_disks_share_the_workers() {
    let dir = tempfile::TempDir::new().expect("a directory");
    let server = Server::start(options()).expect("a server");
    let mut guests = Vec::new();
    for i in 0..24_u8 {
        let name = format!("d{i}");
        let socket = dir.path().join(format!("{name}.sock"));
        let kind = [Kind::Direct, Kind::Buffered, Kind::Memory][usize::from(i % 3)];
        server
            .add(disk::make(dir.path(), &name, SIZE, kind, false), &socket, 2)
            .expect("served");
        guests.push(Guest::boot(
            &socket,
            Style {
                queues: 2,
                ..MODERN
            },
        ));
    }
    for (i, guest) in guests.iter_mut().enumerate() {
        assert_eq!(guest.write(i % 2, 0, &[i as u8; 4096]), OK);
    }
    for (i, guest) in guests.iter_mut().enumerate() {
        assert_eq!(guest.read((i + 1) % 2, 0, 4096), [i as u8; 4096]);
    }
    assert_eq!(server.disks().len(), 24);
    assert_eq!(
        server
            .stats()
            .iter()
            .map(|(_, stats)| stats.write.ops)
            .sum::<u64>(),
        24
    );
    drop(guests);
    server.shutdown().expect("shut down");
}
