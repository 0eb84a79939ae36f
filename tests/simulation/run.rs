//! Running a history against the real pool, and checking what a crash at every step of it leaves.

use crate::act::Act;
use crate::common;
use crate::oracle::{Model, SECTOR, fill};
use std::collections::HashSet;
use std::sync::Arc;
use tidepool::cowdisk::{self, Disk, DiskError, NewDisk, Pass, WritePlan};
use tidepool::pool::{Pool, PoolErrorKind, check};
use tidepool::storage::sim::Moment;
use tidepool::storage::{SimStorage, Storage};
use tidepool::sync::Mutex;
use tidepool::sys::clock;

/// Whole leaves that one bulk step unmaps: a batch of 256 KiB.
const BULK: u64 = 8000;
/// What every history takes for the time of day.
const SECONDS: u64 = 1_700_000_000;

/// How much is checked of every step.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Effort {
    /// Where a step can leave this many disks at most, all of them are checked.
    pub(crate) all: usize,
    /// Else the two extremes and this many others.
    pub(crate) seeds: u64,
    /// One step in so many is followed further: the opening is cut short as well, the process is
    /// killed instead, and the pool works on and crashes again.
    pub(crate) deep_in: u64,
}

/// What was checked.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Counts {
    pub(crate) histories: u64,
    /// Steps of the device at which the power was cut.
    pub(crate) steps: u64,
    /// Images that were opened by the pool, checked and compared with what they must hold.
    pub(crate) images: u64,
    /// Images that were the same as one checked before, with the same that they must hold: not
    /// counted above, and not checked again.
    pub(crate) repeated: u64,
}

impl Counts {
    pub(crate) fn add(&mut self, other: &Self) {
        self.histories += other.histories;
        self.steps += other.steps;
        self.images += other.images;
        self.repeated += other.repeated;
    }
}

/// What the crash checker knows of the moment.
pub(crate) struct Scene {
    effort: Effort,
    /// What the pool may be after a crash now.
    candidates: Vec<Model>,
    hash: u64,
    /// Steps are checked from here on.
    pub(crate) is_checking: bool,
    pub(crate) counts: Counts,
    seen: HashSet<u64>,
    /// What went wrong first.
    pub(crate) fault: Option<String>,
}

impl Scene {
    pub(crate) fn new(effort: Effort) -> Self {
        Self {
            effort,
            candidates: Vec::new(),
            hash: 0,
            is_checking: true,
            counts: Counts::default(),
            seen: HashSet::new(),
            fault: None,
        }
    }

    fn expect(&mut self, candidates: Vec<Model>) {
        let hashes = candidates.iter().map(Model::hash_of);
        self.hash = hashes.fold(1, |all, one| {
            (all ^ one).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        });
        self.candidates = candidates;
    }

    /// The device is in the middle of an operation.
    fn step(&mut self, moment: &Moment<'_>) {
        if !self.is_checking || self.fault.is_some() {
            return;
        }
        self.counts.steps += 1;
        let number = self.counts.steps;
        let crashes = moment.crashes(self.effort.all).unwrap_or_else(|| {
            let seeds = (0..self.effort.seeds).map(|n| moment.crash(number << 8 | n));
            let extremes = [moment.all_lost(), moment.all_kept()];
            extremes.into_iter().chain(seeds).collect()
        });
        for crash in crashes {
            if !self.seen.insert(crash.mark() ^ self.hash) {
                self.counts.repeated += 1;
                continue;
            }
            self.counts.images += 1;
            let image = moment.image(&crash);
            image.forget_versions();
            if let Err(fault) = check_image(&Arc::new(image), &self.candidates) {
                self.fault = Some(format!("step {number} ({:?}): {fault}", moment.op()));
                return;
            }
        }
        if number.is_multiple_of(self.effort.deep_in) {
            if let Err(fault) = self.go_deep(moment, number) {
                self.fault = Some(format!("step {number} ({:?}), {fault}", moment.op()));
            }
        }
    }

