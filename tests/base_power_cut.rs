//! Goal: a base image that was written to a moment before it became a base, or by a commit, is known
//! again after a power cut.
//!
//! Method: the image lies on a file system in a file, mounted through a loop device. When the power
//! goes, the file is copied as the file system has left it, which has not yet written all it knows (the
//! time of last write is the first thing it puts off), and the copy is mounted in its place. The pool
//! loses all it has not flushed.

mod common;

use common::{bytes, fresh, opened, read};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use tidepool::cowdisk::{self, Disk, NewDisk};
use tidepool::format::catalogue::BaseFormat;
use tidepool::storage::{Access, FileStorage, Storage as _};

const LEN: u64 = 1 << 20;

/// Runs a program, or says why not.
fn run(program: &str, args: &[&str]) -> Result<(), String> {
    let out = Command::new(program).args(args).output();
    let out = out.map_err(|e| format!("{program}: {e}"))?;
    if out.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&out.stderr);
    Err(format!("{program} {args:?}: {}", said.trim()))
}

fn text(path: &Path) -> &str {
    path.to_str().expect("ours are UTF-8")
}

/// The file system in a file, after so many power cuts.
fn image_in(dir: &tempfile::TempDir, cuts: u32) -> PathBuf {
    dir.path().join(format!("image{cuts}"))
}

fn mount(kind: &str, image: &Path, at: &Path) -> Result<(), String> {
    let args = ["-t", kind, "-o", "loop", text(image), text(at)];
    run("mount", &args)
}

/// A machine's file system, mounted.
struct Host {
    dir: tempfile::TempDir,
    kind: &'static str,
    cuts: u32,
}

impl Host {
    fn new(kind: &'static str) -> Result<Self, String> {
        let dir = tempfile::tempdir_in("/var/tmp").map_err(|e| e.to_string())?;
        let (image, at) = (image_in(&dir, 0), dir.path().join("mnt"));
        run("truncate", &["-s", "320M", text(&image)])?;
        let force = if kind == "ext4" { "-F" } else { "-f" };
        run(&format!("mkfs.{kind}"), &["-q", force, text(&image)])?;
        std::fs::create_dir(&at).map_err(|e| e.to_string())?;
        mount(kind, &image, &at)?;
        let cuts = 0;
        Ok(Self { dir, kind, cuts })
    }

    fn at(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    /// Loses power, and starts again.
    fn cut_power(&mut self) {
        let before = image_in(&self.dir, self.cuts);
        self.cuts += 1;
        let after = image_in(&self.dir, self.cuts);
        run("cp", &[text(&before), text(&after)]).expect("copies");
        run("umount", &[text(&self.at())]).expect("nobody uses it");
        mount(self.kind, &after, &self.at()).expect("recovers");
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let unmounted = run("umount", &["-l", text(&self.at())]);
        assert!(
            unmounted.is_ok() || std::thread::panicking(),
            "{unmounted:?}"
        );
    }
}

/// Writes into the image, and leaves it to the file system when that becomes durable.
fn write(path: &Path, value: u8) {
    let time = || std::fs::metadata(path).expect("there").mtime_nsec();
    let before = time();
    let file = FileStorage::open_image(path, Access::ReadWrite).expect("opens");
    while time() == before {
        file.write_at(&bytes(value, LEN), 0).expect("writes");
    }
}

fn is_known_again(host: &mut Host) {
    let kind = host.kind;
    let path = host.at().join("base.raw");
    std::fs::write(&path, bytes(1, LEN)).expect("an image");
    run("sync", &["-f", text(&path)]).expect("syncs");
    write(&path, 2);
    let (storage, pool) = fresh();
    let new = NewDisk {
        base: Some((path.clone(), BaseFormat::Raw)),
        ..NewDisk::empty("d", LEN)
    };
    cowdisk::create(&pool, &new).expect("creates");
    drop(pool);
    let storage = Arc::new(storage.crash_all_lost());
    host.cut_power();
    let pool = opened(&storage);
    let disk = Disk::open(&pool, "d").expect("its base is what it was");
    assert!(read(&disk, 0, LEN) == bytes(2, LEN), "{kind}");
    disk.write_at(&bytes(3, LEN / 2), 0).expect("writes");
    drop(disk);
    cowdisk::commit_to_base(&pool, "d", false, &mut |_, _| Ok(())).expect("commits");
    drop(pool);
    let storage = Arc::new(storage.crash_all_lost());
    host.cut_power();
    let pool = opened(&storage);
    let disk = Disk::open(&pool, "d").expect("its base is what the commit made of it");
    let expected = [bytes(3, LEN / 2), bytes(2, LEN / 2)].concat();
    assert!(read(&disk, 0, LEN) == expected, "{kind}");
}

#[test]
fn a_base_is_known_again_after_a_power_cut() {
    for kind in ["ext4", "xfs", "btrfs"] {
        match Host::new(kind) {
            Ok(mut host) => is_known_again(&mut host),
            Err(why) => {
                println!("SKIPPED: a_base_is_known_again_after_a_power_cut/{kind}: {why}");
            }
        }
    }
}
