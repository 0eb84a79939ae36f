//! One suite over every implementation of [`Storage`]: what the contract promises while the power
//! stays on. (What it promises after a crash only `storage::sim` can show.)
//!
//! Method: each case works on a fresh store and compares it with a plain vector of bytes. A store
//! that this machine cannot make is skipped, and the reason printed.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::process::Command;

use super::loop_device::Loop;
use super::medium::Rng;
use super::{
    Access, AlignedBuf, BLOCK, Caching, FileStorage, OpenError, SimStorage, Storage, Tier,
};
use crate::sync::spawn_named;
use crate::sys::{clock, file as sys};

/// Over twice the bounce buffer, and not a multiple of a page.
const LEN: usize = (2 << 20) + 512 * 9;

/// A device ends with a whole sector of its own size, which may be 4096 bytes.
const DEVICE_LEN: usize = (2 << 20) + 4096 * 3;

/// A store under test and what may be asked of it.
struct Subject {
    name: &'static str,
    store: Box<dyn Storage>,
    len: usize,
    /// Ranges of this alignment read as zeros after a punch.
    punch_unit: usize,
    is_resizable: bool,
}

impl Subject {
    fn flat(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        self.store.read_at(&mut bytes, 0).unwrap();
        bytes
    }
}

/// Panics naming the first byte that differs, instead of printing megabytes.
fn assert_same(found: &[u8], expected: &[u8], when: &str) {
    assert_eq!(found.len(), expected.len(), "{when}");
    let differs = (0..found.len()).find(|at| found[*at] != expected[*at]);
    if let Some(at) = differs {
        let (found, expected) = (found[at], expected[at]);
        panic!("{when}: byte {at} is {found}, expected {expected}");
    }
}

fn noise(rng: &mut Rng, buf: &mut [u8]) {
    for byte in buf {
        *byte = rng.next().to_le_bytes()[0] | 1;
    }
}

/// Any offset and length, often on block bounds and often within one block.
fn range(rng: &mut Rng, size: usize) -> (usize, usize) {
    let unit = [1, 7, 512, 4096][rng.below(4)];
    let len = match rng.below(4) {
        0 => rng.below(600),
        1 => rng.below(20) * 512,
        2 => rng.below(70_000),
        _ => rng.below(size),
    };
    let offset = rng.below(size) / unit * unit;
    (offset, len.min(size - offset))
}

fn follows_a_flat_model(subject: &Subject) {
    let seed = u64::from(std::process::id());
    eprintln!("{}: seed {seed}", subject.name);
    let mut rng = Rng(seed);
    let mut model = vec![0; subject.len];
    let mut space = AlignedBuf::new(subject.len + 4096);
    for step in 0..150 {
        let (offset, len) = range(&mut rng, subject.len);
        // Buffers both aligned and not.
        let skew = [0, 0, 1, 512][rng.below(4)];
        let buf = &mut space[skew..skew + len];
        let at = offset as u64;
        let when = format!("{} seed {seed} step {step}", subject.name);
        match rng.below(8) {
            0..=2 => {
                noise(&mut rng, buf);
                subject.store.write_at(buf, at).expect(&when);
                model[offset..offset + len].copy_from_slice(buf);
            }
            3 => {
                noise(&mut rng, buf);
                subject.store.write_durable_at(buf, at).expect(&when);
                model[offset..offset + len].copy_from_slice(buf);
            }
            4 => {
                let start = offset.next_multiple_of(subject.punch_unit);
                let end = (offset + len) / subject.punch_unit * subject.punch_unit;
                if start < end {
                    let (start_byte, bytes) = (start as u64, (end - start) as u64);
                    subject.store.punch(start_byte, bytes).expect(&when);
                    model[start..end].fill(0);
                }
            }
            5 => subject.store.flush().expect(&when),
            _ => {
                subject.store.read_at(buf, at).expect(&when);
                assert_same(buf, &model[offset..offset + len], &when);
            }
        }
    }
    assert_same(&subject.flat(), &model, subject.name);
    holes_are_zeros(subject, &model);
}

