//! Commands that show what is there.

use crate::cli::args::ItemRef;
use crate::cli::failure::Failure;
use crate::cli::output::Reply;
use crate::cli::{human, natural, open};
use crate::cowdisk::{self, DiskUsage, PoolUsage};
use crate::format::catalogue::{Row, RowKind};
use crate::format::units::DiskId;
use crate::pool::PoolError;
use crate::pool::catalogue::Item;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

fn measure(path: &Path) -> Result<PoolUsage, Failure> {
    let mut usage = open::reading(path, |pool| {
        cowdisk::usage(pool).map_err(|e| Failure::disk(path.display(), &e))
    })?;
    let disks = &mut usage.disks;
    disks.sort_by(|(a, _), (b, _)| natural::compare(&a.row.name, &b.row.name));
    Ok(usage)
}

/// The name of what `row` was forked from.
fn parent<'a>(usage: &'a PoolUsage, row: &Row) -> Option<&'a str> {
    let mut rows = usage.disks.iter().map(|(item, _)| &item.row);
    let found = rows.find(|other| Some(other.id) == row.parent)?;
    Some(&found.name)
}

fn describe(usage: &PoolUsage, row: &Row, space: &DiskUsage) -> Value {
    json!({
        "name": row.name,
        "kind": row.kind,
        "id": row.id,
        "family": row.family,
        "parent": parent(usage, row),
        "size_bytes": row.size,
        "used_bytes": space.used,
        "shared_bytes": space.shared,
        "unique_bytes": space.unique,
        "reclaimable_bytes": space.reclaimable,
        "base": row.base.as_ref().map(|base| json!({
            "path": base.path,
            "format": base.format,
            "length_bytes": row.base_len,
        })),
        "limit_bytes": row.limit,
        "limit_used_bytes": space.counted.filter(|_| row.limit.is_some()),
        "reserve_bytes": row.reserve,
        "reserve_left_bytes": space.reserve_left.filter(|_| row.reserve.is_some()),
        "is_ephemeral": row.is_ephemeral,
        "created": row.created,
    })
}

pub(super) fn list(path: &Path) -> Result<Reply, Failure> {
    let usage = measure(path)?;
    let mut rows = Vec::new();
    for (item, space) in &usage.disks {
        let row = &item.row;
        let base = row.base.as_ref().map(|base| base.path.as_str());
        rows.push(vec![
            row.name.clone(),
            human::bytes(row.size),
            human::bytes(space.used),
            human::bytes(space.shared),
            human::bytes(space.unique),
            human::date(row.created),
            parent(&usage, row).or(base).unwrap_or("-").to_owned(),
        ]);
    }
    let heading = [
        "NAME", ">SIZE", ">USED", ">SHARED", ">UNIQUE", "CREATED", "FROM",
    ];
    let disks = usage.disks.iter();
    let disks: Vec<Value> = disks
        .map(|(item, space)| describe(&usage, &item.row, space))
        .collect();
    let json = json!({ "pool": path, "disks": disks });
    Ok(Reply::new(json, human::table(&heading, &rows)))
}

