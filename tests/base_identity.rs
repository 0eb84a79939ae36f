//! Goal: a base image is what it was when it became one, with every file below it; what was looked at
//! is what is read; and one that moved is taken again once it reads as before.
//!
//! Method: an opener waits for the lock of the image, held by a writer nobody can see: its descriptor
//! is on its way through a socket. The image changes before it gets the lock. Files of a chain that
//! `qemu-img` made are changed, written and moved one by one, under disks over them.

use nix::sys::socket::socketpair;
use nix::sys::socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg};
use std::fs::File;
use std::io::IoSlice;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use tidepool::cowdisk::{self, Base, Compared, Disk, DiskError, NewDisk, Rebase};
use tidepool::format::catalogue::{BaseFormat, Row, RowKind};
use tidepool::pool::{CreateOptions, OpenOptions, Pool, open};
use tidepool::storage::{Access, FileStorage, SimStorage, Storage};
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

/// A pool in memory.
fn pool() -> Arc<Pool> {
    let storage = Arc::new(SimStorage::new(64 << 20));
    open::create(&*storage, &CreateOptions::new(64 << 20)).expect("a pool");
    Pool::open(storage as Arc<dyn Storage>, &OpenOptions::default()).expect("opens")
}

fn over(pool: &Arc<Pool>, name: &str, base: &Path, format: BaseFormat) {
    let new = NewDisk {
        size: None,
        base: Some((base.to_owned(), format)),
        ..NewDisk::empty(name, 0)
    };
    cowdisk::create(pool, &new).expect("a disk");
}

fn opens(pool: &Arc<Pool>, name: &str) -> Result<Vec<u8>, String> {
    let disk = Disk::open(pool, name).map_err(|e| e.to_string())?;
    let mut bytes = vec![0; usize::try_from(disk.size()).expect("short")];
    disk.read_at(&mut bytes, 0).map_err(|e| e.to_string())?;
    Ok(bytes)
}

/// How `rebase` is to be done: to `base`, or what is at the old path.
fn to(base: Option<(&Path, BaseFormat)>) -> Rebase {
    Rebase {
        base: base.map(|(path, format)| (path.to_owned(), format)),
        is_trusted: false,
        is_alone: false,
    }
}

fn rebase(pool: &Arc<Pool>, name: &str, how: &Rebase) -> Result<cowdisk::Rebased, DiskError> {
    cowdisk::rebase(pool, name, how, &mut |_, _| Ok(()))
}

/// Bytes that differ from place to place.
fn noise(len: usize) -> Vec<u8> {
    let word = |n: usize| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 13).to_le_bytes();
    (1..=len / 8).flat_map(word).collect()
}

/// A file, to be changed behind everybody's back.
#[expect(clippy::disallowed_methods, reason = "the test plays another program")]
fn writable(path: &Path) -> File {
    File::options().write(true).open(path).expect("a file")
}

/// Goes back to the time of last write that the file had, as `cp -p` does.
fn keep_time(path: &Path, change: impl FnOnce()) {
    let time = std::fs::metadata(path)
        .and_then(|old| old.modified())
        .expect("has one");
    change();
    let file = writable(path);
    file.set_modified(time).expect("sets it");
}

/// `top`, over `middle`, whose data is in `data`, over `bottom`; `None` without the programs.
fn chain(dir: &Path) -> Option<()> {
    let qemu = |words: &str| {
        let mut command = Command::new("qemu-img");
        let output = command
            .args(words.split(' '))
            .current_dir(dir)
            .output()
            .ok()?;
        assert!(output.status.success(), "{words}: {output:?}");
        Some(())
    };
    std::fs::write(dir.join("bottom"), noise(1 << 20)).expect("writes");
    let data = "data_file=data";
    qemu(&format!(
        "create -q -f qcow2 -o {data} -b bottom -F raw middle"
    ))?;
    qemu("create -q -f qcow2 -b middle -F qcow2 top")
}

