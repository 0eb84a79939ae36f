//! The two clocks, in one place: nothing else may ask what time it is, so that what depends on
//! time can be found by searching for this module.

use std::cell::Cell;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

thread_local! {
    static HELD_AT: Cell<Option<u64>> = const { Cell::new(None) };
}

/// Makes the time of day stand still for this thread, at `seconds` since 1970, or run again: a
/// simulation that is to be repeated byte for byte cannot ask the kernel.
pub fn hold_still(seconds: Option<u64>) {
    HELD_AT.set(seconds);
}

/// The monotonic clock (`CLOCK_MONOTONIC`): for intervals, never for dates.
#[must_use]
pub fn now() -> Instant {
    #[expect(clippy::disallowed_methods, reason = "this is the wrapper")]
    Instant::now()
}

/// Seconds since 1970-01-01 00:00 UTC, leap seconds not counted; 0 on a clock set before that.
#[must_use]
pub fn unix_seconds() -> u64 {
    if let Some(seconds) = HELD_AT.get() {
        return seconds;
    }
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
        hold_still(Some(7));
        assert_eq!(unix_seconds(), 7);
        hold_still(None);
        assert!(unix_seconds() > 1_600_000_000);
    }
}
