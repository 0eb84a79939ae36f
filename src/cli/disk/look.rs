//! Commands that look into disks: which parts differ, and where they are.

use super::{Diff, Item};
use crate::cli::failure::Failure;
use crate::cli::output::Reply;
use crate::cli::{human, open};
use crate::cowdisk::{self, Comparison, Disk, ExtentKind};
use serde_json::{Value, json};

pub(super) fn diff(args: &Diff) -> Result<Reply, Failure> {
    let first = &args.first;
    let second = args.second.in_pool_of(first).map_err(Failure::usage)?;
    let comparison = match args.content {
        true => Comparison::Contents,
        false => Comparison::Places,
    };
    open::reading(&first.pool, |pool| {
        let failed = |e| Failure::disk(first, &e);
        let a = Disk::open(pool, &first.name).map_err(failed)?;
        let b = Disk::open(pool, second).map_err(failed)?;
        let ranges = cowdisk::diff(&a, &b, comparison).map_err(failed)?;
        let bytes: u64 = ranges.iter().map(|range| range.end - range.start).sum();
        let rows: Vec<Vec<String>> = ranges
            .iter()
            .map(|range| {
                vec![
                    range.start.to_string(),
                    (range.end - range.start).to_string(),
                ]
            })
            .collect();
        let mut text = String::new();
        if !rows.is_empty() {
            text = human::table(&[">OFFSET", ">LENGTH"], &rows);
        }
        let (name, sizes) = (&first.name, [a.size(), b.size()]);
        text.push_str(&match ranges.len() {
            0 if sizes[0] == sizes[1] => format!("{name} and {second} are the same\n"),
            0 => format!("{name} and {second} hold the same, and zeros beyond it\n"),
            count => format!(
                "{} and {second} differ in {count} ranges, {} of {}\n",
                first.name,
                human::bytes(bytes),
                human::bytes(sizes[0].max(sizes[1]))
            ),
        });
        if sizes[0] != sizes[1] {
            let [a, b] = sizes.map(human::exact);
            text.push_str(&format!(
                "their sizes differ: {name} has {a}, {second} {b}\n"
            ));
        }
        let extents: Vec<Value> = ranges
            .iter()
            .map(|range| json!({ "offset": range.start, "length": range.end - range.start }))
            .collect();
        let json = json!({
            "pool": first.pool,
            "a": first.name,
            "b": second,
            "a_size_bytes": sizes[0],
            "b_size_bytes": sizes[1],
            "compared": if args.content { "content" } else { "places" },
            "bytes": bytes,
            "extents": extents,
        });
        Ok(Reply::new(json, text))
    })
}

pub(super) fn map(args: &Item) -> Result<Reply, Failure> {
    let item = &args.item;
    open::reading(&item.pool, |pool| {
        let failed = |e| Failure::disk(item, &e);
        let disk = Disk::open(pool, &item.name).map_err(failed)?;
        let extents = disk.extents().map_err(failed)?;
        let mut rows = Vec::new();
        let mut values = Vec::new();
        for extent in &extents {
            let (kind, at) = match extent.kind {
                ExtentKind::Data(at) => ("data", Some(at)),
                ExtentKind::Zero => ("zero", None),
                ExtentKind::Base => ("base", None),
                ExtentKind::Hole => ("hole", None),
            };
            rows.push(vec![
                extent.offset.to_string(),
                extent.len.to_string(),
                kind.to_owned(),
                at.map_or("-".to_owned(), |at| at.to_string()),
            ]);
            values.push(json!({
                "offset": extent.offset,
                "length": extent.len,
                "kind": kind,
                "pool_offset": at,
            }));
        }
        let heading = [">OFFSET", ">LENGTH", "KIND", ">POOL OFFSET"];
        let text = human::table(&heading, &rows);
        let json = json!({
            "pool": item.pool,
            "name": item.name,
            "size_bytes": disk.size(),
            "extents": values,
        });
        Ok(Reply::new(json, text))
    })
}
