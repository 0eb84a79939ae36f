//! Disks and snapshots of a pool, named one by one or by patterns.

use crate::cli::args::ItemRef;
use crate::cli::failure::Failure;
use crate::cli::natural;
use crate::pool::{Pool, PoolError};
use glob::Pattern;
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// A name, or a pattern of names, in a pool.
#[derive(Debug, Clone)]
pub(super) struct Wanted {
    /// Path of the pool.
    pool: PathBuf,
    name: Name,
}

#[derive(Debug, Clone)]
enum Name {
    Plain(String),
    Pattern(Pattern),
}

impl FromStr for Wanted {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (pool, name) = text.rsplit_once(':').unwrap_or_default();
        if pool.is_empty() || !name.contains(['*', '?', '[']) {
            let ItemRef { pool, name } = text.parse()?;
            let name = Name::Plain(name);
            return Ok(Self { pool, name });
        }
        let pattern = Pattern::new(name).map_err(|e| format!("`{name}`: {e}"))?;
        Ok(Self {
            pool: PathBuf::from(pool),
            name: Name::Pattern(pattern),
        })
    }
}

impl Wanted {
    /// The pool that all are in.
    ///
    /// # Errors
    /// They are in several; in words for the user.
    pub(super) fn pool_of(all: &[Self]) -> Result<&Path, String> {
        let first = &all.first().ok_or("name a disk, POOL:NAME")?.pool;
        match all.iter().find(|wanted| wanted.pool != *first) {
            None => Ok(first),
            Some(other) => Err(format!(
                "{} and {} are two pools: one command for each",
                first.display(),
                other.pool.display()
            )),
        }
    }

    /// A pattern of disks is none of snapshots: those go with `*@*`.
    fn is_it(&self, name: &str) -> bool {
        match &self.name {
            Name::Plain(plain) => plain == name,
            Name::Pattern(pattern) => {
                pattern.as_str().contains('@') == name.contains('@') && pattern.matches(name)
            }
        }
    }
}

/// The names that are wanted, each once: snapshots before disks, which would be in their way, and both
/// in their natural order.
///
/// # Errors
/// There is no such disk or snapshot, or none that fits a pattern.
pub(super) fn names(all: &[Wanted], pool: &Pool) -> Result<Vec<String>, Failure> {
    let there: Vec<String> = pool.items().into_iter().map(|item| item.row.name).collect();
    let mut found = HashSet::new();
    for wanted in all {
        let fitting: Vec<&String> = there.iter().filter(|name| wanted.is_it(name)).collect();
        if fitting.is_empty() {
            let name = match &wanted.name {
                Name::Plain(name) => name.clone(),
                Name::Pattern(pattern) => pattern.as_str().to_owned(),
            };
            let object = format!("{}:{name}", wanted.pool.display());
            return Err(Failure::pool(object, &PoolError::NotFound { name }));
        }
        found.extend(fitting.into_iter().cloned());
    }
    let mut names: Vec<String> = found.into_iter().collect();
    let is_disk = |name: &str| !name.contains('@');
    names.sort_by(|a, b| {
        let by_kind = is_disk(a).cmp(&is_disk(b));
        by_kind.then_with(|| natural::compare(a, b))
    });
    Ok(names)
}
