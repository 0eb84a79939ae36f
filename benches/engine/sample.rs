//! What was measured, as one JSON line a figure; and the memory of this process.

use std::io::Write as _;
use std::time::Duration;

use crate::Result;
use tidepool::sys::clock::now;

/// Values of one figure.
#[derive(Default)]
pub(crate) struct Sample(Vec<f64>);

impl Sample {
    /// Adds a time in microseconds.
    pub(crate) fn add_us(&mut self, time: Duration) {
        self.0.push(time.as_secs_f64() * 1e6);
    }

    /// The value that a share `q` of all did not exceed.
    fn quantile(&self, q: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let share = (1..=sorted.len()).position(|n| n as f64 >= q * sorted.len() as f64);
        share
            .and_then(|at| sorted.get(at))
            .copied()
            .unwrap_or(f64::NAN)
    }

    /// Prints the figure `name`.
    ///
    /// # Errors
    /// Nobody listens.
    pub(crate) fn print(&self, name: &str, unit: &str) -> Result<()> {
        let line = serde_json::json!({
            "name": name,
            "p50": self.quantile(0.5),
            "p90": self.quantile(0.9),
            "max": self.quantile(1.0),
            "n": self.0.len(),
            "unit": unit,
        });
        Ok(writeln!(std::io::stdout(), "{line}")?)
    }
}

/// Prints a figure measured once.
///
/// # Errors
/// Nobody listens.
pub(crate) fn print_one(name: &str, value: f64, unit: &str) -> Result<()> {
    Sample(vec![value]).print(name, unit)
}

/// Runs `work`; what it gave, and the time it took.
///
/// # Errors
/// What `work` says.
pub(crate) fn timed<T, E>(
    work: impl FnOnce() -> std::result::Result<T, E>,
) -> std::result::Result<(T, Duration), E> {
    let begun = now();
    let given = work()?;
    Ok((given, begun.elapsed()))
}

/// A line of `/proc/self/status` in MiB: `VmRSS` is the memory now, `VmHWM` the most there was.
///
/// # Errors
/// There is no such line.
pub(crate) fn memory_mib(line: &str) -> Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let found = status
        .lines()
        .find_map(|l| l.strip_prefix(line)?.strip_prefix(':'));
    let value = found
        .and_then(|l| l.trim().strip_suffix(" kB"))
        .ok_or("no such line")?;
    let kib: u32 = value.parse()?;
    Ok(f64::from(kib) / 1024.0)
}
