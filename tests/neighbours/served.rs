//! A daemon of its own process, so that what it takes of the machine can be told from what its guests
//! take.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use tempfile::TempDir;
use tidepool::cowdisk::{self, NewDisk};
use tidepool::format::units::ClusterSize;
use tidepool::pool::{CreateOptions, OpenOptions, Pool, open};
use tidepool::storage::FileStorage;

/// Longer than anything takes that is going to happen.
const SOON: Duration = Duration::from_secs(20);

/// Ticks of /proc/PID/stat in a second (`USER_HZ`, the same on all that Linux runs on).
const TICKS: u64 = 100;

/// A pool with disks.
pub struct Plan {
    pub pool_len: u64,
    pub cluster: u64,
    /// Names and sizes in bytes.
    pub disks: Vec<(String, u64)>,
    /// The file is in memory, not on a device.
    pub in_memory: bool,
}

/// A running `tidepool serve`.
pub struct Served {
    child: Child,
    dir: TempDir,
    lines: Receiver<String>,
}

impl Served {
    /// Makes the pool, fills the first `filled` bytes of each disk, and serves it.
    pub fn start(plan: &Plan, filled: u64, args: &[&str]) -> Self {
        let root = if plan.in_memory {
            "/dev/shm"
        } else {
            "/var/tmp"
        };
        let dir = tempfile::tempdir_in(root).expect("a directory");
        // Sockets beside the pool: their paths are short everywhere.
        let path = dir.path().join("p");
        make(&path, plan, filled);
        // Another build of it can be tried by naming it.
        let program = std::env::var_os("TIDEPOOL");
        let program = program.unwrap_or_else(|| env!("CARGO_BIN_EXE_tidepool").into());
        let mut child = Command::new(program)
            .arg("serve")
            .arg(&path)
            .args(args)
            .arg("--sockets")
            .arg(dir.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("the daemon starts");
        let mut out = BufReader::new(child.stdout.take().expect("piped")).lines();
        let is_ready = out.any(|line| line.is_ok_and(|line| line.contains("ready")));
        assert!(is_ready, "it says when it is ready");
        // It says more: somebody must listen.
        let (to, lines) = channel();
        let listen = move || {
            let mut lines = out.map_while(Result::ok);
            // Until the test is over.
            while lines.next().is_some_and(|line| to.send(line).is_ok()) {}
        };
        std::thread::Builder::new().spawn(listen).expect("a thread");
        Self { child, dir, lines }
    }

    /// Waits until it says `words`.
    pub fn hear(&self, words: &str) -> bool {
        let next = || self.lines.recv_timeout(SOON).ok();
        std::iter::from_fn(next).any(|line| line.contains(words))
    }

    /// Lets it have `count` descriptors at most.
    ///
    /// # Errors
    /// There is no program for that here.
    pub fn limit_descriptors(&self, count: usize) -> std::io::Result<()> {
        let pid = self.child.id().to_string();
        let limit = format!("--nofile={count}:");
        let status = Command::new("prlimit")
            .args(["--pid", &pid, &limit])
            .status()?;
        assert!(status.success(), "{limit}");
        Ok(())
    }

    pub fn socket(&self, disk: &str) -> PathBuf {
        self.dir.path().join(format!("{disk}.sock"))
    }

    fn proc(&self, file: &str) -> String {
        let path = format!("/proc/{}/{file}", self.child.id());
        std::fs::read_to_string(path).expect("it runs")
    }

    /// CPU time it has used.
    pub fn cpu(&self) -> Duration {
        let stat = self.proc("stat");
        let fields = stat.rsplit(')').next().expect("fields");
        let times = fields.split_whitespace().skip(11).take(2);
        let ticks: u64 = times.filter_map(|time| time.parse::<u64>().ok()).sum();
        Duration::from_millis(ticks * 1000 / TICKS)
    }

    /// Bytes of memory it has.
    pub fn resident(&self) -> u64 {
        let status = self.proc("status");
        let line = status.lines().find(|line| line.starts_with("VmRSS:"));
        let kib = line.and_then(|line| line.split_whitespace().nth(1));
        kib.and_then(|kib| kib.parse::<u64>().ok()).expect("a size") << 10
    }

    /// Mappings and descriptors it has.
    pub fn holds(&self) -> (usize, usize) {
        let fds = std::fs::read_dir(format!("/proc/{}/fd", self.child.id()));
        let fds = fds.expect("procfs").count();
        (self.proc("maps").lines().count(), fds)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // Fails if it has ended, which a test would have seen.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Every byte of a filled disk is its 4 KiB block's number modulo 251.
pub fn pattern(block: u64) -> u8 {
    u8::try_from(block % 251).expect("a byte")
}

fn make(path: &Path, plan: &Plan, filled: u64) {
    let file = Arc::new(FileStorage::create_new(path, plan.pool_len).expect("a file"));
    let cluster = ClusterSize::from_log2(plan.cluster.ilog2()).expect("a cluster size");
    let options = CreateOptions {
        cluster_size: cluster,
        ..CreateOptions::new(plan.pool_len)
    };
    open::create(&*file, &options).expect("a pool");
    let pool = Pool::open(file, &OpenOptions::default()).expect("it opens");
    for (name, size) in &plan.disks {
        cowdisk::create(&pool, &NewDisk::empty(name, *size)).expect("a disk");
        let disk = cowdisk::Disk::open(&pool, name).expect("it opens");
        for mib in 0..filled >> 20 {
            let bytes: Vec<u8> = (mib * 256..(mib + 1) * 256)
                .flat_map(|block| [pattern(block); 4096])
                .collect();
            disk.write_at(&bytes, mib << 20).expect("space");
        }
    }
    pool.close().expect("closed");
}
