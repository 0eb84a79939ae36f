//! Every moment of a recording as a crash: the store as it may be found then, opened, checked,
//! and compared with what the guest had been told.

use super::log::{Recording, Tag};
use super::oracle::{Notes, Oracle};
use super::{machine, recover};
use crate::random::Random;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use tidepool::cowdisk::Disk;
use tidepool::pool::check::check;
use tidepool::pool::{OpenOptions, Pool, Return};
use tidepool::storage::{SimStorage, Storage};
use tidepool::sync::{Mutex, spawn_named};

/// The guest's disk, and what it was forked from.
pub(crate) const DISK: &str = "data";
pub(crate) const BASE: &str = "base";

const THREADS: u64 = 2;
/// One image in so many has its base compared too, and one is closed and checked once more.
const EXTRAS: u64 = 8;

/// How much of a recording to look at.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    /// Crash images.
    pub(crate) images: u64,
    /// Of these, how many are given to the guest's file system to recover.
    pub(crate) recoveries: u64,
    pub(crate) seed: u64,
    /// The store says that it flushed and does not: to see that this would be noticed.
    pub(crate) is_lying: bool,
}

/// What was looked at.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Counts {
    /// Moments right before and after a flush or durable write of the store, and right after a
    /// flush of the disk was acknowledged.
    pub(crate) boundaries: u64,
    /// Of these, with an image.
    pub(crate) boundaries_seen: u64,
    pub(crate) images: u64,
    /// Images with more than one version of some block to choose from.
    pub(crate) torn: u64,
    /// Images where writes were in flight.
    pub(crate) in_flight: u64,
    /// Flushes acknowledged to the guest in the whole recording.
    pub(crate) flushes: u64,
    /// Images that the guest's file system recovered, and files found whole in them.
    pub(crate) recovered: u64,
    pub(crate) files: u64,
}

impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} images ({} with unflushed blocks, {} with writes in flight) at {} of {} boundaries and elsewhere; {} flushes acknowledged to the guest; {} file systems recovered with {} durable files",
            self.images,
            self.torn,
            self.in_flight,
            self.boundaries_seen,
            self.boundaries,
            self.flushes,
            self.recovered,
            self.files
        )
    }
}

/// One crash image, and what must be true of it.
struct Case {
    number: u64,
    name: String,
    image: SimStorage,
    oracle: Oracle,
    base: Arc<Oracle>,
    /// Set if the file system is to recover it, in the guest or on this host.
    recovery: Option<(Notes, bool)>,
}

/// Where and with what images are looked at.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) file_system: String,
    /// For files of ours.
    pub(crate) scratch: PathBuf,
    /// What guests boot from.
    pub(crate) guest: PathBuf,
}

/// The store, as far as the recording got.
struct Device {
    storage: SimStorage,
    is_lying: bool,
    /// Records of writes and punches without an answer, by number.
    in_flight: BTreeMap<u64, usize>,
}

impl Device {
    fn apply(&mut self, recording: &Recording, at: usize) {
        let record = &recording.records[at];
        match record.tag {
            Tag::StoreWrite | Tag::StoreDurable | Tag::StorePunch => {
                self.in_flight.insert(record.number, at);
            }
            Tag::StoreEnd => {
                let begun = self.in_flight.remove(&record.number).expect("it began");
                execute(&self.storage, recording, begun, self.is_lying);
            }
            Tag::StoreFlush if self.is_lying => {}
            Tag::StoreFlush => self.storage.flush().expect("no fault is planned"),
            Tag::StoreLen => self
                .storage
                .set_len(record.len)
                .expect("no fault is planned"),
            Tag::DiskWrite
            | Tag::DiskZero
            | Tag::DiskDiscard
            | Tag::DiskFlush
            | Tag::DiskEnd
            | Tag::Note => {}
        }
    }

    /// What a crash now leaves, as `random` has it.
    fn crash(&self, recording: &Recording, random: &mut Random) -> (SimStorage, &'static str) {
        let pick = random.below(8);
        let seed = random.next();
        let busy = (!self.in_flight.is_empty()).then(|| {
            let now = self.storage.kill();
            for begun in self.in_flight.values() {
                // in flight: not durable yet, whatever it is to be
                execute(&now, recording, *begun, true);
            }
            now
        });
        let now = busy.as_ref().unwrap_or(&self.storage);
        match pick {
            0 => (now.crash_all_lost(), "all lost"),
            1 => (now.crash_all_kept(), "all kept"),
            _ => (now.crash(seed), "some kept"),
        }
    }
}

