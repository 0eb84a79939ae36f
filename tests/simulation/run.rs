//! Running a history against the real pool.

use crate::act::Act;
use crate::common;
use crate::oracle::{Model, SECTOR, fill};
use crate::perform::perform;
use crate::scene::{Counts, Effort, Scene, check_well, open_and_compare};
use std::sync::Arc;
use tidepool::cowdisk::{Disk, Pass, WritePlan};
use tidepool::pool::Pool;
use tidepool::storage::sim::Moment;
use tidepool::storage::{SimStorage, Storage as _};
use tidepool::sync::Mutex;
use tidepool::sys::clock;

/// What every history takes for the time of day.
const SECONDS: u64 = 1_700_000_000;

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
            vec![self.model.clone(), after.clone()]
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
