//! A disk in memory that crashes and fails on demand, exactly as far as the contract of
//! [`Storage`] allows: the same operations and the same seed give the same bytes for ever.
//!
//! A test does what it wants to test on a [`SimStorage`], then asks for what a power cut at that
//! moment could have left behind: one image by seed ([`SimStorage::crash`]), the two extremes, or
//! all of them where there are few ([`SimStorage::images`]). [`SimStorage::cut_power_at`] stops
//! the disk in the middle of any operation; [`SimStorage::fail`] makes one operation fail.

use std::fmt;
use std::io::{self, ErrorKind};
use std::os::fd::BorrowedFd;

use super::crash::Draw;
use super::medium::{Medium, Rng};
use super::plan::Fault;
pub use super::plan::{Counters, Harm, Op};
pub use super::watch::{Crash, Moment, Watcher};
use super::{BLOCK, Storage, Tier};
use crate::sync::Mutex;

/// Linux's number for a failed transfer, the usual choice for [`SimStorage::fail`].
pub const EIO: i32 = 5;

struct State {
    medium: Medium,
    counters: Counters,
    faults: Vec<Fault>,
    /// The value of `counters.changes()` at which the power goes.
    cut_at: Option<u64>,
    is_off: bool,
    hole_writes_max: usize,
    rng: Rng,
    watcher: Option<Watcher>,
}

impl State {
    /// Shows the disk, in the middle of an operation, to whoever watches.
    fn show(&mut self, op: Op) {
        if let Some(watcher) = &mut self.watcher {
            let medium = &self.medium;
            watcher(&Moment::new(medium, op));
        }
    }

    /// Which of the blocks of a write that fails are done.
    fn partly(&mut self, is_short: bool, blocks: usize) -> impl FnMut() -> bool + use<> {
        let rng = &mut self.rng;
        let kept: Vec<bool> = (0..blocks)
            .map(|n| {
                if is_short {
                    n < blocks / 2
                } else {
                    rng.below(2) == 0
                }
            })
            .collect();
        let mut kept = kept.into_iter();
        move || kept.next().unwrap_or(false)
    }
}

/// What becomes of an operation.
enum Fate {
    Works,
    /// Fails, half done: the first half, or any.
    Fails(io::Error, bool),
    /// Only seems to work.
    Lost,
    /// Is done at another byte.
    Elsewhere(u64),
    /// Was in flight when the power went: a crash may find any part of it.
    Cut,
}

/// A simulated disk. See the module.
pub struct SimStorage {
    state: Mutex<State>,
}

fn power_is_off() -> io::Error {
    io::Error::other("the simulated power is off")
}

impl SimStorage {
    /// A disk of `len` zero bytes, a multiple of [`BLOCK`], all durable.
    ///
    /// # Panics
    /// If the length is odd.
    #[must_use]
    pub fn new(len: u64) -> Self {
        assert!(len.is_multiple_of(BLOCK), "length {len} is not in blocks");
        Self::from_medium(Medium::new(len))
    }

    pub(super) fn from_medium(medium: Medium) -> Self {
        Self {
            state: Mutex::new(State {
                medium,
                counters: Counters::default(),
                faults: Vec::new(),
                cut_at: None,
                is_off: false,
                hole_writes_max: usize::MAX,
                rng: Rng(0),
                watcher: None,
            }),
        }
    }

    /// Seeds what a failed write leaves half done. Crashes take their own seed.
    pub fn reseed(&self, seed: u64) {
        self.state.lock().rng = Rng(seed);
    }

    /// Makes the operation of this kind after `skip` more of them fail with an errno. A failed
    /// write has written some of its blocks; what a failed flush or durable write was to save is
    /// not saved by any later flush either, as on Linux, until it is written again.
    pub fn fail(&self, op: Op, skip: u64, errno: i32) {
        self.harm(op, skip, Harm::Fails(errno));
    }

    /// As [`SimStorage::fail`], for any harm.
    pub fn harm(&self, op: Op, skip: u64, harm: Harm) {
        let mut state = self.state.lock();
        let at = state.counters.of(op) + skip;
        let op = Some(op);
        state.faults.push(Fault { op, at, harm });
    }

