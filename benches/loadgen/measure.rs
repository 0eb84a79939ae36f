//! What is measured: time, latency, and CPU time of the backend, the machine and ourselves.

use std::time::Instant;

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike as _;
use nix::unistd::{SysconfVar, sysconf};

/// The time now.
#[expect(
    clippy::disallowed_methods,
    reason = "a benchmark measures the real clock"
)]
pub(crate) fn now() -> Instant {
    Instant::now()
}

/// Sub-buckets per power of two: a value is known to within 1/64, 1.6 %.
const SUB_BITS: u32 = 6;
const SUB: usize = 1 << SUB_BITS;
/// Powers of two covered above the linear part: to 2^46 ns, 19 hours.
const OCTAVES: usize = 40;

/// A latency histogram in nanoseconds, logarithmic with linear sub-buckets.
#[derive(Clone, Debug)]
pub(crate) struct Histogram {
    counts: Vec<u64>,
    total: u64,
    sum_ns: u64,
    max_ns: u64,
}

impl Histogram {
    pub(crate) fn new() -> Self {
        Self {
            counts: vec![0; SUB * (OCTAVES + 1)],
            total: 0,
            sum_ns: 0,
            max_ns: 0,
        }
    }

    fn bucket(ns: u64) -> usize {
        let octave = (64 - ns.leading_zeros()).saturating_sub(SUB_BITS + 1);
        let sub = usize::try_from(ns >> octave).expect("at most two times SUB");
        let octave = usize::try_from(octave).expect("at most 64");
        (octave * SUB + sub).min(SUB * (OCTAVES + 1) - 1)
    }

    /// The smallest value that falls into bucket `index`.
    fn lower_bound(index: usize) -> u64 {
        if index < 2 * SUB {
            return index as u64;
        }
        let octave = index / SUB - 1;
        ((index - octave * SUB) as u64) << octave
    }

    /// Counts one latency.
    pub(crate) fn add(&mut self, ns: u64) {
        if let Some(count) = self.counts.get_mut(Self::bucket(ns)) {
            *count += 1;
        }
        self.total += 1;
        self.sum_ns += ns;
        self.max_ns = self.max_ns.max(ns);
    }

    /// Latencies counted.
    pub(crate) fn count(&self) -> u64 {
        self.total
    }

    /// The latency in microseconds that a share `q` (0 to 1) of the requests did not exceed.
    fn quantile_us(&self, q: f64) -> f64 {
        let wanted = q * self.total as f64;
        let mut seen = 0;
        for (index, count) in self.counts.iter().enumerate() {
            seen += count;
            if *count > 0 && seen as f64 >= wanted {
                return Self::lower_bound(index) as f64 / 1e3;
            }
        }
        self.max_ns as f64 / 1e3
    }

    /// Percentiles, mean and maximum in microseconds; null when nothing was counted.
    pub(crate) fn report(&self) -> serde_json::Value {
        if self.total == 0 {
            return serde_json::Value::Null;
        }
        serde_json::json!({
            "count": self.total,
            "p50": self.quantile_us(0.5),
            "p99": self.quantile_us(0.99),
            "p999": self.quantile_us(0.999),
            "mean": self.sum_ns as f64 / self.total as f64 / 1e3,
            "max": self.max_ns as f64 / 1e3,
        })
    }
}

/// CPU seconds spent so far.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CpuTimes {
    /// By the backend: user and system time of all its threads, those that ended included. The
    /// kernel's own threads (writeback, loop devices) are not in it.
    backend: Option<f64>,
    /// By the whole machine, idle, I/O wait and stolen time left out.
    machine: f64,
    /// By this process.
    own: f64,
}

fn ticks(field: Option<&str>) -> f64 {
    field.and_then(|f| f.parse().ok()).unwrap_or(0.0)
}

/// Fields 14 and 15 of `/proc/PID/stat` (proc(5)): utime and stime, here in ticks.
fn process_ticks(pid: u32) -> Option<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    Some(ticks(fields.next()) + ticks(fields.next()))
}

/// First line of `/proc/stat`: user nice system idle iowait irq softirq steal.
fn machine_ticks() -> f64 {
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let line = stat.lines().next().unwrap_or("");
    let fields: Vec<_> = line.split_whitespace().collect();
    [1, 2, 3, 6, 7]
        .iter()
        .map(|i| ticks(fields.get(*i).copied()))
        .sum()
}

impl CpuTimes {
    /// Reads the clocks.
    pub(crate) fn read(backend_pid: Option<u32>) -> Self {
        let per_second = match sysconf(SysconfVar::CLK_TCK) {
            Ok(Some(hertz)) => hertz as f64,
            Ok(None) | Err(_) => 100.0,
        };
        let own = getrusage(UsageWho::RUSAGE_SELF).map_or(0, |usage| {
            usage.user_time().num_microseconds() + usage.system_time().num_microseconds()
        });
        Self {
            backend: backend_pid.and_then(process_ticks).map(|t| t / per_second),
            machine: machine_ticks() / per_second,
            own: own as f64 / 1e6,
        }
    }

    /// CPU microseconds a request cost between `self` and `later`.
    pub(crate) fn per_request(&self, later: &Self, requests: u64) -> serde_json::Value {
        let each = |seconds: f64| seconds * 1e6 / requests.max(1) as f64;
        let own = later.own - self.own;
        let backend = match (self.backend, later.backend) {
            (Some(a), Some(b)) => Some(each(b - a)),
            (None, _) | (_, None) => None,
        };
        serde_json::json!({
            "backend": backend,
            "machine_without_client": each((later.machine - self.machine - own).max(0.0)),
            "client": each(own),
        })
    }
}
