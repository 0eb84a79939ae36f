//! A base that moved, or was put back from a copy: its contents are compared with those of the old
//! one, or with what is remembered of them, and all disks and snapshots that have it get the new
//! reference. What they read stays the same, so this is safe for all of them at once.

use super::base::{Base, is_same, samples};
use super::error::DiskError;
use super::manage::{check_unused, put_row};
use super::transfer::Progress;
use crate::format::catalogue::{BaseFormat, BaseRef, Row};
use crate::format::journal::{Record, SLOT_LEN, slots_of};
use crate::format::units::{bytes_of, len_of};
use crate::pool::catalogue::Item;
use crate::pool::commit::SMALL_CHANGE_LEN_MAX;
use crate::pool::{Pool, PoolError};
use crate::sync::Arc;
use std::path::PathBuf;

/// Most bytes compared at once.
const PART_LEN: u64 = 1 << 20;

/// What is to become of a base.
#[derive(Debug, Clone)]
pub struct Rebase {
    /// Where it is now, and its format; `None` for what is at the old path.
    pub base: Option<(PathBuf, BaseFormat)>,
    /// Takes the new one without a look at its contents.
    pub is_trusted: bool,
    /// Leaves other disks and snapshots that have the base with the old one.
    pub is_alone: bool,
}

/// What was found out about the new base.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compared {
    /// It reads as the old one, all of it: this many bytes.
    All(u64),
    /// The old one is not there. The size, and this many bytes of samples taken when the old one became
    /// a base, are the same.
    Samples(u64),
    /// Nothing: it was to be trusted.
    Nothing,
}

/// What a rebase did.
#[derive(Debug, Clone)]
pub struct Rebased {
    /// The path of the base now.
    pub path: String,
    /// The disks and snapshots that have the new reference.
    pub names: Vec<String>,
    /// What that rests on.
    pub compared: Compared,
}

/// Gives the disk or snapshot `name`, and all of the pool that have the same base, a new reference to
/// it. `progress` is told bytes compared. Many disks take several batches, each all or nothing; begun
/// again it does the rest.
///
/// # Errors
/// No such disk, no base, in use, the new base cannot become one, it reads otherwise than the old
/// one, or nothing is known of the old one.
pub fn rebase(
    pool: &Arc<Pool>,
    name: &str,
    how: &Rebase,
    progress: Progress<'_>,
) -> Result<Rebased, DiskError> {
    let item = pool.find(name)?;
    let Some(was) = &item.row.base else {
        let what = format!("`{name}` has no base");
        return Err(PoolError::invalid(what).into());
    };
    let (path, format) = match &how.base {
        Some((path, format)) => (path.clone(), *format),
        None => (PathBuf::from(&was.path), was.format),
    };
    // Open until it is in all rows.
    let (base, now) = Base::adopt(&path, format)?;
    let compared = match how.is_trusted {
        true => Compared::Nothing,
        false => compare(was, &base, &now, progress)?,
    };
    let mut items: Vec<Item> = pool
        .items()
        .into_iter()
        .filter(|other| match how.is_alone {
            true => other.row.id == item.row.id,
            false => other
                .row
                .base
                .as_ref()
                .is_some_and(|base| is_one(base, was)),
        })
        .collect();
    let names = items.iter().map(|item| item.row.name.clone()).collect();
    items.iter().try_for_each(check_unused)?;
    while !items.is_empty() {
        let rest = items.split_off(fitting(&items, &now)?);
        put_base(pool, &items, &now)?;
        items = rest;
    }
    Ok(Rebased {
        path: now.path,
        names,
        compared,
    })
}

/// Whether both rows have one base, which may have been changed between them.
fn is_one(a: &BaseRef, b: &BaseRef) -> bool {
    is_same(a, b) && (a.samples == b.samples || a.samples.is_none() || b.samples.is_none())
}

fn row_with(item: &Item, base: &BaseRef) -> Row {
    Row {
        base: Some(base.clone()),
        ..item.row.clone()
    }
}

