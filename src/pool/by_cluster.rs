//! A value for each cluster of a pool, in chunks made when first touched: what it takes follows what
//! is mapped, not what the pool could hold.

use super::error::PoolError;
use crate::format::units::index;
use crate::storage::advise_huge;
use std::ops::Range;
use zerocopy::FromZeros;

/// Values in a chunk. It comes from the kernel as zeros, page by page when written to.
const CHUNK: u32 = 1 << 20;

/// Values by number, zero where nothing was put yet.
#[derive(Debug)]
pub struct ByCluster<T> {
    chunks: Vec<Vec<T>>,
    count: u32,
    is_dense: bool,
}

impl<T: Copy + FromZeros> ByCluster<T> {
    /// For numbers below `count`. `is_dense`: most of them will be used, so huge pages pay.
    ///
    /// # Errors
    /// [`PoolError::NoMemory`].
    pub fn new(count: u32, is_dense: bool) -> Result<Self, PoolError> {
        let mut chunks = Vec::new();
        let len = index(count.div_ceil(CHUNK));
        let reserved = chunks.try_reserve_exact(len);
        reserved.map_err(|_too_little| PoolError::NoMemory)?;
        chunks.resize_with(len, Vec::new);
        Ok(Self {
            chunks,
            count,
            is_dense,
        })
    }

    /// The value of `number`; zero if it is out of range.
    #[inline]
    #[must_use]
    pub fn get(&self, number: u32) -> T {
        let chunk = self.chunks.get(index(number / CHUNK));
        let found = chunk.and_then(|chunk| chunk.get(index(number % CHUNK)));
        found.copied().unwrap_or_else(T::new_zeroed)
    }

    /// The value of `number`, to be changed; `None` if nothing was put near it yet, or it is out of
    /// range.
    #[inline]
    pub fn get_mut(&mut self, number: u32) -> Option<&mut T> {
        let chunk = self.chunks.get_mut(index(number / CHUNK))?;
        chunk.get_mut(index(number % CHUNK))
    }

    /// As [`ByCluster::get_mut`], with its place made if there is none; `None` if it is out of range.
    ///
    /// # Errors
    /// [`PoolError::NoMemory`].
    #[cold]
    pub fn make(&mut self, number: u32) -> Result<Option<&mut T>, PoolError> {
        let first = number / CHUNK * CHUNK;
        let Some(chunk) = self.chunks.get_mut(index(number / CHUNK)) else {
            return Ok(None);
        };
        if chunk.is_empty() {
            let len = index(CHUNK.min(self.count - first));
            let made = T::new_vec_zeroed(len);
            *chunk = made.map_err(|_too_little| PoolError::NoMemory)?;
            if self.is_dense {
                advise_huge(chunk);
            }
        }
        Ok(chunk.get_mut(index(number % CHUNK)))
    }

    /// The values in order, in the longest pieces that are at hand: numbers, and their values, or
    /// none where all are zero.
    pub fn pieces(&self) -> impl Iterator<Item = (Range<u32>, &[T])> {
        let mut first = 0_u32;
        self.chunks.iter().map(move |chunk| {
            let range = first..self.count.min(first.saturating_add(CHUNK));
            first = range.end;
            (range, chunk.as_slice())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_put_is_zero() {
        let count = 3 * CHUNK + 5;
        let mut table = ByCluster::<u64>::new(count, true).expect("memory");
        for number in [0, CHUNK - 1, CHUNK, count - 1] {
            let place = table.make(number).expect("memory");
            *place.expect("in range") = u64::from(number) + 1;
        }
        for outside in [count, 4 * CHUNK, u32::MAX] {
            assert!(table.make(outside).expect("memory").is_none());
            assert!(table.get_mut(outside).is_none());
            assert_eq!(table.get(outside), 0);
        }
        assert_eq!((table.get(1), table.get(CHUNK)), (0, u64::from(CHUNK) + 1));
        let pieces = table.pieces().map(|(range, values)| (range, values.len()));
        let len = index(CHUNK);
        let expected = [
            (0..CHUNK, len),
            (CHUNK..2 * CHUNK, len),
            (2 * CHUNK..3 * CHUNK, 0),
            (3 * CHUNK..count, 5),
        ];
        assert_eq!(pieces.collect::<Vec<_>>(), expected);
    }

    #[test]
    fn all_there_can_be_takes_what_is_used_of_it() {
        let mut table = ByCluster::<u64>::new(u32::MAX, false).expect("memory");
        assert!(table.get_mut(u32::MAX - 1).is_none(), "not made yet");
        let last = table.make(u32::MAX - 1).expect("memory");
        *last.expect("in range") = 7;
        assert_eq!(table.get(u32::MAX - 1), 7);
        let used = table.pieces().filter(|(_, values)| !values.is_empty());
        assert_eq!(used.count(), 1);
    }
}
