//! What the words of a command line mean: sizes, and names of disks.

use crate::format::catalogue::{RowKind, check_name};
use std::path::PathBuf;
use std::str::FromStr;

/// Parses a size in bytes, 1 or more: `512`, `64K`, `1.5G`; K, M, G, T, P and E are powers of 1024,
/// and may be followed by `iB`. What is left of a fraction of a byte is dropped.
///
/// # Errors
/// Anything else, zero, or more than 2^63 - 1 bytes; in words for the user.
pub(super) fn parse_size(text: &str) -> Result<u64, String> {
    let fault = |what: &str| format!("{what}; sizes look like 512, 64K, 1.5G or 2T");
    let (number, unit) = split_unit(text).map_err(|what| fault(&what))?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let is_number = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    let has_digits = !whole.is_empty() && (number.len() == whole.len() || !fraction.is_empty());
    if !has_digits || !is_number(whole) || !is_number(fraction) || fraction.len() > 9 {
        return Err(fault("not a number"));
    }
    if unit == 1 && !fraction.is_empty() {
        return Err(fault("a fraction needs a unit"));
    }
    let too_large = || fault("more than 2^63 - 1 bytes");
    let whole: u128 = whole.parse().map_err(|_too_long| too_large())?;
    let scale = 10_u128.pow(u32::try_from(fraction.len()).unwrap_or(0));
    let parts: u128 = format!("0{fraction}").parse().unwrap_or(0);
    let bytes = whole
        .checked_mul(unit)
        .and_then(|bytes| bytes.checked_add(parts * unit / scale))
        .and_then(|bytes| i64::try_from(bytes).ok())
        .and_then(|bytes| u64::try_from(bytes).ok())
        .ok_or_else(too_large)?;
    match bytes {
        0 => Err(fault("nothing has zero bytes")),
        bytes => Ok(bytes),
    }
}

/// The number, and the bytes in its unit.
///
/// # Errors
/// What is wrong with the unit.
fn split_unit(text: &str) -> Result<(&str, u128), String> {
    let at = text
        .find(|c: char| c.is_ascii_alphabetic())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(at);
    let unit = unit.to_ascii_uppercase();
    let letter = unit.strip_suffix("IB").unwrap_or(&unit);
    let bytes = match letter {
        "" if unit.is_empty() => 1,
        "K" => 1 << 10,
        "M" => 1 << 20,
        "G" => 1 << 30,
        "T" => 1_u128 << 40,
        "P" => 1_u128 << 50,
        "E" => 1_u128 << 60,
        "KB" | "MB" | "GB" | "TB" | "PB" | "EB" => {
            let letter = &letter[..1];
            return Err(format!(
                "{letter}B is a power of 1000 to some and of 1024 to others: say {number}{letter}, \
                 which is of 1024"
            ));
        }
        _ => return Err("unknown unit".to_owned()),
    };
    Ok((number, bytes))
}

/// As [`parse_size`], or `none` for no size at all.
///
/// # Errors
/// As [`parse_size`].
pub(super) fn parse_size_or_none(text: &str) -> Result<OptionalSize, String> {
    match text {
        "none" => Ok(OptionalSize(None)),
        text => parse_size(text).map(|bytes| OptionalSize(Some(bytes))),
    }
}

/// A size that can be taken away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct OptionalSize(pub Option<u64>);

/// A disk or snapshot: `POOL:NAME` or `POOL:NAME@SNAP`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ItemRef {
    /// Path of the pool. It may have colons; the name cannot, so the last one splits.
    pub pool: PathBuf,
    /// Name in the pool.
    pub name: String,
}

impl std::fmt::Display for ItemRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.pool.display(), self.name)
    }
}

impl FromStr for ItemRef {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let shape = "name it POOL:NAME or POOL:NAME@SNAPSHOT, like vms.pool:vm1";
        let (pool, name) = text.rsplit_once(':').ok_or(shape)?;
        if pool.is_empty() {
            return Err(shape.to_owned());
        }
        check_item_name(name)?;
        let (pool, name) = (PathBuf::from(pool), name.to_owned());
        Ok(Self { pool, name })
    }
}

fn check_item_name(name: &str) -> Result<(), String> {
    let kind = if name.contains('@') {
        RowKind::Snapshot
    } else {
        RowKind::Disk
    };
    check_name(name, kind)
}

