//! What the maps of disks have in common, for dumps: a part that two of them share is described once,
//! and the second disk's is said to be the same. A dump of a thousand forks is hardly longer than one
//! of their origin, and what is restored from it shares what they shared, inner nodes too.

use super::map::{Inner, Leaf, Tree};
use crate::format::image::{FANOUT, LEVELS};
use crate::format::units::index;
use crate::sync::Shared;
use std::collections::HashMap;
use std::collections::hash_map::Entry;

/// A part of a map, by where it is: level 0 has the leaves, [`LEVELS`] the root, and nodes are numbered
/// from the start of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub level: u8,
    pub number: u32,
}

/// What is found on a walk.
pub(super) enum Found<'a> {
    /// A leaf, and its number.
    Leaf(u32, &'a Leaf),
    /// What is there is that of the disk walked as number `of`, at the same place.
    Same { place: Place, of: usize },
}

/// Shared nodes that were met: by address, and number at their level, the disk they were met in.
#[derive(Debug, Default)]
pub(super) struct Known(HashMap<(usize, u32), usize>);

impl Known {
    /// Visits what `tree`, the map of disk number `disk`, has that no disk before had at that place.
    pub(super) fn walk(&mut self, tree: &Tree, disk: usize, visit: &mut dyn FnMut(Found<'_>)) {
        if let Some(root) = &tree.root {
            walk(root, 0, self, disk, visit);
        }
    }
}

trait Node {
    const LEVEL: u8;

    fn below(&self, number: u32, known: &mut Known, disk: usize, visit: &mut dyn FnMut(Found<'_>));
}

fn walk<N: Node>(
    node: &Shared<N>,
    number: u32,
    known: &mut Known,
    disk: usize,
    visit: &mut dyn FnMut(Found<'_>),
) {
    if Shared::strong_count(node) > 1 {
        match known.0.entry((Shared::as_ptr(node).addr(), number)) {
            Entry::Vacant(place) => _ = place.insert(disk),
            Entry::Occupied(met) => {
                let (level, of) = (N::LEVEL, *met.get());
                let place = Place { level, number };
                visit(Found::Same { place, of });
                return;
            }
        }
    }
    node.below(number, known, disk, visit);
}

impl Node for Leaf {
    const LEVEL: u8 = 0;

    fn below(&self, number: u32, _: &mut Known, _: usize, visit: &mut dyn FnMut(Found<'_>)) {
        visit(Found::Leaf(number, self));
    }
}

impl<C: Node> Node for Inner<C> {
    const LEVEL: u8 = C::LEVEL + 1;

    fn below(&self, number: u32, known: &mut Known, disk: usize, visit: &mut dyn FnMut(Found<'_>)) {
        for (place, child) in (0_u32..).zip(&self.child) {
            if let Some(child) = child {
                walk(child, (number << 9) | place, known, disk, visit);
            }
        }
    }
}

/// Makes what `to` has at `place` that of `from`. `None`, and nothing is changed, if there is no such
/// place or `from` has nothing there.
#[must_use]
pub(super) fn share(from: &Tree, to: &mut Tree, place: Place) -> Option<()> {
    let Place { level, number } = place;
    let at = index(number);
    let root = from.root.as_ref()?;
    match level {
        LEVELS if number == 0 => to.root = Some(Shared::clone(root)),
        2 => {
            let mid = root.child.get(at)?.as_ref()?;
            let mid = Some(Shared::clone(mid));
            Shared::make_mut(to.root.get_or_insert_default()).child[at] = mid;
        }
        1 => {
            let (high, mid) = (at / FANOUT, at % FANOUT);
            let low = root.child.get(high)?.as_ref()?.child[mid].as_ref()?;
            let low = Some(Shared::clone(low));
            let root = Shared::make_mut(to.root.get_or_insert_default());
            let node = Shared::make_mut(root.child[high].get_or_insert_default());
            node.child[mid] = low;
        }
        0 if at / FANOUT / FANOUT < FANOUT => {
            let leaf = Shared::clone(from.leaf(number)?);
            to.replace_leaf(number, Some(leaf));
        }
        _ => return None,
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::journal::Entry as MapEntry;
    use crate::pool::counts::Counts;

    /// A tree with the leaves `numbers`.
    fn tree(numbers: &[u32]) -> Tree {
        let mut tree = Tree::default();
        for number in numbers {
            let leaf = tree.leaf_mut(*number, &Counts::none());
            leaf.entries[0] = MapEntry {
                own: number + 1,
                ..MapEntry::default()
            };
        }
        tree
    }

    /// Walks `trees`, and makes them anew from what was found, as one who reads a dump does.
    fn again(trees: &[Tree]) -> (Vec<Tree>, usize) {
        let mut known = Known::default();
        let (mut made, mut lines) = (Vec::<Tree>::new(), 0);
        for (disk, tree) in trees.iter().enumerate() {
            let mut new = Tree::default();
            known.walk(tree, disk, &mut |found| {
                lines += 1;
                match found {
                    Found::Leaf(number, leaf) => {
                        let copy = new.leaf_mut(number, &Counts::none());
                        copy.entries = leaf.entries;
                    }
                    Found::Same { place, of } => {
                        share(&made[of], &mut new, place).expect("it was met there");
                    }
                }
            });
            made.push(new);
        }
        (made, lines)
    }

    #[test]
    fn what_was_shared_is_shared_again_and_said_once() {
        let first = tree(&[0, 1, 600, 1 << 18, 5 << 18]);
        let mut trees = vec![first.clone(), first.clone()];
        // Differs in one leaf, one row of leaves, and one quarter.
        for number in [1, 601, (5 << 18) + 1] {
            let mut other = trees[1].clone();
            other.leaf_mut(number, &Counts::none()).entries[3].own = 77;
            trees.push(other);
        }
        trees.push(Tree::default());
        let (made, lines) = again(&trees);
        // Five leaves, all of them again, and for each other tree one leaf and what is beside it.
        let below = [1 + 1 + 1 + 2, 1 + 1 + 1 + 2, 1 + 1 + 2];
        assert_eq!(lines, 5 + 1 + below.iter().sum::<usize>());
        for (tree, made) in trees.iter().zip(&made) {
            let mut next = Some(0);
            while let Some(number) = next.and_then(|from| tree.next_leaf(from)) {
                let [leaf, again] = [tree, made].map(|tree| tree.leaf(number).expect("there"));
                assert_eq!(leaf.entries, again.entries, "leaf {number}");
                assert_eq!(
                    Shared::strong_count(leaf),
                    Shared::strong_count(again),
                    "leaf {number}"
                );
                next = number.checked_add(1);
            }
        }
    }

    #[test]
    fn places_that_are_not_there_change_nothing() {
        let from = tree(&[5]);
        let mut to = Tree::default();
        for (level, number) in [
            (3, 1),
            (2, 1),
            (2, 512),
            (2, u32::MAX),
            (1, 1),
            (1, u32::MAX),
            (0, 4),
            (0, u32::MAX),
            (4, 0),
            (255, 0),
        ] {
            let place = Place { level, number };
            assert_eq!(share(&from, &mut to, place), None, "{place:?}");
            assert!(to.root.is_none(), "{place:?}");
        }
        share(
            &from,
            &mut to,
            Place {
                level: 0,
                number: 5,
            },
        )
        .expect("it is there");
        assert_eq!(to.get(crate::format::units::Lcn(5 * 64)).own, 6);
    }
}
