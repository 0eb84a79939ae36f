//! Goal: a base image is what it was when it became one, and what was looked at is what is read.
//!
//! Method: an opener waits for the lock of the image, held by a writer nobody can see: its descriptor
//! is on its way through a socket. The image changes before it gets the lock.

use nix::sys::socket::socketpair;
use nix::sys::socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg};
use std::io::IoSlice;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use tidepool::cowdisk::{Base, DiskError};
use tidepool::format::catalogue::BaseFormat;
use tidepool::storage::{Access, FileStorage, Storage};
use tidepool::sync::{Arc, spawn_named};

/// Takes the lock of a writer, which lasts until both ends of the socket are closed.
fn lock_unseen(path: &Path) -> (OwnedFd, OwnedFd) {
    let image = FileStorage::open_image(path, Access::ReadWrite).expect("nobody has it");
    let (near, far) = socketpair(
        AddressFamily::Unix,
        SockType::Stream,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .expect("a socket");
    let fds = [image.as_fd().expect("a file").as_raw_fd()];
    let message = [ControlMessage::ScmRights(&fds)];
    sendmsg::<()>(
        near.as_raw_fd(),
        &[IoSlice::new(b"x")],
        &message,
        MsgFlags::empty(),
        None,
    )
    .expect("sends");
    (near, far)
}

/// Whether a descriptor of this process is open on `path`.
fn is_open(path: &Path) -> bool {
    let fds = std::fs::read_dir("/proc/self/fd").expect("a directory");
    fds.flatten()
        .any(|fd| std::fs::read_link(fd.path()).is_ok_and(|to| to == path))
}

/// Opens the image at `path` as a base while it gets `new` contents.
fn open_while_it_changes(path: &Path, new: &[u8]) -> Result<Arc<Base>, DiskError> {
    let reference = Base::examine(path, BaseFormat::Raw).expect("a file");
    let writer = lock_unseen(path);
    let opener = spawn_named("opener", move || Base::open(&reference)).expect("a thread");
    while !is_open(path) {
        assert!(!opener.is_finished(), "it waits for the lock");
        std::thread::yield_now();
    }
    std::fs::write(path, new).expect("writes");
    drop(writer);
    opener.join().expect("no panic")
}

#[test]
fn a_base_is_examined_when_it_is_locked() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().canonicalize().expect("there").join("base.raw");
    std::fs::write(&path, vec![7; 1 << 20]).expect("an image");
    let opened = open_while_it_changes(&path, &vec![8; 2 << 20]);
    let e = opened.expect_err("it is not what it was").to_string();
    assert!(e.contains("has changed since it became a base"), "{e}");
}

#[test]
fn a_base_that_got_another_name_is_the_same_base() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("base.raw");
    std::fs::write(&path, vec![7; 1 << 20]).expect("an image");
    let reference = Base::examine(&path, BaseFormat::Raw).expect("a file");
    let time = || std::fs::metadata(&path).expect("there").ctime_nsec();
    let (before, mut names) = (time(), 0);
    while time() == before {
        std::fs::hard_link(&path, dir.path().join(format!("link{names}"))).expect("links");
        names += 1;
    }
    let base = Base::open(&reference).expect("its contents are what they were");
    let again = Base::open(&reference).expect("it is open");
    assert!(Arc::ptr_eq(&base, &again), "disks share what they read");
}

/// File systems get another device number with each mount, or with each start of the machine.
#[test]
fn a_base_on_a_device_of_another_number_is_the_same_base() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("base.raw");
    std::fs::write(&path, vec![7; 1 << 20]).expect("an image");
    let mut reference = Base::examine(&path, BaseFormat::Raw).expect("a file");
    let base = Base::open(&reference).expect("its contents are what they were");
    reference.dev += 1;
    let again = Base::open(&reference).expect("its contents are what they were");
    assert!(Arc::ptr_eq(&base, &again), "disks share what they read");
    drop((base, again));
    Base::open(&reference).expect("its contents are what they were");
}

#[test]
fn a_device_does_not_become_a_base() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("base.raw");
    std::fs::write(&path, vec![7; 1 << 20]).expect("an image");
    let losetup = |args: &[&std::ffi::OsStr]| Command::new("losetup").args(args).output();
    let made = losetup(&["--find".as_ref(), "--show".as_ref(), path.as_os_str()]);
    let Some(made) = made.ok().filter(|made| made.status.success()) else {
        println!("SKIPPED: a_device_does_not_become_a_base: no loop device");
        return;
    };
    let device = String::from_utf8(made.stdout).expect("a path");
    let device = Path::new(device.trim());
    let adopted = Base::adopt(device, BaseFormat::Raw);
    let image = Base::examine(device, BaseFormat::Raw).and_then(|image| Base::open(&image));
    let is_readable = image.is_ok();
    drop(image);
    losetup(&["--detach".as_ref(), device.as_os_str()]).expect("detaches");
    let e = adopted.expect_err("a device").to_string();
    assert!(e.contains("import it instead"), "{e}");
    assert!(is_readable, "that is what an import does");
}
