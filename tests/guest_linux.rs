//! Goal: a real Linux, with its own driver, its own file system and its own judgement, finds on a
//! served disk what it wrote, over a power-off and over a restart of the server, under load too;
//! and an export is what the guest saw.
//!
//! Method: QEMU (TCG, so no KVM is needed) boots Debian's cloud kernel from a fork of a small
//! base disk, both over vhost-user-blk with two queues. The first boot loads a data disk with fio
//! (checksummed, trims mixed in), ext4 and fsx; the second checks it with e2fsck and fio; during the
//! third the server is restarted, again and again, while fio verifies what it wrote. The jobs
//! are shell scripts in `tests/guest/`, their results marked lines on the serial console.
//! `TIDEPOOL_BIN` names another program to test.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::thread::sleep;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

/// What the first boot must report as done, in order. fsx is apart: it may not have been built.
const WRITE_STEPS: &[&str] = &[
    "queues",
    "discard-offered",
    "fio-raw",
    "discard",
    "discarded-is-zero",
    "mkfs",
    "mount",
    "fio-files",
    "fsx",
    "fill",
    "copy",
    "unlink",
    "fstrim",
    "umount",
];
const VERIFY_STEPS: &[&str] = &[
    "fsck",
    "mount",
    "fio-verify",
    "append",
    "umount",
    "fsck-again",
];

/// Longest wait for the server to open its sockets or to end, in polls of `POLL`.
const POLLS_MAX: u32 = 1200;
const POLL: Duration = Duration::from_millis(50);

#[test]
fn linux_guest_keeps_its_data_over_power_off() {
    let Some(program) = program() else {
        return skip("this crate has no program `tidepool` yet");
    };
    let image = match guest_image() {
        Ok(image) => image,
        Err(reason) => return skip(&reason),
    };
    let dir = TempDir::new().expect("a scratch directory can be made");
    let bench = Bench {
        program,
        image,
        dir: dir.path().to_owned(),
        pool: path_text(&dir.path().join("guest.pool")),
    };

    let base = path_text(&bench.image.join("base.raw"));
    bench.tidepool(&["pool", "create", &bench.pool, "--size", "2G"]);
    bench.tidepool(&["disk", "import", &base, &bench.disk("base")]);
    bench.tidepool(&["disk", "fork", &bench.disk("base"), &bench.disk("root")]);
    bench.tidepool(&["disk", "create", &bench.disk("data"), "--size", "192M"]);

    let wrote = bench.boot("write", 0);
    assert_eq!(wrote.steps(), wrote.expected(WRITE_STEPS));
    bench.tidepool(&["pool", "check", &bench.pool]);
    let exported = bench.export("data", "raw");
    assert_eq!(
        sum(&exported),
        wrote.value("device"),
        "export after the first boot"
    );

    let found = bench.boot("verify", 0);
    assert_eq!(found.steps(), found.expected(VERIFY_STEPS));
    assert_eq!(
        found.value("files"),
        wrote.value("files"),
        "file contents after the second boot"
    );
    bench.tidepool(&["pool", "check", &bench.pool]);
    let raw = bench.export("data", "raw");
    assert_eq!(
        sum(&raw),
        found.value("device"),
        "export after the second boot"
    );
    let qcow2 = bench.export("data", "qcow2");
    run(
        "qemu-img",
        &[
            "compare",
            "-f",
            "raw",
            "-F",
            "qcow2",
            &path_text(&raw),
            &path_text(&qcow2),
        ],
    );

    let load = bench.boot("restart", 3);
    assert_eq!(load.steps(), ["load", "whole"]);
    bench.tidepool(&["pool", "check", &bench.pool]);

    // the guest wrote to its fork of the base; the base must not know
    let parent = path_text(&bench.export("base", "raw"));
    run(
        "qemu-img",
        &["compare", "-f", "raw", "-F", "raw", &base, &parent],
    );
}

/// The program under test and where it works.
struct Bench {
    program: PathBuf,
    image: PathBuf,
    dir: PathBuf,
    pool: String,
}

