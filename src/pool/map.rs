//! The map of a disk: a radix tree from a disk's clusters to entries, three levels of inner nodes
//! over leaves of 64 entries (4 MiB at 64 KiB clusters). Nodes are shared between disks by `Arc`:
//! a fork copies a root pointer, and a change copies the shared nodes on its path first.
//!
//! A leaf counts as one reference to each cluster it names, however many disks share the leaf.

use super::counts::Counts;
use crate::format::image::{FANOUT, LEAF_ENTRIES};
use crate::format::journal::Entry;
use crate::format::units::{Lcn, index};
use crate::sync::Shared;

/// Entries for 64 consecutive clusters of a disk.
#[derive(Debug, Clone)]
pub struct Leaf {
    /// By place in the leaf.
    pub entries: [Entry; LEAF_ENTRIES],
    /// Entries changed since they were last put into a batch: a bit each.
    pub dirty: u64,
}

impl Default for Leaf {
    fn default() -> Self {
        Self {
            entries: [Entry::default(); LEAF_ENTRIES],
            dirty: 0,
        }
    }
}

/// A node over [`FANOUT`] children.
#[derive(Debug, Clone)]
pub struct Inner<C> {
    /// By place in the node.
    pub child: [Option<Shared<C>>; FANOUT],
}

impl<C> Default for Inner<C> {
    fn default() -> Self {
        Self {
            child: [const { None }; FANOUT],
        }
    }
}

/// Level 1: over leaves.
pub type Low = Inner<Leaf>;
/// Level 2.
pub type Mid = Inner<Low>;
/// Level 3.
pub type Root = Inner<Mid>;

/// Number of a leaf in its disk, and an entry's place in it.
#[must_use]
pub fn leaf_of(lcn: Lcn) -> (u32, usize) {
    (lcn.0 / 64, index(lcn.0 % 64))
}

/// Places of a leaf on the path from the root.
fn path(leaf: u32) -> [usize; 3] {
    [
        index(leaf >> 18),
        index((leaf >> 9) & 511),
        index(leaf & 511),
    ]
}

/// The map of one disk. Cloning shares every node.
#[derive(Debug, Clone, Default)]
pub struct Tree {
    /// `None` for an empty map.
    pub root: Option<Shared<Root>>,
}

impl Tree {
    /// The leaf numbered `leaf`, if any of its entries was ever set.
    #[must_use]
    pub fn leaf(&self, leaf: u32) -> Option<&Shared<Leaf>> {
        let [high, mid, low] = path(leaf);
        let root = self.root.as_ref()?;
        root.child[high].as_ref()?.child[mid].as_ref()?.child[low].as_ref()
    }

    /// The entry of `lcn`.
    #[must_use]
    pub fn get(&self, lcn: Lcn) -> Entry {
        let (leaf, place) = leaf_of(lcn);
        self.leaf(leaf)
            .map_or(Entry::default(), |leaf| leaf.entries[place])
    }

    /// The leaf numbered `leaf`, made this tree's alone: shared nodes on the way are copied.
    pub fn leaf_mut(&mut self, leaf: u32, counts: &Counts) -> &mut Leaf {
        let [high, mid, low] = path(leaf);
        let root = Shared::make_mut(self.root.get_or_insert_default());
        let mid_node = Shared::make_mut(root.child[high].get_or_insert_default());
        let low_node = Shared::make_mut(mid_node.child[mid].get_or_insert_default());
        let shared = low_node.child[low].get_or_insert_default();
        if Shared::get_mut(shared).is_none() {
            let copy = Shared::new(Leaf::clone(shared));
            counts.retain_leaf(&copy);
            let old = std::mem::replace(shared, copy);
            // The other holder may have let go between the two lines: then this was the last one,
            // and the old leaf's references go with it. The copy keeps every count above zero.
            if let Some(old) = Shared::into_inner(old) {
                counts.release_copied_leaf(&old);
            }
        }
        Shared::get_mut(shared).expect("nobody else can reach a leaf below unshared nodes")
    }

