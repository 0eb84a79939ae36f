//! Visiting the leaves of maps, shared nodes once.

use super::map::{Inner, Leaf, Tree};
use crate::sync::Arc;
use std::collections::HashSet;

/// Called with a leaf's number in its disk, whether any node on its path is shared, and the leaf.
pub type Visit<'a> = &'a mut dyn FnMut(u32, bool, &Leaf);

/// Remembers shared nodes, so that walking many trees visits each leaf once.
#[derive(Debug, Default)]
pub struct Seen {
    nodes: HashSet<usize>,
}

impl Seen {
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
        let address = Arc::as_ptr(node).addr();
        if seen
            .as_deref_mut()
            .is_some_and(|seen| !seen.nodes.insert(address))
        {
            return;
        }
    }
    node.step(prefix, is_shared, seen, visit);
}

impl Walk for Leaf {
    fn step(&self, prefix: u32, is_shared: bool, _seen: Option<&mut Seen>, visit: Visit<'_>) {
        visit(prefix, is_shared, self);
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
}
