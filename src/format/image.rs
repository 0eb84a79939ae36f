//! The checkpoint image: the disk table and every map node once, as a stream of tokens. How the
//! stream lies in the pool is in `image_block`.

use super::catalogue::Row;
use super::journal::{Entry, ROW_LEN_MAX};
use super::units::{DiskId, Generation, bytes_of};
use super::{Cursor, FormatError};
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Entries in a leaf of the map.
pub const LEAF_ENTRIES: usize = 64;
/// Children of an inner node of the map.
pub const FANOUT: usize = 512;
/// Levels of inner nodes above the leaves; level 3 is the root.
pub const LEVELS: u8 = 3;
/// Most children of a node of the highest level: more would be of clusters beyond 2^32.
const ROOT_FANOUT: usize = 256;
/// Version of the token stream.
pub const IMAGE_VERSION: u32 = 1;

const WHAT: &str = "checkpoint image";

const TOKEN_START: u8 = b'S';
const TOKEN_LEAF: u8 = b'L';
const TOKEN_INNER: u8 = b'N';
const TOKEN_DISK: u8 = b'D';
const TOKEN_END: u8 = b'E';

const RUN_EACH: u8 = 0;
const RUN_CONSECUTIVE: u8 = 1;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Clone, Copy)]
#[repr(C)]
struct RawEntry {
    own: U32,
    under: U32,
    alloc: U16,
    zero: U16,
    birth: U32,
}
const _: () = assert!(size_of::<RawEntry>() == 16);

impl From<Entry> for RawEntry {
    fn from(entry: Entry) -> Self {
        Self {
            own: entry.own.into(),
            under: entry.under.into(),
            alloc: entry.alloc.into(),
            zero: entry.zero.into(),
            birth: entry.birth.into(),
        }
    }
}

impl From<RawEntry> for Entry {
    fn from(raw: RawEntry) -> Self {
        Self {
            own: raw.own.get(),
            under: raw.under.get(),
            alloc: raw.alloc.get(),
            zero: raw.zero.get(),
            birth: raw.birth.get(),
        }
    }
}

/// One item of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Token {
    /// Always first.
    Start {
        /// The pool's current generation.
        generation: Generation,
        /// The next disk id to give out.
        next_disk: DiskId,
    },
    /// A leaf; nodes are numbered from 0 in the order they appear.
    Leaf(Box<[Entry; LEAF_ENTRIES]>),
    /// An inner node; its children came before it.
    Inner {
        /// 1 above leaves, up to [`LEVELS`].
        level: u8,
        /// Place (0..[`FANOUT`], rising) and node number of each child.
        children: Vec<(u16, u32)>,
    },
    /// A disk or snapshot.
    Disk {
        /// Its row.
        row: Box<Row>,
        /// Node number of its root, of level [`LEVELS`]; `None` for an empty map.
        root: Option<u32>,
        /// Generation of its last fork.
        last_fork: Generation,
        /// Generation of its last change.
        changed: Generation,
    },
    /// Always last: how many of each there were.
    End {
        /// Leaves and inner nodes.
        nodes: u64,
        /// Disks.
        disks: u64,
    },
}

/// Encodes one token at the end of `out`.
///
/// # Errors
/// A row longer than [`ROW_LEN_MAX`].
pub fn encode_token(token: &Token, out: &mut Vec<u8>) -> Result<(), FormatError> {
    match token {
        Token::Start {
            generation,
            next_disk,
        } => {
            out.push(TOKEN_START);
            out.extend_from_slice(&IMAGE_VERSION.to_le_bytes());
            out.extend_from_slice(&generation.0.to_le_bytes());
            out.extend_from_slice(&next_disk.0.to_le_bytes());
        }
        Token::Leaf(entries) => encode_leaf(entries, out),
        Token::Inner { level, children } => {
            let count = u16::try_from(children.len()).unwrap_or(u16::MAX);
            out.push(TOKEN_INNER);
            out.push(*level);
            out.extend_from_slice(&count.to_le_bytes());
            for (place, node) in children {
                out.extend_from_slice(&place.to_le_bytes());
                out.extend_from_slice(&node.to_le_bytes());
            }
        }
        Token::Disk {
            row,
            root,
            last_fork,
            changed,
        } => {
            let json = row.to_json()?;
            let len = u32::try_from(json.len()).unwrap_or(u32::MAX);
            out.push(TOKEN_DISK);
            for field in [root.unwrap_or(u32::MAX), last_fork.0, changed.0, len] {
                out.extend_from_slice(&field.to_le_bytes());
            }
            out.extend_from_slice(&json);
        }
        Token::End { nodes, disks } => {
            out.push(TOKEN_END);
            out.extend_from_slice(&nodes.to_le_bytes());
            out.extend_from_slice(&disks.to_le_bytes());
        }
    }
    Ok(())
}

