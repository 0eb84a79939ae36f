//! Reference counts: who finds itself alone with a cluster is, and no count is lost or left over.

use super::{Place, explore, spawn};
use tidepool::format::catalogue::{Row, RowKind};
use tidepool::format::journal::Entry;
use tidepool::format::units::{DiskId, Generation, Lcn};
use tidepool::pool::counts::Counts;
use tidepool::pool::map::{Dropped, Tree, leaf_of};
use tidepool::pool::space::Space;
use tidepool::pool::volume::Volume;
use tidepool::sync::Arc;

const CLUSTERS: [u32; 2] = [5, 6];

/// A map that names the two clusters, counted.
fn tree(counts: &Counts) -> Tree {
    let mut tree = Tree::default();
    for (place, own) in CLUSTERS.into_iter().enumerate() {
        tree.leaf_mut(0, counts).entries[place] = Entry {
            own,
            alloc: 1,
            birth: 1,
            ..Entry::default()
        };
        counts.retain(own);
    }
    tree
}

/// Lets go of all that `tree` names, as the pool does.
fn drop_tree(tree: Tree, counts: &Counts) {
    let mut stack: Vec<Dropped> = tree.root.map(Dropped::Root).into_iter().collect();
    while let Some(dropped) = stack.pop() {
        if let Some(cluster) = dropped.unravel(&mut stack) {
            counts.release(cluster);
        }
    }
}

/// Of two disks that share a leaf, one changes its map (and copies the leaf) while the other is
/// deleted. Each cluster has one reference in the end, whoever came first.
///
/// Fails if `Tree::leaf_mut` does not release what the old leaf held when it turns out to be its last
/// holder.
#[test]
fn a_copied_leaf_and_its_other_holder() {
    explore("counts/copied", 8, || {
        let counts = Arc::new(Counts::new());
        let mut kept = tree(&counts);
        let deleted = kept.clone();
        let deleter = {
            let counts = Arc::clone(&counts);
            spawn(move || drop_tree(deleted, &counts))
        };
        kept.leaf_mut(0, &counts).dirty = 1;
        deleter.join().expect("no panic");
        for cluster in CLUSTERS {
            assert_eq!(counts.get(cluster), 1, "cluster {cluster}");
        }
        drop_tree(kept, &counts);
        for cluster in CLUSTERS {
            assert_eq!(counts.get(cluster), 0, "cluster {cluster}");
        }
    });
}

/// Two disks that share a leaf change their maps at once, then both are deleted.
///
/// Fails as the test above.
#[test]
fn two_holders_copy_a_leaf() {
    explore("counts/both", 6, || {
        let counts = Arc::new(Counts::new());
        let mut one = tree(&counts);
        let mut other = one.clone();
        let copier = {
            let counts = Arc::clone(&counts);
            spawn(move || {
                other.leaf_mut(0, &counts).dirty = 1;
                other
            })
        };
        one.leaf_mut(0, &counts).dirty = 1;
        let other = copier.join().expect("no panic");
        for cluster in CLUSTERS {
            assert_eq!(counts.get(cluster), 2, "cluster {cluster}");
        }
        drop_tree(one, &counts);
        drop_tree(other, &counts);
        for cluster in CLUSTERS {
            assert_eq!(counts.get(cluster), 0, "cluster {cluster}");
        }
    });
}

fn volume(tree: Tree) -> Volume {
    let row = Row {
        id: DiskId(1),
        name: "d".to_owned(),
        kind: RowKind::Disk,
        parent: None,
        family: DiskId(1),
        size: 1 << 20,
        created: 0,
        birth_generation: Generation(0),
        base: None,
        base_len: 0,
        limit: None,
        reserve: None,
        is_ephemeral: false,
    };
    let now = Generation(1);
    Volume::new(&row, tree, now, now)
}

/// A disk claims a cluster to write it in place while the fork it shares the cluster with reads it a
/// last time and lets go. The write is never at once with the read (I4, R5).
///
/// Fails if `Counts::get` does not acquire, or `Counts::release` does not release: the claim is then
/// not ordered after the read.
#[test]
fn a_claim_against_a_release() {
    explore("counts/claim", 8, || {
        let shared = Arc::new((Space::new(), Place::new()));
        let mine = tree(&shared.0.counts);
        let forked = mine.clone();
        let (leaf, place) = leaf_of(Lcn(0));
        let volume = volume(mine);
        let reader = {
            let shared = Arc::clone(&shared);
            spawn(move || {
                let (space, data) = &*shared;
                assert_eq!(forked.leaf(leaf).expect("there").entries[place].own, 5);
                data.read();
                drop_tree(forked, &space.counts);
            })
        };
        let (space, data) = &*shared;
        let claimed = volume.map.write().claim(space, Lcn(0), Generation(2));
        if claimed {
            data.write();
        }
        reader.join().expect("no panic");
        let references = space.counts.get(5);
        assert_eq!(references, 1, "claimed: {claimed}");
        let mut map = volume.map.write();
        assert!(claimed || map.claim(space, Lcn(0), Generation(2)));
        assert!(map.is_own(&map.get(Lcn(0))));
    });
}
