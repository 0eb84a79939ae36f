//! Which operations a simulated disk knows and counts, and what may be planned to go wrong with them.

#[expect(unused_imports, reason = "for the documentation")]
use super::Storage;

/// The operations faults are planned for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// [`Storage::read_at`].
    Read,
    /// [`Storage::write_at`].
    Write,
    /// [`Storage::write_durable_at`].
    WriteDurable,
    /// [`Storage::flush`].
    Flush,
    /// [`Storage::punch`].
    Punch,
    /// [`Storage::allocate`].
    Allocate,
    /// [`Storage::set_len`].
    SetLen,
}

/// How many operations of each kind were begun, failed ones included, requests refused for their
/// range not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// [`Op::Read`].
    pub reads: u64,
    /// [`Op::Write`].
    pub writes: u64,
    /// [`Op::WriteDurable`].
    pub durable_writes: u64,
    /// [`Op::Flush`].
    pub flushes: u64,
    /// [`Op::Punch`].
    pub punches: u64,
    /// [`Op::Allocate`].
    pub allocates: u64,
    /// [`Op::SetLen`].
    pub set_lens: u64,
}

impl Counters {
    /// All but the reads: the moments at which a power cut can make a difference.
    #[must_use]
    pub fn changes(&self) -> u64 {
        self.writes
            + self.durable_writes
            + self.flushes
            + self.punches
            + self.allocates
            + self.set_lens
    }

    /// All.
    #[must_use]
    pub fn all(&self) -> u64 {
        self.changes() + self.reads
    }

    /// The counter of one kind.
    #[must_use]
    pub fn of(&self, op: Op) -> u64 {
        let mut copy = *self;
        *copy.slot(op)
    }

    pub(super) fn slot(&mut self, op: Op) -> &mut u64 {
        match op {
            Op::Read => &mut self.reads,
            Op::Write => &mut self.writes,
            Op::WriteDurable => &mut self.durable_writes,
            Op::Flush => &mut self.flushes,
            Op::Punch => &mut self.punches,
            Op::Allocate => &mut self.allocates,
            Op::SetLen => &mut self.set_lens,
        }
    }
}

/// What a device does to an operation instead of doing it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Harm {
    /// Fails with this errno; of a write, any blocks are done.
    Fails(i32),
    /// Fails with this errno; of a write, the first half is done.
    Short(i32),
    /// Says that it worked, and does nothing. No contract allows that.
    Lost,
    /// Says that it worked, and does it at this byte instead. Nor that.
    Elsewhere(u64),
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Fault {
    /// `None` for any.
    pub(super) op: Option<Op>,
    /// The value of the counter of `op`, or of all, at which it strikes.
    pub(super) at: u64,
    pub(super) harm: Harm,
}
