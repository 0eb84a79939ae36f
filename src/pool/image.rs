//! Writing a checkpoint image from a frozen forest, and loading one. The forest is frozen by
//! cloning root pointers; requests go on and copy the nodes they change.

use super::error::PoolError;
use super::map::{Dropped, Inner, Leaf, Low, Mid, Root, Tree};
use super::space::{Purpose, Space};
use crate::format::FormatError;
use crate::format::catalogue::Row;
use crate::format::image::{FANOUT, LEAF_ENTRIES, LEVELS, Token, encode_leaf, encode_token};
use crate::format::image_block::{
    BLOCK_HEADER_LEN, Extent, ImageStamp, PARITY_BLOCKS, WINDOW, add_parity, extents_per_head,
    seal_block, seal_head,
};
use crate::format::journal::Entry;
use crate::format::superblock::ImageRef;
use crate::format::units::{Cluster, ClusterSize, DiskId, Generation, bytes_of, index};
use crate::storage::{AlignedBuf, Storage};
use crate::sync::Shared;
use std::collections::HashMap;
use std::ops::Range;

/// A disk as it was when the forest was frozen.
#[derive(Debug)]
pub struct FrozenDisk {
    /// Its row.
    pub row: Row,
    /// Its map, shared with the live one.
    pub tree: Tree,
    /// Generation of its last fork.
    pub last_fork: Generation,
    /// Generation of its last change.
    pub changed: Generation,
}

/// The state of all disks after batch `seq`.
#[derive(Debug)]
pub struct Frozen {
    /// The last batch included.
    pub seq: u64,
    /// The pool's generation.
    pub generation: Generation,
    /// The next disk id to give out.
    pub next_disk: DiskId,
    /// All disks and snapshots.
    pub disks: Vec<FrozenDisk>,
}

impl Frozen {
    /// Its references, to be released when the image is written or given up.
    pub fn into_dropped(self) -> Vec<Dropped> {
        let roots = self.disks.into_iter().filter_map(|disk| disk.tree.root);
        roots.map(Dropped::Root).collect()
    }
}

/// A written image: what the superblock says of it, and the clusters it takes.
#[derive(Debug)]
pub struct Written {
    /// For the superblock.
    pub image: ImageRef,
    /// Every cluster of blocks and heads.
    pub clusters: Vec<Range<u32>>,
}

/// Writes `frozen` into free clusters. Nothing refers to them until the superblock does; the
/// caller flushes first.
///
/// # Errors
/// No space, or the store failed. The clusters taken are free again.
pub fn write(
    frozen: &Frozen,
    uuid_low: u64,
    size: ClusterSize,
    space: &Space,
    storage: &dyn Storage,
) -> Result<Written, PoolError> {
    let stamp = ImageStamp {
        uuid_low,
        seq: frozen.seq,
    };
    let mut writer = Writer {
        stamp,
        size,
        space,
        storage,
        tokens: Vec::with_capacity(size.len()),
        block: AlignedBuf::new(size.len()),
        blocks: 0,
        parity: Vec::new(),
        clusters: Vec::new(),
        slab: 0..0,
        numbers: HashMap::new(),
        next_number: 0,
    };
    let result = writer.write_all(frozen);
    writer.give_up_slab();
    match result {
        Ok((head, head_copy)) => {
            let len = u64::from(writer.blocks) * size.bytes();
            let image = ImageRef {
                seq: frozen.seq,
                len,
                head,
                head_copy,
            };
            Ok(Written {
                image,
                clusters: writer.clusters,
            })
        }
        Err(e) => {
            for range in writer.clusters {
                space.give_back(range, true).wake();
            }
            Err(e)
        }
    }
}

