//! Deriving from what was loaded what is never stored: reference counts and free space. Whatever the
//! maps say that cannot be is found on the way.
//!
//! Neighbours in a map need not be neighbours in the pool, so what takes time is waiting for memory.
//! The loop that goes to a cluster's place does little else, and what can be done from end to end is
//! done so.

use super::by_cluster::ByCluster;
use super::counts::Counts;
use super::error::PoolError;
use super::load::Loaded;
use super::map::Leaf;
use super::space::Space;
use super::walk::Seen;
use crate::format::journal::Entry;
use std::ops::Range;

/// An entry that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{disk}`, cluster {lcn}: {what}")]
pub struct EntryFault {
    /// The disk or snapshot.
    pub disk: String,
    /// Its cluster, the first of those below a node.
    pub lcn: u32,
    /// What is wrong.
    pub what: String,
    /// What helps.
    pub mend: Mend,
}

/// What is to be done about an entry that cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mend {
    /// Nothing can be done.
    Nothing,
    /// Zeros take its place.
    Zeros,
    /// It is taken away from disks that end before it.
    Cut,
    /// Nobody takes the cluster for its alone: it is copied before it is written again.
    Share,
}

/// Owner of the clusters of the checkpoint image. No cluster of a disk has the last number.
const IMAGE: u64 = u64::MAX;
const BEYOND: &str = "beyond the end of the disk";
/// Most faults that are listed, and mended.
const FAULTS_MAX: usize = 16384;
/// I4 is broken.
const SHARED: &str = "it would be written in place although it may be shared";

/// Clusters of a pool for which it does not matter how many of them are used.
const SMALL_COUNT: u32 = 1 << 25;

/// Whether clusters are used so densely that huge pages pay: places that are far from one another
/// take some of the image each.
fn is_dense(loaded: &Loaded) -> bool {
    let count = loaded.superblock.cluster_count;
    let image_len = loaded.superblock.image.map_or(0, |image| image.len);
    count <= SMALL_COUNT || image_len >= u64::from(count)
}

/// Counts the references, checks every entry, I1 and I4, and declares the rest free. Empty if all
/// is well.
///
/// # Errors
/// [`PoolError::NoMemory`].
pub(super) fn derive(loaded: &Loaded, space: &mut Space) -> Result<Vec<EntryFault>, PoolError> {
    let size = loaded.superblock.cluster_size;
    let count = loaded.superblock.cluster_count;
    let first = size
        .count(loaded.superblock.metadata_end())
        .unwrap_or(u32::MAX);
    let mut references = References {
        clusters: first..count,
        generation: loaded.replay.generation,
        used: ByCluster::new(count, is_dense(loaded))?,
        alone: ByCluster::new(count.div_ceil(64), is_dense(loaded))?,
        counts: &mut space.counts,
        faults: Vec::new(),
        no_memory: Ok(()),
    };
    for cluster in loaded.image_clusters.iter().cloned().flatten() {
        references.add_image(cluster);
    }
    let mut seen = Seen::default();
    for item in loaded.catalogue.iter() {
        let map = item.volume.map.read();
        let disk = Owner {
            name: &item.row.name,
            family: item.row.family.0,
            end: size.count(map.size).unwrap_or(u32::MAX),
            last_fork: map.last_fork.0,
        };
        seen.set_disk(disk.family, disk.last_fork);
        let clashes = seen.clashes().len();
        seen.walk(&map.tree, &mut |number, is_shared, leaf| {
            references.add_leaf(&disk, number, is_shared, leaf);
        });
        for clash in &seen.clashes()[clashes..] {
            let (what, mend) = match clash.is_elsewhere {
                true => ("a map node belongs to another place too", Mend::Nothing),
                false => (SHARED, Mend::Share),
            };
            references.fault(&disk, clash.lcn, what, mend);
        }
    }
    let (used, faults) = references.finish()?;
    add_free(first, &used, space);
    Ok(faults)
}