/// Does what a record says; not durably if `is_volatile`.
fn execute(storage: &SimStorage, recording: &Recording, at: usize, is_volatile: bool) {
    let record = &recording.records[at];
    let payload = recording.payload(record);
    if record.tag == Tag::StorePunch {
        storage.punch(record.offset, record.len)
    } else if record.tag == Tag::StoreDurable && !is_volatile {
        storage.write_durable_at(payload, record.offset)
    } else {
        storage.write_at(payload, record.offset)
    }
    .expect("no fault is planned");
}

/// The moments worth a crash, in order: a moment is how many records have happened.
struct Moments {
    /// Right after something became durable, or was said to be.
    after: Vec<usize>,
    /// Right before: there is most to lose.
    before: Vec<usize>,
}

fn moments(recording: &Recording, from: usize) -> Moments {
    let mut durable = BTreeSet::new();
    let mut flushes = BTreeSet::new();
    let (mut after, mut before) = (Vec::new(), Vec::new());
    for (at, record) in recording.records.iter().enumerate().skip(from) {
        let is_ours = |numbers: &BTreeSet<u64>| numbers.contains(&record.number);
        if record.tag == Tag::StoreDurable {
            durable.insert(record.number);
        } else if record.tag == Tag::DiskFlush {
            flushes.insert(record.number);
        } else if record.tag == Tag::StoreFlush || record.tag == Tag::StoreEnd && is_ours(&durable)
        {
            before.push(at);
            after.push(at + 1);
        } else if record.tag == Tag::DiskEnd && is_ours(&flushes) {
            after.push(at + 1);
        }
    }
    Moments { after, before }
}

/// How many images at which moment: half of them right before something becomes durable, a quarter
/// right after, once each, the rest anywhere.
fn choose(plan: Plan, moments: &Moments, records: usize, from: usize) -> BTreeMap<usize, u64> {
    let mut random = Random(plan.seed);
    let mut chosen: BTreeMap<usize, u64> = BTreeMap::new();
    let mut left = plan.images;
    if plan.images / 4 >= moments.after.len() as u64 {
        chosen.extend(moments.after.iter().map(|at| (*at, 1)));
        left -= moments.after.len() as u64;
    } else {
        for _ in 0..plan.images / 4 {
            let at = moments.after[pick(&mut random, moments.after.len())];
            left -= u64::from(chosen.insert(at, 1).is_none());
        }
    }
    let anywhere = left / 3;
    left -= anywhere;
    let count = moments.before.len() as u64;
    for at in &moments.before {
        if left >= count {
            *chosen.entry(*at).or_default() += left / count;
        }
    }
    for _ in 0..left % count {
        let at = moments.before[pick(&mut random, moments.before.len())];
        *chosen.entry(at).or_default() += 1;
    }
    for _ in 0..anywhere {
        let at = from + pick(&mut random, records - from);
        *chosen.entry(at).or_default() += 1;
    }
    chosen
}

fn pick(random: &mut Random, count: usize) -> usize {
    usize::try_from(random.below(count as u64)).expect("fits")
}

fn open(image: SimStorage) -> Result<(Arc<dyn Storage>, Arc<Pool>), String> {
    let storage: Arc<dyn Storage> = Arc::new(image);
    let options = OpenOptions {
        returning: Return::Never,
        ..OpenOptions::default()
    };
    let pool = Pool::open(Arc::clone(&storage), &options).map_err(|e| format!("open: {e}"))?;
    Ok((storage, pool))
}

/// Shows `seen` all of a disk, part by part.
fn each_part(
    disk: &Disk,
    mut seen: impl FnMut(u64, &[u8]) -> Result<(), String>,
) -> Result<(), String> {
    let mut bytes = vec![0; 1 << 20];
    let mut at = 0;
    while at < disk.size() {
        let len = (bytes.len() as u64).min(disk.size() - at);
        let part = &mut bytes[..usize::try_from(len).expect("fits")];
        disk.read_at(part, at).map_err(|e| format!("read: {e}"))?;
        seen(at, part)?;
        at += len;
    }
    Ok(())
}