    /// Takes the leaf numbered `leaf` out, leaving `instead`.
    pub fn replace_leaf(
        &mut self,
        leaf: u32,
        instead: Option<Shared<Leaf>>,
    ) -> Option<Shared<Leaf>> {
        if instead.is_none() {
            self.leaf(leaf)?;
        }
        let [high, mid, low] = path(leaf);
        let root = Shared::make_mut(self.root.get_or_insert_default());
        let mid_node = Shared::make_mut(root.child[high].get_or_insert_default());
        let low_node = Shared::make_mut(mid_node.child[mid].get_or_insert_default());
        std::mem::replace(&mut low_node.child[low], instead)
    }

    /// Makes leaves from `first` on zeros, or nothing: `most` at most, but as many at once as a node
    /// has. Returns how many. Only at replay: what was there is forgotten, whatever it refers to.
    pub fn fill(&mut self, first: u32, most: u32, zeros: Option<&Zeros>) -> u32 {
        const LOW_LEAVES: u32 = 1 << 9;
        const MID_LEAVES: u32 = 1 << 18;
        let [high, mid, low] = path(first);
        let root = Shared::make_mut(self.root.get_or_insert_default());
        let mid_place = &mut root.child[high];
        if first.is_multiple_of(MID_LEAVES) && most >= MID_LEAVES {
            *mid_place = zeros.map(|zeros| Shared::clone(&zeros.mid));
            return MID_LEAVES;
        }
        if mid_place.is_none() && zeros.is_none() {
            return most.min(MID_LEAVES - first % MID_LEAVES);
        }
        let low_place = &mut Shared::make_mut(mid_place.get_or_insert_default()).child[mid];
        if first.is_multiple_of(LOW_LEAVES) && most >= LOW_LEAVES {
            *low_place = zeros.map(|zeros| Shared::clone(&zeros.low));
            return LOW_LEAVES;
        }
        if low_place.is_none() && zeros.is_none() {
            return most.min(LOW_LEAVES - first % LOW_LEAVES);
        }
        let low_node = Shared::make_mut(low_place.get_or_insert_default());
        low_node.child[low] = zeros.map(|zeros| Shared::clone(&zeros.leaf));
        1
    }

    /// Number of the first leaf at or after `from` that exists.
    #[must_use]
    pub fn next_leaf(&self, from: u32) -> Option<u32> {
        let root = self.root.as_ref()?;
        let mut leaf = from;
        loop {
            let [high, mid, low] = path(leaf);
            let Some(mid_node) = root.child.get(high)?.as_ref() else {
                leaf = ((leaf >> 18) + 1).checked_mul(1 << 18)?;
                continue;
            };
            let Some(low_node) = mid_node.child[mid].as_ref() else {
                leaf = ((leaf >> 9) + 1).checked_mul(1 << 9)?;
                continue;
            };
            match (low..FANOUT).find(|place| low_node.child[*place].is_some()) {
                Some(place) => {
                    let place = u32::try_from(place).expect("below FANOUT");
                    return Some((leaf & !511) | place);
                }
                None => leaf = ((leaf >> 9) + 1).checked_mul(1 << 9)?,
            }
        }
    }
}

/// Parts of a map that read as zeros, shared wherever they are: a record of 32 bytes can make all
/// of the largest disk zeros.
#[derive(Debug)]
pub struct Zeros {
    /// 64 clusters.
    pub leaf: Shared<Leaf>,
    low: Shared<Low>,
    mid: Shared<Mid>,
}

impl Zeros {
    /// One of each size.
    #[must_use]
    pub fn new() -> Self {
        let zero = Entry {
            zero: u16::MAX,
            ..Entry::default()
        };
        let leaf = Shared::new(Leaf {
            entries: [zero; LEAF_ENTRIES],
            dirty: 0,
        });
        let low = Shared::new(full_of(&leaf));
        let mid = Shared::new(full_of(&low));
        Self { leaf, low, mid }
    }
}

fn full_of<C>(child: &Shared<C>) -> Inner<C> {
    Inner {
        child: std::array::from_fn(|_| Some(Shared::clone(child))),
    }
}

