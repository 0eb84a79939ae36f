//! Goal: whatever one guest asks for, its neighbours are served as if it asked for ordinary reads.
//! Method: a daemon of its own process; a guest that reads and verifies, one read at a time, beside
//! one that does everything that could be in its way. Bounds are ratios to what the same reader gets
//! beside ordinary reads, and hold in one of a few tries: what others do to the machine meanwhile is
//! not the daemon's fault, and a fault of the daemon's shows every time.
#![expect(
    unreachable_pub,
    clippy::cast_possible_truncation,
    reason = "a test: its names are its documentation, its numbers are small"
)]

#[path = "../vhost_blk/client.rs"]
#[expect(dead_code, reason = "shared with the session tests")]
mod client;
#[path = "../vhost_blk/disk.rs"]
#[expect(dead_code, reason = "shared with the session tests")]
mod disk;
#[path = "../vhost_blk/guest.rs"]
#[expect(dead_code, reason = "shared with the session tests")]
mod guest;
mod moods;
#[path = "../common/random.rs"]
mod random;
mod rogue;
mod served;
mod stranger;
mod tables;
mod turns;
mod user;
mod waits;
