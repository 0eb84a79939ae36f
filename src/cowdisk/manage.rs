//! Creating, removing and changing disks.

use super::base::Base;
use super::error::DiskError;
use super::fork::same_item;
use crate::format::catalogue::{BaseFormat, Row, RowKind, check_name};
use crate::format::journal::{Record, SLOT_LEN};
use crate::format::units::{DiskId, Generation, SECTOR, bytes_of};
use crate::pool::account::Quota;
use crate::pool::catalogue::{Item, renamed};
use crate::pool::map::Tree;
use crate::pool::transaction::Transaction;
use crate::pool::volume::Volume;
use crate::pool::{Pool, PoolError, PoolErrorKind};
use crate::storage::unix_seconds;
use crate::sync::Arc;
use crate::sync::atomic::Ordering;
use std::collections::BTreeSet;
use std::path::PathBuf;

/// A disk to be made.
#[derive(Debug, Clone)]
pub struct NewDisk {
    /// Its name.
    pub name: String,
    /// Bytes, rounded up to sectors; the base's size if `None`.
    pub size: Option<u64>,
    /// What it reads as where it was not written, instead of zeros.
    pub base: Option<(PathBuf, BaseFormat)>,
    /// Most bytes of data it may hold of its own.
    pub limit: Option<u64>,
    /// Bytes of pool space kept for it.
    pub reserve: Option<u64>,
    /// Flushes need not reach the device.
    pub is_ephemeral: bool,
}

impl NewDisk {
    /// A view over zeros.
    #[must_use]
    pub fn empty(name: &str, size: u64) -> Self {
        Self {
            name: name.to_owned(),
            size: Some(size),
            base: None,
            limit: None,
            reserve: None,
            is_ephemeral: false,
        }
    }
}

/// Makes a disk.
///
/// # Errors
/// A name that is taken or impossible, a size out of range, a base that cannot be read, a reserve
/// the pool has no space for, or as [`Pool::flush`].
pub fn create(pool: &Arc<Pool>, new: &NewDisk) -> Result<(), DiskError> {
    check_name(&new.name, RowKind::Disk).map_err(PoolError::invalid)?;
    let adopted = new
        .base
        .as_ref()
        .map(|(path, format)| Base::adopt(path, *format));
    // Open until the row that names it is durable.
    let base = adopted.transpose()?;
    let base_len = base.as_ref().map_or(0, |(base, _)| base.disk_len());
    let size = new.size.unwrap_or(base_len).next_multiple_of(SECTOR);
    check_size(pool, size)?;
    pool.transact(&[], |transaction| {
        pool.with_catalogue(|all| all.check_free(&new.name))?;
        let id = transaction.new_id()?;
        let row = Row {
            id,
            name: new.name.clone(),
            kind: RowKind::Disk,
            parent: None,
            family: id,
            size,
            created: unix_seconds(),
            birth_generation: Generation(0),
            base: base.as_ref().map(|(_, reference)| reference.clone()),
            base_len: base_len.min(size),
            limit: new.limit,
            reserve: new.reserve,
            is_ephemeral: new.is_ephemeral,
        };
        transaction.check_row(&row)?;
        let (tree, none) = (Tree::default(), Generation(0));
        let quota = Quota::of(&row, &tree, none, pool.cluster_size());
        let volume = Arc::new(Volume::new(&row, tree, none, none));
        pool.reserve(&[(&volume, quota)])?;
        volume.map.write().set_quota(&quota);
        transaction.record(&Record::Row(Box::new(row.clone())))?;
        pool.change_catalogue(|all| all.put(row, &volume));
        Ok(())
    })?;
    Ok(())
}

pub(super) fn check_size(pool: &Pool, size: u64) -> Result<(), DiskError> {
    let most = pool.cluster_size().disk_bytes_max();
    if size == 0 || size > most {
        let what = format!("a disk has 512 to {most} bytes, not {size}");
        return Err(PoolError::invalid(what).into());
    }
    Ok(())
}

/// `Err` if the disk or snapshot is open.
pub(super) fn check_unused(item: &Item) -> Result<(), PoolError> {
    match item.volume.opens.load(Ordering::SeqCst) {
        0 => Ok(()),
        _ => Err(PoolError::InUse {
            name: item.row.name.clone(),
        }),
    }
}