    /// Follows a step further.
    fn go_deep(&mut self, moment: &Moment<'_>, seed: u64) -> Result<(), String> {
        let image = || moment.image(&moment.crash(seed));
        let (candidates, counts) = (&self.candidates, &mut self.counts);
        cut_opening(&Arc::new(image()), candidates, true, counts)
            .map_err(|e| format!("opening cut short: {e}"))?;
        let killed = Arc::new(moment.kill());
        cut_opening(&killed, candidates, false, counts).map_err(|e| format!("killed: {e}"))?;
        work_on(&Arc::new(image()), candidates, counts).map_err(|e| format!("working on: {e}"))
    }
}

/// The pool that `image` holds, opened by the code that opens every pool, and the candidate that
/// it agrees with in every sector of every disk.
pub(crate) fn open_and_compare(
    image: &Arc<SimStorage>,
    candidates: &[Model],
    is_durable: bool,
) -> Result<(Arc<Pool>, Model), String> {
    let pool = common::try_open(image).map_err(|e| format!("it does not open: {e}"))?;
    let mut faults = Vec::new();
    for candidate in candidates {
        let names = candidate.check_names(&pool);
        match names.and_then(|()| candidate.settled(&pool, is_durable)) {
            Ok(settled) => return Ok((pool, settled)),
            Err(fault) => faults.push(fault),
        }
    }
    Err(faults.join("; or "))
}

/// Opens one image, after `check` found nothing wrong with it.
pub(crate) fn check_image(image: &Arc<SimStorage>, candidates: &[Model]) -> Result<(), String> {
    check_well(image)?;
    open_and_compare(image, candidates, true).map(|_| ())
}

/// `check` finds nothing wrong.
fn check_well(image: &SimStorage) -> Result<(), String> {
    let report = check::check(image).map_err(|e| e.to_string())?;
    if let Some(fault) = report.faults.first() {
        return Err(format!("check: {}", fault.what));
    }
    Ok(())
}

/// Opens `image` and crashes at every step of the opening, and after it.
fn cut_opening(
    image: &Arc<SimStorage>,
    candidates: &[Model],
    is_durable: bool,
    counts: &mut Counts,
) -> Result<(), String> {
    check_well(image)?;
    let images = Arc::new(Mutex::new(Vec::new()));
    let taken = Arc::clone(&images);
    image.watch(Some(Box::new(move |moment| {
        let seed = taken.lock().len() as u64;
        let crashes = [moment.all_lost(), moment.crash(seed)];
        taken
            .lock()
            .extend(crashes.map(|crash| moment.image(&crash)));
    })));
    let (pool, now) = open_and_compare(image, candidates, is_durable)?;
    counts.images += 1;
    image.watch(None);
    for image in images.lock().drain(..) {
        counts.images += 1;
        check_image(&Arc::new(image), candidates).map_err(|e| format!("in the middle: {e}"))?;
    }
    // What was seen stays: of two states before and after a change it may not go back.
    counts.images += 2;
    for crashed in [image.crash_all_lost(), image.crash(1)] {
        check_image(&Arc::new(crashed), std::slice::from_ref(&now))
            .map_err(|e| format!("afterwards: {e}"))?;
    }
    pool.flush().map_err(|e| e.to_string())?;
    let mut flushed = now.clone();
    flushed.all_durable();
    counts.images += 1;
    check_image(&Arc::new(image.crash_all_lost()), &[flushed])
        .map_err(|e| format!("after a flush: {e}"))
}

/// The pool that was left goes on being used, and loses power once more.
fn work_on(
    image: &Arc<SimStorage>,
    candidates: &[Model],
    counts: &mut Counts,
) -> Result<(), String> {
    let (pool, mut model) = open_and_compare(image, candidates, true)?;
    model.next += 1_000_000;
    let mut acts = vec![
        Act::Create("new".to_owned()),
        Act::Write("new".to_owned(), 3, model.disk_len() / SECTOR - 5),
    ];
    if let Some(name) = model.disks.keys().find(|name| !name.contains('@')).cloned() {
        let len = model.disks[&name].now.len() as u64;
        acts.push(Act::Write(name.clone(), 0, (len / 2).max(1)));
        acts.push(Act::Fork(name.clone(), "newer".to_owned()));
        acts.push(Act::Remove(name));
        acts.push(Act::Write("newer".to_owned(), 0, (len / 3).max(1)));
    }
    acts.push(Act::Flush);
    for act in &acts {
        if !model.allows(act) {
            continue;
        }
        perform(&pool, act, &model).map_err(|e| format!("{act}: {e}"))?;
        model.apply(act);
    }
    drop(pool);
    counts.images += 2;
    check_image(
        &Arc::new(image.crash_all_kept()),
        std::slice::from_ref(&model),
    )?;
    check_image(&Arc::new(image.crash_all_lost()), &[model])
}