impl Bench {
    fn disk(&self, name: &str) -> String {
        format!("{}:{name}", self.pool)
    }

    fn tidepool(&self, args: &[&str]) {
        run(&path_text(&self.program), args);
    }

    fn export(&self, name: &str, format: &str) -> PathBuf {
        let file = self.dir.join(format!("{name}.{format}"));
        if file.exists() {
            fs::remove_file(&file).expect("an earlier export can be removed");
        }
        self.tidepool(&[
            "disk",
            "export",
            &self.disk(name),
            &path_text(&file),
            "--format",
            format,
        ]);
        file
    }

    /// Serves the pool, boots Linux with `root` and `data`, waits for its power-off, and stops
    /// serving as Ctrl-C does. Until then the server is restarted `restarts` times, each time that it
    /// has work to do.
    fn boot(&self, job: &str, restarts: u32) -> Console {
        let sockets = self.dir.join(format!("sockets-{job}"));
        fs::create_dir(&sockets).expect("the socket directory can be made");
        let disks = [sockets.join("root.sock"), sockets.join("data.sock")];
        let mut server = Server::start(&self.program, &self.pool, &sockets, &disks);

        let script = self.dir.join(format!("job-{job}"));
        let parts = ["common", job].map(|part| {
            let path = repository().join(format!("tests/guest/job-{part}"));
            fs::read_to_string(&path).expect("the job is in the repository")
        });
        fs::write(&script, parts.concat()).expect("the job can be written");
        let console = self.dir.join(format!("console-{job}"));
        let mut guest = Command::new("bash");
        guest.args([
            "-euo",
            "pipefail",
            "-c",
            ". scripts/lib.sh; guest_run \"$@\"",
            "guest",
        ]);
        guest.args([&self.image, &script, &console]).args(&disks);
        let guest = guest.current_dir(repository()).spawn();
        let mut guest = guest.expect("bash can be started");
        for _ in 0..restarts {
            server.work();
            let ended = server.stop();
            assert!(ended.success(), "tidepool serve did not end: {ended}");
            server = Server::start(&self.program, &self.pool, &sockets, &disks);
        }
        let ran = guest.wait().expect("bash is our child");
        let console = Console::read(&console);
        assert!(
            ran.success(),
            "boot `{job}` failed ({ran}); its console:\n{}",
            console.0
        );

        let ended = server.stop();
        assert!(
            ended.success(),
            "tidepool serve did not end cleanly: {ended}"
        );
        console
    }
}

/// A running `tidepool serve`; killed if the test ends without stopping it.
struct Server(Child);

impl Server {
    fn start(program: &Path, pool: &str, sockets: &Path, wanted: &[PathBuf]) -> Self {
        let mut command = Command::new(program);
        command.args(["serve", pool, "--sockets"]).arg(sockets);
        let mut server = Self(command.spawn().expect("tidepool can be started"));
        server.poll("open its sockets", |child| {
            if let Some(status) = child.try_wait().expect("the server is our child") {
                panic!("tidepool serve ended early: {status}");
            }
            wanted.iter().all(|socket| socket.exists()).then_some(())
        });
        server
    }

    /// Waits until the guest has written 4 MiB: then it has more under way.
    fn work(&mut self) {
        self.poll("do any work", |child| {
            let io = fs::read_to_string(format!("/proc/{}/io", child.id())).ok()?;
            let counts = io.lines().filter_map(|line| {
                let (name, count) = line.split_once(": ")?;
                matches!(name, "wchar" | "write_bytes").then(|| count.parse::<u64>().ok())?
            });
            counts.max().filter(|bytes| *bytes >= 4 << 20).map(drop)
        });
    }

    fn stop(&mut self) -> ExitStatus {
        let pid = i32::try_from(self.0.id()).expect("a pid is an i32");
        kill(Pid::from_raw(pid), Signal::SIGINT).expect("the server is still running");
        self.poll("end", |child| {
            child.try_wait().expect("the server is our child")
        })
    }