    /// As [`SimStorage::harm`], for the operation after `skip` more of any kind.
    pub fn harm_any(&self, skip: u64, harm: Harm) {
        let mut state = self.state.lock();
        let at = state.counters.all() + skip;
        state.faults.push(Fault { op: None, at, harm });
    }

    /// Has `watcher` called in the middle of every changing operation: one that writes has
    /// written, but nothing of it is durable; a flush has saved nothing yet. Whatever a crash
    /// between two operations can leave, one in the middle of the next can. The watcher must not
    /// use this disk.
    pub fn watch(&self, watcher: Option<Watcher>) {
        self.state.lock().watcher = watcher;
    }

    /// Shows the disk as it is between two operations.
    pub fn look<T>(&self, look: impl FnOnce(&Moment<'_>) -> T) -> T {
        let medium = &self.state.lock().medium;
        let op = Op::Read;
        look(&Moment::new(medium, op))
    }

    /// Everything is durable at once from here on: for a disk that will not crash again, which is
    /// quicker so.
    pub fn forget_versions(&self) {
        self.state.lock().medium.forget();
    }

    /// Forgets the faults planned by [`SimStorage::fail`].
    pub fn clear_faults(&self) {
        self.state.lock().faults.clear();
    }

    /// The host has room for this many bytes of data in all, in pages of 4 KiB; what is already
    /// there stays. `u64::MAX` for no limit.
    pub fn set_capacity(&self, bytes: u64) {
        self.state.lock().medium.set_capacity(bytes);
    }

    /// The answer to [`Storage::hole_writes_max`] from now on, after crashes too.
    pub fn set_hole_writes_max(&self, most: usize) {
        self.state.lock().hole_writes_max = most;
    }

    /// The power goes during the changing operation (any but a read) after `skip` more of them.
    /// That one was in flight: it fails, and a crash may find any part of it, or all, or nothing.
    /// Every operation after it fails.
    pub fn cut_power_at(&self, skip: u64) {
        let mut state = self.state.lock();
        state.cut_at = Some(state.counters.changes() + skip);
    }

    /// The power goes now, between two operations.
    pub fn cut_power(&self) {
        self.state.lock().is_off = true;
    }

    /// True after the power went.
    #[must_use]
    pub fn is_off(&self) -> bool {
        self.state.lock().is_off
    }

    /// Operations so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.state.lock().counters
    }

    /// Blocks of which a crash may leave more than one version.
    #[must_use]
    pub fn dirty_blocks(&self) -> usize {
        self.state.lock().medium.dirty_blocks()
    }

    /// What a crash now may leave behind: every block independently one of the versions the
    /// contract allows, in a pattern that depends on `seed` alone. A new disk without faults, power
    /// on, everything durable; this one is not changed.
    #[must_use]
    pub fn crash(&self, seed: u64) -> Self {
        self.image(|medium| medium.draw(seed))
    }

    /// As [`SimStorage::crash`], where nothing survived that no flush had saved.
    #[must_use]
    pub fn crash_all_lost(&self) -> Self {
        self.image(Medium::draw_all_lost)
    }

    /// As [`SimStorage::crash`], where everything survived.
    #[must_use]
    pub fn crash_all_kept(&self) -> Self {
        self.image(Medium::draw_all_kept)
    }

    /// What the next process finds when this one is killed but the power stays on: the present
    /// versions, and the older ones still to fear from a later crash. A new disk without faults;
    /// this one is not changed. An operation that [`SimStorage::cut_power_at`] stopped is done, but
    /// not durable.
    #[must_use]
    pub fn kill(&self) -> Self {
        let state = self.state.lock();
        let next = Self::from_medium(state.medium.clone());
        next.set_hole_writes_max(state.hole_writes_max);
        next
    }

    /// Every distinct disk a crash now may leave behind, if there are at most `max`.
    #[must_use]
    pub fn images(&self, max: usize) -> Option<impl Iterator<Item = Self> + use<>> {
        let medium = self.state.lock().medium.clone();
        let draws = medium.draws(max)?.into_iter();
        Some(draws.map(move |draw| Self::from_medium(medium.image(&draw))))
    }

