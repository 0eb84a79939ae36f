//! A set of clusters as a bitmap in chunks. A chunk that is empty or full takes no memory, and a word
//! of time: what a pool's free space costs follows what is mapped, not what the pool could hold.

use crate::format::units::index;
use std::ops::Range;

/// Clusters in a chunk.
const CHUNK: u32 = 1 << 15;
/// Words in a chunk.
const WORDS: usize = 512;
const WORD: u32 = u64::BITS;

const _: () = assert!(WORDS * 64 == 1 << 15, "a bit for each cluster of a chunk");

/// A set of cluster numbers.
#[derive(Debug, Default)]
pub struct Bitmap {
    chunks: Vec<Chunk>,
    /// A bit for each chunk that is not empty.
    occupied: Vec<u64>,
    len: u32,
    /// Words that a chunk gave up last: the next one that needs some has them at once.
    spare: Option<Box<Words>>,
}

#[derive(Debug, Default)]
enum Chunk {
    #[default]
    Empty,
    Full,
    Mixed(Box<Words>),
}

/// The members of a chunk that has some, and not all there can be.
#[derive(Debug, Clone)]
struct Words {
    bits: [u64; WORDS],
    /// A bit for each word that is not zero.
    summary: [u64; WORDS / 64],
    len: u32,
}

impl Words {
    fn fill(&mut self, is_full: bool) {
        let word = if is_full { u64::MAX } else { 0 };
        self.bits.fill(word);
        self.summary.fill(word);
        self.len = if is_full { CHUNK } else { 0 };
    }

    fn contains(&self, at: u32) -> bool {
        self.bits[index(at / WORD)] >> (at % WORD) & 1 == 1
    }

    /// Changes `range`, which must be all absent or, to be taken away, all present. `Err` has the
    /// first that is not.
    fn change(&mut self, range: Range<u32>, is_added: bool) -> Result<(), u32> {
        let mut at = range.start;
        while at < range.end {
            let word = index(at / WORD);
            let end = range.end.min((at / WORD + 1) * WORD);
            let mask = u64::MAX >> (WORD - (end - at)) << (at % WORD);
            let now = self.bits[word];
            let wrong = mask & if is_added { now } else { !now };
            if wrong != 0 {
                return Err(at / WORD * WORD + wrong.trailing_zeros());
            }
            self.bits[word] = now ^ mask;
            let bit = 1 << (word % 64);
            if self.bits[word] == 0 {
                self.summary[word / 64] &= !bit;
            } else {
                self.summary[word / 64] |= bit;
            }
            at = end;
        }
        let changed = range.end - range.start;
        self.len = if is_added {
            self.len + changed
        } else {
            self.len - changed
        };
        Ok(())
    }

    /// The first member at or after `from`.
    fn next(&self, from: u32) -> Option<u32> {
        let word = index(from / WORD);
        let bits = self.bits[word] & (u64::MAX << (from % WORD));
        if bits != 0 {
            return Some(from / WORD * WORD + bits.trailing_zeros());
        }
        let word = next_bit(&self.summary, word + 1)?;
        let first = u32::try_from(word).expect("below WORDS") * WORD;
        Some(first + self.bits[word].trailing_zeros())
    }
}

/// The first bit of `words` that is set, at or after `from`.
fn next_bit(words: &[u64], from: usize) -> Option<usize> {
    let mut at = from / 64;
    let mut bits = words.get(at)? & (u64::MAX << (from % 64));
    while bits == 0 {
        at += 1;
        bits = *words.get(at)?;
    }
    Some(at * 64 + index(bits.trailing_zeros()))
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
        match self.chunks.get(index(n / CHUNK)) {
            None | Some(Chunk::Empty) => false,
            Some(Chunk::Full) => true,
            Some(Chunk::Mixed(words)) => words.contains(n % CHUNK),
        }
    }

    /// Adds `range`, whose members must all be absent.
    ///
    /// # Panics
    /// One is there already: a cluster would be free twice.
    pub fn insert(&mut self, range: Range<u32>) {
        let chunks = index(range.end.div_ceil(CHUNK));
        if chunks > self.chunks.len() {
            self.chunks.resize_with(chunks, Chunk::default);
            self.occupied.resize(chunks.div_ceil(64), 0);
        }
        self.len += range.end.saturating_sub(range.start);
        if let Err(n) = self.change(range, true) {
            panic!("cluster {n} is free already");
        }
    }

    /// Takes `range`, whose members must all be present.
    ///
    /// # Panics
    /// One is absent.
    pub fn remove(&mut self, range: Range<u32>) {
        let len = range.end.saturating_sub(range.start);
        if let Err(n) = self.change(range, false) {
            panic!("cluster {n} is not free");
        }
        self.len -= len;
    }

    /// Chunk by chunk. `Err` has the first cluster that is not as it should be.
    fn change(&mut self, range: Range<u32>, is_added: bool) -> Result<(), u32> {
        let mut at = range.start;
        while at < range.end {
            let number = at / CHUNK;
            let first = number * CHUNK;
            // The last chunk there can be ends at the last number.
            let end = range.end.min(first.saturating_add(CHUNK));
            let chunk = self.chunks.get_mut(index(number)).ok_or(at)?;
            if let Err(n) = chunk.change(at - first..end - first, is_added, &mut self.spare) {
                return Err(first + n);
            }
            let bit = 1 << (number % 64);
            let occupied = &mut self.occupied[index(number / 64)];
            match chunk {
                Chunk::Empty => *occupied &= !bit,
                Chunk::Full | Chunk::Mixed(_) => *occupied |= bit,
            }
            at = end;
        }
        Ok(())
    }

    /// The first member at or after `from`.
    #[must_use]
    pub fn next(&self, from: u32) -> Option<u32> {
        let mut number = index(from / CHUNK);
        let mut from = from % CHUNK;
        loop {
            let found = match self.chunks.get(number)? {
                Chunk::Empty => None,
                Chunk::Full => Some(from),
                Chunk::Mixed(words) => words.next(from),
            };
            if let Some(found) = found {
                let number = u32::try_from(number).expect("clusters are numbered in 32 bits");
                return Some(number * CHUNK + found);
            }
            number = next_bit(&self.occupied, number + 1)?;
            from = 0;
        }
    }

    /// Members from `start` on without a gap, `most` at most.
    #[must_use]
    pub fn run_from(&self, start: u32, most: u32) -> Range<u32> {
        let end = start.saturating_add(most);
        let mut at = start;
        while at < end {
            match self.chunks.get(index(at / CHUNK)) {
                Some(Chunk::Full) => at = end.min((at / CHUNK + 1).saturating_mul(CHUNK)),
                Some(Chunk::Mixed(words)) if words.contains(at % CHUNK) => at += 1,
                None | Some(Chunk::Empty | Chunk::Mixed(_)) => break,
            }
        }
        start..at
    }
}

