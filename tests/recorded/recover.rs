//! The guest's own file system on a crashed disk: mounted by this host's kernel, which recovers
//! it, then checked file by file, then by the file system's own checker.

use super::oracle::Notes;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;
use tidepool::sync::{Mutex, OnceLock};

/// A sparse copy of a disk.
pub(crate) struct Copy(File);

impl Copy {
    pub(crate) fn create(path: &Path, len: u64) -> Result<Self, String> {
        let file = File::create(path).map_err(|e| e.to_string())?;
        file.set_len(len).map_err(|e| e.to_string())?;
        Ok(Self(file))
    }

    pub(crate) fn add(&mut self, at: u64, part: &[u8]) -> Result<(), String> {
        for (at, piece) in (at..).step_by(4096).zip(part.chunks(4096)) {
            if piece.iter().any(|byte| *byte != 0) {
                self.0.write_all_at(piece, at).map_err(|e| e.to_string())?;
            }
        }
        Ok(())
    }
}

/// Runs a program; what it printed, or why that is bad.
fn run(program: &str, args: &[&str]) -> Result<String, String> {
    let out = Command::new(program).args(args).output();
    let out = out.map_err(|e| format!("{program}: {e}"))?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    if out.status.success() {
        return Ok(text);
    }
    let said = String::from_utf8_lossy(&out.stderr);
    Err(format!("{program} {args:?}: {}: {said}{text}", out.status))
}

/// Why nothing can be mounted here, if so.
pub(crate) fn obstacle(file_system: &str, checker: &str) -> Option<String> {
    if let Err(e) = Command::new(checker).arg("-V").output() {
        return Some(format!("no {checker} here: {e}: run scripts/packages"));
    }
    drop(run("modprobe", &["-q", file_system])); // built in, loaded, or seen to be missing below
    let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if !known.split_whitespace().any(|word| word == file_system) {
        return Some(format!("this kernel has no {file_system}"));
    }
    let found = run("losetup", &["--find"]);
    found.err().map(|e| format!("no loop device: {e}"))
}

/// The program that checks a file system.
pub(crate) fn checker(file_system: &str) -> &'static str {
    match file_system {
        "ext4" => "e2fsck",
        "xfs" => "xfs_repair",
        _ => "btrfs",
    }
}

/// Mounts `image` at `at`, compares what the guest knew to be durable, and checks the file system;
/// the number of files compared.
///
/// # Errors
/// What is wrong.
pub(crate) fn recover(
    file_system: &str,
    image: &Path,
    at: &Path,
    notes: &Notes,
) -> Result<u64, String> {
    // Two images of one file system must not be mounted at once: they have one UUID.
    static ALONE: OnceLock<Mutex<()>> = OnceLock::new();
    let _alone = ALONE.get_or_init(Mutex::default).lock();
    let image = image.to_str().ok_or("a path of ours is UTF-8")?;
    let options = if file_system == "xfs" {
        "loop,nouuid"
    } else {
        "loop"
    };
    std::fs::create_dir_all(at).map_err(|e| e.to_string())?;
    let dir = at.to_str().ok_or("a path of ours is UTF-8")?;
    run("mount", &["-t", file_system, "-o", options, image, dir])?;
    let compared = compare(at, notes);
    run("umount", &[dir])?;
    let compared = compared?;
    match file_system {
        "ext4" => run("e2fsck", &["-f", "-n", image])?,
        "xfs" => run("xfs_repair", &["-n", "-f", image])?,
        _ => {
            run("btrfs", &["device", "scan", "--forget"])?;
            run("btrfs", &["check", "--readonly", image])?
        }
    };
    Ok(compared)
}

fn compare(at: &Path, notes: &Notes) -> Result<u64, String> {
    let mut paths = Vec::new();
    for path in notes.files.keys() {
        paths.push(at.join(path));
    }
    if paths.is_empty() {
        return Ok(0);
    }
    let out = Command::new("sha256sum").args(&paths).output();
    let out = out.map_err(|e| e.to_string())?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let said = String::from_utf8_lossy(&out.stderr);
    if !out.status.success() {
        return Err(format!("files that were durable are gone: {said}"));
    }
    let found = text.lines().map(|line| line.split(' ').next());
    for ((path, sum), found) in notes.files.iter().zip(found) {
        if found != Some(sum.as_str()) {
            return Err(format!("{path} was durable as {sum}, is {found:?}"));
        }
    }
    Ok(notes.files.len() as u64)
}