fn whole(pool: &Arc<Pool>, name: &str) -> Vec<u8> {
    let disk = Disk::open(pool, name).expect("the disk is there");
    let mut bytes = Vec::new();
    each_part(&disk, |_, part| {
        bytes.extend_from_slice(part);
        Ok(())
    })
    .expect("it can be read");
    bytes
}

fn check_image(image: &dyn Storage) -> Result<(), String> {
    let report = check(image).map_err(|e| format!("check: {e}"))?;
    match report.faults.first() {
        None => Ok(()),
        Some(fault) => Err(format!("check: {}", fault.what)),
    }
}

/// Files that were found whole, if the file system was to recover.
fn verify(case: Case, place: &Place) -> Result<Option<u64>, String> {
    check_image(&case.image)?;
    let (storage, pool) = open(case.image)?;
    let disk = Disk::open(&pool, DISK).map_err(|e| format!("disk: {e}"))?;
    let file = place.scratch.join(format!("image-{}", case.number));
    let mut copy = match case.recovery {
        Some(_) => Some(recover::Copy::create(&file, disk.size())?),
        None => None,
    };
    each_part(&disk, |at, part| {
        case.oracle.compare(at, part)?;
        copy.as_mut().map_or(Ok(()), |copy| copy.add(at, part))
    })?;
    if case.number.is_multiple_of(EXTRAS) {
        let base = Disk::open(&pool, BASE).map_err(|e| format!("base: {e}"))?;
        each_part(&base, |at, part| case.base.compare(at, part))
            .map_err(|e| format!("base: {e}"))?;
    }
    drop(disk);
    if case.number % EXTRAS == 1 {
        pool.close().map_err(|e| format!("close: {e}"))?;
        drop(pool);
        check_image(&*storage).map_err(|e| format!("closed again: {e}"))?;
    }
    let Some((notes, is_guest)) = case.recovery else {
        return Ok(None);
    };
    drop(copy);
    let found = if is_guest {
        machine::recover(place, &file, &notes)?
    } else {
        let at = place.scratch.join("mnt");
        recover::recover(&place.file_system, &file, &at, &notes)?
    };
    std::fs::remove_file(&file).map_err(|e| e.to_string())?;
    Ok(Some(found))
}

/// Those who verify cases while more are made.
struct Team {
    sender: SyncSender<Case>,
    threads: Vec<JoinHandle<Counts>>,
    faults: Arc<Mutex<Vec<String>>>,
}

impl Team {
    fn start(place: &Place) -> Self {
        let faults = Arc::new(Mutex::new(Vec::new()));
        let (sender, receiver) = sync_channel(2);
        let receiver = Arc::new(Mutex::new(receiver));
        let start = |number| {
            let (receiver, faults) = (Arc::clone(&receiver), Arc::clone(&faults));
            let place = place.clone();
            let body = move || work(&receiver, &place, &faults);
            spawn_named(&format!("verify{number}"), body).expect("a thread")
        };
        Self {
            sender,
            threads: (0..THREADS).map(start).collect(),
            faults,
        }
    }

    /// Adds what they counted; what they found wrong.
    fn finish(self, counts: &mut Counts) -> Vec<String> {
        drop(self.sender);
        let mut verified = 0;
        for thread in self.threads {
            let theirs = thread.join().expect("a verifier does not panic");
            verified += theirs.images;
            counts.recovered += theirs.recovered;
            counts.files += theirs.files;
        }
        assert_eq!(verified, counts.images, "every image was verified");
        std::mem::take(&mut *self.faults.lock())
    }
}

/// Verifies cases until there are no more; what went well is counted, what did not is listed.
fn work(cases: &Mutex<Receiver<Case>>, place: &Place, faults: &Mutex<Vec<String>>) -> Counts {
    let mut counts = Counts::default();
    loop {
        let case = cases.lock().recv();
        let Ok(case) = case else {
            return counts;
        };
        let name = case.name.clone();
        counts.images += 1;
        match verify(case, place) {
            Ok(None) => {}
            Ok(Some(files)) => {
                counts.recovered += 1;
                counts.files += files;
            }
            Err(e) => faults.lock().push(format!("{name}: {e}")),
        }
    }
}