/// Removes the disk or snapshot `name`; with `is_cascading` the snapshots of a disk too. Forks live
/// on: they share map nodes and clusters, and depend on nothing else. The space comes back as it is
/// released.
///
/// # Errors
/// No such disk, in use, it has snapshots, or as [`Pool::flush`].
pub fn remove(pool: &Arc<Pool>, name: &str, is_cascading: bool) -> Result<(), DiskError> {
    let mut items = vec![pool.find(name)?];
    items.extend(pool.with_catalogue(|all| all.snapshots_of(name).cloned().collect::<Vec<_>>()));
    let drained: Vec<_> = items.iter().map(|item| Arc::clone(&item.volume)).collect();
    let ids: BTreeSet<DiskId> = items.iter().map(|item| item.row.id).collect();
    let change = |transaction: &mut Transaction<'_>| {
        let snapshots: Vec<Item> =
            pool.with_catalogue(|all| all.snapshots_of(name).cloned().collect());
        let first = pool.find(name)?;
        let is_drained = |item: &Item| ids.contains(&item.row.id);
        if !(is_drained(&first) && snapshots.iter().all(is_drained)) {
            return Err(PoolError::InUse {
                name: name.to_owned(),
            });
        }
        if !(snapshots.is_empty() || is_cascading) {
            let names = snapshots.into_iter().map(|item| item.row.name).collect();
            return Err(PoolError::HasDependents {
                name: name.to_owned(),
                names,
            });
        }
        check_unused(&first)?;
        snapshots.iter().try_for_each(check_unused)?;
        // One record for all: the snapshots of a disk go with it.
        let disk = first.row.id;
        transaction.record(&Record::Delete { disk })?;
        for item in snapshots.iter().chain([&first]) {
            delete(transaction, item);
        }
        Ok(())
    };
    match pool.transact(&drained, change) {
        // A full pool can always be emptied.
        Err(e) if e.kind() == PoolErrorKind::NoSpace => {
            let len = bytes_of(SLOT_LEN);
            Ok(pool.transact_in_rest(&drained, len, change)?)
        }
        result => Ok(result?),
    }
}

fn delete(transaction: &mut Transaction<'_>, item: &Item) {
    let pool = transaction.pool;
    let mut map = item.volume.map.write();
    map.is_deleted = true;
    map.replace_tree(Tree::default());
    transaction.discard_changes(&mut map);
    let woken = map.drop_slab(&pool.space);
    map.close_account(&pool.space);
    drop(map);
    woken.wake();
    pool.change_catalogue(|all| all.remove(item.row.id));
}

/// Renames a disk; its snapshots follow.
///
/// # Errors
/// No such disk, a name that is taken or impossible, or as [`Pool::flush`].
pub fn rename(pool: &Arc<Pool>, name: &str, new_name: &str) -> Result<(), DiskError> {
    let kind = pool.find(name)?.row.kind;
    check_name(new_name, kind).map_err(PoolError::invalid)?;
    let prefix = |name: &str| name.split('@').next().map(str::to_owned);
    if kind == RowKind::Snapshot && prefix(name) != prefix(new_name) {
        let what = format!("`{name}` is a snapshot; it stays with its disk: name it DISK@NEW");
        return Err(PoolError::invalid(what).into());
    }
    pool.transact(&[], |transaction| {
        pool.with_catalogue(|all| all.check_free(new_name))?;
        let item = pool.find(name)?;
        let named = |item: &Item| Row {
            name: renamed(&item.row.name, name, new_name),
            ..item.row.clone()
        };
        // One record for all: the snapshots of a disk have its name.
        pool.with_catalogue(|all| {
            let mut snapshots = all.snapshots_of(name);
            snapshots.try_for_each(|item| transaction.check_row(&named(item)))
        })?;
        put_row(transaction, &item, named(&item))
    })?;
    Ok(())
}

pub(super) fn put_row(
    transaction: &mut Transaction<'_>,
    item: &Item,
    row: Row,
) -> Result<(), PoolError> {
    transaction.record(&Record::Row(Box::new(row.clone())))?;
    transaction
        .pool
        .change_catalogue(|all| all.put(row, &item.volume));
    Ok(())
}

pub(super) fn writable(pool: &Pool, name: &str) -> Result<Item, DiskError> {
    let item = pool.find(name)?;
    if item.row.kind == RowKind::Snapshot {
        return Err(DiskError::ReadOnly {
            name: name.to_owned(),
        });
    }
    Ok(item)
}

/// What [`set`] changes; `None` leaves a value, `Some(None)` removes it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Settings {
    /// Most bytes of data the disk may hold of its own.
    pub limit: Option<Option<u64>>,
    /// Bytes of pool space kept for it.
    pub reserve: Option<Option<u64>>,
    /// Flushes need not reach the device. Takes effect when the disk is next opened.
    pub is_ephemeral: Option<bool>,
}

/// Changes a disk's settings.
///
/// # Errors
/// No such disk, a snapshot, a reserve the pool has no space for, or as [`Pool::flush`].
pub fn set(pool: &Arc<Pool>, name: &str, settings: &Settings) -> Result<(), DiskError> {
    let item = writable(pool, name)?;
    pool.transact(&[Arc::clone(&item.volume)], |transaction| {
        let item = same_item(pool, name, &item)?;
        let row = Row {
            limit: settings.limit.unwrap_or(item.row.limit),
            reserve: settings.reserve.unwrap_or(item.row.reserve),
            is_ephemeral: settings.is_ephemeral.unwrap_or(item.row.is_ephemeral),
            ..item.row.clone()
        };
        transaction.check_row(&row)?;
        let size = pool.cluster_size();
        let quota = {
            let map = item.volume.map.read();
            Quota::of(&row, &map.tree, map.last_fork, size)
        };
        pool.reserve(&[(&item.volume, quota)])?;
        item.volume.map.write().set_quota(&quota);
        put_row(transaction, &item, row)
    })?;
    Ok(())
}
