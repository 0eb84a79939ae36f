//! Places for pools that run out of space or fail: small file systems in files, and loop devices.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Runs a program; what it printed, or what went wrong.
///
/// # Errors
/// It cannot be started, or failed.
pub(crate) fn run(program: &str, args: &[&str]) -> Result<String, String> {
    let out = Command::new(program).args(args).output();
    let out = out.map_err(|e| format!("{program}: {e}"))?;
    if out.status.success() {
        return Ok(String::from_utf8_lossy(&out.stdout).trim().to_owned());
    }
    let said = String::from_utf8_lossy(&out.stderr);
    Err(format!(
        "{program} {args:?}: {}: {}",
        out.status,
        said.trim()
    ))
}

fn text(path: &Path) -> &str {
    path.to_str().expect("ours are UTF-8")
}

/// A directory that is not in memory, which /tmp may be.
pub(crate) fn fault_dir() -> std::io::Result<tempfile::TempDir> {
    let root = std::env::var_os("TIDEPOOL_FAULT_DIR");
    tempfile::tempdir_in(root.unwrap_or_else(|| "/var/tmp".into()))
}

/// Bytes of the steps in which a file system is filled.
const STEP_MAX: u64 = 256 << 20;
const STEP_MIN: u64 = 1 << 20;

/// A mounted file system in a file.
pub(crate) struct Mounted {
    dir: tempfile::TempDir,
}

impl Mounted {
    /// # Errors
    /// Why it cannot be made here.
    pub(crate) fn new(kind: &str, len: u64) -> Result<Self, String> {
        let dir = fault_dir().map_err(|e| e.to_string())?;
        let (image, at) = (dir.path().join("image"), dir.path().join("mnt"));
        run("truncate", &["-s", &len.to_string(), text(&image)])?;
        let options: &[&str] = if kind == "ext4" {
            &["-q", "-F", "-m", "0"] // nothing kept back for root, which we may be
        } else {
            &["-q", "-f"]
        };
        run(
            &format!("mkfs.{kind}"),
            &[options, &[text(&image)]].concat(),
        )?;
        std::fs::create_dir(&at).map_err(|e| e.to_string())?;
        run(
            "mount",
            &["-t", kind, "-o", "loop", text(&image), text(&at)],
        )?;
        Ok(Self { dir })
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    fn ballast(&self) -> PathBuf {
        self.path().join("ballast")
    }

    /// Takes all space but `free` bytes or thereabouts. The figure of available bytes counts some
    /// that no file gets, so this goes in ever smaller steps.
    pub(crate) fn fill(&self, free: u64) {
        let (mut at, mut step) = (0, STEP_MAX);
        while step >= STEP_MIN {
            let stat = nix::sys::statvfs::statvfs(&self.path()).expect("mounted");
            let available = stat.blocks_available() * stat.fragment_size();
            let (offset, len) = (at.to_string(), step.to_string());
            let ballast = self.ballast();
            let args = ["-o", &offset, "-l", &len, text(&ballast)];
            if available >= free + step && run("fallocate", &args).is_ok() {
                at += step;
            } else {
                step /= 2;
            }
        }
    }

    /// Makes room again.
    pub(crate) fn relieve(&self) {
        std::fs::remove_file(self.ballast()).expect("it is there");
        run("sync", &["-f", text(&self.path())]).expect("syncs");
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // not while the test fails for another reason: that one counts
        let unmounted = run("umount", &["-l", text(&self.path())]);
        assert!(
            unmounted.is_ok() || std::thread::panicking(),
            "{unmounted:?}"
        );
    }
}

/// A loop device over a file.
pub(crate) struct Loop(PathBuf);

impl Loop {
    /// # Errors
    /// Why there is none.
    pub(crate) fn new(file: &Path) -> Result<Self, String> {
        let args = ["--find", "--show", "--direct-io=on", text(file)];
        run("losetup", &args).map(|device| Self(PathBuf::from(device)))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let detached = run("losetup", &["--detach", text(&self.0)]);
        assert!(detached.is_ok() || std::thread::panicking(), "{detached:?}");
    }
}