#[test]
fn every_file_below_a_base_is_locked_and_known_again() {
    let dir = tempfile::tempdir().expect("a directory");
    let dir = dir.path().canonicalize().expect("there");
    if chain(&dir).is_none() {
        println!("SKIPPED: every_file_below_a_base_is_locked_and_known_again: no qemu-img");
        return;
    }
    let pool = pool();
    over(&pool, "a", &dir.join("top"), BaseFormat::Qcow2);
    let row = pool.find("a").expect("there").row;
    let below = row.base.and_then(|base| base.below).expect("they are kept");
    let names: Vec<_> = below.iter().map(|file| file.path.as_str()).collect();
    let expected = ["middle", "data", "bottom"].map(|name| dir.join(name).display().to_string());
    assert_eq!(names, expected);
    for name in ["top", "middle", "data", "bottom"] {
        let path = dir.join(name);
        let disk = Disk::open(&pool, "a").expect("nothing has changed");
        let write = FileStorage::open_image(&path, Access::ReadWrite);
        write.expect_err("it is locked");
        // What another disk over it would find, the one that is open notwithstanding.
        let changed = |what: &str| {
            let e = opens(&pool, "a").expect_err(name);
            assert!(e.contains(what) && e.contains(name), "{name}: {e}");
        };
        let time = std::fs::metadata(&path)
            .and_then(|old| old.modified())
            .expect("has one");
        let file = writable(&path);
        file.set_modified(std::time::UNIX_EPOCH).expect("sets it");
        changed("last written at 0.000000000, was ");
        drop(disk);
        changed("last written at 0.000000000, was ");
        file.set_modified(time).expect("sets it");
        opens(&pool, "a").expect("it is what it was");
        let aside = dir.join("aside");
        std::fs::rename(&path, &aside).expect("renames");
        changed("No such file"); // at its path
        std::fs::copy(&aside, &path).expect("copies");
        let copy = writable(&path);
        copy.set_modified(time).expect("sets it");
        changed("inode");
        std::fs::rename(&aside, &path).expect("renames");
    }
    opens(&pool, "a").expect("it is what it was");
}

#[test]
fn a_base_that_was_put_back_is_taken_when_it_reads_as_before() {
    let dir = tempfile::tempdir().expect("a directory");
    let dir = dir.path().canonicalize().expect("there");
    let (base, copy) = (dir.join("base"), dir.join("copy"));
    let bytes = noise(4 << 20);
    std::fs::write(&base, &bytes).expect("writes");
    let pool = pool();
    over(&pool, "a", &base, BaseFormat::Raw);
    cowdisk::snapshot(&pool, "a", "s").expect("a snapshot");
    cowdisk::fork(&pool, "a@s", &["b".to_owned()]).expect("a fork");
    over(&pool, "other", &base, BaseFormat::Raw);
    // Another file of the same time and length, at the same path.
    keep_time(&base, || {
        std::fs::copy(&base, &copy).expect("copies");
        std::fs::rename(&copy, &base).expect("renames");
    });
    let e = opens(&pool, "a").expect_err("another file");
    assert!(e.contains("inode") && !e.contains("last written"), "{e}");
    {
        let mut other = bytes.clone();
        other[0] ^= 1;
        keep_time(&base, || std::fs::write(&base, &other).expect("writes"));
        let e = rebase(&pool, "a", &to(None))
            .expect_err("other bytes")
            .to_string();
        assert!(
            e.contains("samples") && e.contains("bytes 0 to 262144"),
            "{e}"
        );
        keep_time(&base, || std::fs::write(&base, &bytes).expect("writes"));
    }
    let done = rebase(&pool, "a", &to(None)).expect("it reads as before");
    assert_eq!(done.names, ["a", "a@s", "b", "other"]);
    assert_eq!(done.compared, Compared::Samples(16 * 8 * 4096));
    for name in ["a", "a@s", "b", "other"] {
        assert!(
            opens(&pool, name).expect("it is known again") == bytes,
            "{name}"
        );
    }
}

