//! Devices that fail: errors, half-done and short writes, full hosts, and lies, at every single
//! operation of a history. What the device admits must cost nothing that was acknowledged; what it
//! lies about must be refused or show nothing foreign, and never make anything panic.

use crate::act::{Act, to_trace};
use crate::common;
use crate::histories;
use crate::oracle::Model;
use crate::perform::{home_in_base, perform};
use crate::run::{Start, World};
use crate::scene::{Effort, Scene, check_image, open_and_compare};
use std::sync::Arc;
use tidepool::cowdisk::Disk;
use tidepool::storage::sim::{Harm, Op};
use tidepool::storage::{SimStorage, Storage};
use tidepool::sync::Mutex;

const EIO: i32 = 5;
const ENOSPC: i32 = 28;
const NOTHING: Effort = Effort {
    all: 0,
    seeds: 0,
    deep_in: u64::MAX,
};

/// How a run with a fault ended.
struct Ended {
    storage: Arc<SimStorage>,
    /// What the pool may be after a crash.
    candidates: Vec<Model>,
    /// The fault came up.
    was_hurt: bool,
}

/// Runs `acts` on a device that `hurt` has prepared, for as long as the pool takes part.
fn run(start: &Start, acts: &[Act], hurt: impl FnOnce(&SimStorage)) -> Result<Ended, String> {
    let scene = Arc::new(Mutex::new(Scene::new(NOTHING)));
    scene.lock().is_checking = false;
    let World {
        storage,
        pool,
        mut model,
        ..
    } = World::new(start, &scene);
    storage.watch(None);
    hurt(&storage);
    let mut was_hurt = false;
    for act in acts {
        if !model.allows(act) {
            continue;
        }
        let done = perform(&pool, act, &model);
        let mut after = model.clone();
        after.apply(act);
        let Err(error) = done else {
            model = after;
            continue;
        };
        was_hurt = true;
        let before = model.clone();
        if pool.check_poison().is_err() {
            let candidates = vec![before, after];
            return Ok(Ended {
                storage,
                candidates,
                was_hurt,
            });
        }
        // It was told that this failed, and holds one or the other.
        let is_part = matches!(act, Act::Write(..) | Act::Discard(..) | Act::Zero(..));
        let worlds = if is_part {
            [after, before]
        } else {
            [before, after]
        };
        let found = worlds.iter().find_map(|world| {
            let names = world.check_names(&pool).ok();
            names.and_then(|()| world.settled(&pool, false).ok())
        });
        let fault = || format!("after {act} failed ({error}) the pool is neither");
        model = found.ok_or_else(fault)?;
    }
    storage.set_capacity(u64::MAX);
    storage.clear_faults();
    model.check_live(&pool)?;
    let candidates = vec![model];
    Ok(Ended {
        storage,
        candidates,
        was_hurt,
    })
}

/// What a crash then leaves, and what the next process finds, is as it must be.
fn check(ended: &Ended, seed: u64) -> Result<u64, String> {
    let storage = &ended.storage;
    storage.clear_faults();
    let images = [
        ("all lost", storage.crash_all_lost()),
        ("all kept", storage.crash_all_kept()),
        ("a crash", storage.crash(seed)),
        ("another crash", storage.crash(seed + 1)),
        ("the next process", storage.kill()),
    ];
    let count = images.len() as u64;
    for (what, image) in images {
        check_image(&Arc::new(image), &ended.candidates).map_err(|e| format!("{what}: {e}"))?;
    }
    // Once it has gone on from what it found, that is not to be lost any more: the batch whose write
    // failed is in a cache that no flush saves.
    let next = Arc::new(storage.kill());
    let (pool, found) = open_and_compare(&next, &ended.candidates, false)?;
    let later = Act::Create("later".to_owned());
    perform(&pool, &later, &found).map_err(|e| format!("the next process: {e}"))?;
    let expected = [found.with_empty("later")];
    for image in [next.crash_all_lost(), next.crash(seed)] {
        check_image(&Arc::new(image), &expected).map_err(|e| format!("afterwards: {e}"))?;
    }
    Ok(count + 2)
}