fn holes_are_zeros(subject: &Subject, model: &[u8]) {
    let mut at = 0;
    while let Some((start, end)) = subject.store.next_data(at).unwrap() {
        assert!(
            start >= at && end > start && end <= subject.len as u64,
            "{start} {end}"
        );
        let hole = usize::try_from(at).unwrap()..usize::try_from(start).unwrap();
        assert!(
            model[hole].iter().all(|byte| *byte == 0),
            "{}",
            subject.name
        );
        at = end;
    }
    let rest = &model[usize::try_from(at).unwrap()..];
    assert!(rest.iter().all(|byte| *byte == 0), "{}", subject.name);
    assert_eq!(subject.store.next_data(subject.len as u64).unwrap(), None);
}

fn starts_as_zeros(subject: &Subject) {
    assert_eq!(subject.store.len().unwrap(), subject.len as u64);
    assert_same(&subject.flat(), &vec![0; subject.len], subject.name);
}

fn refuses_what_is_out_of_range(subject: &Subject) {
    let (store, len) = (&subject.store, subject.len as u64);
    let mut two = [0; 2];
    for offset in [len - 1, len, len + 4096, u64::MAX - 1, u64::MAX] {
        let read = store.read_at(&mut two, offset).unwrap_err();
        assert_eq!(read.kind(), ErrorKind::UnexpectedEof, "{offset}");
        for refused in [
            store.write_at(&two, offset),
            store.write_durable_at(&two, offset),
            store.punch(offset, 2),
            store.allocate(offset, 2),
        ] {
            assert_eq!(
                refused.unwrap_err().kind(),
                ErrorKind::InvalidInput,
                "{offset}"
            );
        }
    }
    assert_eq!(store.len().unwrap(), len);
    store.read_at(&mut [], len).unwrap();
    store.write_at(&[], len).unwrap();
    store.write_durable_at(&[], 3).unwrap();
    store.punch(len, 0).unwrap();
    store.allocate(7, 0).unwrap();
    assert_same(&subject.flat(), &vec![0; subject.len], subject.name);
}

fn gives_space_back(subject: &Subject) {
    let store = &subject.store;
    store.write_at(&vec![9; 1 << 20], 0).unwrap();
    store.flush().unwrap();
    let before = store.allocated().unwrap();
    assert!(before >= 1 << 20);
    store.punch(0, 1 << 19).unwrap();
    store.flush().unwrap();
    let after = store.allocated().unwrap();
    if subject.is_resizable {
        assert!(
            after + (1 << 19) <= before,
            "{}: {before} to {after}",
            subject.name
        );
    }
    let mut model = vec![0; subject.len];
    model[1 << 19..1 << 20].fill(9);
    assert_same(&subject.flat(), &model, subject.name);
    holes_are_zeros(subject, &model);
}

fn allocating_changes_nothing_but_the_space(subject: &Subject) {
    let store = &subject.store;
    store.write_at(&[9; 100], 5000).unwrap();
    store.allocate(0, subject.len as u64).unwrap();
    store.flush().unwrap();
    assert!(
        store.allocated().unwrap() >= subject.len as u64,
        "{}",
        subject.name
    );
    let mut model = vec![0; subject.len];
    model[5000..5100].fill(9);
    assert_same(&subject.flat(), &model, subject.name);
}

fn changes_its_length(subject: &Subject) {
    let (store, len) = (&subject.store, subject.len as u64);
    let odd = store.set_len(len + 1).unwrap_err();
    assert_eq!(odd.kind(), ErrorKind::InvalidInput);
    if !subject.is_resizable {
        let differs = store.set_len(len + BLOCK).unwrap_err();
        assert_eq!(differs.kind(), ErrorKind::Unsupported);
        store.set_len(len).unwrap();
        return;
    }
    store.write_at(&[9; 4096], len - 4096).unwrap();
    store.set_len(len + 3 * BLOCK).unwrap();
    assert_eq!(store.len().unwrap(), len + 3 * BLOCK);
    let mut tail = vec![1; 4096 + 3 * 512];
    store.read_at(&mut tail, len - 4096).unwrap();
    assert_eq!(
        (&tail[..4096], &tail[4096..]),
        (&[9; 4096][..], &[0; 1536][..])
    );
    store.write_at(&[8; 512], len).unwrap();
    store.set_len(len - 1024).unwrap();
    let beyond = store.read_at(&mut [0; 1], len - 1024).unwrap_err();
    assert_eq!(beyond.kind(), ErrorKind::UnexpectedEof);
    store.set_len(len + 3 * BLOCK).unwrap();
    store.flush().unwrap();
    store.read_at(&mut tail, len - 4096).unwrap();
    assert_eq!(
        (&tail[..3072], &tail[3072..]),
        (&[9; 3072][..], &[0; 2560][..])
    );
}