pub(super) fn info(item: &ItemRef) -> Result<Reply, Failure> {
    let usage = measure(&item.pool)?;
    let found = usage
        .disks
        .iter()
        .find(|(disk, _)| disk.row.name == item.name);
    let Some((found, space)) = found else {
        let name = item.name.clone();
        return Err(Failure::pool(item, &PoolError::NotFound { name }));
    };
    let row = &found.row;
    let prefix = format!("{}@", row.name);
    let names = usage.disks.iter().map(|(disk, _)| disk.row.name.as_str());
    let snapshots: Vec<&str> = names.filter(|name| name.starts_with(&prefix)).collect();
    let children: Vec<&str> = usage
        .disks
        .iter()
        .filter(|(disk, _)| disk.row.parent == Some(row.id) && disk.row.kind == RowKind::Disk)
        .map(|(disk, _)| disk.row.name.as_str())
        .collect();
    let mut json = describe(&usage, row, space);
    json["pool"] = json!(item.pool);
    json["snapshots"] = json!(snapshots);
    json["forks"] = json!(children);
    let size = |bytes: Option<u64>| bytes.map_or("none".to_owned(), human::exact);
    let of = |bytes: Option<u64>, part: Option<u64>, what: &str| match (bytes, part) {
        (Some(_), Some(part)) => format!("{}, {} {what}", size(bytes), human::exact(part)),
        _ => size(bytes),
    };
    let list = |names: &[&str]| match names {
        [] => "none".to_owned(),
        names => names.join(", "),
    };
    let kind = match row.kind {
        RowKind::Disk => "disk",
        RowKind::Snapshot => "snapshot",
    };
    let base = row.base.as_ref();
    let base = base.map(|base| {
        let format = format!("{:?}", base.format).to_lowercase();
        format!("{} ({format})", base.path)
    });
    let text = human::fields(&[
        (kind, item.to_string()),
        ("size", human::exact(row.size)),
        ("used", human::exact(space.used)),
        ("shared", human::exact(space.shared)),
        ("unique", human::exact(space.unique)),
        ("reclaimable", human::exact(space.reclaimable)),
        ("parent", parent(&usage, row).unwrap_or("none").to_owned()),
        ("base", base.unwrap_or_else(|| "none".to_owned())),
        ("limit", of(row.limit, space.counted, "used")),
        ("reserve", of(row.reserve, space.reserve_left, "kept free")),
        (
            "ephemeral",
            if row.is_ephemeral { "yes" } else { "no" }.to_owned(),
        ),
        ("created", format!("{} UTC", human::date(row.created))),
        ("snapshots", list(&snapshots)),
        ("forks", list(&children)),
    ]);
    Ok(Reply::new(json, text))
}

/// Disks by what they were forked from; what has no parent is below `None`.
type Children<'a> = BTreeMap<Option<DiskId>, Vec<&'a (Item, DiskUsage)>>;

pub(super) fn tree(path: &Path) -> Result<Reply, Failure> {
    let usage = measure(path)?;
    let mut children: Children<'_> = BTreeMap::new();
    for disk in &usage.disks {
        let known = |id: &DiskId| usage.disks.iter().any(|(item, _)| item.row.id == *id);
        children
            .entry(disk.0.row.parent.filter(known))
            .or_default()
            .push(disk);
    }
    let rows = draw(&children);
    let heading = [
        "NAME",
        ">SIZE",
        ">USED",
        ">SHARED",
        ">UNIQUE",
        ">RECLAIMABLE",
        "BASE",
    ];
    let mut text = human::table(&heading, &rows);
    text.push_str(&format!(
        "\npool: capacity {}, used {}, free {}, metadata {}, on the host {}\n",
        human::bytes(usage.capacity),
        human::bytes(usage.used),
        human::bytes(usage.free),
        human::bytes(usage.metadata),
        human::bytes(usage.host_allocated)
    ));
    let disks = usage.disks.iter();
    let disks: Vec<Value> = disks
        .map(|(item, space)| describe(&usage, &item.row, space))
        .collect();
    let json = json!({
        "pool": path,
        "capacity_bytes": usage.capacity,
        "used_bytes": usage.used,
        "free_bytes": usage.free,
        "metadata_bytes": usage.metadata,
        "host_allocated_bytes": usage.host_allocated,
        "disks": disks,
    });
    Ok(Reply::new(json, text))
}

/// A line for each disk, below what it was forked from. Ancestry may be thousands deep: a stack of
/// our own, and no recursion.
fn draw(children: &Children<'_>) -> Vec<Vec<String>> {
    let below = |id: Option<DiskId>| children.get(&id).map_or(&[][..], Vec::as_slice);
    let mut rows = Vec::new();
    let mut stack: Vec<_> = below(None)
        .iter()
        .rev()
        .map(|disk| (disk, String::new(), ""))
        .collect();
    while let Some((disk, indent, branch)) = stack.pop() {
        let (row, space) = (&disk.0.row, &disk.1);
        rows.push(vec![
            format!("{indent}{branch}{}", row.name),
            human::bytes(row.size),
            human::bytes(space.used),
            human::bytes(space.shared),
            human::bytes(space.unique),
            human::bytes(space.reclaimable),
            row.base
                .as_ref()
                .map(|base| base.path.clone())
                .unwrap_or_default(),
        ]);
        let indent = match branch {
            "" => indent,
            "|- " => format!("{indent}|  "),
            _ => format!("{indent}   "),
        };
        let forks = below(Some(row.id));
        for (place, fork) in forks.iter().enumerate().rev() {
            let branch = if place + 1 == forks.len() {
                "`- "
            } else {
                "|- "
            };
            stack.push((fork, indent.clone(), branch));
        }
    }
    rows
}
