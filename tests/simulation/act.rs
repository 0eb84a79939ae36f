//! What a history does, and how it is written down: one text for each act, so that a failure can be
//! repeated from what it printed.

use std::fmt;
use std::str::FromStr;

/// Places and lengths are in sectors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Act {
    Create(String),
    /// Makes a disk over the base image.
    Over(String),
    Write(String, u64, u64),
    /// Sends a write to the device without completing it, under a number.
    Begin(u64, String, u64, u64),
    /// Completes it.
    End(u64),
    Discard(String, u64, u64),
    Zero(String, u64, u64),
    Flush,
    Fork(String, String),
    Snapshot(String, String),
    Rollback(String),
    Commit(String),
    /// Copies in what the disk has from the base image.
    Flatten(String),
    Remove(String),
    Resize(String, u64),
    Rename(String, String),
    Trim,
    /// Gives the pool this many MiB.
    Pool(u64),
    /// Fills a quarter of a journal half, so that images are written and halves change.
    Bulk,
    /// Closes the pool in good order and opens it again.
    Close,
    /// The power goes: nothing survives that was not flushed (0), everything (1), or what this seed
    /// says.
    Crash(u64),
    /// The process is killed; the device keeps its cache.
    Kill,
}

impl Act {
    /// Waits until no request is in flight, and is an atom.
    pub(crate) fn is_structural(&self) -> bool {
        match self {
            Act::Create(_)
            | Act::Over(_)
            | Act::Fork(..)
            | Act::Snapshot(..)
            | Act::Rollback(_)
            | Act::Commit(_)
            | Act::Flatten(_)
            | Act::Remove(_)
            | Act::Resize(..)
            | Act::Rename(..)
            | Act::Close => true,
            Act::Write(..)
            | Act::Begin(..)
            | Act::End(_)
            | Act::Discard(..)
            | Act::Zero(..)
            | Act::Flush
            | Act::Trim
            | Act::Pool(_)
            | Act::Bulk
            | Act::Crash(_)
            | Act::Kill => false,
        }
    }
}

impl fmt::Display for Act {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Act::Create(a) => write!(f, "create {a}"),
            Act::Over(a) => write!(f, "over {a}"),
            Act::Write(a, at, len) => write!(f, "write {a} {at} {len}"),
            Act::Begin(n, a, at, len) => write!(f, "begin {n} {a} {at} {len}"),
            Act::End(n) => write!(f, "end {n}"),
            Act::Discard(a, at, len) => write!(f, "discard {a} {at} {len}"),
            Act::Zero(a, at, len) => write!(f, "zero {a} {at} {len}"),
            Act::Flush => write!(f, "flush"),
            Act::Fork(a, b) => write!(f, "fork {a} {b}"),
            Act::Snapshot(a, b) => write!(f, "snapshot {a} {b}"),
            Act::Rollback(a) => write!(f, "rollback {a}"),
            Act::Commit(a) => write!(f, "commit {a}"),
            Act::Flatten(a) => write!(f, "flatten {a}"),
            Act::Remove(a) => write!(f, "remove {a}"),
            Act::Resize(a, len) => write!(f, "resize {a} {len}"),
            Act::Rename(a, b) => write!(f, "rename {a} {b}"),
            Act::Trim => write!(f, "trim"),
            Act::Pool(len) => write!(f, "pool {len}"),
            Act::Bulk => write!(f, "bulk"),
            Act::Close => write!(f, "close"),
            Act::Crash(seed) => write!(f, "crash {seed}"),
            Act::Kill => write!(f, "kill"),
        }
    }
}

impl FromStr for Act {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let words: Vec<&str> = text.split_whitespace().collect();
        let name = |n: usize| words.get(n).copied().unwrap_or_default().to_owned();
        let number = |n: usize| -> Result<u64, String> {
            let word = words.get(n).copied().unwrap_or_default();
            word.parse().map_err(|e| format!("`{text}`, `{word}`: {e}"))
        };
        Ok(match name(0).as_str() {
            "create" => Act::Create(name(1)),
            "over" => Act::Over(name(1)),
            "write" => Act::Write(name(1), number(2)?, number(3)?),
            "begin" => Act::Begin(number(1)?, name(2), number(3)?, number(4)?),
            "end" => Act::End(number(1)?),
            "discard" => Act::Discard(name(1), number(2)?, number(3)?),
            "zero" => Act::Zero(name(1), number(2)?, number(3)?),
            "flush" => Act::Flush,
            "fork" => Act::Fork(name(1), name(2)),
            "snapshot" => Act::Snapshot(name(1), name(2)),
            "rollback" => Act::Rollback(name(1)),
            "commit" => Act::Commit(name(1)),
            "flatten" => Act::Flatten(name(1)),
            "remove" => Act::Remove(name(1)),
            "resize" => Act::Resize(name(1), number(2)?),
            "rename" => Act::Rename(name(1), name(2)),
            "trim" => Act::Trim,
            "pool" => Act::Pool(number(1)?),
            "bulk" => Act::Bulk,
            "close" => Act::Close,
            "crash" => Act::Crash(number(1)?),
            "kill" => Act::Kill,
            other => return Err(format!("no act is called `{other}`")),
        })
    }
}

pub(crate) fn to_trace(acts: &[Act]) -> String {
    let texts: Vec<String> = acts.iter().map(Act::to_string).collect();
    texts.join("; ")
}

pub(crate) fn from_trace(text: &str) -> Vec<Act> {
    let acts = text.split(';').filter(|part| !part.trim().is_empty());
    let parsed: Result<Vec<Act>, String> = acts.map(Act::from_str).collect();
    parsed.unwrap_or_else(|e| panic!("{e}"))
}
