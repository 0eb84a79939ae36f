//! How long a worker looks for more requests before it sleeps. Waking up costs more than a request
//! from memory does; looking about for nothing costs a CPU. So it looks for as long as that has paid
//! lately: a sleep that ended within the longest window lengthens it, a look in vain halves it.

use std::time::Duration;

/// What the window begins with when sleeps turn out to be short.
const FIRST: Duration = Duration::from_micros(4);
/// A window shorter than this is none.
const LEAST: Duration = Duration::from_micros(1);

/// The window of one worker.
#[derive(Debug, Clone, Copy)]
pub(super) struct Polling {
    most: Duration,
    window: Duration,
}

impl Polling {
    /// A window of up to `most`; zero for none ever.
    pub(super) fn new(most: Duration) -> Self {
        Self {
            most,
            window: Duration::ZERO,
        }
    }

    /// Whether there may ever be a window, so that sleeps are worth timing.
    pub(super) fn is_on(self) -> bool {
        !self.most.is_zero()
    }

    /// How long to look about now.
    pub(super) fn window(self) -> Duration {
        self.window
    }

    /// A look was in vain.
    pub(super) fn missed(&mut self) {
        let half = self.window / 2;
        self.window = if half < LEAST { Duration::ZERO } else { half };
    }

    /// A sleep took `asleep`: had it been a look of the longest window, would it have paid?
    pub(super) fn slept(&mut self, asleep: Duration) {
        if asleep <= self.most {
            self.window = (self.window * 2).max(FIRST).min(self.most);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_follows_what_paid() {
        let most = Duration::from_micros(32);
        let mut polling = Polling::new(most);
        assert!(polling.is_on() && polling.window().is_zero());
        polling.slept(Duration::from_millis(5));
        assert!(polling.window().is_zero(), "nothing comes soon: no look");
        for _ in 0..6 {
            polling.slept(Duration::from_micros(20));
        }
        assert_eq!(polling.window(), most);
        for _ in 0..6 {
            polling.missed();
        }
        assert!(polling.window().is_zero(), "an idle disk costs nothing");
        let mut off = Polling::new(Duration::ZERO);
        off.slept(Duration::ZERO);
        assert!(!off.is_on() && off.window().is_zero());
    }
}
