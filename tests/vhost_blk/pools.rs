//! Pools of threads: what runs on one never waits for what is queued behind it.

use tidepool::cowdisk;

use crate::disk::Kind;
use crate::guest::{Bench, DATA, Guest, HEADERS, MODERN, OK, OUT, Style, WRITE_ZEROES};

const SIZE: u64 = 16 << 20;
/// Sectors of a cluster.
const CLUSTER: u64 = 128;
/// Requests of each kind at once: many more than any pool has threads.
pub const EACH: u16 = 80;

/// Zeroes and writes of parts of blocks, in the same clusters at once. The zeroes waited on helper
/// threads for copies that were queued behind them, and nothing went on, for any disk.
#[test]
fn zeroes_and_writes_of_parts_of_blocks_all_end() {
    let many = Style {
        size: 1024,
        ..MODERN
    };
    for kind in [Kind::Direct, Kind::Memory] {
        let mut served = None;
        let bench = Bench::with(crate::guest::options(), |dir| {
            let disk = crate::disk::make(dir, "disk", SIZE, kind, false);
            served.insert(disk).clone()
        });
        let disk = served.expect("served");
        let mut guest = Guest::boot(&bench.socket, many);
        for round in 0..6_u8 {
            // Shared clusters with data, so that each request needs a copy first.
            disk.write_at(&vec![7; 16 << 20], 0).expect("writes");
            let snapshot = format!("s{round}");
            cowdisk::snapshot(disk.pool(), "disk", &snapshot).expect("snapshots");
            flood(&mut guest);
            let got = guest.read(0, 0, 64 << 10);
            for (sector, bytes) in got.chunks(512).enumerate() {
                let expected = match sector {
                    1..7 => 0,
                    64 => 9,
                    _ => 7,
                };
                assert_eq!(bytes, [expected; 512], "{kind:?}, sector {sector}");
            }
            cowdisk::remove(disk.pool(), &format!("disk@{snapshot}"), false).expect("removes");
        }
    }
}

/// In each of [`EACH`] clusters, zeroes sectors 1 to 6 and writes sector 64, all at once.
pub fn flood(guest: &mut Guest) {
    let ranges = HEADERS + 0x2_0000;
    guest.ram.write(DATA, &[9; 512]);
    for n in 0..EACH {
        let mut range = (u64::from(n) * CLUSTER + 1).to_le_bytes().to_vec();
        range.extend(6_u32.to_le_bytes());
        range.extend(0_u32.to_le_bytes());
        let at = ranges + u64::from(n) * 16;
        guest.ram.write(at, &range);
        guest.put(0, n * 3, WRITE_ZEROES, 0, &[(at, 16, 0)]);
    }
    for n in 0..EACH {
        let sector = u64::from(n) * CLUSTER + 64;
        guest.put(0, (EACH + n) * 3, OUT, sector, &[(DATA, 512, 0)]);
    }
    for _ in 0..2 * EACH {
        assert!(guest.wait(0).is_some(), "a request is never answered");
    }
    for n in 0..2 * EACH {
        assert_eq!(guest.status(0, n * 3), OK);
    }
}
