//! Looking at a simulated disk in the middle of its operations, and at what a crash there would leave.

use super::crash::Draw;
use super::medium::Medium;
use super::plan::Op;
use super::sim::SimStorage;
use std::fmt;

/// The disk in the middle of an operation, for whoever watches it ([`SimStorage::watch`]).
pub struct Moment<'a> {
    medium: &'a Medium,
    op: Op,
}

/// One choice that a crash can make.
#[derive(Debug, Clone)]
pub struct Crash(Draw);

impl Crash {
    /// Equal for disks with equal contents; different for others, as good as certainly.
    #[must_use]
    pub fn mark(&self) -> u64 {
        self.0.mark
    }
}

impl<'a> Moment<'a> {
    pub(super) fn new(medium: &'a Medium, op: Op) -> Self {
        Self { medium, op }
    }

    /// What is being done.
    #[must_use]
    pub fn op(&self) -> Op {
        self.op
    }

    /// As [`SimStorage::crash_all_lost`].
    #[must_use]
    pub fn all_lost(&self) -> Crash {
        Crash(self.medium.draw_all_lost())
    }

    /// As [`SimStorage::crash_all_kept`].
    #[must_use]
    pub fn all_kept(&self) -> Crash {
        Crash(self.medium.draw_all_kept())
    }

    /// As [`SimStorage::crash`].
    #[must_use]
    pub fn crash(&self, seed: u64) -> Crash {
        Crash(self.medium.draw(seed))
    }

    /// Every crash that leaves another disk, if there are at most `max`.
    #[must_use]
    pub fn crashes(&self, max: usize) -> Option<Vec<Crash>> {
        Some(self.medium.draws(max)?.into_iter().map(Crash).collect())
    }

    /// As [`SimStorage::kill`].
    #[must_use]
    pub fn kill(&self) -> SimStorage {
        SimStorage::from_medium(self.medium.clone())
    }

    /// The disk after `crash`, which must be of this moment.
    #[must_use]
    pub fn image(&self, crash: &Crash) -> SimStorage {
        SimStorage::from_medium(self.medium.image(&crash.0))
    }
}

/// Called in the middle of every changing operation; see [`SimStorage::watch`].
pub type Watcher = Box<dyn FnMut(&Moment<'_>) + Send>;

impl fmt::Debug for Moment<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Moment({:?})", self.op)
    }
}
