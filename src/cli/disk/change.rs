//! Commands that change the catalogue: a batch of the journal each, whatever the size of the disk.

use super::select::{self, Wanted};
use super::{Create, Fork, Rename, Resize, Rm, Set};
use crate::cli::args::ItemRef;
use crate::cli::failure::Failure;
use crate::cli::human;
use crate::cli::open;
use crate::cli::output::Reply;
use crate::cowdisk::{self, DiskError, NewDisk, Settings};
use crate::format::catalogue::BaseFormat;
use crate::pool::{Pool, PoolError};
use crate::sync::Arc;
use crate::sys::file;
use serde_json::json;
use std::path::Path;

/// Runs `work` on the pool of `item`; its errors name `item`.
pub(super) fn with_pool<T>(
    item: &ItemRef,
    command: &str,
    work: impl FnOnce(&Arc<Pool>) -> Result<T, DiskError>,
) -> Result<T, Failure> {
    let doing = format!("started by tidepool disk {command}");
    open::writing(&item.pool, &doing, |pool| {
        work(pool).map_err(|e| Failure::disk(item, &e))
    })
}

pub(super) fn create(args: &Create) -> Result<Reply, Failure> {
    let base = match &args.base {
        None => None,
        Some(path) => {
            let format = match args.base_format {
                Some(format) => format.into(),
                None => guess_format(path)?,
            };
            Some((path.clone(), format))
        }
    };
    let new = NewDisk {
        name: args.disk.name.clone(),
        size: args.size,
        base,
        limit: args.limit,
        reserve: args.reserve,
        is_ephemeral: args.ephemeral,
    };
    let promises = Promises {
        size: args.size,
        limit: args.limit,
        reserve: args.reserve,
    };
    promises
        .check()
        .map_err(|what| Failure::new("invalid", &args.disk, what))?;
    let row = with_pool(&args.disk, "create", |pool| {
        cowdisk::create(pool, &new)?;
        Ok(pool.find(&new.name)?.row)
    })?;
    let base = row.base.as_ref();
    let over = base
        .map(|base| format!(" over {}", base.path))
        .unwrap_or_default();
    let text = format!(
        "{}: a disk of {}{over}\n",
        args.disk,
        human::bytes(row.size)
    );
    let json = json!({
        "pool": args.disk.pool,
        "name": row.name,
        "size_bytes": row.size,
        "base": base.map(|base| json!({ "path": base.path, "format": base.format })),
    });
    Ok(Reply::new(json, text))
}

/// The format of an image, told from its bytes; one that is not read is refused.
pub(super) fn guess_format(path: &Path) -> Result<BaseFormat, Failure> {
    let kind = file::kind_of(path).map_err(|e| Failure::io(path, "open the image", &e))?;
    if kind == file::Kind::Other {
        let what = "neither a regular file nor a block device";
        return Err(Failure::new("io", path.display(), what));
    }
    cowdisk::probe(path).map_err(|e| Failure::image(path, &e))
}

pub(super) fn remove(args: &Rm) -> Result<Reply, Failure> {
    let path = Wanted::pool_of(&args.items).map_err(Failure::usage)?;
    let removed = open::writing(path, "started by tidepool disk rm", |pool| {
        let names = select::names(&args.items, pool)?;
        for (done, name) in names.iter().enumerate() {
            let removed = cowdisk::remove(pool, name, args.cascade);
            removed.map_err(|e| {
                let failure = Failure::disk(format!("{}:{name}", path.display()), &e);
                match done {
                    0 => failure,
                    _ => failure.hint(format!("removed before it: {}", names[..done].join(", "))),
                }
            })?;
        }
        Ok(names)
    })?;
    let one = match removed.as_slice() {
        [one] => Some(one),
        _ => None,
    };
    let json = json!({ "pool": path, "removed": one, "names": removed });
    let lines = removed.iter();
    let lines = lines.map(|name| format!("{}:{name}: removed\n", path.display()));
    Ok(Reply::new(json, lines.collect::<String>()))
}

pub(super) fn rename(args: &Rename) -> Result<Reply, Failure> {
    let item = &args.item;
    let new = args.new.in_pool_of(item).map_err(Failure::usage)?;
    if new == item.name {
        return Err(Failure::new(
            "exists",
            item,
            "it exists already, under that name",
        ));
    }
    with_pool(item, "rename", |pool| {
        cowdisk::rename(pool, &item.name, new)
    })?;
    let json = json!({ "pool": item.pool, "old_name": item.name, "name": new });
    Ok(Reply::new(json, format!("{item}: now named {new}\n")))
}

pub(super) fn resize(args: &Resize) -> Result<Reply, Failure> {
    let disk = &args.disk;
    let (old, new) = with_pool(disk, "resize", |pool| {
        let old = pool.find(&disk.name)?.row.size;
        cowdisk::resize(pool, &disk.name, args.size, args.shrink)?;
        Ok((old, pool.find(&disk.name)?.row.size))
    })?;
    let json =
        json!({ "pool": disk.pool, "name": disk.name, "old_size_bytes": old, "size_bytes": new });
    let text = format!(
        "{disk}: now {}, was {}\n",
        human::bytes(new),
        human::bytes(old)
    );
    Ok(Reply::new(json, text))
}