/// A part of a map that one disk no longer refers to.
#[derive(Debug)]
pub enum Dropped {
    /// One reference from one entry.
    Cluster(u32),
    /// One reference to a leaf.
    Leaf(Shared<Leaf>),
    /// One reference to a level-1 node.
    Low(Shared<Low>),
    /// One reference to a level-2 node.
    Mid(Shared<Mid>),
    /// One reference to a root.
    Root(Shared<Root>),
}

impl Dropped {
    /// Takes one step: what was only referred to from here is pushed onto `stack` in parts, until
    /// only clusters are left. Of two that let go of a shared node at once, exactly one gets it.
    pub fn unravel(self, stack: &mut Vec<Dropped>) -> Option<u32> {
        match self {
            Dropped::Cluster(cluster) => return Some(cluster),
            Dropped::Leaf(leaf) => {
                if let Some(leaf) = Shared::into_inner(leaf) {
                    let clusters = leaf.entries.iter().flat_map(Entry::clusters);
                    stack.extend(clusters.filter(|c| *c != 0).map(Dropped::Cluster));
                }
            }
            Dropped::Low(node) => push_children(node, Dropped::Leaf, stack),
            Dropped::Mid(node) => push_children(node, Dropped::Low, stack),
            Dropped::Root(node) => push_children(node, Dropped::Mid, stack),
        }
        None
    }
}

fn push_children<C>(
    node: Shared<Inner<C>>,
    wrap: fn(Shared<C>) -> Dropped,
    stack: &mut Vec<Dropped>,
) {
    if let Some(node) = Shared::into_inner(node) {
        stack.extend(node.child.into_iter().flatten().map(wrap));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(own: u32) -> Entry {
        Entry {
            own,
            alloc: 1,
            birth: 1,
            ..Entry::default()
        }
    }

    fn set(tree: &mut Tree, counts: &Counts, lcn: u32, own: u32) {
        let (leaf, place) = leaf_of(Lcn(lcn));
        let old = std::mem::replace(&mut tree.leaf_mut(leaf, counts).entries[place], entry(own));
        counts.retain(own);
        if old.own != 0 {
            counts.release(old.own);
        }
    }

    #[test]
    fn a_clone_keeps_what_the_original_changes() {
        let counts = Counts::new();
        let mut tree = Tree::default();
        set(&mut tree, &counts, 70, 5);
        let fork = tree.clone();
        assert_eq!(counts.get(5), 1, "one shared leaf");
        set(&mut tree, &counts, 71, 6);
        assert_eq!(counts.get(5), 2, "two leaves now");
        assert_eq!(fork.get(Lcn(71)), Entry::default());
        assert_eq!(tree.get(Lcn(70)), fork.get(Lcn(70)));
    }

    #[test]
    fn unravelling_gives_back_each_reference_once() {
        let counts = Counts::new();
        let mut tree = Tree::default();
        for n in 0..200 {
            set(&mut tree, &counts, n * 7000, n + 1);
        }
        let fork = tree.clone();
        // In the leaf of the first: that leaf is copied, and refers to its cluster twice now.
        set(&mut tree, &counts, 3, 1000);
        let mut released = Vec::new();
        for tree in [tree, fork] {
            let mut stack = vec![Dropped::Root(tree.root.expect("not empty"))];
            while let Some(dropped) = stack.pop() {
                released.extend(dropped.unravel(&mut stack));
            }
        }
        for cluster in &released {
            counts.release(*cluster);
        }
        assert_eq!(counts.get(1), 0);
        assert_eq!(counts.get(1000), 0);
        assert_eq!(released.len(), 202);
    }

    #[test]
    fn next_leaf_finds_each_in_order() {
        let counts = Counts::new();
        let mut tree = Tree::default();
        let leaves = [0, 1, 511, 512, 1 << 18, (1 << 26) - 1];
        for leaf in leaves {
            tree.leaf_mut(leaf, &counts);
        }
        let mut found = Vec::new();
        let mut from = Some(0);
        while let Some(leaf) = from.and_then(|from| tree.next_leaf(from)) {
            found.push(leaf);
            from = leaf.checked_add(1);
        }
        assert_eq!(found, leaves);
    }
}
