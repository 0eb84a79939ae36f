//! Making a recording: a pool on the recorded store, the real daemon, and Linux in QEMU whose disk
//! is the tap.

use super::log::{Recorder, Tag};
use super::oracle::Notes;
use super::replay::{BASE, DISK, Place};
use super::store::{POOL_NAME, Store};
use super::tap;
use crate::random::Random;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use tidepool::cowdisk::{self, Disk, NewDisk};
use tidepool::pool::{CreateOptions, OpenOptions, Pool, open};
use tidepool::storage::FileStorage;
use tidepool::sync::spawn_named;
use tidepool::sys::file as sys;

const POOL_LEN: u64 = 1 << 30;
/// The smallest disk that mkfs.xfs takes is 300 MiB.
const DISK_LEN: u64 = 320 << 20;
/// How much of the base holds data, a quarter of it in every four.
const BASE_DATA: u64 = 64 << 20;

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The directory of the guest's kernel and disks, built if it must be.
///
/// # Errors
/// Why there is no guest to be had here.
pub(crate) fn guest_image() -> Result<PathBuf, String> {
    let qemu = Command::new("qemu-system-x86_64").arg("--version").output();
    qemu.map_err(|e| format!("no qemu-system-x86_64 here: {e}: run scripts/packages"))?;
    let script = repository().join("scripts/guest-image");
    let out = Command::new(&script).output();
    let out = out.map_err(|e| format!("{}: {e}", script.display()))?;
    let said = String::from_utf8_lossy(&out.stderr);
    if !out.status.success() {
        let why = said.lines().last().unwrap_or("no reason given");
        return Err(format!("no guest image: {why}"));
    }
    Ok(PathBuf::from(String::from_utf8_lossy(&out.stdout).trim()))
}

/// A pool with a base disk of random bytes and zeros, and a fork of it for the guest.
fn make_pool(path: &Path, seed: u64) {
    let file = FileStorage::create_new(path, POOL_LEN).expect("a new file");
    open::create(&file, &CreateOptions::new(POOL_LEN)).expect("an empty pool");
    let pool = Pool::open(Arc::new(file), &OpenOptions::default()).expect("opens");
    cowdisk::create(&pool, &NewDisk::empty(BASE, DISK_LEN)).expect("creates");
    let disk = Disk::open(&pool, BASE).expect("opens");
    let mut random = Random(seed);
    let mut bytes = vec![0; 64 << 10];
    let mut at = 0;
    while at < BASE_DATA {
        random.fill(&mut bytes);
        disk.write_at(&bytes, at).expect("writes");
        at += 4 * bytes.len() as u64;
    }
    drop(disk);
    cowdisk::fork(&pool, BASE, &[DISK.to_owned()]).expect("forks");
    pool.close().expect("closes");
}

/// Records what the file holds before anything happens.
fn record_start(path: &Path, recorder: &Recorder) {
    let file = sys::open(path, sys::Mode::Read).expect("it is ours");
    let len = file.metadata().expect("open").len();
    recorder.add(Tag::StoreLen, 0, 0, len, &[]);
    let mut bytes = vec![0; 1 << 20];
    let mut at = 0;
    while let Some(start) = sys::seek_data(&file, at).expect("seeks") {
        let end = sys::seek_hole(&file, start).expect("seeks").unwrap_or(len);
        let most = bytes.len() as u64;
        let part = &mut bytes[..usize::try_from((end - start).min(most)).expect("small")];
        file.read_exact_at(part, start).expect("reads");
        let len = part.len() as u64;
        recorder.add(Tag::StoreWrite, 0, start, len, part);
        recorder.add(Tag::StoreEnd, 0, 0, 0, &[]);
        at = start + len;
    }
    recorder.add(Tag::StoreFlush, 0, 0, 0, &[]);
}

/// A child that does not outlive the test.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // both fail only when it has ended already, which is what is wanted
        drop((self.0.kill(), self.0.wait()));
    }
}

fn serve(pool: &Path, sockets: &Path) -> Killed {
    let mut child = Command::new(env!("CARGO_BIN_EXE_tidepool"))
        .arg("serve")
        .arg(pool)
        .args(["--workers", "2", "--return", "eager", "--sockets"])
        .arg(sockets)
        .stdout(Stdio::piped())
        .spawn()
        .expect("the daemon starts");
    let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let mut lines = lines.map_while(Result::ok);
    assert!(
        lines.any(|line| line.contains("ready")),
        "the daemon starts"
    );
    Killed(child)
}