/// Leaves dominate every image, so they have an entry of their own that copies nothing.
pub fn encode_leaf(entries: &[Entry; LEAF_ENTRIES], out: &mut Vec<u8>) {
    out.push(TOKEN_LEAF);
    let runs_at = out.len();
    out.push(0);
    let mut runs = 0_u8;
    let mut rest: &[Entry] = entries;
    let mut start = 0_u8;
    while let Some(first) = rest.first() {
        let run = run_len(rest);
        let len = u8::try_from(run).unwrap_or(u8::MAX);
        let (taken, after) = rest.split_at_checked(run).unwrap_or((rest, &[]));
        if *first != Entry::default() {
            let kind = if run > 1 { RUN_CONSECUTIVE } else { RUN_EACH };
            out.extend_from_slice(&[start, len, kind]);
            let stored = if run > 1 {
                taken.get(..1).unwrap_or(taken)
            } else {
                taken
            };
            for entry in stored {
                out.extend_from_slice(RawEntry::from(*entry).as_bytes());
            }
            runs = runs.saturating_add(1);
        }
        start = start.saturating_add(len);
        rest = after;
    }
    if let Some(count) = out.get_mut(runs_at) {
        *count = runs;
    }
}

/// Entries at the start of `entries` that follow from the first by counting up.
fn run_len(entries: &[Entry]) -> usize {
    let Some(first) = entries.first() else {
        return 0;
    };
    let follows = |(n, entry): &(usize, &Entry)| {
        u32::try_from(*n).is_ok_and(|n| nth_of_run(*first, n) == Some(**entry))
    };
    entries.iter().enumerate().take_while(follows).count()
}

/// The entry `n` places after `first` in a consecutive run.
fn nth_of_run(first: Entry, n: u32) -> Option<Entry> {
    let step = |cluster: u32| match cluster {
        0 => Some(0),
        cluster => cluster.checked_add(n),
    };
    Some(Entry {
        own: step(first.own)?,
        under: step(first.under)?,
        ..first
    })
}

/// Takes the first token off `tokens`; `None` at the end.
///
/// # Errors
/// Bytes that are not a token.
pub fn decode_token(tokens: &mut &[u8]) -> Result<Option<Token>, FormatError> {
    let mut cursor = Cursor {
        what: WHAT,
        rest: tokens,
    };
    if cursor.rest.is_empty() {
        return Ok(None);
    }
    let bad = |field, value| FormatError::Field {
        what: WHAT,
        field,
        value,
    };
    let token = match cursor.u8()? {
        TOKEN_START => {
            let found = cursor.u32()?;
            if found != IMAGE_VERSION {
                return Err(FormatError::Version {
                    what: WHAT,
                    found,
                    known: IMAGE_VERSION,
                });
            }
            let generation = Generation(cursor.u32()?);
            Token::Start {
                generation,
                next_disk: DiskId(cursor.u32()?),
            }
        }
        TOKEN_LEAF => Token::Leaf(decode_leaf(&mut cursor)?),
        TOKEN_INNER => decode_inner(&mut cursor)?,
        TOKEN_DISK => {
            let root = cursor.u32()?;
            let last_fork = Generation(cursor.u32()?);
            let changed = Generation(cursor.u32()?);
            let len = usize::try_from(cursor.u32()?).unwrap_or(usize::MAX);
            if len > ROW_LEN_MAX {
                return Err(bad("row length", bytes_of(len)));
            }
            let row = Box::new(Row::from_json(cursor.take(len)?)?);
            Token::Disk {
                row,
                root: (root != u32::MAX).then_some(root),
                last_fork,
                changed,
            }
        }
        TOKEN_END => Token::End {
            nodes: cursor.u64()?,
            disks: cursor.u64()?,
        },
        kind => return Err(bad("token", u64::from(kind))),
    };
    *tokens = cursor.rest;
    Ok(Some(token))
}

fn decode_leaf(cursor: &mut Cursor<'_>) -> Result<Box<[Entry; LEAF_ENTRIES]>, FormatError> {
    let bad = |field, value| FormatError::Field {
        what: WHAT,
        field,
        value,
    };
    let mut entries = Box::new([Entry::default(); LEAF_ENTRIES]);
    for _ in 0..cursor.u8()? {
        let [start, len, kind] = cursor.array()?;
        let range = usize::from(start)..usize::from(start).saturating_add(usize::from(len));
        let places = entries.get_mut(range).ok_or(bad("run", u64::from(start)))?;
        if len == 0 || kind > RUN_CONSECUTIVE || (kind == RUN_EACH && len != 1) {
            return Err(bad("run kind", u64::from(kind)));
        }
        let raw = RawEntry::read_from_bytes(cursor.take(size_of::<RawEntry>())?)
            .map_err(|_short| FormatError::Short { what: WHAT })?;
        let first = Entry::from(raw);
        for (n, place) in (0_u32..).zip(places) {
            *place = nth_of_run(first, n).ok_or(bad("run end", u64::from(first.own)))?;
        }
    }
    Ok(entries)
}