impl Chunk {
    /// As [`Words::change`]. What becomes empty or full gives its words to `spare`.
    fn change(
        &mut self,
        range: Range<u32>,
        is_added: bool,
        spare: &mut Option<Box<Words>>,
    ) -> Result<(), u32> {
        let is_full = match self {
            Chunk::Mixed(_) => None,
            Chunk::Empty => Some(false),
            Chunk::Full => Some(true),
        };
        if is_full == Some(is_added) {
            return Err(range.start);
        }
        if range == (0..CHUNK) && is_full.is_some() {
            *self = if is_added { Chunk::Full } else { Chunk::Empty };
            return Ok(());
        }
        if let Some(is_full) = is_full {
            let mut words = spare.take().unwrap_or_else(|| Box::new(Words::NONE));
            words.fill(is_full);
            *self = Chunk::Mixed(words);
        }
        let Chunk::Mixed(words) = self else {
            return Ok(());
        };
        words.change(range, is_added)?;
        let now = match words.len {
            0 => Chunk::Empty,
            CHUNK => Chunk::Full,
            _ => return Ok(()),
        };
        if let Chunk::Mixed(words) = std::mem::replace(self, now) {
            *spare = Some(words);
        }
        Ok(())
    }
}

impl Words {
    const NONE: Words = Words {
        bits: [0; WORDS],
        summary: [0; WORDS / 64],
        len: 0,
    };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

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

    #[test]
    fn it_is_a_set() {
        let (mut set, mut expected) = (Bitmap::default(), BTreeSet::new());
        let mut state = 1_u64;
        let mut below = |n: u32| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            u32::try_from((state >> 33) % u64::from(n)).expect("below n")
        };
        for _ in 0..4000 {
            // Around the ends of chunks and words, and whole chunks.
            let start = below(4) * CHUNK + [0, 1, 63, 64, CHUNK - 1][index(below(5))];
            let len = [1, 2, 64, 65, CHUNK, CHUNK + 1][index(below(6))];
            let range = start..start + len;
            if range.clone().all(|n| expected.contains(&n)) {
                set.remove(range.clone());
                expected.retain(|n| !range.contains(n));
            } else if !range.clone().any(|n| expected.contains(&n)) {
                set.insert(range.clone());
                expected.extend(range);
            }
            assert_eq!(index(set.len()), expected.len());
            let from = below(6 * CHUNK);
            let next = expected.range(from..).next().copied();
            assert_eq!(set.next(from), next);
            if let Some(next) = next {
                let run = set.run_from(next, CHUNK + 70);
                let end = (next..next + CHUNK + 70).find(|n| !expected.contains(n));
                assert_eq!(run, next..end.unwrap_or(next + CHUNK + 70));
            }
        }
    }

    #[test]
    fn all_there_can_be_takes_no_memory_to_speak_of() {
        let mut set = Bitmap::default();
        set.insert(5..u32::MAX);
        assert_eq!(set.len(), u32::MAX - 5);
        let is_mixed = |chunk: &&Chunk| matches!(chunk, Chunk::Mixed(_));
        assert_eq!(set.chunks.iter().filter(is_mixed).count(), 2);
        assert_eq!(set.next(0), Some(5));
        assert_eq!(set.next(u32::MAX - 1), Some(u32::MAX - 1));
        set.remove(5..u32::MAX);
        assert_eq!(set.next(0), None);
    }

    #[test]
    #[should_panic(expected = "cluster 70 is free already")]
    fn nothing_is_free_twice() {
        let mut set = Bitmap::default();
        set.insert(70..71);
        set.insert(0..CHUNK);
    }
}
