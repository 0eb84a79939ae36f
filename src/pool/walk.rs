//! Visiting the leaves of maps, shared nodes once.

use super::map::{Inner, Leaf, Tree};
use crate::sync::Shared;
use std::collections::HashMap;

/// Called with a leaf's number in its disk, whether any node on its path is shared, and the leaf.
pub type Visit<'a> = &'a mut dyn FnMut(u32, bool, &Leaf);

/// Remembers shared nodes, so that walking many trees visits each leaf once.
#[derive(Debug, Default)]
pub struct Seen {
    /// By address.
    nodes: HashMap<usize, Met>,
    family: u32,
    last_fork: u32,
    clashes: Vec<Clash>,
}

/// A shared node that was met.
#[derive(Debug, Clone, Copy)]
struct Met {
    /// Its number at its level, and the family it was met in.
    place: (u32, u32),
    below: Below,
}

/// What the leaves below a node refer to.
#[derive(Debug, Clone, Copy, Default)]
struct Below {
    has_clusters: bool,
    /// The latest birth of a cluster there.
    newest: u32,
}

impl Below {
    fn and(self, other: Below) -> Below {
        Below {
            has_clusters: self.has_clusters || other.has_clusters,
            newest: self.newest.max(other.newest),
        }
    }
}

/// A shared node that cannot be where it was met again.
#[derive(Debug, Clone, Copy)]
pub struct Clash {
    /// The first cluster of the disk that the node is about.
    pub lcn: u32,
    /// I1: it was met in another place or family too. Otherwise I4: the disk would write in place
    /// what it shares.
    pub is_elsewhere: bool,
}

impl Seen {
    /// Trees walked from now on belong to a disk of this family, last forked in this generation.
    pub fn set_disk(&mut self, family: u32, last_fork: u32) {
        self.family = family;
        self.last_fork = last_fork;
    }

    /// What cannot be about nodes that were met again.
    #[must_use]
    pub fn clashes(&self) -> &[Clash] {
        &self.clashes
    }

    /// Visits the leaves of `tree` that were not visited before.
    pub fn walk(&mut self, tree: &Tree, visit: Visit<'_>) {
        if let Some(root) = &tree.root {
            walk(root, 0, false, Some(self), visit);
        }
    }

    /// What is below the node at `address`, number `number` of those with `1 << leaves_log2` leaves,
    /// if it was met before.
    fn meet_again(&mut self, address: usize, number: u32, leaves_log2: u32) -> Option<Below> {
        let met = self.nodes.get_mut(&address)?;
        let here = (number, self.family);
        let is_elsewhere = std::mem::replace(&mut met.place, here) != here;
        let below = met.below;
        if below.has_clusters && (is_elsewhere || below.newest > self.last_fork) {
            let lcn = (number << leaves_log2) << 6;
            self.clashes.push(Clash { lcn, is_elsewhere });
        }
        Some(below)
    }
}

/// Visits every leaf of `tree`.
pub fn walk_all(tree: &Tree, visit: Visit<'_>) {
    if let Some(root) = &tree.root {
        walk(root, 0, false, None, visit);
    }
}

/// A node that can be walked; `prefix` is its own number at its level.
trait Walk {
    /// Leaves below it, as an exponent of two.
    const LEAVES_LOG2: u32;

    /// What is below is told of shared nodes only.
    fn step(
        &self,
        prefix: u32,
        is_shared: bool,
        seen: Option<&mut Seen>,
        visit: Visit<'_>,
    ) -> Below;
}

fn walk<N: Walk>(
    node: &Shared<N>,
    prefix: u32,
    is_shared: bool,
    seen: Option<&mut Seen>,
    visit: Visit<'_>,
) -> Below {
    let is_shared = is_shared || Shared::strong_count(node) > 1;
    let seen = match seen {
        Some(seen) if is_shared => seen,
        seen => return node.step(prefix, is_shared, seen, visit),
    };
    let address = Shared::as_ptr(node).addr();
    if let Some(below) = seen.meet_again(address, prefix, N::LEAVES_LOG2) {
        return below;
    }
    let below = node.step(prefix, is_shared, Some(&mut *seen), visit);
    let place = (prefix, seen.family);
    seen.nodes.insert(address, Met { place, below });
    below
}

impl Walk for Leaf {
    const LEAVES_LOG2: u32 = 0;

    fn step(
        &self,
        prefix: u32,
        is_shared: bool,
        _seen: Option<&mut Seen>,
        visit: Visit<'_>,
    ) -> Below {
        visit(prefix, is_shared, self);
        if !is_shared {
            return Below::default();
        }
        let below = self.entries.iter().map(|entry| Below {
            has_clusters: entry.clusters() != [0, 0],
            newest: if entry.own == 0 { 0 } else { entry.birth },
        });
        below.fold(Below::default(), Below::and)
    }
}

impl<C: Walk> Walk for Inner<C> {
    const LEAVES_LOG2: u32 = C::LEAVES_LOG2 + 9;

    fn step(
        &self,
        prefix: u32,
        is_shared: bool,
        mut seen: Option<&mut Seen>,
        visit: Visit<'_>,
    ) -> Below {
        let mut below = Below::default();
        for (place, child) in (0_u32..).zip(&self.child) {
            if let Some(child) = child {
                let prefix = (prefix << 9) | place;
                let seen = seen.as_deref_mut();
                below = below.and(walk(child, prefix, is_shared, seen, visit));
            }
        }
        below
    }
}