struct Writer<'a> {
    stamp: ImageStamp,
    size: ClusterSize,
    space: &'a Space,
    storage: &'a dyn Storage,
    tokens: Vec<u8>,
    block: AlignedBuf,
    blocks: u32,
    /// Of the blocks since the last ones.
    parity: Vec<AlignedBuf>,
    clusters: Vec<Range<u32>>,
    slab: Range<u32>,
    /// Numbers of nodes that more than one parent refers to, by address. The frozen forest keeps
    /// them alive, so an address is not used twice.
    numbers: HashMap<usize, u32>,
    next_number: u32,
}

impl Writer<'_> {
    fn write_all(&mut self, frozen: &Frozen) -> Result<(u32, u32), PoolError> {
        let Frozen {
            generation,
            next_disk,
            ..
        } = *frozen;
        self.put(&Token::Start {
            generation,
            next_disk,
        })?;
        for disk in &frozen.disks {
            let root = disk
                .tree
                .root
                .as_ref()
                .map(|root| self.put_root(root))
                .transpose()?;
            let row = Box::new(disk.row.clone());
            let FrozenDisk {
                last_fork, changed, ..
            } = *disk;
            self.put(&Token::Disk {
                row,
                root,
                last_fork,
                changed,
            })?;
        }
        let nodes = u64::from(self.next_number);
        let disks = bytes_of(frozen.disks.len());
        self.put(&Token::End { nodes, disks })?;
        self.flush_block()?;
        self.flush_parity()?;
        self.write_heads()
    }

    fn put_root(&mut self, root: &Shared<Root>) -> Result<u32, PoolError> {
        self.put_inner(LEVELS, root, |this, mid: &Shared<Mid>| {
            this.put_inner(2, mid, |this, low: &Shared<Low>| {
                this.put_inner(1, low, |this, leaf: &Shared<Leaf>| this.put_leaf(leaf))
            })
        })
    }

    fn put_inner<C>(
        &mut self,
        level: u8,
        node: &Shared<Inner<C>>,
        mut put_child: impl FnMut(&mut Self, &Shared<C>) -> Result<u32, PoolError>,
    ) -> Result<u32, PoolError> {
        if let Some(number) = self.numbers.get(&address(node)) {
            return Ok(*number);
        }
        let mut children = Vec::new();
        for (place, child) in (0_u16..).zip(&node.child) {
            if let Some(child) = child {
                children.push((place, put_child(self, child)?));
            }
        }
        self.put(&Token::Inner { level, children })?;
        Ok(self.number(node))
    }

    fn put_leaf(&mut self, leaf: &Shared<Leaf>) -> Result<u32, PoolError> {
        if let Some(number) = self.numbers.get(&address(leaf)) {
            return Ok(*number);
        }
        let mut token = Vec::with_capacity(2048);
        encode_leaf(&leaf.entries, &mut token);
        self.append(&token)?;
        Ok(self.number(leaf))
    }

    /// The number of the node just put; remembered if it can be met again.
    fn number<T>(&mut self, node: &Shared<T>) -> u32 {
        let number = self.next_number;
        self.next_number += 1;
        if Shared::strong_count(node) > 1 {
            self.numbers.insert(address(node), number);
        }
        number
    }

    fn put(&mut self, token: &Token) -> Result<(), PoolError> {
        let mut bytes = Vec::new();
        encode_token(token, &mut bytes)?;
        self.append(&bytes)
    }

    fn append(&mut self, token: &[u8]) -> Result<(), PoolError> {
        if self.tokens.len() + token.len() > self.size.len() - BLOCK_HEADER_LEN {
            self.flush_block()?;
        }
        self.tokens.extend_from_slice(token);
        Ok(())
    }

    fn flush_block(&mut self) -> Result<(), PoolError> {
        seal_block(self.stamp, self.blocks, &self.tokens, &mut self.block);
        self.tokens.clear();
        let cluster = self.take_cluster()?;
        self.write_block(cluster, &self.block)?;
        let group = index(self.blocks % PARITY_BLOCKS);
        if self.parity.len() <= group {
            self.parity.push(AlignedBuf::new(self.size.len()));
        }
        add_parity(&mut self.parity[group], &self.block);
        self.blocks += 1;
        match self.blocks.is_multiple_of(WINDOW) {
            true => self.flush_parity(),
            false => Ok(()),
        }
    }

    fn flush_parity(&mut self) -> Result<(), PoolError> {
        let mut parity = std::mem::take(&mut self.parity);
        if !parity.is_empty() {
            // It goes on where the blocks end, so that no two neighbours are of one group.
            let in_window = (self.blocks - 1) % WINDOW + 1;
            let first = index(in_window) % parity.len();
            parity.rotate_left(first);
        }
        for parity in parity {
            let cluster = self.take_cluster()?;
            self.write_block(cluster, &parity)?;
        }
        Ok(())
    }

    fn write_block(&self, cluster: u32, block: &[u8]) -> Result<(), PoolError> {
        let at = self.size.offset(Cluster(cluster));
        let write = self.storage.write_at(block, at);
        write.map_err(PoolError::storage("writing a checkpoint image"))
    }

    fn take_cluster(&mut self) -> Result<u32, PoolError> {
        if self.slab.is_empty() {
            self.slab = self.space.take(64, Purpose::Image)?.clusters;
        }
        let cluster = self.slab.next().ok_or(PoolError::NoSpace)?;
        match self.clusters.last_mut() {
            Some(last) if last.end == cluster => last.end += 1,
            Some(_) | None => self.clusters.push(cluster..cluster + 1),
        }
        Ok(cluster)
    }

    fn give_up_slab(&mut self) {
        let rest = std::mem::take(&mut self.slab);
        self.space.give_back(rest, true).wake();
    }

    /// Extent lists, the last one first, so that each names the one after it; all of them twice.
    fn write_heads(&mut self) -> Result<(u32, u32), PoolError> {
        let extents: Vec<Extent> = self
            .clusters
            .iter()
            .map(|run| Extent {
                start: run.start,
                count: run.end - run.start,
            })
            .collect();
        let mut next = (0, 0);
        for part in extents.chunks(extents_per_head(self.size.len())).rev() {
            seal_head(self.stamp, next, part, &mut self.block);
            next = (self.take_cluster()?, self.take_cluster()?);
            self.write_block(next.0, &self.block)?;
            self.write_block(next.1, &self.block)?;
        }
        Ok(next)
    }
}

