//! A catalogue row: what a disk or snapshot is, apart from its map. JSON, because rows are few,
//! are read by people in dumps, and grow fields.

use super::FormatError;
use super::journal::ROW_LEN_MAX;
use super::units::{DiskId, Generation};
use serde::{Deserialize, Serialize};

/// Longest name of a disk or of a snapshot, bytes.
pub const NAME_LEN_MAX: usize = 128;

/// The format of a base image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BaseFormat {
    /// A flat image.
    Raw,
    /// QEMU's copy-on-write format.
    Qcow2,
}

/// A read-only image outside the pool, and what it looked like when it was taken as a base.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BaseRef {
    /// Absolute path.
    pub path: String,
    /// How to read it.
    pub format: BaseFormat,
    /// Device number of its file system.
    pub dev: u64,
    /// Inode number.
    pub ino: u64,
    /// Bytes of the file (not of the virtual disk in it).
    pub file_len: u64,
    /// Time of the last write, nanoseconds since 1970.
    pub mtime_ns: i64,
    /// Time of the last change of the inode, nanoseconds since 1970.
    pub ctime_ns: i64,
    /// The other files it is read from, from the top down: data files and backing files. `None` in
    /// rows of before these were kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub below: Option<Vec<FileRef>>,
    /// Samples of what it reads as. `None` in rows of before these were kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub samples: Option<Samples>,
}

impl BaseRef {
    /// The paths of all files that it is read from, as far as they are known.
    pub fn paths(&self) -> impl Iterator<Item = &str> {
        let below = self.below.iter().flatten();
        [self.path.as_str()]
            .into_iter()
            .chain(below.map(|file| file.path.as_str()))
    }
}

/// A file below the top one of a base, and what it looked like when that was taken as a base.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileRef {
    /// Absolute path.
    pub path: String,
    /// Inode number.
    pub ino: u64,
    /// Bytes.
    pub file_len: u64,
    /// Time of the last write, nanoseconds since 1970.
    pub mtime_ns: i64,
}

/// What is remembered of the contents of a base, to know it again where nothing else is as it was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Samples {
    /// Bytes of the virtual disk.
    pub len: u64,
    /// CRC-32C of a few blocks of each of as many equal parts.
    pub crcs: Vec<u32>,
}

/// What a row describes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RowKind {
    /// Writable.
    Disk,
    /// Read-only state of a disk; its name is `DISK@SNAPSHOT`.
    Snapshot,
}

/// A disk or snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    /// Its identity.
    pub id: DiskId,
    /// Unique in the pool. See [`check_name`].
    pub name: String,
    /// Writable or not.
    pub kind: RowKind,
    /// What it was forked from, while that exists; its grandparent after that, if that is still
    /// what the parent was forked from.
    pub parent: Option<DiskId>,
    /// The disk all disks related to it by fork began with.
    pub family: DiskId,
    /// Bytes; a multiple of 512.
    pub size: u64,
    /// Seconds since 1970.
    pub created: u64,
    /// Generation it was created in, forked in, or last equal to its parent in, by a commit: what it
    /// allocated since counts for its quota, and if its parent changed since, it is not committed.
    pub birth_generation: Generation,
    /// What unwritten parts read as, instead of zeros.
    pub base: Option<BaseRef>,
    /// Bytes from the start that may come from the base.
    pub base_len: u64,
    /// Most bytes of data it may hold of its own.
    pub limit: Option<u64>,
    /// Bytes of pool space kept for it.
    pub reserve: Option<u64>,
    /// Flushes need not reach the device: contents may be lost in a crash, never mixed up.
    pub is_ephemeral: bool,
}

impl Row {
    /// As JSON.
    ///
    /// # Errors
    /// Longer than [`ROW_LEN_MAX`].
    pub fn to_json(&self) -> Result<Vec<u8>, FormatError> {
        let reason = |e: serde_json::Error| FormatError::Row {
            reason: e.to_string(),
        };
        let json = serde_json::to_vec(self).map_err(reason)?;
        if json.len() > ROW_LEN_MAX {
            let reason = format!("{} bytes; the most is {ROW_LEN_MAX}", json.len());
            return Err(FormatError::Row { reason });
        }
        Ok(json)
    }

