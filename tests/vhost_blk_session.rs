//! Goal: a real vhost-user client gets the right bytes whatever it does, and a rude one harms
//! nobody but itself. Method: a front end written from the protocol document drives a server in
//! this process, over real sockets, memfds and eventfds.
#![expect(
    unreachable_pub,
    clippy::cast_possible_truncation,
    reason = "a test: its names are its documentation, its numbers are small"
)]

#[path = "vhost_blk/bounds.rs"]
mod bounds;
#[path = "vhost_blk/client.rs"]
mod client;
#[path = "vhost_blk/data.rs"]
mod data;
#[path = "vhost_blk/disk.rs"]
mod disk;
#[path = "vhost_blk/guest.rs"]
mod guest;
#[path = "vhost_blk/hang.rs"]
mod hang;
#[path = "vhost_blk/host.rs"]
mod host;
#[path = "vhost_blk/hostile.rs"]
mod hostile;
#[path = "vhost_blk/hung.rs"]
mod hung;
#[path = "vhost_blk/lost.rs"]
mod lost;
#[path = "vhost_blk/pools.rs"]
mod pools;
#[path = "common/random.rs"]
mod random;
#[path = "vhost_blk/session.rs"]
mod session;
#[path = "common/small.rs"]
mod small;
#[path = "vhost_blk/stranger.rs"]
mod stranger;
#[path = "vhost_blk/vmms/mod.rs"]
mod vmms;