/// The disk whose map is looked at.
struct Owner<'a> {
    name: &'a str,
    family: u32,
    /// Its size, clusters.
    end: u32,
    last_fork: u32,
}

impl Owner<'_> {
    /// Whether the disk takes the entry's own cluster for its alone, as `Map::is_own`.
    fn is_alone(&self, entry: &Entry) -> bool {
        entry.own != 0 && entry.birth > self.last_fork
    }

    /// What is wrong with an entry that is possible in itself.
    fn fault(
        &self,
        lcn: u32,
        entry: &Entry,
        is_shared: bool,
        generation: u32,
    ) -> Option<&'static str> {
        if entry.clusters() != [0, 0] && lcn >= self.end {
            Some(BEYOND)
        } else if entry.birth > generation || (is_shared && self.is_alone(entry)) {
            // Births are of generations that have begun.
            Some(SHARED)
        } else {
            None
        }
    }
}

/// Who uses each cluster, and how often.
struct References<'a> {
    /// Where data may be.
    clusters: Range<u32>,
    /// The pool's generation.
    generation: u32,
    /// By cluster: 0, or its owner.
    used: ByCluster<u64>,
    /// By cluster, a bit each: a disk takes it for its alone (I4).
    alone: ByCluster<u64>,
    /// References after the first to each cluster; [`References::finish`] adds the first ones.
    counts: &'a mut Counts,
    faults: Vec<EntryFault>,
    /// The first time there was not enough memory: all that was found is void.
    no_memory: Result<(), PoolError>,
}