/// The histories to be hurt: the short ones by hand, and some at random, one call at a time.
fn victims() -> Vec<Vec<Act>> {
    let scripted = histories::scripted().into_iter().take(3);
    let mut victims: Vec<Vec<Act>> = scripted.map(|(_, acts)| acts).collect();
    victims.extend((0..12).map(|seed| histories::random(7000 + seed)));
    let is_one_call = |act: &Act| {
        !matches!(
            act,
            Act::Begin(..) | Act::End(_) | Act::Crash(_) | Act::Kill | Act::Close | Act::Bulk
        )
    };
    for acts in &mut victims {
        acts.retain(is_one_call);
    }
    victims
}

/// Operations that `acts` take on a device that works.
fn operations(start: &Start, acts: &[Act]) -> (u64, u64) {
    let mut before = (0, 0);
    let ended = run(start, acts, |storage| {
        let counters = storage.counters();
        before = (counters.all(), counters.durable_writes);
    });
    let counters = ended.expect("nothing fails").storage.counters();
    (
        counters.all() - before.0,
        counters.durable_writes - before.1,
    )
}

/// Every operation of every victim, once with every harm; returns how many were hurt, and images.
pub(crate) fn every_operation(harms: &[Harm]) -> (u64, u64) {
    let start = Start::empty(histories::CLUSTERS);
    let (mut hurt, mut images) = (0, 0);
    for acts in victims() {
        let (all, _) = operations(&start, &acts);
        for n in 0..all {
            for harm in harms {
                let result = run(&start, &acts, |storage| storage.harm_any(n, *harm))
                    .and_then(|ended| Ok((ended.was_hurt, check(&ended, n)?)));
                match result {
                    Ok((was_hurt, more)) => {
                        hurt += u64::from(was_hurt);
                        images += more;
                    }
                    Err(fault) => panic!(
                        "{harm:?} at operation {n} of {all}: {fault}\n{}",
                        to_trace(&acts)
                    ),
                }
            }
        }
    }
    (hurt, images)
}

#[test]
fn an_error_at_any_operation_loses_nothing_acknowledged() {
    let (hurt, images) = every_operation(&[Harm::Fails(EIO), Harm::Short(EIO)]);
    println!("{hurt} runs told of an error, {images} images");
    assert!(hurt > 800);
}

#[test]
fn a_full_host_at_any_operation_loses_nothing_acknowledged() {
    let (hurt, images) = every_operation(&[Harm::Fails(ENOSPC)]);
    println!("{hurt} runs told of it, {images} images");
    assert!(hurt > 400);
}

/// An opening that fails, or is refused by the device, changes nothing that the next one needs.
#[test]
fn an_error_while_opening_loses_nothing() {
    let start = Start::empty(histories::CLUSTERS);
    let mut refused = 0;
    for (seed, acts) in (0..).zip(victims()) {
        let ended = run(&start, &acts, |_| {}).expect("nothing fails");
        for n in 0.. {
            let image = Arc::new(ended.storage.crash(seed));
            image.harm_any(n, Harm::Fails(EIO));
            let before = image.counters().all();
            let is_open = common::try_open(&image).is_ok();
            let was_hurt = image.counters().all() - before > n;
            if !was_hurt {
                break;
            }
            refused += u64::from(!is_open);
            image.clear_faults();
            for next in [image.kill(), image.crash_all_lost(), image.crash(n)] {
                let checked = check_image(&Arc::new(next), &ended.candidates);
                checked.unwrap_or_else(|e| panic!("operation {n}: {e}\n{}", to_trace(&acts)));
            }
        }
    }
    println!("{refused} openings failed");
    assert!(refused > 300);
}

/// The host has room for a number of pages and no more, until the end.
#[test]
fn a_host_that_fills_up_at_any_allocation_loses_nothing_acknowledged() {
    let start = Start::empty(histories::CLUSTERS);
    let (mut hurt, mut images) = (0, 0);
    for acts in victims() {
        for pages in 0..2000 {
            let ended = run(&start, &acts, |storage| {
                let now = storage.allocated().expect("a simulated disk knows");
                storage.set_capacity(now + pages * 4096);
            });
            let result = ended.and_then(|ended| Ok((ended.was_hurt, check(&ended, pages)?)));
            match result {
                Ok((was_hurt, more)) => {
                    images += more;
                    if !was_hurt {
                        break;
                    }
                    hurt += 1;
                }
                Err(fault) => panic!("room for {pages}: {fault}\n{}", to_trace(&acts)),
            }
        }
    }
    println!("{hurt} runs were out of space, {images} images");
    assert!(hurt > 200);
}