    fn image(&self, draw: impl FnOnce(&Medium) -> Draw) -> Self {
        let state = self.state.lock();
        let after = Self::from_medium(state.medium.image(&draw(&state.medium)));
        after.set_hole_writes_max(state.hole_writes_max);
        after
    }

    /// Runs `body` on the state with the fate of an operation of kind `op` on a range.
    ///
    /// # Errors
    /// As `body`; the power is off; the range is not on the disk.
    fn operate(
        &self,
        op: Op,
        (offset, len): (u64, u64),
        body: impl FnOnce(&mut State, Fate) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut state = self.state.lock();
        if state.is_off {
            return Err(power_is_off());
        }
        let end = offset.checked_add(len);
        if end.is_none_or(|end| end > state.medium.len()) {
            return Err(if op == Op::Read {
                ErrorKind::UnexpectedEof.into()
            } else {
                ErrorKind::InvalidInput.into()
            });
        }
        let (count, all) = (state.counters.of(op), state.counters.all());
        let is_cut = op != Op::Read && state.cut_at == Some(state.counters.changes());
        *state.counters.slot(op) += 1;
        state.medium.begin();
        let planned = |fault: &&Fault| match fault.op {
            Some(kind) => kind == op && fault.at == count,
            None => fault.at == all,
        };
        let fate = if is_cut {
            state.is_off = true;
            Fate::Cut
        } else if let Some(fault) = state.faults.iter().find(planned) {
            match fault.harm {
                Harm::Fails(errno) => Fate::Fails(io::Error::from_raw_os_error(errno), false),
                Harm::Short(errno) => Fate::Fails(io::Error::from_raw_os_error(errno), true),
                Harm::Lost => Fate::Lost,
                Harm::Elsewhere(at) => Fate::Elsewhere(at),
            }
        } else {
            Fate::Works
        };
        body(&mut state, fate)
    }
}

impl fmt::Debug for SimStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state.lock();
        f.debug_struct("SimStorage")
            .field("len", &state.medium.len())
            .field("dirty_blocks", &state.medium.dirty_blocks())
            .field("counters", &state.counters)
            .field("is_off", &state.is_off)
            .finish_non_exhaustive()
    }
}