fn decode_inner(cursor: &mut Cursor<'_>) -> Result<Token, FormatError> {
    let bad = |field, value| FormatError::Field {
        what: WHAT,
        field,
        value,
    };
    let level = cursor.u8()?;
    if level == 0 || level > LEVELS {
        return Err(bad("level", u64::from(level)));
    }
    let count = usize::from(cursor.u16()?);
    if count > FANOUT {
        return Err(bad("children", bytes_of(count)));
    }
    let mut children = Vec::with_capacity(count);
    let mut next_place = 0_u16;
    for _ in 0..count {
        let (place, node) = (cursor.u16()?, cursor.u32()?);
        let fanout = if level == LEVELS { ROOT_FANOUT } else { FANOUT };
        if place < next_place || usize::from(place) >= fanout {
            return Err(bad("place", u64::from(place)));
        }
        next_place = place.saturating_add(1);
        children.push((place, node));
    }
    Ok(Token::Inner { level, children })
}

#[cfg(test)]
mod tests {
    use super::super::catalogue::tests::sample_row;
    use super::super::catalogue::{BaseFormat, BaseRef};
    use super::*;

    fn tokens() -> Vec<Token> {
        let mut entries = Box::new([Entry::default(); LEAF_ENTRIES]);
        for n in 0..20_u32 {
            entries[10 + n as usize] = Entry {
                own: 100 + n,
                alloc: 0xffff,
                birth: 1,
                ..Entry::default()
            };
        }
        entries[63] = Entry {
            own: 7,
            under: 8,
            alloc: 1,
            zero: 2,
            birth: 9,
        };
        vec![
            Token::Start {
                generation: Generation(3),
                next_disk: DiskId(4),
            },
            Token::Leaf(entries),
            Token::Inner {
                level: 1,
                children: vec![(0, 0), (511, 0)],
            },
            Token::Disk {
                row: Box::new(sample_row(3)),
                root: None,
                last_fork: Generation(1),
                changed: Generation(2),
            },
            Token::End { nodes: 2, disks: 1 },
        ]
    }

    fn encoded() -> Vec<u8> {
        let mut out = Vec::new();
        for token in tokens() {
            encode_token(&token, &mut out).expect("short rows");
        }
        out
    }

    fn decode_all(mut bytes: &[u8]) -> Result<Vec<Token>, FormatError> {
        let mut found = Vec::new();
        while let Some(token) = decode_token(&mut bytes)? {
            found.push(token);
        }
        Ok(found)
    }

    #[test]
    fn tokens_round_trip_and_runs_are_short() {
        assert_eq!(decode_all(&encoded()), Ok(tokens()));
        let mut leaf = Vec::new();
        encode_token(&tokens()[1], &mut leaf).expect("a leaf");
        assert_eq!(
            leaf.len(),
            2 + 2 * (3 + 16),
            "20 consecutive entries are one run"
        );
    }

    /// What the journal takes, an image must give back.
    #[test]
    fn the_longest_row_round_trips() {
        let row = |len: usize| {
            let mut row = sample_row(3);
            row.base = Some(BaseRef {
                path: "p".repeat(len),
                format: BaseFormat::Raw,
                dev: 1,
                ino: 2,
                file_len: 3,
                mtime_ns: 4,
                ctime_ns: 5,
                below: None,
                samples: None,
            });
            row
        };
        let rest = row(0).to_json().expect("short").len();
        let longest = row(ROW_LEN_MAX - rest);
        let token = Token::Disk {
            row: Box::new(longest),
            root: None,
            last_fork: Generation(1),
            changed: Generation(2),
        };
        let mut bytes = Vec::new();
        encode_token(&token, &mut bytes).expect("not longer");
        assert_eq!(decode_all(&bytes), Ok(vec![token]));
        row(ROW_LEN_MAX - rest + 1).to_json().expect_err("longer");
    }

    /// Clusters under others count up as well: this is how the bytes of every pool are read.
    #[test]
    fn a_run_counts_up_both_clusters() {
        let mut entries = [Entry::default(); LEAF_ENTRIES];
        for (n, entry) in (0..).zip(&mut entries) {
            *entry = Entry {
                own: 100 + n,
                under: 500 + n,
                alloc: 1,
                ..Entry::default()
            };
        }
        let mut leaf = Vec::new();
        encode_leaf(&entries, &mut leaf);
        assert_eq!(leaf.len(), 2 + 3 + 16, "one run");
        assert_eq!(decode_all(&leaf), Ok(vec![Token::Leaf(Box::new(entries))]));
    }

    /// Their clusters would have numbers beyond 2^32, and come out as those of others.
    #[test]
    fn a_root_has_no_more_children_than_there_are_clusters() {
        for (level, place, is_good) in [(3, 255, true), (3, 256, false), (2, 511, true)] {
            let mut bytes = Vec::new();
            let token = Token::Inner {
                level,
                children: vec![(place, 0)],
            };
            encode_token(&token, &mut bytes).expect("short");
            assert_eq!(decode_all(&bytes).is_ok(), is_good, "{place} at {level}");
        }
    }

    #[test]
    fn every_prefix_of_a_stream_is_refused_or_shorter() {
        let bytes = encoded();
        for len in 0..bytes.len() {
            if let Ok(found) = decode_all(&bytes[..len]) {
                assert!(found.len() < tokens().len());
            }
        }
    }
}
