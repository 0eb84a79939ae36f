//! Disks to serve in tests, each in a pool of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use tidepool::cowdisk::{self, Disk, NewDisk};
use tidepool::format::catalogue::BaseFormat;
use tidepool::pool::{CreateOptions, OpenOptions, Pool, open};
use tidepool::storage::{Caching, FileStorage};

/// How the file under a disk is driven.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Direct,
    Buffered,
    Memory,
}

/// A pool of `size` bytes; its file is in `dir`, or without a name in /dev/shm.
fn pool(dir: &Path, name: &str, kind: Kind, size: u64) -> Arc<Pool> {
    let dir = if kind == Kind::Memory {
        Path::new("/dev/shm")
    } else {
        dir
    };
    pool_in(dir, name, kind, size)
}

/// A pool of `size` bytes in a file in `dir`, which has lost its name.
fn pool_in(dir: &Path, name: &str, kind: Kind, size: u64) -> Arc<Pool> {
    let path = dir.join(format!("{name}.{}.{:p}.pool", std::process::id(), &name));
    let caching = if kind == Kind::Buffered {
        Caching::Buffered
    } else {
        Caching::Auto
    };
    let file = FileStorage::create_new_with(&path, size, caching).expect("a pool file");
    let file = Arc::new(file);
    open::create(&*file, &CreateOptions::new(size)).expect("a pool");
    fs::remove_file(&path).expect("the file is open");
    Pool::open(file, &OpenOptions::default()).expect("the pool opens")
}

/// A disk of `size` bytes. In `trouble` it is forked and the forks deleted without an end, so
/// that requests find the disk draining and its clusters shared.
pub fn make(dir: &Path, name: &str, size: u64, kind: Kind, trouble: bool) -> Disk {
    let pool = pool(dir, name, kind, 256 << 20);
    cowdisk::create(&pool, &NewDisk::empty(name, size)).expect("a disk");
    if trouble {
        fork_for_ever(&pool, name);
    }
    Disk::open(&pool, name).expect("the disk opens")
}

fn fork_for_ever(pool: &Arc<Pool>, name: &str) {
    let (weak, name) = (Arc::downgrade(pool), name.to_owned());
    let forks = move || {
        let mut count = 0_u32;
        while let Some(pool) = weak.upgrade() {
            count += 1;
            let fork = format!("fork{count}");
            cowdisk::fork(&pool, &name, std::slice::from_ref(&fork)).expect("a fork");
            cowdisk::remove(&pool, &fork, false).expect("deleted again");
        }
    };
    std::thread::Builder::new().spawn(forks).expect("a thread");
}

/// A disk of `size` bytes in a pool with less space than that.
pub fn make_tight(dir: &Path, size: u64) -> Disk {
    let pool = pool(dir, "tight", Kind::Direct, 32 << 20);
    cowdisk::create(&pool, &NewDisk::empty("tight", size)).expect("a disk");
    Disk::open(&pool, "tight").expect("the disk opens")
}

/// A disk of `size` bytes in a pool that may grow to 64 MiB, on the file system of `dir`.
pub fn make_on(dir: &Path, size: u64) -> Disk {
    let pool = pool_in(dir, "disk", Kind::Memory, 64 << 20);
    cowdisk::create(&pool, &NewDisk::empty("disk", size)).expect("a disk");
    Disk::open(&pool, "disk").expect("the disk opens")
}

/// A snapshot of a disk that was never written.
pub fn make_read_only(dir: &Path, size: u64) -> Disk {
    let pool = pool(dir, "disk", Kind::Buffered, 64 << 20);
    cowdisk::create(&pool, &NewDisk::empty("disk", size)).expect("a disk");
    cowdisk::snapshot(&pool, "disk", "then").expect("a snapshot");
    Disk::open(&pool, "disk@then").expect("the snapshot opens")
}

/// Cuts a file behind everybody's back.
#[expect(clippy::disallowed_methods, reason = "the test plays another program")]
pub fn cut(path: &Path, len: u64) {
    let file = fs::File::options().write(true).open(path);
    file.and_then(|file| file.set_len(len)).expect("cuts");
}

/// A disk of `size` bytes over a base of a quarter of that and one sector, in which each byte is
/// its sector's number modulo 251. `None` without the program that makes qcow2 images.
pub fn make_over_base(dir: &Path, size: u64, kind: Kind, format: BaseFormat) -> Option<Disk> {
    let raw = dir.join("base.raw");
    let len = usize::try_from(size / 4 + 512).expect("length");
    let bytes: Vec<u8> = (0..len)
        .map(|at| u8::try_from(at / 512 % 251).expect("byte"))
        .collect();
    fs::write(&raw, &bytes).expect("a base");
    let path: PathBuf = match format {
        BaseFormat::Raw => raw,
        BaseFormat::Qcow2 => {
            let path = dir.join("base.qcow2");
            let mut convert = Command::new("qemu-img");
            convert
                .args(["convert", "-O", "qcow2"])
                .arg(&raw)
                .arg(&path);
            convert.status().ok()?.success().then_some(path)?
        }
    };
    let pool = pool(dir, "disk", kind, 64 << 20);
    let new = NewDisk {
        base: Some((path, format)),
        ..NewDisk::empty("disk", size)
    };
    cowdisk::create(&pool, &new).expect("a disk over a base");
    Some(Disk::open(&pool, "disk").expect("the disk opens"))
}