/// Each value at the place it was written to, whichever disk shows it.
fn shows_nothing_foreign(image: SimStorage, homes: &[u64]) -> Result<bool, String> {
    let Ok(pool) = common::try_open(&Arc::new(image)) else {
        return Ok(false);
    };
    for item in pool.items() {
        let name = &item.row.name;
        let disk = Disk::open(&pool, name).map_err(|e| e.to_string())?;
        let bytes = common::read(&disk, 0, disk.size());
        for (n, sector) in (0..).zip(bytes.chunks_exact(512)) {
            let value = u64::from_le_bytes(*sector.first_chunk().expect("8 bytes"));
            let is_whole = sector == crate::oracle::fill(value);
            let home = || Some(*homes.get(usize::try_from(value).ok()?)?);
            let home = home_in_base(value).or_else(home);
            if !is_whole || (value != 0 && home != Some(n)) {
                return Err(format!(
                    "{name} sector {n} holds {value} of sector {home:?}"
                ));
            }
        }
    }
    Ok(true)
}

/// The sector each value was written to, by value.
fn homes(acts: &[Act]) -> Vec<u64> {
    let mut model = Model::new(histories::CLUSTERS);
    let mut homes = vec![u64::MAX];
    for act in acts {
        if model.allows(act) {
            if let Act::Write(_, from, len) = act {
                homes.extend(*from..from + len);
            }
            model.apply(act);
        }
    }
    homes
}

/// A journal or superblock write that was acknowledged and lost, or went to another place.
#[test]
fn lies_about_metadata_are_refused_or_show_nothing_foreign() {
    let start = Start::empty(histories::CLUSTERS);
    let (mut opened, mut refused) = (0, 0);
    for mut acts in victims() {
        // Only a batch after it shows that one is missing: the last ones are not lied about.
        acts.extend(["y", "z"].map(|name| Act::Create(name.to_owned())));
        let homes = homes(&acts);
        let (_, durable) = operations(&start, &acts);
        for n in 0..durable.saturating_sub(2) {
            let places = [0, 1 << 20, 2 << 20, (2 << 20) + 8192, 3 << 20];
            let lies = places.map(Harm::Elsewhere).into_iter().chain([Harm::Lost]);
            for lie in lies {
                let harmed = |storage: &SimStorage| storage.harm(Op::WriteDurable, n, lie);
                let result = run(&start, &acts, harmed).and_then(|ended| {
                    let image = ended.storage.crash_all_kept();
                    shows_nothing_foreign(image, &homes)
                });
                match result {
                    Ok(true) => opened += 1,
                    Ok(false) => refused += 1,
                    Err(fault) => {
                        panic!("{lie:?}, durable write {n}: {fault}\n{}", to_trace(&acts))
                    }
                }
            }
        }
    }
    println!("{opened} opened, {refused} were refused");
    assert!(refused > 300);
}

/// A data write that was lost or went elsewhere: nothing can notice that, and nothing panics.
#[test]
fn lies_about_data_make_nothing_panic() {
    let start = Start::empty(histories::CLUSTERS);
    let mut runs = 0_u64;
    for acts in victims() {
        let (all, _) = operations(&start, &acts);
        for n in 0..all {
            for lie in [
                Harm::Lost,
                Harm::Elsewhere(5 << 20),
                Harm::Elsewhere(6 << 20),
            ] {
                // What it reads as may be wrong, and the pool may refuse it.
                let hurt = |storage: &SimStorage| storage.harm_any(n, lie);
                if let Ok(ended) = run(&start, &acts, hurt) {
                    drop(common::try_open(&Arc::new(ended.storage.crash_all_kept())));
                }
                runs += 1;
            }
        }
    }
    println!("{runs} runs");
    assert!(runs > 1000);
}
