//! Making a history that fails as short as it can be (delta debugging), and printing it.

use crate::act::Act;

/// Runs of the history that minimising may cost.
const RUNS_MAX: usize = 600;

/// The shortest part of `acts` found that still fails, and how.
pub(crate) fn shrink(
    acts: &[Act],
    fault: String,
    fails: impl Fn(&[Act]) -> Option<String>,
) -> (Vec<Act>, String) {
    let (mut best, mut fault) = (acts.to_vec(), fault);
    let mut runs = 0;
    let mut part = best.len().div_ceil(2).max(1);
    loop {
        let mut from = 0;
        let mut is_shorter = false;
        while from < best.len() && runs < RUNS_MAX {
            let end = best.len().min(from + part);
            let without = [&best[..from], &best[end..]].concat();
            runs += 1;
            if let Some(found) = fails(&without) {
                (best, fault, is_shorter) = (without, found, true);
            } else {
                from = end;
            }
        }
        if runs >= RUNS_MAX || (part == 1 && !is_shorter) {
            return (best, fault);
        }
        part = part.div_ceil(2);
    }
}
