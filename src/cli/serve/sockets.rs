//! The directory of the sockets, and their names in it.

use super::super::failure::Failure;
use super::Serve;
use crate::sys::file;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// Bytes of a socket's path: `sun_path` less its terminator, unix(7).
const PATH_BYTES_MAX: usize = 107;
const SUFFIX: &str = ".sock";
/// What stands for the rest of a name that is too long; no name of a disk has it.
const CUT: char = '~';
/// Hexadecimal digits that tell such names apart.
const DIGITS: usize = 16;
/// Bytes of the shortest name that any disk can be given.
const SHORTEST: usize = 1 + DIGITS + SUFFIX.len();
/// Bytes of a file's name, on nearly every file system.
const NAME_BYTES_MAX: usize = 255;

/// See the module.
#[derive(Debug)]
pub(super) struct Sockets {
    dir: PathBuf,
    /// Bytes of the longest path that clients name the directory by, as far as we know.
    len: usize,
}

impl Sockets {
    /// Makes the directory, if it is not there.
    ///
    /// # Errors
    /// It cannot be made, or its path leaves no room for the name of a socket.
    pub(super) fn open(args: &Serve) -> Result<Self, Failure> {
        let first = &args.pools[0];
        let is_device = file::kind_of(first).is_ok_and(|kind| kind == file::Kind::BlockDevice);
        let dir = args.sockets.clone();
        let dir = dir.unwrap_or_else(|| default_dir(first, is_device));
        let most = PATH_BYTES_MAX - 1 - SHORTEST;
        let len = dir.as_os_str().len();
        if len > most {
            let what =
                format!("this directory's path has {len} bytes; sockets take {most} at most");
            let hint = "name one with a shorter path, relative or through a symbolic link, by \
                        --sockets DIR: clients can connect to no longer ones";
            return Err(Failure::new("socket", dir.display(), what).hint(hint));
        }
        // A socket is a disk: not for everybody.
        let is_ours = args.sockets.is_none() && is_device;
        let mut builder = std::fs::DirBuilder::new();
        match builder.recursive(is_ours).mode(0o700).create(&dir) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists && dir.is_dir() => {}
            Err(e) => return Err(Failure::io(&dir, "make the directory for sockets", &e)),
        }
        // Clients elsewhere need a path that begins at the root, where there is one that fits.
        let whole = dir.canonicalize().map_or(0, |path| path.as_os_str().len());
        let len = if whole > most { len } else { len.max(whole) };
        Ok(Self { dir, len })
    }

    /// The directory.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The socket for `name`: `name.sock`, or where that is longer than a client can say, as much of
    /// it as there is room for, and a number made from all of it, the same each time.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        let room = PATH_BYTES_MAX.saturating_sub(self.len + 1);
        let room = room.min(NAME_BYTES_MAX);
        if name.len() + SUFFIX.len() <= room {
            return self.dir.join(format!("{name}{SUFFIX}"));
        }
        let mut kept = room.saturating_sub(SHORTEST);
        while !name.is_char_boundary(kept) {
            kept -= 1;
        }
        let (kept, number) = (&name[..kept], number_of(name));
        self.dir
            .join(format!("{kept}{CUT}{number:0DIGITS$x}{SUFFIX}"))
    }
}

/// Where the sockets of `pool` are, where nobody says: beside it, but not among the devices.
fn default_dir(pool: &Path, is_device: bool) -> PathBuf {
    let mut name = match (is_device, pool.file_name()) {
        (true, Some(name)) => Path::new("/run/tidepool").join(name),
        (true, None) | (false, _) => pool.to_owned(),
    }
    .into_os_string();
    name.push(".sockets");
    PathBuf::from(name)
}

/// FNV-1a of 64 bits: it need not be more than unlikely to meet, for sockets of one directory.
fn number_of(name: &str) -> u64 {
    let bytes = name.bytes();
    bytes.fold(0xcbf2_9ce4_8422_2325, |sum, byte| {
        (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sockets(dir: &str) -> Sockets {
        let len = dir.len();
        Sockets {
            dir: PathBuf::from(dir),
            len,
        }
    }

    #[test]
    fn sockets_are_beside_their_pool_and_not_among_devices() {
        let dir = |pool: &str, is_device| default_dir(Path::new(pool), is_device);
        assert_eq!(dir("a/p", false), PathBuf::from("a/p.sockets"));
        let device = PathBuf::from("/run/tidepool/nvme1n1.sockets");
        assert_eq!(dir("/dev/nvme1n1", true), device);
    }

    #[test]
    fn names_are_cut_where_clients_could_not_say_them() {
        let dir = sockets("/run/tidepool");
        let fits = "n".repeat(PATH_BYTES_MAX - 14 - SUFFIX.len());
        let plain = format!("/run/tidepool/{fits}.sock");
        assert_eq!(dir.path(&fits), PathBuf::from(plain));
        let cut = dir.path(&format!("{fits}n"));
        assert_eq!(cut.as_os_str().len(), PATH_BYTES_MAX);
        assert_ne!(cut, dir.path(&format!("{fits}m")), "all of it counts");
        // The same in every release: clients keep it in their configuration.
        let long = "d".repeat(128);
        let kept = "d".repeat(PATH_BYTES_MAX - 14 - SHORTEST);
        let told = format!("/run/tidepool/{kept}~{:016x}.sock", number_of(&long));
        assert_eq!(dir.path(&long), PathBuf::from(told));
        assert_eq!(number_of("a"), 0xaf63_dc4c_8601_ec8c);
    }

    #[test]
    fn the_longest_directory_still_has_room() {
        let dir = sockets(&"d".repeat(PATH_BYTES_MAX - 1 - SHORTEST));
        for name in ["\u{e9}".repeat(64), "n".repeat(128)] {
            assert_eq!(dir.path(&name).as_os_str().len(), PATH_BYTES_MAX);
        }
        let long_stem = format!("{}.d", "s".repeat(250));
        let path = sockets("s").path(&long_stem);
        assert!(path.as_os_str().len() <= PATH_BYTES_MAX);
    }
}