/// Writers of different bytes in one block do not overlap, so neither may undo the other.
fn neighbours_in_a_block_do_not_disturb_each_other(subject: &Subject) {
    let store = &subject.store;
    std::thread::scope(|scope| {
        for part in 0..4_u8 {
            scope.spawn(move || {
                for round in 1..=50_u8 {
                    let at = u64::from(part) * 300;
                    store.write_at(&[round ^ part; 300], at).unwrap();
                }
            });
        }
    });
    let mut found = [0; 1200];
    store.read_at(&mut found, 0).unwrap();
    let expected: Vec<u8> = (0..4_u8).flat_map(|part| [50 ^ part; 300]).collect();
    assert_same(&found, &expected, subject.name);
}

fn says_how_to_drive_it(subject: &Subject) {
    match subject.store.tier() {
        Tier::Direct { align } => {
            assert!(align.is_power_of_two() && u64::from(align) <= BLOCK);
            assert!(subject.store.as_fd().is_some());
        }
        Tier::Memory => assert!(subject.store.as_fd().is_some()),
        Tier::Buffered => {}
    }
}

/// Runs every case, each on a store that `make` makes anew.
fn run(mut make: impl FnMut() -> Subject) {
    let cases: [fn(&Subject); 8] = [
        starts_as_zeros,
        follows_a_flat_model,
        refuses_what_is_out_of_range,
        gives_space_back,
        allocating_changes_nothing_but_the_space,
        changes_its_length,
        neighbours_in_a_block_do_not_disturb_each_other,
        says_how_to_drive_it,
    ];
    for case in cases {
        case(&make());
    }
}

fn file_in(dir: &Path, name: &'static str, caching: Caching) -> Subject {
    let path = dir.join("store");
    if path.exists() {
        fs::remove_file(&path).unwrap();
    }
    Subject {
        name,
        store: Box::new(FileStorage::create_new_with(&path, LEN as u64, caching).unwrap()),
        len: LEN,
        punch_unit: 1,
        is_resizable: true,
    }
}

#[test]
fn sim_conforms() {
    run(|| Subject {
        name: "sim",
        store: Box::new(SimStorage::new(LEN as u64)),
        len: LEN,
        punch_unit: 1,
        is_resizable: true,
    });
}

/// /var/tmp outlives a reboot by the Filesystem Hierarchy Standard, so it is a real disk.
#[test]
fn file_on_disk_conforms() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let tier = file_in(dir.path(), "disk", Caching::Auto).store.tier();
    if !matches!(tier, Tier::Direct { .. }) {
        eprintln!("direct I/O not covered: /var/tmp is {tier:?} here");
    }
    run(|| file_in(dir.path(), "disk", Caching::Auto));
}

#[test]
fn file_through_the_page_cache_conforms() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    run(|| file_in(dir.path(), "page cache", Caching::Buffered));
}

#[test]
fn file_in_memory_conforms() {
    let dir = match tempfile::tempdir_in("/dev/shm") {
        Ok(dir) => dir,
        Err(error) => {
            eprintln!("skipped: no /dev/shm: {error}");
            return;
        }
    };
    let subject = file_in(dir.path(), "memory", Caching::Auto);
    assert_eq!(subject.store.tier(), Tier::Memory);
    drop(subject);
    run(|| file_in(dir.path(), "memory", Caching::Auto));
}

fn device_store(device: &Loop) -> FileStorage {
    at_last(|| FileStorage::create_new(&device.device, DEVICE_LEN as u64)).unwrap()
}

fn device_subject(device: &Loop, name: &'static str) -> Subject {
    let store = device_store(device);
    assert!(store.is_block_device());
    // A device keeps what it held, so a fresh start takes zeros; not by punch, which is
    // under test.
    store.write_at(&vec![0; DEVICE_LEN], 0).unwrap();
    Subject {
        name,
        store: Box::new(store),
        len: DEVICE_LEN,
        punch_unit: 4096,
        is_resizable: false,
    }
}

