//! What a repair gives up is kept: as a snapshot whose clusters are those of the pool, each at its own
//! place. So nobody else gets them, they are seen and counted like any others, what is in them can
//! be exported, and removing the snapshot is what gives them up for good.

use super::load::Loaded;
use super::map::Tree;
use super::volume::Volume;
use crate::format::catalogue::{Row, RowKind};
use crate::format::journal::Entry;
use crate::format::units::{DiskId, Generation, Lcn};
use crate::sync::Arc;
use std::ops::Range;

/// Names of such snapshots begin with this; a number follows.
pub const KEPT_PREFIX: &str = "lost+found@";

/// Adds a snapshot that has the clusters of `left`, which nothing else has. Returns its name.
pub(super) fn keep(loaded: &mut Loaded, left: &[Range<u32>]) -> Option<String> {
    if left.is_empty() {
        return None;
    }
    let size = loaded.superblock.cluster_size;
    let id = DiskId(loaded.replay.next_disk);
    let name = (1_u32..)
        .map(|number| format!("{KEPT_PREFIX}{number}"))
        .find(|name| loaded.catalogue.check_free(name).is_ok())?;
    let now = Generation(loaded.replay.generation);
    let created = loaded.catalogue.iter().map(|item| item.row.created).max();
    let row = Row {
        id,
        name: name.clone(),
        kind: RowKind::Snapshot,
        parent: None,
        family: id,
        size: loaded.superblock.pool_len().min(size.disk_bytes_max()),
        created: created.unwrap_or(0),
        birth_generation: now,
        base: None,
        base_len: 0,
        limit: None,
        reserve: None,
        is_ephemeral: false,
    };
    let volume = Volume::new(&row, Tree::default(), now, now);
    for cluster in left.iter().cloned().flatten() {
        let entry = Entry {
            own: cluster,
            alloc: u16::MAX,
            birth: now.0,
            ..Entry::default()
        };
        volume
            .map
            .write()
            .replay_entry(&loaded.replay, Lcn(cluster), entry);
    }
    loaded.catalogue.put(row, &Arc::new(volume));
    loaded.replay.next_disk = id.0.saturating_add(1);
    Some(name)
}
