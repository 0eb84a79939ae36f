//! Threads for work that blocks on one store or base: a few at most, made when there is work for them,
//! ended when there has been none for a while. One crew for each pool and each base: storage that
//! hangs has its own threads hanging, and nobody else's.
//!
//! What runs here waits for nothing but its own I/O, least of all for work that may be queued behind
//! it: with as many waiting as there are threads, nothing would ever go on.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::time::Duration;

use crate::sync::{Arc, Condvar, Mutex, Vital, spawn_named};
use crate::sys::buffer::AlignedBuf;

/// How long a thread waits for more before it ends.
const IDLE: Duration = Duration::from_secs(5);
/// Most bytes that a job moves through its thread's buffer.
pub(super) const SCRATCH_LEN: usize = 128 << 10;

/// A thread's buffer, made when it is first used.
#[derive(Debug, Default)]
pub(super) struct Scratch(Option<AlignedBuf>);

impl Scratch {
    /// The first `len` bytes of it, at most [`SCRATCH_LEN`], with anything in them.
    pub(super) fn bytes(&mut self, len: usize) -> &mut [u8] {
        let buffer = self.0.get_or_insert_with(|| AlignedBuf::new(SCRATCH_LEN));
        &mut buffer.bytes_mut()[..len]
    }
}

/// A piece of work.
pub(super) trait Job: Send + 'static {
    /// Does it, and tells whoever waits for it.
    fn run(self, scratch: &mut Scratch);
    /// Tells whoever waits for it that there is no thread to do it.
    fn refuse(self, error: &io::Error);
}

/// Jobs in line. Those who gave some take turns, so that who gave many waits longest.
#[derive(Debug)]
struct Line<J> {
    turns: VecDeque<usize>,
    jobs: HashMap<usize, VecDeque<J>>,
    len: usize,
}

impl<J> Line<J> {
    fn push(&mut self, from: usize, job: J) {
        let theirs = self.jobs.entry(from).or_default();
        if theirs.is_empty() {
            self.turns.push_back(from);
        }
        theirs.push_back(job);
        self.len += 1;
    }

    fn pop(&mut self) -> Option<J> {
        let from = self.turns.pop_front()?;
        let theirs = self.jobs.get_mut(&from)?;
        let job = theirs.pop_front()?;
        if theirs.is_empty() {
            self.jobs.remove(&from);
        } else {
            self.turns.push_back(from);
        }
        self.len -= 1;
        Some(job)
    }
}

#[derive(Debug)]
struct State<J> {
    line: Line<J>,
    /// Threads that are there, or being made.
    threads: usize,
    /// Those of them that wait for a job.
    idle: usize,
    is_closed: bool,
}

#[derive(Debug)]
struct Shared<J> {
    state: Mutex<State<J>>,
    changed: Condvar,
}

impl<J: Job> Shared<J> {
    /// The next job, or `None` when this thread is to end.
    fn next(&self) -> Option<J> {
        let mut state = self.state.lock();
        let mut is_late = false;
        loop {
            if let Some(job) = state.line.pop() {
                return Some(job);
            }
            if state.is_closed || is_late {
                state.threads -= 1;
                return None;
            }
            state.idle += 1;
            is_late = self.changed.wait_for(&mut state, IDLE).timed_out();
            state.idle -= 1;
        }
    }

    fn work(&self) {
        let _vital = Vital::new();
        let mut scratch = Scratch::default();
        while let Some(job) = self.next() {
            job.run(&mut scratch);
        }
    }
}

/// See the module. The line is bounded by what feeds it: no piece of a request is in it twice, and
/// requests are bounded by the sizes of their virtqueues.
#[derive(Debug)]
pub(super) struct Crew<J> {
    shared: Arc<Shared<J>>,
    name: &'static str,
    most: usize,
}

impl<J: Job> Crew<J> {
    /// Of up to `most` threads, of which there are none yet.
    pub(super) fn new(name: &'static str, most: usize) -> Self {
        let line = Line {
            turns: VecDeque::new(),
            jobs: HashMap::new(),
            len: 0,
        };
        let state = State {
            line,
            threads: 0,
            idle: 0,
            is_closed: false,
        };
        let shared = Shared {
            state: Mutex::new(state),
            changed: Condvar::new(),
        };
        Self {
            shared: Arc::new(shared),
            name,
            most,
        }
    }

    /// Has `job` done. `from` tells those apart who take turns.
    pub(super) fn submit(&self, from: usize, job: J) {
        let is_short = {
            let mut state = self.shared.state.lock();
            state.line.push(from, job);
            let is_short = state.line.len > state.idle && state.threads < self.most;
            state.threads += usize::from(is_short);
            is_short
        };
        if !is_short {
            self.shared.changed.notify_one();
            return;
        }
        let shared = Arc::clone(&self.shared);
        // Never joined: what it does may hang for ever, and it keeps nothing but the line.
        if let Err(error) = spawn_named(self.name, move || shared.work()) {
            self.do_without(&error);
        }
    }

