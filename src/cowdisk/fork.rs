//! Fork, snapshot, rollback and commit: one root pointer and one batch, whatever the size of the
//! disk and however long its ancestry. The deltas of a parent come along as shared map nodes, so a
//! child never reads through its parent: the hierarchy does not get deeper.

use super::error::DiskError;
use super::manage::check_unused;
use crate::format::catalogue::{NAME_LEN_MAX, Row, RowKind, check_name};
use crate::format::journal::{ROW_LEN_MAX, Record, SLOT_LEN, slots_of};
use crate::format::units::{DiskId, Generation, bytes_of, len_of};
use crate::pool::account::Quota;
use crate::pool::catalogue::Item;
use crate::pool::commit::SMALL_CHANGE_LEN_MAX;
use crate::pool::transaction::Transaction;
use crate::pool::volume::Volume;
use crate::pool::{Pool, PoolError};
use crate::storage::unix_seconds;
use crate::sync::Arc;
use crate::sync::atomic::Ordering;

/// Most forks in one batch; more are made in several, each all or nothing.
const FORKS_PER_BATCH: usize = 256;

/// Makes writable disks named `targets` that start as the state `source` has now. The source, a
/// disk or snapshot, may be in use; its requests in flight complete first, and those that follow
/// are not seen by the forks.
///
/// # Errors
/// No such source, it is being written into its base, a name that is taken or impossible, or as
/// [`Pool::flush`].
pub fn fork(pool: &Arc<Pool>, source: &str, targets: &[String]) -> Result<(), DiskError> {
    let row = pool.find(source)?.row;
    for part in targets.chunks(forks_per_batch(&row)) {
        copy_to_new(pool, source, part, RowKind::Disk)?;
    }
    Ok(())
}

/// Forks of the disk `row` whose records surely fit one batch.
fn forks_per_batch(row: &Row) -> usize {
    let longest = Row {
        name: "n".repeat(NAME_LEN_MAX),
        parent: Some(DiskId(u32::MAX)),
        id: DiskId(u32::MAX),
        created: u64::MAX,
        birth_generation: Generation(u32::MAX),
        ..row.clone()
    };
    // A name may be too long for a row that has a long path: then the fork says so.
    let slots = slots_of(&Record::Row(Box::new(longest))).unwrap_or(ROW_LEN_MAX / SLOT_LEN + 1);
    let len = bytes_of((slots + 1) * SLOT_LEN);
    len_of(SMALL_CHANGE_LEN_MAX / len).clamp(1, FORKS_PER_BATCH)
}

/// Keeps the state that the disk `source` has now as the read-only snapshot `SOURCE@SNAPSHOT`.
///
/// # Errors
/// As [`fork`].
pub fn snapshot(pool: &Arc<Pool>, source: &str, snapshot: &str) -> Result<(), DiskError> {
    let name = format!("{source}@{snapshot}");
    copy_to_new(pool, source, &[name], RowKind::Snapshot)
}

fn copy_to_new(
    pool: &Arc<Pool>,
    source: &str,
    names: &[String],
    kind: RowKind,
) -> Result<(), DiskError> {
    for name in names {
        check_name(name, kind).map_err(PoolError::invalid)?;
    }
    let origin = pool.find(source)?;
    if kind == RowKind::Snapshot && origin.row.kind == RowKind::Snapshot {
        let what = format!("`{source}` is a snapshot already; fork it to get a disk");
        return Err(PoolError::invalid(what).into());
    }
    let created = unix_seconds();
    pool.transact(&[Arc::clone(&origin.volume)], |transaction| {
        let origin = same_item(pool, source, &origin)?;
        pool.with_catalogue(|all| names.iter().try_for_each(|name| all.check_free(name)))?;
        check_distinct(names)?;
        let mut rows = Vec::new();
        for name in names {
            let row = Row {
                id: transaction.new_id()?,
                name: name.clone(),
                kind,
                parent: Some(origin.row.id),
                created,
                birth_generation: pool.generation(),
                limit: None,
                reserve: None,
                is_ephemeral: origin.row.is_ephemeral && kind == RowKind::Disk,
                ..origin.row.clone()
            };
            transaction.check_row(&row)?;
            rows.push(row);
        }
        // What it has is shared from now on: all that is reserved for it must be there once more.
        let quota = origin.volume.map.read().quota_when_shared();
        pool.reserve(&[(&origin.volume, quota)])?;
        // From here on nothing fails: a generation that the journal does not know of would, after
        // the next opening, be given out again to entries that are shared by then.
        let generation = transaction.end_generation()?;
        transaction.collect(&mut origin.volume.map.write())?;
        origin.volume.map.write().share_all(generation);
        for row in rows {
            add_fork(transaction, &origin.volume, row, generation)?;
        }
        Ok(())
    })?;
    Ok(())
}

fn add_fork(
    transaction: &mut Transaction<'_>,
    origin: &Arc<Volume>,
    row: Row,
    generation: Generation,
) -> Result<(), PoolError> {
    let pool = transaction.pool;
    let tree = origin.map.read().tree.clone();
    let volume = Volume::new(&row, tree, generation, generation);
    transaction.record(&Record::Row(Box::new(row.clone())))?;
    transaction.record(&Record::Fork {
        from: origin.id,
        to: row.id,
        generation,
    })?;
    pool.change_catalogue(|all| all.put(row, &Arc::new(volume)));
    Ok(())
}

fn check_distinct(names: &[String]) -> Result<(), PoolError> {
    let mut sorted: Vec<&String> = names.iter().collect();
    sorted.sort();
    match sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        None => Ok(()),
        Some(pair) => Err(PoolError::Exists {
            name: pair[0].clone(),
        }),
    }
}