/// As [`ItemRef`], but a disk: no `@SNAPSHOT`.
///
/// # Errors
/// In words for the user.
pub(super) fn parse_disk(text: &str) -> Result<ItemRef, String> {
    let item: ItemRef = text.parse()?;
    match item.name.contains('@') {
        false => Ok(item),
        true => Err("that is a snapshot; name a disk, POOL:NAME".to_owned()),
    }
}

/// As [`ItemRef`], but a snapshot.
///
/// # Errors
/// In words for the user.
pub(super) fn parse_snapshot(text: &str) -> Result<ItemRef, String> {
    let item: ItemRef = text.parse()?;
    match item.name.contains('@') {
        true => Ok(item),
        false => Err("name a snapshot, POOL:NAME@SNAPSHOT".to_owned()),
    }
}

/// A second item: `POOL:NAME`, or only `NAME` for one in the pool of the first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct OtherRef {
    /// Path of the pool, if it was given.
    pub pool: Option<PathBuf>,
    /// Name in the pool.
    pub name: String,
}

impl FromStr for OtherRef {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.contains(':') {
            let ItemRef { pool, name } = text.parse()?;
            return Ok(Self {
                pool: Some(pool),
                name,
            });
        }
        check_item_name(text)?;
        Ok(Self {
            pool: None,
            name: text.to_owned(),
        })
    }
}

impl OtherRef {
    /// Its name, if it is in the pool of `first`.
    ///
    /// # Errors
    /// It is in another pool; in words for the user.
    pub(super) fn in_pool_of(&self, first: &ItemRef) -> Result<&str, String> {
        let same = |pool: &PathBuf| {
            *pool == first.pool
                || matches!((pool.canonicalize(), first.pool.canonicalize()),
                    (Ok(a), Ok(b)) if a == b)
        };
        match &self.pool {
            Some(pool) if !same(pool) => Err(format!(
                "{}:{} is in another pool than {first}; disks of two pools share nothing: \
                 export one and import it into the other",
                pool.display(),
                self.name
            )),
            Some(_) | None => Ok(&self.name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_mean_something() {
        for (text, bytes) in [
            ("512", 512),
            ("64K", 65536),
            ("64k", 65536),
            ("64KiB", 65536),
            ("1.5G", 3 << 29),
            ("2T", 2 << 40),
            ("0.5M", 1 << 19),
            ("8388607T", 8_388_607 << 40),
            ("3P", 3 << 50),
            ("7EiB", 7 << 60),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn sizes_that_mean_nothing() {
        for text in [
            "",
            "K",
            "5.5Q",
            "-1",
            "+1",
            "1e9",
            "0",
            "0K",
            "1..5G",
            "1.G",
            ".5G",
            "1 G",
            "G1",
            "0x10",
            "10GG",
            "10GB",
            "10iB",
            "1.5",
            "8E",
            "8388608T",
            "99999999999999999999999",
            "0.1",
            "1.0000000001G",
        ] {
            parse_size(text).expect_err(text);
        }
    }

    #[test]
    fn the_last_colon_splits() {
        let item: ItemRef = "/a:b/c.pool:vm1@s".parse().expect("plain");
        assert_eq!(item.pool, PathBuf::from("/a:b/c.pool"));
        assert_eq!(item.name, "vm1@s");
        for text in [
            "vm1", ":vm1", "p:", "p:a/b", "p:..", "p:a@", "p:a@b@c", "p:@s", "/a:b/c",
        ] {
            text.parse::<ItemRef>().expect_err(text);
        }
        parse_disk("p:a@s").expect_err("a snapshot");
        parse_snapshot("p:a").expect_err("a disk");
    }

    #[test]
    fn a_second_name_may_leave_the_pool_out() {
        let first: ItemRef = "p:a".parse().expect("plain");
        let name = |text: &str| {
            let other: OtherRef = text.parse().expect("plain");
            other.in_pool_of(&first).map(str::to_owned)
        };
        assert_eq!(name("b"), Ok("b".to_owned()));
        assert_eq!(name("p:b@s"), Ok("b@s".to_owned()));
        name("q:b").expect_err("another pool");
    }
}