    /// A thread could not be made. The others will do, if there are any.
    fn do_without(&self, error: &io::Error) {
        let mut stranded = Vec::new();
        {
            let mut state = self.shared.state.lock();
            state.threads -= 1;
            if state.threads == 0 {
                stranded.extend(std::iter::from_fn(|| state.line.pop()));
            }
        }
        for job in stranded {
            job.refuse(error);
        }
    }
}

impl<J> Drop for Crew<J> {
    fn drop(&mut self) {
        self.shared.state.lock().is_closed = true;
        self.shared.changed.notify_all();
    }
}

#[cfg(all(test, feature = "loom"))]
mod loom_tests {
    use super::*;
    use crate::sync::explore::explore;

    #[derive(Debug, Default)]
    struct Done {
        jobs: Mutex<Vec<u32>>,
        changed: Condvar,
    }

    struct Tell(u32, Arc<Done>);

    impl Job for Tell {
        fn run(self, _scratch: &mut Scratch) {
            self.1.jobs.lock().push(self.0);
            self.1.changed.notify_one();
        }

        fn refuse(self, error: &io::Error) {
            panic!("{error}");
        }
    }

    /// Two jobs, then a third once these are done; then the crew is let go of. Each job is done once,
    /// and no thread waits for ever.
    ///
    /// Fails if `Crew::submit` does not notify, or the end of the crew wakes nobody.
    #[test]
    fn loom_every_job_is_done_once() {
        explore("crew", 3, || {
            let done = Arc::new(Done::default());
            let crew = Crew::new("crew", 2);
            for n in 0..2 {
                crew.submit(n, Tell(1, Arc::clone(&done)));
            }
            let wait_for = |count: usize| {
                let mut jobs = done.jobs.lock();
                while jobs.len() < count {
                    done.changed.wait(&mut jobs);
                }
            };
            wait_for(2);
            crew.submit(0, Tell(2, Arc::clone(&done)));
            wait_for(3);
            drop(crew);
            assert_eq!(*done.jobs.lock(), [1, 1, 2]);
        });
    }
}

#[cfg(all(test, not(any(feature = "loom", feature = "shuttle"))))]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, Sender, channel};

    /// Says that it began, then waits until it is let go on.
    struct Held(u32, Sender<u32>, Arc<Mutex<Receiver<()>>>);

    impl Job for Held {
        fn run(self, _scratch: &mut Scratch) {
            self.1.send(self.0).expect("the test waits");
            let go_on = self.2.lock().recv();
            assert!(go_on.is_ok(), "the test lets everybody go on");
        }

        fn refuse(self, error: &io::Error) {
            panic!("{error}");
        }
    }

    #[test]
    fn who_gives_much_waits_by_himself() {
        let (begun, begins) = channel();
        let (let_go, go_on) = channel();
        let go_on = Arc::new(Mutex::new(go_on));
        let crew = Crew::new("crew", 1);
        let submit = |from, n| crew.submit(from, Held(n, begun.clone(), Arc::clone(&go_on)));
        submit(1, 10);
        assert_eq!(begins.recv(), Ok(10));
        for n in 11..20 {
            submit(1, n);
        }
        submit(2, 50);
        submit(2, 51);
        assert_eq!(
            crew.shared.state.lock().threads,
            1,
            "no more than there may be"
        );
        for expected in [11, 50, 12, 51, 13, 14, 15, 16, 17, 18, 19] {
            let_go.send(()).expect("a thread waits");
            assert_eq!(begins.recv(), Ok(expected));
        }
        let_go.send(()).expect("the last one waits");
    }

    #[test]
    fn threads_are_made_while_jobs_wait_and_used_again() {
        let (begun, begins) = channel();
        let (let_go, go_on) = channel();
        let go_on = Arc::new(Mutex::new(go_on));
        let crew = Crew::new("crew", 3);
        let submit = |n| crew.submit(0, Held(n, begun.clone(), Arc::clone(&go_on)));
        (0..2).for_each(submit);
        let mut seen: Vec<_> = begins.iter().take(2).collect();
        seen.sort_unstable();
        assert_eq!(seen, [0, 1], "each has a thread");
        for _ in 0..2 {
            let_go.send(()).expect("a thread waits");
        }
        while crew.shared.state.lock().idle < 2 {
            std::thread::yield_now();
        }
        submit(2);
        assert_eq!(begins.recv(), Ok(2));
        assert_eq!(crew.shared.state.lock().threads, 2, "an idle one took it");
        let_go.send(()).expect("a thread waits");
        let shared = Arc::clone(&crew.shared);
        drop(crew);
        while shared.state.lock().threads > 0 {
            std::thread::yield_now();
        }
    }
}