/// Makes the disk of `snapshot` (`DISK@SNAPSHOT`) what it was then. What it holds now is lost
/// unless another snapshot or fork has it; later snapshots stay.
///
/// # Errors
/// No such snapshot, its disk is in use, or as [`Pool::flush`].
pub fn rollback(pool: &Arc<Pool>, snapshot: &str) -> Result<(), DiskError> {
    let Some((disk, _)) = snapshot.split_once('@') else {
        let what = format!("`{snapshot}` is not a snapshot: name one as DISK@SNAPSHOT");
        return Err(PoolError::invalid(what).into());
    };
    replace_by(pool, snapshot, disk, |snapshot, _| Ok(snapshot.row.size))
}

/// Makes the parent of `child` what the child is. The parent must not have changed since the fork;
/// both are equal afterwards, and go on from there. A parent that is longer stays so, and reads as
/// zeros beyond the child's end.
///
/// # Errors
/// The child has no parent disk, the parent has changed or is in use, or as [`Pool::flush`].
pub fn commit(pool: &Arc<Pool>, child: &str) -> Result<(), DiskError> {
    let row = pool.find(child)?.row;
    let parent = row
        .parent
        .and_then(|id| pool.with_catalogue(|all| all.get(id).map(|item| item.row.clone())));
    let Some(parent) = parent else {
        let what = format!("`{child}` was not forked from a disk of this pool");
        return Err(PoolError::invalid(what).into());
    };
    if row.kind == RowKind::Snapshot || parent.kind == RowKind::Snapshot {
        let what = format!(
            "`{child}` is committed into `{}`, but snapshots do not change",
            parent.name
        );
        return Err(PoolError::invalid(what).into());
    }
    replace_by(pool, child, &parent.name, |child, parent| {
        if child.row.parent != Some(parent.row.id) {
            let name = child.row.name.clone();
            return Err(PoolError::InUse { name });
        }
        if parent.volume.map.read().changed > child.row.birth_generation {
            return Err(PoolError::invalid(format!(
                "`{}` has changed since `{}` was forked from it; what it holds now would be lost. \
                 Fork or snapshot it, and roll it back first",
                parent.row.name, child.row.name
            )));
        }
        Ok(child.row.size.max(parent.row.size))
    })
}

/// The map of `target` becomes that of `source`, if `check` allows it; it says how many bytes
/// `target` has afterwards.
fn replace_by(
    pool: &Arc<Pool>,
    source: &str,
    target: &str,
    check: impl Fn(&Item, &Item) -> Result<u64, PoolError>,
) -> Result<(), DiskError> {
    let (from, to) = (pool.find(source)?, pool.find(target)?);
    let drained = [Arc::clone(&from.volume), Arc::clone(&to.volume)];
    pool.transact(&drained, |transaction| {
        let from = same_item(pool, source, &from)?;
        let to = same_item(pool, target, &to)?;
        check_unused(&to)?;
        // The birth stays: neither is a new fork of the target's own parent, which may have changed
        // since the last.
        let row = Row {
            size: check(&from, &to)?,
            base: from.row.base.clone(),
            base_len: from.row.base_len,
            ..to.row.clone()
        };
        transaction.check_row(&row)?;
        // The child's quota and a later commit count from here: parent and child are equal.
        let equal = Row {
            birth_generation: transaction.check_generation()?,
            ..from.row.clone()
        };
        let size = pool.cluster_size();
        // Everything in either is shared with the other.
        let now = transaction.check_generation()?;
        let quota_of = |row: &Row| Quota::of(row, &from.volume.map.read().tree, now, size);
        let (quota, equal_quota) = (quota_of(&row), quota_of(&equal));
        let mut quotas = vec![(&*to.volume, quota)];
        if from.row.kind == RowKind::Disk {
            quotas.push((&*from.volume, equal_quota));
        }
        pool.reserve(&quotas)?;
        let generation = transaction.end_generation()?;
        transaction.collect(&mut from.volume.map.write())?;
        transaction.collect(&mut to.volume.map.write())?;
        transaction.record(&Record::Row(Box::new(row.clone())))?;
        let (from_id, to_id) = (from.row.id, to.row.id);
        transaction.record(&Record::Fork {
            from: from_id,
            to: to_id,
            generation,
        })?;
        let tree = {
            let mut map = from.volume.map.write();
            map.share_all(generation);
            map.tree.clone()
        };
        {
            let mut map = to.volume.map.write();
            map.replay_row(&row);
            map.replace_tree(tree);
            map.last_fork = generation;
            map.changed = generation;
            transaction.discard_changes(&mut map);
            map.set_quota(&quota);
        }
        pool.change_catalogue(|all| all.put(row, &to.volume));
        if from.row.kind == RowKind::Disk {
            transaction.record(&Record::Row(Box::new(equal.clone())))?;
            let mut map = from.volume.map.write();
            map.account.set_birth(generation);
            map.set_quota(&equal_quota);
            drop(map);
            pool.change_catalogue(|all| all.put(equal, &from.volume));
        }
        Ok(())
    })?;
    Ok(())
}

/// The item `name` as it is now, if it is still the one that was drained, and is not being written
/// into its base.
pub(super) fn same_item(pool: &Pool, name: &str, drained: &Item) -> Result<Item, PoolError> {
    let item = pool.find(name)?;
    if item.row.id != drained.row.id || item.volume.is_committing.load(Ordering::SeqCst) {
        return Err(PoolError::InUse {
            name: name.to_owned(),
        });
    }
    Ok(item)
}
