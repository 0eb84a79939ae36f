//! Surviving guest memory that is taken away: SIGBUS on a registered mapping costs its session,
//! not the process.
//!
//! A client may shrink the file behind its memory after we mapped it (unless the file could be
//! sealed); the next touch beyond the end raises SIGBUS on the thread that touched. The handler
//! puts zero pages of our own in place of the whole mapping, marks it lost, and returns: the touch
//! is repeated and finds zeros. Whoever works on that memory learns of it from [`losses`] and
//! [`Registration::is_lost`], and ends the session. System calls on such memory never come here:
//! they fail with EFAULT.
//!
//! The whole mapping, not only what lies beyond the fault: it needs no page size (huge pages can
//! only be replaced whole), and no further mapping, of which a process has a limited number.
//!
//! The handler runs at any instruction of any thread, so all it uses is atomics and three system
//! calls (signal-safety(7); Linux has mmap(2) as a plain system call).
#![expect(unsafe_code, reason = "signal handlers")]

use std::io;

use nix::errno::Errno;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, raise, sigaction};

use crate::sync::OnceLock;
use crate::sync::global::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

/// Most mappings at once: about what `vm.max_map_count` grants a process by default.
const SLOTS_MAX: usize = 65536;

/// One registered mapping.
///
/// # Invariants
/// `start` and `len` change only while `version` is odd, and only by the owner of `is_taken`.
#[derive(Debug)]
struct Slot {
    is_taken: AtomicBool,
    is_lost: AtomicBool,
    version: AtomicUsize,
    start: AtomicUsize,
    len: AtomicUsize,
}

impl Slot {
    const fn new() -> Self {
        Self {
            is_taken: AtomicBool::new(false),
            is_lost: AtomicBool::new(false),
            version: AtomicUsize::new(0),
            start: AtomicUsize::new(0),
            len: AtomicUsize::new(0),
        }
    }

    fn set(&self, start: usize, len: usize) {
        self.version.fetch_add(1, Ordering::SeqCst);
        self.start.store(start, Ordering::SeqCst);
        self.len.store(len, Ordering::SeqCst);
        self.version.fetch_add(1, Ordering::SeqCst);
    }

    /// Start and length, or `None` if they are just being changed.
    fn get(&self) -> Option<(usize, usize)> {
        let version = self.version.load(Ordering::SeqCst);
        let span = (
            self.start.load(Ordering::SeqCst),
            self.len.load(Ordering::SeqCst),
        );
        let is_stable = version.is_multiple_of(2) && self.version.load(Ordering::SeqCst) == version;
        is_stable.then_some(span)
    }
}

static SLOTS: [Slot; SLOTS_MAX] = [const { Slot::new() }; SLOTS_MAX];
/// Slots from this one on were never taken.
static SLOTS_USED: AtomicUsize = AtomicUsize::new(0);
/// Slots that are taken.
static IN_USE: AtomicUsize = AtomicUsize::new(0);
static LOSSES: AtomicU64 = AtomicU64::new(0);
/// Whether the handler is installed, or why not.
static INSTALLED: OnceLock<Result<(), Errno>> = OnceLock::new();

/// Mappings lost since the process began. When it differs from what it was, somebody's
/// [`Registration::is_lost`] has become true.
#[must_use]
pub fn losses() -> u64 {
    LOSSES.load(Ordering::Acquire)
}

/// Whether more than half of all mappings that there may be are registered.
pub(super) fn is_crowded() -> bool {
    IN_USE.load(Ordering::Relaxed) > SLOTS_MAX / 2
}

