//! The right bytes: every request, any alignment and layout, on every tier.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use tidepool::cowdisk::Disk;
use tidepool::format::catalogue::BaseFormat;
use tidepool::pool::{OpenOptions, Pool};
use tidepool::storage::{Access, FileStorage};

use crate::client::{Random, WRITE, seed};
use crate::disk::{self, Kind};
use crate::guest::{
    Bench, DATA, DISCARD, FLUSH, GET_ID, Guest, IN, IOERR, MODERN, OK, OUT, PLAIN, Style, UNSUPP,
    WRITE_ZEROES, options,
};

const SIZE: u64 = 16 << 20;
const KINDS: [Kind; 3] = [Kind::Direct, Kind::Buffered, Kind::Memory];

/// Cuts `len` bytes at `DATA` + `skew` into buffers at random, with gaps between them.
fn scatter(random: &mut Random, skew: u64, len: u32, flags: u16) -> Vec<(u64, u32, u16)> {
    let mut bufs = Vec::new();
    let mut at = DATA + skew;
    let mut left = len;
    while left > 0 {
        let is_last = bufs.len() >= 20;
        let part = if is_last {
            left
        } else {
            1 + random.below(left.into()) as u32
        };
        bufs.push((at, part, flags));
        at += u64::from(part) + random.below(3) * 8;
        left -= part;
    }
    bufs
}

fn verify_random(kind: Kind, style: Style, trouble: bool) {
    let mut random = Random(seed());
    let bench = Bench::new(kind, SIZE, trouble);
    let mut guest = Guest::boot(&bench.socket, style);
    let mut model = vec![0_u8; SIZE as usize];
    for round in 0..400 {
        let sectors = 1 + random.below(if round % 8 == 0 { 512 } else { 24 });
        let sector = random.below(SIZE / 512 - sectors);
        let len = sectors as u32 * 512;
        let skew = [0, 512, 1, 16, 4095][random.below(5) as usize];
        let at = sector as usize * 512;
        let range = at..at + len as usize;
        let is_write = random.below(2) == 0;
        let flags = if is_write { 0 } else { WRITE };
        let is_simple = random.below(2) == 0;
        let bufs = if is_simple {
            vec![(DATA + skew, len, flags)]
        } else {
            scatter(&mut random, skew, len, flags)
        };
        if is_write {
            random.fill(&mut model[range.clone()]);
            let mut done = at;
            for (addr, part, _) in &bufs {
                let end = done + *part as usize;
                guest.ram.write(*addr, &model[done..end]);
                done = end;
            }
            assert_eq!(guest.request(0, OUT, sector, &bufs), OK);
        } else {
            for (addr, part, _) in &bufs {
                guest.ram.write(*addr, &vec![0xEE; *part as usize]);
            }
            assert_eq!(guest.request(0, IN, sector, &bufs), OK);
            let got: Vec<u8> = bufs
                .iter()
                .flat_map(|(addr, part, _)| guest.ram.read(*addr, *part as usize))
                .collect();
            assert!(
                got == model[range],
                "{kind:?} round {round}: {sectors} at {sector}"
            );
        }
    }
    let stats = bench.stats();
    assert_eq!(stats.read.ops + stats.write.ops, 400);
    assert_eq!(
        stats.read.errors + stats.write.errors + stats.broken_queues,
        0
    );
    assert_eq!(stats.read.latency.total(), stats.read.ops);
}

#[test]
fn random_layouts_read_back_on_every_tier() {
    for kind in KINDS {
        verify_random(kind, MODERN, false);
    }
}

#[test]
fn random_layouts_read_back_when_the_pool_is_busy_full_and_copying() {
    for kind in KINDS {
        verify_random(kind, MODERN, true);
    }
}

#[test]
fn random_layouts_read_back_for_the_plainest_client() {
    verify_random(Kind::Direct, PLAIN, false);
    verify_random(Kind::Memory, PLAIN, true);
}

