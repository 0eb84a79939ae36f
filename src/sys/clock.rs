//! The two clocks, in one place: nothing else may ask what time it is, so that what depends on
//! time can be found by searching for this module.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// The monotonic clock (`CLOCK_MONOTONIC`): for intervals, never for dates.
#[must_use]
pub fn now() -> Instant {
    #[expect(clippy::disallowed_methods, reason = "this is the wrapper")]
    Instant::now()
}

/// Seconds since 1970-01-01 00:00 UTC, leap seconds not counted; 0 on a clock set before that.
#[must_use]
pub fn unix_seconds() -> u64 {
    #[expect(clippy::disallowed_methods, reason = "this is the wrapper")]
    let now = SystemTime::now();
    now.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_move_forwards() {
        let before = now();
        assert!(now() >= before);
        // 2020-09-13: any machine that builds this is later.
        assert!(unix_seconds() > 1_600_000_000);
    }
}