impl References<'_> {
    fn fault(&mut self, disk: &Owner<'_>, lcn: u32, what: &str, mend: Mend) {
        let (what, mend) = match self.faults.len() {
            0..FAULTS_MAX => (what, mend),
            FAULTS_MAX => (
                "this and more: too many faults to be repaired",
                Mend::Nothing,
            ),
            _ => return,
        };
        self.faults.push(EntryFault {
            disk: disk.name.to_owned(),
            lcn,
            what: what.to_owned(),
            mend,
        });
    }

    /// A fault of one entry.
    fn entry_fault(&mut self, disk: &Owner<'_>, lcn: u32, what: &str) {
        let mend = match what {
            SHARED => Mend::Share,
            BEYOND => Mend::Cut,
            _ => Mend::Zeros,
        };
        self.fault(disk, lcn, what, mend);
    }

    fn add_image(&mut self, cluster: u32) {
        match self.used.make(cluster) {
            Err(no_memory) => self.no_memory = Err(no_memory),
            Ok(Some(owner)) if *owner == 0 && cluster >= self.clusters.start => *owner = IMAGE,
            Ok(_) => self.faults.push(EntryFault {
                disk: "checkpoint image".to_owned(),
                lcn: cluster,
                what: "this cluster of the pool cannot belong to it".to_owned(),
                mend: Mend::Nothing,
            }),
        }
    }

    /// Adds what the entries of leaf `number` refer to.
    fn add_leaf(&mut self, disk: &Owner<'_>, number: u32, is_shared: bool, leaf: &Leaf) {
        let Range { start, end } = self.clusters;
        let generation = self.generation;
        let first = number * 64;
        // A bit each: entries that refer to nothing that could be counted, and odd ones.
        let (mut bad, mut odd) = (0_u64, 0_u64);
        for (place, entry) in (0_u32..).zip(&leaf.entries) {
            let lcn = first + place;
            bad |= u64::from(entry.fault(start, end).is_some()) << place;
            odd |= u64::from(disk.fault(lcn, entry, is_shared, generation).is_some()) << place;
        }
        self.fetch(leaf);
        // Packed so that it is never 0: disk ids begin at 1.
        let family = u64::from(disk.family) << 32;
        for (place, entry) in (0_u32..).zip(&leaf.entries) {
            let lcn = first + place;
            if bad >> place & 1 == 1 {
                self.entry_fault(disk, lcn, entry.fault(start, end).unwrap_or_default());
            } else if let Err(what) = self.add_entry(entry, family | u64::from(lcn), disk) {
                self.entry_fault(disk, lcn, &what);
            } else if odd >> place & 1 == 1 {
                let what = disk.fault(lcn, entry, is_shared, generation);
                self.entry_fault(disk, lcn, what.unwrap_or_default());
            }
        }
    }

    /// Looks at the place of every entry at once, so that the processor fetches them side by side
    /// and not one after the other.
    fn fetch(&self, leaf: &Leaf) {
        let place = |entry: &Entry| self.used.get(entry.own);
        let all = leaf.entries.iter().fold(0, |all, entry| all | place(entry));
        std::hint::black_box(all);
    }

    /// I1: one (family, lcn) for each cluster, and I4: one reference to a cluster that a disk takes
    /// for its alone. `Err` says what is wrong.
    fn add_entry(&mut self, entry: &Entry, owner: u64, disk: &Owner<'_>) -> Result<(), String> {
        for cluster in entry.clusters() {
            if cluster == 0 {
                continue;
            }
            let is_alone = cluster == entry.own && disk.is_alone(entry);
            let word = cluster / 64;
            if self.used.get_mut(cluster).is_none() || self.alone.get_mut(word).is_none() {
                let made = self.used.make(cluster).and(self.alone.make(word));
                if let Err(no_memory) = made {
                    self.no_memory = Err(no_memory);
                    return Ok(());
                }
            }
            let places = (self.used.get_mut(cluster), self.alone.get_mut(word));
            let (Some(known), Some(alone)) = places else {
                panic!("cluster {cluster}: its entry was checked");
            };
            let bit = 1_u64 << (cluster % 64);
            if *known == 0 {
                *known = owner;
                // Most clusters are: a bit is near at hand where a count would be waited for.
                *alone |= if is_alone { bit } else { 0 };
            } else if *known == owner {
                self.counts.retain_alone(cluster);
                if is_alone || *alone & bit != 0 {
                    return Err(SHARED.to_owned());
                }
            } else {
                let elsewhere = match *known {
                    IMAGE => "the checkpoint image".to_owned(),
                    known => {
                        let (family, lcn) = (known >> 32, known & u64::from(u32::MAX));
                        format!("cluster {lcn} of a disk of the family of disk {family}")
                    }
                };
                return Err(format!(
                    "cluster {cluster} of the pool is used elsewhere too, as {elsewhere}"
                ));
            }
        }
        Ok(())
    }

    /// The owners by cluster, and what is wrong.
    fn finish(self) -> Result<(ByCluster<u64>, Vec<EntryFault>), PoolError> {
        self.no_memory?;
        for (clusters, owners) in self.used.pieces() {
            for (cluster, owner) in clusters.zip(owners) {
                if *owner != 0 && *owner != IMAGE {
                    self.counts.retain_alone(cluster);
                }
            }
        }
        Ok((self.used, self.faults))
    }
}

/// Declares the clusters from `first` on free that `used` says are not used, run by run.
fn add_free(first: u32, used: &ByCluster<u64>, space: &Space) {
    for (clusters, owners) in used.pieces() {
        let from = clusters.start.max(first).min(clusters.end);
        if owners.is_empty() && from < clusters.end {
            space.add_clean(from..clusters.end);
            continue;
        }
        let skipped = usize::try_from(from - clusters.start).expect("a piece is short");
        let mut free_from = from;
        let mut rest = owners.get(skipped..).unwrap_or_default();
        while !rest.is_empty() {
            let free = run_len(false, rest);
            let taken = run_len(true, &rest[free..]);
            let clusters = |n: usize| u32::try_from(n).expect("a piece is short");
            if free > 0 {
                space.add_clean(free_from..free_from + clusters(free));
            }
            free_from += clusters(free + taken);
            rest = &rest[free + taken..];
        }
    }
}

/// How many of `owners` are used, or not, before the first that is otherwise.
fn run_len(is_used: bool, owners: &[u64]) -> usize {
    let other = owners.iter().position(|owner| (*owner != 0) != is_used);
    other.unwrap_or(owners.len())
}