/// How many of the first items fit one batch; at least one.
fn fitting(items: &[Item], base: &BaseRef) -> Result<usize, PoolError> {
    let (mut len, mut count) = (0, 0);
    for item in items {
        let slots = slots_of(&Record::Row(Box::new(row_with(item, base))))?;
        len += bytes_of(slots * SLOT_LEN);
        if len > SMALL_CHANGE_LEN_MAX && count > 0 {
            break;
        }
        count += 1;
    }
    Ok(count)
}

fn put_base(pool: &Arc<Pool>, items: &[Item], base: &BaseRef) -> Result<(), DiskError> {
    let volumes: Vec<_> = items.iter().map(|item| Arc::clone(&item.volume)).collect();
    pool.transact(&volumes, |transaction| {
        for item in items {
            let now = pool.find(&item.row.name)?;
            if now.row != item.row {
                let name = item.row.name.clone();
                return Err(PoolError::InUse { name });
            }
            check_unused(&now)?;
        }
        for item in items {
            put_row(transaction, item, row_with(item, base))?;
        }
        Ok(())
    })?;
    Ok(())
}

/// `Err` unless `base` reads as the one that `was` names.
fn compare(
    was: &BaseRef,
    base: &Arc<Base>,
    now: &BaseRef,
    progress: Progress<'_>,
) -> Result<Compared, DiskError> {
    let differs = |what: String| DiskError::Base {
        path: now.path.clone(),
        what: format!("{what}; nothing was changed"),
    };
    if let Ok(old) = Base::open(was) {
        let (len, new) = (old.disk_len(), base.disk_len());
        if len != new {
            let what = format!("its disk has {new} bytes, that of {} has {len}", was.path);
            return Err(differs(what));
        }
        if !Arc::ptr_eq(&old, base)
            && let Some(at) = first_difference(&old, base, progress)?
        {
            let what = format!("it differs from {} at byte {at}", was.path);
            return Err(differs(what));
        }
        return Ok(Compared::All(len));
    }
    let (Some(was_samples), Some(now_samples)) = (&was.samples, &now.samples) else {
        let what = "the old one is not there to compare it with, and no samples of it were kept: \
                    an older version made the disk; --trust takes it unseen";
        return Err(differs(what.to_owned()));
    };
    if was_samples.len != now_samples.len {
        let (now, was) = (now_samples.len, was_samples.len);
        let what = format!("its disk has {now} bytes, that of the old one had {was}");
        return Err(differs(what));
    }
    match samples::difference(was_samples, now_samples) {
        Some(part) => Err(differs(format!(
            "it differs from the samples kept of the old one, first within bytes {} to {}",
            part.start, part.end
        ))),
        None => Ok(Compared::Samples(samples::looked_at(was_samples.len))),
    }
}

/// The first byte in which two bases of one size differ.
fn first_difference(
    one: &Base,
    two: &Base,
    progress: Progress<'_>,
) -> Result<Option<u64>, DiskError> {
    let reading = || DiskError::io("comparing the base images");
    let total = one.disk_len();
    let mut bufs = [(); 2].map(|()| vec![0; len_of(PART_LEN)]);
    let mut at = 0;
    while at < total {
        let mut next = total;
        for base in [one, two] {
            let data = match at < base.len() {
                true => base.next_data(at).map_err(reading())?,
                false => None,
            };
            next = next.min(data.map_or(total, |(start, _)| start.max(at)));
        }
        at = next;
        let len = len_of(PART_LEN.min(total - at));
        let [first, second] = &mut bufs;
        let (first, second) = (&mut first[..len], &mut second[..len]);
        one.read_at(first, at).map_err(reading())?;
        two.read_at(second, at).map_err(reading())?;
        if let Some(byte) = first.iter().zip(&*second).position(|(a, b)| a != b) {
            return Ok(Some(at + bytes_of(byte)));
        }
        at += bytes_of(len);
        progress(at, total)?;
    }
    Ok(None)
}
