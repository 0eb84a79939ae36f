//! A pool and a forked disk inside one's own program, without a daemon: `cargo run --example embed`.

use std::sync::Arc;
use tidepool::cowdisk::{self, Disk, NewDisk};
use tidepool::pool::{CreateOptions, OpenOptions, Pool, open};
use tidepool::storage::FileStorage;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::temp_dir().join(format!("embed-{}.pool", std::process::id()));
    let file = Arc::new(FileStorage::create_new(&path, 1 << 30)?);
    open::create(&*file, &CreateOptions::new(1 << 30))?;
    let pool = Pool::open(file, &OpenOptions::default())?;
    cowdisk::create(&pool, &NewDisk::empty("golden", 10 << 30))?;
    Disk::open(&pool, "golden")?.write_at(b"Hello, fork!".repeat(128).as_slice(), 0)?;
    cowdisk::fork(&pool, "golden", &["vm1".to_owned()])?;
    let mut greeting = [0; 512];
    Disk::open(&pool, "vm1")?.read_at(&mut greeting, 0)?;
    assert_eq!(&greeting[..12], b"Hello, fork!");
    pool.close()?;
    Ok(std::fs::remove_file(path)?)
}