/// Does `act` to the pool, if it is one that a pool does in one call.
pub(crate) fn perform(pool: &Arc<Pool>, act: &Act, model: &Model) -> Result<(), DiskError> {
    let open = |name: &str| Disk::open(pool, name);
    match act {
        Act::Create(name) => cowdisk::create(pool, &NewDisk::empty(name, model.disk_len())),
        Act::Write(name, from, len) => {
            let bytes: Vec<u8> = model.values(*len).into_iter().flat_map(fill).collect();
            open(name)?.write_at(&bytes, from * SECTOR)
        }
        Act::Discard(name, from, len) => open(name)?.discard(from * SECTOR, len * SECTOR),
        Act::Zero(name, from, len) => open(name)?.write_zeroes(from * SECTOR, len * SECTOR, true),
        Act::Flush => Ok(pool.flush()?),
        Act::Fork(from, to) => cowdisk::fork(pool, from, std::slice::from_ref(to)),
        Act::Snapshot(from, name) => cowdisk::snapshot(pool, from, name),
        Act::Rollback(snapshot) => cowdisk::rollback(pool, snapshot),
        Act::Commit(child) => cowdisk::commit(pool, child),
        Act::Remove(name) => cowdisk::remove(pool, name, true),
        Act::Resize(name, len) => cowdisk::resize(pool, name, len * SECTOR, true),
        Act::Rename(name, new) => cowdisk::rename(pool, name, new),
        Act::Trim => Ok(pool.trim().map(|_| ())?),
        Act::Pool(len) => match pool.resize(len << 20) {
            // Something is in the way.
            Err(e) if e.kind() == PoolErrorKind::Request => Ok(()),
            resized => Ok(resized?),
        },
        Act::Bulk => {
            let bulk = match open("bulk") {
                Ok(bulk) => bulk,
                Err(_) => {
                    let len = 2 * BULK * 64 * common::CLUSTER;
                    cowdisk::create(pool, &NewDisk::empty("bulk", len))?;
                    open("bulk")?
                }
            };
            for n in 0..BULK {
                bulk.discard(2 * n * 64 * common::CLUSTER, 64 * common::CLUSTER)?;
            }
            bulk.flush()
        }
        Act::Close => Ok(pool.close()?),
        Act::Begin(..) | Act::End(_) | Act::Crash(_) | Act::Kill => {
            unreachable!("{act} is not one call")
        }
    }
}

/// A write in flight. Those with odd numbers are in the device's cache from the beginning, the
/// others at the end only.
struct InFlight {
    number: u64,
    disk: Disk,
    pass: Pass,
    plan: WritePlan,
    bytes: Vec<u8>,
}

/// A pool, its device, and what it should hold.
pub(crate) struct World {
    pub(crate) storage: Arc<SimStorage>,
    pub(crate) pool: Arc<Pool>,
    pub(crate) model: Model,
    in_flight: Vec<InFlight>,
    scene: Arc<Mutex<Scene>>,
}

/// What histories begin from: a device, and what its pool holds.
pub(crate) struct Start {
    storage: SimStorage,
    model: Model,
}

impl Start {
    /// An empty pool in which new disks have `clusters`.
    pub(crate) fn empty(clusters: u64) -> Self {
        clock::hold_still(Some(SECONDS));
        let storage = common::empty(common::POOL_LEN).crash_all_kept();
        let model = Model::new(clusters);
        Self { storage, model }
    }

    /// On a host that is slow to fill holes: small first writes then fill their clusters.
    pub(crate) fn with_slow_holes(self) -> Self {
        self.storage.set_hole_writes_max(0);
        self
    }

