//! A set of clusters as a bitmap with a summary, for finding runs without walking all of it.

use crate::format::units::index;
use std::ops::Range;

/// A set of cluster numbers.
#[derive(Debug, Default)]
pub struct Bitmap {
    words: Vec<u64>,
    /// A bit for each word that is not zero.
    summary: Vec<u64>,
    len: u32,
}

impl Bitmap {
    /// Members.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Whether `n` is a member.
    #[must_use]
    pub fn contains(&self, n: u32) -> bool {
        let word = self.words.get(index(n / 64)).copied().unwrap_or(0);
        word >> (n % 64) & 1 == 1
    }

    /// Adds `range`, whose members must all be absent.
    ///
    /// # Panics
    /// One is there already: a cluster would be free twice.
    pub fn insert(&mut self, range: Range<u32>) {
        let words = index(range.end).div_ceil(64);
        if words > self.words.len() {
            self.words.resize(words, 0);
            self.summary.resize(words.div_ceil(64), 0);
        }
        for n in range {
            let (word, bit) = (index(n / 64), 1_u64 << (n % 64));
            assert!(self.words[word] & bit == 0, "cluster {n} is free already");
            self.words[word] |= bit;
            self.summary[word / 64] |= 1 << (word % 64);
            self.len += 1;
        }
    }

    /// Takes `range`, whose members must all be present.
    ///
    /// # Panics
    /// One is absent.
    pub fn remove(&mut self, range: Range<u32>) {
        for n in range {
            let (word, bit) = (index(n / 64), 1_u64 << (n % 64));
            assert!(self.contains(n), "cluster {n} is not free");
            self.words[word] &= !bit;
            if self.words[word] == 0 {
                self.summary[word / 64] &= !(1 << (word % 64));
            }
            self.len -= 1;
        }
    }

    /// The first member at or after `from`.
    #[must_use]
    pub fn next(&self, from: u32) -> Option<u32> {
        let mut word = index(from / 64);
        let mut bits = self.words.get(word)? & (u64::MAX << (from % 64));
        loop {
            if bits != 0 {
                let word = u32::try_from(word).expect("clusters are numbered in 32 bits");
                return Some(word * 64 + bits.trailing_zeros());
            }
            word = self.next_word(word + 1)?;
            bits = self.words[word];
        }
    }

    /// The first word at or after `from` that is not zero.
    fn next_word(&self, from: usize) -> Option<usize> {
        let mut at = from / 64;
        let mut bits = self.summary.get(at)? & (u64::MAX << (from % 64));
        while bits == 0 {
            at += 1;
            bits = *self.summary.get(at)?;
        }
        Some(at * 64 + index(bits.trailing_zeros()))
    }

    /// Members from `start` on without a gap, `most` at most.
    #[must_use]
    pub fn run_from(&self, start: u32, most: u32) -> Range<u32> {
        let end = (start..start.saturating_add(most)).find(|n| !self.contains(*n));
        start..end.unwrap_or(start.saturating_add(most))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn next_skips_gaps_of_any_size() {
        let mut set = Bitmap::default();
        for n in [3, 64, 4096, 1_000_000] {
            set.insert(n..n + 2);
        }
        let mut found = Vec::new();
        let mut from = 0;
        while let Some(n) = set.next(from) {
            found.push(n);
            from = n + 1;
        }
        assert_eq!(found, [3, 4, 64, 65, 4096, 4097, 1_000_000, 1_000_001]);
        assert_eq!(set.run_from(64, 16), 64..66);
        set.remove(64..66);
        assert_eq!(set.next(5), Some(4096));
        assert_eq!(set.len(), 6);
    }
}
