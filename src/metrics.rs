//! Counters and latency histograms, and the snapshots taken of them. No I/O, no clock.
//!
//! Each set of counters has one writer (a worker thread) and any number of readers, so that a
//! count costs a plain store.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Buckets of a histogram: four for each power of two of nanoseconds.
pub const BUCKETS: usize = 4 * 40;

/// A count with one writer.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `amount`. Only one thread may ever do so.
    pub fn add(&self, amount: u64) {
        let now = self.0.load(Ordering::Relaxed);
        self.0.store(now.wrapping_add(amount), Ordering::Relaxed);
    }

    /// The count.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// How often something took how long, to within 25 %. One writer.
#[derive(Debug)]
pub struct Histogram([Counter; BUCKETS]);

impl Default for Histogram {
    fn default() -> Self {
        Self(std::array::from_fn(|_| Counter::default()))
    }
}

/// The bucket of `nanos`: two bits below the highest one that is set.
fn bucket(nanos: u64) -> usize {
    let nanos = nanos.max(4);
    let log = nanos.ilog2();
    let quarter = (nanos >> (log - 2)) & 3;
    let index = u64::from(log - 2) * 4 + quarter;
    usize::try_from(index).unwrap_or(BUCKETS).min(BUCKETS - 1)
}

/// The largest number of nanoseconds in `bucket`.
fn upper(bucket: usize) -> u64 {
    let bucket = u64::try_from(bucket).unwrap_or(0);
    let (log, quarter) = (bucket / 4, bucket % 4);
    ((5 + quarter) << log) - 1
}

impl Histogram {
    /// Counts one event that took `time`.
    pub fn record(&self, time: Duration) {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.0[bucket(nanos)].add(1);
    }

    /// A copy of the counts.
    #[must_use]
    pub fn snapshot(&self) -> HistogramSnapshot {
        HistogramSnapshot {
            counts: self.0.iter().map(Counter::get).collect(),
        }
    }
}

/// Counts of a [`Histogram`] at one time.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HistogramSnapshot {
    /// By bucket; empty is the same as all zero.
    counts: Vec<u64>,
}

impl HistogramSnapshot {
    /// Events counted.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The time that `per_mille` thousandths of the events did not exceed, rounded up to its
    /// bucket; zero if there was no event.
    #[must_use]
    pub fn quantile(&self, per_mille: u64) -> Duration {
        let total = self.total();
        let mut left = (total * per_mille.min(1000)).div_ceil(1000).max(1);
        for (index, count) in self.counts.iter().enumerate() {
            if *count >= left {
                return Duration::from_nanos(upper(index));
            }
            left -= count;
        }
        Duration::ZERO
    }

    /// Adds the events of `other`.
    pub fn merge(&mut self, other: &Self) {
        self.counts.resize(BUCKETS.max(self.counts.len()), 0);
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine += theirs;
        }
    }

    /// Upper bounds and counts of the buckets that are not empty, ascending.
    pub fn buckets(&self) -> impl Iterator<Item = (Duration, u64)> + '_ {
        let counts = self.counts.iter().enumerate();
        counts
            .filter(|(_, count)| **count > 0)
            .map(|(index, count)| (Duration::from_nanos(upper(index)), *count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_time_lies_in_its_bucket() {
        for shift in 2..40 {
            for nanos in [
                1_u64 << shift,
                (1 << shift) + 1,
                (1 << shift) * 7 / 4,
                (2 << shift) - 1,
            ] {
                let index = bucket(nanos);
                assert!(nanos <= upper(index), "{nanos} above bucket {index}");
                assert!(
                    index == 0 || nanos > upper(index - 1),
                    "{nanos} below bucket {index}"
                );
                assert!(
                    upper(index) <= nanos + nanos / 4 + 1,
                    "{nanos}: bucket is too wide"
                );
            }
        }
        assert_eq!(bucket(0), 0);
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn quantiles_walk_the_counts() {
        let histogram = Histogram::default();
        for _ in 0..99 {
            histogram.record(Duration::from_micros(10));
        }
        histogram.record(Duration::from_millis(5));
        let mut snapshot = histogram.snapshot();
        assert_eq!(snapshot.total(), 100);
        let median = snapshot.quantile(500).as_nanos();
        assert!((10_000..12_600).contains(&median), "{median}");
        assert!(snapshot.quantile(1000) >= Duration::from_millis(5));
        let copy = snapshot.clone();
        snapshot.merge(&copy);
        assert_eq!(snapshot.total(), 200);
        assert_eq!(snapshot.buckets().count(), 2);
        assert_eq!(HistogramSnapshot::default().quantile(500), Duration::ZERO);
    }
}
