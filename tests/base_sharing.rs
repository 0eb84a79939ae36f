//! Goal: a base image is shared with whoever reads it and kept from whoever writes it, whether that
//! is a program of QEMU's or this one, which lock images alike.
//!
//! Method: the real `qemu-img`, `qemu-io` and `qemu-storage-daemon` on the base of an open disk, and
//! disks opened over an image that a `qemu-io` has open.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use tidepool::cowdisk::{self, Disk, NewDisk};
use tidepool::format::catalogue::BaseFormat;
use tidepool::pool::{CreateOptions, OpenOptions, Pool, open};
use tidepool::storage::FileStorage;

const LEN: u64 = 4 << 20;

struct Bench {
    dir: tempfile::TempDir,
    pool: Arc<Pool>,
}

impl Bench {
    /// A pool with a disk `raw` over `base.raw` and a disk `qcow2` over `base.qcow2`; `None`, and a
    /// line that says so, without the programs.
    fn new(test: &str) -> Option<Self> {
        let programs = ["qemu-img", "qemu-io", "qemu-storage-daemon"];
        let is_there = |program: &&str| run(Command::new(program).arg("--version")).0;
        if !programs.iter().all(is_there) {
            #[expect(clippy::print_stdout, reason = "a test that did not run says so")]
            {
                println!(
                    "SKIPPED: {test}: {} are not all installed",
                    programs.join(", ")
                );
            }
            return None;
        }
        let dir = tempfile::tempdir().expect("a directory");
        let file = FileStorage::create_new(dir.path().join("pool"), 64 << 20).expect("a file");
        open::create(&file, &CreateOptions::new(64 << 20)).expect("a pool");
        let pool = Pool::open(Arc::new(file), &OpenOptions::default()).expect("opens");
        let bench = Self { dir, pool };
        std::fs::write(
            bench.base("raw"),
            vec![7; usize::try_from(LEN).expect("short")],
        )
        .expect("an image");
        let (base, copy) = (bench.base("raw"), bench.base("qcow2"));
        let made = run(Command::new("qemu-img")
            .args(["convert", "-O", "qcow2"])
            .args([base, copy]));
        assert!(made.0, "{made:?}");
        for (name, format) in FORMATS {
            let base = Some((bench.base(name), format));
            let new = NewDisk {
                base,
                ..NewDisk::empty(name, LEN)
            };
            cowdisk::create(&bench.pool, &new).expect("a disk");
        }
        Some(bench)
    }

    fn base(&self, format: &str) -> PathBuf {
        self.dir.path().join(format!("base.{format}"))
    }
}

const FORMATS: [(&str, BaseFormat); 2] = [("raw", BaseFormat::Raw), ("qcow2", BaseFormat::Qcow2)];

/// Whether it succeeded, and what it printed.
fn run(command: &mut Command) -> (bool, String) {
    let Ok(output) = command.stdin(Stdio::null()).output() else {
        return (false, String::new());
    };
    let text = [output.stdout, output.stderr].concat();
    (
        output.status.success(),
        String::from_utf8_lossy(&text).into_owned(),
    )
}

/// A `qemu-io` that has an image open until it is dropped.
struct Holder {
    child: Child,
    stdin: Option<ChildStdin>,
}

impl Holder {
    fn open(image: &Path, options: &[&str]) -> Self {
        let mut child = Command::new("qemu-io")
            .args(options)
            .args(["-f", "raw"])
            .arg(image)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("starts");
        let mut stdin = child.stdin.take().expect("piped");
        writeln!(stdin, "length").expect("it reads");
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let answer = lines.next().expect("it opened the image").expect("reads");
        assert!(answer.contains("MiB"), "{answer}");
        Self {
            child,
            stdin: Some(stdin),
        }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        drop(self.stdin.take());
        self.child.wait().expect("it ends with its input");
    }
}