impl Storage for SimStorage {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let range = (offset, buf.len() as u64);
        self.operate(Op::Read, range, |state, fate| match fate {
            Fate::Works => {
                state.medium.read(buf, offset);
                Ok(())
            }
            Fate::Elsewhere(at) => {
                let last = state.medium.len() - buf.len() as u64;
                state.medium.read(buf, at.min(last));
                Ok(())
            }
            Fate::Lost => Ok(()),
            Fate::Fails(error, _) => Err(error),
            Fate::Cut => Err(power_is_off()),
        })
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let range = (offset, buf.len() as u64);
        self.operate(Op::Write, range, |state, fate| match fate {
            Fate::Works => {
                state.medium.write(buf, offset, || true)?;
                state.show(Op::Write);
                Ok(())
            }
            Fate::Elsewhere(at) => {
                let last = state.medium.len() - buf.len() as u64;
                state.medium.write(buf, at.min(last), || true)
            }
            Fate::Lost => Ok(()),
            Fate::Fails(error, is_short) => {
                let keep = state.partly(is_short, buf.len().div_ceil(512));
                state.medium.write(buf, offset, keep)?;
                Err(error)
            }
            Fate::Cut => {
                state.medium.write(buf, offset, || true)?;
                Err(power_is_off())
            }
        })
    }

    fn write_durable_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let range = (offset, buf.len() as u64);
        self.operate(Op::WriteDurable, range, |state, fate| match fate {
            Fate::Works => {
                state.medium.write(buf, offset, || true)?;
                state.show(Op::WriteDurable);
                state.medium.settle(offset, buf.len());
                Ok(())
            }
            Fate::Elsewhere(at) => {
                let at = at.min(state.medium.len() - buf.len() as u64);
                state.medium.write(buf, at, || true)?;
                state.medium.settle(at, buf.len());
                Ok(())
            }
            Fate::Lost => Ok(()),
            Fate::Fails(error, is_short) => {
                let keep = state.partly(is_short, buf.len().div_ceil(512));
                let written = state.medium.write(buf, offset, keep);
                state.medium.abandon(offset, buf.len());
                Err(written.err().unwrap_or(error))
            }
            Fate::Cut => {
                state.medium.write(buf, offset, || true)?;
                Err(power_is_off())
            }
        })
    }

    fn flush(&self) -> io::Result<()> {
        self.operate(Op::Flush, (0, 0), |state, fate| match fate {
            Fate::Works | Fate::Elsewhere(_) => {
                state.show(Op::Flush);
                state.medium.flush();
                Ok(())
            }
            Fate::Lost => Ok(()),
            Fate::Fails(error, _) => {
                state.medium.flush_failed();
                Err(error)
            }
            Fate::Cut => Err(power_is_off()),
        })
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.operate(Op::Punch, (offset, len), |state, fate| match fate {
            Fate::Works | Fate::Elsewhere(_) => {
                state.medium.punch(offset, len);
                state.show(Op::Punch);
                Ok(())
            }
            Fate::Lost => Ok(()),
            Fate::Fails(error, _) => Err(error),
            Fate::Cut => {
                state.medium.punch(offset, len);
                Err(power_is_off())
            }
        })
    }

    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        self.operate(Op::Allocate, (offset, len), |state, fate| match fate {
            Fate::Works | Fate::Elsewhere(_) => state.medium.allocate(offset, len),
            Fate::Lost => Ok(()),
            Fate::Fails(error, _) => Err(error),
            Fate::Cut => Err(power_is_off()),
        })
    }

    fn len(&self) -> io::Result<u64> {
        let state = self.state.lock();
        if state.is_off {
            return Err(power_is_off());
        }
        Ok(state.medium.len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if !len.is_multiple_of(BLOCK) {
            return Err(ErrorKind::InvalidInput.into());
        }
        self.operate(Op::SetLen, (0, 0), |state, fate| match fate {
            Fate::Works | Fate::Elsewhere(_) => {
                state.medium.set_len(len);
                state.show(Op::SetLen);
                Ok(())
            }
            Fate::Lost => Ok(()),
            Fate::Fails(error, _) => Err(error),
            Fate::Cut => {
                state.medium.set_len(len);
                Err(power_is_off())
            }
        })
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(self.state.lock().medium.allocated())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        Ok(self.state.lock().medium.next_data(offset))
    }

    fn hole_writes_max(&self) -> usize {
        self.state.lock().hole_writes_max
    }

    fn tier(&self) -> Tier {
        Tier::Buffered
    }

    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const LEN: u64 = 1 << 20;

    fn block(fill: u8) -> Vec<u8> {
        vec![fill; 512]
    }

    /// The first byte of `count` blocks from `offset` on, each of which must be uniform.
    fn fills(disk: &SimStorage, offset: u64, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count * 512];
        disk.read_at(&mut bytes, offset).unwrap();
        let blocks = bytes.chunks(512);
        blocks
            .map(|block| {
                assert!(block.iter().all(|byte| *byte == block[0]), "torn block");
                block[0]
            })
            .collect()
    }

    fn all_fills(disk: &SimStorage, count: usize) -> BTreeSet<Vec<u8>> {
        let images = disk.images(1000).unwrap();
        images.map(|image| fills(&image, 0, count)).collect()
    }

    #[test]
    fn a_flush_keeps_what_was_written_before_it() {
        let disk = SimStorage::new(LEN);
        disk.write_at(&block(1), 0).unwrap();
        disk.flush().unwrap();
        assert_eq!(disk.dirty_blocks(), 0);
        for seed in 0..50 {
            assert_eq!(fills(&disk.crash(seed), 0, 1), [1]);
        }
        assert_eq!(fills(&disk.crash_all_lost(), 0, 1), [1]);
    }

    #[test]
    fn unflushed_blocks_are_lost_torn_and_reordered_one_by_one() {
        let disk = SimStorage::new(LEN);
        disk.write_at(&[[1; 512], [1; 512]].concat(), 0).unwrap();
        disk.flush().unwrap();
        disk.write_at(&[[2; 512], [2; 512]].concat(), 0).unwrap();
        disk.write_at(&block(3), 512).unwrap();
        let expected: BTreeSet<_> = [1, 2]
            .iter()
            .flat_map(|a| [1, 2, 3].map(|b| vec![*a, b]))
            .collect();
        assert_eq!(all_fills(&disk, 2), expected);
        let seen: BTreeSet<_> = (0..300).map(|s| fills(&disk.crash(s), 0, 2)).collect();
        assert_eq!(seen, expected, "300 seeds reach all six images");
        assert_eq!(fills(&disk.crash_all_lost(), 0, 2), [1, 1]);
        assert_eq!(fills(&disk.crash_all_kept(), 0, 2), [2, 3]);
        assert_eq!(
            fills(&disk, 0, 2),
            [2, 3],
            "a crash leaves the disk itself alone"
        );
    }

    #[test]
    fn seeds_also_keep_and_lose_whole_operations() {
        let disk = SimStorage::new(LEN);
        disk.write_at(&[1; 8 * 512], 0).unwrap();
        disk.write_at(&[2; 4 * 512], 0).unwrap();
        let seen: BTreeSet<_> = (0..300).map(|s| fills(&disk.crash(s), 0, 8)).collect();
        let (first, second, both) = ([1; 8], [2, 2, 2, 2, 0, 0, 0, 0], [2, 2, 2, 2, 1, 1, 1, 1]);
        for image in [[0; 8], first, second, both] {
            assert!(seen.contains(&image[..]), "{image:?}");
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_image() {
        let disk = SimStorage::new(LEN);
        for round in 0..20_u8 {
            disk.write_at(&[round; 4096], u64::from(round % 7) * 2048)
                .unwrap();
        }
        for seed in 0..20 {
            assert_eq!(
                fills(&disk.crash(seed), 0, 64),
                fills(&disk.crash(seed), 0, 64)
            );
        }
        assert!(disk.images(1000).is_none(), "too many to list");
    }

    #[test]
    fn a_durable_write_saves_itself_and_nothing_else() {
        let disk = SimStorage::new(LEN);
        disk.write_at(&block(1), 0).unwrap();
        disk.write_durable_at(&block(2), 512).unwrap();
        let expected = [vec![0, 2], vec![1, 2]];
        assert_eq!(all_fills(&disk, 2), expected.into());
    }

    #[test]
    fn a_punch_is_volatile_until_the_next_flush() {
        let disk = SimStorage::new(LEN);
        disk.write_durable_at(&[1; 8192], 0).unwrap();
        disk.punch(0, 4096).unwrap();
        assert_eq!(fills(&disk, 0, 9), [0, 0, 0, 0, 0, 0, 0, 0, 1]);
        assert_eq!(disk.allocated().unwrap(), 4096);
        assert_eq!(fills(&disk.crash_all_lost(), 0, 8), [1; 8]);
        assert_eq!(all_fills(&disk, 8).len(), 256);
        disk.flush().unwrap();
        assert_eq!(fills(&disk.crash_all_lost(), 0, 8), [0; 8]);
    }

    #[test]
    fn a_punch_of_unflushed_data_may_bring_back_every_older_version() {
        let disk = SimStorage::new(LEN);
        disk.write_durable_at(&block(1), 0).unwrap();
        disk.write_at(&block(2), 0).unwrap();
        disk.punch(0, 4096).unwrap();
        assert_eq!(all_fills(&disk, 1), [vec![0], vec![1], vec![2]].into());
    }

    #[test]
    fn a_length_is_volatile_until_flushed_or_written_durably() {
        let disk = SimStorage::new(4096);
        disk.set_len(8192).unwrap();
        let lens = |disk: &SimStorage| -> BTreeSet<u64> {
            let images = disk.images(1000).unwrap();
            images.map(|image| image.len().unwrap()).collect()
        };
        assert_eq!(lens(&disk), [4096, 8192].into());
        disk.write_durable_at(&block(1), 7680).unwrap();
        assert_eq!(lens(&disk), [8192].into());
        disk.set_len(0).unwrap();
        assert_eq!(lens(&disk), [0, 8192].into());
        assert_eq!(disk.crash_all_lost().len().unwrap(), 8192);
        assert_eq!(fills(&disk.crash_all_lost(), 7680, 1), [1]);
        disk.flush().unwrap();
        assert_eq!(lens(&disk), [0].into());
        disk.set_len(8192).unwrap();
        assert_eq!(fills(&disk, 7680, 1), [0]);
    }

    #[test]
    fn a_failed_flush_loses_what_it_was_to_save_even_if_tried_again() {
        let disk = SimStorage::new(LEN);
        disk.write_at(&block(1), 0).unwrap();
        disk.fail(Op::Flush, 0, EIO);
        assert_eq!(disk.flush().unwrap_err().raw_os_error(), Some(EIO));
        disk.write_at(&block(2), 512).unwrap();
        disk.flush().unwrap();
        assert_eq!(all_fills(&disk, 2), [vec![0, 2], vec![1, 2]].into());
        disk.write_at(&block(3), 0).unwrap();
        disk.flush().unwrap();
        assert_eq!(all_fills(&disk, 2), [vec![3, 2]].into());
    }

    #[test]
    fn the_nth_operation_fails_and_no_other() {
        let disk = SimStorage::new(LEN);
        disk.write_at(&block(1), 0).unwrap();
        disk.fail(Op::Write, 1, EIO);
        disk.fail(Op::Read, 0, EIO);
        assert_eq!(
            disk.read_at(&mut block(0), 0).unwrap_err().raw_os_error(),
            Some(EIO)
        );
        disk.write_at(&block(2), 0).unwrap();
        let failed = disk.write_at(&[3; 512 * 64], 0).unwrap_err();
        assert_eq!(failed.raw_os_error(), Some(EIO));
        let after = fills(&disk, 0, 64);
        assert!(
            after.contains(&3) && !after.iter().all(|fill| *fill == 3),
            "half done: {after:?}"
        );
        disk.write_at(&block(4), 0).unwrap();
        let counters = disk.counters();
        assert_eq!(
            (counters.reads, counters.writes, counters.changes()),
            (2, 4, 4)
        );
    }

    #[test]
    fn a_failed_durable_write_is_not_saved_by_a_flush() {
        let disk = SimStorage::new(LEN);
        disk.reseed(1);
        disk.fail(Op::WriteDurable, 0, EIO);
        assert!(disk.write_durable_at(&[1; 2048], 0).is_err());
        disk.flush().unwrap();
        assert!(disk.dirty_blocks() > 0);
        assert_eq!(fills(&disk.crash_all_lost(), 0, 4), [0; 4]);
    }

    #[test]
    fn space_runs_out_and_comes_back_by_punching() {
        let disk = SimStorage::new(LEN);
        disk.set_capacity(8192);
        disk.write_at(&[1; 8192], 4096).unwrap();
        let full = disk.write_at(&block(2), 0).unwrap_err();
        assert_eq!(full.kind(), ErrorKind::StorageFull);
        assert_eq!(
            disk.allocate(0, 4096).unwrap_err().kind(),
            ErrorKind::StorageFull
        );
        disk.write_at(&block(2), 4096).unwrap();
        disk.punch(8192, 4096).unwrap();
        disk.write_at(&block(2), 0).unwrap();
        assert_eq!(fills(&disk, 0, 1), [2]);
    }

    #[test]
    fn a_power_cut_leaves_the_operation_in_flight_in_any_state() {
        let disk = SimStorage::new(LEN);
        disk.write_durable_at(&[1; 1024], 0).unwrap();
        disk.cut_power_at(1);
        disk.flush().unwrap();
        assert!(disk.write_durable_at(&[2; 1024], 0).is_err());
        assert!(disk.is_off());
        assert!(disk.read_at(&mut block(0), 0).is_err());
        assert!(disk.flush().is_err());
        assert_eq!(
            disk.counters().changes(),
            3,
            "nothing is counted with the power off"
        );
        let expected = [vec![1, 1], vec![1, 2], vec![2, 1], vec![2, 2]];
        assert_eq!(all_fills(&disk, 2), expected.into());
        let reborn = disk.crash_all_lost();
        reborn.write_at(&block(5), 0).unwrap();
        assert_eq!(fills(&reborn, 0, 2), [5, 1]);
    }

    #[test]
    fn a_killed_process_leaves_what_is_not_durable_in_the_cache() {
        let disk = SimStorage::new(LEN);
        disk.write_at(&block(1), 0).unwrap();
        disk.cut_power_at(0);
        assert!(disk.write_durable_at(&block(2), 512).is_err());
        let next = disk.kill();
        assert_eq!(fills(&next, 0, 2), [1, 2], "the cache has it all");
        assert_eq!(fills(&next.crash_all_lost(), 0, 2), [0, 0]);
        next.flush().unwrap();
        assert_eq!(fills(&next.crash_all_lost(), 0, 2), [1, 2]);
    }

    #[test]
    fn a_cut_during_a_flush_saves_nothing_for_sure() {
        let disk = SimStorage::new(LEN);
        disk.write_at(&block(1), 0).unwrap();
        disk.cut_power_at(0);
        assert!(disk.flush().is_err());
        assert_eq!(all_fills(&disk, 1), [vec![0], vec![1]].into());
    }

    #[test]
    fn a_huge_empty_disk_costs_what_was_written() {
        let disk = SimStorage::new(1 << 50);
        disk.write_at(&block(1), (1 << 49) + 512).unwrap();
        disk.punch(0, 1 << 50).unwrap();
        disk.write_at(&block(2), 1 << 49).unwrap();
        assert_eq!(disk.allocated().unwrap(), 4096);
        assert_eq!(
            disk.next_data(0).unwrap(),
            Some((1 << 49, (1 << 49) + 4096))
        );
        assert_eq!(disk.next_data((1 << 49) + 4096).unwrap(), None);
    }

    /// The contract once more, as plainly as can be: for each block, what a crash may leave.
    struct Allowed(Vec<Vec<Vec<u8>>>);

    impl Allowed {
        fn change(&mut self, offset: usize, bytes: &[u8], is_durable: bool) {
            for block in offset / 512..(offset + bytes.len()).div_ceil(512) {
                let versions = &mut self.0[block];
                let mut next = versions.last().unwrap().clone();
                for (at, slot) in next.iter_mut().enumerate() {
                    let byte = (block * 512 + at).checked_sub(offset);
                    if let Some(byte) = byte.and_then(|byte| bytes.get(byte)) {
                        *slot = *byte;
                    }
                }
                versions.push(next);
                if is_durable {
                    versions.drain(..versions.len() - 1);
                }
            }
        }

        fn check(&self, image: &SimStorage, when: &str) {
            for (number, versions) in self.0.iter().enumerate() {
                let mut found = vec![0; 512];
                image.read_at(&mut found, number as u64 * 512).unwrap();
                assert!(versions.contains(&found), "{when}: block {number}");
            }
        }
    }

    #[test]
    fn every_image_is_one_the_contract_allows() {
        let seed = u64::from(std::process::id());
        eprintln!("seed {seed}");
        let mut rng = Rng(seed);
        for life in 0..40 {
            let size = 32 * 512;
            let disk = SimStorage::new(size as u64);
            let mut allowed = Allowed(vec![vec![vec![0; 512]]; 32]);
            for step in 0..40_u8 {
                let offset = rng.below(size);
                let len = (1 + rng.below(3000)).min(size - offset);
                let (at, bytes) = (offset as u64, vec![step + 1; len]);
                match rng.below(8) {
                    0 => {
                        disk.write_durable_at(&bytes, at).unwrap();
                        allowed.change(offset, &bytes, true);
                    }
                    1 => {
                        disk.punch(at, len as u64).unwrap();
                        allowed.change(offset, &vec![0; len], false);
                    }
                    2 => {
                        disk.flush().unwrap();
                        for versions in &mut allowed.0 {
                            versions.drain(..versions.len() - 1);
                        }
                    }
                    _ => {
                        disk.write_at(&bytes, at).unwrap();
                        allowed.change(offset, &bytes, false);
                    }
                }
                let when = format!("seed {seed} life {life} step {step}");
                allowed.check(&disk.crash(rng.next()), &when);
                allowed.check(&disk.crash_all_lost(), &when);
                allowed.check(&disk.crash_all_kept(), &when);
            }
        }
    }
}
