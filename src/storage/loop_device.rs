//! Block devices for tests.

use std::path::PathBuf;
use std::process::Command;

/// A loop device over a fresh sparse file; detached when dropped.
#[derive(Debug)]
pub(super) struct Loop {
    pub(super) device: PathBuf,
    pub(super) dir: tempfile::TempDir,
}

impl Loop {
    /// Makes one of `len` bytes with sectors of so many.
    ///
    /// # Errors
    /// Why it cannot be set up here.
    pub(super) fn new(len: usize, sector: &str) -> Result<Self, String> {
        let dir = tempfile::tempdir_in("/var/tmp").map_err(|error| error.to_string())?;
        let backing = dir.path().join("backing");
        let len = len.to_string();
        for argv in [
            vec!["truncate", "--size", &len],
            vec!["losetup", "--find", "--show", "--sector-size", sector],
        ] {
            let output = Command::new(argv[0])
                .args(&argv[1..])
                .arg(&backing)
                .output()
                .map_err(|error| format!("{}: {error}", argv[0]))?;
            if !output.status.success() {
                return Err(String::from_utf8_lossy(&output.stderr).into_owned());
            }
            let device = String::from_utf8_lossy(&output.stdout).trim().to_owned();
            if !device.is_empty() {
                let device = PathBuf::from(device);
                return Ok(Self { device, dir });
            }
        }
        Err("losetup named no device".to_owned())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let detached = Command::new("losetup").arg("-d").arg(&self.device).status();
        if !detached.is_ok_and(|status| status.success()) {
            eprintln!("cannot detach {}", self.device.display());
        }
    }
}