fn address<T>(node: &Shared<T>) -> usize {
    Shared::as_ptr(node).addr()
}

/// A node of an image being loaded.
#[derive(Debug, Clone)]
enum Node {
    Leaf(Shared<Leaf>),
    Low(Shared<Low>),
    Mid(Shared<Mid>),
    Root(Shared<Root>),
}

/// Puts the tokens of an image together. Feed it all of them, then take [`Loader::finish`].
#[derive(Debug, Default)]
pub struct Loader {
    nodes: Vec<Node>,
    /// By level: the node that says nothing. One for all, or an image of them would take a thousand
    /// times its size in memory.
    empty: [Option<Node>; 4],
    start: Option<(Generation, DiskId)>,
    disks: Vec<FrozenDisk>,
    is_complete: bool,
}

impl Loader {
    /// The next token.
    ///
    /// # Errors
    /// It does not fit those before it.
    pub fn feed(&mut self, token: Token) -> Result<(), PoolError> {
        if self.is_complete || self.start.is_none() != matches!(token, Token::Start { .. }) {
            return Err(PoolError::damaged("checkpoint image: tokens out of order"));
        }
        match token {
            Token::Start {
                generation,
                next_disk,
            } => self.start = Some((generation, next_disk)),
            Token::Leaf(entries) => {
                let is_empty = *entries == [Entry::default(); LEAF_ENTRIES];
                self.push(0, is_empty, |_| {
                    let leaf = Leaf {
                        entries: *entries,
                        dirty: 0,
                    };
                    Ok(Node::Leaf(Shared::new(leaf)))
                })?;
            }
            Token::Inner { level, children } => {
                self.push(level, children.is_empty(), |this| {
                    this.inner(level, &children)
                })?;
            }
            Token::Disk {
                row,
                root,
                last_fork,
                changed,
            } => {
                let root = root.map(|number| self.root(number)).transpose()?;
                let tree = Tree { root };
                self.disks.push(FrozenDisk {
                    row: *row,
                    tree,
                    last_fork,
                    changed,
                });
            }
            Token::End { nodes, disks } => {
                if nodes != bytes_of(self.nodes.len()) || disks != bytes_of(self.disks.len()) {
                    return Err(PoolError::damaged("checkpoint image: nodes are missing"));
                }
                self.is_complete = true;
            }
        }
        Ok(())
    }

