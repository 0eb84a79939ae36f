//! A file system that is soon full, for tests of a host without space.

use std::path::Path;
use std::process::Command;

/// A mounted tmpfs of 24 MiB; unmounted at the end.
pub(crate) struct Small {
    dir: tempfile::TempDir,
}

impl Small {
    /// `None`, and a line that says so, where `test` must not mount.
    pub(crate) fn mount(test: &str) -> Option<Self> {
        let dir = tempfile::tempdir().expect("a directory");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=24m", "tidepool-test"])
            .arg(dir.path())
            .status();
        if mounted.is_ok_and(|status| status.success()) {
            return Some(Self { dir });
        }
        #[expect(clippy::print_stdout, reason = "a test that did not run says so")]
        {
            println!("SKIPPED: {test}: tmpfs cannot be mounted here");
        }
        None
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let unmounted = Command::new("umount")
            .arg("-l")
            .arg(self.dir.path())
            .status();
        assert!(
            unmounted.is_ok_and(|status| status.success()),
            "the tmpfs is unmounted"
        );
    }
}