#[test]
fn the_header_may_be_cut_anywhere_and_the_status_share_a_buffer() {
    let bench = Bench::new(Kind::Direct, SIZE, false);
    let mut guest = Guest::boot(&bench.socket, MODERN);
    assert_eq!(guest.write(0, 8, &[0x5A; 512]), OK);
    // Header in pieces of 1, 7 and 8 bytes; data and status in one buffer of 513.
    let header: Vec<u8> = [0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0].to_vec();
    guest.ram.write(DATA, &header);
    guest.ram.write(DATA + 4096, &[0xEE; 513]);
    let chain = [
        (DATA, 1, 0),
        (DATA + 1, 7, 0),
        (DATA + 8, 8, 0),
        (DATA + 4096, 513, WRITE),
    ];
    guest.queues[0].submit(&guest.ram, 0, &chain);
    assert_eq!(guest.wait(0), Some((0, 513)));
    let got = guest.ram.read(DATA + 4096, 513);
    assert_eq!(got[..512], [0x5A; 512]);
    assert_eq!(got[512], OK);
}

#[test]
fn many_in_flight_on_several_queues_all_come_back() {
    for kind in KINDS {
        for trouble in [false, true] {
            in_flight(kind, trouble);
        }
    }
}

fn in_flight(kind: Kind, trouble: bool) {
    const DEPTH: u16 = 32;
    let bench = Bench::new(kind, SIZE, trouble);
    let mut guest = Guest::boot(
        &bench.socket,
        Style {
            queues: 4,
            ..MODERN
        },
    );
    for round in 0..8_u8 {
        for q in 0..4_u64 {
            for i in 0..DEPTH {
                let place = q * u64::from(DEPTH) + u64::from(i);
                let addr = DATA + place * 4096;
                guest.ram.write(addr, &[round ^ place as u8; 4096]);
                let queue = q as usize;
                guest.put(queue, i * 3, OUT, place * 8, &[(addr, 4096, 0)]);
            }
        }
        for q in 0..4 {
            let mut heads = Vec::new();
            for _ in 0..DEPTH {
                let (head, len) = guest.wait(q).expect("an answer");
                assert_eq!(len, 1);
                assert_eq!(guest.status(q, head as u16), OK);
                heads.push(head);
            }
            heads.sort_unstable();
            heads.dedup();
            assert_eq!(heads.len(), usize::from(DEPTH), "each head comes back once");
        }
        for place in [0, 33, 66, 127_u64] {
            let got = guest.read((place % 4) as usize, place * 8, 4096);
            assert_eq!(
                got,
                [round ^ place as u8; 4096],
                "{kind:?} round {round} at {place}"
            );
        }
    }
}

#[test]
fn flush_id_and_unknown_requests_are_answered() {
    let mut serial = String::new();
    let bench = Bench::with(options(), |dir| {
        let disk = disk::make(dir, "disk", SIZE, Kind::Buffered, false);
        serial = disk.id_string();
        disk
    });
    assert!(!serial.is_empty() && serial.len() <= 20);
    let mut guest = Guest::boot(&bench.socket, MODERN);
    assert_eq!(guest.request(0, FLUSH, 0, &[]), OK);
    guest.ram.write(DATA, &[0xEE; 24]);
    assert_eq!(guest.request(0, GET_ID, 0, &[(DATA, 20, WRITE)]), OK);
    let mut id = serial.into_bytes();
    id.resize(20, 0);
    id.extend([0xEE; 4]);
    assert_eq!(guest.ram.read(DATA, 24), id);
    // Secure erase, a zone report, nonsense.
    for kind in [14, 16, 0xFFFF_FFFF] {
        assert_eq!(guest.request(0, kind, 0, &[]), UNSUPP, "type {kind}");
    }
    assert_eq!(bench.stats().flush.ops, 1);
}

#[test]
fn discard_and_write_zeroes_take_many_ranges() {
    for kind in KINDS {
        for trouble in [false, true] {
            unmap(kind, trouble);
        }
    }
}

