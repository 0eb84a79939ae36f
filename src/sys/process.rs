//! Processes, told from later ones of the same number, and whether they are alive.

use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;

/// `PF_EXITING` among the flags of proc_pid_stat(5): it is closing what it had.
const EXITING: u64 = 4;
/// Bit of SIGKILL in the sets of proc_pid_status(5).
const KILLED: u64 = 1 << 8;

/// A process of this host that is or was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process {
    /// Its number, in its namespace.
    pub pid: u32,
    /// When it was started, in ticks since the host was.
    started: u64,
    /// Its PID namespace, as /proc/self/ns/pid has it.
    namespace: u64,
}

/// What became of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Life {
    /// It runs.
    Alive,
    /// It has ended, or is about to and can do nothing about it.
    Over,
    /// It is of another namespace: we cannot tell.
    Unknown,
}

impl Process {
    /// This one.
    ///
    /// # Errors
    /// /proc is not mounted.
    pub fn this() -> io::Result<Self> {
        Self::of(std::process::id())
    }

    /// The one that has the number `pid` now, in our namespace.
    ///
    /// # Errors
    /// There is none, or /proc is not mounted.
    pub fn of(pid: u32) -> io::Result<Self> {
        Ok(Self {
            pid,
            started: stat(pid)?.started,
            namespace: namespace()?,
        })
    }

    /// What `text` begins with, as it is displayed, and what follows after a comma.
    #[must_use]
    pub fn parse(text: &str) -> Option<(Self, &str)> {
        let rest = text.strip_prefix("pid ")?;
        let (pid, rest) = rest.split_once(" started ")?;
        let (started, rest) = rest.split_once(" in ")?;
        let (namespace, rest) = rest.split_once(", ").unwrap_or((rest, ""));
        let process = Self {
            pid: pid.parse().ok()?,
            started: started.parse().ok()?,
            namespace: namespace.parse().ok()?,
        };
        Some((process, rest))
    }

    /// Whether it runs.
    #[must_use]
    pub fn life(&self) -> Life {
        if namespace().ok() != Some(self.namespace) {
            return Life::Unknown;
        }
        match stat(self.pid) {
            Ok(now) if now.started == self.started && !is_ending(self.pid) => Life::Alive,
            Ok(_) => Life::Over,
            Err(e) if e.kind() == io::ErrorKind::NotFound => Life::Over,
            Err(_unseen) => Life::Unknown,
        }
    }
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            pid,
            started,
            namespace,
        } = self;
        write!(f, "pid {pid} started {started} in {namespace}")
    }
}

/// Whether the process `pid` is a zombie, is closing what it had, or was killed and is yet to notice.
#[must_use]
pub fn is_ending(pid: u32) -> bool {
    let is_exiting = stat(pid).is_ok_and(|stat| stat.is_exiting);
    is_exiting || {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        is_killed(&status)
    }
}

/// Whether /proc shows us every process of this host: we are root, and not in a container.
#[must_use]
pub fn sees_all() -> bool {
    const INITIAL: u64 = 0xeffffffc; // PROC_PID_INIT_INO of linux/proc_ns.h
    nix::unistd::geteuid().is_root() && namespace().is_ok_and(|ours| ours == INITIAL)
}

fn namespace() -> io::Result<u64> {
    Ok(fs::metadata("/proc/self/ns/pid")?.ino())
}

/// What is looked at in proc_pid_stat(5).
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    is_exiting: bool,
    started: u64,
}

fn stat(pid: u32) -> io::Result<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    parse_stat(&text).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn parse_stat(text: &str) -> Option<Stat> {
    // A name may have spaces and parentheses; field 3 follows the last one.
    let fields: Vec<&str> = text.rsplit_once(") ")?.1.split(' ').collect();
    let is_over = matches!(*fields.first()?, "Z" | "X" | "x");
    let flags: u64 = fields.get(9 - 3)?.parse().ok()?;
    Some(Stat {
        is_exiting: is_over || flags & EXITING != 0,
        started: fields.get(22 - 3)?.parse().ok()?,
    })
}

fn is_killed(status: &str) -> bool {
    let sets = status.lines().filter_map(|line| {
        line.strip_prefix("SigPnd:")
            .or_else(|| line.strip_prefix("ShdPnd:"))
    });
    let mut sets = sets.filter_map(|set| u64::from_str_radix(set.trim(), 16).ok());
    sets.any(|set| set & KILLED != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn a_process_is_known_again_from_its_text() {
        let this = Process::this().expect("/proc");
        let text = format!("{this}, serving");
        assert_eq!(Process::parse(&text), Some((this, "serving")));
        assert_eq!(Process::parse(&this.to_string()), Some((this, "")));
        assert_eq!(this.life(), Life::Alive);
        for strange in [
            "",
            "pid 1",
            "pid 1, x",
            "pid -1 started 1 in 1",
            "pid 1 started 2",
        ] {
            assert_eq!(Process::parse(strange), None, "{strange}");
        }
        let later = Process {
            started: this.started + 1,
            ..this
        };
        assert_eq!(later.life(), Life::Over, "another of its number");
        let elsewhere = Process {
            namespace: this.namespace + 1,
            ..this
        };
        assert_eq!(elsewhere.life(), Life::Unknown);
    }

    #[test]
    fn a_process_that_was_killed_is_over_before_it_is_waited_for() {
        let mut sleeper = Command::new("sleep");
        let mut child = sleeper
            .arg("600")
            .stdin(Stdio::null())
            .spawn()
            .expect("starts");
        let process = Process::of(child.id()).expect("it runs");
        assert_eq!(process.life(), Life::Alive);
        child.kill().expect("ours");
        assert_eq!(process.life(), Life::Over, "pending, ending or a zombie");
        child.wait().expect("ours");
        assert_eq!(process.life(), Life::Over, "gone");
    }

    #[test]
    fn names_do_not_mislead() {
        let fields = "1 1 1 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 777 0";
        let text = format!("12 (a) Z (b) S {fields}");
        let running = Stat {
            is_exiting: false,
            started: 777,
        };
        assert_eq!(parse_stat(&text), Some(running));
        assert!(parse_stat(&text.replace(") S", ") Z")).is_some_and(|stat| stat.is_exiting));
        let exiting = text.replace("4194560", "4194564");
        assert!(parse_stat(&exiting).is_some_and(|stat| stat.is_exiting));
        assert_eq!(parse_stat("12 (a) S 1 1"), None);
        assert!(is_killed("Name:\tx\nSigPnd:\t0000000000000100\n"));
        assert!(!is_killed(
            "SigPnd:\t0000000000004000\nSigCgt:\t0000000000000100\n"
        ));
    }
}