/// Boots the guest in `dir` with disks given by `disks` beside its root disk, to do `job`; ends
/// when it has powered off.
///
/// # Errors
/// What went wrong, with the console.
fn boot(image: &Path, dir: &Path, job: &str, disks: &[String]) -> Result<(), String> {
    let script = dir.join("job");
    std::fs::write(&script, job).expect("writes");
    let (initrd, console) = (dir.join("initrd"), dir.join("console"));
    let made = Command::new("bash")
        .args(["-euo", "pipefail", "-c"])
        .args([". scripts/lib.sh; guest_initrd \"$@\"", "initrd"])
        .args([image, &script, &initrd])
        .current_dir(repository())
        .status();
    assert!(made.expect("bash starts").success(), "an initramfs is made");
    let mut qemu = Command::new("timeout");
    qemu.args(["900", "qemu-system-x86_64", "-machine", "q35,accel=tcg"]);
    qemu.args(["-cpu", "max", "-smp", "2", "-m", "768", "-nodefaults"]);
    qemu.args(["-no-reboot", "-display", "none", "-append"]);
    qemu.arg("console=ttyS0 quiet panic=-1 no_timer_check root=/dev/vda");
    qemu.arg("-serial")
        .arg(format!("file:{}", console.display()));
    qemu.arg("-kernel").arg(image.join("vmlinuz"));
    qemu.arg("-initrd").arg(&initrd);
    // the root disk is no part of it: what is written there is thrown away
    let root = image.join("base.raw").display().to_string();
    qemu.arg("-drive").arg(format!(
        "if=none,id=root,format=raw,snapshot=on,file={root}"
    ));
    qemu.args(["-device", "virtio-blk-pci,drive=root"]);
    for (number, disk) in disks.iter().enumerate() {
        qemu.arg("-blockdev")
            .arg(format!("{disk},node-name=disk{number}"));
        qemu.arg("-device");
        qemu.arg(format!(
            "virtio-blk-pci,drive=disk{number},num-queues=2,write-cache=on"
        ));
    }
    let ran = qemu.status().expect("timeout(1) starts");
    let text = std::fs::read(&console).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let is_done = text.contains("TIDEPOOL-GUEST: done") && !text.contains("TIDEPOOL-GUEST: fail");
    if ran.success() && is_done {
        Ok(())
    } else {
        Err(format!("the guest failed ({ran}); its console:\n{text}"))
    }
}

fn job(name: &str) -> String {
    let path = repository().join("tests/guest").join(name);
    std::fs::read_to_string(path).expect("the job is in the repository")
}

/// The guest's own kernel recovers the disk in `file`: as `super::recover::recover`, where nothing
/// can be mounted here, and by the kernel that wrote it.
///
/// # Errors
/// What is wrong.
pub(crate) fn recover(place: &Place, file: &Path, notes: &Notes) -> Result<u64, String> {
    let dir = tempfile::tempdir_in(&place.scratch).map_err(|e| e.to_string())?;
    let mut text = format!("fs={}\ncat >/tmp/sums <<END\n", place.file_system);
    for (path, sum) in &notes.files {
        text.push_str(&format!("{sum}  /mnt/{path}\n"));
    }
    text.push_str("END\n");
    text.push_str(&job("job-recover"));
    let disk = format!("driver=file,filename={}", file.display());
    boot(&place.guest, dir.path(), &text, &[disk])?;
    Ok(notes.files.len() as u64)
}

/// Records one guest's work on `file_system` to the file `recording`.
///
/// # Errors
/// Why there can be no recording here.
pub(crate) fn record(
    recording: &Path,
    image: &Path,
    file_system: &str,
    rounds: u64,
    seed: u64,
) -> Result<(), String> {
    let dir = tempfile::tempdir_in("/var/tmp").expect("a directory");
    let (file, mounted) = (dir.path().join("file"), dir.path().join("store"));
    std::fs::create_dir(&mounted).expect("a directory");
    make_pool(&file, seed);
    let recorder = Arc::new(Recorder::create(recording).expect("a new file"));
    record_start(&file, &recorder);
    let store = Store::mount(&file, &mounted, Arc::clone(&recorder), seed);
    let store = store.map_err(|e| format!("FUSE: {e}"))?;
    let sockets = dir.path().join("s");
    std::fs::create_dir(&sockets).expect("a directory");
    let mut daemon = serve(&mounted.join(POOL_NAME), &sockets);
    let device = tap::connect(&sockets.join(format!("{DISK}.sock")));
    let nbd = dir.path().join("nbd");
    let listener = UnixListener::bind(&nbd).expect("a socket");
    let tapped = Arc::clone(&recorder);
    let thread = spawn_named("tap", move || tap::serve(&listener, device, &tapped));
    let text = format!("fs={file_system}\nrounds={rounds}\n{}", job("job-recorded"));
    let nbd = nbd.display();
    let disks = ["disk", "notes"].map(|export| {
        format!("driver=nbd,server.type=unix,server.path={nbd},export={export},discard=unmap")
    });
    boot(image, dir.path(), &text, &disks).expect("the guest does its work");
    let thread = thread.expect("a thread").join().expect("no panic");
    thread.expect("QEMU ends in good order");
    let pid = i32::try_from(daemon.0.id()).expect("a pid is an i32");
    let pid = nix::unistd::Pid::from_raw(pid);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).expect("it runs");
    assert!(
        daemon.0.wait().expect("ours").success(),
        "the daemon ends in good order"
    );
    drop(store);
    Ok(())
}
