//! What overlapping requests did to each sector, and whether one disk could have done it: requests
//! that are in flight at once take effect in any order, those that are not in theirs.

use std::collections::BTreeMap;

/// What a request did to a sector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum What {
    /// It wrote the value, which no other write of that sector has unless it is 0.
    Write,
    /// It read the value.
    Read,
}

/// A sector's part of a request. Times are of one clock that never stands still.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Event {
    pub(crate) what: What,
    pub(crate) sector: u64,
    pub(crate) value: u64,
    /// Before the request was made.
    pub(crate) began: u64,
    /// After its answer.
    pub(crate) ended: u64,
}

impl Event {
    fn is_before(&self, other: &Event) -> bool {
        self.ended < other.began
    }
}

/// Looks at all sectors, which held 0 before time 1. How many reads there were, or what cannot be.
///
/// A read's value must be that of a write that began before the read ended, and after which no other
/// write both began and ended before the read began. That is necessary, and for zeros it is all that
/// is asked. For other values, which tell their writes apart, the sector must be linearizable: all of
/// its writes and reads fit one order that agrees with time (Gibbons and Korach, "Testing shared
/// memories", 1997).
pub(crate) fn check(events: &[Event]) -> Result<usize, String> {
    let mut sectors: BTreeMap<u64, Vec<Event>> = BTreeMap::new();
    for event in events {
        sectors.entry(event.sector).or_default().push(*event);
    }
    let mut reads = 0;
    for of_sector in sectors.values() {
        reads += check_sector(of_sector)?;
    }
    Ok(reads)
}

fn check_sector(events: &[Event]) -> Result<usize, String> {
    let (mut writes, reads): (Vec<Event>, Vec<Event>) =
        events.iter().partition(|event| event.what == What::Write);
    writes.push(Event {
        what: What::Write,
        sector: events[0].sector,
        value: 0,
        began: 0,
        ended: 0,
    });
    for read in &reads {
        let is_possible = |write: &Event| {
            let is_over = |other: &Event| write.is_before(other) && other.is_before(read);
            write.value == read.value && write.began < read.ended && !writes.iter().any(is_over)
        };
        if !writes.iter().any(is_possible) {
            return Err(format!(
                "no write explains {read:?}; {}",
                around(&writes, read)
            ));
        }
    }
    check_zones(&writes, &reads)?;
    Ok(reads.len())
}

/// The writes of a sector that could matter to a read.
fn around(writes: &[Event], read: &Event) -> String {
    let same = writes.iter().find(|write| write.value == read.value);
    let before = writes.iter().filter(|write| write.is_before(read));
    let last = before.max_by_key(|write| write.began);
    format!("its own write is {same:?}, the last one before it {last:?}")
}

/// When a value must have been there: from the first end of a request that had it to the last
/// beginning of one, or, if these are the other way round, at some time between.
#[derive(Debug, Clone, Copy)]
struct Zone {
    value: u64,
    first_end: u64,
    last_begin: u64,
}

fn check_zones(writes: &[Event], reads: &[Event]) -> Result<(), String> {
    let mut zones: BTreeMap<u64, Zone> = BTreeMap::new();
    for event in writes.iter().chain(reads).filter(|event| event.value != 0) {
        let zone = zones.entry(event.value).or_insert(Zone {
            value: event.value,
            first_end: event.ended,
            last_begin: event.began,
        });
        zone.first_end = zone.first_end.min(event.ended);
        zone.last_begin = zone.last_begin.max(event.began);
    }
    let zones: Vec<Zone> = zones.into_values().collect();
    // Of those that last, no two overlap; and none of the others lies within one of them.
    for one in zones.iter().filter(|zone| zone.first_end < zone.last_begin) {
        for other in zones.iter().filter(|other| other.value != one.value) {
            if one.first_end < other.last_begin && other.first_end < one.last_begin {
                return Err(format!(
                    "sector {}: {one:?} and {other:?} were there at once",
                    writes[0].sector
                ));
            }
        }
    }
    Ok(())
}