fn unmap(kind: Kind, trouble: bool) {
    let bench = Bench::new(kind, SIZE, trouble);
    let mut guest = Guest::boot(&bench.socket, MODERN);
    assert_eq!(guest.write(0, 0, &[7; 1 << 18]), OK);
    assert_eq!(
        guest.ranges(0, WRITE_ZEROES, &[(8, 8, 0), (32, 8, 1), (64, 1, 0)]),
        OK
    );
    let got = guest.read(0, 0, 40 << 10);
    for (sector, bytes) in got.chunks(512).enumerate() {
        let is_zero = matches!(sector, 8..16 | 32..40 | 64);
        assert_eq!(
            bytes,
            [if is_zero { 0 } else { 7 }; 512],
            "{kind:?} sector {sector}"
        );
    }
    assert_eq!(guest.ranges(0, DISCARD, &[(128, 128, 0), (0, 0, 0)]), OK);
    // UNMAP in a DISCARD and unknown flags are unsupported; beyond the end is an error.
    assert_eq!(guest.ranges(0, DISCARD, &[(128, 128, 1)]), UNSUPP);
    assert_eq!(guest.ranges(0, WRITE_ZEROES, &[(128, 128, 2)]), UNSUPP);
    assert_eq!(
        guest.ranges(0, WRITE_ZEROES, &[(SIZE / 512 - 1, 2, 0)]),
        IOERR
    );
    assert_eq!(guest.ranges(0, DISCARD, &[(u64::MAX, 1, 0)]), IOERR);
    assert_eq!(guest.request(0, DISCARD, 0, &[]), IOERR);
    assert_eq!(guest.request(0, DISCARD, 0, &[(DATA, 15, 0)]), IOERR);
}

#[test]
fn ranges_and_lengths_are_checked() {
    let bench = Bench::new(Kind::Direct, SIZE, false);
    let mut guest = Guest::boot(&bench.socket, MODERN);
    let last = SIZE / 512 - 1;
    assert_eq!(guest.request(0, IN, last, &[(DATA, 512, WRITE)]), OK);
    assert_eq!(guest.request(0, IN, last, &[(DATA, 1024, WRITE)]), IOERR);
    assert_eq!(guest.request(0, OUT, last + 1, &[(DATA, 512, 0)]), IOERR);
    assert_eq!(guest.request(0, OUT, u64::MAX, &[(DATA, 512, 0)]), IOERR);
    assert_eq!(guest.request(0, IN, 0, &[(DATA, 513, WRITE)]), IOERR);
    assert_eq!(guest.request(0, OUT, 0, &[(DATA, 100, 0)]), IOERR);
    assert_eq!(
        guest.request(0, OUT, 0, &[(DATA, 512, 0), (DATA, 512, WRITE)]),
        IOERR
    );
    assert_eq!(guest.request(0, IN, 0, &[]), OK);
    assert_eq!(bench.stats().broken_queues, 0);
}

#[test]
fn read_only_disks_refuse_writes_and_say_so() {
    let bench = Bench::with(options(), |dir| disk::make_read_only(dir, SIZE));
    let mut guest = Guest::boot(
        &bench.socket,
        Style {
            features: MODERN.features | crate::client::feature::RO,
            ..MODERN
        },
    );
    assert_eq!(guest.write(0, 0, &[1; 512]), IOERR);
    assert_eq!(guest.ranges(0, WRITE_ZEROES, &[(0, 8, 0)]), IOERR);
    assert_eq!(guest.request(0, FLUSH, 0, &[]), OK);
    assert_eq!(guest.read(0, 0, 4096), [0; 4096]);
}

#[test]
fn a_base_is_read_through_the_ring_or_elsewhere_and_ends_in_zeros() {
    for kind in KINDS {
        // A ring reads a raw base by itself; a qcow2 base is read by helpers.
        for format in [BaseFormat::Raw, BaseFormat::Qcow2] {
            let dir = tempfile::TempDir::new().expect("a directory");
            let Some(disk) = disk::make_over_base(dir.path(), 4 << 20, kind, format) else {
                continue;
            };
            let bench = Bench::with(options(), |_| disk);
            let mut guest = Guest::boot(&bench.socket, MODERN);
            for (sector, count) in [(0_u64, 1_usize), (3, 200), (2000, 80), (3000, 16)] {
                let got = guest.read(0, sector, count * 512);
                for (offset, bytes) in got.chunks(512).enumerate() {
                    let place = sector as usize + offset;
                    let wanted = if place <= 2048 {
                        (place % 251) as u8
                    } else {
                        0
                    };
                    assert_eq!(bytes, [wanted; 512], "{kind:?} {format:?} sector {place}");
                }
            }
        }
    }
}