    /// Adds a node of `level` (0: a leaf).
    fn push(
        &mut self,
        level: u8,
        is_empty: bool,
        make: impl FnOnce(&Self) -> Result<Node, PoolError>,
    ) -> Result<(), PoolError> {
        let place = usize::from(level);
        let known = self.empty.get(place).and_then(Option::as_ref);
        let node = match known.filter(|_| is_empty) {
            Some(node) => node.clone(),
            None => make(self)?,
        };
        if let Some(empty) = self.empty.get_mut(place).filter(|_| is_empty) {
            *empty = Some(node.clone());
        }
        self.nodes.push(node);
        Ok(())
    }

    fn node(&self, number: u32) -> Result<&Node, PoolError> {
        let node = self.nodes.get(index(number));
        node.ok_or_else(|| PoolError::damaged(format!("checkpoint image: no node {number} yet")))
    }

    fn root(&self, number: u32) -> Result<Shared<Root>, PoolError> {
        match self.node(number)? {
            Node::Root(root) => Ok(Shared::clone(root)),
            Node::Leaf(_) | Node::Low(_) | Node::Mid(_) => Err(wrong_level(number)),
        }
    }

    fn inner(&self, level: u8, children: &[(u16, u32)]) -> Result<Node, PoolError> {
        match level {
            1 => Ok(Node::Low(self.gather(children, |node| match node {
                Node::Leaf(leaf) => Some(leaf),
                Node::Low(_) | Node::Mid(_) | Node::Root(_) => None,
            })?)),
            2 => Ok(Node::Mid(self.gather(children, |node| match node {
                Node::Low(low) => Some(low),
                Node::Leaf(_) | Node::Mid(_) | Node::Root(_) => None,
            })?)),
            LEVELS => Ok(Node::Root(self.gather(children, |node| match node {
                Node::Mid(mid) => Some(mid),
                Node::Leaf(_) | Node::Low(_) | Node::Root(_) => None,
            })?)),
            level => Err(FormatError::Field {
                what: "checkpoint image",
                field: "level",
                value: u64::from(level),
            }
            .into()),
        }
    }

    fn gather<C>(
        &self,
        children: &[(u16, u32)],
        pick: impl Fn(&Node) -> Option<&Shared<C>>,
    ) -> Result<Shared<Inner<C>>, PoolError> {
        let mut inner = Inner::default();
        for (place, number) in children {
            let child = pick(self.node(*number)?).ok_or_else(|| wrong_level(*number))?;
            inner.child[usize::from(*place) % FANOUT] = Some(Shared::clone(child));
        }
        Ok(Shared::new(inner))
    }

    /// The forest.
    ///
    /// # Errors
    /// The image was cut short.
    pub fn finish(self, seq: u64) -> Result<Frozen, PoolError> {
        match self.start {
            Some((generation, next_disk)) if self.is_complete => Ok(Frozen {
                seq,
                generation,
                next_disk,
                disks: self.disks,
            }),
            Some(_) | None => Err(PoolError::damaged("checkpoint image: its end is missing")),
        }
    }
}

fn wrong_level(number: u32) -> PoolError {
    PoolError::damaged(format!(
        "checkpoint image: node {number} is of another level"
    ))
}
