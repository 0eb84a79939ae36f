//! Goal: the ordering rules R1 to R11 of `src/pool/mod.rs` are enough, and each of them is needed.
//!
//! Method: a model of a pool that does nothing but obey the rules, over a disk with a volatile
//! cache, driven by random histories in which every step of every operation is an event of its
//! own: requests are planned, reach the device and are published; a flush is six steps; the power
//! goes, or the process dies, between any two, also while the pool recovers. A client's view is
//! kept beside it ([`oracle`]): every value written is written once, so whatever is lost, brought
//! back or another disk's shows. With all rules the model must show nothing wrong in any history.
//! Then each rule is broken alone, and a history that goes wrong must be found.
//!
//! To read it: [`device`] (what a power cut leaves), [`oracle`] (what a client may see), [`pool`]
//! (maps, writes, drops), [`commit`] (flushes and structural changes), [`history`] (recovery, and
//! who does what when). `breaks(Rule::..)` stands wherever a rule acts.
//!
//! Left out, because no ordering rule is about it: checkpoint images (the journal here is as long
//! as the history; `tests/simulation` runs the real ones), blocks written in part, quotas.
//!
//! `TIDEPOOL_HISTORIES` runs more, `TIDEPOOL_SEED` one history of the sound model.

mod commit;
mod device;
mod history;
mod oracle;
mod pool;

use tidepool::sys::clock;

/// The rules, and for those with several sides the way in which each is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rule {
    /// R1: `alloc` is set when a write is planned, not at its completion.
    BitsAtCompletion,
    /// R2: the journal is written without a flush of the data.
    DataFlush,
    /// R2: the data is flushed after the journal is written.
    DataFirst,
    /// R2, commit into a base: the base is not flushed before the disk lets go of its data.
    BaseFlush,
    /// R3: a freed cluster is used again before the record that frees it is durable.
    DurableBeforeReuse,
    /// R3: a freed cluster is punched before that.
    DurableBeforePunch,
    /// R4: a cluster is free while it is being punched.
    PunchBeforeFree,
    /// R5: a dropped reference no longer counts although the drop is not durable.
    DropsCount,
    /// R6: a freed cluster does not wait for the requests begun before.
    WaitForRequests,
    /// R7: a fork does not drain its source.
    DrainFork,
    /// R7: a rollback or commit does not drain its disks.
    DrainReplace,
    /// R8: instead of a flush, batches carry checksums of the data they name.
    NoChecksums,
    /// R8: a commit without records flushes nothing.
    FlushOverwrites,
    /// R9: a second batch is written, and acknowledged, while one is outstanding.
    OneOutstanding,
    /// R9: two are outstanding, acknowledged in order, and none says which was before it.
    Chain,
    /// R10: a failed flush is tried again.
    NoSecondFlush,
    /// R10: after a failed journal write the pool goes on.
    FreezeOnJournal,
    /// R10: a cluster is chosen in one step and accounted for in another.
    AccountAtOnce,
    /// R11: an opening relies on a batch that it read but that may not be durable.
    SettleJournal,
    /// R11: an opening does not flush what a process before it wrote.
    FlushAtOpening,
}

/// Every way to break a rule.
const MUTANTS: [Rule; 20] = [
    Rule::BitsAtCompletion,
    Rule::DataFlush,
    Rule::DataFirst,
    Rule::BaseFlush,
    Rule::DurableBeforeReuse,
    Rule::DurableBeforePunch,
    Rule::PunchBeforeFree,
    Rule::DropsCount,
    Rule::WaitForRequests,
    Rule::DrainFork,
    Rule::DrainReplace,
    Rule::NoChecksums,
    Rule::FlushOverwrites,
    Rule::OneOutstanding,
    Rule::Chain,
    Rule::NoSecondFlush,
    Rule::FreezeOnJournal,
    Rule::AccountAtOnce,
    Rule::SettleJournal,
    Rule::FlushAtOpening,
];

/// Histories of the sound model, if nothing else is said.
const HISTORIES: u64 = 120_000;
/// Histories in which every mutant must show itself.
const MUTANT_HISTORIES_MAX: u64 = 5000;

fn number(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(value.parse().expect("a number"))
}

fn to_text(trace: &[history::Event]) -> String {
    let lines: Vec<String> = trace.iter().map(history::Event::to_text).collect();
    lines.join("\n")
}

#[test]
fn the_rules_are_enough() {
    if let Some(seed) = number("TIDEPOOL_SEED") {
        let (trace, result) = history::run(None, seed);
        println!("{}", to_text(&trace));
        result.expect("the sound model shows nothing wrong");
        return;
    }
    let count = number("TIDEPOOL_HISTORIES").unwrap_or(HISTORIES);
    let began = clock::now();
    let mut reached = history::Reached::default();
    for seed in 0..count {
        let (trace, result) = history::run(None, seed);
        if let Err(fault) = result {
            panic!("TIDEPOOL_SEED={seed}: {fault}\n{}", to_text(&trace));
        }
        reached.add(&trace);
    }
    println!("{count} histories in {:?}: {reached}", began.elapsed());
    reached.check();
}

#[test]
fn every_rule_is_needed() {
    for rule in MUTANTS {
        let began = clock::now();
        let found = (0..MUTANT_HISTORIES_MAX)
            .find_map(|seed| Some((seed, history::run(Some(rule), seed).1.err()?)));
        let Some((seed, fault)) = found else {
            panic!("{rule:?}: nothing went wrong in {MUTANT_HISTORIES_MAX} histories");
        };
        let count = seed + 1;
        println!(
            "{rule:?}: history {count} (seed {seed}), {:?}: {fault}",
            began.elapsed()
        );
    }
}