    /// The pool after `acts`, closed.
    pub(crate) fn after(self, acts: &[Act]) -> Self {
        let effort = Effort {
            all: 0,
            seeds: 0,
            deep_in: u64::MAX,
        };
        let scene = Arc::new(Mutex::new(Scene::new(effort)));
        scene.lock().is_checking = false;
        let mut world = World::new(&self, &scene);
        for act in acts.iter().chain([&Act::Close]) {
            world
                .act(act)
                .unwrap_or_else(|fault| panic!("{act}: {fault}"));
        }
        world.storage.watch(None);
        let storage = world.storage.crash_all_lost();
        Self {
            storage,
            model: world.model,
        }
    }
}

impl World {
    /// The pool in `start`, opened.
    pub(crate) fn new(start: &Start, scene: &Arc<Mutex<Scene>>) -> Self {
        clock::hold_still(Some(SECONDS));
        let storage = Arc::new(start.storage.crash_all_kept());
        let pool = common::opened(&storage);
        let world = Self {
            storage,
            pool,
            model: start.model.clone(),
            in_flight: Vec::new(),
            scene: Arc::clone(scene),
        };
        world.watch();
        world
    }

    /// Every step of the device is shown to the checker.
    fn watch(&self) {
        let scene = Arc::clone(&self.scene);
        let watcher = move |moment: &Moment<'_>| scene.lock().step(moment);
        self.storage.watch(Some(Box::new(watcher)));
    }

    /// Does `act`, if it makes sense, and what must come before it.
    pub(crate) fn act(&mut self, act: &Act) -> Result<(), String> {
        if !self.model.allows(act) {
            return Ok(());
        }
        if self.must_drain(act) {
            for number in self.model.pending_numbers() {
                self.act(&Act::End(number))?;
            }
        }
        if let Act::Crash(seed) = act {
            let image = match seed {
                0 => self.storage.crash_all_lost(),
                1 => self.storage.crash_all_kept(),
                seed => self.storage.crash(*seed),
            };
            return self.reopen(image, true);
        }
        if matches!(act, Act::Kill) {
            return self.reopen(self.storage.kill(), false);
        }
        let mut after = self.model.clone();
        after.apply(act);
        let candidates = if act.is_structural() {
            vec![self.model.before(act), after.clone()]
        } else if matches!(act, Act::Flush | Act::Trim | Act::Bulk) {
            vec![self.model.clone()]
        } else {
            // Every version is there.
            vec![after.clone()]
        };
        self.scene.lock().expect(candidates);
        if let Act::Begin(number, name, from, len) = act {
            self.begin(*number, name, *from, *len)?;
        } else if let Act::End(number) = act {
            self.end(*number);
            self.model.end_clouded(&self.pool, *number)?;
            if !self.model.has_pending(*number) {
                return self.verdict();
            }
        } else {
            perform(&self.pool, act, &self.model).map_err(|e| format!("{act}: {e}"))?;
        }
        self.model = after;
        if matches!(act, Act::Close) {
            self.reopen(self.storage.crash_all_lost(), true)?;
        }
        self.verdict()
    }

    /// What the checker found while the act was done.
    fn verdict(&self) -> Result<(), String> {
        match self.scene.lock().fault.take() {
            None => Ok(()),
            Some(fault) => Err(fault),
        }
    }

    /// A pool waits for requests in flight before structural changes, and before it copies the rest
    /// of a block that is written in part; one thread cannot wait for itself. On a host with slow
    /// holes a write in flight may be filling its cluster, which nobody else may touch until then.
    fn must_drain(&self, act: &Act) -> bool {
        let is_whole = |from: u64, len: u64| {
            from.is_multiple_of(crate::oracle::BLOCK) && len.is_multiple_of(crate::oracle::BLOCK)
        };
        if let Act::Write(_, from, len) | Act::Zero(_, from, len) = act {
            return !is_whole(*from, *len) || self.storage.hole_writes_max() == 0;
        }
        let is_change = matches!(act, Act::Begin(..) | Act::Discard(..));
        act.is_structural() || (is_change && self.storage.hole_writes_max() == 0)
    }

