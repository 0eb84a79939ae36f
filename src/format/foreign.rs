//! Formats that a disk image may come in and that are not read here, told by their first or last
//! bytes: to take them for a flat image would give a guest the container for the disk.

use super::qcow2;
use super::units::{bytes_of, len_of};

/// Bytes at the start of a file that tell.
pub const HEAD_LEN: usize = 512;
/// Bytes at the end of a file that tell.
pub const TAIL_LEN: usize = 512;

/// What an image seems to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seems {
    /// Nothing that is known: a flat image.
    Raw,
    /// A qcow2 image.
    Qcow2,
    /// A format that is not read.
    Foreign(Foreign),
}

/// A format that is not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Foreign {
    /// Its name.
    pub name: &'static str,
    /// How to make one of it that is read.
    pub way: Way,
}

/// How to make an image that is read of one that is not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// `qemu-img convert -f FORMAT`.
    Convert(&'static str),
    /// This command unpacks it.
    Unpack(&'static str),
    /// An archive with disks in it.
    Archive,
    /// With the key: `qemu-img convert --image-opts`.
    Decrypt,
}

/// Where a format has its magic.
enum At {
    Start(usize),
    /// Bytes before the end.
    End(usize),
}

const fn convert(name: &'static str, format: &'static str) -> Foreign {
    let way = Way::Convert(format);
    Foreign { name, way }
}

const fn unpack(name: &'static str, command: &'static str) -> Foreign {
    let way = Way::Unpack(command);
    Foreign { name, way }
}

const LUKS: Foreign = Foreign {
    name: "a LUKS container",
    way: Way::Decrypt,
};
const TAR: Foreign = Foreign {
    name: "an archive (tar, OVA)",
    way: Way::Archive,
};
const VMDK: Foreign = convert("a VMDK image", "vmdk");
const VPC: Foreign = convert("a VHD (VPC) image", "vpc");
const PARALLELS: Foreign = convert("a Parallels image", "parallels");

/// The magics. Those at the end come last: whoever writes a whole disk chooses them more easily.
const MAGICS: &[(At, &[u8], Foreign)] = &[
    (At::Start(0), b"KDMV", VMDK),
    (At::Start(0), b"COWD", VMDK),
    (At::Start(0), b"\xbe\xba\xfe\xca\0\0\0\0", VMDK),
    (At::Start(0), b"vhdxfile", convert("a VHDX image", "vhdx")),
    (
        At::Start(64),
        b"\x7f\x10\xda\xbe",
        convert("a VDI image", "vdi"),
    ),
    (At::Start(0), b"conectix", VPC),
    (At::Start(0), b"QED\0", convert("a QED image", "qed")),
    (At::Start(0), b"WithoutFreeSpace", PARALLELS),
    (At::Start(0), b"WithouFreSpacExt", PARALLELS),
    (
        At::Start(0),
        b"Bochs Virtual HD Image",
        convert("a Bochs image", "bochs"),
    ),
    (
        At::Start(0),
        b"#!/bin/sh\n#V2.0 Format\n",
        convert("a cloop image", "cloop"),
    ),
    (At::Start(0), b"LUKS\xba\xbe", LUKS),
    (At::Start(0), b"\x1f\x8b", unpack("gzip data", "gzip -dk")),
    (At::Start(0), b"\xfd7zXZ\0", unpack("xz data", "xz -dk")),
    (
        At::Start(0),
        b"\x28\xb5\x2f\xfd",
        unpack("zstd data", "zstd -d"),
    ),
    (
        At::Start(0),
        b"\x04\x22\x4d\x18",
        unpack("lz4 data", "lz4 -d"),
    ),
    (At::Start(0), b"BZh", unpack("bzip2 data", "bzip2 -dk")),
    (
        At::Start(0),
        b"PK\x03\x04",
        unpack("a zip archive", "unzip"),
    ),
    (
        At::Start(0),
        b"7z\xbc\xaf\x27\x1c",
        unpack("a 7z archive", "7z x"),
    ),
    (At::Start(257), b"ustar", TAR),
    (At::End(512), b"conectix", VPC),
    (At::End(511), b"conectix", VPC),
    (At::End(512), b"koly", convert("a DMG image", "dmg")),
];

/// A VMDK may be a text that names the files with the data, after comments and white space.
const VMDK_TEXT: &[u8] = b"# Disk DescriptorFile";

/// What an image seems to be whose first and last bytes these are, at most [`HEAD_LEN`] and
/// [`TAIL_LEN`] (fewer if it is shorter).
#[must_use]
pub fn tell(head: &[u8], tail: &[u8]) -> Seems {
    if head.starts_with(&qcow2::MAGIC) {
        return Seems::Qcow2;
    }
    let is_there = |at: &At, magic: &[u8]| {
        let bytes = match at {
            At::Start(skip) => head.get(*skip..),
            At::End(back) => tail.len().checked_sub(*back).and_then(|at| tail.get(at..)),
        };
        bytes.is_some_and(|bytes| bytes.starts_with(magic))
    };
    if let Some((.., foreign)) = MAGICS.iter().find(|(at, magic, _)| is_there(at, magic)) {
        return Seems::Foreign(*foreign);
    }
    let text = head.trim_ascii_start();
    if text.len() >= VMDK_TEXT.len()
        && text
            .get(..VMDK_TEXT.len())
            .is_some_and(|start| start.eq_ignore_ascii_case(VMDK_TEXT))
    {
        return Seems::Foreign(VMDK);
    }
    Seems::Raw
}

/// Where the last bytes begin of a file of `len` bytes, and how many they are.
#[must_use]
pub fn tail_of(len: u64) -> (u64, usize) {
    let tail = len.min(bytes_of(TAIL_LEN));
    (len.saturating_sub(tail), len_of(tail))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(head: &[u8], tail: &[u8]) -> &'static str {
        match tell(head, tail) {
            Seems::Raw => "raw",
            Seems::Qcow2 => "qcow2",
            Seems::Foreign(foreign) => foreign.name,
        }
    }

    #[test]
    fn every_magic_is_told_where_it_is_and_nowhere_else() {
        for (at, magic, foreign) in MAGICS {
            let mut bytes = vec![0; 512];
            let start = match at {
                At::Start(skip) => *skip,
                At::End(back) => 512 - back,
            };
            bytes[start..][..magic.len()].copy_from_slice(magic);
            match at {
                At::Start(_) => assert_eq!(name(&bytes, &[0; 512]), foreign.name),
                At::End(_) => assert_eq!(name(&[0; 512], &bytes), foreign.name),
            }
            bytes.rotate_right(7);
            assert_eq!(name(&bytes, &[0; 512]), "raw", "{}", foreign.name);
            assert_eq!(name(magic.split_last().expect("some").1, &[]), "raw");
        }
        assert_eq!(name(b"QFI\xfb\0", &[]), "qcow2");
        assert_eq!(
            name(b"\n# Disk DescriptorFile\nversion=1", &[]),
            "a VMDK image"
        );
        assert_eq!(name(&[], &[]), "raw");
    }

    #[test]
    fn the_tail_is_within_the_file() {
        assert_eq!(tail_of(0), (0, 0));
        assert_eq!(tail_of(100), (0, 100));
        assert_eq!(tail_of(5000), (4488, 512));
    }
}
