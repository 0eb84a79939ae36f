//! Serves one disk of a pool as vhost-user-blk until standard input ends:
//! `cargo run --release --example serve_one -- POOL DISK SOCKET`.

use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use tidepool::cowdisk::Disk;
use tidepool::pool::{OpenOptions, Pool};
use tidepool::storage::{Access, FileStorage};
use tidepool::vhost_blk::{Server, ServerOptions};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [path, disk, socket] = arguments.as_slice() else {
        return Err("usage: serve_one POOL DISK SOCKET".into());
    };
    let file = Arc::new(FileStorage::open(path, Access::ReadWrite)?);
    let pool = Pool::open(file, &OpenOptions::default())?;
    let background = pool.start_background()?;
    let server = Server::start(ServerOptions::default())?;
    server.add(Disk::open(&pool, disk)?, Path::new(socket), 4)?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    server.shutdown()?;
    drop(background);
    Ok(pool.close()?)
}