    fn begin(&mut self, number: u64, name: &str, from: u64, len: u64) -> Result<(), String> {
        let disk = Disk::open(&self.pool, name).map_err(|e| e.to_string())?;
        let values = self.model.values(len);
        let bytes: Vec<u8> = values.into_iter().flat_map(fill).collect();
        let (pass, plan) = common::begin_write(&disk, from * SECTOR, &bytes);
        if !number.is_multiple_of(2) {
            common::move_bytes(&disk, &plan, &bytes);
        }
        self.in_flight.push(InFlight {
            number,
            disk,
            pass,
            plan,
            bytes,
        });
        Ok(())
    }

    fn end(&mut self, number: u64) {
        let found = self.in_flight.iter().position(|w| w.number == number);
        let mut write = self.in_flight.remove(found.expect("it was begun"));
        if number.is_multiple_of(2) {
            common::move_bytes(&write.disk, &write.plan, &write.bytes);
        }
        write.disk.complete_write(&mut write.plan, true);
        drop(write.pass);
    }

    /// The pool's next life, on what is left of the device.
    fn reopen(&mut self, image: SimStorage, is_durable: bool) -> Result<(), String> {
        for mut write in self.in_flight.drain(..) {
            write.disk.complete_write(&mut write.plan, false);
        }
        self.storage.watch(None);
        self.storage = Arc::new(image);
        let candidate = std::slice::from_ref(&self.model);
        {
            let mut scene = self.scene.lock();
            if scene.is_checking {
                scene.counts.steps += 1;
                scene.counts.images += 1;
                check_well(&self.storage)?;
            }
        }
        let (pool, model) = open_and_compare(&self.storage, candidate, is_durable)?;
        (self.pool, self.model) = (pool, model);
        self.watch();
        Ok(())
    }

    /// Everything reads as it should, and the pool closes in good order.
    pub(crate) fn finish(mut self) -> Result<(), String> {
        for number in self.model.pending_numbers() {
            self.act(&Act::End(number))?;
        }
        self.model.check_live(&self.pool)?;
        self.storage.watch(None);
        Ok(())
    }
}

/// Whether all of `acts` make sense, one after the other. Where one does not, the others are a
/// shorter history.
pub(crate) fn is_sensible(start: &Start, acts: &[Act]) -> bool {
    let mut model = start.model.clone();
    acts.iter().all(|act| {
        let is_allowed = model.allows(act);
        if is_allowed {
            model.apply(act);
        }
        is_allowed
    })
}

/// Runs `acts` from `start`. The first `quiet` of them are not crashed in: other histories do that.
pub(crate) fn run(
    start: &Start,
    acts: &[Act],
    quiet: usize,
    scene: &Arc<Mutex<Scene>>,
) -> Result<(), String> {
    let body = std::panic::AssertUnwindSafe(|| run_all(start, acts, quiet, scene));
    match std::panic::catch_unwind(body) {
        Ok(result) => result,
        Err(payload) => {
            let text = payload.downcast_ref::<String>().cloned();
            let text = text.or_else(|| payload.downcast_ref::<&str>().map(|s| (*s).to_owned()));
            Err(format!("panic: {}", text.unwrap_or_default()))
        }
    }
}

fn run_all(
    start: &Start,
    acts: &[Act],
    quiet: usize,
    scene: &Arc<Mutex<Scene>>,
) -> Result<(), String> {
    let mut world = World::new(start, scene);
    for (n, act) in acts.iter().enumerate() {
        scene.lock().is_checking = n >= quiet;
        world
            .act(act)
            .map_err(|e| format!("act {n} ({act}): {e}"))?;
    }
    scene.lock().counts.histories += 1;
    world.finish().map_err(|e| format!("at the end: {e}"))
}

/// As [`run`], of everything, alone.
pub(crate) fn run_alone(start: &Start, acts: &[Act], effort: Effort) -> Result<Counts, String> {
    let scene = Arc::new(Mutex::new(Scene::new(effort)));
    run(start, acts, 0, &scene)?;
    let counts = scene.lock().counts;
    Ok(counts)
}