    /// From JSON.
    ///
    /// # Errors
    /// Not the JSON of a row, or a row that cannot be.
    pub fn from_json(json: &[u8]) -> Result<Row, FormatError> {
        let row: Row = serde_json::from_slice(json).map_err(|e| FormatError::Row {
            reason: e.to_string(),
        })?;
        let bad = |field, value| FormatError::Field {
            what: "catalogue row",
            field,
            value,
        };
        if row.id.0 == 0 {
            return Err(bad("id", 0));
        }
        if row.size == 0 || !row.size.is_multiple_of(super::units::SECTOR) {
            return Err(bad("size", row.size));
        }
        // Ids only grow: a parent is older, and chains of parents end.
        if let Some(parent) = row
            .parent
            .filter(|parent| *parent >= row.id || parent.0 == 0)
        {
            return Err(bad("parent", u64::from(parent.0)));
        }
        if row.family.0 == 0 || row.family > row.id {
            return Err(bad("family", u64::from(row.family.0)));
        }
        if row.base_len > row.size {
            return Err(bad("base_len", row.base_len));
        }
        check_name(&row.name, row.kind).map_err(|reason| FormatError::Row {
            reason: format!("name: {reason}"),
        })?;
        Ok(row)
    }
}

/// Whether `name` may name a disk, or `DISK@SNAPSHOT` a snapshot. Parts are 1 to
/// [`NAME_LEN_MAX`] bytes of `A-Z a-z 0-9 . _ - +`, and do not begin with `.` or `-`: they become
/// file names and arguments.
///
/// # Errors
/// What is wrong, for people.
pub fn check_name(name: &str, kind: RowKind) -> Result<(), String> {
    match kind {
        RowKind::Disk => check_part(name),
        RowKind::Snapshot => match name.split_once('@') {
            None => Err(format!("a snapshot is named DISK@SNAPSHOT, not `{name}`")),
            Some((disk, snapshot)) => check_part(disk).and_then(|()| check_part(snapshot)),
        },
    }
}

fn check_part(part: &str) -> Result<(), String> {
    if part.is_empty() {
        return Err("a name cannot be empty".to_owned());
    }
    if part.len() > NAME_LEN_MAX {
        return Err(format!(
            "a name has at most {NAME_LEN_MAX} bytes, this has {}",
            part.len()
        ));
    }
    if part.starts_with(['.', '-']) {
        return Err(format!(
            "`{part}` begins with `{}`",
            part.chars().next().unwrap_or('.')
        ));
    }
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '+');
    match part.chars().find(|c| !is_plain(*c)) {
        None => Ok(()),
        Some(c) => Err(format!(
            "`{part}` has {c:?}; names have letters, digits and . _ - + only"
        )),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn sample_row(id: u32) -> Row {
        Row {
            id: DiskId(id),
            name: format!("vm{id}"),
            kind: RowKind::Disk,
            parent: None,
            family: DiskId(id),
            size: 1 << 30,
            created: 1_700_000_000,
            birth_generation: Generation(1),
            base: None,
            base_len: 0,
            limit: Some(1 << 20),
            reserve: None,
            is_ephemeral: false,
        }
    }

    #[test]
    fn rows_round_trip_and_bad_ones_are_refused() {
        let row = sample_row(3);
        assert_eq!(
            Row::from_json(&row.to_json().expect("short")),
            Ok(row.clone())
        );
        let bad = |change: &dyn Fn(&mut Row)| {
            let mut row = row.clone();
            change(&mut row);
            Row::from_json(&row.to_json().expect("short"))
        };
        bad(&|row| row.size = 0).expect_err("a row that cannot be");
        bad(&|row| row.size = 513).expect_err("a row that cannot be");
        bad(&|row| row.id = DiskId(0)).expect_err("a row that cannot be");
        bad(&|row| row.name = "../etc".to_owned()).expect_err("a row that cannot be");
        Row::from_json(b"{}").expect_err("no fields");
    }

    #[test]
    fn names_that_could_escape_a_directory_are_refused() {
        for name in ["", "..", ".x", "a/b", "a\0b", "-n", "a b", "a@b", "\u{e9}"] {
            assert!(check_name(name, RowKind::Disk).is_err(), "{name:?} passed");
        }
        assert!(check_name(&"x".repeat(129), RowKind::Disk).is_err());
        check_name("vm-1.img+x_2", RowKind::Disk).expect("plain");
        check_name("vm1@s1", RowKind::Snapshot).expect("plain");
        assert!(check_name("vm1@", RowKind::Snapshot).is_err());
        assert!(check_name("vm1@a@b", RowKind::Snapshot).is_err());
        assert!(check_name("vm1", RowKind::Snapshot).is_err());
    }
}