#[test]
fn qemu_may_read_the_base_of_an_open_disk_and_not_write_it() {
    let Some(bench) = Bench::new("qemu_may_read_the_base_of_an_open_disk_and_not_write_it") else {
        return;
    };
    for (name, _) in FORMATS {
        let _disk = Disk::open(&bench.pool, name).expect("opens");
        let base = bench.base(name);
        let info = run(Command::new("qemu-img")
            .args(["info", "-f", name])
            .arg(&base));
        assert!(info.0, "{name}: {info:?}");
        let copy = bench.dir.path().join("copy");
        let convert = run(Command::new("qemu-img")
            .args(["convert", "-O", "raw"])
            .args([&base, &copy]));
        assert!(convert.0, "{name}: {convert:?}");
        let overlay = bench.dir.path().join("overlay.qcow2");
        let mut create = Command::new("qemu-img");
        create
            .args(["create", "-f", "qcow2", "-F", name, "-b"])
            .args([&base, &overlay]);
        let create = run(&mut create);
        assert!(create.0, "{name}: {create:?}");
        let used = run(Command::new("qemu-io")
            .args(["-c", "write 0 4k", "-c", "read 1M 4k"])
            .arg(&overlay));
        assert!(used.0, "{name}: an overlay over the base: {used:?}");
        let read = run(Command::new("qemu-io")
            .args(["-r", "-f", name, "-c", "read 0 4k"])
            .arg(&base));
        assert!(read.0, "{name}: {read:?}");

        let write = run(Command::new("qemu-io")
            .args(["-f", name, "-c", "write 0 4k"])
            .arg(&base));
        assert!(!write.0 && write.1.contains("lock"), "{name}: {write:?}");
        let resize = run(Command::new("qemu-img")
            .args(["resize", "-f", name])
            .arg(&base)
            .arg("+1M"));
        assert!(!resize.0 && resize.1.contains("lock"), "{name}: {resize:?}");
        let node = format!("driver=file,node-name=f,filename={}", base.display());
        let socket = bench.dir.path().join("socket");
        let export = format!(
            "type=vhost-user-blk,id=e,node-name=f,writable=on,addr.type=unix,addr.path={}",
            socket.display()
        );
        let mut daemon = Command::new("qemu-storage-daemon");
        let serve = run(daemon.args(["--blockdev", &node, "--export", &export]));
        assert!(!serve.0 && serve.1.contains("lock"), "{name}: {serve:?}");
    }
}

#[test]
fn a_base_that_qemu_writes_is_refused_and_one_that_it_reads_is_not() {
    let Some(bench) = Bench::new("a_base_that_qemu_writes_is_refused_and_one_that_it_reads_is_not")
    else {
        return;
    };
    let base = bench.base("raw");
    let commit = || cowdisk::commit_to_base(&bench.pool, "raw", false, &mut |_, _| Ok(()));

    let writer = Holder::open(&base, &[]);
    let refused = Disk::open(&bench.pool, "raw")
        .expect_err("QEMU writes it")
        .to_string();
    let pid = format!("in use by process {}", writer.child.id());
    assert!(refused.contains(&pid), "{refused}");
    commit().expect_err("QEMU writes it");
    drop(writer);

    let reader = Holder::open(&base, &["-r"]);
    let disk = Disk::open(&bench.pool, "raw").expect("QEMU only reads it");
    let mut bytes = [0; 512];
    disk.read_at(&mut bytes, 0).expect("reads");
    assert_eq!(bytes, [7; 512]);
    disk.write_at(&[9; 4096], 0).expect("writes");
    drop(disk);
    let refused = commit()
        .expect_err("a reader would see it half done")
        .to_string();
    assert!(
        refused.contains(&format!("process {}", reader.child.id())),
        "{refused}"
    );
    drop(reader);

    commit().expect("nobody has it");
    let written = std::fs::read(&base).expect("reads");
    assert_eq!((written[0], written[4096]), (9, 7));
}