#[test]
fn a_base_that_moved_is_compared_whole() {
    let dir = tempfile::tempdir().expect("a directory");
    let dir = dir.path().canonicalize().expect("there");
    let (base, copy) = (dir.join("base"), dir.join("copy"));
    let bytes = noise(4 << 20);
    std::fs::write(&base, &bytes).expect("writes");
    let pool = pool();
    over(&pool, "a", &base, BaseFormat::Raw);
    over(&pool, "b", &base, BaseFormat::Raw);
    let new = to(Some((&copy, BaseFormat::Raw)));
    let refused = |other: &[u8], says: &str| {
        std::fs::write(&copy, other).expect("writes");
        let e = rebase(&pool, "a", &new).expect_err(says).to_string();
        assert!(e.contains(says) && e.contains("nothing was changed"), "{e}");
        opens(&pool, "a").expect("it has the old one");
    };
    // A byte that no sample has.
    let mut other = bytes.clone();
    other[3_333_333] ^= 1;
    refused(&other, "at byte 3333333");
    refused(&bytes[..3 << 20], "has 3145728 bytes");
    std::fs::write(&copy, &bytes).expect("writes");
    let disk = Disk::open(&pool, "b").expect("opens");
    let e = rebase(&pool, "a", &new).expect_err("in use").to_string();
    assert!(e.contains("`b`"), "{e}");
    drop(disk);
    let done = rebase(
        &pool,
        "a",
        &Rebase {
            is_alone: true,
            ..new.clone()
        },
    )
    .expect("alike");
    assert_eq!(
        (done.names, done.compared),
        (vec!["a".to_owned()], Compared::All(4 << 20))
    );
    std::fs::remove_file(&base).expect("removes");
    assert!(opens(&pool, "a").expect("it has the new one") == bytes);
    opens(&pool, "b").expect_err("it has the old one");
    // The old one is gone: what is remembered of it has to do.
    let done = rebase(&pool, "b", &new).expect("alike");
    assert_eq!(done.compared, Compared::Samples(16 * 8 * 4096));
    assert!(opens(&pool, "b").expect("it has the new one") == bytes);
    // Who says so is believed.
    std::fs::write(&base, vec![9; 4 << 20]).expect("writes");
    let trusted = Rebase {
        is_trusted: true,
        ..to(Some((&base, BaseFormat::Raw)))
    };
    let done = rebase(&pool, "b", &trusted).expect("nothing is compared");
    assert_eq!(done.names, ["a", "b"]);
    assert!(opens(&pool, "a").expect("opens") == vec![9; 4 << 20]);
    let e = cowdisk::create(&pool, &NewDisk::empty("plain", 4096));
    e.expect("a disk");
    let e = rebase(&pool, "plain", &new)
        .expect_err("no base")
        .to_string();
    assert!(e.contains("has no base"), "{e}");
}

/// The other files of a base, its format and its disk's samples are what they are for all formats.
#[test]
fn an_image_may_become_another_that_reads_alike() {
    let dir = tempfile::tempdir().expect("a directory");
    let dir = dir.path().canonicalize().expect("there");
    if chain(&dir).is_none() {
        println!("SKIPPED: an_image_may_become_another_that_reads_alike: no qemu-img");
        return;
    }
    let pool = pool();
    over(&pool, "a", &dir.join("top"), BaseFormat::Qcow2);
    let done = rebase(
        &pool,
        "a",
        &to(Some((&dir.join("bottom"), BaseFormat::Raw))),
    );
    assert_eq!(
        done.expect("it reads alike").compared,
        Compared::All(1 << 20)
    );
    std::fs::remove_file(dir.join("bottom")).expect("removes");
    std::fs::write(dir.join("bottom"), noise(1 << 20)).expect("writes");
    let done = rebase(&pool, "a", &to(Some((&dir.join("top"), BaseFormat::Qcow2))));
    assert_eq!(
        done.expect("it reads alike").compared,
        Compared::Samples(1 << 19)
    );
    assert!(opens(&pool, "a").expect("opens") == noise(1 << 20));
}

/// Rows of before the files below and the samples were kept.
#[test]
fn older_rows_are_read_and_get_what_they_lack() {
    let dir = tempfile::tempdir().expect("a directory");
    let base = dir.path().canonicalize().expect("there").join("base");
    std::fs::write(&base, noise(1 << 20)).expect("writes");
    let mut reference = Base::examine(&base, BaseFormat::Raw).expect("a file");
    assert_eq!((&reference.below, &reference.samples), (&None, &None));
    Base::open(&reference).expect("nothing to compare");
    let json =
        |row: &Row| serde_json::from_slice::<serde_json::Value>(&row.to_json().expect("short"));
    let pool = pool();
    over(&pool, "a", &base, BaseFormat::Raw);
    let row = pool.find("a").expect("there").row;
    assert_eq!(row.kind, RowKind::Disk);
    let mut older = json(&row).expect("JSON");
    let fields = older["base"].as_object_mut().expect("a base");
    for field in ["below", "samples"] {
        fields.remove(field).expect("it is kept");
    }
    let older = Row::from_json(older.to_string().as_bytes()).expect("a row");
    reference = older.base.expect("a base");
    assert_eq!((&reference.below, &reference.samples), (&None, &None));
}