#[test]
fn block_devices_conform() {
    for (sector, tier) in [
        ("512", Tier::Direct { align: 512 }),
        ("4096", Tier::Buffered),
    ] {
        let device = match Loop::new(DEVICE_LEN, sector) {
            Ok(device) => device,
            Err(reason) => {
                eprintln!("skipped: no loop device with sectors of {sector}: {reason}");
                continue;
            }
        };
        let subject = device_subject(&device, "loop device");
        assert_eq!(subject.store.tier(), tier, "sectors of {sector}");
        drop(subject);
        run(|| device_subject(&device, "loop device"));
        claimed_or_too_small_is_refused(&device);
    }
}

/// Told as "no space", it was waited for, a minute for each request.
#[test]
fn a_device_that_was_made_smaller_is_no_full_one() {
    let device = match Loop::new(DEVICE_LEN, "512") {
        Ok(device) => device,
        Err(reason) => {
            eprintln!("skipped: no loop device: {reason}");
            return;
        }
    };
    let store = device_store(&device);
    let shrunk = Command::new("truncate")
        .args(["--size", &(DEVICE_LEN / 2).to_string()])
        .arg(device.dir.path().join("backing"))
        .status();
    assert!(shrunk.unwrap().success());
    let resized = Command::new("losetup")
        .arg("-c")
        .arg(&device.device)
        .status();
    assert!(resized.unwrap().success());
    store.write_at(&[1; 512], 0).unwrap();
    let last = DEVICE_LEN as u64 - 512;
    let ended = store.write_at(&[1; 512], last).unwrap_err();
    assert_ne!(ended.kind(), ErrorKind::StorageFull, "{ended}");
    assert!(
        ended.to_string().contains("bytes when it was opened"),
        "{ended}"
    );
    store.read_at(&mut [0; 512], last).unwrap_err();
    let full = ErrorKind::StorageFull.into();
    assert_ne!(store.failure(full).kind(), ErrorKind::StorageFull);
}

/// Opens what this process has closed. A child that another test starts has a copy of every lock until
/// it is another program.
pub(super) fn at_last(
    mut open: impl FnMut() -> Result<FileStorage, OpenError>,
) -> Result<FileStorage, OpenError> {
    let end = clock::now() + std::time::Duration::from_secs(30);
    loop {
        match open() {
            Err(OpenError::Locked { pid, .. })
                if pid != Some(std::process::id()) && clock::now() < end =>
            {
                std::thread::yield_now();
            }
            opened => return opened,
        }
    }
}

fn claimed_or_too_small_is_refused(device: &Loop) {
    let first = device_store(device);
    for refused in [
        FileStorage::open(&device.device, Access::ReadWrite),
        FileStorage::open(&device.device, Access::ReadOnly),
        FileStorage::create_new(&device.device, BLOCK),
    ] {
        assert!(
            matches!(refused, Err(OpenError::Locked { .. })),
            "{refused:?}"
        );
    }
    let refused = FileStorage::open(&device.device, Access::ReadWrite).unwrap_err();
    let holder = format!("process {}", std::process::id());
    assert!(refused.to_string().contains(&holder), "{refused}");
    drop(first);
    orphaned_claim_is_waited_for(device);
    let beyond = DEVICE_LEN as u64 + BLOCK;
    let beyond = at_last(|| FileStorage::create_new(&device.device, beyond)).unwrap_err();
    assert!(matches!(beyond, OpenError::Length { .. }), "{beyond}");
}

/// As after SIGKILL: nobody has locked the device, but the kernel has not let go of it. The same
/// is seen of `losetup --find`, which claims every device it tries for an instant.
fn orphaned_claim_is_waited_for(device: &Loop) {
    let orphan = sys::open(Path::new(&device.device), sys::Mode::ReadWrite).unwrap();
    let letting_go = spawn_named("orphan", move || {
        std::thread::sleep(std::time::Duration::from_millis(100));
        drop(orphan);
    });
    let opened = FileStorage::open(&device.device, Access::ReadWrite);
    assert!(opened.is_ok(), "{opened:?}");
    letting_go.unwrap().join().unwrap();
}
