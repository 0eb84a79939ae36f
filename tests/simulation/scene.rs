//! Checking what a crash at every step of a history leaves.

use crate::act::Act;
use crate::common;
use crate::oracle::{Model, SECTOR};
use crate::perform::perform;
use std::collections::HashSet;
use std::sync::Arc;
use tidepool::pool::{Pool, check};
use tidepool::storage::SimStorage;
use tidepool::storage::sim::Moment;
use tidepool::sync::Mutex;

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

    pub(crate) fn expect(&mut self, candidates: Vec<Model>) {
        let hashes = candidates.iter().map(Model::hash_of);
        self.hash = hashes.fold(1, |all, one| {
            (all ^ one).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        });
        self.candidates = candidates;
    }

    /// The device is in the middle of an operation.
    pub(crate) fn step(&mut self, moment: &Moment<'_>) {
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
pub(crate) fn check_well(image: &SimStorage) -> Result<(), String> {
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