/// A mapping whose loss is survived while this lives. To be dropped before it is unmapped.
#[derive(Debug)]
pub(super) struct Registration(&'static Slot);

impl Registration {
    /// Registers the `len` bytes mapped at `start`. The first call installs the handler for the
    /// whole process.
    ///
    /// # Safety
    /// From `start` for `len` bytes, both multiples of the page size of the mapping, there must be
    /// a mapping of the caller's that stays until this is dropped, and whose contents may become
    /// zeros at any time: nobody may hold a reference into it.
    ///
    /// # Errors
    /// `QuotaExceeded` if [`SLOTS_MAX`] mappings are registered; otherwise as sigaction(2).
    pub(super) unsafe fn new(start: usize, len: usize) -> io::Result<Self> {
        (*INSTALLED.get_or_init(install))?;
        let free = SLOTS.iter().enumerate().find(|(_, slot)| {
            !slot.is_taken.load(Ordering::Relaxed) && !slot.is_taken.swap(true, Ordering::SeqCst)
        });
        let (index, slot) = free.ok_or_else(|| {
            let what = format!("more than {SLOTS_MAX} regions of guest memory");
            io::Error::new(io::ErrorKind::QuotaExceeded, what)
        })?;
        IN_USE.fetch_add(1, Ordering::Relaxed);
        SLOTS_USED.fetch_max(index + 1, Ordering::SeqCst);
        slot.is_lost.store(false, Ordering::SeqCst);
        slot.set(start, len);
        Ok(Self(slot))
    }

    /// Whether the mapping was replaced by zeros.
    pub(super) fn is_lost(&self) -> bool {
        self.0.is_lost.load(Ordering::SeqCst)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.0.set(0, 0);
        self.0.is_taken.store(false, Ordering::SeqCst);
        IN_USE.fetch_sub(1, Ordering::Relaxed);
    }
}

fn install() -> Result<(), Errno> {
    // On the alternate stack, which the threads of std have: a thread may be short of its own.
    let flags = SaFlags::SA_SIGINFO | SaFlags::SA_ONSTACK;
    let action = SigAction::new(SigHandler::SigAction(handle), flags, SigSet::empty());
    // SAFETY: `handle` does only what signal-safety(7) allows, and has the signature that
    // SA_SIGINFO asks for (sigaction(2)).
    unsafe { sigaction(Signal::SIGBUS, &action) }.map(drop)
}

extern "C" fn handle(
    _signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    // SAFETY: with SA_SIGINFO the kernel passes a valid siginfo_t that is this call's own
    // (sigaction(2)).
    let info = unsafe { info.as_ref() };
    let is_saved = info
        .filter(|info| info.si_code == libc::BUS_ADRERR)
        .is_some_and(|info| {
            // SAFETY: SIGBUS with a code of the kernel's carries an address (sigaction(2)).
            let at = unsafe { info.si_addr() };
            replace(at.addr())
        });
    if !is_saved {
        give_way();
    }
}

/// Puts zeros in place of the mapping that holds `at`; `false` if none was registered.
fn replace(at: usize) -> bool {
    let used = SLOTS_USED.load(Ordering::SeqCst);
    // The thread that touched `at` keeps its mapping alive, so that slot is not being changed; any
    // other slot, stable or not, does not hold `at`.
    let found = SLOTS.iter().take(used).find_map(|slot| {
        let (start, len) = slot.get()?;
        (at.checked_sub(start)? < len).then_some((slot, start, len))
    });
    let Some((slot, start, len)) = found else {
        return false;
    };
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    let address = std::ptr::without_provenance_mut(start);
    // SAFETY: MAP_FIXED replaces exactly the mapping that was registered as (start, len), whose
    // owner agreed to find zeros in it and still holds it: the faulting thread is using it. Two
    // threads may both do this; the second finds nothing but zeros to replace.
    let mapped = unsafe { libc::mmap(address, len, protection, flags, -1, 0) };
    if mapped == libc::MAP_FAILED {
        return false;
    }
    slot.is_lost.store(true, Ordering::SeqCst);
    LOSSES.fetch_add(1, Ordering::SeqCst);
    true
}

/// None of ours: the default action, the end of the process, takes it from here.
fn give_way() {
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    // Neither call can fail for a signal that exists, and a panic would not be safe here.
    // SAFETY: the default action runs no code of ours (sigaction(2)).
    let _former = unsafe { sigaction(Signal::SIGBUS, &default) };
    // Blocked until the handler returns. Without it a signal that was sent by a process, not
    // raised by a touch, would be lost.
    let _raised = raise(Signal::SIGBUS);
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use nix::sys::memfd::{MFdFlags, memfd_create};
    use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

    use super::*;
    use crate::sys::mmap::{GuestMemory, Region};

    const LEN: u64 = 1 << 20;
    /// Tells a child what to die of.
    const DEATH: &str = "TIDEPOOL_TEST_DEATH";

    fn memfd(flags: MFdFlags) -> File {
        let file = File::from(memfd_create("guest", flags).expect("memfd"));
        file.set_len(LEN).expect("set_len");
        file
    }

    fn share(file: &File) -> GuestMemory {
        let file = file.try_clone().expect("dup");
        let region = Region::map(file, 0, LEN, 0, 0).expect("mapped");
        GuestMemory::new(vec![region]).expect("memory")
    }

    fn byte(memory: &GuestMemory, gpa: u64) -> u8 {
        let mut bytes = [0xAA];
        memory.read(&memory.contiguous(gpa, 1).expect("in memory"), &mut bytes);
        bytes[0]
    }

    #[test]
    fn memory_that_is_gone_reads_as_zeros_and_is_lost_alone() {
        let before = losses();
        let (gone, kept) = (memfd(MFdFlags::empty()), memfd(MFdFlags::empty()));
        let (memory, other) = (share(&gone), share(&kept));
        for memory in [&memory, &other] {
            let run = memory.contiguous(LEN - 1, 1).expect("in memory");
            assert_eq!(memory.write(&run, &[7]), 1);
        }
        gone.set_len(LEN / 2).expect("truncate");
        assert!(!memory.is_lost());
        assert_eq!(byte(&memory, LEN - 1), 0);
        assert!(memory.is_lost());
        assert!(!other.is_lost());
        assert_eq!(byte(&other, LEN - 1), 7);
        assert!(losses() > before);
        // Written to as well, and taken by the slot's next user without its past.
        let run = memory.contiguous(LEN - 1, 1).expect("in memory");
        assert_eq!(memory.write(&run, &[9]), 1);
        drop(memory);
        let again = share(&kept);
        assert!(!again.is_lost());
        assert_eq!(byte(&again, LEN - 1), 7);
    }

    #[test]
    fn a_part_of_a_huge_page_is_replaced_with_the_rest_of_it() {
        // Needs no huge page of the system: none is ever touched while it is there.
        let huge = memfd_create("huge", MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB);
        let file = File::from(huge.expect("memfd"));
        file.set_len(4 << 20).expect("set_len");
        let shared = file.try_clone().expect("dup");
        let region = Region::map(shared, 0, LEN, 0, (2 << 20) + LEN / 2).expect("mapped");
        let memory = GuestMemory::new(vec![region]).expect("memory");
        file.set_len(0).expect("truncate");
        assert_eq!(byte(&memory, LEN - 1), 0);
        assert!(memory.is_lost());
    }

    #[test]
    fn threads_may_find_the_loss_together() {
        for _ in 0..50 {
            let file = memfd(MFdFlags::empty());
            let memory = share(&file);
            file.set_len(0).expect("truncate");
            std::thread::scope(|scope| {
                for thread in 0..4 {
                    let memory = &memory;
                    scope.spawn(move || {
                        for page in 0..LEN / 4096 {
                            assert_eq!(byte(memory, page * 4096 + thread), 0);
                        }
                    });
                }
            });
            assert!(memory.is_lost());
        }
    }

    #[test]
    fn a_file_that_can_be_sealed_cannot_be_shrunk() {
        let file = memfd(MFdFlags::MFD_ALLOW_SEALING);
        let memory = share(&file);
        file.set_len(0).expect_err("sealed");
        assert_eq!(byte(&memory, LEN - 1), 0);
        assert!(!memory.is_lost());
    }

    /// Runs in a child, which does not come back.
    fn die(how: &str) {
        let file = memfd(MFdFlags::empty());
        let memory = share(&file);
        assert_eq!(byte(&memory, 0), 0);
        if how == "sent" {
            raise(Signal::SIGBUS).expect("raise");
            panic!("outlived a signal that was sent");
        }
        let map = MmapRegion::<()>::from_file(FileOffset::new(file, 0), 4096).expect("mmap");
        map.file_offset()
            .expect("a file")
            .file()
            .set_len(0)
            .expect("truncate");
        let read: u8 = map
            .get_slice(0, 1)
            .expect("in it")
            .read_obj(0)
            .expect("read");
        panic!("read {read} beyond the end of a file");
    }

    #[test]
    fn a_fault_elsewhere_ends_the_process_as_ever() {
        const ME: &str = "sys::sigbus::tests::a_fault_elsewhere_ends_the_process_as_ever";
        if let Ok(how) = std::env::var(DEATH) {
            die(&how);
        }
        for how in ["touched", "sent"] {
            let mut child = Command::new(std::env::current_exe().expect("this test"));
            child.args(["--exact", ME]).env(DEATH, how);
            let output = child.output().expect("a child");
            assert_eq!(output.status.signal(), Some(libc::SIGBUS), "{how}");
        }
    }
}
