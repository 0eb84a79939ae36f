//! Disks to serve in tests.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::fcntl::OFlag;
use tidepool::cowdisk::{Disk, Parts, Tier};

/// How the file under a disk is driven.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Direct,
    Buffered,
    Memory,
}

pub fn open(path: &Path, is_direct: bool) -> File {
    let flags = if is_direct { OFlag::O_DIRECT.bits() } else { 0 };
    #[expect(clippy::disallowed_methods, reason = "a test's own file")]
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .custom_flags(flags)
        .open(path);
    file.expect("a file for the disk")
}

/// A disk of `size` bytes in `dir`; one in `trouble` requests has to wait for something.
pub fn make(dir: &Path, name: &str, size: u64, kind: Kind, trouble: u64) -> Disk {
    make_with(dir, name, size, kind, trouble, false, false)
}

pub fn make_with(
    dir: &Path,
    name: &str,
    size: u64,
    kind: Kind,
    trouble: u64,
    read_only: bool,
    with_base: bool,
) -> Disk {
    let path = dir.join(name);
    open(&path, false).set_len(size).expect("set_len");
    let base = with_base.then(|| {
        use std::os::unix::fs::FileExt;
        let base = open(&dir.join(format!("{name}.base")), false);
        let len = usize::try_from(size / 4 + 512).expect("length");
        let bytes: Vec<u8> = (0..len)
            .map(|at| u8::try_from(at / 512 % 251).expect("byte"))
            .collect();
        base.write_all_at(&bytes, 0).expect("write");
        base
    });
    Disk::stand_in(Parts {
        name: name.to_owned(),
        file: open(&path, kind == Kind::Direct),
        size,
        tier: match kind {
            Kind::Direct => Tier::Direct { align: 512 },
            Kind::Buffered => Tier::Buffered,
            Kind::Memory => Tier::Memory,
        },
        read_only,
        base,
        trouble,
    })
}