    fn poll<T>(&mut self, what: &str, mut done: impl FnMut(&mut Child) -> Option<T>) -> T {
        for _ in 0..POLLS_MAX {
            if let Some(value) = done(&mut self.0) {
                return value;
            }
            sleep(POLL);
        }
        panic!(
            "tidepool serve did not {what} within {:?}",
            POLL * POLLS_MAX
        );
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // both fail only when it has ended already, which is what is wanted
        let killed = self.0.kill();
        let waited = self.0.wait();
        drop((killed, waited));
    }
}

/// What a guest printed on its serial console.
struct Console(String);

impl Console {
    fn read(path: &Path) -> Self {
        let bytes = fs::read(path).unwrap_or_default();
        Self(String::from_utf8_lossy(&bytes).replace('\r', ""))
    }

    fn reports(&self, kind: &str) -> impl Iterator<Item = &str> {
        let start = format!("TIDEPOOL-GUEST: {kind} ");
        self.0
            .lines()
            .filter_map(move |line| line.strip_prefix(&start))
    }

    /// The steps that went well, in order, without the boot itself.
    fn steps(&self) -> Vec<&str> {
        self.reports("ok")
            .filter(|name| !name.starts_with("boot-"))
            .collect()
    }

    /// `steps` less those that the guest skipped; each is printed to be counted.
    fn expected<'a>(&self, steps: &[&'a str]) -> Vec<&'a str> {
        let skipped: Vec<(&str, &str)> = self
            .reports("skip")
            .filter_map(|text| text.split_once(' '))
            .collect();
        for (name, reason) in &skipped {
            print_skip(&format!("guest_linux/{name}: {reason}"));
        }
        let is_skipped = |step: &str| skipped.iter().any(|(name, _)| *name == step);
        steps
            .iter()
            .copied()
            .filter(|step| !is_skipped(step))
            .collect()
    }

    fn value(&self, name: &str) -> &str {
        let mut values = self
            .reports("value")
            .filter_map(|text| text.split_once(' '));
        let found = values.find(|(key, _)| *key == name);
        found.expect("the guest reported this value").1
    }
}

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn program() -> Option<PathBuf> {
    let given = env::var_os("TIDEPOOL_BIN").map(PathBuf::from);
    given.or_else(|| option_env!("CARGO_BIN_EXE_tidepool").map(PathBuf::from))
}

/// The directory of the guest's kernel and disks, built if it must be.
///
/// # Errors
/// Why there is no guest to be had here: the last line of what the script said.
fn guest_image() -> Result<PathBuf, String> {
    for program in ["qemu-system-x86_64", "qemu-img"] {
        if Command::new(program).arg("--version").output().is_err() {
            return Err(format!("no {program} here: run scripts/packages"));
        }
    }
    let script = repository().join("scripts/guest-image");
    let out = Command::new(&script)
        .output()
        .map_err(|e| format!("{}: {e}", script.display()))?;
    if !out.status.success() {
        let said = String::from_utf8_lossy(&out.stderr);
        return Err(format!(
            "no guest image: {}",
            said.lines().last().unwrap_or("no reason given")
        ));
    }
    Ok(PathBuf::from(String::from_utf8_lossy(&out.stdout).trim()))
}

/// SHA-256 of a file, as the guest prints it.
fn sum(file: &Path) -> String {
    let out = run("sha256sum", &[&path_text(file)]);
    out.split(' ').next().unwrap_or_default().to_owned()
}

/// Runs a program that must succeed; what it printed.
fn run(program: &str, args: &[&str]) -> String {
    let out = Command::new(program)
        .args(args)
        .output()
        .expect("the program can be started");
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(
        out.status.success(),
        "{program} {args:?}: {}\n{text}{said}",
        out.status
    );
    text
}

fn path_text(path: &Path) -> String {
    path.to_str().expect("scratch paths are UTF-8").to_owned()
}

fn skip(reason: &str) {
    print_skip(&format!("guest_linux: {reason}"));
}

#[expect(clippy::print_stderr, reason = "scripts/test counts these lines")]
fn print_skip(text: &str) {
    eprintln!("SKIPPED: {text}");
}