/// What a disk is to be kept to, bytes.
struct Promises {
    /// Its size, if that is known yet.
    size: Option<u64>,
    limit: Option<u64>,
    reserve: Option<u64>,
}

impl Promises {
    /// # Errors
    /// One could never be reached, or used; in words for the user.
    fn check(&self) -> Result<(), String> {
        let is_above = |one: Option<u64>, other: Option<u64>| {
            let pair = one.zip(other).filter(|(one, other)| one > other);
            pair.map(|(one, other)| (human::bytes(one), human::bytes(other)))
        };
        if let Some((limit, size)) = is_above(self.limit, self.size) {
            return Err(format!(
                "a limit of {limit} is more than the disk's {size} and would never be reached: \
                 leave it out, or make the disk larger"
            ));
        }
        if let Some((reserve, size)) = is_above(self.reserve, self.size) {
            return Err(format!(
                "a reserve of {reserve} is more than the disk's {size} and could never be used: \
                 reserve less, or make the disk larger"
            ));
        }
        if let Some((reserve, limit)) = is_above(self.reserve, self.limit) {
            return Err(format!(
                "a reserve of {reserve} is more than the limit of {limit} and could never be used: \
                 reserve less, or raise the limit"
            ));
        }
        Ok(())
    }
}

pub(super) fn set(args: &Set) -> Result<Reply, Failure> {
    let disk = &args.disk;
    if args.limit.is_none() && args.reserve.is_none() && args.ephemeral.is_none() {
        let what = "nothing to set: give --limit, --reserve or --ephemeral";
        return Err(Failure::usage(what));
    }
    let settings = Settings {
        limit: args.limit.map(|size| size.0),
        reserve: args.reserve.map(|size| size.0),
        is_ephemeral: args.ephemeral,
    };
    let row = with_pool(disk, "set", |pool| {
        let row = pool.find(&disk.name)?.row;
        let promises = Promises {
            size: Some(row.size),
            limit: settings.limit.unwrap_or(row.limit),
            reserve: settings.reserve.unwrap_or(row.reserve),
        };
        if settings.limit.is_some() || settings.reserve.is_some() {
            promises.check().map_err(PoolError::invalid)?;
        }
        cowdisk::set(pool, &disk.name, &settings)?;
        Ok(pool.find(&disk.name)?.row)
    })?;
    let size = |bytes: Option<u64>| bytes.map_or("none".to_owned(), human::bytes);
    let text = format!(
        "{disk}: limit {}, reserve {}{}\n",
        size(row.limit),
        size(row.reserve),
        if row.is_ephemeral { ", ephemeral" } else { "" }
    );
    let json = json!({
        "pool": disk.pool,
        "name": disk.name,
        "limit_bytes": row.limit,
        "reserve_bytes": row.reserve,
        "is_ephemeral": row.is_ephemeral,
    });
    Ok(Reply::new(json, text))
}

pub(super) fn fork(args: &Fork) -> Result<Reply, Failure> {
    let source = &args.source;
    let target = args.target.in_pool_of(source).map_err(Failure::usage)?;
    let targets: Vec<String> = match args.count {
        None => vec![target.to_owned()],
        Some(count) => (1..=count).map(|n| format!("{target}-{n}")).collect(),
    };
    with_pool(source, "fork", |pool| {
        cowdisk::fork(pool, &source.name, &targets)
    })?;
    let shown = match targets.as_slice() {
        [first, .., last] => format!("{first} to {last}"),
        one => one.concat(),
    };
    let json = json!({ "pool": source.pool, "source": source.name, "forks": targets });
    Ok(Reply::new(json, format!("{source}: forked to {shown}\n")))
}

pub(super) fn snapshot(item: &ItemRef) -> Result<Reply, Failure> {
    let (disk, snapshot) = item.name.split_once('@').unwrap_or((&item.name, ""));
    with_pool(item, "snapshot", |pool| {
        cowdisk::snapshot(pool, disk, snapshot)
    })?;
    let json = json!({ "pool": item.pool, "name": disk, "snapshot": item.name });
    Ok(Reply::new(json, format!("{item}: kept\n")))
}

pub(super) fn rollback(item: &ItemRef) -> Result<Reply, Failure> {
    with_pool(item, "rollback", |pool| cowdisk::rollback(pool, &item.name))?;
    let disk = item.name.split('@').next().unwrap_or_default();
    let json = json!({ "pool": item.pool, "name": disk, "snapshot": item.name });
    Ok(Reply::new(
        json,
        format!(
            "{}:{disk}: as it was at {}\n",
            item.pool.display(),
            item.name
        ),
    ))
}