/// Where the recording has got to.
struct Player<'a> {
    recording: &'a Recording,
    plan: Plan,
    device: Device,
    oracle: Oracle,
    base: Arc<Oracle>,
    notes: Notes,
    random: Random,
    counts: Counts,
    /// Recoveries, in parts of an image, that are to be made; and those that were asked for.
    due: u64,
    asked: u64,
}

impl<'a> Player<'a> {
    /// The recording's beginning, `from` records long: what the store held.
    fn new(recording: &'a Recording, plan: Plan, from: usize) -> Self {
        let mut device = Device {
            storage: SimStorage::new(0),
            is_lying: false,
            in_flight: BTreeMap::new(),
        };
        for at in 0..from {
            device.apply(recording, at);
        }
        device.is_lying = plan.is_lying;
        let (_, pool) = open(device.storage.kill()).expect("the pool was well");
        Self {
            recording,
            plan,
            device,
            oracle: Oracle::new(&whole(&pool, DISK)),
            base: Arc::new(Oracle::new(&whole(&pool, BASE))),
            notes: Notes::default(),
            random: Random(plan.seed ^ 0x7265_706c_6179),
            counts: Counts::default(),
            due: 0,
            asked: 0,
        }
    }

    /// One crash now.
    fn crash(&mut self, at: usize) -> Case {
        let counts = &mut self.counts;
        counts.images += 1;
        counts.torn += u64::from(self.device.storage.dirty_blocks() > 0);
        counts.in_flight += u64::from(!self.device.in_flight.is_empty());
        let (image, how) = self.device.crash(self.recording, &mut self.random);
        self.due += self.plan.recoveries;
        let is_due = self.due >= self.plan.images && self.notes.is_made;
        let mut recovery = None;
        if is_due {
            self.due -= self.plan.images;
            self.asked += 1;
            // one of them, in the midst of it, is for the guest itself
            let is_guest = self.asked == self.plan.recoveries.div_ceil(2);
            recovery = Some((self.notes.clone(), is_guest));
        }
        let (number, count) = (counts.images, self.recording.records.len());
        Case {
            number,
            name: format!("image {number} after record {at} of {count}, {how}"),
            image,
            oracle: self.oracle.clone(),
            base: Arc::clone(&self.base),
            recovery,
        }
    }

    /// The next thing happens.
    fn step(&mut self, at: usize) {
        let record = &self.recording.records[at];
        let payload = self.recording.payload(record);
        self.device.apply(self.recording, at);
        self.oracle.apply(record, payload);
        if record.tag == Tag::Note {
            self.notes
                .apply(std::str::from_utf8(payload).expect("text"));
        }
    }
}

/// Replays a recording as `plan` says.
///
/// # Errors
/// What was wrong with which images.
pub(crate) fn replay(
    recording: &Recording,
    plan: Plan,
    place: &Place,
) -> Result<Counts, Vec<String>> {
    let records = recording.records.len();
    let mut tags = recording.records.iter().map(|record| record.tag);
    let from = tags.position(|tag| tag == Tag::StoreFlush);
    let from = from.expect("a recording begins with what was there") + 1;
    let mut player = Player::new(recording, plan, from);
    let moments = moments(recording, from);
    let chosen = choose(plan, &moments, records, from);
    let all = moments.after.iter().chain(&moments.before);
    let all: BTreeSet<usize> = all.copied().collect();
    player.counts.boundaries = all.len() as u64;
    player.counts.boundaries_seen = all.iter().filter(|at| chosen.contains_key(at)).count() as u64;
    let team = Team::start(place);
    for at in from..=records {
        for _ in 0..chosen.get(&at).copied().unwrap_or(0) {
            let case = player.crash(at);
            team.sender.send(case).expect("they wait for it");
        }
        if at < records {
            player.step(at);
        }
    }
    let mut counts = player.counts;
    counts.flushes = player.oracle.flushed;
    let faults = team.finish(&mut counts);
    if faults.is_empty() {
        Ok(counts)
    } else {
        Err(faults)
    }
}