/// The guest is told, and told of what is cut off only: zeros in its place would be taken for data.
#[test]
fn a_base_that_is_cut_short_is_an_error_and_not_zeros() {
    for kind in KINDS {
        for (format, name) in [
            (BaseFormat::Raw, "base.raw"),
            (BaseFormat::Qcow2, "base.qcow2"),
        ] {
            let dir = tempfile::TempDir::new().expect("a directory");
            let Some(disk) = disk::make_over_base(dir.path(), 4 << 20, kind, format) else {
                continue;
            };
            let bench = Bench::with(options(), |_| disk);
            let mut guest = Guest::boot(&bench.socket, MODERN);
            assert_eq!(guest.read(0, 2000, 512), [(2000 % 251) as u8; 512]);
            let path = dir.path().join(name);
            let len = std::fs::metadata(&path).expect("there").len();
            disk::cut(&path, len - (256 << 10));
            for (sector, count) in [(2000, 1), (1900, 64), (1500, 400)] {
                let bufs = [(DATA, count * 512, WRITE)];
                let status = guest.request(0, IN, sector, &bufs);
                assert_eq!(status, IOERR, "{kind:?} {format:?} sector {sector}");
            }
            assert_eq!(guest.read(0, 3, 512), [3; 512], "{kind:?} {format:?}");
        }
    }
}

#[test]
fn without_a_write_cache_every_write_is_flushed() {
    let bench = Bench::new(Kind::Buffered, SIZE, false);
    // CONFIG_WCE and writeback = 0.
    let mut guest = Guest::boot(&bench.socket, MODERN);
    assert_eq!(guest.wire.config(32, 1), Some(vec![1]));
    assert!(guest.wire.set_config(32, &[0]));
    assert_eq!(guest.wire.config(32, 1), Some(vec![0]));
    assert_eq!(guest.write(0, 0, &[3; 4096]), OK);
    assert_eq!(guest.ranges(0, WRITE_ZEROES, &[(0, 8, 0)]), OK);
    assert_eq!(guest.read(0, 0, 512), [0; 512]);
}

/// The first bytes of the disk `disk` after a crash of the process, at worst.
fn after_a_crash(disk: &Disk) -> [u8; 512] {
    let dir = tempfile::tempdir().expect("a directory");
    let copy = dir.path().join("copy");
    let fd = disk.data_fd().expect("a file").as_raw_fd();
    std::fs::copy(format!("/proc/self/fd/{fd}"), &copy).expect("copies");
    let file = FileStorage::open(&copy, Access::ReadWrite).expect("opens");
    let pool = Pool::open(Arc::new(file), &OpenOptions::default()).expect("a pool");
    let mut bytes = [0xEE; 512];
    let disk = Disk::open(&pool, "disk").expect("it is there");
    disk.read_at(&mut bytes, 0).expect("reads");
    bytes
}

#[test]
fn the_write_cache_is_off_until_the_guest_is_known_to_know_of_it() {
    let dir = tempfile::tempdir().expect("a directory");
    let disk = disk::make(dir.path(), "disk", SIZE, Kind::Buffered, false);
    // As QEMU comes back to a server that was restarted: it asks for no configuration, and its guest
    // may have turned the cache off at the one before.
    let bench = Bench::with(options(), |_| disk.clone());
    let mut guest = Guest::boot(&bench.socket, MODERN);
    assert_eq!(guest.write(0, 0, &[1; 4096]), OK);
    assert_eq!(
        after_a_crash(&disk),
        [1; 512],
        "flushed, lest the guest does not"
    );
    // A guest that flushes knows of the cache.
    assert_eq!(guest.request(0, FLUSH, 0, &[]), OK);
    assert_eq!(guest.ranges(0, WRITE_ZEROES, &[(0, 8, 0)]), OK);
    assert_eq!(after_a_crash(&disk), [1; 512], "not flushed");
    drop(guest);
    drop(bench);

    // And so does one whose front end asks, or says so.
    for is_asked in [true, false] {
        let bench = Bench::with(options(), |_| disk.clone());
        let mut guest = Guest::boot(&bench.socket, MODERN);
        assert_eq!(guest.write(0, 0, &[3; 4096]), OK);
        assert_eq!(after_a_crash(&disk), [3; 512]);
        if is_asked {
            assert_eq!(guest.wire.config(32, 1), Some(vec![1]));
        } else {
            assert!(guest.wire.set_config(32, &[1]));
        }
        assert_eq!(guest.ranges(0, WRITE_ZEROES, &[(0, 8, 0)]), OK);
        assert_eq!(after_a_crash(&disk), [3; 512], "not flushed");
        assert!(guest.wire.set_config(32, &[0]));
        assert_eq!(guest.ranges(0, WRITE_ZEROES, &[(0, 8, 0)]), OK);
        assert_eq!(after_a_crash(&disk), [0; 512], "flushed");
    }
}
