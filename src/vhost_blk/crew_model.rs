//! A model of what a worker, a crew of one thread, and a disk do to one another: writes and zeroes of
//! parts of blocks in one cluster, each of which needs a copy. In no order may they wait for one
//! another for ever; and the shape that this once had, in which zeroing was itself a job that waited
//! for copies, is seen to.

use std::io;
use std::task::{Wake, Waker};

use shuttle::scheduler::RandomScheduler;
use shuttle::{Config, MaxSteps, Runner};

use super::crew::{Crew, Job, Scratch};
use crate::cowdisk::{CopyJob, Disk, Pass, Step, WritePlan, modelled};
use crate::sync::{Arc, Condvar, Mutex};

const SECTOR: u64 = 512;

/// What is done to a worker from outside.
#[derive(Debug, Default)]
struct Inbox {
    /// Requests whose job is over; `None` to try again what was busy.
    mail: Mutex<Vec<Option<usize>>>,
    changed: Condvar,
}

impl Inbox {
    fn post(&self, mail: Option<usize>) {
        self.mail.lock().push(mail);
        self.changed.notify_one();
    }

    fn wait(&self) -> Vec<Option<usize>> {
        let mut mail = self.mail.lock();
        while mail.is_empty() {
            self.changed.wait(&mut mail);
        }
        std::mem::take(&mut mail)
    }
}

impl Wake for Inbox {
    fn wake(self: Arc<Self>) {
        self.post(None);
    }
}

enum Work {
    Copy(Disk, CopyJob),
    /// As it was: waits for the cluster, whoever has it.
    ZeroBlocking(Disk, u64),
}

struct Errand(Work, usize, Arc<Inbox>);

impl Job for Errand {
    fn run(self, _scratch: &mut Scratch) {
        match self.0 {
            Work::Copy(disk, job) => disk.run_copy(job).expect("copies"),
            Work::ZeroBlocking(disk, at) => {
                disk.write_zeroes(at, SECTOR, false).expect("zeroes");
            }
        }
        self.2.post(Some(self.1));
    }

    fn refuse(self, error: &io::Error) {
        panic!("{error}");
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Shape {
    /// Zeroing is planned, and its copies are jobs.
    Steps,
    /// Zeroing is a job.
    Blocking,
}

struct Worker {
    shape: Shape,
    disk: Disk,
    crew: Crew<Errand>,
    inbox: Arc<Inbox>,
    /// Of each request that is not done, its pass while a copy is run.
    passes: Vec<Option<Pass>>,
    is_done: Vec<bool>,
    busy: Vec<usize>,
}

impl Worker {
    /// Request `n`: sector `n` of the cluster, zeroed if `n` is even, written if not.
    fn go_on(&mut self, n: usize) {
        let at = u64::try_from(n).expect("few") * 2 * SECTOR + SECTOR;
        let is_zero = n % 2 == 0;
        if is_zero && self.shape == Shape::Blocking {
            let work = Work::ZeroBlocking(self.disk.clone(), at);
            self.crew
                .submit(n, Errand(work, n, Arc::clone(&self.inbox)));
            return;
        }
        let waker = Waker::from(Arc::clone(&self.inbox));
        let pass = self.passes[n].take().or_else(|| self.disk.enter(0, &waker));
        let mut pass = pass.expect("nobody drains the disk");
        let mut plan = WritePlan::default();
        let planned = if is_zero {
            let planned = self
                .disk
                .plan_zeroes(&pass, at, SECTOR, false, &mut plan, &waker);
            planned.map(|planned| planned.step)
        } else {
            self.disk.plan_write(&pass, at, 512, &mut plan, &waker)
        };
        match planned.expect("a legal request") {
            Step::Ready => {
                let value = if is_zero { 0 } else { 9 };
                for segment in plan.segments() {
                    let written = self
                        .disk
                        .pool()
                        .storage()
                        .write_at(&[value; 512], segment.to);
                    written.expect("writes");
                }
                self.disk.complete_write(&mut plan, true);
                self.is_done[n] = true;
            }
            Step::Copy(job) => {
                pass.pause();
                self.passes[n] = Some(pass);
                let work = Work::Copy(self.disk.clone(), job);
                self.crew
                    .submit(n, Errand(work, n, Arc::clone(&self.inbox)));
            }
            Step::Busy => self.busy.push(n),
            step @ (Step::Done | Step::Full) => panic!("{step:?}"),
        }
    }

    fn run(&mut self) {
        (0..self.is_done.len()).for_each(|n| self.go_on(n));
        while self.is_done.contains(&false) {
            for mail in self.inbox.wait() {
                match mail {
                    None => std::mem::take(&mut self.busy)
                        .into_iter()
                        .for_each(|n| self.go_on(n)),
                    Some(n) => match self.passes[n].as_mut() {
                        Some(pass) => {
                            pass.resume();
                            self.go_on(n);
                        }
                        None => self.is_done[n] = true,
                    },
                }
            }
        }
    }
}

/// One run: two zeroes and two writes of a block each in part, in a cluster that a snapshot shares.
fn meet(shape: Shape) {
    crate::sys::clock::hold_still(Some(1_700_000_000));
    let disk = modelled::shared_disk();
    let mut worker = Worker {
        shape,
        disk: disk.clone(),
        crew: Crew::new("crew", 1),
        inbox: Arc::new(Inbox::default()),
        passes: (0..4).map(|_| None).collect(),
        is_done: vec![false; 4],
        busy: Vec::new(),
    };
    worker.run();
    let mut got = vec![1; 5120];
    disk.read_at(&mut got, 0).expect("reads");
    let sectors: Vec<u8> = got.chunks(512).map(|sector| sector[0]).collect();
    assert_eq!(sectors, [7, 0, 7, 9, 7, 0, 7, 9, 7, 7]);
}

fn explore(shape: Shape, schedules: usize) -> usize {
    let mut config = Config::new();
    config.stack_size = 1 << 18;
    config.max_steps = MaxSteps::FailAfter(1_000_000);
    config.silence_warnings = true;
    let scheduler = RandomScheduler::new_from_seed(20_261_128, schedules);
    Runner::new(scheduler, config).run(move || meet(shape))
}

#[test]
#[expect(clippy::print_stdout, reason = "a run says how much it looked at")]
fn shuttle_a_job_waits_for_no_other() {
    let schedules = explore(Shape::Steps, 500);
    println!("SHUTTLE crew: {schedules} schedules");
}

#[test]
#[should_panic(expected = "deadlock")]
fn shuttle_the_model_finds_jobs_that_wait_for_others() {
    explore(Shape::Blocking, 2000);
}
