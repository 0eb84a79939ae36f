//! Visiting the leaves of maps, shared nodes once.

use super::map::{Inner, Leaf, Tree};
use crate::format::journal::Entry;
use crate::sync::Arc;
use std::collections::HashMap;

/// Called with a leaf's number in its disk, whether any node on its path is shared, and the leaf.
pub type Visit<'a> = &'a mut dyn FnMut(u32, bool, &Leaf);

/// Remembers shared nodes, so that walking many trees visits each leaf once.
#[derive(Debug, Default)]
pub struct Seen {
    /// By address: the node's number at its level, and the family it was met in.
    nodes: HashMap<usize, (u32, u32)>,
    family: u32,
    clashes: Vec<u32>,
}

impl Seen {
    /// Trees walked from now on belong to this family.
    pub fn set_family(&mut self, family: u32) {
        self.family = family;
    }

    /// Numbers of nodes that were met again in another place or family, although they refer to
    /// clusters: I1 is broken by each.
    #[must_use]
    pub fn clashes(&self) -> &[u32] {
        &self.clashes
    }

    /// Visits the leaves of `tree` that were not visited before.
    pub fn walk(&mut self, tree: &Tree, visit: Visit<'_>) {
        if let Some(root) = &tree.root {
            walk(root, 0, false, Some(self), visit);
        }
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
    fn step(&self, prefix: u32, is_shared: bool, seen: Option<&mut Seen>, visit: Visit<'_>);

    /// Whether it matters where it is: leaves of zeros are shared by all.
    fn has_clusters(&self) -> bool;
}

fn walk<N: Walk>(
    node: &Arc<N>,
    prefix: u32,
    is_shared: bool,
    seen: Option<&mut Seen>,
    visit: Visit<'_>,
) {
    let is_shared = is_shared || Arc::strong_count(node) > 1;
    let mut seen = seen;
    if is_shared {
        if let Some(seen) = seen.as_deref_mut() {
            let here = (prefix, seen.family);
            if let Some(before) = seen.nodes.insert(Arc::as_ptr(node).addr(), here) {
                if before != here && node.has_clusters() {
                    seen.clashes.push(prefix);
                }
                return;
            }
        }
    }
    node.step(prefix, is_shared, seen, visit);
}

impl Walk for Leaf {
    fn step(&self, prefix: u32, is_shared: bool, _seen: Option<&mut Seen>, visit: Visit<'_>) {
        visit(prefix, is_shared, self);
    }

    fn has_clusters(&self) -> bool {
        self.entries
            .iter()
            .flat_map(Entry::clusters)
            .any(|c| c != 0)
    }
}

impl<C: Walk> Walk for Inner<C> {
    fn step(&self, prefix: u32, is_shared: bool, mut seen: Option<&mut Seen>, visit: Visit<'_>) {
        for (place, child) in (0_u32..).zip(&self.child) {
            if let Some(child) = child {
                walk(
                    child,
                    (prefix << 9) | place,
                    is_shared,
                    seen.as_deref_mut(),
                    visit,
                );
            }
        }
    }

    fn has_clusters(&self) -> bool {
        self.child
            .iter()
            .flatten()
            .any(|child| child.has_clusters())
    }
}
