//! Clusters of a disk that requests are busy with.

use crate::format::units::SUBS;

/// What requests are doing to a cluster of the disk besides reading and overwriting in place.
#[derive(Debug, Clone, Copy, Default)]
pub struct Busy {
    /// Writes under way to sub-clusters not yet allocated.
    pub fills: u32,
    /// One request writes all of it (a copy, or a first write with zeros around it): nothing else
    /// may write to it or change its entry.
    pub is_exclusive: bool,
    /// Sub-clusters that are charged to the disk's account, and do not count yet by the entry.
    pub(super) charged: u16,
    /// Discards that took something away since the oldest of these writes began.
    pub discards: u8,
    /// By sub-cluster, the last of them that took it away.
    discarded: [u8; SUBS as usize],
}

impl Busy {
    /// A discard took away the sub-clusters `mask`. It comes after all writes that are under way:
    /// with the end of one of them, what another left there would be back.
    pub fn discard(&mut self, mask: u16) {
        assert!(self.can_discard(), "the discard waits");
        self.discards += 1;
        for (sub, last) in self.discarded.iter_mut().enumerate() {
            if mask >> sub & 1 == 1 {
                *last = self.discards;
            }
        }
    }

    /// Whether one more discard can be told from the others.
    #[must_use]
    pub fn can_discard(&self) -> bool {
        self.discards < u8::MAX
    }

    /// The sub-clusters that were taken away from a write that began after `began` discards.
    #[must_use]
    pub fn discarded_since(&self, began: u8) -> u16 {
        let is_later = |sub: &usize| self.discarded[*sub] > began;
        (0..self.discarded.len())
            .filter(is_later)
            .fold(0, |mask, sub| mask | 1 << sub)
    }
}
